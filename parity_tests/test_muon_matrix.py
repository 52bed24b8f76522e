"""Ours against the other Muons: each equal to rounding, or different by exactly the term named here, in float64.

Rules of others are written from their published definitions as a momentum rule, an eps rule and a scale around one
Newton-Schulz (this file's own, in NumPy), except for torch.optim.Muon and optax.contrib.muon, which are called.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import torch_ref.muon
from parity_tests.compare.tolerance import SAFETY, check, relative_error
from parity_tests.newton_schulz_error import allowance, newton_schulz
from recipe.contract import UNIT_ROUNDOFF

BETA, EPS, STEPS = 0.95, 1e-7, 5
SHAPES = [(48, 48), (96, 24), (24, 96)]
# At the second scale eps is a tenth of the gradient's norm, so no rule for it can hide.
SCALES = [1.0, 2e-8]


@pytest.fixture(params=[(shape, scale) for shape in SHAPES for scale in SCALES], ids=str)
def grads(request):
    """Correlated gradients (fan_out, fan_in), one per step."""
    shape, scale = request.param
    generator = np.random.default_rng(2)
    mean = generator.standard_normal(shape)
    return [(mean + generator.standard_normal(shape)) * scale for _ in range(STEPS)]


def ours(grads, **options) -> list[np.ndarray]:
    """torch_ref.Muon's updates in float64 at learning rate 1."""
    weight = torch.nn.Parameter(torch.zeros(grads[0].shape, dtype=torch.float64))
    optimizer = torch_ref.muon.Muon([weight], lr=1.0, ns_dtype=torch.float64, **options)
    updates = []
    for grad in grads:
        before = weight.detach().clone()
        weight.grad = torch.tensor(grad)
        optimizer.step()
        updates.append((before - weight.detach()).numpy())
    return updates


def fan_ratio(shape) -> float:
    return max(1.0, shape[0] / shape[1]) ** 0.5


def averaged(grads, beta=BETA):
    """Momentum as an average, and Nesterov's mix of it: the notebook, Keller Jordan, torch.optim, ours."""
    momentum = np.zeros_like(grads[0])
    for grad in grads:
        momentum = beta * momentum + (1 - beta) * grad
        yield beta * momentum + (1 - beta) * grad


def summed(grads, beta=BETA):
    """Momentum as a sum, and Nesterov's mix of it: Moonlight, dion, levanter."""
    momentum = np.zeros_like(grads[0])
    for grad in grads:
        momentum = beta * momentum + grad
        yield beta * momentum + grad


def agree(what: str, updates, expected) -> None:
    """Equal to rounding: each side may err as Newton-Schulz must, and once more for the difference of two weights."""
    for step, (update, other) in enumerate(zip(updates, expected, strict=True)):
        # Weights reach STEPS times an update before their difference is taken.
        limit = 2 * allowance(other, "float64") + SAFETY * STEPS**2 * 2.0**-53
        check(f"{what}, update {step}", update, other, limit)


def test_the_notebook_and_keller_jordan(grads):
    """Equal: the same rule."""
    scale = fan_ratio(grads[0].shape)
    agree("notebook", ours(grads), [scale * newton_schulz(d, eps=EPS) for d in averaged(grads)])


def test_keller_jordan_decays(grads):
    """Equal with weight decay: weights shrink by lr * decay before the update is added."""
    decay, weight, expected = 0.1, np.zeros_like(grads[0]), []
    for direction in averaged(grads):
        new = weight * (1 - decay) - fan_ratio(weight.shape) * newton_schulz(direction, eps=EPS)
        expected.append(weight - new)
        weight = new
    agree("decay", ours(grads, weight_decay=decay), expected)


def test_moonlight(grads):
    """Two terms differ: eps weighs 1 - beta as much beside a sum, and the scale is 0.2 sqrt(max(fan_out, fan_in))."""
    shape = grads[0].shape
    moonlight = [0.2 * max(shape) ** 0.5 * newton_schulz(d, eps=EPS) for d in summed(grads)]
    rescaled = [0.2 * max(shape) ** 0.5 / fan_ratio(shape) * update for update in ours(grads, eps=EPS * (1 - BETA))]
    agree("Moonlight", rescaled, moonlight)
    ratio = np.linalg.norm(moonlight[0]) / np.linalg.norm(ours(grads, eps=EPS * (1 - BETA))[0])
    # Two norms of sums of squares, a quotient, a product: each good to a few roundings.
    expected = np.array(0.2 * max(shape) ** 0.5 / fan_ratio(shape))
    check("ratio", np.array(ratio), expected, SAFETY * sum(shape) * UNIT_ROUNDOFF["float64"])


def test_torch_optim_muon(grads, monkeypatch):
    """One term differs: the norm is max(norm, eps), not norm + eps. Its cast to bfloat16 is taken out for this test."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.double())
    weight = torch.nn.Parameter(torch.zeros(grads[0].shape, dtype=torch.float64))
    optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=BETA, eps=EPS)
    theirs = []
    for grad in grads:
        before = weight.detach().clone()
        weight.grad = torch.tensor(grad)
        optimizer.step()
        theirs.append((before - weight.detach()).numpy())

    scale = fan_ratio(grads[0].shape)
    for step, (update, direction) in enumerate(zip(theirs, averaged(grads), strict=True)):
        norm = np.linalg.norm(direction)
        # Given X with ||X|| = r, newton_schulz divides by r + eps: choose eps so that it divides by max(norm, EPS).
        expected = scale * newton_schulz(direction, eps=max(norm, EPS) - norm)
        agree(f"torch.optim.Muon {step}", [update], [expected])
    # With eps added instead, X starts smaller by the share eps / norm and the update differs in that order: the quintic
    # changes a relative change of a singular value by a factor between 0 and about 3, so not by nothing and not by 4.
    share = EPS / np.linalg.norm(next(averaged(grads)))
    difference = relative_error(ours(grads)[0], theirs[0])
    assert share / 50 < difference < 4 * share


def test_optax_contrib_muon(grads):
    """Two terms differ: its momentum is corrected for bias (with Nesterov at the next step's count), and eps is 1e-8.

    Its update is ours for the direction  beta m / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t),  t from 1.
    """
    with jax.enable_x64(True):
        # Flax kernels are (fan_in, fan_out), which is what its scale assumes.
        params = {"w": jnp.zeros(grads[0].T.shape, jnp.float64)}
        transformation = optax.contrib.muon(1.0)
        state, theirs = transformation.init(params), []
        for grad in grads:
            updates, state = transformation.update({"w": jnp.asarray(grad.T)}, state, params)
            theirs.append(-np.asarray(updates["w"]).T)
    momentum, expected = np.zeros_like(grads[0]), []
    for step, grad in enumerate(grads, start=1):
        momentum = BETA * momentum + (1 - BETA) * grad
        direction = BETA * momentum / (1 - BETA ** (step + 1)) + (1 - BETA) * grad / (1 - BETA**step)
        expected.append(fan_ratio(grad.shape) * newton_schulz(direction, eps=1e-8))
    agree("optax.contrib.muon", theirs, expected)
    assert relative_error(theirs[1], ours(grads)[1]) > 0.01, "another direction, not another rounding"


def test_without_nesterov_the_bias_correction_is_a_factor_that_cancels(grads):
    """Then optax.contrib.muon is ours, but for eps beside a momentum that was divided by 1 - beta^t."""
    with jax.enable_x64(True):
        params = {"w": jnp.zeros(grads[0].T.shape, jnp.float64)}
        transformation = optax.contrib.muon(1.0, nesterov=False, eps=EPS)
        state, theirs = transformation.init(params), []
        for grad in grads:
            updates, state = transformation.update({"w": jnp.asarray(grad.T)}, state, params)
            theirs.append(-np.asarray(updates["w"]).T)
    for step in range(STEPS):
        corrected = ours(grads, nesterov=False, eps=EPS * (1 - BETA ** (step + 1)))[step]
        agree(f"update {step}", [theirs[step]], [corrected])
