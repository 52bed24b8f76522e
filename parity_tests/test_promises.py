"""Precision as it is promised, read from the programs: the jaxpr on one side, the dispatched operations on the other.

In bfloat16 runs, norms, RoPE, softmax, silu, loss, carries of gradients and moments, and the sums of Newton-Schulz are
float32. An allowance that takes every operation to round would hide it if one of them did.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jax_impl.attention
import jax_impl.cache
import jax_impl.generate
import jax_impl.loss
import jax_impl.model
import jax_impl.train
import torch_ref.attention
import torch_ref.cache
import torch_ref.generate
import torch_ref.loss
import torch_ref.model
import torch_ref.train
from jax_impl.muon.newton_schulz import orthogonalize_via_newton_schulz as jax_newton_schulz
from parity_tests.cases import AWKWARD, BFLOAT16, random_tokens, random_weights, run_config
from parity_tests.sides import JaxModel, TorchModel, TorchTraining
from recipe.contract import UNIT_ROUNDOFF
from recipe.params import param_specs
from recipe.sampling import SamplingOptions
from torch_ref.muon.newton_schulz import orthogonalize_via_newton_schulz as torch_newton_schulz

MODEL = dataclasses.replace(AWKWARD, attention_bias=True, tie_word_embeddings=False, dropout=0.1)
L = MODEL.num_hidden_layers
WIDE, NARROW = "float32", "bfloat16"
JAX_MOVES = set(
    """broadcast_in_dim reshape transpose split concatenate pad slice select_n squeeze jit pjit remat2 checkpoint
    custom_vjp_call scan while optimization_barrier gather dynamic_slice scatter copy stop_gradient""".split()
)
TORCH_MOVES = set(
    """scalar_tensor where view t alias permute clone _unsafe_view transpose unsqueeze cat slice squeeze empty copy_
    expand select detach zeros ones masked_fill embedding index empty_like _reshape_alias split stack""".split()
)
"""Operations that compute nothing, and calls whose insides are walked."""
TORCH_KERNELS = {"mm", "bmm", "addmm", "baddbmm", "silu", "silu_backward"}
"""torch's kernels that take bfloat16, compute in float32 and round their result once."""

Ops = collections.Counter[tuple[str, str]]
"""(operation, dtype of its result) -> how often; a cast to bfloat16 is called "rounding", one to float32 "cast"."""


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those inside calls and loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def jax_ops(function: Callable, *args) -> Ops:
    """What the traced function computes."""
    found: Ops = collections.Counter()
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        name = equation.primitive.name
        for out in equation.outvars:
            if not jnp.issubdtype(out.aval.dtype, jnp.floating) or name in JAX_MOVES:
                continue
            if name == "convert_element_type":
                before = str(equation.invars[0].aval.dtype)
                name = "rounding" if (before, str(out.aval.dtype)) == (WIDE, NARROW) else "cast"
            found[name, str(out.aval.dtype)] += 1
    return found


class Recorder(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Ops = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for x in out if isinstance(out, tuple | list) else [out]:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or name in TORCH_MOVES:
                continue
            dtype = str(x.dtype).removeprefix("torch.")
            if name == "_to_copy":
                name = "rounding" if dtype == NARROW and args[0].dtype == torch.float32 else "cast"
            self.found[name, dtype] += 1
        return out


def torch_ops(function: Callable, *args) -> Ops:
    with Recorder() as recorder:
        function(*args)
    return recorder.found


def narrow(found: Ops) -> dict[str, int]:
    """What happens in bfloat16: roundings and arithmetic."""
    return {name: count for (name, dtype), count in found.items() if dtype == NARROW and name != "cast"}


RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 7, 6, 4))
SCALE = 1.0 + 0.3 * RANDOM.standard_normal(4)
ANGLES = RANDOM.uniform(0.0, 6.0, (7, 2))
HIDDEN, HEAD, TARGETS = RANDOM.standard_normal((14, 30)), RANDOM.standard_normal((53, 30)), np.arange(14) % 53
KEYS = RANDOM.standard_normal((2, 7, 2, 4))


def in_jax(x, dtype=NARROW):
    return jnp.asarray(x, dtype)


def in_torch(x, dtype=NARROW):
    return torch.tensor(np.asarray(x)).to(getattr(torch, dtype))


def jax_cached(q, k):
    cache = jax_impl.cache.KVCache([(k.swapaxes(1, 2),) * 2], jnp.array([6, 3]))
    return cache.attend(0, q[:, :1], window=None)


def torch_cached(q, k):
    cache = torch_ref.cache.KVCache([(k.transpose(1, 2),) * 2], torch.tensor([6, 3]))
    return cache.attend(0, q[:, :1], window=None)


def jax_sites() -> dict[str, tuple[Callable, tuple]]:
    """Site -> function and operands, given in bfloat16, so that what is cast on the way in is not counted."""
    x, keys, cos, sin = in_jax(X), in_jax(KEYS), in_jax(np.cos(ANGLES), WIDE), in_jax(np.sin(ANGLES), WIDE)
    return {
        "norm": (lambda x, w: jax_impl.model.rms_norm(x, w, 1e-6), (x, in_jax(SCALE, WIDE))),
        "rope": (jax_impl.model.apply_rope, (x, cos, sin)),
        "swiglu": (jax_impl.model.swiglu, (x, x)),
        "attention": (lambda q, k: jax_impl.attention.attention(q, k, k, window=3), (x, keys)),
        "cached attention": (jax_cached, (x, keys)),
        "losses": (jax_impl.loss.token_losses, (in_jax(HIDDEN), in_jax(HEAD), TARGETS)),
        "Newton-Schulz": (jax_newton_schulz, (in_jax(HEAD, WIDE),)),
    }


def torch_sites() -> dict[str, tuple[Callable, tuple]]:
    """The same of torch."""
    x, keys, cos, sin = in_torch(X), in_torch(KEYS), in_torch(np.cos(ANGLES), WIDE), in_torch(np.sin(ANGLES), WIDE)
    return {
        "norm": (lambda x, w: torch_ref.model.rms_norm(x, w, 1e-6), (x, in_torch(SCALE, WIDE))),
        "rope": (torch_ref.model.apply_rope, (x, cos, sin)),
        "swiglu": (torch_ref.model.swiglu, (x, x)),
        "attention": (lambda q, k: torch_ref.attention.attention(q, k, k, window=3), (x, keys)),
        "cached attention": (torch_cached, (x, keys)),
        "losses": (torch_ref.loss.token_losses, (in_torch(HIDDEN), in_torch(HEAD), torch.tensor(TARGETS))),
        "Newton-Schulz": (torch_newton_schulz, (in_torch(HEAD, WIDE),)),
    }


# Site -> what JAX does in bfloat16, what torch does. torch rounds products to bfloat16 first where JAX asks for float32
# (docs/parity.md). Of Newton-Schulz JAX's loop is walked once: A, B and X are each rounded once.
PROMISED = {
    "norm": ({"rounding": 1}, {"rounding": 1}),
    "rope": ({"rounding": 1}, {"rounding": 1}),
    "swiglu": ({"rounding": 1, "mul": 1}, {"silu": 1, "mul": 1}),
    "attention": ({"rounding": 2}, {"bmm": 2, "rounding": 1}),
    "cached attention": ({"rounding": 2}, {"bmm": 2, "rounding": 1}),
    "losses": ({}, {"mm": 1}),
    "Newton-Schulz": ({"rounding": 1 + 3}, {"rounding": 1, "bmm": 5, "baddbmm": 10}),
}


@pytest.mark.parametrize("side", ["jax", "torch"])
@pytest.mark.parametrize("site", PROMISED)
def test_a_site_rounds_as_often_as_is_promised(site, side):
    if side == "jax":
        function, operands = jax_sites()[site]
        assert narrow(jax_ops(function, *operands)) == PROMISED[site][0]
    else:
        function, operands = torch_sites()[site]
        assert narrow(torch_ops(function, *operands)) == PROMISED[site][1]


def jax_loss(precision=BFLOAT16):
    side = JaxModel(MODEL, precision, random_weights(MODEL))
    inputs, targets = random_tokens(MODEL, 2, 7), random_tokens(MODEL, 2, 7, seed=2)
    key = jax_impl.model.random.key(0)
    return (
        lambda params: jax_impl.weights.bind(side.graph, params).loss(inputs, targets, dropout_key=key)
    ), side.params


def test_the_whole_forward_pass_in_jax_computes_in_float32_but_for_residuals_and_gates():
    found = narrow(jax_ops(*jax_loss()))
    del found["rounding"]
    assert found == {"add": 2 * L, "mul": L}


def test_the_whole_backward_pass_in_jax_computes_in_float32_but_for_gates_and_sums_of_cotangents():
    function, params = jax_loss()
    found = narrow(jax_ops(jax.grad(function), params))
    assert set(found) == {"rounding", "add", "mul", "add_any"}
    # The gate's product, and a product for the gradient of each of its factors.
    assert found["add"] == 2 * L and found["mul"] == 3 * L


def test_the_whole_pass_in_torch_computes_in_float32_but_for_residuals_and_gates():
    side = TorchModel(MODEL, BFLOAT16, random_weights(MODEL))
    inputs, targets = (torch.tensor(random_tokens(MODEL, 2, 7, seed=seed)).long() for seed in (1, 2))
    with Recorder() as forward:
        loss = side.module.loss(inputs, targets, dropout_key=torch_ref.model.random.key(0))
    with Recorder() as backward:
        loss.backward()
    found = {name: n for name, n in narrow(forward.found).items() if name not in TORCH_KERNELS | {"rounding"}}
    assert found == {"add": 2 * L, "mul": L}
    found = {name: n for name, n in narrow(backward.found).items() if name not in TORCH_KERNELS | {"rounding"}}
    # Four biases a block are summed over tokens by torch's kernel, which accumulates in float32.
    assert set(found) == {"add", "mul", "sum"} and found["mul"] == 2 * L and found["sum"] == 4 * L


def test_gradients_moments_and_losses_are_carried_in_float32():
    config = run_config(MODEL, BFLOAT16)
    state = jax_impl.train.init_state(config, random_weights(MODEL))
    inputs, targets = (random_tokens(MODEL, 3, 2, 7, seed=seed) for seed in (1, 2))
    traced = jax_impl.train.make_train_step(config).__wrapped__.trace(state, inputs, targets)
    scans = [e for e in equations(traced.jaxpr.jaxpr) if e.primitive.name == "scan"]
    (over_batches,) = [scan for scan in scans if scan.params["length"] == 3 and scan.params["num_carry"] > 2]
    carried = [v.aval.dtype.name for v in over_batches.outvars[: over_batches.params["num_carry"]]]
    assert len(carried) == len(state.params) + 1 and set(carried) == {WIDE}
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {WIDE}
    training = TorchTraining(config, random_weights(MODEL))
    training.step(inputs, targets)
    parameters = dict(training.state.model.named_parameters())
    kept = [x for half in (training.state.optimizer.muon, training.state.optimizer.adamw) for s in half.state.values()
            for x in s.values()]  # fmt: skip
    assert {x.dtype for x in [*parameters.values(), *(p.grad for p in parameters.values()), *kept]} == {torch.float32}


def test_the_updates_arithmetic_in_jax_has_no_bfloat16_outside_newton_schulz():
    for newton_schulz in (WIDE, NARROW):
        config = run_config(MODEL, dataclasses.replace(BFLOAT16, newton_schulz=newton_schulz))
        optimizer = jax_impl.train.make_optimizer(config)
        state = jax_impl.train.init_state(config, random_weights(MODEL))
        found = narrow(jax_ops(lambda *args, o=optimizer: o.update(*args), state.params, state.opt_state, state.params))
        assert set(found) == ({"rounding"} if newton_schulz == NARROW else set())


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_rotary_tables_and_logits_are_float32(side, monkeypatch):
    module, tables = (jax_impl.model, []) if side == "jax" else (torch_ref.model, [])
    original = module.apply_rope
    monkeypatch.setattr(module, "apply_rope", lambda x, *angles: tables.extend(angles) or original(x, *angles))
    logits = (JaxModel if side == "jax" else TorchModel)(MODEL, BFLOAT16, random_weights(MODEL)).logits(
        random_tokens(MODEL, 1, 5)
    )
    assert logits.dtype == np.float32 and len(tables) == 4 * L
    assert {str(table.dtype).removeprefix("torch.") for table in tables} == {WIDE}


def test_generation_holds_its_matrices_rounded_and_its_norms_not():
    """In bfloat16 both halves write; a CPU keeps JAX's rounded values in float32 (`jax_impl/backend.py`)."""
    model = dataclasses.replace(MODEL, dropout=0.0)
    weights, precision = random_weights(model), dataclasses.replace(BFLOAT16, params="float32")
    held_torch = dict(torch_ref.generate.held_model(weights, model, precision, "cpu").named_parameters())
    held_jax = jax_impl.generate.held_params(weights, model, precision)
    for name, (_, role) in param_specs(model).items():
        is_rounded = role in ("matrix", "embedding", "head")
        assert held_torch[name].dtype == (torch.bfloat16 if is_rounded else torch.float32), name
        expected = weights[name].astype(NARROW if is_rounded else WIDE).astype(np.float64)
        np.testing.assert_array_equal(values_of(held_torch[name].detach()), expected, err_msg=name)
        np.testing.assert_array_equal(values_of(held_jax[name]), expected, err_msg=name)
    for module in (jax_impl.generate, torch_ref.generate):
        tokens = list(module.make_generator(model, precision, weights)([1, 2, 3], SamplingOptions(max_new_tokens=4)))
        assert len(tokens) == 4


def one_rounding(value: np.ndarray, truth: np.ndarray, scale: np.ndarray, operations: int) -> np.ndarray:
    """Error element by element over what one rounding to bfloat16 of a float32 result may have.

    The float32 result is off by `operations` roundings relative to `scale`, the sum of the magnitudes that were added.
    """
    before = operations * UNIT_ROUNDOFF[WIDE] * scale
    allowed = UNIT_ROUNDOFF[NARROW] * (np.abs(truth) + before) + before
    error = np.abs(value - truth)
    assert not error[allowed == 0.0].any(), "zeros are exact"
    return error / np.where(allowed == 0.0, 1.0, allowed)


def values_of(x) -> np.ndarray:
    return np.asarray(x.float() if isinstance(x, torch.Tensor) else x, np.float64)


@pytest.mark.parametrize("side", ["jax", "torch"])
@pytest.mark.parametrize("site", ["norm", "rope", "silu", "probabilities"])
def test_where_one_rounding_is_promised_no_element_has_two(site, side, record_property):
    model, to = (jax_impl.model, in_jax) if side == "jax" else (torch_ref.model, in_torch)
    x = np.random.default_rng(3).standard_normal((4, 50, 6, 16))
    given = values_of(to(x))
    if site == "norm":
        scale = values_of(to(1.0 + 0.3 * RANDOM.standard_normal(16), WIDE))
        value = model.rms_norm(to(x), to(scale, WIDE), 1e-6)
        truth = given / np.sqrt(np.mean(given**2, axis=-1, keepdims=True) + 1e-6) * scale
        # A sum of squares of 16, all of one sign, a mean, a root, two products.
        share = one_rounding(values_of(value), truth, np.abs(truth), 16 + 6)
    elif site == "rope":
        angles = RANDOM.uniform(0.0, 6.0, (50, 8))
        cos, sin = (values_of(to(f(angles), WIDE)) for f in (np.cos, np.sin))
        value = model.apply_rope(to(x), to(cos, WIDE), to(sin, WIDE))
        a, b, c, s = given[..., :8], given[..., 8:], cos[:, None], sin[:, None]
        truth = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
        magnitude = np.concatenate([np.abs(a * c) + np.abs(b * s), np.abs(b * c) + np.abs(a * s)], axis=-1)
        share = one_rounding(values_of(value), truth, magnitude, 2)
    elif site == "silu":
        value = model.swiglu(to(x), to(np.ones_like(x)))  # a product with one rounds nothing
        truth = given / (1.0 + np.exp(-given))
        # The exponential to two units, its sum, a division, a product; its argument is exact.
        share = one_rounding(values_of(value), truth, np.abs(truth), 8)
    else:
        # Keys are rows of the identity, so the values that come out are the probabilities, summed with zeros.
        q = to(4.0 * x[:1, :16, :1])
        k, v = to(np.eye(16)[None, :, None]), to(np.eye(16)[None, :, None])
        attention = (jax_impl.attention if side == "jax" else torch_ref.attention).attention
        value = values_of(attention(q, k, v, window=None))[0, :, 0]
        scores = np.where(np.tril(np.ones((16, 16))) > 0, values_of(q)[0, :, 0] / math.sqrt(16), -np.inf)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        truth = powers / powers.sum(axis=-1, keepdims=True)
        # Scores up to 4 in magnitude: a rounding of their difference is 8 relative to the exponential; 16 terms.
        share = one_rounding(value, truth, np.abs(truth), 16 + 16)
    record_property("error over allowance", float(share.max()))
    assert share.max() <= 1.0
    assert share.max() > 0.5, "some element comes close to half a unit, or nothing was rounded here"
