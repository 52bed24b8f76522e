"""Signals that end a run: SIGINT, SIGTERM, SIGHUP. The first waits for what must not be cut, a second acts at once.

Python runs a handler in the main thread alone, between two of its instructions; while that compiles, or tokenises in
Rust, none runs for minutes. So every signal is also written to a socket, and a thread reads it: the line that answers
comes at once, and a main thread that does not leave in time is ended with its process. Only code that keeps Python's
own lock while it runs holds up both.
"""

import contextlib
import gc
import math
import os
import selectors
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from recipe.reading import short

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGTERM") if hasattr(signal, name))
TO_BEGIN, TO_END = 3.0, 1.0
"""Seconds in which the main thread must begin to leave after a first signal, and have left after a second."""
REMINDER = 0.2
"""Seconds after which a main thread that has not begun is sent the signal itself: it may be asleep."""
TO_WRITE = 1.0
"""Seconds for a line: a terminal may be held, a pipe unread."""


class Terminated(SystemExit):
    """A run ends by another signal than Ctrl-C, with exit code 128 + its number; the text is the last line to print."""

    code: int

    def __init__(self, line: str, number: int) -> None:
        super().__init__(line)
        self.code = 128 + number


class Interruption:
    """Answers the signals that end a run while its block runs; may be nested, and entered again.

    The first signal is noted, and one line on stderr says so; the run calls `leave` where nothing is half done. In a
    stretch `at_once` it ends the stretch by that exception. A second signal, of whatever kind, acts at once everywhere;
    the exit code is that of the signal that acts. A signal that is ignored when the block begins stays ignored (nohup,
    a shell's background jobs). Outside the main thread the block does nothing.

    A main thread that does not leave in time is ended with its process, unless neither this nor one around it
    `ends_process`: a program that trains, or a notebook, may have more to lose than the run.
    """

    signal: int | None
    """The first signal that came."""
    doing: str
    """What a first signal waits for: "this update"."""
    where: str
    """How far the run is, to follow "stopped by SIGTERM": "while reading the text", "after step 120"."""
    remedy: str
    """How to go on; paths in it are quoted for the shell."""

    def __init__(
        self, *, doing: str = "this update", where: str = "", remedy: str = "", ends_process: bool = True
    ) -> None:
        self.doing, self.where, self.remedy, self.ends_process = doing, where, remedy, ends_process
        self._begin()

    def _begin(self) -> None:
        self.signal = None
        self._stretches = 0
        self._acting: int | None = None  # the last signal, if it is to end the process
        self._first = False  # whether that is the first one
        self._raised = False  # whether the main thread has its exception
        self._deadline = math.inf
        self._ends = self.ends_process  # or one around this does

    def __enter__(self) -> "Interruption":
        self._begin()
        if threading.current_thread() is threading.main_thread():
            _WATCH.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _WATCH.leave(self)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A stretch in which nothing is half done: a signal ends it by an exception, also one that was noted before.

        It ends so even if a library swallows the exception, or makes another of it.
        """
        with _WATCH.lock:
            self._stretches += 1
        try:
            if self.signal is not None:
                self.leave()
            yield
        except BaseException as error:
            self._end_stretch(error)
            raise
        else:
            self._end_stretch(None)

    def _end_stretch(self, error: BaseException | None) -> None:
        with _WATCH.lock:  # A signal comes before this, and acts, or after it, and is noted.
            self._stretches -= 1
            heard = isinstance(error, KeyboardInterrupt | Terminated) and str(error)
            unheard = self._acting is not None and not heard
        if unheard:
            raise self._exception() from error

    def take_over(self, number: int) -> None:
        """Note a signal that another process of this run had, as if it had come here."""
        with _WATCH.lock:
            self.signal = number

    @property
    def hurries(self) -> bool:
        """Whether a signal acts at once by now, so that nothing more is to be begun."""
        return self._acting is not None

    def leave(self) -> NoReturn:
        """End the run in good order, as the signal asks: KeyboardInterrupt or `Terminated`, its text the last line."""
        raise self._exception()

    def _exception(self) -> KeyboardInterrupt | Terminated:
        with _WATCH.lock:
            self._raised = True
            if self._first:
                self._deadline = math.inf  # It begins to leave, and may take its time.
            number, line = self._number(), self._line()
        return KeyboardInterrupt(line) if number == signal.SIGINT else Terminated(line, number)

    def _number(self) -> int:
        number = self.signal if self._acting is None else self._acting
        assert number is not None, "nothing asked to stop"
        return number

    def _line(self) -> str:
        said = f"stopped by {signal.Signals(self._number()).name}"
        said += f" {self.where}" if self.where else ""
        said += f"; {self.remedy}" if self.remedy else ""
        return short(said, len(said))  # a path may hold what a terminal cannot show

    # The rest is called with the lock held.

    def _arrive(self, number: int) -> str | None:
        """Take in a signal; the line that answers it, if it is to wait."""
        first = self.signal is None
        if first:
            self.signal = number
            if not self._stretches:
                return f"stopping after {self.doing}; once more stops at once"
        self._acting, self._first, self._raised = number, first, False
        if self._ends:
            self._deadline = min(self._deadline, time.monotonic() + (TO_BEGIN if first else TO_END))
        return None

    def _due(self) -> KeyboardInterrupt | Terminated | None:
        """The exception that the main thread is to raise now, if any."""
        return None if self._acting is None or self._raised else self._exception()

    def _patience(self) -> float | None:
        """Seconds until something is to be done about the main thread; None for ever."""
        if self._acting is None or (self._raised and self._deadline == math.inf):
            return None
        left = max(0.0, self._deadline - time.monotonic())
        return left if self._raised else min(left, REMINDER)


class _Watch:
    """What a process has once, for all Interruptions entered: the handlers, the socket, the thread that reads it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # A handler may come while the main thread holds it.
        self._entered: list[Interruption] = []  # The last takes the signals.
        self._undo = contextlib.ExitStack()
        self._thread: threading.Thread | None = None
        self._late: int | None = None  # came when all had been left
        self._echoes: list[int] = []
        self._lines: list[str] = []
        self._closing = self._ending = False

    def enter(self, interruption: Interruption) -> None:
        with self.lock:
            self._entered.append(interruption)
            interruption._ends = any(entered.ends_process for entered in self._entered)
        if len(self._entered) == 1:
            try:
                self._install()
            except BaseException:
                self.leave(interruption)
                raise

    def leave(self, interruption: Interruption) -> None:
        if interruption not in self._entered:
            return  # another thread's, or of before a fork
        with self.lock:
            del self._entered[self._entered.index(interruption) :]
        if self._thread is not None and (self._ending or not self._entered):
            self._closing = True
            self._wake()
            self._thread.join()  # Does not return if the thread is ending the process.
            self._thread = None
        if not self._entered:
            self._undo.close()
            if self._late is not None:
                interruption._arrive(self._late)
                interruption.leave()

    def _install(self) -> None:
        self._late, self._echoes, self._lines, self._closing = None, [], [], False
        self._reader, self._writer = (self._undo.enter_context(end) for end in socket.socketpair())
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # None: set by other than Python, which cannot put it back
                self._undo.callback(signal.signal, number, before)
                signal.signal(number, self._handle)
        before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._undo.callback(self._put_back, before)
        thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        thread.start()
        self._thread = thread

    def _put_back(self, before: int) -> None:
        """Restore the descriptor that signals are written to; not if somebody has replaced ours since."""
        if self._is_ours():
            try:
                signal.set_wakeup_fd(before)
            except (OSError, ValueError):  # closed since
                signal.set_wakeup_fd(-1)

    def _is_ours(self) -> bool:
        ours = self._writer.fileno()
        found = signal.set_wakeup_fd(ours, warn_on_full_buffer=False)
        if found != ours:
            with contextlib.suppress(OSError, ValueError):  # closed since
                signal.set_wakeup_fd(found)
        return found == ours

    def forget(self) -> None:
        """In the child of a fork, which has no such thread: all as if nothing had been entered."""
        self.lock = threading.RLock()
        self._entered.clear()
        self._thread = None
        self._undo.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        with self.lock:
            if not self._entered:
                self._late = number
                return
            if self._is_ours():
                self._read()
            else:
                self._take(number)  # It was written elsewhere.
            # What is not raised now is due again with the next reminder.
            error = None if _is_swallowed(frame) else self._entered[-1]._due()
        self._wake()
        if error is not None:
            raise error

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full, so it wakes
            self._writer.send(b"\0")

    def _read(self) -> None:
        """Take the signals that were written, in their order."""
        try:
            numbers = self._reader.recv(4096)
        except BlockingIOError:
            return
        for number in numbers:
            # Others may be written here, and some have been given to other handlers since.
            if self._entered and number in SIGNALS and signal.getsignal(number) == self._handle:
                self._take(number)

    def _take(self, number: int) -> None:
        if number in self._echoes:
            self._echoes.remove(number)
            return
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        if line := self._entered[-1]._arrive(number):
            self._lines.append(line)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            closing = False
            while not closing:
                with self.lock:
                    patience = self._entered[-1]._patience() if self._entered else None
                silent = not selector.select(patience)
                with self.lock:
                    closing = self._closing  # Then these lines are the last.
                    self._read()
                    lines, self._lines = self._lines, []
                    last = self._entered[-1] if self._entered else None
                    if last is not None:
                        self._ending = time.monotonic() >= last._deadline
                        if silent and not self._ending and not last._raised:
                            self._remind(last._number())
                for line in lines:
                    _print(line)
                if self._ending and last is not None:
                    _end(128 + last._number(), last._line())

    def _remind(self, number: int) -> None:
        """Send the signal to the main thread: another may have had it, so that a sleep or a wait goes on."""
        if hasattr(signal, "pthread_kill") and number not in self._echoes:
            self._echoes.append(number)
            signal.pthread_kill(threading.main_thread().ident or 0, number)


_WATCH = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WATCH.forget)


def _end(code: int, line: str) -> NoReturn:
    """End the process, whatever its main thread does."""
    _within(TO_WRITE, lambda: sys.stdout.flush())
    _print(line)
    os._exit(code)


def _print(line: str) -> None:
    above = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # A bar may stand there.
    _within(TO_WRITE, lambda: print(above + line, file=sys.stderr, flush=True))


def _within(seconds: float, write: Callable[[], object]) -> None:
    """Call it in a thread and wait no longer than that; a stream that is gone is passed over."""

    def attempt() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            write()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)


def _is_swallowed(frame: FrameType | None) -> bool:
    """Whether Python would print an exception that is raised in this frame and go on: within a callback of its garbage
    collector, as jax has one, or a finalizer."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _leave_terminal() -> None:
    """Send what is printed from now on nowhere, if the terminal is gone: each line would end the run by an error."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
