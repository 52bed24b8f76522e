"""The torch side of a comparison: a copy of a module in a dtype, tapped while it runs forward and backward."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from parity_tests.compare.errors import CompareError, first_line, require, some
from parity_tests.compare.montecarlo import Mode, rounded
from parity_tests.compare.precision import UNIT_ROUNDOFF
from parity_tests.compare.program import decimal, is_exact
from parity_tests.compare.rules import TorchTensor
from parity_tests.compare.walk import LOSS, Arrays, FunctionTap, Run, Walk, flatten_output, to_numpy

_INPUTS = "inputs is a list of its arguments, or a dict of keyword arguments"

Objective = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def is_inexact(value) -> bool:
    """Whether it is a tensor of real or complex numbers."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


@contextlib.contextmanager
def torch_taps(
    module: torch.nn.Module,
    *,
    functions: Iterable[FunctionTap] = (),
    inputs: Mapping[str, str] | None = None,
) -> Iterator[tuple[Arrays, Arrays]]:
    """Context in which calling `module` fills the first yielded dict and a backward pass, in its order, the second.

    `inputs`: see `Walk`.
    """
    forward: Arrays = {}
    backward: Arrays = {}

    def record(name, value, to_common):
        # A view of the same values: its gradient is what flows through this tap, whoever else reads the original.
        value = value.view_as(value)
        forward[name] = to_common(to_numpy(value))
        if value.requires_grad:
            value.register_hook(lambda grad: backward.__setitem__(name, to_common(to_numpy(grad))))
        return value

    walk = Walk(record, is_inexact, inputs=inputs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(walk.functions(functions))

        def entered(path, args):
            return None if _in_backward() else walk.enter(path, args)

        def left(path, out):
            return None if _in_backward() else walk.leave(path, out)

        for path, part in module.named_modules():
            before = part.register_forward_pre_hook(lambda _, args, path=path: entered(path, args))
            after = part.register_forward_hook(lambda _, args, out, path=path: left(path, out))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield forward, backward


def _in_backward() -> bool:
    """Whether a backward pass runs, where a checkpointed module is called once more for what it has not kept."""
    return torch._C._current_graph_task_id() != -1


class Widened(Mode):
    """Makes torch code that names float32 mean float64, so that a model which casts inside has a float64 truth.

    A tensor that is still float32 was made outside of it: a constant held by the model's code. Its numbers are taken as
    they would be written, else as they are, and what is rounded is noted. With a `seed` each such constant is moved by
    one rounding of float32.
    """

    def __init__(self, *narrower: torch.dtype, seed: int | None = None) -> None:
        """`narrower`: dtypes that mean float64 as well."""
        super().__init__()
        self.wide, self.seed = {**_WIDE, **dict.fromkeys(narrower, torch.float64)}, seed
        self.constants: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        """By where they lie: in float64, and themselves, so that nothing else comes to lie there."""
        self.shapes: set[tuple[int, ...]] = set()
        """Of those that are rounded."""
        self.drawn: list[str] = []
        """Operations that gave random numbers."""

    def widen(self, x):
        if not (isinstance(x, torch.Tensor) and x.dtype in _WIDE):
            return x
        key = (x.data_ptr(), x._version, *x.shape)
        if key not in self.constants:
            array = x.detach().numpy()
            wide = decimal(array)
            if not is_exact(array):
                self.shapes.add(tuple(x.shape))
                if self.seed is not None:
                    wide = wide * rounding_of_float32(array.shape, self.seed)
            self.constants[key] = torch.tensor(wide), x
        return self.constants[key][0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn.append(func.overloadpacket.__name__)
        if kwargs.get("dtype") in self.wide:
            kwargs = {**kwargs, "dtype": self.wide[kwargs["dtype"]]}
        if not func._schema.is_mutable:  # what is written must be the caller's own
            args, kwargs = pytree.tree_map(self.widen, (args, kwargs))
        return func(*args, **kwargs)


_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def rounding_of_float32(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Factors that move each number by up to one rounding of float32."""
    return 1.0 + UNIT_ROUNDOFF["float32"] * np.random.default_rng(seed).uniform(-1.0, 1.0, shape)


def _complex_of(width: torch.dtype) -> torch.dtype:
    """The dtype of complex numbers that goes with one of real numbers; those of bfloat16 do not exist."""
    return torch.complex128 if width == torch.float64 else torch.complex64


def _cast(module: torch.nn.Module, width: torch.dtype) -> torch.nn.Module:
    """The module, in place, in this dtype; `module.to` would drop the imaginary part of complex numbers."""

    def cast(one: torch.Tensor) -> torch.Tensor:
        return one.to(_complex_of(width)) if one.is_complex() else one.to(width) if one.is_floating_point() else one

    return module._apply(cast)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Context in which new tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class TorchSide:
    """A module that is never changed, and its inputs."""

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: Any,
        constants: Mapping[str, np.ndarray] | None = None,
        loss: Callable | None = None,
        *,
        check_mode: bool = True,
    ) -> None:
        module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
        self.module = _copied(module)
        self.constants, self.loss, self.check_mode = dict(constants or {}), loss, check_mode
        if check_mode:
            _check_mode(module)
        self.args, self.kwargs = arguments(inputs)
        self.parameters = dict(self.module.named_parameters())
        self.buffers = {name: one for name, one in self.module.named_buffers() if is_inexact(one)}
        owners = {name: type(part).__name__ for name, part in self.module.named_modules()}
        self.tensors = {
            name: TorchTensor(tuple(one.shape), owners[name.rpartition(".")[0]], name in self.parameters)
            for name, one in [*self.parameters.items(), *self.buffers.items()]
        }
        first = {id(one): name for name, one in self.parameters.items()}
        every = self.module.named_parameters(remove_duplicate=False)
        self.aliases = {name: first[id(one)] for name, one in every if first[id(one)] != name}
        self.modules = [name for name, _ in self.module.named_modules(remove_duplicate=False) if name]
        self.has_run = False
        self.held: set[tuple[int, ...]] = set()
        """Shapes of rounded float32 constants that the module's code holds."""
        # A table's row that torch does not train, by the name of its parameter.
        self.padding = {
            f"{path}.weight".removeprefix("."): part.padding_idx
            for path, part in self.module.named_modules()
            if isinstance(part, torch.nn.Embedding) and part.padding_idx is not None
        }
        unknown = [name for name in self.constants if name not in self.buffers]
        require(
            not unknown, f"constants names {some(unknown)}, no buffer of the torch module; name one of its buffers."
        )
        for name, one in self.constants.items():
            shapes = np.shape(one), tuple(self.buffers[name].shape)
            require(
                shapes[0] == shapes[1],
                f"constants[{name!r}] has the shape {shapes[0]} and the buffer {shapes[1]}; give its own values.",
            )

    def is_finer_than(self, dtype: str) -> bool:
        """Whether the module's parameters have digits that a cast to this dtype would round."""
        kinds = {str(one.real.dtype).removeprefix("torch.") for one in self.parameters.values() if is_inexact(one)}
        return any(UNIT_ROUNDOFF.get(kind, 1.0) < UNIT_ROUNDOFF[dtype] for kind in kinds)

    def values(self) -> Arrays:
        """Parameters and buffers, in their own dtype, by name."""
        return {name: to_numpy(one) for name, one in [*self.parameters.items(), *self.buffers.items()]}

    def rounded_buffers(self, carried: Iterable[str]) -> list[str]:
        """Buffers in float32 whose numbers are the rounding of others, if they are not computed anew in float64.

        Not those that the JAX side holds too (`carried`), number for number.
        """
        again = {
            f"{path}.{name}" for path in self._remakeable for name, _ in self.module.get_submodule(path).named_buffers()
        }
        return [
            name
            for name, one in self.buffers.items()
            if one.dtype in _WIDE and name not in {*carried, *self.constants, *again}
            if not is_exact(to_numpy(one))
        ]

    @functools.cached_property
    def _remakeable(self) -> list[str]:
        """Parts whose float32 buffers can be computed anew in float64.

        A part without parameters that is made from a `config` alone, as transformers' rotary embeddings are, and that
        has the same buffers, bit for bit, when it is made again.
        """
        found = []
        for path, part in self.module.named_modules():
            buffers = {name: one for name, one in part.named_buffers() if one.dtype == torch.float32}
            if not path or not buffers or any(True for _ in part.parameters()) or not hasattr(part, "config"):
                continue
            try:
                again = dict(type(part)(part.config).named_buffers())
                if all(torch.equal(again[name], one) for name, one in buffers.items()):
                    _made_again(part)
                    found.append(path)
            except Exception:  # Somebody else's constructor, tried on a guess.
                continue
        return found

    def _wide_copy(self) -> torch.nn.Module:
        """The module in float64, its rotary tables and the like computed anew in it."""
        module = _cast(copy.deepcopy(self.module), torch.float64)
        for path in self._remakeable:
            parent, _, last = path.rpartition(".")
            setattr(module.get_submodule(parent), last, _made_again(self.module.get_submodule(path)))
        with torch.no_grad():
            for name, value in self.constants.items():
                module.get_buffer(name).copy_(torch.tensor(np.asarray(value, np.float64)))
        return module

    def run(
        self,
        dtype: str,
        objective: Objective | Literal[False],
        *,
        wide: bool,
        noisy: bool = False,
        factors: Mapping[str, np.ndarray] | None = None,
        seed: int | None = None,
    ) -> Run:
        """One pass in `dtype`, or in float64 (`wide`), whatever the module names; `noisy` passes what a cast to `dtype`
        rounds to `rounded`; `factors` multiply buffers, and `seed` moves the constants that the code holds. Without an
        objective there is no backward pass.
        """
        width = torch.float64 if wide else getattr(torch, dtype)
        module = self._wide_copy() if wide else self._narrow_copy(width)
        with torch.no_grad():
            if noisy and self.is_finer_than(dtype):
                for parameter in module.parameters():
                    if is_inexact(parameter):
                        parameter.copy_(torch.tensor(rounded(parameter.numpy())))
            for name, factor in (factors or {}).items():
                module.get_buffer(name).mul_(torch.tensor(factor))
        module.zero_grad()
        cast = UNIT_ROUNDOFF[dtype] > UNIT_ROUNDOFF["float32"]

        def tensor(value):
            """A fresh tensor, no leaf, so that the module may write into it."""
            if not isinstance(value, np.ndarray):
                return value
            if not np.issubdtype(value.dtype, np.inexact):
                return torch.tensor(value)
            value = rounded(value) if noisy and cast else value
            found = torch.tensor(value)
            return found.to(_complex_of(width) if found.is_complex() else width).requires_grad_()

        leaves = {name: tensor(one) for name, one in named_leaves(self.args, self.kwargs).items()}

        def fresh(value):
            return value.clone() if is_inexact(value) else value

        with contextlib.ExitStack() as stack:
            widened = Widened(seed=seed)
            if wide:
                stack.enter_context(widened)
                stack.enter_context(default_dtype(torch.float64))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # Without an objective too: a model may differentiate inside, as one that returns forces does.
            stack.enter_context(torch.set_grad_enabled(True))
            forward, backward = stack.enter_context(torch_taps(module))
            out = self._called(module, *filled(self.args, self.kwargs, lambda name, _: fresh(leaves[name])))
            require(
                not (widened.drawn and self.check_mode),
                f"the torch module draws random numbers ({some(dict.fromkeys(widened.drawn))}); call module.eval(), or "
                "pass what it draws as an input.",
            )
            outputs = flatten_output(out, lambda value: isinstance(value, torch.Tensor))
            if self.loss is not None:
                outputs[LOSS] = self._loss_of(out)
            loss = None
            if objective:
                loss = objective(outputs)
                if loss.requires_grad:
                    loss.backward()
        self.held |= widened.shapes if wide else set()
        # A tied parameter has one gradient, under its first name.
        gradients = {name: to_numpy(one.grad) for name, one in module.named_parameters() if one.grad is not None}
        given = {name: to_numpy(one.grad) for name, one in leaves.items() if is_inexact(one) and one.grad is not None}
        return Run(
            {name: to_numpy(one) for name, one in outputs.items() if name != LOSS},
            dict(forward),
            dict(backward),
            gradients,
            given,
            None if loss is None else to_numpy(loss),
        )

    def _loss_of(self, out: Any) -> torch.Tensor:
        try:
            value = self.loss(out)
        except Exception as error:
            raise CompareError(
                f"the loss of the torch module's output fails: {first_line(error)}; loss is (of JAX's output, of "
                "torch's)."
            ) from error
        good = isinstance(value, torch.Tensor) and value.shape == () and value.is_floating_point()
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        require(good, f"the loss of the torch module's output is {what}; return a scalar tensor.")
        return value

    def _called(self, module: torch.nn.Module, args: list, kwargs: dict) -> Any:
        """The module's result. Raises `CompareError` if it cannot be run on these inputs at all."""
        try:
            return module(*args, **kwargs)
        except Exception as error:
            if isinstance(error, CompareError) or self.has_run:
                raise
            training = "training" in str(error) and self.module.training
            remedy = "call module.eval() first" if training else _INPUTS
            raise CompareError(
                f"the torch module does not run on these inputs: {first_line(error)}; {remedy}."
            ) from error
        finally:
            self.has_run = True

    def given(self) -> dict[str, np.ndarray]:
        """The inputs that are arrays, by position or name."""
        every = named_leaves(self.args, self.kwargs)
        return {name: one for name, one in every.items() if isinstance(one, np.ndarray)}

    def _narrow_copy(self, width: torch.dtype) -> torch.nn.Module:
        """The module in this dtype; tables that are not stored with the weights stay in float32 below it."""
        module = _cast(copy.deepcopy(self.module), width)
        if width == torch.bfloat16:
            stored = self.module.state_dict().keys()
            for name, one in self.buffers.items():
                if name not in stored and "inv_freq" in name:  # transformers keeps its frequencies in float32
                    parent, _, last = name.rpartition(".")
                    module.get_submodule(parent)._buffers[last] = one.clone()
        return module


def _made_again(part: torch.nn.Module) -> torch.nn.Module:
    """A part made from its `config` with float32 meaning float64."""
    with Widened(), default_dtype(torch.float64):
        return type(part)(part.config).to(torch.float64).train(part.training)


def kind_of(value: Any) -> str:
    """The class of an object and the package it comes from."""
    return f"{type(value).__module__.partition('.')[0]} {type(value).__name__}".removeprefix("builtins ")


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    """A copy on the CPU, every parameter of which is trained."""
    require(
        isinstance(module, torch.nn.Module),
        f"the torch side is a {kind_of(module)}; pass the JAX module first and a torch.nn.Module second.",
    )
    meta = [name for name, one in [*module.named_parameters(), *module.named_buffers()] if one.is_meta]
    require(not meta, f"the torch module has no values in {some(meta)}: they are on the meta device; load them first.")
    scripted = [name or "it" for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    require(not scripted, f"the torch module is compiled to TorchScript ({some(scripted)}); pass what it was made of.")
    lazy = [name for name, one in module.named_parameters() if torch.nn.parameter.is_lazy(one)]
    require(not lazy, f"the torch module has no values in {some(lazy)}: they are lazy; call it once first.")
    try:
        module = copy.deepcopy(module, _computed(module)).cpu()
    except Exception as error:
        raise CompareError(f"the torch module cannot be copied: {first_line(error)}; pass a plain module.") from error
    kinds = {one.dtype for one in module.parameters()} & {torch.float16}
    require(not kinds, "the torch module has float16 parameters, which are not compared; pass module.float().")
    for parameter in module.parameters():
        if is_inexact(parameter):
            parameter.requires_grad_()
    return module


def _computed(module: torch.nn.Module) -> dict[int, torch.Tensor]:
    """A memo for deepcopy of tensors that a module has computed and keeps, as weight_norm's `weight`: their values."""
    kept = [one for part in module.modules() for one in vars(part).values() if isinstance(one, torch.Tensor)]
    return {id(one): one.detach().clone() for one in kept if not one.is_leaf}


def _check_mode(module: torch.nn.Module) -> None:
    dropping = [
        f"{name or 'the module'} ({type(part).__name__}, p={part.p})"
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.training and part.p > 0
    ]
    require(not dropping, f"dropout is on in the torch module: {some(dropping)}; call module.eval() first.")


def arguments(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments as NumPy arrays; what is no array stays as it is."""
    if isinstance(inputs, Mapping):
        bad = [name for name in inputs if not isinstance(name, str)]
        require(not bad, f"inputs has the key {bad[0]!r}; keys are names of arguments." if bad else "")
        return (), {name: _array(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list) and not (inputs and all(isinstance(x, int | float) for x in inputs)):
        return tuple(_array(value) for value in inputs), {}
    return (_array(inputs),), {}


def _array(value):
    """An array of either framework, or a list of numbers, in NumPy."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return to_numpy(value)
    if isinstance(value, dict | tuple) or (isinstance(value, list) and any(hasattr(one, "ndim") for one in value)):
        return _each(value, "", lambda _, one: _array(one))
    if isinstance(value, list) or hasattr(value, "__array__"):
        try:
            array = to_numpy(value)
        except ValueError as error:
            raise CompareError(f"an input is no array: {first_line(error)}; nest lists of one length.") from error
        require(array.dtype.kind in "biufc", f"an input is an array of {array.dtype}; pass numbers or booleans.")
        require(array.dtype != np.float16, "an input is float16, which is not compared; pass it as float32.")
        return array
    return value


def _each(value: Any, name: str, leaf: Callable[[str, Any], Any]) -> Any:
    """An argument, a tuple or dict of several included, whose leaves are `leaf(name, leaf)`; input.1.0 is a name."""
    if isinstance(value, dict):
        return {key: _each(one, f"{name}.{key}", leaf) for key, one in value.items()}
    if isinstance(value, tuple | list):
        every = [_each(one, f"{name}.{index}", leaf) for index, one in enumerate(value)]
        return type(value)(*every) if hasattr(value, "_fields") else type(value)(every)
    return leaf(name, value)


def filled(args: tuple, kwargs: Mapping[str, Any], leaf: Callable[[str, Any], Any]) -> tuple[list, dict[str, Any]]:
    """The arguments with `leaf(name, value)` in place of every value."""
    return (
        [_each(one, f"input.{index}", leaf) for index, one in enumerate(args)],
        {name: _each(one, f"input.{name}", leaf) for name, one in kwargs.items()},
    )


def named_leaves(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every value among the arguments, by position or name."""
    found: dict[str, Any] = {}
    filled(args, kwargs, found.__setitem__)
    return found
