"""What the machine refuses, told from a bug: exit code and remedy of errors of the system, of memory, of sizes."""

import errno
import os
import signal
from collections.abc import Sequence

from recipe.config import UserError

USERS_MISTAKES = (
    *(UserError, FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError),
)
"""Errors whose own text is the line that the user gets."""

FAILED, MISTAKEN = 1, 2


class RunFailed(RuntimeError):
    """A training run came to nothing: the text says why, what its folder keeps and how to go on, in one line."""


SMALLER = "choose smaller sizes, or a machine with more memory"
SYSTEM = {
    errno.ENOENT: (MISTAKEN, "name one that is there"),
    errno.EEXIST: (MISTAKEN, "choose another name"),
    errno.ENOTDIR: (MISTAKEN, "name a folder's path"),
    errno.EISDIR: (MISTAKEN, "name a file"),
    errno.ENOTEMPTY: (MISTAKEN, "choose another name"),
    errno.EACCES: (MISTAKEN, "choose another place, or change the permissions"),
    errno.EPERM: (MISTAKEN, "choose another place, or change the permissions"),
    errno.EROFS: (MISTAKEN, "choose a place that can be written"),
    errno.ENAMETOOLONG: (MISTAKEN, "choose a shorter name"),
    errno.ELOOP: (MISTAKEN, "mend the symbolic links"),
    errno.EADDRINUSE: (MISTAKEN, "choose another --port"),
    errno.ENOSPC: (FAILED, "make room, and run it again or go on with --resume"),
    errno.EDQUOT: (FAILED, "make room, and run it again or go on with --resume"),
    errno.EFBIG: (FAILED, "choose a place that takes larger files"),
    errno.EIO: (FAILED, "the disk or its connection is at fault; try another"),
    errno.ESTALE: (FAILED, "the folder's connection was lost; run it again or go on with --resume"),
    errno.EMFILE: (FAILED, "raise the limit of open files (`ulimit -n`)"),
    errno.ENFILE: (FAILED, "close other programs, or raise the limit of open files"),
    errno.EAGAIN: (FAILED, "close other programs, or raise the limit of processes (`ulimit -u`)"),
    errno.ENOMEM: (FAILED, SMALLER),
}
"""Exit code and remedy of what the operating system refuses; any other of its errors is a bug."""
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "can't allocate memory", "out of memory")
"""In the texts with which XLA and torch say it, as RuntimeErrors of classes that are not to be imported here."""
TOO_LARGE = (
    *("too large to convert", "too big to convert", "index-sized integer", "array is too big", "out of bounds for"),
    *("dimension exceeded", "Maximum allowed size exceeded"),
)
"""In the texts with which Python and NumPy refuse a number that fits no machine word."""


def machine_says(error: Exception) -> tuple[int, str] | None:
    """Exit code and line of a failed run, of an error of the system, of memory or of an absurd size; None of a bug."""
    text = str(error)
    if isinstance(error, RunFailed):
        return FAILED, text
    if isinstance(error, OSError):
        # NumPy's `tofile` does not say why it wrote less than it was asked to.
        number = errno.ENOSPC if error.errno is None and text.endswith(" written") else error.errno
        if number is None and isinstance(error, USERS_MISTAKES):
            return MISTAKEN, text
        if number not in SYSTEM:
            return None
        code, remedy = SYSTEM[number]
        files = " and ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
        return code, f"{files}{': ' if files else ''}{os.strerror(number)}; {remedy}."
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _any_of(OUT_OF_MEMORY, text)):
        return FAILED, f"out of memory{f' ({text})' if text else ''}; {SMALLER}."
    if isinstance(error, RuntimeError) and text == "Could not determine home directory.":
        return MISTAKEN, "there is no home folder; set HOME, or name a folder with --data.cache_dir."
    if isinstance(error, OverflowError | ValueError) and _any_of(TOO_LARGE, text):
        return MISTAKEN, f"a size is beyond any machine's ({text}); choose smaller sizes."
    return None


def _any_of(parts: Sequence[str], text: str) -> bool:
    return any(part.lower() in text.lower() for part in parts)


def exit_code(error: BaseException) -> int:
    """The code with which the command line answers an error, a signal's among them; a bug's is 1."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, UserError):
        return MISTAKEN
    said = machine_says(error) if isinstance(error, Exception) else None
    return FAILED if said is None else said[0]
