"""The collectives of a compiled update on a mesh: which axes they join, what they are for, how much leaves a device.

`formula` is what `jax_impl.traffic` says on paper of the same update.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.plan.parts import Cost
from benchmarks.plan.program import Launch
from benchmarks.tables import table
from recipe.mesh import MeshShape

NUMBERS = "loss and norm"
RULES = {
    "muon": r"sharded\.",
    "gradients": r"exchange\.(reduced|_gathered_backward)",
    "weights": r"exchange\.(in_use|_all_gather|_gathered|AtRest)",
    NUMBERS: r"exchange\.norm|\w*loss\w*\.",
    "activations": r"exchange\.(total|spread|whole_product|_total|_spread)",
}
"""What a collective is for -> what `file.function` of a frame begins with. The innermost frame is asked first."""
UNKNOWN = "merged"
"""Collectives that XLA has made of several, and of which it has lost the lines."""
FEW = 16
"""Bytes; no more are in the loss and the norm, which XLA merges."""


def purpose(launch: Launch) -> str:
    """What a collective is for."""
    for frame in launch.frames:
        for name, rule in RULES.items():
            if re.match(rule, str(frame)):
                # By layer a gradient is scattered where its weight was gathered, and XLA knows that line alone.
                return "gradients" if launch.collective == "reduce-scatter" else name
    return NUMBERS if launch.payload <= FEW else UNKNOWN


def axes_of(shape: MeshShape, groups: tuple[tuple[int, ...], ...]) -> str:
    """The mesh axes along which groups join devices, such as data+fsdp; nothing known is a question mark."""
    wanted = {tuple(sorted(group)) for group in groups}
    names = [name for name, size in shape._asdict().items() if size > 1]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            if wanted == set(_groups(shape, chosen)):
                return "+".join(chosen)
    return "?"


def _groups(shape: MeshShape, chosen: tuple[str, ...]) -> Iterable[tuple[int, ...]]:
    """The devices that differ in these axes alone, group by group; they are numbered along the mesh."""
    groups = collections.defaultdict(list)
    for number, place in enumerate(itertools.product(*map(range, shape))):
        fixed = tuple(at for name, at in zip(shape._fields, place, strict=True) if name not in chosen)
        groups[fixed].append(number)
    return map(tuple, groups.values())


def travels(costs: Iterable[Cost], shape: MeshShape) -> list[dict[str, Any]]:
    """Every collective by purpose, kind and axes: how often, bytes sent, seconds, how many overlap with other work."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cost in costs:
        launch = cost.launch
        if not launch.collective:
            continue
        key = (purpose(launch), launch.collective, axes_of(shape, launch.groups))
        one = found.setdefault(key, {"launches": 0, "sent": 0, "seconds": 0.0, "overlap": 0, "in_loops": 0})
        one["launches"] += launch.times
        one["sent"] += launch.times * launch.sent
        one["seconds"] += launch.times * cost.seconds
        one["overlap"] += launch.times * bool(launch.overlaps)
        one["in_loops"] += launch.times if launch.loops else 0
    return [dict(zip(("part", "kind", "axes"), key, strict=True), **found[key]) for key in sorted(found)]


def formula(config, tokens_at_once: int | None) -> list[dict[str, Any]]:
    """The same on paper; empty without a mesh."""
    from jax_impl import traffic

    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in traffic.sent(config, tokens_at_once=tokens_at_once):
        key = (NUMBERS if one.part in ("loss", "norm") else one.part, one.kind, "+".join(one.axes))
        row = found.setdefault(key, {"arrays": 0, "sent": 0})
        row["arrays"] += one.times
        row["sent"] += one.times * one.bytes
    return [dict(zip(("part", "kind", "axes"), key, strict=True), **found[key]) for key in sorted(found)]


def markdown(found: list[Mapping[str, Any]], expected: list[Mapping[str, Any]]) -> list[str]:
    """Compiled beside paper, by kind and axes, and by part. XLA merges what it can: numbers differ, bytes do not."""

    def sums(rows: Iterable[Mapping[str, Any]], keys: tuple[str, ...]) -> dict[tuple, dict[str, float]]:
        total: dict[tuple, dict[str, float]] = {}
        for row in rows:
            one = total.setdefault(tuple(row[key] for key in keys), collections.defaultdict(float))
            for name, value in row.items():
                if not isinstance(value, str):
                    one[name] += value
        return total

    lines = []
    for keys in (("kind", "axes"), ("part",)):
        compiled, paper = sums(found, keys), sums(expected, keys)
        rows = []
        for key in sorted(compiled.keys() | paper.keys()):
            one, on_paper = compiled.get(key, {}), paper.get(key, {})
            ratio = one.get("sent", 0) / on_paper["sent"] if on_paper.get("sent") else math.nan
            rows.append(
                [
                    " over ".join(key),
                    f"{one.get('launches', 0):,.0f}",
                    f"{one.get('in_loops', 0):,.0f}",
                    f"{one.get('overlap', 0):,.0f}",
                    f"{one.get('sent', 0) / 1e6:,.2f}",
                    f"{on_paper.get('arrays', 0):,.0f}" if on_paper else "–",
                    f"{on_paper.get('sent', 0) / 1e6:,.2f}" if on_paper else "–",
                    "–" if math.isnan(ratio) else f"{ratio:.4f}",
                    f"{1e3 * one.get('seconds', 0):,.2f}",
                ]
            )
        columns = {"collectives" if len(keys) == 2 else "for": "l", "run": "r", "in loops": "r", "overlap": "r"}
        columns |= {"MB sent": "r", "arrays by formula": "r", "MB by formula": "r", "ratio": "r", "ms on links": "r"}
        lines += [*table(columns, rows), ""]
    return lines
