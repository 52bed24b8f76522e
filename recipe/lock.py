"""One process at a time in a folder: an advisory lock on the folder itself, which ends with its holder."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Hold an existing folder while the block runs, and leave no file for it.

    Yields True if it is held, False if another holder has it (never with `wait`), None if the system or the folder's
    file system has no locks, so that nobody can tell. Raises OSError if the folder cannot be opened, or if it was moved
    or removed before it was held: a lock on what has no name any more keeps nobody out.
    """
    if fcntl is None:
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    held: bool | None = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:  # some network file systems
            held = None
        if held and not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, "another folder took its place", str(folder))
        yield held
    finally:
        os.close(handle)
