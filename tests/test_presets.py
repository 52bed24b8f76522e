"""The qwen3 presets, field by field, against the published config.json of each model and transformers' own defaults."""

import dataclasses
import re

import pytest

from harness.hf_config import to_hf_config
from recipe.config import AdamWConfig, ModelConfig, MuonConfig, RunConfig, UserError, to_dict
from recipe.presets import PRESETS, changed, seed, tiny

# https://huggingface.co/Qwen/NAME/blob/main/config.json, as published in April 2025; theirs are the dense Base and chat
# models alike, but for max_position_embeddings, which is the chat models'.
COMMON = {
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "initializer_range": 0.02,
    "sliding_window": None,
}
TABLE = """
Qwen3-0.6B   1024   3072  28  16  tied
Qwen3-1.7B   2048   6144  28  16  tied
Qwen3-4B     2560   9728  36  32  tied
Qwen3-8B     4096  12288  36  32  untied
Qwen3-14B    5120  17408  40  40  untied
Qwen3-32B    5120  25600  64  64  untied
"""
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
PUBLISHED = {
    name.lower(): COMMON | dict(zip(SIZES, map(int, sizes), strict=True)) | {"tie_word_embeddings": tied == "tied"}
    for name, *sizes, tied in map(str.split, TABLE.strip().splitlines())
}
OURS = {"qk_norm": True, "dropout": 0.0, "max_window_layers": 0}
"""Fields that config.json has no name for, or that mean nothing without a window: what Qwen3 is."""


def test_every_published_size_is_a_preset():
    assert set(PUBLISHED) == {name for name in PRESETS if name.startswith("qwen3")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_model(name):
    assert dataclasses.asdict(PRESETS[name]().model) == PUBLISHED[name] | OURS


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_makes_the_same_model_of_it(name):
    """What the published files leave to the class is the class's default, and our file says the same of all of it."""
    from transformers import Qwen3Config

    published = {field: value for field, value in PUBLISHED[name].items() if field != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": PUBLISHED[name]["rope_theta"]}
    theirs = Qwen3Config(**published, rope_parameters=rope)
    ours = Qwen3Config(**to_hf_config(PRESETS[name]().model))
    skip = {"architectures", "dtype", "torch_dtype", "_name_or_path", "rope_theta", "max_window_layers"}
    for field, value in theirs.to_dict().items():
        if field not in skip:
            assert ours.to_dict()[field] == value, field
    assert all(kind == "full_attention" for kind in ours.layer_types)


def test_the_defaults_of_a_model_are_qwen3s_where_size_does_not_matter():
    from transformers import Qwen3Config

    theirs, ours = Qwen3Config(), ModelConfig()
    for field in ("rms_norm_eps", "initializer_range", "attention_bias", "sliding_window"):
        assert getattr(ours, field) == getattr(theirs, field), field


# docs/notebook.md, "What is kept exactly", and torch's AdamW for what the notebook leaves to it.
OPTIMIZERS = {
    MuonConfig: dict(learning_rate=0.01, beta=0.95, nesterov=True, ns_steps=5, eps=1e-7, weight_decay=0.0),
    AdamWConfig: dict(learning_rate=0.001, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, decay_norms=False),
}


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_an_optimizers_defaults_are_the_notebooks(kind):
    import torch

    assert dataclasses.asdict(kind()) == OPTIMIZERS[kind]
    theirs = torch.optim.AdamW([torch.zeros(1)]).defaults
    assert (theirs["betas"], theirs["eps"]) == ((0.9, 0.999), 1e-8)
    assert RunConfig().clip_norm == 1.0


def test_changes_reach_their_fields_and_leave_the_others():
    given = tiny()
    new = changed(given, {"steps": 20, "prompts": ["a", "b"], "model": {"dropout": 0.1}, "data": {}})
    model = dataclasses.replace(given.model, dropout=0.1)
    assert new == dataclasses.replace(given, steps=20, prompts=("a", "b"), model=model)
    assert changed(given, {"model": model, "steps": 20}).model == model
    assert changed(given, to_dict(seed())) == seed() and changed(given, {}) == given


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stpes": 2}, "stpes is no field of a configuration; did you mean steps?"),
        ({"model": {"droput": 0.1}}, "model.droput is no field of a configuration; did you mean model.dropout?"),
        ({"model.dropout": 0.1}, "model.dropout is no field of a configuration; did you mean model.dropout?"),
        ({"lr": 1.0}, "did you mean muon.learning_rate or adamw.learning_rate?"),
        ({"schedule": {"form": "x"}}, "schedule.form is no field of a configuration; there are "),
        ({3: 1}, "3 is no field of a configuration; there are preset, "),
        ({"model": 0.1}, "model=0.1 must be an object with fields such as model.vocab_size; name the one to change."),
        ({"steps": "20"}, "steps='20' must be a whole number (int)"),
        ({"prompts": "a"}, "prompts='a' must be a tuple"),
        ({"model": {"dropout": 2.0}}, "dropout=2.0 must lie in [0, 1)"),
    ],
)
def test_a_wrong_change_is_a_line(changes, line):
    with pytest.raises(UserError, match=re.escape(line)):
        changed(tiny(), changes)
