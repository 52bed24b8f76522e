"""Time a training run's saves: `python -m benchmarks.saving --help`.

How long the main thread is held, how much slower the updates are beside which a state is written, what the same save
costs in the foreground, and how fast its bytes are written, hashed and read back. All in one process, in turns whose
order is reversed every round.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from benchmarks import job, machine, report
from benchmarks.tables import ranged, table
from harness.cli import parse, run
from harness.manifest import check_files
from harness.saving import Saver, Snapshot
from harness.state import TrainingState, load_state, save_state
from harness.tensors import StoredTensors, read_header
from recipe.config import RunConfig, require
from recipe.params import init_params, param_counts
from recipe.presets import get_preset

PARTS = {
    "write": "copied, hashed, written",
    "sha256": "SHA-256 alone",
    "crc32": "CRC-32 alone",
    "read": "read",
    "read_checked": "read, CRC-32 checked",
    "verify": "all files verified by SHA-256",
}
"""What is timed of a state's bytes alone, in the foreground and with the files in the system's cache."""


@dataclasses.dataclass(frozen=True)
class SavingConfig:
    """One benchmark: one framework's updates with and without a save."""

    preset: str = "tiny"
    """Recipe whose model, optimizers and batches the updates have."""
    framework: Literal["jax", "torch"] = "jax"
    """Whose updates and whose copies."""
    batch_size: int = 0
    """Rows of a micro-batch; 0 is the preset's number."""
    sequence_length: int = 0
    """Tokens of a row; 0 is the preset's number."""
    accumulation: int = 0
    """Micro-batches of an update; 0 is the preset's number."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products, Newton-Schulz's included; parameters are float32."""
    overrides: str = ""
    """Further settings as a JSON object, e.g. '{"muon": {"ns_steps": 1}}'."""
    rounds: int = 5
    """Measured rounds; in each, an update without a save, updates beside one, and a save in the foreground."""
    out: str = ""
    """OUT.jsonl gets one more row and OUT.md a table of all its rows; empty prints the table only."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"rounds={self.rounds} must be at least 1; choose e.g. 2.")
        for name in ("batch_size", "sequence_length", "accumulation"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be below 0; choose e.g. 1.")
        get_preset(self.preset)


class Bench:
    """A trainer, and a folder its states are saved in."""

    def __init__(self, config: RunConfig, framework: str, folder: Path) -> None:
        self.config, self.folder = config, folder
        package = {"jax": "jax_impl", "torch": "torch_ref"}[framework]
        trainer = importlib.import_module(f"{package}.train").Trainer  # one of the two, and none for --help
        self.trainer = trainer(config, init_params(config.model, config.seed))
        self.written = 0.0

    def update(self) -> None:
        """One update, waited for."""
        position = sum(self.trainer.counts())
        metrics = self.trainer.step(*job.make_batch(self.config, position))
        for value in metrics.values():
            float(value)

    def save(self, snapshot: Snapshot) -> None:
        """Write the state, the last one's place being its own."""
        state = TrainingState(
            self.config, snapshot.weights, snapshot.slots, snapshot.updates, snapshot.skipped, math.inf, ""
        )
        save_state(self.folder / "last", state, tokenizer=None, about={})
        self.written = time.perf_counter()

    def plain(self) -> dict[str, float]:
        """An update without a save."""
        return _timed("update", self.update)

    def beside(self) -> dict[str, float]:
        """A save and the updates made until it is written, at least one."""
        counts = {"beside_updates": 0.0}

        def save_and_update() -> None:
            with Saver() as saver:
                counts.update(_timed("held", lambda: self.begin(saver)))
                while saver.busy or not counts["beside_updates"]:
                    self.update()
                    counts["beside_updates"] += 1

        began = time.perf_counter()
        seconds = _timed("beside", save_and_update)
        return seconds | counts | {"writing": self.written - began}

    def begin(self, saver: Saver) -> None:
        """What the main thread does for a save."""
        saver.submit(functools.partial(self.save, self.trainer.snapshot()))

    def foreground(self) -> dict[str, float]:
        """The same save with nothing beside it."""
        return _timed("write", lambda: self.save(self.trainer.snapshot()))

    def parts(self) -> dict[str, float]:
        """The other `PARTS`, of the state that has been written last."""
        last = self.folder / "last"
        hashes = {"sha256": hashlib.sha256, "crc32": zlib.crc32}
        seconds = {f"{name}{ending}": 0.0 for name in hashes for ending in ("", "_cpu")}
        for array in _arrays(self.trainer.snapshot()):
            for name, hashed in hashes.items():
                for key, value in _timed(name, functools.partial(hashed, array)).items():
                    seconds[key] += value
        stored = [StoredTensors(read_header(file), "a state") for file in sorted(last.glob("*.safetensors"))]
        seconds |= _timed("read", lambda: [_read(tensors) for tensors in stored])
        seconds |= _timed("read_checked", lambda: _read_state(last))
        return seconds | _timed("verify", lambda: check_files(last, tensors=True))


def _timed(name: str, call: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call by the clock, and of processors, which other processes of the machine do not change."""
    began, cpu = time.perf_counter(), time.process_time()
    call()
    return {name: time.perf_counter() - began, f"{name}_cpu": time.process_time() - cpu}


def _arrays(snapshot: Snapshot) -> Iterator[np.ndarray]:
    """All arrays as bytes."""
    for part in (snapshot.weights, *snapshot.slots.values()):
        for name in part:
            yield part[name].reshape(-1).view(np.uint8)


def _read(tensors: Mapping[str, np.ndarray]) -> None:
    for name in tensors:
        tensors[name]


def _read_state(folder: Path) -> None:
    state = load_state(folder)
    for tensors in (state.weights, *state.slots.values()):
        _read(tensors)


def benchmark(options: SavingConfig) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    require(sys.platform == "linux", f"this runs on {sys.platform}, but the benchmark reads /proc; use Linux.")
    config = job.resolve(
        options.preset,
        batch_size=options.batch_size or None,
        sequence_length=options.sequence_length or None,
        accumulation=options.accumulation or None,
        overrides=options.overrides,
        seed=0,
        dropout=None,
        compute=options.compute,
        newton_schulz=options.compute,
        matmul="highest",
        attention="explicit",
    )
    seconds: dict[str, list[float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="saving-"))
    try:
        bench = Bench(config, options.framework, folder)
        bench.update()  # compiles
        first = _timed("snapshot", bench.trainer.snapshot)  # compiles the copy
        cpus = sorted(os.sched_getaffinity(0))
        began, busy, own = time.perf_counter(), machine.busy_seconds(cpus), time.process_time()
        arms = [bench.plain, bench.beside, bench.foreground]
        for index in tqdm(range(options.rounds), unit="round", disable=None):
            for arm in [*(arms if index % 2 == 0 else reversed(arms)), bench.parts]:
                for name, value in arm().items():
                    seconds.setdefault(name, []).append(value)
            if not sys.stderr.isatty():
                print(f"round {index + 1}/{options.rounds}", file=sys.stderr)
        others = machine.busy_seconds(cpus) - busy - (time.process_time() - own)
        elapsed = time.perf_counter() - began
        size = sum(file.stat().st_size for file in (folder / "last").iterdir())
        environment = dict(bench.trainer.environment)
    finally:
        shutil.rmtree(folder)
    return report.circumstances("benchmarks.saving") | {
        "options": dataclasses.asdict(options),
        "environment": environment,
        "flags": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "XLA_FLAGS") if name in os.environ},
        "cores_used_by_others": max(0.0, others) / elapsed,
        "parameters": param_counts(config.model).total,
        "tokens_per_update": config.tokens_per_step,
        "bytes": size,
        "first_snapshot": first,
        "seconds": seconds,
        **summary(seconds, size),
    }


def summary(seconds: Mapping[str, list[float]], size: int) -> dict[str, dict[str, dict[str, float]]]:
    """Spreads over the rounds: a save against the update without one of its round, and bytes per second."""
    rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]
    ratios = {
        "held": [each["held"] / each["update"] for each in rounds],
        "slowdown": [(each["beside"] - each["held"]) / each["beside_updates"] / each["update"] for each in rounds],
        "beside": [each["beside"] / each["update"] - each["beside_updates"] for each in rounds],
        "beside_cpu": [each["beside_cpu"] / each["update_cpu"] - each["beside_updates"] for each in rounds],
        "foreground": [each["write"] / each["update"] for each in rounds],
    }
    rates = {name: [size / value for value in seconds[name]] for part in PARTS for name in (part, f"{part}_cpu")}
    return {
        "ratios": {name: report.spread(values) for name, values in ratios.items()},
        "bytes_per_second": {name: report.spread(values) for name, values in rates.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """What was run and where, then a line per row in each of two tables."""
    text = ["### What a save costs", ""]
    for row in rows:
        versions = ", ".join(f"{name} {row['versions'][name]}" for name in ("numpy", row["options"]["framework"]))
        flags = "".join(f"{name}={value} " for name, value in row["flags"].items())
        text += [
            f"- `{flags}{row['command']}`: {row['cpu']}, of which other processes used "
            f"{row['cores_used_by_others']:.2f}; {row['environment']['device']}; {versions}; commit "
            f"{row['git_commit']}; {row['date']}. Rounds in alternating order: "
            f"{len(row['seconds']['update'])}; tokens per update: {row['tokens_per_update']:,}."
        ]
    costs = {
        **{"preset": "l", "framework": "l", "state, MB": "r", "update without a save, s": "r"},
        **{"main thread held, of an update": "r", "an update beside the writing, x": "r"},
        **{"a save beside updates, updates": "r", "the same in CPU time": "r", "in the foreground, updates": "r"},
        **{"written after, s": "r"},
    }
    rates = {"preset": "l", "framework": "l", "written by the clock": "r", **dict.fromkeys(PARTS.values(), "r")}
    text += [
        "",
        "Medians (smallest–largest); ratios are taken within each round.",
        "",
        *table(costs, map(_costs, rows)),
    ]
    text += ["", "MB per second; but for the first, of CPU time.", "", *table(rates, map(_rates, rows))]
    return "\n".join(text) + "\n"


def _costs(row: dict[str, Any]) -> list[str]:
    ratios, seconds = row["ratios"], row["seconds"]
    return [
        *(row["options"]["preset"], row["options"]["framework"], f"{row['bytes'] / 1e6:,.1f}"),
        ranged(report.spread(seconds["update"]), ",.2f"),
        ranged(ratios["held"], ".2%"),
        *(ranged(ratios[name], ",.2f") for name in ("slowdown", "beside", "beside_cpu", "foreground")),
        ranged(report.spread(seconds["writing"]), ",.2f"),
    ]


def _rates(row: dict[str, Any]) -> list[str]:
    names = ("write", *(f"{part}_cpu" for part in PARTS))
    rates = [ranged(row["bytes_per_second"][name], ",.0f", 1e-6) for name in names]
    return [row["options"]["preset"], row["options"]["framework"], *rates]


def read_rows(out: str) -> list[dict[str, Any]]:
    """The rows of earlier measurements."""
    file = Path(f"{out}.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines() if out and file.exists() else []
    return [json.loads(line) for line in lines]


def main(argv: list[str]) -> None:
    """Parse, measure, print the table and write the results."""
    describe = "Time a run's saves: beside updates, in the foreground, and the bytes alone."
    options = parse(SavingConfig, argv, prog="benchmarks.saving", description=describe)
    rows = read_rows(options.out)
    kind = options.preset, options.framework
    taken = [row for row in rows if (row["options"]["preset"], row["options"]["framework"]) == kind]
    if taken:
        raise FileExistsError(f"{options.out}.jsonl has {' on '.join(kind)} already; choose another --out.")
    rows.append(benchmark(options))
    print()
    print(markdown(rows))
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{options.out}.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(rows[-1], allow_nan=False) + "\n")
        Path(f"{options.out}.md").write_text(markdown(rows), encoding="utf-8")
        print(f"wrote {options.out}.jsonl, {options.out}.md")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
