"""Qwen3 in PyTorch, with Hugging Face's attribute names; the twin of `jax_impl/model.py`.

A micro-batches per update   B rows per micro-batch   T query positions   S key/value positions
V vocabulary   D hidden_size   F intermediate_size   N query heads   K key/value heads   G = N/K   H head_dim
O, I  fan_out, fan_in of one matrix      R = H/2 rotary pairs      M = B*T tokens

Activations travel in the compute dtype, products accumulate in float32, and norms, RoPE, softmax and loss run in
float32; in float64 everything is float64. Parameters are cast where they are used.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from recipe.config import ModelConfig, PrecisionConfig, require
from torch_ref import random

# Queries per block of explicit attention: a block skips the keys none of its queries sees.
QUERY_BLOCK = 128


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: where sums, norms, softmax and loss are computed."""
    return torch.promote_types(dtype, torch.float32)


def dropout(x: torch.Tensor, rate: float, key: random.Key | None, *path: int) -> torch.Tensor:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); no key means no dropout."""
    if key is None or rate == 0.0:
        return x
    scaled = (x.to(accumulator(x.dtype)) / (1.0 - rate)).to(x.dtype)
    return torch.where(random.keep_mask(random.fold_in(key, *path), x.shape, rate, x.device), scaled, 0.0)


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


def attention(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    *,
    window: int | None,
    rate: float = 0.0,
    key: random.Key | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention in blocks of queries; query t sees keys s <= t, and s > t - window if set.

    `key` and `rate` drop probabilities; the mask of a block is keyed by the block's index.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    dtype = q_BTNH.dtype
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    outputs = []
    for block, start in enumerate(range(0, T, QUERY_BLOCK)):
        stop = min(start + QUERY_BLOCK, T)
        first = 0 if window is None else max(0, start - window + 1)
        t = torch.arange(start, stop, device=q_BTNH.device)[:, None]
        s = torch.arange(first, stop, device=q_BTNH.device)[None, :]
        visible = (s <= t) if window is None else (s <= t) & (s > t - window)
        q, k, v = q_BTKGH[:, start:stop], k_BSKH[:, first:stop], v_BSKH[:, first:stop]
        scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q, k).to(accumulator(dtype)) / math.sqrt(H)
        probs_BKGTS = torch.softmax(scores_BKGTS.masked_fill(~visible, -math.inf), dim=-1).to(dtype)
        probs_BKGTS = dropout(probs_BKGTS, rate, key, block)
        outputs.append(torch.einsum("bkgts,bskh->btkgh", probs_BKGTS, v))
    return torch.cat(outputs, dim=1).reshape(B, T, N, H)


def fused_attention(
    q_BTNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor, *, window: int | None
) -> torch.Tensor:
    """The same through torch's SDPA, without dropout."""
    T = q_BTNH.shape[1]
    mask = None
    if window is not None:
        position = torch.arange(T, device=q_BTNH.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window)
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out_BNTH.transpose(1, 2)


class KVCache:
    """Keys and values of earlier tokens, k_BKSH and v_BKSH for each layer: slot s holds position s of its row.

    `position_B` is the position of each row's one new token. None means prompts: T tokens of every row go to the slots
    from 0 on, padded at the end, where causal attention does not look and new tokens overwrite the padding in time.
    """

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], position_B: torch.Tensor | None = None) -> None:
        self.layers, self.position_B = list(layers), position_B

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: str) -> "KVCache":
        """A cache without tokens."""
        shape, to = (rows, config.num_key_value_heads, slots, config.head_dim), dict(dtype=dtype, device=device)
        return cls([(torch.zeros(shape, **to), torch.zeros(shape, **to)) for _ in range(config.num_hidden_layers)])

    @property
    def slots(self) -> int:
        """S, the length of the longest row that fits."""
        return self.layers[0][0].shape[2]

    def append(self, layer: int, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor) -> None:
        """Put the new tokens' keys and values into their slots, in place."""
        k_BKSH, v_BKSH = self.layers[layer]
        k_BKTH, v_BKTH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if self.position_B is None:
            T = k_BKTH.shape[2]
            k_BKSH[:, :, :T], v_BKSH[:, :, :T] = k_BKTH, v_BKTH
        else:
            b, s = torch.arange(len(self.position_B), device=k_BKSH.device), self.position_B
            k_BKSH[b, :, s], v_BKSH[b, :, s] = k_BKTH[:, :, 0], v_BKTH[:, :, 0]

    def attend(self, layer: int, q_BTNH: torch.Tensor, *, window: int | None) -> torch.Tensor:
        """`attention` of each row's new token, T = 1, over the slots up to its own."""
        k_BKSH, v_BKSH = self.layers[layer]
        B, T, N, H = q_BTNH.shape
        K, S = k_BKSH.shape[1:3]
        dtype = q_BTNH.dtype
        q_BKGH = q_BTNH.reshape(B, K, N // K, H)
        t, s = self.position_B[:, None], torch.arange(S, device=q_BTNH.device)[None, :]
        visible_BS = (s <= t) if window is None else (s <= t) & (s > t - window)
        scores_BKGS = torch.einsum("bkgh,bksh->bkgs", q_BKGH, k_BKSH).to(accumulator(dtype)) / math.sqrt(H)
        probs_BKGS = torch.softmax(scores_BKGS.masked_fill(~visible_BS[:, None, None], -math.inf), dim=-1).to(dtype)
        return torch.einsum("bkgs,bksh->bkgh", probs_BKGS, v_BKSH).reshape(B, T, N, H)


def cross_entropy(x_MD: torch.Tensor, head_VD: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(x head^T)[target] over the tokens; unlike its twin it holds all logits."""
    return F.cross_entropy(_logits(x_MD, head_VD), targets_M)


def token_losses(
    x_MD: torch.Tensor, head_VD: torch.Tensor, targets_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token, in float32 or wider, and whether its target had the largest logit."""
    logits_MV = _logits(x_MD, head_VD)
    return F.cross_entropy(logits_MV, targets_M, reduction="none"), logits_MV.argmax(-1) == targets_M


def _logits(x: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Logits in float32 or wider; the product rounds to the compute dtype first, which torch cannot avoid."""
    return F.linear(x, head_VD.to(x.dtype)).to(accumulator(x.dtype))


class Linear(nn.Linear):
    """x weight^T + bias, the weight (fan_out, fan_in) as everywhere in torch."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, features: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(accumulator(x.dtype))
        normed = wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + self.eps)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)


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
        self.fused = precision.attention == "fused"

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        dropout_key: random.Key | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        B, T, _ = x_BTD.shape
        q_BTNH = self.q_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        k_BSKH = self.k_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        v_BSKH = self.v_proj(x_BTD).reshape(B, T, -1, self.head_dim)
        if self.q_norm is not None:
            q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)
        q_BTNH, k_BSKH = apply_rope(q_BTNH, cos_TR, sin_TR), apply_rope(k_BSKH, cos_TR, sin_TR)
        if cache is not None:
            cache.append(self.layer, k_BSKH, v_BSKH)
        dropping = dropout_key is not None and self.rate > 0.0
        if cache is not None and cache.position_B is not None:
            out_BTNH = cache.attend(self.layer, q_BTNH, window=self.window)
        elif self.fused and not dropping:
            out_BTNH = fused_attention(q_BTNH, k_BSKH, v_BSKH, window=self.window)
        else:
            site_key = random.fold_in(dropout_key, self.layer, random.ATTENTION_PROBABILITIES) if dropping else None
            out_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, window=self.window, rate=self.rate, key=site_key)
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
        hidden_BTF = F.silu(gate_BTF) * up_BTF
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
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        dropout_key: random.Key | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        branch_BTD = self.self_attn(self.input_layernorm(x_BTD), cos_TR, sin_TR, dropout_key, cache)
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
        self, tokens_BT: torch.Tensor, *, dropout_key: random.Key | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """The last hidden states (B, T, D). With a cache, the tokens follow those in it and are added to it."""
        T, rate, outside = tokens_BT.shape[1], self.config.dropout, self.config.num_hidden_layers
        limit = self.config.max_position_embeddings
        require(limit >= T, f"a sequence of {T} tokens exceeds max_position_embeddings={limit}; shorten it.")
        to = dict(dtype=accumulator(self.dtype), device=tokens_BT.device)
        decoding = cache is not None and cache.position_B is not None
        tables = rope_table(self.config, cache.slots if decoding else T)
        cos_TR, sin_TR = (torch.as_tensor(table, **to) for table in tables)
        if decoding:
            cos_TR, sin_TR = cos_TR[cache.position_B[:, None]], sin_TR[cache.position_B[:, None]]
        x_BTD = dropout(self.embed_tokens(tokens_BT, self.dtype), rate, dropout_key, outside, random.EMBEDDING)
        for layer in self.layers:
            call = functools.partial(layer, cos_TR=cos_TR, sin_TR=sin_TR, dropout_key=dropout_key, cache=cache)
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

    def forward(self, tokens_BT: torch.Tensor, *, dropout_key: random.Key | None = None) -> torch.Tensor:
        """Logits (B, T, V) in float32 or wider."""
        x_BTD = self.model(tokens_BT, dropout_key=dropout_key)
        return _logits(x_BTD, self.head_VD)

    def loss(
        self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, *, dropout_key: random.Key | None = None
    ) -> torch.Tensor:
        """Mean loss in nats per token."""
        x_BTD = self.model(inputs_BT, dropout_key=dropout_key)
        return cross_entropy(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1))

    def evaluate(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the tokens' losses and number of tokens whose target had the largest logit."""
        x_BTD = self.model(inputs_BT)
        losses_M, correct_M = token_losses(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1))
        return losses_M.sum(), correct_M.sum()
