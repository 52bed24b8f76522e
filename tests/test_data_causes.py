"""What decides which windows a batch holds, one cause varied at a time: seed, epoch, step, split, corpus, shape."""

import dataclasses

import numpy as np
import pytest

from recipe.config import DataConfig
from recipe.corpus import Documents
from recipe.data import Dataset, split_documents
from recipe.tokenizer import train_bpe

T, WINDOWS = 8, 30
TOKENIZER = train_bpe(["some text"], 260)
TOKENS = np.arange(T * WINDOWS + 1, dtype=np.uint16)
SHAPE = dict(accumulation=2, batch_size=3, sequence_length=T)
EPOCH = WINDOWS // 6
"""Updates of six windows in an epoch."""


def dataset(*, seed: int = 3, tokens: np.ndarray = TOKENS, leaking: float | None = None) -> Dataset:
    return Dataset(TOKENIZER, tokens, tokens[:90], bytes_per_token=2.0, leaking_fraction=leaking, seed=seed)


def order(data: Dataset, epoch: int = 0) -> list[int]:
    """The first tokens of an epoch's windows in the order in which they are trained on."""
    return [int(x) for step in range(EPOCH) for x in data.batch(epoch * EPOCH + step, **SHAPE)[0][..., 0].ravel()]


def held_out(data: Dataset) -> list[int]:
    return [int(x) for inputs, _ in data.validation_batches(3, T, 48) for x in inputs[:, 0]]


def test_the_same_causes_have_the_same_effect():
    assert order(dataset()) == order(dataset()) and held_out(dataset()) == held_out(dataset())


def test_the_seed_alone_changes_the_order_and_nothing_else():
    orders = [order(dataset(seed=seed)) for seed in range(5)]
    assert len(set(map(tuple, orders))) == 5
    assert {tuple(sorted(one)) for one in orders} == {tuple(range(0, T * WINDOWS, T))}
    assert held_out(dataset(seed=0)) == held_out(dataset(seed=1)) == list(range(0, 48, T))


def test_the_epoch_alone_changes_the_order_and_nothing_else():
    data = dataset()
    orders = [order(data, epoch) for epoch in range(4)]
    assert len(set(map(tuple, orders))) == 4 and len({tuple(sorted(one)) for one in orders}) == 1


def test_the_step_alone_changes_the_windows_and_no_other_step_does():
    data = dataset()
    batches = [data.batch(step, **SHAPE)[0] for step in range(2 * EPOCH)]
    for step in reversed(range(2 * EPOCH)):
        np.testing.assert_array_equal(data.batch(step, **SHAPE)[0], batches[step])
    assert len({batch.tobytes() for batch in batches}) == 2 * EPOCH


def test_the_shape_alone_groups_the_same_order_otherwise():
    data = dataset()
    twelve = data.batch(0, accumulation=4, batch_size=3, sequence_length=T)[0].reshape(-1, T)
    six = np.concatenate([data.batch(step, **SHAPE)[0].reshape(-1, T) for step in (0, 1)])
    np.testing.assert_array_equal(twelve, six)


def test_the_text_alone_changes_the_tokens_and_not_their_order():
    other = dataset(tokens=TOKENS[::-1].copy())
    mirrored = [int(TOKENS[-1]) - x for x in order(dataset())]
    assert order(other) == mirrored


@pytest.mark.parametrize("place", [0, 100, len(TOKENS) - 1])
def test_any_token_alone_changes_the_fingerprint(place):
    tokens = TOKENS.copy()
    tokens[place] += 1
    assert dataset(tokens=tokens).fingerprint != dataset().fingerprint == dataset(seed=9).fingerprint
    long = np.zeros(10_000, np.uint16)
    changed = long.copy()
    changed[-1] = 1
    assert dataset(tokens=long).fingerprint != dataset(tokens=changed).fingerprint


def test_the_split_alone_and_the_seed_decide_the_leaking_windows():
    first, again, other = (dataset(seed=seed, leaking=0.2) for seed in (3, 3, 4))
    assert held_out(first) == held_out(again) != held_out(other)
    starts = [first.batch(step, **SHAPE)[0][..., 0].ravel() for step in range(20)]
    assert not set(np.concatenate(starts).tolist()) & set(held_out(first))
    assert held_out(first) != held_out(dataset())


def test_the_seed_alone_draws_the_documents_held_out():
    texts = [f"document {number} " * 20 for number in range(40)]
    documents = Documents([str(number) for number in range(40)], texts, "identity")
    config = DataConfig(corpus="elsewhere", validation_fraction=0.1)
    splits = [split_documents(documents, config, seed) for seed in range(4)]
    assert len({tuple(split.validation) for split in splits}) == 4
    for split in splits:
        assert sorted(split.train + split.validation) == sorted(texts)
    assert splits[0] == split_documents(documents, config, 0)
    wider = split_documents(documents, dataclasses.replace(config, validation_fraction=0.3), 0)
    assert len(wider.validation) > len(splits[0].validation)


def test_an_epochs_order_is_drawn_once(monkeypatch):
    """A permutation of millions of windows for every batch would cost more than the batch."""
    drawn = []
    original = Dataset._permute
    monkeypatch.setattr(Dataset, "_permute", lambda *args: drawn.append(args[1:]) or original(*args))
    data = dataset()
    order(data), order(data), order(data, 1)
    assert drawn == [(0, WINDOWS), (1, WINDOWS)]
