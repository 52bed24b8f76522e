"""Muon among optax's wrappers and JAX's transformations: what optax people expect, against Jordan's rule in float64."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

from jax_impl.muon import (
    FULLY_CONNECTED,
    Heads,
    Matrix,
    MultiSteps,
    add_cautious_decayed_weights,
    clip_qk,
    muon,
    muon_or,
    orthogonalize,
    scale_by_muon,
    scale_by_neuron_norm,
    two_axes,
)
from parity_tests.compare.tolerance import SAFETY, check
from parity_tests.newton_schulz_error import allowance, newton_schulz
from recipe.contract import UNIT_ROUNDOFF
from tests.muon_models import drawn, jit, shapes

RATE, BETA = 0.25, 0.95
# Two kernels, (fan_in, fan_out).
KERNELS = {"up": shapes(10, 14), "down": shapes(15, 6)}
PARAMS = drawn(KERNELS, 1)
GRADS = [drawn(KERNELS, seed) for seed in range(10, 14)]
RATES = [0.5, 0.25, 0.125, 0.0625]


def schedule(count):
    return jnp.asarray(RATES)[count]


ours = functools.partial(muon, ns_dtype="float32")


def on_paper(grads: list[dict], rates: list[float], beta: float = BETA) -> list[dict[str, np.ndarray]]:
    """Each update, (fan_in, fan_out), in float64: Jordan's rule."""
    updates = []
    mu = {name: np.zeros(grad.shape) for name, grad in grads[0].items()}
    for step, rate in zip(grads, rates, strict=True):
        updates.append({})
        for name, grad in step.items():
            g = np.asarray(grad, np.float64)
            mu[name] = beta * mu[name] + (1 - beta) * g
            fan_in, fan_out = g.shape
            direction = beta * mu[name] + (1 - beta) * g
            updates[-1][name] = -rate * max(1.0, fan_out / fan_in) ** 0.5 * newton_schulz(direction.T).T
    return updates


def check_updates(what: str, updates: list[dict], truths: list[dict], dtype: str = "float32", grads=None) -> None:
    """To rounding; directions are averages, conditioned like the gradients they are made of."""
    for step, (update, truth) in enumerate(zip(updates, truths, strict=True)):
        assert update.keys() == truth.keys()
        for name, value in update.items():
            limit = SAFETY * max(allowance(np.asarray(g[name], np.float64).T, dtype) for g in grads or GRADS)
            check(f"{what}: {name} at step {step}", value, truth[name], limit)


class TracedOnce:
    """A jitted function that refuses to be traced a second time."""

    def __init__(self, function: Callable) -> None:
        self.traces = 0

        def counting(*args):
            self.traces += 1
            assert self.traces == 1, "traced again"
            return function(*args)

        self.call = jit(counting)

    def __call__(self, *args):
        return self.call(*args)


def run(transformation, params=PARAMS, grads=None) -> tuple[list[dict], Any]:
    """Updates by a jitted step, and the last state."""
    state, history = transformation.init(params), []

    @TracedOnce
    def step(grads, state, params):
        updates, state = transformation.update(grads, state, params)
        return updates, state, optax.apply_updates(params, updates)

    for grad in grads or GRADS:
        updates, state, params = step(grad, state, params)
        history.append(updates)
    return history, state


CONSTANT = on_paper(GRADS, [RATE] * 4)
SCHEDULED = on_paper(GRADS, RATES)


def injected(learning_rate, static=("matrices",), **options):
    return optax.inject_hyperparams(muon, static_args=static)(learning_rate, ns_dtype="float32", **options)


AS_OPTAX = {
    "constant": (ours(RATE), CONSTANT),
    "schedule": (ours(schedule), SCHEDULED),
    "inject_hyperparams": (optax.inject_hyperparams(ours)(learning_rate=RATE), CONSTANT),
    "inject_hyperparams, plain, in bfloat16": (optax.inject_hyperparams(muon)(learning_rate=RATE), CONSTANT),
    "inject_hyperparams, a schedule and a rule": (injected(schedule, matrices=two_axes, batched=True), SCHEDULED),
    "chain": (optax.chain(optax.scale(8.0), ours(2 * RATE), optax.scale(0.5)), CONSTANT),
    "partition": (optax.partition({"a": ours(RATE), "b": ours(schedule)}, {"up": "a", "down": "b"}), None),
    "multi_transform": (optax.multi_transform({0: ours(schedule)}, {"up": 0, "down": 0}), SCHEDULED),
    "apply_if_finite": (optax.apply_if_finite(ours(RATE), 3), CONSTANT),
    "every step of MultiSteps": (MultiSteps(ours(schedule), 1), SCHEDULED),
    "a rule by hand": (ours(RATE, matrices=lambda *_: Matrix((0,), (1,))), CONSTANT),
}


@pytest.mark.parametrize("what", AS_OPTAX)
def test_four_updates_are_jordans_and_traced_once(what):
    transformation, truth = AS_OPTAX[what]
    truth = truth or [{"up": a["up"], "down": b["down"]} for a, b in zip(CONSTANT, SCHEDULED, strict=True)]
    updates, _ = run(transformation)
    check_updates(what, updates, truth, "bfloat16" if "bfloat16" in what else "float32")


def test_an_injected_rate_can_be_set_without_another_trace():
    transformation = injected(RATE)
    update = TracedOnce(transformation.update)
    state = transformation.init(PARAMS)
    once, _ = update(GRADS[0], state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.asarray(2 * RATE, "float32")
    twice, _ = update(GRADS[0], state, PARAMS)
    for name in KERNELS:  # twice a float is exact
        np.testing.assert_array_equal(twice[name], 2 * once[name])
    assert set(state.hyperparams) == {"learning_rate", "beta", "eps", "weight_decay"}


def test_what_inject_hyperparams_makes_of_a_dtype_is_refused():
    """jnp.bfloat16 can be called, so optax takes it for a schedule."""
    with pytest.raises(ValueError, match=r"ns_dtype=Array.*'bfloat16'"):
        optax.inject_hyperparams(muon)(RATE, ns_dtype=jnp.bfloat16).init(PARAMS)


def test_injected_decay_and_neurons_equal_given_ones():
    options = dict(weight_decay=0.1, neuron_beta=0.9, cautious=True, momentum="heavy_ball", scale="consistent_rms")
    for given, by_optax in zip(run(ours(RATE, **options))[0], run(injected(RATE, **options))[0], strict=True):
        check_updates("injected", [by_optax], [given])


def out_in(path, leaf):
    """A rule by which kernels are (fan_out, fan_in), and one of them is none."""
    return Matrix((-1,), (-2,)) if path == "up" else None


HYBRIDS = {
    "said once": muon_or(out_in, ours(RATE), optax.sgd(1.0)),
    "said twice": muon_or(out_in, ours(RATE, matrices=out_in), optax.sgd(1.0)),
    "injected": muon_or(out_in, optax.inject_hyperparams(ours)(learning_rate=RATE), optax.sgd(1.0)),
    "in micro-steps": optax.with_extra_args_support(MultiSteps(muon_or(out_in, ours(RATE), optax.sgd(1.0)), 1)),
}


@pytest.mark.parametrize("what", HYBRIDS)
def test_a_muon_takes_the_rule_of_the_hybrid_around_it(what):
    """Else the scale of (10, 14) as (fan_out, fan_in) would be sqrt(1.4) for 1."""
    updates, _ = run(HYBRIDS[what])
    turned = on_paper([{"up": grad["up"].T} for grad in GRADS], [RATE] * 4)
    for step, update in enumerate(updates):
        limit = SAFETY * max(allowance(np.asarray(grad["up"], np.float64), "float32") for grad in GRADS)
        check(f"{what} at step {step}", update["up"].T, turned[step]["up"], limit)
        np.testing.assert_array_equal(update["down"], -GRADS[step]["down"])
    with pytest.raises(ValueError, match=r"scalar \(\) is no matrix by two_axes"):
        ours(RATE).init({"scalar": jnp.ones(())})


def test_masked_leaves_pass_as_gradients():
    """optax's rule: what is masked out is left as it is; here the other optimizer comes after."""
    params = PARAMS | {"scale": jnp.ones(5)}
    mask = {"up": True, "down": False, "scale": False}
    grads = GRADS[0] | {"scale": jnp.arange(5.0)}
    updates, state = run(optax.masked(ours(RATE), mask), params, [grads])
    check_updates("masked", [{"up": updates[0]["up"]}], [{"up": CONSTANT[0]["up"]}])
    for name in ("down", "scale"):
        np.testing.assert_array_equal(updates[0][name], grads[name])
    assert jax.tree.leaves(state.inner_state[0].mu)[0].shape == (10, 14) and len(jax.tree.leaves(state)) == 1


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been():
    broken = GRADS[0] | {"up": GRADS[0]["up"].at[2, 3].set(jnp.nan)}
    updates, state = run(optax.apply_if_finite(ours(RATE), 3), grads=[GRADS[0], broken, *GRADS[1:]])
    assert not any(np.any(update) for update in updates[1].values())
    check_updates("around it", [updates[0], *updates[2:]], CONSTANT)
    assert int(state.total_notfinite) == 1
    # Without it what is not finite is seen, in its own leaf alone.
    infinite = broken | {"up": GRADS[0]["up"].at[2, 3].set(jnp.inf)}
    alone = ours(RATE)
    step = TracedOnce(lambda grads: alone.update(grads, alone.init(PARAMS))[0])
    for grads in (broken, infinite):
        updates = step(grads)
        assert not np.isfinite(updates["up"]).any()
        check_updates("its neighbour", [{"down": updates["down"]}], [{"down": CONSTANT[0]["down"]}])


def test_bfloat16_parameters_with_float32_gradients_inside_a_scan():
    """A scan's carry must keep its types; the momentum of optax's own Muon does not."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    transformation = ours(RATE)

    def step(carry, grads):
        params, state = carry
        updates, state = transformation.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    stacked = jax.tree.map(lambda *grads: jnp.stack(grads), *GRADS)
    (after, state), updates = jit(lambda params: jax.lax.scan(step, (params, transformation.init(params)), stacked))(
        params
    )
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves((updates, state))} == {jnp.dtype("float32")}
    check_updates("scanned", [{name: u[i] for name, u in updates.items()} for i in range(4)], CONSTANT)
    for name, mu in state[0].mu.items():
        weights = [(1 - BETA) * BETA ** (len(GRADS) - 1 - i) for i in range(len(GRADS))]
        truth = sum(weight * np.asarray(g[name], np.float64) for weight, g in zip(weights, GRADS, strict=True))
        check(name, mu, truth, 3 * len(GRADS) * UNIT_ROUNDOFF["float32"])  # two products and a sum a step


def test_vmap_over_seeds_equals_a_loop():
    transformation = ours(RATE, batched=False)
    stacked = jax.tree.map(lambda *grads: jnp.stack(grads), *GRADS)

    def first(grads):
        return transformation.update(grads, transformation.init(grads))[0]

    together = jit(jax.vmap(first))(stacked)
    single = jit(first)
    for index, grads in enumerate(GRADS):
        check_updates("vmap", [{name: x[index] for name, x in together.items()}], [single(grads)])


def test_vmap_over_learning_rates_and_betas_as_traced_numbers():
    rates, betas = jnp.asarray(RATES[:3]), jnp.asarray([0.0, 0.5, 0.9])

    def two_updates(rate, beta):
        transformation = ours(rate, beta)
        state, updates = transformation.init(PARAMS), []
        for grads in GRADS[:2]:
            update, state = transformation.update(grads, state, PARAMS)
            updates.append(update)
        return updates

    together = jit(jax.vmap(two_updates))(rates, betas)
    for index, (rate, beta) in enumerate(zip(RATES, betas.tolist(), strict=False)):
        truth = on_paper(GRADS[:2], [rate] * 2, beta)
        check_updates("vmap", [{name: x[index] for name, x in update.items()} for update in together], truth)


TYPED = {
    "float32": (lambda: ours(RATE), KERNELS, KERNELS),
    "bfloat16 parameters": (lambda: ours(RATE, weight_decay=0.1), "bfloat16", "float32"),
    "bfloat16 gradients": (lambda: ours(RATE), "float32", "bfloat16"),
    "both bfloat16": (lambda: muon(RATE, neuron_beta=0.9), "bfloat16", "bfloat16"),
    "float16": (lambda: muon(RATE, weight_decay=0.1, cautious=True), "float16", "float16"),
    "momentum in bfloat16": (lambda: ours(RATE, mu_dtype="bfloat16", neuron_beta=0.9), "float32", "float32"),
    "heavy ball": (lambda: ours(schedule, momentum="heavy_ball", gram=True), "bfloat16", "float32"),
    "injected": (lambda: injected(RATE, weight_decay=0.1, neuron_beta=0.9), "bfloat16", "float32"),
    "MultiSteps": (lambda: MultiSteps(ours(RATE), 3), "float32", "float32"),
    "MultiSteps of narrow parameters": (lambda: MultiSteps(ours(RATE), 3), "bfloat16", "float32"),
    "cautious part": (lambda: add_cautious_decayed_weights(0.1), "bfloat16", "float32"),
}


@pytest.mark.parametrize("what", TYPED)
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
def test_types_are_those_it_was_given_and_eval_shape_knows_them(what, batched, monkeypatch):
    """The state's types are a fixed point, so nothing is traced twice; updates have the gradients'."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if batched else "cpu")
    factory, of_params, of_grads = TYPED[what]
    params, grads = (
        jax.tree.map(lambda x, dtype=dtype: shapes(*x.shape, dtype=dtype), KERNELS) if isinstance(dtype, str) else dtype
        for dtype in (of_params, of_grads)
    )
    transformation = factory()
    state = jax.eval_shape(transformation.init, params)
    updates, after = jax.eval_shape(transformation.update, grads, state, params)
    types = [jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree) for tree in (state, after)]
    assert types[0] == types[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    weak = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=True), x) for x in (grads, params)]
    _, again = jax.eval_shape(transformation.update, weak[0], state, weak[1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), again) == types[0]


def test_eval_shape_tells_what_update_returns():
    transformation = muon_or(two_axes, ours(schedule, weight_decay=0.1), optax.adam(0.1))
    params = PARAMS | {"scale": jnp.ones(5), "none": None}
    told = jax.eval_shape(lambda p: transformation.update(p, transformation.init(p), p), params)
    done = jit(lambda p: transformation.update(p, transformation.init(p), p))(params)
    chex.assert_trees_all_equal_structs(told, done)
    chex.assert_trees_all_equal_shapes_and_dtypes(told, done)


def test_parameters_and_state_can_be_donated():
    transformation = ours(RATE, weight_decay=0.1)

    def step(params, state, grads):
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    traces = []

    def counting(*args):
        traces.append(1)
        return step(*args)

    kept, donating = jit(step), jit(counting, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = transformation.init(params)
    truth = kept(*kept(params, state, GRADS[0]), GRADS[1])
    given = jax.tree.leaves((params, state))
    once = donating(params, state, GRADS[0])
    assert all(leaf.is_deleted() for leaf in given)
    chex.assert_trees_all_equal(donating(*once, GRADS[1]), truth)
    assert len(traces) == 1


def test_orbax_saves_and_restores_the_state(tmp_path):
    params = {"scale": jnp.ones(5), "narrow": jnp.ones((4, 7), jnp.bfloat16)}
    transformation = muon_or(two_axes, ours(schedule, neuron_beta=0.9), optax.adam(0.1))
    grads = {"scale": jnp.arange(5.0), "narrow": drawn(shapes(4, 7))}
    update = TracedOnce(transformation.update)
    _, state = update(grads, transformation.init(params), params)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(transformation.init, params))
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_dtypes(restored, state)
    chex.assert_trees_all_equal(update(grads, restored, params), update(grads, state, params))


def test_the_momentum_lies_where_its_parameter_does():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = jax.device_put({"up": PARAMS["up"]}, sharding)
    assert ours(RATE).init(params)[0].mu["up"].sharding == sharding


def test_optax_looks_into_the_state():
    transformation = muon_or(two_axes, ours(RATE), optax.adam(0.1))
    params = PARAMS | {"scale": jnp.ones(5)}
    state = transformation.init(params)
    shaped = optax.tree.map_params(transformation, lambda leaf: leaf.shape, state)
    assert optax.tree.get(shaped, "mu", filtering=lambda keys, _: "muon" in str(keys))["up"] == (10, 14)
    mu = optax.tree.get(ours(RATE).init(PARAMS), "mu")
    assert jax.tree.structure(mu) == jax.tree.structure(PARAMS)


# Micro-steps.
def dots(jaxpr, inside: bool = False) -> tuple[int, int]:
    """Matrix products (outside, inside) the branches of a condition."""
    counts = np.zeros(2, int)
    for equation in jaxpr.eqns:
        counts[int(inside)] += equation.primitive.name == "dot_general"
        for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                counts += dots(inner, inside or equation.primitive.name == "cond")
    return tuple(counts)


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
def test_newton_schulz_runs_only_when_a_step_is_applied(batched):
    def products(wrapper):
        transformation = wrapper(ours(RATE, batched=batched), 3)
        state = jax.eval_shape(transformation.init, PARAMS)
        return dots(jax.make_jaxpr(transformation.update)(GRADS[0], state, PARAMS).jaxpr)

    # Three products for each of the two kernels, in one branch of a condition.
    assert products(MultiSteps) == (0, 6)


def test_the_optimizer_runs_only_when_a_step_is_applied():
    """What the program does, not what it says: optax's own runs at each of five micro-steps, ours at two."""
    ran = []

    def counting(wrapper):
        def update(updates, state, params=None):
            jax.debug.callback(lambda: ran.append(wrapper))
            return updates, state

        return wrapper(optax.GradientTransformation(lambda _: optax.EmptyState(), update), 2)

    for wrapper in (MultiSteps, optax.MultiSteps):
        run(counting(wrapper), grads=[*GRADS, GRADS[0]])
    jax.effects_barrier()
    assert (ran.count(MultiSteps), ran.count(optax.MultiSteps)) == (2, 5)


MICRO_STEPS = {
    "more and more": (lambda step: step + 1, {}),
    "sums of three": (3, {"use_grad_mean": False}),
    "what is not finite is skipped": (2, {"should_skip_update_fn": optax.skip_not_finite}),
}


@pytest.mark.parametrize("what", MICRO_STEPS)
def test_micro_steps_are_optaxs(what):
    """With AdamW beside it, bfloat16 parameters and float32 gradients: its moments must keep their types as well."""
    every, options = MICRO_STEPS[what]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS | {"bias": jnp.ones(7)})
    grads = [g | {"bias": jnp.full(7, 0.5 + i, "float32")} for i, g in enumerate([*GRADS, *GRADS[:3]])]
    if "finite" in what:
        grads[1] = grads[1] | {"up": grads[1]["up"].at[1, 1].set(jnp.nan)}
    results = []
    for wrapper in (MultiSteps, optax.MultiSteps):
        both = muon_or(two_axes, ours(RATE), optax.adamw(0.1))
        multi = wrapper(both, every, **options)
        assert isinstance(multi, optax.MultiSteps)
        results.append(run(multi.gradient_transformation(), params, grads))
    (ours_, state), (theirs, their_state) = results
    chex.assert_trees_all_equal_shapes_and_dtypes(state, their_state)
    assert (int(state.mini_step), int(state.gradient_step)) == (
        int(their_state.mini_step),
        int(their_state.gradient_step),
    )
    applied = [any(np.any(x) for x in jax.tree.leaves(update)) for update in ours_]
    assert applied == [any(np.any(x) for x in jax.tree.leaves(update)) for update in theirs] and 1 < sum(applied) < 7
    for update, their in zip(ours_, theirs, strict=True):
        kernels = [{name: tree[name] for name in KERNELS} for tree in (update, their)]
        check_updates(what, [kernels[0]], [kernels[1]])
        # AdamW: a dozen roundings, in bfloat16 where it decays.
        check("bias", update["bias"], np.asarray(their["bias"], np.float64), 12 * UNIT_ROUNDOFF["bfloat16"])


def test_micro_steps_under_vmap():
    multi = MultiSteps(ours(RATE), 2)

    def last_of_two(grads):
        _, state = multi.update(grads, multi.init(PARAMS), PARAMS)
        return multi.update(grads, state, PARAMS)[0]

    together = jit(jax.vmap(last_of_two))(jax.tree.map(lambda *grads: jnp.stack(grads), *GRADS[:2]))
    for index, grads in enumerate(GRADS[:2]):
        alone = on_paper([grads], [RATE])
        check_updates("vmap", [{name: x[index] for name, x in together.items()}], alone)


def test_logits_reach_the_clip_through_every_wrapper():
    """QK-clip inside MultiSteps inside a partition's chain; negative logits and those below the threshold pass."""

    def heads(path, leaf):
        return Heads("first", -1, 1.0) if path == "up" else None

    chained = optax.chain(muon_or(two_axes, ours(RATE), optax.sgd(0.5)), clip_qk(heads, threshold=10.0))
    multi = MultiSteps(chained, 2)

    @jit
    def second(logits):
        _, state = multi.update(GRADS[0], multi.init(PARAMS), PARAMS, max_logits={"first": logits})
        return multi.update(GRADS[0], state, PARAMS, max_logits={"first": logits})[0]

    updates = second(jnp.asarray([20.0, -50.0]))
    truth = on_paper([GRADS[0]], [RATE])[0]
    check_updates("not clipped", [{"down": updates["down"]}], [{"down": truth["down"]}])
    weights = np.asarray(PARAMS["up"], np.float64)
    whole = weights + truth["up"]
    after = weights + np.asarray(updates["up"], np.float64)
    limit = SAFETY * allowance(np.asarray(GRADS[0]["up"], np.float64).T, "float32")
    check("a head over the threshold", after[:, :7], whole[:, :7] / 2, limit)
    check("a head far below zero", after[:, 7:], whole[:, 7:], limit)


def test_a_clip_says_which_logits_it_lacks_and_can_be_injected():
    injected_clip = optax.inject_hyperparams(clip_qk, static_args="heads")(
        lambda *_: Heads("first", -1), threshold=10.0
    )
    state = injected_clip.init(PARAMS)
    update = jit(injected_clip.update)
    low = update(GRADS[0], state, PARAMS, max_logits={"first": jnp.asarray([1.0, 2.0])})[0]
    chex.assert_trees_all_equal(low, GRADS[0])
    with pytest.raises(ValueError, match="max_logits has no 'first', as down needs, but second"):
        update(GRADS[0], state, PARAMS, max_logits={"second": jnp.ones(2)})


# Unusual numbers.
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_any_size(dtype, batched):
    """1e20 is squared beyond float32, and 1e-30 below it; beside the latter, eps is all."""
    transformation = muon(RATE, ns_dtype=dtype, batched=batched)
    step = TracedOnce(lambda grads: transformation.update(grads, transformation.init(PARAMS))[0])
    for scale in (1.0, 1e20, 1e-30):
        grads = {name: jnp.asarray(np.asarray(g, np.float64) * scale, "float32") for name, g in GRADS[0].items()}
        check_updates(str(scale), [step(grads)], on_paper([grads], [RATE]), dtype, [grads])


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
def test_matrices_without_entries_pass_through(batched):
    """A layer list that is empty, or a width of zero: nothing to orthogonalise, and its neighbour does not notice."""
    params = {"none": jnp.ones((0, 14)), "no layers": jnp.ones((0, 10, 14)), "no input": jnp.ones((3, 0, 14))}
    matrices = functools.partial(lambda path, leaf: FULLY_CONNECTED)
    transformation = ours(RATE, matrices=matrices, batched=batched, neuron_beta=None)
    updates, _ = run(transformation, PARAMS | params, [GRADS[0] | params])
    chex.assert_trees_all_equal_shapes_and_dtypes(updates[0], PARAMS | params)
    check_updates("neighbours", [{name: updates[0][name] for name in KERNELS}], CONSTANT[:1])
    neurons = scale_by_neuron_norm(matrices=matrices)
    _, state = jit(lambda p: neurons.update(p, neurons.init(p)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
def test_leaves_of_many_dtypes_do_not_touch_each_other(batched):
    """Alike in shape, so that they share a batch, in which no leaf may lose digits to another."""
    dtypes = {"wide": "float32", "narrow": "bfloat16", "half": "float16"}
    grads = {name: drawn(shapes(10, 14, dtype=dtype), 5) for name, dtype in dtypes.items()}
    (updates,), state = run(ours(RATE, batched=batched), grads, [grads])
    assert {name: str(x.dtype) for name, x in updates.items()} == dtypes
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    for name, grad in grads.items():
        (truth,) = on_paper([{name: np.asarray(grad, np.float64)}], [RATE])
        # Newton-Schulz in float32; its result, times the scale, times the rate: three roundings to the leaf's dtype.
        limit = allowance(np.asarray(grad, np.float64).T, "float32") + 3 * float(jnp.finfo(grad.dtype).eps) / 2
        check(name, updates[name], truth[name], limit)


def test_numpy_parameters():
    """NumPy's float64 is JAX's float32 where x64 is off, without a warning."""
    params, grads = ({"up": np.asarray(tree["up"], "float64")} for tree in (PARAMS, GRADS[0]))
    transformation = ours(RATE)
    updates, state = transformation.update(grads, transformation.init(params), params)
    check_updates("NumPy", [updates], [{"up": CONSTANT[0]["up"]}])
    assert {x.dtype for x in jax.tree.leaves((updates, state, orthogonalize(grads)))} == {jnp.dtype("float32")}


def test_float64_is_kept_where_x64_is_on():
    with jax.enable_x64(True):
        grads = [{name: jnp.asarray(x, "float64") for name, x in GRADS[0].items()}]
        updates, state = run(muon(RATE, ns_dtype="float64"), grads[0], grads)
        assert {x.dtype for x in jax.tree.leaves((updates, state[0]))} == {jnp.dtype("float64")}
        check_updates("float64", updates, CONSTANT[:1], "float64")


def test_updates_can_be_differentiated():
    """Meta-learning: the derivative along a direction, forward and backward, is one number."""
    transformation = ours(RATE)
    grads, direction, weights = (g["up"] for g in GRADS[:3])

    def total(grads):
        updates, _ = transformation.update(grads, transformation.init(grads))
        return jnp.vdot(weights, updates)

    forward, gradient = jit(lambda g: (jax.jvp(total, (g,), (direction,))[1], jax.grad(total)(g)))(grads)
    backward = np.vdot(gradient, direction)
    # Both sum the same products in another order: kappa is the size of the terms over that of their sum.
    size = np.linalg.norm(gradient) * np.linalg.norm(direction)
    limit = SAFETY * allowance(np.asarray(grads, np.float64).T, "float32")
    check("derivative", np.asarray(forward), np.asarray(backward), limit * float(size / abs(backward)))


def test_momentum_is_kept_wider_than_a_narrow_parameter():
    """An average of equal gradients reaches them, where in bfloat16 it would stop 6 % short."""
    params = {"up": jnp.ones((10, 14), jnp.bfloat16)}
    transformation = scale_by_muon()
    state = transformation.init(params)
    _, state = jax.lax.scan(lambda state, _: (transformation.update(params, state)[1], None), state, None, length=400)[
        ::-1
    ]
    # Each step rounds a product, a product and a sum of the average, and 1 / (1 - beta) of them are remembered.
    limit = 3 * UNIT_ROUNDOFF["float32"] / (1 - BETA) + BETA**400
    check("momentum", state.mu["up"], np.ones((10, 14)), limit)
