"""Time training updates of both frameworks side by side: `python -m benchmarks.throughput --help`.

One process per mode, each with the same weights, batches and precision; the driver imports no framework. It steps the
workers in turn and reverses the order every round, so that noise and clock drift hit all alike.
"""

import contextlib
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import job, machine, report
from recipe.cli import parse, run
from recipe.config import RunConfig, require, to_dict
from recipe.runlog import git_commit, installed_versions

ROOT = Path(__file__).resolve().parents[1]
MODES = {
    "jax": "benchmarks.worker_jax",
    "torch-eager": "benchmarks.worker_torch",
    "torch-compile": "benchmarks.worker_torch",
    "torch-compile-max": "benchmarks.worker_torch",
    "hf": "benchmarks.worker_torch",
}
"""Mode -> the module of its worker."""

BASELINE = "torch-eager"
# CPU cores that others may use during a measurement on a CPU, and how often a disturbed one is repeated.
FOREIGN_CORES, REPEATS = 0.15, 3


@dataclass(frozen=True)
class ThroughputConfig:
    """One benchmark: a table with one row per mode."""

    preset: str = "tiny"
    """The model and recipe to time."""
    batch_size: int | None = None
    """Sequences per micro-batch; None takes the preset's."""
    sequence_length: int | None = None
    """Tokens per sequence; None takes the preset's."""
    accumulation: int | None = None
    """Micro-batches per update; None takes the preset's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters stay in float32."""
    newton_schulz: Literal["float32", "bfloat16"] = "bfloat16"
    """Stored dtype of the Newton-Schulz iteration."""
    matmul: Literal["default", "highest"] = "highest"
    """float32 products: highest is true float32; default lets a GPU use TF32."""
    attention: Literal["fused", "explicit"] = "fused"
    """fused is the framework's kernel where it has one (SDPA, cuDNN), explicit this project's query blocks."""
    dropout: float = 0.0
    """Dropout rate; hf has none, and with it no side uses its fused attention."""
    modes: str = "jax,torch-eager"
    """Comma-separated: jax, torch-eager, torch-compile, torch-compile-max (max-autotune, GPU only), hf (its Qwen3)."""
    rounds: int = 5
    """Measured rounds; every mode is timed once in each."""
    warmup: int = 2
    """Rounds after the first update that do not count."""
    round_seconds: float = 1.0
    """A measurement lasts about this long at least, in whole updates, the same number for every mode."""
    threads: int = 0
    """CPU cores each worker is pinned to; 0 is every physical core."""
    strict: bool = False
    """Fail instead of marking a row as noisy."""
    seed: int = 0
    """Seeds weights and batches."""
    overrides: str = ""
    """JSON over the preset, e.g. {"model": {"num_hidden_layers": 1}}."""
    out: str = ""
    """Results are written to OUT.jsonl, OUT.md and OUT.png, never over older ones; empty prints the table only."""

    def __post_init__(self) -> None:
        modes = self.mode_list
        for mode in modes:
            require(mode in MODES, f"--modes {mode} is unknown; choose from {', '.join(MODES)}.")
        require(len(set(modes)) == len(modes), f"--modes {self.modes} names a mode twice; name each once.")
        require(self.rounds >= 1, f"--rounds {self.rounds} must be at least 1; choose e.g. 5.")
        require(self.warmup >= 1, f"--warmup {self.warmup} must be at least 1; choose e.g. 2.")
        require(self.round_seconds >= 0, f"--round-seconds {self.round_seconds} must be at least 0; choose e.g. 1.")
        require(self.threads >= 0, f"--threads {self.threads} must be at least 0; choose 0 for all physical cores.")
        require("hf" not in modes or self.dropout == 0, f"--dropout {self.dropout} excludes mode hf; use 0 or drop it.")

    @property
    def mode_list(self) -> list[str]:
        """The modes in the order given."""
        return self.modes.split(",")


class Worker:
    """A worker process, its pipe, and the CPUs it is pinned to."""

    def __init__(self, mode: str, config: RunConfig, cpus: list[int]) -> None:
        self.mode = mode
        # Cold compilation, and memory taken as needed: two frameworks may share one GPU.
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)  # inherited by the child, whose frameworks size their thread pools by it
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODES[mode]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        finally:
            os.sched_setaffinity(0, before)
        self.send({"mode": mode, "config": to_dict(config)})

    def send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"worker {self.mode} ended early; its error stands above") from None

    def receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.mode} ended with code {self.process.wait()}; its error stands above")
        return json.loads(line)

    def ask(self, do: str, **values) -> dict[str, Any]:
        self.send({"do": do, **values})
        return self.receive()

    def close(self) -> None:
        """Let it finish, or end it if it does not."""
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Meter:
    """Times a worker's updates and the CPU that everything else used meanwhile."""

    def __init__(self, cpus: list[int], guard: bool, strict: bool) -> None:
        self.cpus, self.guard, self.strict = cpus, guard, strict

    def once(self, worker: Worker, updates: int) -> dict[str, float]:
        """One measurement; `foreign` is the mean number of these CPUs that others kept busy."""
        before = machine.busy_seconds(self.cpus)
        answer = worker.ask("run", updates=updates)
        busy = machine.busy_seconds(self.cpus) - before
        # The kernel counts in ticks, so up to one per CPU at either end is not evidence of anyone.
        foreign = max(0.0, busy - answer["cpu_seconds"] - machine.TICK * len(self.cpus)) / answer["seconds"]
        return answer | {"updates": updates, "foreign": foreign}

    def quietest(self, worker: Worker, updates: int) -> dict[str, float]:
        """A measurement that others left alone, or the least disturbed of 1 + REPEATS."""
        best = self.once(worker, updates)
        for _ in range(REPEATS):
            if not self.noisy(best):
                break
            print(f"  {worker.mode}: others used {best['foreign']:.2f} cores; measuring again", flush=True)
            best = min(best, self.once(worker, updates), key=lambda answer: answer["foreign"])
        require(
            not (self.strict and self.noisy(best)),
            f"others used {best['foreign']:.2f} cores beside {worker.mode} in {1 + REPEATS} measurements, above "
            f"{FOREIGN_CORES}; quieten the machine or drop --strict.",
        )
        return best

    def noisy(self, answer: dict[str, float]) -> bool:
        return self.guard and answer["foreign"] > FOREIGN_CORES


def throughput(options: ThroughputConfig) -> list[dict[str, Any]]:
    """Run the benchmark and return one row per mode; raises ValueError where the modes cannot be compared."""
    require(sys.platform == "linux", f"this runs on {sys.platform}, but the benchmark reads /proc; use Linux.")
    config = job.resolve(
        options.preset,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        accumulation=options.accumulation,
        overrides=options.overrides,
        dropout=options.dropout,
        seed=options.seed,
        compute=options.dtype,
        newton_schulz=options.newton_schulz,
        matmul=options.matmul,
        attention=options.attention,
    )
    cores = machine.physical_cores()
    require(options.threads <= len(cores), f"--threads {options.threads} exceeds the {len(cores)} cores; lower it.")
    cpus = cores[: options.threads or len(cores)]
    report.check_free(options.out)
    print(
        f"{machine.cpu_name()}; pinned to {len(cpus)} cores; {job.flops_per_update(config):.4g} FLOPs per update",
        flush=True,
    )

    workers: list[Worker] = []
    try:
        for mode in options.mode_list:
            workers.append(Worker(mode, config, cpus))
        return _measure(options, config, workers, cpus)
    finally:
        for worker in workers:
            worker.close()


def _measure(options: ThroughputConfig, config: RunConfig, workers: list[Worker], cpus: list[int]) -> list[dict]:
    described = {worker.mode: worker.receive() for worker in workers}
    for mode, answer in described.items():
        print(f"{mode}: {json.dumps(answer['contract'])}", flush=True)
    job.check_contracts({mode: answer["contract"] for mode, answer in described.items()})
    on_gpu = described[workers[0].mode]["contract"]["backend"] == "gpu"
    if not on_gpu:
        for worker in [worker for worker in workers if worker.mode == "torch-compile-max"]:
            print("torch-compile-max: skipped, as max-autotune needs a GPU", flush=True)
            workers.remove(worker)
            worker.close()
        require(bool(workers), "--modes torch-compile-max has nothing to run on a CPU; add torch-compile.")

    meter = Meter(cpus, guard=not on_gpu, strict=options.strict)
    firsts = {}
    for worker in workers:
        firsts[worker.mode] = first = meter.once(worker, 1)
        print(f"{worker.mode}: first update {first['seconds']:.2f} s, loss {first['loss']:.9g}", flush=True)
    differences = job.check_first_updates(config, firsts)
    print(f"first losses differ by {differences['loss']:.2e} nats, gradient norms by {differences['grad_norm']:.2e}")
    memory = {worker.mode: {"to_first": worker.ask("memory")} for worker in workers}
    for worker in workers:
        memory[worker.mode]["reset"] = worker.ask("reset_memory")["done"]

    warm = {worker.mode: meter.once(worker, 1)["seconds"] for _ in range(options.warmup) for worker in workers}
    updates = max(1, math.ceil(options.round_seconds / min(warm.values())))
    print(f"{updates} updates per measurement, {options.rounds} rounds", flush=True)
    answers: dict[str, list[dict]] = {worker.mode: [] for worker in workers}
    for index in range(options.rounds):
        for worker in workers if index % 2 == 0 else reversed(workers):
            answers[worker.mode].append(meter.quietest(worker, updates))
        times = ", ".join(f"{m} {1e3 * a[-1]['seconds'] / updates:.1f} ms" for m, a in answers.items())
        print(f"round {index + 1}/{options.rounds}: {times}", flush=True)
    for worker in workers:
        memory[worker.mode]["steady"] = worker.ask("memory")
    ceilings = {worker.mode: worker.ask("ceiling")["flops_per_second"] for worker in workers}
    print("ceilings: " + ", ".join(f"{mode} {rate / 1e9:.1f} GFLOP/s" for mode, rate in ceilings.items()), flush=True)

    skipped = {mode: rounds[-1]["skipped"] for mode, rounds in answers.items() if rounds[-1]["skipped"]}
    require(not skipped, f"updates were skipped as not finite: {skipped}; times of left-out work mean nothing.")
    common = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.throughput", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "versions": installed_versions(),
        "cpu": machine.cpu_name(),
        "vector_extensions": machine.vector_extensions(),
        "cores": len(cpus),
        "preset": options.preset,
        "dtype": options.dtype,
        "config": to_dict(config),
        "flop_formula": job.FLOP_FORMULA,
        "flops_per_update": job.flops_per_update(config),
        "tokens_per_update": config.tokens_per_step,
        "updates_per_measurement": updates,
        "ceiling_flops_per_second": max(ceilings.values()),
        "first_update_differences": differences,
        "first_update_allowances": job.first_update_allowances(config),
    }
    baseline = BASELINE if BASELINE in answers else workers[0].mode
    return [
        common
        | report.summarise(
            mode,
            seconds=[answer["seconds"] / updates for answer in answers[mode]],
            baseline_seconds=[answer["seconds"] / updates for answer in answers[baseline]],
            flops=common["flops_per_update"],
            tokens=config.tokens_per_step,
            ceiling=common["ceiling_flops_per_second"],
        )
        | {
            "baseline": baseline,
            "first_update_seconds": firsts[mode]["seconds"],
            "first_loss": firsts[mode]["loss"],
            "first_grad_norm": firsts[mode]["grad_norm"],
            "last_loss": answers[mode][-1]["loss"],
            "own_ceiling_flops_per_second": ceilings[mode],
            "memory": memory[mode],
            "foreign_cores": [answer["foreign"] for answer in answers[mode]],
            "noisy": any(meter.noisy(answer) for answer in answers[mode]),
            **described[mode],
        }
        for mode in answers
    ]


def main(argv: list[str]) -> None:
    """Parse, measure, print the table and write the results."""
    describe = "Time training updates of JAX and torch side by side: same weights, batches and precision."
    options = parse(ThroughputConfig, argv, prog="benchmarks.throughput", description=describe)
    rows = throughput(options)
    print()
    print(report.markdown(rows))
    if options.out:
        print("wrote " + ", ".join(map(str, report.write(rows, options.out))))


def command_line() -> int:
    """The exit code: 0 done, 1 failed, 2 the user's mistake or modes that cannot be compared."""
    return run(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(command_line())
