"""The loop of a worker process: one JSON line in, one JSON line out. Imports no framework."""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from benchmarks import machine
from benchmarks.job import fingerprint, make_batch
from recipe.config import RunConfig, from_dict
from recipe.params import init_params

# Batches are made before the clock starts and used in turn.
BATCHES = 4
# Side lengths of the square products whose best rate is the ceiling, by backend.
CEILING_SIZES = {"cpu": (1024, 2048), "gpu": (4096, 8192)}
CEILING_REPEATS = 7

Part = tuple[int, Callable[[int], None]]
"""How often an update runs a part, and a function that runs it so many times and waits."""


class HasMemory(Protocol):
    """What tells of a device's memory."""

    def device_peak_bytes(self) -> int | None:
        """Largest device memory in use since the start or the last reset; None on a CPU."""

    def reset_device_peak(self) -> None:
        """Let the peak count from the present use, where the framework can."""


class Side(HasMemory, Protocol):
    """One implementation under measurement."""

    def describe(self) -> dict[str, Any]:
        """`contract` (a `job.WorkContract`; what arrived is added by the worker) and `environment`."""

    def weights(self) -> dict:
        """The present parameters in NumPy, by Hugging Face name."""

    def received(self, tokens):
        """Tokens as they lie on the device, brought back to NumPy."""

    def update(self, inputs_ABT, targets_ABT) -> dict[str, Any]:
        """Start one update and return its metrics, finished or not."""

    def synchronize(self, metrics: dict[str, Any]) -> None:
        """Wait until all updates and these metrics are finished."""

    def square_product(self, size: int) -> Callable[[int], None]:
        """A function that computes so many (size, size) products in the compute dtype and waits for them."""

    def parts(self) -> dict[str, Part]:
        """Parts of an update (`job.PARTS`) by themselves; they may spoil the state, so no update follows."""


def reply_channel() -> Callable[[dict], None]:
    """A function that sends one JSON line to the driver; stdout carries these alone, whatever is printed goes to
    stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(answer: dict) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    return reply


def answer_commands(reply: Callable[[dict], None], commands: Mapping[str, Callable[[dict], dict]]) -> None:
    """Answer a line of stdin after the other, each naming one of the commands, until it closes."""
    for line in sys.stdin:
        command = json.loads(line)
        reply(commands[command["do"]](command))


def serve(make_side: Callable[[RunConfig, str, dict], Side]) -> None:
    """Read the job from stdin, and then commands."""
    reply = reply_channel()
    job = json.loads(sys.stdin.readline())
    # The driver's clock reading: on Linux this clock is the machine's, the same in every process.
    import_seconds = time.perf_counter() - job["launched"]
    config = from_dict(job["config"])
    weights = init_params(config.model, config.seed)
    began = time.perf_counter()
    side = make_side(config, job["mode"], weights)
    start_seconds = import_seconds + time.perf_counter() - began
    del weights  # the side has its own; these would count as its memory
    batches = [make_batch(config, index) for index in range(BATCHES)]
    description = side.describe()
    arrived = {f"{i}.{j}": side.received(array) for i, batch in enumerate(batches) for j, array in enumerate(batch)}
    contract = dataclasses.replace(
        description["contract"],
        tokens_per_update=config.tokens_per_step,
        weights=fingerprint(side.weights()),
        batches=fingerprint(arrived),
    )
    description["contract"] = dataclasses.asdict(contract)
    reply(description | {"start_seconds": start_seconds})

    parts: dict[str, Part] = {}

    def time_parts(command) -> dict[str, float]:
        parts.update(parts or side.parts())
        return {name: _seconds_per_update(*part, command["seconds"]) for name, part in parts.items()}

    commands = {
        "run": lambda command: _run(side, batches, command["updates"]),
        "ceiling": lambda _: _ceiling(side, contract.backend),
        **memory_commands(side),
        "parts": time_parts,
    }
    answer_commands(reply, commands)


def memory_commands(side: HasMemory) -> dict[str, Callable[[dict], dict]]:
    """The commands that ask for peaks in bytes, of this process and of the device, and that reset them."""

    def reset(_) -> dict[str, bool]:
        side.reset_device_peak()
        return {"done": machine.reset_peak_memory()}

    def ask(_) -> dict[str, int | None]:
        return {"peak_rss": machine.peak_memory_bytes(), "peak_device": side.device_peak_bytes()}

    return {"memory": ask, "reset_memory": reset}


def _run(side: Side, batches: list, updates: int) -> dict[str, float]:
    """Time so many updates, the last one finished before the clock stops."""
    cpu, start = time.process_time(), time.perf_counter()
    for index in range(updates):
        metrics = side.update(*batches[index % len(batches)])
    side.synchronize(metrics)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    values = {name: float(metrics[name]) for name in ("loss", "grad_norm", "skipped")}
    return {"seconds": seconds, "cpu_seconds": cpu, **values}


def _seconds_per_update(runs: int, run: Callable[[int], None], seconds: float) -> float:
    """Time of `runs` runs of one part, from about `seconds` of them."""

    def timed(count: int) -> float:
        start = time.perf_counter()
        run(count)
        return time.perf_counter() - start

    run(1)  # compiles, and refills the caches that another part has filled
    count = max(1, math.ceil(seconds / timed(1)))
    return runs * timed(count) / count


def _ceiling(side: Side, backend: str) -> dict[str, float]:
    """Best rate of a square matrix product, FLOP/s; a best and not a median, as it stands for a limit."""
    best = 0.0
    for size in CEILING_SIZES[backend]:
        product = side.square_product(size)
        count = 1 if backend == "cpu" else 10
        product(count)
        for _ in range(CEILING_REPEATS):
            start = time.perf_counter()
            product(count)
            best = max(best, 2.0 * size**3 * count / (time.perf_counter() - start))
    return {"flops_per_second": best}
