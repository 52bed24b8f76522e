"""The hybrid optimizer: who gets which parameter, who decays, and the same update on both sides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.hybrid
import jax_impl.weights
import torch_ref.hybrid
import torch_ref.weights
from parity_tests.cases import FLOAT64, VARIANTS, random_weights
from parity_tests.compare.tolerance import SAFETY, check
from parity_tests.newton_schulz_error import allowance
from recipe.config import AdamWConfig, MuonConfig
from recipe.contract import UNIT_ROUNDOFF
from recipe.params import param_counts, param_specs
from recipe.presets import get_preset

STEPS = 6
MODELS = {name: VARIANTS[name] for name in ("plain", "square", "everything")}


def by_label(model) -> dict[str, set[str]]:
    """Hugging Face names under each optimizer of jax_impl."""
    abstract = {
        jax_impl.weights.flax_path(name, spec.role): jax.ShapeDtypeStruct(spec.shape, jnp.float32)
        for name, spec in param_specs(model).items()
    }
    labels: dict[str, set[str]] = {"muon": set(), "adamw": set()}
    for path, leaf in abstract.items():
        is_matrix = jax_impl.hybrid.qwen_matrices(path, leaf, model=model) is not None
        labels["muon" if is_matrix else "adamw"].add(jax_impl.weights.hf_name(path))
    return labels


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_has_one_optimizer_and_the_same_in_both(name):
    model = MODELS[name]
    labels = by_label(model)
    assert labels["muon"] | labels["adamw"] == set(param_specs(model)) and not labels["muon"] & labels["adamw"]
    module = torch_ref.weights.from_hf(random_weights(model), model, FLOAT64)
    hybrid = torch_ref.hybrid.MuonWithAdamW(module, MuonConfig(), AdamWConfig())
    names = {parameter: its for its, parameter in module.named_parameters()}
    for label, optimizer in (("muon", hybrid.muon), ("adamw", hybrid.adamw)):
        theirs = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(theirs) == sorted(labels[label])
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    expected = {its for its in param_specs(model) if its.endswith(tuple(f"{p}.weight" for p in projections))}
    assert labels["muon"] == expected


def test_the_seed_model_is_divided_as_in_the_notebook():
    model = get_preset("seed").model
    assert param_counts(model) == (32_150_976, 13_271_040, 18_879_936)
    assert len(by_label(model)["muon"]) == 42


class Update:
    """Both hybrids on the same weights and gradients, in float64, after STEPS updates."""

    def __init__(self, model, adamw: AdamWConfig, muon: MuonConfig) -> None:
        self.weights = random_weights(model)
        generator = np.random.default_rng(11)
        grads = [{n: generator.standard_normal(w.shape) for n, w in self.weights.items()} for _ in range(STEPS)]
        self.grads = grads
        factors = np.linspace(0.5, 1.0, STEPS)
        with jax.enable_x64(True):
            params = jax_impl.weights.from_hf(self.weights, model, FLOAT64)
            hybrid = jax_impl.hybrid.muon_with_adamw(
                muon, adamw, model, schedule=lambda count: jnp.asarray(factors)[count], ns_dtype=jnp.float64
            )
            state, update = hybrid.init(params), jax.jit(hybrid.update)
            for step in grads:
                updates, state = update(jax_impl.weights.from_hf(step, model, FLOAT64), state, params)
                params = jax.tree.map(jnp.add, params, updates)
            self.jax = jax_impl.weights.to_hf(params)
            self.jax_slots = jax_impl.weights.optimizer_slots(state)
        module = torch_ref.weights.from_hf(self.weights, model, FLOAT64)
        optimizer = torch_ref.hybrid.MuonWithAdamW(module, muon, adamw, ns_dtype=torch.float64)
        for step, factor in zip(grads, factors, strict=True):
            for name, parameter in module.named_parameters():
                parameter.grad = torch.tensor(step[name])
            optimizer.step(factor)
        self.torch = torch_ref.weights.to_hf(dict(module.named_parameters()))
        self.torch_slots = torch_ref.weights.optimizer_slots(optimizer)


@pytest.fixture(scope="module", params=["plain", "square", "everything", "decay"])
def update(request):
    adamw, muon = AdamWConfig(learning_rate=0.01), MuonConfig(learning_rate=0.02)
    if request.param == "decay":
        adamw = dataclasses.replace(adamw, decay_norms=True)
        return Update(MODELS["everything"], adamw, dataclasses.replace(muon, weight_decay=0.1))
    return Update(MODELS[request.param], adamw, muon)


def test_updates_are_equal(update):
    u = UNIT_ROUNDOFF["float64"]
    for name in update.jax:
        moved, reference = update.jax[name] - update.weights[name], update.torch[name] - update.weights[name]
        # Each weight is rounded once a step, at its own size; the way it went is smaller by this much.
        cancellation = np.linalg.norm(update.weights[name]) / np.linalg.norm(reference)
        kappa = STEPS * (1 + cancellation)
        if update.weights[name].ndim == 2 and "embed" not in name and "lm_head" not in name:
            kappa += max(allowance(step[name], "float64") for step in update.grads) / u
        else:
            # AdamW divides by a root of sums of squares: a dozen roundings a step, none of them amplified.
            kappa += 12
        check(name, moved, reference, SAFETY * kappa * u)


def test_slots_are_equal(update):
    assert update.jax_slots.keys() == update.torch_slots.keys() == {"mu", "exp_avg", "exp_avg_sq"}
    for slot, arrays in update.torch_slots.items():
        assert arrays.keys() == update.jax_slots[slot].keys()
        for name, array in arrays.items():
            # Averages of STEPS gradients: a product and a sum a step; cancellation between gradients is below ten.
            check(f"{slot} {name}", update.jax_slots[slot][name], array, 10 * STEPS * UNIT_ROUNDOFF["float64"])


@pytest.mark.parametrize("decay_norms", [False, True])
def test_norms_decay_only_if_asked(decay_norms):
    """With zero gradients AdamW moves nothing but what it decays."""
    model = MODELS["everything"]
    weights = random_weights(model)
    adamw = AdamWConfig(learning_rate=0.5, weight_decay=0.1, decay_norms=decay_norms)
    params = jax_impl.weights.from_hf(weights, model, dataclasses.replace(FLOAT64, params="float32", compute="float32"))
    hybrid = jax_impl.hybrid.muon_with_adamw(MuonConfig(), adamw, model, schedule=lambda count: 1.0)
    updates, _ = hybrid.update(jax.tree.map(jnp.zeros_like, params), hybrid.init(params), params)
    module = torch_ref.weights.from_hf(weights, model, FLOAT64)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch_ref.hybrid.MuonWithAdamW(module, MuonConfig(), adamw).step(1.0)
    after = torch_ref.weights.to_hf(dict(module.named_parameters()))
    for name, spec in param_specs(model).items():
        decays = spec.role in ("embedding", "head") or (decay_norms and spec.role in ("norm", "bias"))
        moved = jax_impl.weights.to_hf(updates)[name]
        assert bool(np.any(moved)) == decays == bool(np.any(after[name] != weights[name])), name


def test_one_clip_over_all_parameters():
    """Torch's rule, norm + 1e-6, and the same on both sides; a norm below the limit changes nothing."""
    generator = np.random.default_rng(0)
    arrays = {"a": generator.standard_normal((5, 7)), "b": generator.standard_normal(11)}
    norm = float(np.sqrt(sum(np.sum(x * x) for x in arrays.values())))
    for limit in (0.5, 2 * norm):
        expected = min(1.0, limit / (norm + 1e-6))
        with jax.enable_x64(True):
            clipped, jax_norm = jax_impl.hybrid.clip_by_global_norm(jax.tree.map(jnp.asarray, arrays), limit)
        tensors = {name: torch.tensor(x) for name, x in arrays.items()}
        torch_norm = torch_ref.hybrid.clip_by_global_norm(list(tensors.values()), limit)
        oracle = {name: torch.nn.Parameter(torch.zeros(x.shape).double()) for name, x in arrays.items()}
        for name, parameter in oracle.items():
            parameter.grad = torch.tensor(arrays[name])
        torch.nn.utils.clip_grad_norm_(oracle.values(), limit)
        bound = 8 * UNIT_ROUNDOFF["float64"]  # sum of squares (pairwise), root, quotient, product
        for name, x in arrays.items():
            check(f"jax {name}", clipped[name], expected * x, bound)
            check(f"torch {name}", tensors[name].numpy(), expected * x, bound)
            check(f"clip_grad_norm_ {name}", oracle[name].grad.numpy(), expected * x, bound)
        check("norm", np.array(jax_norm), np.array(norm), bound)
        check("norm", np.array(torch_norm.item()), np.array(norm), bound)
