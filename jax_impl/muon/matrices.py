"""Which leaves of a tree of parameters are matrices, and along which of their axes.

One function `(path, leaf) -> Matrix | None` decides everything: who is Muon's, what is laid out as a matrix, its fan
ratio, where NorMuon's neurons are, and what `explain` prints. `path` has the names from the root, joined by "/".
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Matrix(NamedTuple):
    """The axes of a leaf that are one matrix's inputs and outputs; all others count matrices (layers, experts)."""

    fan_in: tuple[int, ...] = (-2,)
    fan_out: tuple[int, ...] = (-1,)


Matrices = Callable[[str, Any], Matrix | None]
"""Path and leaf to the matrix it is, or None for a leaf that is none (a bias, a scale, an embedding)."""

FULLY_CONNECTED = Matrix()
"""(fan_in, fan_out): the kernel of Flax's Dense and Linear."""
OUT_IN = Matrix((-1,), (-2,))
"""(fan_out, fan_in): the weight of Equinox's Linear, and torch's."""
TO_HEADS = Matrix((-3,), (-2, -1))
"""(fan_in, heads, head_dim): query, key and value of Flax's attention."""
FROM_HEADS = Matrix((-3, -2), (-1,))
"""(heads, head_dim, fan_out): the projection out of Flax's attention."""

_TO_HEADS = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
_FROM_HEADS = ("out", "o_proj", "out_proj")


def two_axes(path: str, leaf: Any) -> Matrix | None:
    """The rule where none is given: a leaf of two axes is (fan_in, fan_out), and every other leaf is no matrix."""
    return FULLY_CONNECTED if jnp.ndim(leaf) == 2 else None


def flax_matrices(
    path: str,
    leaf: Any,
    *,
    stacked: int | Mapping[str, int] = 0,
    named: Mapping[str, Matrix | None] | None = None,
) -> Matrix | None:
    """The rule for parameters of Flax, Linen and NNX: kernels are matrices; biases, scales and embeddings are not.

    A kernel of two axes is (fan_in, fan_out); under query, key, value (or q_proj, ...) one of three is (fan_in, heads,
    head_dim), under out (o_proj) (heads, head_dim, fan_out); in a module with "conv" in its name, or in a list of that
    name, a kernel is a convolution's (..., fan_in, fan_out), whose inputs are all but the last axis. Other kernels
    raise a ValueError: a stack of layers has as many axes as a convolution, so that theirs cannot be told.

    stacked: leading axes that count layers, as `nn.scan`, `nn.vmap` and `nnx.vmap` make them; a mapping says it for
        the paths that begin with a name or contain it, {"layers": 1}, the longest that fits, and 0 for the rest.
    named: what certain leaves are, by the end of their path: {"head/kernel": None, "mixer/kernel": Matrix((0,), (1,))}.
    """
    names = path.split("/")
    if (found := _named(path, named)) is not _UNKNOWN:
        return found
    if names[-1] != "kernel" or "lm_head" in names:
        return None
    axes = jnp.ndim(leaf) - _stacked(path, stacked)
    parent = names[-2] if len(names) > 1 else ""
    if axes == 2:
        return FULLY_CONNECTED
    if axes == 3 and parent in _TO_HEADS:
        return TO_HEADS
    if axes == 3 and parent in _FROM_HEADS:
        return FROM_HEADS
    convolution = Matrix(tuple(range(-axes, -1)), (-1,))
    if axes >= 3 and _is_convolution(names):
        return convolution
    raise _unclear(path, leaf, axes, "flax_matrices", convolution)


def equinox_matrices(
    path: str,
    leaf: Any,
    *,
    stacked: int | Mapping[str, int] = 0,
    named: Mapping[str, Matrix | None] | None = None,
) -> Matrix | None:
    """The rule for Equinox, and for torch's layout in general: a weight is (fan_out, fan_in, ...).

    In a module with "conv" in its name, or in a list of that name, what follows the second axis is a convolution's
    window and belongs to the inputs; other weights of more than two axes raise a ValueError, since a stack of layers
    looks the same. Biases, leaves of one axis and whatever has "embed" or "norm" in its path, or "lm_head", are no
    matrices; an embedding by another name looks like any Linear: say named={"tokens/weight": None}. `stacked` and
    `named` are as in `flax_matrices`.
    """
    if (found := _named(path, named)) is not _UNKNOWN:
        return found
    names, axes = path.split("/"), jnp.ndim(leaf) - _stacked(path, stacked)
    apart = any(word in name.lower() for name in names for word in ("embed", "norm", "lm_head"))
    if names[-1] != "weight" or apart or axes < 2:
        return None
    convolution = Matrix(tuple(range(1 - axes, 0)), (-axes,))
    if axes == 2 or _is_convolution(names):
        return convolution
    raise _unclear(path, leaf, axes, "equinox_matrices", convolution)


_around: contextvars.ContextVar[Matrices] = contextvars.ContextVar("matrices", default=two_axes)
"""The rule of what has been given none."""


@contextlib.contextmanager
def by_default(matrices: Matrices) -> Iterator[None]:
    """Context in which transformations that were given no rule take this one; what is traced inside keeps it."""
    token = _around.set(matrices)
    try:
        yield
    finally:
        _around.reset(token)


_UNKNOWN: Any = object()


def _named(path: str, named: Mapping[str, Matrix | None] | None) -> Matrix | None:
    """What `named` says of this path, by whole names at its end."""
    ends = [end for end in named or () if f"/{path}".endswith(f"/{end}")]
    return named[max(ends, key=len)] if named and ends else _UNKNOWN


def _stacked(path: str, stacked: int | Mapping[str, int]) -> int:
    """Leading axes of this leaf that count layers."""
    if not isinstance(stacked, Mapping):
        return stacked
    parts = [name for name in stacked if f"/{name}/" in f"/{path}/"]
    return stacked[max(parts, key=len)] if parts else 0


def _is_convolution(names: list[str]) -> bool:
    """Whether the module that has this leaf is named a convolution; what a list counts is no name."""
    return "conv" in next((name for name in reversed(names[:-1]) if not name.isdecimal()), "").lower()


def _unclear(path: str, leaf: Any, axes: int, rule: str, convolution: Matrix) -> ValueError:
    start = f"{path} {jnp.shape(leaf)} has {axes} axes besides those that count layers"
    if axes < 2:
        return ValueError(
            f'{start}: say of which paths some do, stacked={{"layers": 1}}, or that it is no matrix, '
            f'named={{"{path}": None}}.'
        )
    return ValueError(
        f'{start}, and {rule} cannot tell inputs from outputs: pass stacked=1 (or {{"layers": 1}}) if one more does, '
        f'or named={{"{path}": Matrix(fan_in, fan_out)}}, with Matrix{tuple(convolution)} if it is a convolution\'s.'
    )


def path_of(keys: tuple) -> str:
    """The names of a path of JAX's, joined by "/"; the `value` inside each of NNX's variables is left out.

    So is a leaf's own name in a dataclass, if that is `value`: JAX's paths do not tell the two apart.
    """
    names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
    is_variable = len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value")
    return "/".join(names[:-1] if is_variable else names)


def map_matrices(function: Callable[..., Any], matrices: Matrices | None, tree: Any, *rest: Any) -> Any:
    """`function(leaf, its Matrix, ...)` over a tree and others of its structure; ValueError for a leaf that is none."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf, *others: function(leaf, matrix_of(path_of(keys), leaf, matrices), *others), tree, *rest
    )


def matrix_of(path: str, leaf: Any, matrices: Matrices | None) -> Matrix:
    """The leaf's matrix, with axes counted from the end; ValueError, by path and shape, for what Muon cannot take."""
    rule = matrices or _around.get()
    matrix, shape, name = rule(path, leaf), jnp.shape(leaf), getattr(rule, "__name__", "the given rule")
    if isinstance(rule, functools.partial):
        name = getattr(rule.func, "__name__", name)
    if matrix is None:
        raise ValueError(
            f"{path} {shape} is no matrix by {name}: give it to another optimizer (muon_or), or pass matrices=, a "
            f"function of path and leaf that says which axes are inputs and outputs (flax_matrices, equinox_matrices)."
        )
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{path} {shape} is {dtype}, and Muon takes real floating numbers: give it to another optimizer."
        )
    if not (isinstance(matrix, Matrix) and all(isinstance(axes, tuple | list) for axes in matrix)):
        raise ValueError(f"{path} {shape} is {matrix!r} by {name}: return e.g. Matrix((-2,), (-1,)), or None.")
    axes = [*matrix.fan_in, *matrix.fan_out]
    counted = [axis if axis < 0 else axis - len(shape) for axis in axes]
    if (
        not (matrix.fan_in and matrix.fan_out)
        or len(set(counted)) < len(axes)
        or min(counted) < -len(shape)
        or max(counted) >= 0
    ):
        raise ValueError(f"{path} {shape} cannot be {matrix}: each side needs axes of its own, of {len(shape)}.")
    return Matrix(tuple(counted[: len(matrix.fan_in)]), tuple(counted[len(matrix.fan_in) :]))


def fans(shape: tuple[int, ...], matrix: Matrix) -> tuple[int, int]:
    """(fan_in, fan_out) of each matrix of a leaf."""
    fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in matrix)
    return fan_in, fan_out


def _order(ndim: int, matrix: Matrix) -> tuple[int, ...]:
    """All axes of a leaf: those that count matrices, then the outputs', then the inputs'."""
    counting = [axis for axis in range(-ndim, 0) if axis not in matrix.fan_in + matrix.fan_out]
    return (*counting, *matrix.fan_out, *matrix.fan_in)


def as_stack(leaf: jax.Array, matrix: Matrix) -> jax.Array:
    """The leaf as (count, fan_out, fan_in), or as one (fan_out, fan_in) if no axis counts matrices."""
    fan_in, fan_out = fans(leaf.shape, matrix)
    count = () if len(matrix.fan_in + matrix.fan_out) == leaf.ndim else (leaf.size // max(fan_in * fan_out, 1),)
    return leaf.transpose(_order(leaf.ndim, matrix)).reshape(*count, fan_out, fan_in)


def from_stack(stack: jax.Array, matrix: Matrix, shape: tuple[int, ...]) -> jax.Array:
    """Inverse of `as_stack` for a leaf of this shape."""
    order = _order(len(shape), matrix)
    places = [order.index(axis) for axis in range(-len(shape), 0)]
    return stack.reshape([shape[axis] for axis in order]).transpose(places)


def explain(params: Any, matrices: Matrices | None = None) -> str:
    """A line for each leaf: path, shape, who takes it, as how many matrices (fan_out, fan_in), with which fan ratio."""
    rule, lines = matrices or two_axes, []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        if rule(path, leaf) is None:
            what = ("other", "")
        else:
            matrix = matrix_of(path, leaf, rule)
            fan_in, fan_out = fans(leaf.shape, matrix)
            count = math.prod(leaf.shape) // max(fan_in * fan_out, 1)
            what = ("muon", f"{count} x ({fan_out}, {fan_in}), scale {max(1.0, fan_out / max(fan_in, 1)) ** 0.5:.3g}")
        lines.append((path, str(jnp.shape(leaf)), *what))
    widths = [max((len(line[column]) for line in lines), default=0) for column in range(3)]
    padded = [[*(part.ljust(width) for part, width in zip(line, widths, strict=False)), line[3]] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)
