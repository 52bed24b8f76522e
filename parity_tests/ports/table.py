"""How often the comparison is wrong: every correct port must be clean, every planted bug named where it is.

`python -m parity_tests.ports [--only NAME ...] [--out FILE]` measures both rates and writes them as a table.
"""

import datetime
import importlib
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import jax

from parity_tests.compare.errors import CompareError
from parity_tests.compare.modules import compare_modules
from parity_tests.compare.precision import DTYPES, versions
from parity_tests.compare.report import Report
from parity_tests.compare.rules import Rules

from .port import Pair, Port

MODULES = ("torch_blocks", "vision", "linen_equinox", "language", "encoders")


class Outcome(NamedTuple):
    """What a comparison of one port said."""

    port: str
    bug: str
    """"" of the correct port."""
    right: bool
    """Clean if it is correct; else the first divergence is a tensor that the bug may show at first."""
    said: str
    """The first divergence, `clean`, or the error."""
    seconds: float
    share: float
    """Largest error over its allowance of the correct port, by whichever side."""
    coverage: str
    explained: bool
    """Whether float64 needed a float32 constant on one side as its reason."""


def ports() -> dict[str, Port]:
    """Every port by name; imports transformers and Equinox."""
    found = (importlib.import_module(f"parity_tests.ports.{name}").PORTS for name in MODULES)
    return {port.name: port for group in found for port in group}


def compare_pair(pair: Pair, **options) -> Report:
    """The comparison of a pair by its own rules and options."""
    rules = Rules(**(pair.rules or {}))
    return compare_modules(pair.jax_side, pair.torch_module, pair.inputs, rules, **pair.options, **options)


def judge(port: Port, bug: str = "", **options) -> Outcome:
    """Compare the port, or the port with a bug, and say whether the verdict is right."""
    began = time.monotonic()
    try:
        report = compare_pair(port.make(bug), **options)
    except CompareError as error:
        return Outcome(port.name, bug, False, f"CompareError: {error}", time.monotonic() - began, 0.0, "", False)
    divergence = report.first_divergence
    said = divergence.row.name if divergence else "clean" if report.exit_code == 0 else report.headline.lower()
    right = said in port.bugs[bug] if bug else said == "clean"
    shares = [row.share(side) for row in report.rows for side in row.errors]
    coverage = report.coverage.text() if report.coverage else ""
    return Outcome(port.name, bug, right, said, time.monotonic() - began, max(shares), coverage, bool(report.explained))


def _measure(task: tuple[str, str]) -> Outcome:
    name, bug = task
    port = ports()[name]
    try:
        return judge(port, bug, dtypes=("float64",), seeds=range(2)) if bug else judge(port, dtypes=DTYPES)
    finally:
        jax.clear_caches()  # the programs of hundreds of models


def measure(names: Iterable[str] = (), workers: int = 2) -> Iterator[Outcome]:
    """The outcome of every port in three dtypes and of every bug in float64, as they come, in other processes."""
    every = ports()
    chosen = [every[name] for name in names] if names else list(every.values())
    tasks = [(port.name, bug) for port in chosen for bug in ("", *port.bugs)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(_measure, tasks)


def table(outcomes: list[Outcome]) -> str:
    """Both rates and a line a port, in Markdown."""
    correct = [one for one in outcomes if not one.bug]
    bugs = [one for one in outcomes if one.bug]
    clean, named = sum(one.right for one in correct), sum(one.right for one in bugs)
    seen = sum(one.said != "clean" and not one.said.startswith("CompareError") for one in bugs)
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# Correct ports and planted bugs",
        "",
        f"`python -m parity_tests.ports`, {datetime.date.today().isoformat()}, on a CPU; {found}.",
        "",
        f"- {clean} of {len(correct)} correct ports are clean in {', '.join(DTYPES)}, every parameter compared.",
        f"- {seen} of {len(bugs)} planted bugs are a divergence; {named} are named at the faulty tensor or after it.",
        f"- {sum(one.explained for one in correct)} correct ports have a float32 constant on one side: it is said.",
        "",
        "| port | compared | largest error / allowance | bugs | named |",
        "|---|---|--:|--:|--:|",
    ]
    for one in correct:
        own = [bug for bug in bugs if bug.port == one.port]
        verdict = "" if one.right else f" **{one.said}**"
        counts = one.coverage.removesuffix(" compared")
        lines.append(
            f"| {one.port}{verdict} | {counts} | {one.share:.2f} | {len(own)} | {sum(bug.right for bug in own)} |"
        )
    missed = [one for one in bugs if not one.right]
    if missed:
        lines += ["", "Not named where they are:", "", "| port | bug | said | may be said |", "|---|---|---|---|"]
        every = ports()
        for one in missed:
            expected = ", ".join(every[one.port].bugs[one.bug])
            lines.append(f"| {one.port} | {one.bug} | {one.said} | {expected} |")
    return "\n".join(lines) + "\n"


def show(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Print a line per outcome as they come; returns them all."""
    found = []
    for one in outcomes:
        found.append(one)
        mark = "right" if one.right else "WRONG"
        print(
            f"{mark} {one.port} {one.bug or '(correct)'}: {one.said}, {one.seconds:.1f} s", file=sys.stderr, flush=True
        )
    return found
