"""Sampling and generation, on both sides: the same rules, the same seed, the same text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.generate
import torch_ref.generate
from jax_impl import random as jax_random
from parity_tests.cases import AWKWARD, FLOAT32, random_tokens, random_weights
from parity_tests.sides import TorchModel
from recipe.generation import SamplingOptions
from torch_ref import random as torch_random

SIDES = {"jax": jax_impl.generate, "torch": torch_ref.generate}


def filtered(side: str, logits_V: np.ndarray, **options) -> np.ndarray:
    """The side's filter_logits, NumPy in and out."""
    asarray = jnp.asarray if side == "jax" else torch.tensor
    return np.asarray(SIDES[side].filter_logits(asarray(logits_V), **options))


@pytest.fixture(scope="module")
def generators():
    weights = random_weights(AWKWARD)
    return {side: module.make_generator(AWKWARD, FLOAT32, weights) for side, module in SIDES.items()}


@pytest.mark.parametrize("side", SIDES)
def test_top_k_keeps_the_k_largest(side):
    logits = np.array([0.5, 3.0, -1.0, 2.0, 1.0], np.float32)
    kept = np.isfinite(filtered(side, logits, temperature=1.0, top_k=2, top_p=1.0))
    assert kept.tolist() == [False, True, False, True, False]
    everything = np.isfinite(filtered(side, logits, temperature=1.0, top_k=99, top_p=1.0))
    assert everything.all()


@pytest.mark.parametrize("side", SIDES)
def test_top_p_keeps_the_smallest_set_that_reaches_p(side):
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32))
    # 0.5 falls short of 0.6, 0.5 + 0.3 reaches it; with p = 0.4 the largest alone does.
    assert np.isfinite(filtered(side, logits, temperature=1.0, top_k=0, top_p=0.6)).tolist() == [
        False,
        True,
        False,
        True,
    ]
    assert np.isfinite(filtered(side, logits, temperature=1.0, top_k=0, top_p=0.4)).sum() == 1


@pytest.mark.parametrize("side", SIDES)
def test_temperature_divides_the_logits(side):
    logits = np.array([1.0, 2.0, 4.0], np.float32)
    assert filtered(side, logits, temperature=2.0, top_k=0, top_p=1.0).tolist() == [0.5, 1.0, 2.0]


def test_sampling_draws_the_same_token_and_the_right_distribution():
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    logits = np.log(probabilities).astype(np.float32)
    options = dict(temperature=1.0, top_k=0, top_p=1.0)
    draws = 500

    def sample(index):
        key = jax_random.fold_in(jax_random.key(7), index)
        return jax_impl.generate.sample_token(jnp.asarray(logits), key, **options)

    from_jax = np.asarray(jax.jit(jax.vmap(sample))(jnp.arange(draws)))
    torch_keys = [torch_random.fold_in(torch_random.key(7), i) for i in range(draws)]
    from_torch = [int(torch_ref.generate.sample_token(torch.tensor(logits), key, **options)) for key in torch_keys]
    assert from_jax.tolist() == from_torch
    counts = np.bincount(from_jax, minlength=4)
    deviations = np.sqrt(draws * probabilities * (1 - probabilities))
    # Five standard deviations of a binomial: one false alarm in some 400,000 such tests.
    assert (np.abs(counts - draws * probabilities) < 5 * deviations).all()


def test_greedy_takes_the_largest_logit_of_the_whole_sequence(generators):
    prompt = random_tokens(AWKWARD, 5).tolist()
    options = SamplingOptions(max_new_tokens=6, temperature=0.0)
    model, expected = TorchModel(AWKWARD, FLOAT32, random_weights(AWKWARD)), list(prompt)
    for _ in range(6):
        expected.append(int(model.logits(np.array([expected]))[0, -1].argmax()))
    for side, generate in generators.items():
        assert list(generate(prompt, options)) == expected[5:], side


def test_the_same_seed_gives_the_same_tokens_in_both_frameworks(generators):
    prompt = random_tokens(AWKWARD, 9).tolist()
    texts = set()
    for seed in range(3):
        options = SamplingOptions(max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.95, seed=seed)
        by_side = {side: tuple(generate(prompt, options)) for side, generate in generators.items()}
        assert by_side["jax"] == by_side["torch"]
        texts.add(by_side["jax"])
    assert len(texts) == 3, "the seed must matter"


def test_generation_stops_at_a_stop_token(generators):
    prompt = random_tokens(AWKWARD, 4).tolist()
    free = SamplingOptions(max_new_tokens=8, temperature=0.0)
    for generate in generators.values():
        tokens = list(generate(prompt, free))
        stop = tokens[3]
        stopped = list(generate(prompt, dataclasses.replace(free, stop_ids=(stop,))))
        assert stopped == tokens[: tokens.index(stop)]


@pytest.mark.parametrize("side", SIDES)
def test_a_prompt_that_does_not_fit_is_refused(generators, side):
    limit = AWKWARD.max_position_embeddings
    prompt = random_tokens(AWKWARD, limit - 3).tolist()
    assert len(list(generators[side](prompt, SamplingOptions(max_new_tokens=3, temperature=0.0)))) == 3
    with pytest.raises(ValueError, match=f"max_position_embeddings={limit}"):
        list(generators[side](prompt, SamplingOptions(max_new_tokens=4)))
    with pytest.raises(ValueError, match="no tokens"):
        list(generators[side]([], SamplingOptions(max_new_tokens=4)))
