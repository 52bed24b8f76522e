"""Folders that transformers made go through both sides and back without losing a bit, at several shapes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from harness.folders import load_folder, save_folder
from harness.hf_config import to_hf_config
from parity_tests.cases import FLOAT32, random_tokens, random_weights
from parity_tests.sides import JaxModel, TorchModel
from parity_tests.test_transformers import MODELS
from parity_tests.test_weights import assert_same
from recipe.config import PrecisionConfig

SIDES = {"jax": JaxModel, "torch": TorchModel}
TOKENS = random_tokens(MODELS["tied"], 2, 7)
BFLOAT16_PARAMS = PrecisionConfig(params="bfloat16", compute="float32")


def made_by_transformers(name: str):
    """A model of transformers' own making, configured as it would be by hand, with norms away from one."""
    config = MODELS[name]
    values = to_hf_config(config)
    for ours in ("architectures", "model_type", "rope_theta", "torch_dtype", "dtype"):
        del values[ours]
    kind, settings = (Qwen3ForCausalLM, Qwen3Config) if config.qk_norm else (LlamaForCausalLM, LlamaConfig)
    model = kind(settings(**values, attn_implementation="eager"))
    model.load_state_dict({n: torch.tensor(w) for n, w in random_weights(config).items()}, strict=False)
    return model


def logits_of_transformers(folder) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS).long(), use_cache=False).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_logits_survive_every_crossing(name, tmp_path):
    """transformers, JAX, folder, torch, folder, JAX: the same weights, and in each framework the same logits."""
    made_by_transformers(name).save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    config, weights = load_folder(tmp_path / "theirs")
    assert config == MODELS[name]
    in_jax, in_torch = JaxModel(config, FLOAT32, weights), TorchModel(config, FLOAT32, weights)
    save_folder(tmp_path / "from jax", config, in_jax.weights())
    through_jax = TorchModel(*_loaded(tmp_path / "from jax"))
    save_folder(tmp_path / "from torch", config, through_jax.weights())
    through_both = JaxModel(*_loaded(tmp_path / "from torch"))
    expected = {name: weight.astype(np.float32) for name, weight in random_weights(config).items()}
    for side in (in_jax, in_torch, through_jax, through_both):
        assert_same(side.weights(), expected)
    np.testing.assert_array_equal(through_jax.logits(TOKENS), in_torch.logits(TOKENS))
    np.testing.assert_array_equal(through_both.logits(TOKENS), in_jax.logits(TOKENS))
    np.testing.assert_array_equal(
        logits_of_transformers(tmp_path / "from torch"), logits_of_transformers(tmp_path / "theirs")
    )


def _loaded(folder):
    config, weights = load_folder(folder)
    return config, FLOAT32, weights


@pytest.mark.parametrize("side", SIDES)
def test_bfloat16_weights_stay_bfloat16(side, tmp_path):
    """As parameters they keep their bits and their size; with float32 activations they give float32's logits."""
    made_by_transformers("untied-bias").bfloat16().save_pretrained(tmp_path)
    config, weights = load_folder(tmp_path)
    narrow, wide = (SIDES[side](config, precision, weights) for precision in (BFLOAT16_PARAMS, FLOAT32))
    for name, weight in narrow.weights().items():
        assert weight.dtype == weights[name].dtype and weight.dtype.name == "bfloat16"
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)
    np.testing.assert_array_equal(narrow.logits(TOKENS), wide.logits(TOKENS))


@pytest.mark.parametrize("side", SIDES)
def test_each_weight_is_read_once(side, tmp_path, monkeypatch):
    model = MODELS["tied"]
    save_folder(tmp_path / "folder", model, random_weights(model))
    _, weights = load_folder(tmp_path / "folder")
    reads, read = [], type(weights).__getitem__
    monkeypatch.setattr(type(weights), "__getitem__", lambda self, name: reads.append(name) or read(self, name))
    SIDES[side](model, FLOAT32, weights)
    assert sorted(reads) == sorted(weights)
