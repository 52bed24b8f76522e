"""Conversations as people keep them for fine-tuning: records with `messages`, as tokens of which some are trained on.

A chat template writes each as one text (`recipe/chat.py`); whole ones share rows (`recipe/packing.py`).
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors
from tqdm import tqdm

from recipe.chat import ChatTemplate, Span
from recipe.config import DataConfig, UserError, require
from recipe.corpus import HUB, LONE_SURROGATE, Tally, hub_records, json_lines, kind_of_file, local_files
from recipe.packing import IGNORE, best_fit_decreasing
from recipe.reading import kind_of, short, some
from recipe.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
TOGETHER = 256
"""Conversations tokenised at once, in parallel."""

Message = Mapping[str, Any]


class Conversation(NamedTuple):
    """A checked record; `where` is its place in messages."""

    where: str
    messages: list[Message]

    @property
    def size(self) -> int:
        """Characters of its contents."""
        return sum(len(turn["content"]) for turn in self.messages)


class Read(NamedTuple):
    """What a corpus holds: `identity` changes when any conversation does, `said` is one line on it."""

    conversations: list[Conversation]
    identity: str
    said: str


def read_conversations(config: DataConfig) -> Read:
    """The conversations of `config.corpus`, the first `max_documents` of them: a JSONL file, a folder of them, or hub:.

    UserError, which names the file and the line, for a record that is none. Those in which the assistant says nothing
    are counted and left out.
    """
    tally, silent, kept, digest = Tally(), 0, list[Conversation](), hashlib.sha256()
    for where, record in islice(_records(config.corpus, tally), config.max_documents):
        messages = _checked(record, where)
        if not any(turn["role"] == "assistant" for turn in messages):
            silent += 1
            continue
        kept.append(Conversation(where, messages))
        text = json.dumps(messages, ensure_ascii=False, sort_keys=True)
        digest.update(f"{len(text)} {text}".encode())
    said = ", ".join(part for part in (tally.said(), f"{len(kept):,} conversations") if part)
    said += f", {silent:,} without a word of the assistant's left out" if silent else ""
    require(
        len(kept) > 1,
        f"data.corpus={short(config.corpus, 300)} has {len(kept)} conversations in which the assistant speaks ({said});"
        " one is held out, so name a corpus with at least two.",
    )
    return Read(kept, digest.hexdigest(), said)


def _records(corpus: str, tally: Tally) -> Iterator[tuple[str, Any]]:
    if corpus.startswith(HUB):
        yield from ((where, record) for where, record, _ in hub_records(corpus.removeprefix(HUB)))
        return
    path = Path(corpus)
    files = [file for file, _ in local_files(path, tally) if file.suffix.lower() == ".jsonl"]
    require(
        bool(files),
        f"data.corpus={short(corpus, 300)} has no .jsonl file, and data.chat reads JSONL; convert it to one, or pass "
        "hub:FOLDER for what `datasets` reads, such as Parquet.",
    )
    for file in files:
        tally.read[kind_of_file(file)] += 1
        yield from ((where, record) for where, record, _, _ in json_lines(file))


def _checked(record: Any, where: str) -> list[Message]:
    """A record's messages; UserError if it has none, or one that is not a role and a content."""
    names = sorted(map(str, record)) if isinstance(record, dict) else []
    held = f"fields: {some(names)}" if isinstance(record, dict) else f"it is {kind_of(record)}"
    messages = record.get("messages") if isinstance(record, dict) else None
    form = 'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    require(isinstance(messages, list), f"{where} has no list of messages ({held}); {form}.")
    require(bool(messages), f"{where} has an empty list of messages; {form}, or leave it out.")
    assert isinstance(messages, list)
    for number, turn in enumerate(messages, 1):
        place = f"{where}, message {number}"
        require(isinstance(turn, dict), f"{place} is {kind_of(turn)}, not an object; {form}.")
        role, content = turn.get("role"), turn.get("content")
        require(role in ROLES, f"{place} has the role {short(repr(role))}; it must be one of {', '.join(ROLES)}.")
        require(
            isinstance(content, str),
            f"{place} has a content that is {kind_of(content)}, not a text; write what was said as one text.",
        )
        require(
            not LONE_SURROGATE.search(json.dumps(turn, ensure_ascii=False)),
            f"{place} holds half of a character (a lone surrogate), which no encoding has; mend it.",
        )
    return messages


class Side(NamedTuple):
    """Conversations one after another, to train on or held out."""

    tokens: np.ndarray
    trained: np.ndarray
    """Whether each token is the assistant's, bool."""
    ends: np.ndarray
    """Where each conversation ends among the tokens, int64."""

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are trained on, and the ones before them; a conversation's first has none before it."""
        first = np.zeros(len(self.tokens) + 1, bool)
        first[[0, *self.ends]] = True
        after = np.flatnonzero(self.trained & ~first[:-1])
        return self.tokens[after - 1], self.tokens[after]


def tokenised(
    tokenizer: Tokenizer, template: ChatTemplate, conversations: Sequence[Conversation], what: str, show_progress: bool
) -> Side:
    """The conversations as the template writes them. UserError, which names the record, if it refuses one."""
    with_offsets = RustTokenizer.from_str(tokenizer.rust.to_str())
    with_offsets.encode_special_tokens = tokenizer.rust.encode_special_tokens
    with_offsets.post_processor = processors.Sequence([])  # a byte-level one takes spaces out of the offsets
    added = tokenizer.rust.get_added_tokens_decoder().values()
    ends = sorted({token.content for token in added if token.special} | {tokenizer.eos_token}, key=len, reverse=True)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    bar = tqdm(total=len(conversations), desc=f"tokenising {what}", disable=None if show_progress else True)
    if show_progress and bar.disable:
        print(f"tokenising {what}: {len(conversations):,} conversations", file=sys.stderr)
    tokens, trained, lengths = [np.zeros(0, dtype)], [np.zeros(0, bool)], []
    for begin in range(0, len(conversations), TOGETHER):
        part = conversations[begin : begin + TOGETHER]
        written = []
        for one in part:
            try:
                written.append(template.conversation(one.messages, ends))
            except UserError as error:
                raise UserError(f"{one.where}: {error}") from None
        encodings = with_offsets.encode_batch([text for text, _ in written], add_special_tokens=False)
        for encoding, (_, spans) in zip(encodings, written, strict=True):
            tokens.append(np.array(encoding.ids, dtype))
            trained.append(of_spans(encoding.offsets, spans))
            lengths.append(len(encoding.ids))
        bar.update(len(part))
    bar.close()
    return Side(np.concatenate(tokens), np.concatenate(trained), np.cumsum(lengths, dtype=np.int64))


def of_spans(offsets: Sequence[Span], spans: Iterable[Span]) -> np.ndarray:
    """Which tokens have a character of a span, by the (first, past the last) characters of each."""
    begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    inside = np.zeros(len(begins), bool)
    for first, end in spans:
        inside |= (begins < end) & (ends > first)
    return inside


class Rows:
    """Whole conversations in rows of `length` tokens and the one that follows the last of them.

    What is longer than a row loses its end; what then has nothing that is trained on is left out.
    """

    def __init__(self, side: Side, length: int, filler: int) -> None:
        """`filler` is the token that fills a row up."""
        self.side, self.length, self.filler = side, length, filler
        begins = np.concatenate([[0], side.ends[:-1]])
        whole = side.ends - begins
        lengths = np.minimum(whole, length + 1)
        before = np.concatenate([[0], np.cumsum(side.trained)])
        # A first token is nobody's target.
        has = before[begins + lengths] > before[np.minimum(begins + 1, begins + lengths)]
        self.cut, self.left_out = int((whole > length + 1)[has].sum()), int((~has).sum())
        self.begins, self.lengths = begins[has], lengths[has]
        self.rows = best_fit_decreasing(self.lengths, length + 1)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, chosen: Iterable[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and documents (rows, T), int32: targets of others than the assistant are IGNORE, the first
        conversation of a row is document 0, and what fills it up is a document of its own."""
        chosen = list(chosen)
        shape = len(chosen), self.length + 1
        tokens, documents = np.full(shape, self.filler, np.int32), np.zeros(shape, np.int32)
        targets = np.full(shape, IGNORE, np.int32)
        for place, row in enumerate(chosen):
            end = 0
            for number, conversation in enumerate(self.rows[row]):
                first, end = end, end + int(self.lengths[conversation])
                begin = int(self.begins[conversation])
                own = slice(begin, begin + end - first)
                tokens[place, first:end] = self.side.tokens[own]
                documents[place, first:end] = number
                trained = self.side.trained[own].copy()
                trained[0] = False
                targets[place, first:end] = np.where(trained, tokens[place, first:end], IGNORE)
            documents[place, end:] = len(self.rows[row])
        return tokens[:, :-1], targets[:, 1:], documents[:, :-1]

    def said(self) -> str:
        """One line on how full the rows are, and what was cut or left out."""
        full = self.lengths.sum() / (len(self) * (self.length + 1))
        parts = [f"{len(self.lengths):,} conversations in {len(self):,} rows, {full:.1%} full"]
        parts += [f"{self.cut:,} longer than a row and cut"] * bool(self.cut)
        parts += [f"{self.left_out:,} of whose assistant nothing is left, not used"] * bool(self.left_out)
        return ", ".join(parts)


def hold_out(
    conversations: Sequence[Conversation], held_out: set[int]
) -> tuple[list[Conversation], list[Conversation]]:
    """To train on, and held out; never all, and never none: then the shortest one moves."""
    shortest = min(range(len(conversations)), key=lambda index: (conversations[index].size, index))
    if not held_out or len(held_out) == len(conversations):
        held_out = held_out ^ {shortest}
    sides: tuple[list[Conversation], list[Conversation]] = [], []
    for index, one in enumerate(conversations):
        sides[index in held_out].append(one)
    return sides
