"""What the devices of a mesh tell each other while an update is computed on them: every collective of the model's.

Gradients are taken in one `jax.shard_map` over all axes of the mesh: each device's program is the one-device program,
on its rows and its parts of the weights, and calls what stands here. Without a mesh all of it does nothing.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jax_impl.products import Rounded, accumulator, gradient_like, product
from jax_impl.sharding import IN_USE, ROWS, Layout, is_matrix, summed_axis
from recipe.mesh import MeshShape

GATHERING = (jax.lax.all_gather_p, jax.lax.bitcast_convert_type_p)
"""What makes a weight whole: by layer, its results are not kept for the backward pass, which gathers again."""
_HERE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def over_devices(layout: Layout | None, mesh: Any, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """The function as each device runs it, on its parts of the arguments; without a layout the function itself."""
    if layout is None:
        return function

    @functools.wraps(function)
    def on_a_device(*args):
        with _entered(layout):
            return function(*args)

    # JAX's check of what is replicated does not know the gradients that are written by hand below.
    return jax.shard_map(on_a_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@contextlib.contextmanager
def _entered(layout: Layout) -> Iterator[None]:
    token = _HERE.set(layout)
    try:
        yield
    finally:
        _HERE.reset(token)


def here() -> Layout | None:
    """The layout of the devices for which this is traced; None for one device that has all."""
    return _HERE.get()


def is_split(axis: str) -> bool:
    """Whether the mesh divides a logical axis of what is traced."""
    layout = here()
    return layout is not None and layout.is_split(axis)


def index(names: tuple[str, ...]) -> jax.Array | int:
    """This device's place along these mesh axes, those of one device left out."""
    layout = here()
    names = layout.names(names) if layout else ()
    return jax.lax.axis_index(names) if names else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x: jax.Array, axis: str) -> jax.Array:
    """x, which every device has, before products with weights that the mesh divides along `axis`.

    Each device's gradient is that of its own part, and the sum of all goes on.
    """
    return x


def _spread_forward(x, axis):
    return x, None


def _spread_backward(axis, _, cotangent):
    return (total(cotangent.astype(accumulator(cotangent.dtype)), axis).astype(cotangent.dtype),)


spread.defvjp(_spread_forward, _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def total(x: jax.Array, axis: str) -> jax.Array:
    """The sum of what devices have of x, over the mesh axis that divides `axis`; each one's gradient is the sum's."""
    return jax.lax.psum(x, IN_USE[axis]) if is_split(axis) else x


def _total_forward(x, axis):
    return total(x, axis), None


def _total_backward(axis, _, cotangent):
    return (cotangent,)


total.defvjp(_total_forward, _total_backward)


def whole_product(spec: str, x: jax.Array, y: jax.Array | Rounded, dtype) -> jax.Array:
    """`product`, summed in float32 or wider over the devices among which the mesh divides the axis it sums over."""
    if not isinstance(y, Rounded) or not is_split(y.sums):
        return product(spec, x, y, dtype)
    return total(product(spec, x, y, accumulator(x.dtype)), y.sums).astype(dtype)


def greatest(x: jax.Array, axis: str) -> jax.Array:
    """The largest of what devices have of x, over the mesh axis that divides `axis`; it has no gradient."""
    return jax.lax.pmax(x, IN_USE[axis]) if is_split(axis) else x


def first(axis: str, here_of_it: int) -> jax.Array | int:
    """Index, in the whole of a logical axis, of the first element that is here, of so many."""
    return index((IN_USE[axis],)) * here_of_it if is_split(axis) else 0


def first_row(rows_here: int) -> jax.Array | int:
    """Index, in the whole micro-batch, of the first row that is here, of so many."""
    return index(ROWS) * rows_here


def head_offsets(B: int, N: int) -> tuple[jax.Array | int, int]:
    """Number row * heads + head, in the whole micro-batch, of the first head of the first row that is here, of B rows
    with N heads each; and how many heads of each row are not here."""
    layout = here()
    heads = N * layout.ways((IN_USE["heads"],)) if layout and layout.is_split("heads") else N
    return first_row(B) * heads + first("heads", N), heads - N


def head_numbers(B: int, N: int) -> jax.Array:
    """The number row * heads + head, in the whole micro-batch, of each head of each row that is here, (B * N,)."""
    begin, skipped = head_offsets(B, N)
    if here() is None:
        return jnp.arange(B * N)
    return (begin + (N + skipped) * jnp.arange(B)[:, None] + jnp.arange(N)).reshape(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table(Rounded):
    """A table (vocabulary, D) of which the mesh may divide the vocabulary."""

    def __getitem__(self, index):
        """As a Flax variable asks for its value, itself; rows of the whole vocabulary, in the copy's dtype."""
        if index is ...:
            return self
        return total(_lookup(self, index - first("vocab", self.shape[0])), "vocab")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AtRest:
    """A device's part of a parameter and its copy in the compute dtype, both gathered at each use; its gradient is
    scattered there."""

    parameter: jax.Array
    copy: jax.Array
    axis: int = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index) -> Rounded:
        """The whole, as a Flax variable asks for its value."""
        assert index is ..., "a part of a parameter is not indexed, but gathered"
        # Nobody reads the whole parameter, so that XLA gathers the copy alone; its gradient is the scattered sum.
        parameter = jax.lax.all_gather(self.parameter, "fsdp", axis=self.axis, tiled=True)
        return _whole(self.path, parameter, _all_gather(self.copy, self.axis))


def _all_gather(x: jax.Array, axis: int) -> jax.Array:
    """Along fsdp; as bits, because XLA:CPU widens bfloat16 to float32 before it sends it."""
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.all_gather(bits, "fsdp", axis=axis, tiled=True)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def in_use(params: Mapping[str, jax.Array], dtype, often: bool) -> tuple[Mapping[str, jax.Array], dict[str, jax.Array]]:
    """What gradients are taken of, and copies of matrices in the compute dtype; of stacks of layers' too (`scan.py`).

    One device has copies where they are rounded once to be used `often`, in several micro-batches or in a loop over
    layers. On a mesh there is one of each matrix, whole if `gather` is update, and then what stands for the parameter
    is never read.
    """
    layout = here()
    if layout is None:
        narrower = {path: x for path, x in params.items() if is_matrix(path) and x.dtype != dtype and often}
        return params, {path: x.astype(dtype) for path, x in narrower.items()}
    variables, copies = dict(params), {}
    for path, x in params.items():
        if not is_matrix(path):
            continue
        copies[path], axis = x.astype(dtype), layout.gathered_axis(path)
        if axis is not None and layout.gather == "update":
            copies[path] = _all_gather(copies[path], axis + x.ndim - 2)
            variables[path] = jnp.zeros(copies[path].shape, x.dtype)
    return variables, copies


def hold(path: str, parameter: jax.Array, copy: jax.Array) -> Rounded | AtRest:
    """A matrix as the model has it: with its copy, which is gathered at each use if `in_use` has not done that."""
    layout = here()
    axis = layout.gathered_axis(path) if layout and layout.gather == "layer" else None
    return _whole(path, parameter, copy) if axis is None else AtRest(parameter, copy, axis, path)


def _whole(path: str, parameter: jax.Array, copy: jax.Array) -> Rounded:
    kind = Rounded if path.endswith(".kernel") or here() is None else Table
    return kind(parameter, copy, summed_axis(path))


def in_turn(copies: dict[str, jax.Array], micro_batch: Any) -> dict[str, jax.Array]:
    """The copies of `in_use` for one micro-batch: else XLA would gather before the first what all of them use."""
    layout = here()
    if layout is None or layout.gather == "update":
        return copies
    return jax.lax.optimization_barrier((copies, micro_batch))[0]


def checkpoint(call: Callable, remat: bool, prevent_cse: bool = True) -> Callable:
    """A layer as it is differentiated: activations computed again if `remat`, weights gathered again if by layer."""
    layout = here()
    if remat:
        return jax.checkpoint(call, prevent_cse=prevent_cse)
    if layout is None or layout.gather == "update":
        return call
    return jax.checkpoint(call, prevent_cse=prevent_cse, policy=lambda primitive, *_, **__: primitive not in GATHERING)


@jax.custom_vjp
def _lookup(table_VD, tokens):
    """Rows of what is here, zero for other tokens; the gradient is summed in the table's own dtype."""
    inside = (tokens >= 0) & (tokens < table_VD.shape[0])
    rows = table_VD.copy[jnp.where(inside, tokens, 0)]
    return jnp.where(inside[..., None], rows, jnp.zeros_like(rows))


def _lookup_forward(table_VD, tokens):
    return _lookup(table_VD, tokens), (table_VD, tokens)


def _lookup_backward(residuals, cotangent):
    table_VD, tokens = residuals
    # A negative place would count from the end; one beyond the end is dropped.
    places = jnp.where(tokens < 0, table_VD.shape[0], tokens)
    grad = jnp.zeros(table_VD.shape, table_VD.dtype).at[places].add(cotangent.astype(table_VD.dtype), mode="drop")
    return gradient_like(table_VD, grad), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def reduced(loss: jax.Array, grads: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over all rows of what each device has as the mean over its own: the loss, and the part of each gradient
    that is kept here.
    """
    layout = here()
    if layout is None:
        return loss, dict(grads)
    rows, done = layout.names(ROWS), {}
    small: dict[tuple, list[str]] = {}
    for path, grad in grads.items():
        axis, names = layout.gathered_axis(path), layout.summed_over(path)
        if not is_matrix(path):  # together, or each would be a collective of its own
            small.setdefault((names, grad.dtype), []).append(path)
            continue
        if axis is not None and layout.gather == "update":
            grad = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis + grad.ndim - 2, tiled=True)
        done[path] = jax.lax.psum(grad, names) if names else grad
    for (names, _), paths in small.items():
        flat = jnp.concatenate([grads[path].reshape(-1) for path in paths])
        flat = jax.lax.psum(flat, names) if names else flat
        ends = np.cumsum([grads[path].size for path in paths])
        for path, part in zip(paths, jnp.split(flat, ends[:-1]), strict=True):
            done[path] = part.reshape(grads[path].shape)
    loss = jax.lax.psum(loss, rows) if rows else loss
    count = layout.ways(rows)
    return loss / count, {path: done[path] / count for path in grads}


def sums_over_rows(sums: Any, divided: bool) -> Any:
    """The sums of all rows, of which each device has summed its own, if they were divided."""
    names = here().names(ROWS) if divided else ()  # type: ignore[union-attr]
    return jax.lax.psum(sums, names) if names else sums


def norm(layout: Layout, mesh: Any, grads: Mapping[str, jax.Array]) -> jax.Array:
    """The Euclidean norm of all gradients, by one sum over the devices."""

    def squares(parts):
        each = [jnp.sum(x * x) / layout.ways(layout.replicas(path)) for path, x in parts.items()]
        names = layout.names(MeshShape._fields)
        return jax.lax.psum(sum(each), names) if names else sum(each)

    specs = ({path: layout.spec(path) for path in grads},)
    return jnp.sqrt(over_devices(layout, mesh, squares, specs, PartitionSpec())(dict(grads)))
