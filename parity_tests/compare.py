"""Is your model the same in two frameworks? Two callables, or a Flax and a torch module, and one report.

`compare` takes two functions dtype -> named arrays in execution order; `compare_modules` taps a Flax NNX and a torch
module itself. The truth is the reference in float64. How an allowance comes about: `docs/parity.md`.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.overrides import TorchFunctionMode

from parity_tests.cases import PRECISIONS
from parity_tests.contract import process_contract
from parity_tests.montecarlo import SEEDS, allowances, amplification, rounded
from parity_tests.report import Report, Row
from parity_tests.taps import Operation, to_numpy, torch_taps, trace_jax
from parity_tests.tolerance import SAFETY, relative_error, wide
from recipe.config import require
from recipe.contract import NOT_THERE, UNIT_ROUNDOFF, PrecisionContract, require_same

Arrays = Mapping[str, np.ndarray]


def compare(
    reference: Callable[[str], Arrays],
    candidate: Callable[[str], Arrays],
    *,
    dtypes: Sequence[str] = ("float64", "float32"),
    name_map: Mapping[str, str] | None = None,
    truth: Arrays | None = None,
    allowance: Callable[[str, str], float] | None = None,
    contracts: Mapping[str, PrecisionContract] | None = None,
    title: str = "candidate against reference",
) -> Report:
    """Compare what two functions return for each dtype ("float64", "float32", "bfloat16"), name by name.

    `name_map` takes a candidate's name to the reference's. `truth` is `reference("float64")` unless given.
    `allowance(dtype, name)` replaces `own_error_allowances`. `contracts` of "reference" and "candidate", if given, must
    agree. Raises `UserError` if no name is common to both.
    """
    _check_dtypes(dtypes)
    if contracts is not None:
        require_same(contracts["reference"], contracts["candidate"])
    truth = dict(reference("float64") if truth is None else truth)
    rows, notes = [], []
    single = None
    for dtype in dtypes:
        values = _renamed(candidate(dtype), name_map)
        common = _common(truth, values, notes)
        own = None if dtype == "float64" else dict(reference(dtype))
        if allowance is None and own is None and single is None:
            single = dict(reference("float32"))
        if allowance is not None:
            allowed = {name: allowance(dtype, name) for name in common}
        else:
            allowed = own_error_allowances({n: truth[n] for n in common}, single if own is None else own, dtype)
        sides = {"candidate": values} if own is None else {"reference": own, "candidate": values}
        # The reference is the measure here, so it is shown and never judged.
        limits = {"reference": dict.fromkeys(common, math.inf), "candidate": allowed}
        rows += make_rows(dtype, {name: truth[name] for name in common}, sides, limits)
    return Report(title, rows, dict(contracts or {}), {"dtypes": list(dtypes)}, notes)


def own_error_allowances(truth: Arrays, own: Arrays, dtype: str) -> dict[str, float]:
    """SAFETY times the reference's own error, the largest so far in execution order, at least one rounding.

    The largest so far, because an error once made is carried on, and luck with one tensor binds nobody. For float64
    `own` is the reference's float32 run: rounding errors scale with u, and twice, for the truth errs as well.
    """
    measured = "float32" if dtype == "float64" else dtype
    sides = 2 if dtype == "float64" else 1
    kappa, allowed = 1.0, {}
    for name, value in truth.items():
        kappa = max(kappa, relative_error(own[name], value) / UNIT_ROUNDOFF[measured])
        allowed[name] = sides * SAFETY * kappa * UNIT_ROUNDOFF[dtype]
    return allowed


def make_rows(
    dtype: str,
    truth: Arrays,
    sides: Mapping[str, Arrays],
    limits: Mapping[str, Mapping[str, float]],
    operations: Mapping[str, Operation] | None = None,
) -> list[Row]:
    """A row per tensor of the truth, with every side that has it."""
    rows, previous = [], ()
    for name, true in truth.items():
        errors, allowed, details = {}, {}, {}
        for side, arrays in sides.items():
            if name not in arrays:
                continue
            errors[side], detail = _error(arrays[name], true)
            allowed[side] = limits[side][name]
            if not errors[side] <= allowed[side]:
                details[side] = detail
        operation, inputs = ("", previous) if operations is None else operations[name]
        rows.append(Row(dtype, name, np.shape(true), errors, allowed, operation, tuple(inputs), details))
        previous = (name,)
    return rows


def _error(value: np.ndarray, truth: np.ndarray) -> tuple[float, str]:
    """Relative error, infinite for another shape or a value that is not a number; and the worst element in words."""
    value, truth = wide(value), wide(truth)
    if value.shape != truth.shape:
        return math.inf, f"shape {value.shape} instead of {truth.shape}"
    if not truth.size:
        return 0.0, "no element"
    error = relative_error(value, truth)
    worst = np.unravel_index(np.argmax(np.nan_to_num(np.abs(value - truth), nan=math.inf)), value.shape)
    detail = f"worst at {tuple(map(int, worst))}: {value[worst].item()!r} instead of {truth[worst].item()!r}"
    return (error if math.isfinite(error) else math.inf), detail


def _check_dtypes(dtypes: Sequence[str]) -> None:
    unknown = [dtype for dtype in dtypes if dtype not in UNIT_ROUNDOFF]
    require(bool(dtypes) and not unknown, f"dtypes={list(dtypes)} must be some of {', '.join(UNIT_ROUNDOFF)}.")


def _renamed(values: Arrays, name_map: Mapping[str, str] | None) -> dict[str, np.ndarray]:
    return {(name_map or {}).get(name, name): value for name, value in values.items()}


def _common(truth: Arrays, values: Arrays, notes: list[str]) -> list[str]:
    """Names on both sides in the reference's order; those on one side alone are noted, once."""
    common = [name for name in truth if name in values]
    require(
        bool(common),
        f"no name is common to both sides: the reference has {', '.join(list(truth)[:3])} ..., the candidate "
        f"{', '.join(list(values)[:3])} ...; pass name_map={{candidate's name: reference's name}}.",
    )
    for side, names in (
        ("reference", [n for n in truth if n not in values]),
        ("candidate", values.keys() - truth.keys()),
    ):
        note = f"only in the {side}, not compared: {', '.join(sorted(names))}"
        if names and note not in notes:
            notes.append(note)
    return common


class _Widened(TorchFunctionMode):
    """Makes torch code that names float32 mean float64, so that a model which casts inside has a float64 truth."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(x):
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def _torch_arrays(
    module: torch.nn.Module, inputs: Sequence[np.ndarray], dtype: str, *, noisy: bool
) -> dict[str, np.ndarray]:
    """Weights, taps and gradients of a copy of the module; `noisy` passes what is cast on the way in to `rounded`."""
    width = getattr(torch, dtype)
    module = copy.deepcopy(module).to(width)
    if noisy:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.tensor(rounded(parameter.numpy())))
    module.zero_grad()
    arguments = [torch.tensor(rounded(x) if noisy else x) if _is_float(x) else torch.tensor(x) for x in inputs]
    arguments = [x.to(width) if x.is_floating_point() else x for x in arguments]
    with torch_taps(module) as (forward, backward):
        out = _first(module(*arguments))
        loss = (out * torch.tensor(_cotangent(out.shape)).to(out.dtype)).sum()
        loss.backward()
    weights = {name: parameter for name, parameter in module.named_parameters()}
    gradients = {name: x.grad for name, x in reversed(weights.items()) if x.grad is not None}
    return {
        **{f"weight {name}": to_numpy(weight) for name, weight in weights.items()},
        **{f"forward {name}": value for name, value in forward.items()},
        **{f"backward {name}": backward[name] for name in reversed(forward) if name in backward},
        **{f"gradient {name}": to_numpy(gradient) for name, gradient in gradients.items()},
    }


def _flax_arrays(module: nnx.Module, inputs: Sequence[np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The same of the Flax module, its parameters under torch's names and in torch's layout."""
    with jax.enable_x64(dtype == "float64"):
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def cast(x):
            return jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        params, rest = jax.tree.map(cast, params), jax.tree.map(cast, rest)
        arguments = [jnp.asarray(x, dtype) if _is_float(x) else jnp.asarray(x) for x in inputs]

        def objective(model):
            out = _first(model(*arguments))
            return (out * jnp.asarray(_cotangent(out.shape), out.dtype)).sum()

        forward, backward, gradients = trace_jax(lambda params: nnx.merge(graph, params, rest), params, objective)
        del forward["loss"]  # the scalar that was differentiated is ours
        weights = _torch_layout(params)
        return {
            **{f"weight {name}": value for name, value in weights.items()},
            **{f"forward {name}": value for name, value in forward.items()},
            **{f"backward {name}": value for name, value in backward.items()},
            **{f"gradient {name}": value for name, value in reversed(_torch_layout(gradients).items())},
        }


def _torch_layout(params: nnx.State) -> dict[str, np.ndarray]:
    """Flax's parameters as torch names and lays them out: a 2-d `kernel` is a transposed `weight`; `scale` and
    `embedding` are called `weight`; the rest is as it is."""
    arrays = {}
    for path, leaf in nnx.to_flat_state(params):
        array, (*parents, last) = to_numpy(leaf[...]), map(str, path)
        if last == "kernel" and array.ndim == 2:
            last, array = "weight", np.ascontiguousarray(array.T)
        arrays[".".join([*parents, "weight" if last in ("scale", "embedding") else last])] = array
    return arrays


def _first(out):
    """The array of a module's result: itself, the first of a tuple, or the logits of a transformers output."""
    if hasattr(out, "logits"):
        return out.logits
    return out[0] if isinstance(out, tuple) else out


def _cotangent(shape: Iterable[int]) -> np.ndarray:
    """What the output is multiplied by before it is summed: random, so that no gradient cancels by symmetry."""
    return np.random.default_rng(0).standard_normal(tuple(shape)).astype(np.float32)


def _is_float(x: np.ndarray) -> bool:
    return np.issubdtype(np.asarray(x).dtype, np.floating)


def compare_modules(
    flax_module: nnx.Module,
    torch_module: torch.nn.Module,
    inputs: Sequence[np.ndarray],
    name_map: Mapping[str, str] | None = None,
    *,
    dtypes: Sequence[str] = ("float64", "float32"),
    seeds: Iterable[int] = SEEDS,
    title: str = "Flax against torch",
) -> Report:
    """Tap both modules on the same inputs: weights, every submodule's output, every cotangent, every gradient.

    Both must hold the same weights already; the first rows say whether they do. `name_map` takes a Flax path (of a
    module, a parameter, or a prefix of such paths) to the torch one. Allowances come from Monte-Carlo arithmetic on the
    torch module. Neither module is changed. Modules must be deterministic: no dropout, no cache.
    """
    _check_dtypes(dtypes)
    rows, notes, contracts = [], [], {}
    for dtype in dtypes:

        def compute(dtype=dtype):
            with _Widened():
                return _torch_arrays(torch_module, inputs, "float64", noisy=dtype != "float64")

        truth, kappas = amplification(compute, dtype, seeds=seeds)
        limit = allowances({name: max(1.0, kappa) for name, kappa in kappas.items()}, dtype)
        flax = {_mapped(name, name_map): value for name, value in _flax_arrays(flax_module, inputs, dtype).items()}
        sides = {"jax": flax}
        if dtype != "float64":
            sides["torch"] = _torch_arrays(torch_module, inputs, dtype, noisy=False)
        common = _common(truth, flax, notes)
        contracts = _module_contracts(dtype)
        rows += make_rows(dtype, {name: truth[name] for name in common}, sides, dict.fromkeys(sides, limit))
    settings = {"dtypes": list(dtypes), "inputs": [list(np.shape(x)) for x in inputs]}
    return Report(title, rows, contracts, settings, notes)


def _mapped(name: str, name_map: Mapping[str, str] | None) -> str:
    """`PHASE PATH` with the longest matching prefix of the path replaced."""
    phase, _, path = name.partition(" ")
    for flax, theirs in sorted((name_map or {}).items(), key=lambda item: -len(item[0])):
        if path == flax or path.startswith(flax + "."):
            return f"{phase} {theirs}{path[len(flax) :]}"
    return name


def _module_contracts(dtype: str) -> dict[str, PrecisionContract]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype == "float64"))
        options = dict(params=dtype, newton_schulz=NOT_THERE, attention="the module's own")
        contracts = {side: process_contract(side, side, PRECISIONS[dtype], **options) for side in ("jax", "torch")}
    require_same(contracts["jax"], contracts["torch"])
    return contracts
