"""What a run that goes on makes of its log, whatever has become of it, and of its surroundings and its picture."""

import dataclasses
import io
import json
import math
import os
import random
import sys
import threading
from pathlib import Path

import pytest

from harness.records import cut_log, lacks_validation, readable_records
from harness.runlog import RunLog, read_metrics
from tests.test_every_moment import REAPER
from tests.test_loop import Killed
from tests.test_runlog import CONFIG, LINES, WITH_EVENTS, events, resume, write_run

UPDATE = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "skipped": 0, "seconds": 0.5, "tokens": CONFIG.tokens_per_step}


@pytest.fixture(autouse=True)
def unwatched():
    yield
    REAPER.watch(None)


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run of 30 updates, evaluated at 10, 20 and 30."""
    write_run(tmp_path / "run")
    return tmp_path / "run"


def said(capsys) -> str:
    """The one line on the log that was printed; empty if none was."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("log  ")]
    assert len(lines) <= 1 and all(line.isprintable() and len(line) < 600 for line in lines)
    return "".join(lines)


def named(records: list[dict]) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in records]


def assert_sound(run: Path) -> None:
    """A log that everybody can read, in order, with each update and each evaluation once."""
    records = read_metrics(run)
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    once = [name for name in named(records) if name[0] != "resume"]
    assert len(once) == len(set(once))


MORE_LINES = LINES | {
    "no loss": b'{"kind": "train", "step": 3}',
    "a text for a loss": b'{"kind": "train", "step": 3, "loss": "x", "skipped": 0, "seconds": 1.0}',
    "an infinite time": b'{"kind": "train", "step": 3, "loss": 1.0, "skipped": 0, "seconds": 1e999}',
    "a loss beyond float64": b'{"kind": "train", "step": 3, "loss": 1%s, "skipped": 0, "seconds": 1}' % (b"0" * 400),
    "a step below 0": b'{"kind": "note", "step": -1}',
    "nothing": b"",
}


@pytest.mark.parametrize("case", MORE_LINES)
@pytest.mark.parametrize("instead", [True, False])
def test_a_damaged_line_costs_that_line_alone(case, instead, run, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:6], MORE_LINES[case] + b"\n", *lines[6 + instead :]])
    path.write_bytes(damaged)
    capsys.readouterr()
    records = resume(run)
    line = said(capsys)
    assert "metrics.jsonl was damaged (line 7" in line and "set aside as metrics-damaged-1.jsonl" in line
    assert ("lacks 1 of the 20 training records before step 21" in line) == instead
    assert (run / "metrics-damaged-1.jsonl").read_bytes() == damaged
    expected = [json.loads(text) for index, text in enumerate(lines) if not (instead and index == 6)]
    assert records[:-2] == [record for record in expected if record["step"] <= 20]
    assert_sound(run)
    resume(run)
    assert said(capsys).count("damaged") == 0 and not (run / "metrics-damaged-2.jsonl").exists()


def test_a_log_cut_anywhere_is_gone_on_with(run):
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        kept = readable_records(run)
        assert kept == records[: len(kept)] and len(kept) - whole[:length].count(b"\n") in (0, 1)
    for length in (0, 1, len(whole) // 2, whole.index(b"\n", len(whole) // 2), len(whole) - 1):
        path.write_bytes(whole[:length])
        before = [record for record in readable_records(run) if record["step"] <= 20]
        assert named(resume(run)) == [*named(before), ("resume", 20), ("train", 21)]


def test_the_end_of_a_log_that_a_kill_left_unfinished_is_no_damage(run, capsys):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    capsys.readouterr()
    resume(run)
    assert said(capsys) == "" and not list(run.glob("*damaged*"))


def test_a_log_whose_end_was_needed_is_set_aside(run, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    cut = b"".join(lines[:15]) + lines[15][:-9]
    path.write_bytes(cut)
    capsys.readouterr()
    resume(run)
    assert "its end is cut off" in said(capsys)
    assert (run / "metrics-damaged-1.jsonl").read_bytes() == cut


def test_a_flipped_bit_anywhere_costs_one_record_and_no_run(run, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)[10:13]  # an update, its evaluation, another update
    whole = b"".join(lines)
    generator = random.Random(0)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        kept = named(readable_records(run))
        assert kept == sorted(kept, key=lambda name: name[1]) and len(kept) >= len(lines) - 2
        if generator.randrange(250) == 0:
            cut_log(run, 20)
            assert_sound(run)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x", encoding="utf-8")


def make_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_folder, make_link])
def test_a_log_that_is_no_file_is_set_aside(make, run, capsys):
    make(run / "metrics.jsonl")
    capsys.readouterr()
    assert named(resume(run)) == [("resume", 20), ("train", 21)]
    line = said(capsys)
    assert "it is no file" in line and "lacks 20 of the 20" in line
    assert os.path.lexists(run / "metrics-damaged-1.jsonl")


def test_a_log_that_cannot_be_read_is_set_aside(run, capsys, monkeypatch):
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "metrics.jsonl":
            raise OSError(5, "Input/output error")
        return read(path)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        cut = cut_log(run, 20)
    assert cut.records == [] and "it cannot be read: Input/output error" in cut.said
    assert len(readable_records(run)) == 0 and (run / "metrics-damaged-1.jsonl").is_file()


def test_doubled_records_are_kept_once_and_the_first_of_them(run, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    other = json.dumps(json.loads(lines[5]) | {"loss": 123.0}).encode() + b"\n"
    path.write_bytes(b"".join([*lines, other, *lines[2:6]]))
    capsys.readouterr()
    records = resume(run)
    assert records[:-2] == [json.loads(line) for line in lines if json.loads(line)["step"] <= 20]
    assert "5 records are doubled" in said(capsys)


@pytest.mark.parametrize("rearrange", [lambda lines: lines.reverse(), random.Random(0).shuffle])
def test_records_out_of_order_are_put_in_order(rearrange, run, capsys):
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "validation", "step": 0, "loss": 9.0, "accuracy": 0.0, "perplexity": null}\n')
    cut_log(run, 30)
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    rearranged = lines[:]
    rearrange(rearranged)
    path.write_bytes(b"".join(rearranged))
    capsys.readouterr()
    assert resume(run)[:-2] == [json.loads(line) for line in lines if json.loads(line)["step"] <= 20]
    assert "its records are out of order" in said(capsys)


def test_a_run_may_be_resumed_twice_at_one_step(run, capsys):
    resume(run)
    capsys.readouterr()
    assert named(resume(run))[-3:] == [("resume", 20), ("resume", 20), ("train", 21)]
    assert said(capsys) == "" and not list(run.glob("*damaged*"))


def test_records_of_other_kinds_stay_as_they_are(run):
    path = run / "metrics.jsonl"
    note = b'{"kind":"note","step":20,"values":[1,{"a":null}]}\n'
    path.write_bytes(path.read_bytes() + note)
    path.write_bytes(b"".join(sorted(path.read_bytes().splitlines(True), key=lambda line: json.loads(line)["step"])))
    resume(run)
    assert note in (run / "metrics.jsonl").read_bytes().splitlines(True) and not list(run.glob("*damaged*"))


@pytest.mark.parametrize("damage", [None, b"[1]\n"])
def test_death_on_the_way_loses_and_doubles_nothing(damage, run, tmp_path):
    """At every file operation of going on; after each the run goes on again."""
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + (damage or b""))
    (run / "undone.jsonl").write_bytes(b"earlier ones, and\nan unfinished li")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    lines = whole.splitlines(keepends=True)
    kept = b"".join(line for line in lines if json.loads(line)["step"] <= 20)
    undone = b"earlier ones, and\nan unfinished li\n" + b"".join(
        line for line in lines if json.loads(line)["step"] > 20
    )
    moment, finished = 0, False
    while not finished:
        for file in run.iterdir():
            file.unlink()
        for name, content in before.items():
            (run / name).write_bytes(content)
        REAPER.watch(run, moment)
        try:
            cut_log(run, 20)
            finished = True
        except Killed:
            REAPER.watch(None)
            cut_log(run, 20)
        REAPER.watch(None)
        assert path.read_bytes() == kept and (run / "undone.jsonl").read_bytes() == undone
        aside = [file.read_bytes() for file in run.glob("metrics-damaged-*.jsonl")]
        assert aside == ([whole + damage] if damage else [])
        moment += 1
    assert moment > 4 and not list(run.glob(".metrics*"))


def test_what_is_undone_again_is_kept_again(run):
    """Two runs over the same updates may write the same lines; only an interruption makes them one."""
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    cut_log(run, 20)
    once = (run / "undone.jsonl").read_bytes()
    path.write_bytes(whole)
    cut_log(run, 20)
    assert (run / "undone.jsonl").read_bytes() == 2 * once


def test_an_undone_file_that_is_none_is_set_aside(run):
    (run / "undone.jsonl").mkdir()
    resume(run)
    assert (run / "undone-damaged-1.jsonl").is_dir() and named(read_metrics(run))[-1] == ("train", 21)
    assert len((run / "undone.jsonl").read_bytes().splitlines()) == 11


@pytest.fixture
def forced(monkeypatch):
    """What was forced to disk and what was renamed, in order."""
    seen = []
    fsync, replace = os.fsync, Path.replace

    def note(descriptor: int) -> None:
        seen.append(("forced", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def look(path: Path, target: Path) -> Path:
        seen.append(("renamed", str(path), str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", look)
    return seen


def assert_forced(seen: list, folder: Path, *names: str) -> None:
    """Each name was put in place, its bytes forced to disk before that and its folder after it."""
    for name in names:
        (place,) = [i for i, what in enumerate(seen) if what[0] == "renamed" and what[2] == str(folder / name)]
        assert ("forced", seen[place][1]) in seen[:place], f"{name} takes its place before it is on disk"
        assert ("forced", str(folder)) in seen[place:], f"the place of {name} is not forced to disk"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors have names in /proc alone")
def test_a_new_log_is_forced_to_disk_with_its_folders(tmp_path, forced):
    write_run(tmp_path / "a" / "run")
    assert_forced(forced, tmp_path / "a" / "run", "run.json", "metrics.jsonl")
    assert ("forced", str(tmp_path)) in forced and ("forced", str(tmp_path / "a")) in forced


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors have names in /proc alone")
def test_a_log_that_is_cut_is_forced_to_disk_after_what_is_moved_out_of_it(run, forced):
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b"[1]\n")
    forced.clear()
    cut_log(run, 20)
    assert_forced(forced, run, "metrics-damaged-1.jsonl", "undone.jsonl", "metrics.jsonl")
    places = [Path(what[2]).name for what in forced if what[0] == "renamed"]
    assert places == ["metrics-damaged-1.jsonl", "undone.jsonl", "metrics.jsonl"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors have names in /proc alone")
def test_the_log_is_forced_to_disk_from_one_thread_while_another_writes(tmp_path, forced):
    errors = []

    def force() -> None:
        try:
            while not done.is_set():
                log.sync()
        except Exception as error:
            errors.append(error)

    done = threading.Event()
    with RunLog(tmp_path / "run", CONFIG, framework="jax", environment={}) as log:
        thread = threading.Thread(target=force)
        thread.start()
        try:
            for step in range(1, 31):
                log.log_step(step=step, **UPDATE)
                if step % 10 == 0:
                    log.rollback(step - 3, {})
                    for again in range(step - 2, step + 1):
                        log.log_step(step=again, **UPDATE)
        finally:
            done.set()
            thread.join()
        forced.clear()
        log.sync()
        assert ("forced", str(tmp_path / "run" / "metrics.jsonl")) in forced
        (tmp_path / "run" / "metrics.jsonl").unlink()
        log.sync()
    log.sync()
    assert not errors


def test_a_run_knows_the_records_it_goes_on_with(run):
    with RunLog(run, CONFIG, framework="jax", environment={}, resume_at=20) as log:
        assert named(log.records) == named([r for r in read_metrics(run) if r["kind"] != "resume"])
        assert not lacks_validation(log.records, 20)
        before = len(log.records)
        log.log_step(step=21, **UPDATE)
        assert len(log.records) == before
    with RunLog(run, CONFIG, framework="jax", environment={}, resume_at=19) as log:
        assert lacks_validation(log.records, 19) and lacks_validation(log.records, 20)
    with RunLog(run.parent / "new", CONFIG, framework="jax", environment={}) as log:
        assert log.records == [] and lacks_validation(log.records, 0)


def test_a_rollback_moves_what_follows_and_counts_on_from_there(run, capsys):
    with RunLog(run, CONFIG, framework="jax", environment={}, resume_at=20) as log:
        for step in range(21, 26):
            log.log_step(step=step, **UPDATE)
        log.rollback(10, {"reason": "the loss rose", "loss": math.inf, "norms": {"a": math.nan, "b": [1, 10**400]}})
        assert named(log.records) == named([r for r in read_metrics(run) if r["kind"] != "rollback"])
        log.log_step(step=11, **UPDATE)
    records = read_metrics(run)
    assert named(records[-2:]) == [("rollback", 10), ("train", 11)]
    assert records[-2] == {
        **{"kind": "rollback", "step": 10, "reason": "the loss rose", "loss": None},
        "norms": {"a": None, "b": [1, None]},
    }
    assert records[-1]["tokens"] == 11 * CONFIG.tokens_per_step
    assert records[-1]["seconds"] == 6.5 + 0.5 and records[-1]["dt_ms"] == 500.0 and records[-1]["tok_s"] is None
    undone = [json.loads(line) for line in (run / "undone.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [r["step"] for r in undone if r["kind"] == "train"]
    assert steps == [*range(21, 31), *range(11, 26)] and ("resume", 20) in named(undone)
    assert_sound(run)
    resumed = resume(run)
    assert ("rollback", 10) in named(resumed)


def test_the_bar_of_a_run_rolled_back_goes_back(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    with RunLog(tmp_path / "run", CONFIG, framework="jax", environment={}) as log:
        for step in range(1, 21):
            log.log_step(step=step, **UPDATE)
        log.rollback(10, {})
        assert "10/30" in sys.stderr.getvalue().rpartition("\r")[2]
        for step in range(11, 31):
            log.log_step(step=step, **UPDATE)
    assert "30/30" in sys.stderr.getvalue().rpartition("\r")[2]


def test_events_of_a_run_rolled_back_begin_again_after_that_step(tmp_path):
    run = tmp_path / "run"
    with RunLog(run, WITH_EVENTS, framework="jax", environment={}) as log:
        for step in range(1, 6):
            log.log_step(step=step, **UPDATE)
        (first,) = run.glob("events.*")
        log.rollback(3, {})
        log.log_step(step=4, **UPDATE)
    first.rename(tmp_path / "first")
    start, update = events(run)
    assert start.step == 4 == update.step and start.session_log.status == start.session_log.START


def test_a_run_is_begun_again_in_its_folder(run, capsys):
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "events.out.tfevents.1").write_bytes(b"")
    other = dataclasses.replace(WITH_EVENTS, seed=5)
    capsys.readouterr()
    with RunLog(run, other, framework="torch", environment={}, again=True) as log:
        assert log.records == []
        log.log_step(step=1, **UPDATE)
    assert "again      begun anew; undone.jsonl has the 34 records of a run" in capsys.readouterr().out
    assert (run / "undone.jsonl").read_bytes() == lines and named(read_metrics(run)) == [("train", 1)]
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert about["framework"] == "torch" and about["config"]["seed"] == 5
    assert len(list(run.glob("events.*"))) == 1, "those of the run before would be drawn with it"


def test_beginning_again_may_be_killed_anywhere(run, tmp_path):
    lines = (run / "metrics.jsonl").read_bytes()
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    moment, finished = 0, False

    def begin() -> None:
        with RunLog(run, CONFIG, framework="jax", environment={}, again=True) as log:
            log.log_step(step=1, **UPDATE)

    while not finished:
        for file in run.iterdir():
            file.unlink()
        for name, content in before.items():
            (run / name).write_bytes(content)
        REAPER.watch(run, moment)
        try:
            begin()
            finished = True
        except Killed:
            REAPER.watch(None)
            begin()
        REAPER.watch(None)
        assert (run / "undone.jsonl").read_bytes() == lines and named(read_metrics(run)) == [("train", 1)]
        json.loads((run / "run.json").read_text(encoding="utf-8"))
        moment += 1
    assert moment > 4


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_run_is_never_overwritten_unless_begun_again(name, tmp_path):
    (tmp_path / name).write_bytes(b"kept")
    with pytest.raises(FileExistsError, match=name):
        RunLog(tmp_path, CONFIG, framework="jax", environment={})
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"kept"
