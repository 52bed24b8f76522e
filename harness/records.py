"""What a run's log holds, whatever has become of it: records read, put in order, and cut at a step.

metrics.jsonl has one JSON object a line. A run that goes on keeps what can be read, so that a damaged log costs records
and never the run.
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config import UserError, fits, require
from recipe.durable import sync, write_whole
from recipe.reading import kind_of, parse_json, take

NEEDED: dict[str, dict[str, Any]] = {
    "train": {"loss": float | None, "skipped": int, "seconds": float},
    "validation": {"loss": float | None, "accuracy": float | None, "perplexity": float | None},
}
"""What a run that goes on, and its picture, read of a record, by kind."""
ONCE = ("baselines", "train", "validation")
"""Kinds of which a step has one record; a run may be resumed or rolled back to the same step twice."""


class _Line(NamedTuple):
    """A record and the line that holds it, with its end: what is kept is kept byte for byte."""

    record: dict[str, Any]
    text: bytes


def readable_records(folder: str | Path) -> list[dict[str, Any]]:
    """The records that a run in this folder would go on with, whatever has become of its log; changes nothing."""
    return [line.record for line in _salvage(Path(folder) / "metrics.jsonl").lines]


def lacks_validation(records: Iterable[Mapping[str, Any]], step: int) -> bool:
    """Whether no evaluation after update `step` is among the records: a run may end between a save and that."""
    return not any(record["kind"] == "validation" and record["step"] == step for record in records)


def read_record(line: bytes, where: str) -> dict[str, Any]:
    """The record in a line of a log; UserError if it is no object that says its kind and its step."""
    record = parse_json(line, where)
    require(isinstance(record, dict), f"{where} holds {kind_of(record)}, not a JSON object")
    _check_fields(record, {"kind": str, "step": int}, where)
    return record


def _check_fields(record: dict[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """UserError unless each field is there and of its type; the message is not made for the many that are."""
    for name, hint in fields.items():
        if name not in record or not fits(record[name], hint):
            take(record, name, hint, where)


def is_finite(value: float) -> bool:
    """Whether a number is one that float64 can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return False


class _Salvaged(NamedTuple):
    lines: list[_Line]
    found: list[str]
    """What is wrong with the log, in words."""
    unfinished: bool
    """Whether its last line is, as a killed run may leave it."""


def _salvage(path: Path) -> _Salvaged:
    """What can be read of a log, in order and each record once."""
    if not os.path.lexists(path):
        return _Salvaged([], [], False)
    if not path.is_file():
        return _Salvaged([], ["it is no file"], False)
    try:
        *texts, last = path.read_bytes().split(b"\n")
    except OSError as error:
        return _Salvaged([], [f"it cannot be read: {error.strerror}"], False)
    lines, found, seen, doubled, unfinished = [], [], set(), 0, False
    for number, text in enumerate([*texts, last] if last else texts, start=1):
        try:
            line = _salvage_line(text, f"line {number}")
        except UserError as error:
            unfinished = number > len(texts)
            found += [str(error).partition(";")[0]] * (not unfinished)
            continue
        name = (line.record["kind"], line.record["step"])
        if name in seen:
            doubled += 1
            continue
        lines.append(line)
        if line.record["kind"] in ONCE:
            seen.add(name)
    if doubled:
        found.append(f"{doubled:,} records are doubled")
    # Of one step, the baselines or the update come first; the rest stay as they were written.
    ordered = sorted(lines, key=lambda line: (line.record["step"], line.record["kind"] not in ("baselines", "train")))
    if ordered != lines:
        found.append("its records are out of order")
    return _Salvaged(ordered, found, unfinished)


def _salvage_line(text: bytes, where: str) -> _Line:
    """A line whose record has all that is asked of one of its kind; UserError for any other."""
    record = read_record(text, where)
    require(record["step"] >= 0, f"{where} has a step below 0")
    needed = NEEDED.get(record["kind"], {})
    _check_fields(record, needed, where)
    for name in needed:
        require(record[name] is None or is_finite(record[name]), f"{where} has {name} beyond all numbers")
    return _Line(record, text + b"\n")


class Cut(NamedTuple):
    """What was left of a log that was cut at a step."""

    records: list[dict[str, Any]]
    """What the log holds now."""
    undone: int
    """Records moved to undone.jsonl."""
    said: str
    """One line on what was wrong with the log; empty if nothing was."""


def cut_log(folder: Path, step: int) -> Cut:
    """Leave in metrics.jsonl the records up to the step, and move later ones to undone.jsonl, all forced to disk.

    A damaged log is kept beside. A process killed on the way has lost nothing, and a next one moves nothing twice.
    """
    path, scratch = folder / "metrics.jsonl", folder / ".metrics.jsonl"
    lines, found, unfinished = _salvage(path)
    kept, undone = ([line for line in lines if (line.record["step"] > step) == later] for later in (False, True))
    records = [line.record for line in kept]
    lacking = max(step, 0) - sum(record["kind"] == "train" and record["step"] > 0 for record in records)
    if unfinished and lacking:
        found.append("its end is cut off")
    wrong = []
    if found:
        more = f", and {len(found) - 1:,} more" * (len(found) > 1)
        wrong.append(f"was damaged ({found[0]}{more}) and is set aside as {_set_aside(path)}")
    if lacking:
        wrong.append(f"lacks {lacking:,} of the {step:,} training records before step {step + 1}")
    said = f"log        metrics.jsonl {', '.join(wrong)}; the run goes on without what is lost" if wrong else ""
    interrupted = scratch.is_file()  # a process was killed on the way, maybe after it had moved these records
    scratch.write_bytes(b"".join(line.text for line in kept))
    sync(scratch)
    sync(folder)
    if undone:
        _append(folder / "undone.jsonl", [line.text for line in undone], interrupted)
    scratch.replace(path)
    sync(folder)
    return Cut(records, len(undone), said)


def _append(path: Path, lines: list[bytes], interrupted: bool) -> None:
    """Add lines to a file, whole or not at all; after an interruption, those it ends with already are added once."""
    old = _bytes(path)
    if old is None and os.path.lexists(path):
        _set_aside(path)
    present = [line + b"\n" for line in (old or b"").split(b"\n")]
    if present[-1] == b"\n":
        present.pop()
    if interrupted:
        pairs = zip(reversed(present), reversed(lines), strict=False)
        equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        present = present[: len(present) - equal]
    write_whole(path, b"".join([*present, *lines]))


def _set_aside(path: Path) -> str:
    """Keep what is damaged under a name of its own, which is returned; a file also keeps its place until another comes.

    A copy that is there already, made by a process that was killed then, serves as well.
    """
    data = _bytes(path)
    for number in itertools.count(1):
        aside = path.with_name(f"{path.stem}-damaged-{number}{path.suffix}")
        if not os.path.lexists(aside):
            break
        if data is not None and _bytes(aside) == data:
            return aside.name
    if data is None:
        path.rename(aside)
        sync(path.parent)
    else:
        write_whole(aside, data)
    return aside.name


def _bytes(path: Path) -> bytes | None:
    """The bytes of a file; None if it is none, or cannot be read."""
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None
