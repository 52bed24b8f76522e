"""Which machine this is and what is fast on it: the only place that asks JAX for its backend.

The order of work may depend on the record of a machine. Results do not: dtypes and roundings come from the
configuration.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Machine:
    """How work is cut and laid out on one kind of device; docs/log.md and docs/performance.md have the measurements."""

    platform: str
    """JAX's name: cpu, gpu, tpu."""
    tokens_at_once: int
    """Tokens whose logits the loss holds: as few as caches and memory like, but no fewer than pay for the sum. Adding a
    chunk's gradient of the head to the sum moves 12 V D bytes; a chunk of n tokens takes 6 V D n FLOPs. At F FLOP/s and
    B bytes/s the sum is a tenth of that for n = 20 F/B: some 200 tokens on a CPU, 2,400 on an H100."""
    scores_at_once: int | None
    """Scores that attention has in work; None takes all. 2^20 in float32 are 4 MiB, which two cores' caches hold."""
    batched_matrices: bool
    """Whether Newton-Schulz multiplies stacked matrices faster; on a CPU it does not, and a stack is one more copy."""
    lays_out_products: bool
    """Whether 16-bit products are fast in one layout alone and with a float32 result. XLA's CPU backend has bfloat16
    kernels for that case; all else it converts to float32 first, three to five times as slow (docs/log.md)."""
    holds_wide: bool
    """Whether generation keeps its rounded weights and cache in float32. XLA's CPU backend has no fast product of a
    bfloat16 matrix and a vector: 40 times slower than in float32 on a machine without bfloat16 units."""
    cudnn: bool
    """Whether cuDNN's attention can be had."""
    loss_kernel_up_to: int
    """Hidden size up to which the loss in a 16-bit dtype is `loss_kernel`'s; 0: never. The kernel makes every logit a
    second time, 2 D FLOPs, and spares writing it in float32 and reading that twice, 12 bytes: at F FLOP/s and B bytes/s
    this pays up to D = 6 F/B, 1,000 on an H100 (500e12, 3e12), for which its tiles are cut."""
    reduces_pairs: bool
    """Whether XLA reduces two arrays by one function as fast as one; on a GPU it does, and a pass is what counts."""
    interprets_kernels: bool
    """Whether Pallas kernels run as plain JAX, tile by tile: the only way on a CPU, and fit for tests alone."""
    attention_kernel: bool
    """Whether `attention_kernel.py` compiles: attention with dropout, which cuDNN's lacks."""
    compiler_options: tuple[tuple[str, str | int], ...]
    """Options of XLA's for a training step. XLA:CPU's default runs whatever is ready, all layers' recomputation at
    once; the order named here keeps little in memory."""
    recomputes_apart: bool
    """Whether barriers keep what is computed again apart from the forward pass. Without them XLA:CPU keeps values, 11 %
    more temporaries in the seed's update; XLA's GPU fusions compute again by themselves, and a barrier between two of
    them is one more pass over memory."""
    deterministic_options: tuple[tuple[str, str | int], ...]
    """Options without which a training step on this machine may give other bits from equal inputs."""


CPU = Machine(
    platform="cpu",
    tokens_at_once=256,
    scores_at_once=2**20,
    batched_matrices=False,
    lays_out_products=True,
    holds_wide=True,
    cudnn=False,
    loss_kernel_up_to=0,
    reduces_pairs=False,
    interprets_kernels=True,
    attention_kernel=False,
    compiler_options=(("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"),),
    recomputes_apart=True,
    deterministic_options=(),
)
GPU = Machine(
    platform="gpu",
    tokens_at_once=2048,
    scores_at_once=None,
    batched_matrices=True,
    lays_out_products=False,
    holds_wide=False,
    cudnn=True,
    loss_kernel_up_to=1000,
    attention_kernel=True,
    reduces_pairs=True,
    interprets_kernels=False,
    # XLA would join gate with up and q with k and v, then copy slices out and concatenate their gradients.
    compiler_options=(("xla_gpu_dot_merger_threshold_mb", 0),),
    recomputes_apart=False,
    deterministic_options=(("xla_gpu_exclude_nondeterministic_ops", True),),
)
MACHINES = {"cpu": CPU, "gpu": GPU}
HOPPER = "9.0"
"""The compute capability that kernels of our own have been compiled for."""
_NO_KERNELS: dict[str, Any] = {"loss_kernel_up_to": 0, "attention_kernel": False}
_NOT_NVIDIA: dict[str, Any] = _NO_KERNELS | {"cudnn": False, "compiler_options": (), "deterministic_options": ()}


def machine() -> Machine:
    """The record of the device that arrays are on: that of `on_device_of` or `jax.default_device`, else the process's.

    A platform without a record of its own is an accelerator without what only NVIDIA's have, and a GPU of another
    generation than kernels of our own were compiled for does without them.
    """
    device = jax.config.jax_default_device
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    record = MACHINES.get(platform, dataclasses.replace(GPU, platform=platform, **_NOT_NVIDIA))
    known = getattr(jax.devices()[0] if device is None else device, "compute_capability", HOPPER) == HOPPER
    return record if known else dataclasses.replace(record, **_NO_KERNELS)


def has_room(nbytes: int) -> bool:
    """Whether so many bytes fit on the device beside the most that has been in use at once; True if it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    used, limit = stats.get("peak_bytes_in_use", 0), stats.get("bytes_limit")
    return limit is None or used + nbytes <= limit


def recomputed(static_argnums: tuple[int, ...] = ()) -> Callable[[Function], Function]:
    """Decorator: the function keeps its arguments alone for the backward pass and is computed again there."""

    def decorate(function):
        @functools.wraps(function)
        def call(*args):
            apart = machine().recomputes_apart
            return jax.checkpoint(function, prevent_cse=apart, static_argnums=static_argnums)(*args)

        return call

    return decorate


@contextlib.contextmanager
def on_device_of(*trees) -> Iterator[None]:
    """Context in which `machine` is that of the first JAX array among the leaves; what is traced inside is for it."""
    arrays = (leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array) and not _is_traced(leaf))
    device = next((min(array.devices(), key=lambda device: device.id) for array in arrays), None)
    elsewhere = device is not None and device.platform != machine().platform
    with jax.default_device(device) if elsewhere else contextlib.nullcontext():
        yield


def _is_traced(leaf: jax.Array) -> bool:
    return isinstance(leaf, jax.core.Tracer)
