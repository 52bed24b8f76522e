"""The catalogue of seeded bugs fits the source: every edit applies exactly once, compiles, and names existing tests."""

import collections
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.mutants import todays
from parity_tests.mutation import MUTANTS, mutate

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_edit_applies_and_compiles(mutant):
    for edit in mutant.edits:
        path = ROOT / (edit.module.replace(".", "/") + ".py")
        source = path.read_text(encoding="utf-8")
        mutated = mutate(source, edit)
        assert mutated != source
        compile(mutated, str(path), "exec")
    for test in mutant.caught_by.split():
        assert (ROOT / test.partition("::")[0]).is_file(), f"{test} does not exist"


def test_there_are_enough_of_every_kind_and_names_are_unique():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) >= 200
    kinds = collections.Counter(mutant.kind for mutant in MUTANTS)
    common = sum(kinds[kind] for kind in ("both halves", "shared facts", "defaults", "data"))
    assert common >= 25 and kinds["torch alone"] >= 15 and kinds["the judge"] >= 6
    assert min(kinds["durability"], kinds["cost"], kinds["precision"]) >= 10
    assert len(set(names)) == len(names)


def test_an_edit_that_does_not_apply_is_an_error():
    edit = MUTANTS[0].edits[0]._replace(old="no such text")
    source = Path(importlib.util.find_spec(edit.module).origin).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutate(source, edit)


def test_a_bug_is_planted_in_the_processes_that_a_test_starts():
    mutant = next(mutant for mutant in MUTANTS if mutant.module == "recipe.schedule")
    child = "import recipe.schedule; print(type(recipe.schedule.__loader__).__name__)"
    parent = "import subprocess, sys, parity_tests.mutation; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", parent, child]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MUTANT")}
    environment["PYTHONPATH"] = str(ROOT)
    for planted, loader in (({"MUTANT": mutant.name}, "_MutatingLoader"), ({}, "SourceFileLoader")):
        found = subprocess.run(command, env=environment | planted, capture_output=True, text=True, check=True)
        assert (found.stdout, found.stderr) == (loader + "\n", "")


def test_every_mutant_has_its_day():
    seen = [mutant.name for day in range(100, 100 + len(MUTANTS)) for mutant in todays(MUTANTS, 8, day)]
    counts = collections.Counter(seen)
    assert counts.keys() == {mutant.name for mutant in MUTANTS} and set(counts.values()) == {8}
    first, second = ({mutant.name for mutant in todays(MUTANTS, 8, day)} for day in (5, 6))
    assert len(first) == len(second) == 8 and not first & second
    assert todays(MUTANTS[:3], 8, 1) and len(todays(MUTANTS[:3], 8, 1)) == 3
