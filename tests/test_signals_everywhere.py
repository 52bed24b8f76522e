"""A signal at every phase of a run: one line that says how to go on, the right exit code, and nothing lost.

The line is taken at its word: what it says is done, and the run must end as one that nobody interrupted.
"""

import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import recipe.cache
import recipe.data
from harness import cli, loop
from harness.interruption import Interruption, Terminated
from harness.saving import Saver
from harness.state import load_state, state_folders
from recipe.config import RunConfig
from tests.test_interruption import HUP, INT, SIGNALS, TERM, usual_handlers  # noqa: F401
from tests.test_loop import Killed, Toy, assert_same_runs, config, kill_at, no_picture, resumed, train  # noqa: F401
from tests.test_training_run import ROOT, SMALL, folder, measured, runs  # noqa: F401

STEPS = 6
LAST_SAVE = 2
"""Of the saves, which come after steps 3 and 6."""


class Watched(Toy):
    """Says what it is about to do, reads the batches that it measures, and has two words to say."""

    reach: Callable[[str], None]

    def __init__(self, *arguments) -> None:
        self.reach("making the trainer")
        super().__init__(*arguments)
        self.before_step = lambda position: self.reach("updating")

    def evaluate(self, batches):
        for _ in batches:
            self.reach("evaluating")
        return super().evaluate(batches)

    def restore(self, *state) -> None:
        self.reach("restoring")
        super().restore(*state)

    def generate(self, tokens, options) -> list[int]:
        self.reach("sampling")
        return [1, 2]


PLACES = {
    "reading": (recipe.data, "load_documents"),
    "tokenising": (recipe.data, "encode_texts"),
    "building the cache": (recipe.data, "publish"),
    "measuring what is to be beaten": (loop, "ngram_baselines"),
    "opening the log": (loop, "RunLog"),
    "looking for a state": (loop, "newest_sound"),
    "looking at best/": (loop, "mend_best"),
    "reading a batch": (loop.Dataset, "batch"),
    "writing best/": (loop, "save_folder"),
    "saving": (loop, "save_state"),
    "waiting for the writer": (loop.Saver, "wait"),
    "drawing": (loop, "plot_runs"),
}
"""Functions that a run comes to, by what it does there; `Watched` knows the others."""


class Moment:
    """Sends signals when a run comes to a place for the n-th time, and notes where it comes to after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.left, self.numbers = "", 0, ()
        self.after: list[str] = []
        self.sent = threading.Event()
        for place, (owner, name) in PLACES.items():
            monkeypatch.setattr(owner, name, self._announced(place, getattr(owner, name)))

    def _announced(self, place: str, original: Callable) -> Callable:
        @functools.wraps(original)
        def announced(*arguments, **options):
            self.reach(place)
            return original(*arguments, **options)

        return announced

    def reach(self, place: str) -> None:
        if self.sent.is_set():
            if threading.current_thread() is threading.main_thread():
                self.after.append(place)
        elif place == self.place:
            self.left -= 1
            if self.left == 0:
                self.sent.set()
                for number in self.numbers:
                    signal.raise_signal(number)
        elif place == "updating" and self.place in ("saving", "writing best/"):
            # The writer is another thread; the signal is to come while it writes.
            self._wait_for_writer()

    def _wait_for_writer(self) -> None:
        for writer in writers():
            while writer.is_alive() and not self.sent.is_set():
                time.sleep(0.001)

    def run(self, config: RunConfig, place: str, nth: int, *numbers: int) -> int:  # noqa: F811
        """The exit code of a run to which these signals are sent when it comes to the place for the n-th time."""
        self.place, self.left, self.numbers = place, nth, numbers
        self.after, self.sent = [], threading.Event()
        trainer = type("Here", (Watched,), {"reach": staticmethod(self.reach)})
        code = cli.run(lambda: loop.run(config, framework="toy", make_trainer=trainer) and None)
        for writer in writers():
            writer.join()  # A process would have ended by now, and its writer with it.
        return code


def writers() -> list[threading.Thread]:
    """The thread that saves, while it does."""
    return [thread for thread in threading.enumerate() if thread.name == "saver"]


@pytest.fixture
def moment(monkeypatch) -> Moment:
    return Moment(monkeypatch)


@pytest.fixture
def short_run(config) -> RunConfig:  # noqa: F811
    """Six updates: evaluated at 0, 2, 4 and 6, in four batches each, saved at 3 and 6."""
    return dataclasses.replace(config, steps=STEPS, eval_every=2, save_every=3, sample_tokens=2, prompts=("fox",))


@pytest.fixture(scope="module")
def made() -> list[str]:
    """Folders of runs that nobody interrupts; every test has the same text."""
    return []


@pytest.fixture
def whole(short_run, tmp_path, moment, made, capsys) -> str:
    """Folder of the run that nobody interrupts."""
    if not made:
        other = dataclasses.replace(short_run, out=str(tmp_path / "other"))
        assert moment.run(other, "", 0) == 0
        made.append(other.out)
        capsys.readouterr()
    return made[0]


def told(err: str, number: int) -> str:
    """How the last line of stderr says to go on; it is one line, and no traceback stands above it."""
    assert "Traceback" not in err
    found = re.fullmatch(r"stopped by (\w+) .+?; (.+)", err.splitlines()[-1])
    assert found and found[1] == signal.Signals(number).name, err
    assert err.count("stopped by") == 1
    return found[2]


def go_on(config: RunConfig, advice: str) -> RunConfig:  # noqa: F811
    """The run that the advice asks for."""
    if advice == "the same command begins it again":
        return config
    assert advice == f"go on with: python train_toy.py --resume {config.out}"
    return resumed(config)


def assert_ends_well(config: RunConfig, advice: str, moment: Moment, whole: str) -> None:  # noqa: F811
    assert moment.run(go_on(config, advice), "", 0) == 0
    assert_same_runs(config.out, whole)
    assert (Path(config.out) / "samples.txt").read_bytes() == (Path(whole) / "samples.txt").read_bytes()
    assert (Path(config.out) / "loss.png").is_file()
    assert not [path.name for path in Path(config.out).iterdir() if path.name.startswith(".")]


BEFORE = "the same command begins it again"
MOMENTS = {
    "reading": ("reading", 1, "while reading the text"),
    "tokenising": ("tokenising", 1, "while reading the text"),
    "building the cache": ("building the cache", 1, "while reading the text"),
    "making the trainer": ("making the trainer", 1, "before the first update"),
    "measuring what is to be beaten": ("measuring what is to be beaten", 1, "before the first update"),
    "opening the log": ("opening the log", 1, "before the first update"),
    "evaluating at the beginning": ("evaluating", 2, "before the first update"),
    "compiling": ("updating", 1, "before the first update"),
    "between two updates": ("reading a batch", 4, "after step 3"),
    "in an update": ("updating", 5, "after step 5"),
    "in the first update to be lost": ("updating", 2, "after step 2"),
    "evaluating": ("evaluating", 6, "after step 2"),
    "writing best/": ("writing best/", 1, "after step 3"),
    "saving": ("saving", 1, "after step "),
    "in the last evaluation": ("evaluating", 14, "after the last update"),
    "in the last save": ("saving", LAST_SAVE, "after the last update"),
    "sampling": ("sampling", 1, "after the last update"),
    "drawing": ("drawing", 1, "after the last update"),
}
"""Where a first signal comes, and what the line says of how far the run is."""


@pytest.mark.parametrize("case", MOMENTS)
def test_a_signal_leaves_what_its_line_says(case, short_run, whole, moment, tmp_path, capsys):
    place, nth, where = MOMENTS[case]
    number = SIGNALS[list(MOMENTS).index(case) % 3]
    data = dataclasses.replace(short_run.data, cache_dir=str(tmp_path / "new cache"))
    run = dataclasses.replace(short_run, data=data)
    assert moment.run(run, place, nth, number) == 128 + number
    err = capsys.readouterr().err
    advice = told(err, number)
    assert f"stopped by {signal.Signals(number).name} {where}" in err
    for state in state_folders(Path(run.out)):
        load_state(state)
    assert bool(state_folders(Path(run.out))) == (advice != BEFORE)
    assert_ends_well(run, advice, moment, whole)


@pytest.mark.parametrize("case", MOMENTS)
def test_a_second_signal_acts_at_once(case, short_run, whole, moment, tmp_path, capsys):
    place, nth, _ = MOMENTS[case]
    index = list(MOMENTS).index(case)
    first, second = SIGNALS[index % 3], SIGNALS[index // 3 % 3]
    data = dataclasses.replace(short_run.data, cache_dir=str(tmp_path / "new cache"))
    run = dataclasses.replace(short_run, data=data)
    code = moment.run(run, place, nth, first, second)
    err = capsys.readouterr().err
    # Where the first one acts, the second finds nothing left to stop.
    acted = second if "once more stops at once" in err else first
    assert code == 128 + acted
    assert set(moment.after) <= {"waiting for the writer"}, "the run goes on"
    assert_ends_well(run, told(err, acted), moment, whole)


AGAIN = {
    "reading the text again": ("reading", 1),
    "looking for a state": ("looking for a state", 1),
    "restoring": ("restoring", 1),
    "opening the log": ("opening the log", 1),
    "measuring again what was broken off": ("evaluating", 2),
    "saving what was measured again": ("saving", 1),
    "compiling": ("updating", 1),
    "looking at best/": ("looking at best/", 1),
}
LATER = ("looking at best/",)
"""What comes only after there is one: the run before was broken off in the next evaluation."""


@pytest.mark.parametrize("case", AGAIN)
@pytest.mark.parametrize("twice", [False, True])
def test_a_signal_while_going_on_loses_nothing(case, twice, short_run, whole, moment, capsys):
    """The run before was broken off in the evaluation after step 2, whose weights are the best."""
    step = 4 if case in LATER else 2
    assert moment.run(short_run, "evaluating", 2 + 2 * step, TERM) == 143
    assert told(capsys.readouterr().err, TERM) != BEFORE
    assert load_state(Path(short_run.out) / "last").position == step
    assert moment.run(resumed(short_run), *AGAIN[case], *[HUP] * (1 + twice)) == 129
    err = capsys.readouterr().err
    assert re.search(rf"stopped by SIGHUP (while reading the text|before going on|after step {step});", err)
    advice = told(err, HUP)
    assert advice != BEFORE
    assert_ends_well(short_run, advice, moment, whole)


def test_what_was_measured_again_and_not_saved_is_the_best_all_the_same(short_run, whole, moment, monkeypatch):
    """Killed between the record of the evaluation and the save that is to keep its weights, and then resumed."""
    assert moment.run(short_run, "evaluating", 6, TERM) == 143
    before = load_state(Path(short_run.out) / "last").best

    def die(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "check_room", die)
        moment.run(resumed(short_run), "", 0)
    assert load_state(Path(short_run.out) / "last").best == before
    assert_ends_well(short_run, f"go on with: python train_toy.py --resume {short_run.out}", moment, whole)


def test_a_signal_while_another_process_tokenises_ends_the_wait(short_run, whole, moment, monkeypatch, capsys):
    data = dataclasses.replace(short_run.data, cache_dir=str(Path(short_run.out).parent / "new cache"))
    run = dataclasses.replace(short_run, data=data)
    with monkeypatch.context() as patch:
        patch.setattr(recipe.cache, "take_scratch", lambda *_: moment.reach("waiting"))
        assert moment.run(run, "waiting", 3, TERM) == 143
    err = capsys.readouterr().err
    assert "waiting for another process" in err
    assert_ends_well(run, told(err, TERM), moment, whole)


def test_a_writer_is_waited_for_though_a_signal_ended_the_first_wait():
    """It lets nobody else into the folder before it has given up."""
    begun, left, written = threading.Event(), threading.Event(), []

    def write() -> None:
        begun.wait()
        signal.raise_signal(TERM)
        signal.raise_signal(TERM)
        left.wait()
        time.sleep(0.1)
        written.append(1)

    with pytest.raises(Terminated), Interruption(), Saver() as saver:
        saver.submit(write)
        try:
            begun.set()
            saver.wait()
        finally:
            left.set()
    assert written


SENDING = """
import importlib, os, sys, threading
from harness.cli import run

script, owner, name, nth, numbers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5].split(",")
module, _, kind = owner.partition(":")
owner = importlib.import_module(module)
owner = getattr(owner, kind) if kind else owner
original, seen = getattr(owner, name), []


def send():
    for number in numbers:
        os.kill(os.getpid(), int(number))


def counted(*arguments, **options):
    seen.append(1)
    if len(seen) == nth:
        threading.Timer(0.02, send).start()
    return original(*arguments, **options)


setattr(owner, name, counted)
sys.argv = [script, *sys.argv[6:]]
sys.exit(run(__import__(script).main))
"""
"""A training script whose process is sent signals, by a thread, just after it has come to a place for the n-th time."""

TRAINERS = {"jax": "jax_impl.train:Trainer", "torch": "torch_ref.train:Trainer"}


def start(framework: str, folder: Path, *arguments: str, sent: tuple[str, str, int, int] | None) -> tuple[int, str]:  # noqa: F811
    """Exit code and stderr of a real run, to which a signal is sent, or none."""
    script = [f"train_{framework}.py"]
    if sent is not None:
        owner, name, nth, number = sent
        script = ["-c", SENDING, f"train_{framework}", owner, name, str(nth), str(int(number))]
    settings = os.environ | {"QWEN_FROM_SCRATCH_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    usual = "import signal, os, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    usual += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"  # a shell has background jobs ignore it
    command = [sys.executable, "-c", usual, *script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def real(folder: Path, out: Path) -> list[str]:  # noqa: F811
    return [*SMALL, "--save_every", "2", "--data.corpus", str(folder / "corpus"), "--out", str(out)]


def test_a_signal_ends_a_compilation(folder, tmp_path):  # noqa: F811
    """XLA's, of which Python hears nothing while it lasts."""
    sent = (TRAINERS["jax"], "step", 1, HUP)
    code, err = start("jax", folder, *real(folder, tmp_path / "run"), sent=sent)
    assert code == 129
    assert told(err, HUP) == BEFORE
    assert err.endswith(f"stopped by SIGHUP before the first update; {BEFORE}\n")
    assert not state_folders(tmp_path / "run")


REAL = {
    "making the trainer": ("trainer", "__init__", 1),
    "evaluating at the beginning": ("trainer", "evaluate", 1),
    "compiling": ("trainer", "step", 1),
    "in an update": ("trainer", "step", 4),
    "evaluating": ("trainer", "evaluate", 2),
    "copying the state": ("trainer", "snapshot", 1),
    "saving": ("harness.loop", "save_state", 1),
    "in the last evaluation": ("trainer", "evaluate", 3),
    "in the last save": ("harness.loop", "save_state", 3),
    "sampling": ("trainer", "generate", 2),
    "drawing": ("harness.loop", "plot_runs", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("framework", TRAINERS)
def test_real_runs_end_as_uninterrupted_ones(framework, case, number, folder, runs, tmp_path):  # noqa: F811
    """A signal in the run, and one while it goes on, if it has a state to go on from."""
    place, name, nth = REAL[case]
    sent = (TRAINERS[framework] if place == "trainer" else place, name, nth, number)
    run = tmp_path / "run"
    code, err = start(framework, folder, *real(folder, run), sent=sent)
    assert code == 128 + number, err
    advice = told(err, number)
    again = ["--resume", str(run)]
    if advice == BEFORE:
        again = real(folder, run)
    else:
        assert advice == f"go on with: python train_{framework}.py --resume {run}"
        code, err = start(framework, folder, *again, sent=(TRAINERS[framework], "restore", 1, number))
        assert code == 128 + number and told(err, number) == advice
    code, err = start(framework, folder, *again, sent=None)
    assert code == 0, err
    assert measured(run) == measured(folder / framework)
    assert_same_runs(str(run), str(folder / framework))
    assert (run / "samples.txt").read_bytes() == (folder / framework / "samples.txt").read_bytes()
