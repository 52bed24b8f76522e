"""Which window a row is: permutations without a list, shares without a remainder, and the same in any order."""

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.config import DataConfig, UserError
from recipe.mixture import BLOCK, Schedule, Term, apportion, parse_mixture, shuffled


def places(length: int, **drawn) -> np.ndarray:
    return shuffled(np.arange(length), length, **dict(seed=0, part=0, epoch=0) | drawn)


@pytest.mark.parametrize("length", [*range(1, 70), 255, 256, 257, 1_000, 4_097, 65_537])
def test_every_place_leads_to_one_window(length):
    np.testing.assert_array_equal(np.sort(places(length)), np.arange(length))


def test_the_order_depends_on_seed_corpus_and_epoch_alone():
    first = places(1_000)
    for other in ({"seed": 1}, {"part": 1}, {"epoch": 1}):
        assert (places(1_000, **other) == first).mean() < 0.01
    some = np.array([17, 3, 999])
    np.testing.assert_array_equal(shuffled(some, 1_000, seed=0, part=0, epoch=0), first[some])


def test_an_order_looks_drawn():
    """Over 1,000 seeds every window of 20 comes first as often as others, and after any other."""
    orders = np.array([places(20, seed=seed) for seed in range(1_000)])
    first = np.bincount(orders[:, 0], minlength=20)
    steps = np.bincount((np.diff(orders) % 20).ravel(), minlength=20)[1:]
    # 19 and 18 degrees of freedom: sums of squares above 60 have a chance below one in 100,000.
    assert ((first - 50) ** 2 / 50).sum() < 60
    assert ((steps - 1_000) ** 2 / 1_000).sum() < 60


def test_a_window_beyond_32_bits_is_found():
    length = 10**12 + 7
    found = shuffled(np.arange(1_000) * 10**9, length, seed=3, part=2, epoch=5)
    assert len(set(found.tolist())) == 1_000 and found.min() >= 0 and found.max() < length
    assert abs(found.mean() / length - 0.5) < 0.05


def test_the_order_stays_what_it_was():
    """Another order would be another run."""
    assert places(10, seed=7, part=1, epoch=2).tolist() == [7, 8, 9, 3, 2, 1, 6, 0, 4, 5]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=9), st.integers(0, 10**5))
def test_whole_shares_add_up_and_are_off_by_less_than_one(weights, total):
    counts = apportion(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - Fraction(weight * total, sum(weights))) < 1


def test_largest_remainders_come_first_then_the_order():
    assert apportion([1, 1, 1], 4) == [2, 1, 1]
    assert apportion([Fraction("0.5"), Fraction("0.3"), Fraction("0.2")], 4) == [2, 1, 1]
    assert apportion([5, 1], 3) == [3, 0]


@pytest.mark.parametrize("weights", [(1, 1), (7, 2, 1), (1, 4095)])
def test_each_block_has_its_shares_and_each_corpus_its_own_places(weights):
    counts = apportion(weights, BLOCK)
    schedule = Schedule(counts, seed=5)
    rows = np.arange(3 * BLOCK)
    parts, own = schedule(rows)
    for block in range(3):
        here = parts[block * BLOCK : (block + 1) * BLOCK]
        assert np.bincount(here, minlength=len(counts)).tolist() == counts
    for part in range(len(counts)):
        np.testing.assert_array_equal(own[parts == part], np.arange(3 * counts[part]))
    some = np.array([2 * BLOCK + 5, 3, BLOCK, 3])
    found = Schedule(counts, seed=5)(some)
    np.testing.assert_array_equal(found[0], parts[some])
    np.testing.assert_array_equal(found[1], own[some])
    if max(counts) < BLOCK - 1:
        assert not np.array_equal(parts[:BLOCK], parts[BLOCK : 2 * BLOCK]), "each block has its own order"
        assert not np.array_equal(Schedule(counts, seed=6)(rows)[0], parts)


def test_one_corpus_has_every_row():
    rows = np.array([0, 5_000, 10**12])
    parts, own = Schedule([BLOCK], seed=0)(rows)
    assert parts.tolist() == [0, 0, 0] and own.tolist() == rows.tolist()


GOOD = {
    "0.7*a.jsonl + 0.3*hub:x/y": [("0.7", "a.jsonl"), ("0.3", "hub:x/y")],
    " 2 * a b.txt  +  1 * c": [("2", "a b.txt"), ("1", "c")],
    "1*a + b.txt + 2.*c*d": [("1", "a + b.txt"), ("2", "c*d")],
    ".5*a+1*b + 1.5*d, e.txt": [("0.5", "a+1*b"), ("1.5", "d, e.txt")],
}


@pytest.mark.parametrize("text", GOOD)
def test_a_mixture_is_read(text):
    assert parse_mixture(text) == [Term(Fraction(weight), corpus) for weight, corpus in GOOD[text]]
    DataConfig(corpus=text, split="hashed")


@pytest.mark.parametrize("text", ["a.jsonl", "shakespeare", "./1*a", "a*b", "1 a + 2 b", "hub:1*x/y", "1.2.3*a"])
def test_what_begins_with_no_weight_is_no_mixture(text):
    assert parse_mixture(text) is None


BAD = {
    "1*a": "is a mixture of one corpus; leave its weight out",
    "1*a + 0*b": "with weights above 0",
    "-1*a + 2*b": "with weights above 0",
    "1*": "must be WEIGHT*CORPUS",
    "1* + 2*b": "must be WEIGHT*CORPUS",
    "1*a + 1*a": "names a corpus twice; add its weights up",
    "1*a + 9999*b": "gives a corpus less than one row in 4096; raise its weight",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_mixture_is_one_line(text):
    with pytest.raises(UserError, match=re.escape(BAD[text])) as caught:
        DataConfig(corpus=text, split="hashed")
    assert str(caught.value).startswith(f"data.corpus={text!r} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["documents", "leaking-windows"])
def test_only_a_hashed_split_mixes(split):
    with pytest.raises(UserError, match=r"is a mixture, which data\.split=.* pass --data\.split hashed"):
        DataConfig(corpus="1*a + 1*b", split=split)
