"""What drives a benchmark: worker processes pinned to cores, asked in turn, and what else the machine did meanwhile.

Imports no framework.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks import machine
from recipe.config import require

ROOT = Path(__file__).resolve().parents[1]

# Environment variables that change how fast or how exactly a framework computes; a row lists those that are set.
FLAG_PREFIXES = (
    *("XLA_", "JAX_", "LIBTPU_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_"),
    *("MALLOC_", "GLIBC_", "LD_PRELOAD", "CUDA_", "NVIDIA_", "CUBLAS", "CUDNN"),
)
# CPU cores that others may use during a measurement on a CPU, and how often a disturbed one is repeated.
FOREIGN_CORES, REPEATS = 0.15, 3
# On a GPU others cannot be told from ourselves while we measure: it must be idle before we begin (share of time in
# use, bytes in use), and the rounds of a mode may differ by this share at most.
IDLE_UTILISATION, IDLE_BYTES, SPREAD = 0.05, 2**30, 0.10


def cores_for(threads: int) -> list[int]:
    """One logical CPU of each of so many physical cores, 0 for all; UserError where there are fewer."""
    require(sys.platform == "linux", f"this runs on {sys.platform}, but the benchmark reads /proc; use Linux.")
    cores = machine.physical_cores()
    require(threads >= 0, f"--threads {threads} must be at least 0; choose 0 for all physical cores.")
    require(threads <= len(cores), f"--threads {threads} exceeds the {len(cores)} cores; lower it.")
    return cores[: threads or len(cores)]


def launch(module: str, environment: Mapping[str, str], cpus: list[int]) -> subprocess.Popen:
    """`python -m module` on these cores, asked and answered a line at a time."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)  # inherited by the child, whose frameworks size their thread pools by it
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            cwd=ROOT,
            env=environment,
        )
    finally:
        os.sched_setaffinity(0, before)


def cold_environment(cache: Path) -> dict[str, str]:
    """This process's environment with compilation caches in an empty folder, so that what is called cold is cold, and
    with memory taken as needed."""
    return dict(os.environ) | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }


def flags_of(environment: Mapping[str, str], cache: Path) -> dict[str, str]:
    """What of an environment a row lists; where this run's fresh cache lies says nothing to a reader."""
    return {
        name: value.replace(str(cache.parent), "TEMPORARY")
        for name, value in environment.items()
        if name.startswith(FLAG_PREFIXES)
    }


class WorkerEnded(RuntimeError):
    """A worker process that is gone."""


class Worker:
    """A worker process and its pipe: one JSON line out, one JSON line back."""

    def __init__(self, mode: str, process: subprocess.Popen) -> None:
        self.mode, self.process = mode, process

    def send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerEnded(f"worker {self.mode} ended early; its error stands above") from None

    def receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise WorkerEnded(f"worker {self.mode} ended with code {self.process.wait()}; its error stands above")
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


class Timed(Protocol):
    """What is timed: a worker, or something that asks one."""

    mode: str

    def ask(self, do: str, **values) -> dict[str, Any]:
        """The answer to `run` has `seconds` and `cpu_seconds` of so many `updates`."""


class Meter:
    """Times a worker's updates and the CPU that everything else used meanwhile."""

    def __init__(self, cpus: list[int], guard: bool, strict: bool) -> None:
        self.cpus, self.guard, self.strict = cpus, guard, strict

    def once(self, worker: Timed, updates: int) -> dict[str, Any]:
        """One measurement; `foreign` is the mean number of these CPUs that others kept busy."""
        before = machine.busy_seconds(self.cpus)
        answer = worker.ask("run", updates=updates)
        busy = machine.busy_seconds(self.cpus) - before
        # The kernel counts in ticks, so up to one per CPU at either end is not evidence of anyone.
        foreign = max(0.0, busy - answer["cpu_seconds"] - machine.TICK * len(self.cpus)) / answer["seconds"]
        return answer | {"updates": updates, "foreign": foreign}

    def quietest(self, worker: Timed, updates: int) -> dict[str, Any]:
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

    def noisy(self, answer: dict[str, Any]) -> bool:
        return self.guard and answer["foreign"] > FOREIGN_CORES

    def rounds(
        self, workers: Sequence[Timed], *, rounds: int, warmup: int, seconds: float
    ) -> Iterator[dict[str, dict[str, Any]]]:
        """Every mode's measurement of each round, the order reversed every other one, after rounds that do not count.

        A measurement lasts about `seconds` at least, in the same whole number of updates for all workers.
        """
        warm = {worker.mode: self.once(worker, 1)["seconds"] for _ in range(warmup) for worker in workers}
        updates = max(1, math.ceil(seconds / min(warm.values())))
        print(f"{updates} updates per measurement, {rounds} rounds", flush=True)
        for index in range(rounds):
            order = workers if index % 2 == 0 else reversed(workers)
            answers = {worker.mode: self.quietest(worker, updates) for worker in order}
            times = (f"{worker.mode} {1e3 * answers[worker.mode]['seconds'] / updates:.1f} ms" for worker in workers)
            print(f"round {index + 1}/{rounds}: {', '.join(times)}", flush=True)
            yield answers

    def noise(self, answers: Sequence[dict[str, Any]], gpu_before: dict[str, Any] | None) -> str:
        """Why a mode's times are not to be trusted, or nothing. Where no CPU is guarded, the GPU is looked at: idle
        before, its rounds alike."""
        if self.guard:
            foreign = max(answer["foreign"] for answer in answers)
            return f"others used up to {foreign:.2f} cores" if any(map(self.noisy, answers)) else ""
        seconds = [answer["seconds"] / answer["updates"] for answer in answers]
        spread = max(seconds) / min(seconds) - 1.0
        unsteady = f"rounds differ by {spread:.0%}" if spread > SPREAD else ""
        return "; ".join(filter(None, (gpu_was_busy(gpu_before), unsteady)))


def gpu_was_busy(state: dict[str, Any] | None) -> str:
    """Why the GPU was not idle when `machine.gpu_state` was asked, or nothing."""
    if state is None or (state["utilisation"] <= IDLE_UTILISATION and state["bytes"] <= IDLE_BYTES):
        return ""
    return f"others keep the GPU {state['utilisation']:.0%} busy and hold {state['bytes'] / 2**20:,.0f} MiB of it"


def refuse_a_busy_gpu(state: dict[str, Any] | None, strict: bool) -> None:
    """Say that the GPU is not idle; UserError if `strict`."""
    busy = gpu_was_busy(state)
    require(not (strict and busy), f"{busy}; wait until it is idle or drop --strict.")
    if busy:
        print(f"noisy: {busy}", flush=True)
