"""From documents to `batch(step)`: hold out, tokenise, cut into windows. The same bytes for both frameworks.

The cache is plain: train.npy, validation.npy, tokenizer.json and manifest.json in a folder named by a hash of the
corpus, the tokenizer and every option (`recipe/cache.py`). What is larger than memory lies in shards instead.
"""

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from recipe.cache import cache_folder, key_of, publish, read_manifest, scratch_of, writing
from recipe.chat import template_of
from recipe.config import DataConfig, require
from recipe.conversations import Rows, Side, hold_out, read_conversations, tokenised
from recipe.corpus import Documents, load_documents
from recipe.durable import make_folder
from recipe.mixture import BLOCK, Schedule, Term, apportion, parse_mixture, shuffled
from recipe.packing import documents_by_end
from recipe.reading import short
from recipe.shards import Shards
from recipe.sources import SIDES
from recipe.streaming import Part, prepare_parts
from recipe.tokenizer import Tokenizer, library_version, load_tokenizer, train_bpe

Tokens = np.ndarray | Shards

FORMAT = 2
"""Raised when the meaning of the cached files changes."""
CHAT_FORMAT = "chat 1"
"""The same of conversations."""
HELD_OUT_ROWS = 2**29
"""Stream of random numbers that orders the rows of held-out conversations; epochs have the small ones."""
CACHED = {"train.npy", "validation.npy", "tokenizer.json"}
HELD_OUT_PLAYS = slice(9, None, 19)
"""Of the 38 plays by name: Henry IV, Part 1 and The Comedy of Errors."""
NEAR = 1000
"""Characters at most by which a cut moves to a blank line, the end of a line, or a space."""
CHARACTERS_AT_ONCE = 2**20
BASELINE_TOKENS = 2**22
"""Of each side of a streamed text, from which the losses to beat are counted."""


class Split(NamedTuple):
    """Texts to train on and texts held out."""

    train: list[str]
    validation: list[str]


class Dataset:
    """Tokens of one corpus; batches are pure functions of (seed, step)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        train_tokens: Tokens,
        validation_tokens: Tokens,
        *,
        bytes_per_token: float,
        leaking_fraction: float | None,
        seed: int,
        said: str = "",
        document_mask: bool = False,
    ) -> None:
        """`leaking_fraction` is the share of stride-1 windows held out under leaking-windows, else None.

        `said` is one line on what was read of the corpus, or empty. With `document_mask` batches say which document of
        its row each token is of, by the ends of text in it.
        """
        self.tokenizer = tokenizer
        self.train_tokens, self.validation_tokens = train_tokens, validation_tokens
        self.bytes_per_token = bytes_per_token
        self.leaking_fraction, self.seed, self.said = leaking_fraction, seed, said
        self.document_mask = document_mask
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)
        self._leaking_starts = functools.lru_cache(maxsize=2)(self._split_windows)

    def batch(
        self,
        step: int,
        *,
        accumulation: int,
        batch_size: int,
        sequence_length: int,
        rows: slice | None = None,
    ) -> tuple[np.ndarray, ...]:
        """inputs_ABT, targets_ABT (int32) of update `step`, counted from 0; targets are one token ahead.

        Where rows have documents that do not see each other, also documents_ABT, each token's within its row.
        Every window of an epoch is used once, in an order drawn from (seed, epoch); a batch may straddle epochs.
        `rows` are those of each micro-batch that are wanted, and read; None is all of them.
        """
        per_step = accumulation * batch_size
        index_AB = np.arange(step * per_step, (step + 1) * per_step).reshape(accumulation, batch_size)
        if rows is not None:
            index_AB = index_AB[:, rows]
        shape = (*index_AB.shape, sequence_length)
        batch = self._with_documents(*self._train_windows(index_AB.ravel(), sequence_length))
        return tuple(array.reshape(shape) for array in batch)

    def _with_documents(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
        if not self.document_mask:
            return inputs, targets
        return inputs, targets, documents_by_end(inputs, self.tokenizer.eos_id)

    def _train_windows(self, index: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of rows by their numbers, counted from the first row of the first update."""
        starts = self._train_starts(sequence_length)
        epochs, places = np.divmod(index, len(starts))
        chosen = np.empty(len(index), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = starts[self._permutation(int(epoch), len(starts))[places[here]]]
        return _windows(self.train_tokens, chosen, sequence_length)

    def validation_batches(
        self, batch_size: int, sequence_length: int, tokens: int
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """inputs_BT, targets_BT (int32), and documents_BT as a batch has them: always the same first windows, whole
        batches within the budget of `tokens`.

        At least one batch; fewer rows than `batch_size` if the held-out text is shorter than one.
        """
        starts = self._validation_starts(sequence_length)
        rows = min(batch_size, len(starts))
        count = max(1, min(tokens // (rows * sequence_length), len(starts) // rows))
        for first in range(0, count * rows, rows):
            yield self._with_documents(*_windows(self.held_out_tokens, starts[first : first + rows], sequence_length))

    def check_length(self, sequence_length: int) -> None:
        """Raise UserError if the training text or the held-out text is shorter than one window."""
        self._train_starts(sequence_length)
        self._validation_starts(sequence_length)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the training tokens, by which a resumed run knows its text."""
        return hashlib.sha256(np.ascontiguousarray(self.train_tokens).data).hexdigest()

    @property
    def held_out_tokens(self) -> Tokens:
        """What is evaluated on; under leaking-windows the training tokens themselves."""
        return self.validation_tokens if self.leaking_fraction is None else self.train_tokens

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """The training and held-out tokens from which the losses to beat are counted: all of them."""
        return np.asarray(self.train_tokens[:]), np.asarray(self.held_out_tokens[:])

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

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a text to go on from, as this dataset's model is asked."""
        return self.tokenizer.encode_prompt(text)

    def describe(self, sequence_length: int) -> str:
        """One line on what was read of the corpus, or empty."""
        return self.said

    def epochs(self, rows: int, sequence_length: int) -> float:
        """How often so many rows go through the training text."""
        return float(rows * sequence_length / len(self.train_tokens))

    def pairs(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
        """Of both sides the tokens trained on and those before them; None if that is all of `counted`."""
        return None


class ChatDataset(Dataset):
    """Conversations, of which the assistant's words are trained on; batches are pure functions of (seed, step), too."""

    def __init__(self, tokenizer: Tokenizer, train: Side, validation: Side, *, seed: int, said: str) -> None:
        text = tokenizer.decode(validation.tokens[validation.trained].tolist())
        super().__init__(
            tokenizer,
            train.tokens,
            validation.tokens,
            bytes_per_token=len(text.encode()) / max(1, int(np.count_nonzero(validation.trained))),
            leaking_fraction=None,
            seed=seed,
            said=said,
        )
        self.train, self.validation = train, validation
        self._rows = functools.lru_cache(maxsize=4)(self._pack)

    def _pack(self, side: str, sequence_length: int) -> Rows:
        rows = Rows(getattr(self, side), sequence_length, self.tokenizer.eos_id)
        which = "training" if side == "train" else "held-out"
        require(
            len(rows) > 0,
            f"sequence_length={sequence_length} cuts off all that the assistant says in the {which} conversations; "
            "raise --sequence_length.",
        )
        return rows

    def check_length(self, sequence_length: int) -> None:
        """Raise UserError if of no conversation to train on, or of none held out, a row has an assistant's word."""
        for side in SIDES:
            self._rows(side, sequence_length)

    def _with_documents(self, *batch: np.ndarray) -> tuple[np.ndarray, ...]:
        return batch

    def _train_windows(self, index: np.ndarray, sequence_length: int) -> tuple[np.ndarray, ...]:  # type: ignore[override]
        rows = self._rows("train", sequence_length)
        epochs, places = np.divmod(index, len(rows))
        chosen = [self._permutation(int(epoch), len(rows))[place] for epoch, place in zip(epochs, places, strict=True)]
        return rows.gather(chosen)

    def validation_batches(
        self, batch_size: int, sequence_length: int, tokens: int
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """As `Dataset` has them, with documents_BT; the budget counts all tokens, also those that nobody trains on."""
        packed = self._rows("validation", sequence_length)
        order = _generator(self.seed, HELD_OUT_ROWS).permutation(len(packed))  # the fullest rows were begun first
        rows = min(batch_size, len(packed))
        count = max(1, min(tokens // (rows * sequence_length), len(packed) // rows))
        for first in range(0, count * rows, rows):
            yield packed.gather(order[first : first + rows])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the training tokens, of which are trained on, and of where conversations end."""
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in self.train)).hexdigest()

    def pairs(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Of both sides the tokens that are the assistant's, and those before them."""
        return self.train.pairs(), self.validation.pairs()

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of the text as a user's message, which asks for an answer."""
        template = template_of(self.tokenizer, "the tokenizer")
        return self.tokenizer.encode(template.render([{"role": "user", "content": text}]))

    def describe(self, sequence_length: int) -> str:
        """One line on what was read, how it is packed, and what of it is trained on."""
        share = np.mean(self.train.trained)
        packed = "; ".join(
            f"{name}: {self._rows(side, sequence_length).said()}"
            for name, side in zip(("training", "held out"), SIDES, strict=True)
        )
        return f"{self.said}; {share:.1%} of the training tokens are the assistant's; {packed}"

    def epochs(self, rows: int, sequence_length: int) -> float:
        """How often so many rows go through all."""
        return rows / len(self._rows("train", sequence_length))


class StreamedDataset(Dataset):
    """Tokens of one corpus larger than memory, or of a mixture; batches are pure functions of (seed, step) here, too.

    Of a mixture each row comes from the corpus that `Schedule` says, and is the next window of that corpus' epoch.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        parts: Sequence[Part],
        weights: Sequence[Fraction],
        *,
        seed: int,
        document_mask: bool = False,
    ) -> None:
        """`weights` are those of the parts: shares of the rows, rounded to one in BLOCK."""
        self.parts, self.counts = list(parts), apportion(weights, BLOCK)
        self._schedule = Schedule(self.counts, seed)
        dtype = parts[0].train.dtype
        super().__init__(
            tokenizer,
            Shards([file for part in parts for file in part.train.files], dtype),
            Shards([file for part in parts for file in part.validation.files], dtype),
            bytes_per_token=sum(
                count * part.bytes_per_token / BLOCK for count, part in zip(self.counts, parts, strict=True)
            ),
            leaking_fraction=None,
            seed=seed,
            said=self._describe(),
            document_mask=document_mask,
        )

    def validation_batches(
        self, batch_size: int, sequence_length: int, tokens: int
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """As `Dataset` has them; of a mixture each corpus' first windows, in the shares that it is trained on.

        A corpus that is too short for its share shortens the evaluation, so that the shares stay.
        """
        windows = [_count(part.validation, sequence_length, "held-out") for part in self.parts]
        available = max(1, min(BLOCK * have // count for have, count in zip(windows, self.counts, strict=True)))
        rows = min(batch_size, available)
        total = rows * max(1, min(tokens // (rows * sequence_length), available // rows))
        chosen = [
            (part, place)
            for part, (wanted, have) in enumerate(zip(apportion(self.counts, total), windows, strict=True))
            for place in range(min(wanted, have))
        ]
        for first in range(0, total, rows):
            parts, places = np.array(chosen[first : first + rows], np.int64).T
            yield self._with_documents(*self._gather(parts, places, sequence_length, "validation"))

    def check_length(self, sequence_length: int) -> None:
        """Raise UserError if a corpus has less than one window to train on, or to evaluate on."""
        for part in self.parts:
            _count(part.train, sequence_length, "training")
            _count(part.validation, sequence_length, "held-out")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the training shards' hashes and of the shares; nothing is read for it."""
        mixed = [[count, part.hashes] for count, part in zip(self.counts, self.parts, strict=True)]
        return hashlib.sha256(json.dumps(mixed).encode()).hexdigest()

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """The first BASELINE_TOKENS at most of each side, of a mixture in its shares."""
        shares = apportion(self.counts, BASELINE_TOKENS)
        sides = ([getattr(part, side) for part in self.parts] for side in SIDES)
        train, held_out = (
            np.concatenate([tokens[:share] for tokens, share in zip(side, shares, strict=True)]) for side in sides
        )
        return train, held_out

    def _train_windows(self, index: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
        parts, rows = self._schedule(index)
        places = np.empty(len(index), np.int64)
        for part in np.unique(parts):
            windows = _count(self.parts[part].train, sequence_length, "training")
            epochs, within = np.divmod(rows, windows)
            for epoch in np.unique(epochs[parts == part]):
                here = (parts == part) & (epochs == epoch)
                places[here] = shuffled(within[here], windows, seed=self.seed, part=int(part), epoch=int(epoch))
        return self._gather(parts, places, sequence_length, "train")

    def _gather(
        self, parts: np.ndarray, places: np.ndarray, sequence_length: int, side: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of windows by their corpora and their numbers there."""
        inputs = np.empty((len(parts), sequence_length), np.int32)
        targets = np.empty_like(inputs)
        for part in np.unique(parts):
            here = parts == part
            starts = places[here] * sequence_length
            inputs[here], targets[here] = _windows(getattr(self.parts[part], side), starts, sequence_length)
        return inputs, targets

    def _describe(self) -> str:
        """One line on what was read; of a mixture with the shares of its corpora."""
        if len(self.parts) == 1:
            return self.parts[0].said
        shares = zip(self.counts, self.parts, strict=True)
        return "; ".join(f"{count / BLOCK:.2%} {short(part.corpus)}: {part.said}" for count, part in shares)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def _count(tokens: Tokens, sequence_length: int, which: str) -> int:
    """Number of the non-overlapping windows; UserError if there is none."""
    windows = (len(tokens) - 1) // sequence_length
    require(
        windows > 0,
        f"sequence_length={sequence_length} needs {sequence_length + 1} tokens, the {which} text has {len(tokens)}; "
        "lower --sequence_length or name a longer corpus.",
    )
    return windows


def _starts(tokens: Tokens, sequence_length: int, which: str) -> np.ndarray:
    """Starts of the non-overlapping windows; UserError if there is none."""
    windows = _count(tokens, sequence_length, which)
    return np.arange(windows, dtype=np.int64) * sequence_length


def _windows(tokens: Tokens, starts: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(tokens, Shards):
        windows = tokens.windows(starts, sequence_length + 1)
    else:
        windows = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[starts].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def prepare(config: DataConfig, *, seed: int, show_progress: bool, tokenizer: Tokenizer | None = None) -> Dataset:
    """The dataset that the configuration describes, from the cache or built into it.

    `tokenizer`, if it is given, stands for the one that the configuration names. With split=hashed the text streams
    through bounded memory into shards (`recipe/streaming.py`), else its documents are all read.
    """
    if config.chat:
        return _prepare_chat(config, tokenizer, seed, show_progress)
    if config.split == "hashed":
        given = load_tokenizer(config.tokenizer) if tokenizer is None and config.tokenizer != "bpe" else tokenizer
        terms = parse_mixture(config.corpus) or [Term(Fraction(1), config.corpus)]
        made, parts = prepare_parts(config, terms, given, cache_folder(config), show_progress)
        shares = [term.weight for term in terms]
        return StreamedDataset(made, parts, shares, seed=seed, document_mask=config.document_mask)
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
    folder = cache_folder(config) / key_of(options)
    manifest = read_manifest(folder, options, CACHED, tell=True)
    if manifest is None:
        manifest = _build(
            folder, options, CACHED, lambda: _tokenise(split, given, config, show_progress), show_progress
        )
    return Dataset(
        load_tokenizer(folder) if given is None else given,
        np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False),
        np.load(folder / "validation.npy", mmap_mode="r", allow_pickle=False),
        bytes_per_token=manifest["bytes_per_token"],
        leaking_fraction=config.validation_fraction if config.split == "leaking-windows" else None,
        seed=seed,
        said=documents.said,
        document_mask=config.document_mask,
    )


def _prepare_chat(config: DataConfig, tokenizer: Tokenizer | None, seed: int, show_progress: bool) -> ChatDataset:
    """The conversations that the configuration describes, from the cache or written by their template into it."""
    require(
        tokenizer is not None or config.tokenizer != "bpe",
        "data.chat needs a tokenizer with a chat template, and data.tokenizer=bpe has none; pass a chat model's folder "
        "as --init or --data.tokenizer.",
    )
    given = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
    template = template_of(given, config.tokenizer)
    read = read_conversations(config)
    found, _ = _drawn([one.size for one in read.conversations], config.validation_fraction, seed)
    conversations = hold_out(read.conversations, found)
    options = {
        "format": CHAT_FORMAT,
        "corpus": read.identity,
        "tokenizer": hashlib.sha256(given.identity.encode()).hexdigest(),
        "template": hashlib.sha256(json.dumps([template.source, template.special_tokens]).encode()).hexdigest(),
        "held_out": hashlib.sha256(json.dumps([one.where for one in conversations[1]]).encode()).hexdigest(),
    }
    folder = cache_folder(config) / key_of(options)
    files = {f"{side}-{array}.npy" for side in SIDES for array in Side._fields}

    def make() -> tuple[dict[str, Any], dict[str, np.ndarray], Tokenizer]:
        arrays: dict[str, np.ndarray] = {}
        for side, part, what in zip(SIDES, conversations, ("training text", "held-out text"), strict=True):
            made = tokenised(given, template, part, what, show_progress)
            arrays |= {f"{side}-{name}": array for name, array in made._asdict().items()}
        return {}, arrays, given

    if read_manifest(folder, options, files, tell=True) is None:
        _build(folder, options, files, make, show_progress)
    train, validation = (
        Side(*(np.load(folder / f"{side}-{array}.npy", mmap_mode="r", allow_pickle=False) for array in Side._fields))
        for side in SIDES
    )
    return ChatDataset(given, train, validation, seed=seed, said=read.said)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} ".encode() + text.encode())
    return digest.hexdigest()


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
    held_out, (missing, slack) = _drawn([len(text) for text in texts], config.validation_fraction, seed)
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


def _drawn(sizes: Sequence[int], fraction: float, seed: int) -> tuple[set[int], tuple[int, int]]:
    """Which documents of these sizes are held out, drawn by the seed; what is then missing of their share of the whole,
    and how much may be."""
    total = sum(sizes)
    wanted = min(max(1, round(fraction * total)), total - 1)
    slack = min(wanted, total - wanted) // 10
    held_out, missing = set(), wanted
    for index in _generator(seed, 2**30).permutation(len(sizes)).tolist():
        if missing > slack and sizes[index] <= missing + slack:
            held_out.add(index)
            missing -= sizes[index]
    return held_out, (missing, slack)


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


def _build(
    folder: Path,
    options: dict,
    names: set[str],
    make: Callable[[], tuple[dict[str, Any], dict[str, np.ndarray], Tokenizer]],
    show_progress: bool,
) -> dict[str, Any]:
    """Write the cache entry of what `make` makes whole or not at all; the manifest of this one or of another's that was
    first. Its files are `names`.

    UserError if the cache cannot be written.
    """
    with contextlib.ExitStack() as building:
        with writing(folder.parent):
            make_folder(folder.parent)
            scratch = building.enter_context(scratch_of(folder, show_progress))
        found = read_manifest(folder, options, names)
        if found is not None:
            return found
        facts, arrays, tokenizer = make()
        with writing(folder.parent):
            for name, array in arrays.items():
                np.save(scratch / f"{name}.npy", array, allow_pickle=False)
            tokenizer.save(scratch)
            return publish(folder, scratch, {"options": options, **facts}, names)


def _tokenise(
    split: Split, tokenizer: Tokenizer | None, config: DataConfig, show_progress: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray], Tokenizer]:
    """What a manifest says of these texts, their tokens, and the tokenizer, trained on them if there is none."""
    if tokenizer is None:
        tokenizer = train_bpe(split.train, config.bpe_vocab_size)
    progress = dict(show_progress=show_progress)
    train = encode_texts(tokenizer, split.train, config.max_tokens, what="training text", **progress)
    validation = encode_texts(tokenizer, split.validation, what="held-out text", **progress)
    sample, tokens = (split.validation, validation) if split.validation else (split.train, train)
    size = sum(len(text.encode()) for text in sample)
    if config.max_tokens is not None and not split.validation:
        size = len(tokenizer.decode(train.tolist()).encode())
    facts = {
        "bytes_per_token": size / max(1, len(tokens)),
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": len(train),
        "validation_tokens": len(validation),
    }
    return facts, {"train": train, "validation": validation}, tokenizer


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
