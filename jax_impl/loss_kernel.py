"""The loss on a GPU: logits are made tile by tile on the chip and never reach memory.

    peak_m = max_v x_m . head_v      total_m = sum_v exp(x_m . head_v - peak_m)
    loss_m = log total_m + peak_m - hit_m, hit_m the target's logit
    grad_mv = weight_m (exp(x_m . head_v - peak_m) / total_m - [v = target_m])

`normalizers` makes peak, total and hit in one pass over V; `grad_logits` makes the logits again and writes their
gradient, rounded to the compute dtype, for one chunk of tokens. The gradients of x and head are then ordinary products
of that array: 8 V D FLOPs a token and three passes over 2 V bytes, in a fixed order. A backward pass without the array
would make the logits once for grad_x and once more for grad_head, 10 V D FLOPs, or add up tiles of one of the two with
atomics, in an order that changes from run to run.

A program owns `TILE_M` tokens and a segment of `SEGMENT` tiles of V, so that a batch makes thousands of programs for a
GPU's hundred multiprocessors, and what the segments of a token found is put together afterwards, as in online softmax
(Milakov and Gimelshein, arXiv:1805.02867). Products, sums and exponentials are in float32, in float64 for float64.

jax 0.11 and 0.12 deprecate Pallas's Triton backend; the jax that drops it has `Machine.loss_kernel_up_to = 0`, or needs
these kernels in Mosaic GPU.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jax_impl.backend import machine
from jax_impl.products import accumulator, in_memory, product

# For an H100: a tile of sums fills half the registers of 8 warps (two warp groups), and 2 TM TV TD FLOPs on
# 2 (TM + TV) TD bytes are 85 a byte, the most that any tile reaches which fits. Three buffers are 144 KiB of shared
# memory. Loads go on while a tile's exponentials are taken.
TILE_M, TILE_V, TILE_D = 128, 256, 64
SEGMENT = 8
COMPILER = triton.CompilerParams(num_warps=8, num_stages=3)


def token_losses(x_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, in float32 or wider, and whether its target had the largest logit, of equals the first."""
    peak_M, total_M, hit_M, before_M = normalizers(x_MD, head_VD.astype(x_MD.dtype), targets_M.astype(jnp.int32))
    return jnp.log(total_M) + (peak_M - hit_M), (hit_M == peak_M) & (before_M < hit_M)


def loss_and_gradients(
    x_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array, weights_M: jax.Array | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Mean loss over the tokens, times their weights, and its gradients of x and head, each in its operand's dtype.

    The gradient of the logits is held for twice `tokens_at_once` tokens, in the compute dtype; where logits are held, a
    token takes three times as much.
    """
    M, D = x_MD.shape
    wide, head, targets_M = accumulator(x_MD.dtype), head_VD.astype(x_MD.dtype), targets_M.astype(jnp.int32)
    # All tokens at once: a chunk of them makes a third of the programs.
    peak_M, total_M, hit_M, _ = normalizers(x_MD, head, targets_M)
    losses_M = jnp.log(total_M) + (peak_M - hit_M)
    loss = jnp.mean(losses_M if weights_M is None else losses_M * weights_M)

    count = pl.cdiv(M, 2 * machine().tokens_at_once)
    rows = pl.cdiv(M, count)

    def chunked(array):
        padding = [(0, count * rows - M)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(count, rows, *array.shape[1:])

    def chunk(grad_head_DV, operands):
        x = operands[0]
        grad_logits_MV = grad_logits(x, head, *operands[1:])
        grad_x = product("mv,vd->md", grad_logits_MV, head, x.dtype)
        # Summed as (D, V): so it is x that has to be transposed and not the logits' gradient.
        return grad_head_DV + product("dm,mv->dv", in_memory(x, (1, 0)), grad_logits_MV, wide), grad_x

    weights_M = jnp.full((M,), 1.0 / M, wide) if weights_M is None else weights_M.astype(wide) / M
    operands = (x_MD, targets_M, peak_M, weights_M / total_M, weights_M)
    start = jnp.zeros(head.shape[::-1], wide)
    grad_head_DV, grad_x_CMD = jax.lax.scan(chunk, start, tuple(map(chunked, operands)))
    return loss, (grad_x_CMD.reshape(-1, D)[:M], grad_head_DV.T.astype(head_VD.dtype))


def normalizers(x_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array) -> tuple[jax.Array, ...]:
    """Per token, in float32 or wider: the largest logit, the sum of all exp(logit - largest), the target's logit, and
    the largest logit of the tokens before the target in the vocabulary, which tells whether an equal one came first.

    x and head are in one dtype, targets in int32. A logit that is not a number makes the sum one.
    """
    wide, M, segments = accumulator(x_MD.dtype), x_MD.shape[0], _segments(head_VD)
    out_shape = [jax.ShapeDtypeStruct((segments, M), wide)] * 4
    peaks, totals, hits, befores = _call(_normalizers_kernel, out_shape, x_MD, head_VD, targets_M)
    peak_M = jnp.max(peaks, axis=0)
    return peak_M, jnp.sum(totals * jnp.exp(peaks - peak_M), axis=0), jnp.sum(hits, axis=0), jnp.max(befores, axis=0)


def grad_logits(
    x_MD: jax.Array,
    head_VD: jax.Array,
    targets_M: jax.Array,
    peak_M: jax.Array,
    scale_M: jax.Array,
    weight_M: jax.Array,
) -> jax.Array:
    """exp(logit - peak) scale - [v = target] weight (M, V) in x's dtype; scale is weight / total."""
    out_shape = jax.ShapeDtypeStruct((x_MD.shape[0], head_VD.shape[0]), x_MD.dtype)
    return _call(_grad_logits_kernel, out_shape, x_MD, head_VD, targets_M, peak_M, scale_M, weight_M)


def _segments(head_VD: jax.Array) -> int:
    return pl.cdiv(head_VD.shape[0], TILE_V * SEGMENT)


def _call(kernel: Callable, out_shape, x_MD: jax.Array, head_VD: jax.Array, *arrays_M: jax.Array):
    """Launch the kernel on (tiles of M, segments of V): neighbours share the head's tiles."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(pl.cdiv(x_MD.shape[0], TILE_M), _segments(head_VD)),
        compiler_params=COMPILER,
        interpret=machine().interprets_kernels,
        name=kernel.__name__.strip("_"),
        cost_estimate=_cost(x_MD, head_VD, *arrays_M, *jax.tree.leaves(out_shape)),
    )(x_MD, head_VD, *arrays_M)


def _cost(x_MD, head_VD, *others) -> pl.CostEstimate:
    """Every logit once: its product and its exponential."""
    (M, D), V = x_MD.shape, head_VD.shape[0]
    moved = sum(array.size * array.dtype.itemsize for array in (x_MD, head_VD, *others))
    return pl.CostEstimate(flops=2 * M * V * D, transcendentals=M * V, bytes_accessed=moved)


def _normalizers_kernel(x_ref, head_ref, targets_ref, peak_ref, total_ref, hit_ref, before_ref):
    wide, m = accumulator(x_ref.dtype), pl.program_id(0) * TILE_M
    V = head_ref.shape[0]
    targets_M = _load(targets_ref, (m,), (TILE_M,))

    def visit(logits_MV, v, carry):
        peak_M, total_M, hit_M, before_M = carry
        if V % TILE_V:
            logits_MV = jnp.where(v + _iota(TILE_V)[None, :] < V, logits_MV, -jnp.inf)
        largest_M = jnp.max(logits_MV, axis=1)
        higher_M = jnp.maximum(peak_M, largest_M)
        total_M *= _exp(peak_M - higher_M)
        total_M += jnp.sum(_exp(logits_MV - higher_M[:, None]), axis=1)

        def seek(hit_M, before_M):
            columns_MV, goal_MV = v + _iota(TILE_V)[None, :], targets_M[:, None]
            hit_M += jnp.sum(jnp.where(columns_MV == goal_MV, logits_MV, 0.0), axis=1)
            among_M = jnp.max(jnp.where(columns_MV < goal_MV, logits_MV, -jnp.inf), axis=1)
            return hit_M, jnp.maximum(before_M, among_M)

        def pass_by(hit_M, before_M):
            return hit_M, jnp.where(targets_M < v, before_M, jnp.maximum(before_M, largest_M))

        hit_M, before_M = jax.lax.cond(_holds(targets_M, v), seek, pass_by, hit_M, before_M)
        return higher_M, total_M, hit_M, before_M

    # The lowest number instead of -inf, whose difference from itself is none.
    lowest, zero = jnp.full((TILE_M,), jnp.finfo(wide).min, wide), jnp.zeros((TILE_M,), wide)
    found = _for_each_tile(x_ref, head_ref, m, visit, (lowest, zero, zero, jnp.full((TILE_M,), -jnp.inf, wide)))
    for ref, value_M in zip((peak_ref, total_ref, hit_ref, before_ref), found, strict=True):
        _store(ref, (pl.program_id(1), m), value_M[None, :])


def _grad_logits_kernel(x_ref, head_ref, targets_ref, peak_ref, scale_ref, weight_ref, grad_ref):
    m = pl.program_id(0) * TILE_M
    refs = (targets_ref, peak_ref, scale_ref, weight_ref)
    targets_M, peak_M, scale_M, weight_M = (_load(ref, (m,), (TILE_M,)) for ref in refs)

    def visit(logits_MV, v, carry):
        grad_MV = _exp(logits_MV - peak_M[:, None]) * scale_M[:, None]

        def less_weight(grad_MV):
            is_target = v + _iota(TILE_V)[None, :] == targets_M[:, None]
            return grad_MV - jnp.where(is_target, weight_M[:, None], 0.0)

        grad_MV = jax.lax.cond(_holds(targets_M, v), less_weight, lambda grad_MV: grad_MV, grad_MV)
        _store(grad_ref, (m, v), grad_MV.astype(grad_ref.dtype))
        return carry

    _for_each_tile(x_ref, head_ref, m, visit, ())


def _for_each_tile(x_ref, head_ref, m, visit: Callable, carry):
    """carry = visit(logits_MV, v, carry) for every tile of this program's segment, v its first column.

    One loop over tiles and over D within them, or the buffers would run empty between two tiles. Every tile has a
    column within V; logits of columns beyond it are 0.
    """
    wide, D, V = accumulator(x_ref.dtype), x_ref.shape[1], head_ref.shape[0]
    first, steps = pl.program_id(1) * SEGMENT, pl.cdiv(D, TILE_D)
    tiles = jnp.minimum(SEGMENT, pl.cdiv(V, TILE_V) - first)

    def step(i, state):
        logits_MV, carry = state
        v, d = (first + jax.lax.div(i, jnp.int32(steps))) * TILE_V, jax.lax.rem(i, jnp.int32(steps)) * TILE_D
        x, head = _load(x_ref, (m, d), (TILE_M, TILE_D)), _load(head_ref, (v, d), (TILE_V, TILE_D))
        # float32 operands are multiplied as such, whatever the caller's default.
        logits_MV += jax.lax.dot_general(
            x, head, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide
        )

        def done(logits_MV, carry):
            return jnp.zeros_like(logits_MV), visit(logits_MV, v, carry)

        return jax.lax.cond(d + TILE_D >= D, done, lambda *state: state, logits_MV, carry)

    start = (jnp.zeros((TILE_M, TILE_V), wide), carry)
    return jax.lax.fori_loop(jnp.int32(0), tiles * steps, step, start)[1]


def _holds(targets_M, v):
    """Whether any of the targets is in the tile that begins at v; many tiles hold none."""
    return jnp.max(((targets_M >= v) & (targets_M < v + TILE_V)).astype(jnp.int32)) > 0


def _exp(x):
    """exp for x <= 0, by the power of two that a GPU has; jnp.exp costs it three instructions more, of eight a logit.

    Rounding x log2(e) is a relative error of u |x|, which e^x outweighs.
    """
    return jnp.exp2(x * math.log2(math.e))


def _iota(size: int) -> jax.Array:
    return jax.lax.iota(jnp.int32, size)


def _inside(starts, sizes, shape):
    """Mask of what of a tile is within an array of this shape; None where all of every tile is."""
    mask = None
    for axis, (start, size, limit) in enumerate(zip(starts, sizes, shape, strict=True)):
        if limit % size:
            within = jnp.expand_dims(start + _iota(size) < limit, [i for i in range(len(shape)) if i != axis])
            mask = within if mask is None else mask & within
    return mask


def _load(ref, starts, sizes):
    """The tile, 0 outside of the array."""
    mask = _inside(starts, sizes, ref.shape)
    tile = ref.at[tuple(map(pl.ds, starts, sizes))]
    return triton.load(tile, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def _store(ref, starts, value) -> None:
    tile = ref.at[tuple(map(pl.ds, starts, value.shape))]
    triton.store(tile, value, mask=_inside(starts, value.shape, ref.shape))
