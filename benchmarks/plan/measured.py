"""Measured time by part beside the paper's, on the device that is here: `python -m benchmarks.plan.measured --help`.

A training step is compiled as `benchmarks.plan` reads it, run under JAX's profiler, and every kernel's time is given to
the part of its instruction. What launches reach in each resource corrects the paper's rates (`targets.py`). CUDA graphs
are off meanwhile, since the profiler sees a graph and not its kernels; the update's time is also taken without the
profiler.
"""

import collections
import dataclasses
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import job, machine
from benchmarks.plan.parts import Cost, costs
from benchmarks.plan.program import Program
from benchmarks.plan.targets import get_target
from benchmarks.tables import table
from harness.cli import end, parse
from harness.surroundings import git_commit, installed_versions
from recipe.config import RunConfig, require
from recipe.params import init_params

MODULE = "train_step"
"""What the compiled program's name contains."""
LONG = 20e-6
"""Seconds from which a launch says something of a rate; a shorter one is mostly its start."""


@dataclasses.dataclass(frozen=True)
class MeasuredConfig:
    """Time the parts of an update on this machine's device."""

    preset: str = "seed"
    """The model and recipe."""
    target: str = "h100"
    """Whose paper times stand beside the measured ones."""
    batch_size: int | None = None
    """Sequences per micro-batch; None takes the preset's."""
    sequence_length: int | None = None
    """Tokens per sequence, likewise."""
    accumulation: int | None = None
    """Micro-batches per update, likewise."""
    dropout: float | None = None
    """Dropout rate, likewise."""
    dtype: str = "bfloat16"
    """Compute dtype; parameters stay in float32."""
    overrides: str = ""
    """JSON over the preset, e.g. {"model": {"num_hidden_layers": 1}}."""
    updates: int = 5
    """Updates under the profiler, and as many without."""
    out: str = ""
    """Writes OUT.md and OUT.json, and on a GPU the compiler's tuning record OUT.tuning.txt, for later plans."""

    def __post_init__(self) -> None:
        require(self.updates > 0, f"--updates {self.updates} must be at least 1; choose e.g. 5.")
        require(get_target(self.target).rates is not None, f"--target {self.target} has no rates; choose h100.")

    def resolve(self) -> RunConfig:
        """The preset with these settings over it."""
        return job.resolve(
            self.preset,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            accumulation=self.accumulation,
            overrides=self.overrides,
            dropout=self.dropout,
            seed=0,
            **{"compute": self.dtype, "newton_schulz": "bfloat16", "matmul": "highest", "attention": "fused"},
        )


def kernel_seconds(events: Iterable[tuple[str, str, float]], launches: Iterable[str]) -> dict[str, float]:
    """Seconds by instruction, of events (module, instruction, seconds); a loop's own event is no launch."""
    names, found = set(launches), collections.Counter[str]()
    for module, name, seconds in events:
        if MODULE in module and name in names:
            found[name] += seconds
    return dict(found)


def by_part(found: list[Cost], seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Launches, paper and measured seconds by part, of one update; an instruction's time is that of all its runs."""
    parts: dict[str, dict[str, float]] = {}
    for cost in found:
        sums = parts.setdefault(cost.part, dict.fromkeys(("launches", "paper", "measured"), 0.0))
        sums["launches"] += cost.launch.times
        sums["paper"] += cost.launch.times * cost.seconds
        sums["measured"] += seconds.get(cost.launch.instruction.name, 0.0)
    return dict(sorted(parts.items(), key=lambda item: -item[1]["measured"]))


def reached(found: list[Cost], seconds: Mapping[str, float]) -> dict[str, float]:
    """FLOP/s or bytes/s of the launches that each resource bounds on paper, those long enough to say something."""
    work, taken = collections.Counter[str](), collections.Counter[str]()
    for cost in found:
        one = seconds.get(cost.launch.instruction.name, 0.0) / cost.launch.times
        products, memory, _ = cost.alone
        if one < LONG or max(products, memory) < cost.seconds:
            continue
        attention = "fmha" in cost.launch.instruction.target
        name = "memory" if memory > products else "attention" if attention else "products"
        work[name] += cost.launch.times * (cost.launch.bytes if name == "memory" else cost.flops)
        taken[name] += cost.launch.times * one
    return {name: work[name] / taken[name] for name in work}


def measure(options: MeasuredConfig) -> dict[str, Any]:
    """The record of a measurement."""
    # Here, because jax reads its environment when it is imported, and `main` must have set it.
    import jax

    from benchmarks.plan.compile import estimates
    from jax_impl.backend import on_device_of
    from jax_impl.train import init_state, make_train_step

    config, target = options.resolve(), get_target(options.target)
    step = make_train_step(config)
    state = init_state(config, init_params(config.model, config.seed))
    batches = [job.make_batch(config, index) for index in range(2)]

    def updates(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for index in range(count):
            state, metrics = step(state, *batches[index % 2])
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - start) / count

    with jax.default_matmul_precision(config.precision.matmul), on_device_of(state):
        traced = step.__wrapped__.trace(state, *batches[0])
        compiled = traced.lower().compile()
    updates(2)
    plain = [updates(1) for _ in range(options.updates)]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            updates(options.updates)
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        events = [event for file in files for event in profile_events(jax.profiler.ProfileData.from_file(str(file)))]
    program = Program(compiled.as_text())
    found = costs(program, config, target.rates, estimates(traced.jaxpr.jaxpr))
    total = kernel_seconds(events, (cost.launch.instruction.name for cost in found))
    seconds = {name: value / options.updates for name, value in total.items()}
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", "-m", "benchmarks.plan.measured", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "versions": installed_versions(),
        "device": device.device_kind,
        "platform": device.platform,
        "preset": options.preset,
        "shape": [config.accumulation, config.batch_size, config.sequence_length],
        "dropout": config.model.dropout,
        "target": target.name,
        "target_kind": target.kind,
        "parts": by_part(found, seconds),
        "update": {"median": statistics.median(plain), "min": min(plain), "max": max(plain)},
        "reached": reached(found, seconds),
        "rates": dataclasses.asdict(target.rates) if target.rates else {},
        "unseen": sorted({c.launch.instruction.name for c in found} - seconds.keys())[:20],
        "slowest": sorted(seconds.items(), key=lambda item: -item[1])[:30],
    }


def profile_events(profile) -> Iterable[tuple[str, str, float]]:
    """(module, instruction, seconds) of every event of a profile that belongs to a compiled program's instruction."""
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    yield str(stats.get("hlo_module", "")), str(stats["hlo_op"]), event.duration_ns * 1e-9


def _warning(record: Mapping[str, Any]) -> list[str]:
    """Said where the paper times are another device's."""
    if record["device"] == record["target_kind"]:
        return []
    return [f"The paper times are of {record['target_kind']}, this ran on {record['device']}.", ""]


def markdown(record: Mapping[str, Any]) -> str:
    """The record as tables."""
    A, B, T = record["shape"]
    update, parts = record["update"], record["parts"]
    total = {key: sum(part[key] for part in parts.values()) for key in ("launches", "paper", "measured")}
    rows = [
        [
            name,
            f"{part['launches']:,.0f}",
            f"{part['paper'] * 1e3:.2f}",
            f"{part['measured'] * 1e3:.2f}",
            f"{part['measured'] / part['paper']:.2f}" if part["paper"] else "–",
        ]
        for name, part in [*parts.items(), ("all kernels", total)]
    ]
    columns = {"part": "l", "launches": "r", f"paper, {record['target']}, ms": "r", "measured, ms": "r", "ratio": "r"}
    lines = [
        f"{record['preset']}, {A} x {B} x {T} tokens, dropout {record['dropout']}, on {record['device']}, commit "
        f"{record['git_commit']}: an update takes {update['median'] * 1e3:.2f} ms ({update['min'] * 1e3:.2f}–"
        f"{update['max'] * 1e3:.2f}), {A * B * T / update['median']:,.0f} tokens/s.",
        "",
        f"`{record['command']}`",
        "",
        *_warning(record),
        *table(columns, rows),
        "",
        "Reached by launches of 20 µs and more, by what bounds them on paper: "
        + (
            ", ".join(f"{name} {value / 1e12:.3g} T/s" for name, value in record["reached"].items())
            or "none is so long"
        )
        + f". Instructions of which the profiler saw nothing: {len(record['unseen'])}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    describe = "Measured time by part of an update beside its paper time, on this machine's device."
    options = parse(MeasuredConfig, sys.argv[1:], prog="benchmarks.plan.measured", description=describe)
    options.resolve()
    files = [Path(f"{options.out}{ending}") for ending in (".md", ".json")] if options.out else []
    for file in files:
        require(not file.exists(), f"{file} exists, and results are never overwritten; choose another --out.")
        file.parent.mkdir(parents=True, exist_ok=True)
    if machine.has_gpu():
        flags = ["--xla_gpu_enable_command_buffer="]
        flags += [f"--xla_gpu_dump_autotune_results_to={options.out}.tuning.txt"] if options.out else []
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    record = measure(options)
    text = markdown(record)
    print(text)
    for file in files:
        file.write_text(text if file.suffix == ".md" else json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if files:
        print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    end(main)
