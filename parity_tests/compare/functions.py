"""Two functions dtype -> named arrays in execution order, and one report. The truth is the reference in float64.

How an allowance comes about: `docs/parity.md`.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from parity_tests.compare.errors import CompareError, require, some
from parity_tests.compare.precision import UNIT_ROUNDOFF, check_dtypes
from parity_tests.compare.report import Coverage, Operation, Report, Row
from parity_tests.compare.tolerance import SAFETY, error_and_worst, relative_error
from parity_tests.compare.walk import to_numpy

Arrays = Mapping[str, np.ndarray]


def compare(
    reference: Callable[[str], Arrays],
    candidate: Callable[[str], Arrays],
    *,
    dtypes: Sequence[str] = ("float64", "float32"),
    name_map: Mapping[str, str] | None = None,
    truth: Arrays | None = None,
    allowance: Callable[[str, str], float] | None = None,
    contracts: Mapping[str, Mapping[str, str]] | None = None,
    partial: bool = False,
    title: str = "candidate against reference",
) -> Report:
    """Compare what two functions return for each dtype ("float64", "float32", "bfloat16"), name by name.

    Arrays are NumPy's, JAX's or torch's, in a mapping or a list. `name_map` takes a candidate's name to the
    reference's. `truth` is `reference("float64")` unless given. `allowance(dtype, name)` replaces
    `own_error_allowances`. `contracts`, by side, are recorded. A name on one side alone and a key of `name_map` that
    matches nothing end in exit code 1 unless `partial`. Raises `CompareError` if no name is common to both.
    """
    dtypes = check_dtypes(dtypes)
    for whose, function in (("reference", reference), ("candidate", candidate)):
        _check_function(function, whose)
    truth = _arrays(reference("float64") if truth is None else truth, "the reference")
    rows, single, coverage = [], None, None
    for dtype in dtypes:
        given = _arrays(candidate(dtype), "the candidate")
        values = {(name_map or {}).get(name, name): value for name, value in given.items()}
        common = _common(truth, values)
        if coverage is None:
            coverage = _coverage(truth, given, values, name_map or {})
        own = None if dtype == "float64" else _arrays(reference(dtype), "the reference")
        if allowance is None and own is None and single is None:
            single = _arrays(reference("float32"), "the reference")
        if allowance is not None:
            allowed = {name: allowance(dtype, name) for name in common}
        else:
            allowed = own_error_allowances({n: truth[n] for n in common}, single if own is None else own, dtype)
        sides = {"candidate": values} if own is None else {"reference": own, "candidate": values}
        # The reference is the measure here, so it is shown and never judged.
        limits = {"reference": dict.fromkeys(common, math.inf), "candidate": allowed}
        rows += make_rows(dtype, {name: truth[name] for name in common}, sides, limits)
    return Report(title, rows, dict(contracts or {}), {"dtypes": list(dtypes)}, coverage=coverage, partial=partial)


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
            errors[side], detail = error_and_worst(arrays[name], true)
            allowed[side] = limits[side][name]
            if not errors[side] <= allowed[side]:
                details[side] = detail
        operation, inputs = ("", previous) if operations is None else operations[name]
        rows.append(Row(dtype, name, np.shape(true), errors, allowed, operation, tuple(inputs), details))
        previous = (name,)
    return rows


def _check_function(function: Any, whose: str) -> None:
    """Refuse what cannot be called with a dtype."""
    what = f"the {whose} must be a function of a dtype that returns named arrays"
    require(callable(function), f"{what}, and is a {type(function).__name__}; write e.g. lambda dtype: {{'a': x}}.")
    try:
        inspect.signature(function).bind("float64")
    except TypeError as error:
        raise CompareError(f"{what}: {error}; take one argument, the dtype's name.") from None
    except ValueError:  # a builtin without a signature
        return


def _arrays(values: Any, whose: str) -> dict[str, np.ndarray]:
    """Named NumPy arrays of what a function returned: a mapping, a list of arrays, or one array."""
    if hasattr(values, "shape"):
        values = {"output": values}
    elif isinstance(values, tuple | list):
        values = {f"output.{index}": value for index, value in enumerate(values)}
    require(isinstance(values, Mapping), f"{whose} returns a {type(values).__name__}; return a dict of arrays by name.")
    found = {}
    for name, value in values.items():
        try:
            found[str(name)] = to_numpy(value)
        except (TypeError, ValueError):
            raise CompareError(f"{whose} returns a {type(value).__name__} as {name!r}; return arrays.") from None
        require(
            found[str(name)].dtype.kind in "biufc",
            f"{whose} returns {name!r} with the dtype {found[str(name)].dtype}; return numbers or booleans.",
        )
    require(bool(found), f"{whose} returns nothing; return a dict of arrays by name.")
    return found


def _common(truth: Arrays, values: Arrays) -> list[str]:
    """Names on both sides in the reference's order."""
    common = [name for name in truth if name in values]
    require(
        bool(common),
        f"no name is common to both sides: the reference has {some(truth)}, the candidate {some(values)}; pass "
        "name_map={candidate's name: reference's name}.",
    )
    return common


def _coverage(truth: Arrays, given: Arrays, values: Arrays, name_map: Mapping[str, str]) -> Coverage:
    """How many names both sides have."""
    common = truth.keys() & values.keys()
    problems = [
        f"name_map key {name!r} is nothing that the candidate returned" for name in name_map if name not in given
    ]
    targets = [name for name in name_map.values() if name not in truth]
    problems += [f"name_map value {name!r} is nothing that the reference returned" for name in targets]
    return Coverage(
        tensors=(len(common), len(truth.keys() | values.keys())),
        only_jax=tuple(name for name in values if name not in common),
        only_torch=tuple(name for name in truth if name not in common),
        problems=tuple(problems),
        sides=("the candidate", "the reference"),
    )
