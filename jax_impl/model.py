"""Qwen3 in Flax NNX, with Hugging Face's attribute names; the twin of `torch_ref/model.py`.

A micro-batches per update   B rows per micro-batch   T query positions   S key/value positions
V vocabulary   D hidden_size   F intermediate_size   N query heads   K key/value heads   G = N/K   H head_dim
O, I  fan_out, fan_in of one matrix      R = H/2 rotary pairs      M = B*T tokens

Activations travel in the compute dtype, products accumulate in float32, and norms, RoPE, softmax and loss run in
float32; in float64 everything is float64. Parameters are cast where they are used.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl import random
from recipe.config import ModelConfig, PrecisionConfig, require

# Queries per block of explicit attention: a block skips the keys none of its queries sees.
QUERY_BLOCK = 128


def accumulator(dtype) -> jnp.dtype:
    """float32, or float64 for float64: where sums, norms, softmax and loss are computed."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(spec: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """Two-operand einsum on x's dtype, accumulated in float32 or wider and returned in `dtype`.

    y is cast to x's dtype. Every index must stand in two of the three terms. The gradients are the two products one
    would write by hand, on operands of x's dtype; y's is returned unrounded in y's own dtype, which is what the
    parameters want, and plain autodiff would multiply float32 by bfloat16, which no fast kernel does.
    """
    y = y.astype(x.dtype)
    if jax.default_backend() != "cpu":
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.promote_types(dtype, x.dtype)).astype(dtype)
    if x.dtype.itemsize > 2:
        return jnp.einsum(spec, x, y, preferred_element_type=accumulator(x.dtype)).astype(dtype)
    # XLA's CPU backend has bfloat16 kernels for float32 results and one layout; all else it converts to float32 first,
    # and takes three to five times as long (docs/log.md).
    z = jnp.einsum(*_lay_out(spec, x, y), preferred_element_type=accumulator(x.dtype))
    # Else jax 0.10 folds a transpose of the result into the product and then has no kernel for it: it fails to run.
    return jax.lax.optimization_barrier(z).astype(dtype)


def in_memory(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """x with its axes in this order, written out; else XLA would hand the order on to the product that reads x.

    On a CPU the order decides which kernel multiplies (`contract`); on a GPU every order is a fast one.
    """
    x = jnp.transpose(x, axes)
    # Flat behind the barrier: the compiler must not see that it is a transpose.
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape) if jax.default_backend() == "cpu" else x


def _lay_out(spec: str, x: jax.Array, y: jax.Array) -> tuple[str, jax.Array, jax.Array]:
    """The same product with that operand first whose own index leads the result, its summed index last in memory."""
    operands, z_axes = spec.split("->")
    x_axes, y_axes = operands.split(",")
    batch = [axis for axis in z_axes if axis in x_axes and axis in y_axes]
    if next(axis for axis in z_axes if axis not in batch) in y_axes:
        x, y, x_axes, y_axes = y, x, y_axes, x_axes
    own = [axis for axis in z_axes if axis not in y_axes]
    axes = "".join([*batch, *own, *(axis for axis in x_axes if axis not in z_axes)])
    if axes != x_axes:
        x = in_memory(x, [x_axes.index(axis) for axis in axes])
    return f"{axes},{y_axes}->{z_axes}", x, y


def _contract_forward(spec, x, y, dtype):
    return contract(spec, x, y, dtype), (x, y)


def _contract_backward(spec, dtype, residuals, cotangent):
    x, y = residuals
    operands, z_axes = spec.split("->")
    x_axes, y_axes = operands.split(",")
    cotangent = cotangent.astype(x.dtype)
    grad_x = contract(f"{z_axes},{y_axes}->{x_axes}", cotangent, y, x.dtype)
    grad_y = contract(f"{x_axes},{z_axes}->{y_axes}", x, cotangent, y.dtype)
    return grad_x, grad_y


contract.defvjp(_contract_forward, _contract_backward)


def contract_held(weight_OI: jax.Array, x_MI: jax.Array, dtype) -> jax.Array:
    """x weight^T (M, O) for weights as generation holds them: torch's layout, and x is cast to their dtype instead.

    XLA's CPU backend multiplies few rows two to four times as fast with the weights first; the barrier keeps it from
    turning the product round to save the transpose of the result.
    """
    return jax.lax.optimization_barrier(contract("oi,mi->om", weight_OI, x_MI, dtype)).T


def dropout(x: jax.Array, rate: float, key: jax.Array | None, *path: int) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); no key means no dropout."""
    if key is None or rate == 0.0:
        return x
    return drop(x, random.keep_mask(random.fold_in(key, *path), x.shape, rate), rate)


def drop(x: jax.Array, keep: jax.Array, rate: float) -> jax.Array:
    """x / (1-rate) where `keep` is true, else zero."""
    scaled = (x.astype(accumulator(x.dtype)) / (1.0 - rate)).astype(x.dtype)
    return jnp.where(keep, scaled, jnp.zeros_like(x))


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


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int | None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention, S = T, in blocks of queries; query t sees keys s <= t, and s > t - window if set.

    `key` and `rate` drop probabilities; the mask of a block is keyed by the block's index. Scores are computed again in
    the backward pass, and on a CPU a few (row, head) pairs at a time, so that they never leave the caches.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    G, X, dtype = N // K, B * K, q_BTNH.dtype
    # Laid out once, by key head: XLA would transpose b, t, k, g in every block and product.
    q_XGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(X, G, T, H)
    k_XSH, v_XSH = (x_BSKH.swapaxes(1, 2).reshape(X, -1, H) for x_BSKH in (k_BSKH, v_BSKH))
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        first = 0 if window is None else max(0, start - window + 1)
        blocks.append((start, stop, first))

    masks_XGTS = []
    if key is not None and rate > 0.0:
        for block, (start, stop, first) in enumerate(blocks):
            mask_BKGTS = random.keep_mask(random.fold_in(key, block), (B, K, G, stop - start, stop - first), rate)
            masks_XGTS.append(mask_BKGTS.reshape(X, *mask_BKGTS.shape[2:]))

    @jax.checkpoint
    def attend(operands):
        q_XGTH, k_XSH, v_XSH, masks_XGTS = operands
        X, outputs = q_XGTH.shape[0], []
        # In pieces, whose gradients are pieces: that of a slice has zeros around it and would be added as a whole.
        edges = np.arange(QUERY_BLOCK, T, QUERY_BLOCK)
        q_blocks = jnp.split(q_XGTH, edges, axis=2)
        k_blocks, v_blocks = jnp.split(k_XSH, edges, axis=1), jnp.split(v_XSH, edges, axis=1)
        for block, (start, stop, first) in enumerate(blocks):
            t, s = np.arange(start, stop)[:, None], np.arange(first, stop)[None, :]
            visible = (s <= t) if window is None else (s <= t) & (s > t - window)
            q_XQH = q_blocks[block].reshape(X, -1, H)
            whole, part = divmod(first, QUERY_BLOCK)
            k_XSH, v_XSH = (jnp.concatenate(x[whole : block + 1], axis=1)[:, part:] for x in (k_blocks, v_blocks))
            scores_XQS = contract("xqh,xsh->xqs", q_XQH, k_XSH, accumulator(dtype)) / math.sqrt(H)
            scores_XGTS = scores_XQS.reshape(X, G, stop - start, -1)
            probs_XGTS = jax.nn.softmax(jnp.where(visible, scores_XGTS, -jnp.inf), axis=-1).astype(dtype)
            if masks_XGTS:
                probs_XGTS = drop(probs_XGTS, masks_XGTS[block], rate)
            out_XQH = contract("xqs,xsh->xqh", probs_XGTS.reshape(scores_XQS.shape), v_XSH, dtype)
            outputs.append(out_XQH.reshape(X, G, -1, H))
        return jnp.concatenate(outputs, axis=2)

    operands = q_XGTH, k_XSH, v_XSH, masks_XGTS
    count = chunk_count(X, G * min(QUERY_BLOCK, T) * T)
    if count == 1:
        out_XGTH = attend(operands)
    else:
        out_XGTH = jax.lax.map(attend, jax.tree.map(lambda x: x.reshape(count, X // count, *x.shape[1:]), operands))
    return out_XGTH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def chunk_count(rows: int, scores: int) -> int:
    """Into how many equal chunks attention splits its rows, each with so many scores at once.

    On a CPU at most 2^20 scores, 4 MiB in float32, are in work, which two cores' caches hold; a GPU takes all.
    """
    if jax.default_backend() != "cpu":
        return 1
    fitting = (count for count in range(1, rows + 1) if rows % count == 0 and rows // count * scores <= 2**20)
    return next(fitting, rows)


def fused_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, window: int | None) -> jax.Array:
    """The same through cuDNN's flash attention, without dropout; needs a GPU and a 16-bit dtype."""
    local_window = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=local_window, implementation="cudnn"
    )


def has_fused_attention(dtype) -> bool:
    """Whether `fused_attention` can run: on a GPU in a 16-bit dtype; elsewhere the explicit code is the fast one."""
    return jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2


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
        visible_BS = (s <= t) if window is None else (s <= t) & (s > t - window)
        scores_BKGS = contract("bksh,bkgh->bkgs", k_BKSH, q_BKGH, accumulator(dtype)) / math.sqrt(H)
        probs_BKGS = jax.nn.softmax(jnp.where(visible_BS[:, None, None], scores_BKGS, -jnp.inf), axis=-1).astype(dtype)
        return contract("bksh,bkgs->bkgh", v_BKSH, probs_BKGS, dtype).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp)
def cross_entropy(x_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array) -> jax.Array:
    """Mean of -log softmax(x head^T)[target] over the tokens, without ever holding all logits.

    Differentiating it computes the gradients together with the loss, chunk by chunk, so nothing is computed twice.
    """
    losses_M, _ = token_losses(x_MD, head_VD, targets_M)
    return jnp.mean(losses_M)


def token_losses(x_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, in float32 or wider, and whether its target had the largest logit."""

    def chunk(operands):
        x, targets = operands
        logits_MV = contract("md,vd->mv", x, head_VD, accumulator(x.dtype))
        log_normalizers = jax.nn.logsumexp(logits_MV, axis=-1)
        losses = log_normalizers - jnp.take_along_axis(logits_MV, targets[:, None], axis=-1)[:, 0]
        return losses, jnp.argmax(logits_MV, axis=-1) == targets

    M = x_MD.shape[0]
    x_CMD, targets_CM, _ = _chunks(x_MD, targets_M)
    losses_CM, correct_CM = jax.lax.map(chunk, (x_CMD, targets_CM))
    return losses_CM.reshape(-1)[:M], correct_CM.reshape(-1)[:M]


def tokens_at_once() -> int:
    """Tokens whose logits the loss holds: as few as caches and memory like, but no fewer than pay for the sum.

    Adding a chunk's gradient of the head to the sum moves 12 V D bytes; a chunk of n tokens takes 6 V D n FLOPs. At
    F FLOP/s and B bytes/s the sum is a tenth of that for n = 20 F/B: some 200 tokens on a CPU, 2,400 on an H100.
    """
    return 256 if jax.default_backend() == "cpu" else 4096


def _chunks(x_MD, targets_M):
    """Equal chunks (C, M/C, ...) of tokens, the last one padded, and the weight 1/M or 0 of each token."""
    M, D = x_MD.shape
    count = math.ceil(M / tokens_at_once())
    rows = math.ceil(M / count)
    padding = count * rows - M
    weights_M = jnp.pad(jnp.full((M,), 1.0 / M, accumulator(x_MD.dtype)), (0, padding))
    x_MD, targets_M = jnp.pad(x_MD, ((0, padding), (0, 0))), jnp.pad(targets_M, (0, padding))
    return x_MD.reshape(count, rows, D), targets_M.reshape(count, rows), weights_M.reshape(count, rows)


def _cross_entropy_forward(x_MD, head_VD, targets_M):
    wide = accumulator(x_MD.dtype)
    head = head_VD.astype(x_MD.dtype)

    def chunk(carry, operands):
        loss, grad_head_DV = carry
        x, targets, weights = operands
        logits_MV = contract("md,vd->mv", x, head, wide)
        peak = jnp.max(logits_MV, axis=-1, keepdims=True)
        exponentials = jnp.exp(logits_MV - peak)
        total = jnp.sum(exponentials, axis=-1, keepdims=True)
        hit = jnp.take_along_axis(logits_MV, targets[:, None], axis=-1)
        loss += jnp.sum((jnp.log(total) + peak - hit)[:, 0] * weights)
        is_target = targets[:, None] == jnp.arange(logits_MV.shape[-1])
        grad_logits = ((exponentials / total - is_target) * weights[:, None]).astype(x.dtype)
        grad_x = contract("mv,vd->md", grad_logits, head, x.dtype)
        # Summed as (D, V): so it is x that has to be transposed and not the logits.
        return (loss, grad_head_DV + contract("dm,mv->dv", in_memory(x, (1, 0)), grad_logits, wide)), grad_x

    x_CMD, targets_CM, weights_CM = _chunks(x_MD, targets_M)
    start = (jnp.zeros((), wide), jnp.zeros(head_VD.shape[::-1], wide))
    (loss, grad_head_DV), grad_x_CMD = jax.lax.scan(chunk, start, (x_CMD, targets_CM, weights_CM))
    grad_x_MD = grad_x_CMD.reshape(-1, x_MD.shape[1])[: x_MD.shape[0]]
    return loss, (grad_x_MD, grad_head_DV.T.astype(head_VD.dtype))


def _cross_entropy_backward(residuals, cotangent):
    grad_x_MD, grad_head_VD = residuals
    return (grad_x_MD * cotangent).astype(grad_x_MD.dtype), grad_head_VD * cotangent, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


class Linear(nnx.Module):
    """x kernel + bias, the kernel (fan_in, fan_out) as everywhere in Flax."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype) -> None:
        self.kernel = nnx.Param(jnp.zeros((in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None
        self.held = False
        """Set by generation: the leaf is weight_OI, rounded to the compute dtype once and for all."""

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        kernel = self.kernel[...]
        y = contract_held(kernel, flat, x.dtype) if self.held else contract("mi,io->mo", flat, kernel, x.dtype)
        y = y.reshape(*x.shape[:-1], -1)
        # Added in float32, or the bias's gradient, a sum over all tokens, would be summed in the compute dtype.
        return y if self.bias is None else (y.astype(accumulator(y.dtype)) + self.bias[...]).astype(y.dtype)


# For the backward pass the next two functions keep only what they are given: in between they are float32 and would take
# twice the memory, which costs more than to compute it again.
@functools.partial(jax.checkpoint, static_argnums=2)
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 or wider."""
    wide = x.astype(accumulator(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(wide.dtype)).astype(x.dtype)


@jax.checkpoint
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
        D, H, dtype, bias = config.hidden_size, config.head_dim, precision.params, config.attention_bias
        self.q_proj = Linear(D, config.num_attention_heads * H, bias=bias, dtype=dtype)
        self.k_proj = Linear(D, config.num_key_value_heads * H, bias=bias, dtype=dtype)
        self.v_proj = Linear(D, config.num_key_value_heads * H, bias=bias, dtype=dtype)
        self.o_proj = Linear(config.num_attention_heads * H, D, bias=bias, dtype=dtype)
        self.q_norm = RMSNorm(H, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None
        self.head_dim, self.window, self.rate, self.layer = H, config.window_of_layer(layer), config.dropout, layer
        self.fused = precision.attention == "fused"

    def __call__(
        self,
        x_BTD: jax.Array,
        cos_TR: jax.Array,
        sin_TR: jax.Array,
        dropout_key: jax.Array | None,
        cache: KVCache | None = None,
    ) -> jax.Array:
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
        elif self.fused and has_fused_attention(x_BTD.dtype) and not dropping:
            out_BTNH = fused_attention(q_BTNH, k_BSKH, v_BSKH, window=self.window)
        else:
            site_key = random.fold_in(dropout_key, self.layer, random.ATTENTION_PROBABILITIES) if dropping else None
            out_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, window=self.window, rate=self.rate, key=site_key)
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
        cos_TR: jax.Array,
        sin_TR: jax.Array,
        dropout_key: jax.Array | None,
        cache: KVCache | None = None,
    ) -> jax.Array:
        branch_BTD = self.self_attn(self.input_layernorm(x_BTD), cos_TR, sin_TR, dropout_key, cache)
        x_BTD = x_BTD + dropout(branch_BTD, self.rate, dropout_key, self.layer, random.ATTENTION_RESIDUAL)
        branch_BTD = self.mlp(self.post_attention_layernorm(x_BTD), dropout_key)
        return x_BTD + dropout(branch_BTD, self.rate, dropout_key, self.layer, random.FFN_RESIDUAL)


class Qwen3Model(nnx.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=precision.params)
        self.layers = nnx.List([Qwen3DecoderLayer(config, precision, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=precision.params)
        self.config, self.dtype, self.remat = config, precision.compute, precision.remat

    def __call__(
        self, tokens_BT: jax.Array, *, dropout_key: jax.Array | None = None, cache: KVCache | None = None
    ) -> jax.Array:
        """The last hidden states (B, T, D). With a cache, the tokens follow those in it and are added to it."""
        T, rate, outside = tokens_BT.shape[1], self.config.dropout, self.config.num_hidden_layers
        limit = self.config.max_position_embeddings
        require(limit >= T, f"a sequence of {T} tokens exceeds max_position_embeddings={limit}; shorten it.")
        decoding = cache is not None and cache.position_B is not None
        tables = rope_table(self.config, cache.slots if decoding else T)
        cos_TR, sin_TR = (jnp.asarray(table, accumulator(self.dtype)) for table in tables)
        if decoding:
            cos_TR, sin_TR = cos_TR[cache.position_B[:, None]], sin_TR[cache.position_B[:, None]]
        x_BTD = dropout(self.embed_tokens(tokens_BT, self.dtype), rate, dropout_key, outside, random.EMBEDDING)
        for layer in self.layers:
            call = functools.partial(layer, cos_TR=cos_TR, sin_TR=sin_TR, dropout_key=dropout_key, cache=cache)
            remat = self.remat and cache is None
            x_BTD = (jax.checkpoint(call) if remat else call)(x_BTD)
        return dropout(self.norm(x_BTD), rate, dropout_key, outside, random.HEAD)


class Qwen3ForCausalLM(nnx.Module):
    """The language model; `__call__` gives logits, `loss` what training minimises."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig) -> None:
        self.model = Qwen3Model(config, precision)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Embedding(config.vocab_size, config.hidden_size, dtype=precision.params)
        self.config = config

    @property
    def head_VD(self) -> jax.Array:
        """The output head: the embedding table if tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def __call__(self, tokens_BT: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits (B, T, V) in float32 or wider."""
        x_BTD = self.model(tokens_BT, dropout_key=dropout_key)
        return contract("btd,vd->btv", x_BTD, self.head_VD, accumulator(x_BTD.dtype))

    def loss(self, inputs_BT: jax.Array, targets_BT: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Mean loss in nats per token."""
        x_BTD = self.model(inputs_BT, dropout_key=dropout_key)
        return cross_entropy(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1))

    def evaluate(self, inputs_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sum of the tokens' losses and number of tokens whose target had the largest logit."""
        x_BTD = self.model(inputs_BT)
        losses_M, correct_M = token_losses(x_BTD.reshape(-1, x_BTD.shape[-1]), self.head_VD, targets_BT.reshape(-1))
        return jnp.sum(losses_M), jnp.sum(correct_M)
