"""The picture of one run or of several: losses, accuracy, perplexity against the step."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

from harness.records import is_finite
from harness.runlog import read_metrics
from recipe.config import LARGEST_WHOLE, require
from recipe.durable import write_whole
from recipe.reading import read_json, short, some, take

LARGEST_DRAWN = 1e38
"""What is larger, and more than float32 holds, is drawn as a gap: axes of float64's whole range overflow."""


def plot_runs(folders: list[str | Path], out_png: str | Path, baselines: dict[str, float] | None = None) -> None:
    """Draw training and validation loss, accuracy and perplexity of runs against the step.

    `baselines` maps a name to nats per token; left out, the runs' own recorded ones are drawn. Later runs are dashed,
    so that two equal curves both show. The suffix of `out_png` chooses the format; UserError, before a run is read,
    for one that is none. The file is written whole or not at all; an older one stays until then.
    """
    from matplotlib.figure import Figure  # half a second; and Figure alone needs no display and no global backend
    from matplotlib.ticker import LogLocator, NullLocator

    out, formats = Path(out_png), Figure().canvas.get_supported_filetypes()
    require(
        out.suffix.lower()[1:] in formats,
        f"--out {short(str(out))} must end in one of {some(sorted(formats))}; choose e.g. {short(out.stem)}.png.",
    )
    require(out.parent.is_dir(), f"--out {short(str(out))} lies in no folder; make {short(str(out.parent))} first.")
    runs = [(label, read_metrics(folder)) for label, folder in zip(_labels(folders), folders, strict=True)]
    for label, records in runs:
        require(
            any(r["kind"] == "train" for r in records), f"run {label} has no training record yet; wait for its first."
        )
    if baselines is None:
        baselines = {}
        for _, records in runs:
            for record in records:
                if record["kind"] == "baselines":
                    names = [name for name in record if name not in ("kind", "step")]
                    baselines |= {name: take(record, name, float | None, f"{label}'s baselines") for name in names}
    levels = {name: nats for name, nats in baselines.items() if _is_drawn(nats)}

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
    loss_axes = figure.add_subplot(grid[:, 0])
    accuracy_axes = figure.add_subplot(grid[0, 1])
    perplexity_axes = figure.add_subplot(grid[1, 1])
    has_perplexity = False
    for index, (label, records) in enumerate(runs):
        style: dict[str, Any] = {"color": f"C{index}", "linestyle": ("-", "--", "-.", ":")[index % 4]}
        # the last run is drawn on top; thinner marks leave the earlier ones visible where curves coincide
        marks = style | {"marker": "osD^"[index % 4], "markersize": 6 if index == 0 else 4}
        loss_axes.plot(*_series(records, "train", "loss"), **style, alpha=0.45, linewidth=1, label=f"{label}: train")
        loss_axes.plot(*_series(records, "validation", "loss"), **marks, label=f"{label}: validation")
        accuracy_axes.plot(*_series(records, "validation", "accuracy"), **marks)
        steps, perplexities = _series(records, "validation", "perplexity")
        positive = [value if value > 0 else math.nan for value in perplexities]
        perplexity_axes.plot(steps, positive, **marks)
        has_perplexity = has_perplexity or not all(map(math.isnan, positive))
    for number, (name, nats) in enumerate(sorted(levels.items(), key=lambda item: -item[1])):
        color = ("0.6", "0.4", "0.2")[number % 3]
        label = f"{_without_formulas(name)}: {nats:{'.2f' if abs(nats) < 1e6 else '.2e'}}"
        loss_axes.axhline(nats, color=color, linestyle=":", linewidth=1.2, label=label)

    loss_axes.set(ylabel="loss (nats per token)", title="Loss")
    accuracy_axes.set(title="Validation accuracy")
    accuracy_axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.10g}%")  # as many digits as a step needs
    perplexity_axes.set(title="Validation perplexity")
    if has_perplexity:
        perplexity_axes.set(yscale="log")
        perplexity_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        perplexity_axes.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if 1 <= x < 1e6 else f"{x:.0e}")
        perplexity_axes.yaxis.set_minor_locator(NullLocator())
    for axes in figure.axes:
        axes.set_xlabel("step (optimizer updates)")
        axes.grid(alpha=0.3)
    loss_axes.legend(loc="upper right", framealpha=0.9, fontsize="small")
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the picture has a box for it
        figure.savefig(picture, dpi=150, format=out.suffix.lower()[1:])
    write_whole(out, picture.getvalue())


def _series(records: list[dict[str, Any]], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a curve; NaN is a gap in it."""
    rows = [record for record in records if record["kind"] == kind]
    for row in rows:
        step = row["step"]
        require(
            0 <= step < LARGEST_WHOLE,
            f"a {kind} record has step={short(str(step))}, and steps lie in [0, {LARGEST_WHOLE}); mend metrics.jsonl.",
        )
    values = [take(row, name, float | None, f"the {kind} record of step {row['step']}") for row in rows]
    return [row["step"] for row in rows], [float(value) if _is_drawn(value) else math.nan for value in values]


def _is_drawn(value: float | None) -> bool:
    return value is not None and is_finite(value) and abs(value) <= LARGEST_DRAWN


def _without_formulas(text: str) -> str:
    """A text for the picture: a pair of $ in it would be mathematics."""
    return short(text, 200).replace("$", r"\$")


def _labels(folders: list[str | Path]) -> list[str]:
    """A run's label: the folder's name and its framework; whole paths if two folders have one name."""
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    frameworks = []
    for path in paths:
        file = path / "run.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; give a run folder.")
        frameworks.append(_without_formulas(take(read_json(file), "framework", str, str(file))))
    return [f"{_without_formulas(name)} ({framework})" for name, framework in zip(names, frameworks, strict=True)]
