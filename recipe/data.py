"""From documents to `batch(step)`: hold out, tokenise, cut into windows. The same bytes for both frameworks.

The cache is plain: train.npy, validation.npy, tokenizer.json and manifest.json in a folder named by a hash of the
corpus, the tokenizer and every option; it is built beside its place and renamed into it.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from recipe.config import DataConfig, require
from recipe.corpus import Documents, load_documents
from recipe.tokenizer import Tokenizer, library_version, load_tokenizer, train_bpe

FORMAT = 1
"""Raised when the meaning of the cached files changes."""
HELD_OUT_PLAYS = slice(9, None, 19)
"""Of the 38 plays by name: Henry IV, Part 1 and The Comedy of Errors."""
CHARACTERS_AT_ONCE = 2**20


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
    ) -> None:
        """`leaking_fraction` is the share of stride-1 windows held out under leaking-windows, else None."""
        self.tokenizer = tokenizer
        self.train_tokens, self.validation_tokens = train_tokens, validation_tokens
        self.bytes_per_token = bytes_per_token
        self.leaking_fraction, self.seed = leaking_fraction, seed
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
        held_out = max(1, round(self.leaking_fraction * len(starts)))
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


def prepare(config: DataConfig, *, seed: int, show_progress: bool) -> Dataset:
    """The dataset that the configuration describes, from the cache or built into it."""
    documents = load_documents(config)
    split = split_documents(documents, config, seed)
    given = None if config.tokenizer == "bpe" else load_tokenizer(config.tokenizer)
    options = {
        "format": FORMAT,
        "corpus": documents.identity,
        "tokenizer": f"bpe {config.bpe_vocab_size} by tokenizers {library_version()}"
        if given is None
        else hashlib.sha256(given.identity.encode()).hexdigest(),
        "max_tokens": config.max_tokens,
        "split": config.split,
        "validation": hashlib.sha256("\0".join(split.validation).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_folder(config) / key
    manifest = _read_manifest(folder, options)
    if manifest is None:
        manifest = _build(folder, split, given, config, options, show_progress)
    return Dataset(
        load_tokenizer(folder) if given is None else given,
        np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False),
        np.load(folder / "validation.npy", mmap_mode="r", allow_pickle=False),
        bytes_per_token=manifest["bytes_per_token"],
        leaking_fraction=config.validation_fraction if config.split == "leaking-windows" else None,
        seed=seed,
    )


def cache_folder(config: DataConfig) -> Path:
    """Where caches lie: `cache_dir`, else $QWEN_FROM_SCRATCH_CACHE, else ~/.cache/qwen-from-scratch."""
    named = config.cache_dir or os.environ.get("QWEN_FROM_SCRATCH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "qwen-from-scratch"


def split_documents(documents: Documents, config: DataConfig, seed: int) -> Split:
    """Whole documents held out; a single document is cut at a line break; leaking-windows holds out none here.

    Of the plays two fixed ones, so that losses compare between runs; of other corpora a share drawn by the seed.
    """
    texts = documents.texts
    if config.split == "leaking-windows":
        return Split(texts, [])
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1.0 - config.validation_fraction))
        cut = texts[0].rfind("\n", 0, cut) + 1 or cut
        return Split([texts[0][:cut]], [texts[0][cut:]])
    if config.corpus == "shakespeare" and config.max_documents is None:
        held_out = set(range(len(texts))[HELD_OUT_PLAYS])
    else:
        count = min(len(texts) - 1, max(1, round(config.validation_fraction * len(texts))))
        held_out = set(_generator(seed, 2**30).permutation(len(texts))[:count].tolist())
    return Split(
        [text for index, text in enumerate(texts) if index not in held_out],
        [text for index, text in enumerate(texts) if index in held_out],
    )


def _read_manifest(folder: Path, options: dict) -> dict | None:
    """The manifest of a whole cache entry; None if it is missing or damaged, in which case it is built again."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name in ("train", "validation"):
            tokens = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if hashlib.sha256(tokens.tobytes()).hexdigest() != manifest[f"{name}_sha256"]:
                return None
        load_tokenizer(folder)
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return manifest if manifest.get("options") == options else None


def _build(
    folder: Path, split: Split, tokenizer: Tokenizer | None, config: DataConfig, options: dict, show_progress: bool
) -> dict:
    """Tokenise and write the cache entry whole or not at all."""
    if tokenizer is None:
        tokenizer = train_bpe(split.train, config.bpe_vocab_size)
    train = encode_texts(tokenizer, split.train, config.max_tokens, what="training text", show_progress=show_progress)
    validation = encode_texts(tokenizer, split.validation, what="held-out text", show_progress=show_progress)
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
        "train_sha256": hashlib.sha256(train.tobytes()).hexdigest(),
        "validation_sha256": hashlib.sha256(validation.tobytes()).hexdigest(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    np.save(scratch / "train.npy", train, allow_pickle=False)
    np.save(scratch / "validation.npy", validation, allow_pickle=False)
    tokenizer.save(scratch)
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # only ever a damaged entry
    try:
        scratch.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(scratch)
    return manifest


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
