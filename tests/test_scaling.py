"""Scaling over host devices and rooflines: what is measured where, what a table says of it, sums done by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import job, roofline, scaling
from benchmarks.plan import targets
from harness.cli import run
from recipe.mesh import MeshShape
from recipe.params import param_counts, param_specs

ROOT = Path(__file__).resolve().parents[1]


def test_every_point_is_measured_once_and_stands_in_its_series():
    points = scaling.ScalingConfig(devices=(1, 2, 4), rows=3).points()
    assert points == {(1, 3): ("weak",), (1, 12): ("strong",), (2, 6): ("weak",), (2, 12): ("strong",),
                      (4, 12): ("weak", "strong")}  # fmt: skip
    along = scaling.ScalingConfig(axis="tensor", devices=(1, 2), rows=3)
    assert along.points() == {(1, 3): ("strong",), (2, 3): ("strong",)}, "every device has all rows"
    assert along.run(2, 3).mesh == "tensor=2" and along.run(2, 3).batch_size == 3


RECORDS = [
    {"devices": 1, "rows": 2, "series": ["weak"], "wall": [1.0, 1.0], "cpu": [1.0, 2.0], "collectives": 0, "sent": 0,
     "formula": 0, "arguments": 2**20, "temporaries": 2**21},
    {"devices": 2, "rows": 4, "series": ["weak", "strong"], "wall": [1.5, 2.5], "cpu": [3.0, 6.0], "collectives": 7,
     "sent": 5e6, "formula": 5e6, "arguments": 2**19, "temporaries": 2**21},
    {"devices": 1, "rows": 4, "series": ["strong"], "wall": [2.0, 2.0], "cpu": [2.0, 2.0], "collectives": 0, "sent": 0,
     "formula": 0, "arguments": 2**20, "temporaries": 2**22},
]  # fmt: skip


def test_a_row_costs_as_much_more_as_its_rounds_say():
    grown = scaling.efficiency(RECORDS, "weak")
    assert (grown[1]["median"], grown[2]["min"], grown[2]["max"]) == (1.0, 1.5, 1.5), "3 / 4 over 1 / 2, 6 / 4 over 1"
    how = {"command": "python", "machine": "a machine", "versions": {"jax": "1"}, "git_commit": "abc"}
    text = scaling.markdown(scaling.ScalingConfig(rounds=2), RECORDS, how)
    assert (
        "| 2 | 4 | 2.00 (1.50–2.50) | 4.50 (3.00–6.00) | 1.50 (1.50–1.50) x | 7 | 5.000 | 5.000 | 0.5 | 2.0 |" in text
    )
    assert "## Weak" in text and "## Strong" in text
    assert "## Strong" not in scaling.markdown(scaling.ScalingConfig(rounds=2), RECORDS[:1], how)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (scaling, ["--axis", "rows"], "--axis rows is no axis of a mesh"),
        (scaling, ["--devices", "2", "4"], "--devices 2 4 must rise from 1"),
        (scaling, ["--devices", "1", "16"], "--devices 1 16 must rise from 1 to at most 8"),
        (scaling, ["--rounds", "0"], "--rounds 0 must be at least 1"),
        (scaling, ["--out", "README"], "README.md exists"),
        (scaling, ["--sequence_length", "4096"], "exceeds model.max_position_embeddings"),
        (roofline, ["--target", "host"], "--target host has no rates"),
        (roofline, ["--rows", "0"], "--rows 0 must be at least 1"),
        (roofline, ["--mesh", ""], "--mesh '' names no mesh"),
        (roofline, ["--out", "README"], "README.md exists"),
    ],
)
def test_a_mistake_is_one_line(program, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments])
    assert run(program.main) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_worker_that_has_ended_is_said():
    ended = [sys.executable, "-c", ""]
    with subprocess.Popen(ended, stdout=subprocess.PIPE) as process, pytest.raises(RuntimeError, match="exit code 0"):
        scaling.hear(process)


def test_what_is_held_is_what_the_parameters_weigh():
    """Without a mesh's division all of it; by fsdp a part of each matrix and table, norms whole."""
    (alone, _) = roofline.RooflineConfig(preset="tiny", mesh=("data=2",)).runs()
    counts, specs = param_counts(alone.model), param_specs(alone.model)
    assert roofline.held(alone)["state"] == 4 * (2 * counts.muon + 3 * (counts.total - counts.muon))
    by_update, by_layer = roofline.RooflineConfig(preset="tiny", mesh=("fsdp=4",)).runs()
    vectors = sum(spec.shape[0] for spec in specs.values() if len(spec.shape) == 1)
    state = 4 * (2 * counts.muon + 3 * (counts.total - counts.muon - vectors)) / 4 + 12 * vectors
    assert roofline.held(by_update)["state"] == roofline.held(by_layer)["state"] == state
    matrices = counts.total - vectors
    assert roofline.held(by_update)["beside"] == 8 * matrices + 4 * vectors, "one micro-batch, float32"
    assert roofline.held(by_layer)["beside"] == 8 * matrices / 4 + 4 * vectors


def test_a_group_is_numbered_along_the_mesh():
    shape = MeshShape(2, 2, 2)
    assert roofline.group(shape, ("tensor",)) == [0, 1] and roofline.group(shape, ("data", "fsdp")) == [0, 2, 4, 6]


def test_an_update_is_bounded_by_its_products_and_its_links():
    (config, by_layer) = roofline.RooflineConfig(preset="qwen3-0.6b", mesh=("fsdp=8",)).runs()
    one, other = (roofline.predict(run, targets.H100) for run in (config, by_layer))
    rates, flops = targets.H100.rates, job.flops_per_update(config)
    assert one["compute"] == flops / 8 / rates.products and one["muon_sent"] == other["muon_sent"]
    assert other["sent"] > one["sent"] > one["muon_sent"] > 0
    assert one["mfu"][1] == flops / 8 / rates.peak / one["compute"] and one["mfu"][0] < one["mfu"][1]
    text = roofline.markdown([one, other | {"beside": 2.0**40}], targets.H100)
    assert "1,024.00: too much" in text and text.count("too much") == 1


def test_pictures_are_drawn(tmp_path):
    found = [roofline.predict(run, targets.H100) for run in roofline.RooflineConfig(preset="tiny").runs()]
    roofline.draw(found, targets.H100, tmp_path / "a.png")
    scaling.draw(scaling.ScalingConfig(devices=(1, 2)), RECORDS, tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_measures_and_what_is_sent_is_the_formulas(tmp_path):
    small = json.dumps({"model": {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 128}})
    shape = ["--devices", "1", "2", "--rows", "1", "--sequence_length", "16", "--rounds", "2"]
    command = [sys.executable, "-m", "benchmarks.scaling", *shape, "--overrides", small, "--out", str(tmp_path / "x")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    points = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["points"]
    assert [len(point["wall"]) for point in points] == [2, 2, 2]
    assert all(point["sent"] == point["formula"] and (point["sent"] > 0) == (point["devices"] > 1) for point in points)
    same = [point["loss"] for point in points if point["rows"] == 2]
    allowed = job.first_update_allowances(scaling.ScalingConfig(sequence_length=16, overrides=small).run(2, 2))["loss"]
    assert len(same) == 2 and abs(same[0] - same[1]) <= allowed, "one update, whoever computes it"
    assert (tmp_path / "x.md").exists() and (tmp_path / "x.png").exists()
