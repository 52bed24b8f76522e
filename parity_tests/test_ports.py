"""Never wolf, never false comfort: correct ports are clean, planted bugs are named at the tensor or right after it.

A spread of them here; `-m slow` runs all, and `python -m parity_tests.ports` writes the table of both rates.
"""

import numpy as np
import pytest
import torch

from parity_tests.compare import Rules, copy_weights, copy_weights_to_torch
from parity_tests.compare.jax_side import open_model
from parity_tests.compare.precision import DTYPES
from parity_tests.ports.table import compare_pair, judge, ports

PORTS = ports()
BUGS = [(name, bug) for name, port in PORTS.items() for bug in port.bugs]

CLEAN = ("nnx_swiglu", "nnx_classifier", "linen_scan", "eqx_mlp")
"""Casts inside, an embedding, stacked layers, vmap; every port is compared every night."""

CARRIED = ("nnx_encoder_layer", "nnx_conv_block", "linen_scan", "gpt2", "gpt-neox", "vit")
"""Fused, convolutions, stacked, transformers' Conv1D, interleaved heads, kernels of nnx.MultiHeadAttention."""

NAMED = BUGS[:: len(BUGS) // 8]
"""Every so many."""


def test_the_table_is_large_enough():
    assert len(PORTS) >= 20 and len(BUGS) >= 60
    assert all(port.bugs for port in PORTS.values())
    assert set(CLEAN) <= PORTS.keys() and len(NAMED) >= 8


@pytest.mark.parametrize("name", CLEAN)
def test_a_correct_port_is_clean(name):
    outcome = judge(PORTS[name], dtypes=("float64", "bfloat16"))
    assert outcome.right, outcome


def test_a_correct_llama_is_clean_in_float64_without_a_word():
    """transformers rounds its rotary frequencies to float32; they are computed anew for the truth."""
    report = compare_pair(PORTS["llama"].make(""), dtypes=("float64",), seeds=range(2))
    assert report.exit_code == 0 and not report.explained, report.verdict()


@pytest.mark.parametrize(("name", "bug"), NAMED)
def test_a_planted_bug_is_named(name, bug):
    outcome = judge(PORTS[name], bug, dtypes=("float64",), seeds=range(2))
    assert outcome.right, (outcome, PORTS[name].bugs[bug])


@pytest.mark.parametrize(
    "name", [*CARRIED, *(pytest.param(n, marks=pytest.mark.slow) for n in PORTS if n not in CARRIED)]
)
def test_weights_are_carried_over_and_back(name):
    """By the rules of the port, onto zeros, and on to a torch module of zeros; the ports themselves do it otherwise."""
    pair = PORTS[name].make("")
    rules, model = Rules(**(pair.rules or {})), open_model(pair.jax_side)
    expected = {key: np.array(value) for key, value in [*model.params.items(), *model.state.items()]}
    blank = model.replace(*({key: np.zeros_like(x) for key, x in x.items()} for x in (model.params, model.state)))
    filled = open_model(copy_weights(pair.torch_module, blank, rules).module)
    for key in filled.params:
        np.testing.assert_array_equal(np.asarray(filled.params[key]), expected[key], err_msg=key)
    before = {key: value.clone() for key, value in pair.torch_module.named_parameters()}
    with torch.no_grad():
        for parameter in pair.torch_module.parameters():
            parameter.zero_()
    copy_weights_to_torch(copy_weights(pair.torch_module, pair.jax_side, rules).module, pair.torch_module, rules)
    assert all((parameter == 0).all() for parameter in pair.torch_module.parameters())
    copy_weights_to_torch(PORTS[name].make("").jax_side, pair.torch_module, rules)
    for key, parameter in pair.torch_module.named_parameters():
        assert torch.equal(parameter, before[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", PORTS)
def test_every_correct_port_is_clean(name):
    outcome = judge(PORTS[name], dtypes=DTYPES)
    assert outcome.right, outcome


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bug"), BUGS)
def test_every_planted_bug_is_named(name, bug):
    outcome = judge(PORTS[name], bug, dtypes=("float64",), seeds=range(2))
    assert outcome.right, (outcome, PORTS[name].bugs[bug])
