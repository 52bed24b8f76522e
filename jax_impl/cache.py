"""The cache of keys and values that decoding reads. The twin is `torch_ref/cache.py`."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl.attention import visible
from jax_impl.products import accumulator, product
from recipe.config import ModelConfig


class KVCache:
    """Keys and values of earlier tokens, k_BKSH and v_BKSH for each layer: slot s holds position s of its row.

    `position_B` is the position of each row's one new token. None means prompts: T tokens of every row go to the slots
    from 0 on, padded at the end, where causal attention does not look and new tokens overwrite the padding in time.
    """

    def __init__(self, layers: list[tuple[jax.Array, jax.Array]], position_B: jax.Array | None = None) -> None:
        self.layers, self.position_B = list(layers), position_B

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, slots: int, dtype) -> "KVCache":
        """A cache without tokens."""
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        return cls([(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)])

    @property
    def slots(self) -> int:
        """S, the length of the longest row that fits."""
        return self.layers[0][0].shape[2]

    def append(self, layer: int, k_BTKH: jax.Array, v_BTKH: jax.Array) -> None:
        """Put the new tokens' keys and values into their slots."""
        k_BKSH, v_BKSH = self.layers[layer]
        B, T, K, _ = k_BTKH.shape
        b, k, s = np.ogrid[:B, :K, :T]
        if self.position_B is not None:
            s = self.position_B[:, None, None]
        # Every (row, head) is a write of its own: of a single write the compiler makes one that copies the cache first.
        k_BKTH, v_BKTH = (x.swapaxes(1, 2).astype(k_BKSH.dtype) for x in (k_BTKH, v_BTKH))
        self.layers[layer] = k_BKSH.at[b, k, s].set(k_BKTH), v_BKSH.at[b, k, s].set(v_BKTH)

    def attend(self, layer: int, q_BTNH: jax.Array, *, window: int | None) -> jax.Array:
        """`attention` of each row's new token, T = 1, over the slots up to its own."""
        k_BKSH, v_BKSH = self.layers[layer]
        B, T, N, H = q_BTNH.shape
        K, S = k_BKSH.shape[1:3]
        dtype = q_BTNH.dtype
        q_BKGH = q_BTNH.reshape(B, K, N // K, H)
        t, s = self.position_B[:, None], np.arange(S)[None, :]
        scores_BKGS = product("bksh,bkgh->bkgs", k_BKSH, q_BKGH, accumulator(dtype)) / math.sqrt(H)
        probs_BKGS = jax.nn.softmax(
            jnp.where(visible(t, s, window)[:, None, None], scores_BKGS, -jnp.inf), axis=-1
        ).astype(dtype)
        return product("bksh,bkgs->bkgh", v_BKSH, probs_BKGS, dtype).reshape(B, T, N, H)
