"""What a folder of ours was when it was written: a hash of every file, looked at whenever the folder is read.

A training state has the hashes in its run.json, a weights folder in a manifest.json of its own: SHA-256 of every file,
and of a file of tensors also a CRC-32 of its header and of each tensor, so that a tensor is checked as it is read, and
named. Of the files of a mesh's arrays the size is looked at first, and every byte before they are used. The JSON file
that holds the hashes carries a SHA-256 of itself. Folders without hashes, such as other people's, are read as they are.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.tensors import Damaged, StoredTensor, header_crc, read_header
from recipe.config import UserError
from recipe.reading import read_json, short, some, take

MANIFEST, RUN = "manifest.json", "run.json"
FORMAT = 2
"""Of a state's run.json: raised when the meaning of the files changes. Those of format 1 have no hashes."""
FILES, CHECKSUM = "files", "checksum"
FILE = {"sha256": str, "header": str, "tensors": dict[str, str], "size": int}
"""What is known of a file; header and tensors of files of tensors alone, size of those of sharded arrays alone."""
ABSENT = {str: "", int: 0}
"""What a file's fields are that are not there."""


def seal(folder: Path, file: str, values: Mapping[str, Any], written: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `values` as a JSON file that also holds the hashes of the folder's other files, and of itself.

    `written` has what is known already of the files that were hashed as they were written.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(file, None)
    hashes = {name: written.get(name) or {"sha256": file_hash(path)} for name, path in files.items()}
    sealed = {**values, FILES: hashes}
    (folder / file).write_bytes(as_json(sealed | {CHECKSUM: _checksum(sealed)}))


def as_json(values: Mapping) -> bytes:
    """Indented JSON in ASCII; a value that is not finite raises ValueError."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode("ascii")


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_sealed(file: Path, values: Mapping[str, Any]) -> bool:
    """Whether a file that `seal` wrote, and the object in it, are what was written."""
    rest = {name: value for name, value in values.items() if name != CHECKSUM}
    try:
        return values.get(CHECKSUM) == _checksum(rest) and file.read_bytes() == as_json(values)
    except ValueError:  # a number that JSON has not
        return False


def read_sealed(file: Path) -> dict[str, Any]:
    """The object in a file that `seal` wrote; Damaged if a byte of it is another."""
    values = read_json(file)
    if not is_sealed(file, values):
        raise Damaged(f"{file} is not what was written: its checksum is another's. {remedy(file.parent)}.")
    return values


def manifest_of(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What is known of a folder's files, by name; None of a folder without hashes. Damaged if that is damaged."""
    values = None
    if (folder / RUN).is_file():
        values = read_json(folder / RUN)
        if values.get("format") == 1:
            return None
        values = read_sealed(folder / RUN)
    elif (folder / MANIFEST).is_file():
        values = read_json(folder / MANIFEST)
        if not values.keys() & {FILES, CHECKSUM}:
            return None  # somebody else's
        values = read_sealed(folder / MANIFEST)
    if values is None:
        return None
    where = f"the list of files in {folder}"
    files = take(values, FILES, dict[str, dict], where)
    for name, known in files.items():
        for field, hint in FILE.items():
            take(known, field, hint, f"{where}, {short(name)}", ABSENT.get(hint, {}))
    return files


def check_files(
    folder: Path, *, tensors: bool = False, part: tuple[int, int] = (0, 1)
) -> dict[str, dict[str, Any]] | None:
    """`manifest_of` a folder, after every file but those of tensors has been hashed; of these the header or the size,
    or with `tensors` all. Damaged names the first file that is missing or another, and its tensors.

    `part` (i, n) leaves all but every n-th file, from the i-th on, to others.
    """
    files = manifest_of(folder)
    for name, known in [*(files or {}).items()][part[0] :: part[1]]:
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing. {remedy(folder)}.")
        same = _looks_same(file, known)
        if not same or (tensors and file_hash(file) != known["sha256"]):
            raise Damaged(f"{file} is not what was written: {_what_differs(file, known)}. {remedy(folder)}.")
    return files


def with_checks(entries: dict[str, StoredTensor], files: Mapping[str, Mapping] | None) -> dict[str, StoredTensor]:
    """The tensors of a folder's files with the CRC-32 that each must have when it is read."""
    if files is None:
        return entries
    known = {file: values.get("tensors", {}) for file, values in files.items()}

    def checked(name: str, entry: StoredTensor) -> StoredTensor:
        return entry._replace(crc=known.get(entry.file.name, {}).get(name), name=name, remedy=remedy(entry.file.parent))

    return {name: checked(name, entry) for name, entry in entries.items()}


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(as_json(values)).hexdigest()


def _looks_same(file: Path, known: Mapping[str, Any]) -> bool:
    """Whether a file is as it was by its size, of those that have one, by its header, or by every byte."""
    if "size" in known:
        return file.stat().st_size == known["size"]
    return header_crc(file) == known["header"] if "tensors" in known else file_hash(file) == known["sha256"]


def _what_differs(file: Path, known: Mapping[str, Any]) -> str:
    """Why a file can be told from what was written: its format, its header, its tensors."""
    if "size" in known and (size := file.stat().st_size) != known["size"]:
        return f"it has {size:,} bytes of {known['size']:,}"
    if "tensors" not in known:
        return "it has another SHA-256"
    try:
        entries = read_header(file)
    except UserError as error:
        return str(error).partition(";")[0]
    if header_crc(file) != known["header"]:
        return "its header has another CRC-32"
    wrong = [name for name, entry in entries.items() if known["tensors"].get(name) != entry.read_crc()]
    return f"{some(wrong)} {'have' if wrong[1:] else 'has'} another CRC-32" if wrong else "it has another SHA-256"


def remedy(folder: Path) -> str:
    """What may help where a folder is damaged."""
    if (folder / RUN).is_file():
        return "Take another copy of the state"
    return f"Take another copy of the folder or, if the change was meant, delete its {MANIFEST}"
