"""What fits where and what bounds an update on a mesh, on paper: `python -m benchmarks.roofline --help`.

Arithmetic alone: FLOPs by `benchmarks.job`, bytes sent by `jax_impl.traffic`, the rates of `benchmarks.plan.targets`.
Nothing is compiled; `benchmarks.plan` does that, one mesh at a time.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import job
from benchmarks.plan.targets import Target, get_target
from benchmarks.tables import table
from harness.cli import end, parse
from jax_impl import traffic
from jax_impl.sharding import layout_of
from jax_impl.weights import param_paths
from recipe.config import RunConfig, require
from recipe.mesh import MeshShape, parse_mesh
from recipe.params import param_specs
from recipe.presets import get_preset


@dataclasses.dataclass(frozen=True)
class RooflineConfig:
    """One table: presets and meshes with commas and spaces between, a machine."""

    preset: str = "qwen3-0.6b,qwen3-8b"
    """The models and recipes, with commas between."""
    target: str = "h100"
    """The device: h100, v5e, v5p, v6e."""
    mesh: tuple[str, ...] = ("fsdp=8", "data=8,fsdp=8", "fsdp=64", "data=4,fsdp=64")
    """Meshes, as the run's --mesh."""
    rows: int = 1
    """Rows of a micro-batch of each device that has rows of its own."""
    out: str = ""
    """Results are written to OUT.md and OUT.png, never over older ones; empty prints the table only."""

    def __post_init__(self) -> None:
        require(get_target(self.target).rates is not None, f"--target {self.target} has no rates; choose e.g. h100.")
        require(self.rows >= 1, f"--rows {self.rows} must be at least 1; choose e.g. 1.")

    def runs(self) -> list[RunConfig]:
        """Every preset on every mesh, gathered by update and by layer."""
        found = []
        for preset in self.preset.split(","):
            for mesh in self.mesh:
                shape = parse_mesh(mesh)
                require(shape is not None, "--mesh '' names no mesh; choose e.g. fsdp=8.")
                assert shape is not None
                for gather in ("update", "layer"):
                    found.append(
                        dataclasses.replace(
                            get_preset(preset), mesh=mesh, gather=gather, batch_size=self.rows * shape.rows
                        )
                    )
        return found


def held(config: RunConfig) -> dict[str, float]:
    """Bytes of a device: the state at rest, and what an update holds of weights and gradients beside it.

    By update that is every weight whole in the compute dtype and its gradient whole in the parameters', two of them
    while micro-batches are added up; by layer the parts of both.
    """
    layout, specs = layout_of(config), param_specs(config.model)
    assert layout is not None
    width, narrow = (np.dtype("float32").itemsize if name != "bfloat16" else 2
                     for name in (config.precision.params, config.precision.compute))  # fmt: skip
    sums = 2 if config.accumulation > 1 else 1
    state = beside = 0.0
    for path, name in param_paths(config.model).items():
        count = math.prod(specs[name].shape)
        axes = [axis for axis in layout.spec(path) if axis]
        part, whole = count / layout.ways(tuple(axes)), count / layout.ways(tuple(a for a in axes if a != "fsdp"))
        state += width * part * (2 if specs[name].role == "matrix" else 3)  # itself, Muon's momentum or Adam's two
        used = part if config.gather == "layer" else whole
        beside += used * (narrow * (len(specs[name].shape) == 2) + width * sums)
    return {"state": state, "beside": beside}


def group(shape: MeshShape, axes: Iterable[str]) -> list[int]:
    """The devices that a collective over these axes joins with device 0, numbered along the mesh."""
    devices = np.arange(shape.devices).reshape(shape)
    return devices[tuple(slice(None) if name in axes else 0 for name in shape._fields)].reshape(-1).tolist()


def predict(config: RunConfig, target: Target) -> dict[str, Any]:
    """Seconds and bytes of one update of a device."""
    shape, rates = parse_mesh(config.mesh), target.rates
    assert shape is not None and rates is not None
    flops = job.flops_per_update(config)
    compute = flops / shape.devices / rates.products
    links = muon = sent = muon_sent = 0.0
    for one in traffic.sent(config, tokens_at_once=2048):
        moved = one.times * one.bytes
        seconds = moved / target.link_rate(shape.devices, group(shape, one.axes))
        links, sent = links + seconds, sent + moved
        if one.part == "muon":
            muon, muon_sent = muon + seconds, muon_sent + moved
    longest, shortest = compute + links, max(compute, links)
    return {
        **held(config),
        "preset": config.preset,
        "mesh": config.mesh,
        "gather": config.gather,
        "devices": shape.devices,
        "compute": compute,
        "links": links,
        "sent": sent,
        "muon": muon,
        "muon_sent": muon_sent,
        "newton_schulz": job.part_flops(config)["newton_schulz"] / shape.devices / rates.products,
        "mfu": tuple(flops / shape.devices / rates.peak / seconds for seconds in (longest, shortest)),
        "tokens": tuple(config.tokens_per_step / shape.devices / seconds for seconds in (longest, shortest)),
    }


def markdown(found: list[Mapping[str, Any]], target: Target) -> str:
    """The table."""
    columns = {"preset": "l", "mesh": "l", "gather": "l", "state, GiB": "r", "weights and gradients, GiB": "r"}
    columns |= {"compute, ms": "r", "links, ms": "r", "GB sent": "r", "of it Muon's": "r", "Muon's ms": "r"}
    columns |= {"Newton-Schulz, ms": "r", "tokens/s a device": "r", "MFU": "r"}
    rows = []
    for one in found:
        full = one["state"] + one["beside"] > (target.memory or math.inf)
        rows.append(
            [
                one["preset"],
                one["mesh"],
                one["gather"],
                f"{one['state'] / 2**30:,.2f}",
                f"{one['beside'] / 2**30:,.2f}" + (": too much" if full else ""),
                f"{1e3 * one['compute']:,.0f}",
                f"{1e3 * one['links']:,.0f}",
                f"{one['sent'] / 1e9:,.2f}",
                f"{one['muon_sent'] / 1e9:,.2f}",
                f"{1e3 * one['muon']:,.1f}",
                f"{1e3 * one['newton_schulz']:,.1f}",
                "–".join(f"{value:,.0f}" for value in one["tokens"]),
                "–".join(f"{value:.0%}" for value in one["mfu"]),
            ]
        )
    return "\n".join(table(columns, rows))


def draw(found: list[Mapping[str, Any]], target: Target, path: Path) -> None:
    """MFU by mesh: from nothing overlapped to all of it, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    presets = list(dict.fromkeys(one["preset"] for one in found))
    figure, every = pyplot.subplots(
        1, len(presets), figsize=(4.2 * len(presets), 3), layout="constrained", sharey=True, squeeze=False
    )
    for axes, preset in zip(every[0], presets, strict=True):
        own = [one for one in found if one["preset"] == preset]
        meshes = list(dict.fromkeys(one["mesh"] for one in own))
        for shift, gather, colour in ((-0.15, "update", "#0072b2"), (0.15, "layer", "#d55e00")):
            chosen = [one for one in own if one["gather"] == gather]
            places = [meshes.index(one["mesh"]) + shift for one in chosen]
            low, high = ([100 * one["mfu"][end] for one in chosen] for end in (0, 1))
            heights = [max(b - a, 0.4) for a, b in zip(low, high, strict=True)]
            axes.bar(places, heights, 0.26, low, color=colour, label=f"gathered by {gather}")
            for place, one, top in zip(places, chosen, high, strict=True):
                if one["state"] + one["beside"] > (target.memory or math.inf):
                    axes.text(place, top + 1, "too\nmuch", ha="center", fontsize=7)
        axes.set_title(f"{preset}, {target.kind}", fontsize=9)
        axes.set_xticks(range(len(meshes)), [mesh.replace(",", "\n") for mesh in meshes], fontsize=8)
        axes.set_ylim(0, 100)
    every[0][0].set_ylabel("MFU of the published peak, %\nnothing to all overlaps")
    every[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Print the table, write it and the picture."""
    describe = "What fits where and what bounds an update on a mesh: arithmetic, nothing is compiled."
    options = parse(RooflineConfig, sys.argv[1:], prog="benchmarks.roofline", description=describe)
    files = [Path(f"{options.out}{ending}") for ending in (".md", ".png")] if options.out else []
    for file in files:
        require(not file.exists(), f"{file} exists, and results are never overwritten; choose another --out.")
    target = get_target(options.target)
    found = [predict(config, target) for config in options.runs()]
    text = markdown(found, target)
    print(text)
    if files:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", "-m", "benchmarks.roofline", *sys.argv[1:]])
        files[0].write_text(f"# On paper: {target.kind}\n\n`{command}`\n\n{text}\n", encoding="utf-8")
        draw(found, target, files[1])
        print("wrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    end(main)
