"""Two trainings side by side: what agrees is let through, what does not is found first and called by its name."""

import copy
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from matplotlib.figure import Figure

from parity_tests.compare.diagnosis import FAMILIES, Recipe, diagnose, replay, reproduces
from parity_tests.compare.errors import CompareError
from parity_tests.compare.rules import Rules
from parity_tests.compare.steps import JaxTraining, optax_slots
from parity_tests.compare.training import (
    _cancelled,
    _measured,
    _record,
    _trajectory,
    compare_training,
    jax_training,
    torch_training,
)
from parity_tests.compare.weights import copy_weights


@pytest.fixture(scope="module", autouse=True)
def _fast_compilation():
    """Programs of a few small products take longer to optimize than to run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


STEPS = 5
OUT, HIDDEN, IN = 3, 7, 5


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(IN, HIDDEN), torch.nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def linear(*sizes: int, **options) -> nnx.Linear:
    """A layer of zeros, which get torch's values; random ones would be compiled first."""
    return nnx.Linear(*sizes, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros, **options)


class FlaxNet(nnx.Module):
    def __init__(self, dtype=None) -> None:
        self.first, self.last = linear(IN, HIDDEN, dtype=dtype), linear(HIDDEN, OUT)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def _nets(seed: int = 0, dtype=None) -> tuple[FlaxNet, TorchNet]:
    """Both with the weights of torch."""
    torch.manual_seed(seed)
    theirs, ours = TorchNet(), FlaxNet(dtype)
    for mine, other in ((ours.first, theirs.first), (ours.last, theirs.last)):
        mine.kernel[...] = jnp.asarray(other.weight.detach().numpy().T)
        mine.bias[...] = jnp.asarray(other.bias.detach().numpy())
    return ours, theirs


def _batches(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    sizes = ((6, IN), (6, OUT))
    return [tuple(rng.standard_normal(size).astype(np.float32) for size in sizes) for _ in range(STEPS)]


def mean_square(model, batch):
    """The loss of either framework."""
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def matrices_only(params):
    """Optax's mask of weight decay: no biases."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def groups(params, decay: float) -> list[dict]:
    """The same in torch."""
    matrices, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def torch_clip(limit: float) -> optax.GradientTransformation:
    """Clipping as torch does it, with 1e-6 in the norm."""

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def falling(optimizer):
    """Torch's schedule: 0.1 / (1 + t)."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))


@functools.cache
def _training(loss, dtype: str, jit: bool) -> JaxTraining:
    """A training of the net by this loss, traced once for all tests."""
    return jax_training(_nets()[0], optax.sgd(0.1), loss, dtype=dtype, jit=jit)


def compared(
    ours,
    theirs,
    *,
    seeds=range(2),
    steps=None,
    loss=mean_square,
    torch_loss=mean_square,
    nets=None,
    jit=False,
    **options,
):
    """The report of two trainings; what `torch_training` takes goes there.

    Nothing is compiled unless `jit`, which takes longer than a few steps of a small net.
    """
    torch_net = nets[1] if nets else _nets()[1]
    kept = {name: options.pop(name) for name in ("clip", "scheduler") if name in options}
    dtype = options.get("dtype", "float64")
    return compare_training(
        jax_training(nets[0], ours, loss, dtype=dtype, jit=jit)
        if nets
        else _training(loss, dtype, jit).fresh(optimizer=ours),
        torch_training(torch_net, theirs, torch_loss, **kept),
        _batches()[:steps],
        seeds=seeds,
        **options,
    )


EQUAL = {
    "SGD": (lambda: optax.sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1), {}),
    "momentum": (lambda: optax.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {}),
    "Nesterov": (
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        {},
    ),
    "Adam": (lambda: optax.adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01), {}),
    "AdamW with a mask": (
        lambda: optax.adamw(0.01, weight_decay=0.05, mask=matrices_only),
        lambda p: torch.optim.AdamW(groups(p, 0.05), lr=0.01),
        {},
    ),
    "RMSprop": (
        lambda: optax.rmsprop(0.01, decay=0.99, eps=1e-8, eps_in_sqrt=False),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        {},
    ),
    "centered RMSprop with momentum": (
        lambda: optax.chain(
            optax.scale_by_stddev(decay=0.99, eps=1e-8, eps_in_sqrt=False), optax.trace(0.9), optax.scale(-0.01)
        ),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
        {"steps": 3},
    ),
    "Adagrad": (
        lambda: optax.adagrad(0.01, initial_accumulator_value=0.1, eps=0.0),
        lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1, eps=0.0),
        {},
    ),
    "clip and schedule": (
        lambda: optax.chain(torch_clip(0.1), optax.adamw(lambda t: 0.1 / (1 + t), weight_decay=0.01)),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        {"clip": 0.1, "scheduler": falling},
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_trainings_are_equal(name):
    ours, theirs, options = EQUAL[name]
    report = compared(ours(), theirs, seeds=range(4), jit="schedule" in name, **options)
    report.assert_equal()
    assert report.exit_code == 0 and report.first_divergence is None and not report.diagnosis
    assert not any(report.alone.values())
    steps = options.get("steps", STEPS)
    assert f"{steps} of {steps} losses" in report.coverage() and "4 of 4 parameters" in report.coverage()
    if name == "Adam":  # exp_avg and exp_avg_sq of four parameters; their counters are compared and not counted
        assert "8 of 8 slots" in report.coverage()
        assert {row.slot for row in report.rows if row.kind == "slot"} == {"exp_avg", "exp_avg_sq", "step"}


def sgd(**options):
    return lambda p: torch.optim.SGD(p, lr=0.1, **options)


def adam(**options):
    return lambda p: torch.optim.Adam(p, **{"lr": 0.01, **options})


def adamw(**options):
    return lambda p: torch.optim.AdamW(p, lr=0.01, **options)


def adam_without_correction():
    """optax.adam with the moments as they are."""
    return optax.chain(
        optax.GradientTransformation(
            lambda params: optax.ScaleByAdamState(
                jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
            ),
            _uncorrected,
        ),
        optax.scale(-0.01),
    )


def _uncorrected(updates, state, params=None):
    mu = jax.tree.map(lambda m, g: 0.9 * m + (1 - 0.9) * g, state.mu, updates)
    nu = jax.tree.map(lambda v, g: 0.999 * v + (1 - 0.999) * g * g, state.nu, updates)
    out = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), mu, nu)
    return out, optax.ScaleByAdamState(state.count + 1, mu, nu)


def per_tensor_clip(limit: float):
    def one(x):
        return x * jnp.minimum(1.0, limit / (jnp.sqrt((x * x).sum()) + 1e-6))

    return optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: (jax.tree.map(one, updates), state)
    )


EXP_AVG, EXP_AVG_SQ, BUFFER = (
    ("slot", "exp_avg"),
    ("slot", "exp_avg_sq"),
    ("slot", "momentum_buffer"),
)
UPDATE = ("update", "")

# name -> optax's transformation, torch's optimizer, the first step, kind and slot, words of the diagnosis, options
PLANTED = {
    "eps in the root": (
        lambda: optax.adamw(0.01, eps=0.0, eps_root=1e-8, weight_decay=0.01),
        adamw(),
        (1, *UPDATE),
        "torch's AdamW but with eps inside the root (optax eps_root); remedy: optax.adamw(eps=1e-08, eps_root=0)",
        {},
    ),
    "another eps": (lambda: optax.adam(0.01, eps=1e-6), adam(), (1, *UPDATE), "but with eps=1e-06; remedy", {}),
    "no bias correction": (adam_without_correction, adam(), (1, *UPDATE), "but with no bias correction; remedy", {}),
    "L2 instead of decoupled": (
        lambda: optax.chain(optax.add_decayed_weights(0.05), optax.adam(0.01)),
        adamw(weight_decay=0.05),
        (1, *EXP_AVG),
        "torch's AdamW but with weight decay coupled to the gradient (L2)",
        {},
    ),
    "decoupled instead of L2": (
        lambda: optax.adamw(0.01, weight_decay=0.05),
        adam(weight_decay=0.05),
        (1, *EXP_AVG),
        "torch's Adam but with weight decay decoupled from the gradient",
        {},
    ),
    "decay not scaled": (
        lambda: optax.chain(optax.scale_by_adam(), optax.scale(-0.01), optax.add_decayed_weights(-0.05)),
        adamw(weight_decay=0.05),
        (1, *UPDATE),
        "but with weight decay not multiplied by the learning rate",
        {},
    ),
    "optax's default decay": (
        lambda: optax.adamw(0.01),
        adamw(),
        (1, *UPDATE),
        "but with weight_decay=0.0001, decoupled; remedy: torch has weight_decay=0.01",
        {},
    ),
    "no mask": (
        lambda: optax.adamw(0.01, weight_decay=0.05),
        lambda p: torch.optim.AdamW(groups(p, 0.05), lr=0.01),
        (1, *UPDATE),
        "but with weight decay on every parameter",
        {},
    ),
    "a mask": (
        lambda: optax.adamw(0.01, weight_decay=0.05, mask=matrices_only),
        adamw(weight_decay=0.05),
        (1, *UPDATE),
        "but with weight decay on tensors of two axes or more only",
        {},
    ),
    "betas swapped": (
        lambda: optax.adam(0.01, b1=0.95, b2=0.9),
        adam(betas=(0.9, 0.95)),
        (1, *EXP_AVG),
        "but with betas swapped; remedy: give optax b1=0.9, b2=0.95",
        {},
    ),
    "another beta": (
        lambda: optax.adam(0.01, b2=0.98),
        adam(),
        (1, *EXP_AVG_SQ),
        "but with betas=(0.9, 0.98); remedy: give optax b1=0.9, b2=0.999",
        {},
    ),
    "a schedule ahead": (
        lambda: optax.adam(lambda t: 0.1 / (2 + t)),
        adam(lr=0.1),
        (1, *UPDATE),
        "but with the learning rate of the next step",
        {"scheduler": falling},
    ),
    "a schedule behind": (
        lambda: optax.adam(lambda t: 0.1 / jnp.maximum(1, t)),
        adam(lr=0.1),
        (2, *UPDATE),
        "but with the learning rate of the step before",
        {"scheduler": falling},
    ),
    "a learning rate": (lambda: optax.adam(0.02), adam(), (1, *UPDATE), "but with learning rate 0.02; remedy", {}),
    "no 1e-6": (
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01)),
        adam(),
        (1, *EXP_AVG),
        "but with no 1e-6 in the clipping norm",
        {"clip": 0.1},
    ),
    "no clipping": (lambda: optax.adam(0.01), adam(), (1, *EXP_AVG), "but with no clipping", {"clip": 0.1}),
    "clipping by tensor": (
        lambda: optax.chain(per_tensor_clip(0.1), optax.sgd(0.1)),
        sgd(),
        (1, *UPDATE),
        "but with clipping tensor by tensor instead of by the global norm",
        {"clip": 0.1},
    ),
    "clipping by value": (
        lambda: optax.chain(optax.clip(0.1), optax.sgd(0.1)),
        sgd(),
        (1, *UPDATE),
        "but with clipping of every value instead of the norm",
        {"clip": 0.1},
    ),
    "averaged momentum": (
        lambda: optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1)),
        sgd(momentum=0.9),
        (1, *BUFFER),
        "but with momentum averaged, (1 - beta) g, instead of heavy ball",
        {},
    ),
    "no dampening": (
        lambda: optax.sgd(0.1, momentum=0.9),
        sgd(momentum=0.9, dampening=0.5),
        (2, *BUFFER),
        "but with no dampening of the momentum",
        {},
    ),
    "plain momentum": (
        lambda: optax.sgd(0.1, momentum=0.9),
        sgd(momentum=0.9, nesterov=True),
        (1, *UPDATE),
        "but with plain instead of Nesterov's momentum",
        {},
    ),
    "another momentum": (
        lambda: optax.sgd(0.1, momentum=0.8),
        sgd(momentum=0.9),
        (2, *BUFFER),
        "but with momentum=0.8; remedy: torch has momentum=0.9",
        {},
    ),
    "optax.rmsprop": (
        lambda: optax.rmsprop(0.01, decay=0.99),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        (1, *UPDATE),
        "torch's RMSprop but with eps inside the root (optax eps_root)",
        {},
    ),
    "optax.rmsprop's momentum": (
        lambda: optax.rmsprop(0.01, decay=0.99, momentum=0.9, eps_in_sqrt=False),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        (1, *BUFFER),
        "but with the learning rate inside the momentum buffer",
        {},
    ),
    "optax.adagrad": (
        lambda: optax.adagrad(0.01, eps=0.0),
        lambda p: torch.optim.Adagrad(p, lr=0.01, eps=0.0),
        (1, "slot", "sum"),
        "but with initial_accumulator_value=0.1; remedy",
        {},
    ),
    "optax.nadam": (
        lambda: optax.nadam(0.01),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        (1, *UPDATE),
        "torch's NAdam but with Nesterov's momentum as optax.nadam has it",
        {},
    ),
    "optax.amsgrad": (
        lambda: optax.amsgrad(0.01),
        adam(amsgrad=True),
        (1, "slot", "max_exp_avg_sq"),
        "but with AMSGrad's maximum over bias-corrected moments",
        {},
    ),
    "two at once": (
        lambda: optax.adamw(0.01, eps=0.0, eps_root=1e-8, weight_decay=0.05),
        lambda p: torch.optim.AdamW(groups(p, 0.05), lr=0.01),
        (1, *UPDATE),
        "but with eps inside the root (optax eps_root) and weight decay on every parameter",
        {},
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_found_first_and_named(name):
    ours, theirs, (step, kind, slot), words, options = PLANTED[name]
    # Two rates of a schedule could be one constant rate.
    report = compared(ours(), theirs, steps=3 if "scheduler" in options else 2, **options)
    first = report.first_divergence
    assert (first.step, first.kind, first.slot) == (step, kind, slot), report.verdict()
    assert words in report.diagnosis, report.verdict()
    named = report.diagnosis.partition("; remedy: ")[0]
    assert named.endswith(words.partition("; remedy")[0]), "nothing else is named beside it"
    assert report.exit_code == 1 and report.diagnosis in report.verdict()
    with pytest.raises(AssertionError, match="first divergence: step"):
        report.assert_equal()


def _matrices():
    """One matrix on each side, of more rows than columns, and batches for it."""
    torch.manual_seed(0)
    theirs = torch.nn.Linear(IN, HIDDEN, bias=False)
    ours = linear(IN, HIDDEN, use_bias=False)
    ours.kernel[...] = jnp.asarray(theirs.weight.detach().numpy().T)
    rng = np.random.default_rng(0)
    sizes = ((6, IN), (6, HIDDEN))
    return ours, theirs, [tuple(rng.standard_normal(size).astype(np.float32) for size in sizes) for _ in range(3)]


def muon_of_torch(debias: bool) -> optax.GradientTransformation:
    """torch.optim.Muon's recipe for one kernel, in optax; with `debias` its momentum is bias-corrected."""

    def update(updates, state, params):
        count = state.count + 1
        buffers = jax.tree.map(lambda b, g: 0.95 * b + (1 - 0.95) * g, state.ema, updates)

        def step(buffer, gradient, param):
            inner = (1 - 0.95) * gradient
            if debias:
                buffer, inner = buffer / (1 - 0.95 ** (count + 1)), inner / (1 - 0.95**count)
            x = inner + 0.95 * buffer  # (IN, HIDDEN): of torch's matrix the transposed
            x = x / jnp.maximum(jnp.linalg.norm(x), 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            return -0.01 * 0.1 * param - 0.01 * math.sqrt(HIDDEN / IN) * x

        return jax.tree.map(step, buffers, updates, params), optax.EmaState(count, buffers)

    return optax.GradientTransformation(
        lambda params: optax.EmaState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)), update
    )


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (lambda: muon_of_torch(False), ""),
        (lambda: muon_of_torch(True), "torch's Muon but with a bias correction of the momentum (optax.contrib.muon)"),
        (
            lambda: optax.contrib.muon(0.01, weight_decay=0.1, consistent_rms=0.2),
            "scale 0.2 sqrt(max(rows, columns)) (consistent_rms) and a bias-corrected momentum and eps=1e-08 added",
        ),
    ],
)
def test_muon(ours, words):
    flax_net, torch_net, batches = _matrices()
    theirs = torch_training(torch_net, lambda p: torch.optim.Muon(p, lr=0.01), mean_square)
    report = compare_training(jax_training(flax_net, ours(), mean_square), theirs, batches, seeds=(0, 1))
    assert words in report.diagnosis and bool(words) == report.exit_code, report.verdict()


def test_a_loss_of_another_reduction_parts_in_the_loss():
    report = compared(optax.adam(0.01), adam(), loss=lambda m, b: ((m(b[0]) - b[1]) ** 2).sum(), steps=2)
    assert (report.first_divergence.step, report.first_divergence.kind) == (1, "loss")
    assert f"torch's times {6 * OUT}; remedy: one reduction" in report.diagnosis


def test_a_constant_in_the_loss_parts_in_the_loss_alone():
    report = compared(optax.adam(0.01), adam(), loss=lambda m, b: mean_square(m, b) + 1.0, steps=2)
    assert {row.kind for row in report.rows if row.beyond} == {"loss"}
    assert "every gradient agrees" in report.diagnosis


@jax.custom_vjp
def wrong_tanh(x):
    """tanh with the derivative 1 - tanh."""
    return jnp.tanh(x)


wrong_tanh.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: ((1 - y) * g,))


def test_a_wrong_gradient_parts_in_the_gradient():
    def loss(model, batch):
        return ((model.last(wrong_tanh(model.first(batch[0]))) - batch[1]) ** 2).mean()

    report = compared(optax.adam(0.01), adam(), loss=loss, steps=2)
    first = report.first_divergence
    assert (first.step, first.kind) == (1, "gradient") and first.name.startswith("first.")
    assert "2 of 4 gradients part: first.bias, first.weight" in report.diagnosis


def test_a_penalty_in_the_gradient_is_named():
    @jax.custom_vjp
    def decaying(x):
        return x

    decaying.defvjp(lambda x: (x, x), lambda x, g: (g + 0.25 * x,))

    def loss(model, batch):
        model.first.kernel[...] = decaying(model.first.kernel[...])
        return mean_square(model, batch)

    report = compared(optax.sgd(0.1), sgd(), loss=loss, steps=2)
    assert (report.first_divergence.kind, report.first_divergence.name) == ("gradient", "first.weight")
    assert "torch's plus 0.25 times the parameter, in 1 of 4" in report.diagnosis


def test_other_parameters_at_the_start_are_said_before_any_step():
    flax_net, torch_net = _nets()
    flax_net.last.bias[...] += 0.5
    report = compared(optax.sgd(0.1), sgd(), nets=(flax_net, torch_net), steps=1)
    first = report.first_divergence
    assert (first.step, first.kind, first.name) == (0, "parameter", "last.bias")
    assert "start from other parameters" in report.diagnosis and "copy_weights" in report.diagnosis


def test_a_parameter_that_one_side_never_updates_is_named():
    frozen = optax.masked(optax.set_to_zero(), lambda p: jax.tree.map(lambda x: x.shape == (OUT,), p))
    report = compared(optax.chain(optax.sgd(0.1), frozen), sgd(), steps=2)
    assert report.diagnosis.startswith("the JAX side never updates last.bias; remedy")

    some_only = compared(optax.sgd(0.1), lambda p: torch.optim.SGD(p[:-1], lr=0.1), steps=2)
    assert some_only.diagnosis.startswith("the torch side never updates last.bias; remedy")


def test_a_slot_on_one_side_alone_is_not_equal():
    with_momentum = optax.chain(optax.trace(0.0), optax.scale(-0.1))  # the same updates, and a state that torch lacks
    report = compared(with_momentum, sgd(), steps=2)
    assert report.first_divergence is None and report.exit_code == 1
    assert report.alone["jax"][0].startswith("slot trace ") and not report.alone["torch"]
    assert "0 of 4 slots" in report.coverage() and "only in jax, so not equal" in report.verdict()
    assert compared(with_momentum, sgd(), steps=2, partial=True).exit_code == 0


def test_a_parameter_without_a_rule_is_not_equal_and_with_one_is():
    class Other(nnx.Module):
        def __init__(self, net: FlaxNet) -> None:
            self.head, self.first = net.last, net.first

        def __call__(self, x):
            return self.head(jnp.tanh(self.first(x)))

    flax_net, torch_net = _nets()
    nets = (Other(flax_net), torch_net)
    report = compared(optax.sgd(0.1), sgd(), nets=nets, steps=1)
    assert report.exit_code == 1 and report.first_divergence is None
    assert {"gradient head.kernel", "parameter head.bias"} <= set(report.alone["jax"])
    assert {"gradient last.weight", "update last.bias"} <= set(report.alone["torch"])
    compared(optax.sgd(0.1), sgd(), nets=nets, steps=1, rules=Rules(names={"head": "last"})).assert_equal()
    compared(optax.sgd(0.1), sgd(), nets=nets, steps=1, rules={"head": "last"}).assert_equal()


def test_slots_of_another_name_need_one_entry():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for state in self.state.values():
                state["velocity"] = state.pop("momentum_buffer")

    def twice(p):
        return Odd(p, lr=0.1, momentum=0.9)

    report = compared(optax.sgd(0.1, momentum=0.9), twice, steps=1)
    assert report.exit_code == 1 and report.alone["torch"][0].startswith("slot velocity")
    compared(optax.sgd(0.1, momentum=0.9), twice, steps=1, slots={"trace": "velocity"}).assert_equal()


def test_signs_that_rounding_decides_are_free():
    """The first bias has no gradient but rounding, of which Adam with a tiny eps makes steps of full size."""

    def centred(tanh):
        def loss(model, batch):
            hidden = model.first(batch[0])
            return ((model.last(tanh(hidden - hidden.mean(0))) - batch[1]) ** 2).mean()

        return loss

    options = dict(loss=centred(jnp.tanh), torch_loss=centred(torch.tanh), seeds=range(8))
    report = compared(optax.adam(0.01, eps=1e-30), adam(eps=1e-30), steps=3, **options)
    report.assert_equal()
    updates = [row for row in report.rows if (row.kind, row.name) == ("update", "first.bias")]
    assert max(row.error for row in updates) > 0.5, "no sign was turned, so this test says nothing"
    others = [row for row in report.rows if row.name.startswith("last.")]
    assert others and all(row.allowance < 2.0**-24 for row in others), "what has signs keeps them"

    def with_a_gradient(model, batch):
        return centred(jnp.tanh)(model, batch) + 1e-6 * model.first.bias[...].sum()

    wrong = compared(optax.adam(0.01), adam(), **{**options, "loss": with_a_gradient}, steps=1)
    beyond = [row.name for row in wrong.rows if row.kind == "gradient" and row.beyond]
    assert beyond == ["first.bias"], "a gradient where there should be none is seen"


def test_a_gradient_of_rounding_alone_may_err_by_what_the_others_err():
    noise, real = ("gradient", "", "noise"), ("gradient", "", "real")
    left = {noise: np.full(4, 2.0**-60), real: np.full(4, 2.0)}
    limits = [{noise: 2.0, real: 2.0**-50}]
    _cancelled([left], limits)
    assert limits == [{noise: 2.0**-50 * 2.0 / 2.0**-60, real: 2.0**-50}]
    limits = [{noise: 0.5, real: 2.0**-50}]  # digits that rounding leaves: nothing is widened
    _cancelled([left], limits)
    assert limits == [{noise: 0.5, real: 2.0**-50}]


def test_float32_is_judged_against_float64():
    equal = compared(optax.adamw(0.01, weight_decay=0.01), adamw(), dtype="float32", jit=True)
    equal.assert_equal()
    apart = compared(optax.adam(0.01, eps=1e-4), adam(), dtype="float32", steps=1, jit=True)
    assert apart.first_divergence.kind == "update" and apart.exit_code == 1


def test_a_layer_that_computes_in_float32_is_compared_in_float64():
    compared(optax.sgd(0.1), sgd(), nets=_nets(dtype=jnp.float32), steps=2).assert_equal()


def test_a_loss_that_casts_inside_is_compared_in_float64():
    def ours(model, batch):
        return ((model.last(jnp.tanh(model.first(batch[0])).astype("float32")) - batch[1]) ** 2).mean()

    def theirs(model, batch):
        return ((model.last(torch.tanh(model.first(batch[0])).float()) - batch[1]) ** 2).mean()

    compared(optax.sgd(0.1), sgd(), loss=ours, torch_loss=theirs, steps=2).assert_equal()


def test_a_schedule_in_float32_is_seen():
    def rate(count):
        return jnp.asarray(0.1 / (1 + count), jnp.float32)

    report = compared(optax.sgd(rate), sgd(), scheduler=falling)
    assert "a learning rate rounded to float32" in report.diagnosis, report.verdict()


def test_neither_side_is_changed():
    flax_net, torch_net = _nets()
    optimizer = torch.optim.AdamW(torch_net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5)  # a scheduler of the user's own, at its first rate
    before = copy.deepcopy(torch_net.state_dict()), jax.tree.map(np.array, nnx.state(flax_net, nnx.Param))
    theirs = torch_training(torch_net, optimizer, mean_square, scheduler=falling)
    ours = jax_training(flax_net, optax.adamw(lambda t: 0.1 / (1 + t), weight_decay=0.01), mean_square)
    first = compare_training(ours, theirs, _batches(), seeds=(0,))
    first.assert_equal()
    assert compare_training(ours, theirs, _batches(), seeds=(0,)).rows == first.rows
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.05
    assert all(torch.equal(value, before[0][name]) for name, value in torch_net.state_dict().items())
    assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(flax_net, nnx.Param), before[1]))
    assert all(p.grad is None and p.dtype == torch.float32 for p in torch_net.parameters())


def _linen(params):
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            hidden = jnp.tanh(linen.Dense(HIDDEN, name="first", dtype=jnp.float32)(x))
            return linen.Dense(OUT, name="last")(hidden)

    return (Net(), {"params": params}), mean_square


def _function(params):
    def function(p, x):
        return jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"]) @ p["last"]["kernel"] + p["last"]["bias"]

    return (function, params), mean_square


def _equinox(params):
    equinox = pytest.importorskip("equinox")

    class Net(equinox.Module):
        first: equinox.nn.Linear
        last: equinox.nn.Linear

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    def layer(*sizes):  # shapes alone, filled below
        return equinox.filter_eval_shape(equinox.nn.Linear, *sizes, key=jax.random.key(0))

    module = Net(layer(IN, HIDDEN), layer(HIDDEN, OUT))
    for name, arrays in params.items():
        where = functools.partial(lambda m, name: (getattr(m, name).weight, getattr(m, name).bias), name=name)
        module = equinox.tree_at(where, module, (arrays["kernel"].T, arrays["bias"]))
    return module, lambda m, b: mean_square(jax.vmap(m), b)


@pytest.mark.parametrize("library", [_linen, _function, _equinox])
def test_other_jax_libraries_train_too(library):
    _, torch_net = _nets()
    arrays = {name: jnp.asarray(p.detach().numpy()) for name, p in torch_net.named_parameters()}
    params = {
        layer: {"kernel": arrays[f"{layer}.weight"].T, "bias": arrays[f"{layer}.bias"]} for layer in ("first", "last")
    }
    model, loss = library(params)
    ours = jax_training(model, optax.adamw(0.01, weight_decay=0.01), loss)
    report = compare_training(ours, torch_training(torch_net, adamw(), mean_square), _batches()[:1], seeds=(0,))
    report.assert_equal()
    assert "8 of 8 slots" in report.coverage()


class TorchCounting(torch.nn.Module):
    """Multiplies by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1.0
        return self.layer(x) * self.calls


def _counting_nnx(kernel, bias):
    class Counting(nnx.Module):
        def __init__(self) -> None:
            self.layer = linear(IN, OUT)
            self.layer.kernel[...], self.layer.bias[...] = kernel, bias
            self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.calls[...] += 1
            return self.layer(x) * self.calls[...]

    return Counting()


def _counting_linen(kernel, bias):
    from flax import linen

    class Counting(linen.Module):
        @linen.compact
        def __call__(self, x):
            calls = self.variable("batch_stats", "calls", lambda: jnp.zeros(()))
            calls.value = calls.value + 1.0
            return linen.Dense(OUT, name="layer")(x) * calls.value

    variables = {"params": {"layer": {"kernel": kernel, "bias": bias}}, "batch_stats": {"calls": jnp.zeros(())}}
    return Counting(), variables


@pytest.mark.parametrize("library", [_counting_nnx, _counting_linen])
def test_statistics_are_carried_from_step_to_step(library):
    torch.manual_seed(0)
    theirs = TorchCounting()
    ours = library(jnp.asarray(theirs.layer.weight.detach().numpy().T), jnp.asarray(theirs.layer.bias.detach().numpy()))
    compared(optax.sgd(0.1), sgd(), nets=(ours, theirs), steps=3).assert_equal()


class TorchStack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(IN, IN) for _ in range(3))
        self.head = torch.nn.Linear(IN, OUT)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class FlaxStack(nnx.Module):
    """One scanned layer that holds three."""

    def __init__(self) -> None:
        self.blocks, self.head = linear(IN, IN), linear(IN, OUT)
        self.blocks.kernel = nnx.Param(jnp.zeros((3, IN, IN)))
        self.blocks.bias = nnx.Param(jnp.zeros((3, IN)))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return jnp.tanh(layer(x))

        return self.head(forward(self.blocks, x))


def _middle_twice():
    """Doubles the gradients of a stack's second layer."""

    def double(path, x):
        stacked = "blocks" in jax.tree_util.keystr(path)
        return x * jnp.array([1.0, 2.0, 1.0]).reshape(3, *(1,) * (x.ndim - 1)) if stacked else x

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(double, updates))


def test_a_scanned_stack_is_compared_layer_by_layer():
    torch.manual_seed(0)
    theirs, ours, rules = TorchStack(), FlaxStack(), Rules(stacked={"blocks": "layers.{}"})
    copy_weights(theirs, ours, rules=rules)
    training = jax_training(ours, optax.adamw(0.01, weight_decay=0.01), mean_square)
    reference = torch_training(theirs, adamw(), mean_square)
    report = compare_training(training, reference, _batches()[:2], rules=rules, seeds=(0, 1))
    report.assert_equal()
    assert "8 of 8 gradients, 16 of 16 slots, 8 of 8 updates" in report.coverage()
    assert {"slot exp_avg_sq layers.2.bias", "slot step layers.1.weight"} <= {
        f"{row.kind} {row.slot} {row.name}" for row in report.rows
    }
    wrong = training.fresh(optimizer=optax.chain(_middle_twice(), optax.adamw(0.01, weight_decay=0.01)))
    report = compare_training(wrong, reference, _batches()[:2], rules=rules, seeds=(0, 1))
    assert report.first_divergence.text == "step 1, slot exp_avg layers.1.weight"
    assert {row.name for row in report.rows if row.beyond and row.step == 1 and row.kind == "slot"} == {
        "layers.1.weight",
        "layers.1.bias",
    }


class TorchAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def attention(params, x):
    """Two heads, with matrices of their own for queries, keys and values."""
    q, k, v = (
        (x @ params[name]["kernel"] + params[name]["bias"]).reshape(*x.shape[:2], 2, 3)
        for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(3))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    return mixed @ params["out"]["kernel"] + params["out"]["bias"]


FUSED = Rules(
    names={"out": "attention.out_proj"},
    fused={
        "attention.in_proj_weight": ["query.kernel", "key.kernel", "value.kernel"],
        "attention.in_proj_bias": ["query.bias", "key.bias", "value.bias"],
    },
)


def test_a_fused_projection_is_compared_as_torch_has_it():
    torch.manual_seed(0)
    theirs, rng = TorchAttention(), np.random.default_rng(0)
    empty = {name: {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)} for name in ("query", "key", "value", "out")}
    ours = copy_weights(theirs, (attention, empty), rules=FUSED).module
    batches = [tuple(rng.standard_normal((2, 4, 6)).astype(np.float32) for _ in range(2)) for _ in range(2)]
    training = jax_training(ours, optax.adamw(0.01, weight_decay=0.01), mean_square, rules=FUSED)
    reference = torch_training(theirs, adamw(), mean_square)
    report = compare_training(training, reference, batches, seeds=(0, 1))
    report.assert_equal()
    assert "4 of 4 gradients, 8 of 8 slots, 4 of 4 updates, 4 of 4 parameters" in report.coverage()

    def double(path, x):
        return 2 * x if "key" in jax.tree_util.keystr(path, simple=True) and x.ndim == 2 else x

    keys_twice = optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(double, updates))
    wrong = training.fresh(optimizer=optax.chain(keys_twice, optax.adamw(0.01, weight_decay=0.01)))
    report = compare_training(wrong, reference, batches, seeds=(0, 1))
    assert report.first_divergence.text == "step 1, slot exp_avg attention.in_proj_weight"
    row = int(report.first_divergence.detail.partition("(")[2].partition(",")[0])
    assert 6 <= row < 12, "the keys' rows of the three"


IN_ORDER = ["loss", "gradient", "slot", "update", "parameter"]


@pytest.mark.parametrize("kind", IN_ORDER)
def test_of_one_step_the_kind_that_comes_about_first_is_named(kind):
    def side(wrong):
        names = {"loss": "loss", "slot": "slot exp_avg x"} | {one: f"{one} x" for one in IN_ORDER[1::2] + IN_ORDER[4:]}
        left = {names[one]: np.float64(2.0 if one in wrong else 1.0) for one in reversed(IN_ORDER)}
        return lambda batch: left

    from_here = IN_ORDER[IN_ORDER.index(kind) :]
    report = compare_training(side(from_here), side(()), [0.0], allowance=lambda step, name: 0.0)
    assert report.first_divergence.kind == kind
    assert [row.kind for row in report.rows] == IN_ORDER


def test_any_callable_does_with_an_allowance_of_its_own():
    def side(rate):
        value = np.array([3.0, 4.0])

        def step(batch):
            nonlocal value
            gradient = 2 * value * batch
            value = value - rate * gradient
            return {
                "loss": (value**2).sum(),
                "gradient x": gradient,
                "update x": -rate * gradient,
                "parameter x": value,
            }

        return step

    def exact(step, name):
        return 0.0

    compare_training(side(0.1), side(0.1), [1.0, 2.0], allowance=exact).assert_equal()
    report = compare_training(side(0.1), side(0.2), [1.0, 2.0], allowance=exact)
    assert (report.first_divergence.step, report.first_divergence.kind) == (1, "loss")
    with pytest.raises(CompareError, match=r"cannot be run again.*pass torch_training"):
        compare_training(side(0.1), side(0.1), [1.0])


def test_bad_input_is_refused_in_one_line():
    flax_net, torch_net = _nets()
    ours = jax_training(flax_net, optax.sgd(0.1), mean_square)
    theirs = torch_training(torch_net, sgd(), mean_square)
    used = torch.optim.SGD(torch_net.parameters(), lr=0.1, momentum=0.9)
    mean_square(torch_net, [torch.tensor(x) for x in _batches()[0]]).backward()
    used.step()
    stranger = torch.optim.SGD(TorchNet().parameters(), lr=0.1)
    dropping = torch.nn.Sequential(torch.nn.Linear(IN, OUT), torch.nn.Dropout(0.5))
    refusals = [
        (lambda: compare_training(ours, theirs, []), "batches is empty"),
        (lambda: compare_training(ours, theirs, _batches(), dtype="float32"), "must compute in float32"),
        (lambda: compare_training(ours, theirs, _batches(), dtype="bfloat16"), "must be float64 or float32"),
        (lambda: compare_training(None, theirs, _batches()), "step_a=None must be callable"),
        (lambda: torch_training(torch_net, used, mean_square), "has taken steps and must be new"),
        (lambda: torch_training(torch_net, stranger, mean_square), "no parameters of the module"),
        (lambda: torch_training(torch_net, sgd(), mean_square, clip=0.0), "clip=0.0 must be positive"),
        (lambda: torch_training(torch_net, None, mean_square), "must be a torch.optim.Optimizer or a function"),
        (lambda: compare_training(theirs, ours, _batches()), "step_b is the JAX training"),
        (lambda: compare_training(ours, ours, _batches()), "step_b is the JAX training"),
        (lambda: compare_training(ours, theirs, None), "batches=NoneType must be a list"),
        (lambda: compare_training(ours, theirs, {"x": 1}), "batches=dict must be a list"),
        (lambda: compare_training(ours, theirs, [3.0]), "loss does not run on this batch"),
        (lambda: ours([1.0, 2.0]), "the JAX loss does not run on this batch"),
        (lambda: jax_training(flax_net, used, mean_square), "is torch's SGD"),
        (lambda: jax_training(flax_net, torch.optim.AdamW, mean_square), "is torch's AdamW"),
        (lambda: jax_training(flax_net, optax.sgd, mean_square), "must have init and update"),
        (lambda: torch_training(torch_net, optax.sgd(0.1), mean_square), "is an optax transformation"),
        (lambda: torch_training(torch_net, optax.sgd, mean_square), "the factory returned GradientTransformation"),
        (lambda: torch_training(torch_net, lambda p: torch.optim.SGD(), mean_square), "cannot be made: TypeError"),
        *(
            (lambda result=result: jax_training(flax_net, optax.sgd(0.1), lambda m, b: result)(None), words)
            for result, words in ((None, "returned a NoneType"), ((1.0, 2.0), "returned a tuple"), (1, "a int"))
        ),
        *(
            (lambda result=result: torch_training(torch_net, sgd(), lambda m, b: result)(None), words)
            for result, words in (
                (None, "returned a NoneType"),
                (torch.ones(2), "an array of shape (2,)"),
                ((torch.ones(()),), "returned a tuple"),
                (torch.ones(()), "does not depend on a trained parameter"),
            )
        ),
        (
            lambda: compare_training(
                lambda b: {"loss": 1.0, "parameter weight": np.ones(3)}, theirs, _batches(), allowance=lambda *_: 0.0
            ),
            "no tensor's name is common to both sides: JAX has parameter weight",
        ),
        (lambda: torch_training(flax_net, sgd(), mean_square), "must be a torch.nn.Module"),
        (lambda: jax_training(flax_net, sgd(), mean_square), "must have init and update"),
        (lambda: jax_training(torch_net, optax.sgd(0.1), mean_square), "is a torch module"),
        (lambda: jax_training(flax_net, optax.sgd(0.1), lambda m, b: m(b[0]))(_batches()[0]), "return a scalar"),
        (lambda: torch_training(torch_net, sgd(), lambda m, b: m(b[0]))(_batches()[0]), "return a scalar"),
        (
            lambda: compare_training(ours, torch_training(dropping, sgd(), mean_square), _batches()),
            "two runs of the reference differ",
        ),
        (
            lambda: compare_training(lambda b: {"los": 1.0}, theirs, _batches()),
            "names are loss, gradient NAME",
        ),
    ]
    for call, words in refusals:
        with pytest.raises(CompareError) as refusal:
            call()
        assert words in str(refusal.value) and "\n" not in str(refusal.value), words
        assert ";" in str(refusal.value), "a refusal names the remedy"


def test_the_report_is_written():
    report = compared(optax.adamw(0.01), adamw(), title="two <nets>")
    values = json.loads(report.to_json())
    assert values["equal"] is False and values["first_divergence"]["kind"] == "update"
    assert len(values["rows"]) == len(report.rows) and values["diagnosis"] == report.diagnosis
    lines = report.summary()
    assert [line.kind for line in lines if line.step == 1] == ["loss", "gradient", "slot", "update", "parameter"]
    for line in lines:
        mine = [row for row in report.rows if (row.step, row.kind) == (line.step, line.kind)]
        assert line.error == max(row.error for row in mine) and line.beyond == sum(row.beyond for row in mine)
    assert len(report.table().splitlines()) == len(lines) + 1
    figure = report.picture()
    assert isinstance(figure, Figure)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"loss", "gradient", "slot", "update", "parameter", "x: beyond its allowance"} <= set(texts)
    assert len(texts) == len(set(texts))
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "step"


def test_what_is_no_number_is_beyond_any_allowance():
    report = compared(optax.sgd(0.1), sgd(), loss=lambda m, b: mean_square(m, b) * jnp.nan, steps=1)
    assert report.first_divergence.kind == "loss" and report.first_divergence.error == math.inf
    assert json.loads(report.to_json())["first_divergence"]["error"] == "inf"
    assert isinstance(report.picture(), Figure)


def test_slots_are_found_by_structure():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    masked = optax.masked(optax.trace(0.9), {"a": True, "b": False})
    state = optax.chain(masked, optax.scale_by_adam(), optax.trace(0.5), optax.scale_by_schedule(lambda t: t)).init(
        params
    )
    assert set(optax_slots(state, params)) == {
        *("trace a", "mu a", "mu b", "nu a", "nu b", "count a", "count b", "trace2 a", "trace b"),
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_replay_is_torchs_own_optimizer(kind):
    """In every family, with every hyperparameter that its recipe reads, against torch in float64."""
    options = {
        "SGD": dict(momentum=0.9, dampening=0.3, weight_decay=0.1),
        "RMSprop": dict(momentum=0.9, centered=True, weight_decay=0.1),
        "Adagrad": dict(lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.2),
        "Adam": dict(amsgrad=True, weight_decay=0.1),
        "NAdam": dict(weight_decay=0.1, decoupled_weight_decay=True),
    }.get(kind, dict(weight_decay=0.1))
    _, torch_net, batches = _matrices()
    theirs = torch_training(torch_net, lambda p: getattr(torch.optim, kind)(p, lr=0.01, **options), mean_square)
    record, done = _record(theirs, batches, "step_b")
    limits = _measured(theirs, batches, record, "float64", (0, 1))[1:]
    trajectory = _trajectory(record)
    recipe = Recipe(kind, tuple(done.settings))
    assert reproduces(recipe, trajectory, (), limits, 2.0**-53)
    assert len(list(replay(recipe, trajectory, "weight"))) == len(batches)
    assert "no term of the optimizer differs" in diagnose(recipe, trajectory, trajectory, limits, 2.0**-53)
    other = diagnose(recipe._replace(kind="Rprop"), trajectory, trajectory, limits, 2.0**-53)
    assert other.startswith("no recipe of torch's Rprop")
