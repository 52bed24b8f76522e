# ruff: noqa: F811 (fixtures of another file)
"""trackio and wandb as a run uses them: stand-ins of their shape, and the real ones where they are installed."""

import dataclasses
import importlib.machinery
import json
import os
import sqlite3
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from harness import trackers
from harness.runlog import read_metrics
from harness.trackers import Tracker, check_tracker
from recipe.config import RunConfig, UserError, to_dict
from tests.test_loop import Killed, config, kill_at, no_picture, resumed, train  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("trackio", "wandb")


class Stand:
    """A tracker's module: what it is asked is noted, by name."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple] = []
        self.failing: str = ""
        self.threads: set[threading.Thread] = set()
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init = self.init
        module.Settings = dict
        self.mode, self.logged_in = "online", True
        module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))
        module.login = lambda prompt: self.logged_in and not prompt
        patch.setitem(sys.modules, name, module)

    def note(self, what: str, *given: object) -> None:
        self.threads.add(threading.current_thread())
        if what == self.failing:
            raise ConnectionError("no network\nat all")
        self.asked.append((what, *given))

    def init(self, **options: object) -> types.SimpleNamespace:
        self.note("init", options)
        return types.SimpleNamespace(
            log=lambda values, step=None: self.note("log", step, values),
            define_metric=lambda *given, **options: self.note("define_metric", *given, options),
            finish=lambda: self.note("finish"),
        )

    def logged(self) -> list[tuple[int, dict]]:
        """(step, values) of each record, whichever way the module is given the step."""
        records = [given for what, *given in self.asked if what == "log"]
        return [(values["step"] if step is None else step, {k: v for k, v in values.items() if k != "step"})
                for step, values in records]  # fmt: skip


@pytest.fixture
def stands(monkeypatch) -> dict[str, Stand]:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return {name: Stand(name, monkeypatch) for name in NAMES}


def tracked(config: RunConfig, name: str) -> RunConfig:
    return dataclasses.replace(config, track=name)


def measured(folder: str) -> list[tuple[int, dict]]:
    """The records of metrics.jsonl as a tracker is to have them."""
    own = ("kind", "step")
    return [
        (record["step"], {f"{record['kind']}/{k}": v for k, v in record.items() if k not in own and v is not None})
        for record in read_metrics(folder)
        if record["kind"] in ("train", "validation", "baselines")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_gets_what_the_log_gets(name, config, stands):
    train(tracked(config, name))
    stand = stands[name]
    assert stand.logged() == measured(config.out) and len(stand.logged()) > 15
    what, options = stand.asked[0]
    assert what == "init" and options["name"] == "run" and options["project"] == "qwen-from-scratch"
    assert options["config"]["steps"] == 12 and options["config"]["model"]["vocab_size"] == 384
    assert stand.asked[-1] == ("finish",) and threading.main_thread() not in stand.threads
    assert not stands[NAMES[name == "trackio"]].asked
    if name == "wandb":
        assert ("define_metric", "*", {"step_metric": "step"}) in stand.asked and options["dir"] == config.out
        assert options["settings"] == {"console": "off", "silent": True}


def test_a_project_of_ones_own(config, stands, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
        train(dataclasses.replace(config, track=name, out=f"{config.out}-{name}"))
        assert stands[name].asked[0][1]["project"] == "mine"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_resumed_goes_on_with_its_trackers(name, config, stands):
    with pytest.raises(Killed):
        train(tracked(config, name), kill_at(7))
    stand = stands[name]
    assert stand.asked[-1] == ("finish",), "an end by an error is an end"
    (_, first), stand.asked = stand.asked[0], []
    train(resumed(tracked(config, name)))
    again = stand.asked[0][1]
    if name == "wandb":
        assert again["id"] == first["id"] and again["resume"] == first["resume"] == "allow"
    else:
        assert (first["resume"], again["resume"], first["name"]) == ("never", "allow", again["name"])
    assert stand.logged() == [record for record in measured(config.out) if record[0] > 6]
    stand.asked = []
    train(dataclasses.replace(tracked(config, name), out=config.out + "-2"))
    assert name == "trackio" or stand.asked[0][1]["id"] != first["id"]


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_fails_ends_no_run_and_says_so_once(name, moment, config, stands, capsys):
    stands[name].failing = moment
    train(tracked(config, name))
    assert read_metrics(config.out)[-1]["step"] == 12
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == [f"warning: {name} is left out from here on (ConnectionError: no network at all); the run goes on"]


def test_a_tracker_that_hangs_holds_nothing_up(config, stands, monkeypatch, capsys):
    let_go = threading.Event()
    monkeypatch.setattr(stands["wandb"], "note", lambda *given: let_go.wait())
    monkeypatch.setattr(trackers, "TO_FINISH", 0.01)
    train(tracked(config, "wandb"))
    assert capsys.readouterr().err.count("warning: wandb is left out from here on (it has not finished in 0 s)") == 1
    monkeypatch.setattr(trackers, "WAITING", 3)
    Path(config.out, "run.json").write_text("{}", encoding="utf-8")
    tracker = Tracker(Path(config.out), tracked(config, "wandb"), resumed=False)
    for step in range(9):
        tracker.log(step, {})
    tracker.finish()
    assert (
        capsys.readouterr().err == "warning: wandb is left out from here on (it is 3 records behind); the run goes on\n"
    )
    let_go.set()


def test_a_tracker_that_is_not_installed_is_a_line_before_a_folder_is_made(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^--track wandb needs wandb, which is not installed; run: pip install wandb, or"
    ):
        train(tracked(config, "wandb"))
    assert not Path(config.out).exists()
    with pytest.raises(UserError, match="--track trackio needs trackio"):
        check_tracker("trackio")


def test_wandb_is_not_left_to_ask_who_one_is(config, stands):
    stands["wandb"].logged_in = False
    with pytest.raises(
        UserError, match=r"^--track wandb: this machine is not logged in; run: wandb login, or set WANDB"
    ):
        train(tracked(config, "wandb"))
    assert not Path(config.out).exists() and not stands["wandb"].asked
    stands["wandb"].mode = "offline"
    check_tracker("wandb")


def test_without_the_flag_nothing_is_tracked(config, stands):
    train(config)
    assert not stands["wandb"].asked and not stands["trackio"].asked


PROGRAM = """
import json, sys
from pathlib import Path
from harness.trackers import Tracker, check_tracker
from recipe.config import from_dict
folder = Path(sys.argv[1])
config = from_dict(json.loads((folder / "config.json").read_text()))
check_tracker(config.track)
for resumed in (False, True):
    tracker = Tracker(folder, config, resumed=resumed)
    for step in range(3):
        tracker.log(3 * resumed + step, {"train/loss": 4.0 - step})
    tracker.finish()
"""


def real(name: str, folder: Path) -> str:
    """A run of the real package's, gone on with, in a process of its own; what it said on stderr."""
    folder.mkdir()
    (folder / "run.json").write_text('{"started": "now"}', encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(to_dict(RunConfig(track=name))), encoding="utf-8")
    settings = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(line, cwd=ROOT, env=settings, capture_output=True, text=True, check=True)
    return done.stderr


@pytest.mark.slow
def test_wandb_itself_without_a_network(tmp_path):
    pytest.importorskip("wandb", reason="pip install 'qwen-from-scratch[wandb]'")
    assert "left out" not in real("wandb", tmp_path / "run")
    kept = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == 2 and len({file.name for file in kept}) == 1, "two parts of one run"


@pytest.mark.slow
def test_trackio_itself(tmp_path):
    pytest.importorskip("trackio", reason="pip install 'qwen-from-scratch[trackio]'")
    assert "left out" not in real("trackio", tmp_path / "run")
    (database,) = (tmp_path / "run" / "trackio").glob("*.db")
    with sqlite3.connect(database) as opened:
        rows = opened.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step, json.loads(values)["train/loss"]) for name, step, values in rows] == [
        ("run", step, 4.0 - step % 3) for step in range(6)
    ]
