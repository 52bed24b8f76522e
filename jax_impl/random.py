"""Random numbers of the JAX side: Threefry-2x32 keys derived from (seed, step, micro-batch, layer, site).

`torch_ref/random.py` computes the same bits, so dropout masks and sampled tokens are equal in both frameworks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from jax_impl import exchange
from jax_impl.backend import recomputed
from jax_impl.products import accumulator
from recipe.dropout import DECISIONS, kept_share, threshold

# Sites of dropout inside one layer. The embedding and the head count as layer `num_hidden_layers`.
EMBEDDING, ATTENTION_PROBABILITIES, ATTENTION_RESIDUAL, FFN_HIDDEN, FFN_RESIDUAL, HEAD = range(6)


def key(seed: int, sample: int = 0) -> jax.Array:
    """The root key of a seed and a sample's number, both below 2**32: the Threefry key words (sample, seed)."""
    return jax.random.wrap_key_data(np.array([sample, seed], np.uint32), impl="threefry2x32")


def fold_in(key: jax.Array, *data) -> jax.Array:
    """A new key for each integer below 2**32 in turn, e.g. `fold_in(key, step, micro_batch)`."""
    for word in data:
        key = jax.random.fold_in(key, word)
    return key


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint32 words of the given shape."""
    return jax.random.bits(key, shape, jnp.uint32)


def decisions(key: jax.Array, rows: range, columns: range, rate: float, first=(0, 0)) -> jax.Array:
    """Dropout's decisions of rows and columns (`recipe.dropout`), four to a byte: uint8 (rows, blocks of columns).

    Bit h of a byte is set if column 4 block + h stays. The barrier keeps XLA from making a block again for each column.
    Rows and columns are counted from `first`, where on a mesh this device's part begins.
    """
    blocks = range(columns.start // DECISIONS, -(-columns.stop // DECISIONS))
    shape = len(rows), len(blocks)
    x0 = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) + jnp.uint32(rows.start + first[0])
    x1 = jax.lax.broadcasted_iota(jnp.uint32, shape, 1) + jnp.uint32(blocks.start + first[1] // DECISIONS)
    words = threefry2x32_p.bind(*jax.random.key_data(key), x0, x1)
    halves = [half for word in words for half in (word & jnp.uint32(0xFFFF), word >> 16)]
    stays = ((half >= jnp.uint32(threshold(rate))).astype(jnp.uint8) << h for h, half in enumerate(halves))
    return jax.lax.optimization_barrier(functools.reduce(jnp.bitwise_or, stays))


def keep_mask(decided: jax.Array, columns: range) -> jax.Array:
    """Boolean mask (..., columns) from bytes of `decisions` for these columns: True where the element stays."""
    bits = decided[..., None] >> jnp.arange(DECISIONS, dtype=jnp.uint8) & jnp.uint8(1)
    first = columns.start % DECISIONS
    return bits.reshape(*decided.shape[:-1], -1)[..., first : first + len(columns)] == 1


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 in (0, 1): the upper 23 bits of a word, and a half, over 2**23."""
    return ((bits(key, shape) >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2**-23)


def gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard Gumbel noise in float32; argmax(logits + gumbel) samples from softmax(logits)."""
    return -jnp.log(-jnp.log(uniform(key, shape)))


def dropout(x: jax.Array, rate: float, key: jax.Array | None, *path: int) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); no key means no dropout."""
    if key is None or rate == 0.0:
        return x
    columns = x.shape[-1]
    rows = x.size // columns
    first = exchange.first_row(rows), exchange.first("ffn", columns) if path[-1:] == (FFN_HIDDEN,) else 0
    decided = decisions(fold_in(key, *path), range(rows), range(columns), rate, first)
    return drop(x, decided.reshape(*x.shape[:-1], -1), rate, 0)


# The backward pass keeps the bytes of `decisions`, a quarter of what the mask would take.
@recomputed(static_argnums=(2, 3))
def drop(x: jax.Array, decided: jax.Array, rate: float, first: int) -> jax.Array:
    """x / (1-rate) where its columns `first` ... stay, else zero; the rate as `recipe.dropout` rounds it."""
    keep = keep_mask(decided, range(first, first + x.shape[-1]))
    scaled = (x.astype(accumulator(x.dtype)) / kept_share(rate)).astype(x.dtype)
    return jnp.where(keep, scaled, jnp.zeros_like(x))
