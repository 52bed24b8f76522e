"""A run that was killed before its first save is begun again by the command it was begun with, and ends as if nothing
had happened; nobody else's folder is taken for such a one.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import harness.folders
import harness.runlog
import harness.state
from harness import loop
from harness.cli import run as run_command
from harness.commands.train import parse_run_config
from harness.folders import load_folder
from harness.state import state_folders
from recipe.config import RunConfig, UserError
from recipe.lock import fcntl, locked
from tests.test_loop import Killed, Toy, assert_same_runs, config, elsewhere, kill_at, no_picture, train  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def early(config) -> RunConfig:  # noqa: F811
    """A run whose weights are kept before its first save: evaluated at 0, 1, 2 ..., saved at 3 and 6."""
    return dataclasses.replace(config, steps=6, eval_every=1, save_every=3)


def die(*arguments, **options):
    raise Killed


def die_in_log(monkeypatch) -> None:
    monkeypatch.setattr(loop, "RunLog", die)


def die_after_settings(monkeypatch) -> None:
    monkeypatch.setattr(harness.runlog, "cut_log", die)


def die_evaluating(monkeypatch) -> None:
    monkeypatch.setattr(Toy, "evaluate", die)


def die_saving(monkeypatch) -> None:
    monkeypatch.setattr(harness.state, "seal", die)


def die_renaming(monkeypatch) -> None:
    """All of the state is written and on disk, but under no name of its own."""
    sync_below = harness.folders.sync_below

    def synced(folder: Path) -> None:
        if folder.name.startswith(".last-"):
            raise Killed
        sync_below(folder)

    monkeypatch.setattr(harness.folders, "sync_below", synced)


KILLED: dict[str, tuple[Callable | None, int]] = {
    "when its folder was made": (die_in_log, 0),
    "when it had written its settings": (die_after_settings, 0),
    "in its first evaluation": (die_evaluating, 0),
    "before its first update": (None, 0),
    "when it had its best weights": (None, 2),
    "in its first save": (die_saving, 2),
    "in its first save, at the end": (die_renaming, 2),
}
"""How a run dies, or at which update."""


def kill(case: str, config: RunConfig) -> None:  # noqa: F811
    """Leave the folder of a run that dies there, as a process does that can tidy nothing up."""
    how, position = KILLED[case]
    remove = shutil.rmtree

    def tidy(folder: Path, *arguments, **options) -> None:
        if not Path(folder).name.startswith(".last-"):
            remove(folder, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", tidy)
        if how is None:
            train(config, kill_at(position))
        else:
            how(patch)
            train(config)
    assert Path(config.out).is_dir() and not state_folders(Path(config.out))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("case", KILLED)
def test_the_same_run_is_begun_again_and_ends_equal(case, times, early, tmp_path, capsys):
    train(elsewhere(early, tmp_path))
    run = Path(early.out)
    logs, bests = b"", []
    for _ in range(times):
        kill(case, early)
        logs += (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
        bests += [(run / "best").stat().st_ino] if (run / "best").exists() else []
    capsys.readouterr()
    train(early)
    said = capsys.readouterr().out
    assert_same_runs(early.out, str(tmp_path / "other"))
    assert ("again      begun anew" in said) == (case != "when its folder was made")
    undone = run / "undone.jsonl"
    assert (undone.read_bytes() if undone.exists() else b"") == logs
    apart = [run / f"best-undone-{number}" for number in range(1, len(bests) + 1)]
    assert [folder.stat().st_ino for folder in apart] == bests and bool(bests) == (KILLED[case][1] > 0)
    for folder in apart:
        load_folder(folder)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert len(list(run.iterdir())) == 6 + bool(logs) + len(bests), "best, last, earlier, log, settings and picture"


def test_it_may_be_resumed_from_its_first_save_on(early, tmp_path):
    """Then what was undone before stays undone, and the rest is kept once."""
    train(elsewhere(early, tmp_path))
    kill("when it had its best weights", early)
    with pytest.raises(Killed):
        train(early, kill_at(5))
    train(dataclasses.replace(early, resume=early.out))
    assert_same_runs(early.out, str(tmp_path / "other"))
    undone = [json.loads(line) for line in (Path(early.out) / "undone.jsonl").read_text("utf-8").splitlines()]
    steps = [record["step"] for record in undone if record["kind"] == "train"]
    assert steps == [1, 2, 4, 5]


def refused(config: RunConfig, error: type[Exception] = UserError) -> str:  # noqa: F811
    """The line with which a run is refused, its folder untouched."""
    run = Path(config.out)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(error) as caught:
        train(config)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert str(caught.value).isprintable()
    return str(caught.value)


OTHERS = {
    "seed": (dict(seed=3), "seed=0 instead of 3"),
    "steps": (dict(steps=9), "steps=6 instead of 9"),
    "how often it logs": (dict(log_every=7), "log_every=1 instead of 7"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_run_is_refused_the_folder(case, early):
    kill("before its first update", early)
    change, part = OTHERS[case]
    line = refused(dataclasses.replace(early, **change))
    assert "killed before its first save, begun with " in line and part in line and "pass the same flags" in line


def test_another_rate_is_named_by_its_part(early):
    kill("before its first update", early)
    muon = dataclasses.replace(early.muon, learning_rate=0.5)
    assert "muon.learning_rate=0.01 instead of 0.5" in refused(dataclasses.replace(early, muon=muon))


@pytest.mark.parametrize("name", ["note.txt", "last", "samples.txt", "best-of-all", "metrics.jsonl.bak"])
def test_a_folder_with_anything_else_is_nobodys_to_begin_in(name, early):
    kill("before its first update", early)
    (Path(early.out) / name).mkdir()
    assert "already holds files" in refused(early)


def test_a_run_that_another_process_has_brought_to_its_first_save_is_left_alone(early):
    """While this one made its trainer."""
    kill("before its first update", early)

    def make_trainer(*arguments):
        with pytest.raises(Killed):
            train(early, kill_at(4))
        return Toy(*arguments)

    with pytest.raises(UserError, match=r"has a state by now, by another process; go on with: .* --resume"):
        loop.run(early, framework="toy", make_trainer=make_trainer)
    assert [path.name for path in state_folders(Path(early.out))] == ["last"]


@pytest.mark.skipif(fcntl is None, reason="nobody can tell without locks")
def test_the_same_command_beside_a_run_that_has_saved_nothing_gets_one_line(early, monkeypatch, capsys):
    lines = []

    def intrude(position: int) -> None:
        if position == 0:  # later the first one itself writes to the folder, from its thread
            with monkeypatch.context() as patch:
                patch.setattr(loop, "prepare", die)  # It is told before it reads the text.
                lines.append(refused(early))

    train(early, intrude)
    assert lines == [f"{early.out} is being trained by another process; wait for it, or stop it."]


HOLDING = """
import sys, time
from pathlib import Path
from recipe.lock import locked

with locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def automatic(early, tmp_path, monkeypatch) -> list[str]:
    """The command line of a run in an automatic folder, which was killed before its first save."""
    monkeypatch.chdir(tmp_path)
    data = early.data
    line = f"""--steps 6 --eval_every 1 --save_every 3 --log_every 1 --batch_size 2 --sequence_length 8
        --sample_tokens 0
        --data.corpus {data.corpus} --data.bpe_vocab_size 300 --data.validation_tokens 64
        --data.cache_dir {data.cache_dir} --model.hidden_size 6 --model.intermediate_size 4
        --model.num_hidden_layers 1 --model.num_attention_heads 2 --model.num_key_value_heads 1 --model.head_dim 2
        --model.vocab_size 128""".split()
    begun = parse_run_config(line, framework="torch")
    assert begun.out == "runs/tiny-torch"
    kill("when it had its best weights", begun)
    return line


def test_an_automatic_folder_is_begun_again(automatic, monkeypatch):
    again = parse_run_config(automatic, framework="torch")
    assert again.out == "runs/tiny-torch", "although its vocabulary has grown with the text"
    train(again)
    assert state_folders(Path(again.out)) and Path("runs/tiny-torch/best-undone-1").is_dir()
    assert parse_run_config(automatic, framework="torch").out == "runs/tiny-torch-2"


def test_an_automatic_folder_of_another_run_is_passed_over(automatic):
    assert parse_run_config([*automatic, "--seed", "5"], framework="torch").out == "runs/tiny-torch-2"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"config": 3}'])
def test_an_automatic_folder_whose_settings_cannot_be_read_is_passed_over(text, automatic):
    Path("runs/tiny-torch/run.json").write_text(text, encoding="utf-8")
    assert parse_run_config(automatic, framework="torch").out == "runs/tiny-torch-2"


@pytest.mark.skipif(fcntl is None, reason="nobody can tell without locks")
def test_an_automatic_folder_that_a_process_holds_is_passed_over(automatic):
    holder = [sys.executable, "-c", HOLDING, "runs/tiny-torch"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)})
    with subprocess.Popen(holder, **pipes) as process:
        assert process.stdout.readline() == "True\n"
        assert parse_run_config(automatic, framework="torch").out == "runs/tiny-torch-2"
        named = parse_run_config([*automatic, "--out", "runs/tiny-torch"], framework="torch")
        assert "is being trained by another process" in refused(named)
        process.kill()
    assert parse_run_config(automatic, framework="torch").out == "runs/tiny-torch", "its holder is dead"
    with locked(Path("runs/tiny-torch")) as held:
        assert held


def test_a_folder_with_a_state_says_how_to_go_on(automatic, capsys):
    with pytest.raises(Killed):
        train(parse_run_config(automatic, framework="torch"), kill_at(4))
    line = [*automatic, "--out", "runs/tiny-torch"]
    assert run_command(lambda: bool(parse_run_config(line, framework="torch"))) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "go on with it by --resume runs/tiny-torch, or choose another folder" in err
