"""The scripts of docs/examples: each runs as a stranger would run it, explains its leaves, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "docs/examples").glob("muon_*.py"))
GUIDE = (ROOT / "docs/muon.md").read_text(encoding="utf-8")


def test_there_is_one_for_each_library():
    assert {file.stem for file in EXAMPLES} == {"muon_linen", "muon_nnx", "muon_equinox"}


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=pytest.mark.slow, id=file.stem) for file in EXAMPLES],
)
def test_an_example_runs_and_learns(file):
    command, environment = [sys.executable, "-W", "error", str(file)], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    takers = {line.split()[0]: ("muon" if " muon " in line else "other") for line in lines if "(" in line}
    assert "muon" in takers.values() and all(takers[path] == "other" for path in takers if "head" in path)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 3


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_guide_quotes_the_example(file):
    """Every line of the guide's block for this library stands in the script that was run."""
    name = file.name
    (block,) = re.findall(rf"\[{name}\][^`]*```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    missing = [line for line in block.splitlines() if line.strip() not in file.read_text(encoding="utf-8")]
    assert not missing and len(block.splitlines()) <= 10
