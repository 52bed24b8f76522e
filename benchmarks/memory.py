"""How much memory an update takes on a device that is not here: `python -m benchmarks.memory --help`.

XLA's own account of the compiled program, as `benchmarks.plan` has it: state, batch and temporaries at their highest.
Nothing runs.
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.plan.__main__ import SHOWN, PlanConfig, prepare
from benchmarks.plan.targets import get_target
from benchmarks.tables import table
from harness.cli import end, parse
from harness.surroundings import git_commit, installed_versions
from recipe.config import RunConfig, UserError, require

REMAT = "+remat"
"""How a preset ends whose blocks are computed again in the backward pass."""
PREALLOCATED = 0.75
"""Share of a device's memory that JAX takes for its arrays unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """One table: presets down, rows of a micro-batch across."""

    preset: str = "tiny,seed,qwen3-0.6b,qwen3-0.6b+remat,qwen3-1.7b+remat"
    """The models and recipes, with commas between; one that ends in +remat is compiled with --precision.remat."""
    batch_size: str = "1,4,16,64"
    """Sequences per micro-batch, with commas between, rising. After the first that the device cannot hold, larger ones
    are not compiled."""
    target: str = "h100"
    """The device: h100, v5e, v5p, v6e, or host for this machine's own processor."""
    overrides: str = ""
    """JSON over each preset, e.g. {"model": {"num_hidden_layers": 1}}."""
    out: str = ""
    """Results are written to OUT.md and OUT.json, never over older ones; empty prints the table only."""

    def __post_init__(self) -> None:
        sizes = self.batch_size.split(",")
        require(
            all(size.isdecimal() and int(size) > 0 for size in sizes) and self.sizes == sorted(set(self.sizes)),
            f"--batch_size {self.batch_size} must be whole numbers of at least 1 that rise, with commas between; "
            "choose e.g. 1,4,16.",
        )
        for preset in self.presets:
            self.resolve(preset, self.sizes[0])

    @property
    def presets(self) -> list[str]:
        """The presets as they are named."""
        return self.preset.split(",")

    @property
    def sizes(self) -> list[int]:
        """The batch sizes."""
        return [int(size) for size in self.batch_size.split(",")]

    def resolve(self, preset: str, batch_size: int) -> RunConfig:
        """The update of a preset with so many rows."""
        name, remat = preset.removesuffix(REMAT), preset.endswith(REMAT)
        plan = PlanConfig(target=self.target, batch_size=batch_size, remat=remat, overrides=self.overrides)
        return plan.resolve(name)


def account(config: RunConfig, target_name: str) -> dict[str, Any]:
    """Bytes of this update's state, temporaries and all, on the target."""
    # Here, because jax reads its environment when it is imported, and `prepare` must have set it.
    from benchmarks.plan.compile import compile_update

    target = get_target(target_name)
    memory = compile_update(config, target).memory
    return {name: memory[name] for name in ("arguments", "temporaries", "total")}


def measure(options: MemoryConfig) -> list[dict[str, Any]]:
    """One record a preset and batch size, until one is too much for the device."""
    records: list[dict[str, Any]] = []
    limit = get_target(options.target).memory or math.inf
    points = [(preset, size) for preset in options.presets for size in options.sizes]
    too_much: set[str] = set()
    bar = tqdm(points, unit="program", disable=None)
    for number, (preset, size) in enumerate(bar, start=1):
        if preset in too_much:
            continue
        config = options.resolve(preset, size)
        if bar.disable:
            print(f"compiling {number} of {len(points)}: {preset}, {size} rows", file=sys.stderr, flush=True)
        found = account(config, options.target)
        shape = {"accumulation": config.accumulation, "sequence_length": config.sequence_length}
        records.append({"preset": preset, "batch_size": size, **shape, **found})
        if found["total"] > limit:
            too_much.add(preset)
    return records


def markdown(records: Iterable[Mapping[str, Any]], how: Mapping[str, Any]) -> str:
    """The table: GiB by preset and batch size, and how it was made."""
    records = list(records)
    sizes = sorted({record["batch_size"] for record in records})
    columns = {"preset": "l", "micro-batches x tokens a row": "l", "state": "r"}
    columns |= {f"{size} row{'s' * (size > 1)}": "r" for size in sizes}
    rows = []
    for preset in dict.fromkeys(record["preset"] for record in records):
        of_preset = {record["batch_size"]: record for record in records if record["preset"] == preset}
        first = next(iter(of_preset.values()))
        shape = f"{first['accumulation']} x {first['sequence_length']:,}"
        totals = [gib(of_preset[size]["total"], how["memory"]) if size in of_preset else "–" for size in sizes]
        rows.append([preset, shape, f"{first['arguments'] / 2**30:.2f}", *totals])
    versions = ", ".join(f"{name} {version}" for name, version in how["versions"].items())
    lines = [
        f"# GiB of device memory that an update takes, {how['target']}",
        "",
        f"`{how['command']}`",
        "",
        f"{versions}; commit {how['git_commit']}. XLA's account of the compiled program, bfloat16 compute on float32 "
        "parameters; nothing ran. State is parameters, optimizer and one micro-batch's tokens; the other columns are "
        "all of it at its highest.",
        "",
        *table(columns, rows),
        "",
        f"JAX takes {PREALLOCATED:.0%} of a device's memory for this unless XLA_PYTHON_CLIENT_MEM_FRACTION says "
        "otherwise. cuDNN's workspace and CUDA's own context, some hundreds of MiB, come on top. Saving holds a second "
        "copy of the state if there is room.",
    ]
    return "\n".join(lines) + "\n"


def gib(size: int, limit: int | None) -> str:
    """Bytes as GiB; marked if that is more than the device has."""
    return f"{size / 2**30:,.2f}" + (" (too much)" if limit is not None and size > limit else "")


def main() -> None:
    """Compile, print the table and write it."""
    describe = "What an update takes of a device's memory: compiled ahead of time and counted, not run."
    options = parse(MemoryConfig, sys.argv[1:], prog="python -m benchmarks.memory", description=describe)
    files = [Path(f"{options.out}{ending}") for ending in (".md", ".json")] if options.out else []
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists, and results are never overwritten; choose another --out.")
    target = get_target(options.target)
    target.check_installed()
    prepare(target, 1)
    versions = {name: version for name, version in installed_versions().items() if name in SHOWN}
    how = {
        "command": shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]]),
        "target": options.target,
        "memory": target.memory,
        "versions": versions | {name: target.versions()[name] for name in target.packages},
        "git_commit": git_commit(),
    }
    records = measure(options)
    text = markdown(records, how)
    print(text)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = text if file.suffix == ".md" else json.dumps({"how": how, "records": records}, indent=1) + "\n"
        file.write_text(whole, encoding="utf-8")
    if files:
        print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    end(main)
