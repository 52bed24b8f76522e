"""An update on 1, 2, 4, 8 host devices, weak and strong: `python -m benchmarks.scaling --help`.

Host devices share this machine's cores, so time says only what dividing the work costs; bytes sent and memory of a
device are those of any machine. All points take turns, one update each, in an order that is turned every round.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import job, machine, report
from benchmarks.tables import ranged, table
from harness.cli import end, parse
from harness.surroundings import git_commit, installed_versions
from recipe.config import RunConfig, require, to_dict
from recipe.mesh import MeshShape, parse_mesh

DEVICES = 8
"""Host devices at most."""


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """One benchmark: the same update on meshes of several sizes."""

    preset: str = "tiny"
    """The model and recipe."""
    axis: str = "fsdp"
    """Mesh axis along which devices are added: data, fsdp or tensor."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Sizes of the mesh."""
    rows: int = 2
    """Rows of a micro-batch of each device where the work grows (weak); all devices share those of the largest mesh
    where it does not (strong). Along tensor every device has all rows."""
    sequence_length: int = 128
    """Tokens of a row."""
    overrides: str = ""
    """JSON over the preset, e.g. {"model": {"num_hidden_layers": 1}}."""
    rounds: int = 7
    """Measured rounds; every point makes one update in each."""
    out: str = ""
    """Results are written to OUT.json, OUT.md and OUT.png, never over older ones; empty prints the table only."""

    def __post_init__(self) -> None:
        require(
            self.axis in MeshShape._fields,
            f"--axis {self.axis} is no axis of a mesh; choose from {', '.join(MeshShape._fields)}.",
        )
        for name in ("rows", "rounds", "sequence_length"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)} must be at least 1; choose e.g. 2.")
        sizes = self.devices
        require(
            len(sizes) > 0 and sizes[0] == 1 and list(sizes) == sorted(set(sizes)) and sizes[-1] <= DEVICES,
            f"--devices {' '.join(map(str, sizes))} must rise from 1 to at most {DEVICES}; choose e.g. 1 2 4 8.",
        )

    def run(self, devices: int, rows: int) -> RunConfig:
        """The update on so many devices, of so many rows in all."""
        config = job.resolve(
            self.preset,
            batch_size=rows,
            sequence_length=self.sequence_length,
            accumulation=1,
            overrides=self.overrides,
            dropout=0.0,
            seed=0,
            compute="float32",
            newton_schulz="float32",
            matmul="highest",
            attention="explicit",
        )
        return dataclasses.replace(config, mesh=f"{self.axis}={devices}")

    def points(self) -> dict[tuple[int, int], tuple[str, ...]]:
        """(devices, rows) -> the series that it stands in, each point measured once."""
        largest = self.rows if self.axis == "tensor" else self.rows * self.devices[-1]
        found: dict[tuple[int, int], tuple[str, ...]] = {}
        for devices in self.devices:
            grown = self.rows * devices
            for name, rows in (("weak", grown), ("strong", largest)):
                if name == "strong" or self.axis != "tensor":
                    found[devices, rows] = (*found.get((devices, rows), ()), name)
        return found


@contextlib.contextmanager
def worker(config: RunConfig) -> Iterator[subprocess.Popen]:
    """A process with as many host devices as the mesh has, which has been given its configuration."""
    shape = parse_mesh(config.mesh) or MeshShape()
    flags = f"--xla_force_host_platform_device_count={shape.devices} --xla_cpu_multi_thread_eigen=false"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.scaling_worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes) as process:  # type: ignore[call-overload]
        try:
            say(process, json.dumps(to_dict(config)))
            yield process
        finally:
            process.kill()


def say(process: subprocess.Popen, line: str) -> None:
    """Hand a worker a line."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen) -> dict[str, Any]:
    """What a worker answers; RuntimeError if it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker of the benchmark ended with exit code {process.wait()}; see its message above.")
    return json.loads(line)


def measure(options: ScalingConfig) -> list[dict[str, Any]]:
    """A record for each point: what its program is, and the seconds of each of its updates."""
    points = options.points()
    records: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        processes = []
        bar = tqdm(total=len(points) + options.rounds, desc="compiling", disable=not sys.stderr.isatty())
        for (devices, rows), series in points.items():
            processes.append(stack.enter_context(worker(options.run(devices, rows))))
            facts = hear(processes[-1])  # one after another: compiling takes all cores
            records.append({"devices": devices, "rows": rows, "series": list(series), **facts, "wall": [], "cpu": []})
            bar.update()
        bar.set_description("measuring")
        for turn in range(options.rounds):
            order = list(range(len(records)))
            order = order[turn % len(order) :] + order[: turn % len(order)]
            for place in order[:: -1 if turn % 2 else 1]:
                say(processes[place], "update")
                for name, seconds in hear(processes[place]).items():
                    records[place][name].append(seconds)
            bar.update()
        bar.close()
    return records


def efficiency(records: Sequence[Mapping[str, Any]], series: str) -> dict[int, dict[str, float]]:
    """CPU seconds for a row of a point over those of the series' first, round by round: what dividing costs."""
    chosen = [record for record in records if series in record["series"]]
    first = chosen[0]
    return {
        record["devices"]: report.spread(
            [
                own / record["rows"] / (alone / first["rows"])
                for own, alone in zip(record["cpu"], first["cpu"], strict=True)
            ]
        )
        for record in chosen
    }


def markdown(options: ScalingConfig, records: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> str:
    """The tables, and what they can and cannot show."""
    lines = [
        f"# Scaling of an update over host devices along {options.axis}",
        "",
        f"`{how['command']}`",
        "",
        f"{how['machine']}; {', '.join(f'{name} {version}' for name, version in how['versions'].items())}; commit "
        f"{how['git_commit']}; {options.preset}, {options.sequence_length} tokens a row, float32, {options.rounds} "
        "rounds in turns. Seconds are medians (least–most).",
        "",
        "All devices share this machine's cores. The time of an update therefore cannot fall with more devices; what "
        "is shown is by how much CPU time grows for the same rows, and what a device holds and sends, as anywhere.",
        "",
    ]
    for series in ("weak", "strong"):
        chosen = [record for record in records if series in record["series"]]
        if not chosen:
            continue
        grown = efficiency(records, series)
        what = "rows grow with the devices" if series == "weak" else "the same rows for all"
        columns = {"devices": "r", "rows": "r", "s an update": "r", "CPU s": "r", "CPU time of a row": "r"}
        columns |= {"collectives": "r", "MB sent by each": "r", "by formula": "r", "MiB of arguments": "r"}
        columns |= {"MiB of temporaries": "r"}
        rows = [
            [
                str(record["devices"]),
                str(record["rows"]),
                ranged(report.spread(record["wall"]), ".2f"),
                ranged(report.spread(record["cpu"]), ".2f"),
                ranged(grown[record["devices"]], ".2f") + " x",
                str(record["collectives"]),
                f"{record['sent'] / 1e6:,.3f}",
                f"{record['formula'] / 1e6:,.3f}",
                f"{record['arguments'] / 2**20:,.1f}",
                f"{record['temporaries'] / 2**20:,.1f}",
            ]
            for record in chosen
        ]
        lines += [f"## {series.capitalize()}: {what}", "", *table(columns, rows), ""]
    return "\n".join(lines)


def draw(options: ScalingConfig, records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """CPU time of a row, memory and bytes of a device over the devices, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for series, colour in (("weak", "#0072b2"), ("strong", "#d55e00")):
        chosen = [record for record in records if series in record["series"]]
        if not chosen:
            continue
        devices = [record["devices"] for record in chosen]
        grown = efficiency(records, series).values()
        low, high = ([abs(one["median"] - one[end]) for one in grown] for end in ("min", "max"))
        left.errorbar(devices, [one["median"] for one in grown], [low, high], marker="o", color=colour, label=series)
        held = [(record["arguments"] + record["temporaries"]) / 2**20 for record in chosen]
        middle.plot(devices, held, marker="o", color=colour, label=series)
        right.plot(devices, [record["sent"] / 1e6 for record in chosen], marker="o", color=colour, label=series)
    for axes, name in ((left, "CPU time of a row, 1 device = 1"), (middle, "MiB a device"), (right, "MB sent by each")):
        axes.set_title(name, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(options.devices, list(map(str, options.devices)))
        axes.set_xlabel(f"devices along {options.axis}")
        axes.set_ylim(bottom=0)
    left.legend()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Measure, print the tables, write them."""
    describe = "What dividing an update among host devices costs: CPU time, bytes sent, memory of a device."
    options = parse(ScalingConfig, sys.argv[1:], prog="benchmarks.scaling", description=describe)
    for devices, rows in options.points():
        options.run(devices, rows)  # every mistake before the first minute
    files = [Path(f"{options.out}{ending}") for ending in (".md", ".json", ".png")] if options.out else []
    for file in files:
        require(not file.exists(), f"{file} exists, and results are never overwritten; choose another --out.")
    records = measure(options)
    versions = {name: version for name, version in installed_versions().items() if name in ("jax", "jaxlib", "flax")}
    command = " ".join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]])
    how = {"command": command, "machine": machine.cpu_name(), "versions": versions, "git_commit": git_commit()}
    text = markdown(options, records, how)
    print(text)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    if files:
        files[0].write_text(text, encoding="utf-8")
        whole = {**how, "options": dataclasses.asdict(options), "points": records}
        files[1].write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draw(options, records, files[2])
        print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    end(main)
