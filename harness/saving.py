"""Saving beside training: a snapshot of the trainer's arrays, and one thread that writes it.

The state written is that of the update it names, because a snapshot is a copy; training goes on while it is read from
the device, hashed and written.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np

NO_ROOM = "note: the device has no room for a copy of the state, so training waits at each save until the host has one"
"""What a trainer says once if it cannot keep a snapshot beside what it trains."""


class LazyArrays(Mapping[str, np.ndarray]):
    """Arrays by name whose shapes are known and whose values are made when they are asked for, one at a time."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
        """`read(name)` makes an array."""
        self.shapes, self._read = dict(shapes), read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Shards(Protocol):
    """Arrays divided over the devices of one process or several, each of which calls the same methods in order."""

    index: int
    """Of this process, from 0; that is the chief, who alone makes folders and files beside the arrays."""
    count: int
    """Of the processes."""

    def write(self, folder: Path, *, slots: bool) -> None:
        """Write the weights, and the slots if asked, into a folder that is made, and wait for all processes' parts."""

    def read(self, folder: Path) -> tuple[LazyArrays, Mapping[str, LazyArrays]]:
        """Weights and slots in such a folder, in torch's layout, for this process alone."""

    def wait(self, moment: str) -> None:
        """Wait until every process is at the moment of that name; never the same name twice."""


class Snapshot(NamedTuple):
    """What a trainer held between two updates; later updates do not touch it, and any thread may read it."""

    weights: LazyArrays
    slots: Mapping[str, LazyArrays]
    updates: int
    skipped: int
    shards: Shards | None = None
    """The same arrays on a mesh, where each process writes its own; those above are then for a run of one process."""


def snapshot_of(trainer) -> Snapshot:
    """The trainer's own snapshot or, of one that has none, copies of its weights and slots."""
    if hasattr(trainer, "snapshot"):
        return trainer.snapshot()

    def copied(arrays: Mapping[str, np.ndarray]) -> LazyArrays:
        copies = {name: np.array(array) for name, array in arrays.items()}
        return LazyArrays({name: array.shape for name, array in copies.items()}, copies.__getitem__)

    slots = {slot: copied(arrays) for slot, arrays in trainer.slots().items()}
    return Snapshot(copied(trainer.weights()), slots, *trainer.counts())


class Saver:
    """One thread that does one job at a time while the main thread trains; a context manager.

    What a job raises is raised in the main thread, at the latest by `wait`. At the end a job under way is waited for,
    however the block is left; whoever asked for the process to stop at once has it ended meanwhile.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        # Waited for instead of the thread, which Python 3.11 takes for ended if a signal interrupts its `join`.
        self._done = threading.Event()
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Begin the job, once the one before is done."""
        self.wait()

        def work() -> None:
            try:
                job()
            except BaseException as error:  # raised again where the run can answer it
                self._error = error
            finally:
                done.set()

        done = self._done = threading.Event()
        # A daemon does not keep alive a process that is told to stop at once.
        self._thread = threading.Thread(target=work, name="saver", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and not self._done.is_set()

    def wait(self) -> None:
        """Wait until the job under way is done, and raise what it raised."""
        if self._thread is not None:
            self._done.wait()
            self._thread.join()  # It has let go of the job, and of the arrays with it.
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def look(self) -> None:
        """Raise what the last job raised, if it is done; wait for nothing."""
        if not self.busy:
            self.wait()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._done.wait()
        if kind is None:
            self.wait()
