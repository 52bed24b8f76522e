"""Rules that no other test of this process breaks: each is broken here once, and said in one line."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import cli, generation_config, web
from harness.commands import plot
from harness.commands.generate import GenerateCommand, generate_text
from harness.commands.train import parse_run_config
from harness.folders import save_folder
from harness.manifest import seal
from recipe import reading
from recipe.config import DataConfig, ModelConfig, PrecisionConfig, RunConfig, UserError
from recipe.corpus import load_documents
from recipe.params import init_params
from recipe.reading import read_json
from recipe.sampling import NO_TOKEN, Generator, SamplingOptions, check_context
from recipe.tokenizer import load_tokenizer, train_bpe
from tests.test_loop import config, no_picture, resumed, train  # noqa: F401

MODEL = ModelConfig(vocab_size=384, hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=2, max_position_embeddings=32)  # fmt: skip


def scripted(token: int) -> Generator:
    """A generator that writes one token for ever."""
    return Generator(MODEL, lambda batch, options: lambda count, done_B: np.full((len(done_B), count), token))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    tokenizer = train_bpe(["the fox and the dog"], 270)
    save_folder(tmp_path / "model", MODEL, init_params(MODEL, 0), tokenizer)
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }}", encoding="utf-8")
    return tmp_path / "model"


def talk(checkpoint: Path, **flags) -> None:
    generate_text(GenerateCommand(checkpoint=str(checkpoint), **flags), lambda *args: scripted(0))


def serve(**options) -> None:
    web.serve(scripted(0), train_bpe(["x"], 260), SamplingOptions(), render=None, title="", port=1, **options)


def without(monkeypatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# What is broken -> what is said; a rule is given the checkpoint's folder and monkeypatch.
RULES = {
    "a trace beyond the run": (lambda *_: RunConfig(steps=3, profile_steps=1), "profile_steps=1 needs steps"),
    "bfloat16 parameters": (
        lambda *_: RunConfig(precision=PrecisionConfig(params="bfloat16", compute="bfloat16")),
        "too coarse to train",
    ),
    "no new tokens": (lambda *_: SamplingOptions(max_new_tokens=0), "max_new_tokens=0"),
    "an infinite temperature": (lambda *_: SamplingOptions(temperature=float("inf")), "temperature=inf"),
    "a negative top-k": (lambda *_: SamplingOptions(top_k=-1), "top_k=-1"),
    "a seed beyond a word": (lambda *_: SamplingOptions(seed=2**32), "seed=4294967296 must lie"),
    "a prompt of nothing": (lambda *_: check_context(MODEL, 0, SamplingOptions()), "the prompt has no tokens"),
    "no samples": (lambda *_: SamplingOptions(samples=0), "samples=0"),
    "an empty stop string": (lambda *_: SamplingOptions(stop=("",)), "a stop string is empty"),
    "samples of a single sequence": (lambda *_: scripted(1)([1], SamplingOptions(samples=2)), "use generate.batch"),
    "logits of NaN": (lambda *_: list(scripted(NO_TOKEN)([1], SamplingOptions(max_new_tokens=3))), "not finite"),
    "a prompt that leaves no room": (
        lambda *_: check_context(MODEL, 30, SamplingOptions(max_new_tokens=3)), "exceed max_position_embeddings=32"
    ),
    "a port that is none": (lambda folder, _: GenerateCommand(checkpoint=str(folder), port=70_000), "port=70000"),
    "a chat of two samples": (lambda folder, _: talk(folder, chat=True, samples=2), "--chat has one answer"),
    "prompts for the page": (lambda folder, _: talk(folder, web=True, prompt=("x",)), "--web takes its prompts"),
    "the page without Gradio": (lambda _, patch: (without(patch, "gradio"), serve()), "--web needs Gradio"),
    "a field of generation_config.json that cannot be done": (
        lambda folder, _: generation_config.defaults(changed(folder, "generation_config.json", num_beams=4)),
        "num_beams=4 is not supported",
    ),
    "a field of generation_config.json out of range": (
        lambda folder, _: generation_config.defaults(changed(folder, "generation_config.json", top_p=2.0)),
        "top_p=2.0 must lie",
    ),
    "a tokenizer without an end": (
        lambda folder, _: load_tokenizer(endless(folder)), "has no end-of-text token"
    ),
    "a template too long": (
        lambda folder, patch: (patch.setattr("recipe.tokenizer.LARGEST_JSON", 3), load_tokenizer(folder)),
        "longer than any file of its kind",
    ),
    "a JSON file too large": (
        lambda folder, patch: (patch.setattr(reading, "LARGEST_JSON", 3), read_json(folder / "config.json")),
        "more than any file of its kind",
    ),
    "Parquet without pyarrow": (
        lambda folder, patch: (
            without(patch, "pyarrow", "pyarrow.parquet"),
            load_documents(DataConfig(corpus=str(written(folder / "x.parquet", b"PAR1")))),
        ),
        "needs pyarrow",
    ),
    "a corpus that is neither file nor folder": (
        lambda *_: load_documents(DataConfig(corpus="/dev/null")), "is neither a file nor a folder"
    ),
    "a run folder of a name too long": (
        lambda *_: parse_run_config(["--out", "x" * 5000], framework="jax"), "cannot be a folder"
    ),
}  # fmt: skip


def changed(folder: Path, name: str, **fields) -> Path:
    values = json.loads((folder / name).read_text(encoding="utf-8")) | fields
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


def endless(folder: Path) -> Path:
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").unlink()
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|endoftext|>", "<|other|>"), encoding="utf-8")
    return folder


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_one_line(rule, checkpoint, monkeypatch):
    break_it, message = RULES[rule]
    with pytest.raises(UserError) as caught:
        break_it(checkpoint, monkeypatch)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_of_more_ids_than_rows_is_refused(checkpoint):
    train_bpe(["".join(map(chr, range(200, 900)))] * 3, 1000).save(checkpoint)
    with pytest.raises(UserError, match="the model has 384"):
        talk(checkpoint, prompt=("x",))


def test_a_plot_of_nothing_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(plot, "parse", lambda *args, **options: plot.PlotConfig(runs=()))
    assert cli.run(plot.main) == 2 and "no run folder is given" in capsys.readouterr().err


def test_another_tokenizer_in_last_is_refused(config):  # noqa: F811
    train(dataclasses.replace(config, steps=3, save_every=3, eval_every=3))
    last = Path(config.out) / "last"
    (Path(config.out) / "loss.png").unlink()
    train_bpe(["another text altogether"], 280).save(last)
    seal(last, "run.json", {k: v for k, v in read_json(last / "run.json").items() if k != "checksum"}, {})
    with pytest.raises(UserError, match=r"its tokenizer\.json is not that of its text"):
        train(resumed(dataclasses.replace(config, steps=3, save_every=3, eval_every=3)))
