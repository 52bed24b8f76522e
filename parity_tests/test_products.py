"""`jax_impl.products.product`: right in every layout, and on a CPU multiplied by the kernels that are fast.

XLA's CPU backend multiplies bfloat16 in one layout and converts every other to float32 first, several times slower and
without a word; what it did stands in the compiled program.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_impl.muon.newton_schulz import orthogonalize_via_newton_schulz
from jax_impl.products import accumulator, in_memory, product
from jax_impl.train import init_state, make_train_step
from parity_tests.cases import AWKWARD
from recipe.config import PrecisionConfig, RunConfig
from recipe.contract import UNIT_ROUNDOFF
from recipe.params import init_params

SIZES = {"b": 2, "k": 3, "x": 4, "m": 35, "i": 30, "o": 14, "d": 30, "v": 53, "q": 9, "s": 11, "g": 5, "h": 6}
SPECS = [
    *("mi,io->mo", "mo,io->mi", "mi,mo->io", "md,vd->mv", "mv,vd->md", "mv,md->vd", "md,mv->dv", "oi,mi->om"),
    *("xqh,xsh->xqs", "xqs,xsh->xqh", "xqh,xqs->xsh", "xqs,xqh->xsh", "bksh,bkgh->bkgs", "bksh,bkgs->bkgh"),
]
"""Every product of the model with its gradients."""


def _operands(spec: str, dtype: str) -> list[jax.Array]:
    random = np.random.default_rng(0)
    shapes = [[SIZES[axis] for axis in axes] for axes in spec.split("->")[0].split(",")]
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def _check(spec: str, value: jax.Array, x, y, dtype: str) -> None:
    """Within (n + 1) u of the accumulator times sum |x||y|, which bounds any order of summation, and one rounding."""
    x, y = (np.asarray(operand, np.float64) for operand in (x, y))
    truth, summed = np.einsum(spec, x, y), set(spec.split("->")[0]) - set(spec.split("->")[1]) - {","}
    terms = int(np.prod([SIZES[axis] for axis in summed]))
    unit = UNIT_ROUNDOFF[str(accumulator(jnp.dtype(dtype)))]
    allowance = (terms + 1) * unit * np.einsum(spec, abs(x), abs(y)) + UNIT_ROUNDOFF[str(value.dtype)] * abs(truth)
    error = abs(np.asarray(value, np.float64) - truth)
    worst = np.unravel_index(np.argmax(error / allowance), error.shape)
    assert (error <= allowance).all(), f"{spec} at {worst}: error {error[worst]:.3e}, allowed {allowance[worst]:.3e}"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_product_and_its_gradients_are_einsum_in_every_layout(spec, dtype):
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        x, y = _operands(spec, dtype)
        narrow = jax.jit(lambda x, y: product(spec, x, y, x.dtype))
        value, pull = jax.vjp(narrow, x, y)
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(value.shape), dtype)
        grad_x, grad_y = pull(cotangent)
        _check(spec, value, x, y, dtype)
        operands, z = spec.split("->")
        x_axes, y_axes = operands.split(",")
        _check(f"{z},{y_axes}->{x_axes}", grad_x, cotangent, y, dtype)
        _check(f"{x_axes},{z}->{y_axes}", grad_y, x, cotangent, dtype)
        assert value.dtype == x.dtype and grad_x.dtype == x.dtype and grad_y.dtype == y.dtype


@pytest.mark.parametrize("spec", SPECS)
def test_a_bfloat16_product_may_be_transposed(spec):
    """jax 0.10 fails to run a program whose transposed product of two bfloat16 arrays comes out in float32."""
    x, y = _operands(spec, "bfloat16")
    plain = jax.jit(lambda x, y: product(spec, x, y, jnp.float32))(x, y)
    axes = tuple(reversed(range(plain.ndim)))
    turned = jax.jit(lambda x, y: jnp.transpose(product(spec, x, y, jnp.float32), axes))(x, y)
    np.testing.assert_array_equal(turned, jnp.transpose(plain, axes))


def test_in_memory_is_a_transpose():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(jax.jit(lambda x: in_memory(x, (0, 2, 1)))(x), x.swapaxes(1, 2))


def _widened_products(program: str) -> list[str]:
    """The products in a compiled program's text that have a float32 operand, and their sources."""
    dtypes = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[", program, re.MULTILINE))
    found = []
    for line in program.splitlines():
        product = re.search(r" dot\(%?([\w.-]+), %?([\w.-]+)\)", line)
        if product and "f32" in (dtypes[name] for name in product.groups()):
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(source[1] if source else line.strip())
    return found


def _require_bfloat16_kernels() -> None:
    x, y = jnp.ones((64, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)
    plain = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    if jax.default_backend() == "cpu" and _widened_products(plain.lower(x, y).compile().as_text()):
        pytest.skip("XLA has no bfloat16 kernels for this CPU and multiplies in float32 whatever the layout")


def test_every_product_of_a_bfloat16_update_multiplies_bfloat16():
    _require_bfloat16_kernels()
    # AWKWARD with all sizes large enough: products of some 30 are multiplied in float32 in every layout.
    model = dataclasses.replace(AWKWARD, hidden_size=192, intermediate_size=320, head_dim=64)
    precision = PrecisionConfig(compute="bfloat16", newton_schulz="bfloat16")
    config = RunConfig(model=model, precision=precision, batch_size=2, sequence_length=200, accumulation=2)
    tokens = np.zeros((2, 2, 200), np.int32)
    step, state = make_train_step(config), init_state(config, init_params(model, 0))
    program = step.__wrapped__.lower(state, tokens, tokens).compile().as_text()
    assert program.count(" dot(") > 20, "the update's products stand in the program's text"
    assert _widened_products(program) == []


def test_the_kernel_test_can_fail():
    """A product with a transposed operand, as XLA is given it by `x @ x.T`, is one of those it converts."""
    _require_bfloat16_kernels()
    x = jnp.ones((256, 128), jnp.bfloat16)
    careless = jax.jit(lambda x: jnp.matmul(x, x.T, preferred_element_type=jnp.float32))
    assert _widened_products(careless.lower(x).compile().as_text())
    careful = jax.jit(lambda x: orthogonalize_via_newton_schulz(x, dtype=jnp.bfloat16))
    assert not _widened_products(careful.lower(x).compile().as_text())
