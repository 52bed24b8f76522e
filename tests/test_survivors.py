"""What seeded bugs of a run's survival showed that no other test saw: earlier states, late saves, rollbacks, signals.

Each test names in parity_tests/mutant_gaps.py the bugs that it was written against.
"""

import dataclasses
import errno
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import recipe.data
from harness import loop
from harness.failures import RunFailed
from harness.folders import load_folder, save_folder
from harness.interruption import Terminated
from harness.saving import Saver
from harness.state import earlier_folder, keep_newest, load_state, place_of_last, read_run, state_folders
from harness.tensors import Damaged
from recipe.config import RunConfig, UserError
from recipe.data import prepare
from recipe.lock import fcntl, locked
from recipe.params import init_params
from recipe.tokenizer import train_bpe
from tests.test_loop import (  # noqa: F401
    STEPS,
    Killed,
    Toy,
    assert_same_runs,
    config,
    elsewhere,
    kill_at,
    no_picture,
    records,
    resumed,
    train,
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What is forced to disk tests/test_power.py looks at."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def positions(run: str | Path) -> list[int]:
    return [load_state(folder).position for folder in state_folders(Path(run))]


def flip_last_bit(file: Path) -> bytes:
    """What the file holds then."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return file.read_bytes()


def everything(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_states_are_kept_and_found_in_their_order(keep, config):  # noqa: F811
    train(dataclasses.replace(config, keep=keep))
    assert positions(config.out) == [12, 9, 6][:keep]


def test_a_run_goes_on_from_an_earlier_state_where_the_last_one_is_damaged(config, tmp_path, capsys):  # noqa: F811
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(11))
    assert positions(config.out) == [9, 6]
    damaged = flip_last_bit(Path(config.out) / "last" / "optimizer.safetensors")
    capsys.readouterr()
    loop.run(resumed(config), framework="toy", make_trainer=Toy)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "optimizer.safetensors is not what was written" in warning and "after step 6" in warning
    assert (Path(config.out) / "last-damaged-1" / "optimizer.safetensors").read_bytes() == damaged
    assert_same_runs(config.out, str(tmp_path / "other"))


def test_a_state_of_the_same_step_takes_no_other_ones_place(config):  # noqa: F811
    with pytest.raises(Killed):
        train(config, kill_at(10))
    run = Path(config.out)
    assert positions(run) == [9, 6]
    assert place_of_last(run, 9, 2) is None
    assert place_of_last(run, 10, 2) == earlier_folder(run, 9)
    assert place_of_last(run, 10, 1) is None


def test_a_run_killed_while_it_removes_a_state_leaves_no_half_of_one(config, monkeypatch):  # noqa: F811
    train(config)

    def die(folder: Path) -> None:
        (folder / "run.json").unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", die)
        keep_newest(Path(config.out), 1)
    assert positions(config.out) == [12]


def test_a_flipped_bit_in_the_best_weights_is_no_best(config, capsys):  # noqa: F811
    with pytest.raises(Killed):
        train(config, kill_at(10))
    run = Path(config.out)
    damaged = flip_last_bit(run / "best" / "model.safetensors")
    train(resumed(config))
    assert "best/ cannot be read" in capsys.readouterr().err
    assert (run / "best-damaged-1" / "model.safetensors").read_bytes() == damaged
    dict(load_folder(run / "best")[1].items())


def test_a_damaged_configuration_is_not_what_is_resumed(config):  # noqa: F811
    with pytest.raises(Killed):
        train(config, kill_at(4))
    file = Path(config.out) / "last" / "run.json"
    read_run(file.parent)
    text = file.read_text(encoding="utf-8")
    assert text.count('"steps": 12,') == 1
    file.write_text(text.replace('"steps": 12,', '"steps": 13,'), encoding="utf-8")
    with pytest.raises(Damaged, match=r"run\.json is not what was written"):
        read_run(file.parent)


def test_a_number_written_otherwise_is_a_damage_too(config):  # noqa: F811
    """One bit makes 1e-07 to 1E-07, which is the same number."""
    with pytest.raises(Killed):
        train(config, kill_at(4))
    file = Path(config.out) / "last" / "run.json"
    file.write_bytes(file.read_bytes().replace(b"1e-07", b"1E-07", 1))
    for read in (load_state, read_run):
        with pytest.raises(Damaged, match=r"run\.json is not what was written"):
            read(file.parent)


def test_files_in_folders_below_have_hashes_too(config, tmp_path):  # noqa: F811
    tokenizer = train_bpe(["some text"], 280)
    tokenizer.companions["additional_chat_templates/tool.jinja"] = "{{ messages }}"
    save_folder(tmp_path / "best", config.model, init_params(config.model, 0), tokenizer, about={})
    load_folder(tmp_path / "best")
    flip_last_bit(tmp_path / "best" / "additional_chat_templates" / "tool.jinja")
    with pytest.raises(Damaged, match=r"tool\.jinja is not what was written"):
        load_folder(tmp_path / "best")


class Late(Saver):
    """Begins a job when it is waited for: by the next save, or at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def submit(self, job) -> None:
        super().submit(lambda: (self.asked.wait(), job()))

    def wait(self) -> None:
        self.asked.set()
        super().wait()
        self.asked.clear()

    def __exit__(self, *why) -> None:
        self.asked.set()
        super().__exit__(*why)


def test_a_state_is_that_of_its_update_however_late_it_is_written(config, tmp_path, monkeypatch):  # noqa: F811
    config = dataclasses.replace(config, keep=4)
    train(elsewhere(config, tmp_path))
    monkeypatch.setattr(loop, "Saver", Late)
    train(config)
    assert_same_runs(config.out, str(tmp_path / "other"))
    assert positions(config.out) == positions(tmp_path / "other") == [12, 9, 6, 3]
    for folders in zip(state_folders(Path(config.out)), state_folders(tmp_path / "other"), strict=True):
        late, usual = map(load_state, folders)
        assert (late.updates, late.skipped) == (usual.updates, usual.skipped)
        before = [
            r["loss"] for r in records(config.out) if r["kind"] == "validation" and 0 < r["step"] <= late.position
        ]
        assert late.best == min(before, default=np.inf)
        for name, weight in usual.weights.items():
            np.testing.assert_array_equal(late.weights[name], weight, err_msg=name)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_what_cannot_be_saved_ends_the_run(number, config, monkeypatch):  # noqa: F811
    """The first state, best weights alone, the last state."""
    saves = []

    def full(config, *, best, state):
        saves.append((best, state))
        if len(saves) == number:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "check_room", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(config)
    assert len(saves) == number


def test_what_cannot_be_saved_is_said_though_a_signal_asked_for_it(config, monkeypatch):  # noqa: F811
    def full(config, *, best, state):
        if state and (Path(config.out) / "last").is_dir():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "check_room", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(config, lambda position: signal.raise_signal(signal.SIGTERM) if position == 4 else None)
    assert positions(config.out) == [3]


def test_a_run_killed_before_its_first_save_is_begun_again_as_it_was(config, tmp_path):  # noqa: F811
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(2))
    before = everything(Path(config.out))
    with pytest.raises(UserError, match=r"killed before its first save, begun with seed=0 instead of 3; pass the same"):
        train(dataclasses.replace(config, seed=3))
    assert everything(Path(config.out)) == before
    train(config)
    assert_same_runs(config.out, str(tmp_path / "other"))


@pytest.mark.skipif(fcntl is None, reason="needs locks")
def test_a_cache_entry_is_held_while_it_is_built(config, monkeypatch):  # noqa: F811
    encode_texts, held = recipe.data.encode_texts, []

    def look(*args, **kwargs):
        (scratch,) = Path(config.data.cache_dir).iterdir()
        with locked(scratch) as free:
            held.append(free is False)
        return encode_texts(*args, **kwargs)

    monkeypatch.setattr(recipe.data, "encode_texts", look)
    prepare(config.data, seed=config.seed, show_progress=False)
    assert held == [True, True], "for the training text and for what is held out"


class Runaway(Toy):
    """Its loss jumps at the eighth update and stays there, unless the rate is lower than that of the run."""

    made: list["Runaway"]
    before = staticmethod(lambda position: None)

    def __init__(self, config: RunConfig, weights) -> None:  # noqa: F811
        super().__init__(config, weights)
        self.rate, self.before_step = config.muon.learning_rate, self.before
        self.runs_away = self.rate > 0.9 * RunConfig().muon.learning_rate
        self.diagnosed: list[tuple[int, int]] = []
        self.made.append(self)

    def step(self, inputs_ABT, targets_ABT):
        metrics = super().step(inputs_ABT, targets_ABT)
        away = self.runs_away and self.updates + self.skipped >= 8
        return metrics | {"loss": 100.0 if away else 1.0}

    def diagnose(self, inputs_ABT, targets_ABT, *, position):
        self.diagnosed.append((position, int(inputs_ABT.sum())))
        raise NotImplementedError("an abacus has no tensors to look at")


def run_away(config: RunConfig, before=lambda position: None) -> list[Runaway]:  # noqa: F811
    """One run, or the rest of one; the trainers that did it."""
    trainer = type("Once", (Runaway,), {"made": [], "before": staticmethod(before)})
    loop.run(config, framework="toy", make_trainer=trainer)
    return trainer.made


@pytest.fixture
def rolling(config) -> RunConfig:  # noqa: F811
    """Three losses in a row above the usual one make it roll back: those of updates 8, 9 and 10."""
    return dataclasses.replace(config, max_diverging=3, on_divergence="rollback")


def sums_of_batches(config: RunConfig, *indices: int) -> list[int]:  # noqa: F811
    dataset = prepare(config.data, seed=config.seed, show_progress=False)
    shape = dict(accumulation=1, batch_size=config.batch_size, sequence_length=config.sequence_length)
    return [int(dataset.batch(index, **shape)[0].sum()) for index in indices]


def test_a_run_that_rolls_back_goes_on_from_before_with_other_batches_at_a_lower_rate(rolling):
    first, second = run_away(rolling)
    assert first.seen == sums_of_batches(rolling, *range(10))
    assert first.diagnosed == [(7, *sums_of_batches(rolling, 7))]
    # Update 7 reads what update 11 would have.
    assert second.seen == sums_of_batches(rolling, *range(10, 16))
    assert second.rate == rolling.rollback_factor * first.rate
    state = load_state(Path(rolling.out) / "last")
    assert [(r.step, r.to, r.data_offset) for r in state.rollbacks] == [(10, 6, 4)]
    assert state.position == STEPS
    assert not list(Path(rolling.out).glob("*-diverged-*")), "no state was saved while the loss was high"
    steps = [record["step"] for record in records(rolling.out) if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))


def test_a_run_that_stops_keeps_its_last_state_from_before(rolling):
    with pytest.raises(RunFailed, match="the loss stayed above 3 times its running median"):
        run_away(dataclasses.replace(rolling, on_divergence="stop", save_every=2))
    assert positions(rolling.out) == [6, 5], "the fourth update is skipped, so its state is not taken"


def test_a_run_rolled_back_is_resumed_at_its_lower_rate(rolling, tmp_path):
    _, whole = run_away(elsewhere(rolling, tmp_path))
    seen = []

    def die_in_the_second(position: int) -> None:
        seen.append(position)
        if position == 9 and seen.count(9) == 2:
            raise Killed

    with pytest.raises(Killed):
        run_away(rolling, die_in_the_second)
    (rest,) = run_away(resumed(rolling))
    assert rest.rate == whole.rate
    assert whole.seen[-len(rest.seen) :] == rest.seen
    assert_same_runs(rolling.out, str(tmp_path / "other"))
    assert load_state(Path(rolling.out) / "last").rollbacks == load_state(tmp_path / "other" / "last").rollbacks
    (mark,) = [record for record in records(rolling.out) if record["kind"] == "rollback"]
    assert (mark["step"], mark["diverged_at"], mark["data_offset"]) == (6, 10, 4)
    assert not list(Path(rolling.out).glob("*-damaged-*")), "the log is in order"


def test_a_state_saved_by_a_signal_amid_a_divergence_is_not_gone_back_to(rolling):
    """Nor is the divergence forgotten by the run that goes on: its third high loss is still update 10's."""
    with pytest.raises(Terminated):
        run_away(rolling, lambda position: signal.raise_signal(signal.SIGTERM) if position == 7 else None)
    assert positions(rolling.out) == [8, 6]
    _, second = run_away(resumed(rolling))
    assert second.seen == sums_of_batches(rolling, *range(10, 16))
    assert load_state(Path(rolling.out) / "last-diverged-1").position == 8


def test_a_signal_breaks_off_an_evaluation_which_is_made_again(config, tmp_path):  # noqa: F811
    train(elsewhere(config, tmp_path))
    looked = []

    class Slow(Toy):
        def evaluate(self, batches):
            for _ in batches:
                if self.updates + self.skipped == 4:
                    looked.append(self.skipped)
                    signal.raise_signal(signal.SIGTERM)
            return super().evaluate(batches)

    with pytest.raises(Terminated):
        loop.run(config, framework="toy", make_trainer=Slow)
    assert len(looked) == 1, "of four batches"
    assert [r["step"] for r in records(config.out) if r["kind"] == "validation"] == [0]
    train(resumed(config))
    assert_same_runs(config.out, str(tmp_path / "other"))
