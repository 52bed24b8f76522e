"""The third oracle: transformers' Qwen3ForCausalLM and LlamaForCausalLM, in float32, through the interchange folder.

Both it and our side err, so each comparison allows the sum of both errors, measured by Monte-Carlo arithmetic.
transformers computes its rotary table in float32; that error grows with the position and is part of the allowance.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from harness.folders import load_folder, save_folder
from parity_tests.cases import AWKWARD, FLOAT32, FLOAT64, random_tokens, random_weights
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import check, check_all
from parity_tests.rope_noise import rounded_rope_tables
from parity_tests.sides import Arrays, JaxModel, TorchModel
from recipe.config import ModelConfig
from recipe.contract import UNIT_ROUNDOFF
from recipe.params import param_specs
from torch_ref.model import rope_table

BASE = dataclasses.replace(AWKWARD, num_hidden_layers=2, head_dim=8)
MODELS = {
    "tied": BASE,
    "untied-bias": dataclasses.replace(BASE, tie_word_embeddings=False, attention_bias=True, rope_theta=1e6),
    "window": dataclasses.replace(BASE, sliding_window=60, max_window_layers=1),
    "llama": dataclasses.replace(BASE, qk_norm=False, tie_word_embeddings=False),
}
SIDES = {"jax": JaxModel, "torch": TorchModel}
LENGTH = 200
# One token more than positions: transformers shifts the labels itself.
TOKENS = random_tokens(BASE, 1, LENGTH + 1)
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def frequency_roundings(model: ModelConfig, theirs) -> float:
    """Largest relative error of transformers' float32 rotary frequencies, in units of u; at least one."""
    cos, sin = rope_table(model, 2)
    frequencies_R = theirs.model.rotary_emb.inv_freq.double().numpy()
    exact_R = np.arctan2(sin[1], cos[1])
    return max(1.0, float(np.abs(frequencies_R / exact_R - 1.0).max()) / UNIT_ROUNDOFF["float32"])


def measure_ours(side: JaxModel | TorchModel) -> Arrays:
    loss, grads = side.loss_and_grads(INPUTS, TARGETS)
    return {"logits": side.logits(INPUTS), "loss": np.array(loss), **grads}


def measure_transformers(model) -> Arrays:
    """Its own logits, its own loss with its own label shift, its gradients."""
    tokens = torch.tensor(TOKENS).long()
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    grads = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return {"logits": output.logits[:, :-1].detach().numpy(), "loss": np.array(output.loss.item()), **grads}


def joint_allowances(model: ModelConfig, theirs, compute: Callable[[], Arrays]) -> dict[str, float]:
    """Of our float32 against transformers' float32: twice the share of the latter, which is the larger one."""
    with rounded_rope_tables(frequency_roundings(model, theirs)):
        return allowances(amplification(compute, "float32")[1], "float32", erring=2)


class Loaded:
    """A model of ours as transformers reads it from the folder that we write."""

    def __init__(self, name: str, folder) -> None:
        self.config = MODELS[name]
        self.folder = folder
        save_folder(folder, self.config, random_weights(self.config))
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.values = measure_transformers(self.model)

    @functools.cached_property
    def allowances(self) -> dict[str, float]:
        def compute() -> Arrays:
            return measure_ours(TorchModel(self.config, FLOAT64, random_weights(self.config)))

        return joint_allowances(self.config, self.model, compute)


@pytest.fixture(scope="module", params=MODELS)
def loaded(request, tmp_path_factory) -> Loaded:
    return Loaded(request.param, tmp_path_factory.mktemp("folders") / request.param)


def test_transformers_reads_our_folder_as_meant(loaded):
    config, theirs = loaded.config, loaded.model.config
    assert type(loaded.model) is (Qwen3ForCausalLM if config.qk_norm else LlamaForCausalLM)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.head_dim == config.head_dim
    if config.sliding_window is not None:
        assert theirs.layer_types == ["full_attention", "sliding_attention"]
        assert theirs.sliding_window == config.sliding_window
    parameters = {name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()}
    assert parameters == {name: spec.shape for name, spec in param_specs(config).items()}
    for name, weight in random_weights(config).items():
        np.testing.assert_array_equal(loaded.model.get_parameter(name).detach().numpy(), weight, err_msg=name)


@pytest.mark.parametrize("side", SIDES)
def test_logits_loss_and_gradients_equal_those_of_transformers(loaded, side, record_property):
    allowed = loaded.allowances
    values = measure_ours(SIDES[side](loaded.config, FLOAT32, random_weights(loaded.config)))
    errors = check_all(values, loaded.values, allowed.get)
    record_property("error over allowance, logits", errors["logits"] / allowed["logits"])
    record_property("largest error over allowance", max(errors[name] / allowed[name] for name in errors))


def test_we_read_what_transformers_saved(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path / "whole")
    loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    expected = random_weights(loaded.config)
    for folder in ("whole", "sharded"):
        config, weights = load_folder(tmp_path / folder)
        # The number of the first windowed layer means nothing without a window.
        assert config == loaded.config
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, expected[name], err_msg=name)


def test_our_folder_round_trips(loaded):
    config, weights = load_folder(loaded.folder)
    assert config == loaded.config
    for name, weight in random_weights(loaded.config).items():
        np.testing.assert_array_equal(weights[name], weight, err_msg=name)


def test_bfloat16_weights_are_widened_exactly(loaded, tmp_path):
    model = type(loaded.model)(loaded.model.config)
    model.load_state_dict(loaded.model.state_dict())
    model.bfloat16().save_pretrained(tmp_path)
    _, weights = load_folder(tmp_path)
    for name, weight in random_weights(loaded.config).items():
        np.testing.assert_array_equal(weights[name], torch.tensor(weight).bfloat16().float().numpy(), err_msg=name)


def test_a_model_that_transformers_made_works_here(tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=53, hidden_size=30, intermediate_size=14, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, attn_implementation="eager",
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    model, weights = load_folder(tmp_path)
    assert model.rope_theta == 500_000.0 and not model.tie_word_embeddings and model.head_dim == 8

    def compute() -> Arrays:
        return {"logits": TorchModel(model, FLOAT64, weights).logits(INPUTS)}

    allowance = joint_allowances(model, theirs, compute)["logits"]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(INPUTS).long(), use_cache=False).logits.numpy()
    for side in SIDES.values():
        check("logits", side(model, FLOAT32, weights).logits(INPUTS), expected, allowance)
