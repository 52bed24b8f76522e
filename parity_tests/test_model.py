"""The whole model, jax_impl against torch_ref in float64: logits, loss, every gradient, evaluation numbers.

In float64 and in each lower precision the error must stay within what Monte-Carlo arithmetic says rounding does to this
very computation (parity_tests/montecarlo.py). In lower precision torch_ref's own error is a second bound: jax_impl's
may be SAFETY times as large at most, since two independent roundings differ by a little.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
import pytest

from parity_tests.cases import (
    AWKWARD,
    FLOAT64,
    LENGTH,
    PRECISIONS,
    ROWS,
    VARIANTS,
    random_tokens,
    random_weights,
)
from parity_tests.compare.montecarlo import allowances, amplification, rounded
from parity_tests.compare.tolerance import SAFETY, check, check_all, relative_error
from parity_tests.rope_noise import rounded_rope_tables
from parity_tests.sides import Arrays, JaxModel, TorchModel
from recipe.config import ModelConfig
from recipe.params import param_specs


class Case(NamedTuple):
    """A model and the shape of the batch it is compared on."""

    model: ModelConfig
    rows: int = ROWS
    length: int = LENGTH

    @property
    def weights(self) -> Arrays:
        return random_weights(self.model)

    @property
    def inputs(self) -> np.ndarray:
        return random_tokens(self.model, self.rows, self.length)

    @property
    def targets(self) -> np.ndarray:
        return random_tokens(self.model, self.rows, self.length, seed=2)

    @property
    def dropout_seed(self) -> int | None:
        return 3 if self.model.dropout else None


# 200 tokens make two query blocks; only positions beyond a hundred tell rotary frequencies apart.
_LONG = dataclasses.replace(AWKWARD, num_hidden_layers=2, head_dim=8, rope_theta=1e6)
CASES = {
    **{name: Case(model) for name, model in VARIANTS.items()},
    # The compiler takes long over dropout, so the lower precisions have one layer of it.
    "everything-shallow": Case(dataclasses.replace(VARIANTS["everything"], num_hidden_layers=1, max_window_layers=0)),
    "long": Case(_LONG, rows=1, length=200),
    "long-window": Case(dataclasses.replace(_LONG, sliding_window=60, max_window_layers=1), rows=1, length=200),
}
COMPARISONS = [(name, "float64") for name in CASES if name != "everything-shallow"]
COMPARISONS += [(name, dtype) for name in ("plain", "everything-shallow") for dtype in ("float32", "bfloat16")]
COMPARISONS += [("long-window", "bfloat16")]


def measure(side: JaxModel | TorchModel, case: Case) -> Arrays:
    """Loss and every gradient of one side."""
    loss, grads = side.loss_and_grads(case.inputs, case.targets, dropout_seed=case.dropout_seed)
    return {"loss": np.array(loss), **grads}


@functools.cache
def truths_and_kappas(case: Case, dtype: str) -> tuple[Arrays, dict[str, float]]:
    """torch_ref in float64 and the amplification of rounding to `dtype`; float64's and float32's are the same."""
    if dtype == "float64":
        return truths_and_kappas(case, "float32")

    def compute() -> Arrays:
        weights = case.weights
        if dtype == "bfloat16":
            weights = {name: rounded(weight) for name, weight in weights.items()}
        side = TorchModel(case.model, FLOAT64, weights)
        return {"logits": side.logits(case.inputs), **measure(side, case)}

    with rounded_rope_tables():
        return amplification(compute, dtype)


class Comparison:
    """One case in one dtype: both sides, the float64 truth, the allowances."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.dtype = case, dtype
        self.truths, kappas = truths_and_kappas(case, dtype)
        self.allowances = allowances(kappas, dtype)

    @functools.cached_property
    def jax(self) -> JaxModel:
        return JaxModel(self.case.model, PRECISIONS[self.dtype], self.case.weights)

    @functools.cached_property
    def torch(self) -> TorchModel:
        return TorchModel(self.case.model, PRECISIONS[self.dtype], self.case.weights)


def test_evaluation_counts_correct_tokens():
    comparison = Comparison(CASES["plain"], "float64")
    case = comparison.case
    best = comparison.truths["logits"].argmax(-1).astype(np.int32)
    best[0, :3] = (best[0, :3] + 1) % case.model.vocab_size
    for side in (comparison.jax, comparison.torch):
        assert side.evaluate(case.inputs, best)[1] == best.size - 3


@pytest.fixture(scope="module", params=COMPARISONS, ids="-".join)
def comparison(request) -> Comparison:
    name, dtype = request.param
    return Comparison(CASES[name], dtype)


def test_logits(comparison, record_property):
    truth, allowance = comparison.truths["logits"], comparison.allowances["logits"]
    logits = comparison.jax.logits(comparison.case.inputs)
    assert logits.dtype == ("float64" if comparison.dtype == "float64" else "float32")
    error = check("logits", logits, truth, allowance)
    record_property("error over allowance", error / allowance)
    if comparison.dtype != "float64":
        own = relative_error(comparison.torch.logits(comparison.case.inputs), truth)
        check("logits, against torch_ref's own error", logits, truth, SAFETY * own)


def test_loss_and_every_gradient(comparison, record_property):
    case, dtype = comparison.case, comparison.dtype
    values = measure(comparison.jax, case)
    truths = {name: comparison.truths[name] for name in values}
    specs = param_specs(case.model)
    assert values.keys() - {"loss"} == specs.keys()
    assert {values[name].dtype.name for name in specs} == {PRECISIONS[dtype].params}
    errors = check_all(values, truths, comparison.allowances.get)
    ratios = {name: errors[name] / comparison.allowances[name] for name in errors}
    record_property("largest error over allowance", max(ratios.values()))
    record_property("median error over allowance", float(np.median(list(ratios.values()))))
    if dtype == "float64":
        return
    # An allowance of one would accept a zero gradient.
    assert max(comparison.allowances[name] for name in errors) < 1.0
    reference = measure(comparison.torch, case)
    own = {name: relative_error(reference[name], truths[name]) for name in errors}
    # The error of a norm's or a bias's few elements does not concentrate, so those are judged together with the rest.
    for name, (_, role) in specs.items():
        if role in ("matrix", "embedding", "head"):
            check(f"{name}, against torch_ref's own error", values[name], truths[name], SAFETY * own[name])
    together, own_together = (math.hypot(*(e[name] for name in specs)) for e in (errors, own))
    record_property("gradient errors over torch_ref's", together / own_together)
    assert together <= SAFETY * own_together, f"gradients err by {together:.3e}, torch_ref's by {own_together:.3e}"


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_evaluation_numbers(dtype):
    comparison = Comparison(CASES["plain"], dtype)
    case, logits, allowance = comparison.case, comparison.truths["logits"], comparison.allowances["loss"]
    # By the definitions: the sum of -log softmax(logits)[target], and the targets that have the largest logit.
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, case.targets[..., None], axis=-1).mean()
    check("mean of the definition", comparison.truths["loss"], expected, allowance)
    # Random targets are hardly ever the likeliest tokens, so a row of them is made so.
    targets = case.targets.copy()
    targets[0] = logits[0].argmax(-1)
    expected = -np.take_along_axis(log_probs, targets[..., None], axis=-1).sum()
    for name, side in {"jax": comparison.jax, "torch": comparison.torch}.items():
        loss, correct = side.evaluate(case.inputs, targets)
        check(f"evaluation loss, {name}", np.array(loss), expected, allowance)
        assert correct == (logits.argmax(-1) == targets).sum() >= case.length


def _matrices_off_by(allowance: float, weights: Arrays) -> Arrays:
    generator = np.random.default_rng(9)
    return {
        name: weight * (1.0 + allowance * generator.uniform(-1.0, 1.0, weight.shape)) if weight.ndim == 2 else weight
        for name, weight in weights.items()
    }


FAULTS = {
    "weights off by four allowances": lambda model: (model, True),
    "eps 1e-5": lambda model: (dataclasses.replace(model, rms_norm_eps=1e-5), False),
    "theta 1 % off": lambda model: (dataclasses.replace(model, rope_theta=1.01 * model.rope_theta), False),
    "theta off by one": lambda model: (dataclasses.replace(model, rope_theta=model.rope_theta + 1.0), False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_small_faults_exceed_the_allowance(fault):
    comparison = Comparison(CASES["plain"], "float64")
    allowance, weights = comparison.allowances["logits"], comparison.case.weights
    model, perturb = FAULTS[fault](comparison.case.model)
    faulty = JaxModel(model, FLOAT64, _matrices_off_by(4 * allowance, weights) if perturb else weights)
    logits = faulty.logits(comparison.case.inputs)
    with pytest.raises(AssertionError, match="exceeds the allowance"):
        check("logits", logits, comparison.truths["logits"], allowance)
