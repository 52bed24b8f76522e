"""The benchmark of saves: a small run from end to end, its figures, what it refuses, the table that is committed."""

import json
from pathlib import Path

import pytest

from benchmarks import saving
from benchmarks.saving import PARTS, SavingConfig, main, markdown, read_rows, summary
from recipe.config import UserError

RESULTS = sorted((Path(__file__).resolve().parents[1] / "benchmarks" / "results").glob("saving-*/*.jsonl"))


def test_a_small_run_leaves_a_row_a_table_and_no_state(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "states"))
    (tmp_path / "states").mkdir()
    overrides = json.dumps({"model": {"num_hidden_layers": 1, "vocab_size": 384}})
    flags = ["--framework", "torch", "--batch_size", "1", "--sequence_length", "8", "--overrides", overrides]
    out = str(tmp_path / "small")
    main([*flags, "--rounds", "2", "--out", out])
    (row,) = read_rows(out)
    seconds = row["seconds"]
    assert {*PARTS, *(f"{part}_cpu" for part in PARTS), "update", "held", "beside", "writing"} < seconds.keys()
    assert all(len(values) == 2 and min(values) >= 0 for values in seconds.values())
    for held, writing, beside, count in zip(
        *(seconds[name] for name in ("held", "writing", "beside", "beside_updates")), strict=True
    ):
        assert held < beside and writing < beside and count >= 1
    assert row["bytes"] > 4 * row["parameters"] and list((tmp_path / "states").glob("saving-*")) == []
    table = Path(f"{out}.md").read_text(encoding="utf-8")
    assert table == markdown([row]) and table in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"small.jsonl has tiny on torch already; choose another --out"):
        main([*flags, "--out", out])


def test_a_save_is_counted_in_updates_of_its_round():
    seconds = {name: [1.0, 1.0] for part in PARTS for name in (part, f"{part}_cpu")}
    seconds |= {"update": [2.0, 4.0], "update_cpu": [4.0, 8.0], "held": [0.5, 1.0], "held_cpu": [0.0, 0.0]}
    seconds |= {"beside": [6.5, 4.0], "beside_cpu": [10.0, 12.0], "beside_updates": [2, 1], "writing": [3.0, 3.0]}
    found = {name: (each["min"], each["max"]) for name, each in summary(seconds, 100)["ratios"].items()}
    assert found == {
        "held": (0.25, 0.25),
        "slowdown": (0.75, 1.5),
        "beside": (0.0, 1.25),
        "beside_cpu": (0.5, 0.5),
        "foreground": (0.25, 0.5),
    }
    assert summary(seconds, 100)["bytes_per_second"]["sha256_cpu"]["median"] == 100.0


@pytest.mark.parametrize("name", ["rounds", "batch_size", "sequence_length", "accumulation"])
def test_bad_values_are_refused(name):
    with pytest.raises(UserError, match=f"{name}=-1 must "):
        SavingConfig(**{name: -1})


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.parent.name)
def test_a_committed_table_is_what_its_rows_say(file):
    rows = saving.read_rows(str(file.with_suffix("")))
    assert rows and markdown(rows) == file.with_suffix(".md").read_text(encoding="utf-8")
