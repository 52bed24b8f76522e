"""The report of a comparison: a row per tensor in execution order, the first divergence, JSON, HTML, pictures."""

import base64
import dataclasses
import datetime
import functools
import io
import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from parity_tests.compare.precision import versions

COLOURS = {
    "jax": "#1f77b4",
    "torch": "#ff7f0e",
    "transformers": "#2ca02c",
    "candidate": "#1f77b4",
    "reference": "#ff7f0e",
}
LONGEST_TICK = 32
"""Characters of a tensor's name below a picture."""
BEYOND = "x: beyond its allowance"
EXACT = "at the foot: exactly 0"
INFINITE = "at the top: infinite (wrong shape, or not a number)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor in one dtype: each side's relative error against the truth, and what rounding explains."""

    dtype: str
    name: str
    shape: tuple[int, ...]
    errors: dict[str, float]
    """Relative Frobenius error by side; infinite if the shape is wrong or a value is not a number."""
    allowances: dict[str, float]
    operation: str = ""
    inputs: tuple[str, ...] = ()
    """Names of the tensors this one is computed from."""
    details: dict[str, str] = dataclasses.field(default_factory=dict)
    """For a side beyond its allowance: the worst index, the value there and the true one."""

    @property
    def beyond(self) -> list[str]:
        """Sides whose error exceeds their allowance."""
        return [side for side, error in self.errors.items() if not error <= self.allowances[side]]

    def share(self, side: str) -> float:
        """The side's error over its allowance; 0 of an exact tensor, whatever its allowance."""
        error, allowance = self.errors[side], self.allowances[side]
        return error / allowance if allowance else (math.inf if error else 0.0)

    def with_allowance(self, side: str, allowance: float) -> "Row":
        """The row with another allowance for one side."""
        return dataclasses.replace(self, allowances={**self.allowances, side: allowance})


class Operation(NamedTuple):
    """What computes a tensor: in words, and the tensors it reads."""

    text: str
    inputs: tuple[str, ...]


class Coverage(NamedTuple):
    """How much of two models was compared: (compared, of so many) by kind, and what was left out."""

    parameters: tuple[int, int] | None = None
    outputs: tuple[int, int] | None = None
    gradients: tuple[int, int] | None = None
    tensors: tuple[int, int] | None = None
    """Of two functions, whose arrays are of no known kind."""
    only_jax: tuple[str, ...] = ()
    """Parameters (or tensors of two functions) without a partner."""
    only_torch: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Rules that match nothing."""
    sides: tuple[str, str] = ("JAX", "torch")

    @property
    def complete(self) -> bool:
        """Whether every parameter has a partner and every rule a use."""
        return not (self.only_jax or self.only_torch or self.problems)

    def text(self) -> str:
        """`12 of 12 parameters, 31 of 34 outputs, 12 of 12 gradients compared`."""
        counts = [(kind, getattr(self, kind)) for kind in ("parameters", "outputs", "gradients", "tensors")]
        return ", ".join(f"{count[0]} of {count[1]} {kind}" for kind, count in counts if count) + " compared"

    def missing(self) -> list[str]:
        """A line for each way in which it is not complete."""
        what = "tensors" if self.parameters is None else "parameters"
        alone = zip(self.sides, (self.only_jax, self.only_torch), strict=True)
        return [*(f"{what} only in {side}: {', '.join(names)}" for side, names in alone if names), *self.problems]


class Summary(NamedTuple):
    """One side in one phase and dtype."""

    dtype: str
    phase: str
    side: str
    tensors: int
    largest: float
    """Largest relative error of any tensor."""
    share: float
    """Largest error over its allowance, which need not be the same tensor's."""
    where: str
    """The tensor that has this share."""
    beyond: int
    """Tensors beyond their allowance."""


class Divergence(NamedTuple):
    """The first tensor, in execution order, that some side has beyond its allowance."""

    row: Row
    side: str
    inputs: tuple[Row, ...]

    def text(self) -> str:
        """Several lines: the tensor, its error, its operation, the errors of what it was computed from."""
        row, side = self.row, self.side
        error, allowance = row.errors[side], row.allowances[side]
        times = f" ({error / allowance:.2e} times)" if allowance else ""
        lines = [f"first divergence: {row.name} in {side}, {row.dtype}"]
        lines.append(f"  relative error {error:.3e}, allowance {allowance:.3e}{times}")
        if side in row.details:
            lines.append(f"  {row.details[side]}")
        if row.operation:
            lines.append(f"  operation: {row.operation}")
        # Without known operations `inputs` is only the row before, be it a weight of another layer.
        which = "from" if row.operation else "the tensor compared just before this one,"
        for one in self.inputs:
            if side in one.errors:
                within = "beyond" if side in one.beyond else "within"
                found = f"error {one.errors[side]:.3e}, {within} its allowance {one.allowances[side]:.3e}"
                lines.append(f"  {which} {one.name}: {found}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
    """A comparison and its verdict."""

    title: str
    rows: list[Row]
    """In execution order, one dtype after the other."""
    contracts: dict[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    """By side, what it computed with."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    """What a reader must know to judge the numbers, tensors that had no partner included."""
    coverage: Coverage | None = None
    """How much was compared, where that is known."""
    partial: bool = False
    """Whether an incomplete coverage is what was asked for."""
    explained: str = ""
    """What a float32 constant or cast on one side explains, if anything had to be."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Versions of the libraries, the date, and what else the maker knows (a commit)."""

    def __post_init__(self) -> None:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        object.__setattr__(self, "about", {"commit": None, "date": date, "versions": versions()} | self.about)

    @functools.cached_property
    def first_divergence(self) -> Divergence | None:
        """The first row beyond its allowance, or None."""
        for row in self.rows:
            if row.beyond:
                by_name = {other.name: other for other in self.rows if other.dtype == row.dtype}
                return Divergence(row, row.beyond[0], tuple(by_name[name] for name in row.inputs if name in by_name))
        return None

    @property
    def incomplete(self) -> bool:
        """Whether something was left out that nobody allowed to be."""
        return self.coverage is not None and not self.partial and not self.coverage.complete

    @property
    def exit_code(self) -> int:
        """0 if every tensor is within its allowance and nothing was left out, 1 otherwise."""
        return 0 if self.first_divergence is None and not self.incomplete else 1

    @property
    def headline(self) -> str:
        """The verdict in one word."""
        if self.first_divergence is not None:
            return "Divergence"
        return "Incomplete" if self.incomplete else "Equal"

    def verdict(self) -> str:
        """One line, and what follows from it: the first divergence, what was left out."""
        lines = [self.first_divergence.text()] if self.first_divergence is not None else []
        if self.first_divergence is None:
            tensors = {(row.dtype, row.name) for row in self.rows}
            lines = [f"no divergence: all {len(tensors)} tensors within what rounding explains"]
        if self.coverage is not None:
            dtypes = ", ".join(dict.fromkeys(row.dtype for row in self.rows if phase_of(row.name) != "weight"))
            how = f"{self.coverage.text()} in {dtypes}"
            if self.first_divergence is not None:
                lines.append(f"  {how}")
            elif self.incomplete:
                lines = [f"incomplete: {how}; what was compared agrees"]
            else:
                lines = [f"no divergence: {how}, all within what rounding explains"]
            if self.explained:
                lines.append(f"  {self.explained}")
            if self.incomplete:
                lines += [f"  {line}" for line in self.coverage.missing()]
                lines.append("  remedy: say in rules which belong together, or pass partial=True")
        return "\n".join(lines)

    def worst(self, most: int = 5) -> list[tuple[Row, str]]:
        """The tensors nearest to their allowance or furthest beyond it, with the side, worst first."""
        pairs = [(row, side) for row in self.rows for side in row.errors if row.allowances[side] < math.inf]
        return sorted(pairs, key=lambda pair: -pair[0].share(pair[1]))[:most]

    def worst_text(self, most: int = 5) -> str:
        """Those as a table: error over allowance."""
        lines = ["nearest to their allowance, or furthest beyond it:"]
        for row, side in self.worst(most):
            times = f"{row.errors[side]:.2e} / {row.allowances[side]:.2e} = {row.share(side):.2e}"
            lines.append(f"  {row.dtype:9} {side:9} {times}  {row.name}")
        return "\n".join(lines)

    def summary(self) -> list[Summary]:
        """A line per dtype, phase and side."""
        lines = []
        for (dtype, phase), rows in self._phases().items():
            for side in dict.fromkeys(side for row in rows for side in row.errors):
                mine = [row for row in rows if side in row.errors]
                worst = max(mine, key=lambda row: row.share(side))
                largest, beyond = max(row.errors[side] for row in mine), sum(side in row.beyond for row in mine)
                lines.append(Summary(dtype, phase, side, len(mine), largest, worst.share(side), worst.name, beyond))
        return lines

    def table(self) -> str:
        """The summary as text."""
        header = f"{'dtype':9} {'phase':9} {'side':13} {'tensors':>7} {'largest error':>13} {'/ allowance':>11} "
        lines = [header + f"{'beyond':>6}  where"]
        for line in self.summary():
            text = f"{line.dtype:9} {line.phase:9} {line.side:13} {line.tensors:7d} {line.largest:13.2e} "
            lines.append(text + f"{line.share:11.2e} {line.beyond:6d}  {line.where}")
        return "\n".join(lines)

    def _phases(self) -> dict[tuple[str, str], list[Row]]:
        phases: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            phases.setdefault((row.dtype, phase_of(row.name)), []).append(row)
        return phases

    def to_json(self) -> str:
        """Everything above; an infinite number is the text "inf", so that the file is JSON to every reader."""
        divergence = self.first_divergence
        found = None
        if divergence is not None:
            row, side = divergence.row, divergence.side
            found = {"name": row.name, "dtype": row.dtype, "side": side, "operation": row.operation}
            found |= {"error": row.errors[side], "allowance": row.allowances[side], "inputs": list(row.inputs)}
        values = {
            "title": self.title,
            "equal": self.exit_code == 0,
            "verdict": self.verdict(),
            "coverage": None if self.coverage is None else self.coverage._asdict(),
            "first_divergence": found,
            **self.about,
            "settings": self.settings,
            "contracts": {side: dict(contract) for side, contract in self.contracts.items()},
            "notes": self.notes,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        return json.dumps(_finite(values), indent=1, allow_nan=False) + "\n"

    def pictures(self) -> dict[str, bytes]:
        """PNG files by name: error against depth, and error against step if there are steps."""
        pictures = {}
        for dtype in dict.fromkeys(row.dtype for row in self.rows):
            mine = [row for row in self.rows if row.dtype == dtype]
            pictures[f"depth-{dtype}.png"] = _depth_picture(self.title, dtype, mine)
            if any(step_of(row.name) for row in mine):
                pictures[f"step-{dtype}.png"] = _step_picture(self.title, dtype, mine)
        return pictures

    def to_html(self) -> str:
        """One file that needs no other: verdict, what was compared, pictures, contracts, the table of every tensor."""
        images = {name: base64.b64encode(data).decode() for name, data in self.pictures().items()}
        return _template().render(
            title=self.title,
            headline=self.headline,
            kind={"Equal": "equal", "Incomplete": "incomplete"}.get(self.headline, "beyond"),
            sign={"Equal": "✓", "Incomplete": "!"}.get(self.headline, "✗"),
            verdict=self.verdict(),
            about=self.about,
            summary=self.summary(),
            notes=self.notes,
            images=images,
            contracts={side: dict(contract) for side, contract in self.contracts.items()},
            fields=list(dict.fromkeys(name for one in self.contracts.values() for name in one if name != "side")),
            worst=self.worst(),
            settings=json.dumps(_finite(self.settings)),
            sides=list(dict.fromkeys(side for row in self.rows for side in row.errors)),
            rows=self.rows,
        )

    def show(self, folder: str | Path = "") -> None:
        """Print verdict, worst tensors, table and notes; with a folder, write the report there too."""
        notes = [f"note: {note}" for note in self.notes]
        print(self.verdict(), self.worst_text(), self.table(), *notes, sep="\n")
        for path in self.write(folder) if folder else ():
            print(f"wrote {path}")

    def write(self, folder: str | Path) -> list[Path]:
        """Write report.json, report.html and the pictures; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"report.json": self.to_json().encode(), "report.html": self.to_html().encode(), **self.pictures()}
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return [folder / name for name in files]


def phase_of(name: str) -> str:
    """First word of a report's tensor name: forward, backward, gradient, step; `tensor` where names have none."""
    first = name.partition(" ")[0]
    return first if first in ("weight", "forward", "backward", "gradient", "step") else "tensor"


def step_of(name: str) -> int | None:
    """The optimizer step a tensor belongs to, counted from 1."""
    words = name.split(" ")
    return int(words[1]) if phase_of(name) == "step" else None


def _template() -> jinja2.Template:
    """The page; names and notes come from whoever compares, so everything is escaped."""
    options = dict(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment = jinja2.Environment(**options)
    environment.filters["number"] = "{:.2e}".format
    return environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))


def _finite(value):
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return "inf" if isinstance(value, float) and not math.isfinite(value) else value


def _figure(title: str, width: float, panels: int):
    from matplotlib.figure import Figure  # takes a second to import; the table does not wait for it

    figure = Figure(figsize=(width, 3.2 * panels), layout="constrained", dpi=90)
    figure.suptitle(textwrap.fill(title, 110), fontsize=10)
    return figure, figure.subplots(panels, 1, squeeze=False)[:, 0]


def _png(figure) -> bytes:
    """The picture in 256 colours, rare ones among them: a third of the bytes."""
    from PIL import Image  # matplotlib's own

    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    few = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _lines(axes, positions, values, label: str, **style) -> None:
    """A line that leaves out zeros and infinities, which a logarithmic axis has no place for."""
    shown = [value if 0 < value < math.inf else math.nan for value in values]
    axes.plot(positions, shown, label=label, **style)


def _edges(axes, positions, values, colour: str | None) -> None:
    """Errors without a place on a logarithmic axis: exact tensors along its foot, infinite errors along its top."""
    at_edge = dict(transform=axes.get_xaxis_transform(), linestyle="", color=colour, clip_on=False, alpha=0.7)
    for limit, height, marker, label in ((0.0, 0.0, "v", EXACT), (math.inf, 1.0, "^", INFINITE)):
        here = [position for position, value in zip(positions, values, strict=True) if value == limit]
        if here:
            axes.plot(here, [height] * len(here), marker=marker, markersize=4, label=label, **at_edge)


def _say_if_empty(axes) -> None:
    """A panel whose every error is at an edge says so, instead of showing an axis with nothing on it."""
    drawn = (value for line in axes.lines if line.get_label() not in (EXACT, INFINITE) for value in line.get_ydata())
    if not any(0 < value < math.inf for value in drawn):
        axes.set_yticks([])
        at = dict(transform=axes.transAxes, ha="center", va="center", fontsize=9)
        axes.text(0.5, 0.5, "no error here has a place on a logarithmic axis: see the marks at foot and top", **at)


def _depth_picture(title: str, dtype: str, rows: list[Row]) -> bytes:
    phases = [phase for phase in dict.fromkeys(phase_of(row.name) for row in rows) if phase != "step"]
    figure, panels = _figure(f"{title}: relative error against the float64 truth, {dtype}", 9, len(phases))
    for phase, axes in zip(phases, panels, strict=True):
        mine = [row for row in rows if phase_of(row.name) == phase]
        for side in dict.fromkeys(side for row in mine for side in row.errors):
            here = [(index, row) for index, row in enumerate(mine) if side in row.errors]
            positions, colour = [index for index, _ in here], COLOURS.get(side)
            errors, allowances = ([getattr(row, kind)[side] for _, row in here] for kind in ("errors", "allowances"))
            _lines(axes, positions, errors, f"{side}: error", color=colour, marker=".", linewidth=1, markersize=4)
            _lines(axes, positions, allowances, f"{side}: allowance (dotted)", color=colour, linestyle=":", linewidth=1)
            _edges(axes, positions, errors, colour)
            beyond = [(index, row.errors[side]) for index, row in here if side in row.beyond]
            if beyond:
                _lines(axes, *zip(*beyond, strict=True), BEYOND, color="red", marker="x", linestyle="")
        ticks = _ticks(mine)
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=30, ha="right", fontsize=7)
        axes.set(yscale="log", ylabel=phase)
        axes.grid(alpha=0.3)
        _say_if_empty(axes)
    handles = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7)
    return _png(figure)


def _ticks(rows: list[Row], most: int = 14) -> dict[int, str]:
    """Every so many tensors one tick with the name's end, which tells more than its beginning."""
    every = math.ceil(len(rows) / most)
    names = {index: row.name.partition(" ")[2] or row.name for index, row in enumerate(rows) if index % every == 0}
    return {
        index: name if len(name) <= LONGEST_TICK else f"…{name[1 - LONGEST_TICK :]}" for index, name in names.items()
    }


def _step_picture(title: str, dtype: str, rows: list[Row]) -> bytes:
    figure, (axes,) = _figure(f"{title}: the largest relative error after each optimizer step, {dtype}", 9, 1)
    rows = [row for row in rows if step_of(row.name)]
    steps = sorted({step_of(row.name) for row in rows})
    kinds = {"loss": "o", "parameter": "s", "update": "^", "mu": "v"}
    for side in dict.fromkeys(side for row in rows for side in row.errors):
        for kind, marker in kinds.items():
            mine = [row for row in rows if row.name.split(" ")[2] == kind and side in row.errors]
            largest = [max(row.errors[side] for row in mine if step_of(row.name) == step) for step in steps]
            _lines(axes, steps, largest, f"{side}: {kind}", color=COLOURS.get(side), marker=marker, linewidth=1)
            _edges(axes, steps, largest, COLOURS.get(side))
    axes.set(yscale="log", xlabel="optimizer step", xticks=steps)
    _say_if_empty(axes)
    axes.grid(alpha=0.3)
    handles = {line.get_label(): line for line in axes.lines}
    axes.legend(handles.values(), handles.keys(), fontsize=7, ncols=2)
    return _png(figure)
