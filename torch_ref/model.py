"""Qwen3 in PyTorch, with Hugging Face's attribute names; the twin of `jax_impl/model.py`.

A micro-batches per update   B rows per micro-batch   T query positions   S key/value positions   P prompts
V vocabulary   D hidden_size   F intermediate_size   N query heads   K key/value heads   G = N/K   H head_dim
O, I  fan_out, fan_in of one matrix      R = H/2 rotary pairs      M = B*T tokens      C chunks
X = B*K pairs of a row and a key head      Q = G*T queries of such a pair

Activations travel in the compute dtype, products accumulate in float32, and norms, RoPE, softmax and loss run in
float32; in float64 everything is float64. Parameters are cast where they are used.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from recipe.config import ModelConfig, PrecisionConfig, require
from torch_ref import random
from torch_ref.attention import Places, attention, attention_in_use, fused_attention
from torch_ref.cache import KVCache
from torch_ref.loss import cross_entropy, logits, token_losses
from torch_ref.products import accumulator
from torch_ref.random import dropout


@functools.lru_cache(maxsize=2)  # Decoding asks for the same table at every token.
def rope_table(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of position * theta^(-2r/H), shape (length, R), in float64."""
    frequencies_R = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    angles_TR = np.arange(length, dtype=np.float64)[:, None] * frequencies_R
    return np.cos(angles_TR), np.sin(angles_TR)


def apply_rope(x_BTNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[r], x[r + R]) of every head by its position's angle; the tables may have rows, (B, T, R)."""
    wide = accumulator(x_BTNH.dtype)
    cos, sin = cos_TR[..., None, :].to(wide), sin_TR[..., None, :].to(wide)
    first, second = x_BTNH.to(wide).chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x_BTNH.dtype)


class Linear(nn.Linear):
    """x weight^T + bias, the weight (fan_out, fan_in) as everywhere in torch."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 or wider."""
    wide = x.to(accumulator(x.dtype))
    normed = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, silu in float32 or wider."""
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    def __init__(self, features: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """A table (V, D); also the head's weights."""

    def __init__(self, rows: int, features: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, features, dtype=dtype))

    def forward(self, tokens_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return F.embedding(tokens_BT, self.weight).to(dtype)


class Qwen3Attention(nn.Module):
    """Projections, QK-norm, RoPE, attention, output projection."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, layer: int) -> None:
        super().__init__()
        D, H, bias = config.hidden_size, config.head_dim, config.attention_bias
        dtype = getattr(torch, precision.params)
        self.q_proj = Linear(D, config.num_attention_heads * H, bias=bias, dtype=dtype)
        self.k_proj = Linear(D, config.num_key_value_heads * H, bias=bias, dtype=dtype)
        self.v_proj = Linear(D, config.num_key_value_heads * H, bias=bias, dtype=dtype)
        self.o_proj = Linear(config.num_attention_heads * H, D, bias=bias, dtype=dtype)
        self.q_norm = RMSNorm(H, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.head_dim, self.window, self.rate, self.layer = H, config.window_of_layer(layer), config.dropout, layer
        self.precision = precision

    def forward(
        self,
        x_BTD: torch.Tensor,
        places: Places,
        dropout_key: random.Key | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        (B, T, _), (cos_TR, sin_TR, documents_BT) = x_BTD.shape, places
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


class Qwen3MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, layer: int) -> None:
        super().__init__()
        D, F_, dtype = config.hidden_size, config.intermediate_size, getattr(torch, precision.params)
        self.gate_proj = Linear(D, F_, bias=False, dtype=dtype)
        self.up_proj = Linear(D, F_, bias=False, dtype=dtype)
        self.down_proj = Linear(F_, D, bias=False, dtype=dtype)
        self.rate, self.layer = config.dropout, layer

    def forward(self, x_BTD: torch.Tensor, dropout_key: random.Key | None) -> torch.Tensor:
        gate_BTF, up_BTF = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        hidden_BTF = swiglu(gate_BTF, up_BTF)
        hidden_BTF = dropout(hidden_BTF, self.rate, dropout_key, self.layer, random.FFN_HIDDEN)
        return self.down_proj(hidden_BTF)


class Qwen3DecoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, layer: int) -> None:
        super().__init__()
        D, eps, dtype = config.hidden_size, config.rms_norm_eps, getattr(torch, precision.params)
        self.input_layernorm = RMSNorm(D, eps, dtype=dtype)
        self.self_attn = Qwen3Attention(config, precision, layer)
        self.post_attention_layernorm = RMSNorm(D, eps, dtype=dtype)
        self.mlp = Qwen3MLP(config, precision, layer)
        self.rate, self.layer = config.dropout, layer

    def forward(
        self,
        x_BTD: torch.Tensor,
        places: Places,
        dropout_key: random.Key | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        branch_BTD = self.self_attn(self.input_layernorm(x_BTD), places, dropout_key, cache)
        x_BTD = x_BTD + dropout(branch_BTD, self.rate, dropout_key, self.layer, random.ATTENTION_RESIDUAL)
        branch_BTD = self.mlp(self.post_attention_layernorm(x_BTD), dropout_key)
        return x_BTD + dropout(branch_BTD, self.rate, dropout_key, self.layer, random.FFN_RESIDUAL)


class Qwen3Model(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig) -> None:
        super().__init__()
        dtype = getattr(torch, precision.params)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, precision, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.config, self.dtype, self.remat = config, getattr(torch, precision.compute), precision.remat

    def forward(
        self, tokens_BT: torch.Tensor, documents_BT=None, *, dropout_key=None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """The last hidden states (B, T, D). With a cache, the tokens follow those in it and are added to it; else each
        sees those of its own document, if `documents_BT` (int32) says which is whose."""
        T, rate, outside = tokens_BT.shape[1], self.config.dropout, self.config.num_hidden_layers
        limit = self.config.max_position_embeddings
        require(limit >= T, f"a sequence of {T} tokens exceeds max_position_embeddings={limit}; shorten it.")
        to = dict(dtype=accumulator(self.dtype), device=tokens_BT.device)
        decoding = cache is not None and cache.position_B is not None
        tables = rope_table(self.config, cache.slots if decoding else T)
        cos_TR, sin_TR = (torch.as_tensor(table, **to) for table in tables)
        if decoding:
            cos_TR, sin_TR = cos_TR[cache.position_B[:, None]], sin_TR[cache.position_B[:, None]]
        places = Places(cos_TR, sin_TR, documents_BT)
        x_BTD = dropout(self.embed_tokens(tokens_BT, self.dtype), rate, dropout_key, outside, random.EMBEDDING)
        for layer in self.layers:
            call = functools.partial(layer, places=places, dropout_key=dropout_key, cache=cache)
            remat = self.remat and cache is None
            x_BTD = checkpoint(call, x_BTD, use_reentrant=False) if remat else call(x_BTD)
        return dropout(self.norm(x_BTD), rate, dropout_key, outside, random.HEAD)


class Qwen3ForCausalLM(nn.Module):
    """The language model; `forward` gives logits, `loss` what training minimises."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig) -> None:
        super().__init__()
        self.model = Qwen3Model(config, precision)
        tied, dtype = config.tie_word_embeddings, getattr(torch, precision.params)
        self.lm_head = None if tied else Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.config = config

    @property
    def head_VD(self) -> torch.Tensor:
        """The output head: the embedding table if tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def forward(self, tokens_BT: torch.Tensor, documents_BT=None, *, dropout_key=None) -> torch.Tensor:
        """Logits (B, T, V) in float32 or wider."""
        x_BTD = self.model(tokens_BT, documents_BT, dropout_key=dropout_key)
        return logits(x_BTD, self.head_VD)

    def loss(self, inputs_BT, targets_BT, documents_BT=None, weights_BT=None, *, dropout_key=None) -> torch.Tensor:
        """Mean loss in nats per token; `weights_BT`, whose mean is one, says how much each counts."""
        x_BTD = self.model(inputs_BT, documents_BT, dropout_key=dropout_key)
        weights_M = None if weights_BT is None else weights_BT.reshape(-1)
        return cross_entropy(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1), weights_M)

    def evaluate(self, inputs_BT, targets_BT, documents_BT=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the tokens' losses and number of tokens whose target had the largest logit, IGNORE left out."""
        x_BTD = self.model(inputs_BT, documents_BT)
        losses_M, correct_M = token_losses(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1))
        return losses_M.sum(), correct_M.sum()
