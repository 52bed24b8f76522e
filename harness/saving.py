"""Saving beside training: a snapshot of the trainer's arrays, and one thread that writes it.

The state written is that of the update it names, because a snapshot is a copy; training goes on while it is read from
the device, hashed and written.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

import numpy as np


class LazyArrays(Mapping[str, np.ndarray]):
    """Arrays by name whose shapes are known and whose values are made when they are asked for, one at a time."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
        check: Callable[[], object] = bool,
    ) -> None:
        """`read(name)` makes an array; `check()` is called before, and may raise to give up."""
        self.shapes, self._read, self._check = dict(shapes), read, check

    def __getitem__(self, name: str) -> np.ndarray:
        self._check()
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Snapshot(NamedTuple):
    """What a trainer held between two updates; later updates do not touch it, and any thread may read it."""

    weights: LazyArrays
    slots: Mapping[str, LazyArrays]
    updates: int
    skipped: int

    def checked(self, check: Callable[[], None]) -> "Snapshot":
        """The same, calling `check` before each array is read."""

        def with_check(arrays: LazyArrays) -> LazyArrays:
            return LazyArrays(arrays.shapes, arrays.__getitem__, check)

        slots = {slot: with_check(arrays) for slot, arrays in self.slots.items()}
        return self._replace(weights=with_check(self.weights), slots=slots)


class Saver:
    """One thread that does one job at a time while the main thread trains; a context manager.

    What a job raises is raised in the main thread, at the latest by `wait`. At the end a job under way is waited for;
    if the block is left because somebody wants the process to stop at once, it gives up at its next array.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = threading.Event()

    def submit(self, job: Callable[[], None]) -> None:
        """Begin the job, once the one before is done."""
        self.wait()

        def work() -> None:
            try:
                job()
            except BaseException as error:  # raised again where the run can answer it
                self._error = error

        # A daemon does not keep alive a process that is told to stop at once.
        self._thread = threading.Thread(target=work, name="saver", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the job under way is done, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def look(self) -> None:
        """Raise what the last job raised, if it is done; wait for nothing."""
        if not self.busy:
            self.wait()

    def check(self) -> None:
        """Raise `GivenUp` in a job that nobody waits for."""
        if self._given_up.is_set():
            raise GivenUp

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
            self._given_up.set()
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self.wait()


class GivenUp(Exception):
    """Ends a job whose process is to stop at once."""
