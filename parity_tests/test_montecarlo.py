"""The Monte-Carlo arithmetic itself: what it perturbs, by how much, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch

from parity_tests.compare.montecarlo import allowances, amplification, rounded, rounding_noise
from parity_tests.compare.tolerance import relative_error
from recipe.contract import UNIT_ROUNDOFF

U = 2.0**-24
X = np.random.default_rng(0).standard_normal((40, 50))


def noisy(function, u: float = U, **options) -> np.ndarray:
    with rounding_noise(u, 0, **options):
        return function(torch.tensor(X)).numpy()


def foreach(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    torch._foreach_mul_([y], 3.0)
    return y


def test_what_rounds_nothing_gets_no_noise():
    for exact in (
        lambda x: x.T.reshape(-1)[3:].clone(),
        lambda x: -torch.cat([x, x]).abs().amax(0),
        lambda x: torch.where(x > 0, x, 0.0).masked_fill(x > 1, 0.0),
        lambda x: torch.nn.functional.embedding(torch.tensor([3, 1]), x),
    ):
        assert (noisy(exact) == exact(torch.tensor(X)).numpy()).all()


@pytest.mark.parametrize(
    "function",
    [lambda x: x + x, lambda x: x.clone().mul_(2.0), torch.exp, lambda x: foreach(x), lambda x: torch.sort(x)[0]],
    ids=["out", "in-place", "exp", "foreach", "tuple"],
)
def test_one_operation_gets_one_rounding(function):
    truth = function(torch.tensor(X)).numpy()
    relative = np.abs(noisy(function) / truth - 1.0) / U
    assert 0.9 < relative.max() <= 1.0 + U, "2000 uniform draws come close to their bound and stay below it"
    assert (noisy(function) != truth).all()


def test_sums_get_the_accumulators_share():
    product = lambda x: x @ x.T  # noqa: E731
    truth = product(torch.tensor(X)).numpy()
    for u_accumulator in (U, U * 2.0**-16):
        largest = np.abs(noisy(product, u_accumulator=u_accumulator) / truth - 1.0).max()
        bound = U + math.sqrt(X.shape[1]) * u_accumulator
        assert 0.9 * bound < largest <= bound * (1 + U)


def test_backward_rounds_too():
    def gradient(x):
        x.requires_grad_()
        (x.sum() * 3.0).backward()
        return x.grad

    assert (noisy(gradient) != 3.0).all()


def test_rounded_inputs():
    assert rounded(X) is X
    with rounding_noise(U, 0):
        relative = np.abs(rounded(X, 3.0) / X - 1.0) / U
    assert 2.0 < relative.max() <= 3.0 + U


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_allowance_covers_a_real_computation_and_is_tight(dtype, record_property):
    def chain(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.T / 7.0, dim=-1) @ x

    def compute():
        return {"y": chain(torch.tensor(rounded(X))).numpy()}

    truths, kappas = amplification(compute, dtype)
    error = relative_error(chain(torch.tensor(X, dtype=getattr(torch, dtype))).float().numpy(), truths["y"])
    allowance = allowances(kappas, dtype)["y"]
    record_property("error over allowance", error / allowance)
    # At least the rounding of the result, at most what was predicted.
    assert UNIT_ROUNDOFF[dtype] / 10 < error <= allowance < 100 * UNIT_ROUNDOFF[dtype]
