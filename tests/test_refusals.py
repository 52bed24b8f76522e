"""The plugin that watches refusals sees them, by the line of the call."""

import contextlib
import inspect

import pytest

from recipe.config import MuonConfig, UserError, require
from tests import refusals

HERE = "tests/test_refusals.py"


def test_a_refusal_is_noted_where_it_happens(monkeypatch):
    monkeypatch.setattr(refusals, "refused", set())
    line = inspect.currentframe().f_lineno
    with contextlib.suppress(UserError):
        require(
            False,
            "a call of several lines is known by its first",
        )
    with pytest.raises(UserError):
        raise UserError("directly")
    require(True, "a rule that holds is not noted")
    assert refusals.refused == {f"{HERE}:{line + 2}", f"{HERE}:{line + 7}"}


def test_the_products_own_sites_are_found_and_noted(monkeypatch):
    monkeypatch.setattr(refusals, "refused", set())
    sites = refusals.all_sites()
    assert len(sites) > 100 and not any(name.endswith(" require") for name in sites.values())
    with pytest.raises(UserError, match=r"muon\.beta"):
        MuonConfig(beta=2.0)
    (site,) = refusals.refused
    assert sites[site] == "recipe/config.py _require_fraction"


def test_sites_are_read_from_the_source():
    source = "def f(x):\n    require(\n        x,\n        'no')\n    raise config.UserError('no')\nrequire(1, '')\n"
    assert refusals.call_sites(source, "a.py") == {"a.py:2": "a.py f", "a.py:5": "a.py f", "a.py:6": "a.py the module"}


def test_every_excuse_names_a_place():
    assert set(refusals.EXCUSED) <= set(refusals.all_sites().values())
