"""The loss and its gradient in chunks of tokens. The twin is `torch_ref/loss.py`."""

import functools
import math

import jax
import jax.numpy as jnp

from jax_impl import exchange
from jax_impl.backend import machine
from jax_impl.products import accumulator, gradient_like, in_memory, product
from recipe.packing import IGNORE


def weighted(targets: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Targets with 0 for IGNORE, and each token's weight: 0 where it was, else one by the share of those trained on.

    A mean of all tokens, whichever way they are divided, is by these weights one of the tokens that are trained on.
    """
    trained = targets != IGNORE
    count = jnp.maximum(jnp.sum(trained), 1).astype(dtype)
    weight = jnp.full_like(count, targets.size) / count
    return jnp.where(trained, targets, 0), jnp.where(trained, weight, jnp.zeros_like(weight))


@functools.partial(jax.custom_vjp)
def cross_entropy(
    x_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array, weights_M: jax.Array | None = None
) -> jax.Array:
    """Mean of -log softmax(x head^T)[target] over the tokens, times their weights, without ever holding all logits.

    Differentiating it computes the gradients together with the loss, chunk by chunk, so nothing is computed twice.
    """
    losses_M, _ = token_losses(x_MD, head_VD, targets_M)
    return jnp.mean(losses_M if weights_M is None else losses_M * weights_M)


def token_losses(x_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, in float32 or wider, and whether its target had the largest logit."""
    if kernel := _kernel(x_MD):
        return kernel.token_losses(x_MD, head_VD, targets_M)

    def chunk(operands):
        x, targets = operands
        logits_MV = product("md,vd->mv", x, head_VD, accumulator(x.dtype))
        if exchange.is_split("vocab"):
            return _token_losses_of_parts(logits_MV, targets)
        log_normalizers = jax.nn.logsumexp(logits_MV, axis=-1)
        losses = log_normalizers - jnp.take_along_axis(logits_MV, targets[:, None], axis=-1)[:, 0]
        return losses, jnp.argmax(logits_MV, axis=-1) == targets

    M = x_MD.shape[0]
    x_CMD, targets_CM, _ = _chunks(x_MD, targets_M)
    losses_CM, correct_CM = jax.lax.map(chunk, (x_CMD, targets_CM))
    return losses_CM.reshape(-1)[:M], correct_CM.reshape(-1)[:M]


def is_in_kernel(dtype, hidden_size: int) -> bool:
    """Whether the loss of such an x is `loss_kernel`'s on this machine; else it is that of the chunks here."""
    return jnp.dtype(dtype).itemsize <= 2 and hidden_size <= machine().loss_kernel_up_to


def _kernel(x_MD):
    if not is_in_kernel(x_MD.dtype, x_MD.shape[1]) or exchange.is_split("vocab"):
        return None
    from jax_impl import loss_kernel  # here, for not every build of jaxlib has Triton

    return loss_kernel


def peak_and_total(logits_MV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """max_v logit_v and sum_v exp(logit_v - max), both (M, 1); where the machine likes it, of one pass over the logits.

    One pass is online softmax (Milakov and Gimelshein, arXiv:1805.02867).
    """
    if not machine().reduces_pairs:
        peak = jnp.max(logits_MV, axis=-1, keepdims=True)
        return peak, jnp.sum(jnp.exp(logits_MV - peak), axis=-1, keepdims=True)

    def merge(one, other):
        peak = jnp.maximum(one[0], other[0])
        return peak, one[1] * jnp.exp(one[0] - peak) + other[1] * jnp.exp(other[0] - peak)

    # The lowest number instead of -inf, whose difference from itself is none.
    lowest = jnp.array(jnp.finfo(logits_MV.dtype).min, logits_MV.dtype)
    pairs, start = (logits_MV, jnp.ones_like(logits_MV)), (lowest, jnp.zeros((), logits_MV.dtype))
    peak, total = jax.lax.reduce(pairs, start, merge, (1,))
    return peak[:, None], total[:, None]


def _statistics(logits_MV, targets_M):
    """Peak, total and the target's logit, all (M, 1) and of the whole vocabulary, and the targets' columns here."""
    peak, total = peak_and_total(logits_MV)
    if not exchange.is_split("vocab"):
        return peak, total, jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1), targets_M
    highest = exchange.greatest(peak, "vocab")
    columns_M = targets_M - exchange.first("vocab", logits_MV.shape[1])
    inside = ((columns_M >= 0) & (columns_M < logits_MV.shape[1]))[:, None]
    hit = jnp.take_along_axis(logits_MV, jnp.where(inside, columns_M[:, None], 0), axis=-1)
    parts = jnp.stack([total * jnp.exp(peak - highest), jnp.where(inside, hit, 0.0)])
    total, hit = exchange.total(parts, "vocab")
    return highest, total, hit, columns_M


def _token_losses_of_parts(logits_MV, targets_M):
    """`token_losses` where the mesh divides the vocabulary: of equal logits the first counts, as in argmax."""
    peak, total, hit, _ = _statistics(logits_MV, targets_M)
    first = exchange.first("vocab", logits_MV.shape[1])
    column_M = jnp.argmax(logits_MV, axis=-1) + first
    has_peak = jnp.max(logits_MV, axis=-1) == peak[:, 0]
    best_M = -exchange.greatest(-jnp.where(has_peak, column_M, jnp.iinfo(jnp.int32).max), "vocab")
    return (jnp.log(total) + peak - hit)[:, 0], best_M == targets_M


def _chunks(x_MD, targets_M, weights_M=None):
    """Equal chunks (C, M/C, ...) of tokens, the last one padded, and the weight 1/M or 0 of each, times its own."""
    M, D = x_MD.shape
    count = math.ceil(M / machine().tokens_at_once)
    rows = math.ceil(M / count)
    padding = count * rows - M
    means_M = jnp.full((M,), 1.0 / M, accumulator(x_MD.dtype)) if weights_M is None else weights_M / M
    weights_M = jnp.pad(means_M, (0, padding))
    x_MD, targets_M = jnp.pad(x_MD, ((0, padding), (0, 0))), jnp.pad(targets_M, (0, padding))
    return x_MD.reshape(count, rows, D), targets_M.reshape(count, rows), weights_M.reshape(count, rows)


def _cross_entropy_forward(x_MD, head_VD, targets_M, weights_M):
    if kernel := _kernel(x_MD):
        loss, (grad_x_MD, grad_head_VD) = kernel.loss_and_gradients(x_MD, head_VD, targets_M, weights_M)
        return loss, (grad_x_MD, gradient_like(head_VD, grad_head_VD))
    wide = accumulator(x_MD.dtype)
    head, summed = head_VD.astype(x_MD.dtype), wide if exchange.is_split("vocab") else x_MD.dtype

    def chunk(carry, operands):
        loss, grad_head_DV = carry
        x, targets, weights = operands
        logits_MV = product("md,vd->mv", x, head, wide)
        peak, total, hit, targets = _statistics(logits_MV, targets)
        exponentials = jnp.exp(logits_MV - peak)
        loss += jnp.sum((jnp.log(total) + peak - hit)[:, 0] * weights)
        is_target = targets[:, None] == jnp.arange(logits_MV.shape[-1])
        grad_logits = ((exponentials / total - is_target) * weights[:, None]).astype(x.dtype)
        grad_x = exchange.total(product("mv,vd->md", grad_logits, head, summed), "vocab").astype(x.dtype)
        # Summed as (D, V): so it is x that has to be transposed and not the logits.
        return (loss, grad_head_DV + product("dm,mv->dv", in_memory(x, (1, 0)), grad_logits, wide)), grad_x

    x_CMD, targets_CM, weights_CM = _chunks(x_MD, targets_M, weights_M)
    start = (jnp.zeros((), wide), jnp.zeros(head_VD.shape[::-1], wide))
    (loss, grad_head_DV), grad_x_CMD = jax.lax.scan(chunk, start, (x_CMD, targets_CM, weights_CM))
    grad_x_MD = grad_x_CMD.reshape(-1, x_MD.shape[1])[: x_MD.shape[0]]
    return loss, (grad_x_MD, gradient_like(head_VD, grad_head_DV.T.astype(head_VD.dtype)))


def _cross_entropy_backward(residuals, cotangent):
    grad_x_MD, grad_head_VD = jax.tree.map(lambda grad: (grad * cotangent).astype(grad.dtype), residuals)
    return grad_x_MD, grad_head_VD, None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
