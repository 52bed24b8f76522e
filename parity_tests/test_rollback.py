"""A run that diverges goes back and on, in both frameworks alike: past the bad batches, at smaller rates, and bit for
bit the same run if it is killed on the way.

One batch spoils the weights of whoever trains on it; from then on no gradient is finite.
"""

import dataclasses
import functools
import json
import math
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_impl.diagnosis
import jax_impl.train
import torch_ref.train
from harness import cli, loop
from harness.divergence import Rollback
from harness.failures import RunFailed
from harness.runlog import RunLog, read_metrics
from harness.state import load_state
from recipe.config import DataConfig, ModelConfig, RunConfig
from recipe.data import Dataset
from recipe.reading import read_json
from tests.test_loop import Killed, Toy, assert_same_runs, no_picture, records, resumed  # noqa: F401

SIDES = ("torch", "jax")
SPOILED = "model.layers.0.mlp.up_proj.weight"
BAD = 7
"""Index of the batch that spoils the weights: update 8 reads it, and update 9 finds them spoiled, too."""


class World:
    """Which batches are bad, which was read last, and at which the process dies."""

    bad: frozenset[int] = frozenset({BAD})
    dies_at: int | None = None
    read: list[int]


WORLD = World()


def spoiling(trainer: type) -> type:
    """The trainer, whose weights a bad batch spoils."""

    class Spoiling(trainer):
        def step(self, inputs_ABT, targets_ABT):
            if WORLD.read[-1] in WORLD.bad:
                weights, slots, counts = self.weights(), self.slots(), self.counts()
                weights[SPOILED] = np.full_like(weights[SPOILED], np.inf)
                self.__init__(self.config, weights)
                self.restore(slots, *counts)
            return super().step(inputs_ABT, targets_ABT)

    return Spoiling


TRAINERS = {"torch": spoiling(torch_ref.train.Trainer), "jax": spoiling(jax_impl.train.Trainer)}


@pytest.fixture(autouse=True)
def world(monkeypatch):
    batch = Dataset.batch

    def noted(self, step, **shape):
        if step == WORLD.dies_at:
            raise Killed
        WORLD.read.append(step)
        return batch(self, step, **shape)

    monkeypatch.setattr(Dataset, "batch", noted)
    WORLD.bad, WORLD.dies_at, WORLD.read = frozenset({BAD}), None, []


MADE = (
    (jax_impl.train, "make_train_step"),
    (jax_impl.train, "make_evaluate"),
    (jax_impl.diagnosis, "_make_tapped_pass"),
)


def once(make):
    """A run's functions, compiled once for all runs that differ in their folder alone."""
    cached = functools.cache(make)

    def made(config, *mesh):
        alike = dataclasses.replace(config, out="", resume="", on_divergence="stop", max_rollbacks=1)
        return cached(alike, *mesh)

    return made


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        for module, name in MADE:
            patch.setattr(module, name, once(getattr(module, name)))
        before = jax.config.jax_compilation_cache_dir
        yield
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    ground = tmp_path_factory.mktemp("ground")
    words = np.random.default_rng(0).choice("a quick brown fox jumps over the lazy dog".split(), 2000)
    (ground / "corpus.txt").write_text(" ".join(words), encoding="utf-8")
    return ground


@pytest.fixture
def config(ground, tmp_path) -> RunConfig:
    """Twelve updates, evaluated every 4, saved every 3; two in a row that are skipped are a divergence."""
    model = ModelConfig(
        vocab_size=384, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    corpus, cache = str(ground / "corpus.txt"), str(ground / "cache")
    return RunConfig(
        out=str(tmp_path / "run"), steps=12, batch_size=2, sequence_length=8, eval_every=4, save_every=3, log_every=1,
        sample_tokens=0, max_skipped=2, on_divergence="rollback", model=model,
        data=DataConfig(corpus=corpus, bpe_vocab_size=300, validation_tokens=64, cache_dir=cache),
    )  # fmt: skip


def train(config: RunConfig, side: str) -> None:
    loop.run(config, framework=side, make_trainer=TRAINERS[side])


def kill(config: RunConfig, side: str, index: int) -> None:
    """Train until the process dies when it asks for this batch."""
    WORLD.dies_at = index
    with pytest.raises(Killed):
        train(config, side)
    WORLD.dies_at = None


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[str, list[int]]]:
    return {}


@pytest.fixture(params=["torch", pytest.param("jax", marks=pytest.mark.slow)])
def side(request) -> str:
    return request.param


def uninterrupted(config: RunConfig, side: str, made, tmp_path: Path) -> tuple[str, list[int]]:
    """Folder of the run that nobody kills, and the batches that it read."""
    if side not in made:
        WORLD.read = []
        run = dataclasses.replace(config, out=str(tmp_path / f"whole-{side}"))
        train(run, side)
        made[side] = run.out, WORLD.read
    return made[side]


REASON = "2 updates in a row were skipped: their gradients were not finite"
ONE = Rollback(step=9, to=6, data_offset=3, factor=0.5, reason=REASON)
FINITE = {"kind": "rollback", "step": 6, "diverged_at": 9, "data_offset": 3, "factor": 0.5, "reason": REASON}


def test_both_roll_back_alike_and_go_on_past_the_bad_batches(config, made, tmp_path, capsys):
    seen = {}
    for side in SIDES:
        out, read = uninterrupted(config, side, made, tmp_path)
        said, run = capsys.readouterr().out, Path(out)
        assert "rolled back to step 6; update 7 reads batch 9, and the rates are 0.005 and 0.0005 (1 of 3" in said
        state = load_state(run / "last")
        assert (state.position, state.updates, state.skipped, state.rollbacks) == (12, 12, 0, (ONE,))
        # Batch 0 is looked at before; 7 is read again for the diagnosis.
        assert read == [0, *range(9), BAD, *range(9, 15)]
        log = read_metrics(run)
        (record,) = [record for record in log if record["kind"] == "rollback"]
        assert record == FINITE
        assert [record["step"] for record in log if record["kind"] == "train"] == list(range(1, 13))
        assert not any(record["skipped"] for record in log if record["kind"] == "train")
        undone = [json.loads(line) for line in (run / "undone.jsonl").read_text(encoding="utf-8").splitlines()]
        seen[side] = [(r["kind"], r["step"], r.get("loss") is None) for r in undone]
        (evidence,) = run.glob("divergence-*.json")
        found = read_json(evidence)
        assert found["diagnosis"]["first_not_finite"] == {"pass": "weight", "tensor": SPOILED}
        assert (found["step"], found["first_step"], found["batch"]) == (9, 8, BAD)
        assert found["last_good"]["position"] == 6 and found["diagnosis"]["norms"]["weights"][SPOILED] == "inf"
        assert f"the first tensor not finite is weight {SPOILED}" in said
    lost = [("train", 7, False), ("train", 8, True), ("validation", 8, True), ("train", 9, True)]
    assert seen == dict.fromkeys(SIDES, lost)


def test_the_rates_are_lowered_in_the_log_too(config, made, tmp_path):
    """Of the updates after the rollback each is half of the schedule's."""
    out, _ = uninterrupted(config, "torch", made, tmp_path)
    undisturbed = dataclasses.replace(config, out=str(tmp_path / "undisturbed"))
    WORLD.bad = frozenset()
    train(undisturbed, "torch")
    rates, usual = (
        {record["step"]: record["lr"] for record in read_metrics(run) if record["kind"] == "train"}
        for run in (out, undisturbed.out)
    )
    assert rates == {step: rate * (0.5 if step > 6 else 1.0) for step, rate in usual.items()}


KILLED = {"before its next save": 10, "after its next save": 13}
"""Index of the batch at which a run dies that has rolled back: it reads 9, 10, 11, saves, and reads 12 ..."""


@pytest.mark.parametrize("when", KILLED)
def test_a_run_killed_after_a_rollback_ends_as_if_it_had_not_been(when, side, config, made, tmp_path):
    out, _ = uninterrupted(config, side, made, tmp_path)
    kill(config, side, KILLED[when])
    train(resumed(config), side)
    assert_same_runs(config.out, out)
    assert load_state(Path(config.out) / "last").rollbacks == (ONE,)


def die(*arguments, **options):
    raise Killed


def die_going_back(monkeypatch) -> None:
    monkeypatch.setattr(loop, "newest_sound", die)


def die_saving(monkeypatch) -> None:
    """The state that has diverged is set apart, and the one gone back to is not saved yet."""
    monkeypatch.setattr(loop, "next_rollback", functools.partial(_second, loop.next_rollback, []))


def _second(original, calls, *arguments, **options):
    calls.append(1)
    return original(*arguments, **options) if len(calls) == 1 else die()


def die_logging(monkeypatch) -> None:
    monkeypatch.setattr(RunLog, "rollback", die)


@pytest.mark.parametrize("how", [die_going_back, die_saving, die_logging])
def test_a_run_killed_while_it_rolls_back_ends_as_if_it_had_not_been(how, config, made, tmp_path):
    out, _ = uninterrupted(config, "torch", made, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        how(patch)
        train(config, "torch")
    train(resumed(config), "torch")
    assert_same_runs(config.out, out)
    assert load_state(Path(config.out) / "last").rollbacks == (ONE,)
    assert [record for record in records(config.out) if record["kind"] == "rollback"] == [FINITE]


def test_a_signal_while_a_run_rolls_back_waits_for_the_state_it_goes_back_to(
    config, made, tmp_path, monkeypatch, capsys
):
    out, _ = uninterrupted(config, "torch", made, tmp_path)
    save_evidence = loop.save_evidence

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return save_evidence(*arguments, **options)

    monkeypatch.setattr(loop, "save_evidence", interrupted)
    assert cli.run(lambda: train(config, "torch")) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped by SIGTERM after step 6; go on with: python train_torch.py --resume {config.out}"
    assert load_state(Path(config.out) / "last").rollbacks == (ONE,)
    train(resumed(config), "torch")
    assert_same_runs(config.out, out)


def test_a_second_divergence_rolls_back_again_and_one_too_many_stops(config, tmp_path, capsys):
    WORLD.bad = frozenset({BAD, 11})
    train(config, "torch")
    first, second = load_state(Path(config.out) / "last").rollbacks
    assert first == ONE
    # Updates 7, 8, 9 read 9, 10 and the second bad one.
    assert second == Rollback(step=10, to=6, data_offset=7, factor=0.5, reason=REASON)
    assert "update 7 reads batch 13, and the rates are 0.0025 and 0.00025 (2 of 3 rollbacks)" in capsys.readouterr().out
    assert len(list(Path(config.out).glob("divergence-*.json"))) == 2

    once = dataclasses.replace(config, out=str(tmp_path / "once"), max_rollbacks=1)
    with pytest.raises(RunFailed) as ended:
        train(once, "torch")
    line = str(ended.value)
    assert line.startswith(f"{REASON}; ") and line.isprintable() and "--on_divergence rollback" not in line
    state = load_state(Path(once.out) / "last")
    assert (state.position, state.rollbacks) == (6, (ONE,)), "the last good one"

    # With more of them allowed it goes on, as the one that was allowed them at once.
    train(dataclasses.replace(resumed(once), max_rollbacks=3), "torch")
    assert_same_runs(once.out, config.out)


def test_a_run_that_was_to_stop_goes_on_as_its_last_line_says(side, config, made, tmp_path):
    out, _ = uninterrupted(config, side, made, tmp_path)
    stopping = dataclasses.replace(config, on_divergence="stop")
    with pytest.raises(RunFailed) as ended:
        train(stopping, side)
    line = str(ended.value)
    assert f"go back and on with: python train_{side}.py --resume {config.out} --on_divergence rollback." in line
    assert load_state(Path(config.out) / "last").position == 6
    train(resumed(config), side)
    assert_same_runs(config.out, out)
    assert len(list(Path(config.out).glob("divergence-*.json"))) == 2, "it came to the same end first"


def test_a_run_goes_on_in_the_other_framework_after_its_rollback(config, made, tmp_path):
    kill(config, "torch", KILLED["before its next save"])
    shutil.copytree(config.out, tmp_path / "copy")
    train(resumed(config), "jax")
    assert load_state(Path(config.out) / "last").rollbacks == (ONE,)
    out, _ = uninterrupted(config, "torch", made, tmp_path)
    names = [[(r["kind"], r["step"]) for r in records(run)] for run in (config.out, out)]
    assert names[0] == names[1]


def test_rates_far_too_large_are_lowered_until_the_run_goes_well(config):
    """No batch is bad here, and a state is saved after every update: the last one before the loss rose is no good."""
    WORLD.bad = frozenset()
    adamw = dataclasses.replace(config.adamw, learning_rate=30.0)
    schedule = dataclasses.replace(config.schedule, warmup_fraction=0.9)
    run = dataclasses.replace(
        config, adamw=adamw, schedule=schedule, steps=24, save_every=1, max_diverging=3, rollback_factor=1e-3
    )
    train(run, "torch")
    state = load_state(Path(run.out) / "last")
    assert state.position == 24 and len(state.rollbacks) == 1
    assert "the loss stayed above 3 times its running median" in state.rollbacks[0].reason
    last = [record["loss"] for record in read_metrics(run.out) if record["kind"] == "train"][-1]
    (evidence,) = Path(run.out).glob("divergence-*.json")
    found = read_json(evidence)
    assert found["diagnosis"]["first_not_finite"] is None and last < found["losses"][-1]["loss"]
    assert state.rollbacks[0].to == found["first_step"] - 2 == found["last_good"]["position"]


@pytest.mark.parametrize("loss", [88.5, 500.0, 1e30, 1e39, 1e308, math.nan])
def test_no_validation_loss_ends_a_run(loss, config, capsys):
    """Their perplexities are beyond float32, float64 or both; so are some of the losses."""

    class Measured(Toy):
        def evaluate(self, batches):
            return (5.0 if self.updates > 8 else loss), 0.5

    run = dataclasses.replace(config, tensorboard=True, on_divergence="stop", max_skipped=20, max_diverging=20)
    loop.run(run, framework="toy", make_trainer=Measured)
    assert load_state(Path(run.out) / "last").position == 12
    assert all(len(line) < 400 for line in capsys.readouterr().out.splitlines() if line.startswith("step"))
    found = [record["loss"] for record in read_metrics(run.out) if record["kind"] == "validation"]
    expected = None if math.isnan(loss) else loss
    assert found == [expected, expected, expected, 5.0]
