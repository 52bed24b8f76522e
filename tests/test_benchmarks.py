"""The benchmark harness: a small run from end to end, what it refuses, and its arithmetic by hand."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import job, machine, report, worker
from benchmarks.driver import FOREIGN_CORES, REPEATS, Meter
from benchmarks.throughput import XLA_PRESETS, ThroughputConfig
from recipe.contract import UNIT_ROUNDOFF
from recipe.params import newton_schulz_flops, train_flops_per_token

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "batch_size": 2,
    "sequence_length": 8,
    "accumulation": 2,
    "overrides": json.dumps({"model": {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 97}}),
}


def resolve(**changes):
    precision = {"compute": "float32", "newton_schulz": "float32", "matmul": "highest", "attention": "fused"}
    return job.resolve("tiny", **{**SMALL, "dropout": 0.0, "seed": 0, **precision, **changes})


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The small benchmark as a user starts it, on one thread whatever this test runs under."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "OMP_NUM_THREADS")}
    flags = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    flags += ["--threads", "1", "--rounds", "2", "--warmup", "1", "--round_seconds", "0", *arguments]
    command = [sys.executable, "-m", "benchmarks.throughput", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept | environment, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "small"
    done = bench("--modes", "jax,torch-eager", "--shares", "True", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.mark.slow
def test_a_small_run_writes_rows_that_agree_and_add_up(finished):
    done, out = finished
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["jax", "torch-eager"]
    jax_row, torch_row = rows
    for key in job.MUST_AGREE:
        assert jax_row["contract"][key] == torch_row["contract"][key]
    assert jax_row["contract"]["threads"] == "1" and jax_row["contract"]["matmul"] == "float32"
    assert abs(jax_row["first_loss"] - torch_row["first_loss"]) <= jax_row["first_update_allowances"]["loss"]
    assert torch_row["speed_against_baseline"]["median"] == 1.0
    paired = [theirs / ours for ours, theirs in zip(jax_row["seconds"], torch_row["seconds"], strict=True)]
    assert jax_row["speed_against_baseline"]["max"] == max(paired)
    for row in rows:
        assert len(row["seconds"]) == len(row["foreign_cores"]) == 2
        assert row["tokens_per_second"] == 2 * 2 * 8 / row["seconds_per_update"]["median"]
        # No bound from above: on a busy machine the ceiling is measured at another moment than the update.
        rate = row["flops_per_update"] / row["seconds_per_update"]["median"]
        assert row["mfu"] == rate / row["ceiling_flops_per_second"] > 0
        # Fresh weights know nothing: the loss is near ln 97, and never infinite or zero.
        assert 4 < row["first_loss"] < 6
        assert row["first_update_seconds"] > 0 and report.peak_bytes(row) > 2**20
        assert {"git_commit", "versions", "cpu", "command", "date", "flop_formula"} <= row.keys()
        assert row["flags"]["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        assert row["parts"].keys() == job.PARTS.keys()
        for part in row["parts"].values():
            assert part["seconds"] > 0 and part["share"] == part["seconds"] / row["seconds_per_update"]["median"]
        assert row["first_step_seconds"]["cold"] > row["first_update_seconds"], "the start of the process counts"
    table = out.with_suffix(".md").read_text()
    assert table in done.stdout + "\n" and "| jax |" in table and "| torch-eager |" in table
    assert all(f"| {what} |" in table for what in job.PARTS.values())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_worker_at_a_time_is_started_twice_and_shows_the_warm_cache(tmp_path):
    """The notebook's path beside ours, in torch alone, which starts fastest."""
    out = tmp_path / "alone"
    arguments = ["--modes", "torch-eager,seed", "--exclusive", "True", "--shares", "True", "--out", str(out)]
    # Without torch.compile, which takes most of a minute and is the compiler's business.
    done = bench(*arguments, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stderr
    rows = {row["mode"]: row for row in map(json.loads, out.with_suffix(".jsonl").read_text().splitlines())}
    assert rows.keys() == {"torch-eager", "seed"}
    order = [line.partition(",")[0] for line in done.stdout.splitlines() if "cache: first update" in line]
    assert order == ["torch-eager", "seed", "seed", "torch-eager"]
    for row in rows.values():
        assert row["first_step_seconds"].keys() == {"cold", "warm"} and len(row["seconds"]) == 2
        assert row["parts"].keys() == job.PARTS.keys() and row["flags"]["TORCHDYNAMO_DISABLE"] == "1"
    assert rows["seed"]["contract"]["attention"] == "SDPA, K/V heads repeated"


@pytest.mark.slow
def test_a_sweep_is_drawn_as_curves(finished, tmp_path):
    rows = [json.loads(line) for line in finished[1].with_suffix(".jsonl").read_text().splitlines()]
    assert not report.plot_scaling(rows, tmp_path / "none.png") and not list(tmp_path.iterdir())
    longer = [json.loads(json.dumps(row)) for row in rows]
    for row in longer:
        row["config"]["sequence_length"] *= 2
    assert report.plot_scaling(rows + longer, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [len(group) for group in report.groups(rows + longer)] == [2, 2], "one table a shape"


def test_a_sweep_runs_every_length_with_every_batch():
    options = ThroughputConfig(batch_size="2,8", sequence_length="256,512")
    assert options.shapes == [(2, 256), (8, 256), (2, 512), (8, 512)]
    assert ThroughputConfig().shapes == [(None, None)]


def test_the_compiler_knows_the_flags_of_every_preset():
    """XLA ends the process at a flag it does not know, on a CPU too."""
    environment = os.environ | {"XLA_FLAGS": XLA_PRESETS["h100"], "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert XLA_PRESETS["none"] == "" == ThroughputConfig(xla_preset="none").xla_preset.removeprefix("none")


@pytest.mark.slow
def test_results_are_never_overwritten(finished):
    _, out = finished
    with pytest.raises(FileExistsError, match=r"never overwritten; choose another --out"):
        report.check_free(str(out))


def test_workers_with_different_thread_counts_are_refused(tmp_path):
    done = bench("--modes", "jax,torch-eager", "--out", str(tmp_path / "x"), OMP_NUM_THREADS="2")
    assert done.returncode == 2
    assert "threads is 1 in jax, 2 in torch-eager" in done.stderr and "Nothing was timed" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", job.MUST_AGREE)
def test_a_contract_that_differs_in_one_key_is_refused(key):
    contract = dict.fromkeys((field.name for field in dataclasses.fields(job.WorkContract)), "same")
    job.check_contracts({"jax": contract, "hf": contract | {"attention": "recorded only"}})
    with pytest.raises(ValueError, match=f"{key} is same in jax, other in hf"):
        job.check_contracts({"jax": contract, "hf": contract | {key: "other"}})


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_first_updates_agree_up_to_the_allowance_and_no_further(key, dtype):
    config = resolve(compute=dtype)
    allowed = job.first_update_allowances(config)[key]
    first = {"loss": 4.0, "grad_norm": 1.0}
    job.check_first_updates(config, {"jax": first, "hf": first | {key: first[key] + allowed / 2}})
    for wrong in (first[key] + 2 * allowed, float("nan")):
        with pytest.raises(ValueError, match=f"first update's {key} is"):
            job.check_first_updates(config, {"jax": first, "hf": first | {key: wrong}})


def test_a_loss_that_torch_rounds_may_be_off_by_its_rounding_and_no_further():
    config, first = resolve(compute="bfloat16"), {"loss": 4.0, "grad_norm": 1.0}
    allowed = job.first_update_allowances(config)["loss"]
    off = first | {"loss": 4.0 + allowed + 4.0 * 2.0**-10}
    job.check_first_updates(config, {"jax": first, "torch-eager-lce": off})
    for firsts in (
        {"jax": first, "hf": off},
        {"jax": first, "torch-eager-lce": off | {"loss": off["loss"] + 4.0 * 2.0**-8}},
    ):
        with pytest.raises(ValueError, match="first update's loss is"):
            job.check_first_updates(config, firsts)


def test_the_allowance_scales_with_the_round_off():
    wide, narrow = (job.rounding_error(resolve(compute=dtype)) for dtype in ("float32", "bfloat16"))
    # In bfloat16 the 16 stored values of one block and the head are all that counts: u sqrt(16).
    # What float32 adds is added in quadrature, so it lies between nothing and all of it.
    assert 4 * 2**-8 <= narrow <= 4 * 2**-8 + wide
    assert wide < narrow / 2**8


def test_flops_by_hand():
    config = resolve()
    assert (config.model.num_attention_heads, config.model.head_dim, config.model.intermediate_size) == (6, 32, 512)
    # q 192 x 32, k and v 64 x 32, o 32 x 192, three of 512 x 32, the head 97 x 32; keys seen: mean of 1..8.
    weights = 192 * 32 + 2 * 64 * 32 + 32 * 192 + 3 * 512 * 32 + 97 * 32
    per_token = 6 * weights + 12 * 6 * 32 * 4.5
    assert train_flops_per_token(config.model, 8) == per_token
    newton_schulz = sum(5 * (4 * 32 * 32 * m + 2 * 32**3) for m in (192, 64, 64, 192, 512, 512, 512))
    assert newton_schulz_flops(config.model) == newton_schulz
    assert job.flops_per_update(config) == 32 * per_token + newton_schulz


def test_parts_and_the_other_products_make_the_whole():
    config = resolve()
    parts, tokens = job.part_flops(config), 32
    assert parts["attention"] == tokens * 12 * 6 * 32 * 4.5
    assert parts["cross_entropy"] == tokens * 6 * 97 * 32
    projections = 192 * 32 + 2 * 64 * 32 + 32 * 192 + 3 * 512 * 32
    rest = tokens * 6 * projections
    assert sum(parts.values()) - parts["newton_schulz"] + rest == job.flops_per_update(config)


def test_the_ceiling_is_the_best_rate_of_a_product(monkeypatch):
    clock, calls = [0.0], []

    def square_product(size):
        def product(count):
            calls.append(size)
            rate = 2**32 if len(calls) == 3 else 2**31  # powers of two: no time is rounded
            clock[0] += count * 2 * size**3 / rate

        return product

    monkeypatch.setattr(worker, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    rate = worker._ceiling(types.SimpleNamespace(square_product=square_product), "cpu")["flops_per_second"]
    assert rate == 2**32


def test_statistics_by_hand():
    row = report.summarise(
        "jax", seconds=[1.0, 2.0, 4.0], baseline_seconds=[2.0, 2.0, 3.0], flops=30.0, tokens=8, ceiling=60.0
    )
    assert row["seconds_per_update"] == {"median": 2.0, "min": 1.0, "max": 4.0, "mad": 1.0}
    assert row["speed_against_baseline"] == {"median": 1.0, "min": 0.75, "max": 2.0, "mad": 0.25}
    assert (row["tokens_per_second"], row["mfu"]) == (4.0, 0.25)


def test_batches_are_a_pure_function_of_seed_and_index():
    config = resolve()
    prints = [job.fingerprint(dict(zip("xy", job.make_batch(config, index), strict=True))) for index in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    inputs, targets = job.make_batch(config, 0)
    assert inputs.shape == (2, 2, 8) and (inputs[..., 1:] == targets[..., :-1]).all()


class FakeWorker:
    """A worker whose measurement takes a second of its own CPU while others use the given cores."""

    mode = "fake"

    def __init__(self, monkeypatch, foreign: list[float]) -> None:
        self.foreign, self.clock = iter(foreign), 0.0
        monkeypatch.setattr(machine, "busy_seconds", lambda cpus: self.clock)

    def ask(self, do: str, updates: int) -> dict:
        self.clock += 1.0 + next(self.foreign) + machine.TICK
        return {"seconds": 1.0, "cpu_seconds": 1.0}


def test_a_disturbed_measurement_is_repeated_and_the_quietest_kept(monkeypatch):
    meter = Meter([0], guard=True, strict=False)
    # The clock runs to about 4 s, and a share is a difference of two readings.
    exact = 4 * 4 * UNIT_ROUNDOFF["float64"]
    assert abs(meter.quietest(FakeWorker(monkeypatch, [0.9, 0.05, 0.0]), 1)["foreign"] - 0.05) <= exact
    always = meter.quietest(FakeWorker(monkeypatch, [0.9, 0.5, 0.8, 0.7]), 1)
    assert meter.noisy(always) and abs(always["foreign"] - 0.5) <= exact
    strict = Meter([0], guard=True, strict=True)
    with pytest.raises(ValueError, match=rf"in {1 + REPEATS} measurements, above {FOREIGN_CORES}"):
        strict.quietest(FakeWorker(monkeypatch, [0.9] * 4), 1)
    assert not Meter([0], guard=False, strict=True).noisy(always)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": "jax,tensorflow"}, "--modes tensorflow is unknown"),
        ({"modes": "jax,jax"}, "names a mode twice"),
        ({"rounds": 0}, "--rounds 0 must be at least 1"),
        ({"warmup": 0}, "--warmup 0 must be at least 1"),
        ({"round_seconds": -1.0}, "--round-seconds -1.0 must be at least 0"),
        ({"threads": -1}, "--threads -1 must be at least 0"),
        ({"modes": "jax,hf", "dropout": 0.1}, "--dropout 0.1 excludes mode hf"),
        ({"modes": "jax,seed", "dropout": 0.1}, "--dropout 0.1 excludes mode seed"),
        ({"batch_size": "2,x"}, "--batch_size 2,x must be whole numbers"),
        ({"sequence_length": "0"}, "--sequence_length 0 must be whole numbers"),
        ({"xla_preset": "fast"}, "--xla-preset fast is unknown; choose from none, "),
        ({"exclusive": True, "rounds": 1}, "--rounds 1 must be at least 2 with --exclusive"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ThroughputConfig(**changes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{", "is not JSON"),
        ('{"model": {"width": 3}}', "has no field model"),
        ('{"modle": {}}', "has no field 'modle'"),
    ],
)
def test_bad_overrides_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        resolve(overrides=overrides)


def test_fields_that_have_no_flag_can_be_set_all_the_same():
    settings = dict(batch_size=None, sequence_length=None, accumulation=None, dropout=0.0, seed=0)
    precision = dict(compute="bfloat16", newton_schulz="bfloat16", matmul="highest", attention="fused")
    overrides = '{"precision": {"deterministic": true, "remat": true}}'
    config = job.resolve("seed", **settings, **precision, overrides=overrides)
    assert (config.precision.deterministic, config.precision.remat, config.precision.compute) == (
        True,
        True,
        "bfloat16",
    )
