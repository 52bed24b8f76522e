"""Readers that are wrong on purpose, one in each way that the fuzzer must tell (`test_fuzz.py`)."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from parity_tests.fuzz import Facts, Target
from recipe.config import require


def seeds(folder: Path) -> Iterator[None]:
    (folder / "text.txt").write_text("seed", encoding="utf-8")
    yield


def whole(folder: Path) -> Facts:
    """The text, as Python reads it."""
    return {"text": (folder / "text.txt").read_bytes().decode()}


def careful(folder: Path) -> Facts:
    data = (folder / "text.txt").read_bytes()
    require(b"\0" not in data and len(data) < 100, "the text is longer than 99 bytes or has zeros; cut it.")
    require(data.isascii(), "the text is not ASCII; convert it.")
    return whole(folder)


def planted(act: Callable[[Path], object]) -> Callable[[Path], Facts]:
    """A careful reader but for what it does with a text that is not the seed's."""

    def read(folder: Path) -> Facts:
        facts = careful(folder)
        return facts if facts["text"] == "seed" else act(folder) or facts

    return read


def refuses(folder: Path) -> Facts:
    facts = careful(folder)
    require(facts["text"] != "seed", "the text is 'seed'; choose another.")
    return facts


def writes(folder: Path) -> None:
    (folder / ".." / "elsewhere").write_text("", encoding="utf-8")


READERS: dict[str, Callable[[Path], Facts]] = {
    "sound": careful,
    "traceback": whole,
    "differs": planted(lambda folder: {"text": ""}),
    "accepts": lambda folder: {"text": (folder / "text.txt").read_bytes().decode(errors="replace")},
    "refuses": refuses,
    "outside": planted(writes),
    "hang": planted(lambda folder: time.sleep(60)),
    "crash": planted(lambda folder: os.abort()),
}
"""The fault that each of them has."""
TARGETS = {
    name: Target(name, seeds, ("text.txt",), read, lambda folder, mine: whole(folder), share)
    for name, read in READERS.items()
    for share in [0.05 if name in ("hang", "crash") else 1.0]  # each costs a process
}
