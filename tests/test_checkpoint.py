"""The weights folder: what is written comes back, Hugging Face opens it, and what does not fit is named at once."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recipe.checkpoint import find_weights, from_hf_config, load_folder, save_folder, to_hf_config
from recipe.config import ModelConfig, UserError
from recipe.params import init_params
from recipe.tokenizer import load_tokenizer, train_bpe

MODEL = ModelConfig(vocab_size=300, hidden_size=30, intermediate_size=14, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, rope_theta=12_345.0)  # fmt: skip
VARIANTS = [
    MODEL,
    dataclasses.replace(MODEL, tie_word_embeddings=False, attention_bias=True),
    dataclasses.replace(MODEL, sliding_window=7, max_window_layers=1),
    dataclasses.replace(MODEL, qk_norm=False),
]


@pytest.mark.parametrize("model", VARIANTS)
def test_a_saved_folder_comes_back_bit_for_bit(model, tmp_path):
    weights = init_params(model, seed=3)
    save_folder(tmp_path / "folder", model, weights)
    loaded_model, loaded = load_folder(tmp_path / "folder")
    assert loaded_model == model
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name], weight)


@pytest.mark.parametrize("model", VARIANTS)
def test_transformers_reads_the_same_configuration(model, tmp_path):
    from transformers import AutoConfig

    save_folder(tmp_path / "folder", model, init_params(model, seed=0))
    theirs = AutoConfig.from_pretrained(tmp_path / "folder")
    assert theirs.rope_parameters["rope_theta"] == model.rope_theta
    assert (theirs.head_dim, theirs.tie_word_embeddings) == (model.head_dim, model.tie_word_embeddings)
    if model.qk_norm:
        windowed = [model.window_of_layer(layer) is not None for layer in range(model.num_hidden_layers)]
        assert [kind == "sliding_attention" for kind in theirs.layer_types] == windowed
        assert from_hf_config(theirs.to_dict()) == model


def test_both_spellings_of_rope_theta_are_read():
    values = to_hf_config(MODEL)
    old = {name: value for name, value in values.items() if name != "rope_parameters"}
    new = {name: value for name, value in values.items() if name != "rope_theta"}
    assert from_hf_config(old).rope_theta == from_hf_config(new).rope_theta == 12_345.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type='yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_the_model_cannot_express_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_hf_config(to_hf_config(MODEL) | change)


def test_every_wrong_weight_is_named_at_once(tmp_path):
    weights = init_params(MODEL, seed=0)
    save_folder(tmp_path / "folder", MODEL, weights)
    broken = load_file(tmp_path / "folder" / "model.safetensors")
    del broken["model.norm.weight"]
    broken["stranger"] = np.zeros(2, np.float32)
    broken["model.embed_tokens.weight"] = np.zeros((299, 30), np.float32)
    save_file(broken, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_folder(tmp_path / "folder")
    for part in (
        "missing model.norm.weight (30,)",
        "unexpected stranger (2,)",
        "(299, 30), the configuration says (300, 30)",
    ):
        assert part in str(caught.value)


def test_sharded_and_bfloat16_weights_are_read(tmp_path):
    import ml_dtypes

    weights = init_params(MODEL, seed=1)
    save_folder(tmp_path / "folder", MODEL, weights)
    (tmp_path / "folder" / "model.safetensors").unlink()
    halves = np.array_split(np.array(list(weights)), 2)
    for index, names in enumerate(halves, start=1):
        shard = {str(name): weights[name].astype(ml_dtypes.bfloat16) for name in names}
        save_file(shard, tmp_path / "folder" / f"model-0000{index}-of-00002.safetensors")
    _, loaded = load_folder(tmp_path / "folder")
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name], weight.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_failed_save_leaves_the_old_folder(tmp_path):
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=0))
    before = (tmp_path / "folder" / "model.safetensors").read_bytes()
    with pytest.raises(UserError):
        save_folder(tmp_path / "folder", MODEL, {})
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == before
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=1))
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_tokenizer_travels_and_transformers_opens_it(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_bpe(["To be, or not to be, that is the question.\n" * 20], 300)
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=0), tokenizer)
    text = "not that, but zebras\n"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs(text)["input_ids"] == tokenizer.encode(text) == load_tokenizer(tmp_path / "folder").encode(text)
    assert theirs.eos_token_id == tokenizer.eos_id == 0
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["eos_token_id"] == 0


def test_a_run_folder_means_its_best_weights(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        find_weights(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no config\.json, best/ or last/"):
        find_weights(str(tmp_path))
    save_folder(tmp_path / "last", MODEL, init_params(MODEL, seed=0))
    assert find_weights(str(tmp_path)) == tmp_path / "last"
    save_folder(tmp_path / "best", MODEL, init_params(MODEL, seed=0))
    assert find_weights(str(tmp_path)) == tmp_path / "best"
    assert find_weights(str(tmp_path / "last")) == tmp_path / "last"
