"""Training on streamed text: a run that was killed goes on with it, on the same batches, and on no other text."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from harness.state import load_state
from recipe.config import RunConfig, UserError
from tests.test_loop import Killed, config, elsewhere, kill_at, no_picture, resumed, train  # noqa: F401
from tests.test_streaming import some_texts, write_json_lines


@pytest.fixture
def streamed(config, tmp_path, monkeypatch) -> RunConfig:  # noqa: F811
    """A run on two parts of one corpus and a part of another."""
    monkeypatch.setattr("recipe.shards.SHARD_TOKENS", 2_000)
    monkeypatch.setattr("recipe.streaming.SHARD_TOKENS", 2_000)
    parts = [write_json_lines(tmp_path / f"{seed}.jsonl", some_texts(90, seed)) for seed in (1, 2)]
    data = dataclasses.replace(
        config.data, corpus=f"2*{parts[0]} + 1*{parts[1]}", split="hashed", validation_fraction=0.2
    )
    return dataclasses.replace(config, data=data)


def test_a_run_on_a_mixture_goes_on_where_it_was_killed(streamed, tmp_path, monkeypatch, capsys):
    whole = elsewhere(streamed, tmp_path)
    train(whole)
    said = capsys.readouterr().out
    assert "66.67% " in said and "split hashed" in said
    with pytest.raises(Killed):
        train(streamed, kill_at(8))
    monkeypatch.setattr("recipe.streaming._Build.run", lambda *_: pytest.fail("tokenised again"))
    train(resumed(streamed))
    first, second = (load_state(Path(run.out) / "last") for run in (whole, streamed))
    assert first.text == second.text and first.position == second.position
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(weight, second.weights[name])


def test_another_streamed_text_is_refused(streamed):
    with pytest.raises(Killed):
        train(streamed, kill_at(8))
    file = Path(streamed.data.corpus.split("*")[2])
    file.write_bytes(file.read_bytes().replace(b"quick", b"quack"))
    with pytest.raises(UserError, match="the training text is not the one it began with"):
        train(resumed(streamed))
