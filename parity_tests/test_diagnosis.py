"""Both halves name the same first tensor that is not finite, by the names and in the order of `taps.py`."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

import jax_impl.diagnosis
import jax_impl.model
import jax_impl.train
import torch_ref.diagnosis
import torch_ref.train
from harness.divergence import Diagnosis, LossWatch, batch_index
from parity_tests import taps
from parity_tests.cases import BFLOAT16, FLOAT32, FLOAT64, VARIANTS, random_tokens, random_weights, run_config
from parity_tests.compare.tolerance import check
from parity_tests.sides import JaxModel, JaxTraining, TorchModel, TorchTraining, x64
from recipe.config import MuonConfig, UserError
from recipe.contract import UNIT_ROUNDOFF

MODEL = dataclasses.replace(VARIANTS["untied"], num_hidden_layers=2)
RUN = run_config(MODEL, FLOAT32, accumulation=2)
RUNS = {
    "plain": RUN,
    "dropout": dataclasses.replace(RUN, model=dataclasses.replace(MODEL, dropout=0.2)),
    "remat": dataclasses.replace(RUN, precision=dataclasses.replace(FLOAT32, remat=True)),
    "bfloat16": dataclasses.replace(RUN, precision=BFLOAT16),
}
TRAINERS = {"jax": jax_impl.train.Trainer, "torch": torch_ref.train.Trainer}
ROPE = ("q_rope", "k_rope")
"""Taps of functions, which no module puts out: a rotation is finite where what it rotates is."""


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """The tapped pass of a configuration is compiled for all cases, not for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax_impl.diagnosis, "_make_tapped_pass", functools.cache(jax_impl.diagnosis._make_tapped_pass))
        yield


def batch(run, seed=1):
    shape = run.accumulation, run.batch_size, run.sequence_length
    return random_tokens(run.model, *shape, seed=seed), random_tokens(run.model, *shape, seed=seed + 1)


def diagnoses(run, weights) -> dict[str, Diagnosis]:
    return {side: make(run, weights).diagnose(*batch(run)) for side, make in TRAINERS.items()}


def planted(**factors):
    """Every weight whose name has this end times a factor."""

    def plant(weights):
        ends = {name.replace("__", "."): factor for name, factor in factors.items()}
        for name in weights:
            for end, factor in ends.items():
                if name.endswith(f"{end}.weight"):
                    weights[name] = weights[name] * factor

    return plant


def element(name, value):
    def plant(weights):
        weights[name].flat[3] = value

    return plant


UP = "model.layers.1.mlp.up_proj"
V = "model.layers.1.self_attn.v_proj"
CASES = {
    "nothing": (lambda weights: None, None),
    "nan in a matrix": (element(f"{UP}.weight", math.nan), ("weight", f"{UP}.weight")),
    "inf in a norm": (element("model.layers.0.input_layernorm.weight", math.inf),
                      ("weight", "model.layers.0.input_layernorm.weight")),
    "a product overflows": (planted(layers__1__mlp__up_proj=1e39), ("forward", UP)),
    "silu(gate) * up overflows": (planted(layers__1__mlp__up_proj=1e30, layers__1__mlp__gate_proj=1e30),
                                  ("forward", "model.layers.1.mlp.hidden")),
    "the residual stream is large": (planted(layers__0__mlp__down_proj=1e30), None),
    "a value overflows": (planted(layers__1__self_attn__v_proj=1e39), ("forward", V)),
    "the logits overflow": (planted(lm_head=1e39), ("forward", "loss")),
    # The residual stream is nearly zero, so the last norm divides what flows back by a thousandth.
    "what flows back overflows": (planted(embed_tokens=1e-5, o_proj=1e-6, down_proj=1e-6, lm_head=1e38),
                                  ("backward", "model.layers.1")),
    # Values of the usual size from inputs of 1e10, times cotangents of 1e30.
    "a gradient overflows": (planted(layers__1__input_layernorm=1e10, q_proj=1e-10, k_proj=1e-10, v_proj=1e-10,
                                     lm_head=1e31), ("gradient", f"{V}.weight")),
    "the norm over all overflows": (planted(lm_head=1e25), ("update", "grad_norm")),
}  # fmt: skip


def weights_of(case, run):
    weights = random_weights(run.model)
    with np.errstate(all="ignore"):
        CASES[case][0](weights)
        # What float32 cannot hold, the case would plant as inf.
        largest = np.finfo(np.float32).max
        planted_inf = case.startswith("inf")
        return {name: w if planted_inf else np.clip(w, -largest, largest) for name, w in weights.items()}


@pytest.mark.parametrize("run", ["plain", pytest.param("dropout", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_both_name_the_same_first_tensor(case, run):
    found = diagnoses(RUNS[run], weights_of(case, RUNS[run]))
    assert {side: diagnosis.first for side, diagnosis in found.items()} == dict.fromkeys(TRAINERS, CASES[case][1])
    whole = CASES[case][1] is None or CASES[case][1][0] == "update"
    assert {diagnosis.micro_batch for diagnosis in found.values()} == {None if whole else 0}


@pytest.mark.parametrize(
    "case", [case for case in CASES if CASES[case][1] and CASES[case][1][0] not in ("weight", "update")]
)
@pytest.mark.slow
def test_the_taps_of_the_parity_tests_name_it_too(case):
    run = RUNS["plain"]
    weights = weights_of(case, run)
    with np.errstate(all="ignore"):
        for found in taps_of(run, weights):
            first = next(name for name, x in found.flat().items() if tapped(name) and not np.isfinite(x).all())
            assert tuple(first.split(" ")) == CASES[case][1]


def taps_of(run, weights) -> list[taps.Taps]:
    inputs_ABT, targets_ABT = batch(run)
    seed = run.seed if run.model.dropout else None
    sides = {JaxModel: taps.jax_model_taps, TorchModel: taps.torch_model_taps}
    return [
        tap(side(run.model, run.precision, weights), inputs_ABT[0], targets_ABT[0], seed) for side, tap in sides.items()
    ]


def tapped(name: str) -> bool:
    """Whether a diagnosis has a tap of this name; logits are computed for `taps.py` alone."""
    return not name.endswith((*ROPE, "logits"))


@functools.cache
def names_by_dropout(rate: float) -> list[taps.Taps]:
    """The parity tests' taps; their names depend on no precision, and they do not reach through remat."""
    run = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, dropout=rate))
    return taps_of(run, random_weights(run.model))


@pytest.mark.parametrize(
    "run", [run if run == "dropout" else pytest.param(run, marks=pytest.mark.slow) for run in RUNS]
)
def test_names_and_order_are_those_of_the_parity_tests(run):
    weights = random_weights(RUNS[run].model)
    for diagnosis in diagnoses(RUNS[run], weights).values():
        assert all(x is True for x in (*diagnosis.forward.values(), *diagnosis.backward.values()))
        assert list(diagnosis.weights) == list(reversed(diagnosis.gradients)) == list(weights)
        for found in names_by_dropout(RUNS[run].model.dropout):
            assert [*diagnosis.forward, "loss"] == [name for name in found.forward if tapped(name)]
            assert list(diagnosis.backward) == [name for name in found.backward if tapped(name)]
            assert list(diagnosis.gradients) == list(found.gradients)


def test_torchs_taps_hold_what_those_of_the_parity_tests_hold(monkeypatch):
    """The arrays themselves instead of whether they are finite; what flows back is that of each tap alone."""
    monkeypatch.setattr(torch_ref.diagnosis, "_is_finite", lambda x: x.detach().clone().numpy())
    side = TorchModel(MODEL, FLOAT32, random_weights(MODEL))
    inputs_BT, targets_BT = (tokens_ABT[0] for tokens_ABT in batch(RUN))
    shown = torch_ref.diagnosis._tapped_pass(
        side.module, [torch.tensor(tokens).long() for tokens in (inputs_BT, targets_BT)], None
    )
    expected = taps.torch_model_taps(side, inputs_BT, targets_BT)
    for found, arrays in ((shown.forward, expected.forward), (shown.backward, expected.backward)):
        for name, array in found.items():
            np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize("side", TRAINERS)
def test_the_norms_are_those_of_the_weights_and_of_the_whole_gradient(side):
    run = RUNS["plain"]
    weights = random_weights(run.model)
    diagnosis = TRAINERS[side](run, weights).diagnose(*batch(run))
    for name, weight in weights.items():
        # A sum of n squares in float64, in any order, has a relative error below n roundings.
        bound = (weight.size + 2) * UNIT_ROUNDOFF["float64"]
        check(name, np.array(diagnosis.weights[name]), np.array(math.hypot(*weight.flat)), bound)
    count = sum(weight.size for weight in weights.values())
    whole = math.hypot(*diagnosis.gradients.values())
    # In float32, as the update's.
    check("grad_norm", np.array(diagnosis.grad_norm), np.array(whole), (count + 2) * UNIT_ROUNDOFF["float32"])
    assert [{*norms.values()} for norms in diagnosis.slots.values()] == [{0.0}] * 3
    assert diagnosis.slots["mu"].keys() | diagnosis.slots["exp_avg"].keys() == weights.keys()
    assert diagnosis.slots["exp_avg"].keys() == diagnosis.slots["exp_avg_sq"].keys()


@pytest.mark.parametrize("side", TRAINERS)
def test_the_first_micro_batch_that_is_not_finite_is_shown(side):
    run = RUNS["plain"]
    inputs_ABT, targets_ABT = batch(run)
    alone = min(set(inputs_ABT[1].flat) - set(inputs_ABT[0].flat))
    weights = random_weights(run.model)
    weights["model.embed_tokens.weight"][alone] = math.nan
    diagnosis = TRAINERS[side](run, weights).diagnose(inputs_ABT, targets_ABT)
    assert diagnosis.first == ("weight", "model.embed_tokens.weight") and diagnosis.micro_batch == 1
    assert not any(diagnosis.forward.values()) and math.isnan(diagnosis.loss)
    again = TRAINERS[side](run, weights).diagnose(inputs_ABT[:1], targets_ABT[:1])
    assert again.micro_batch is None and all(again.forward.values()) and math.isfinite(again.loss)


@pytest.mark.parametrize("side", TRAINERS)
def test_a_slot_that_is_not_finite_is_named_last(side):
    run = RUNS["plain"]
    trainer = TRAINERS[side](run, random_weights(run.model))
    slots = {slot: {name: array.copy() for name, array in arrays.items()} for slot, arrays in trainer.slots().items()}
    slots["mu"][f"{V}.weight"].flat[0] = math.inf
    slots["exp_avg_sq"]["model.norm.weight"].flat[0] = math.nan
    trainer.restore(slots, 4, 1)
    assert trainer.diagnose(*batch(run)).first == ("slot", f"mu.{V}.weight")


def jax_diagnosis(run, training: JaxTraining, position: int) -> Diagnosis:
    with x64(run.precision):
        return jax_impl.diagnosis.diagnose(run, training.state.params, training.slots(), position, *batch(run))


def torch_diagnosis(run, training: TorchTraining, position: int) -> Diagnosis:
    tensors = (torch.tensor(tokens).long() for tokens in batch(run))
    return torch_ref.diagnosis.diagnose(run, training.state.model, training.slots(), position, *tensors)


@pytest.mark.parametrize(
    ("side", "diagnosis_of"),
    [pytest.param(JaxTraining, jax_diagnosis, marks=pytest.mark.slow), (TorchTraining, torch_diagnosis)],
)
def test_it_is_the_update_that_is_diagnosed(side, diagnosis_of):
    """Loss and norm are the update's to half the digits: far more than rounding takes, far fewer than another mask."""
    run = dataclasses.replace(RUNS["dropout"], precision=FLOAT64)
    training = side(run, random_weights(run.model))
    training.restore(training.slots(), 2, 1)
    found = {position: diagnosis_of(run, training, position) for position in (2, 3)}
    metrics = training.step(*batch(run))
    for name in ("loss", "grad_norm"):
        errors = {p: abs(getattr(x, name) / float(metrics[name]) - 1) for p, x in found.items()}
        assert errors[3] <= UNIT_ROUNDOFF["float64"] ** 0.5 < errors[2], name


@pytest.mark.parametrize("side", TRAINERS)
def test_the_next_update_is_diagnosed_unless_told_another_and_nothing_is_changed(side):
    run = RUNS["dropout"]
    trainer = TRAINERS[side](run, random_weights(run.model))
    trainer.restore(trainer.slots(), 2, 1)
    before, slots = trainer.weights(), trainer.slots()
    found = {position: trainer.diagnose(*batch(run), position=position) for position in (2, 3)}
    assert trainer.diagnose(*batch(run)) == found[3] != found[2]
    assert trainer.counts() == (2, 1)
    for kept, now in [(before, trainer.weights()), *((slots[slot], now) for slot, now in trainer.slots().items())]:
        for name, array in kept.items():
            np.testing.assert_array_equal(now[name], array, err_msg=name)


@pytest.mark.parametrize("part", ["Linear", "RMSNorm", "Qwen3DecoderLayer"])
def test_the_modules_are_as_before_also_after_a_failure(part):
    kind, run = getattr(jax_impl.model, part), RUNS["plain"]
    call, trainer = kind.__call__, TRAINERS["jax"](run, random_weights(run.model))
    trainer.diagnose(*batch(run))
    assert kind.__call__ is call
    inputs_ABT, targets_ABT = (np.zeros((1, 1, run.model.max_position_embeddings + 1), np.int32) for _ in range(2))
    with pytest.raises(UserError, match="max_position_embeddings"):
        trainer.diagnose(inputs_ABT, targets_ABT)
    assert kind.__call__ is call


@pytest.mark.slow
def test_a_run_that_diverges_shows_the_same_in_both():
    """With an absurd rate the second update's numbers overflow; its batch is shown, by the weights it met."""
    run = dataclasses.replace(RUNS["dropout"], steps=40, muon=MuonConfig(learning_rate=1e30))
    found = {}
    for side, make in TRAINERS.items():
        trainer, watch = make(run, random_weights(run.model)), LossWatch(run)
        for step in range(1, run.steps + 1):
            metrics = trainer.step(*batch(run, seed=step))
            watch.see(step, float(metrics["loss"]), int(metrics["skipped"]))
            if watch.verdict():
                break
        assert watch.verdict() == "20 updates in a row were skipped: their gradients were not finite"
        shown = trainer.diagnose(*batch(run, seed=watch.since), position=batch_index(watch.since, ()))
        found[side] = (watch.step, watch.since, shown.first, shown.micro_batch)
    assert found["jax"] == found["torch"] == (21, 2, ("forward", "model.layers.0.self_attn.o_proj"), 0)
