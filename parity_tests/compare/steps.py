"""Training steps of foreign models, as `compare_training` wants them: a batch in, what one update leaves out.

A step returns a mapping with some of: "loss"; "gradient NAME", as differentiated, before any clipping;
"slot SLOT NAME", an array of the optimizer's state after the update; "update NAME", the parameter after minus before;
"parameter NAME", after. A `JaxTraining` says so in JAX's names and layout, a `TorchTraining` in torch's.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from parity_tests.compare.errors import CompareError, first_line, require, some
from parity_tests.compare.jax_side import Model, cast, is_inexact, open_model
from parity_tests.compare.montecarlo import Mode, rounded
from parity_tests.compare.precision import check_dtypes
from parity_tests.compare.program import COMPILED_FOR_ONE_RUN, Program, tracing
from parity_tests.compare.torch_side import Widened, default_dtype
from parity_tests.compare.walk import Arrays, to_numpy

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes that torch's optimizers and losses name beside float32: Muon's products."""


def _is_array(x) -> bool:
    return isinstance(x, np.ndarray | np.generic | jax.Array | torch.Tensor)


def _paths(tree) -> dict[str, Any]:
    """Leaves by path, its parts joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _what(value) -> str:
    """A value that should have been a scalar, in words."""
    return f"an array of shape {tuple(np.shape(value))}" if _is_array(value) else f"a {type(value).__name__}"


class JaxTraining:
    """Updates of a JAX model by an optax transformation; made by `jax_training`."""

    def __init__(self, model: Model, optimizer, loss: Callable, dtype: str, rules=None, jit: bool = True) -> None:
        self._model, self._loss = model, loss
        self.dtype, self.rules, self._jit = dtype, rules, jit
        self.notes: list[str] = []
        """What was done to the model so that it computes in the dtype."""
        self._gradients: dict[Any, Callable] = {}
        names = model.tree({name: name for name in model.params})
        self._named = _paths(names)
        self._take(optimizer)
        self._begin()

    def _take(self, optimizer) -> None:
        def update(gradients, state, params):
            updates, state = optimizer.update(gradients, state, params)
            # As optax.apply_updates: a masked update has no leaf and cannot be added.
            return jax.tree.map(lambda p, u: jnp.asarray(p + u, p.dtype), params, updates), state

        self._optimizer, self._update = (
            optimizer,
            jax.jit(update, compiler_options=COMPILED_FOR_ONE_RUN) if self._jit else update,
        )

    def _begin(self) -> None:
        with self._precision():
            self._params = self._model.tree({name: cast(x, self.dtype) for name, x in self._model.params.items()})
            self._rest = {name: cast(x, self.dtype) for name, x in self._model.rest.items()}
            try:
                self._state = self._optimizer.init(self._params)
            except Exception as error:
                raise CompareError(
                    f"the optimizer cannot be initialized with the parameters: {first_line(error)}; its masks and "
                    "labels must fit their tree."
                ) from error

    @contextlib.contextmanager
    def _precision(self):
        """What the optimizer runs in. A dtype that it names is meant: a schedule in float32 is a difference."""
        with jax.enable_x64(self.dtype == "float64"), jax.default_matmul_precision("highest"):
            yield

    def fresh(self, *, optimizer=None) -> "JaxTraining":
        """The same training before its first step, with another optimizer if one is given; compiled once for all."""
        again = copy.copy(self)
        if optimizer is not None:
            again._take(_checked(optimizer))
        again._begin()
        return again

    def start(self) -> Arrays:
        """The parameters as they are now, by JAX path."""
        return self._by_name(self._params)

    def _by_name(self, tree) -> Arrays:
        return {self._named[path]: to_numpy(value) for path, value in _paths(tree).items()}

    def __call__(self, batch) -> Arrays:
        leaves, form = jax.tree.flatten(batch)
        with tracing(self.dtype):
            arrays = {
                i: cast(to_numpy(x) if isinstance(x, torch.Tensor) else x, self.dtype)
                for i, x in enumerate(leaves)
                if _is_array(x)
            }
            fixed = {i: x for i, x in enumerate(leaves) if i not in arrays}
            differentiate = self._differentiated(arrays, fixed, form)
            (loss, self._rest), gradients = differentiate(self._params, self._rest, arrays)
        before = self.start()
        with self._precision():
            self._params, self._state = self._update(gradients, self._state, self._params)
        slots = {tuple(key.split(" ", 1)): x for key, x in optax_slots(self._state, self._params).items()}
        after = self.start()
        left = {"loss": to_numpy(loss)}
        left |= {f"gradient {name}": value for name, value in self._by_name(gradients).items()}
        left |= {f"slot {slot} {self._named[path]}": to_numpy(value) for (slot, path), value in slots.items()}
        left |= {f"update {name}": after[name] - before[name] for name in after}
        return left | {f"parameter {name}": value for name, value in after.items()}

    def _differentiated(self, arrays: Mapping[int, jax.Array], fixed: Mapping[int, Any], form) -> Callable:
        """(parameters, rest, arrays of a batch) -> ((loss, rest), gradients), made once for batches of this form.

        `fixed` are the leaves that are no arrays.
        """
        key = (form, tuple((i, x.shape, x.dtype) for i, x in arrays.items()), tuple(fixed.items()))
        try:
            known = self._gradients.get(key)
        except TypeError:
            raise CompareError(
                f"a batch holds {some(type(x).__name__ for x in fixed.values())}, which cannot be compiled; a batch is "
                "a pytree of arrays, numbers and strings."
            ) from None
        if known is None:
            known = self._gradients[key] = self._compiled(arrays, fixed, form)
        return known

    def _compiled(self, arrays: Mapping[int, jax.Array], fixed: Mapping[int, Any], form) -> Callable:
        def run(params, rest, arrays):
            by_name = {self._named[path]: value for path, value in _paths(params).items()}
            model, left = self._model.live(by_name, rest)
            batch = jax.tree.unflatten(form, [x for _, x in sorted({**arrays, **fixed}.items())])
            with self._model.taps(model, self.dtype, self.notes):
                loss = self._loss(model, batch)
            scalar = isinstance(loss, float | np.ndarray | np.generic | jax.Array) and np.shape(loss) == ()
            require(
                scalar and jnp.issubdtype(jnp.result_type(loss), jnp.floating),
                f"the JAX loss returned {_what(loss)} and must return a scalar; return its mean or its sum alone.",
            )
            return jnp.asarray(loss), {name: jnp.asarray(x, rest[name].dtype) for name, x in left().items()}

        try:
            jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(self._params, self._rest, arrays)
        except CompareError:
            raise
        except Exception as error:
            raise CompareError(
                f"the JAX loss does not run on this batch: {first_line(error)}; loss(model, batch) gets the batch as "
                "it is, and must run under jax.jit."
            ) from error
        program = Program(jaxpr, widen=self.dtype == "float64")
        on = f": {some(self._model.dropping)}" if self._model.dropping else ""
        require(
            not program.draws(),
            f"the JAX loss draws random numbers{on}, which torch cannot draw as well; "
            f"{self._model.eval or 'switch dropout off'}.",
        )
        structure, constants = jax.tree.structure(shapes), program.constants()

        def forward(params, rest, arrays, constants):
            outputs, _ = program.run(constants, jax.tree.leaves((params, rest, arrays)), None)
            return jax.tree.unflatten(structure, outputs)

        gradients = jax.value_and_grad(forward, has_aux=True)
        gradients = jax.jit(gradients, compiler_options=COMPILED_FOR_ONE_RUN) if self._jit else gradients
        return lambda params, rest, arrays: gradients(params, rest, arrays, constants)


def optax_slots(state, params) -> dict[str, Any]:
    """Arrays of an optax state by "FIELD PATH": fields of its named tuples whose tree is that of the parameters.

    Masked trees may lack parameters. A `count` beside such a field is given to each of its parameters. A field name
    that comes twice for one parameter gets a number: "trace", "trace2".
    """
    shapes = {name: np.shape(value) for name, value in _paths(params).items()}
    found: dict[str, Any] = {}

    def add(field: str, name: str, value) -> None:
        key, number = f"{field} {name}", 1
        while key in found:
            number += 1
            key = f"{field}{number} {name}"
        found[key] = value

    def visit(node) -> None:
        if hasattr(node, "_fields"):
            children = {field: getattr(node, field) for field in node._fields}
            owned: dict[str, None] = {}
            for field, child in children.items():
                leaves = _paths(child)
                floats = [name for name, x in leaves.items() if is_inexact(x) and shapes.get(name) == np.shape(x)]
                if leaves and len(floats) == len(leaves):
                    owned |= dict.fromkeys(leaves)
                    for name, value in leaves.items():
                        add(field, name, value)
                else:
                    visit(child)
            if "count" in children and np.shape(children["count"]) == ():
                for name in owned:
                    add("count", name, children["count"])
        elif isinstance(node, Mapping):
            for child in node.values():
                visit(child)
        elif isinstance(node, tuple | list):
            for child in node:
                visit(child)

    visit(state)
    return found


def jax_training(
    model, optimizer, loss: Callable, *, dtype: str = "float64", rules=None, jit: bool = True
) -> JaxTraining:
    """Steps of a JAX model.

    `model` is a flax.nnx.Module, a pair (linen module, variables), an equinox.Module, or a pair (function, params).
    `loss(model, batch)` returns a scalar and gets the model as it was given; a Linen module bound to its variables; of
    a pair (function, params) a function of the inputs alone. Statistics that it changes in an NNX or a Linen module
    are carried from step to step. `optimizer` is an optax.GradientTransformation. Both are compiled, once for batches
    of one form; with `jit=False` they run operation by operation, which suits a few steps of a small model and an
    optimizer that cannot be traced. Floating arrays of the model and of a batch are cast to `dtype`. The model is not
    changed. Raises `CompareError`.
    """
    check_dtypes(dtype)
    require(callable(loss), f"loss={loss!r} must be callable; pass a function loss(model, batch) -> scalar.")
    return JaxTraining(open_model(model), _checked(optimizer), loss, dtype, rules, jit)


def _checked(optimizer):
    """The optax transformation. Raises `CompareError` for what is none."""
    of_torch = isinstance(optimizer, torch.optim.Optimizer) or (
        isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    )
    require(not of_torch, f"the JAX side's optimizer is torch's {_kind(optimizer)}; pass an optax transformation.")
    require(
        callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None)),
        f"optimizer={_kind(optimizer)} must have init and update; pass an optax.GradientTransformation, as "
        "optax.adam(1e-3) is.",
    )
    return optimizer


def _kind(value) -> str:
    """Name of a class, or of an object's."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


class _RoundedBases(Mode):
    """Rounds the base of a power of a number under `rounding_noise`, as a number in a narrow dtype is: betas."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.pow.Scalar:
            args = (float(rounded(np.array(args[0], np.float64))), *args[1:])
        return func(*args, **(kwargs or {}))


class TorchTraining:
    """Updates of a torch module by a torch optimizer; made by `torch_training`."""

    def __init__(self, module, optimizer, loss: Callable, dtype: str, clip, scheduler, rounding: str = "") -> None:
        self._made_of = (module, optimizer, loss, dtype, clip, scheduler)
        self._loss, self.dtype, self.clip = loss, dtype, clip
        self._rounds_bases = rounding not in ("", "float64")
        copied = copy.deepcopy(module)
        for own in copied.parameters():
            own.grad = None
        self._module = copied.to(getattr(torch, dtype))
        self._names = dict(self._module.named_parameters())
        if isinstance(optimizer, torch.optim.Optimizer):
            theirs = dict(module.named_parameters())
            self._optimizer = _rebuilt(optimizer, {id(theirs[name]): own for name, own in self._names.items()})
        else:
            try:
                self._optimizer = optimizer(list(self._module.parameters()))
            except Exception as error:
                raise CompareError(
                    f"the optimizer cannot be made: {first_line(error)}; pass a function of a list of parameters: "
                    "lambda params: torch.optim.AdamW(params)."
                ) from error
        require(
            isinstance(self._optimizer, torch.optim.Optimizer),
            f"the factory returned {_kind(self._optimizer)} and must return a torch.optim.Optimizer; do so.",
        )
        self._scheduler = scheduler(self._optimizer) if scheduler else None
        self._has_run = False
        for group in self._optimizer.param_groups:
            if rounding and "differentiable" in group:
                group["differentiable"] = True
        self.settings: list[dict[str, dict[str, Any]]] = [self._settings()]
        """Hyperparameters by parameter, before each step taken so far and before the next."""

    def fresh(self, *, rounding: str = "") -> "TorchTraining":
        """The same training before its first step.

        With the dtype of a comparison as `rounding` the optimizer's scalars, Adam's 1 - beta^t among them, are tensors
        where it can have them so, and round under `rounding_noise`: torch has them in Python's float64, optax in the
        dtype of the run. Below float64 the betas are rounded too.
        """
        return type(self)(*self._made_of, rounding)

    @property
    def kind(self) -> str:
        """Class name of the optimizer."""
        return type(self._optimizer).__name__

    def start(self) -> Arrays:
        """The parameters as they are now."""
        return {name: to_numpy(value) for name, value in self._names.items()}

    def owners(self) -> dict[str, str]:
        """Class name of the module that holds each parameter."""
        modules = dict(self._module.named_modules())
        return {name: type(modules[name.rpartition(".")[0]]).__name__ for name in self._names}

    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters -> their first."""
        first = {id(value): name for name, value in self._names.items()}
        every = self._module.named_parameters(remove_duplicate=False)
        return {name: first[id(value)] for name, value in every if first[id(value)] != name}

    def _settings(self) -> dict[str, dict[str, Any]]:
        names = {id(value): name for name, value in self._names.items()}
        found = {}
        for group in self._optimizer.param_groups:
            values = {key: _plain(value) for key, value in group.items() if key != "params"}
            found |= {names[id(value)]: values for value in group["params"] if id(value) in names}
        return found

    def __call__(self, batch) -> Arrays:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # a fused kernel is one operation to the noise
            if self.dtype == "float64":
                stack.enter_context(Widened(*NARROW))
                stack.enter_context(default_dtype(torch.float64))
                if self._rounds_bases:
                    stack.enter_context(_RoundedBases())
            return self._step(batch)

    def _step(self, batch) -> Arrays:
        width = getattr(torch, self.dtype)

        def tensor(x):
            if not _is_array(x):
                return x
            x = x if isinstance(x, torch.Tensor) else torch.tensor(np.asarray(x))
            return x.to(width) if x.is_floating_point() else x

        self._optimizer.zero_grad()
        try:
            loss = self._loss(self._module, jax.tree.map(tensor, batch))
        except Exception as error:
            if isinstance(error, CompareError) or self._has_run:
                raise
            raise CompareError(
                f"the torch loss does not run on this batch: {first_line(error)}; loss(module, batch) gets the batch "
                "as it is, its arrays as tensors."
            ) from error
        self._has_run = True
        require(
            isinstance(loss, torch.Tensor) and loss.dim() == 0 and loss.is_floating_point(),
            f"the torch loss returned {_what(loss)} and must return a scalar tensor; return its mean or its sum alone.",
        )
        require(
            loss.requires_grad,
            "the torch loss does not depend on a trained parameter; let it run without torch.no_grad() and .item().",
        )
        loss.backward()
        left = {"loss": to_numpy(loss)}
        before = self.start()
        trained = {name: value for name, value in self._names.items() if value.requires_grad}
        for name, value in reversed(trained.items()):
            # A parameter that the loss does not reach has no gradient here and zeros in JAX.
            left[f"gradient {name}"] = np.zeros(value.shape) if value.grad is None else to_numpy(value.grad)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self._names.values()), self.clip)
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        self.settings.append(self._settings())
        for name, value in self._names.items():
            for slot, one in self._optimizer.state.get(value, {}).items():
                if isinstance(one, torch.Tensor) and (one.shape == value.shape or slot == "step"):
                    left[f"slot {slot} {name}"] = to_numpy(one)
                elif slot == "step":
                    left[f"slot {slot} {name}"] = np.array(float(one))
        after = self.start()
        left |= {f"update {name}": after[name] - before[name] for name in after}
        return left | {f"parameter {name}": value for name, value in after.items()}


def _plain(value):
    """A hyperparameter as Python has it: a learning rate may be a tensor."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _rebuilt(optimizer: torch.optim.Optimizer, own: dict[int, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """A copy of an optimizer that updates the copied parameters, at the learning rates it was made with."""
    strangers = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    require(
        not strangers,
        f"the optimizer holds {len(strangers)} tensors that are no parameters of the module, e.g. of shape "
        f"{list(strangers[0].shape) if strangers else ''}; pass a factory: lambda params: torch.optim.AdamW(params).",
    )
    require(
        not optimizer.state,
        f"the {type(optimizer).__name__} has taken steps and must be new, as the JAX state is; build it again.",
    )
    # deepcopy takes from its memo what stands there: the copied parameter in place of each.
    copied = copy.deepcopy(optimizer, dict(own))
    for group in copied.param_groups:
        if "initial_lr" in group:  # a scheduler was built on it, and ours starts again
            group["lr"] = group.pop("initial_lr")
    return copied


def torch_training(
    module: torch.nn.Module,
    optimizer,
    loss: Callable,
    *,
    dtype: str = "float64",
    clip: float | None = None,
    scheduler=None,
) -> TorchTraining:
    """Steps of a torch module, the reference: always float64 if it is compared with, whatever the JAX side's dtype.

    `optimizer` is a torch.optim.Optimizer built on the module's parameters, or a function of a list of parameters that
    builds one. `loss(module, batch)` returns a scalar tensor; floating arrays of the batch come in `dtype`. Gradients
    are clipped to the norm `clip` by torch.nn.utils.clip_grad_norm_; `scheduler(optimizer)` builds a learning-rate
    scheduler, which steps after the optimizer. Module and optimizer are not changed. Raises `CompareError`.
    """
    check_dtypes(dtype)
    require(
        isinstance(module, torch.nn.Module),
        f"module={type(module).__name__} must be a torch.nn.Module; pass the one that is trained.",
    )
    require(
        not (hasattr(optimizer, "init") and hasattr(optimizer, "update")),
        "the torch side's optimizer is an optax transformation; pass a torch.optim.Optimizer.",
    )
    require(
        isinstance(optimizer, torch.optim.Optimizer) or callable(optimizer),
        f"optimizer={_kind(optimizer)} must be a torch.optim.Optimizer or a function of parameters; pass one of them.",
    )
    require(callable(loss), f"loss={loss!r} must be callable; pass a function loss(module, batch) -> scalar.")
    require(clip is None or clip > 0, f"clip={clip} must be positive; give the largest norm, or None for no clipping.")
    require(
        scheduler is None or (callable(scheduler) and not hasattr(scheduler, "step")),
        f"scheduler={type(scheduler).__name__} must be a function of an optimizer; "
        "pass lambda opt: LambdaLR(opt, ...).",
    )
    snapshot = copy.deepcopy(module)
    if isinstance(optimizer, torch.optim.Optimizer):
        theirs = dict(snapshot.named_parameters())
        optimizer = _rebuilt(optimizer, {id(p): theirs[name] for name, p in module.named_parameters()})
    return TorchTraining(snapshot, optimizer, loss, dtype, clip, scheduler)


def check_left(left, side: str) -> dict[tuple[str, str, str], np.ndarray]:
    """What a step returned, by (kind, slot, name). Raises `CompareError` for names that say nothing."""
    require(
        isinstance(left, Mapping) and bool(left),
        f"{side} returned {type(left).__name__} and must return a mapping of names to arrays; return what a step left.",
    )
    found = {}
    for key, value in left.items():
        kind, _, name = str(key).partition(" ")
        slot = ""
        if kind == "slot":
            slot, _, name = name.partition(" ")
        if kind not in KINDS or (kind == "loss") != (not name):
            raise CompareError(
                f"{side} returned the name {key!r}; names are loss, gradient NAME, slot SLOT NAME, update NAME, "
                "parameter NAME; rename it."
            )
        found[kind, slot, name] = to_numpy(value)
    return found


KINDS = ("loss", "gradient", "slot", "update", "parameter")
"""What a step leaves, in the order in which it comes about."""


def text_of(key: tuple[str, str, str]) -> str:
    """`slot exp_avg l1.weight` of ("slot", "exp_avg", "l1.weight")."""
    return " ".join(part for part in key if part)
