"""Allowances derived from unit round-off and measured amplification; nothing here is tuned.

The error of an array is relative and global: ||value - truth||_F / ||truth||_F, the truth in float64. Element by
element it would mean nothing beside zero. The allowance of a computation in a dtype of unit round-off u is

    SAFETY * kappa * u,      kappa = ||noisy - truth|| / (||truth|| u)

where `noisy` is the same computation in float64 with noise of one u at every rounding (Monte-Carlo arithmetic;
Parker 1997, Higham and Mary 2019), so kappa is measured for the very inputs of the test. The error norm sums
thousands of independent roundings and concentrates to a few per cent; SAFETY = 2 covers that and second order.
"""

import math

import numpy as np

SAFETY = 2.0


def wide(value: np.ndarray) -> np.ndarray:
    """The array in float64, or in complex128 if it is complex: NumPy's cast would drop the imaginary part."""
    return np.asarray(value, np.complex128 if np.iscomplexobj(value) else np.float64)


def difference(value: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """value - truth in double precision; 0 where both are the same infinity, as a masked score is."""
    value, truth = wide(value), wide(truth)
    with np.errstate(invalid="ignore"):
        return np.where(value == truth, 0.0, value - truth)


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    """||value - truth||_F / ||truth||_F in double precision, ||truth||_F of what is finite; for a zero truth,
    ||value||_F."""
    truth = wide(truth)
    norm = np.linalg.norm(truth[np.isfinite(truth)])
    return float(np.linalg.norm(difference(value, truth)) / (norm if norm > 0 else 1.0))


def error_and_worst(value: np.ndarray, truth: np.ndarray) -> tuple[float, str]:
    """Relative error, infinite for another shape or a value that is not a number; and the worst element in words."""
    value, truth = wide(value), wide(truth)
    if value.shape != truth.shape:
        return math.inf, f"shape {value.shape} instead of {truth.shape}"
    if not truth.size:
        return 0.0, "no element"
    error = relative_error(value, truth)
    apart = np.abs(difference(value, truth))
    worst = np.unravel_index(np.argmax(np.nan_to_num(apart, nan=math.inf)), value.shape)
    place = f"at {tuple(map(int, worst))}: " if worst else ""
    detail = f"worst {place}{value[worst].item()!r} instead of {truth[worst].item()!r}"
    return (error if math.isfinite(error) else math.inf), detail


def may_turn(moments: np.ndarray, allowance: float) -> np.ndarray:
    """Where rounding may carry one of Adam's first moments through zero, as a mask.

    Adam's first updates are nearly the signs of the moments, so a draw of noise either turns one around or shows
    nothing of it. The smallest moments of a tensor that together stay within its allowance may have either sign.
    """
    squares = np.sort(moments[moments != 0.0] ** 2)
    free = np.searchsorted(np.cumsum(squares), (allowance * np.linalg.norm(moments)) ** 2)
    return (moments != 0.0) & (moments**2 <= (squares[free - 1] if free else -1.0))


def check(name: str, value: np.ndarray, truth: np.ndarray, allowance: float) -> float:
    """Return the relative error, or raise AssertionError naming tensor, error, allowance and worst index."""
    value, truth = wide(value), wide(truth)
    if value.shape != truth.shape:
        raise AssertionError(f"{name}: shape {value.shape} instead of {truth.shape}")
    error = relative_error(value, truth) if np.isfinite(truth).all() else float("nan")
    if not error <= allowance:
        apart = np.abs(difference(value, truth))
        worst = np.unravel_index(np.argmax(np.nan_to_num(apart, nan=np.inf)), value.shape)
        index = tuple(map(int, worst))
        raise AssertionError(
            f"{name}: relative error {error:.3e} exceeds the allowance {allowance:.3e} "
            f"({error / allowance:.3g} times); worst at {index}: {value[worst]!r} instead of {truth[worst]!r}"
        )
    return error


def check_all(values: dict[str, np.ndarray], truths: dict[str, np.ndarray], allowance) -> dict[str, float]:
    """`check` every named array against its namesake; `allowance` is a number or a function of the name.

    No arrays at all are no comparison, and fail like a missing one.
    """
    if not truths:
        raise AssertionError("there is nothing to compare: no array has a name")
    if values.keys() != truths.keys():
        raise AssertionError(f"names differ: {sorted(values.keys() ^ truths.keys())}")
    of = allowance if callable(allowance) else lambda _: allowance
    return {name: check(name, values[name], truths[name], of(name)) for name in truths}
