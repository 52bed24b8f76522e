"""The loop of a worker process of `benchmarks.muon_speed`, and the gradients every row gets. Imports no framework."""

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from benchmarks.job import fingerprint
from benchmarks.worker import CEILING_SIZES

LEARNING_RATE = 0.02
BETA = 0.95
STEPS = 5
DTYPES = ("bfloat16", "float32")

Shapes = Mapping[str, tuple[int, int]]
"""Matrices by name, (fan_out, fan_in) as in `recipe.params`."""


class Rows(Protocol):
    """One framework's optimizers, each with weights and momentum of its own, all with the same gradients."""

    def __init__(self, gradients: Mapping[str, np.ndarray], dtype: str) -> None: ...

    def describe(self) -> dict[str, Any]:
        """`framework` with its version, `backend`, `device` and `threads`."""

    def received(self) -> dict[str, np.ndarray]:
        """The gradients as they lie on the device, (fan_out, fan_in)."""

    def prepare(self, row: str) -> None:
        """What must be done before an update and is not part of it; builds the row's optimizer at the first call."""

    def update(self, row: str) -> None:
        """One update of every matrix, finished."""

    def weights(self, row: str) -> dict[str, np.ndarray]:
        """The row's present weights in float32, (fan_out, fan_in)."""

    def square_product(self, size: int, dtype: str) -> Callable[[int], None]:
        """A function that computes so many (size, size) products in this dtype and waits for them."""


def make_gradients(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Standard normal float32, a generator of its own for each matrix, so that leaving one out moves no other."""
    gradients = {}
    for name, shape in shapes.items():
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
        gradients[name] = generator.standard_normal(shape, np.float32)
    return gradients


def serve(make_rows: Callable[[dict[str, np.ndarray], str], Rows]) -> None:
    """Read the job and then commands from stdin until it closes; stdout carries replies alone, prints go to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(answer: dict) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    job = json.loads(sys.stdin.readline())
    shapes = {name: tuple(shape) for name, shape in job["shapes"].items()}
    rows = make_rows(make_gradients(shapes, job["seed"]), job["dtype"])
    description = rows.describe()
    reply(description | {"gradients": fingerprint(rows.received())})

    def first(command: dict) -> dict[str, float]:
        """The update that compiles; what it made of weights of zero is left in a file, over the learning rate."""
        answer = _run(rows, command["row"], 1)
        np.savez(command["file"], **{name: x / -LEARNING_RATE for name, x in rows.weights(command["row"]).items()})
        return answer

    products: dict[tuple[str, int], Callable[[int], None]] = {}

    def product_rates(_) -> dict[str, float]:
        backend = description["backend"]
        for key in [
            (dtype, size) for dtype in DTYPES for size in CEILING_SIZES[backend] if (dtype, size) not in products
        ]:
            products[key] = rows.square_product(key[1], key[0])
            products[key](1)
        # One core may be lent to others meanwhile; on several, CPU time counts threads that only wait.
        clock = time.process_time if job["cores"] == 1 else time.perf_counter
        return _rates(products, 1 if backend == "cpu" else 10, clock)

    commands = {
        "first": first,
        "run": lambda command: _run(rows, command["row"], command["updates"]),
        "product_rates": product_rates,
    }
    for line in sys.stdin:
        command = json.loads(line)
        reply(commands[command["do"]](command))


def _run(rows: Rows, row: str, updates: int) -> dict[str, float]:
    """Wall and CPU seconds of so many updates, and the CPU seconds of this process, preparation included."""
    began, wall, cpu = time.process_time(), 0.0, 0.0
    for _ in range(updates):
        rows.prepare(row)
        start, start_cpu = time.perf_counter(), time.process_time()
        rows.update(row)
        wall, cpu = wall + time.perf_counter() - start, cpu + time.process_time() - start_cpu
    return {"seconds": wall, "busy_seconds": cpu, "cpu_seconds": time.process_time() - began}


def _rates(
    products: Mapping[tuple[str, int], Callable[[int], None]], count: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The better rate of each dtype's square products, FLOP/s, from one run of each."""
    rates = dict.fromkeys(DTYPES, 0.0)
    for (dtype, size), product in products.items():
        start = clock()
        product(count)
        rates[dtype] = max(rates[dtype], 2.0 * size**3 * count / (clock() - start))
    return rates
