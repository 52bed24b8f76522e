"""Newton-Schulz orthogonalisation: the heart of Muon, as one pure function."""

import functools

import jax
import jax.numpy as jnp

# Keller Jordan's quintic, tuned for slope at zero: https://kellerjordan.github.io/posts/muon/
KELLER_JORDAN_COEFFS = (3.4445, -4.7750, 2.0315)


@functools.partial(jax.jit, static_argnames=("steps", "coeffs", "dtype", "rounds_gram"))
def orthogonalize_via_newton_schulz(
    x_OI: jax.Array,
    *,
    steps: int = 5,
    coeffs: tuple[float, float, float] = KELLER_JORDAN_COEFFS,
    eps: float = 1e-7,
    dtype: jnp.dtype = jnp.bfloat16,
    rounds_gram: bool = False,
) -> jax.Array:
    """Replace the singular values of each matrix by values near one: U S V^T -> about U V^T.

    x_OI has shape (..., fan_out, fan_in); leading axes are a batch. A square matrix must come as (fan_out, fan_in),
    since the iteration works on X X^T. X = x / (||x||_F + eps), then `steps` times

        A = X X^T,  B = b A + c A A,  X = a X + B X

    on the wide orientation. X, A and B are stored in `dtype`, each rounded once; products accumulate and the sums are
    taken in float32 or wider, where Python's coefficients are not rounded to bfloat16. Returns `dtype`.

    `rounds_gram` has the product itself round A, not a step after it: the same values, half the bytes on a GPU.
    """
    a, b, c = coeffs
    wide = jnp.promote_types(dtype, jnp.float32)
    # bfloat16 products are exact in float32; wider operands must not be cut to TF32 on a GPU.
    precision = jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    matmul = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    gram_of = functools.partial(matmul, preferred_element_type=dtype) if rounds_gram else matmul

    def summand(*operands):
        # Else XLA hands the sum's other term to the product's kernel, widened to float32 in memory first.
        return jax.lax.optimization_barrier(matmul(*operands))

    tall = x_OI.shape[-2] > x_OI.shape[-1]
    x = (x_OI.mT if tall else x_OI).astype(wide)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = (x / (norm + eps)).astype(dtype)

    def iteration(_, x):
        gram = gram_of("...ij,...kj->...ik", x, x).astype(dtype)  # x @ x.mT, for which XLA:CPU has no bfloat16 kernel
        polynomial = (b * gram.astype(wide) + c * summand("...ij,...jk->...ik", gram, gram)).astype(dtype)
        return (a * x.astype(wide) + summand("...ij,...jk->...ik", polynomial, x)).astype(dtype)

    x = jax.lax.fori_loop(0, steps, iteration, x)
    return x.mT if tall else x
