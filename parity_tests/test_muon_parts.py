"""Muon's parts on both sides in float64, against a third opinion: NumPy, written from the papers.

`limit` grows with what each part does to an error; nothing in it is tuned.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jax_impl.muon
import torch_ref.muon
from parity_tests.compare.tolerance import SAFETY, check, relative_error
from parity_tests.newton_schulz_error import KELLER_JORDAN, allowance, newton_schulz
from recipe.contract import UNIT_ROUNDOFF

BETA, EPS, STEPS, RATE, DECAY = 0.95, 1e-7, 5, 0.03, 0.1
# As (fan_out, fan_in). No side is another's, and no two ratios are equal.
SHAPES = {"square": (29, 29), "tall": (61, 19), "wide": (17, 53)}


def gradients() -> list[dict[str, np.ndarray]]:
    """Correlated gradients by name, (fan_out, fan_in), of neurons whose scales differ by up to 3."""
    generator = np.random.default_rng(7)
    base = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    rows = {name: generator.uniform(1.0, 3.0, (shape[0], 1)) for name, shape in SHAPES.items()}
    return [
        {name: rows[name] * (mean + generator.standard_normal(mean.shape)) for name, mean in base.items()}
        for _ in range(STEPS)
    ]


def start() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(11)
    return {name: 0.1 * generator.standard_normal(shape) for name, shape in SHAPES.items()}


def on_jax(**options) -> list[dict[str, np.ndarray]]:
    """Weights after each update of jax_impl, (fan_out, fan_in)."""
    with jax.enable_x64(True):
        transformation = jax_impl.muon.muon(RATE, ns_dtype="float64", **options)
        params = {name: jnp.asarray(weight.T) for name, weight in start().items()}
        state, history = transformation.init(params), []
        update = jax.jit(transformation.update)
        for grads in gradients():
            updates, state = update({name: jnp.asarray(grad.T) for name, grad in grads.items()}, state, params)
            params = optax.apply_updates(params, updates)
            history.append({name: np.asarray(weight).T for name, weight in params.items()})
    return history


def on_torch(**options) -> list[dict[str, np.ndarray]]:
    """Weights after each update of torch_ref, (fan_out, fan_in)."""
    params = {name: torch.nn.Parameter(torch.tensor(weight)) for name, weight in start().items()}
    optimizer = torch_ref.muon.Muon(params.values(), lr=RATE, ns_dtype=torch.float64, **options)
    history = []
    for grads in gradients():
        for name, parameter in params.items():
            parameter.grad = torch.tensor(grads[name])
        optimizer.step()
        history.append({name: parameter.detach().numpy().copy() for name, parameter in params.items()})
    return history


def on_paper(
    momentum="average",
    nesterov=True,
    coefficients=KELLER_JORDAN,
    gram=False,
    neuron_beta=None,
    scale="fan_ratio",
    weight_decay=0.0,
    cautious=False,
) -> list[dict[str, np.ndarray]]:
    """Weights after each update, by loops over neurons and entries where the papers have sums over them."""
    params = start()
    mus = {name: np.zeros_like(weight) for name, weight in params.items()}
    squares = {name: np.zeros(shape[0]) for name, shape in SHAPES.items()}
    history = []
    for grads in gradients():
        for name, weight in params.items():
            fan_out, fan_in = weight.shape
            share = 1 - BETA if momentum == "average" else 1.0
            mus[name] = BETA * mus[name] + share * grads[name]
            direction = BETA * mus[name] + share * grads[name] if nesterov else mus[name]
            update = newton_schulz(direction, coefficients, eps=EPS)
            if neuron_beta is not None:
                even = np.empty_like(update)
                for neuron, row in enumerate(update):
                    squares[name][neuron] = neuron_beta * squares[name][neuron] + (1 - neuron_beta) * row @ row / fan_in
                    even[neuron] = row / (squares[name][neuron] ** 0.5 + 1e-8)
                update = even * np.linalg.norm(update) / (np.linalg.norm(even) + 1e-8)
            factor = {
                "fan_ratio": max(1.0, fan_out / fan_in) ** 0.5,
                "unclamped_fan_ratio": (fan_out / fan_in) ** 0.5,
                "consistent_rms": 0.2 * max(fan_out, fan_in) ** 0.5,
            }[scale]
            new = weight - RATE * factor * update
            for place in np.ndindex(weight.shape):
                if not cautious or update[place] * weight[place] >= 0:
                    new[place] -= RATE * weight_decay * weight[place]
            params[name] = new
        history.append(dict(params))
    return history


OPTIONS = {
    "as it stands": {},
    "heavy ball": {"momentum": "heavy_ball"},
    "heavy ball without Nesterov": {"momentum": "heavy_ball", "nesterov": False},
    "average without Nesterov": {"nesterov": False},
    "unclamped ratio": {"scale": "unclamped_fan_ratio"},
    "consistent RMS": {"scale": "consistent_rms"},
    "decoupled decay": {"weight_decay": DECAY},
    "cautious decay": {"weight_decay": DECAY, "cautious": True},
    "Polar Express": {"coefficients": jax_impl.muon.POLAR_EXPRESS},
    "dion's Polar Express": {"coefficients": jax_impl.muon.POLAR_EXPRESS_DION},
    "You": {"coefficients": jax_impl.muon.YOU},
    "convergent": {"coefficients": jax_impl.muon.CONVERGENT},
    "Gram": {"gram": True},
    "NorMuon": {"neuron_beta": 0.9},
    "all": {
        "momentum": "heavy_ball",
        "coefficients": jax_impl.muon.POLAR_EXPRESS,
        "gram": True,
        "neuron_beta": 0.9,
        "scale": "consistent_rms",
        "weight_decay": DECAY,
        "cautious": True,
    },
}


def limit(name: str, options: dict) -> float:
    """Allowance of the distance that STEPS updates move a weight: each update's, and the rounding of the weight itself.

    The division of NorMuon multiplies the relative error of a neuron by how far its norm is below the others'.
    """
    form = {key: options[key] for key in ("coefficients", "gram") if key in options}
    one = max(allowance(grads[name], "float64", **form) for grads in gradients())
    if options.get("neuron_beta") is not None:
        rows = np.linalg.norm(newton_schulz(gradients()[0][name], options.get("coefficients", KELLER_JORDAN)), axis=1)
        one *= 2 * rows.max() / rows.min()
    smallest = min(np.linalg.norm(weight - start()[name]) for weight in (step[name] for step in on_paper(**options)))
    rounding = UNIT_ROUNDOFF["float64"] * np.linalg.norm(start()[name]) / smallest
    return SAFETY * one + SAFETY * STEPS * rounding


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.parametrize("what", OPTIONS)
def test_both_sides_take_the_papers_updates(what, batched):
    options = OPTIONS[what]
    truth = on_paper(**options)
    sides = {"jax": on_jax(batched=batched, **options), "torch": on_torch(batched=batched, **options)}
    for name, weight in start().items():
        allowed = limit(name, options)
        for side, history in sides.items():
            for step in range(STEPS):
                moved, expected = history[step][name] - weight, truth[step][name] - weight
                check(f"{side} {what} {name} at step {step}", moved, expected, allowed)


def test_every_option_changes_the_updates():
    """The table would pass if an option were dropped on all three sides."""
    plain = on_paper()[-1]
    for what, options in OPTIONS.items():
        apart = max(relative_error(on_paper(**options)[-1][name], plain[name]) for name in SHAPES)
        # Gram is the same polynomial, and the momentum as a sum the same direction but for eps.
        same = what in ("as it stands", "Gram", "heavy ball")
        assert (apart < 1e3 * EPS) if same else (apart > 1e3 * EPS), what
    heavy = on_jax(momentum="heavy_ball")
    assert heavy[-1]["wide"].shape == SHAPES["wide"]


def test_the_gram_form_is_taken_where_it_multiplies_less():
    """FLOPs over 2 n^2: 5 (2 m + n) in the plain form, 6 m + 11 n in segments of 2, 1 and 2 steps: from m = 1.5 n."""
    for module in (jax_impl.muon.newton_schulz, torch_ref.muon.newton_schulz):
        assert [module.gram_pays(100, long, 5) for long in (100, 149, 151, 300)] == [False, False, True, True]
        assert module._segments(5) == [2, 1, 2] and module._segments(2) == [2] and module._segments(7) == [2, 1, 4]


@pytest.mark.parametrize("name", ["POLAR_EXPRESS", "YOU", "POLAR_EXPRESS_DION", "CONVERGENT", "KELLER_JORDAN"])
def test_the_tables_are_the_same_on_both_sides(name):
    assert getattr(jax_impl.muon, name) == getattr(torch_ref.muon, name)


def best_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """The odd quintic nearest to 1 on [lower, upper], by Remez: its error swings four times."""
    inner = np.array([3 * lower + upper, lower + 3 * upper]) / 4
    for _ in range(60):
        x = np.array([lower, *inner, upper])
        a, b, c, _ = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return a, b, c


def polar_express(steps: int, lowest: float, cushion: float):
    """Algorithm of the paper's appendix: the best quintic for what the last one left, centred around 1 again."""
    lower, upper = lowest, 1.0
    for _ in range(steps):
        a, b, c = best_quintic(max(lower, cushion * upper), upper)
        ends = [a * x + b * x**3 + c * x**5 for x in (lower, upper)]
        a, b, c = (2 / sum(ends) * value for value in (a, b, c))
        yield a, b, c
        lower = a * lower + b * lower**3 + c * lower**5
        upper = 2 - lower


def test_polar_express_is_the_papers_optimum():
    """Rows derived anew: best for [1e-3, 1] with the paper's cushion, over its margin of 1.01."""
    derived = list(polar_express(5, 1e-3, 0.02407327424182761))
    margin = np.array([1.01, 1.01**3, 1.01**5])
    # Each row is made from the last one's end, and a solve of four equations near a double root loses half the digits.
    check("rows", np.array(jax_impl.muon.POLAR_EXPRESS) * margin, np.array(derived), np.sqrt(UNIT_ROUNDOFF["float64"]))
    first = np.array(next(polar_express(1, 1e-3, 0.02))) / np.array([1.02, 1.02**3, 1.02**5])
    ours = np.array(jax_impl.muon.POLAR_EXPRESS_DION[0])
    check("dion's first row", ours, first, np.sqrt(UNIT_ROUNDOFF["float64"]))


@pytest.mark.parametrize("name", ["KELLER_JORDAN", "YOU", "POLAR_EXPRESS", "POLAR_EXPRESS_DION"])
def test_optax_takes_the_tables_to_the_same_update(name):
    """An oracle by other hands, which knows Jordan's row and You's by name and takes any table."""
    rows = getattr(jax_impl.muon, name)
    known = {"KELLER_JORDAN": "standard", "YOU": "dion"}
    with jax.enable_x64(True):
        params = {shape: jnp.asarray(weight.T) for shape, weight in start().items()}
        grads = {shape: jnp.asarray(grad.T) for shape, grad in gradients()[0].items()}
        theirs = optax.contrib.muon(1.0, known.get(name, rows), beta=0.0, nesterov=False, eps=EPS)
        expected, _ = theirs.update(grads, theirs.init(params), params)
        ours = jax_impl.muon.muon(1.0, 0.0, nesterov=False, coefficients=rows, ns_dtype="float64")
        updates, _ = ours.update(grads, ours.init(params))
    for shape, grad in gradients()[0].items():
        check(shape, updates[shape], expected[shape], 2 * allowance(grad, "float64", coefficients=rows))


@pytest.mark.parametrize("name", ["KELLER_JORDAN", "POLAR_EXPRESS", "POLAR_EXPRESS_DION", "YOU", "CONVERGENT"])
def test_the_guide_has_the_bands(name):
    """Where a table takes singular values from 0.01 to 1 of the norm, and its slope at zero."""
    values, slope = np.geomspace(0.01, 1.0, 200_001), 1.0
    for a, b, c in getattr(jax_impl.muon, name):
        values, slope = a * values + b * values**3 + c * values**5, slope * a
    guide = " ".join((Path(__file__).parents[1] / "docs/muon.md").read_text(encoding="utf-8").split())
    assert f" {values.min():.2f} to {values.max():.2f} ({slope:.0f})" in guide


@pytest.mark.parametrize("shape", [(96, 96), (96, 192), (96, 384)], ids=str)
def test_the_root_mean_square_is_as_the_docstring_has_it(shape):
    """After Jordan's five steps on a Gaussian matrix, with Moonlight's scale of 0.2."""
    update = newton_schulz(np.random.default_rng(0).standard_normal(shape))
    assert 0.17 <= round(0.2 * max(shape) ** 0.5 * float(np.sqrt(np.mean(update**2))), 2) <= 0.20


def test_an_average_in_bfloat16_stands_off_its_fixed_point():
    grads = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((24, 32)), jnp.bfloat16)}
    off = {}
    for dtype in ("bfloat16", None):
        transformation = jax_impl.muon.scale_by_muon(mu_dtype=dtype, coefficients=KELLER_JORDAN[:1])
        state, update = transformation.init(grads), jax.jit(transformation.update)
        for _ in range(400):
            _, state = update(grads, state)
        off[dtype] = relative_error(np.asarray(state.mu["w"], np.float64), np.asarray(grads["w"], np.float64))
    assert f"{off['bfloat16']:.0%}" == "5%" and off[None] <= BETA**400 + 400 * UNIT_ROUNDOFF["float32"]


def test_a_convergent_table_ends_at_the_polar_factor():
    u, _, vt = np.linalg.svd(gradients()[0]["wide"], full_matrices=False)
    ends = newton_schulz(gradients()[0]["wide"], jax_impl.muon.CONVERGENT, eps=0.0)
    check("U V^T", ends, u @ vt, allowance(gradients()[0]["wide"], "float64", coefficients=jax_impl.muon.CONVERGENT))


@pytest.mark.parametrize("scale", [1e20, 1e-30, 1e-38])
@pytest.mark.parametrize("side", ["jax", "torch"])
def test_the_norm_neither_overflows_nor_vanishes_in_float32(side, scale):
    """eps = 0 for the small ones: nothing else then keeps a vanished norm from a division by zero."""
    x, eps = gradients()[0]["wide"].astype(np.float32) * np.float32(scale), EPS if scale > 1 else 0.0
    if side == "jax":
        out = jax_impl.muon.orthogonalize_via_newton_schulz(jnp.asarray(x), eps=eps, dtype="float32")
    else:
        out = torch_ref.muon.orthogonalize_via_newton_schulz(torch.tensor(x), eps=eps, dtype=torch.float32)
    truth = newton_schulz(x.astype(np.float64), eps=eps)
    # Below 2^-126 numbers have fewer digits, and a processor may take them for zero.
    lost = np.finfo(np.float32).smallest_normal * np.sqrt(x.size) / np.linalg.norm(x.astype(np.float64))
    amplified = 3.4445**5 * lost
    check(f"{side} x {scale}", np.asarray(out), truth, allowance(x.astype(np.float64), "float32") + amplified)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_so_it_is_in_float64(scale):
    x = gradients()[0]["wide"]
    with jax.enable_x64(True):
        ours = jax_impl.muon.orthogonalize_via_newton_schulz(jnp.asarray(x * scale), eps=0.0, dtype="float64")
    theirs = torch_ref.muon.orthogonalize_via_newton_schulz(torch.tensor(x * scale), eps=0.0, dtype=torch.float64)
    for out in (ours, theirs):
        check(f"x {scale}", np.asarray(out), newton_schulz(x, eps=0.0), allowance(x, "float64"))


def test_eps_beside_a_vanishing_gradient():
    """1e-30 under eps = 1e-7: the update is the gradient times 3.4445^5 / eps, and no zero, no NaN."""
    x = gradients()[0]["wide"] * 1e-30
    out = jax_impl.muon.orthogonalize_via_newton_schulz(jnp.asarray(x, jnp.float32), dtype="float32")
    expected = x / EPS * 3.4445**5
    check("tiny", np.asarray(out, np.float64), expected, SAFETY * 5 * 2 * UNIT_ROUNDOFF["float32"] * np.sqrt(x.size))


HEADS, HEAD_DIM, WIDTH = 3, 4, 7


def largest_logits(q_OI: np.ndarray, k_OI: np.ndarray, x_TI: np.ndarray, groups: int) -> np.ndarray:
    """Largest query-key product of each query head over all pairs of tokens."""
    q = (x_TI @ q_OI.T).reshape(len(x_TI), -1, HEAD_DIM)
    k = (x_TI @ k_OI.T).reshape(len(x_TI), -1, HEAD_DIM).repeat(groups, axis=1)
    return np.einsum("tnh,snh->nts", q, k).max(axis=(1, 2))


@pytest.mark.parametrize("shared", [False, True], ids=["a key for each query", "shared keys"])
def test_qk_clip_brings_the_largest_logit_to_the_threshold(shared):
    """The property it is for, on both sides: heads above the threshold end at it, the others are left alone."""
    generator = np.random.default_rng(3)
    groups, threshold = (HEADS if shared else 1), 9.0
    x = generator.standard_normal((11, WIDTH))
    q = generator.standard_normal((HEADS, HEAD_DIM, WIDTH)) * np.array([0.1, 1.0, 3.0])[:, None, None]
    q, k = q.reshape(-1, WIDTH), generator.standard_normal((HEAD_DIM * HEADS // groups, WIDTH))
    before = largest_logits(q, k, x, groups)
    assert before.min() < threshold < np.sort(before)[1], "the test has heads on both sides"
    power = 1.0 if shared else 0.5

    def heads(path, leaf):
        if path == "q":
            return jax_impl.muon.Heads("layer", -1, power)
        return None if shared or path != "k" else jax_impl.muon.Heads("layer", -1)

    with jax.enable_x64(True):
        clip = optax.chain(optax.scale(-1.0), jax_impl.muon.clip_qk(heads, threshold))
        params = {"q": jnp.asarray(q.T), "k": jnp.asarray(k.T), "o": jnp.ones((2, 2))}
        # An update that ends at these weights, from others: the clip is of the weights after it.
        from_ = jax.tree.map(lambda leaf: leaf + 1.0, params)
        grads = jax.tree.map(lambda leaf: jnp.ones_like(leaf), params)
        logits = {"layer": jnp.asarray(before)}
        updates, _ = jax.jit(clip.update)(grads, clip.init(from_), from_, max_logits=logits)
        clipped = {name: np.asarray(leaf).T for name, leaf in optax.apply_updates(from_, updates).items()}
    np.testing.assert_array_equal(clipped["o"], np.ones((2, 2)))
    in_torch = {"q": torch.tensor(q), "k": torch.tensor(k)}
    torch_ref.muon.clip_qk(in_torch["q"], torch.tensor(before), threshold, power)
    if not shared:
        torch_ref.muon.clip_qk(in_torch["k"], torch.tensor(before), threshold)
    rounding = SAFETY * WIDTH * HEAD_DIM * 4 * UNIT_ROUNDOFF["float64"]
    for side, pair in (("jax", clipped), ("torch", {name: leaf.numpy() for name, leaf in in_torch.items()})):
        after = largest_logits(pair["q"], pair["k"], x, groups)
        check(side, after, np.minimum(before, threshold), rounding * np.linalg.norm(q) * np.linalg.norm(x))


def test_qk_clip_says_what_it_lacks():
    clip = jax_impl.muon.clip_qk(lambda path, leaf: jax_impl.muon.Heads("layer", -1))
    params = {"q": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match="needs parameters and logits"):
        clip.update(params, clip.init(params), params)
    with pytest.raises(ValueError, match=r"q \(4, 6\) has 6 columns on axis -1, not a multiple of .*: one logit"):
        clip.update(params, clip.init(params), params, max_logits={"layer": jnp.ones(4)})
    with pytest.raises(ValueError, match="threshold=0 must be above 0"):
        jax_impl.muon.clip_qk(lambda path, leaf: None, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_momentum_has_the_dtype_it_was_given(dtype):
    """Both sides take sums in float32, and store one rounding of them."""
    grads = gradients()
    params = {name: jnp.asarray(weight.T, jnp.float32) for name, weight in start().items()}
    transformation = jax_impl.muon.muon(RATE, mu_dtype=dtype)
    state = transformation.init(params)
    weights = {name: torch.nn.Parameter(torch.tensor(weight).float()) for name, weight in start().items()}
    optimizer = torch_ref.muon.Muon(weights.values(), lr=RATE, mu_dtype=getattr(torch, dtype))
    for step in grads:
        _, state = transformation.update({n: jnp.asarray(g.T, jnp.float32) for n, g in step.items()}, state, params)
        for name, weight in weights.items():
            weight.grad = torch.tensor(step[name]).float()
        optimizer.step()
    for name in SHAPES:
        mu, theirs = state[0].mu[name], optimizer.state[weights[name]]["mu"]
        assert mu.dtype == dtype and theirs.dtype == getattr(torch, dtype)
        truth = np.zeros(SHAPES[name])
        for step in grads:
            truth = BETA * truth + (1 - BETA) * step[name]
        # Roundings of earlier averages fade by BETA; each is of a stored number, and one of a sum of two products.
        allowed = SAFETY * STEPS * (UNIT_ROUNDOFF[dtype] + 3 * UNIT_ROUNDOFF["float32"])
        check(f"jax {name}", np.asarray(mu, np.float64).T, truth, allowed)
        check(f"torch {name}", theirs.double().numpy(), truth, allowed)


def test_torch_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"\(16,\) of torch.float32 is no matrix"):
        torch_ref.muon.Muon([torch.nn.Parameter(torch.ones(16))], lr=0.1)
    with pytest.raises(ValueError, match=r"torch.complex64 is no matrix"):
        torch_ref.muon.Muon([torch.nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))], lr=0.1)


@pytest.mark.parametrize(("shape", "stacked"), [((5, 3, 2, 4), 0), ((2, 5, 7), 1), ((2, 5, 3, 4), 1)])
def test_torch_convolutions_and_stacks_are_the_matrices_they_hold(shape, stacked):
    """torch's (O, I, window...) is JAX's (window..., I, O); axes before them count layers on both sides."""
    generator = np.random.default_rng(1)
    weight, grad = generator.standard_normal((2, *shape))
    parameter = torch.nn.Parameter(torch.tensor(weight))
    parameter.grad = torch.tensor(grad)
    torch_ref.muon.Muon([parameter], lr=RATE, stacked=stacked, ns_dtype=torch.float64).step()

    def to_flax(x):  # (layers, O, rest...) -> (layers, rest..., O)
        return np.moveaxis(x, stacked, -1)

    axes = len(shape) - stacked
    matrix = jax_impl.muon.Matrix(tuple(range(-axes, -1)), (-1,))
    with jax.enable_x64(True):
        ours = jax_impl.muon.muon(RATE, matrices=lambda path, leaf: matrix, ns_dtype="float64")
        params = {"kernel": jnp.asarray(to_flax(weight))}
        updates, _ = ours.update({"kernel": jnp.asarray(to_flax(grad))}, ours.init(params), params)
    flat = grad.reshape(*shape[: stacked + 1], -1).reshape(-1, shape[stacked], int(np.prod(shape[stacked + 1 :])))
    allowed = 2 * max(allowance(one, "float64") for one in flat)
    rounding = SAFETY * UNIT_ROUNDOFF["float64"] * np.linalg.norm(weight) / RATE
    check("flax", np.asarray(updates["kernel"]), to_flax(parameter.detach().numpy() - weight), allowed + rounding)
