"""What every device sends in an update on a mesh, on paper: the formula that the compiled programs are held against.

A ring of g devices is assumed: all-gather and all-to-all send (g-1)/g of the whole, a reduce-scatter as much, an
all-reduce twice that. With P the elements that fsdp divides (of what tensor leaves here), A micro-batches of M tokens
here, L layers and D the model's width:

    weights      P, all-gather over fsdp, in the compute dtype: once; by layer A times forward and A times backward
    gradients    P, reduce-scatter over fsdp, in the parameters' dtype: once; by layer A times. Then what is left of
                 them, all-reduce over data, and all of what is whole everywhere over data and fsdp: once
    activations  M D, all-reduce over tensor, in float32 or wider: A L times four, of attention and feed-forward layer,
                 forward and backward; and once for each embedding and each chunk of the loss
    muon         every matrix twice, all-to-all over fsdp and tensor, and once all-gather over data (`muon/sharded.py`)

A tied table is gathered, and its gradient scattered, once for the embedding and once for the head.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from jax_impl.backend import machine
from jax_impl.hybrid import qwen_matrices
from jax_impl.muon.sharded import collective_bytes
from jax_impl.products import accumulator
from jax_impl.sharding import ROWS, Layout, layout_of
from jax_impl.weights import param_paths
from recipe.config import RunConfig
from recipe.mesh import MeshShape
from recipe.params import param_specs


class Sent(NamedTuple):
    """One kind of collective of an update."""

    part: str
    """weights, gradients, activations, loss, norm or muon."""
    kind: str
    """As XLA calls it, such as all-gather."""
    axes: tuple[str, ...]
    """Mesh axes whose devices take part."""
    dtype: str
    bytes: int
    """That leave each device, of one such collective."""
    times: int
    """How often it runs in an update."""


def sent(config: RunConfig, *, tokens_at_once: int | None = None) -> list[Sent]:
    """All collectives of an update of this run, one entry for each array or group that travels; nothing without a mesh.

    tokens_at_once: how many tokens of the loss are a chunk; None is this machine's number.
    """
    layout = layout_of(config)
    if layout is None:
        return []
    return [
        *_of_parameters(config, layout),
        *_of_activations(config, layout, tokens_at_once),
        *_of_muon(config, layout),
    ]


def _of_parameters(config: RunConfig, layout: Layout) -> list[Sent]:
    """Weights and gradients, the loss and the gradients' norm."""
    specs, model, A = param_specs(config.model), config.model, config.accumulation
    params, compute = config.precision.params, config.precision.compute
    found, small = [], dict[tuple[str, ...], int]()
    for path, name in param_paths(model).items():
        shape, axis, names = specs[name].shape, layout.gathered_axis(path), layout.summed_over(path)
        here = math.prod(shape) // layout.ways(tuple(x for x in layout.spec(path) if x not in (None, "fsdp")))
        if len(shape) < 2:
            small[names] = small.get(names, 0) + here
            continue
        # A layer's weights again in the backward pass; what a tied table is for, twice in the forward pass.
        uses = 1 + (path.endswith(".kernel") or (model.tie_word_embeddings and specs[name].role == "embedding"))
        grads = uses if specs[name].role == "embedding" else 1
        by_layer = layout.gather == "layer"
        if axis is not None:
            ring = _ring(layout, ("fsdp",), here)
            found.append(Sent("weights", "all-gather", ("fsdp",), compute, ring(compute), A * uses if by_layer else 1))
            times = A * grads if by_layer else 1
            found.append(Sent("gradients", "reduce-scatter", ("fsdp",), params, ring(params), times))
            here //= layout.shape.fsdp
        if names:
            found.append(Sent("gradients", "all-reduce", names, params, 2 * _ring(layout, names, here)(params), 1))
    for names, count in small.items():
        if names:
            found.append(Sent("gradients", "all-reduce", names, params, 2 * _ring(layout, names, count)(params), 1))
    rows, everywhere, wide = layout.names(ROWS), layout.names(MeshShape._fields), accumulator(compute).name
    found += [Sent("loss", "all-reduce", rows, wide, 2 * _ring(layout, rows, 1)(wide), 1)] * bool(rows)
    return found + [Sent("norm", "all-reduce", everywhere, params, 2 * _ring(layout, everywhere, 1)(params), 1)] * bool(
        everywhere
    )


def _of_activations(config: RunConfig, layout: Layout, tokens_at_once: int | None) -> list[Sent]:
    """What tensor parallelism sums."""
    model, A, L = config.model, config.accumulation, config.model.num_hidden_layers
    M = config.batch_size // layout.shape.rows * config.sequence_length
    compute, wide = config.precision.compute, accumulator(config.precision.compute).name
    found = []

    def summed(part: str, elements: int, dtype: str, times: int) -> None:
        of_one = 2 * _ring(layout, ("tensor",), elements)(dtype)
        found.append(Sent(part, "all-reduce", ("tensor",), dtype, of_one, times))

    if layout.is_split("heads"):  # the sum of o_proj, again where activations are computed again, and of gradients of x
        summed("activations", M * model.hidden_size, wide, A * L * (2 + config.precision.remat))
    if layout.is_split("ffn"):
        summed("activations", M * model.hidden_size, wide, A * L * 2)
    if layout.is_split("vocab"):
        summed("activations", M * model.hidden_size, compute, A)
        chunks = math.ceil(M / (tokens_at_once or machine().tokens_at_once))
        rows = math.ceil(M / chunks)
        summed("activations", rows * model.hidden_size, wide, A * chunks)
        summed("loss", rows, wide, A * chunks)  # the peak
        summed("loss", 2 * rows, wide, A * chunks)  # the sum of exponentials, and the target's logit
    return found


def _of_muon(config: RunConfig, layout: Layout) -> list[Sent]:
    """The exchange of whole matrices."""
    mesh, specs = AbstractMesh(tuple(layout.shape), MeshShape._fields), param_specs(config.model)
    leaves, matrices, shardings = [], [], []
    for path, name in param_paths(config.model).items():
        leaf = jax.ShapeDtypeStruct(specs[name].shape[::-1], config.precision.params)
        if matrix := qwen_matrices(path, leaf, model=config.model):
            leaves.append(leaf)
            matrices.append(matrix)
            shardings.append(NamedSharding(mesh, layout.spec(path)))
    of_muon = collective_bytes(leaves, matrices, shardings, config.precision.newton_schulz)
    return [Sent("muon", one.kind, one.axes, one.dtype.name, one.sent, 1) for one in of_muon]


def _ring(layout: Layout, names: tuple[str, ...], elements: int) -> Callable[[str], int]:
    """Bytes that leave a device when a ring along these axes passes so many elements round once, by their dtype."""
    ways = layout.ways(names)
    return lambda dtype: elements * jnp.dtype(dtype).itemsize * (ways - 1) // ways
