"""Weights carried from one framework to the other by the rules that compare them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from parity_tests.compare.errors import CompareError, require, some
from parity_tests.compare.jax_side import open_model
from parity_tests.compare.rules import Plan, Rules, as_rules, make_plan
from parity_tests.compare.torch_side import TorchSide, kind_of
from parity_tests.compare.walk import Arrays, to_numpy


class Copied(NamedTuple):
    """What was carried over, and what was not."""

    module: Any
    """The side that was written: a Flax NNX or torch module in place, else a new object of the kind handed over."""
    placed: tuple[str, ...]
    """Names, on the written side, of the parameters and states that have new values."""
    unplaced: tuple[str, ...]
    """A line for each parameter of either side, and each rule, that found no place; empty unless `partial`."""


def copy_weights(
    torch_module: torch.nn.Module,
    jax_side: Any,
    rules: Rules | Mapping[str, str] | None = None,
    *,
    partial: bool = False,
) -> Copied:
    """Give the JAX side the values of the torch module's parameters and buffers, in its own layout and dtypes.

    An NNX module is written in place; of (Linen module, variables), Equinox and (function, params) a new one comes
    back, as `.module` in every case. Raises `CompareError`, before anything is written, if a parameter of either side
    has no place, unless `partial`, or if a shape does not fit.
    """
    model, theirs, plan = _both(torch_module, jax_side, rules)
    unplaced = _unplaced(plan, partial)
    ours = {**model.params, **model.state}
    values, tensors = {name: to_numpy(one) for name, one in ours.items()}, theirs.values()
    shapes = {part.name: part.take(values).shape for link in plan.links for part in link.parts}
    new: Arrays = {}
    for link in plan.links:
        for (source, index), array in _fitted(link, tensors, shapes).items():
            if index is None:
                new[source] = array
            else:
                new.setdefault(source, values[source].copy())[index] = array
    cast = {name: _like(array, ours[name]) for name, array in new.items()}
    params = {name: cast.get(name, one) for name, one in model.params.items()}
    state = {name: cast.get(name, one) for name, one in model.state.items()}
    return Copied(model.replace(params, state), tuple(cast), unplaced)


def copy_weights_to_torch(
    jax_side: Any,
    torch_module: torch.nn.Module,
    rules: Rules | Mapping[str, str] | None = None,
    *,
    partial: bool = False,
) -> Copied:
    """The way back: the torch module, in place, with the JAX side's values. Errors as `copy_weights` has them."""
    model, theirs, plan = _both(torch_module, jax_side, rules)
    unplaced = _unplaced(plan, partial)
    values = {name: to_numpy(one) for name, one in [*model.params.items(), *model.state.items()]}
    shapes = {name: one.shape for name, one in theirs.tensors.items()}
    new: Arrays = {}
    for link in plan.links:
        for name, array in link.to_torch(values, shapes).items():
            require(
                array.shape == shapes[name],
                f"{name} has the shape {shapes[name]} in torch and {array.shape} in JAX ({link.parts[0].name}); a "
                "layout rule may be missing.",
            )
            new[name] = array
    targets = {**dict(torch_module.named_parameters()), **dict(torch_module.named_buffers())}
    with torch.no_grad():
        for name, array in new.items():
            targets[name].copy_(torch.tensor(np.ascontiguousarray(array)))
    return Copied(torch_module, tuple(new), unplaced)


def _both(torch_module, jax_side, rules):
    """The two sides and how they belong together, told by names and shapes alone."""
    require(
        isinstance(torch_module, torch.nn.Module),
        f"the torch side is a {kind_of(torch_module)}; copy_weights takes (torch_module, jax_side), "
        "copy_weights_to_torch (jax_side, torch_module).",
    )
    model, theirs = open_model(jax_side), TorchSide(torch_module, (), check_mode=False)
    shapes = {name: tuple(np.shape(one)) for name, one in [*model.params.items(), *model.state.items()]}
    plan = make_plan(
        as_rules(rules),
        shapes,
        model.state,
        theirs.tensors,
        theirs.aliases,
        jax_modules=model.modules,
        torch_modules=theirs.modules,
    )
    return model, theirs, plan


def _unplaced(plan: Plan, partial: bool) -> tuple[str, ...]:
    lines = [f"{name} of JAX has no place in torch" for name in plan.only_jax]
    lines += [f"{name} of torch has no place in JAX" for name in plan.only_torch]
    lines += plan.problems
    if lines and not partial:
        raise CompareError(f"{some(lines)}; say in rules which belong together, or pass partial=True.")
    return tuple(lines)


def _fitted(link, tensors: Arrays, shapes: Mapping[str, tuple[int, ...]]):
    try:
        return link.to_jax(tensors, shapes)
    except ValueError:
        ours = " + ".join(f"{part.name} {shapes[part.name]}" for part in link.parts)
        theirs = " + ".join(f"{name} {tensors[name].shape}" for name in link.names)
        raise CompareError(f"{ours} of JAX and {theirs} of torch do not fit; a layout rule may be missing.") from None


def _like(array: np.ndarray, old: Any):
    """The array as the old one is: its dtype, NumPy's or JAX's."""
    import jax.numpy as jnp

    return np.asarray(array, old.dtype) if isinstance(old, np.ndarray) else jnp.asarray(array, old.dtype)
