"""A user's mistake, in one line: the value, the rule, the remedy."""

import re


class CompareError(ValueError):
    """What was asked for cannot be compared; its text is one line. The command line ends with exit code 2."""


def require(condition: bool, message: str) -> None:
    """Raise `CompareError` with the message unless the condition holds."""
    if not condition:
        raise CompareError(message)


def first_line(error: BaseException, most: int = 200) -> str:
    """Kind and first line of an exception from somebody else's code, shortened."""
    text = re.sub(r" *\(https?://[^ )]*\)", "", str(error).strip().partition("\n")[0])
    text = f"{type(error).__name__}: {text.rstrip('.')}" if text else type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def some(names, most: int = 3) -> str:
    """The first few names of many, for a message."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
