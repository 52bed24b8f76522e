"""Processes that want the same cache entry: one builds it, the others wait for it, and none hangs on a dead one."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.config import DataConfig
from recipe.data import prepare
from recipe.lock import fcntl, locked
from tests.test_data import changed, config  # noqa: F401

pytestmark = pytest.mark.skipif(fcntl is None, reason="where there are no locks, each builds its own")

SCRIPT = """
import os, signal, sys
import recipe.data
from recipe.config import DataConfig

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
encode_texts = recipe.data.encode_texts

def slowly(tokenizer, texts, limit=None, *, what="", show_progress=False):
    if what == "training text":
        print("building", flush=True)
        sys.stdin.readline()
    return encode_texts(tokenizer, texts, limit, what=what, show_progress=show_progress)

recipe.data.encode_texts = slowly
data = DataConfig(**eval(sys.argv[1]))
print(recipe.data.prepare(data, seed=0, show_progress=True).fingerprint, flush=True)
"""
WAITING = "waiting for another process, which tokenises the same text for "


class Builder:
    """A process that prepares the text, and stops while it tokenises until it is told to go on."""

    def __init__(self, data: DataConfig) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, repr(vars(data))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip

    def builds(self) -> "Builder":
        assert self.process.stdout.readline() == "building\n"
        return self

    def waits(self) -> "Builder":
        assert self.process.stderr.readline().startswith(WAITING)
        return self

    def go_on(self) -> "Builder":
        """Let it tokenise, now or when it comes to that."""
        with contextlib.suppress(BrokenPipeError):  # it had nothing to tokenise, and is done
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self

    def finish(self) -> tuple[str, str]:
        """What it still writes to stdout and stderr, once it may go on."""
        out, errors = self.go_on().process.communicate(timeout=120)
        assert self.process.returncode == 0, errors
        return out, errors

    def end(self, number: int) -> str:
        """What it has written to stderr once the signal has ended it."""
        self.process.send_signal(number)
        errors = self.process.communicate(timeout=120)[1]
        assert self.process.returncode == -number
        return errors


@pytest.fixture
def builder(config):  # noqa: F811
    """Starts builders of the one entry, and ends those that a failed test leaves."""
    started = []

    def start() -> Builder:
        started.append(Builder(config))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def fingerprint(config, tmp_path) -> str:  # noqa: F811
    elsewhere = changed(config, cache_dir=str(tmp_path / "elsewhere"))
    return prepare(elsewhere, seed=0, show_progress=False).fingerprint


def assert_one_entry(config: DataConfig) -> None:  # noqa: F811
    (entry,) = Path(config.cache_dir).iterdir()
    assert not entry.name.startswith(".")


def test_of_three_at_once_one_builds_and_two_wait_for_it(builder, config, fingerprint):  # noqa: F811
    first = builder().builds()
    second, third = builder().waits(), builder().waits()
    assert first.finish()[0] == fingerprint + "\n"
    assert second.finish() == third.finish() == (fingerprint + "\n", ""), "they tokenise nothing"
    assert_one_entry(config)


def test_whoever_waits_builds_if_the_holder_is_killed(builder, config, fingerprint):  # noqa: F811
    first = builder().builds()
    second, third = builder().waits().go_on(), builder().waits().go_on()  # either may be the one that builds
    first.end(signal.SIGKILL)
    outputs = sorted([second.finish(), third.finish()])
    assert outputs[0][0] == fingerprint + "\n" and outputs[1][0] == "building\n" + fingerprint + "\n"
    assert_one_entry(config)


def test_whoever_waits_may_be_interrupted(builder, config, fingerprint):  # noqa: F811
    first = builder().builds()
    errors = builder().waits().end(signal.SIGINT)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert first.finish()[0] == fingerprint + "\n"
    assert_one_entry(config)


def test_a_builder_that_is_interrupted_leaves_nothing(builder, config, fingerprint):  # noqa: F811
    builder().builds().end(signal.SIGINT)
    assert not list(Path(config.cache_dir).iterdir())
    assert builder().builds().finish()[0] == fingerprint + "\n"
    assert_one_entry(config)


def test_builders_of_two_entries_do_not_wait_for_each_other(builder, config, fingerprint):  # noqa: F811
    first = builder().builds()
    other = Builder(changed(config, bpe_vocab_size=290))
    try:
        other.builds().finish()
    finally:
        other.process.kill()
    assert first.finish()[0] == fingerprint + "\n"
    assert len(list(Path(config.cache_dir).iterdir())) == 2


def test_a_long_wait_says_every_minute_that_it_goes_on(config, tmp_path, monkeypatch, capsys):  # noqa: F811
    prepare(config, seed=0, show_progress=False)
    (entry,) = Path(config.cache_dir).iterdir()
    entry.rename(entry.with_name(f".building-{entry.name}"))
    clock, nap = [0.0], []
    monkeypatch.setattr("recipe.cache.time.monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += 20
        nap.append(seconds)
        if len(nap) == 8:
            holder.__exit__(None, None, None)

    monkeypatch.setattr("recipe.cache.time.sleep", sleep)
    holder = locked(entry.with_name(f".building-{entry.name}"))
    assert holder.__enter__()
    prepare(config, seed=0, show_progress=True)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(WAITING)]
    assert [line.removeprefix(WAITING + str(entry)) for line in said] == ["", ": 1 min so far", ": 2 min so far"]
    assert_one_entry(config)
