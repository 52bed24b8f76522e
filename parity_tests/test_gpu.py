"""On a GPU: both sides against the float64 truth on the CPU, at the allowances of the other tests.

float32 runs with true float32 products (matmul "highest", no TF32). Without a GPU every test here is skipped;
PARITY_DEVICE=cpu runs the same code on the CPU, which shows that it runs and nothing about a GPU.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.attention
import jax_impl.muon
import torch_ref.attention
import torch_ref.muon
from jax_impl.attention_kernel import tiles_of
from parity_tests import test_attention_kernel, test_model, test_muon, test_newton_schulz, test_training
from parity_tests.cases import BFLOAT16, FLOAT32, PRECISIONS, random_weights
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import SAFETY, check, check_all, relative_error
from parity_tests.newton_schulz_error import allowance, newton_schulz
from parity_tests.sides import JaxModel, JaxTraining, TorchModel, TorchTraining
from recipe.config import PrecisionConfig
from recipe.contract import UNIT_ROUNDOFF

pytestmark = pytest.mark.gpu
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", autouse=True)
def device() -> str:
    """torch's name of the device; skips where JAX or torch has no GPU."""
    if os.environ.get("PARITY_DEVICE") == "cpu":
        return "cpu"
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        pytest.skip(f"needs a GPU in both: JAX has {jax.default_backend()}, torch CUDA: {torch.cuda.is_available()}")
    assert not torch.backends.cuda.matmul.allow_tf32
    return "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "long-window", "everything-shallow"])
def test_logits_loss_and_every_gradient(device, name, dtype, record_property):
    case = test_model.CASES[name]
    truths, kappas = test_model.truths_and_kappas(case, dtype)
    limits = allowances(kappas, dtype)
    sides = {
        "jax": JaxModel(case.model, PRECISIONS[dtype], case.weights),
        "torch": TorchModel(case.model, PRECISIONS[dtype], case.weights, device),
    }
    errors = {}
    for side_name, side in sides.items():
        values = {"logits": side.logits(case.inputs), **test_model.measure(side, case)}
        errors[side_name] = check_all(values, truths, limits.get)
        share = max(errors[side_name][each] / limits[each] for each in limits)
        record_property(f"{side_name}, largest error over allowance", share)
    together = {side: np.linalg.norm(list(its.values())) for side, its in errors.items()}
    assert together["jax"] <= SAFETY * together["torch"], "no worse than the reference's own error"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", test_newton_schulz.SHAPES, ids=str)
def test_one_newton_schulz(device, shape, dtype):
    x = test_newton_schulz.matrix(shape)
    truth, limit = newton_schulz(x), allowance(x, dtype)
    on_device = torch.tensor(x, dtype=torch.float32, device=device)
    values = {
        "jax": test_newton_schulz.on_jax(x, dtype),
        "torch": torch_ref.muon.orthogonalize_via_newton_schulz(on_device, dtype=getattr(torch, dtype)).double().cpu(),
    }
    errors = {side: check(f"{side} {dtype}", value, truth, limit) for side, value in values.items()}
    assert errors["jax"] <= SAFETY * errors["torch"], "no worse than the reference's own error"


@pytest.mark.parametrize("dtype", DTYPES)
def test_muon_updates(device, dtype):
    grads = test_muon.gradients(1.0)
    truth, _ = test_muon.run_torch(grads, torch.float64, ns_dtype=torch.float64)
    ours = jax_impl.muon.muon(test_muon.LEARNING_RATE, ns_dtype=jnp.dtype(dtype))
    from_jax, _ = test_muon.run_optax(ours, grads, jnp.float32)
    params = {name: torch.nn.Parameter(torch.ones(shape, device=device)) for name, shape in test_muon.SHAPES.items()}
    muon = torch_ref.muon.Muon(params.values(), lr=test_muon.LEARNING_RATE, ns_dtype=getattr(torch, dtype))
    for step in grads:
        for name, parameter in params.items():
            parameter.grad = torch.tensor(step[name], dtype=torch.float32, device=device)
        muon.step()
    from_torch = [{name: parameter.detach().double().cpu().numpy() for name, parameter in params.items()}]
    for name in test_muon.SHAPES:
        expected, limit = test_muon.moved(truth)[-1][name], test_muon.limit(grads, name, dtype)
        error = check(f"jax {name}", test_muon.moved(from_jax)[-1][name], expected, limit)
        reference = check(f"torch {name}", test_muon.moved(from_torch)[-1][name], expected, limit)
        assert error <= SAFETY * reference, "no worse than the reference's own error"


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=DTYPES)
def test_ten_updates(device, precision, record_property):
    """Dropout, accumulation, clip, both optimizers and schedule: metrics, weights and slots after every update."""
    config, weights = test_training.config(precision), random_weights(test_training.MODEL)
    drift = {}
    for side, training in (("jax", JaxTraining(config, weights)), ("torch", TorchTraining(config, weights, device))):
        history, truth = test_training.record(training), test_training.truth()
        share = test_training.compare(history, truth, UNIT_ROUNDOFF[precision.compute])
        record_property(f"{side}, largest share of the allowance", share)
        squares = [relative_error(e[name], t[name]) ** 2 for e, t in zip(history, truth, strict=True) for name in t]
        drift[side] = np.sqrt(np.mean(squares))
    assert drift["jax"] <= SAFETY * drift["torch"]


# Rows, tokens, query heads, key/value heads, head_dim, window: the seed's heads, Qwen3's, and a window.
ATTENTION = {"seed": (2, 200, 8, 4, 48, None), "qwen3": (1, 200, 4, 2, 128, None), "window": (2, 200, 4, 2, 64, 60)}


@pytest.mark.parametrize("name", ATTENTION)
def test_fused_attention(device, name, record_property):
    """bfloat16 output and gradients of explicit, cuDNN's and torch's attention, within what rounding makes."""
    B, T, N, K, H, window = ATTENTION[name]
    generator = np.random.default_rng(4)
    shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H), "out_grad": (B, T, N, H)}
    # Exact in bfloat16, so that only the computation rounds.
    arrays = {
        key: np.asarray(jnp.asarray(generator.standard_normal(shape), jnp.bfloat16), np.float64)
        for key, shape in shapes.items()
    }

    def on_torch(forward, dtype: torch.dtype, where: str) -> dict[str, np.ndarray]:
        heads = [torch.tensor(arrays[key], dtype=dtype, device=where, requires_grad=True) for key in "qkv"]
        out = forward(*heads, window=window)
        grads = torch.autograd.grad(out, heads, torch.tensor(arrays["out_grad"], dtype=dtype, device=where))
        return {key: x.detach().double().cpu().numpy() for key, x in zip(("out", *"qkv"), (out, *grads), strict=True)}

    def on_jax(forward) -> dict[str, np.ndarray]:
        heads = [jnp.asarray(arrays[key], jnp.bfloat16) for key in "qkv"]
        out, pull_back = jax.vjp(functools.partial(forward, window=window), *heads)
        grads = pull_back(jnp.asarray(arrays["out_grad"], jnp.bfloat16))
        return {key: np.asarray(x, np.float64) for key, x in zip(("out", *"qkv"), (out, *grads), strict=True)}

    truths, kappas = amplification(lambda: on_torch(torch_ref.attention.attention, torch.float64, "cpu"), "bfloat16")
    limits = allowances(kappas, "bfloat16")
    results = {
        "jax explicit": on_jax(jax_impl.attention.attention),
        "torch explicit": on_torch(torch_ref.attention.attention, torch.bfloat16, device),
        "torch SDPA": on_torch(torch_ref.attention.fused_attention, torch.bfloat16, device),
    }
    if not jax_impl.attention.why_not_fused(PrecisionConfig(compute="bfloat16"), 0.0):
        results["jax cuDNN"] = on_jax(jax_impl.attention.fused_attention)
    for kind, values in results.items():
        shares = {key: check(f"{kind} {key}", values[key], truths[key], limits[key]) / limits[key] for key in truths}
        record_property(f"{kind}, largest error over allowance", max(shares.values()))


@pytest.mark.parametrize("name", test_attention_kernel.CASES)
def test_attention_with_dropout(device, name, record_property):
    """Our kernels' bfloat16 output and gradients."""
    share = test_attention_kernel.check_in_bfloat16(name, interpret=device == "cpu")
    record_property("largest error over allowance", share)


@pytest.mark.parametrize("keeps_masks", [True, False], ids=["masks kept", "masks made again"])
def test_attention_drops_what_the_definition_says(device, keeps_masks):
    tiles = tiles_of(test_attention_kernel.BITS.H)
    test_attention_kernel.check_bits(tiles, interpret=device == "cpu", keeps_masks=keeps_masks)


def test_fused_and_explicit_attention_train_alike(device):
    """Logits, loss and gradients in bfloat16 through either path, each within the allowance of the explicit one."""
    model = dataclasses.replace(test_model.CASES["long"].model, head_dim=16)
    case = test_model.Case(model, rows=1, length=200)
    truths, kappas = test_model.truths_and_kappas(case, "bfloat16")
    limits = allowances(kappas, "bfloat16")
    for attention in ("explicit", "fused"):
        precision = dataclasses.replace(BFLOAT16, attention=attention)
        sides = JaxModel(model, precision, case.weights), TorchModel(model, precision, case.weights, device)
        for side in sides:
            values = {"logits": side.logits(case.inputs), **test_model.measure(side, case)}
            check_all(values, truths, limits.get)
