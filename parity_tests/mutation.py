"""A pytest plugin that plants one bug: it edits a module's source while Python imports it, and no file changes.

`MUTANT=NAME python -m pytest -p parity_tests.mutation ...` runs tests against the mutant of that name.
"""

import importlib.abc
import importlib.machinery
import os
import sys

from parity_tests.mutant_catalogue import MUTANTS, Mutant


def mutate(source: str, mutant: Mutant) -> str:
    """The source with the mutant's edit; raises ValueError unless its text occurs exactly once."""
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(f"mutant {mutant.name}: its text occurs {count} times in {mutant.module}; mend the catalogue.")
    return source.replace(mutant.old, mutant.new)


class _MutatingLoader(importlib.machinery.SourceFileLoader):
    """Compiles the edited source, past any cached bytecode."""

    mutant: Mutant

    def get_code(self, fullname: str):
        path = self.get_filename(fullname)
        source = mutate(self.get_data(path).decode(), self.mutant)
        return self.source_to_code(source.encode(), path)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, fullname, path, target=None):
        if fullname != self.mutant.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        spec.loader = _MutatingLoader(fullname, spec.origin)
        spec.loader.mutant = self.mutant
        return spec


if "MUTANT" in os.environ:
    _mutant = {mutant.name: mutant for mutant in MUTANTS}[os.environ["MUTANT"]]
    if _mutant.module in sys.modules:
        raise RuntimeError(f"{_mutant.module} is imported already; load this plugin with -p.")
    sys.meta_path.insert(0, _Finder(_mutant))
