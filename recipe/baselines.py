"""Losses to beat: models that know nothing, frequencies, and pairs."""

import math

import numpy as np

from recipe.data import Dataset


def ngram_baselines(dataset: Dataset) -> dict[str, float]:
    """Nats per held-out token of models that know nothing, frequencies, and pairs: uniform, unigram, bigram.

    Counts are those of the training tokens, of a streamed text of its first BASELINE_TOKENS on either side; the unigram
    has one added to each count, and the bigram is interpolated, (count(a, b) + m p(b)) / (count(a) + m), with the m of
    a small grid that does best, which flatters it a little. Of conversations, tokens are those that are trained on.
    """
    vocabulary = dataset.tokenizer.vocab_size
    trained = dataset.pairs()
    if trained is None:
        train, held_out = (tokens.astype(np.int64) for tokens in dataset.counted())
        contexts, (first, second), (before, after) = train, (train[:-1], train[1:]), (held_out[:-1], held_out[1:])
    else:
        (first, second), (before, after) = (tuple(x.astype(np.int64) for x in side) for side in trained)
        contexts, train, held_out = first, second, after
    counts = np.bincount(train, minlength=vocabulary)
    unigram = (counts + 1.0) / (len(train) + vocabulary)
    pairs, pair_counts = np.unique(first * vocabulary + second, return_counts=True)
    counts = np.bincount(contexts, minlength=vocabulary)
    wanted = before * vocabulary + after
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    mixtures = [(seen + m * unigram[after]) / (counts[before] + m) for m in (10.0, 30.0, 100.0, 300.0, 1000.0)]
    return {
        "uniform": math.log(vocabulary),
        "unigram": float(-np.log(unigram[held_out]).mean()),
        "bigram": min(float(-np.log(mixture).mean()) for mixture in mixtures),
    }
