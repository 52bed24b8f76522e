"""Steps of one's own: what is timed and how, what is refused and when; most of it without a framework's seconds."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import driver, job, machine, pair, report, step_worker, throughput
from benchmarks.driver import Meter
from benchmarks.throughput import ThroughputConfig
from recipe.config import UserError
from tests import plain_steps

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = "docs/examples/throughput_steps.py"
QUICK = {"rounds": 2, "warmup": 1, "round_seconds": 0.0, "threads": 1}
PLAIN = "tests.plain_steps"


@pytest.fixture
def plain(monkeypatch):
    """Both sides are plain Python, on one thread."""
    monkeypatch.setattr(pair, "MODULES", dict.fromkeys(pair.MODULES, PLAIN))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def on_one_thread(**more: str) -> dict[str, str]:
    flags = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    return os.environ | flags | more


def bench(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.throughput", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)


def test_the_example_is_timed_in_both_frameworks(monkeypatch):
    for name in ("OMP_NUM_THREADS", "XLA_FLAGS"):
        monkeypatch.setenv(name, on_one_thread()[name])
    rows = pair.time_pair(f"{EXAMPLE}:jax_step", f"{EXAMPLE}:torch_step", **QUICK).rows
    contracts = [row["contract"] for row in rows]
    assert all(contracts[0][name] == contracts[1][name] for name in pair.MUST_AGREE)
    assert [contract["framework"].partition(" ")[0] for contract in contracts] == ["jax", "torch"]
    assert (contracts[0]["matmul"], contracts[0]["params"], contracts[0]["items"]) == ("float32", "float32", "256")
    # The same weights and rows: sums of so many terms in float32, on either side.
    terms = 64 + 512 + 512 + 10 + 256
    first, last = ([row[name] for row in rows] for name in ("first_loss", "last_loss"))
    assert abs(first[0] - first[1]) <= 2 * terms * 2.0**-24 * max(first)
    assert last[0] < first[0] and last[1] < first[1], "whole updates: it learns"


@pytest.mark.slow
def test_the_command_line_writes_the_same_and_torch_compiles(tmp_path):
    out = tmp_path / "pair"
    steps = ["--jax-step", f"{EXAMPLE}:jax_step", "--torch-step", f"{EXAMPLE}:torch_compiled_step"]
    how = ["--threads", "1", "--rounds", "2", "--round_seconds", "0"]
    done = bench(*steps, *how, "--out", str(out), env=on_one_thread())
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == steps[1::2]
    assert out.with_suffix(".md").read_text(encoding="utf-8") in done.stdout + "\n"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    again = bench(*steps, *how, "--out", str(out), env=on_one_thread())
    assert again.returncode == 2 and "never overwritten" in again.stderr


def test_rows_ratio_table_and_picture_say_the_same(plain, tmp_path):
    timed = pair.time_pair(plain_steps.counting, f"{ROOT}/tests/plain_steps.py:printing", **QUICK)
    first, second = timed.rows
    medians = [row["seconds_per_update"]["median"] for row in timed.rows]
    assert timed.seconds == dict(zip(("jax", "torch"), medians, strict=True))
    ratios = [theirs / ours for ours, theirs in zip(first["seconds"], second["seconds"], strict=True)]
    assert timed.ratio == report.spread(ratios) and second["speed_against_baseline"]["max"] == 1.0
    assert (first["items_per_second"], first["flops_per_second"]) == (4 / medians[0], 8 / medians[0])
    # A first update, one to warm up, two rounds: each measurement, of one update here, is waited for.
    measurements = 2 + sum(row["updates_per_measurement"] for row in [first, first])
    assert first["first_loss"] == 1.0 and first["last_loss"] >= measurements
    assert first["first_step_seconds"]["cold"] > first["first_update_seconds"] and report.peak_bytes(first) > 2**20
    processes = {row["contract"]["framework"] for row in timed.rows}
    assert len(processes) == 2 and f"plain {os.getpid()}" not in processes
    text = str(timed)
    assert text == timed.table and "| jax | plain " in text and "| torch | plain " in text
    assert "4 rows per step; dtype float32" in text and "First losses: 1 in jax, 1 in torch." in text
    assert set(timed.noise) == {"jax", "torch"}
    written = report.write(timed.rows, str(tmp_path / "out"), table=pair.markdown, bars=pair.plot)
    assert written[2].read_bytes().startswith(b"\x89PNG") and written[1].read_text(encoding="utf-8") == text
    timed.plot(tmp_path / "bars.svg")
    drawn = (tmp_path / "bars.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")


def test_two_steps_of_one_framework_are_told_apart(plain):
    timed = pair.time_pair(plain_steps.silent, plain_steps.silent, frameworks=("torch", "torch"), items=3, **QUICK)
    names = [f"{PLAIN}:silent", f"{PLAIN}:silent (again)"]
    assert list(timed.seconds) == names and timed.rows[0]["baseline"] == names[1]
    assert "3 items per step; dtype not stated" in timed.table and timed.rows[0]["first_loss"] is None


REFUSED = {
    "items": (f"{PLAIN}:more_items", "items is 4 in jax, 8 in torch. Nothing was timed; make them agree"),
    "a step that says nothing": (f"{PLAIN}:silent", "dtype is float32 in jax, not stated in torch; items is 4 in jax"),
    "while it is built": (f"{PLAIN}:failing", "the torch step: tests.plain_steps:failing raised RuntimeError: no such"),
    "in its first update": (f"{PLAIN}:failing_later", "failing_later raised RuntimeError: out of luck; its traceback"),
    "a precision set by the first update": (f"{PLAIN}:narrowing", "matmul is float32 in jax, TF32 in torch"),
    "a function that needs arguments": (f"{PLAIN}:takes_an_argument", "missing 1 required positional argument"),
    "no function of this name": (f"{PLAIN}:counted", "tests.plain_steps has no counted; name a function in it"),
    "no module of this name": ("not_installed:step", "there is no module not_installed; run where it lies"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(case, plain, monkeypatch):
    other, message = REFUSED[case]
    monkeypatch.setattr(Meter, "rounds", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(UserError) as refused:
        pair.time_pair(plain_steps.counting, other, **QUICK)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_times_itself_may_not_do_so_as_it_is_read(plain, tmp_path):
    script = tmp_path / "script.py"
    source = "from benchmarks.pair import time_pair\ndef step():\n    return lambda: None\ntime_pair(step, step)\n"
    script.write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match="put the call under if __name__ =="):
        pair.time_pair(f"{script}:step", f"{script}:step", **QUICK)


def test_functions_that_another_process_would_not_find_are_refused(monkeypatch):
    def within():
        return lambda: None

    method = Meter([], guard=False, strict=False).once
    for step in (lambda: None, within, method, functools.partial(within)):
        with pytest.raises(UserError, match="define a plain function at the top of a file"):
            pair.reference(step)
    assert pair.reference(plain_steps.counting) == f"{PLAIN}:counting"

    main = types.ModuleType("__main__")
    exec("def step(): ...", main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(UserError, match=r"in a notebook or at the prompt.*write it into a file.*'FILE\.py:step'"):
        pair.reference(main.step)
    main.__file__ = "script.py"
    assert pair.reference(main.step) == f"{Path.cwd() / 'script.py'}:step"
    main.__spec__ = types.SimpleNamespace(name="package.steps")
    assert pair.reference(main.step) == "package.steps:step"


@pytest.mark.parametrize("text", ["steps", ":step", "steps.py:", "steps:1", "steps:a-b", "none.py:step"])
def test_texts_that_name_no_function_are_refused(text):
    with pytest.raises(UserError, match=r"names no function|is no file"):
        pair.reference(text)


def test_flags_and_environment_are_checked_before_anything_starts(monkeypatch):
    monkeypatch.setattr(driver, "launch", lambda *_: pytest.fail("a worker was started"))
    for module in (pair, throughput):
        monkeypatch.setattr(module, "launch", driver.launch)
    monkeypatch.setattr(machine, "physical_cores", lambda: [0, 1])
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with pytest.raises(UserError, match=r"threads is 2 in jax, 1 in torch\. Nothing was timed"):
        pair.time_pair(plain_steps.counting, plain_steps.counting)
    ours = dict(preset="tiny", newton_schulz="float32")
    with pytest.raises(UserError, match="threads is 2 in jax, 1 in torch-eager"):
        throughput.throughput(ThroughputConfig(**ours, modes="jax,torch-eager"))
    with pytest.raises(UserError, match="newton_schulz is float32 in torch-eager, bfloat16 in hf"):
        throughput.throughput(ThroughputConfig(**ours, modes="torch-eager,hf"))
    for how, message in {"rounds": "rounds=0", "warmup": "warmup=0", "round_seconds": "round_seconds=-1"}.items():
        with pytest.raises(UserError, match=message):
            pair.time_pair(plain_steps.counting, plain_steps.counting, **{how: int(message.rpartition("=")[2])})
    with pytest.raises(UserError, match="framework 'tensorflow' is unknown; choose from jax, torch"):
        pair.time_pair(plain_steps.counting, plain_steps.counting, frameworks=("jax", "tensorflow"))
    for threads, message in {3: "exceeds the 2 cores", -1: "must be at least 0"}.items():
        with pytest.raises(UserError, match=message):
            pair.time_pair(plain_steps.counting, plain_steps.counting, threads=threads)


def foreseen(overrides: str = "", modes: str = "seed", **more):
    precision = dict(compute="float32", newton_schulz="float32", matmul="highest", attention="fused")
    sizes = dict(batch_size=None, sequence_length=None, accumulation=None, dropout=0.0, seed=0)
    config = job.resolve("tiny", **sizes, **precision, overrides=overrides)
    job.check_foreseen(config, modes.split(","), **{"cpus": 1, "on_gpu": False} | more)


def test_what_a_mode_cannot_do_is_told_before_it_starts(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for overrides, message in {
        '{"model": {"sliding_window": 8}}': "mode seed has no sliding window",
        '{"muon": {"weight_decay": 0.1}}': r"mode seed has no muon\.weight_decay=0\.1",
    }.items():
        with pytest.raises(UserError, match=message):
            foreseen(overrides)
    monkeypatch.setattr(job.importlib.metadata, "version", lambda name: "2.11.0+cu128")
    with pytest.raises(UserError, match=r"mode torch-eager-lce needs .* which torch 2\.11\.0\+cu128 lacks"):
        foreseen(modes="torch-eager-lce")
    monkeypatch.setattr(job.importlib.metadata, "version", lambda name: "2.13.0")
    foreseen(modes="torch-eager-lce")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(job.shutil, "which", lambda name: None)
    for modes in ("jax,torch-compile", "torch-compile-lce", "seed"):
        with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and there is none here; install g\+\+"):
            foreseen(modes=modes)
    foreseen(modes="jax,torch-eager", cpus=1)
    foreseen(modes="torch-compile", on_gpu=True)
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    for modes, name in {"jax,torch-eager": "torch", "hf": "torch"}.items():
        with pytest.raises(ModuleNotFoundError) as missing:
            foreseen(modes=modes)
        assert missing.value.name == name
    foreseen(modes="jax")


class Waits:
    """A framework that counts how often it is waited for."""

    def __init__(self) -> None:
        self.calls: list = []

    def describe(self) -> dict[str, str]:
        return {"framework": "plain", "threads": "1"}

    def wait(self, result) -> None:
        self.calls.append(result)


def stepper(made, items=None, monkeypatch=None) -> step_worker.Stepper:
    job = {"reference": "steps:made", "items": items, "launched": 0.0}
    monkeypatch.setattr(step_worker, "load", lambda reference: lambda: made)
    found = step_worker.Stepper(Waits(), job)
    found.answer = found.guarded(found.start)({})
    return found


def test_so_many_updates_are_taken_and_the_last_is_waited_for(monkeypatch):
    calls = []
    timed = stepper((lambda: calls.append(1) or len(calls), {"items": 7}), items=3, monkeypatch=monkeypatch)
    answer = timed.run({"updates": 5})
    assert len(calls) == 5 and timed.framework.calls == [5] and answer["loss"] == 5.0
    assert timed.facts.items == 7, "what the function states goes before what the caller does"
    assert timed.answer["contract"]["items"] == "7" and timed.answer["contract"]["dtype"] == step_worker.NOT_STATED
    assert stepper(lambda: None, items=3, monkeypatch=monkeypatch).facts.items == 3


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (3.0, "returned float, not a step; let it return a function that does one update"),
        ((len, [1]), "returned list beside its step; make it a dict"),
        ((len, {"item": 3}), "states 'item'; did you mean items? Known are items, unit, dtype, flops"),
        ((len, {"items": 0}), "items=0 of a step is not a positive number"),
        ((len, {"flops": float("inf")}), "flops=inf of a step is not a positive number"),
        ((len, {"items": True}), "items=True of a step is not a positive number"),
        ((len, {"dtype": 32}), "dtype=32 of a step is not a text"),
        ((len, {"unit": ""}), "unit='' of a step is not a text"),
    ],
)
def test_what_a_function_returns_is_checked(made, message, monkeypatch):
    assert message in stepper(made, monkeypatch=monkeypatch).answer["refused"]


def test_the_loss_is_found_in_what_a_step_returns():
    class Scalar:
        ndim = 0

        def __init__(self, attached):
            self.attached = attached

        def detach(self):
            return Scalar(False)

        def __float__(self):
            assert not self.attached
            return 2.5

    state = {"w": [1.0]}
    for result in (2.5, Scalar(True), (state, Scalar(True)), [2.5, state], {"loss": Scalar(True), "other": 1.0}):
        assert step_worker.loss_of(result) == 2.5
    for result in (None, state, (1.0, 2.0), {"w": 1.0}, "loss"):
        assert step_worker.loss_of(result) is None


class Turns:
    """A worker whose updates take no time that counts, and who notes his turn."""

    def __init__(self, mode: str, seconds: float, turns: list) -> None:
        self.mode, self.seconds, self.turns = mode, seconds, turns

    def ask(self, do: str, updates: int) -> dict:
        self.turns.append((self.mode, updates))
        return {"seconds": self.seconds * updates, "cpu_seconds": 0.0}


def test_the_order_turns_every_round_and_all_take_as_many_updates(monkeypatch):
    monkeypatch.setattr(machine, "busy_seconds", lambda cpus: 0.0)
    turns: list = []
    workers = [Turns("a", 0.5, turns), Turns("b", 0.25, turns)]
    meter = Meter([0], guard=True, strict=False)
    rounds = list(meter.rounds(workers, rounds=3, warmup=2, seconds=1.0))
    # At least a second of the fastest: four updates each.
    assert turns == [("a", 1), ("b", 1)] * 2 + [("a", 4), ("b", 4), ("b", 4), ("a", 4), ("a", 4), ("b", 4)]
    assert [answers["a"]["seconds"] for answers in rounds] == [2.0] * 3


def test_noise_is_others_on_a_cpu_and_a_busy_or_unsteady_gpu():
    quiet, loud = {"foreign": 0.0, "seconds": 1.0, "updates": 1}, {"foreign": 0.5, "seconds": 1.5, "updates": 1}
    meter = Meter([0], guard=True, strict=False)
    assert meter.noise([quiet, quiet], None) == "" and "up to 0.50 cores" in meter.noise([quiet, loud], None)
    meter.guard = False
    idle, busy = ({"utilisation": share, "bytes": 0} for share in (0.0, 0.5))
    assert meter.noise([quiet, quiet], idle) == "" and meter.noise([quiet, loud], idle) == "rounds differ by 50%"
    assert "keep the GPU 50% busy" in meter.noise([quiet, quiet], busy)
    with pytest.raises(UserError, match="wait until it is idle or drop --strict"):
        driver.refuse_a_busy_gpu(busy, strict=True)
    driver.refuse_a_busy_gpu(busy, strict=False)


def test_strict_fails_where_times_are_noisy(plain, monkeypatch):
    monkeypatch.setattr(Meter, "noise", lambda *_: "others used up to 0.50 cores")
    monkeypatch.setattr(Meter, "noisy", lambda *_: False)
    with pytest.raises(UserError, match=r"too noisy: .*0\.50 cores"):
        pair.time_pair(plain_steps.counting, plain_steps.counting, strict=True, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jax_step": "a:b"}, "--torch-step and --jax-step go together"),
        ({"torch_step": "a:b"}, "--jax-step and --torch-step go together"),
        ({"preset": "seed"}, "--preset seed is of this project's own model"),
        ({"exclusive": True}, "--exclusive True is of this project's own model"),
        ({"batch_size": "4"}, "--batch-size 4 is of this project's own model"),
    ],
)
def test_flags_of_the_modes_do_not_go_with_a_pair(options, message):
    alone = {} if "go together" in message else {"jax_step": "a:b", "torch_step": "c:d"}
    with pytest.raises(UserError, match=message):
        ThroughputConfig(**alone, **options)


def test_a_pair_takes_the_flags_that_go_with_it(monkeypatch, capsys):
    seen = {}

    def time_pair(a, b, **how):
        seen.update(how, steps=(a, b))
        row = {"mode": "jax"}
        return pair.Pair([row])

    monkeypatch.setattr(pair, "time_pair", time_pair)
    monkeypatch.setattr(pair, "markdown", lambda rows: f"table of {rows[0]['mode']}")
    flags = "--rounds 3 --warmup 4 --round_seconds 0.5 --threads 1 --strict True"
    throughput.main(["--jax-step", "a:b", "--torch-step", "c:d", *flags.split()])
    how = {"rounds": 3, "warmup": 4, "round_seconds": 0.5, "threads": 1, "strict": True}
    assert seen == how | {"steps": ("a:b", "c:d")} and "table of jax" in capsys.readouterr().out


def test_the_default_modes_have_torch_compile():
    assert ThroughputConfig().mode_list == ["jax", "torch-eager", "torch-compile"]
    names = {field.name for field in dataclasses.fields(ThroughputConfig)}
    assert set(throughput.OF_A_PAIR) < names


def test_a_report_reads_the_rows_of_modes_alone(tmp_path, monkeypatch):
    rows = tmp_path / "pair.jsonl"
    rows.write_text(json.dumps({"kind": "steps"}) + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(rows), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"pair\.jsonl holds rows of something else"):
        report.main()
