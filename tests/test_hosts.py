"""One run of several processes: one log, one folder, one decision; how they meet, and how they end.

With toy peers in threads, whose collectives are barriers; `test_processes.py` has real ones.
"""

import contextlib
import dataclasses
import io
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness import loop, together
from harness.commands.train import parse_run_config
from harness.failures import exit_code
from harness.interruption import Interruption, Terminated
from harness.peers import ALONE, LOST, Prefixed, hush
from harness.runlog import SilentLog
from harness.state import load_state
from recipe.config import HostsConfig, RunConfig, UserError
from recipe.lock import locked
from recipe.reading import read_json
from tests.test_loop import (  # noqa: F401
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

ROOT = Path(__file__).resolve().parents[1]


class Reset(Exception):
    """What a toy collective raises once a process is gone."""


class Ended(BaseException):
    """Stands for os._exit: exit code and last line."""


class Toys:
    """What the toy peers of one run share."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count)
        self.values: list = [None] * count
        self.agreements = [0] * count


class ToyPeers:
    """`harness.peers.Peers` of a thread."""

    def __init__(self, toys: Toys, index: int) -> None:
        self.toys, self.index, self.count, self.is_chief = toys, index, toys.count, index == 0
        self.parted = False
        self.last_words: Callable[[str], tuple[int, str]] | None = None

    def _all(self, value) -> list:
        assert not self.parted
        try:
            self.toys.values[self.index] = value
            self.toys.barrier.wait(60)
            values = list(self.toys.values)
            self.toys.barrier.wait(60)
        except threading.BrokenBarrierError:
            raise Reset("connection reset") from None
        return values

    def agree(self, value: int) -> int:
        self.toys.agreements[self.index] += 1
        return max(self._all(int(value)))

    def tell(self, text: str) -> str:
        return self._all(text)[0]

    def wait(self, name: str) -> None:
        assert set(self._all(name)) == {name}

    def part(self) -> None:
        if not self.parted:
            self._all("part")
            self.parted = True

    def lost(self, error: BaseException) -> str | None:
        return str(error) if isinstance(error, Reset) else None

    def expect(self, last_words) -> None:
        self.last_words = last_words


@pytest.fixture(autouse=True)
def ended(monkeypatch):
    """A process that is ended at once is a thread that raises `Ended`."""

    def end_at_once(code: int, line: str) -> None:
        raise Ended(code, line)

    monkeypatch.setattr(together, "end_at_once", end_at_once)


def run_all(configs: list[RunConfig], trainers: Callable[[int], Callable] | None = None, *, made=None) -> list:
    """One run of as many threads as configurations: what each raised, None if nothing. `made` gets the toy peers."""
    toys = Toys(len(configs))
    outcomes: list = [None] * len(configs)

    def work(index: int) -> None:
        mine = ToyPeers(toys, index)
        if made is not None:
            made.append(mine)
        try:
            make_trainer = Toy if trainers is None else trainers(index)
            loop.run(configs[index], framework="toy", make_trainer=make_trainer, peers=mine)
        except BaseException as error:
            outcomes[index] = error
            if not mine.parted:  # its sockets close with it
                toys.barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(configs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def several(config: RunConfig, count: int = 3) -> list[RunConfig]:  # noqa: F811
    hosts = [HostsConfig("10.0.0.1:1234", count, index) for index in range(count)]
    return [dataclasses.replace(config, hosts=one) for one in hosts]


@pytest.fixture
def signalled(monkeypatch) -> dict[int, Interruption]:
    """The Interruption of each thread's run, by the thread's number."""
    found: dict[int, Interruption] = {}

    class Noted(Interruption):
        def __enter__(self):
            found[threading.get_ident()] = self
            return super().__enter__()

    monkeypatch.setattr(loop, "Interruption", Noted)
    return found


def signal_at(signalled, wanted: int, numbers: dict[int, int]) -> Callable[[int], Callable]:
    """Trainers before whose update `wanted` these processes have these signals."""

    def trainers(index: int) -> Callable:
        def make_trainer(*args):
            toy = Toy(*args)

            def before_step(position: int) -> None:
                if position == wanted and index in numbers:
                    signalled[threading.get_ident()].signal = numbers[index]

            toy.before_step = before_step
            return toy

        return make_trainer

    return trainers


def test_several_keep_one_folder_one_log_and_say_each_line_once(config, tmp_path, capsys):  # noqa: F811
    train(elsewhere(config, tmp_path))
    alone = capsys.readouterr().out.replace(str(tmp_path / "other"), config.out)
    assert run_all(several(config)) == [None] * 3
    out = capsys.readouterr().out

    def said(text: str) -> list[str]:
        return [line.partition("| tok/s")[0] for line in text.splitlines() if not line.startswith(("disk", "time"))]

    assert said(out) == said(alone)
    assert_same_runs(config.out, str(tmp_path / "other"))
    assert read_json(Path(config.out) / "run.json")["config"]["hosts"] == dataclasses.asdict(HostsConfig())
    assert load_state(Path(config.out) / "last").config.hosts == HostsConfig()


def test_no_clock_decides_what_several_do(config, monkeypatch):  # noqa: F811
    """They agree where a record is read, and between the batches of an evaluation; else they would wait for ever."""
    slow = dataclasses.replace(config, log_every=100, eval_every=100, save_every=5)
    made: list[ToyPeers] = []
    counts = []
    for seconds in (-1.0, 1e9):
        monkeypatch.setattr(loop, "SECONDS_BETWEEN_RECORDS", seconds)
        out = dataclasses.replace(slow, out=f"{config.out}{seconds}")
        assert run_all(several(out, 2), made=made) == [None] * 2
        counts.append(made[-1].toys.agreements)
    stretches, moments, end = 5, len({1, 5, 10, 12}), 1
    assert counts == [[stretches + moments + end] * 2] * 2


@pytest.mark.parametrize(
    ("numbers", "code"),
    [({1: signal.SIGTERM}, 143), ({0: signal.SIGINT}, 130), ({0: signal.SIGINT, 2: signal.SIGTERM}, 143)],
)
def test_a_signal_to_any_stops_all_after_the_same_update(numbers, code, config, tmp_path, signalled):  # noqa: F811
    train(elsewhere(config, tmp_path))
    some = dataclasses.replace(config, log_every=2, eval_every=100, save_every=100)
    chief, *others = run_all(several(some), signal_at(signalled, 4, numbers))
    assert (
        exit_code(chief) == code and [(type(error), exit_code(error)) for error in others] == [(SystemExit, code)] * 2
    )
    assert isinstance(chief, KeyboardInterrupt if code == 130 else Terminated)
    go_on = (
        f"python train_toy.py --resume {config.out} --hosts.coordinator 10.0.0.1:1234 --hosts.count 3 --hosts.index 0"
    )
    name = signal.Signals(code - 128).name
    assert str(chief) == f"stopped by {name} after step 6; go on with: {go_on}, and the other processes likewise"
    assert load_state(Path(config.out) / "last").position == 6
    assert records(config.out)[-1]["step"] == 6


def test_a_signal_in_an_evaluation_breaks_it_off_in_all(config, signalled):  # noqa: F811
    class Evaluating(Toy):
        def evaluate(self, batches):
            for number, _ in enumerate(batches):
                if self.updates and number == 1 and threading.get_ident() == last[0]:
                    signalled[last[0]].signal = signal.SIGTERM
            return super().evaluate(batches)

    last = []

    def trainers(index: int):
        def make_trainer(*args):
            if index == 1:
                last.append(threading.get_ident())
            return Evaluating(*args)

        return make_trainer

    assert [exit_code(error) for error in run_all(several(config, 2), trainers)] == [143, 143]
    assert load_state(Path(config.out) / "last").position == 4
    assert [r["step"] for r in records(config.out) if r["kind"] == "validation"] == [0]


def test_several_go_on_with_what_one_began_and_one_with_theirs(config, tmp_path, signalled):  # noqa: F811
    """The records of the log come from the folder, and the losses in it judge the next ones."""
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(4))
    outcomes = run_all(several(resumed(config), 2), signal_at(signalled, 7, {1: signal.SIGTERM}))
    assert [exit_code(error) for error in outcomes] == [143, 143]
    train(resumed(config))
    assert_same_runs(config.out, str(tmp_path / "other"))


def test_the_log_of_the_others_has_the_chiefs_records(config):  # noqa: F811
    with pytest.raises(Killed):
        train(config, kill_at(8))
    log = SilentLog(config.out, 4)
    assert {record["step"] for record in log.records} == {0, 1, 2, 3, 4}
    before = sorted(Path(config.out).iterdir())
    log.log_baselines({}, 1.0)
    log.log_step(step=5, loss=1.0)
    log.rollback(2, {})
    assert {record["step"] for record in log.records} == {0, 1, 2} and sorted(Path(config.out).iterdir()) == before
    assert SilentLog(config.out).records == []


def test_a_run_that_comes_to_nothing_ends_in_all(config):  # noqa: F811
    class Lost(Toy):
        def step(self, *batch):
            return super().step(*batch) | {"loss": np.float32(np.nan)}

    chief, other = run_all(several(config, 2), lambda index: Lost)
    assert "the loss was not finite for 6 updates" in str(chief) and exit_code(chief) == 1
    assert (type(other), other.code) == (SystemExit, 1)


def test_what_one_refuses_ends_all(config, capsys):  # noqa: F811
    Path(config.out).mkdir()
    with locked(Path(config.out)):
        chief, *others = run_all(several(config))
    assert isinstance(chief, UserError) and "is being trained by another process" in str(chief)
    assert [(type(error), exit_code(error)) for error in others] == [(SystemExit, 2)] * 2
    said = "stopped: another process of this run refused to go on, and says why"
    assert capsys.readouterr().err.splitlines() == [said] * 2
    assert list(Path(config.out).iterdir()) == []


def test_a_bug_in_one_before_the_first_update_ends_all(config):  # noqa: F811
    def trainers(index: int):
        return Toy if index == 0 else lambda *args: 1 // 0

    chief, other = run_all(several(config, 2), trainers)
    assert exit_code(chief) == 1 and isinstance(other, ZeroDivisionError)


def test_other_flags_and_another_text_are_refused(config, tmp_path):  # noqa: F811
    first, second = several(config, 2)
    chief, other = run_all([first, dataclasses.replace(second, seed=7)])
    assert exit_code(chief) == 2
    assert str(other).startswith("process 1 has another configuration than process 0: seed=7 and not 0; start all")
    texts = [tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt"]
    for number, text in enumerate(texts):
        text.parent.mkdir()
        text.write_text(f"{number} quick brown fox jumps. " * 300, encoding="utf-8")
    with contextlib.ExitStack() as stack:
        read = loop.prepare

        def prepare(data, **kwargs):
            index = int(threading.current_thread().name.rpartition("-")[2].partition(" ")[0]) % 2
            return read(dataclasses.replace(data, corpus=str(texts[index])), **kwargs)

        stack.enter_context(pytest.MonkeyPatch.context()).setattr(loop, "prepare", prepare)
        outcomes = run_all([first, second])
    assert sorted(map(exit_code, outcomes)) == [2, 2]
    assert "process 1 has another text than process 0; start all" in str(outcomes[1])
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("wanted", "remedy"), [(1, "the same command begins it again"), (7, "go on with: python train_toy.py --resume")]
)
def test_who_loses_another_says_so_and_how_to_go_on(wanted, remedy, config):  # noqa: F811
    def trainers(index: int):
        def make_trainer(*args):
            toy = Toy(*args)
            toy.before_step = kill_at(wanted) if index == 1 else lambda position: None
            return toy

        return make_trainer

    made: list[ToyPeers] = []
    outcomes = run_all(several(config), trainers, made=made)
    assert isinstance(outcomes[1], Killed)
    for index in (0, 2):
        code, line = outcomes[index].args
        assert code == LOST == 75
        said = rf"process {index} of 3: lost a peer after step ({wanted}|{wanted + 1}) \(connection reset\); {remedy}"
        assert re.match(said, line), "one of them may still have been at the agreement before"
    assert "--hosts.index 2, and the other processes likewise" in outcomes[2].args[1] or wanted == 1


def test_the_last_words_of_a_process_that_was_told_to_stop_are_those(config, signalled):  # noqa: F811
    """The runtime may end it because another one has left first."""
    made: list[ToyPeers] = []
    run_all(several(config, 2), signal_at(signalled, 4, {0: signal.SIGTERM, 1: signal.SIGTERM}), made=made)
    code, line = next(one for one in made if one.index == 1).last_words("aborted")
    assert code == 143 and line.startswith("process 1 of 2: stopped by SIGTERM after step 5; go on with: python")


def test_each_reads_only_its_rows(config):  # noqa: F811
    seen: dict[int, list] = {}

    class Half(Toy):
        def step(self, inputs_ABT, targets_ABT):
            assert inputs_ABT.shape == targets_ABT.shape == (1, 1, 8)
            seen.setdefault(self.rows_of_batch.start, []).append(inputs_ABT[0, 0])
            return super().step(np.ones(1), targets_ABT)

    def trainers(index: int):
        return type(f"Half{index}", (Half,), {"rows_of_batch": slice(index, index + 1)})

    assert run_all(several(config, 2), trainers) == [None] * 2
    whole = []

    class Whole(Toy):
        def step(self, inputs_ABT, targets_ABT):
            whole.append(inputs_ABT[0])
            return super().step(np.ones(1), targets_ABT)

    loop.run(dataclasses.replace(config, out=config.out + "-whole"), framework="toy", make_trainer=Whole)
    np.testing.assert_array_equal(np.stack([seen[0], seen[1]], axis=1), whole)


def test_one_process_is_its_own_peer():
    assert (ALONE.index, ALONE.count, ALONE.is_chief) == (0, 1, True)
    assert (ALONE.agree(7), ALONE.tell("x"), ALONE.lost(ValueError("gloo"))) == (7, "x", None)
    ALONE.wait("here")
    ALONE.part()
    ALONE.expect(lambda reason: (1, reason))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((KeyboardInterrupt(), 130), (Terminated("", 15), 143), (SystemExit(3), 3), (SystemExit("x"), 1)),
        *((SystemExit(None), 0), (UserError("x"), 2), (FileExistsError(17, "x"), 2), (OSError(28, "full"), 1)),
        *((ZeroDivisionError(), 1), (MemoryError(), 1), (Killed(), 1)),
    ],
)
def test_every_error_has_the_exit_code_that_the_command_line_gives_it(error, code):
    assert exit_code(error) == code


def test_the_others_name_themselves_and_print_nothing_else(monkeypatch):
    stream = io.StringIO()
    prefixed = Prefixed(stream, "process 3: ")
    print("a", 1, end="", file=prefixed)
    assert stream.getvalue() == ""
    print(" b\n\nc", file=prefixed, flush=True)
    assert stream.getvalue() == "process 3: a 1 b\n\nprocess 3: c\n"
    assert not prefixed.isatty() and prefixed.writable() and prefixed.encoding == stream.encoding
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", stream)
    hush(ALONE)
    assert sys.stderr is stream
    hush(dataclasses.replace(ALONE, index=2, is_chief=False))
    print("unseen")
    print("seen", file=sys.stderr)
    assert stream.getvalue().endswith("\nprocess 2: seen\n") and "unseen" not in stream.getvalue()
    sys.stdout.close()


# The command line.
@pytest.mark.parametrize(
    ("framework", "argv", "said"),
    [
        ("torch", ["--mesh", "data=2"], "--mesh is JAX's; PyTorch trains on one device"),
        ("torch", ["--hosts.coordinator=auto", "--mesh", "data=2"], "--hosts.coordinator is JAX's"),
        ("jax", ["--hosts.coordinator", "auto"], "--hosts.coordinator needs --mesh"),
        ("jax", ["--hosts.heartbeat", "5"], "--hosts.heartbeat needs --mesh"),
    ],
)
def test_flags_that_do_not_go_together(framework, argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        parse_run_config(argv, framework=framework)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_its_own_place_among_the_processes(config, capsys):  # noqa: F811
    with pytest.raises(Killed):
        train(dataclasses.replace(config, mesh="data=2"), kill_at(8))
    flags = ["--hosts.coordinator", "10.0.0.1:1", "--hosts.count", "2", "--hosts.index", "1"]
    taken = parse_run_config(["--resume", config.out, *flags], framework="jax")
    assert (taken.mesh, taken.hosts) == ("data=2", HostsConfig("10.0.0.1:1", 2, 1))
    assert parse_run_config(["--resume", config.out], framework="jax").hosts == HostsConfig()
    capsys.readouterr()
    assert parse_run_config(["--resume", config.out], framework="torch").mesh == ""
    assert capsys.readouterr().err == "note: the run had the devices data=2; it goes on with one\n"


def test_a_run_that_was_killed_before_its_first_save_is_the_same_run_in_any_place(config, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    hosts = ["--hosts.coordinator", "10.0.0.1:1", "--hosts.count", "2", "--hosts.index"]
    argv = ["--mesh", "data=2", "--data.corpus", config.data.corpus, "--steps", "5", "--sequence_length", "8"]
    first = parse_run_config([*argv, *hosts, "0"], framework="jax")
    assert first.out == "runs/tiny-jax"
    with pytest.raises(Killed):
        train(dataclasses.replace(first, hosts=HostsConfig()), kill_at(0))
    for flags in ([*hosts, "0"], [*hosts, "1"], []):
        assert parse_run_config([*argv, *flags], framework="jax").out == "runs/tiny-jax"


ABORTING = """
import ctypes, threading, time
from harness.peers import LastWords

words = LastWords()
{before}
threading.Thread(target=ctypes.CDLL(None).abort).start()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        ("words.say(lambda: (75, 'process 1 of 2: lost a peer'))", 75, "process 1 of 2: lost a peer\n"),
        ("words.say(lambda: (75, 'x')); words.forget()", -signal.SIGABRT, ""),
    ],
)
def test_a_process_that_the_runtime_aborts_has_the_last_word(before, code, said):
    command = [sys.executable, "-c", ABORTING.format(before=before)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)
