"""Both sides draw the same random bits: jax.random's Threefry, bit for bit."""

import math

import jax
import numpy as np
import pytest
import torch

from jax_impl import random as jax_random
from recipe.dropout import RESOLUTION, threshold
from torch_ref import random as torch_random

# The first is a scalar, the last two have more than 2**16 elements.
SHAPES = [(), (1,), (7,), (3, 5, 2), (257, 259), (2, 3, 11, 1009)]
SEEDS = [0, 1, 42, 2**31, 2**32 - 1]
PATHS = [(), (0,), (1, 2), (2**32 - 1, 0, 7), (3, 1, 4, 1, 5, 9)]


def keys(seed: int, *path: int):
    return jax_random.fold_in(jax_random.key(seed), *path), torch_random.fold_in(torch_random.key(seed), *path)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_authors_known_answers(key, counter, expected):
    # The vectors of Random123's kat_vectors for threefry2x32 with 20 rounds.
    assert torch_random.threefry_2x32(key, *counter) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_and_fold_in_chains_are_the_same_words(seed):
    for path in PATHS:
        jax_key, torch_key = keys(seed, *path)
        assert tuple(jax.random.key_data(jax_key).tolist()) == torch_key
        folded = jax.random.key(seed, impl="threefry2x32")
        for word in path:
            folded = jax.random.fold_in(folded, word)
        assert tuple(jax.random.key_data(folded).tolist()) == torch_key


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_equal(shape):
    jax_key, torch_key = keys(42, 3, 1)
    bits = torch_random.bits(torch_key, shape).numpy()
    assert bits.shape == shape
    assert (np.asarray(jax_random.bits(jax_key, shape)) == bits).all()
    assert (np.asarray(jax.random.bits(jax_key, shape, np.uint32)) == bits).all()


def test_bits_do_not_depend_on_x64_or_jit():
    bits = torch_random.bits(torch_random.key(7), (1000,)).numpy()
    for x64 in (False, True):
        with jax.enable_x64(x64):
            key = jax_random.key(7)
            assert (np.asarray(jax.jit(lambda key: jax_random.bits(key, (1000,)))(key)) == bits).all()


# Rows and columns of masks; the last two begin elsewhere, within a block and in another one.
MASKS = [
    (range(257), range(259)),
    (range(1), range(1)),
    (range(3, 70), range(5, 91)),
    (range(2**20, 2**20 + 3), range(7, 8)),
]


@pytest.mark.parametrize("rate", [2e-5, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "columns"), MASKS, ids=str)
def test_keep_masks_are_equal_and_as_defined(rows, columns, rate):
    jax_key, torch_key = keys(1, 2)
    mask = torch_random.keep_mask(torch_key, rows, columns, rate).numpy()
    assert mask.dtype == bool and mask.shape == (len(rows), len(columns))
    decided = jax.jit(lambda key: jax_random.decisions(key, rows, columns, rate))(jax_key)
    assert decided.dtype == np.uint8 and decided.shape[1] <= len(columns) // 4 + 2, "four decisions a byte"
    assert (np.asarray(jax_random.keep_mask(decided, columns)) == mask).all()
    for r, c in [(0, 0), (-1, -1), (len(rows) // 2, len(columns) // 3)]:
        words = torch_random.threefry_2x32(torch_key, rows[r], columns[c] // 4)
        half = (words[0] | words[1] << 32) >> 16 * (columns[c] % 4) & 0xFFFF
        assert mask[r, c] == (half >= round(rate * 2**16))


def test_a_mask_is_cut_anywhere():
    """A decision belongs to its row and column, whatever part of the mask is asked for."""
    _, key = keys(4)
    whole = torch_random.keep_mask(key, range(40), range(50), 0.3)
    part = torch_random.keep_mask(key, range(11, 30), range(6, 43), 0.3)
    assert (part == whole[11:30, 6:43]).all()
    both = torch_random.keep_mask(torch_random.fold_in(key, torch.arange(3)), range(11), range(6), 0.3)
    for head in range(3):
        assert (both[head] == torch_random.keep_mask(torch_random.fold_in(key, head), range(11), range(6), 0.3)).all()


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5])
def test_decisions_are_independent_draws_at_the_rate(rate):
    """2^22 decisions: their share, pairs of neighbours of every kind, and sums of rows, columns and halves."""
    _, key = keys(6, 1)
    R, C = 2048, 2048
    dropped = (~torch_random.keep_mask(key, range(R), range(C), rate)).numpy().astype(np.float64)
    p = threshold(rate) / RESOLUTION
    assert abs(p - rate) <= 0.5 / RESOLUTION
    # Five standard deviations: 6e-7 a comparison, were the key not fixed.
    assert abs(dropped.mean() - p) <= 5 * math.sqrt(p * (1 - p) / dropped.size)
    centred = dropped - p
    for name, product in {
        "next column": centred[:, 1:] * centred[:, :-1],
        "next but one": centred[:, 2:] * centred[:, :-2],
        "same half of the next block": centred[:, 4:] * centred[:, :-4],
        "next row": centred[1:] * centred[:-1],
        "diagonal": centred[1:, 1:] * centred[:-1, :-1],
    }.items():
        assert abs(product.mean()) <= 5 * p * (1 - p) / math.sqrt(product.size), name
    for name, sums, draws in (
        ("rows", dropped.sum(1), C),
        ("columns", dropped.sum(0), R),
        ("blocks", dropped.reshape(R, -1, 4).sum(-1).ravel(), 4),
    ):
        variance, fourth = draws * p * (1 - p), draws * p * (1 - p) * (1 + 3 * (draws - 2) * p * (1 - p))
        spread = math.sqrt((fourth - variance**2) / len(sums))
        assert abs(((sums - draws * p) ** 2).mean() - variance) <= 5 * spread, name


def test_what_stays_is_divided_by_the_probability_with_which_it_stays():
    _, key = keys(2)
    for rate in (2e-5, 0.1, 0.3, 0.99999 - 2e-5):
        values = torch_random.dropout(torch.ones(64, 64, dtype=torch.float64), rate, key).unique().tolist()
        assert all(value in (0.0, 1.0 / (1.0 - round(rate * 65536) / 65536)) for value in values)


def test_uniform_is_equal_bit_for_bit_and_open():
    jax_key, torch_key = keys(3)
    shape = (257, 1031)
    ours, theirs = torch_random.uniform(torch_key, shape).numpy(), np.asarray(jax_random.uniform(jax_key, shape))
    assert ours.dtype == theirs.dtype == np.float32
    assert (ours.view(np.uint32) == theirs.view(np.uint32)).all()
    assert 0.0 < ours.min() < 2.0**-16 and 1.0 - 2.0**-16 < ours.max() < 1.0


def test_gumbel_is_within_two_ulp_of_the_exact_value():
    # One ulp for each of the two logarithms. The outer one turns the inner one's relative error into an absolute one,
    # so the ulp is that of max(|gumbel|, 1).
    jax_key, torch_key = keys(5)
    shape = (257, 1031)
    exact = -np.log(-np.log(torch_random.uniform(torch_key, shape).numpy().astype(np.float64)))
    ulp = np.spacing(np.maximum(np.abs(exact), 1.0).astype(np.float32))
    for noise in (torch_random.gumbel(torch_key, shape).numpy(), np.asarray(jax_random.gumbel(jax_key, shape))):
        assert noise.dtype == np.float32
        assert (np.abs(noise - exact) / ulp).max() <= 2.0


def test_sites_of_dropout_have_the_same_numbers_and_no_two_alike():
    names = ["EMBEDDING", "ATTENTION_PROBABILITIES", "ATTENTION_RESIDUAL", "FFN_HIDDEN", "FFN_RESIDUAL", "HEAD"]
    numbers = [getattr(jax_random, name) for name in names]
    assert numbers == [getattr(torch_random, name) for name in names]
    assert len(set(numbers)) == len(names)
