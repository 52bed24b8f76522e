"""The picture of a run: drawn whatever its numbers are, written whole or not at all, and known to be whole."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from harness.finished import finished
from harness.plot import LARGEST_DRAWN, plot_runs
from recipe.config import UserError
from recipe.presets import get_preset
from tests.test_every_moment import REAPER
from tests.test_loop import Killed
from tests.test_runlog import write_run

CONFIG = dataclasses.replace(get_preset("tiny"), sample_tokens=5, prompts=("ROMEO:",))


def write_log(run: Path, values: list, baselines: dict | None = None) -> None:
    """A run whose losses and perplexities are these."""
    run.mkdir()
    (run / "run.json").write_text('{"framework": "jax"}', encoding="utf-8")
    records = [{"kind": "baselines", "step": 0} | (baselines or {})]
    for step, value in enumerate(values, start=1):
        records.append({"kind": "train", "step": step, "loss": value})
        records.append({"kind": "validation", "step": step, "loss": value, "accuracy": 0.5, "perplexity": value})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


VALUES = {
    "none is finite": [None, None, None],
    "one": [3.0],
    "one, not finite": [None],
    "one beyond float32": [1e300],
    "beyond float32": [1e300, 1.0],
    "float64's whole range": [1.7e308, -1.7e308],
    "beyond float64": [10**400, 1],
    "infinite": [float("inf"), 1.0],
    "as large as is drawn": [LARGEST_DRAWN, 1.0, -LARGEST_DRAWN],
    "from the smallest to the largest": [5e-324, 1e-300, LARGEST_DRAWN],
    "every power": [10.0**power for power in range(-30, 38)],
    "all equal": [2.0] * 5,
    "nearly equal": [1.0, 1.0000000000000002],
    "all zero": [0.0, 0.0],
    "some zero": [0.0, 1.0],
    "negative": [-1.0, -2.0],
}


@pytest.mark.parametrize("case", VALUES)
def test_whatever_its_numbers_are_a_run_is_drawn_without_a_warning(case, tmp_path, capsys):
    write_log(tmp_path / "run", VALUES[case], {"uniform": 9.0, "$a^": VALUES[case][0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_runs([tmp_path / "run"], tmp_path / "loss.png")
    assert capsys.readouterr() == ("", "")
    assert finished(tmp_path, dataclasses.replace(CONFIG, sample_tokens=0))


def figure_of(run: Path, monkeypatch) -> Figure:
    """The figure that `plot_runs` saves of this run."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    plot_runs([run], run / "loss.png")
    return figures[0]


ACCURACY_LABELS = {
    0.15: ["0%", "2.5%", "5%", "7.5%", "10%", "12.5%", "15%"],
    0.25: ["0%", "5%", "10%", "15%", "20%", "25%"],
    0.9: ["0%", "20%", "40%", "60%", "80%"],
    0.015: ["0%", "0.25%", "0.5%", "0.75%", "1%", "1.25%", "1.5%"],
}


@pytest.mark.parametrize("best", ACCURACY_LABELS)
def test_the_accuracy_axis_reads_as_percent_with_the_digits_of_its_steps(best, tmp_path, monkeypatch):
    run = tmp_path / "run"
    write_log(run, [3.0, 2.0])
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    for accuracy in (0.0, best):
        text = text.replace('"accuracy": 0.5', f'"accuracy": {accuracy}', 1)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    loss, accuracy, _ = figure_of(run, monkeypatch).axes
    assert accuracy.get_title() == "Validation accuracy"
    low, high = accuracy.get_ylim()
    ticks = zip(accuracy.get_yticks(), accuracy.get_yticklabels(), strict=True)
    assert [label.get_text() for tick, label in ticks if low <= tick <= high] == ACCURACY_LABELS[best]
    assert [line.get_text() for line in loss.get_legend().get_texts()] == ["run (jax): train", "run (jax): validation"]


@pytest.mark.parametrize("step", [-1, 2**31, 10**400])
def test_a_step_that_no_run_has_is_told(step, tmp_path):
    write_log(tmp_path / "run", [1.0])
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "train", "step": step, "loss": 1.0}) + "\n")
    with pytest.raises(UserError, match=r"a train record has step=.*mend metrics\.jsonl"):
        plot_runs([tmp_path / "run"], tmp_path / "loss.png")


def test_a_run_without_a_training_record_is_not_drawn(tmp_path):
    write_log(tmp_path / "run", [])
    with pytest.raises(UserError, match="has no training record yet"):
        plot_runs([tmp_path / "run"], tmp_path / "loss.png")


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("PNG", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_the_suffix_chooses_the_format(suffix, begins, tmp_path):
    write_log(tmp_path / "run", [3.0, 2.0])
    plot_runs([tmp_path / "run"], tmp_path / f"p.{suffix}")
    assert (tmp_path / f"p.{suffix}").read_bytes().startswith(begins)


def test_drawing_that_ends_early_leaves_the_old_picture(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    picture = tmp_path / "pictures" / "loss.png"
    picture.parent.mkdir()
    picture.write_bytes(b"the old one")

    def save(figure, file, **options) -> None:
        file.write(b"half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Figure, "savefig", save)
        plot_runs([tmp_path / "run"], picture)
    assert [path.read_bytes() for path in picture.parent.iterdir()] == [b"the old one"]
    moment, done = 0, False
    while not done:
        picture.write_bytes(b"the old one")
        REAPER.watch(picture.parent, moment)
        try:
            plot_runs([tmp_path / "run"], picture)
            done = True
        except Killed:
            assert picture.read_bytes() == b"the old one"
        finally:
            REAPER.watch(None)
        moment += 1
    assert moment > 2 and picture.read_bytes().startswith(b"\x89PNG")
    assert list(picture.parent.iterdir()) == [picture]


@pytest.fixture(scope="module")
def whole_picture(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("drawn")
    write_log(folder / "run", [3.0, 2.0])
    plot_runs([folder / "run"], folder / "loss.png")
    return (folder / "loss.png").read_bytes()


@pytest.fixture
def done(tmp_path, whole_picture) -> Path:
    """A folder with all that a finished run leaves last."""
    (tmp_path / "loss.png").write_bytes(whole_picture)
    (tmp_path / "samples.txt").write_text("ROMEO: what\n", encoding="utf-8")
    assert finished(tmp_path, CONFIG)
    return tmp_path


@pytest.mark.parametrize("name", ["loss.png", "samples.txt"])
@pytest.mark.parametrize("how", ["missing", "empty", "zeroed", "a folder"])
def test_a_run_without_its_picture_or_its_samples_is_not_finished(name, how, done):
    file = done / name
    size = file.stat().st_size
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes(bytes(size if how == "zeroed" else 0))
    assert not finished(done, CONFIG)
    unasked = [dataclasses.replace(CONFIG, sample_tokens=0), dataclasses.replace(CONFIG, prompts=())]
    assert [finished(done, config) for config in unasked] == [name == "samples.txt"] * 2


def test_a_picture_cut_short_anywhere_is_not_whole(done, whole_picture):
    for length in [*range(0, len(whole_picture), 997), *range(len(whole_picture) - 20, len(whole_picture))]:
        (done / "loss.png").write_bytes(whole_picture[:length])
        assert not finished(done, CONFIG), length
    (done / "loss.png").write_bytes(whole_picture + b"\0")
    assert not finished(done, CONFIG)


def test_a_flipped_bit_anywhere_in_a_picture_is_found(done, whole_picture):
    for bit in [*range(8 * 60), *range(8 * 60, 8 * len(whole_picture), 4801), *range(8 * len(whole_picture))[-100:]]:
        flipped = bytearray(whole_picture)
        flipped[bit // 8] ^= 1 << bit % 8
        (done / "loss.png").write_bytes(flipped)
        assert not finished(done, CONFIG), bit
