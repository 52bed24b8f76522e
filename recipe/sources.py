"""A corpus as a stream: documents one after another, each with the place from which the rest can be read.

What is known of it without reading it (its name, its files and their sizes) names its cache entry.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipe.cache import file_hash
from recipe.config import DataConfig, UserError
from recipe.corpus import (
    EMBEDDED,
    HUB,
    RECORDS,
    Found,
    Tally,
    hub_folder,
    kind_of_file,
    load_documents,
    local_files,
    pieces,
    read_hub,
    read_json_lines,
    read_texts,
)
from recipe.reading import short

LONGEST_LINE = 2**26
"""Bytes of a line of streamed JSONL."""
SIDES = ("train", "validation")

Stat = list[int]
"""Size, time of the last change in nanoseconds, and inode of a file: while they stay, its bytes are taken to."""


class Place(NamedTuple):
    """Between two documents: `documents` were read before it; `file`, `offset` and `number` tell where to go on."""

    file: int = 0
    offset: int = 0
    number: int = 0
    documents: int = 0


class Piece(NamedTuple):
    """A document, or a part of one that was too long, which counts as a document of its own."""

    text: str
    after: Place | None
    """Where to go on; None within a document that is read whole before it is cut."""
    size: int
    """Bytes of UTF-8."""


class Source:
    """One corpus of a configuration, to be read once from any place; `tally` counts what was read."""

    def __init__(self, config: DataConfig, corpus: str) -> None:
        """UserError if there is no such corpus."""
        self.config, self.corpus, self.tally = config, corpus, Tally()
        self.files: list[tuple[Path, str]] = []
        """Each with its name, in the order in which they are read."""
        self.identity: dict[str, Any] = {"corpus": corpus}
        self.exhausted = False
        """Whether reading came to the end, and not to `max_documents`."""
        self._texts: list[str] | None = None
        if corpus in EMBEDDED:
            documents = load_documents(DataConfig(corpus=corpus))
            self._texts = documents.texts
            self.identity["texts"] = documents.identity
            return
        if not corpus.startswith(HUB):
            self.files = local_files(Path(corpus), self.tally)
            self.identity["corpus"] = os.path.realpath(corpus)
        elif hub_folder(corpus.removeprefix(HUB)):
            root = Path(corpus.removeprefix(HUB))
            found = sorted(path for path in root.rglob("*") if path.is_file())
            self.files = [(path, str(path.relative_to(root))) for path in found]
            self.identity["corpus"] = HUB + os.path.realpath(root)
        self._sizes = [stat_of(path)[0] for path, _ in self.files]
        named = [f"{size} {name}" for size, (_, name) in zip(self._sizes, self.files, strict=True)]
        listed = "\0".join(named).encode("utf-8", "surrogatepass")
        self.identity["files"] = hashlib.sha256(listed).hexdigest()

    def options(self) -> dict[str, Any]:
        """All that decides which documents there are and which of them are held out, as far as it is known unread."""
        names = "text_field", "max_documents", "max_characters", "validation_fraction"
        return self.identity | {name: getattr(self.config, name) for name in names}

    def stat(self, index: int) -> Stat:
        """Of one of its files, by which a change of it is noticed."""
        return stat_of(self.files[index][0])

    def stats(self) -> list[Stat]:
        """Those of all its files."""
        return [stat_of(file) for file, _ in self.files]

    def hash(self, index: int) -> str:
        """SHA-256 of one of its files."""
        return file_hash(self.files[index][0])

    @property
    def size(self) -> int | None:
        """Bytes of its files; None if it has none."""
        return sum(self._sizes) if self.files else None

    def position(self, place: Place) -> int:
        """Bytes of the files before a place, without the part of a Parquet file; documents if there are no files."""
        if not self.files:
            return place.documents
        part = min(place.offset, self._sizes[place.file])
        return sum(self._sizes[: place.file]) + (0 if self._by_rows(place.file) else part)

    def _by_rows(self, index: int) -> bool:
        return self.corpus.startswith(HUB) or self.files[index][0].suffix.lower() == ".parquet"

    def documents(self, start: Place) -> Iterator[Piece]:
        """The documents from a place on, clean and not blank, up to `max_documents` of them."""
        read, self.exhausted = start.documents, False
        if start == Place():
            self.tally.empty = self.tally.surrogates = 0
        for file, found in self._found(start):
            if read == self.config.max_documents:
                return
            read += 1
            text = self.tally.clean(found.text[: self.config.max_characters])
            parts = [part for part in pieces(text) if part.strip()]
            after = Place(file, found.offset, found.number, read)
            for index, part in enumerate(parts, start=1):
                yield Piece(part, after if index == len(parts) else None, len(part.encode()))
        self.exhausted = True

    def _found(self, start: Place) -> Iterator[tuple[int, Found]]:
        """What is found from a place on, each with the index of its file."""
        if self._texts is not None:
            for offset, text in enumerate(self._texts[start.offset :], start=start.offset + 1):
                yield 0, Found("", text, offset)
            return
        if self.corpus.startswith(HUB):
            for found in read_hub(self.corpus.removeprefix(HUB), self.config.text_field, start.offset):
                yield 0, found
            return
        self.tally.read = Counter(kind_of_file(file) for file, _ in self.files[: start.file])
        for index in range(start.file, len(self.files)):
            file, name = self.files[index]
            self.tally.read[kind_of_file(file)] += 1
            here = start if index == start.file else Place()
            for found in self._file(file, name, here):
                yield index, found

    def _file(self, file: Path, name: str, here: Place) -> Iterator[Found]:
        field, suffix = self.config.text_field, file.suffix.lower()
        if suffix == ".jsonl":
            return read_json_lines(file, name, field, here.offset, here.number, LONGEST_LINE + 1)
        if suffix in RECORDS:
            return RECORDS[suffix](file, name, field, here.offset)
        return read_texts(file, name, here.offset, here.number, self.config.max_characters)


def stat_of(file: Path) -> Stat:
    """By which a change of a file is noticed; UserError if it is gone."""
    try:
        found = file.stat()
    except OSError as error:
        reason = short(error.strerror or str(error))
        raise UserError(f"{short(str(file), 300)} cannot be looked at ({reason}); restore it.") from None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is evaluated on: by a hash of its text alone, so that copies of it are, too.

    Not by the seed: losses of runs that differ in that compare, and the tokens are made once. White space around the
    text does not count. With a larger fraction more is held out, and nothing that was is trained on.
    """
    number = int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8, person=b"held out").digest())
    return number < fraction * 2**64
