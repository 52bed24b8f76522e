"""A pytest plugin that plants one bug: it edits a module's source while Python imports it, and no file changes.

`MUTANT=NAME python -m pytest -p parity_tests.mutation ...` runs tests against the mutant of that name, in the processes
that they start as well.
"""

import atexit
import importlib.abc
import importlib.machinery
import os
import sys
import tempfile
from pathlib import Path

from parity_tests import mutant_catalogue, mutant_gaps, mutant_meshes
from parity_tests.mutant import Edit

MUTANTS = (*mutant_catalogue.MUTANTS, *mutant_gaps.MUTANTS, *mutant_meshes.MUTANTS)


def mutate(source: str, edit: Edit) -> str:
    """The source with the edit made; raises ValueError unless its text occurs exactly once."""
    count = source.count(edit.old)
    if count != 1:
        raise ValueError(f"{edit.old!r} occurs {count} times in {edit.module}; mend the catalogue.")
    return source.replace(edit.old, edit.new)


class _MutatingLoader(importlib.machinery.SourceFileLoader):
    """Compiles the edited source, past any cached bytecode."""

    edit: Edit

    def get_code(self, fullname: str):
        path = self.get_filename(fullname)
        source = mutate(self.get_data(path).decode(), self.edit)
        return self.source_to_code(source.encode(), path)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, edits: tuple[Edit, ...]) -> None:
        self.edits = {edit.module: edit for edit in edits}

    def find_spec(self, fullname, path, target=None):
        if fullname not in self.edits:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        spec.loader = _MutatingLoader(fullname, spec.origin)
        spec.loader.edit = self.edits[fullname]
        return spec


def _plant_in_children() -> None:
    """Have every Python that this process starts import this module first, whatever it runs."""
    if "MUTANT_PLANTED" in os.environ:  # by a process above
        return
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    (Path(folder.name) / "sitecustomize.py").write_text("import parity_tests.mutation\n", encoding="utf-8")
    paths = [folder.name, str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "MUTANT_PLANTED": "1"}


if "MUTANT" in os.environ:
    _mutant = {mutant.name: mutant for mutant in MUTANTS}[os.environ["MUTANT"]]
    if _loaded := [edit.module for edit in _mutant.edits if edit.module in sys.modules]:
        raise RuntimeError(f"{_loaded[0]} is imported already; load this plugin with -p.")
    sys.meta_path.insert(0, _Finder(_mutant.edits))
    _plant_in_children()
