"""Random numbers of the JAX side: Threefry-2x32 keys derived from (seed, step, micro-batch, layer, site).

`torch_ref/random.py` computes the same bits, so dropout masks and sampled tokens are equal in both frameworks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl.products import accumulator

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


def keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Boolean mask, True with probability 1 - rate, in integer arithmetic so that no dtype setting changes it."""
    return bits(key, shape) >= jnp.uint32(round(rate * 2**32))


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
    return drop(x, keep_mask(fold_in(key, *path), x.shape, rate), rate)


def drop(x: jax.Array, keep: jax.Array, rate: float) -> jax.Array:
    """x / (1-rate) where `keep` is true, else zero."""
    scaled = (x.astype(accumulator(x.dtype)) / (1.0 - rate)).astype(x.dtype)
    return jnp.where(keep, scaled, jnp.zeros_like(x))
