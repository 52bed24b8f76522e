"""Each part of the model alone, values and gradients: RoPE, RMSNorm, attention, dropout, MLP, block, cross-entropy.

Bounds as in test_model.py, part by part, so that a failure there has an address here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_impl.model
import torch_ref.model
from jax_impl import random as jax_random
from jax_impl.weights import bind, flax_path
from parity_tests.cases import AWKWARD, PRECISIONS, random_weights
from parity_tests.compare.montecarlo import allowances, amplification, rounded
from parity_tests.compare.tolerance import SAFETY, check_all, relative_error
from parity_tests.rope_noise import rounded_rope_tables
from parity_tests.sides import Arrays, x64
from recipe.config import PrecisionConfig
from recipe.params import param_specs
from torch_ref import random as torch_random

MODEL = dataclasses.replace(AWKWARD, attention_bias=True, rope_theta=1e6, dropout=0.1)
LAYER = "model.layers.0."


class Part(NamedTuple):
    """One part as both sides call it: `call(library, build, inputs)` with torch_ref.model or jax_impl.model."""

    call: Callable
    inputs: dict[str, tuple[int, ...]]
    """Shapes of the activations."""
    weights: str = ""
    """Prefix of the part's weights in the model."""


def _tables(library, x) -> tuple:
    asarray = torch.as_tensor if library is torch_ref.model else jnp.asarray
    wide = library.accumulator(x.dtype)
    model = dataclasses.replace(MODEL, head_dim=8 if x.ndim == 4 else MODEL.head_dim)
    return tuple(asarray(table, dtype=wide) for table in library.rope_table(model, x.shape[1]))


def _places(library, x):
    return library.Places(*_tables(library, x), None)


def _key(library):
    return torch_random.key(5) if library is torch_ref.model else jax_random.key(5)


def _targets(library, rows: int):
    targets = np.random.default_rng(3).integers(0, MODEL.vocab_size, rows)
    return torch.tensor(targets) if library is torch_ref.model else jnp.asarray(targets)


def _attention(*, window: int | None = None, rate: float = 0.0) -> Callable:
    return lambda library, module, q, k, v: library.attention(q, k, v, window=window, rate=rate, key=_key(library))


def _qkv(T: int, S: int) -> dict[str, tuple[int, ...]]:
    return {"q": (2, T, 6, 4), "k": (2, S, 2, 4), "v": (2, S, 2, 4)}


PARTS = {
    "rope": Part(lambda library, module, x: library.apply_rope(x, *_tables(library, x)), {"x": (1, 200, 3, 8)}),
    "rms_norm": Part(lambda library, module, x: module(x), {"x": (2, 7, 30)}, LAYER + "input_layernorm."),
    "attention": Part(_attention(), _qkv(7, 7)),
    "attention-window": Part(_attention(window=3), _qkv(7, 7)),
    "attention-two-blocks": Part(_attention(), _qkv(140, 140)),
    "attention-two-blocks-window": Part(_attention(window=20), _qkv(140, 140)),
    "attention-two-blocks-dropout": Part(_attention(window=20, rate=0.1), _qkv(140, 140)),
    "dropout": Part(lambda library, module, x: library.dropout(x, 0.1, _key(library), 1, 2), {"x": (3, 5, 7)}),
    "mlp": Part(lambda library, module, x: module(x, None), {"x": (2, 7, 30)}, LAYER + "mlp."),
    "self_attn": Part(
        lambda library, module, x: module(x, _places(library, x), None), {"x": (2, 7, 30)}, LAYER + "self_attn."
    ),
    "block": Part(lambda library, module, x: module(x, _places(library, x), None), {"x": (2, 7, 30)}, LAYER),
    "cross_entropy": Part(
        lambda library, module, x, head: library.cross_entropy(x, head, _targets(library, 14)),
        {"x": (14, 30), "head": (53, 30)},
    ),
}
CLASSES = {"input_layernorm.": "RMSNorm", "mlp.": "Qwen3MLP", "self_attn.": "Qwen3Attention", "": "Qwen3DecoderLayer"}


def _build(library, part: Part, precision: PrecisionConfig):
    """The part's module, or None for a plain function."""
    if not part.weights:
        return None
    name = CLASSES[part.weights.removeprefix(LAYER)]
    if name == "RMSNorm":
        params = precision.params if library is jax_impl.model else getattr(torch, precision.params)
        return library.RMSNorm(MODEL.hidden_size, MODEL.rms_norm_eps, dtype=params)
    return getattr(library, name)(MODEL, precision, 0)


def _weights(part: Part) -> Arrays:
    weights = random_weights(MODEL)
    return {name: weights[name] for name in weights if part.weights and name.startswith(part.weights)}


def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Normal numbers that bfloat16 holds exactly."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape)).bfloat16().double().numpy()


def _inputs(part: Part) -> Arrays:
    return {name: _normal(shape, seed) for seed, (name, shape) in enumerate(part.inputs.items())}


def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What the gradients are taken with."""
    return _normal(shape, seed=9)


def run_torch(part: Part, precision: PrecisionConfig, inputs: Arrays, weights: Arrays) -> Arrays:
    """The result and the gradient of every input and weight, by name, in torch."""
    compute, params = getattr(torch, precision.compute), getattr(torch, precision.params)
    module = _build(torch_ref.model, part, precision)
    leaves = {name: torch.tensor(x, dtype=compute).requires_grad_() for name, x in inputs.items()}
    parameters = {name: torch.tensor(weight, dtype=params).requires_grad_() for name, weight in weights.items()}
    local = {name.removeprefix(part.weights): weight for name, weight in parameters.items()}
    bound = None if module is None else functools.partial(torch.func.functional_call, module, local)
    call = bound if bound is None else lambda *args: bound(args)
    result = part.call(torch_ref.model, call, **leaves)
    result.backward(torch.tensor(_cotangent(tuple(result.shape)), dtype=result.dtype))
    grads = {f"gradient of {name}": leaf.grad for name, leaf in (leaves | parameters).items()}
    return {name: x.detach().double().numpy() for name, x in {"result": result, **grads}.items()}


def run_jax(part: Part, precision: PrecisionConfig, inputs: Arrays, weights: Arrays) -> Arrays:
    """The same in JAX, jitted."""
    with x64(precision):
        specs = param_specs(MODEL)
        graph = None
        if part.weights:
            graph, _ = nnx.split(nnx.eval_shape(lambda: _build(jax_impl.model, part, precision)))
        leaves = {name: jnp.asarray(x, precision.compute) for name, x in inputs.items()}
        parameters = {name: jnp.asarray(weight, precision.params) for name, weight in weights.items()}

        def call(leaves, parameters):
            paths = {
                flax_path(name.removeprefix(part.weights), specs[name].role): (
                    weight.T if specs[name].role == "matrix" else weight
                )
                for name, weight in parameters.items()
            }
            module = None if graph is None else bind(graph, paths)
            return part.call(jax_impl.model, module, **leaves)

        @jax.jit
        def value_and_grads(leaves, parameters):
            result, pull = jax.vjp(call, leaves, parameters)
            return result, pull(jnp.asarray(_cotangent(result.shape), result.dtype))

        result, grads = value_and_grads(leaves, parameters)
        named = {f"gradient of {name}": grad for tree in grads for name, grad in tree.items()}
        named["result"] = result
        return {name: np.asarray(x.astype(jax_impl.model.accumulator(x.dtype))) for name, x in named.items()}


@functools.cache
def truths_and_kappas(name: str, dtype: str) -> tuple[Arrays, dict[str, float]]:
    if dtype == "float64":
        return truths_and_kappas(name, "float32")
    part = PARTS[name]

    def compute() -> Arrays:
        weights = _weights(part)
        if dtype == "bfloat16":
            weights = {key: rounded(weight) for key, weight in weights.items()}
        return run_torch(part, PRECISIONS["float64"], _inputs(part), weights)

    with rounded_rope_tables():
        return amplification(compute, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", PARTS)
def test_part(name, dtype, record_property):
    part, precision = PARTS[name], PRECISIONS[dtype]
    truths, kappas = truths_and_kappas(name, dtype)
    allowed = allowances(kappas, dtype)
    errors = check_all(run_jax(part, precision, _inputs(part), _weights(part)), truths, allowed.get)
    record_property("largest error over allowance", max(errors[key] / allowed[key] for key in errors if allowed[key]))
    if dtype == "float64":
        return
    reference = run_torch(part, precision, _inputs(part), _weights(part))
    for key, error in errors.items():
        # A loss or a norm's gradient has too few elements for its error to concentrate; test_model.py pools those.
        if truths[key].ndim > 1:
            own = relative_error(reference[key], truths[key])
            assert error <= SAFETY * own, f"{key}: error {error:.3e}, torch_ref's own {own:.3e}"


@pytest.mark.parametrize("head_dim", [4, 6, 64, 128])
def test_rope_tables_are_equal_and_right(head_dim):
    model = dataclasses.replace(MODEL, head_dim=head_dim)
    length = model.max_position_embeddings
    tables = jax_impl.model.rope_table(model, length)
    for ours, theirs in zip(tables, torch_ref.model.rope_table(model, length), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # In long double, by the definition: the pair r of position p turns by p * theta^(-2r/H).
    r, p = np.arange(head_dim // 2, dtype=np.longdouble), np.arange(length, dtype=np.longdouble)
    exponents = -2 * r / head_dim
    angles = p[:, None] * np.longdouble(model.rope_theta) ** exponents
    # float64 rounds the exponent (times log theta), the power, and the product.
    roundings = 2 + np.abs(np.log(model.rope_theta)) + 1
    for table, exact in zip(tables, (np.cos(angles), np.sin(angles)), strict=True):
        assert (np.abs(table - exact) <= (roundings * angles + 1) * np.finfo(np.float64).eps).all()


def test_rope_turns_the_pair_r_and_r_plus_half():
    x = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    x[..., 1] = 1.0
    cos, sin = (torch.tensor(table) for table in torch_ref.model.rope_table(dataclasses.replace(MODEL, head_dim=4), 3))
    turned = torch_ref.model.apply_rope(x, cos, sin)[0, 2, 0]
    assert turned.tolist() == [0.0, cos[2, 1].item(), 0.0, sin[2, 1].item()]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_dropout_masks_are_equal_bit_for_bit(dtype):
    precision, shape = PRECISIONS[dtype], (3, 50, 70)
    with x64(precision):
        ones = jnp.ones(shape, precision.compute)
        ours = jax.jit(lambda x: jax_impl.model.dropout(x, 0.3, jax_random.key(8), 4, 1))(ones)
        ours = np.asarray(ours.astype(jnp.float32))
    theirs = torch_ref.model.dropout(
        torch.ones(shape, dtype=getattr(torch, precision.compute)), 0.3, torch_random.key(8), 4, 1
    )
    assert ((ours == 0.0) == (theirs == 0.0).numpy()).all()
    assert len(np.unique(ours)) == 2 and (ours == 0.0).any()
