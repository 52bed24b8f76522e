"""`python -m parity_tests.mutants`: plant every bug of the catalogue, one process each, and print who caught it.

A mutant is caught if a test named beside it fails; exit code 1 if one survives. The table goes to docs/mutants.md.
"""

import concurrent.futures
import dataclasses
import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from harness.cli import end, parse
from harness.surroundings import git_commit
from parity_tests.mutant import Mutant
from parity_tests.mutant_catalogue import EQUIVALENT
from parity_tests.mutation import MUTANTS
from recipe.config import require

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class MutantsCommand:
    """Plant seeded bugs and see which test catches each."""

    only: str = ""
    """Only mutants whose name contains this."""
    sample: int = 0
    """Only so many of them, others every day; 0 plants all."""
    workers: int = 2
    """Processes at once."""
    out: str = "docs/mutants.md"
    """Markdown file for the table; written only when every mutant was run."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the tests said under one mutant."""

    mutant: Mutant
    killer: str
    """Node id of the first failing test; empty if none failed."""
    message: str
    """The failing assertion's line."""
    seconds: float


def examine(mutant: Mutant) -> Outcome:
    """Run the mutant's tests in a process of its own until one fails."""
    command = [sys.executable, "-m", "pytest", "-p", "parity_tests.mutation", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--no-header", "--tb=line", "-rf", *mutant.caught_by.split()]
    environment = os.environ | {"MUTANT": mutant.name, "COLUMNS": "400"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    # 0 all passed, 1 some failed; anything else (no such test, broken catalogue) proves nothing.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mutant {mutant.name}: pytest ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    failed = re.search(r"^FAILED (.+?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    errors = re.search(r"^ERROR (.+?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed is None:
        detail = errors.group(0) if errors else done.stdout
        raise RuntimeError(f"mutant {mutant.name}: an error instead of a failing test: {detail}")
    return Outcome(mutant, failed.group(1) if failed else "", (failed.group(2) or "") if failed else "", seconds)


def todays(mutants: Sequence[Mutant], count: int, day: int) -> list[Mutant]:
    """`count` of the mutants, spread over the catalogue and so over its kinds; on the next day the next of each."""
    count = min(count, len(mutants))
    return [mutants[(day + index * (len(mutants) // count)) % len(mutants)] for index in range(count)]


def table(outcomes: list[Outcome]) -> str:
    """The kill table and the list of equivalents in Markdown."""
    caught = sum(bool(outcome.killer) for outcome in outcomes)
    lines = [
        "# Seeded bugs",
        "",
        "Written by `make mutants` (`python -m parity_tests.mutants`). Each row is one edit of the source, planted",
        "while Python imports the module, and the first test that failed under it. The edits are in",
        "`parity_tests/mutant_catalogue.py`, `parity_tests/mutant_gaps.py` and `parity_tests/mutant_meshes.py`.",
        "",
        f"{caught} of {len(outcomes)} caught. Of commit {git_commit()}.",
        "",
        "| kind | seeded bug | in | caught by | what the test said |",
        "|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        said = outcome.message.replace("|", "\\|")[:160]
        killer = f"`{outcome.killer}`" if outcome.killer else "**survived**"
        where = ", ".join(f"`{edit.module}`" for edit in outcome.mutant.edits)
        lines.append(f"| {outcome.mutant.kind} | {outcome.mutant.name} | {where} | {killer} | {said} |")
    lines += ["", "## Equivalent mutants", "", "No test of these values can see them, for a reason:", ""]
    lines += ["| edit | text | reason |", "|---|---|---|"]
    lines += [f"| {mutant.name} | `{mutant.edit}` | {mutant.reason} |" for mutant in EQUIVALENT]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the catalogue; returns the exit code."""
    command = parse(
        MutantsCommand,
        sys.argv[1:],
        default=MutantsCommand(),
        prog="python -m parity_tests.mutants",
        description="Plant seeded bugs and see which test catches each.",
    )
    mutants = [mutant for mutant in MUTANTS if command.only in mutant.name]
    require(bool(mutants), f"--only {command.only!r} matches no mutant; leave it out to run all {len(MUTANTS)}.")
    require(command.sample >= 0, f"--sample {command.sample} must be at least 0; choose e.g. 8, or 0 for all.")
    if command.sample:
        mutants = todays(mutants, command.sample, datetime.date.today().toordinal())
    require(command.workers > 0, f"--workers {command.workers} must be at least 1; choose e.g. 2.")
    outcomes = []
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(command.workers) as pool:
        progress = tqdm(pool.map(examine, mutants), total=len(mutants), unit="mutant", disable=None)
        for outcome in progress:
            outcomes.append(outcome)
            verdict = outcome.killer or "SURVIVED"
            progress.write(f"{outcome.seconds:5.1f} s  {outcome.mutant.name}: {verdict}")
    survivors = [outcome.mutant.name for outcome in outcomes if not outcome.killer]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} caught in {time.perf_counter() - start:.0f} s")
    if len(mutants) == len(MUTANTS):
        Path(ROOT / command.out).write_text(table(outcomes), encoding="utf-8")
        print(command.out)
    if survivors:
        print("survived: " + "; ".join(survivors), file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    end(main)
