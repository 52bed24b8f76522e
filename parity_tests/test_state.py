"""The training state travels: half a run in one framework, saved, and the other half in the other or in the same one.

Accumulation, dropout, clip, Muon, AdamW and schedule are on, and one batch of the first half is skipped because its
gradient is not finite. Allowances are those of parity_tests/test_training.py, measured on a run that skips it too.
"""

import functools
import math

import numpy as np
import pytest

from harness.state import TrainingState, load_state, save_state
from parity_tests.cases import PRECISIONS, random_weights
from parity_tests.sides import JaxTraining, TorchTraining
from parity_tests.test_training import MODEL, compare, config, record, truth
from recipe.contract import UNIT_ROUNDOFF

SIDES = {"jax": JaxTraining, "torch": TorchTraining}
POISONED = 2
HALVES = [6, pytest.param(100, marks=pytest.mark.slow)]


@functools.cache
def uninterrupted(side: str, precision: str, steps: int):
    return record(SIDES[side](config(PRECISIONS[precision], steps), random_weights(MODEL)), steps, poisoned=POISONED)


def first_half(side: str, precision: str, half: int, folder) -> None:
    """Train on half of the batches and save the state."""
    settings = config(PRECISIONS[precision], 2 * half)
    training = SIDES[side](settings, random_weights(MODEL))
    record(training, half, poisoned=POISONED)
    updates, skipped = training.counts()
    assert (updates, skipped) == (half - 1, 1)
    save_state(
        folder,
        TrainingState(settings, training.weights(), training.slots(), updates, skipped, best=math.inf, text=""),
        tokenizer=None,
        about={},
    )


def second_half(side: str, folder):
    """Load the state and train on the other batches; everything after each update."""
    state = load_state(folder)
    training = SIDES[side](state.config, state.weights)
    training.restore(state.slots, state.updates, state.skipped)
    return record(training, state.config.steps, first=state.position)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("precision", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("begun", "ended"), [("torch", "jax"), ("jax", "torch")])
def test_a_run_goes_on_in_the_other_framework(begun, ended, precision, half, tmp_path, record_property):
    """Every metric, weight and slot after each update of the second half, against one float64 run in torch."""
    first_half(begun, precision, half, tmp_path / "state")
    history = second_half(ended, tmp_path / "state")
    assert len(history) == half and history[-1]["skipped"] == 1
    u, steps = UNIT_ROUNDOFF[precision], 2 * half
    share = compare(history, truth(steps, POISONED), u, steps, first=half, poisoned=POISONED)
    record_property("largest share of the allowance", share)
    if precision == "float64":
        # The framework that goes on, in one piece: the same run but for the rounding of the first half.
        compare(history, uninterrupted(ended, precision, steps), u, steps, first=half, poisoned=POISONED)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("precision", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", SIDES)
def test_a_run_goes_on_in_the_same_framework_bit_for_bit(side, precision, half, tmp_path):
    first_half(side, precision, half, tmp_path / "state")
    history = second_half(side, tmp_path / "state")
    expected = uninterrupted(side, precision, 2 * half)[half:]
    assert len(history) == len(expected)
    for step, (entry, wanted) in enumerate(zip(history, expected, strict=True), start=half):
        assert entry.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(entry[name], value, err_msg=f"step {step}: {name}")


@pytest.mark.parametrize("side", SIDES)
def test_a_state_before_the_first_update_is_all_zeros(side, tmp_path):
    settings = config(PRECISIONS["float32"], 12)
    training = SIDES[side](settings, random_weights(MODEL))
    slots = training.slots()
    assert {slot: len(arrays) for slot, arrays in slots.items()} == {"mu": 21, "exp_avg": 14, "exp_avg_sq": 14}
    assert not any(array.any() for arrays in slots.values() for array in arrays.values())
    save_state(tmp_path / "state", TrainingState(settings, training.weights(), slots, 0, 0, math.inf, ""), None, {})
    history = second_half(side, tmp_path / "state")
    for name, value in record(training, 12)[-1].items():
        np.testing.assert_array_equal(history[-1][name], value, err_msg=name)
