"""Whole updates, one after another, on both sides: losses, norms, rates, every parameter, every optimizer slot.

How far two correct runs may part is measured, not chosen: the torch reference runs again in float64 with its weights
moved by random noise of PROBE relative to each, and what becomes of that noise by each step is the amplification of a
rounding made at the beginning. Roundings are made at every step, so the allowance of step t is

    SAFETY * ROUNDINGS * (t + 1) * kappa_t * u,      kappa_t the largest amplification up to step t

with ROUNDINGS the roundings that one update makes one after another (the depth of the computation, counted below).
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import torch

from jax_impl.train import make_train_step
from parity_tests import sides, whole_run
from parity_tests.cases import AWKWARD, BFLOAT16, FLOAT32, FLOAT64, random_tokens, random_weights, run_config
from parity_tests.compare.tolerance import SAFETY, check, relative_error
from parity_tests.sides import JaxTraining, TorchTraining
from recipe.config import AdamWConfig, MuonConfig, PrecisionConfig
from recipe.contract import UNIT_ROUNDOFF
from recipe.schedule import learning_rate_factors

MODEL = dataclasses.replace(AWKWARD, hidden_size=24, dropout=0.1, tie_word_embeddings=True)
STEPS = 10
PROBE = 2.0**-30
# Embedding, 3 blocks of about 12 (two norms, projections, QK-norm, RoPE, scores, softmax, sum, output, gate, product,
# down, residuals), norm, head, loss: 42 forward, as many backward; clip; 15 in Newton-Schulz; the update.
ROUNDINGS = 100


def config(precision: PrecisionConfig, steps: int = STEPS):
    """Accumulation, dropout, a clip that clips, both optimizers, warm-up and cosine, tied embedding."""
    return run_config(
        MODEL,
        precision,
        steps=steps,
        clip_norm=0.5,
        seed=3,
        muon=MuonConfig(learning_rate=0.02),
        adamw=AdamWConfig(learning_rate=0.01),
    )


@functools.cache
def batches(steps: int = STEPS):
    shape = (3, 2, 7)
    return [
        (random_tokens(MODEL, *shape, seed=10 + 2 * step), random_tokens(MODEL, *shape, seed=11 + 2 * step))
        for step in range(steps)
    ]


def record(training, steps: int = STEPS, *, first: int = 0, poisoned: int | None = None):
    """Everything there is to compare after each update from batch `first` on, flat: metrics, weights, slots.

    The gradient of batch `poisoned` is not finite.
    """
    history = []
    for index, (inputs, targets) in enumerate(batches(steps)[first:], start=first):
        if index == poisoned:
            old = make_final_norm_infinite(training)
            metrics = training.step(inputs, targets)
            restore_final_norm(training, old)
            assert not math.isfinite(metrics.pop("loss") + metrics.pop("grad_norm"))
        else:
            metrics = training.step(inputs, targets)
        entry = {name: np.array(value) for name, value in metrics.items()}
        entry |= training.weights()
        entry |= {f"{slot} {name}": a for slot, arrays in training.slots().items() for name, a in arrays.items()}
        history.append(entry)
    return history


@functools.cache
def truth(steps: int = STEPS, poisoned: int | None = None):
    return record(TorchTraining(config(FLOAT64, steps), random_weights(MODEL)), steps, poisoned=poisoned)


@functools.cache
def amplification(steps: int = STEPS, poisoned: int | None = None) -> list[dict[str, float]]:
    """kappa by step and name: relative change over PROBE, the largest of three draws and of the steps so far."""
    reference = truth(steps, poisoned)
    kappas = [dict.fromkeys(entry, 1.0) for entry in reference]
    for seed in range(3):
        generator = np.random.default_rng(seed)
        moved = {
            name: weight * (1.0 + PROBE * generator.uniform(-1.0, 1.0, weight.shape))
            for name, weight in random_weights(MODEL).items()
        }
        largest = dict.fromkeys(kappas[0], 1.0)
        history = record(TorchTraining(config(FLOAT64, steps), moved), steps, poisoned=poisoned)
        for step, entry in enumerate(history):
            for name, value in entry.items():
                largest[name] = max(largest[name], relative_error(value, reference[step][name]) / PROBE)
                kappas[step][name] = max(kappas[step][name], largest[name])
    return kappas


def allowance(step: int, name: str, u: float, steps: int = STEPS, poisoned: int | None = None) -> float:
    return SAFETY * ROUNDINGS * (step + 1) * amplification(steps, poisoned)[step][name] * u


def compare(history, reference, u: float, steps: int = STEPS, *, first: int = 0, poisoned: int | None = None) -> float:
    """Check every entry from batch `first` on; returns the largest share of its allowance that any error took."""
    worst = 0.0
    for step, (entry, expected) in enumerate(zip(history, reference[first:], strict=True), start=first):
        assert entry.keys() == expected.keys()
        for name, value in expected.items():
            limit = allowance(step, name, u, steps, poisoned)
            worst = max(worst, check(f"step {step}: {name}", entry[name], value, limit) / limit)
    return worst


def test_ten_updates_agree_in_float64(record_property):
    history = record(JaxTraining(config(FLOAT64), random_weights(MODEL)))
    share = compare(history, truth(), UNIT_ROUNDOFF["float64"])
    record_property("largest share of the allowance", share)
    assert any(float(entry["grad_norm"]) > 0.5 for entry in history), "the clip must have clipped"
    expected = 0.02 * learning_rate_factors(config(FLOAT64).schedule, STEPS)
    check("lr", np.array([entry["lr"] for entry in history]), expected, 2 * UNIT_ROUNDOFF["float64"])


@pytest.mark.parametrize(("precision", "dtype"), [(FLOAT32, "float32"), (BFLOAT16, "bfloat16")], ids=["f32", "bf16"])
def test_low_precision_drifts_as_rounding_must(precision, dtype, record_property):
    """Against the float64 run: no further than derived, and no further than twice the reference's own drift."""
    ours = record(JaxTraining(config(precision), random_weights(MODEL)))
    reference = record(TorchTraining(config(precision), random_weights(MODEL)))
    record_property("largest share of the allowance", compare(ours, truth(), UNIT_ROUNDOFF[dtype]))
    drift = {
        side: math.sqrt(
            np.mean([relative_error(entry[n], t[n]) ** 2 for entry, t in zip(run, truth(), strict=True) for n in t])
        )
        for side, run in (("jax", ours), ("torch", reference))
    }
    record_property("root mean square drift", drift)
    assert drift["jax"] <= SAFETY * drift["torch"]


def test_three_hundred_updates_agree_in_float64(record_property):
    """The whole recipe at the seed's rates: every number after each of 300 updates within 1e-11 of torch's.

    A first moment of Adam's is a difference of gradients that may nearly cancel, so no bound holds for its rounding
    relative to itself. It is measured on the scale of the root of the second moment, by which Adam divides it.
    """
    truths = whole_run.updates("torch", FLOAT64)
    worst = (0.0, 0, "")
    losses = []
    for step, (entry, truth) in enumerate(zip(whole_run.updates("jax", FLOAT64), truths, strict=True), start=1):
        errors = whole_run.drift(entry, truth)
        first, second = truth["exp_avg"], truth["exp_avg_sq"]
        errors["exp_avg"] = max(
            np.linalg.norm(entry["exp_avg"][name] - first[name]) / np.linalg.norm(np.sqrt(second[name]))
            for name in first
        )
        worst = max(worst, *((float(value), step, kind) for kind, value in errors.items()))
        losses.append(float(entry["metric"]["loss"]))
    record_property("worst", worst)
    assert worst[0] <= 1e-11, f"relative difference {worst[0]:.2e} after update {worst[1]} in a {worst[2]}"
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 1.0, "a run that learns nothing proves little"


@pytest.mark.slow
def test_accumulation_is_the_mean_over_all_rows():
    """3 micro-batches of 2 rows make the update of one micro-batch of 6, without dropout."""
    plain = dataclasses.replace(config(FLOAT64), model=dataclasses.replace(MODEL, dropout=0.0))
    inputs, targets = batches()[0]
    together = inputs.reshape(1, 6, 7), targets.reshape(1, 6, 7)
    for side in (JaxTraining, TorchTraining):
        split, whole = side(plain, random_weights(MODEL)), side(plain, random_weights(MODEL))
        a, b = split.step(inputs, targets), whole.step(*together)
        limit = allowance(0, "loss", UNIT_ROUNDOFF["float64"])
        check("loss", np.array(a["loss"]), np.array(b["loss"]), limit)
        check("grad_norm", np.array(a["grad_norm"]), np.array(b["grad_norm"]), limit)
        for name, weight in whole.weights().items():
            check(name, split.weights()[name], weight, allowance(0, name, UNIT_ROUNDOFF["float64"]))


@pytest.mark.parametrize("side", [JaxTraining, TorchTraining], ids=["jax", "torch"])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(side):
    """An infinite weight poisons one update; without it, the next one continues as if that had not been."""
    training = side(config(FLOAT64), random_weights(MODEL))
    training.step(*batches()[0])
    before, slots = training.weights(), training.slots()
    old = make_final_norm_infinite(training)
    metrics = training.step(*batches()[1])
    restore_final_norm(training, old)
    assert not math.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1
    for name, weight in training.weights().items():
        np.testing.assert_array_equal(weight, before[name])
    for slot, arrays in training.slots().items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, slots[slot][name])
    metrics = training.step(*batches()[1])
    assert metrics["skipped"] == 1 and math.isfinite(metrics["loss"])
    factors = learning_rate_factors(config(FLOAT64).schedule, STEPS)
    check("lr", np.array(metrics["lr"]), np.array(0.02 * factors[1]), 2 * UNIT_ROUNDOFF["float64"])


def make_final_norm_infinite(training):
    """Make the final norm's scale infinite and return what it was."""
    if isinstance(training, JaxTraining):
        with jax.enable_x64(True):
            old = training.state.params["model.norm.weight"]
            training.state.params["model.norm.weight"] = old * math.inf
            return np.asarray(old)
    weight = training.state.model.model.norm.weight
    old = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(math.inf)
    return old


def restore_final_norm(training, old) -> None:
    if isinstance(training, JaxTraining):
        with jax.enable_x64(True):
            training.state.params["model.norm.weight"] = jax.numpy.asarray(old)
        return
    with torch.no_grad():
        training.state.model.model.norm.weight.copy_(old)


def test_training_compiles_once(monkeypatch, caplog):
    monkeypatch.setattr(sides, "_make_train_step", make_train_step)  # one that no other test has compiled
    training = JaxTraining(config(FLOAT32), random_weights(MODEL))
    with jax.log_compiles():
        for step in range(3):
            training.step(*batches()[step])
    assert training.train_step.__wrapped__._cache_size() == 1
    finished = [record for record in caplog.messages if record.startswith("Finished XLA compilation")]
    assert sum("jit(train_step)" in record for record in finished) == 1


def test_the_train_step_gives_its_buffers_away():
    training = JaxTraining(config(FLOAT32), random_weights(MODEL))
    old = training.state.params["model.norm.weight"]
    training.step(*batches()[0])
    assert old.is_deleted()
