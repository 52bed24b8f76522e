"""What `make wheel` looks for, and that the commands of pyproject.toml are there; CI builds the wheel itself."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from harness.cli import COMMANDS
from tests import wheel

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = PROJECT["project"]["scripts"]
GOOD = dict.fromkeys([*wheel.NEEDED, "recipe/config.py", "x-0.2.0.dist-info/METADATA"], 100)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_command_is_a_function(name):
    module, _, function = SCRIPTS[name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_commands_that_lines_name_are_installed():
    assert set(COMMANDS.values()) == set(SCRIPTS) - {"compare-models"}


@pytest.mark.parametrize(
    ("change", "total", "line"),
    [
        ({}, 1000, ""),
        ({"benchmarks/driver.py": 1}, 1000, "benchmarks/driver.py belongs to no package of ours"),
        ({"parity_tests/test_model.py": 1}, 1000, "parity_tests/test_model.py is of the tests"),
        ({"parity_tests/mutant_gaps.py": 1}, 1000, "parity_tests/mutant_gaps.py is of the tests"),
        ({"recipe/results/a.json": 1}, 1000, "recipe/results/a.json is of the tests"),
        ({}, wheel.LARGEST + 1, "bytes are more than"),
    ],
)
def test_what_does_not_belong_into_a_wheel_is_found(change, total, line):
    found = wheel.faults(GOOD | change, total)
    assert [line in fault for fault in found] == [True] * bool(line)
    assert wheel.faults({name: 1 for name in GOOD if name != "recipe/py.typed"}, 1) == ["recipe/py.typed is missing"]


def test_the_readme_of_the_wheel_has_no_picture_and_no_link_that_leads_nowhere():
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.compile(r"\]\((?!https?:)")
    assert links.search(text)
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert not links.search(text) and "docs/parity.md" in text


@pytest.mark.parametrize("name", ["qwen-train-torch", "qwen-generate-jax", "qwen-plot"])
def test_a_command_says_its_own_name(name):
    module, _, function = SCRIPTS[name].partition(":")
    program = f"import sys; sys.argv[0] = '/venv/bin/{name}'; from {module} import {function}; {function}()"
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name}"), done.stderr
