"""Which machine this is and what is fast on it: the only place that asks JAX for its backend.

The order of work may depend on the record of a machine. Results do not: dtypes and roundings come from the
configuration.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax


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
    attention_kernel: bool
    """Whether `attention_kernel.py` compiles: attention with dropout, which cuDNN's lacks."""
    compiler_options: tuple[tuple[str, str], ...]
    """Options of XLA's for a training step. XLA:CPU's default runs whatever is ready, all layers' recomputation at
    once; the order named here keeps little in memory."""


CPU = Machine(
    platform="cpu",
    tokens_at_once=256,
    scores_at_once=2**20,
    batched_matrices=False,
    lays_out_products=True,
    holds_wide=True,
    cudnn=False,
    attention_kernel=False,
    compiler_options=(("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"),),
)
GPU = Machine(
    platform="gpu",
    tokens_at_once=4096,
    scores_at_once=None,
    batched_matrices=True,
    lays_out_products=False,
    holds_wide=False,
    cudnn=True,
    attention_kernel=True,
    compiler_options=(),
)
MACHINES = {"cpu": CPU, "gpu": GPU}


def machine() -> Machine:
    """The record of the device that arrays are on: that of `on_device_of` or `jax.default_device`, else the process's.

    A platform without a record of its own is an accelerator without NVIDIA's kernels.
    """
    device = jax.config.jax_default_device
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    other = dataclasses.replace(GPU, platform=platform, cudnn=False, attention_kernel=False)
    return MACHINES.get(platform, other)


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
