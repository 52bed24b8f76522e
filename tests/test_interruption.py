"""Signals at any moment of a run: one line, the right exit code, nothing half done cut by the first of them."""

import contextlib
import gc
import io
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import cli
from harness.interruption import Interruption, Terminated

ROOT = Path(__file__).resolve().parents[1]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SIGNALS = (INT, TERM, HUP)
NOTED = "stopping after this update; once more stops at once"
GO_ON = "run the same command again"
BEGIN = """
import hashlib, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore it.
from harness import cli, interruption
from harness.interruption import Interruption

def say(word):
    print(word, flush=True)

def compute():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # one call in C, for many minutes, without Python's lock
"""
WAITS = {
    "python": "while True: pass",
    "asleep": "time.sleep(3600)",
    "waiting for a thread": "threading.Event().wait()",
    "computing in C": "compute()",
}


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Whatever the tests were started by: a shell has background jobs ignore SIGINT, nohup SIGHUP."""
    usual = {INT: signal.default_int_handler, TERM: signal.SIG_DFL, HUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    descriptor = signal.set_wakeup_fd(-1)
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == usual
    assert signal.set_wakeup_fd(descriptor) == -1
    assert "signals" not in {thread.name for thread in threading.enumerate()}
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def child(body: str, *, prefix: tuple[str, ...] = (), **options) -> Iterator[subprocess.Popen]:
    """A process whose main function has this body, and whose exit code is that of `cli.run`."""
    program = BEGIN + "\ndef main():\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\nsys.exit(cli.run(main))\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    usual = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    usual |= {"text": True, "cwd": ROOT, "env": environment}
    with subprocess.Popen([*prefix, sys.executable, "-c", program], **usual | options) as process:
        try:
            yield process
        finally:
            process.kill()


def rest(process: subprocess.Popen, line: str | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, after a line to its stdin."""
    out, err = process.communicate(line)
    return process.returncode, out, err


def stopped(number: int, where: str = "") -> str:
    return f"stopped by {signal.Signals(number).name}{where and ' '}{where}; {GO_ON}\n"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("wait", WAITS)
def test_a_signal_ends_a_stretch_in_which_nothing_is_half_done(wait, number):
    body = f"""
        interruption.TO_BEGIN = 0.3
        with Interruption(where="while reading", remedy="{GO_ON}") as run, run.at_once():
            say("ready")
            {WAITS[wait]}
    """
    with child(body) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert rest(process) == (128 + number, "", stopped(number, "while reading"))


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("wait", ["asleep", "computing in C"])
def test_the_first_signal_is_noted_at_once_and_the_second_acts_at_once(wait, first, second):
    body = f"""
        interruption.TO_END = 0.3
        with Interruption(where="after step 3", remedy="{GO_ON}"):
            say("ready")
            {WAITS[wait]}
    """
    with child(body) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stderr.readline() == NOTED + "\n"
        process.send_signal(second)
        assert rest(process) == (128 + second, "", stopped(second, "after step 3"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_leaves_where_its_state_is_whole(number):
    body = f"""
        with Interruption(doing="this evaluation", where="after step 2", remedy="{GO_ON}") as run:
            say("ready")
            while run.signal is None:
                time.sleep(0.01)
            say("saved")
            try:
                run.leave()
            finally:
                say("tidied")
    """
    with child(body) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        code, out, err = rest(process)
    assert (code, out) == (128 + number, "saved\ntidied\n")
    assert err == NOTED.replace("update", "evaluation") + "\n" + stopped(number, "after step 2")


def test_after_a_first_signal_tidying_up_may_take_its_time():
    body = """
        interruption.TO_BEGIN = 2.0
        with Interruption() as run, run.at_once():
            try:
                say("ready")
                time.sleep(3600)
            finally:
                time.sleep(1.25 * interruption.TO_BEGIN)
                say("tidied")
    """
    with child(body) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(TERM)
        assert rest(process) == (143, "tidied\n", "stopped by SIGTERM\n")


def test_a_second_signal_ends_what_tidies_up_for_ever():
    body = """
        interruption.TO_END = 0.3
        with Interruption() as run, run.at_once():
            try:
                say("ready")
                time.sleep(3600)
            finally:
                say("tidying")
                compute()
    """
    with child(body) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(TERM)
        assert process.stdout.readline() == "tidying\n"
        process.send_signal(INT)
        assert rest(process) == (130, "", "stopped by SIGINT\n")


def test_a_main_thread_asleep_is_woken_though_another_thread_had_the_signal():
    """Left to itself it would sleep on: the system wakes the thread that it gives the signal to."""
    body = """
        interruption.TO_BEGIN = 3600.0
        with Interruption() as run, run.at_once():
            def other():
                time.sleep(0.3)
                signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            try:
                threading.Thread(target=other).start()
                time.sleep(3600)
            finally:
                say("woken")
    """
    with child(body) as process:
        assert rest(process) == (143, "woken\n", "stopped by SIGTERM\n")


def test_a_reminder_is_no_second_signal():
    """It would cut the time to begin to leave, which C code needs here."""
    body = """
        interruption.TO_BEGIN, interruption.TO_END, interruption.REMINDER = 3600.0, 0.0, 0.01
        with Interruption() as run, run.at_once():
            try:
                say("ready")
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6)
                time.sleep(3600)
            finally:
                say("left")
    """
    with child(body) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(TERM)
        assert rest(process) == (143, "left\n", "stopped by SIGTERM\n")


def test_a_second_signal_acts_though_nobody_reads_the_output():
    body = """
        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, bytes(65536))
        except BlockingIOError:
            os.set_blocking(2, True)
        interruption.TO_WRITE = interruption.TO_END = 0.1
        with Interruption():
            say("ready")
            compute()
    """
    with child(body, text=False) as process:
        assert process.stdout.readline() == b"ready\n"
        while process.poll() is None:
            process.send_signal(TERM)
            time.sleep(0.01)
        assert process.returncode == 143


@pytest.mark.parametrize("wait", ["asleep", "computing in C"])
def test_the_line_is_the_last_one_of_a_log_that_holds_both_streams(wait):
    body = f"""
        interruption.TO_BEGIN = 0.3
        with Interruption(remedy="{GO_ON}") as run, run.at_once():
            print("buffered")
            os.write(1, b"ready\\n")
            {WAITS[wait]}
    """
    with child(body, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(TERM)
        assert rest(process)[:2] == (143, "buffered\n" + stopped(TERM))


@pytest.mark.skipif(not shutil.which("nohup"), reason="needs nohup")
def test_nohup_keeps_a_run_from_hanging_up():
    body = """
        with Interruption() as run:
            say("ready")
            sys.stdin.readline()
            say(run.signal)
            while run.signal is None:
                time.sleep(0.01)
            run.leave()
    """
    with child(body, prefix=("nohup",)) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(HUP)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "None\n"
        process.send_signal(TERM)
        code, _, err = rest(process)
    assert code == 143 and err.splitlines()[-2:] == [NOTED, "stopped by SIGTERM"]


def test_a_terminal_that_goes_away_leaves_a_whole_state(tmp_path):
    """What a run prints after that would end it by an error."""
    body = f"""
        import fcntl, termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        with Interruption() as run:
            say("ready")
            while run.signal is None:
                time.sleep(0.01)
            print("step 3", flush=True)
            print("a warning", file=sys.stderr, flush=True)
            open({str(tmp_path / "state")!r}, "w", encoding="utf-8").close()
            run.leave()
    """
    terminal, end = pty.openpty()
    with child(body, stdin=end, stdout=end, stderr=end, start_new_session=True) as process:
        os.close(end)
        shown = b""
        while b"ready" not in shown:
            shown += os.read(terminal, 1024)
        os.close(terminal)
        assert process.wait() == 129
    assert (tmp_path / "state").exists()


def test_on_a_terminal_the_line_does_not_go_on_with_that_of_a_bar():
    body = """
        with Interruption() as run:
            print("step 3", end="", flush=True, file=sys.stderr)
            say("ready")
            while run.signal is None:
                time.sleep(0.01)
    """
    terminal, end = pty.openpty()
    with child(body, stderr=end) as process:
        os.close(end)
        assert process.stdout.readline() == "ready\n"
        process.send_signal(TERM)
        assert process.wait() == 0
        assert os.read(terminal, 1024).decode().splitlines() == ["step 3", NOTED]
    os.close(terminal)


def test_a_forked_child_answers_for_itself():
    """Its signals are not written to the socket that it shares with its parent, and end it as they would have."""
    body = """
        import warnings
        warnings.simplefilter("ignore")  # By Python 3.12: a fork in a process of several threads.
        with Interruption() as run:
            child = os.fork()
            if not child:
                with Interruption():
                    pass
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(3600)
            _, status = os.waitpid(child, 0)
            say(os.WIFSIGNALED(status) and os.WTERMSIG(status))
            os.kill(os.getpid(), signal.SIGHUP)
            while run.signal is None:
                time.sleep(0.01)
            say(run.signal)
    """
    with child(body) as process:
        assert rest(process) == (0, f"{int(TERM)}\n{int(HUP)}\n", NOTED + "\n")


def test_one_line_is_printed_before_the_block_ends(capsys):
    with Interruption() as run:
        signal.raise_signal(TERM)
        assert run.signal == TERM
    assert capsys.readouterr().err == NOTED + "\n"


@pytest.mark.parametrize(("number", "kind"), [(INT, KeyboardInterrupt), (TERM, Terminated), (HUP, Terminated)])
def test_the_exception_carries_the_line_and_the_code(number, kind):
    with Interruption(where="after step 1", remedy="x\ny") as run, pytest.raises(kind) as left:
        signal.raise_signal(number)
        run.leave()
    assert str(left.value) == f"stopped by {signal.Signals(number).name} after step 1; x\\ny"
    assert number == INT or left.value.code == 128 + number


@pytest.mark.parametrize("where", ["a callback of the collector", "a finalizer"])
def test_what_python_would_swallow_is_raised_after_it(where, monkeypatch, capsys):
    """Exceptions of a collector's callback and of `__del__` are printed, and their program goes on."""
    lost, sent = [], []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    def send(*_):
        if not sent:
            sent.append(True)
            signal.raise_signal(TERM)

    class Finalized:
        def __del__(self):
            send()

    try:
        with pytest.raises(Terminated), Interruption() as interruption, interruption.at_once():
            if where == "a finalizer":
                Finalized()
            else:
                gc.callbacks.append(send)
                gc.collect()
            time.sleep(30)
    finally:
        if send in gc.callbacks:
            gc.callbacks.remove(send)
    assert sent and not lost


def test_nobody_leaves_unasked():
    with Interruption() as run, pytest.raises(AssertionError, match="nothing asked to stop"):
        run.leave()


def test_a_stretch_begins_with_what_was_noted_before():
    with Interruption() as run:
        signal.raise_signal(TERM)
        with pytest.raises(Terminated), run.at_once():
            pytest.fail("it is not begun")


def test_a_signal_after_a_stretch_is_noted_again():
    with Interruption() as run:
        with run.at_once(), run.at_once():
            pass
        signal.raise_signal(HUP)
        assert run.signal == HUP


def test_within_a_stretch_a_second_one_changes_nothing():
    with Interruption() as run, pytest.raises(Terminated), run.at_once():
        with run.at_once():
            pass
        signal.raise_signal(TERM)


@pytest.mark.parametrize("made", [None, RuntimeError("in Rust"), KeyboardInterrupt(), SystemExit(0)])
def test_a_stretch_ends_by_the_signal_whatever_a_library_makes_of_it(made):
    reached = False
    with Interruption() as run:
        with pytest.raises(Terminated, match="stopped by SIGTERM"), run.at_once():
            try:
                signal.raise_signal(TERM)
            except Terminated:
                reached = True
            if made is not None:
                raise made
        assert reached


def test_errors_pass_when_nothing_asked_to_stop():
    with Interruption() as run, pytest.raises(RuntimeError, match="a bug"), run.at_once():
        raise RuntimeError("a bug")


def test_the_innermost_answers_and_the_outer_one_after_it(capsys):
    with pytest.raises(Terminated, match="stopped by SIGHUP outside"):  # noqa: SIM117 (one after the other)
        with Interruption(where="outside") as outer, outer.at_once():
            with Interruption(doing="the inner one", where="inside") as inner:
                signal.raise_signal(TERM)
                assert (inner.signal, outer.signal) == (TERM, None)
                with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT inside"):
                    signal.raise_signal(INT)
            assert outer.signal is None
            signal.raise_signal(HUP)
    assert capsys.readouterr().err == NOTED.replace("this update", "the inner one") + "\n"


def test_one_may_be_entered_again():
    run = Interruption()
    for number in (TERM, HUP):
        with run:
            assert run.signal is None
            signal.raise_signal(number)
            assert run.signal == number


def test_all_is_restored_after_an_error_too():
    with pytest.raises(ZeroDivisionError), Interruption():
        assert signal.getsignal(INT) is not signal.default_int_handler
        raise ZeroDivisionError
    # The fixture looks at the handlers.


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_ignored(number, capsys):
    before = signal.signal(number, signal.SIG_IGN)
    with Interruption() as run, run.at_once():
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.raise_signal(number)
    assert run.signal is None and signal.getsignal(number) == signal.SIG_IGN
    assert capsys.readouterr().err == ""
    signal.signal(number, before)


def test_outside_the_main_thread_nothing_happens():
    seen = []

    def elsewhere() -> None:
        with Interruption() as run, run.at_once():
            seen.append((run.signal, signal.getsignal(TERM), [thread.name for thread in threading.enumerate()]))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    (found,) = seen
    assert found[:2] == (None, signal.SIG_DFL) and "signals" not in found[2]


def test_a_handler_that_somebody_sets_within_has_the_signal_for_itself():
    body = """
        interruption.TO_BEGIN = interruption.TO_END = 0.1
        with Interruption() as run, run.at_once():
            before = signal.signal(signal.SIGTERM, lambda number, frame: os.write(1, b"theirs\\n"))
            say("ready")
            sys.stdin.readline()
            time.sleep(5 * interruption.TO_BEGIN)
            signal.signal(signal.SIGTERM, before)
            say(run.signal)
            time.sleep(3600)
    """
    with child(body) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            process.send_signal(TERM)
            assert process.stdout.readline() == "theirs\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "None\n"
        process.send_signal(TERM)
        assert rest(process) == (143, "", "stopped by SIGTERM\n")


@pytest.fixture
def theirs() -> Iterator[int]:
    """A descriptor that another library has signals written to."""
    ours, other = socket.socketpair()
    ours.setblocking(False)
    with ours, other:
        yield ours.fileno()


def test_a_descriptor_of_before_is_put_back(theirs):
    signal.set_wakeup_fd(theirs)
    with Interruption():
        pass
    assert signal.set_wakeup_fd(-1) == theirs


def test_a_descriptor_of_somebody_else_stays_and_signals_come_all_the_same(theirs, capsys):
    with Interruption() as run:
        signal.set_wakeup_fd(theirs)
        signal.raise_signal(TERM)
        assert run.signal == TERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(INT)
    assert signal.set_wakeup_fd(-1) == theirs
    assert capsys.readouterr().err == NOTED + "\n"


def test_a_descriptor_closed_since_is_not_put_back():
    ours, other = socket.socketpair()
    with other:
        with ours:
            ours.setblocking(False)
            signal.set_wakeup_fd(ours.fileno())
            run = Interruption()
            run.__enter__()
        run.__exit__(None, None, None)
    # The fixture looks for it.


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_answers_a_signal_from_its_start(number, tmp_path):
    """While it imports its framework, of which this is the place."""
    (tmp_path / "jax").mkdir()
    source = "import time\nprint('importing', flush=True)\ntime.sleep(3600)\n"
    (tmp_path / "jax" / "__init__.py").write_text(source, encoding="utf-8")
    start = f"import signal, runpy; signal.signal({int(INT)}, signal.default_int_handler); "
    start += f"runpy.run_path({str(ROOT / 'train_jax.py')!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    with subprocess.Popen([sys.executable, "-c", start], **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (128 + number, "", f"stopped by {signal.Signals(number).name}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["jax"]


def test_a_signal_while_python_ends_adds_nothing_to_what_was_said():
    """All is said then; the system ends the process, and a shell has the same exit code."""
    body = """
        import atexit
        atexit.register(time.sleep, 3600)
        atexit.register(say, "ending")
        with Interruption() as run, run.at_once():
            say("ready")
            time.sleep(3600)
    """
    for second in SIGNALS:
        with child(body) as process:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(TERM)
            assert process.stdout.readline() == "ending\n"
            process.send_signal(second)
            assert rest(process) == (-second, "", "stopped by SIGTERM\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_ended_by_a_signal_tears_nothing_down(number):
    body = f"import atexit; atexit.register(say, 'torn down'); cli.end(lambda: signal.raise_signal({int(number)}))"
    with child(body) as process:
        assert rest(process) == (128 + number, "", f"stopped by {signal.Signals(number).name}\n")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_any_other_process_ends_as_ever(code):
    with child(f"import atexit; atexit.register(say, 'torn down'); cli.end(lambda: {code})") as process:
        assert rest(process) == (code, "torn down\n", "")


def raise_(error: BaseException) -> None:
    raise error


ENDS = {
    "done": (lambda: None, 0, ""),
    "terminated": (lambda: signal.raise_signal(TERM), 143, "stopped by SIGTERM\n"),
    "hung up": (lambda: signal.raise_signal(HUP), 129, "stopped by SIGHUP\n"),
    "Ctrl-C": (lambda: signal.raise_signal(INT), 130, "stopped by SIGINT\n"),
    "interrupted by a library": (lambda: raise_(KeyboardInterrupt()), 130, "interrupted\n"),
    "left in good order": (lambda: raise_(KeyboardInterrupt("stopped; go on")), 130, "stopped; go on\n"),
    "terminated in good order": (lambda: raise_(Terminated("\x1b; go on", TERM)), 143, "\\x1b; go on\n"),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_a_command_ends_with_one_line_and_its_code(how, capsys):
    main, code, line = ENDS[how]
    assert cli.run(main) == code
    assert capsys.readouterr().err == line


def test_a_bug_of_a_command_leaves_the_handlers_as_they_were():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: raise_(ZeroDivisionError()))


def test_the_exit_code_stands_though_the_output_is_gone(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert cli.run(lambda: signal.raise_signal(HUP)) == 129
