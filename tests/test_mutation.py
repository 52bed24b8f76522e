"""The catalogue of seeded bugs fits the source: every edit applies exactly once, compiles, and names existing tests."""

import importlib.util
from pathlib import Path

import pytest

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


def test_there_are_at_least_forty_and_names_are_unique():
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) >= 40
    assert len(set(names)) == len(names)


def test_an_edit_that_does_not_apply_is_an_error():
    edit = MUTANTS[0].edits[0]._replace(old="no such text")
    source = Path(importlib.util.find_spec(edit.module).origin).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutate(source, edit)
