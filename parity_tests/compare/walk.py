"""Where execution stands while a model of either framework runs, and what its outputs are called.

Outputs are named by the module's path. A module that is called again gets `#2`; an array that no module put out gets
the name of the module that takes it in, with `.input`.
"""

import contextlib
import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

Arrays = dict[str, np.ndarray]


class FunctionTap(NamedTuple):
    """A function of a Python module whose results are taps of whichever model's module calls it."""

    owner: Any
    attribute: str
    names: tuple[str, ...]
    """Names of the results of one call, or of successive calls that return one array each."""
    to_common: Callable[[np.ndarray], np.ndarray] = lambda array: array
    """From this function's layout to the one that is compared."""


class Walk:
    """The modules entered and the names given so far."""

    def __init__(
        self,
        record: Callable[[str, Any, Callable], Any],
        is_array: Callable[[Any], bool],
        *,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """`record(name, value, to_common)` returns what the model goes on with.

        `inputs`: end of a module's path -> what its input is called. Without it every input that no module put out is
        recorded as `PATH.input`, and a module that hands on its child's very output is recorded as well.
        """
        self.record, self.is_array, self.inputs = record, is_array, inputs
        self.path: list[str] = []
        self.names: set[str] = set()
        self.calls: dict[tuple[str, str], int] = {}
        self.recorded: list[Any] = []

    def tap(self, name: str, value, to_common: Callable = lambda array: array):
        """Record an array under a name not yet taken; returns what the model is to go on with."""
        numbered = (f"{name}#{call}" for call in itertools.count(2))
        unique = next(one for one in itertools.chain([name], numbered) if one not in self.names)
        self.names.add(unique)
        value = self.record(unique, value, to_common)
        self.recorded.append(value)
        return value

    def enter(self, path: str, args: tuple) -> tuple:
        """A module is about to run on these positional arguments; returns those that it is to have."""
        self.path.append(path)
        if self.inputs is None:
            known = bool(args) and any(args[0] is one for one in self.recorded)
            if path and args and self.is_array(args[0]) and not known:
                return (self.tap(f"{path}.input", args[0]), *args[1:])
            return args
        for end, name in self.inputs.items():
            if ("." + path).endswith("." + end) and args:
                return (self.tap(path.removesuffix(end) + name, args[0]), *args[1:])
        return args

    def leave(self, path: str, out):
        """A module has returned `out`; returns what its caller is to see."""
        self.path.pop()
        value, replaced = main_array(out, self.is_array)
        if value is None:
            return out
        if self.inputs is not None and self.recorded and value is self.recorded[-1]:
            return out
        if self.inputs is None and not path:
            return out  # the model's result is compared as such
        return replaced(self.tap(path or "output", value))

    def wrap(self, tap: FunctionTap, original: Callable) -> Callable:
        """The function, its results tapped under the module that is running."""

        def function(*args, **kwargs):
            out = original(*args, **kwargs)
            here = self.path[-1] + "." if self.path else ""
            if isinstance(out, tuple):
                pairs = zip(tap.names, out, strict=True)
                return tuple(self.tap(here + name, value, tap.to_common) for name, value in pairs)
            call = self.calls.get((here, tap.attribute), 0)
            self.calls[here, tap.attribute] = call + 1
            return self.tap(here + tap.names[call % len(tap.names)], out, tap.to_common)

        return function

    @contextlib.contextmanager
    def functions(self, taps: Iterable[FunctionTap]) -> Iterator[None]:
        """Context in which these functions are tapped."""
        with contextlib.ExitStack() as stack:
            for tap in taps:
                original = getattr(tap.owner, tap.attribute)
                setattr(tap.owner, tap.attribute, self.wrap(tap, original))
                stack.callback(setattr, tap.owner, tap.attribute, original)
            yield


_INPUT = re.compile(r"\.input(#\d+)?$")


def is_input(name: str) -> bool:
    """Whether it is the name of what a module was given; `input_layernorm` is a module's own."""
    return bool(_INPUT.search(name))


LOSS = "the loss"
"""Key of a loss among a model's outputs; no output has this name."""

MAIN = ("logits", "last_hidden_state")
"""Fields of transformers' outputs that are the result, the first that is there."""


def main_array(out, is_array: Callable[[Any], bool]) -> tuple[Any, Callable[[Any], Any]]:
    """The array that a module's result is, or begins with, and a function that puts another in its place."""
    if is_array(out):
        return out, lambda value: value
    if isinstance(out, Mapping):
        keys = [key for key in (*MAIN, *out) if key in out and is_array(out[key])]
        return (out[keys[0]], lambda value: _with_key(out, keys[0], value)) if keys else (None, None)
    if isinstance(out, tuple | list):
        for index, one in enumerate(out):
            if is_array(one):
                return one, lambda value, index=index: _with_index(out, index, value)
        return None, None
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        fields = [field.name for field in dataclasses.fields(out)]
        names = [name for name in (*MAIN, *fields) if name in fields and is_array(getattr(out, name))]
        if names:
            return getattr(out, names[0]), lambda value: dataclasses.replace(out, **{names[0]: value})
    return None, None


def _with_key(out: Mapping, key: str, value):
    changed = copy.copy(out)
    changed[key] = value
    return changed


def _with_index(out, index: int, value):
    values = [*out[:index], value, *out[index + 1 :]]
    return type(out)(*values) if hasattr(out, "_fields") else type(out)(values)


def flatten_output(out, is_array: Callable[[Any], bool]) -> dict[str, Any]:
    """Every array of a model's result: "" of a lone array, else by key or position, nested ones joined by dots."""
    if is_array(out):
        return {"": out}
    if isinstance(out, Mapping):
        pairs = list(out.items())
    elif isinstance(out, tuple) and hasattr(out, "_fields"):
        pairs = list(zip(out._fields, out, strict=True))
    elif isinstance(out, tuple | list):
        pairs = list(enumerate(out))
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        pairs = [(field.name, getattr(out, field.name)) for field in dataclasses.fields(out)]
    else:
        return {}
    found = {}
    for key, value in pairs:
        for rest, array in flatten_output(value, is_array).items():
            found[f"{key}.{rest}" if rest else str(key)] = array
    return found


class Run(NamedTuple):
    """What one forward and backward pass of a side leaves, by that side's own names and in its own layout."""

    outputs: Arrays
    forward: Arrays
    backward: Arrays
    gradients: Arrays
    inputs: Arrays
    """Gradients with respect to the inputs."""
    loss: np.ndarray | None

    def flat(self) -> Arrays:
        """One dict in execution order: `forward NAME`, `backward NAME`, `gradient NAME`."""
        found = {f"forward {name}": value for name, value in self.forward.items()}
        found |= {f"forward {output_name(name)}": value for name, value in self.outputs.items()}
        if self.loss is not None:
            found["forward loss"] = self.loss
        ordered = [name for name in reversed(self.forward) if name in self.backward]
        found |= {f"backward {name}": self.backward[name] for name in ordered}
        found |= {f"gradient {name}": value for name, value in reversed(self.gradients.items())}
        return found | {f"gradient {name}": value for name, value in self.inputs.items()}


def output_name(key: str) -> str:
    """What a report calls an output: `output`, or `output.KEY` of several."""
    return f"output.{key}" if key else "output"


def to_numpy(value) -> np.ndarray:
    """A copy in NumPy; bfloat16, which NumPy lacks, is widened to float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.resolve_conj().resolve_neg() if value.is_complex() else value
        return (value.float() if value.dtype == torch.bfloat16 else value.clone()).numpy()
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
