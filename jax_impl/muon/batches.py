"""Orthogonalising a tree: which matrices share one call, and where each of them is whole."""

import collections
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from jax_impl.muon.matrices import Matrices, as_stack, from_stack, matrix_of, path_of
from jax_impl.muon.newton_schulz import KELLER_JORDAN, Coefficients, checked, orthogonalize_via_newton_schulz
from jax_impl.muon.sharded import orthogonalize_sharded, sharding_of

Shardings = Callable[[str, Any], NamedSharding | None]
"""Path and leaf to the sharding that the leaf has, or None."""


def orthogonalize(
    updates: Any,
    matrices: Matrices | None = None,
    *,
    coefficients: Coefficients = KELLER_JORDAN,
    eps: float | jax.Array = 1e-7,
    dtype: jax.typing.DTypeLike = "bfloat16",
    gram: bool = False,
    batched: bool | None = None,
    shardings: Shardings | None = None,
) -> Any:
    """Each matrix of a tree with singular values near one, in the leaves' dtypes.

    coefficients, eps, dtype, gram: see `orthogonalize_via_newton_schulz`.
    matrices: which axes of a leaf are inputs and outputs; without it a leaf of two axes is (fan_in, fan_out). A leaf
        that is no matrix raises a ValueError.
    batched: True lets matrices that are alike when laid wide share one batched product, as accelerators like it; False
        gives each its own, which is faster on a CPU. None: batched unless the program is compiled for a CPU.
    shardings: where the leaves lie on a mesh, as `shardings_of(params)` gives it: each matrix is then orthogonalised
        whole on one device, for two all-to-alls (`sharded.py`). Not needed outside `jax.jit` nor in explicit mode,
        where arrays and types say it; inside jit in Auto mode, XLA communicates in every iteration without it.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(updates)
    found = [matrix_of(path_of(keys), leaf, matrices) for keys, leaf in paths]
    leaves = [jax.numpy.asarray(leaf) for _, leaf in paths]

    def orthogonalize_stacks(stacks: list[jax.Array]) -> list[jax.Array]:
        options = dict(coefficients=checked(coefficients), eps=eps, dtype=dtype, gram=gram)
        if batched is not None:
            return _in_batches(stacks, options) if batched else _one_by_one(stacks, options)
        # Of the two only the one for the platform that the program is compiled for becomes a part of it.
        return jax.lax.platform_dependent(
            stacks, cpu=lambda stacks: _one_by_one(stacks, options), default=lambda stacks: _in_batches(stacks, options)
        )

    told = shardings or (lambda _, leaf: sharding_of(leaf))
    lie = [told(path_of(keys), leaf) for keys, leaf in paths]
    if any(sharding is not None for sharding in lie):
        whole = orthogonalize_sharded(leaves, found, lie, orthogonalize_stacks)
    else:
        stacks = orthogonalize_stacks([as_stack(leaf, matrix) for leaf, matrix in zip(leaves, found, strict=True)])
        # Out of `dtype` before any scaling: a factor applied in bfloat16 would cost 2e-3.
        whole = [
            from_stack(stack, matrix, leaf.shape).astype(leaf.dtype)
            for stack, matrix, leaf in zip(stacks, found, leaves, strict=True)
        ]
    return jax.tree.unflatten(tree, whole)


def _one_by_one(stacks: list[jax.Array], options: dict[str, Any]) -> list[jax.Array]:
    """Each matrix in a call of its own; those of one stack in a loop."""

    def one(x_OI: jax.Array) -> jax.Array:
        return orthogonalize_via_newton_schulz(x_OI, **options)

    return [one(stack) if stack.ndim == 2 else jax.lax.map(one, stack) for stack in stacks]


def _in_batches(stacks: list[jax.Array], options: dict[str, Any]) -> list[jax.Array]:
    """Matrices that are alike when laid wide in one call, whatever stack they are from."""
    groups = collections.defaultdict(list)
    for index, stack in enumerate(stacks):
        groups[tuple(sorted(stack.shape[-2:]))].append(index)
    done = list(stacks)
    for (short, long), indices in groups.items():
        are_tall = [stacks[i].shape[-2] > short for i in indices]
        wide = [stacks[i].mT if is_tall else stacks[i] for i, is_tall in zip(indices, are_tall, strict=True)]
        counts = [math.prod(stack.shape[:-2]) for stack in wide]
        batch = jax.numpy.concatenate(
            [stack.reshape(count, short, long) for stack, count in zip(wide, counts, strict=True)]
        )
        batch = orthogonalize_via_newton_schulz(batch, rounds_gram=True, **options)
        taken = 0
        for i, is_tall, stack, count in zip(indices, are_tall, wide, counts, strict=True):
            part = batch[taken : taken + count].reshape(stack.shape)
            done[i], taken = part.mT if is_tall else part, taken + count
    return done
