"""A disk that is full, or read-only, from any file operation of a run on: one line, and the rest of the run is as ever.

The operations are those of tests/test_every_moment.py, and every write and fsync of Python's files. A write that finds
the disk full stores a part, as the system does. The run is that of a trainer of plain NumPy, its cache of tokens made
on the way.
"""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from harness import cli
from harness.state import state_folders
from recipe.config import RunConfig
from tests.survival import SMALL, Nursery, differences, leftovers, write_corpus
from tests.test_every_moment import MOVES
from tests.test_loop import assert_same_runs, config, elsewhere, no_picture, resumed, train  # noqa: F401

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MODES = {
    "full for a moment": (errno.ENOSPC, True),
    "full from then on": (errno.ENOSPC, False),
    "read-only from then on": (errno.EROFS, False),
    "failing from then on": (errno.EIO, False),
}
"""Error number, and whether one operation fails alone."""


class Disk:
    """Counts the file operations below a folder, and refuses the n-th, or all from that on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.watch(None)

    def watch(self, folder: Path | None, *, refuse: int = -1, error: int = 0, once: bool = False) -> None:
        """Begin to count below the folder; the operation with number `refuse` fails, if that is not negative."""
        self.folder, self.refuse, self.error, self.once = str(folder or ""), refuse, error, once
        self.seen, self.refused, self.short = 0, "", False

    def concerns(self, path: object) -> bool:
        """Whether operations on the path are counted now."""
        return bool(self.folder) and isinstance(path, str | os.PathLike) and self._below(Path(path))

    def _below(self, path: Path) -> bool:
        return str(path.absolute()).startswith(self.folder)

    def operate(self, what: str, path: object) -> None:
        """Count an operation, and refuse it if it is its turn."""
        if not self._turn():
            return
        self.refused = self.refused or f"{what} {path}"
        raise OSError(self.error, os.strerror(self.error), str(path))

    def _turn(self) -> bool:
        with self._lock:
            number, self.seen = self.seen, self.seen + 1
            return 0 <= self.refuse <= number and not (self.once and self.refused)

    def write(self, file: "Written", data: bytes) -> int:
        """Count a write, and store but a part of what is to be refused next."""
        with self._lock:
            short, self.short = self.short, False
            part = not short and self.seen == self.refuse and self.error == errno.ENOSPC and len(data) > 1
            if part:
                self.short = True
        if part:
            return io.FileIO.write(file, memoryview(data).cast("B")[: len(data) // 2])
        self.operate("write", file.name)
        return io.FileIO.write(file, data)

    def __call__(self, event: str, args: tuple) -> None:
        """The audit hook."""
        if not self.folder or not (event in MOVES or event == "open"):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if self.concerns(args[0]):
            self.operate(event, args[0])


class Written(io.FileIO):
    """A file whose writes the disk counts."""

    def write(self, data) -> int:
        return DISK.write(self, data)


DISK = Disk()
sys.addaudithook(DISK)  # for the life of the process: a hook cannot be taken away


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Writes and fsyncs are counted, too."""
    opened, fsync = io.open, os.fsync

    def open_counted(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if not set(mode) & set("wxa") or "+" in mode or not DISK.concerns(file):
            return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
        stream = io.BufferedWriter(Written(file, mode.replace("b", "").replace("t", ""), closefd, opener))
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding, errors, newline)

    def fsync_counted(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}") if DISK.folder else ""
        if DISK.concerns(path):
            DISK.operate("fsync", path)
        fsync(handle)

    monkeypatch.setattr(builtins, "open", open_counted)
    monkeypatch.setattr(io, "open", open_counted)
    monkeypatch.setattr(os, "fsync", fsync_counted)
    yield
    DISK.watch(None)


def attempt(config: RunConfig, capsys) -> tuple[int, str]:  # noqa: F811
    """Exit code and errors of a run, as the command line gives them."""
    capsys.readouterr()
    code = cli.run(lambda: train(config) and None)
    return code, capsys.readouterr().err


def starve(config: RunConfig, expected: Path, moment: int, mode: str, capsys) -> str:  # noqa: F811
    """Refuse an operation of a run, make room, go on, compare; what was refused."""
    run, (error, once) = Path(config.out), MODES[mode]
    for folder in (run, Path(config.data.cache_dir)):
        shutil.rmtree(folder, ignore_errors=True)
    DISK.watch(run.parent, refuse=moment, error=error, once=once)
    code, said = attempt(config, capsys)
    refused = DISK.refused
    DISK.watch(None)
    where = f"{mode}, operation {moment}: {refused}"
    if not refused:
        return ""  # The thread that saves came to it in another order, and the run was shorter.
    last = said.splitlines()[-1] if said else ""
    assert "Traceback" not in said, f"{where}: {said}"
    assert code in (0, 1, 2) and (code == 0 or last.startswith("error: ")), f"{where}: {code} {said}"
    assert code == 0 or said.count("error: ") == 1, f"{where}: {said}"
    assert code or once, f"{where}: a disk that refuses everything ends the run"
    assert not code or "; " in last, f"{where}: no remedy in {last}"
    if run.is_dir() and state_folders(run):
        code, said = attempt(resumed(config), capsys)
        assert code == 0 or "is finished" in said, f"{where}: {said}"
    else:
        code, said = attempt(config, capsys)
        assert code == 0, f"{where}: {said}"
    assert_same_runs(str(run), str(expected))
    assert leftovers(run) == [], where
    assert len(state_folders(run)) <= config.keep, where
    return refused


@pytest.fixture
def whole(config, tmp_path) -> tuple[RunConfig, Path, int]:  # noqa: F811
    """A short run's configuration, where it was made undisturbed, and its operations."""
    config = dataclasses.replace(config, steps=6, eval_every=2, save_every=3)
    train(elsewhere(config, tmp_path))
    shutil.move(tmp_path / "other", tmp_path.with_name(tmp_path.name + "-other"))
    shutil.rmtree(config.data.cache_dir)
    DISK.watch(tmp_path)
    train(config)
    seen = DISK.seen
    DISK.watch(None)
    return config, tmp_path.with_name(tmp_path.name + "-other"), seen


def test_a_full_disk_ends_a_run_in_one_line_and_costs_nothing(whole, capsys):
    config, expected, operations = whole  # noqa: F811
    assert operations > 100
    chance = random.Random(0)
    refused = [starve(config, expected, chance.randrange(operations), mode, capsys) for mode in [*MODES] * 3]
    assert {what.partition(" ")[0] for what in refused} >= {"open", "write", "fsync"}, "all kinds are met"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_at_every_operation(mode, whole, capsys):
    config, expected, operations = whole  # noqa: F811
    refused = [starve(config, expected, moment, mode, capsys) for moment in range(operations)]
    kinds = Counter(what.partition(" ")[0] for what in refused)
    assert kinds.keys() >= {"open", "write", "fsync", "os.mkdir", "os.rename"} and kinds[""] < operations // 10
    if named := os.environ.get("SURVIVAL_REPORT"):
        with open(named, "a", encoding="utf-8") as file:
            file.write(json.dumps({"disk": mode, "operations": operations, "refused": kinds}) + "\n")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB that can be filled for real."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_disk_that_fills_up_under_a_real_run(framework, small_disk, tmp_path):
    flags = [*SMALL, "--steps", "60", "--eval_every", "3", "--save_every", "1", "--log_every", "1"]
    flags += ["--data.corpus", str(write_corpus(tmp_path / "corpus"))]
    whole, run, filler = tmp_path / "whole", small_disk / "run", small_disk / "filler"
    with Nursery(tmp_path / "logs", tmp_path / "cache") as nursery:
        code, said = nursery.run(f"train_{framework}.py", *flags, "--out", str(whole))
        assert code == 0, said
        child = nursery.start(f"train_{framework}.py", *flags, "--out", str(run))
        while not (run / "best").is_dir():
            assert not child.ended(0.001), child.log.read_text(encoding="utf-8")
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        code = nursery.exit_code(child)
        last = child.log.read_text(encoding="utf-8").splitlines()[-1]
        assert code == 1 and "No space left on device" in last and "make room" in last, last
        filler.unlink()
        command = ["--resume", str(run)] if state_folders(run) else [*flags, "--out", str(run)]
        code, said = nursery.run(f"train_{framework}.py", *command)
        assert code == 0, said
        assert differences(run, whole) == []
