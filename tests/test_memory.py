"""The table of memory: what is compiled, what a cell says, and that the committed table is what its record says."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import memory
from harness.cli import run

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("memory-*.json"))


def test_a_preset_is_compiled_with_and_without_remat_and_as_many_rows_as_asked():
    options = memory.MemoryConfig(preset="tiny,seed+remat", batch_size="2,6")
    assert options.presets == ["tiny", "seed+remat"] and options.sizes == [2, 6]
    plain, again = options.resolve("tiny", 2), options.resolve("seed+remat", 6)
    assert (plain.preset, plain.batch_size, plain.precision.remat) == ("tiny", 2, False)
    assert (again.preset, again.batch_size, again.precision.remat) == ("seed", 6, True)
    assert again.precision.compute == "bfloat16" and again.accumulation == 4, "the preset's own recipe"


def test_what_does_not_fit_is_said_and_larger_ones_are_not_compiled(monkeypatch):
    asked = []

    def account(config, target):
        asked.append((config.preset, config.batch_size))
        size = 2**30 * config.batch_size * (10 if config.preset == "seed" else 1)
        return {"arguments": 2**29, "temporaries": size - 2**29, "total": size}

    monkeypatch.setattr(memory, "account", account)
    records = memory.measure(memory.MemoryConfig(preset="seed,tiny", batch_size="4,16,64"))
    assert asked == [("seed", 4), ("seed", 16), ("tiny", 4), ("tiny", 16), ("tiny", 64)]
    how = {"command": "c", "target": "h100", "memory": 79 * 2**30, "versions": {"jax": "1"}, "git_commit": "abc"}
    lines = memory.markdown(records, how).splitlines()
    assert "| preset | micro-batches x tokens a row | state | 4 rows | 16 rows | 64 rows |" in lines
    assert "| seed | 4 x 512 | 0.50 | 40.00 | 160.00 (too much) | – |" in lines
    assert "| tiny | 1 x 256 | 0.50 | 4.00 | 16.00 | 64.00 |" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "4,2"], "--batch_size 4,2 must be whole numbers of at least 1 that rise"),
        (["--batch_size", "0"], "--batch_size 0 must be"),
        (["--batch_size", "two"], "--batch_size two must be"),
        (["--preset", "tinny"], "--preset tinny is unknown; did you mean tiny"),
        (["--target", "host", "--out", "README"], "README.md exists"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    assert run(memory.main) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_table_is_committed():
    assert COMMITTED


@pytest.mark.parametrize("file", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_table_is_what_its_record_says(file):
    record = json.loads(file.read_text(encoding="utf-8"))
    assert memory.markdown(record["records"], record["how"]) == file.with_suffix(".md").read_text(encoding="utf-8")
    for found in record["records"]:
        assert found["total"] >= found["arguments"] + found["temporaries"]


def test_the_guide_shows_the_committed_table():
    shown = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    committed = (ROOT / "benchmarks" / "results" / "memory-h100.md").read_text(encoding="utf-8")
    assert all(line in shown for line in committed.splitlines() if line.startswith("| "))
