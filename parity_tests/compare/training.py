"""Is the training of two models the same? Losses, gradients, optimizer state, updates and parameters, step by step.

`compare_training` runs both sides over the same batches. What rounding explains is measured on the torch side: the
whole trajectory, optimizer included, runs again with a rounding at random at every operation (`montecarlo.py`). If the
optimizers part, `diagnosis.py` names the term.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from parity_tests.compare.diagnosis import Recipe, Seen, Trajectory, diagnose, diagnose_gradients
from parity_tests.compare.errors import require, some
from parity_tests.compare.montecarlo import SEEDS, allowances, amplification
from parity_tests.compare.precision import UNIT_ROUNDOFF, check_dtypes
from parity_tests.compare.rules import Rules, TorchTensor, as_rules, make_plan
from parity_tests.compare.steps import (
    KINDS,
    JaxTraining,
    TorchTraining,
    check_left,
    jax_training,
    text_of,
    torch_training,
)
from parity_tests.compare.tolerance import error_and_worst, may_turn, wide

__all__ = ["SLOTS", "TrainingReport", "TrainingRow", "compare_training", "jax_training", "torch_training"]

Key = tuple[str, str, str]
Left = dict[Key, np.ndarray]

SLOTS: dict[str, tuple[str, ...]] = {
    "mu": ("exp_avg", "grad_avg", "momentum_buffer"),
    "nu": ("exp_avg_sq", "square_avg", "exp_inf"),
    "nu_max": ("max_exp_avg_sq",),
    "trace": ("momentum_buffer",),
    "ema": ("exp_avg", "grad_avg", "momentum_buffer"),
    "sum_of_squares": ("sum",),
    "e_g": ("square_avg",),
    "e_x": ("acc_delta",),
    "count": ("step",),
}
"""Slot of optax -> torch's names for it; the first that the torch optimizer has for the parameter is taken."""

COUNTER = "step"
"""Torch's counter of updates. It is no moment: an optimizer that keeps none is not another optimizer."""


@dataclasses.dataclass(frozen=True)
class TrainingRow:
    """One tensor after one step."""

    step: int
    """From 1; 0 is before the first update."""
    kind: str
    slot: str
    name: str
    shape: tuple[int, ...]
    error: float
    """Relative Frobenius error; infinite if the shape is wrong or a value is not a number."""
    allowance: float
    detail: str = ""
    """If beyond the allowance: the worst index, the value there and the reference's."""

    @property
    def beyond(self) -> bool:
        """Whether the error exceeds its allowance."""
        return not self.error <= self.allowance

    @property
    def text(self) -> str:
        """Step, kind, slot and tensor in words."""
        return f"step {self.step}, {text_of((self.kind, self.slot, self.name))}"


class Largest(NamedTuple):
    """The tensors of one kind after one step."""

    step: int
    kind: str
    tensors: int
    error: float
    """Largest relative error."""
    where: str
    """The tensor that has it."""
    beyond: int
    """Tensors beyond their allowance."""


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """A comparison of two trainings and its verdict."""

    title: str
    dtype: str
    rows: list[TrainingRow]
    """In order of steps, and within a step of kinds."""
    alone: dict[str, list[str]]
    """Side, jax or torch -> what it alone has."""
    partial: bool = False
    """Whether tensors on one side alone are let through."""
    diagnosis: str = ""
    """What the JAX side does instead, if it is known; one line."""
    notes: list[str] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def first_divergence(self) -> TrainingRow | None:
        """The first row beyond its allowance: by step, then loss, gradient, slot, update, parameter. Or None."""
        return next((row for row in self.rows if row.beyond), None)

    @property
    def exit_code(self) -> int:
        """0 if every tensor is within its allowance and, unless partial, on both sides; 1 otherwise."""
        unmatched = any(self.alone.values()) and not self.partial
        return 1 if self.first_divergence is not None or unmatched else 0

    def assert_equal(self) -> None:
        """Raise AssertionError with the verdict unless `exit_code` is 0."""
        if self.exit_code:
            raise AssertionError(self.verdict())

    def coverage(self) -> str:
        """How many losses, gradients, slots, updates and parameters were compared, of how many there are."""
        parts = []
        # A loss is one per step; a tensor is the same tensor after every step.
        for kind, plural in zip(KINDS, ("losses", "gradients", "slots", "updates", "parameters"), strict=True):
            mine = [row for row in self.rows if row.kind == kind and row.slot != COUNTER]
            compared = len({(row.step if kind == "loss" else row.slot, row.name) for row in mine})
            alone = [text for texts in self.alone.values() for text in texts if text.partition(" ")[0] == kind]
            if compared or alone:
                parts.append(f"{compared} of {compared + len(alone)} {plural}")
        return ", ".join(parts) + " compared"

    def verdict(self) -> str:
        """The first divergence with its diagnosis, or that there is none; the coverage; what has no partner."""
        row, lines = self.first_divergence, []
        if row is None:
            steps = max((row.step for row in self.rows), default=0)
            lines.append(f"no divergence over {steps} steps: every tensor is within what rounding explains")
        else:
            lines.append(f"first divergence: {row.text}, {self.dtype}")
            times = f" ({row.error / row.allowance:.2e} times)" if row.allowance else ""
            lines.append(f"  relative error {row.error:.3e}, allowance {row.allowance:.3e}{times}; {row.detail}")
        if self.diagnosis:
            lines.append(f"  {self.diagnosis}")
        lines.append(self.coverage())
        for side, texts in self.alone.items():
            if texts:
                lines.append(f"only in {side}{'' if self.partial else ', so not equal'}: {some(texts)}")
        return "\n".join(lines)

    def summary(self) -> list[Largest]:
        """A line per step and kind."""
        lines = []
        for step, kind in dict.fromkeys((row.step, row.kind) for row in self.rows):
            mine = [row for row in self.rows if (row.step, row.kind) == (step, kind)]
            worst = max(mine, key=lambda row: row.error)
            where = text_of((kind, worst.slot, worst.name))
            lines.append(Largest(step, kind, len(mine), worst.error, where, sum(row.beyond for row in mine)))
        return lines

    def table(self) -> str:
        """The summary as text."""
        lines = [f"{'step':>4} {'kind':9} {'tensors':>7} {'largest error':>13} {'beyond':>6}  where"]
        for one in self.summary():
            lines.append(f"{one.step:4d} {one.kind:9} {one.tensors:7d} {one.error:13.2e} {one.beyond:6d}  {one.where}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything above; an infinite number is the text "inf", so that the file is JSON to every reader."""

        def finite(value):
            return "inf" if isinstance(value, float) and not math.isfinite(value) else value

        def row_of(row: TrainingRow) -> dict[str, Any]:
            return {name: finite(value) for name, value in dataclasses.asdict(row).items()}

        values = {
            "title": self.title,
            "dtype": self.dtype,
            "equal": self.exit_code == 0,
            "first_divergence": None if self.first_divergence is None else row_of(self.first_divergence),
            "diagnosis": self.diagnosis,
            "coverage": self.coverage(),
            "alone": self.alone,
            "partial": self.partial,
            "notes": self.notes,
            "rows": [row_of(row) for row in self.rows],
        }
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    def picture(self):
        """Matplotlib Figure: the largest relative error of each kind against the step; crosses are beyond allowance.

        An error of exactly 0 is a mark at the foot, an infinite one at the top.
        """
        from matplotlib.figure import Figure  # takes a second to import; the verdict does not wait for it

        figure = Figure(figsize=(8, 4), layout="constrained", dpi=90)
        axes = figure.subplots()
        axes.set_title(f"{self.title}: largest relative error after each step, {self.dtype}", fontsize=10)
        at_edge = dict(transform=axes.get_xaxis_transform(), linestyle="", clip_on=False, markersize=5)
        edges = {"at the foot: exactly 0": (0.0, 0.0, "v"), "at the top: infinite": (math.inf, 1.0, "^")}
        labels, drawn = set(), False
        for kind in KINDS:
            lines = [one for one in self.summary() if one.kind == kind]
            if not lines:
                continue
            errors = [one.error if 0 < one.error < math.inf else math.nan for one in lines]
            (line,) = axes.plot([one.step for one in lines], errors, marker="o", markersize=4, label=kind)
            drawn = drawn or not all(map(math.isnan, errors))
            beyond = [(one.step, error) for one, error in zip(lines, errors, strict=True) if one.beyond]
            if beyond:
                label = None if "beyond" in labels else "x: beyond its allowance"
                labels.add("beyond")
                axes.plot(*zip(*beyond, strict=True), "x", color="red", label=label, markersize=9)
            for text, (value, height, marker) in edges.items():
                steps = [one.step for one in lines if one.error == value]
                if steps:
                    label = None if text in labels else text
                    labels.add(text)
                    style = dict(marker=marker, color=line.get_color(), label=label)
                    axes.plot(steps, [height] * len(steps), **style, **at_edge)
        if drawn:
            axes.set_yscale("log")
        else:
            axes.set_yticks([])
        axes.set(xlabel="step", ylabel="relative error", xticks=sorted({row.step for row in self.rows}))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
        return figure


def compare_training(
    step_a: Callable[[Any], Mapping[str, Any]],
    step_b: Callable[[Any], Mapping[str, Any]],
    batches: Iterable[Any],
    *,
    rules: Rules | Mapping | None = None,
    slots: Mapping[str, str | tuple[str, ...]] | None = None,
    dtype: str = "float64",
    title: str = "training in JAX against torch",
    partial: bool = False,
    seeds: Iterable[int] = SEEDS,
    allowance: Callable[[int, str], float] | None = None,
) -> TrainingReport:
    """Run both sides over the batches, one update each, and compare all that both leave.

    `step_a` is the JAX side and `step_b` torch's, the reference: callables batch -> named arrays, as `jax_training` and
    `torch_training` make them, or any other with the names of `steps.py`. `rules` name the JAX parameters in torch's
    terms; `slots` are added to `SLOTS`. The allowance of a tensor is 2 * SAFETY * kappa * u in float64, kappa measured
    over the `seeds` on the reference. Only a step with `fresh` can be run again: of another reference give
    `allowance(step, name)`. Steps made by the builders are not changed. Raises `CompareError`.
    """
    check_dtypes(dtype)
    require(
        dtype != "bfloat16", "dtype=bfloat16 must be float64 or float32, as an optimizer's state; pass one of them."
    )
    require(
        isinstance(batches, Iterable) and not isinstance(batches, Mapping | str),
        f"batches={type(batches).__name__} must be a list of batches, one per step; put the one batch into a list.",
    )
    batches = list(batches)
    require(bool(batches), "batches is empty and must hold one batch per step; give at least one.")
    for side, step in (("step_a", step_a), ("step_b", step_b)):
        require(callable(step), f"{side}={step!r} must be callable; pass a function of a batch, or jax_training(...).")
    swapped = isinstance(step_b, JaxTraining) and (isinstance(step_a, TorchTraining) or allowance is None)
    require(
        not swapped,
        "step_b is the JAX training and must be torch's, the reference; call compare_training(jax_training(...), "
        "torch_training(...), batches).",
    )
    restartable = hasattr(step_b, "fresh")
    require(
        restartable or allowance is not None,
        "step_b cannot be run again, so its rounding cannot be measured; pass torch_training(...), or allowance=a "
        "function (step, name) -> relative error.",
    )
    for side, step, wanted in (("step_a", step_a, dtype), ("step_b", step_b, "float64")):
        have = getattr(step, "dtype", wanted)
        require(
            have == wanted, f"{side} computes in {have} and must compute in {wanted}; build it with dtype={wanted!r}."
        )

    theirs, done = _record(step_b, batches, "step_b")
    ours, _ = _record(step_a, batches, "step_a")
    notes = list(dict.fromkeys(getattr(step_a, "notes", ())))
    given = rules if rules is not None else getattr(step_a, "rules", None)
    if given is not None or isinstance(step_a, JaxTraining):
        ours = _translated(ours, theirs, as_rules(given), step_b, notes)
    table = {**SLOTS, **{name: (one,) if isinstance(one, str) else tuple(one) for name, one in (slots or {}).items()}}
    ours = [_renamed_slots(mine, other, table) for mine, other in zip(ours, theirs, strict=True)]

    if allowance is None:
        limits = _measured(step_b, batches, theirs, dtype, seeds)
    else:
        limits = [{key: float(allowance(step, text_of(key))) for key in left} for step, left in enumerate(theirs)]
    rows, alone = _rows(ours, theirs, limits)
    require(
        any(row.step and (row.kind != "loss" or len(theirs[1]) == 1 or len(ours[1]) == 1) for row in rows),
        f"no tensor's name is common to both sides: JAX has {_tensors(ours[1])}, torch "
        f"{_tensors(theirs[1])}; pass rules=Rules(names=...), JAX's path to torch's.",
    )
    first = next((row for row in rows if row.beyond), None)
    found = "" if first is None else _diagnosis(first, ours, theirs, limits, done, dtype)
    return TrainingReport(title, dtype, rows, alone, partial, found, notes)


def _tensors(left: Left) -> str:
    """A few of the tensors that a step left."""
    return some(text_of(key) for key in left if key[0] != "loss") or "a loss alone"


def _record(step, batches: list, side: str, **options) -> tuple[list[Left], Callable]:
    """What the side left before the first step (its parameters, if it says them) and after each; and what ran."""
    step = step.fresh(**options) if hasattr(step, "fresh") else step
    start = step.start() if hasattr(step, "start") else {}
    record: list[Left] = [{("parameter", "", name): value for name, value in start.items()}]
    return record + [check_left(step(batch), side) for batch in batches], step


def _translated(ours: list[Left], theirs: list[Left], rules: Rules, step_b, notes: list[str]) -> list[Left]:
    """The JAX side's record under torch's names and in torch's layout; what has no partner keeps its name."""
    owners = step_b.owners() if hasattr(step_b, "owners") else {}
    aliases = step_b.aliases() if hasattr(step_b, "aliases") else {}
    first = ours[0] or {key: value for key, value in ours[1].items() if key[0] in ("gradient", "parameter")}
    mine = {name: value for (_, _, name), value in first.items()}
    started = {name: value for (kind, _, name), value in theirs[0].items() if kind == "parameter"}
    shapes = {name: value.shape for left in theirs for (kind, _, name), value in left.items() if kind in KINDS[3:]}
    shapes |= {name: value.shape for (kind, _, name), value in theirs[1].items() if kind == "gradient"}
    tensors = {name: TorchTensor(shape, owners.get(name, ""), True) for name, shape in shapes.items()}
    plan = make_plan(
        rules,
        {name: value.shape for name, value in mine.items()},
        (),
        tensors,
        aliases,
        values=(mine, started) if started.keys() >= tensors.keys() else None,
    )
    notes += plan.problems
    return [_translated_once(left, plan, shapes) for left in ours]


def _translated_once(left: Left, plan, shapes: Mapping[str, tuple[int, ...]]) -> Left:
    out: Left = {key: value for key, value in left.items() if key[0] == "loss"}
    families: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for (kind, slot, name), value in left.items():
        if kind != "loss":
            families.setdefault((kind, slot), {})[name] = value
    for (kind, slot), arrays in families.items():
        placed: set[str] = set()
        for link in plan.links:
            sources = {part.source for part in link.parts}
            if not sources <= arrays.keys():
                continue
            placed |= sources
            if slot == "count":  # one number for all
                out |= {(kind, slot, name): arrays[link.parts[0].source] for name in link.names}
            else:
                out |= {(kind, slot, name): value for name, value in link.to_torch(arrays, shapes).items()}
        out |= {(kind, slot, name): value for name, value in arrays.items() if name not in placed}
    return out


def _renamed_slots(ours: Left, theirs: Left, table: Mapping[str, tuple[str, ...]]) -> Left:
    """Slots under the torch names that the torch side has; counters that one side alone keeps are left out."""
    out: Left = {}
    for (kind, slot, name), value in ours.items():
        if kind == "slot" and (kind, slot, name) not in theirs:
            names = [one for one in table.get(slot, ()) if (kind, one, name) in theirs and (kind, one, name) not in out]
            if not names and COUNTER in table.get(slot, ()):
                continue
            slot = names[0] if names else slot
        out[kind, slot, name] = value
    return out


def _measured(step_b, batches: list, theirs: list[Left], dtype: str, seeds: Iterable[int]) -> list[dict[Key, float]]:
    """The allowance of everything that the reference leaves."""

    for step, (left, again) in enumerate(zip(theirs, _record(step_b, batches, "step_b")[0], strict=True)):
        for key, value in left.items():
            require(
                np.array_equal(value, again[key], equal_nan=True),
                f"two runs of the reference differ at step {step} in {text_of(key)} and must be one; switch off "
                "what is random: module.eval(), no dropout, no data augmentation in the loss.",
            )

    def compute() -> dict[tuple[int, Key], np.ndarray]:
        options = {"rounding": dtype} if isinstance(step_b, TorchTraining) else {}
        record, _ = _record(step_b, batches, "step_b", **options)
        return {(step, key): value for step, left in enumerate(record) for key, value in left.items()}

    _, kappas = amplification(compute, dtype, seeds=seeds)
    # An error that comes out as zero by luck is at least one rounding. A loss is one number, whose error scatters from
    # draw to draw: it is allowed what the losses before it were, for an error once made is carried on.
    floors = {key: 1.0 for _, key in kappas}
    for step, key in sorted(kappas):
        kappas[step, key] = max(floors[key], kappas[step, key])
        if key[0] == "loss":
            floors[key] = kappas[step, key]
    flat = allowances(kappas, dtype)
    limits: list[dict[Key, float]] = [{} for _ in theirs]
    for (step, key), value in flat.items():
        limits[step][key] = value
    _cancelled(theirs, limits)
    _free_signs(theirs, limits)
    return limits


def _cancelled(theirs: list[Left], limits: list[dict[Key, float]]) -> None:
    """Widen the allowances of gradients that cancel to nothing but rounding, and of what is made of them.

    Such a gradient, of a bias before a batch norm say, is one draw of its rounding and no measure of another. It sums
    terms of the size of the other gradients, so it may err by as much as any of those, in absolute terms.
    """
    widened: dict[str, float] = {}
    for left, limit in zip(theirs, limits, strict=True):
        absolute = {key[2]: limit[key] * float(np.linalg.norm(left[key])) for key in left if key[0] == "gradient"}
        for name, error in absolute.items():
            if error and limit["gradient", "", name] >= 1.0:
                widened[name] = max(widened.get(name, 1.0), max(absolute.values()) / error)
        for kind, slot, name in limit:
            if name in widened and slot != COUNTER:  # a second moment is a square
                limit[kind, slot, name] *= widened[name] ** (2 if kind == "slot" else 1)


def _free_signs(theirs: list[Left], limits: list[dict[Key, float]]) -> None:
    """Widen the allowances where Adam divides a moment that rounding may send through zero.

    A moment that `may_turn` moves its update by up to twice its size, and the parameter by as much.
    """
    moved: dict[str, float] = {}
    for left, limit in zip(theirs, limits, strict=True):
        for (kind, slot, name), moments in left.items():
            update, value = left.get(("update", "", name)), left.get(("parameter", "", name))
            if (kind, slot) != ("slot", "exp_avg") or update is None or value is None:
                continue
            extra = 2.0 * float(np.linalg.norm(update[may_turn(moments, limit[kind, slot, name])]))
            moved[name] = moved.get(name, 0.0) + extra
            for key, size in ((("update", "", name), extra), (("parameter", "", name), moved[name])):
                limit[key] += size / (float(np.linalg.norm(left[key])) or 1.0)


def _rows(
    ours: list[Left], theirs: list[Left], limits: list[dict[Key, float]]
) -> tuple[list[TrainingRow], dict[str, list[str]]]:
    """A row for everything on both sides, in order; and what one side alone has, in any step."""
    rows: list[TrainingRow] = []
    alone: dict[str, dict[str, None]] = {"jax": {}, "torch": {}}
    for step, (mine, other, limit) in enumerate(zip(ours, theirs, limits, strict=True)):
        if step == 0 and not (mine and other):  # one side does not say where it starts
            continue
        # The order of the reference within a kind.
        for key in sorted(other, key=lambda key: KINDS.index(key[0])):
            if key not in mine:
                if key[:2] != ("slot", COUNTER):
                    alone["torch"][text_of(key)] = None
                continue
            error, detail = error_and_worst(mine[key], other[key])
            detail = "" if error <= limit[key] else detail
            rows.append(TrainingRow(step, *key, np.shape(other[key]), error, limit[key], detail))
        alone["jax"] |= dict.fromkeys(text_of(key) for key in mine if key not in other)
    return rows, {side: list(texts) for side, texts in alone.items()}


def _diagnosis(
    first: TrainingRow, ours: list[Left], theirs: list[Left], limits: list[dict[Key, float]], done, dtype: str
) -> str:
    """What is known of the first divergence, in one line, or nothing; `done` is the reference after its last step."""
    if first.step == 0:
        return "the trainings start from other parameters; remedy: copy_weights(torch_module, jax_side) before them"
    if first.kind in ("loss", "gradient"):
        t = first.step
        return diagnose_gradients(first.kind, ours[t], theirs[t], ours[t - 1], limits[t])
    if not hasattr(done, "settings"):
        return ""
    return diagnose(
        Recipe(done.kind, tuple(done.settings), done.clip),
        _trajectory(ours),
        _trajectory(theirs),
        limits[1:],
        UNIT_ROUNDOFF[dtype],
    )


def _trajectory(record: list[Left]) -> Trajectory | None:
    """What an optimizer saw and did; None if the side does not say where it starts or what it did."""

    def of(kind: str, left: Left) -> dict[str, np.ndarray]:
        return {name: wide(value) for (mine, _, name), value in left.items() if mine == kind}

    steps = [
        Seen(
            of("gradient", left),
            of("parameter", before),
            of("update", left),
            {(slot, name): wide(value) for (kind, slot, name), value in left.items() if kind == "slot"},
            math.sqrt(sum(float((one * one).sum()) for one in of("gradient", left).values())),
        )
        for before, left in itertools.pairwise(record)
    ]
    whole = all(one.gradients.keys() & one.updates.keys() & one.before.keys() for one in steps)
    return Trajectory(tuple(steps)) if whole else None
