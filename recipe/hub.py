"""Names on the Hugging Face Hub: OWNER/NAME, or OWNER/NAME@REVISION, wherever a folder may be named too.

A folder here comes first, and what begins with the name of a folder here is a path, so that a misspelt run is not asked
of the Hub. Whatever is asked is said in one line on stderr; the libraries behind it are kept from adding theirs.
"""

import contextlib
import fnmatch
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config import UserError
from recipe.reading import short

NAME = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_][\w.-]*(@[\w./-]+)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
PATIENCE = 10.0
"""Seconds in which the Hub must answer the first question; the libraries alone would ask six times over."""
LIBRARIES = ("huggingface_hub", "datasets", "fsspec", "httpx", "httpx2", "urllib3")
"""Loggers that speak of every attempt."""
LONGEST_REASON = 200


class NotHad(Exception):
    """The Hub does not give what is asked for; the text is why, to stand in a message."""


class Unreachable(NotHad):
    """The Hub cannot be asked."""


class Wanted(NamedTuple):
    """Which files of a repository are fetched, and which of them it must have."""

    what: str
    patterns: tuple[str, ...]
    needed: tuple[str, ...]
    """Patterns, of each of which a file must be there."""


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
TOKENIZER = Wanted("tokenizer", TOKENIZER_FILES, ("tokenizer.json",))
WEIGHTS = Wanted(
    "weights",
    ("model*.safetensors", "*.json", "*.txt", "*.jinja", "additional_chat_templates/*.jinja"),
    ("config.json", "model*.safetensors"),
)


def is_hub_name(name: str | Path) -> bool:
    """Whether a name that is no folder or file here may be one of the Hub's."""
    match = NAME.fullmatch(str(name))
    if match is None or match["owner"] is None:
        return False
    return not os.path.exists(name) and not os.path.isdir(match["owner"])


def weights_folder(name: str | Path) -> Path:
    """The weights folder meant: one here, or the copy of the Hub's in its cache, fetched first where it must be.

    A name that is neither a folder here nor a possible one of the Hub's is returned as a path, for whoever reads it
    to refuse. UserError if the Hub has no such weights, or cannot be asked and the cache lacks them.
    """
    if not is_hub_name(name):
        return Path(name)
    try:
        return _folder(str(name), WEIGHTS)
    except NotHad as reason:
        raise UserError(
            f"{name} is not a folder, and {reason}; name a run folder, a Hugging Face weights folder or OWNER/NAME."
        ) from None


def tokenizer_folder(name: str) -> Path:
    """The folder in the Hub's cache with a repository's tokenizer.json and what belongs to it.

    Here a name may lack its owner, as the oldest on the Hub do. `NotHad` if there is none to be had.
    """
    match = NAME.fullmatch(name)
    if not match or name.endswith(".json"):
        raise NotHad("it is no name of the Hub's")
    if match["owner"] and os.path.isdir(match["owner"]):
        raise NotHad(f"{match['owner']} is a folder here, so the Hub is not asked")
    return _folder(name, TOKENIZER)


def pinned(name: str, folder: Path) -> str:
    """The name with the commit that was taken, if that is what the folder holds: what a run records."""
    from_hub = is_hub_name(name) and folder.parent.name == "snapshots"
    return f"{name.partition('@')[0]}@{folder.name}" if from_hub else name


def reach(name: str, kind: str) -> None:
    """Say that the Hub is asked for a repository, and raise `NotHad` if it does not have it or does not answer.

    `kind` is "model" or "dataset". Where a library would try again for half a minute, this asks once.
    """
    _ask(name.partition("@")[0], name.partition("@")[2] or None, kind)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A stretch in which the libraries behind the Hub log errors alone; several may overlap."""
    with _Silence.lock:
        _Silence.depth += 1
        if _Silence.depth == 1:
            _Silence.before = {library: logging.getLogger(library).level for library in LIBRARIES}
            for library in LIBRARIES:
                logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _Silence.lock:
            _Silence.depth -= 1
            if _Silence.depth == 0:
                for library, level in _Silence.before.items():
                    logging.getLogger(library).setLevel(level)


class _Silence:
    """How many stretches are quiet, and what the levels were before."""

    lock = threading.Lock()
    depth = 0
    before: dict[str, int] = {}  # noqa: RUF012 (one for the process)


_found: dict[tuple[str, str], Path] = {}
"""What this process has been given already, by what is wanted and name."""
_said: set[str] = set()
"""What this process has said that it asks for."""


def _folder(name: str, wanted: Wanted) -> Path:
    """The snapshot of a repository with the files that are wanted."""
    known = _found.get((wanted.what, name))
    if known is None or not known.is_dir():
        known = _found[wanted.what, name] = _fetch(name, wanted)
    return known


def _fetch(name: str, wanted: Wanted) -> Path:
    repository, _, revision = name.partition("@")
    if COMMIT.fullmatch(revision) and (cached := _cached(repository, revision, wanted)):
        return cached  # a commit never changes
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        info = _ask(repository, revision or None, "model", files_metadata=True)
    except Unreachable as unreachable:
        cached = _cached(repository, revision or "main", wanted)
        if cached is None:
            raise NotHad(f"{unreachable}, and its cache has no such {wanted.what}") from None
        print(f"note: {unreachable}; the {wanted.what} in the cache are taken, {cached.name[:12]}", file=sys.stderr)
        return cached
    files = {file.rfilename: file.size or 0 for file in info.siblings or () if _is_wanted(file.rfilename, wanted)}
    for pattern in wanted.needed:
        if not fnmatch.filter(files, pattern):
            raise NotHad(f"{repository} on the Hub has no {pattern}")
    try:
        with quiet(), _bars():
            _download(repository, info.sha, files, hf_hub_download)
            options: dict[str, Any] = dict(revision=revision or None, allow_patterns=list(files))
            return Path(snapshot_download(repository, **options))  # all is there; this notes which commit it was
    except Exception as error:  # the network, the disk, a repository whose terms are not accepted
        raise NotHad(f"{repository} cannot be fetched from the Hub ({_reason(error)})") from None


def _download(repository: str, commit: str, files: dict[str, int], download: Callable[..., str]) -> None:
    """Fetch what the cache lacks, file by file, each said if it takes a while."""
    from huggingface_hub import try_to_load_from_cache

    missing = [name for name in files if not isinstance(try_to_load_from_cache(repository, name, revision=commit), str)]
    if not missing:
        return
    size, began = sum(files[name] for name in missing), time.monotonic()
    print(f"fetching {len(missing)} files of {repository}, {_size(size)}", file=sys.stderr)
    for number, name in enumerate(missing, start=1):
        if files[name] >= LARGE and not sys.stderr.isatty():  # a terminal has the library's bar
            print(f"fetching {name}, {_size(files[name])} ({number}/{len(missing)})", file=sys.stderr)
        download(repository, name, revision=commit)
    print(f"fetched in {time.monotonic() - began:,.0f} s", file=sys.stderr)


LARGE = 50_000_000
"""Bytes of a file whose fetching is said."""


def _size(count: int) -> str:
    """Bytes as people say them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """The library's bars where a terminal shows them, and nowhere else."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _ask(repository: str, revision: str | None, kind: str, **options: Any) -> Any:
    """What the Hub says of a repository; `NotHad` if it has none, `Unreachable` if it does not answer."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise Unreachable("the Hub is not asked, as HF_HUB_OFFLINE is set")
    asked = f"{repository}{f'@{revision}' if revision else ''}"
    if asked not in _said:
        _said.add(asked)
        print(f"asking the Hub for {short(asked, LONGEST_REASON)}", file=sys.stderr, flush=True)
    try:
        with quiet():
            return HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=PATIENCE, **options)
    except GatedRepoError:
        raise NotHad(f"{repository} is gated (accept its terms on its page, then run: hf auth login)") from None
    except RepositoryNotFoundError:
        raise NotHad(f"the Hub has no {kind} {repository}, or it is private (then run: hf auth login)") from None
    except RevisionNotFoundError:
        raise NotHad(f"{repository} on the Hub has no revision {revision}") from None
    except HFValidationError as error:
        raise NotHad(f"no name of the Hub's: {_reason(error)}") from None
    except Exception as error:  # whatever the network and the libraries between raise
        raise Unreachable(f"the Hub cannot be reached ({_reason(error)})") from None


def _cached(repository: str, revision: str, wanted: Wanted) -> Path | None:
    """The snapshot in the cache, if it has all that is needed: the index's files too, where there is an index."""
    from huggingface_hub import try_to_load_from_cache

    first = try_to_load_from_cache(repository, wanted.needed[0], revision=revision)
    if not isinstance(first, str):
        return None
    folder = Path(first).parent
    names = [file.name for file in folder.iterdir() if file.exists()]
    whole = all(fnmatch.filter(names, pattern) for pattern in wanted.needed)
    return folder if whole and not _lacks_shards(names) else None


def _lacks_shards(names: Sequence[str]) -> bool:
    """Whether of `model-00001-of-00003.safetensors` and its like fewer are there than the names count."""
    shards = [match for name in names if (match := re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", name))]
    return any(len(shards) < int(shard[1]) for shard in shards)


def _is_wanted(name: str, wanted: Wanted) -> bool:
    """Whether a file is of a wanted kind, at the top or where a pattern says; `*` of a pattern means no folder."""
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in wanted.patterns
    )


def _reason(error: BaseException) -> str:
    """A library's complaint as one line, its address and its advice left out."""
    said = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
    return short(said or type(error).__name__, LONGEST_REASON).rstrip(".")
