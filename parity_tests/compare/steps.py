"""Training steps of foreign models, as `compare_training` wants them: a batch in, what one update leaves out.

A step returns a mapping with some of: "loss"; "gradient NAME", as differentiated, before any clipping;
"slot SLOT NAME", an array of the optimizer's state after the update; "update NAME", the parameter after minus before;
"parameter NAME", after. A `JaxTraining` says so in JAX's names and layout, a `TorchTraining` in torch's.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from parity_tests.compare.errors import CompareError, require
from parity_tests.compare.montecarlo import rounded
from parity_tests.compare.precision import check_dtypes

Arrays = dict[str, np.ndarray]


def to_numpy(x) -> np.ndarray:
    """A jax or torch array on the host, in a memory of its own; bfloat16 becomes float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    x = np.array(x)
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x


def _is_array(x) -> bool:
    return isinstance(x, np.ndarray | np.generic | jax.Array)


def _is_inexact(x) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _paths(tree) -> dict[str, Any]:
    """Leaves by path, its parts joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


class JaxTraining:
    """Updates of a JAX model by an optax transformation; made by `jax_training`."""

    def __init__(self, params, rest, rebuild: Callable, optimizer, loss: Callable, dtype: str, rules=None) -> None:
        """`rebuild(params, rest, dtype)` gives the model, a function that returns `rest` as the loss left it, and a
        context for the loss.
        """
        self._made_of = (params, rest, rebuild, optimizer, loss, dtype, rules)
        self._rebuild, self._optimizer, self._loss = rebuild, optimizer, loss
        self.dtype, self.rules = dtype, rules
        with self._precision():
            self._params, self._rest = jax.tree.map(self._cast, (params, rest))
            self._state = optimizer.init(self._params)

    def _precision(self):
        return jax.enable_x64(self.dtype == "float64")

    def _cast(self, x):
        if not _is_array(x) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.array(x, self.dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)

    def fresh(self) -> "JaxTraining":
        """The same training before its first step."""
        return type(self)(*self._made_of)

    def start(self) -> Arrays:
        """The parameters as they are now, by JAX path."""
        return {name: to_numpy(value) for name, value in _paths(self._params).items()}

    def __call__(self, batch) -> Arrays:
        with self._precision(), jax.default_matmul_precision("highest"):
            arguments = jax.tree.map(self._cast, batch)

            def objective(params):
                model, rest_of, context = self._rebuild(params, self._rest, self.dtype)
                with context:
                    loss = jnp.asarray(self._loss(model, arguments))
                require(
                    loss.shape == (),
                    f"the JAX loss has shape {loss.shape} and must be a scalar; take its mean or its sum.",
                )
                return loss, rest_of()

            (loss, self._rest), gradients = jax.value_and_grad(objective, has_aux=True)(self._params)
            updates, self._state = self._optimizer.update(gradients, self._state, self._params)
            before = self._params
            # As optax.apply_updates: a masked update has no leaf and cannot be added.
            self._params = jax.tree.map(lambda p, u: jnp.asarray(p + u, p.dtype), before, updates)
            left = {"loss": to_numpy(loss)}
            left |= {f"gradient {name}": to_numpy(value) for name, value in _paths(gradients).items()}
            left |= {f"slot {key}": to_numpy(value) for key, value in optax_slots(self._state, before).items()}
            old, new = self._paths_of(before), self._paths_of(self._params)
            left |= {f"update {name}": new[name] - old[name] for name in new}
            return left | {f"parameter {name}": value for name, value in new.items()}

    @staticmethod
    def _paths_of(params) -> Arrays:
        return {name: to_numpy(value) for name, value in _paths(params).items()}


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
                floats = [name for name, x in leaves.items() if _is_inexact(x) and shapes.get(name) == np.shape(x)]
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


def jax_training(model, optimizer, loss: Callable, *, dtype: str = "float64", rules=None) -> JaxTraining:
    """Steps of a JAX model.

    `model` is a flax.nnx.Module, a pair (linen module, variables), an equinox.Module, or a pair (function, params).
    `loss(model, batch)` returns a scalar and gets the model as it was given; a Linen module bound to its variables; of
    a pair (function, params) a function of the inputs alone. `optimizer` is an optax.GradientTransformation. Floating
    arrays of the model and of a batch are cast to `dtype`. The model is not changed. Raises `CompareError`.
    """
    check_dtypes(dtype)
    require(
        hasattr(optimizer, "init") and hasattr(optimizer, "update"),
        f"optimizer={type(optimizer).__name__} must have init and update; pass an optax.GradientTransformation.",
    )
    require(callable(loss), f"loss={loss!r} must be callable; pass a function loss(model, batch) -> scalar.")
    return JaxTraining(*_parts_of(model), optimizer, loss, dtype, rules)


def _parts_of(model) -> tuple[Any, Any, Callable]:
    """Parameters, the other arrays, and the function that makes a model of them."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__}
    if "flax.Module" in kinds and not isinstance(model, tuple):
        from flax import nnx

        require(
            isinstance(model, nnx.Module),
            f"{type(model).__name__} is a Linen module without its variables; pass (module, variables).",
        )
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        variables, like = jax.tree.structure(params), jax.tree.structure(rest)

        def rebuild(values, others, dtype):
            whole = nnx.merge(graph, variables.unflatten(jax.tree.leaves(values)), like.unflatten(others))
            for _, part in nnx.iter_modules(whole):
                _compute_in(part, dtype)
            return whole, lambda: jax.tree.leaves(nnx.state(whole, nnx.Not(nnx.Param))), contextlib.nullcontext()

        return nnx.as_pure(params), jax.tree.leaves(rest), rebuild
    if "equinox.Module" in kinds:
        params = jax.tree.map(lambda x: x if _is_inexact(x) else None, model)

        def rebuild(values, *_):
            whole = jax.tree.map(
                lambda value, other: other if value is None else value, values, model, is_leaf=lambda x: x is None
            )
            return whole, lambda: (), contextlib.nullcontext()

        return params, (), rebuild
    good = isinstance(model, tuple) and len(model) == 2
    require(
        good,
        f"the JAX model is a {type(model).__name__} and must be an nnx.Module, (linen module, variables), an "
        "equinox.Module or (function, params); pass one of them.",
    )
    what, values = model
    if hasattr(what, "bind"):
        others = {name: value for name, value in values.items() if name != "params"}
        require("params" in values, "the Linen variables have no collection 'params'; pass what init returned.")
        return values["params"], others, functools.partial(_bound, what)
    require(callable(what), f"{what!r} must be callable; pass (function, params), called as function(params, ...).")
    return values, (), lambda p, *_: (functools.partial(what, p), lambda: (), contextlib.nullcontext())


def _compute_in(part, dtype: str) -> None:
    """Set a layer's own dtype of computation, where one was frozen into it, to the one that is compared."""
    for attribute in ("dtype", "compute_dtype", "computation_dtype"):
        width = getattr(part, attribute, None)
        if isinstance(width, str | type | np.dtype) and jnp.issubdtype(width, jnp.floating):
            object.__setattr__(part, attribute, jnp.dtype(dtype))


def _bound(module, params, rest, dtype: str):
    """A Linen module bound to its variables, whose layers compute in the dtype."""
    from flax import linen

    def intercept(call, args, kwargs, context):
        _compute_in(context.module, dtype)
        return call(*args, **kwargs)

    return module.bind({"params": params, **rest}), lambda: rest, linen.intercept_methods(intercept)


class _Widened(TorchFunctionMode):
    """Makes torch code that names a narrow dtype mean float64: models that cast inside, Muon's bfloat16 products."""

    NARROW = (torch.float32, torch.bfloat16, torch.float16)
    CASTS = (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half)

    def __init__(self, rounds_bases: bool) -> None:
        """`rounds_bases`: the base of a power is rounded under `rounding_noise`, as a number in a narrow dtype is."""
        super().__init__()
        self.rounds_bases = rounds_bases

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.rounds_bases and func is torch.Tensor.__rpow__:
            args = (args[0], float(rounded(np.array(args[1], np.float64))))

        def widen(x):
            return torch.float64 if any(x is one for one in self.NARROW) else x

        if any(func is one for one in self.CASTS):
            func = torch.Tensor.double
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
            self._optimizer = optimizer(list(self._module.parameters()))
        require(
            isinstance(self._optimizer, torch.optim.Optimizer),
            f"the factory returned {type(self._optimizer).__name__} and must return a torch.optim.Optimizer; do so.",
        )
        self._scheduler = scheduler(self._optimizer) if scheduler else None
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
                stack.enter_context(_Widened(self._rounds_bases))
                stack.enter_context(_default_dtype(torch.float64))
            return self._step(batch)

    def _step(self, batch) -> Arrays:
        width = getattr(torch, self.dtype)

        def cast(x):
            if not _is_array(x) and not isinstance(x, torch.Tensor):
                return x
            x = x if isinstance(x, torch.Tensor) else torch.tensor(np.asarray(x))
            return x.to(width) if x.is_floating_point() else x

        self._optimizer.zero_grad()
        loss = self._loss(self._module, jax.tree.map(cast, batch))
        require(
            isinstance(loss, torch.Tensor) and loss.dim() == 0,
            f"the torch loss is {list(np.shape(loss))} and must be a scalar tensor; take its mean or its sum.",
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
        isinstance(optimizer, torch.optim.Optimizer) or callable(optimizer),
        f"optimizer={optimizer!r} must be a torch.optim.Optimizer or a function of parameters; pass one of them.",
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
