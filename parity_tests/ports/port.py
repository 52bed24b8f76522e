"""A correct port and the bugs that can be planted in it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """A JAX side and a torch module that hold the same weights, and how to compare them."""

    jax_side: Any
    torch_module: Any
    inputs: Any
    rules: Any = None  # dict of keyword arguments of compare.Rules: names, stacked, fused, layouts
    options: Mapping[str, Any] = {}  # further keyword arguments of compare_modules: jax_inputs, call


@dataclass(frozen=True)
class Port:
    """A pair of equal models, and for each bug the names in the report of which one may diverge first."""

    name: str
    make: Callable[[str], Pair]  # make("") is correct; make(bug) has that bug planted
    bugs: Mapping[str, tuple[str, ...]]  # the faulty tensor or one after it, e.g. ("forward fc2", "forward act")
