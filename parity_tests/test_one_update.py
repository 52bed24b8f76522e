"""Both halves against the third opinion, `one_update.py`: whole updates with no field at its default.

How far two correct programs may part is measured by Monte-Carlo arithmetic on torch_ref, as everywhere.
"""

import ast
import dataclasses
import functools
import inspect
import math

import numpy as np
import pytest

import jax_impl.train
import torch_ref.train
from harness.cli import leaves
from parity_tests import one_update
from parity_tests.cases import FLOAT32, FLOAT64, random_tokens, random_weights
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import check, check_all
from parity_tests.one_update import State
from parity_tests.sides import JaxTraining, TorchModel, TorchTraining
from parity_tests.test_training import make_final_norm_infinite, restore_final_norm
from recipe.config import AdamWConfig, ModelConfig, MuonConfig, RunConfig, ScheduleConfig

# No two sizes alike, so that no swapped axis survives; a few hundred parameters, because each costs a forward pass.
MODEL = ModelConfig(
    vocab_size=7, hidden_size=5, intermediate_size=6, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
    head_dim=4, max_position_embeddings=200, rope_theta=30.0, rms_norm_eps=1e-2, tie_word_embeddings=False,
    attention_bias=True, qk_norm=False, sliding_window=2, max_window_layers=1, initializer_range=0.3, dropout=0.2,
)  # fmt: skip
# One update of warm-up, one at the peak, one on the cosine.
RUN = RunConfig(
    steps=5,
    accumulation=2,
    batch_size=2,
    sequence_length=4,
    clip_norm=0.3,
    seed=5,
    model=MODEL,
    muon=MuonConfig(learning_rate=0.03, beta=0.8, nesterov=False, ns_steps=3, eps=1e-2, weight_decay=0.2),
    adamw=AdamWConfig(learning_rate=0.02, beta1=0.7, beta2=0.9, eps=1e-4, weight_decay=0.3, decay_norms=True),
    schedule=ScheduleConfig(warmup_fraction=0.15, final_factor=0.25),
    precision=FLOAT64,
)
RUNS = {
    "no-default": RUN,
    # The other value of every switch, and a clip that lets most gradients through.
    "switches": dataclasses.replace(
        RUN,
        clip_norm=30.0,
        model=dataclasses.replace(
            MODEL,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            qk_norm=True,
            sliding_window=None,
            dropout=0.0,
        ),
        muon=dataclasses.replace(RUN.muon, nesterov=True, ns_steps=4),
        adamw=dataclasses.replace(RUN.adamw, decay_norms=False),
    ),
}
UPDATES = 3
SIDES = {"jax": JaxTraining, "torch": TorchTraining}
ELSEWHERE = {
    "initializer_range": "recipe/params.py draws the weights, these are given",
    "max_position_embeddings": "only a limit",
}
"""Fields of the model that no update reads."""


def batches(run: RunConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    shape = run.accumulation, run.batch_size, run.sequence_length
    return [
        tuple(random_tokens(run.model, *shape, seed=2 * step + which) for which in (1, 2)) for step in range(UPDATES)
    ]


def begin(run: RunConfig) -> State:
    weights = random_weights(run.model)
    matrices = [name for name in weights if name.endswith("_proj.weight")]
    slots = {("mu", name): np.zeros_like(weights[name]) for name in matrices}
    for slot in ("exp_avg", "exp_avg_sq"):
        slots |= {(slot, name): np.zeros_like(w) for name, w in weights.items() if name not in matrices}
    return State(weights, slots)


def flat(step: int, metrics: dict, weights: dict, slots: dict) -> dict[str, np.ndarray]:
    named = {f"{slot} {name}": array for (slot, name), array in slots.items()}
    return {f"{step} {name}": np.asarray(value) for name, value in (metrics | weights | named).items()}


def record(side: type, run: RunConfig, made=batches) -> dict[str, np.ndarray]:
    """Metrics, weights and slots after every update of one of the halves, on the batches that `made(run)` makes."""
    training, history = side(run, random_weights(run.model)), {}
    for step, batch in enumerate(made(run)):
        metrics = training.step(*batch)
        slots = {(slot, name): a for slot, arrays in training.slots().items() for name, a in arrays.items()}
        history |= flat(step, metrics, training.weights(), slots)
    return history


@functools.cache
def third(name: str, made=batches) -> dict[str, np.ndarray]:
    state, history = begin(RUNS[name]), {}
    for step, batch in enumerate(made(RUNS[name])):
        state, metrics = one_update.one_update(RUNS[name], state, *batch)
        history |= flat(step, metrics, state.weights, state.slots)
    return history


@functools.cache
def allowed(name: str, made=batches) -> dict[str, float]:
    kappas = amplification(lambda: record(TorchTraining, RUNS[name], made))[1]
    # What no operation of torch's makes, the rate and the counts, is one product of two numbers at most.
    return allowances({key: max(1.0, kappa) for key, kappa in kappas.items()}, "float64")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("side", SIDES)
def test_whole_updates_equal_the_third_opinion(side, name):
    check_all(record(SIDES[side], RUNS[name]), third(name), allowed(name).get)


def test_no_field_that_an_update_reads_is_at_its_default():
    default = RunConfig()
    for name, _, value in leaves(RunConfig, default):
        part, _, field = name.rpartition(".")
        if part in ("model", "muon", "adamw", "schedule") and field not in ELSEWHERE:
            chosen = functools.reduce(getattr, name.split("."), RUN)
            assert chosen != value, f"{name} is {value} here too"
    for field in ("steps", "accumulation", "batch_size", "sequence_length", "clip_norm", "seed"):
        assert getattr(RUN, field) != getattr(default, field), field


@pytest.mark.parametrize("side", SIDES)
def test_an_infinite_gradient_of_a_finite_loss_changes_nothing_but_the_count(side):
    """A first norm of 1e200 over embeddings of zero: its output is zero, its derivative is not."""
    run = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, attention_bias=False))
    weights = random_weights(run.model)
    weights["model.embed_tokens.weight"][:] = 0.0
    weights["model.layers.0.input_layernorm.weight"][:] = 1e200
    batch = batches(run)[0]
    training = SIDES[side](run, weights)
    metrics = training.step(*batch)
    # The logits are zero exactly, so the loss is log V to the rounding of a logarithm and a sum of V ones.
    check("loss", metrics["loss"], math.log(run.model.vocab_size), 4 * run.model.vocab_size * 2.0**-53)
    assert not math.isfinite(metrics["grad_norm"]) and training.counts() == (0, 1)
    for name, weight in training.weights().items():
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)
    assert not any(np.any(array) for arrays in training.slots().values() for array in arrays.values())


@pytest.mark.parametrize("window", [None, 100])
def test_masks_of_two_blocks_of_queries(window):
    """One forward pass over more than a block of 128 queries; JAX is held against torch at any length elsewhere."""
    model = dataclasses.replace(MODEL, num_hidden_layers=1, max_window_layers=0, sliding_window=window, dropout=0.3)
    weights, tokens = random_weights(model), random_tokens(model, 1, 151)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def ours():
        side = TorchModel(model, FLOAT64, weights)
        return {"loss": np.array(side.loss_and_grads(inputs, targets, dropout_seed=9)[0])}

    theirs = one_update.loss(model, weights, inputs, targets, one_update.folded((0, 9))).real
    limit = allowances(amplification(ours)[1], "float64")["loss"]
    check("loss", ours()["loss"], theirs, limit)


@pytest.mark.parametrize("side", SIDES)
def test_after_a_skipped_update_masks_go_on_and_schedule_and_moments_stay(side):
    first, batch = batches(RUN)[:2]
    state = begin(RUN)

    def after():
        training = SIDES[side](RUN, random_weights(MODEL))
        old = make_final_norm_infinite(training)
        assert not math.isfinite(training.step(*first)["grad_norm"])
        restore_final_norm(training, old)
        metrics = training.step(*batch)
        slots = {(slot, name): a for slot, arrays in training.slots().items() for name, a in arrays.items()}
        return flat(0, metrics, training.weights(), slots)

    state, metrics = one_update.one_update(RUN, state._replace(skipped=1), *batch)
    # The first of the three updates that the allowances were measured for.
    first_update = {name: limit for name, limit in allowed("no-default").items() if name.startswith("0 ")}
    check_all(after(), flat(0, metrics, state.weights, state.slots), first_update.get)


@pytest.mark.parametrize("trainer", [jax_impl.train.Trainer, torch_ref.train.Trainer])
def test_an_evaluation_is_the_mean_over_tokens(trainer):
    model = dataclasses.replace(MODEL, dropout=0.0)
    run = dataclasses.replace(RUN, model=model, precision=FLOAT32)
    weights = random_weights(model)
    rows = [(random_tokens(model, n, 4, seed=n), random_tokens(model, n, 4, seed=n + 9)) for n in (3, 1)]
    losses = [one_update.loss(model, weights, *batch).real for batch in rows]
    found, accuracy = trainer(run, weights).evaluate(rows)

    def torch_loss():
        return {"loss": np.array(TorchModel(model, FLOAT64, weights).loss_and_grads(*rows[0])[0])}

    limit = allowances(amplification(torch_loss, "float32")[1], "float32", erring=2)["loss"]
    check("loss", found, (3 * losses[0] + losses[1]) / 4, limit)
    assert accuracy * 16 in range(17)


def test_the_third_opinion_imports_nothing_of_ours():
    tree = ast.parse(inspect.getsource(one_update))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"functools", "math", "numpy", "collections.abc", "typing"}
    assert len(inspect.getsource(one_update).splitlines()) < 215
