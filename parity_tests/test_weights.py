"""Weights travel between the common dict and either model without losing a bit, under Hugging Face's names."""

import dataclasses

import numpy as np
import pytest
import torch

from jax_impl import weights as jax_weights
from parity_tests.cases import (
    AWKWARD,
    FLOAT32,
    FLOAT64,
    PRECISIONS,
    VARIANTS,
    random_tokens,
    random_weights,
    run_config,
)
from parity_tests.sides import JaxModel, JaxTraining, TorchModel, TorchTraining
from recipe.params import param_specs

SIDES = {"jax": JaxModel, "torch": TorchModel}


def assert_same(weights: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, expected[name], err_msg=name)


@pytest.mark.parametrize("precision", [FLOAT64, FLOAT32], ids=["float64", "float32"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_exact(variant, side, precision):
    model = VARIANTS[variant]
    weights = random_weights(model)
    returned = SIDES[side](model, precision, weights).weights()
    assert_same(returned, weights)
    assert {weight.dtype.name for weight in returned.values()} == {precision.params}


def test_a_full_circle_through_both_sides_is_exact():
    model, weights = VARIANTS["everything"], random_weights(VARIANTS["everything"])
    there = TorchModel(model, FLOAT64, JaxModel(model, FLOAT64, weights).weights()).weights()
    assert_same(JaxModel(model, FLOAT64, there).weights(), weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_models_have_exactly_the_parameters_of_the_contract(variant):
    model = VARIANTS[variant]
    specs, weights = param_specs(model), random_weights(model)
    module = TorchModel(model, FLOAT32, weights).module
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {n: s.shape for n, s in specs.items()}
    side = JaxModel(model, FLOAT32, weights)
    expected = {
        jax_weights.flax_path(name, spec.role): spec.shape[::-1] if spec.role == "matrix" else spec.shape
        for name, spec in specs.items()
    }
    assert {path: leaf.shape for path, leaf in side.params.items()} == expected
    bound = jax_weights.bind(side.graph, side.params)
    assert (bound.lm_head is None) == (module.lm_head is None) == model.tie_word_embeddings


def test_names_translate_by_rule_and_back():
    for name, spec in param_specs(VARIANTS["everything"]).items():
        path = jax_weights.flax_path(name, spec.role)
        assert jax_weights.hf_name(path) == name
        assert path.endswith(".kernel") == (spec.role == "matrix")


def test_square_kernels_are_transposed():
    model = VARIANTS["square"]
    name = "model.layers.0.self_attn.q_proj"
    weight = random_weights(model)[name + ".weight"]
    assert weight.shape[0] == weight.shape[1]
    kernel = JaxModel(model, FLOAT64, random_weights(model)).params[name + ".kernel"]
    np.testing.assert_array_equal(np.asarray(kernel), weight.T)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_parameters_keep_their_dtype_whatever_the_compute_dtype(precision):
    weights = random_weights(AWKWARD)
    assert {str(leaf.dtype) for leaf in JaxModel(AWKWARD, precision, weights).params.values()} == {precision.params}
    module = TorchModel(AWKWARD, precision, weights).module
    assert {p.dtype for p in module.parameters()} == {getattr(torch, precision.params)}


@pytest.mark.parametrize("side", SIDES)
def test_every_wrong_weight_is_listed_at_once(side):
    weights = random_weights(AWKWARD)
    del weights["model.norm.weight"]
    weights["model.layers.9.mlp.up_proj.weight"] = np.zeros((14, 30))
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].T
    with pytest.raises(ValueError) as error:
        SIDES[side](AWKWARD, FLOAT32, weights)
    for part in ("missing model.norm.weight", "unexpected model.layers.9", "misshapen model.layers.0.mlp.up_proj"):
        assert part in str(error.value)


@pytest.mark.parametrize("training", [JaxTraining, TorchTraining])
def test_what_was_read_out_is_not_what_goes_on_being_trained(training):
    """Weights and slots are copies: an update after they were read, as while they are saved, changes none of them."""
    model = dataclasses.replace(AWKWARD, num_hidden_layers=1)
    side = training(run_config(model, FLOAT32), random_weights(model))
    batches = [random_tokens(model, 3, 2, 7, seed=seed) for seed in range(4)]
    side.step(*batches[:2])
    read = side.weights() | {f"{slot} {name}": a for slot, arrays in side.slots().items() for name, a in arrays.items()}
    kept = {name: array.copy() for name, array in read.items()}
    side.step(*batches[2:])
    for name, array in read.items():
        np.testing.assert_array_equal(array, kept[name], err_msg=name)
    assert not np.array_equal(side.weights()["model.norm.weight"], kept["model.norm.weight"])
