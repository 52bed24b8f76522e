"""A user's mistake, in one line: the value, the rule, the remedy."""

from collections.abc import Callable
from typing import Any


class CompareError(ValueError):
    """What was asked for cannot be compared; its text is one line. The command line ends with exit code 2."""


def require(condition: bool, message: str) -> None:
    """Raise `CompareError` with the message unless the condition holds."""
    if not condition:
        raise CompareError(message)


def scalar(loss: Callable, out: Any, side: str) -> Any:
    """The loss of a model's output. Raises `CompareError` if it fails or is no scalar."""
    try:
        value = loss(out)
    except Exception as error:
        raise CompareError(f"the {side} side's loss fails on its output: {first_line(error)}; mend loss.") from error
    shape = getattr(value, "shape", None)
    what = "no array" if shape is None else f"of shape {tuple(shape)}"
    require(shape is not None and len(shape) == 0, f"the {side} side's loss is {what}; return a scalar.")
    return value


def first_line(error: BaseException, most: int = 200) -> str:
    """Kind and first line of an exception from somebody else's code, shortened."""
    text = str(error).strip().partition("\n")[0]
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def some(names, most: int = 3) -> str:
    """The first few names of many, for a message."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
