"""What a resumed run may have other than the run it goes on with: its weights and slots are the same, bit for bit, and
what differs is said in one line.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from harness.commands.train import parse_run_config
from harness.configure import FREE_ON_RESUME
from harness.manifest import seal
from harness.state import SLOTS, load_state, state_folders
from recipe.config import HostsConfig, RunConfig
from recipe.reading import read_json
from tests.test_loop import Killed, config, elsewhere, kill_at, no_picture, records, resumed, train  # noqa: F401

OTHER = {
    "log_every": 5,
    "eval_every": 1,
    "save_every": 2,
    "prompts": ("dog", "fox"),
    "sample_tokens": 3,
    "tensorboard": True,
    "track": "trackio",
    "keep": 1,
    "data.cache_dir": "elsewhere",
    "max_skipped": 3,
    "divergence_factor": 1.5,
    "max_diverging": 4,
    "on_divergence": "rollback",
    "max_rollbacks": 7,
    "rollback_factor": 0.25,
    "mesh": "data=2",
    "gather": "layer",
    "scan_layers": True,
}
"""Another value of each field that may differ, with which the run below does not diverge."""
OF_JAX = ("mesh", "gather")
HOSTS = HostsConfig("10.0.0.1:1234", 2, 0, 7)
"""Where a process stands among others, which is no part of the run."""


def assert_same_state(a: Path, b: Path) -> None:
    """All that training moves; how often it is evaluated decides which weights are the best."""
    first, second = load_state(a / "last"), load_state(b / "last")
    assert (first.updates, first.skipped, first.text) == (second.updates, second.skipped, second.text)
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(weight, second.weights[name], err_msg=name)
    for slot in SLOTS:
        for name, array in first.slots[slot].items():
            np.testing.assert_array_equal(array, second.slots[slot][name], err_msg=f"{slot} {name}")


@pytest.fixture(scope="module")
def made() -> list[str]:
    """Folders of runs that nobody interrupts; every test has the same text."""
    return []


@pytest.fixture
def whole(config, made, tmp_path) -> Path:  # noqa: F811
    if not made:
        train(elsewhere(config, tmp_path))
        made.append(str(tmp_path / "other"))
    return Path(made[0])


@pytest.fixture
def killed(config, whole) -> RunConfig:  # noqa: F811
    """Killed before update 9; its states are those of steps 3 and 6."""
    with pytest.raises(Killed):
        train(config, kill_at(8))
    assert [load_state(state).position for state in state_folders(Path(config.out))] == [6, 3]
    return config


def changed(config: RunConfig, name: str, value) -> RunConfig:  # noqa: F811
    """The run with another value of a field, which may be one of its data's."""
    section, _, last = name.rpartition(".")
    if section:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **{last: value}))
    return dataclasses.replace(config, **{last: value})


@pytest.fixture(autouse=True)
def no_tracker(monkeypatch):
    """tests/test_trackers.py looks at what they are given."""
    monkeypatch.setattr("harness.loop.check_tracker", lambda name: None)
    monkeypatch.setattr("harness.trackers.BEGIN", {"trackio": lambda *_: (lambda *_: None, lambda: None)})


def said_to_differ(out: str) -> list[str]:
    """The lines between the one that says where the run goes on and the first of its updates."""
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("resumed    after step"))
    end = next(number for number, line in enumerate(lines) if line.startswith("step "))
    return lines[start + 1 : end]


def test_every_field_that_may_differ_is_tried():
    assert OTHER.keys() | {f"hosts.{name}" for name in dataclasses.asdict(HOSTS)} == set(FREE_ON_RESUME)


@pytest.mark.parametrize("name", OTHER)
def test_a_field_that_may_differ_moves_no_weight(name, killed, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    value = OTHER[name]
    text = json.dumps(value) if isinstance(value, tuple) else str(value)
    flags = [f"--{name}", *value] if isinstance(value, tuple) else [f"--{name}", text]
    run = parse_run_config(["--resume", killed.out, *flags], framework="jax" if name in OF_JAX else "torch")
    assert run == changed(resumed(killed), name, value), "the command line takes it"
    capsys.readouterr()
    train(run)
    (line,) = said_to_differ(capsys.readouterr().out)
    old, new = (str(list(x)) if isinstance(x, tuple) else str(x) for x in (_value(killed, name), value))
    assert line.startswith(f"changed    {name} ") and line.endswith(f" -> {new}")
    assert old in line or "..." in line or "…" in line
    assert_same_state(Path(killed.out), whole)
    steps = [record["step"] for record in records(killed.out) if record["kind"] == "train"]
    assert steps == list(range(1, killed.steps + 1))
    assert _value(load_state(Path(killed.out) / "last").config, name) == value, "the next one to go on has it"


def test_a_process_has_another_place_and_the_run_knows_nothing_of_it(killed, whole, capsys):
    flags = [word for name, value in dataclasses.asdict(HOSTS).items() for word in (f"--hosts.{name}", str(value))]
    run = parse_run_config(["--resume", killed.out, "--mesh", "data=2", *flags], framework="jax")
    assert run.hosts == HOSTS
    capsys.readouterr()
    train(run)
    (line,) = said_to_differ(capsys.readouterr().out)
    assert line.endswith("changed    mesh '' -> data=2")
    assert_same_state(Path(killed.out), whole)
    assert load_state(Path(killed.out) / "last").config.hosts == HostsConfig()


def _value(config: RunConfig, name: str):  # noqa: F811
    section, _, last = name.rpartition(".")
    return getattr(config.data if section else config, last)


def test_all_of_them_together(killed, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = resumed(killed)
    for name, value in OTHER.items():
        run = changed(run, name, value)
    capsys.readouterr()
    train(run)
    (line,) = said_to_differ(capsys.readouterr().out)
    assert all(f" {name} " in line for name in OTHER)
    assert_same_state(Path(killed.out), whole)


def test_nothing_is_said_where_nothing_differs(killed, whole, capsys):
    capsys.readouterr()
    train(resumed(killed))
    assert said_to_differ(capsys.readouterr().out) == []


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_another_number_of_states_is_kept_from_then_on(keep, killed, whole):
    before = state_folders(Path(killed.out))
    train(dataclasses.replace(resumed(killed), keep=keep), lambda position: _look(killed, keep, len(before)))
    kept = [load_state(state).position for state in state_folders(Path(killed.out))]
    assert kept == [12, 9, 6, 3][:keep]
    assert_same_state(Path(killed.out), whole)


def _look(run: RunConfig, keep: int, before: int) -> None:
    """While it goes on it never has more than it is to keep, or had before."""
    assert len(state_folders(Path(run.out))) <= max(keep, before)


def rewritten(state: Path, change) -> None:
    """Let another have written the state: other values of its run.json, under a seal that fits."""
    values = read_json(state / "run.json")
    files = {name: entry for name, entry in values.pop("files").items() if name != "run.json"}
    del values["checksum"]
    change(values)
    seal(state, "run.json", values, files)


SURROUNDINGS = {
    "framework": (lambda v: v.update(framework="jax"), "framework  jax -> toy"),
    "code": (lambda v: v.update(git_commit="0123456789ab" + 28 * "c"), "code       commit 0123456789ab -> "),
    "no code": (lambda v: v.update(git_commit=None), "code       commit none -> "),
    "Python": (lambda v: v.update(python="3.1.4"), "python     3.1.4 -> "),
    "platform": (lambda v: v.update(platform="Plan 9"), "platform   Plan 9 -> "),
    "a library": (lambda v: v["versions"].update(numpy="0.9"), "versions   numpy 0.9 -> "),
    "a library that was not there": (lambda v: v["versions"].pop("tokenizers"), "versions   tokenizers absent -> "),
    "device": (lambda v: v["environment"].update(device="slide rule"), "device     slide rule -> abacus"),
}
"""What a state may say of where it was written, and the line that a resumed run has for it."""


@pytest.mark.parametrize("case", SURROUNDINGS)
def test_other_surroundings_are_said_and_that_is_all(case, killed, whole, capsys):
    change, line = SURROUNDINGS[case]
    rewritten(Path(killed.out) / "last", change)
    capsys.readouterr()
    train(resumed(killed))
    done = capsys.readouterr()
    (said,) = said_to_differ(done.out)
    assert said.startswith(line) and said.isprintable()
    assert done.err.count("warning") == 0
    assert_same_state(Path(killed.out), whole)
    assert records(killed.out) == records(str(whole))


@pytest.mark.parametrize("value", ["absent", None, 3, {"a": {"b": [1, None]}}, "\x1b[31m" + 5000 * "x"])
def test_surroundings_that_say_nothing_stop_no_run(value, killed, capsys):
    def change(values: dict) -> None:
        for name in ("framework", "git_commit", "python", "platform", "versions", "environment"):
            values.pop(name) if value == "absent" else values.update({name: value})

    rewritten(Path(killed.out) / "last", change)
    capsys.readouterr()
    with pytest.raises(Killed):
        train(resumed(killed), kill_at(6))
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("run  ")]
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
