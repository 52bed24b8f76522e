"""Losses to beat: models that know nothing, frequencies, and pairs."""

import math

import numpy as np

from recipe.data import Dataset


def ngram_baselines(dataset: Dataset) -> dict[str, float]:
    """Nats per held-out token of models that know nothing, frequencies, and pairs: uniform, unigram, bigram.

    Counts are those of the training tokens, of a streamed text of its first BASELINE_TOKENS on either side; the unigram
    has one added to each count, and the bigram is interpolated, (count(a, b) + m p(b)) / (count(a) + m), with the m of
    a small grid that does best, which flatters it a little.
    """
    vocabulary = dataset.tokenizer.vocab_size
    train, held_out = (tokens.astype(np.int64) for tokens in dataset.counted())
    counts = np.bincount(train, minlength=vocabulary)
    unigram = (counts + 1.0) / (len(train) + vocabulary)
    pairs, pair_counts = np.unique(train[:-1] * vocabulary + train[1:], return_counts=True)
    before, after = held_out[:-1], held_out[1:]
    wanted = before * vocabulary + after
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    mixtures = [(seen + m * unigram[after]) / (counts[before] + m) for m in (10.0, 30.0, 100.0, 300.0, 1000.0)]
    return {
        "uniform": math.log(vocabulary),
        "unigram": float(-np.log(unigram[held_out]).mean()),
        "bigram": min(float(-np.log(mixture).mean()) for mixture in mixtures),
    }
