"""Newton-Schulz orthogonalisation: the heart of Muon, as pure functions on stacks of matrices.

Tables of coefficients are tuples of rows (a, b, c), one for each step: x -> a x + b x^3 + c x^5 on singular values.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

Coefficients = tuple[tuple[float, float, float], ...]

# Keller Jordan's quintic, tuned for slope at zero: https://kellerjordan.github.io/posts/muon/
KELLER_JORDAN: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5

_POLAR_EXPRESS_ROWS: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# The first five rows of Algorithm 1 in "The Polar Express" (https://arxiv.org/abs/2505.16932), best in the worst case
# for singular values from 1e-3 to 1, with the paper's margin of 1.01 against rounding.
POLAR_EXPRESS: Coefficients = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS_ROWS)

# Other rows by the same method, with a margin of 1.02 in all but the last: those of dion, modded-nanogpt and nanochat.
POLAR_EXPRESS_DION: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# YouJiacheng's five rows in dion and DeepSpeed, found by search: values in [0.01, 1] of the norm end nearer to one.
YOU: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# p(1) = 1 and p'(1) = 0: converges to U V^T itself, where the tables above stay in a band around it; slope 2 at zero.
CONVERGENT: Coefficients = ((2.0, -1.5, 0.5),) * 12

# Steps of the Gram form after which X is made anew. In bfloat16 its error is then no more than the plain form's.
GRAM_RESTARTS = (2, 3)


@functools.partial(jax.jit, static_argnames=("coefficients", "dtype", "gram", "rounds_gram"))
def orthogonalize_via_newton_schulz(
    x_OI: jax.Array,
    *,
    coefficients: Coefficients = KELLER_JORDAN,
    eps: float | jax.Array = 1e-7,
    dtype: jax.typing.DTypeLike = "bfloat16",
    gram: bool = False,
    rounds_gram: bool = False,
) -> jax.Array:
    """Replace the singular values of each matrix by values near one: U S V^T -> about U V^T.

    x_OI has shape (..., fan_out, fan_in); leading axes are a batch. A square matrix must come as (fan_out, fan_in),
    since the iteration works on X X^T. X = x / (||x||_F + eps), then for each row (a, b, c) of the coefficients

        A = X X^T,  B = b A + c A A,  X = a X + B X

    on the wide orientation. X, A and B are stored in `dtype`, each rounded once; products accumulate and the sums are
    taken in float32 or wider, where Python's coefficients are not rounded to bfloat16. Returns `dtype`.

    `gram` lets matrices whose long side is more than 1.5 times the short one iterate on A alone (`_iterate_gram`).
    `rounds_gram` has the product itself round A, not a step after it: the same values, half the bytes on a GPU.
    """
    dtype = jnp.dtype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    tall = x_OI.shape[-2] > x_OI.shape[-1]
    x = (x_OI.mT if tall else x_OI).astype(wide)
    x = normalize(x, eps).astype(dtype)
    iterate = _iterate_gram if gram and gram_pays(x.shape[-2], x.shape[-1], len(coefficients)) else _iterate
    x = iterate(x, coefficients, rounds_gram)
    return x.mT if tall else x


def normalize(x: jax.Array, eps: float | jax.Array) -> jax.Array:
    """x / (||x||_F + eps) for each matrix of a stack, whose norm neither overflows nor vanishes at any scale.

    What is squared are the entries over a power of two near the largest of them: an exact division.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0.0))
    # Up to 2^100 either way, so that no reciprocal is subnormal; what is left of the range has room for squares.
    scale = jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(jnp.frexp(largest)[1] - 1, -100, 100))
    x = x / scale
    return x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + eps / scale)


def gram_pays(short: int, long: int, steps: int) -> bool:
    """Whether the Gram form multiplies less than the plain one, in FLOPs over 2 short^2.

    In a segment of n steps it makes A once and X once, a product for each B, two for each new A, one for each new Q.
    """
    in_gram = sum(2 * long + short * (n + 3 * (n - 1)) for n in _segments(steps))
    return in_gram < steps * (2 * long + short)


def _segments(steps: int) -> list[int]:
    """Steps between restarts of the Gram form: 5 -> [2, 1, 2]."""
    ends = [0, *(step for step in GRAM_RESTARTS if step < steps), steps]
    return [end - start for start, end in itertools.pairwise(ends)]


def _iterate(x: jax.Array, coefficients: Coefficients, rounds_gram: bool) -> jax.Array:
    """The plain form, three products a step: one body in a loop, whatever the number of steps."""
    gram_of, multiply, add = _products(x.dtype, rounds_gram)

    def step(x, row):
        a, b, c = row
        gram = gram_of(x)
        polynomial = add(b, gram, c * multiply(gram, gram))
        return add(a, x, multiply(polynomial, x)), None

    if len(set(coefficients)) == 1:
        return jax.lax.fori_loop(0, len(coefficients), lambda _, x: step(x, coefficients[0])[0], x)
    table = jnp.asarray(coefficients, jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.scan(step, x, table)[0]


def _iterate_gram(x: jax.Array, coefficients: Coefficients, rounds_gram: bool) -> jax.Array:
    """The same polynomials on A = X X^T, whose sides are short, with X = Q X at the end of each segment.

    Source: Dao-AILab's Gram Newton-Schulz, which restarts once and in float16. Q multiplies by up to a^n what rounding
    put into A's null directions; making X and A anew stops it.
    """
    gram_of, multiply, add = _products(x.dtype, rounds_gram)
    # Else jaxlib 0.10.2's XLA:CPU reads the transpose of a tall Flax kernel in place, a layout in which it has no
    # bfloat16 product, and fails with "Unsupported element type for DotThunk".
    x = jax.lax.optimization_barrier(x)
    rows = iter(coefficients)
    for length in _segments(len(coefficients)):
        gram, q = gram_of(x), jnp.eye(x.shape[-2], dtype=x.dtype)
        for done in range(length):
            a, b, c = next(rows)
            polynomial = add(b, gram, c * multiply(gram, gram))
            q = add(a, q, multiply(polynomial, q) if done else polynomial)
            if done < length - 1:
                half = add(a, gram, multiply(polynomial, gram))  # (a I + B) A (a I + B), one side at a time
                gram = add(a, half, multiply(half, polynomial))
        x = multiply(q, x).astype(x.dtype)
    return x


def _products(dtype, rounds_gram: bool):
    """Three functions: x x^T rounded once; y z in float32 or wider; a x + such a product, rounded once."""
    wide = jnp.promote_types(dtype, jnp.float32)
    # bfloat16 products are exact in float32; wider operands must not be cut to TF32 on a GPU.
    precision = jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    matmul = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    rounded = functools.partial(matmul, preferred_element_type=dtype) if rounds_gram else matmul

    def gram_of(x):
        # x @ x.mT, for which XLA:CPU has no bfloat16 kernel
        return rounded("...ij,...kj->...ik", x, x).astype(dtype)

    def multiply(y, z):
        # Else XLA hands the sum's other term to the product's kernel, widened to float32 in memory first.
        return jax.lax.optimization_barrier(matmul("...ij,...jk->...ik", y, z))

    def add(a, x, product):
        return (a * x.astype(wide) + product).astype(dtype)

    return gram_of, multiply, add
