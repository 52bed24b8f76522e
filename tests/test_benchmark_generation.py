"""The generation benchmark: a small run from end to end, its arithmetic by hand, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.generation import GenerationConfig, agreement, summarise
from benchmarks.generation_worker import MODES

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 97, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "small"
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "OMP_NUM_THREADS")}
    flags = ["--preset", "tiny", "--overrides", json.dumps({"model": MODEL}), "--out", str(out), "--threads", "1"]
    flags += ["--batch_sizes", "1,3", "--prompt_tokens", "5", "--new_tokens", "9", "--rounds", "2", "--warmup", "0"]
    command = [sys.executable, "-m", "benchmarks.generation", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept, check=False)
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.mark.slow
def test_all_ways_write_the_same_text_and_their_rows_add_up(finished):
    done, out = finished
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    modes = ["jax", "torch", "torch-recompute", "hf"]
    assert [(row["batch_size"], row["mode"]) for row in rows] == [(batch, mode) for batch in (1, 3) for mode in modes]
    for row in rows:
        assert row["agreement"] == 1.0, row["mode"]
        assert row["tokens_per_second"] == row["batch_size"] * 9 / row["seconds"]["median"]
        assert 0 < row["first_token_seconds"]["median"] < row["seconds"]["median"]
        assert {"git_commit", "versions", "cpu", "command", "date"} <= row.keys()
    assert out.with_suffix(".md").read_text() in done.stdout + "\n"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_agreement_counts_tokens_before_the_first_difference():
    assert agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == 6 / 8


def test_the_statistics_by_hand():
    answers = [{"seconds": s, "first_seconds": 0.5, "foreign": 0.0} for s in (2.0, 4.0, 3.0)]
    baseline = [answer | {"seconds": 6.0} for answer in answers]
    row = summarise({"seconds": 10.0}, answers, baseline, tokens=30)
    assert row["tokens_per_second"] == 10.0 and row["compile_seconds"] == 7.0
    assert row["speed_against_baseline"]["median"] == 2.0 and row["speed_against_baseline"]["max"] == 3.0


@pytest.mark.parametrize(
    ("field", "value"), [("modes", "jax,hff"), ("modes", "jax,jax"), ("batch_sizes", "1,x"), ("batch_sizes", "0")]
)
def test_bad_options_are_refused(field, value):
    with pytest.raises(ValueError, match="--" + field.replace("_", "-")):
        GenerationConfig(**{field: value})


def test_every_mode_has_a_worker():
    from benchmarks.generation import COLOURS

    assert MODES.keys() == COLOURS.keys()
