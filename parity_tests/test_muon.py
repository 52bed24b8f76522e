"""Muon on both sides against a composition of public optax parts, in updates and in state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jax_impl.backend
import jax_impl.muon.batches
import torch_ref.muon.batches
from parity_tests.compare.tolerance import SAFETY, check, relative_error
from parity_tests.newton_schulz_error import allowance
from recipe.contract import UNIT_ROUNDOFF

STEPS = 8
LEARNING_RATE = 0.03
# Square, tall, wide and grouped-query shapes, as (fan_out, fan_in); two that share a Newton-Schulz call.
SHAPES = {"square": (48, 48), "tall": (96, 24), "wide": (24, 96), "key": (24, 48), "value": (24, 48)}
SCALES = {"unit gradients": 1.0, "tiny gradients": 1e-8}


def gradients(scale: float, steps: int = STEPS) -> list[dict[str, np.ndarray]]:
    """Correlated gradients by name, (fan_out, fan_in), exact in float32."""
    generator = np.random.default_rng(5)
    base = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    return [
        {
            name: ((mean + generator.standard_normal(mean.shape)) * scale).astype(np.float32).astype(np.float64)
            for name, mean in base.items()
        }
        for _ in range(steps)
    ]


def run_optax(transformation, grads, dtype):
    """Parameters from zero after each step, and the final state; matrices enter transposed, as Flax kernels."""
    params = {name: jnp.ones(shape[::-1], dtype) for name, shape in SHAPES.items()}
    state, history = transformation.init(params), []
    update = jax.jit(transformation.update)
    for step in grads:
        updates, state = update({name: jnp.asarray(g.T, dtype) for name, g in step.items()}, state, params)
        params = optax.apply_updates(params, updates)
        history.append({name: np.asarray(p, np.float64).T for name, p in params.items()})
    return history, state


def run_torch(grads, dtype, **options):
    params = {name: torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for name, shape in SHAPES.items()}
    optimizer = torch_ref.muon.Muon(params.values(), lr=LEARNING_RATE, **options)
    history = []
    for step in grads:
        for name, parameter in params.items():
            parameter.grad = torch.tensor(step[name], dtype=dtype)
        optimizer.step()
        history.append({name: p.detach().double().numpy().copy() for name, p in params.items()})
    return history, {name: optimizer.state[p]["mu"].double().numpy() for name, p in params.items()}


def moved(history):
    """Distance travelled, so that the starting point does not hide the update."""
    return [{name: value - 1.0 for name, value in step.items()} for step in history]


def limit(grads, name: str, dtype: str) -> float:
    """Allowance of the path after all steps: each step's, the momentum being as well conditioned as a gradient.

    Plus the rounding of parameters near one, whose every update has a root mean square near LEARNING_RATE / sqrt(side).
    """
    one = max(allowance(step[name], dtype) for step in grads)
    storage = "float64" if dtype == "float64" else "float32"
    side = max(SHAPES[name])
    return SAFETY * one + SAFETY * len(grads) * UNIT_ROUNDOFF[storage] * np.sqrt(side) / LEARNING_RATE


@pytest.fixture(params=SCALES, ids=str)
def scale(request):
    return SCALES[request.param]


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"weight_decay": 0.1}], ids=str)
def test_the_twins_agree_in_updates_and_momentum(scale, options):
    grads = gradients(scale)
    with jax.enable_x64(True):
        ours = jax_impl.muon.muon(LEARNING_RATE, ns_dtype=jnp.float64, **options)
        from_jax, state = run_optax(ours, grads, jnp.float64)
        momentum = {name: np.asarray(mu).T for name, mu in state[0].mu.items()}
    from_torch, torch_momentum = run_torch(grads, torch.float64, ns_dtype=torch.float64, **options)
    # Gradients of 1e-8 are conditioned like their unit-sized selves.
    unit = gradients(1.0)
    for step, (a, b) in enumerate(zip(moved(from_jax), moved(from_torch), strict=True)):
        for name in SHAPES:
            check(f"{name} at step {step}", a[name], b[name], 2 * limit(unit, name, "float64"))
    for name in SHAPES:
        # A convex combination of 8 gradients: at most one rounding of each product and sum per step.
        check(f"momentum {name}", momentum[name], torch_momentum[name], 4 * STEPS * UNIT_ROUNDOFF["float64"])


def test_public_optax_parts_make_the_same_optimizer(scale):
    """An oracle by other hands: heavy-ball momentum is 1/(1-beta) times ours, so eps is scaled to match."""
    grads, beta = gradients(scale), 0.95
    with jax.enable_x64(True):
        ours, _ = run_optax(jax_impl.muon.muon(LEARNING_RATE, beta, ns_dtype=jnp.float64), grads, jnp.float64)
        oracle = optax.chain(
            optax.trace(beta, nesterov=True),
            optax.contrib.muon(LEARNING_RATE, beta=0.0, nesterov=False, eps=1e-7 / (1.0 - beta)),
        )
        theirs, _ = run_optax(oracle, grads, jnp.float64)
    unit = gradients(1.0)
    for name in SHAPES:
        check(name, moved(ours)[-1][name], moved(theirs)[-1][name], 2 * limit(unit, name, "float64"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_errs_as_rounding_must(dtype):
    grads = gradients(1.0)
    truth, _ = run_torch(grads, torch.float64, ns_dtype=torch.float64)
    ours = jax_impl.muon.muon(LEARNING_RATE, ns_dtype=jnp.dtype(dtype))
    from_jax, _ = run_optax(ours, grads, jnp.float32)
    from_torch, _ = run_torch(grads, torch.float32, ns_dtype=getattr(torch, dtype))
    for name in SHAPES:
        t = moved(truth)[-1][name]
        error = check(f"jax {name}", moved(from_jax)[-1][name], t, limit(grads, name, dtype))
        reference = check(f"torch {name}", moved(from_torch)[-1][name], t, limit(grads, name, dtype))
        assert error <= SAFETY * reference, "no worse than the reference's own error"


def test_torch_optim_muon_agrees_in_bfloat16():
    grads = gradients(1.0)
    ours, _ = run_torch(grads, torch.float32, ns_dtype=torch.bfloat16)
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    theirs = torch.optim.Muon(list(params.values()), lr=LEARNING_RATE, weight_decay=0.0, eps=1e-7)
    for step in grads:
        for name, parameter in params.items():
            parameter.grad = torch.tensor(step[name], dtype=torch.float32)
        theirs.step()
    for name in SHAPES:
        final = params[name].detach().double().numpy() - 1.0
        check(name, moved(ours)[-1][name], final, 2 * limit(grads, name, "bfloat16"))


def test_optax_contrib_muon_is_another_optimizer():
    """Its Nesterov corrects the bias: another direction, not another rounding."""
    grads = gradients(1.0, steps=2)
    with jax.enable_x64(True):
        ours, _ = run_optax(jax_impl.muon.muon(LEARNING_RATE, ns_dtype=jnp.float64), grads, jnp.float64)
        theirs, _ = run_optax(optax.contrib.muon(LEARNING_RATE, eps=1e-7), grads, jnp.float64)
    first, second = (
        max(relative_error(moved(ours)[step][name], moved(theirs)[step][name]) for name in SHAPES) for step in (0, 1)
    )
    # At first both directions are multiples of the gradient: only eps beside the norm differs, and what it moves of a
    # singular value near zero is multiplied by 3.4445 five times.
    smallest = (1 - 0.95**2) * min(np.linalg.norm(grad) for grad in grads[0].values())
    of_eps = 3.4445**5 * 1e-7 / smallest
    assert first <= of_eps
    assert second > 100 * first


def test_square_kernels_are_iterated_as_fan_out_by_fan_in():
    """In bfloat16 X X^T and X^T X give other bits, and each kernel must take its torch twin's."""
    x = gradients(1.0)[0]["square"]
    together = jax_impl.muon.orthogonalize({"square": jnp.asarray(x.T, jnp.float32)})["square"]
    right = jax_impl.muon.orthogonalize_via_newton_schulz(jnp.asarray(x, jnp.float32)).astype(jnp.float32)
    wrong = jax_impl.muon.orthogonalize_via_newton_schulz(jnp.asarray(x.T, jnp.float32)).astype(jnp.float32).T
    np.testing.assert_array_equal(np.asarray(together).T, right)
    assert not np.array_equal(right, wrong)


@pytest.mark.parametrize(("batches", "calls"), [(True, 3), (False, 5)])
def test_matrices_that_are_alike_share_one_call_where_batches_are_fast(batches, calls, monkeypatch):
    """48x48; 96x24 with 24x96; 24x48 twice: three shapes of five matrices, whose values do not depend on the way."""
    taken = {"jax": [], "torch": []}

    def counting(module, side: str):
        original = module.orthogonalize_via_newton_schulz

        def orthogonalize(x, **options):
            taken[side].append(tuple(x.shape))
            return original(x, **options)

        monkeypatch.setattr(module, "orthogonalize_via_newton_schulz", orthogonalize)

    matrices = gradients(1.0)[0]
    alone = {
        name: torch_ref.muon.orthogonalize_via_newton_schulz(torch.tensor(x), dtype=torch.float64).numpy()
        for name, x in matrices.items()
    }
    counting(jax_impl.muon.batches, "jax")
    counting(torch_ref.muon.batches, "torch")
    with jax.enable_x64(True):
        kernels = {name: jnp.asarray(x.T) for name, x in matrices.items()}
        from_jax = jax_impl.muon.orthogonalize(kernels, dtype="float64", batched=batches)
    from_torch = torch_ref.muon.orthogonalize(
        [torch.tensor(x) for x in matrices.values()], dtype=torch.float64, batched=batches
    )
    for name, theirs in zip(matrices, from_torch, strict=True):
        check(f"jax {name}", np.asarray(from_jax[name]).T, alone[name], allowance(matrices[name], "float64"))
        check(f"torch {name}", theirs.numpy(), alone[name], allowance(matrices[name], "float64"))
    assert {side: len(shapes) for side, shapes in taken.items()} == {"jax": calls, "torch": calls}
    assert sorted(taken["jax"]) == sorted(taken["torch"])


@pytest.mark.parametrize(("platform", "device"), [("cpu", "cpu"), ("cuda", "meta"), ("tpu", "meta")])
def test_batches_are_for_accelerators(platform, device, monkeypatch):
    """Left alone, JAX's program is that of the platform it is compiled for; torch looks at the tensors' device."""
    x = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 4))}
    program = jax.jit(jax_impl.muon.orthogonalize).trace(x).lower(lowering_platforms=(platform,)).as_text()
    taken = []
    for name in ("_in_batches", "_one_by_one"):
        monkeypatch.setattr(
            torch_ref.muon.batches, name, lambda stacks, options, name=name: taken.append(name) or stacks
        )
    torch_ref.muon.orthogonalize([torch.ones(4, 6, device=device)])
    batched = platform != "cpu"
    assert ("tensor<2x4x6xf32>" in program) == batched and taken == ["_in_batches" if batched else "_one_by_one"]
    record = jax_impl.backend.MACHINES.get("gpu" if batched else "cpu")
    assert record.batched_matrices == batched, "what the hybrid says is what would be done without it"


def test_it_behaves_as_an_optax_transformation():
    grads = {"a": jnp.ones((4, 6)), "b": jnp.ones((3,))}
    transformation = optax.partition(
        {"muon": jax_impl.muon.muon(0.1), "rest": optax.sgd(0.1)}, {"a": "muon", "b": "rest"}
    )
    updates, _ = transformation.update(grads, transformation.init(grads), grads)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    alone = jax_impl.muon.muon(0.1)
    kernel = {"a": grads["a"]}
    without_params, _ = alone.update(kernel, alone.init(kernel))
    np.testing.assert_array_equal(without_params["a"], updates["a"])
    scheduled = optax.inject_hyperparams(jax_impl.muon.muon)(learning_rate=0.1)
    injected, state = scheduled.update(kernel, scheduled.init(kernel), kernel)
    assert float(state.hyperparams["learning_rate"]) == np.float32(0.1)
    check("injected", injected["a"], updates["a"], allowance(np.ones((6, 4)), "bfloat16"))


def test_gradients_are_left_alone():
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    before = parameter.grad.clone()
    torch_ref.muon.Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter.grad, before)
