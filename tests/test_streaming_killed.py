"""A build that streams may be killed at any moment: the next one goes on from what is on disk, to the same bytes."""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import recipe.shards
import recipe.streaming
from recipe.config import DataConfig
from recipe.data import prepare
from recipe.lock import fcntl
from recipe.tokenizer import train_bpe
from tests.power import Power
from tests.test_data_together import WAITING
from tests.test_streaming import some_texts, write_json_lines

pytestmark = pytest.mark.skipif(fcntl is None, reason="without locks nobody goes on with another's build")

SMALL = {
    "shards.SHARD_TOKENS": 3_000,
    "streaming.SHARD_TOKENS": 3_000,
    "streaming.BYTES_AT_ONCE": 500,
    "streaming.BYTES_BETWEEN_COMMITS": 4_000,
}
SCRIPT = """
import sys
import recipe.shards, recipe.streaming
from recipe.config import DataConfig
from recipe.data import prepare

for name, value in eval(sys.argv[2]).items():
    module, _, name = name.partition(".")
    setattr(getattr(recipe, module), name, value)
commit, commits = recipe.streaming._Build._commit, []

def stop(build):
    commit(build)
    commits.append(1)
    if len(commits) == 2:
        print("committed", flush=True)
        sys.stdin.readline()

recipe.streaming._Build._commit = stop
dataset = prepare(DataConfig(**eval(sys.argv[1])), seed=0, show_progress=True)
print(len(commits), dataset.fingerprint, flush=True)
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> DataConfig:
    """Two files, of which some eight commits become five shards."""
    for name, value in SMALL.items():
        monkeypatch.setattr(f"recipe.{name}", value)
    (tmp_path / "corpus").mkdir()
    write_json_lines(tmp_path / "corpus" / "a.jsonl", some_texts(160))
    text = "\n\n".join(some_texts(60, seed=1))
    (tmp_path / "corpus" / "b.txt").write_text(text, encoding="utf-8")
    write_json_lines(tmp_path / "corpus" / "c.jsonl", some_texts(40, seed=2))
    train_bpe(some_texts(20), 280).save(tmp_path)
    return DataConfig(
        corpus=str(tmp_path / "corpus"), split="hashed", tokenizer=str(tmp_path / "tokenizer.json"),
        validation_fraction=0.2, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def contents(cache: Path) -> dict[str, str]:
    """Name -> hash of all that is in a cache but stamps, which know inodes and times."""
    files = (file for file in cache.rglob("*") if file.is_file() and file.name != "stamp.json")
    return {str(file.relative_to(cache)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def whole(config, tmp_path) -> dict[str, str]:
    """What nobody interrupted."""
    prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "whole")), seed=0, show_progress=False)
    found = contents(tmp_path / "whole")
    assert len(found) == 1 + 6 and not [name for name in found if name.startswith(".")], found
    return found


class Killed(BaseException):
    """Ends a build where a kill would."""


def operations(then: Callable[[int], None]) -> Callable[[str, tuple], None]:
    """An audit hook that counts what changes files, and calls `then` before each."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir")
        if changes or (event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            then(count)
            count += 1

    return hook


def in_a_child(config: DataConfig, killed_at: int | None) -> bool:
    """Build in a fork of this process, killed before its n-th change of a file; whether it came to its end."""

    def kill(count: int) -> None:
        if count == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(operations(kill))
            prepare(config, seed=0, show_progress=False)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


def kill_everywhere(config: DataConfig, whole: dict[str, str], every: int) -> None:
    """Kill a build before each n-th change of a file, and go on with it."""
    cache, at, gone_on = Path(config.cache_dir), 0, 0
    while not in_a_child(config, at):
        gone_on += any(cache.glob(".streaming-*/progress.json"))
        prepare(config, seed=0, show_progress=False)
        assert contents(cache) == whole, f"killed before change {at}"
        shutil.rmtree(cache)
        at += every
    assert contents(cache) == whole
    assert at > 60 and gone_on > at // every // 2, "most kills come after a commit"


def kill_again_and_again(config: DataConfig, whole: dict[str, str], after: int) -> None:
    """Kill a build and all that go on with it after so many changes of files each."""
    kills = 0
    while not in_a_child(config, after):
        kills += 1
        assert kills < 50, "it makes no progress"
    assert contents(Path(config.cache_dir)) == whole and kills > 3


def answer(function: Callable, arguments: tuple, answers: Any) -> None:
    for name, value in SMALL.items():
        module, _, name = name.partition(".")
        setattr(getattr(recipe, module), name, value)
    try:
        answers.put(function(*arguments))
    except BaseException as error:
        answers.put(repr(error))


def elsewhere(function: Callable, *arguments: Any) -> None:
    """Call a function in a process that may fork: this one may hold JAX's threads, which a fork does not carry over."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_streaming_killed"])
    answers = context.Queue()
    process = context.Process(target=answer, args=(function, arguments, answers))
    process.start()
    assert answers.get(timeout=500) is None
    process.join()


def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(config, whole):
    elsewhere(kill_everywhere, config, whole, 7)


@pytest.mark.slow
def test_a_build_killed_before_any_change_goes_on_to_the_same_bytes(config, whole):
    elsewhere(kill_everywhere, config, whole, 1)


def test_a_build_that_is_killed_again_and_again_comes_to_its_end(config, whole):
    elsewhere(kill_again_and_again, config, whole, 25)


def power_is_lost(config: DataConfig, whole: dict[str, str], tmp_path: Path, monkeypatch, every: int) -> None:
    """Go on from what a disk may hold after a power loss before any operation."""
    root = tmp_path / "root"
    root.mkdir()
    data = dataclasses.replace(config, cache_dir=str(root / "cache"))
    with Power(root, tmp_path / "images") as power:
        prepare(data, seed=0, show_progress=False)
    seen: set[Path] = set()
    went_on: list[bool] = []
    go_on = recipe.streaming._Build._go_on

    def look(build) -> dict:
        writers = go_on(build)
        went_on.append(build.at.documents > 0)
        return writers

    monkeypatch.setattr("recipe.streaming._Build._go_on", look)
    for number, operation, assumption, image in power.images():
        if image in seen or number % every:
            continue
        seen.add(image)
        shutil.rmtree(root)
        shutil.copytree(image, root)
        committed = any(root.glob("cache/.streaming-*/progress.json"))
        went_on.clear()
        prepare(data, seed=0, show_progress=False)
        assert contents(root / "cache") == whole, f"{assumption}, {operation}"
        assert all(went_on) or not committed, f"{assumption}, {operation}: what was committed is made again"
    assert len(seen) > 10


def test_no_power_loss_makes_a_build_lie(config, whole, tmp_path, monkeypatch):
    power_is_lost(config, whole, tmp_path, monkeypatch, every=9)


@pytest.mark.slow
def test_no_power_loss_anywhere_makes_a_build_lie(config, whole, tmp_path, monkeypatch):
    power_is_lost(config, whole, tmp_path, monkeypatch, every=1)


def interrupt(config: DataConfig, monkeypatch, commits: int = 3) -> Path:
    """Leave a build that was ended after so many commits; its folder."""
    commit, done = recipe.streaming._Build._commit, []

    def end(build) -> None:
        commit(build)
        done.append(build)
        if len(done) == commits:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("recipe.streaming._Build._commit", end)
        prepare(config, seed=0, show_progress=False)
    (place,) = Path(config.cache_dir).iterdir()
    assert place.name.startswith(".streaming-")
    return place


def read_again(monkeypatch) -> list[int]:
    """Sizes of the documents that are tokenised from now on."""
    sizes, take = [], recipe.streaming._Build._take
    monkeypatch.setattr(
        "recipe.streaming._Build._take",
        lambda build, batch, limit: sizes.extend(piece.size for piece in batch) or take(build, batch, limit),
    )
    return sizes


def test_what_was_committed_is_not_tokenised_again(config, whole, monkeypatch, capsys):
    everything = read_again(monkeypatch)
    prepare(dataclasses.replace(config, cache_dir=config.cache_dir + "2"), seed=0, show_progress=False)
    total = sum(everything)
    monkeypatch.undo()
    for name, value in SMALL.items():
        monkeypatch.setattr(f"recipe.{name}", value)
    interrupt(config, monkeypatch)
    sizes = read_again(monkeypatch)
    prepare(config, seed=0, show_progress=True)
    assert 0 < sum(sizes) <= total - 3 * 4_000
    assert "going on after " in capsys.readouterr().err
    assert contents(Path(config.cache_dir)) == whole


@pytest.mark.parametrize("what", ["a shard", "an open shard", "the progress", "the corpus", "touched"])
def test_a_build_whose_past_is_not_what_it_was_begins_again(config, whole, monkeypatch, what, capsys):
    place = interrupt(config, monkeypatch)
    corpus = Path(config.corpus, "a.jsonl")
    if what == "a shard":
        data = bytearray((place / "train-00000.npy").read_bytes())
        data[-1] ^= 1
        (place / "train-00000.npy").write_bytes(data)
    elif what == "an open shard":
        file = max(place.glob("train-*.npy"))
        os.truncate(file, 100)
    elif what == "the progress":
        (place / "progress.json").write_bytes(b"{")
    elif what == "the corpus":
        corpus.write_bytes(corpus.read_bytes().replace(b"quick", b"quack"))
    else:
        os.utime(corpus, (5, 5))
    prepare(config, seed=0, show_progress=True)
    assert ("going on after" in capsys.readouterr().err) == (what == "touched")
    found = contents(Path(config.cache_dir))
    assert (found == whole) == (what != "the corpus") and found.keys() == whole.keys()


@contextlib.contextmanager
def builders(config: DataConfig) -> Iterator[Callable[[], subprocess.Popen]]:
    """A function that starts a process which builds; all are gone at the end."""
    with contextlib.ExitStack() as gone:

        def start() -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, repr(vars(config)), repr(SMALL)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            )  # fmt: skip
            gone.callback(process.communicate)
            gone.callback(process.kill)
            return process

        yield start


def test_whoever_waits_goes_on_where_the_killed_one_was(config, whole):
    with builders(config) as start:
        first = start()
        assert first.stdout.readline() == "committed\n"
        second = start()
        assert second.stderr.readline().startswith(WAITING)
        first.kill()
        out, errors = second.communicate("\n", timeout=300)
        assert "going on after " in errors and out.startswith("committed\n") and second.returncode == 0
        assert contents(Path(config.cache_dir)) == whole


def test_whoever_waits_uses_what_the_first_has_built(config, whole):
    with builders(config) as start:
        first = start()
        assert first.stdout.readline() == "committed\n"
        second = start()
        assert second.stderr.readline().startswith(WAITING)
        out, _ = first.communicate("\n", timeout=300)
        fingerprint = out.split()[-1]
        out, errors = second.communicate("\n", timeout=300)
        assert (out, errors) == (f"0 {fingerprint}\n", ""), "it commits nothing"
        assert contents(Path(config.cache_dir)) == whole


def test_without_locks_each_builds_its_own(config, whole, monkeypatch, capsys):
    monkeypatch.setattr("recipe.lock.fcntl", None)
    prepare(config, seed=0, show_progress=True)
    assert "has no locks" in capsys.readouterr().err
    assert contents(Path(config.cache_dir)) == whole
