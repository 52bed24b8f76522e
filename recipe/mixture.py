"""Which window of which corpus a row is: closed formulas of the seed and the row, with no list as long as the text.

`0.7*a.jsonl + 0.3*hub:x/y` is a mixture of corpora. Rows come in blocks; in each block every corpus has the same number
of rows, in an order drawn from the seed and the block, so that the rows drawn of a corpus before any row are known.
"""

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

BLOCK = 2**12
"""Rows of a block: shares are multiples of one in so many."""
ROUNDS = 12
"""Of the Feistel network; even, so that its two halves end with the widths they began with."""
SCHEDULE, WINDOWS = 2**62, 2**61
"""Beyond the streams of random numbers that others draw from."""
EPOCHS = 2**40
"""No corpus is gone through so often."""
TERM = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*\*\s*(.*?)\s*", re.DOTALL)
"""A weight and a corpus."""
PLUS = re.compile(r"\s\+\s(?=\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*\*)")
"""A plus sign between spaces, before the next weight."""


class Term(NamedTuple):
    """A corpus, and its share of the rows as its weight over all weights."""

    weight: Fraction
    corpus: str


def parse_mixture(text: str) -> list[Term] | None:
    """The corpora of `WEIGHT*CORPUS + WEIGHT*CORPUS`, each with its weight; None if this begins with no weight.

    A path that begins like a weight is written `./1*x`. Raises ValueError (value, rule, remedy) for weights that are
    not above 0, a corpus without a name or a weight, one corpus alone, one named twice, and too small a share.
    """
    if not TERM.fullmatch(text):
        return None
    remedy = "choose e.g. '0.7*a.jsonl + 0.3*b.jsonl'."
    what = f"data.corpus={text[:200]!r}"
    terms = []
    for part in PLUS.split(text):
        match = TERM.fullmatch(part)
        if match is None or not match[2] or Fraction(match[1]) <= 0:
            raise ValueError(f"{what} must be WEIGHT*CORPUS + WEIGHT*CORPUS with weights above 0; {remedy}")
        terms.append(Term(Fraction(match[1]), match[2]))
    names = [term.corpus for term in terms]
    if len(terms) == 1:
        raise ValueError(f"{what} is a mixture of one corpus; leave its weight out, or {remedy}")
    if len(set(names)) < len(names):
        raise ValueError(f"{what} names a corpus twice; add its weights up.")
    if not all(apportion([term.weight for term in terms], BLOCK)):
        raise ValueError(f"{what} gives a corpus less than one row in {BLOCK}; raise its weight, or leave it out.")
    return terms


def apportion(weights: Sequence[Fraction | int], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total`: largest remainders first, then in order."""
    exact = [Fraction(weight) * total / Fraction(sum(weights)) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: (counts[part] - exact[part], part))
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    return counts


class Schedule:
    """From which corpus each row comes, and as which of that corpus' rows; a pure function of (seed, row).

    `counts` are the rows of each corpus in a block of BLOCK.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self.counts, self.seed = np.array(counts, np.int64), seed
        self._block = functools.lru_cache(maxsize=4)(self._draw)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row its corpus (an index), and how many earlier rows come from that corpus; both int64."""
        if len(self.counts) == 1:
            return np.zeros(len(rows), np.int64), rows
        blocks, slots = np.divmod(rows, BLOCK)
        parts, places = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            order, rank = self._block(int(block))
            parts[here] = order[slots[here]]
            places[here] = block * self.counts[parts[here]] + rank[slots[here]]
        return parts, places

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The corpora of a block's rows, and of each row how many earlier ones of the block share its corpus."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, SCHEDULE + block]))
        order = generator.permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        rank = np.empty(BLOCK, np.int64)
        for part, count in enumerate(self.counts):
            rank[order == part] = np.arange(count)
        return order, rank


def shuffled(places: np.ndarray, length: int, *, seed: int, part: int, epoch: int) -> np.ndarray:
    """The values (int64) at some places of a permutation of range(length), drawn from (seed, part, epoch).

    A Feistel network permutes the next power of two, and is asked again where it leads beyond `length` (Black and
    Rogaway's cycle walking): no array as long as the permutation is made.
    """
    keys = np.random.Philox(key=[seed, WINDOWS + part * EPOCHS + epoch]).random_raw(ROUNDS)
    bits = max(2, (length - 1).bit_length())
    values = _feistel(places.astype(np.uint64), keys, bits)
    while (beyond := values >= length).any():
        values[beyond] = _feistel(values[beyond], keys, bits)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of the numbers of so many bits (uint64): halves change places, one with a hash of the other."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64(2**right_bits - 1)
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & np.uint64(2**left_bits - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's last steps: every bit of the result depends on all 64 (arithmetic modulo 2**64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
