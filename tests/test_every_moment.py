"""Death at the n-th file operation of a run, for every n: what is resumed equals an uninterrupted run, bit for bit.

The operations are those that Python's audit hooks see: files opened to be written, folders made, renamed, removed.
From the n-th on every one of them fails, as for a process that is no more; nothing it would have tidied up is tidied.
Power loss, which also loses what was not forced to disk, is another matter; what is forced is looked at below.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import pytest

from harness.state import state_folders
from recipe.config import RunConfig, UserError
from tests.test_loop import Killed, assert_same_runs, config, elsewhere, kill_at, no_picture, resumed, train  # noqa: F401

MOVES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree", "shutil.move", "os.truncate"}


class Reaper:
    """Counts the file operations below a folder, and lets none happen from the n-th on."""

    def __init__(self) -> None:
        self.folder, self.left, self.seen = "", -1, 0

    def watch(self, folder: Path | None, left: int = -1) -> None:
        """Count below the folder; after `left` operations all fail, if that is not negative."""
        self.folder, self.left, self.seen = "" if folder is None else str(folder), left, 0

    def __call__(self, event: str, args: tuple) -> None:
        if not self.folder or not (event in MOVES or event == "open"):
            return
        path, flags = args[0], args[2] if event == "open" else os.O_WRONLY
        if not isinstance(path, str | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR):
            return
        if not str(Path(path).absolute()).startswith(self.folder):
            return
        if self.seen == self.left:
            raise Killed
        self.seen += 1


REAPER = Reaper()
sys.addaudithook(REAPER)  # for the life of the process: a hook cannot be taken away

# Evaluations and saves together, one in the other's rhythm, and at different times.
RHYTHMS = {"equal": (2, 2), "evaluated more often": (1, 2), "saved more often": (2, 1), "coprime": (2, 3)}


@pytest.fixture(autouse=True)
def unwatched():
    yield
    REAPER.watch(None)


QUICK = ("evaluated more often", "coprime")
"""The others are run at night."""


@pytest.fixture(params=[r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in RHYTHMS])
def rhythm(request, config) -> RunConfig:  # noqa: F811
    eval_every, save_every = RHYTHMS[request.param]
    return dataclasses.replace(
        config, steps=6 if request.param == "coprime" else 4, eval_every=eval_every, save_every=save_every
    )


def test_a_run_that_dies_at_any_file_operation_is_resumed_bit_for_bit(rhythm, tmp_path, record_property):
    train(elsewhere(rhythm, tmp_path))
    run = Path(rhythm.out)
    REAPER.watch(run)
    train(rhythm)
    operations = REAPER.seen
    assert_same_runs(str(run), str(tmp_path / "other"))
    record_property("file operations", operations)
    unsaved = 0
    for moment in range(operations):
        REAPER.watch(None)
        shutil.rmtree(run, ignore_errors=True)
        REAPER.watch(run, moment)
        with pytest.raises(Killed):
            train(rhythm)
        REAPER.watch(None)
        if not state_folders(run):
            with pytest.raises(UserError, match=r"holds no last/run\.json|is not a folder"):
                train(resumed(rhythm))
            unsaved += 1
            continue
        if (run / "loss.png").exists():
            with pytest.raises(UserError, match="is finished"):
                train(resumed(rhythm))
        else:
            train(resumed(rhythm))
        assert_same_runs(str(run), str(tmp_path / "other"))
        left = {path.name for path in run.iterdir() if path.is_dir()}
        assert left in ({"best", "last"}, {"best", "earlier", "last"}), f"after operation {moment}"
        assert len(state_folders(run)) <= rhythm.keep, f"after operation {moment}"
    assert 0 < unsaved < operations, "some moments lie before the first save, and some after"


def test_a_resumed_run_may_die_too(rhythm, tmp_path):
    """Killed an update after its first save, and again at every third operation of going on."""
    train(elsewhere(rhythm, tmp_path))
    run, kept = Path(rhythm.out), tmp_path / "kept"
    with pytest.raises(Killed):
        train(rhythm, kill_at(rhythm.save_every + 1))
    shutil.copytree(run, kept)
    moment, finished = 0, False
    while not finished:
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        REAPER.watch(run, moment)
        try:
            train(resumed(rhythm))
            finished = True
        except Killed:
            REAPER.watch(None)
            if not (run / "loss.png").exists():
                train(resumed(rhythm))
        REAPER.watch(None)
        assert_same_runs(str(run), str(tmp_path / "other"))
        moment += 3
    assert moment > 3


def test_the_reaper_sees_and_stops(tmp_path):
    REAPER.watch(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x", encoding="utf-8")
    (tmp_path / "a" / "b").read_text(encoding="utf-8")
    (tmp_path / "a" / "b").rename(tmp_path / "c")
    assert REAPER.seen == 3
    REAPER.watch(tmp_path, 0)
    with pytest.raises(Killed):
        (tmp_path / "c").unlink()
    REAPER.watch(None)
    assert (tmp_path / "c").exists()


def test_tensors_are_forced_to_disk_before_they_take_their_place(config, monkeypatch):  # noqa: F811
    forced, renamed = set(), []
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        forced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def look(path: Path, target):
        for file in path.glob("*.safetensors"):
            renamed.append((target.name, file.name))
            assert str(file) in forced, f"{file.name} is renamed into {target} before it is on disk"
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", look)
    train(dataclasses.replace(config, steps=3, eval_every=3, save_every=3))
    assert {("last", "optimizer.safetensors"), ("last", "model.safetensors"), ("best", "model.safetensors")} <= set(
        renamed
    )
