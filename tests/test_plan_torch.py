"""The count of torch's side on paper: the formula's FLOPs, and more bytes where more is moved."""

import subprocess
import sys

import pytest

from benchmarks import job

H100 = ["--target", "h100"]


def config(**changes):
    fields = dict(
        dropout=0.0, seed=0, compute="bfloat16", newton_schulz="bfloat16", matmul="highest", attention="fused"
    )
    return job.resolve("tiny", batch_size=2, sequence_length=64, accumulation=3, overrides="", **fields | changes)


@pytest.fixture(scope="module")
def counts():
    from benchmarks import plan_torch

    return {
        "plain": plan_torch.record(config(), "torch-eager", "h100"),
        "lce": plan_torch.record(config(), "torch-eager-lce", "h100"),
        "dropout": plan_torch.record(config(dropout=0.1), "torch-eager", "h100"),
        "explicit": plan_torch.record(config(attention="explicit"), "torch-eager", "h100"),
    }


@pytest.mark.parametrize("kind", ["plain", "lce"])
def test_products_are_those_of_the_formula(counts, kind):
    """Three micro-batches and an optimizer, counted from two: exactly the formula's FLOPs, part by part."""
    parts, by_part = counts[kind]["parts"], job.part_flops(config())
    assert parts["head and loss"]["flops"] == by_part["cross_entropy"]
    assert 6 * parts["attention"]["flops"] == 7 * by_part["attention"], "the scores are computed again"
    assert parts["clip, Muon, AdamW"]["flops"] == by_part["newton_schulz"]
    rest = sum(part["flops"] for part in parts.values()) - parts["attention"]["flops"]
    assert rest == job.flops_per_update(config()) - by_part["attention"]


def test_chunks_of_logits_move_less_and_dropout_and_scores_move_more(counts):
    moved = {kind: sum(part["bytes"] for part in count["parts"].values()) for kind, count in counts.items()}
    assert moved["lce"] < moved["plain"] < min(moved["dropout"], moved["explicit"])
    assert "dropout masks" in counts["dropout"]["parts"] and "dropout masks" not in counts["plain"]["parts"]
    for count in counts.values():
        assert count["seconds"] == sum(part["seconds"] for part in count["parts"].values())
        assert 0 < count["mfu"] < 1


@pytest.mark.slow
def test_the_command_writes_what_it_prints_and_refuses_what_it_cannot_count(tmp_path):
    out = tmp_path / "plan.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.plan_torch",
        "--preset",
        "tiny",
        "--batch_size",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run([*command, *H100], capture_output=True, text=True, check=True)
    assert "torch-eager, tiny, 1 x 1 x 256 tokens" in done.stdout and out.exists()
    for extra, said in (
        ([], f"--out {out} exists"),
        (["--mode", "torch-compile"], "--mode torch-compile is not counted"),
        (["--target", "host", "--out", ""], "--target host has no rates"),
    ):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
