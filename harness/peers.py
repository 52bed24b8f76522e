"""The processes of one run: who leads, how they agree, and how one ends when another is lost.

A run of several computes the same updates in all of them; what only one may do (folder, log, picture, lines) the chief
does. Whatever decides what is computed next is the same everywhere: losses are, and a signal is agreed on.
`jax_impl/processes.py` has the processes of JAX; nothing here knows a framework.
"""

import ctypes
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol, TextIO

from recipe.reading import short

LOST = 75  # EX_TEMPFAIL of sysexits.h: try again
"""Exit code of a process that lost another one."""


class Peers(Protocol):
    """The processes of a run. Every process calls agree, tell, wait and part in the same order."""

    @property
    def index(self) -> int:
        """Number of this process, from 0; 0 is the chief."""

    @property
    def count(self) -> int:
        """Processes in all."""

    @property
    def is_chief(self) -> bool:
        """Whether this process keeps the folder and speaks."""

    def agree(self, value: int) -> int:
        """The largest of all processes' values, on all of them; waits for the last to come."""

    def tell(self, text: str) -> str:
        """The chief's text, on all."""

    def wait(self, name: str) -> None:
        """Wait until all are at the moment of this name."""

    def part(self) -> None:
        """Wait for all, and be alone from then on: each may end when it likes."""

    def lost(self, error: BaseException) -> str | None:
        """Why another process is lost, in one line, if that is what an error says."""

    def expect(self, last_words: Callable[[str], tuple[int, str]]) -> None:
        """Should the framework's runtime end the process because another is lost, `last_words(reason)` has its exit
        code and last line."""


@dataclass(frozen=True)
class Alone:
    """The peers of a run of one process."""

    index: int = 0
    count: int = 1
    is_chief: bool = True

    def agree(self, value: int) -> int:
        return value

    def tell(self, text: str) -> str:
        return text

    def wait(self, name: str) -> None:
        pass

    def part(self) -> None:
        pass

    def lost(self, error: BaseException) -> str | None:
        return None

    def expect(self, last_words: Callable[[str], tuple[int, str]]) -> None:
        pass


ALONE = Alone()


def end_at_once(code: int, line: str) -> NoReturn:
    """Print the last line on stderr and end the process, waiting for nothing: an ordinary exit waits for the dead.

    Without Python's streams, which another thread may hold.
    """
    above = "\n" if os.isatty(2) else ""  # A bar may stand there.
    try:
        os.write(2, f"{above}{short(line, len(line))}\n".encode())
    finally:
        os._exit(code)


class LastWords:
    """What a process says that a library ends by abort(): a handler of SIGABRT in C, which may run in any thread.

    Python's own handlers do not: they wait for the main thread, and abort() waits for nobody.
    """

    def __init__(self) -> None:
        self._words: Callable[[], tuple[int, str]] | None = None
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._speak)

    def say(self, words: Callable[[], tuple[int, str]]) -> None:
        """From here on these: exit code and line."""
        self._words = words
        self._set(ctypes.cast(self._handler, ctypes.c_void_p))

    def forget(self) -> None:
        """Leave SIGABRT to the system again."""
        self._words = None
        self._set(ctypes.c_void_p(None))

    @staticmethod
    def _set(handler: ctypes.c_void_p) -> None:
        library = ctypes.CDLL(None)
        library.signal.restype, library.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
        library.signal(signal.SIGABRT, handler)

    def _speak(self, number: int) -> None:
        try:
            code, line = self._words() if self._words else (128 + number, "aborted")
        except BaseException:
            code, line = LOST, traceback.format_exc()
        end_at_once(code, line)


class Prefixed(io.TextIOBase):
    """A stream that begins every line with who wrote it, and writes whole lines: several processes may share it."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self.stream, self.prefix = stream, prefix
        self._rest = ""
        self._lock = threading.Lock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            if lines:
                self.stream.write("".join(f"{self.prefix}{line}\n" if line else "\n" for line in lines))
                self.stream.flush()
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True


def hush(peers: Peers) -> None:
    """From here on this process, if it is not the chief, prints nothing, and names itself in errors and warnings."""
    if not peers.is_chief:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
        sys.stderr = Prefixed(sys.stderr, f"process {peers.index}: ")
