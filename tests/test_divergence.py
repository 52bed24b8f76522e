"""What counts as divergence, what is kept of it, and how a run goes back and on; pure functions and one file."""

import dataclasses
import json
import math
import statistics
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.divergence import (
    HISTORY,
    Diagnosis,
    LossWatch,
    Rollback,
    batch_index,
    input_name,
    next_rollback,
    norm,
    norms,
    read_rollbacks,
    rolled_back,
    save_evidence,
    streak_limit,
    summary,
)
from recipe.config import AdamWConfig, MuonConfig, RunConfig, UserError
from recipe.params import param_specs
from recipe.schedule import learning_rate_factors
from tests.test_checkpoint import MODEL

CONFIG = RunConfig(steps=1000, max_skipped=4, max_diverging=5, divergence_factor=3.0)


def watched(losses, config=CONFIG, skipped=()) -> LossWatch:
    """A watch that has seen these losses; `skipped` holds the steps that were."""
    watch = LossWatch(config)
    for step, loss in enumerate(losses, start=1):
        watch.see(step, loss, sum(one <= step for one in skipped))
    return watch


def test_a_falling_loss_is_no_divergence():
    watch = watched([9.0, 8.0, 7.0, 7.5, 6.0, 4.0])
    assert watch.verdict() is None and watch.since is None and watch.median == 7.25
    assert (watch.skipped_in_a_row, watch.diverging_in_a_row, watch.step) == (0, 0, 6)


def test_skipped_updates_in_a_row():
    assert watched([5.0] * 8, skipped=(3, 4, 5, 7)).verdict() is None
    watch = watched([5.0] * 3 + [math.nan] * 4, skipped=range(4, 8))
    assert watch.verdict() == "4 updates in a row were skipped: their gradients were not finite"
    assert watch.since == 4
    assert watched([5.0] * 7, skipped=range(4, 8)).verdict() == watch.verdict(), "whatever their losses"


def test_losses_that_are_not_finite():
    for losses in ([5.0] * 3 + [math.nan] * 5, [math.inf] * 5, [5.0] * 3 + [math.nan, math.inf] * 2 + [-math.inf]):
        watch = watched(losses)
        assert watch.verdict() == "the loss was not finite for 5 updates"
        assert watch.since == len(losses) - 4
        assert watched(losses[:-1]).verdict() is None


def test_losses_far_above_their_median():
    losses = [4.2, 4.21, 4.3, 12.7, 13.0, math.nan, 14.0, 18.31]
    watch = watched(losses)
    assert watch.verdict() == "the loss stayed above 3 times its running median (4.21) for 5 updates: 18.31 at step 8"
    assert watch.since == 4 and watch.median == 4.21, "what diverges is no part of the median"
    assert watched([4.2, 4.21, 4.3, 12.6, 13.0, math.nan, 14.0, 18.31]).verdict() is None, "12.6 is below"
    assert watched([*losses[:5], 4.0, *losses[5:]]).verdict() is None, "a usual loss ends the streak"
    assert watched([*losses[:-1], math.inf]).verdict().endswith("for 5 updates: inf at step 8")


def test_a_median_near_zero_counts_as_one():
    assert watched([0.01] * 3 + [2.9] * 6).verdict() is None
    watch = watched([0.01] * 3 + [3.1] * 5)
    said = "above 3 times its running median (0.01, counted as 1) for 5 updates: 3.1 at step 8"
    assert watch.verdict() == f"the loss stayed {said}"
    assert watched([-5.0] * 3 + [2.9] * 6).verdict() is None, "a negative loss, of some other objective"


def test_the_first_loss_is_history_enough():
    assert watched([4.0] + [13.0] * 5).since == 2
    assert watched([math.nan, 13.0] + [14.0] * 5).verdict() is None


def test_the_factor_decides():
    losses = [4.0] * 3 + [9.0] * 5
    assert watched(losses).verdict() is None
    assert "above 2 times" in watched(losses, dataclasses.replace(CONFIG, divergence_factor=2.0)).verdict()


@pytest.mark.parametrize("most", [1, 3, 7])
def test_the_limits_decide(most):
    config = dataclasses.replace(CONFIG, max_diverging=most, max_skipped=most)
    for losses, skipped in (([4.0] + [math.nan] * most, ()), ([4.0] * (1 + most), range(2, 2 + most))):
        assert watched(losses, config, skipped).verdict() is not None
        assert watched(losses[:-1], config, skipped).verdict() is None


@pytest.mark.parametrize(("steps", "limit"), [(1, 1), (2, 1), (3, 2), (10, 5), (11, 6), (39, 20), (40, 20), (1000, 20)])
def test_a_short_run_bears_half_of_its_updates(steps, limit):
    assert streak_limit(20, steps) == limit
    watch = LossWatch(RunConfig(steps=steps))
    assert watch.most_skipped == watch.most_diverging == limit


def test_both_streaks_begin_where_the_longer_one_does():
    watch = watched([4.0, 4.0, math.nan, math.nan, math.nan], skipped=(4, 5))
    assert (watch.skipped_in_a_row, watch.diverging_in_a_row, watch.since) == (2, 3, 3)
    watch.see(6, 4.0, 3)
    assert (watch.skipped_in_a_row, watch.diverging_in_a_row, watch.since) == (3, 0, 4)


def rough(seed: int) -> list[float]:
    """Losses of a run longer than the median's history: falling, and now and then not usual for a while."""
    generator = np.random.default_rng(seed)
    losses: list[float] = []
    while len(losses) < 3 * HISTORY:
        usual = generator.uniform(0.5, 2.0, generator.integers(1, HISTORY)) * 9.0 / (1 + len(losses) / HISTORY)
        unusual = generator.choice([math.nan, math.inf, 1e300, 40.0, 4.0], generator.integers(1, 8))
        losses += [*map(float, usual), *map(float, unusual)]
    return losses


@pytest.mark.parametrize("seed", range(5))
def test_the_median_is_that_of_the_last_usual_losses(seed):
    watch, usual, losses = LossWatch(CONFIG), [], rough(seed)
    for step, loss in enumerate(losses, start=1):
        median = statistics.median(usual[-HISTORY:]) if usual else None
        assert watch.median == median
        diverges = not math.isfinite(loss) or (median is not None and loss > 3.0 * max(median, 1.0))
        watch.see(step, loss, 0)
        assert (watch.diverging_in_a_row > 0) == diverges
        if not diverges:
            usual.append(loss)
    assert [step for step, _ in watch.recent] == list(range(1, len(losses) + 1))[-HISTORY:]


@pytest.mark.parametrize("seed", range(5))
def test_a_resumed_run_is_judged_as_an_uninterrupted_one(seed):
    losses = rough(seed)
    counts = [int(count) for count in np.cumsum(np.random.default_rng(seed).random(len(losses)) < 0.6)]
    # As the log holds them: no number for what is not finite, and records of other kinds between.
    records = [{"kind": "validation", "step": 0, "loss": 9.0}]
    for step, (loss, count) in enumerate(zip(losses, counts, strict=True), start=1):
        records.append({"kind": "train", "step": step, "loss": loss if math.isfinite(loss) else None, "skipped": count})
        records.append({"kind": "resume", "step": step})
    whole = LossWatch(CONFIG)
    stopped = 0
    for step, (loss, count) in enumerate(zip(losses, counts, strict=True), start=1):
        resumed = LossWatch(CONFIG, [record for record in records if record["step"] < step])
        for watch in (whole, resumed):
            watch.see(step, loss, count)
        for name in ("since", "median", "skipped", "skipped_in_a_row", "diverging_in_a_row"):
            assert getattr(resumed, name) == getattr(whole, name), name
        assert resumed.verdict() == whole.verdict()
        stopped += whole.verdict() is not None
    assert stopped


def test_a_damaged_log_is_read_as_far_as_it_says_something():
    good = {"kind": "train", "step": 1, "loss": 4.0, "skipped": 0}
    damaged = [good | {"step": 2, "loss": "4"}, good | {"step": 3, "skipped": None}, {"kind": "train", "step": 4}]
    watch = LossWatch(CONFIG, [good, *damaged, good | {"step": 5, "loss": 10**400}])
    assert (watch.step, watch.median, watch.diverging_in_a_row) == (5, 4.0, 1)


def test_the_states_count_of_skipped_updates_stands_in_for_a_lost_log():
    watch = LossWatch(CONFIG, [], skipped=7)
    watch.see(101, 4.0, 7)
    assert watch.skipped_in_a_row == 0
    watch.see(102, 4.0, 8)
    assert watch.skipped_in_a_row == 1
    assert LossWatch(CONFIG, [{"kind": "train", "step": 1, "loss": 4.0, "skipped": 1}], skipped=1).skipped_in_a_row == 1


# Norms and the first tensor that is not finite.
@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
def test_no_norm_overflows(values):
    found = norm(np.array(values))
    expected = min(math.hypot(*values), sys.float_info.max)
    # Below the least normal number a rounding is no longer relative.
    bound = (len(values) + 4) * max(2.0**-53 * expected, 2.0**-1074)
    assert abs(found - expected) <= bound and math.isfinite(found)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_norm_is_finite_only_where_every_element_is(dtype):
    array = np.full((3, 4), 1e30, dtype)
    expected = math.sqrt(12) * float(array[0, 0])
    assert abs(norm(array) - expected) <= 16 * 2.0**-53 * expected
    array[1, 2] = -math.inf
    assert norm(array) == math.inf
    array[0, 0] = math.nan
    assert math.isnan(norm(array))
    assert norm(np.zeros((0,), dtype)) == norm(np.zeros((3,), dtype)) == 0.0


def test_norms_have_the_order_of_the_parameters():
    specs = param_specs(MODEL)
    tensors = {name: [float(index), 0.0] for index, name in enumerate(specs)}
    shuffled = dict(sorted(tensors.items()))  # as a jitted function returns them
    found = norms(shuffled, MODEL, np.array)
    assert list(found) == list(specs) and list(found.values()) == [float(index) for index in range(len(specs))]
    assert list(norms(shuffled, MODEL, np.array, backwards=True)) == list(reversed(specs))
    last = list(specs)[-1]
    assert norms({last: [3.0, 4.0]}, MODEL, np.array) == {last: 5.0}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.3.self_attn.o_proj", "model.layers.3.self_attn.attention"),
        ("model.layers.11.mlp.down_proj", "model.layers.11.mlp.hidden"),
        ("model.layers.0.post_attention_layernorm", "model.layers.0.residual"),
        ("model.layers.0.input_layernorm", None),
        ("model.layers.0.other_mlp.down_proj_2", None),
        ("model", None),
        ("", None),
    ],
)
def test_inputs_that_no_module_puts_out_have_names(path, name):
    assert input_name(path) == name


GOOD = Diagnosis(
    weights={"a": 1.0, "b": 2.0},
    forward={"m.a": True, "m.b": True},
    loss=3.0,
    backward={"m.b": True, "m.a": True},
    gradients={"b": 0.5, "a": 0.25},
    grad_norm=0.6,
    slots={"mu": {"a": 0.1}, "exp_avg": {"b": 0.2}},
    micro_batch=None,
)
WORSE = [
    ({"slots": {"mu": {"a": 0.1}, "exp_avg": {"b": math.inf}}}, ("slot", "exp_avg.b")),
    ({"grad_norm": math.inf}, ("update", "grad_norm")),
    ({"gradients": {"b": 0.5, "a": math.nan}}, ("gradient", "a")),
    ({"gradients": {"b": math.nan, "a": math.nan}}, ("gradient", "b")),
    ({"backward": {"m.b": True, "m.a": False}}, ("backward", "m.a")),
    ({"loss": math.inf}, ("forward", "loss")),
    ({"forward": {"m.a": True, "m.b": False}}, ("forward", "m.b")),
    ({"forward": {"m.a": False, "m.b": False}}, ("forward", "m.a")),
    ({"weights": {"a": 1.0, "b": math.inf}}, ("weight", "b")),
]


def test_the_first_in_the_order_of_execution_is_named():
    assert GOOD.first is None
    found = GOOD
    for change, first in WORSE:  # each earlier than all before it, which stay
        found = dataclasses.replace(found, **change)
        assert found.first == first


# Going back and on.
ROLLING = dataclasses.replace(CONFIG, on_divergence="rollback", max_rollbacks=2, rollback_factor=0.5)


def test_a_rollback_passes_over_the_batches_it_has_seen():
    first = next_rollback(ROLLING, (), step=340, to=300, reason="why")
    assert first == Rollback(step=340, to=300, data_offset=40, factor=0.5, reason="why")
    quarter = dataclasses.replace(ROLLING, rollback_factor=0.25)
    assert next_rollback(quarter, (), step=340, to=300, reason="why") == dataclasses.replace(first, factor=0.25)
    assert batch_index(301, ()) == 300 and batch_index(301, [first]) == 340
    second = next_rollback(ROLLING, [first], step=310, to=200, reason="again")
    assert second.data_offset == 150 and batch_index(201, [first, second]) == 350


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 49)), min_size=1, max_size=6))
def test_no_batch_is_seen_again_after_a_rollback(moves):
    """Whatever the run does, its batches rise, and those of a rollback's passed updates are its own."""
    config, rollbacks, position = dataclasses.replace(ROLLING, max_rollbacks=9), [], 0
    seen = []
    for ahead, back in moves:
        for step in range(position + 1, position + ahead + 1):
            seen.append(batch_index(step, rollbacks))
        step = position + ahead
        to = max(0, step - 1 - back)
        rollbacks.append(next_rollback(config, rollbacks, step=step, to=to, reason=""))
        position = to
    assert seen == list(range(len(seen)))
    assert batch_index(position + 1, rollbacks) == len(seen)


def test_a_run_that_may_not_roll_back_stops():
    one, two = (Rollback(step=9, to=5, data_offset=offset, factor=0.5, reason="") for offset in (4, 8))
    asked = dict(step=9, to=5, reason="")
    assert next_rollback(ROLLING, [one], **asked) == two
    assert next_rollback(ROLLING, [one, two], **asked) is None, "max_rollbacks"
    assert next_rollback(dataclasses.replace(ROLLING, max_rollbacks=3), [one, two], **asked).data_offset == 12
    assert next_rollback(ROLLING, [], **asked | {"to": None}) is None, "no sound state"
    assert next_rollback(CONFIG, [], **asked) is None, "on_divergence=stop"
    assert next_rollback(ROLLING, [], **asked | {"to": 0}).data_offset == 9


def test_every_rollback_lowers_both_rates():
    config = dataclasses.replace(
        ROLLING, muon=MuonConfig(learning_rate=0.08, beta=0.5), adamw=AdamWConfig(learning_rate=0.004, beta1=0.5)
    )
    assert rolled_back(config, ()) == config
    rollback = next_rollback(config, (), step=9, to=5, reason="")
    # The factor is the one of its time, whatever a resumed run is told now.
    later = dataclasses.replace(rollback, factor=0.25)
    expected = dataclasses.replace(
        config,
        muon=dataclasses.replace(config.muon, learning_rate=0.01),
        adamw=dataclasses.replace(config.adamw, learning_rate=0.0005),
    )
    assert rolled_back(config, [rollback, later]) == expected
    assert rolled_back(dataclasses.replace(config, rollback_factor=1.0), [rollback, later]).muon == expected.muon


def two_rollbacks() -> list[dict]:
    first = next_rollback(ROLLING, (), step=340, to=300, reason="why")
    return [dataclasses.asdict(one) for one in (first, next_rollback(ROLLING, [first], step=310, to=200, reason="\n"))]


def test_rollbacks_come_back_from_json():
    values = json.loads(json.dumps({"rollbacks": two_rollbacks()}))
    found = read_rollbacks(values, "run.json")
    assert [dataclasses.asdict(rollback) for rollback in found] == two_rollbacks()
    assert read_rollbacks({}, "run.json") == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "340"}, "run.json: rollbacks: step='340' must be a whole number"),
        ({"factor": None}, "factor=None must be a number"),
        ({"reason": 3}, "reason=3 must be a text"),
        ({"factor": 0.0}, "factor=0.0 must lie above 0"),
        ({"factor": 1.5}, "factor=1.5 must lie above 0"),
        ({"factor": math.nan}, "factor=nan must lie above 0"),
        ({"data_offset": 41}, "from step 340 to 300 does not make data_offset=41; use another copy of the state"),
        ({"to": 340, "data_offset": 0}, "from step 340 to 340 does not make data_offset=0"),
        ({"to": -1, "data_offset": 341}, "from step 340 to -1 does not make data_offset=341"),
    ],
)
def test_rollbacks_that_cannot_be_are_refused(change, message):
    first, second = two_rollbacks()
    with pytest.raises(UserError) as caught:
        read_rollbacks({"rollbacks": [first | change, second]}, "run.json")
    assert message in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}])
def test_rollbacks_of_another_type_are_refused(value):
    with pytest.raises(UserError, match=r"rollbacks=.* must be a list, each part a dict"):
        read_rollbacks({"rollbacks": value}, "run.json")
    with pytest.raises(UserError, match="rollbacks does not say step"):
        read_rollbacks({"rollbacks": [{}]}, "run.json")


# What is kept of it.
def save(folder, diagnosis, watch=None, rollbacks=(), **changes):
    config = dataclasses.replace(CONFIG, out=str(folder))
    given = dict(updates=500, last_good=("last", 300), rollbacks=rollbacks, about={"framework": "abacus"}) | changes
    watch = watch or watched([4.0, 4.0, math.nan, 1e300, math.inf, 13.0, -math.inf])
    return save_evidence(config, watch, watch.verdict() or "why", diagnosis, **given)


def test_the_evidence_says_everything(tmp_path):
    diagnosis = dataclasses.replace(GOOD, loss=-math.inf, gradients={"b": math.nan, "a": 1.0}, micro_batch=2)
    rollback = Rollback(step=9, to=5, data_offset=4, factor=0.5, reason="before")
    file = save(tmp_path, diagnosis, rollbacks=[rollback])
    assert file == tmp_path / "divergence-1.json" and [path.name for path in tmp_path.iterdir()] == [file.name]
    evidence = json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    factor = float(learning_rate_factors(CONFIG.schedule, CONFIG.steps)[500])
    losses = [4.0, 4.0, "nan", 1e300, "inf", 13.0, "-inf"]
    assert evidence == {
        "framework": "abacus",
        "reason": "the loss stayed above 3 times its running median (4) for 5 updates: -inf at step 7",
        "step": 7,
        "first_step": 3,
        "batch": 6,
        "losses": [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)],
        "running_median": 4.0,
        "learning_rates": {"muon": 0.01 * factor, "adamw": 0.001 * factor},
        "last_good": {"state": "last", "position": 300},
        "rollbacks": [dataclasses.asdict(rollback)],
        "diagnosis": {
            "first_not_finite": {"pass": "forward", "tensor": "loss"},
            "micro_batch": 2,
            "loss": "-inf",
            "grad_norm": 0.6,
            "norms": {
                "weights": {"a": 1.0, "b": 2.0},
                "gradients": {"b": "nan", "a": 1.0},
                "mu": {"a": 0.1},
                "exp_avg": {"b": 0.2},
            },
        },
    }


def test_no_evidence_is_overwritten(tmp_path):
    first = save(tmp_path, GOOD)
    before = first.read_bytes()
    assert json.loads(before)["diagnosis"]["first_not_finite"] is None
    (tmp_path / "divergence-2.json").symlink_to(tmp_path / "nowhere")
    second = save(tmp_path, "the GPU's memory is full", last_good=None, updates=10**6)
    assert second.name == "divergence-3.json" and first.read_bytes() == before
    evidence = json.loads(second.read_bytes())
    assert evidence["diagnosis"] == "the GPU's memory is full" and evidence["last_good"] is None
    assert evidence["learning_rates"]["muon"] == 0.01 * CONFIG.schedule.final_factor


def test_a_run_without_one_usual_loss_has_evidence_too(tmp_path):
    evidence = json.loads(save(tmp_path, GOOD, watched([math.nan] * 5)).read_bytes())
    assert evidence["running_median"] is None and evidence["first_step"] == 1 and evidence["batch"] == 0


def test_the_terminal_is_told_in_one_line(tmp_path):
    watch = watched([4.0] * 5, skipped=(2, 3, 4, 5))
    reason = watch.verdict()
    file = tmp_path / "a\nb" / "divergence-1.json"
    rollback = Rollback(step=9, to=5, data_offset=4, factor=0.5, reason="")
    bad = dataclasses.replace(GOOD, forward={"m.a": True, "m.b": False}, micro_batch=1)
    said = summary(watch, reason, bad, file, rollbacks=[rollback])
    assert said == (
        "divergence 4 updates in a row were skipped: their gradients were not finite; it began at step 2 with batch 5; "
        f"the first tensor not finite is forward m.b of micro-batch 1; evidence in {tmp_path}/a\\nb/divergence-1.json"
    )
    whole = summary(watch, reason, GOOD, file, rollbacks=())
    assert "with batch 1; every tensor of that batch is finite; evidence" in whole
    mean = summary(watch, reason, dataclasses.replace(GOOD, grad_norm=math.inf), file, rollbacks=())
    assert "the first tensor not finite is update grad_norm; evidence" in mean
    none = summary(watch, reason, "no memory\n" * 100, file, rollbacks=())
    assert "no diagnosis (no memory" in none
    assert all(line.isprintable() for line in (said, whole, mean, none))
