"""The cache: where entries lie, who builds one, and whether one is what was written.

An entry is a folder named by a hash of its options. It is built beside its place by one process at a time, forced to
disk and renamed into it; its manifest.json has a hash of every file and of itself.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipe.config import DataConfig, UserError, require
from recipe.durable import sync, sync_below
from recipe.lock import locked
from recipe.reading import read_json, short, take

SECONDS_BETWEEN_LOOKS = 0.2
"""How often a process that waits for another's cache entry looks whether it is there."""
GOING_ON = ".streaming-"
"""Begins the name of a folder in which a build goes on after it was killed."""

Take = Callable[[Path, contextlib.ExitStack, bool], Path | None]


def cache_folder(config: DataConfig) -> Path:
    """Where caches lie: `cache_dir`, else $QWEN_FROM_SCRATCH_CACHE, else ~/.cache/qwen-from-scratch."""
    named = config.cache_dir or os.environ.get("QWEN_FROM_SCRATCH_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "qwen-from-scratch"
    except RuntimeError:
        raise UserError("no home folder is known, so no place for the cache; pass --data.cache_dir FOLDER.") from None


def key_of(options: dict) -> str:
    """The name of the entry that these options describe."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(manifest: dict[str, Any]) -> str:
    """A hash of all that a manifest says besides."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(values: dict[str, Any]) -> bytes:
    """The values and their checksum as the text of a JSON file."""
    return (json.dumps(values | {"checksum": checksum(values)}, indent=2) + "\n").encode()


def read_sealed(file: Path, options: dict) -> dict[str, Any]:
    """What `sealed` wrote; UserError if a bit of it is another, or if it is of other options."""
    values = read_json(file)
    remedy = "build it again."
    whole = take(values, "checksum", str, str(file)) == checksum(values)
    require(whole, f"{file} is not what was written; {remedy}")
    require(values.get("options") == options, f"{file} is of another entry; {remedy}")
    return values


def read_manifest(folder: Path, options: dict, names: Set[str], *, tell: bool = False) -> dict[str, Any] | None:
    """The manifest of a whole cache entry; None if there is none, or if it is damaged and must be built again.

    `names` are files that it has at least. With `tell`, what is damaged is named on stderr.
    """
    if not os.path.lexists(folder):
        return None
    try:
        return check_entry(folder, options, names)
    except (OSError, UserError) as error:
        if tell:
            tell_damage(folder, error)
        return None


def tell_damage(folder: Path, error: Exception) -> None:
    """Say on stderr what is wrong with an entry, and that it is built again."""
    reason = short(str(error).partition(";")[0], 300)
    print(f"note: the cache entry {short(str(folder), 300)} is damaged: {reason}", file=sys.stderr)
    print("note: it is not used, but built again", file=sys.stderr)


def check_entry(folder: Path, options: dict, names: Set[str]) -> dict[str, Any]:
    """The manifest of a cache entry; UserError or OSError if a bit of it or of the files it names is another."""
    file = folder / "manifest.json"
    manifest = read_sealed(file, options)
    hashes = take(manifest, "sha256", dict[str, str], str(file))
    require(hashes.keys() >= names, f"{file} is of another entry; build it again.")
    check_hashes(folder, hashes)
    return manifest


def check_hashes(folder: Path, hashes: dict[str, str]) -> None:
    """Read files and compare their hashes; UserError, which names the file, or OSError if one is another."""
    for name, digest in hashes.items():
        require(file_hash(folder / name) == digest, f"{folder / name} is not what was written; build it again.")


@contextlib.contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Turn what the system says against writing to the cache into one line."""
    try:
        yield
    except OSError as error:
        # NumPy's has no number: it tells how many values it could not write.
        reason = short(error.strerror or f"{error}, as if the disk were full")
        raise UserError(
            f"the cache {short(str(cache), 300)} cannot be written ({reason}); make room there, or pass another place "
            "as --data.cache_dir."
        ) from None


def publish(folder: Path, scratch: Path, manifest: dict[str, Any], names: Set[str]) -> dict[str, Any]:
    """Add the manifest to what the scratch folder holds and rename that into its place, unless another was first.

    The manifest of the entry that is there at the end.
    """
    files = [file for file in sorted(scratch.rglob("*")) if file.is_file()]
    manifest["sha256"] = {str(file.relative_to(scratch)): file_hash(file) for file in files}
    manifest["checksum"] = checksum(manifest)
    (scratch / "manifest.json").write_bytes(sealed(manifest))
    sync_below(scratch)
    # Another may have been first, where there are no locks; what is no whole entry can only be a damaged one.
    found = read_manifest(folder, manifest["options"], names)
    if found is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    try:
        scratch.rename(folder)
    except OSError:
        found = read_manifest(folder, manifest["options"], names)
        if found is None:
            raise
        return found
    sync(folder.parent)
    return manifest


@contextlib.contextmanager
def scratch_of(folder: Path, show_progress: bool) -> Iterator[Path]:
    """The folder beside an entry in which it is built, empty, by one process at a time; gone at the end.

    Whoever comes second waits until it is the other's no more, because that one is done or dead.
    """
    with contextlib.ExitStack() as building:
        scratch = _take(folder, building, show_progress, take_scratch)
        inode = scratch.stat().st_ino
        try:
            yield scratch
        finally:
            with contextlib.suppress(OSError):
                if scratch.stat().st_ino == inode:  # not renamed into its place, with another's here since
                    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def workplace_of(folder: Path, show_progress: bool) -> Iterator[Path]:
    """As `scratch_of`, but what a process leaves that does not finish is there for the next one to go on from."""
    with contextlib.ExitStack() as building:
        yield _take(folder, building, show_progress, take_workplace)


def _take(folder: Path, building: contextlib.ExitStack, show_progress: bool, take_one: Take) -> Path:
    place = take_one(folder, building, show_progress)
    return _wait(folder, building, show_progress, take_one) if place is None else place


def take_scratch(folder: Path, building: contextlib.ExitStack, show_progress: bool) -> Path | None:
    """The scratch folder of an entry, held by `building`; None if another process has it.

    What killed builders of any entry left goes first. Where there are no locks, each has a folder of its own.
    """
    cache = folder.parent
    scratch = cache / f".building-{folder.name}"
    with locked(cache, wait=True) as sure:
        if sure is None:
            _tell_no_locks(cache, show_progress)
            return Path(tempfile.mkdtemp(prefix=f"{scratch.name}-", dir=cache))
        for left in cache.glob(".building-*"):
            with contextlib.suppress(OSError), locked(left) as abandoned:
                if abandoned:
                    shutil.rmtree(left, ignore_errors=True)
        try:
            scratch.mkdir()
        except FileExistsError:  # of one that lives
            return None
        building.enter_context(locked(scratch))
        return scratch


def take_workplace(folder: Path, building: contextlib.ExitStack, show_progress: bool) -> Path | None:
    """The folder in which the build of an entry goes on, held by `building`; None if another process has it.

    Where there are no locks, each has an empty folder of its own, which goes with it.
    """
    cache = folder.parent
    place = cache / f"{GOING_ON}{folder.name}"
    with locked(cache, wait=True) as sure:
        if sure is None:
            _tell_no_locks(cache, show_progress)
            alone = tempfile.mkdtemp(prefix=f"{place.name}-", dir=cache)
            building.callback(shutil.rmtree, alone, ignore_errors=True)
            return Path(alone)
        place.mkdir(exist_ok=True)
        with contextlib.ExitStack() as lock:
            if not lock.enter_context(locked(place)):
                return None
            building.push(lock.pop_all())
        return place


def _tell_no_locks(cache: Path, show_progress: bool) -> None:
    if show_progress:
        where = short(str(cache), 300)
        print(f"note: {where} has no locks, so nobody can tell who else builds there", file=sys.stderr)


def _wait(folder: Path, building: contextlib.ExitStack, show_progress: bool, take_one: Take) -> Path:
    """The folder of a build once the process that has it is done or dead, with a line for what is waited."""
    line = f"waiting for another process, which tokenises the same text for {short(str(folder), 300)}"
    hidden = None if show_progress else True
    with tqdm(desc=line, bar_format="{desc}: {elapsed}", disable=hidden) as bar:
        since, said, place = time.monotonic(), -1, None
        while place is None:
            minutes = int(time.monotonic() - since) // 60
            if show_progress and bar.disable and minutes > said:
                said = minutes
                print(f"{line}: {minutes} min so far" if minutes else line, file=sys.stderr)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            bar.refresh()
            place = take_one(folder, building, show_progress)
    return place
