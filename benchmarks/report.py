"""Results on paper: the statistics of a row, JSON lines, Markdown tables, a bar chart, and curves over a sweep.

`python -m benchmarks.report A.jsonl B.jsonl --out NAME` puts several results into one table and one picture.
"""

import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, tables
from benchmarks.job import PARTS
from harness.cli import end, parse
from harness.surroundings import git_commit, installed_versions
from recipe.config import require

COLOURS = {
    "jax": "#0072b2",
    "torch-eager": "#e69f00",
    "torch-compile": "#d55e00",
    "torch-compile-max": "#cc79a7",
    "torch-eager-lce": "#f0e442",
    "torch-compile-lce": "#999933",
    "hf": "#7f7f7f",
    "seed": "#009e73",
}
"""One colour per mode in every picture, told apart by colour-blind readers too (Okabe and Ito's palette)."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum, maximum and median absolute deviation."""
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    return {"median": median, "min": min(values), "max": max(values), "mad": mad}


def summarise(
    mode: str,
    *,
    seconds: Sequence[float],
    baseline_seconds: Sequence[float],
    flops: float,
    tokens: int,
    ceiling: float,
) -> dict[str, Any]:
    """Statistics of one mode from the seconds per update of each round; ratios are taken within a round."""
    times = spread(seconds)
    ratios = [theirs / ours for ours, theirs in zip(seconds, baseline_seconds, strict=True)]
    return {
        "mode": mode,
        "seconds": list(seconds),
        "seconds_per_update": times,
        "tokens_per_second": tokens / times["median"],
        "speed_against_baseline": spread(ratios),
        "mfu": flops / times["median"] / ceiling,
    }


ENDINGS = (".jsonl", ".md", ".png", "-scaling.png")


def _files(out: str, endings: Sequence[str] = ENDINGS) -> list[Path]:
    return [Path(f"{out}{ending}") for ending in endings]


def check_free(out: str, endings: Sequence[str] = ENDINGS) -> None:
    """Raise FileExistsError if results of this name exist."""
    for path in _files(out, endings) if out else []:
        if path.exists():
            raise FileExistsError(f"{path} exists, and results are never overwritten; choose another --out.")


def circumstances(program: str) -> dict[str, Any]:
    """When, how, from which commit, with which versions and on which CPU this process measures: a row's first keys."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
        "git_commit": git_commit(),
        "versions": installed_versions(),
        "cpu": machine.cpu_name(),
        "vector_extensions": machine.vector_extensions(),
    }


def write(
    rows: list[dict[str, Any]],
    out: str,
    *,
    table: Callable[[list[dict[str, Any]]], str],
    bars: Callable[[list[dict[str, Any]], Path], None],
    curves: Callable[[list[dict[str, Any]], Path], bool] | None = None,
) -> list[Path]:
    """Write OUT.jsonl, OUT.md, OUT.png and, if `curves` draws any, OUT-scaling.png; returns their paths."""
    check_free(out)
    lines, markdown_file, picture, scaling = _files(out)
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    markdown_file.write_text(table(rows), encoding="utf-8")
    bars(rows, picture)
    drawn = curves is not None and curves(rows, scaling)
    return [lines, markdown_file, picture, *([scaling] if drawn else [])]


def show(rows: list[dict[str, Any]], out: str, **how) -> None:
    """Print the tables and write the files, if `out` names any; `how` is for `write`."""
    print()
    print(how["table"](rows))
    if out:
        print("wrote " + ", ".join(map(str, write(rows, out, **how))))


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows by benchmark and shape, each group one row per mode."""
    by_key: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        by_key.setdefault((row["date"], row["command"], title(row)), []).append(row)
    return list(by_key.values())


def device(row: dict[str, Any]) -> str:
    """The GPU's name, or the CPU's with the cores in use."""
    contract = row["contract"]
    return f"{row['cpu']}, {row['cores']} in use" if contract["backend"] == "cpu" else contract["device"]


def title(row: dict[str, Any]) -> str:
    """What was run: preset, shape, dtype."""
    config = row["config"]
    shape = f"{config['accumulation']} x {config['batch_size']} x {config['sequence_length']}"
    dtypes = f"{row['dtype']}, Newton-Schulz {config['precision']['newton_schulz']}"
    return f"{row['preset']}, {shape} tokens per update, {dtypes}, dropout {config['model']['dropout']:g}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table per benchmark: what was run and where, then a line per mode."""
    text = []
    for group in groups(rows):
        first = group[0]
        versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "flax", "torch", "transformers"))
        differences, allowed = first["first_update_differences"], first["first_update_allowances"]
        text += [
            f"### {title(first)}",
            "",
            f"`{first['command']}`",
            "",
            f"{device(first)}; {versions}; commit {first['git_commit']}; {first['date']}.",
            f"Matrix-product ceiling {first['ceiling_flops_per_second'] / 1e9:.1f} GFLOP/s; "
            f"{first['flops_per_update'] / 1e9:.1f} GFLOP per update; {len(first['seconds'])} rounds of "
            f"{first['updates_per_measurement']} updates. First losses differ by {differences['loss']:.1e} nats "
            f"(rounding explains {allowed['loss']:.1e}), gradient norms by {differences['grad_norm']:.1e} "
            f"({allowed['grad_norm']:.1e}).",
            *(f"{mode} is missing or incomplete: {reason}." for mode, reason in first["failed"].items()),
            "",
            *tables.table(
                {
                    **{"mode": "l", "ms per update, median (min–max, MAD)": "r", "tokens/s": "r"},
                    **{f"x {first['baseline']} (min–max)": "r", "MFU": "r"},
                    **{"optimizer / head and loss / attention": "r", "start to first update, s: cold (warm)": "r"},
                    **{"peak memory, MiB": "r", "noise": "l"},
                },
                map(_cells, group),
            ),
            "",
            *_parts_table(group),
        ]
    return "\n".join(text)


def _parts_table(group: list[dict[str, Any]]) -> list[str]:
    """Each part's time at the ceiling, then what it takes alone in every mode, with its share of that mode's update."""
    timed = [row for row in group if row["parts"]]
    if not timed:
        return []
    first = timed[0]
    lines = []
    for name, what in PARTS.items():
        cells = [row["parts"].get(name) for row in timed]
        flops = next((cell["flops"] for cell in cells if cell), 0.0)
        limit = 1e3 * flops / first["ceiling_flops_per_second"]
        texts = [f"{1e3 * cell['seconds']:,.1f} ({cell['share']:.0%})" if cell else "–" for cell in cells]
        lines.append([what, f"{limit:,.1f}", *texts])
    limit = 1e3 * first["flops_per_update"] / first["ceiling_flops_per_second"]
    texts = [f"{1e3 * row['seconds_per_update']['median']:,.1f}" for row in timed]
    lines.append(["the whole update", f"{limit:,.1f}", *texts])
    columns = {"part of an update, alone": "l", "at the ceiling, ms": "r"}
    return [*tables.table(columns | {f"{row['mode']}, ms": "r" for row in timed}, lines), ""]


def peak_bytes(row: dict[str, Any]) -> int:
    """Device memory on a GPU; on a CPU the largest resident set of the whole life, compilation included."""
    peaks = [row["memory"]["to_first"], row["memory"]["steady"]]
    on_device = [peak["peak_device"] for peak in peaks if peak["peak_device"] is not None]
    return max(on_device or [peak["peak_rss"] for peak in peaks])


def _cells(row: dict[str, Any]) -> list[str]:
    times = {name: 1e3 * value for name, value in row["seconds_per_update"].items()}
    ratio = row["speed_against_baseline"]
    steady = row["memory"]["steady"]["peak_rss"] / 2**20
    memory = f"{peak_bytes(row) / 2**20:,.0f}"
    if row["contract"]["backend"] == "cpu" and row["memory"]["reset"]:
        memory += f" ({steady:,.0f} once compiled)"
    shares = [row["parts"].get(name) for name in ("optimizer", "cross_entropy", "attention")]
    share = " / ".join(f"{part['share']:.0%}" for part in shares if part) or "–"
    cold, warm = row["first_step_seconds"]["cold"], row["first_step_seconds"].get("warm")
    first_step = f"{cold:.1f}" + ("" if warm is None else f" ({warm:.1f})")
    return [
        row["mode"],
        f"{times['median']:,.1f} ({times['min']:,.1f}–{times['max']:,.1f}, {times['mad']:,.1f})",
        f"{row['tokens_per_second']:,.0f}",
        tables.ranged(ratio, ".2f"),
        f"{row['mfu']:.1%}",
        share,
        first_step,
        memory,
        f"**noisy**: {row['noise']}" if row["noisy"] else "within limits",
    ]


def plot(rows: list[dict[str, Any]], png: Path) -> None:
    """Bars of tokens per second, whiskers from the slowest to the fastest round, one group per benchmark."""
    panels = []
    for members in groups(rows):
        drawn = []
        for row in members:
            tokens, times = row["tokens_per_update"], row["seconds_per_update"]
            label = (
                f"{row['tokens_per_second']:,.0f}   {row['speed_against_baseline']['median']:.2f} x {row['baseline']}"
            )
            label += f"   MFU {row['mfu']:.0%}" + ("   noisy" if row["noisy"] else "")
            ends = tokens / times["max"], tokens / times["min"]
            drawn.append(tables.Bar(row["mode"], row["tokens_per_second"], *ends, label, COLOURS[row["mode"]]))
        panels.append((title(members[0]), drawn))
    quantity = "training tokens per second: median round, whiskers slowest to fastest"
    tables.bars(panels, png, quantity=quantity, heading=heading(rows, device), one_scale=True)


def heading(rows: list[dict[str, Any]], place: Callable[[dict[str, Any]], str]) -> str:
    """What stands above a picture: where, of which commit, when."""
    places = "; ".join(dict.fromkeys(map(place, rows)))
    return f"{places}\ncommit {str(rows[0]['git_commit'])[:12]}, {rows[0]['date'][:10]}"


def plot_scaling(rows: list[dict[str, Any]], png: Path) -> bool:
    """Curves of tokens per second and of peak memory over each size that varies; False, and no file, if none does.

    A mode has one curve for every value of the other size; later values are drawn dashed, then dotted.
    """
    from matplotlib.figure import Figure

    names = {"sequence_length": "tokens per sequence", "batch_size": "sequences per micro-batch"}
    values = {name: sorted({row["config"][name] for row in rows}) for name in names}
    varied = [name for name in names if len(values[name]) > 1]
    if not varied:
        return False
    quantities = {
        "training tokens per second": lambda row: row["tokens_per_second"],
        "peak memory, MiB": lambda row: peak_bytes(row) / 2**20,
    }
    figure = Figure(figsize=(5.0 * len(varied), 7.0), layout="constrained")
    grid = figure.subplots(2, len(varied), squeeze=False, sharex="col")
    for column, name in enumerate(varied):
        other = next(size for size in names if size != name)
        for index, fixed in enumerate(values[other]):
            for mode in dict.fromkeys(row["mode"] for row in rows):
                curve = [row for row in rows if row["mode"] == mode and row["config"][other] == fixed]
                curve.sort(key=lambda row: row["config"][name])
                sizes = [row["config"][name] for row in curve]
                label = mode + (f", {fixed} {names[other]}" if len(values[other]) > 1 else "")
                style = {"color": COLOURS[mode], "linestyle": ("-", "--", ":")[index % 3], "marker": "o"}
                for axes, quantity in zip(grid[:, column], quantities.values(), strict=True):
                    axes.plot(sizes, [quantity(row) for row in curve], **style, label=label)
        for axes, quantity in zip(grid[:, column], quantities, strict=True):
            axes.set(ylabel=quantity, ylim=(0, None))
            axes.grid(alpha=0.3)
        grid[1, column].set_xlabel(names[name])
        grid[1, column].set_xscale("log", base=2)
        grid[1, column].set_xticks(values[name], [str(value) for value in values[name]])
        grid[1, column].minorticks_off()
    grid[0, 0].legend(fontsize="small")
    figure.suptitle(f"{device(rows[0])}; {rows[0]['preset']}, {rows[0]['dtype']}", fontsize=9)
    figure.savefig(png, dpi=150)
    return True


@dataclass(frozen=True)
class ReportConfig:
    """Which results to put together."""

    results: tuple[str, ...]
    """JSON lines files of `benchmarks.throughput`."""
    out: str
    """Writes OUT.jsonl, OUT.md, OUT.png and, of several shapes, OUT-scaling.png."""


def main() -> None:
    """Read the files, print one table, write table and picture."""
    describe = "Put several results into one table and one picture."
    options = parse(ReportConfig, sys.argv[1:], prog="benchmarks.report", description=describe)
    rows = []
    for name in options.results:
        read = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        require(
            all("first_update_differences" in row for row in read),
            f"{name} holds rows of something else; name a .jsonl that benchmarks.throughput wrote of its modes.",
        )
        rows += read
    require(bool(rows), "the files given hold no rows; name the .jsonl files that benchmarks.throughput wrote.")
    show(rows, options.out, table=markdown, bars=plot, curves=plot_scaling)


if __name__ == "__main__":
    end(main)
