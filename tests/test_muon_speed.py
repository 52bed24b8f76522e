"""The benchmark of Muon alone: a small run from end to end, its FLOPs against the compiler's, what it refuses."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import muon_speed, muon_speed_jax, muon_speed_torch
from benchmarks.muon_speed import ROWS, STEPS, MuonSpeedConfig, flops, markdown, matrices, verdict
from jax_impl.muon import KELLER_JORDAN, orthogonalize_via_newton_schulz
from recipe.params import newton_schulz_flops
from recipe.presets import get_preset

ROOT = Path(__file__).resolve().parents[1]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    """The benchmark as a user starts it, on one thread; without torch.compile, which takes a minute of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "OMP_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.muon_speed", "--threads", "1", *arguments]
    environment = kept | {"TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


SMALL = ["ours", "ours-gram", "optax", "torch-ref", "torch", "dion", "notebook"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "small"
    done = bench(
        "--preset",
        "tiny",
        "--layers",
        "1",
        "--rounds",
        "2",
        "--warmup",
        "0",
        "--rows",
        ",".join(SMALL),
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.mark.slow
def test_a_small_run_times_every_row_and_its_table_adds_up(finished):
    done, out = finished
    result = json.loads(out.with_suffix(".json").read_text())
    assert [row["row"] for row in result["rows"]] == SMALL
    ours = result["rows"][0]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["first_update_seconds"] > 0
        paired = [own / theirs for own, theirs in zip(row["seconds"], ours["seconds"], strict=True)]
        assert row["against_ours"]["min"] == min(paired) and row["against_ours"]["max"] == max(paired)
        rate = result["best_product_flops_per_second"][row["newton_schulz"]]
        assert row["floor_seconds"] == row["flops"] / rate > 0
        # On one core CPU time counts.
        assert row["share_of_floor"] == row["floor_seconds"] / row["cpu_seconds_per_update"]["median"]
    assert ours["flops"] == newton_schulz_flops(get_preset("tiny").model) / get_preset("tiny").model.num_hidden_layers
    assert result["processes"]["jax"]["gradients"] == result["processes"]["torch"]["gradients"]
    assert {"git_commit", "versions", "cpu", "command", "date", "load_average_before"} <= result.keys()
    table = out.with_suffix(".md").read_text()
    columns = ["row", "what", "iterates in", "GFLOP", "ms, median (min–max)", "CPU ms, median (min–max)"]
    columns += ["time / ours (min–max)", "CPU time / ours (min–max)", "floor / CPU time", "first update off by"]
    assert f"| {' | '.join(columns)} |" in table
    assert all(f"| {name} | {ROWS[name].what} |" in table for name in SMALL) and table in done.stdout
    assert f"Best of the others in bfloat16, by CPU time: `{verdict(result)['best']}`" in table and table == markdown(
        result
    )


@pytest.mark.slow
def test_the_first_updates_are_the_same_but_for_rounding(finished):
    result = json.loads(finished[1].with_suffix(".json").read_text())
    off = {row["row"]: row["first_update_difference"] for row in result["rows"]}
    assert off.pop("ours") == 0.0
    assert all(0 < difference <= muon_speed.ALLOWED for difference in off.values())


@pytest.mark.slow
def test_the_best_of_the_others_iterates_in_the_same_dtype_and_is_not_ours(finished):
    result = json.loads(finished[1].with_suffix(".json").read_text())
    assert ROWS[verdict(result)["best"]].theirs and verdict(result)["best"] != "optax"
    result["options"]["dtype"] = "float16"
    assert verdict(result) == {} and "Best of the others" not in markdown(result)


def test_every_row_has_an_optimizer():
    known = {"jax": muon_speed_jax.ROWS, "torch": muon_speed_torch.ROWS}
    for process, builders in known.items():
        assert list(builders) == [name for name, row in ROWS.items() if row.process == process]


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("shape", [(128, 512), (512, 128), (128, 256), (160, 160)])
def test_flops_are_those_of_the_compiled_program(shape, gram):
    """Elementwise work comes on top: less than 16 operations per entry of X and of A in every step."""
    n, m = sorted(shape)
    pays = gram and m > 1.5 * n
    # The plain form is a loop, whose body the compiler counts once whatever its trips: one step of it is compiled.
    steps = STEPS if pays else 1
    function = functools.partial(
        orthogonalize_via_newton_schulz, gram=gram, dtype="float32", coefficients=KELLER_JORDAN[:steps]
    )
    argument = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = jax.jit(function).lower(argument).compile().cost_analysis()["flops"] * STEPS / steps
    counted = flops([shape], gram=gram)
    assert counted <= compiled <= counted + 16 * STEPS * (n * m + n * n)
    assert (counted == 5 * (4 * n * n * m + 2 * n**3)) != pays


def test_flops_of_the_gram_form_by_hand():
    """Three times X X^T and Q X; five B, four products for two new A, two for two new Q."""
    assert flops([(2, 10)], gram=True) == 3 * 2 * (2 * 2 * 2 * 10) + (5 + 4 + 2) * 2 * 2**3
    assert flops([(2, 2)], gram=True) == flops([(2, 2)], gram=False) == 5 * (4 * 8 + 2 * 8)


def test_matrices_are_the_presets():
    assert len(matrices("seed")) == 42 and len(matrices("qwen3-0.6b")) == 196
    assert len(matrices("qwen3-0.6b", 1)) == 7
    assert flops(matrices("seed").values(), gram=False) == newton_schulz_flops(get_preset("seed").model)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        *(("rows", "ours,ourz", "ourz"), ("rows", "ours,ours", "ours,ours"), ("rows", "torch", "torch")),
        *(("rounds", 0, "0"), ("updates", 0, "0"), ("layers", -1, "-1"), ("warmup", -1, "-1")),
    ],
)
def test_bad_options_are_refused(field, value, named):
    with pytest.raises(ValueError, match=f"--{field} {named} "):
        dataclasses.replace(MuonSpeedConfig(), **{field: value})


@pytest.mark.parametrize("arguments", [("--layers", "5", "--preset", "tiny"), ("--rows", "ours,ourz")])
def test_a_mistake_is_one_line_and_exit_code_2(arguments):
    done = bench(*arguments)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert arguments[0] in done.stderr
