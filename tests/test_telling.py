# ruff: noqa: F811 (fixtures of another file)
"""What a run says first and last: few lines, what is not the preset's, commands that run as they stand."""

import dataclasses
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from harness import cli, loop
from harness.commands.train import parse_run_config
from harness.plot import plot_runs
from harness.telling import describe, duration
from recipe.config import DataConfig, ModelConfig, RunConfig
from recipe.presets import get_preset
from tests.test_interruption import usual_handlers  # noqa: F401 (a fixture for all)
from tests.test_loop import Toy, config, no_picture, resumed, train  # noqa: F401 (fixtures)

ENVIRONMENT = {"backend": "cpu", "device": "abacus", "jax": "0.12.0", "x64": False, "machine": {"cores": 2}}


def run_line(config: RunConfig) -> str:
    line, *_ = describe(config, ENVIRONMENT)
    assert line.startswith("run        ")
    return line[11:]


def test_the_beginning_says_what_is_not_the_presets():
    tiny = get_preset("tiny")
    assert run_line(dataclasses.replace(tiny, out="x", resume="x")) == "preset tiny"
    data = dataclasses.replace(tiny.data, corpus="notes/")
    assert run_line(dataclasses.replace(tiny, steps=20, data=data)) == "preset tiny, but steps=20, data.corpus=notes/"
    assert run_line(dataclasses.replace(tiny, prompts=("a\nb", ""))) == "preset tiny, but prompts=['a\\nb', '']"
    assert run_line(dataclasses.replace(get_preset("seed"), mesh="data=2")) == "preset seed, but mesh=data=2"
    assert run_line(RunConfig(preset="mine", seed=3)) == "preset mine, but seed=3"
    assert describe(tiny, ENVIRONMENT)[2] == "device     backend cpu, device abacus, jax 0.12.0, x64 False"


def test_of_weights_to_begin_with_the_model_goes_unsaid():
    model = ModelConfig(vocab_size=300, hidden_size=16, dropout=0.25)
    mine = dataclasses.replace(get_preset("tiny"), init="w", model=model, data=DataConfig(tokenizer="w"))
    assert run_line(mine) == "preset tiny, but init=w, model.dropout=0.25"
    other = dataclasses.replace(mine, data=DataConfig(tokenizer="t"))
    assert run_line(other).endswith(", data.tokenizer=t")


def test_however_much_differs_the_beginning_is_short(capsys, config):
    long = dataclasses.replace(config, seed=2**31)
    line = run_line(long)
    assert re.search(r" and \d+ more$", line) and len(line) < 320
    train(config)
    first = capsys.readouterr().out.splitlines()
    before = first[: next(number for number, line in enumerate(first) if line.startswith("step"))]
    assert [line.split()[0] for line in before] == [
        "run",
        "parameters",
        "device",
        "folder",
        "corpus",
        "text",
        "disk",
        "to",
    ]
    assert sum(1 + len(line) // 80 for line in before[1:] if not line.startswith("folder")) <= 7


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (65, "1 min 05 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_a_time_in_words(seconds, said):
    assert duration(seconds) == said


def test_the_end_says_what_it_came_to_and_two_commands(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/qwen-train-jax"])
    config = dataclasses.replace(config, out=str(tmp_path / "my run"))
    loop.run(config, framework="jax", make_trainer=Toy)
    said = capsys.readouterr().out.splitlines()[-6:]
    assert [line[:11] for line in said] == [
        "validation ",
        "time       ",
        "weights    ",
        "picture    ",
        "generate   ",
        "train on   ",
    ]
    assert said[0].startswith("validation 4.3430 nats per token at best, after step 8 (interpolated bigram ")
    assert re.fullmatch(r"time       [\d.]+ s in all; updates at [\d,]+ tokens/s", said[1])
    assert shlex.split(said[4])[1:] == ["qwen-generate-jax", "--checkpoint", config.out]
    words = shlex.split(said[5])[2:]
    assert words[0] == "qwen-train-jax" and "'" in said[5]
    again = parse_run_config([*words[1:], "--out", str(tmp_path / "next")], framework="jax")
    assert again.init == f"{config.out}/best" and again.data.corpus == config.data.corpus
    assert (again.steps, again.batch_size, again.model.hidden_size) == (12, 2, 6)


def interrupted(config: RunConfig, monkeypatch, *, at: int, signals: int = 1) -> tuple[int, Path]:
    """A run that gets so many SIGTERM in an update, with a real picture of one; its exit code and that one's place."""
    if signals == 1:
        monkeypatch.setattr(loop, "plot_runs", plot_runs)

    def before_step(position: int) -> None:
        for _ in range(signals if position == at else 0):
            signal.raise_signal(signal.SIGTERM)

    def make_trainer(*args):
        trainer = Toy(*args)
        trainer.before_step = before_step
        return trainer

    code = cli.run(lambda: loop.run(config, framework="toy", make_trainer=make_trainer) and None)
    return code, Path(config.out) / "loss.png"


def test_an_interrupted_run_leaves_the_picture_so_far_and_its_end_another(config, monkeypatch, capsys):
    code, picture = interrupted(config, monkeypatch, at=5)
    said = capsys.readouterr()
    assert code == 143 and picture.read_bytes().startswith(b"\x89PNG")
    assert f"picture    {picture}, so far\n" in said.out
    assert said.err.splitlines()[-1] == (
        f"stopped by SIGTERM after step 6; go on with: python train_toy.py --resume {config.out}"
    )
    seen = []
    monkeypatch.setattr(loop, "plot_runs", lambda folders, path, baselines: path.write_bytes(b"end"))
    train(resumed(config), lambda position: seen.append(picture.exists()))
    assert set(seen) == {False} and picture.read_bytes() == b"end"


def test_a_second_signal_draws_nothing(config, monkeypatch, capsys):
    code, picture = interrupted(config, monkeypatch, at=5, signals=2)
    assert code == 143 and not picture.exists() and "go on with: " in capsys.readouterr().err


def test_nothing_is_drawn_before_there_is_an_update_nor_does_a_picture_cost_the_line(config, monkeypatch, capsys):
    code, picture = interrupted(config, monkeypatch, at=0)
    assert code == 143 and not picture.exists() and "so far" not in capsys.readouterr().out
    monkeypatch.setattr("harness.loop.readable_records", lambda folder: 1 / 0)
    code, picture = interrupted(config, monkeypatch, at=5)
    assert code == 143 and not picture.exists() and "go on with: " in capsys.readouterr().err
