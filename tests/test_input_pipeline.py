"""The benchmark of the input pipeline: a small run from end to end, and that both ways make the same windows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.notebook import TextTokenDataset
from recipe.data import Dataset

ROOT = Path(__file__).resolve().parents[1]


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.input_pipeline", *flags]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"{n * n} is the square of {n}, as you may check.\n" for n in range(20_000)))
    flags = ["--preset", "tiny", "--corpus", str(corpus), "--vocabulary", "300", "--rounds", "2", "--batches", "3"]
    done = run(*flags, "--out", str(folder / "small"))
    assert done.returncode == 0, done.stderr
    return done, folder / "small", flags


@pytest.mark.slow
def test_rows_add_up(finished):
    done, out, _ = finished
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    ways = ["here", "notebook", "notebook, 2 workers"]
    assert [(row["task"], row["way"]) for row in rows] == [
        *(("tokenising", way) for way in ways[:2]),
        *(("batches", way) for way in ways),
    ]
    for row in rows:
        assert len(row["rates"]) == 2 and min(row["rates"]) == row["tokens_per_second"]["min"] > 0
        assert row["way"] != "notebook" or row["speed_against_notebook"]["max"] == 1.0
        assert {"git_commit", "versions", "cpu", "command", "date"} <= row.keys()
    assert out.with_suffix(".md").read_text() in done.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_results_are_not_overwritten_and_bad_values_are_refused(finished):
    _, out, flags = finished
    again = run(*flags, "--out", str(out))
    assert again.returncode == 2 and "exists, and results are never overwritten" in again.stderr
    refused = run("--rounds", "0")
    assert refused.returncode == 2 and "rounds=0 must be at least 1" in refused.stderr


def test_a_window_of_the_notebook_is_one_of_ours():
    tokens = np.arange(100, dtype=np.uint16)
    ours = Dataset(None, tokens, tokens[:0], bytes_per_token=1.0, leaking_fraction=None, seed=0)
    inputs, targets = ours.batch(0, accumulation=1, batch_size=4, sequence_length=8)
    windows = TextTokenDataset(tokens.tolist(), 8)
    assert len(windows) == 92
    for row, target in zip(inputs[0], targets[0], strict=True):
        x, y = windows[int(row[0])]
        assert torch.equal(x, torch.tensor(row).long()) and torch.equal(y, torch.tensor(target).long())
