"""What somebody else wrote: JSON objects, their fields with a check of each one's type, and names fit for a message.

Every JSON file of ours or of others is read here and nowhere else, because `json.loads` promises neither an object nor
a type, and three of the errors it raises are not JSON errors at all.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from recipe.config import UserError, expected, fits, require

LONGEST_NAME = 80
"""Characters of one name or value in a message."""
NAMES_SHOWN = 5
"""Names listed in a message before the rest are counted."""
LARGEST_JSON = 100_000_000
"""Bytes of a JSON file; the largest published tokenizer.json has some 35 MB."""


def parse_json(
    text: str | bytes,
    what: str,
    *,
    pairs: Callable[[list], Any] | None = None,
    integer: Callable[[str], float] | None = None,
) -> Any:
    """The JSON value in a text; `UserError`, which says `what` it is, if there is none.

    `json` raises ValueError for bad text, bytes that are not UTF-8 and numbers of thousands of digits, RecursionError
    for thousands of brackets. `pairs` is its `object_pairs_hook`, `integer` its `parse_int`.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_int=integer)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{what} is not JSON ({short(reason)}); fetch or save it again.") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` if the file is absent, too large, not JSON or not an object."""
    require(file.is_file(), f"{file} is not there, or is no file; fetch or save it again.")
    size = file.stat().st_size
    require(size <= LARGEST_JSON, f"{file} has {size:,} bytes, more than any file of its kind; fetch it again.")
    values = parse_json(file.read_bytes(), str(file))
    require(isinstance(values, dict), f"{file} holds {kind_of(values)}, not a JSON object; fetch or save it again.")
    return values


def take(values: Mapping[str, Any], name: str, hint: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a JSON object, of the type that `hint` says; `default`, if there is one, where it is absent."""
    if name not in values:
        require(default is not dataclasses.MISSING, f"{where} does not say {name}; add it, or fetch the file again.")
        return default
    value = values[name]
    require(fits(value, hint), f"{where}: {name}={short(repr(value))} must be {expected(hint)}; mend it there.")
    return value


def kind_of(value: object) -> str:
    """A JSON value's type in words."""
    words = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return words.get(type(value), "a number")


def short(text: str, longest: int = LONGEST_NAME) -> str:
    """The text with its control characters escaped, cut in the middle where it is longer than a message should be."""
    cut = text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in cut)


def some(names: Iterable[str] | Collection[str], separator: str = ", ") -> str:
    """The first few names, shortened, and how many more there are."""
    names = list(names)
    shown = separator.join(short(name) for name in names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return shown if more <= 0 else f"{shown} and {more:,} more"


def flat(values: Any) -> dict[str, Any]:
    """The values of an object and of the objects in it, by dotted name; nothing of what is no object."""
    found: dict[str, Any] = {}
    for name, value in values.items() if isinstance(values, Mapping) else ():
        parts = {f"{name}.{part}": inner for part, inner in value.items()} if isinstance(value, Mapping) else {}
        found |= parts or {name: value}
    return found
