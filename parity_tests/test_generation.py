"""Sampling and generation, on both sides: the same rules, the same seed, the same text; cached as if it were not.

Cached logits equal uncached ones up to float64's rounding and not bit for bit: a product of one row and a product of
many add up in another order. The content of the padding changes no bit at all. Tokens are compared exactly.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.generation import logits_process

import jax_impl.generate
import torch_ref.generate
from harness.hf_config import to_hf_config
from jax_impl import random as jax_random
from jax_impl.weights import bind
from parity_tests.cases import AWKWARD, FLOAT32, FLOAT64, VARIANTS, random_tokens, random_weights
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import check
from parity_tests.sides import TorchModel, x64
from recipe.config import UserError
from recipe.contract import UNIT_ROUNDOFF
from recipe.sampling import NO_TOKEN, SamplingOptions
from torch_ref import random as torch_random

SIDES = {"jax": jax_impl.generate, "torch": torch_ref.generate}


NOTHING = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
EVERYTHING = dict(temperature=0.9, top_k=20, top_p=0.95, min_p=0.02, repetition_penalty=1.3)


def filtered(side: str, logits_V: np.ndarray, seen_V: np.ndarray | None = None, **options) -> np.ndarray:
    """The side's penalize and filter_logits, NumPy in and out."""
    asarray = jnp.asarray if side == "jax" else torch.tensor
    logits_V, penalty = asarray(logits_V), options.pop("repetition_penalty", None)
    if penalty is not None:
        logits_V = SIDES[side].penalize(logits_V, asarray(seen_V), penalty)
    return np.asarray(SIDES[side].filter_logits(logits_V, **NOTHING | options))


class JaxCache:
    """jax_impl's cache, filled and read step by step, with logits instead of tokens."""

    def __init__(self, model, precision, weights, prompts_PT: np.ndarray, slots: int) -> None:
        self.precision = precision
        with x64(precision):
            self.params = jax_impl.generate.held_params(weights, model, precision)
            graph, dtype = jax_impl.generate.held_structure(model, precision), jax_impl.generate.held_dtype(precision)
            shape = dict(slots=slots, dtype=dtype, samples=1)
            self.layers = jax_impl.generate.prefill(graph, self.params, prompts_PT, **shape)

            def step(params, *arguments):
                return jax_impl.generate.next_logits(bind(graph, params), *arguments)

            self.call = jax.jit(step)

    def step(self, token_B: np.ndarray, position_B: np.ndarray) -> np.ndarray:
        with x64(self.precision):
            self.layers, logits_BV = self.call(self.params, self.layers, jnp.array(token_B), jnp.array(position_B))
            return np.asarray(logits_BV)


class TorchCache:
    """torch_ref's cache, filled and read step by step, with logits instead of tokens."""

    def __init__(self, model, precision, weights, prompts_PT: np.ndarray, slots: int) -> None:
        self.model = torch_ref.generate.held_model(weights, model, precision, "cpu")
        dtype = getattr(torch, precision.compute)
        prompts_PT = torch.tensor(prompts_PT)
        self.layers = torch_ref.generate.prefill(self.model, prompts_PT, slots=slots, dtype=dtype, samples=1)

    def step(self, token_B: np.ndarray, position_B: np.ndarray) -> np.ndarray:
        arrays = torch.tensor(token_B), torch.tensor(position_B)
        self.layers, logits_BV = torch_ref.generate.next_logits(self.model, self.layers, *arrays)
        return logits_BV.numpy()


CACHES = {"jax": JaxCache, "torch": TorchCache}
LENGTHS, STEPS, SLOTS = np.array([3, 9, 5], np.int32), 8, 19
ROW = np.arange(len(LENGTHS))


def cached_logits(side: str, model, padding_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of STEPS tokens after prompts of three LENGTHS, (3, STEPS, V), and the rows they belong to (3, SLOTS)."""
    tokens = random_tokens(model, len(LENGTHS), SLOTS)
    padding = random_tokens(model, len(LENGTHS), 11, seed=padding_seed)
    prompts = np.where(np.arange(11) < LENGTHS[:, None], tokens[:, :11], padding)
    cache = CACHES[side](model, FLOAT64, random_weights(model), prompts, SLOTS)
    positions = [LENGTHS - 1 + step for step in range(STEPS)]
    return np.stack([cache.step(tokens[ROW, position], position) for position in positions], axis=1), tokens


@pytest.mark.parametrize("side", CACHES)
@pytest.mark.parametrize("name", ["plain", "window", "everything"])
def test_cached_logits_equal_uncached_ones(name, side):
    model = dataclasses.replace(VARIANTS[name], dropout=0.0)
    logits, tokens = cached_logits(side, model, padding_seed=5)

    def compute():
        uncached = TorchModel(model, FLOAT64, random_weights(model)).logits(tokens)
        return {"logits": np.stack([uncached[ROW, LENGTHS - 1 + step] for step in range(STEPS)], axis=1)}

    truths, kappas = amplification(compute)
    check("logits", logits, truths["logits"], allowances(kappas, "float64")["logits"])


@pytest.mark.parametrize("side", CACHES)
def test_what_stands_in_the_padding_changes_no_bit(side):
    one, other = (cached_logits(side, VARIANTS["window"], padding_seed=seed)[0] for seed in (5, 6))
    np.testing.assert_array_equal(one, other)


PROMPTS = [random_tokens(AWKWARD, length, seed=length).tolist() for length in (9, 2, 70)]
"""Of different lengths, the last one longer than a compiled length."""


@pytest.fixture(scope="module")
def generators():
    weights = random_weights(AWKWARD)
    return {side: module.make_generator(AWKWARD, FLOAT32, weights) for side, module in SIDES.items()}


@pytest.mark.parametrize("side", SIDES)
def test_top_k_keeps_the_k_largest(side):
    logits = np.array([0.5, 3.0, -1.0, 2.0, 1.0], np.float32)
    kept = np.isfinite(filtered(side, logits, top_k=2))
    assert kept.tolist() == [False, True, False, True, False]
    everything = np.isfinite(filtered(side, logits, top_k=99))
    assert everything.all()


@pytest.mark.parametrize("side", SIDES)
def test_top_p_keeps_the_smallest_set_that_reaches_p(side):
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32))
    # 0.5 falls short of 0.6, 0.5 + 0.3 reaches it; with p = 0.4 the largest alone does.
    assert np.isfinite(filtered(side, logits, top_p=0.6)).tolist() == [False, True, False, True]
    assert np.isfinite(filtered(side, logits, top_p=0.4)).sum() == 1


@pytest.mark.parametrize("p", [0.5, 0.95, 0.99, 0.999, 0.9999])
def test_top_p_reaches_p_at_a_published_vocabulary(p):
    """151,936 logits of deviation 4, the truth in float64; a sum from the top would be 3,000 tokens short."""
    logits = (4.0 * np.random.default_rng(0).standard_normal(151_936)).astype(np.float32)
    descending = np.sort(logits.astype(np.float64))[::-1]
    probabilities = np.exp(descending - descending[0]) / np.sum(np.exp(descending - descending[0]))
    truth = int(np.sum(np.cumsum(probabilities) - probabilities < p))
    kept = {side: np.isfinite(filtered(side, logits, top_p=p)) for side in SIDES}
    np.testing.assert_array_equal(kept["jax"], kept["torch"])
    assert abs(int(kept["jax"].sum()) - truth) <= 1


TIES = {
    "all": ([0.25, 0.25, 0.25, 0.25], 0.5, [True] * 4),
    "at the boundary": ([0.2, 0.4, 0.2, 0.2], 0.5, [True] * 4),
    "above the boundary": ([0.3, 0.3, 0.1, 0.3], 0.85, [True, True, False, True]),
    "below it": ([0.5, 0.1, 0.3, 0.1], 0.75, [True, False, True, False]),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", TIES)
def test_what_ties_with_the_smallest_token_kept_is_kept(case, side):
    """transformers keeps as many of them as reach p, whichever its sort puts last; what it keeps is kept here."""
    probabilities, p, expected = TIES[case]
    logits = np.log(np.array(probabilities, np.float32))
    kept = np.isfinite(filtered(side, logits, top_p=p))
    assert kept.tolist() == expected
    theirs = np.isfinite(logits_process.TopPLogitsWarper(p)(None, torch.tensor(logits)[None])[0].numpy())
    assert kept[theirs].all() and set(logits[kept & ~theirs]) <= {min(logits[kept])}
    assert np.isfinite(filtered(side, logits, top_k=1)).tolist() == (logits == max(logits)).tolist()


@pytest.mark.parametrize("side", SIDES)
def test_temperature_divides_what_logits_lack_of_the_largest(side):
    logits = np.array([1.0, 2.0, 4.0], np.float32)
    assert filtered(side, logits, temperature=2.0).tolist() == [-1.5, -1.0, 0.0]


def chosen(side: str, logits: list[float], **options) -> set[int]:
    """The tokens that sample_token chooses under eight keys, in a compiled program on JAX."""
    options = NOTHING | {"repetition_penalty": 1.0} | options
    if side == "jax":
        keys = [jax_random.key(seed) for seed in range(8)]
        choose = jax.jit(lambda x, key: jax_impl.generate.sample_token(x, np.zeros(len(logits), bool), key, **options))
        return {int(choose(jnp.array(logits, jnp.float32), key)) for key in keys}
    arrays = torch.tensor(logits), torch.zeros(len(logits), dtype=torch.bool)
    keys = [torch_random.key(seed) for seed in range(8)]
    return {int(torch_ref.generate.sample_token(*arrays, key, **options)) for key in keys}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-37, 1e-38, 1e-45, 1e-320])
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}], ids=["plain", "filters"])
def test_tiny_temperatures_are_greedy(options, temperature, side):
    for logits in ([50.0, 60.0, 40.0], [1.0, 2.0, 3.0], [-3e38, 3e38, 0.0], [-1e-3, -2e-3, -5.0]):
        assert chosen(side, logits, temperature=temperature, **options) == {int(np.argmax(logits))}
    assert chosen(side, [5.0, 5.0, 1.0], temperature=temperature, **options) == {0, 1}, "ties are drawn"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 0.8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_choose_no_token(value, temperature, side):
    logits = [1.0, value, 2.0] if value != -np.inf else [value] * 3
    for options in ({}, EVERYTHING, {"top_p": 0.5}):
        assert chosen(side, logits, **options | {"temperature": temperature}) == {NO_TOKEN}
    assert chosen(side, [1.0, -np.inf, 9.0], temperature=0.0) == {2}, "a token may be ruled out"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_of_nan_are_told(temperature, side):
    """The token 5 alone has an embedding of NaN: only the row that reads it has no logits."""
    model = dataclasses.replace(AWKWARD, tie_word_embeddings=False)
    weights = random_weights(model)
    weights["model.embed_tokens.weight"][5] = np.nan
    generate = SIDES[side].make_generator(model, FLOAT32, weights)
    options = SamplingOptions(max_new_tokens=8, temperature=temperature)
    with pytest.raises(UserError, match="the logits are not finite"):
        generate.batch([[1, 2, 3], [4, 5]], options)
    rows = generate.stream([[1, 2, 3], [4, 5]], options, np.array([False, True]))
    assert next(rows)[0] == 0, "what a row that is done gets means nothing"


PROCESSORS = {
    "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
}
"""transformers' own, in the order in which its `generate` applies them."""


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*PROCESSORS, "all"])
def test_filters_equal_those_of_transformers(name, side):
    generator = np.random.default_rng(4)
    options = EVERYTHING | {"min_p": 0.05, "top_p": 0.9}
    options = options if name == "all" else {name: options[name]}
    for _ in range(5):
        logits_V = (2.0 * generator.standard_normal(AWKWARD.vocab_size)).astype(np.float32)
        seen = generator.integers(0, AWKWARD.vocab_size, 9)
        expected = torch.tensor(logits_V, dtype=torch.float64)[None]
        for option, value in options.items() if name != "all" else [(o, options[o]) for o in PROCESSORS]:
            expected = PROCESSORS[option](value)(torch.tensor(seen)[None], expected)
        seen_V = np.isin(np.arange(AWKWARD.vocab_size), seen)
        values, expected = filtered(side, logits_V, seen_V, **options), expected[0].numpy()
        assert np.isfinite(values).sum() > 1 and np.isfinite(values).tolist() == np.isfinite(expected).tolist()
        # Four roundings: the penalty of a logit and of the largest one, their difference, the temperature.
        kept = np.isfinite(values)
        check("kept logits", values[kept], expected[kept] - expected.max(), 4 * UNIT_ROUNDOFF["float32"])


def test_sampling_draws_the_same_token_and_the_right_distribution():
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    logits = np.log(probabilities).astype(np.float32)
    options, unseen = NOTHING | {"repetition_penalty": 1.0}, np.zeros(4, bool)
    draws = 500

    def sample(index):
        key = jax_random.fold_in(jax_random.key(7), index)
        return jax_impl.generate.sample_token(jnp.asarray(logits), unseen, key, **options)

    from_jax = np.asarray(jax.jit(jax.vmap(sample))(jnp.arange(draws)))
    torch_keys = [torch_random.fold_in(torch_random.key(7), i) for i in range(draws)]
    arrays = torch.tensor(logits), torch.tensor(unseen)
    from_torch = [int(torch_ref.generate.sample_token(*arrays, key, **options)) for key in torch_keys]
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
    texts = set()
    for seed in range(3):
        options = SamplingOptions(max_new_tokens=12, seed=seed, samples=2, **EVERYTHING)
        by_side = {side: generate.batch(PROMPTS, options) for side, generate in generators.items()}
        assert by_side["jax"] == by_side["torch"]
        texts |= set(map(tuple, by_side["jax"]))
    assert len(texts) == 3 * 2 * len(PROMPTS), "seed, sample and prompt must matter"


@pytest.mark.parametrize("side", SIDES)
def test_a_batch_gives_each_row_what_it_gets_alone(generators, side):
    generate = generators[side]
    options = SamplingOptions(max_new_tokens=12, samples=2, stop_ids=(7,), **EVERYTHING)
    together = generate.batch(PROMPTS, options)
    apart = [row for prompt in PROMPTS for row in generate.batch([prompt], options)]
    assert together == apart
    assert len({len(row) for row in together}) > 1, "rows must end at different steps"


@pytest.mark.parametrize("side", SIDES)
def test_samples_differ_and_the_first_one_is_the_single_text(generators, side):
    generate = generators[side]
    options = SamplingOptions(max_new_tokens=12, samples=2, **EVERYTHING)
    first, second = generate.batch(PROMPTS[:1], options)
    assert first == list(generate(PROMPTS[0], dataclasses.replace(options, samples=1)))
    assert first != second
    with pytest.raises(ValueError, match=r"use generate\.batch"):
        generate(PROMPTS[0], options)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["plain", "window"])
def test_greedy_tokens_equal_those_of_transformers(name, side):
    model, weights = VARIANTS[name], random_weights(VARIANTS[name])
    theirs = Qwen3ForCausalLM(Qwen3Config(**to_hf_config(model), attn_implementation="eager")).eval()
    state = {name: torch.tensor(weight, dtype=torch.float32) for name, weight in weights.items()}
    theirs.load_state_dict(state, strict=not model.tie_word_embeddings)
    options = SamplingOptions(max_new_tokens=20, temperature=0.0, repetition_penalty=1.3)
    expected = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        output = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20, repetition_penalty=1.3
        )
        expected.append(output[0, len(prompt) :].tolist())
    assert SIDES[side].make_generator(model, FLOAT32, weights).batch(PROMPTS, options) == expected


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
