"""The rounding error of Newton-Schulz, predicted: Monte-Carlo arithmetic on a NumPy float64 iteration of its own."""

import numpy as np

from parity_tests.compare.tolerance import SAFETY, relative_error
from recipe.contract import UNIT_ROUNDOFF, accumulation_of

COEFFS = (3.4445, -4.7750, 2.0315)
# Noise at which the amplification is measured: first order to seven digits.
PROBE = 2.0**-24


def newton_schulz(x_OI: np.ndarray, steps: int = 5, eps: float = 1e-7, noise=lambda array: array) -> np.ndarray:
    """The iteration in float64, an oracle independent of both twins; `noise` acts on each stored array."""
    a, b, c = COEFFS
    x = x_OI.T if x_OI.shape[0] > x_OI.shape[1] else x_OI
    x = noise(x / (np.linalg.norm(x) + eps))
    for _ in range(steps):
        gram = noise(x @ x.T)
        polynomial = noise(b * gram + c * gram @ gram)
        x = noise(a * x + polynomial @ x)
    return x.T if x_OI.shape[0] > x_OI.shape[1] else x


def amplification(x_OI: np.ndarray, seed: int = 0) -> float:
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

    return relative_error(newton_schulz(x_OI, noise=noise), newton_schulz(x_OI)) / PROBE


def allowance(x_OI: np.ndarray, dtype: str) -> float:
    """SAFETY * kappa * (u + sqrt(K) u_acc) + SAFETY * sqrt(N) * u_acc: storage, sums of K products, the norm of N."""
    store = UNIT_ROUNDOFF[dtype]
    accumulate = UNIT_ROUNDOFF[accumulation_of(dtype)]
    longest, elements = max(x_OI.shape), x_OI.size
    products = amplification(x_OI) * (store + np.sqrt(longest) * accumulate)
    return SAFETY * products + SAFETY * np.sqrt(elements) * accumulate


def bias_allowance(x_OI: np.ndarray, dtype: str) -> float:
    """Limit on |<out - truth, truth>| / ||truth||^2: random roundings cancel in it, systematic ones do not."""
    return SAFETY * SAFETY * amplification(x_OI) * UNIT_ROUNDOFF[dtype] / np.sqrt(min(x_OI.shape))
