"""The one Markdown table and the one picture of bars that all benchmarks use, and the tables that are committed."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks import generation, gpu, input_pipeline, muon_training, report
from benchmarks.tables import Bar, bars, ranged, table
from harness.cli import parse

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
TRAINING = [file for file in RESULTS if file.stem.startswith("muon-training")]


def test_a_table_is_markdown():
    lines = table({"mode": "l", "ms": "r"}, [("jax", "1.5"), ("a|b", "–")])
    assert lines == ["| mode | ms |", "|---|--:|", "| jax | 1.5 |", "| a\\|b | – |"]
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        table({"mode": "l", "ms": "r"}, [("jax",)])


def test_a_spread_is_scaled_and_grouped():
    values = {"median": 1.5e9, "min": 1.25e9, "max": 2e9, "mad": 0.0}
    assert ranged(values, ",.1f", 1e-6) == "1,500.0 (1,250.0–2,000.0)"


def drawn(tmp_path, monkeypatch, **options):
    """The figure that `bars` saves."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    quick = [Bar("jax", 10.0, 8.0, 11.0, "ten", "#0072b2"), Bar("hf", 4.0, 3.0, 5.0, "four", "#7f7f7f")]
    groups = [("small", quick), ("large", [Bar("jax", 2.0, 1.0, 3.0, "two", "#0072b2")])]
    bars(groups, tmp_path / "o.png", quantity="tokens per second", heading="here", **options)
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    return figures[0]


def test_bars_have_names_lengths_whiskers_and_labels(tmp_path, monkeypatch):
    small, large = drawn(tmp_path, monkeypatch).axes
    assert [text.get_text() for text in small.get_yticklabels()] == ["jax", "hf"]
    assert [patch.get_width() for patch in small.patches] == [10.0, 4.0]
    assert [text.get_text().strip() for text in small.texts] == ["ten", "four"]
    ends = [segment[:, 0].tolist() for segment in small.collections[0].get_segments()]
    assert ends == [[8.0, 11.0]] and small.get_title("left") == "small" and large.get_title("left") == "large"
    assert small.get_ylim()[0] > small.get_ylim()[1], "the first bar is at the top"
    assert small.get_xlim()[1] > 11.0 > large.get_xlim()[1] > 3.0 and large.get_xlabel() == "tokens per second"


def test_bars_may_share_a_scale_or_have_a_logarithmic_one(tmp_path, monkeypatch):
    small, large = drawn(tmp_path, monkeypatch, one_scale=True).axes
    assert small.get_xlim() == large.get_xlim()
    small, large = drawn(tmp_path, monkeypatch, log=True).axes
    assert small.get_xscale() == large.get_xscale() == "log" and small.get_xlim()[0] < 3.0


@pytest.mark.parametrize("file", TRAINING, ids=lambda path: path.stem)
def test_a_committed_comparison_of_optimizers_is_what_its_rows_say(file, tmp_path, monkeypatch):
    """The command that made it finds every run in the file, trains nothing and writes the same table."""
    rows = tmp_path / file.name
    shutil.copyfile(file, rows)
    sessions = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if '"session"' in line]
    argv = shlex.split(sessions[-1]["command"])[3:]
    argv[argv.index("--out") + 1] = str(rows.with_suffix(""))
    options = parse(muon_training.TrainingConfig, argv, prog="benchmarks.muon_training", description="")
    monkeypatch.setattr(muon_training.Bench, "trial", lambda self, name: pytest.fail(f"{name} is not finished"))
    table = muon_training.markdown(muon_training.benchmark(options))
    assert table == file.with_suffix(".md").read_text(encoding="utf-8")
    assert rows.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("file", [file for file in RESULTS if file not in TRAINING], ids=lambda path: path.stem)
def test_a_committed_table_is_what_its_rows_say(file):
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    program = rows[0]["command"].split()[2].removeprefix("benchmarks.")
    by = {"throughput": report, "generation": generation, "input_pipeline": input_pipeline}[program]
    assert by.markdown(rows) == file.with_suffix(".md").read_text(encoding="utf-8")


def test_the_recipes_table_stands_beside_the_notebooks_numbers(tmp_path):
    gpu.report_recipes(tmp_path)
    lines = (tmp_path / "recipe.md").read_text(encoding="utf-8").splitlines()
    assert lines[2:4] == ["| run | validation loss | accuracy | perplexity | seconds |", "|---|--:|--:|--:|--:|"]
    assert lines[4].startswith("| the notebook, its own corpus and tokenizer | 1.1146 | 75.12% |")
