"""What is to survive a power cut: files and folders forced to disk before anything is built on them.

A file is safe when its bytes are on disk and the folder that names it is, too. The order is always the same: the bytes,
the folder they lie in, the rename that gives them their place, the folder of that place.
"""

import contextlib
import errno
import os
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows, which forces no folder to disk
    fcntl = None  # type: ignore[assignment]

CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.ENOTTY)
"""What file systems answer that know no way to force a folder to disk."""


def sync(path: Path) -> None:
    """Force a file's bytes, or the names in a folder, to disk; raises OSError if the disk refuses.

    A folder is passed over where the system cannot do it (Windows, some network file systems).
    """
    folder = path.is_dir()
    if folder and fcntl is None:
        return
    handle = os.open(path, os.O_RDONLY if folder or fcntl is not None else os.O_RDWR)
    try:
        _force(handle)
    except OSError as error:
        if not folder or error.errno not in CANNOT:
            raise
    finally:
        os.close(handle)


def _force(handle: int) -> None:
    """fsync, and the drive's own cache with it: macOS leaves that out of fsync."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
        except OSError as error:  # some file systems have fsync alone; after an error of the disk, fsync might not tell
            if error.errno not in CANNOT:
                raise
    os.fsync(handle)


def sync_below(folder: Path) -> None:
    """Force everything in a folder to disk: files, the folders below, then the folder itself."""
    for path in sorted(folder.iterdir()):
        sync_below(path) if path.is_dir() and not path.is_symlink() else sync(path)
    sync(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are not there, each forced to disk by name."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def write_whole(file: Path, data: bytes) -> None:
    """Write a file whole or not at all, forced to disk; an older one of that name is replaced."""
    scratch = file.with_name(f".{file.name}.new")
    try:
        scratch.write_bytes(data)
        sync(scratch)
        scratch.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    sync(file.parent)
