"""How every benchmark writes a Markdown table and draws its bars."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


def table(columns: Mapping[str, str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; `columns` maps each heading to "l" for text or "r" for numbers."""
    rules = {"l": "---", "r": "--:"}
    lines = [_line(columns), "|" + "|".join(rules[side] for side in columns.values()) + "|"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells under {len(columns)} headings: {list(row)}")
        lines.append(_line(row))
    return lines


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def ranged(values: Mapping[str, float], form: str, scale: float = 1.0) -> str:
    """`median (min–max)` of a spread in the given format."""
    median, low, high = (format(scale * values[name], form) for name in ("median", "min", "max"))
    return f"{median} ({low}–{high})"


class Bar(NamedTuple):
    """One bar: its name on the axis, its length, its whiskers' ends, what stands beside it."""

    name: str
    value: float
    low: float
    high: float
    label: str
    colour: str


def bars(
    groups: Sequence[tuple[str, Sequence[Bar]]],
    png: Path,
    *,
    quantity: str,
    heading: str,
    log: bool = False,
    one_scale: bool = False,
) -> None:
    """A picture with a panel of horizontal bars per titled group, whiskers from low to high.

    `one_scale` gives all panels the same axis, `log` a logarithmic one.
    """
    from matplotlib.figure import Figure  # takes a second to import; the tables do not wait for it

    count = sum(len(members) for _, members in groups)
    figure = Figure(figsize=(9, 1.2 + 0.32 * count + 0.6 * len(groups)), layout="constrained")
    heights = dict(height_ratios=[len(members) for _, members in groups])
    panels = figure.subplots(len(groups), squeeze=False, gridspec_kw=heights)[:, 0]
    longest = max(bar.high for _, members in groups for bar in members)
    for axes, (title, members) in zip(panels, groups, strict=True):
        for position, bar in enumerate(members):
            whiskers = [[bar.value - bar.low], [bar.high - bar.value]]
            axes.barh(position, bar.value, xerr=whiskers, capsize=3, color=bar.colour, height=0.75)
            axes.text(bar.high, position, f"   {bar.label}", va="center", fontsize=8)
        end = longest if one_scale else max(bar.high for bar in members)
        # Room to the right for the labels.
        if log:
            axes.set_xscale("log")
            axes.set_xlim(min(bar.low for bar in members) / 10, 20 * end)
        else:
            axes.set_xlim(0, 1.45 * end)
        axes.set_yticks(range(len(members)), [bar.name for bar in members])
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(quantity)
    figure.suptitle(heading, fontsize=9)
    figure.savefig(png, dpi=150)
