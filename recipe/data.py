"""From documents to `batch(step)`: hold out, tokenise, cut into windows. The same bytes for both frameworks.

The cache is plain: train.npy, validation.npy, tokenizer.json and manifest.json in a folder named by a hash of the
corpus, the tokenizer and every option; it is built beside its place by one process at a time, forced to disk and
renamed into it.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from recipe.config import DataConfig, UserError, require
from recipe.corpus import Documents, load_documents
from recipe.durable import make_folder, sync, sync_below
from recipe.lock import locked
from recipe.reading import read_json, short, take
from recipe.tokenizer import Tokenizer, library_version, load_tokenizer, train_bpe

FORMAT = 2
"""Raised when the meaning of the cached files changes."""
CACHED = {"train.npy", "validation.npy", "tokenizer.json"}
HELD_OUT_PLAYS = slice(9, None, 19)
"""Of the 38 plays by name: Henry IV, Part 1 and The Comedy of Errors."""
NEAR = 1000
"""Characters at most by which a cut moves to a blank line, the end of a line, or a space."""
CHARACTERS_AT_ONCE = 2**20
SECONDS_BETWEEN_LOOKS = 0.2
"""How often a process that waits for another's cache entry looks whether it is there."""


class Split(NamedTuple):
    """Texts to train on and texts held out."""

    train: list[str]
    validation: list[str]


class Dataset:
    """Tokens of one corpus; batches are pure functions of (seed, step)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        train_tokens: np.ndarray,
        validation_tokens: np.ndarray,
        *,
        bytes_per_token: float,
        leaking_fraction: float | None,
        seed: int,
        said: str = "",
    ) -> None:
        """`leaking_fraction` is the share of stride-1 windows held out under leaking-windows, else None.

        `said` is one line on what was read of the corpus, or empty.
        """
        self.tokenizer = tokenizer
        self.train_tokens, self.validation_tokens = train_tokens, validation_tokens
        self.bytes_per_token = bytes_per_token
        self.leaking_fraction, self.seed, self.said = leaking_fraction, seed, said
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)
        self._leaking_starts = functools.lru_cache(maxsize=2)(self._split_windows)

    def batch(
        self, step: int, *, accumulation: int, batch_size: int, sequence_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """inputs_ABT, targets_ABT (int32) of update `step`, counted from 0; targets are one token ahead.

        Every window of an epoch is used once, in an order drawn from (seed, epoch); a batch may straddle epochs.
        """
        starts = self._train_starts(sequence_length)
        per_step = accumulation * batch_size
        index = np.arange(step * per_step, (step + 1) * per_step)
        epochs, places = np.divmod(index, len(starts))
        chosen = np.empty(per_step, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = starts[self._permutation(int(epoch), len(starts))[places[here]]]
        inputs, targets = _windows(self.train_tokens, chosen, sequence_length)
        shape = accumulation, batch_size, sequence_length
        return inputs.reshape(shape), targets.reshape(shape)

    def validation_batches(
        self, batch_size: int, sequence_length: int, tokens: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """inputs_BT, targets_BT (int32): always the same first windows, whole batches within the budget of `tokens`.

        At least one batch; fewer rows than `batch_size` if the held-out text is shorter than one.
        """
        starts = self._validation_starts(sequence_length)
        rows = min(batch_size, len(starts))
        count = max(1, min(tokens // (rows * sequence_length), len(starts) // rows))
        for first in range(0, count * rows, rows):
            yield _windows(self.held_out_tokens, starts[first : first + rows], sequence_length)

    def check_length(self, sequence_length: int) -> None:
        """Raise UserError if the training text or the held-out text is shorter than one window."""
        self._train_starts(sequence_length)
        self._validation_starts(sequence_length)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the training tokens, by which a resumed run knows its text."""
        return hashlib.sha256(np.ascontiguousarray(self.train_tokens).data).hexdigest()

    @property
    def held_out_tokens(self) -> np.ndarray:
        """What is evaluated on; under leaking-windows the training tokens themselves."""
        return self.validation_tokens if self.leaking_fraction is None else self.train_tokens

    def _train_starts(self, sequence_length: int) -> np.ndarray:
        if self.leaking_fraction is None:
            return _starts(self.train_tokens, sequence_length, "training")
        return self._leaking_starts(sequence_length)[0]

    def _validation_starts(self, sequence_length: int) -> np.ndarray:
        if self.leaking_fraction is None:
            return _starts(self.validation_tokens, sequence_length, "held-out")
        return self._leaking_starts(sequence_length)[1]

    def _split_windows(self, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """The notebook's protocol: all stride-1 windows in random order, the first share of them held out."""
        assert self.leaking_fraction is not None, "only leaking-windows splits windows"
        _starts(self.train_tokens, sequence_length, "training")
        starts = _generator(self.seed, 2**31).permutation(len(self.train_tokens) - sequence_length)
        require(
            len(starts) > 1,
            f"sequence_length={sequence_length} leaves one window, and leaking-windows needs one to train on and one "
            "to hold out; lower --sequence_length or name a longer corpus.",
        )
        held_out = min(len(starts) - 1, max(1, round(self.leaking_fraction * len(starts))))
        return starts[held_out:], starts[:held_out]

    def _permute(self, epoch: int, windows: int) -> np.ndarray:
        return _generator(self.seed, epoch).permutation(windows)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def _starts(tokens: np.ndarray, sequence_length: int, which: str) -> np.ndarray:
    """Starts of the non-overlapping windows; ValueError if there is none."""
    windows = (len(tokens) - 1) // sequence_length
    require(
        windows > 0,
        f"sequence_length={sequence_length} needs {sequence_length + 1} tokens, the {which} text has {len(tokens)}; "
        "lower --sequence_length or name a longer corpus.",
    )
    return np.arange(windows, dtype=np.int64) * sequence_length


def _windows(tokens: np.ndarray, starts: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    view = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)
    windows = view[starts].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def prepare(config: DataConfig, *, seed: int, show_progress: bool, tokenizer: Tokenizer | None = None) -> Dataset:
    """The dataset that the configuration describes, from the cache or built into it.

    `tokenizer`, if it is given, stands for the one that the configuration names.
    """
    documents = load_documents(config)
    split = split_documents(documents, config, seed)
    given = load_tokenizer(config.tokenizer) if tokenizer is None and config.tokenizer != "bpe" else tokenizer
    options = {
        "format": FORMAT,
        "corpus": documents.identity,
        "tokenizer": f"bpe {config.bpe_vocab_size} by tokenizers {library_version()}"
        if given is None
        else hashlib.sha256(given.identity.encode()).hexdigest(),
        "max_tokens": config.max_tokens,
        "split": config.split,
        "train": _digest(split.train),
        "validation": _digest(split.validation),
    }
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_folder(config) / key
    manifest = _read_manifest(folder, options, tell=True)
    if manifest is None:
        manifest = _build(folder, split, given, config, options, show_progress)
    return Dataset(
        load_tokenizer(folder) if given is None else given,
        np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False),
        np.load(folder / "validation.npy", mmap_mode="r", allow_pickle=False),
        bytes_per_token=manifest["bytes_per_token"],
        leaking_fraction=config.validation_fraction if config.split == "leaking-windows" else None,
        seed=seed,
        said=documents.said,
    )


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} ".encode() + text.encode())
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_folder(config: DataConfig) -> Path:
    """Where caches lie: `cache_dir`, else $QWEN_FROM_SCRATCH_CACHE, else ~/.cache/qwen-from-scratch."""
    named = config.cache_dir or os.environ.get("QWEN_FROM_SCRATCH_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "qwen-from-scratch"
    except RuntimeError:
        raise UserError("no home folder is known, so no place for the cache; pass --data.cache_dir FOLDER.") from None


def split_documents(documents: Documents, config: DataConfig, seed: int) -> Split:
    """Two of the plays, so that losses compare between runs; of other corpora a share of the characters.

    Whole documents are held out, drawn by the seed, until a tenth of the share at most is missing or too much (of what
    is left to train on, if that is less). Where no whole document fits, the longest is cut, and its end is held out.
    leaking-windows holds out none here.
    """
    texts = documents.texts
    if config.split == "leaking-windows":
        return Split(texts, [])
    if config.corpus == "shakespeare" and config.max_documents is None:
        held_out = set(range(len(texts))[HELD_OUT_PLAYS])
        return Split(
            [text for index, text in enumerate(texts) if index not in held_out],
            [text for index, text in enumerate(texts) if index in held_out],
        )
    total = sum(map(len, texts))
    wanted = min(max(1, round(config.validation_fraction * total)), total - 1)
    slack = min(wanted, total - wanted) // 10
    held_out, missing = set(), wanted
    for index in _generator(seed, 2**30).permutation(len(texts)).tolist():
        if missing > slack and len(texts[index]) <= missing + slack:
            held_out.add(index)
            missing -= len(texts[index])
    train = [text for index, text in enumerate(texts) if index not in held_out]
    validation = [text for index, text in enumerate(texts) if index in held_out]
    if missing > slack or not validation:
        text = max(train, key=lambda text: len(text.strip()))
        cuttable = len(text.strip()) > 1
        require(
            cuttable or len(texts) > 1,
            "the corpus is a single character, so nothing can be held out; name a longer one.",
        )
        if cuttable:
            cut = _cut(text, missing, min(slack, NEAR))
            train[train.index(text)] = text[:cut]
            validation.append(text[cut:])
        elif not validation:
            validation.append(train.pop())
    return Split(train, validation)


def _cut(text: str, end: int, near: int) -> int:
    """Where to cut the text so that some `end` characters come after and neither part is blank.

    After the last blank line, line or space of the `near` characters before that place, else just there.
    """
    first, last = len(text) - len(text.lstrip()) + 1, len(text.rstrip()) - 1
    cut = min(max(len(text) - end, first), last)
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, max(first, cut - near), cut)
        if place >= 0:
            return place + len(mark)
    return cut


def _read_manifest(folder: Path, options: dict, *, tell: bool = False) -> dict[str, Any] | None:
    """The manifest of a whole cache entry; None if there is none, or if it is damaged and must be built again.

    With `tell`, what is damaged is named on stderr.
    """
    if not os.path.lexists(folder):
        return None
    try:
        return _check_entry(folder, options)
    except (OSError, UserError) as error:
        if tell:
            reason = short(str(error).partition(";")[0], 300)
            print(f"note: the cache entry {short(str(folder), 300)} is damaged: {reason}", file=sys.stderr)
            print("note: it is not used, but built again", file=sys.stderr)
        return None


def _check_entry(folder: Path, options: dict) -> dict[str, Any]:
    """The manifest of a cache entry; UserError or OSError if a bit of it or of the files it names is another."""
    file = folder / "manifest.json"
    manifest = read_json(file)
    remedy = "build it again."
    whole = take(manifest, "checksum", str, str(file)) == _checksum(manifest)
    require(whole, f"{file} is not what was written; {remedy}")
    hashes = take(manifest, "sha256", dict[str, str], str(file))
    require(hashes.keys() >= CACHED and manifest.get("options") == options, f"{file} is of another entry; {remedy}")
    for name, digest in hashes.items():
        require(_file_hash(folder / name) == digest, f"{folder / name} is not what was written; {remedy}")
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    """A hash of all that a manifest says besides."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _build(
    folder: Path, split: Split, tokenizer: Tokenizer | None, config: DataConfig, options: dict, show_progress: bool
) -> dict[str, Any]:
    """Tokenise and write the cache entry whole or not at all; the manifest of this one or of another's that was first.

    UserError if the cache cannot be written.
    """
    with contextlib.ExitStack() as building:
        with _writing(folder.parent):
            make_folder(folder.parent)
            scratch = building.enter_context(_scratch(folder, show_progress))
        found = _read_manifest(folder, options)
        if found is not None:
            return found
        if tokenizer is None:
            tokenizer = train_bpe(split.train, config.bpe_vocab_size)
        progress = dict(show_progress=show_progress)
        train = encode_texts(tokenizer, split.train, config.max_tokens, what="training text", **progress)
        validation = encode_texts(tokenizer, split.validation, what="held-out text", **progress)
        sample, tokens = (split.validation, validation) if split.validation else (split.train, train)
        size = sum(len(text.encode()) for text in sample)
        if config.max_tokens is not None and not split.validation:
            size = len(tokenizer.decode(train.tolist()).encode())
        manifest = {
            "options": options,
            "bytes_per_token": size / max(1, len(tokens)),
            "vocab_size": tokenizer.vocab_size,
            "train_tokens": len(train),
            "validation_tokens": len(validation),
        }
        with _writing(folder.parent):
            return _publish(folder, scratch, manifest, {"train": train, "validation": validation}, tokenizer)


@contextlib.contextmanager
def _writing(cache: Path) -> Iterator[None]:
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


def _publish(
    folder: Path, scratch: Path, manifest: dict[str, Any], arrays: dict[str, np.ndarray], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write the entry to the scratch folder and rename that into its place, unless another process has been first."""
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array, allow_pickle=False)
    tokenizer.save(scratch)
    files = [file for file in sorted(scratch.rglob("*")) if file.is_file()]
    manifest["sha256"] = {str(file.relative_to(scratch)): _file_hash(file) for file in files}
    manifest["checksum"] = _checksum(manifest)
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync_below(scratch)
    # Another may have been first, where there are no locks; what is no whole entry can only be a damaged one.
    found = _read_manifest(folder, manifest["options"])
    if found is not None:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    try:
        scratch.rename(folder)
    except OSError:
        found = _read_manifest(folder, manifest["options"])
        if found is None:
            raise
        return found
    sync(folder.parent)
    return manifest


@contextlib.contextmanager
def _scratch(folder: Path, show_progress: bool) -> Iterator[Path]:
    """The folder beside an entry in which it is built, empty, by one process at a time; gone at the end.

    Whoever comes second waits until it is the other's no more, because that one is done or dead.
    """
    with contextlib.ExitStack() as building:
        scratch = _take_scratch(folder, building, show_progress)
        if scratch is None:
            scratch = _wait_for_scratch(folder, building, show_progress)
        inode = scratch.stat().st_ino
        try:
            yield scratch
        finally:
            with contextlib.suppress(OSError):
                if scratch.stat().st_ino == inode:  # not renamed into its place, with another's here since
                    shutil.rmtree(scratch, ignore_errors=True)


def _take_scratch(folder: Path, building: contextlib.ExitStack, show_progress: bool) -> Path | None:
    """The scratch folder of an entry, held by `building`; None if another process has it.

    What killed builders of any entry left goes first. Where there are no locks, each has a folder of its own.
    """
    cache = folder.parent
    scratch = cache / f".building-{folder.name}"
    with locked(cache, wait=True) as sure:
        if sure is None:
            if show_progress:
                where = short(str(cache), 300)
                print(f"note: {where} has no locks, so nobody can tell who else builds there", file=sys.stderr)
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


def _wait_for_scratch(folder: Path, building: contextlib.ExitStack, show_progress: bool) -> Path:
    """The scratch folder of an entry once the process that has it is done or dead, with a line for what is waited."""
    line = f"waiting for another process, which tokenises the same text for {short(str(folder), 300)}"
    hidden = None if show_progress else True
    with tqdm(desc=line, bar_format="{desc}: {elapsed}", disable=hidden) as bar:
        since, said, scratch = time.monotonic(), -1, None
        while scratch is None:
            minutes = int(time.monotonic() - since) // 60
            if show_progress and bar.disable and minutes > said:
                said = minutes
                print(f"{line}: {minutes} min so far" if minutes else line, file=sys.stderr)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            bar.refresh()
            scratch = _take_scratch(folder, building, show_progress)
    return scratch


def encode_texts(
    tokenizer: Tokenizer, texts: list[str], limit: int | None = None, *, what: str = "", show_progress: bool = False
) -> np.ndarray:
    """Tokens of all texts with end-of-text after each, uint16 where the vocabulary allows; in parallel, in order.

    The first `limit` tokens, if it is given; `what` names the text in the progress.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    total = sum(map(len, texts))
    # A bar on a terminal, one plain line elsewhere.
    hidden = None if show_progress else True
    bar = tqdm(total=total, unit="char", unit_scale=True, desc=f"tokenising {what}", disable=hidden)
    if show_progress and bar.disable and total:
        print(f"tokenising {what}: {total:,} characters", file=sys.stderr)
    parts, batch, characters, count = [], [], 0, 0
    for index, text in enumerate(texts):
        batch.append(text)
        characters += len(text)
        if characters < CHARACTERS_AT_ONCE and index + 1 < len(texts):
            continue
        for ids in tokenizer.encode_batch(batch):
            parts.append(np.array([*ids, tokenizer.eos_id], dtype))
            count += len(ids) + 1
        bar.update(characters)
        batch, characters = [], 0
        if limit is not None and count >= limit:
            break
    bar.close()
    return np.concatenate(parts)[:limit] if parts else np.zeros(0, dtype)
