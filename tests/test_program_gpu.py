"""What JAX hands to the compiler of a GPU, read on a machine without one: dtypes, logits, cuDNN calls.

The training step is lowered to StableHLO for CUDA with the GPU's branches taken; no plugin, driver or CUDA package is
needed. tests/test_plan_gpu.py reads what the compiler makes of it.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

import pytest

import jax_impl.backend
from benchmarks.plan.compile import stablehlo
from benchmarks.plan.targets import H100
from recipe.config import RunConfig
from recipe.presets import get_preset

LAYERS = 2
PRESETS = ("seed", "qwen3-0.6b")
SHAPE = re.compile(r"tensor<((?:\d+x)*)(\w+)>")
DOT = re.compile(r"stablehlo\.dot_general .* : \((tensor<[^>]*>), (tensor<[^>]*>)\) -> (tensor<[^>]*>)")
KERNEL = re.compile(r'\bname = "(\w+)"')
CUDNN = re.compile(r"custom_call @(__cudnn\$fmhaSoftmax(?:Backward)?)\(")


class Found(NamedTuple):
    """What the promises are about."""

    products: int
    """Matrix products in the text; a loop's body counts once."""
    float32_operands: int
    logits: set[tuple[int, ...]]
    """Arrays with a logit of every token of a micro-batch."""
    forward: int
    """cuDNN calls."""
    backward: int
    ours: dict[str, int]
    """Calls of kernels of our own, by name."""


def shape(text: str) -> tuple[tuple[int, ...], str]:
    """Dimensions and dtype of `tensor<2x3xbf16>`."""
    dims, dtype = SHAPE.fullmatch(text).groups()
    return tuple(map(int, dims.split("x")[:-1])), dtype


def configuration(name: str, *, dropout: float = 0.0, **precision) -> RunConfig:
    """The preset with two layers."""
    preset = get_preset(name)
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, num_hidden_layers=LAYERS, dropout=dropout),
        precision=dataclasses.replace(preset.precision, **precision),
    )


def read(config: RunConfig) -> Found:
    """The training step of this configuration, lowered for an H100."""
    text = stablehlo(config, H100)
    operands = [[shape(side)[1] for side in dot.groups()[:2]] for dot in DOT.finditer(text)]
    assert len(operands) == text.count("stablehlo.dot_general"), "every product was read"
    arrays = {shape(found.group(0))[0] for found in SHAPE.finditer(text)}
    V, D, tokens = config.model.vocab_size, config.model.hidden_size, config.batch_size * config.sequence_length
    with_logits = {dims for dims in arrays if V in dims and D not in dims and math.prod(dims) >= tokens * V}
    calls = CUDNN.findall(text)
    backward = sum(call.endswith("Backward") for call in calls)
    return Found(
        products=len(operands),
        float32_operands=sum("f32" in pair for pair in operands),
        logits=with_logits,
        forward=len(calls) - backward,
        backward=backward,
        ours=dict(collections.Counter(KERNEL.findall(text))),
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", PRESETS)
def test_no_product_has_a_float32_operand_and_all_logits_are_never_held(name, dropout):
    found = read(configuration(name, dropout=dropout))
    assert found.products >= 3 * 7 * LAYERS, "seven matrices a layer, forward and backward"
    assert (found.float32_operands, found.logits) == (0, set())


@pytest.mark.parametrize("name", PRESETS)
def test_attention_is_one_call_of_cudnn_a_layer_and_direction(name):
    found = read(configuration(name))
    assert (found.forward, found.backward) == (LAYERS, LAYERS)


LOSS = {"normalizers_kernel": 1, "grad_logits_kernel": 1}
ATTENTION = dict.fromkeys(("attention_forward", "attention_query_grad", "attention_key_grads"), LAYERS)


@pytest.mark.parametrize(
    ("name", "changes", "ours"),
    [
        ("seed", {}, LOSS),
        ("seed", {"dropout": 0.1}, LOSS | ATTENTION),
        ("seed", {"dropout": 0.1, "attention": "explicit"}, LOSS),
        ("seed", {"dropout": 0.1, "compute": "float32"}, {}),
        ("qwen3-0.6b", {"dropout": 0.1}, ATTENTION),  # its hidden size is beyond what the loss's kernel pays for
    ],
)
def test_our_kernels_are_called_once_a_layer_and_direction(name, changes, ours):
    found = read(configuration(name, **changes))
    assert found.ours == ours
    assert not found.forward or "dropout" not in changes, "cuDNN's attention drops nothing"


@pytest.mark.parametrize("name", PRESETS)
def test_a_computation_in_float32_is_noticed(name):
    found = read(configuration(name, compute="float32"))
    assert found.float32_operands > 0 and (found.forward, found.backward) == (0, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_explicit_attention_is_noticed(name):
    found = read(configuration(name, attention="explicit"))
    assert (found.float32_operands, found.forward, found.backward) == (0, 0, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_all_logits_at_once_are_noticed(name, monkeypatch):
    whole = dataclasses.replace(jax_impl.backend.GPU, tokens_at_once=2**30)
    monkeypatch.setitem(jax_impl.backend.MACHINES, "gpu", whole)
    config = configuration(name)
    assert (config.batch_size * config.sequence_length, config.model.vocab_size) in read(config).logits
