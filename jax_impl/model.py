"""Qwen3 in Flax NNX, with Hugging Face's attribute names; the twin of `torch_ref/model.py`.

A micro-batches per update   B rows per micro-batch   T query positions   S key/value positions   P prompts
V vocabulary   D hidden_size   F intermediate_size   N query heads   K key/value heads   G = N/K   H head_dim
O, I  fan_out, fan_in of one matrix      R = H/2 rotary pairs      M = B*T tokens      C chunks
X = B*K pairs of a row and a key head      Q = G*T queries of such a pair

Activations travel in the compute dtype, products accumulate in float32, and norms, RoPE, softmax and loss run in
float32; in float64 everything is float64. Parameters are cast where they are used.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl import random
from jax_impl.attention import Places, attention, attention_in_use, fused_attention
from jax_impl.backend import recomputed
from jax_impl.cache import KVCache
from jax_impl.exchange import spread, whole_product
from jax_impl.loss import cross_entropy, token_losses
from jax_impl.products import accumulator, product
from jax_impl.random import dropout
from jax_impl.scan import checkpoint
from recipe.config import ModelConfig, PrecisionConfig, require
from recipe.packing import IGNORE


def rope_table(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of position * theta^(-2r/H), shape (length, R), in float64."""
    frequencies_R = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    angles_TR = np.arange(length, dtype=np.float64)[:, None] * frequencies_R
    return np.cos(angles_TR), np.sin(angles_TR)


def apply_rope(x_BTNH: jax.Array, cos_TR: jax.Array, sin_TR: jax.Array) -> jax.Array:
    """Rotate the pairs (x[r], x[r + R]) of every head by its position's angle; the tables may have rows, (B, T, R)."""
    wide = accumulator(x_BTNH.dtype)
    cos, sin = cos_TR[..., None, :].astype(wide), sin_TR[..., None, :].astype(wide)
    first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


class Linear(nnx.Module):
    """x kernel + bias, the kernel (fan_in, fan_out) as everywhere in Flax."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype) -> None:
        self.kernel = nnx.Param(jnp.zeros((in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.multiply(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        # Added in float32, or the bias's gradient, a sum over all tokens, would be summed in the compute dtype.
        return y if self.bias is None else (y.astype(accumulator(y.dtype)) + self.bias[...]).astype(y.dtype)

    def multiply(self, x_MI: jax.Array) -> jax.Array:
        """x kernel (M, O)."""
        return whole_product("mi,io->mo", x_MI, self.kernel[...], x_MI.dtype)


# For the backward pass the next two functions keep only what they are given: in between they are float32 and would take
# twice the memory, which costs more than to compute it again.
@recomputed(static_argnums=(2,))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 or wider."""
    wide = x.astype(accumulator(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(wide.dtype)).astype(x.dtype)


@recomputed()
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, silu in float32 or wider."""
    return jax.nn.silu(gate.astype(accumulator(gate.dtype))).astype(gate.dtype) * up


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight."""

    def __init__(self, features: int, eps: float, *, dtype) -> None:
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


class Embedding(nnx.Module):
    """A table (V, D); also the head's weights, which keep torch's layout."""

    def __init__(self, rows: int, features: int, *, dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((rows, features), dtype))

    def __call__(self, tokens_BT: jax.Array, dtype) -> jax.Array:
        return self.weight[...][tokens_BT].astype(dtype)


class Qwen3Attention(nnx.Module):
    """Projections, QK-norm, RoPE, attention, output projection."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, layer: int) -> None:
        D, H, bias = config.hidden_size, config.head_dim, config.attention_bias
        dtype = precision.params
        self.q_proj = Linear(D, config.num_attention_heads * H, bias=bias, dtype=dtype)
        self.k_proj = Linear(D, config.num_key_value_heads * H, bias=bias, dtype=dtype)
        self.v_proj = Linear(D, config.num_key_value_heads * H, bias=bias, dtype=dtype)
        self.o_proj = Linear(config.num_attention_heads * H, D, bias=bias, dtype=dtype)
        self.q_norm = RMSNorm(H, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.head_dim, self.window, self.rate, self.layer = H, config.window_of_layer(layer), config.dropout, layer
        self.precision = precision

    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        dropout_key: jax.Array | None,
        cache: KVCache | None = None,
    ) -> jax.Array:
        (B, T, _), (cos_TR, sin_TR, documents_BT) = x_BTD.shape, places
        x_BTD = spread(x_BTD, "heads")
        q_BTNH = self.q_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        k_BSKH = self.k_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        v_BSKH = self.v_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        if self.q_norm is not None:
            q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)
        q_BTNH, k_BSKH = apply_rope(q_BTNH, cos_TR, sin_TR), apply_rope(k_BSKH, cos_TR, sin_TR)
        if cache is not None:
            cache.append(self.layer, k_BSKH, v_BSKH)
        rate = 0.0 if dropout_key is None else self.rate
        if cache is not None and cache.position_B is not None:
            out_BTNH = cache.attend(self.layer, q_BTNH, window=self.window)
        else:
            site_key = random.fold_in(dropout_key, self.layer, random.ATTENTION_PROBABILITIES) if rate else None
            attend = fused_attention if attention_in_use(self.precision, rate, places.packed) == "fused" else attention
            out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, documents_BT, window=self.window, rate=rate, key=site_key)
        return self.o_proj(out_BTNH.reshape(B, T, -1))


class Qwen3MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, layer: int) -> None:
        D, F, dtype = config.hidden_size, config.intermediate_size, precision.params
        self.gate_proj = Linear(D, F, bias=False, dtype=dtype)
        self.up_proj = Linear(D, F, bias=False, dtype=dtype)
        self.down_proj = Linear(F, D, bias=False, dtype=dtype)
        self.rate, self.layer = config.dropout, layer

    def __call__(self, x_BTD: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        x_BTD = spread(x_BTD, "ffn")
        gate_BTF, up_BTF = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        hidden_BTF = swiglu(gate_BTF, up_BTF)
        hidden_BTF = dropout(hidden_BTF, self.rate, dropout_key, self.layer, random.FFN_HIDDEN)
        return self.down_proj(hidden_BTF)


class Qwen3DecoderLayer(nnx.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, layer: int) -> None:
        D, eps, dtype = config.hidden_size, config.rms_norm_eps, precision.params
        self.input_layernorm = RMSNorm(D, eps, dtype=dtype)
        self.self_attn = Qwen3Attention(config, precision, layer)
        self.post_attention_layernorm = RMSNorm(D, eps, dtype=dtype)
        self.mlp = Qwen3MLP(config, precision, layer)
        self.rate, self.layer = config.dropout, layer

    def __call__(
        self,
        x_BTD: jax.Array,
        places: Places,
        dropout_key: jax.Array | None,
        cache: KVCache | None = None,
    ) -> jax.Array:
        branch_BTD = self.self_attn(self.input_layernorm(x_BTD), places, dropout_key, cache)
        x_BTD = x_BTD + dropout(branch_BTD, self.rate, dropout_key, self.layer, random.ATTENTION_RESIDUAL)
        branch_BTD = self.mlp(self.post_attention_layernorm(x_BTD), dropout_key)
        return x_BTD + dropout(branch_BTD, self.rate, dropout_key, self.layer, random.FFN_RESIDUAL)


class Qwen3Model(nnx.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig) -> None:
        dtype = precision.params
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nnx.List([Qwen3DecoderLayer(config, precision, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.config, self.dtype, self.remat = config, precision.compute, precision.remat

    def __call__(
        self, tokens_BT: jax.Array, documents_BT=None, *, dropout_key=None, cache: KVCache | None = None
    ) -> jax.Array:
        """The last hidden states (B, T, D). With a cache, the tokens follow those in it and are added to it; else each
        sees those of its own document, if `documents_BT` (int32) says which is whose."""
        T, rate, outside = tokens_BT.shape[1], self.config.dropout, self.config.num_hidden_layers
        limit = self.config.max_position_embeddings
        require(limit >= T, f"a sequence of {T} tokens exceeds max_position_embeddings={limit}; shorten it.")
        decoding = cache is not None and cache.position_B is not None
        tables = rope_table(self.config, cache.slots if decoding else T)
        cos_TR, sin_TR = (jnp.asarray(table, accumulator(self.dtype)) for table in tables)
        if decoding:
            cos_TR, sin_TR = cos_TR[cache.position_B[:, None]], sin_TR[cache.position_B[:, None]]
        places = Places(cos_TR, sin_TR, documents_BT)
        x_BTD = dropout(self.embed_tokens(tokens_BT, self.dtype), rate, dropout_key, outside, random.EMBEDDING)
        for layer in self.layers:
            call = functools.partial(layer, places=places, dropout_key=dropout_key, cache=cache)
            remat = self.remat and cache is None
            x_BTD = checkpoint(call, remat)(x_BTD)
        return dropout(self.norm(x_BTD), rate, dropout_key, outside, random.HEAD)


class Qwen3ForCausalLM(nnx.Module):
    """The language model; `__call__` gives logits, `loss` what training minimises."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig) -> None:
        self.model = Qwen3Model(config, precision)
        tied, dtype = config.tie_word_embeddings, precision.params
        self.lm_head = None if tied else Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.config = config

    @property
    def head_VD(self) -> jax.Array:
        """The output head: the embedding table if tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def __call__(self, tokens_BT: jax.Array, documents_BT=None, *, dropout_key=None) -> jax.Array:
        """Logits (B, T, V) in float32 or wider."""
        x_BTD = self.model(tokens_BT, documents_BT, dropout_key=dropout_key)
        return product("btd,vd->btv", x_BTD, self.head_VD, accumulator(x_BTD.dtype))

    def loss(self, inputs_BT, targets_BT, documents_BT=None, weights_BT=None, *, dropout_key=None) -> jax.Array:
        """Mean loss in nats per token; `weights_BT`, whose mean is one, says how much each counts."""
        x_BTD = self.model(inputs_BT, documents_BT, dropout_key=dropout_key)
        weights_M = None if weights_BT is None else weights_BT.reshape(-1)
        return cross_entropy(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1), weights_M)

    def evaluate(self, inputs_BT, targets_BT, documents_BT=None) -> tuple[jax.Array, jax.Array]:
        """Sum of the tokens' losses and number of tokens whose target had the largest logit, IGNORE left out."""
        x_BTD = self.model(inputs_BT, documents_BT)
        losses_M, correct_M = token_losses(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1))
        trained_M = None if documents_BT is None else targets_BT.reshape(-1) != IGNORE
        return jnp.sum(losses_M, where=trained_M), jnp.sum(correct_M)
