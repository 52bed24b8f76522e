"""The rounding error of Newton-Schulz, predicted: Monte-Carlo arithmetic on a NumPy float64 iteration of its own."""

import numpy as np

from parity_tests.compare.tolerance import SAFETY, relative_error
from recipe.contract import UNIT_ROUNDOFF, accumulation_of

KELLER_JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
# Noise at which the amplification is measured: first order to seven digits.
PROBE = 2.0**-24


def newton_schulz(
    x_OI: np.ndarray, coefficients=KELLER_JORDAN, eps: float = 1e-7, noise=lambda array: array, gram: bool = False
) -> np.ndarray:
    """The iteration in float64, an oracle independent of both twins; `noise` acts on each stored array.

    `gram` iterates on X X^T in segments that end after steps 2, 3 and the last one: the same polynomials.
    """
    x = x_OI.T if x_OI.shape[0] > x_OI.shape[1] else x_OI
    x = noise(x / (np.linalg.norm(x) + eps))
    if gram:
        for rows in (coefficients[:2], coefficients[2:3], coefficients[3:]):
            x = _segment(x, rows, noise)
    else:
        for a, b, c in coefficients:
            square = noise(x @ x.T)
            polynomial = noise(b * square + c * square @ square)
            x = noise(a * x + polynomial @ x)
    return x.T if x_OI.shape[0] > x_OI.shape[1] else x


def _segment(x: np.ndarray, rows, noise) -> np.ndarray:
    """Some steps on A = X X^T alone: X becomes Q X, where Q is the product of all a I + B."""
    square, product = noise(x @ x.T), None
    for a, b, c in rows:
        polynomial = noise(b * square + c * square @ square)
        factor = a * np.eye(len(x)) + polynomial
        product = noise(factor if product is None else factor @ product)
        square = noise(noise(factor @ square) @ factor)
    return noise(product @ x)


def amplification(x_OI: np.ndarray, seed: int = 0, **form) -> float:
    """kappa: relative error of the result over u, when each stored array (X, A, B) is rounded at random to u.

    A rounded product of a matrix with its own transpose is symmetric, so the noise on square arrays is too.
    """
    generator = np.random.default_rng(seed)

    def noise(array: np.ndarray) -> np.ndarray:
        uniform = generator.uniform(-1.0, 1.0, array.shape)
        if array.shape[0] == array.shape[1] and np.allclose(array, array.T):
            uniform = np.triu(uniform) + np.triu(uniform, 1).T
        # Rounding to nearest errs by up to half a unit in the last place, 2**-p of the power of two below.
        return array + uniform * PROBE * 2.0 ** np.floor(np.log2(np.maximum(np.abs(array), 1e-300)))

    return relative_error(newton_schulz(x_OI, noise=noise, **form), newton_schulz(x_OI, **form)) / PROBE


def allowance(x_OI: np.ndarray, dtype: str, **form) -> float:
    """SAFETY * kappa * (u + sqrt(K) u_acc) + SAFETY * sqrt(N) * u_acc: storage, sums of K products, the norm of N.

    `form` is what `newton_schulz` takes: coefficients, gram.
    """
    store = UNIT_ROUNDOFF[dtype]
    accumulate = UNIT_ROUNDOFF[accumulation_of(dtype)]
    longest, elements = max(x_OI.shape), x_OI.size
    products = amplification(x_OI, **form) * (store + np.sqrt(longest) * accumulate)
    return SAFETY * products + SAFETY * np.sqrt(elements) * accumulate


def bias_allowance(x_OI: np.ndarray, dtype: str) -> float:
    """Limit on |<out - truth, truth>| / ||truth||^2: random roundings cancel in it, systematic ones do not."""
    return SAFETY * SAFETY * amplification(x_OI) * UNIT_ROUNDOFF[dtype] / np.sqrt(min(x_OI.shape))
