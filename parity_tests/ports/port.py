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
    """A port's name, how it is made, and the bugs it can have."""

    name: str
    make: Callable[[str], Pair]  # make("") is correct; make(bug) has that bug planted
    # Name of a bug -> names in the report, any of which may be the first divergence: the faulty tensor or the one after
    # it, e.g. ("forward fc2", "forward act").
    bugs: Mapping[str, tuple[str, ...]]
