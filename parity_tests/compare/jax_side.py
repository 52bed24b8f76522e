"""The JAX side of a comparison: NNX, Linen, Equinox or a plain function, as one function of arrays with taps."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from parity_tests.compare.errors import CompareError, first_line, require, some
from parity_tests.compare.program import COMPILED_FOR_ONE_RUN, Program, is_exact, is_narrow, tap, tracing
from parity_tests.compare.torch_side import arguments, filled, named_leaves
from parity_tests.compare.walk import LOSS, Arrays, Run, Walk, flatten_output, to_numpy

WIDTHS = ("float64", "float32", "bfloat16", "float16")


class Model(NamedTuple):
    """A JAX model of any library in one form."""

    kind: str
    params: dict[str, Any]
    """Trained arrays by path."""
    state: dict[str, Any]
    """Other arrays of real numbers by path: statistics of batch norm, tables."""
    modules: list[str]
    """Paths of its submodules."""
    build: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    """(params, state) -> the model as its user calls it, whose arrays are these."""
    taps: Callable[[Any, str, list[str]], contextlib.AbstractContextManager]
    """(built model, dtype, notes) -> context in which calling it names its submodules' outputs."""
    replace: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    """(params, state) -> what the user handed over, with these arrays."""
    tree: Callable[[Mapping[str, Any]], Any]
    """Values by path of the trained arrays -> the pytree of them that its user's optimizer is given."""
    rest: dict[str, Any]
    """All other arrays by path, whole numbers and random keys too."""
    live: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Any, Callable[[], dict[str, Any]]]]
    """(params, rest) -> the model as a loss calls it, and a function that gives `rest` as the calls have left it."""
    dropping: tuple[str, ...] = ()
    """Its dropout layers that are on, unless a call says otherwise."""
    eval: str = ""
    """How its user switches them off."""


def is_inexact(value) -> bool:
    """Whether it is a JAX array of real or complex numbers."""
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.inexact)


def open_model(model: Any) -> Model:
    """The model in one form. Raises `CompareError` for what is none."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        raise CompareError("the JAX side is a torch module; pass the JAX module first and the torch module second.")
    flax = sys.modules.get("flax")
    if flax is not None:
        from flax import linen, nnx

        if isinstance(model, nnx.Module):
            return _open_nnx(model)
        if isinstance(model, linen.Module):
            require(
                model.scope is not None,
                f"the Linen module {type(model).__name__} has no variables; pass (module, variables) or "
                "module.bind(variables).",
            )
            return _open_linen(*model.unbind(), bound=True)
        if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], linen.Module):
            return _open_linen(*model, bound=False)
    equinox = sys.modules.get("equinox")
    if equinox is not None and isinstance(model, equinox.Module):
        return _open_equinox(model)
    if isinstance(model, tuple) and len(model) == 2 and callable(model[0]):
        return _open_function(*model)
    raise CompareError(
        f"the JAX side is a {type(model).__name__}; pass an NNX module, (Linen module, variables), an Equinox module "
        "or (function, params)."
    )


def _open_nnx(module) -> Model:
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    flat, others = dict(nnx.to_flat_state(params)), dict(nnx.to_flat_state(rest))

    def arrays_of(variables):
        found = {".".join(map(str, path)): _value(variable) for path, variable in variables.items()}
        return {name: value for name, value in found.items() if isinstance(value, jax.Array | np.ndarray)}

    def named(variables):
        found = arrays_of(variables).items()
        return {name: value for name, value in found if is_inexact(value) or isinstance(value, np.ndarray)}

    def filled(variables, arrays):
        pairs = []
        for path, variable in variables.items():
            name = ".".join(map(str, path))
            bare = not hasattr(variable, "replace")  # nnx.data(array)
            value = arrays.get(name, _value(variable))
            # A variable of its own in any case: what a call counts or draws is not to change the user's.
            pairs.append((path, value if bare else variable.replace(value)))
        return nnx.from_flat_state(pairs)

    def build(params, state):
        return nnx.merge(graph, filled(flat, params), filled(others, state))

    def replace(params, state):
        nnx.update(module, filled(flat, params), filled(others, state))
        return module

    def live(params, rest):
        built = build(params, rest)

        def left():
            found = arrays_of(dict(nnx.to_flat_state(nnx.state(built, nnx.Not(nnx.Param)))))
            return {name: found[name] for name in rest}

        return built, left

    parts = [(".".join(map(str, path)), part) for path, part in nnx.iter_modules(module)]
    dropping = tuple(
        f"{name or 'the module'} (rate={part.rate})"
        for name, part in parts
        if isinstance(part, nnx.Dropout) and part.rate > 0 and not part.deterministic
    )
    paths = [name for name, _ in parts if name]
    off = "call module.eval()"
    tree, rest = _refilling(nnx.as_pure(params)), arrays_of(others)
    return Model("nnx", named(flat), named(others), paths, build, _nnx_taps, replace, tree, rest, live, dropping, off)


def _value(variable):
    return variable[...] if hasattr(variable, "replace") and not isinstance(variable, jax.Array) else variable


_NAME = "to_nnx__compared_as"
"""Attribute of a module that is its path; a Linen module in an NNX one takes no attribute so begun for its variable."""


@contextlib.contextmanager
def _nnx_taps(model, dtype: str, notes: list[str]) -> Iterator[None]:
    from flax import nnx

    parts = list(nnx.iter_modules(model))
    for path, part in parts:
        name = ".".join(map(str, path))
        # A name that is kept when scan or remat take the module apart and make it anew.
        setattr(part, _NAME, name)
        _set_widths(part, name, dtype, notes)
    with patched_calls(_walk(), {type(part) for _, part in parts}, lambda self: getattr(self, _NAME, None)):
        yield


def _set_widths(part: Any, name: str, dtype: str, notes: list[str], put: Callable = setattr) -> None:
    """Set a layer's own dtype of computation, where one was frozen into it, to the one that is compared."""
    for attribute in ("dtype", "compute_dtype", "computation_dtype"):
        width = getattr(part, attribute, None)
        try:
            frozen = None if width is None else jnp.dtype(width).name
        except TypeError:
            continue
        if frozen in WIDTHS and frozen != dtype:
            put(part, attribute, jnp.dtype(dtype))
            kind = type(part).__name__
            notes.append(f"{attribute}={frozen} of {kind} layers is taken as the dtype compared")


@contextlib.contextmanager
def patched_calls(walk: Walk, kinds: set[type], path_of: Callable[[Any], str | None]) -> Iterator[None]:
    """Context in which `__call__` of these classes taps what it returns by the path of the object called."""

    def tapped(original):
        def call(self, *args, **kwargs):
            path = path_of(self)
            if path is None or (walk.path and walk.path[-1] == path):  # a parent class's __call__, through super()
                return original(self, *args, **kwargs)
            return walk.leave(path, original(self, *walk.enter(path, args), **kwargs))

        return call

    originals = {kind: kind.__call__ for kind in kinds if any("__call__" in vars(base) for base in kind.__mro__)}
    with contextlib.ExitStack() as stack:
        for kind, original in originals.items():
            own = vars(kind).get("__call__")
            stack.callback(
                *((type.__setattr__, kind, "__call__", own) if own else (type.__delattr__, kind, "__call__"))
            )
            type.__setattr__(kind, "__call__", tapped(original))
        yield


def _walk() -> Walk:
    """Names by path alone: a program numbers calls itself, since one trace may be run several times."""
    return Walk(lambda name, value, to_common: tap(name.partition("#")[0], value), is_inexact)


def _open_linen(module, variables, *, bound: bool) -> Model:
    from flax import linen

    require(
        isinstance(variables, Mapping) and "params" in variables,
        "the Linen module's variables hold no 'params'; pass (module, module.init(key, x)).",
    )
    leaves, tree = jax.tree_util.tree_flatten_with_path(dict(variables))
    names = [(_part(path[0]), ".".join(map(_part, path[1:]))) for path, _ in leaves]
    # Boxed leaves (nn.Partitioned) end in the box's own key.
    names = [(kind, name.removesuffix(".value")) for kind, name in names]
    values = [value for _, value in leaves]
    params = {name: value for (kind, name), value in zip(names, values, strict=True) if kind == "params"}
    state = {name: value for (kind, name), value in zip(names, values, strict=True) if kind != "params"}

    def put(params, state):
        found = [
            (params if kind == "params" else state).get(name, value)
            for (kind, name), value in zip(names, values, strict=True)
        ]
        return jax.tree.unflatten(tree, found)

    def build(params, state):
        filled = put(params, state)

        def call(*args, **kwargs):
            return module.apply(filled, *args, **kwargs)

        return call

    @contextlib.contextmanager
    def taps(model, dtype, notes):
        walk = _walk()

        def intercept(following, args, kwargs, context):
            part = context.module
            _set_widths(part, "", dtype, notes, object.__setattr__)
            if context.method_name != "__call__":
                return following(*args, **kwargs)
            path = ".".join(part.path)
            return walk.leave(path, following(*walk.enter(path, args), **kwargs))

        with linen.intercept_methods(intercept):
            yield

    def replace(params, state):
        filled = put(params, state)
        return module.bind(filled) if bound else (module, filled)

    def rest_of(variables):
        leaves, _ = jax.tree_util.tree_flatten_with_path(dict(variables))
        return {".".join(map(_part, path)): value for path, value in leaves if _part(path[0]) != "params"}

    def live(params, rest):
        keys = [".".join(map(_part, path)) for path, _ in leaves]
        filled = [
            params[name] if kind == "params" else rest[key] for key, (kind, name) in zip(keys, names, strict=True)
        ]
        changing = [collection for collection in variables if collection != "params"]
        built = module.bind(jax.tree.unflatten(tree, filled), mutable=changing)

        def left():
            found = rest_of(built.variables)
            return {key: found[key] for key in rest}

        return built, left

    paths = {name.rpartition(".")[0] for name in [*params, *state]}
    paths = {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}
    trained = _refilling(variables["params"], ".value")
    return Model(
        "linen",
        params,
        _inexact(state),
        sorted(paths - {""}),
        build,
        taps,
        replace,
        trained,
        rest_of(variables),
        live,
    )


def _open_equinox(module) -> Model:
    import equinox

    leaves, tree = jax.tree_util.tree_flatten_with_path(module)
    names = [".".join(map(_part, path)) for path, _ in leaves]
    values = [value for _, value in leaves]
    params = {name: value for name, value in zip(names, values, strict=True) if equinox.is_inexact_array(value)}

    def build(params, state):
        return jax.tree.unflatten(tree, [params.get(name, value) for name, value in zip(names, values, strict=True)])

    paths = dict(_equinox_modules(module, ""))

    @contextlib.contextmanager
    def taps(model, dtype, notes):
        known = {id(part): path for path, part in _equinox_modules(model, "")}
        kinds: dict[type, list[str]] = {}
        for path, part in _equinox_modules(model, ""):
            kinds.setdefault(type(part), []).append(path)

        def path_of(part):
            # What a transformation made anew is known by its class, if one path alone has it.
            only = kinds.get(type(part), [])
            return known.get(id(part), only[0] if len(only) == 1 else None)

        with patched_calls(_walk(), set(kinds), path_of):
            yield

    dropping = tuple(path for path, part in paths.items() if _drops(part))
    return Model(
        "equinox",
        params,
        {},
        [path for path in paths if path],
        build,
        taps,
        build,
        _refilling(module),
        {},
        _alive(build),
        dropping,
        "pass equinox.nn.inference_mode(module)",
    )


def _drops(part) -> bool:
    return type(part).__name__ == "Dropout" and not part.inference and isinstance(part.p, float) and part.p > 0


def _equinox_modules(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Path and object of a module and of those in its fields, lists and dicts."""
    import dataclasses

    import equinox

    if isinstance(part, equinox.Module):
        yield path, part
        children = [(field.name, getattr(part, field.name, None)) for field in dataclasses.fields(part)]
    elif isinstance(part, tuple | list):
        children = list(enumerate(part))
    elif isinstance(part, dict):
        children = list(part.items())
    else:
        return
    for key, child in children:
        yield from _equinox_modules(child, f"{path}.{key}" if path else str(key))


def _open_function(function, params) -> Model:
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    require(bool(leaves), "(function, params) has no parameters; pass a pytree of arrays.")
    names = [".".join(map(_part, path)) or "params" for path, _ in leaves]
    bad = [name for name, (_, value) in zip(names, leaves, strict=True) if not hasattr(value, "dtype")]
    require(not bad, f"(function, params): {some(bad)} is no array; pass a pytree of arrays.")
    values = dict(zip(names, (value for _, value in leaves), strict=True))

    def put(params, state):
        return jax.tree.unflatten(tree, [params.get(name, values[name]) for name in names])

    def build(params, state):
        filled = put(params, state)
        return lambda *args, **kwargs: function(filled, *args, **kwargs)

    inexact = _inexact(values)
    modules = {name.rpartition(".")[0] for name in names} - {""}
    return Model(
        "function",
        inexact,
        {},
        sorted(modules),
        build,
        lambda model, dtype, notes: contextlib.nullcontext(),
        lambda params, state: (function, put(params, state)),
        _refilling(params),
        {},
        _alive(build),
    )


def _alive(build: Callable) -> Callable:
    """`Model.live` of a library whose calls change nothing."""
    return lambda params, rest: (build(params, {}), dict)


def _refilling(tree: Any, suffix: str = "") -> Callable[[Mapping[str, Any]], Any]:
    """A function that puts values by path in place of a tree's leaves, and None where there is none.

    `suffix`: of a leaf's path, no part of its name.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [".".join(map(_part, path)).removesuffix(suffix) or "params" for path, _ in leaves]
    return lambda values: jax.tree.unflatten(structure, [values.get(name) for name in names])


def _inexact(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if jnp.issubdtype(jnp.result_type(value), jnp.inexact)}


def _part(key) -> str:
    """One step of a path in a pytree, as people write it."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def cast(x, dtype: str) -> jax.Array:
    """A JAX array; in this dtype if it holds real numbers, in one as wide if complex ones."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return x.astype(jnp.complex128 if dtype == "float64" else jnp.complex64)
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


class JaxSide:
    """A model that is never changed, and its inputs."""

    def __init__(self, model: Any, inputs: Any, call: Callable | None = None, loss: Callable | None = None) -> None:
        self.model, self.loss = open_model(model), loss
        self.args, self.kwargs = arguments(inputs)
        self.call = call or (lambda model, *args, **kwargs: model(*args, **kwargs))
        self.notes: list[str] = []
        self.unreached: list[str] = []
        self.float32: list[str] = []
        self._programs: dict[str, tuple[Program, list]] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and state array."""
        return {name: tuple(np.shape(one)) for name, one in [*self.model.params.items(), *self.model.state.items()]}

    def values(self) -> Arrays:
        """Parameters and states by name."""
        return {name: to_numpy(one) for name, one in [*self.model.params.items(), *self.model.state.items()]}

    def rounded_state(self) -> list[str]:
        """States in float32 whose numbers are the rounding of others; statistics, which were measured, are not."""
        return [name for name, one in self.model.state.items() if is_narrow(one) and not is_exact(np.asarray(one))]

    def output_shapes(self, dtype: str) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of every output, by key."""
        program, keys = self._program(dtype)
        return {key: (tuple(one.shape), one.dtype) for key, one in zip(keys, program.jaxpr.out_avals, strict=True)}

    def rounded_constants(self) -> dict[str, str]:
        """Captured arrays in float32 whose numbers are the rounding of others: key for `factors` -> what it is."""
        return {f"constant {index}": what for index, what in self._program("float64")[0].rounded_constants().items()}

    def constant_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every captured array, by key for `factors`."""
        program, _ = self._program("float64")
        return {f"constant {index}": tuple(np.shape(one)) for index, one in enumerate(program.jaxpr.consts)}

    def _program(self, dtype: str) -> tuple[Program, list]:
        if dtype not in self._programs:
            self._programs[dtype] = self._trace(dtype)
        return self._programs[dtype]

    def _trace(self, dtype: str) -> tuple[Program, list]:
        """The model's program in this dtype, and the keys of its outputs."""
        try:
            jaxpr, keys = self._traced(dtype)
        except CompareError:
            # A loop whose carry is float32 by its own default, as a recurrent cell's, is no program of float64. The
            # model as its user runs it is one of float32, and all that is float32 in it can be made wider.
            if dtype != "float64":
                raise
            try:
                jaxpr, keys = self._traced("float32")
            except CompareError:
                jaxpr = None
            if jaxpr is None:
                raise
        require(bool(keys), "the JAX side returns no array; return one, or pass call=lambda model, *inputs: ...")
        program = Program(jaxpr, widen=dtype == "float64")
        if program.draws():
            on = f" in {some(self.model.dropping)}" if self.model.dropping else ""
            raise CompareError(f"the JAX side draws random numbers{on}; {_switch_off(self.model)}.")
        return program, keys

    def _traced(self, dtype: str) -> tuple[Any, list[str]]:
        """The model's jaxpr in this dtype, and the keys of its outputs. Raises `CompareError` if it does not run."""
        keys: list[str] = []
        params, state, inputs = self._arrays(dtype)

        def run(params, state, inputs):
            keys.clear()
            model = self.model.build(params, state)
            args, kwargs = self._filled(inputs)
            with self.model.taps(model, dtype, self.notes):
                out = self.call(model, *args, **kwargs)
            outputs = flatten_output(out, lambda one: isinstance(one, jax.Array))
            if self.loss is not None:
                outputs[LOSS] = self._loss_of(out)
            keys.extend(outputs)
            return list(outputs.values())

        with tracing(dtype):
            try:
                jaxpr = jax.make_jaxpr(run)(params, state, inputs)
            except CompareError:
                raise
            except Exception as error:
                raise CompareError(
                    f"the JAX side does not run on these inputs in {dtype}: {first_line(error)}; "
                    f"{_remedy(error, self.model)}"
                ) from error
        return jaxpr, list(keys)

    def _loss_of(self, out: Any) -> jax.Array:
        try:
            value = self.loss(out)
        except Exception as error:
            raise CompareError(
                f"the loss of the JAX side's output fails: {first_line(error)}; loss is (of JAX's output, of torch's)."
            ) from error
        what = f"an array of shape {value.shape}" if isinstance(value, jax.Array) else type(value).__name__
        good = is_inexact(value) and value.shape == ()
        require(good, f"the loss of the JAX side's output is {what}; return a scalar array.")
        return value

    def _arrays(self, dtype: str):
        """Parameters, states and inputs in this dtype."""
        with tracing(dtype):
            found = self.model.params, self.model.state, self.given()
            return tuple({name: cast(one, dtype) for name, one in arrays.items()} for arrays in found)

    def given(self) -> dict[str, np.ndarray]:
        """The inputs that are arrays, by position or name."""
        every = named_leaves(self.args, self.kwargs)
        return {name: one for name, one in every.items() if isinstance(one, np.ndarray)}

    def _filled(self, inputs: Mapping[str, Any]) -> tuple[list, dict]:
        return filled(self.args, self.kwargs, inputs.get)

    def run(self, dtype: str, objective: Callable | None, *, factors: Mapping[str, np.ndarray] | None = None) -> Run:
        """One pass in `dtype`. `objective(outputs by key)` gives the scalar that is differentiated.

        `factors` multiply states and, under `constant INDEX`, what the function captured.
        """
        program, keys = self._program(dtype)
        params, state, inputs = self._arrays(dtype)
        with tracing(dtype):
            constants = program.constants()
            for name, factor in (factors or {}).items():
                if name.startswith("constant "):
                    index = int(name.split(" ")[1])
                    constants[index] = constants[index] * jnp.asarray(factor)
                else:
                    state[name] = state[name] * jnp.asarray(factor)
            differentiable = {name: one for name, one in inputs.items() if jnp.issubdtype(one.dtype, jnp.inexact)}
            fixed = {name: one for name, one in inputs.items() if name not in differentiable}
            order: list[str] = []
            jitted = functools.partial(jax.jit, compiler_options=COMPILED_FOR_ONE_RUN)

            def forward(params, differentiable, shifts, constants, state, fixed):
                args = jax.tree.leaves((params, state, {**differentiable, **fixed}))
                outputs, taps = program.run(constants, args, shifts)
                order[:] = taps
                by_key = dict(zip(keys, outputs, strict=True))
                return (objective(by_key) if objective else jnp.zeros(())), (by_key, taps)

            rest = (constants, state, fixed)
            if objective is None:
                _, (outputs, taps) = jitted(lambda *args: forward(*args[:2], None, *args[2:]))(
                    params, differentiable, *rest
                )
                loss, gradients, cotangents, given = None, {}, {}, {}
            else:
                shapes = jax.eval_shape(
                    lambda *args: forward(*args[:2], None, *args[2:])[1][1], params, differentiable, *rest
                )
                zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
                step = jitted(jax.value_and_grad(forward, argnums=(0, 1, 2), has_aux=True))
                (loss, (outputs, taps)), (gradients, given, cotangents) = step(params, differentiable, zeros, *rest)
        self.unreached, self.float32 = list(program.unreached), list(program.float32)
        return Run(
            {key: to_numpy(one) for key, one in outputs.items()},
            {name: to_numpy(taps[name]) for name in order},
            {name: _conjugate(cotangents[name]) for name in reversed(order) if name in cotangents},
            {name: _conjugate(one) for name, one in gradients.items()},
            {name: _conjugate(one) for name, one in given.items()},
            None if loss is None else to_numpy(loss),
        )


def _conjugate(value) -> np.ndarray:
    """A gradient in torch's convention, which for complex numbers is the conjugate of JAX's."""
    array = to_numpy(value)
    return array.conj() if np.iscomplexobj(array) else array


def _switch_off(model: Model) -> str:
    """How dropout is switched off."""
    by_argument = "pass deterministic=True in jax_inputs"
    return model.eval if model.kind == "equinox" else f"{model.eval}, or {by_argument}" if model.eval else by_argument


def _remedy(error: Exception, model: Model) -> str:
    """What helps against the usual ones."""
    kind, text = type(error).__name__, str(error)
    if kind == "InvalidRngError" or "RngCount" in text or "RngStream" in text or "Dropout requires a key" in text:
        on = f" in {some(model.dropping)}" if model.dropping else ""
        return f"it draws random numbers{on}: {_switch_off(model)}."
    if kind == "ModifyScopeVariableError":
        return "it writes statistics: pass use_running_average=True, train=False or the like in jax_inputs or call=."
    if isinstance(error, jax.errors.JAXTypeError | jax.errors.JAXIndexError):
        return "it is traced, so it must be written with jax.numpy and jax.lax."
    if kind == "TypeError" and "argument" in text:
        return "jax_inputs gives it arguments of its own, call= calls it in another way."
    if "dot_general" in text or "Incompatible shapes" in text or "shape" in text:
        return "jax_inputs gives it arrays of its own layout, call=lambda model, x: jax.vmap(model)(x) a batch axis."
    return "check the inputs, jax_inputs and call=."
