"""A JAX function as its program: named outputs taken out of it, cotangents too, float32 made float64.

`tap` names an array where the function is traced; the program (a jaxpr) is then run again equation by equation. That
reaches into `jit`, `remat`, `vmap` and `scan`, whose values could not leave their traces otherwise: a body of `jit` or
`remat` is run in place, a `scan` hands its taps out stacked over its steps. Bodies of `while`, `cond` and of functions
with a derivative of their own are run as they are, and taps within them are not reached.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.extend.core import primitives

PREFIX = "parity:"

COMPILED_FOR_ONE_RUN = {"xla_backend_optimization_level": 0}
"""Options of XLA for a program that runs once or twice: half the time of a comparison is the compiler's."""

_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
"""Primitives that give random numbers."""

_WIDE = {np.dtype(np.float32): np.dtype(np.float64), np.dtype(np.complex64): np.dtype(np.complex128)}

# Part of the key of JAX's caches: what is traced with taps, or with float32 meaning float64, is traced anew and never
# handed to anybody else.
_traced = jax.make_user_context(None)


def tap(name: str, x: jax.Array) -> jax.Array:
    """x itself; under a comparison its value is compared under this name. Works inside jit, vmap, remat and scan."""
    return checkpoint_name(x, PREFIX + name)


@contextlib.contextmanager
def tracing(dtype: str) -> Iterator[None]:
    """Context in which a model is traced: x64 as the dtype needs it, products not cut short, caches of its own.

    In float64 the name `jnp.float32` means float64, so that a model that casts inside has a program in float64.
    """
    original = jnp.float32, jnp.complex64
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"), _traced(f"compare {dtype}"):
        try:
            if dtype == "float64":
                jnp.float32, jnp.complex64 = jnp.float64, jnp.complex128
            yield
        finally:
            jnp.float32, jnp.complex64 = original


@dataclass
class Program:
    """A traced function of flat arguments, and how it is run."""

    jaxpr: core.ClosedJaxpr
    widen: bool
    """Whether float32 inside means float64."""
    float32: list[str] = field(default_factory=list)
    """What stays rounded to float32 though all is float64, filled while it runs."""
    unreached: list[str] = field(default_factory=list)
    """Names of taps inside bodies that cannot be entered."""

    def run(self, constants: list, args: list, perturbations: Mapping[str, Any] | None):
        """(outputs, taps by name in execution order); perturbations are added at the taps of their names.

        `constants` are those of the method of that name, or others in their place.
        """
        self.float32.clear()
        self.unreached.clear()
        state = _State(self, perturbations)
        kinds = [one.aval.dtype for one in self.jaxpr.jaxpr.invars]
        args = [
            jnp.asarray(one, kind) if jnp.issubdtype(kind, jnp.integer) else one
            for one, kind in zip(args, kinds, strict=True)
        ]
        outputs = state.evaluate(self.jaxpr.jaxpr, constants, args)
        return outputs, state.taps

    def constants(self) -> list:
        """The arrays that the function captured, float32 in float64 where all is."""
        return self.as_computed(self.jaxpr.jaxpr.constvars, self.jaxpr.consts)

    def as_computed(self, variables: list, values: list) -> list:
        """What the program captured, as it is computed with: float32 widened where all is, whole numbers as typed."""
        found = []
        for variable, value in zip(variables, values, strict=True):
            if self.widen and is_narrow(value):
                value = jnp.asarray(decimal(np.asarray(value)))
            elif jnp.issubdtype(variable.aval.dtype, jnp.integer):  # NumPy's int64 stays as it is in a program of int32
                value = jnp.asarray(value, jax.dtypes.canonicalize_dtype(variable.aval.dtype))
            found.append(value)
        return found

    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return any(name in _RANDOM for name in _primitives(self.jaxpr.jaxpr))

    def rounded_constants(self) -> dict[int, str]:
        """Those in float32 whose numbers are the rounding of others, as a sine is; position -> what it is called."""
        return {
            index: f"an array of shape {np.shape(one)} in the JAX function"
            for index, one in enumerate(self.jaxpr.consts)
            if is_narrow(one) and not is_exact(np.asarray(one))
        }


class _State:
    """One run: the taps so far and the names they have."""

    def __init__(self, program: Program, perturbations: Mapping[str, Any] | None) -> None:
        self.program, self.perturbations = program, perturbations
        self.taps: dict[str, Any] = {}

    def unique(self, name: str) -> str:
        number, found = 1, name
        while found in self.taps:
            number += 1
            found = f"{name}#{number}"
        return found

    def tap(self, name: str, value):
        """Record a value; returns what the program goes on with."""
        name = self.unique(name)
        if self.perturbations is not None and name in self.perturbations:
            value = value + self.perturbations[name]
        self.taps[name] = value
        return value

    def evaluate(self, jaxpr: core.Jaxpr, constants: list, args: list) -> list:
        environment: dict[Any, Any] = {}

        def read(atom):
            if not isinstance(atom, core.Literal):
                return environment[atom]
            return self.program.as_computed([atom], [atom.val])[0]

        environment |= zip(jaxpr.constvars, constants, strict=True)
        environment |= zip(jaxpr.invars, args, strict=True)
        for equation in jaxpr.eqns:
            values = [read(atom) for atom in equation.invars]
            outputs = self.apply(equation, values)
            environment |= zip(equation.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, equation, values: list) -> list:
        primitive, params = equation.primitive, equation.params
        if primitive is primitives.name_p and str(params["name"]).startswith(PREFIX):
            return [self.tap(params["name"].removeprefix(PREFIX), values[0])]
        if primitive is primitives.jit_p:
            return self.inside(params["jaxpr"], values)
        if primitive is primitives.remat_p:
            return self.evaluate(params["jaxpr"], [], values)
        if primitive is primitives.closed_call_p:
            return self.inside(params["call_jaxpr"], values)
        if primitive is primitives.scan_p:
            return self.scan(params, values)
        if primitive is primitives.custom_jvp_call_p and self.wider(equation, values):
            return self.inside(params["call_jaxpr"], values)
        return self.bind(equation, values)

    def inside(self, closed: core.ClosedJaxpr, values: list) -> list:
        return self.evaluate(closed.jaxpr, self.program.as_computed(closed.jaxpr.constvars, closed.consts), values)

    def wider(self, equation, values: list) -> bool:
        """Whether some value has become float64 where the program has float32."""
        return self.program.widen and any(
            is_narrow(atom.aval) and jnp.result_type(value) == _WIDE[atom.aval.dtype]
            for atom, value in zip(equation.invars, values, strict=True)
        )

    def bind(self, equation, values: list) -> list:
        """Run one equation, its float32 made float64 where that is asked for."""
        primitive, params = equation.primitive, dict(equation.params)
        bodies = list(core.jaxprs_in_params(params))
        for body in bodies:
            self.program.unreached += [str(name) for name in _names(body)]
        if self.program.widen and not bodies:
            params = {key: _widened(value) for key, value in params.items()}
        elif self.wider(equation, values):
            # A body that we do not enter is typed: it gets the float32 that it was written for.
            self.program.float32.append(f"{primitive.name} with a body in float32")
            values = [
                jnp.asarray(value, atom.aval.dtype) if is_narrow(atom.aval) else value
                for atom, value in zip(equation.invars, values, strict=True)
            ]
        outputs = primitive.bind(*values, **primitive.get_bind_params(params))
        outputs = list(outputs) if primitive.multiple_results else [outputs]
        if self.program.widen and bodies:
            outputs = [jnp.asarray(one, _WIDE[one.dtype]) if is_narrow(one) else one for one in outputs]
        return outputs

    def scan(self, params: dict, values: list) -> list:
        """A scan whose taps come out stacked, by a scan of our own over the same body."""
        if "ft_in" in params:  # jax 0.12 groups the arguments
            fixed, carry, xs = map(list, params["ft_in"].update(values).unpack())
        else:
            consts, carried = params["num_consts"], params["num_carry"]
            fixed, carry, xs = values[:consts], values[consts : consts + carried], values[consts + carried :]
        body, carried = params["jaxpr"], len(carry)

        if not any(True for _ in _names(body.jaxpr)) and not self.program.widen:
            return list(primitives.scan_p.bind(*values, **params))

        def run(inner: _State, carry, xs):
            outputs = inner.inside(body, [*fixed, *carry, *xs])
            return outputs[:carried], outputs[carried:]

        # Names of the taps of one step, and the widths that its carry settles at.
        probe = _State(self.program, None)
        first = [x[0] for x in xs]
        shapes = jax.eval_shape(lambda carry, first: run(probe, carry, first), carry, first)
        carry = [jnp.asarray(x, shape.dtype) for x, shape in zip(carry, shapes[0], strict=True)]
        outer = {}
        for name in probe.taps:
            outer[name] = self.unique(name)
            self.taps[outer[name]] = None
        mine = self.perturbations or {}
        shifts = {name: mine[unique] for name, unique in outer.items() if unique in mine}

        def step(carry, slices):
            xs, shifts = slices
            inner = _State(self.program, shifts)
            carry, ys = run(inner, carry, xs)
            return carry, (ys, inner.taps)

        carry, (ys, taps) = jax.lax.scan(
            step, carry, (xs, shifts), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        for name, unique in outer.items():
            self.taps[unique] = taps[name]
        return [*carry, *ys]


def _names(jaxpr) -> Iterator[str]:
    """Names of all taps in a program, its bodies included."""
    for equation in jaxpr.eqns:
        if equation.primitive is primitives.name_p and str(equation.params["name"]).startswith(PREFIX):
            yield equation.params["name"].removeprefix(PREFIX)
        for body in core.jaxprs_in_params(equation.params):
            yield from _names(body)


def _primitives(jaxpr) -> Iterator[str]:
    """Names of all primitives in a program, its bodies included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for body in core.jaxprs_in_params(equation.params):
            yield from _primitives(body)


def is_narrow(value) -> bool:
    """Whether it is an array of float32 or of complex numbers made of two of them."""
    return getattr(value, "dtype", None) in _WIDE


def _widened(value):
    """A parameter of an equation; the dtype float32 as float64."""
    is_dtype = isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic))
    return _WIDE.get(np.dtype(value), value) if is_dtype else value


def is_exact(array: np.ndarray) -> bool:
    """Whether float32 numbers are what was meant, not the rounding of others: whole, or of few binary digits."""
    if np.iscomplexobj(array):
        return is_exact(array.real) and is_exact(array.imag)
    with np.errstate(invalid="ignore"):
        narrow = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    return bool(np.all((narrow == array) | (array == np.rint(array)) | np.isnan(array)))


def decimal(array: np.ndarray) -> np.ndarray:
    """float32 in float64; a lone number is taken as a person would write it: 1e-6, not 9.99999997e-07."""
    if np.iscomplexobj(array):
        return decimal(array.real) + 1j * decimal(array.imag)
    if array.ndim:
        return array.astype(np.float64)
    return np.asarray(float(str(array[()])), np.float64)
