"""Newton-Schulz of both twins against a float64 oracle, at the error that rounding must make."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.muon.newton_schulz
import torch_ref.muon.newton_schulz
from jax_impl.muon.newton_schulz import CONVERGENT, KELLER_JORDAN, POLAR_EXPRESS, YOU
from jax_impl.muon.newton_schulz import orthogonalize_via_newton_schulz as jax_newton_schulz
from parity_tests.compare.tolerance import SAFETY, check, relative_error
from parity_tests.newton_schulz_error import allowance, bias_allowance, newton_schulz
from recipe.contract import UNIT_ROUNDOFF
from torch_ref.muon.newton_schulz import orthogonalize_via_newton_schulz as torch_newton_schulz

SHAPES = [(96, 96), (192, 64), (64, 160)]
DTYPES = ["float64", "float32", "bfloat16"]
# Norm of the gradient over eps is 1e1 at this scale: where eps stands then shows in every digit.
TINY = 1e-8


def on_jax(x_OI: np.ndarray, dtype: str, **options) -> np.ndarray:
    with jax.enable_x64(dtype == "float64"):
        # A Python string is traced as a static argument; the input arrives in float32 unless it is float64.
        x = jnp.asarray(x_OI, "float64" if dtype == "float64" else "float32")
        return np.asarray(jax_newton_schulz(x, dtype=dtype, **options).astype(x.dtype), np.float64)


def on_torch(x_OI: np.ndarray, dtype: str, **options) -> np.ndarray:
    x = torch.tensor(x_OI, dtype=torch.float64 if dtype == "float64" else torch.float32)
    return torch_newton_schulz(x, dtype=getattr(torch, dtype), **options).double().numpy()


SIDES = {"jax": on_jax, "torch": on_torch}


def matrix(shape, *, seed: int = 0, condition: float | None = None) -> np.ndarray:
    """Gaussian, or with singular values from 1 down to 1/condition; exact in float32."""
    x = np.random.default_rng(seed).standard_normal(shape)
    if condition is not None:
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        x = u * np.geomspace(1.0, 1.0 / condition, min(shape)) @ vt
    return x.astype(np.float32).astype(np.float64)


CONDITIONS = pytest.mark.parametrize("condition", [None, 1e4], ids=["gaussian", "ill-conditioned"])


@CONDITIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_what_rounding_makes(shape, dtype, condition):
    x = matrix(shape, condition=condition)
    truth, limit = newton_schulz(x), allowance(x, dtype)
    errors = {side: check(f"{side} {dtype}", run(x, dtype), truth, limit) for side, run in SIDES.items()}
    if dtype != "float64":
        assert errors["jax"] <= SAFETY * errors["torch"], "no worse than the reference's own error"


FORMS = {
    "Jordan, Gram": {"gram": True},
    "Polar Express": {"coefficients": POLAR_EXPRESS},
    "Polar Express, Gram": {"coefficients": POLAR_EXPRESS, "gram": True},
    "You": {"coefficients": YOU},
    "convergent": {"coefficients": CONVERGENT},
}


@CONDITIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_error_of_other_tables_and_of_the_gram_form(form, dtype, condition):
    """The Gram form has the plain one's truth, and a bound of its own from the arrays that it stores."""
    x, options = matrix((64, 256), condition=condition), FORMS[form]
    truth = newton_schulz(x, options.get("coefficients", KELLER_JORDAN))
    limit = allowance(x, dtype, **options)
    errors = {side: check(f"{side} {form}", run(x, dtype, **options), truth, limit) for side, run in SIDES.items()}
    if dtype != "float64":
        assert errors["jax"] <= SAFETY * errors["torch"], "no worse than the reference's own error"


@pytest.mark.parametrize("side", SIDES)
def test_two_restarts_make_the_gram_form_sound_in_bfloat16(side, monkeypatch):
    """At condition 1e4 its error is the plain form's; with one restart it is twice that, with none it diverges."""
    x = matrix((96, 384), condition=1e4)
    truth = newton_schulz(x)
    module = {"jax": jax_impl.muon.newton_schulz, "torch": torch_ref.muon.newton_schulz}[side]
    plain = relative_error(SIDES[side](x, "bfloat16"), truth)
    errors = [relative_error(SIDES[side](x, "bfloat16", gram=True), truth)]  # with the restarts as they stand
    for restarts in ((2,), ()):
        monkeypatch.setattr(module, "GRAM_RESTARTS", restarts)
        jax.clear_caches()  # the constant is no argument of the compiled function
        errors.append(relative_error(SIDES[side](x, "bfloat16", gram=True), truth))
    print(f"{side}: plain {plain:.3g}, Gram with restarts after 2 and 3, after 2, none: {errors}")
    jax.clear_caches()
    assert errors[0] <= plain * SAFETY**0.5 and errors[0] * SAFETY**0.5 < errors[1] and errors[1] * SAFETY < errors[2]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_has_no_systematic_error(side, shape):
    """A norm bound hides a bias; rounded coefficients are one."""
    x = matrix(shape)
    truth = newton_schulz(x)
    bias = np.sum((SIDES[side](x, "bfloat16") - truth) * truth) / np.sum(truth * truth)
    assert abs(bias) <= bias_allowance(x, "bfloat16")


@pytest.mark.parametrize("side", SIDES)
def test_a_stack_is_as_good_as_its_matrices(side):
    stack = np.stack([matrix((64, 96), seed=seed) for seed in range(3)]) * np.array([1.0, 30.0, 0.01])[:, None, None]
    together = SIDES[side](stack, "float64")
    for alone, one in zip(stack, together, strict=True):
        check("one of a stack", one, newton_schulz(alone), allowance(alone, "float64"))


@pytest.mark.parametrize("side", SIDES)
def test_eps_is_added_to_the_norm(side):
    x = matrix((48, 64)) * TINY
    truth = newton_schulz(x)
    check(f"{side} tiny", SIDES[side](x, "float64"), truth, allowance(x / TINY, "float64"))
    other_eps = relative_error(newton_schulz(x, eps=1e-8), truth)
    assert other_eps > 1e6 * UNIT_ROUNDOFF["float64"], "the test sees eps"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero(side, dtype):
    assert not SIDES[side](np.zeros((24, 32)), dtype).any()


@pytest.mark.parametrize("side", SIDES)
def test_singular_values_lie_in_the_band(side):
    """After five steps the quintic maps [0.004, 1] into [0.67, 1.21] (bounds of its fifth iterate, computed here)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    sigma = np.linspace(0.0, 1.0, 200_001)
    image = sigma
    for _ in range(5):
        image = a * image + b * image**3 + c * image**5
    x = matrix((96, 128))
    start = np.linalg.svd(x / np.linalg.norm(x), compute_uv=False)
    reachable = image[(sigma >= start.min()) & (sigma <= start.max())]
    values = np.linalg.svd(SIDES[side](x, "float64"), compute_uv=False)
    # Between two points of the grid the image moves no further than it does from one to the next.
    margin = np.abs(np.diff(reachable)).max()
    assert reachable.min() - margin < values.min() and values.max() < reachable.max() + margin
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_tall_matrix_is_iterated_wide():
    """Values cannot show a missing transpose; the cost can: steps * (4 n^2 m + 2 n^3) with n the short side."""
    tall = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    compiled = jax_newton_schulz.lower(tall, coefficients=KELLER_JORDAN[:1], dtype="float32").compile()
    n, m = 64, 256
    flops = compiled.cost_analysis()["flops"]
    # Elementwise work is of order n m; a Gram matrix of the long side would cost ten times as much.
    assert 4 * n * n * m + 2 * n**3 <= flops <= 2 * (4 * n * n * m + 2 * n**3)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", [(192, 64), (96, 96)], ids=str)
def test_a_matrix_that_comes_transposed_is_written_out_first(shape, steps, gram):
    """XLA:CPU hands a transpose on to the first product, if no loop is between, and has no bfloat16 kernel for it."""
    function = functools.partial(jax_newton_schulz, coefficients=KELLER_JORDAN[:steps], gram=gram)
    x_OI = matrix(shape)
    turned = jax.jit(lambda x_IO: function(x_IO.mT))(jnp.asarray(x_OI.T, jnp.float32))
    # Each of the two may be off by the allowance of five steps.
    difference = relative_error(turned, function(jnp.asarray(x_OI, jnp.float32)))
    assert difference <= 2 * allowance(x_OI, "bfloat16")


def test_bfloat16_products_accumulate_in_float32_and_coefficients_stay_exact():
    x = jax.ShapeDtypeStruct((32, 48), jnp.float32)
    text = str(jax.make_jaxpr(lambda x: jax_newton_schulz(x, dtype=jnp.bfloat16))(x))
    dots = re.findall(r":(\w+)\[[\d,]*\] = dot_general", text)
    assert len(dots) == 3 and set(dots) == {"f32"}
    assert re.search(r"3\.4444999\d*:f32|3\.4445\d*:f32", text) and ":bf16[] " not in text
