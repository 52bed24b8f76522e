"""Time two training steps of one's own against each other: `time_pair`, or `--jax-step` and `--torch-step` of
`python -m benchmarks.throughput`.

The rules are those of this project's own modes: a process each, pinned to the same cores; nothing is timed unless what
the steps compute with and on how much is the same; the order is reversed every round, others' use of the cores is
watched, and ratios are taken within a round. benchmarks/README.md shows what a step is.
"""

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import job, machine, report, tables
from benchmarks.driver import Meter, Worker, cold_environment, cores_for, flags_of, launch, refuse_a_busy_gpu
from benchmarks.step_worker import StepContract
from recipe.config import UserError, require
from recipe.contract import NOT_THERE, require_same

MODULES = {"jax": "benchmarks.step_worker_jax", "torch": "benchmarks.step_worker_torch"}
"""Framework -> the module of its worker."""

MUST_AGREE = ("backend", "threads", "matmul", "dtype", "items", "unit")
"""Fields of two steps' contracts that must be the same; the others are recorded only."""

MAKE_ALIKE = (
    "Nothing was timed; make them agree (items, unit, dtype: what the functions state; threads: OMP_NUM_THREADS, "
    "XLA_FLAGS; matmul: jax_default_matmul_precision, torch.set_float32_matmul_precision)."
)

IN_WORKER = "BENCHMARKS_STEP_WORKER"
"""The environment variable by which a process knows that it is a worker."""

Step = str | Callable[[], Any]
"""A function that builds a step: itself, or as MODULE:FUNCTION or FILE.py:FUNCTION."""


@dataclass(frozen=True)
class Pair:
    """What two steps took: `rows` has a record for each, as `report.write` takes them."""

    rows: list[dict[str, Any]]

    @property
    def seconds(self) -> dict[str, float]:
        """The median time of a step, by side."""
        return {row["mode"]: row["seconds_per_update"]["median"] for row in self.rows}

    @property
    def ratio(self) -> dict[str, float]:
        """How often the first does its step while the second does one: median, min, max and mad over the rounds."""
        return self.rows[0]["speed_against_baseline"]

    @property
    def noise(self) -> dict[str, str]:
        """Why a side's times are not to be trusted, or nothing."""
        return {row["mode"]: row["noise"] for row in self.rows}

    @property
    def table(self) -> str:
        """The table in Markdown, with what was run and where."""
        return markdown(self.rows)

    def plot(self, path: str | Path) -> None:
        """Draw the bars; the suffix of the path chooses the format."""
        plot(self.rows, Path(path))

    def __str__(self) -> str:
        return self.table


def time_pair(
    a: Step,
    b: Step,
    *,
    frameworks: tuple[str, str] = ("jax", "torch"),
    items: float | None = None,
    rounds: int = 5,
    warmup: int = 2,
    round_seconds: float = 1.0,
    threads: int = 0,
    strict: bool = False,
) -> Pair:
    """Time `a`'s step against `b`'s, each in a process of its own, and return the times and their ratio.

    `items` is what one step works through, for functions that do not state it. A measurement is one round's updates of
    one side, `round_seconds` long at least; `warmup` rounds do not count. Each side is pinned to `threads` physical
    cores, 0 for all; `strict` fails where times would be marked noisy. UserError, before a step is taken, where the two
    cannot be compared.
    """
    require(
        IN_WORKER not in os.environ,
        "time_pair was called by a file that it times, as that was read in a process of its own; put the call under "
        'if __name__ == "__main__":',
    )
    references = [reference(step) for step in (a, b)]
    for framework in frameworks:
        require(framework in MODULES, f"framework {framework!r} is unknown; choose from {', '.join(MODULES)}.")
    require(rounds >= 1, f"rounds={rounds} must be at least 1; choose e.g. 5.")
    require(warmup >= 1, f"warmup={warmup} must be at least 1; choose e.g. 2.")
    require(round_seconds >= 0, f"round_seconds={round_seconds} must be at least 0; choose e.g. 1.")
    cpus = cores_for(threads)
    names = list(frameworks if frameworks[0] != frameworks[1] else references)
    names[1] += " (again)" if names[0] == names[1] else ""
    if not machine.has_gpu():
        seen = [
            job.foreseen(name, threads=job.foreseen_threads(framework, len(cpus)))
            for name, framework in zip(names, frameworks, strict=True)
        ]
        require_same(*seen, fields=("threads",), remedy=MAKE_ALIKE)
    print(f"{machine.cpu_name()}; pinned to {len(cpus)} cores; {' against '.join(references)}", flush=True)
    gpu_before = machine.gpu_state()
    refuse_a_busy_gpu(gpu_before, strict)
    meter, workers = Meter(cpus, guard=True, strict=strict), []
    with tempfile.TemporaryDirectory() as caches:
        try:
            for name, framework, step in zip(names, frameworks, references, strict=True):
                cache = Path(caches) / str(len(workers))
                workers.append(_StepWorker(name, framework, step, items, cpus, cache))
                workers[-1].start()  # one after another, as starting is timed
            _first_updates(workers, meter)
            for worker in workers:
                worker.memory = {"to_first": worker.ask("memory"), "reset": worker.ask("reset_memory")["done"]}
            for answers in meter.rounds(workers, rounds=rounds, warmup=warmup, seconds=round_seconds):
                for worker in workers:
                    worker.answers.append(answers[worker.mode])
            for worker in workers:
                worker.memory["steady"] = worker.ask("memory")
        finally:
            for worker in workers:
                worker.close()
    noise = {worker.mode: meter.noise(worker.answers, gpu_before) for worker in workers}
    require(not (strict and any(noise.values())), f"too noisy: {noise}; quieten it or drop --strict.")
    common = report.circumstances("benchmarks.throughput") | {"kind": "steps", "cores": len(cpus), "baseline": names[1]}
    common |= {"gpu_before": gpu_before, "gpu_after": machine.gpu_state()}
    rows = (worker.row(workers[1].seconds) | {"noise": noise[worker.mode]} for worker in workers)
    return Pair([common | row for row in rows])


class _StepWorker(Worker):
    """The process of one step, and what it answered."""

    def __init__(self, name: str, framework: str, step: str, items: float | None, cpus: list[int], cache: Path) -> None:
        environment = cold_environment(cache) | {IN_WORKER: "1"}
        self.flags, self.step = flags_of(environment, cache), step
        launched = time.perf_counter()
        super().__init__(name, launch(MODULES[framework], environment, cpus))
        self.send({"reference": step, "items": items, "launched": launched, "cwd": os.getcwd(), "path": sys.path})
        self.contract: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self.start_seconds = 0.0
        self.first: dict[str, Any] = {}
        self.answers: list[dict[str, Any]] = []
        self.memory: dict[str, Any] = {}

    def receive(self) -> dict[str, Any]:
        answer = super().receive()
        if "refused" in answer:
            raise UserError(f"the {self.mode} step: {answer['refused']}")
        return answer

    def start(self) -> None:
        """Have the step built."""
        answer = self.ask("start")
        self.contract, self.facts, self.start_seconds = (
            answer[name] for name in ("contract", "facts", "start_seconds")
        )
        known = {name: value for name, value in self.contract.items() if value not in (NOT_THERE, self.step)}
        print(f"{self.mode}: {json.dumps(known)}", flush=True)

    def take_first(self, meter: Meter) -> None:
        """The first update, which compiles."""
        self.first = meter.once(self, 1)
        self.contract = self.ask("contract")["contract"]
        seconds = self.first["seconds"]
        total = self.start_seconds + seconds
        print(f"{self.mode}, cold cache: first update {seconds:.2f} s, with the start {total:.2f} s", flush=True)

    @property
    def seconds(self) -> list[float]:
        """Seconds per update of each round."""
        return [answer["seconds"] / answer["updates"] for answer in self.answers]

    def row(self, baseline_seconds: Sequence[float]) -> dict[str, Any]:
        """The record of this side."""
        times, facts = report.spread(self.seconds), self.facts
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, baseline_seconds, strict=True)]
        rates = {name: value and value / times["median"] for name, value in facts.items() if name in ("items", "flops")}
        return {
            "mode": self.mode,
            "step": self.step,
            "facts": facts,
            "seconds": self.seconds,
            "seconds_per_update": times,
            "items_per_second": rates["items"],
            "flops_per_second": rates["flops"],
            "speed_against_baseline": report.spread(ratios),
            "updates_per_measurement": self.answers[0]["updates"],
            "first_update_seconds": self.first["seconds"],
            "first_step_seconds": {"cold": self.start_seconds + self.first["seconds"]},
            "first_loss": _finite(self.first["loss"]),
            "last_loss": _finite(self.answers[-1]["loss"]),
            "finite": all(answer["loss"] is None or math.isfinite(answer["loss"]) for answer in self.answers),
            "memory": self.memory,
            "flags": self.flags,
            "foreign_cores": [answer["foreign"] for answer in self.answers],
            "contract": self.contract,
        }


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _check_contracts(workers: Sequence[_StepWorker]) -> None:
    """Raise `UserError` naming every field of `MUST_AGREE` on which the steps differ."""
    sides = [StepContract(**{**worker.contract, "side": worker.mode}) for worker in workers]
    require_same(*sides, fields=MUST_AGREE, remedy=MAKE_ALIKE)


def _first_updates(workers: Sequence[_StepWorker], meter: Meter) -> None:
    """Contracts before and after the first update of each, which may set what its process computes with; and the first
    losses side by side. How far two correct ones may differ is their author's to know."""
    _check_contracts(workers)
    for worker in workers:
        worker.take_first(meter)
    _check_contracts(workers)
    meter.guard = workers[0].contract["backend"] == "cpu"
    losses = {worker.mode: worker.first["loss"] for worker in workers}
    if None in losses.values():
        print("first losses are not compared: a step returns no single number and no dict with a loss", flush=True)
        return
    first, second = losses.values()
    shown = ", ".join(f"{loss:.9g} in {mode}" for mode, loss in losses.items())
    print(f"first losses: {shown}; they differ by {abs(first - second):.2e}", flush=True)


def reference(step: Step) -> str:
    """The step's function as another process finds it; `UserError` for one that it would not find."""
    if isinstance(step, str):
        source, colon, name = step.rpartition(":")
        parts = all(part.isidentifier() for part in name.split("."))
        require(
            bool(colon and source) and parts,
            f"{step!r} names no function; write MODULE:FUNCTION or FILE.py:FUNCTION, e.g. steps.py:jax_step.",
        )
        if source.endswith(".py"):
            require(Path(source).is_file(), f"{source} of {step!r} is no file; name the file that has {name}.")
        return step
    name, module = getattr(step, "__qualname__", ""), sys.modules.get(getattr(step, "__module__", None) or "")
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    require(
        isinstance(module, ModuleType) and found is step,
        f"{name or step!r} cannot be found again in another process: a lambda, a method, or a function within a "
        "function; define a plain function at the top of a file.",
    )
    if module.__name__ != "__main__":
        return f"{module.__name__}:{name}"
    if spec := module.__spec__:  # python -m MODULE
        return f"{spec.name}:{name}"
    file = getattr(module, "__file__", None)
    require(
        file is not None,
        f"{name} lies in a notebook or at the prompt, where no other process finds it; write it into a file, and give "
        f"time_pair 'FILE.py:{name}'.",
    )
    return f"{Path(file).resolve()}:{name}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """What was run and where, then a line per step."""
    first = rows[0]
    facts = first["facts"]
    amount = "" if facts["items"] is None else f"{facts['items']:,g} {facts['unit']} per step; "
    losses = {row["mode"]: row["first_loss"] for row in rows}
    shown = ", ".join(f"{loss:.6g} in {mode}" for mode, loss in losses.items() if loss is not None)
    rate = "items/s" if facts["items"] is None else f"{facts['unit']}/s"
    columns = {"step": "l", "framework": "l", "ms per step, median (min–max, MAD)": "r", rate: "r"}
    columns |= {f"x {first['baseline']} (min–max)": "r", "GFLOP/s": "r", "start to first update, s": "r"}
    columns |= {"peak memory, MiB": "r", "noise": "l"}
    title = f"### {' against '.join(row['step'] for row in rows)}"
    place = f"{report.device(first)}; commit {first['git_commit']}; {first['date']}."
    what = f"{amount}dtype {facts['dtype']}, float32 products in {first['contract']['matmul']}; "
    what += f"{len(first['seconds'])} rounds of {first['updates_per_measurement']} updates"
    lines = [title, "", f"`{first['command']}`", "", place, what + (f". First losses: {shown}." if shown else ".")]
    lines += [
        f"The losses of {row['mode']} are not finite: judge whether its times mean anything."
        for row in rows
        if not row["finite"]
    ]
    return "\n".join([*lines, "", *tables.table(columns, map(_cells, rows)), ""])


def _cells(row: dict[str, Any]) -> list[str]:
    times = {name: 1e3 * value for name, value in row["seconds_per_update"].items()}
    rate, flops = row["items_per_second"], row["flops_per_second"]
    return [
        row["mode"],
        row["contract"]["framework"],
        f"{times['median']:,.2f} ({times['min']:,.2f}–{times['max']:,.2f}, {times['mad']:,.2f})",
        "–" if rate is None else f"{rate:,.0f}",
        tables.ranged(row["speed_against_baseline"], ".2f"),
        "–" if flops is None else f"{flops / 1e9:,.1f}",
        f"{row['first_step_seconds']['cold']:.1f}",
        f"{report.peak_bytes(row) / 2**20:,.0f}",
        f"**noisy**: {row['noise']}" if row["noise"] else "within limits",
    ]


def plot(rows: list[dict[str, Any]], png: Path) -> None:
    """Bars of steps per second, whiskers from the slowest to the fastest round."""
    drawn = []
    for row, colour in zip(rows, (report.COLOURS["jax"], report.COLOURS["torch-eager"]), strict=True):
        times, ratio = row["seconds_per_update"], row["speed_against_baseline"]
        label = f"{1e3 * times['median']:,.2f} ms   {ratio['median']:.2f} x {row['baseline']}"
        label += "   noisy" if row["noise"] else ""
        ends = 1 / times["max"], 1 / times["min"]
        drawn.append(tables.Bar(row["mode"], 1 / times["median"], *ends, label, colour))
    title = " against ".join(row["step"] for row in rows)
    quantity = "steps per second: median round, whiskers slowest to fastest"
    tables.bars([(title, drawn)], png, quantity=quantity, heading=report.heading(rows, report.device))
