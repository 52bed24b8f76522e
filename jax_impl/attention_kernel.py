"""Attention with dropout as three GPU kernels that never write a probability; the letters are those of `model.py`.

`flash_attention` is `attention` of `attention.py`: the same masks, the same dtypes, probabilities rounded to the
compute dtype before the second product. The algorithm is FlashAttention-2 (Dao, arXiv:2307.08691): forward keeps the
output and the logarithm of each query's sum; backward computes the probabilities again, once for the queries' gradient
and once for those of keys and values. Each program sums what it writes, so that no result depends on scheduling.

The dropout mask of a row's head n is that of `recipe.dropout` under the key `fold_in(key, row * N + n)`, queries by
keys: one Threefry block with counter words (t, s // 4) decides for four neighbouring keys. So that a thread uses all
four without asking another one, a tile holds its keys in the order of `_positions`, and the four are a quarter of the
tile apart; softmax and sums over keys do not mind. Up to a sequence length (`_keeps_masks`) forward also writes the
decisions, four to a byte, and backward's two kernels read them instead of making them again. The kernels are written in
Pallas for Triton, which jax 0.12 deprecates and still compiles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jax_impl import exchange
from jax_impl.products import accumulator
from recipe.config import UserError
from recipe.dropout import RESOLUTION, kept_share, threshold

# Threefry-2x32 as in `torch_ref/random.py`.
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

# Below every score, and finite: the difference of two infinities is not a number.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys whose scores a program holds at once, powers of two from 16 on, and how Triton compiles it."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    query_grad: Tile
    key_grads: Tile


def tiles_of(head_dim: int) -> Tiles:
    """Tiles whose kernels, compiled for an H100, spill no register; head_dim counts as the next power of two.

    They need 58 KiB of shared memory up to head_dim 64, 179 KiB up to 128 and 169 KiB up to 256, of 227 there are.
    """
    if head_dim <= 64:
        return Tiles(Tile(64, 64), Tile(64, 64), Tile(64, 64))
    if head_dim <= 128:
        return Tiles(Tile(64, 64), Tile(64, 64), Tile(128, 64, warps=8))
    if head_dim <= 256:
        return Tiles(Tile(64, 32), Tile(64, 32), Tile(128, 32, warps=8))
    raise UserError(f"head_dim={head_dim} exceeds 256, all that fits the kernel; choose precision.attention=explicit.")


class _Settings(NamedTuple):
    """What is known when a kernel is compiled."""

    window: int | None
    rate: float
    tiles: Tiles
    interpret: bool
    keeps_masks: bool
    """Whether forward writes its decisions for backward: bit h of byte (t, c) is set if t keeps key 4 c + h."""

    @property
    def kept(self) -> float:
        """The share of probabilities that are kept."""
        return kept_share(self.rate)


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int | None,
    rate: float = 0.0,
    key: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
    keeps_masks: bool | None = None,
) -> jax.Array:
    """Causal grouped-query attention (B, T, N, H), S = T, with dropout of probabilities at `rate` keyed by `key`.

    Needs an NVIDIA GPU and a 16-bit dtype; `interpret` runs the kernels as JAX operations in any dtype, for tests.
    `keeps_masks` says whether backward finds the masks in memory; by default `_keeps_masks` decides.
    """
    words = jnp.zeros(2, jnp.uint32) if key is None else jax.random.key_data(key)
    # On a mesh the rows and heads here are a part of all.
    first, skipped = exchange.head_offsets(q_BTNH.shape[0], q_BTNH.shape[2])
    words = jnp.concatenate([words, jnp.stack([jnp.uint32(first), jnp.uint32(skipped)])])
    tiles, rate = tiles or tiles_of(q_BTNH.shape[-1]), 0.0 if key is None else rate
    if keeps_masks is None:
        keeps_masks = _keeps_masks(tiles, q_BTNH, k_BSKH)
    settings = _Settings(window, rate, tiles, interpret, keeps_masks and rate > 0.0)
    if threshold(settings.rate) >= RESOLUTION:
        raise ValueError(f"rate={rate} drops every probability; choose one below 1 - 2^-17.")
    return _attend(settings, words, q_BTNH, k_BSKH, v_BSKH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: _Settings, key: jax.Array, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    return _attend_forward(settings._replace(keeps_masks=False), key, q_BTNH, k_BSKH, v_BSKH)[0]


def _attend_forward(settings, key, q_BTNH, k_BSKH, v_BSKH):
    """The output, and what backward wants: instead of the key the masks, if they are kept."""
    B, T, N, H = q_BTNH.shape
    G, tile = N // k_BSKH.shape[2], settings.tiles.forward
    of_query, of_key, of_sum = _blocks(T, G, H)
    masks = [_masks(settings.tiles, q_BTNH)] * settings.keeps_masks
    out_BTNH, log_sum_BNT, *kept = pl.pallas_call(
        functools.partial(attention_forward, settings=settings),
        grid=(_tiles(T, tile.queries), N, B),
        in_specs=[pl.BlockSpec((4,), lambda i, n, b: (0,)), of_query, of_key, of_key],
        out_specs=[of_query, of_sum, *[_of_masks(x) for x in masks]],
        out_shape=[
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            jax.ShapeDtypeStruct((B, N, T), accumulator(q_BTNH.dtype)),
            *masks,
        ],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=settings.interpret,
        name="attention_forward",
        cost_estimate=_cost(2, settings, q_BTNH, k_BSKH, v_BSKH, q_BTNH, *masks),
    )(key, q_BTNH, k_BSKH, v_BSKH)
    return out_BTNH, (kept[0] if kept else key, q_BTNH, k_BSKH, v_BSKH, out_BTNH, log_sum_BNT)


def _attend_backward(settings, residuals, grad_BTNH):
    """The gradients; the key has none."""
    random, q_BTNH, k_BSKH, v_BSKH, out_BTNH, log_sum_BNT = residuals
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    G, tile, wide = N // K, settings.tiles.query_grad, log_sum_BNT.dtype
    # sum_s p_s dp_s = out . dout, which a probability's gradient is centred by.
    centre_BNT = jnp.sum(out_BTNH.astype(wide) * grad_BTNH.astype(wide), axis=-1).swapaxes(1, 2)
    of_query, of_key, of_sum = _blocks(T, G, H)
    masks = [random] * settings.keeps_masks
    of_random = _of_masks(random) if masks else pl.BlockSpec((4,), lambda i, n, b: (0,))
    q_grad_BTNH = pl.pallas_call(
        functools.partial(attention_query_grad, settings=settings),
        grid=(_tiles(T, tile.queries), N, B),
        in_specs=[of_random, of_query, of_key, of_key, of_query, of_sum, of_sum],
        out_specs=of_query,
        out_shape=jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=settings.interpret,
        name="attention_query_grad",
        cost_estimate=_cost(3, settings, q_BTNH, k_BSKH, v_BSKH, grad_BTNH, q_BTNH, *masks),
    )(random, q_BTNH, k_BSKH, v_BSKH, grad_BTNH, log_sum_BNT, centre_BNT)
    # A program per key head has all its query heads.
    tile = settings.tiles.key_grads
    of_queries = pl.BlockSpec((None, T, None, G, H), lambda j, k, b: (b, 0, k, 0, 0))
    of_key = pl.BlockSpec((None, T, None, H), lambda j, k, b: (b, 0, k, 0))
    of_sums = pl.BlockSpec((None, None, G, T), lambda j, k, b: (b, k, 0, 0))
    q_BTKGH, grad_BTKGH = (x.reshape(B, T, K, G, H) for x in (q_BTNH, grad_BTNH))
    log_sum_BKGT, centre_BKGT = (x.reshape(B, K, G, T) for x in (log_sum_BNT, centre_BNT))
    if masks:
        random = random.reshape(B, K, G, *random.shape[2:])
        of_random = _of_masks(random)
    k_grad_BSKH, v_grad_BSKH = pl.pallas_call(
        functools.partial(attention_key_grads, settings=settings),
        grid=(_tiles(T, tile.keys), K, B),
        in_specs=[of_random, of_queries, of_key, of_key, of_queries, of_sums, of_sums],
        out_specs=[of_key, of_key],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BSKH, v_BSKH)],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=settings.interpret,
        name="attention_key_grads",
        cost_estimate=_cost(4, settings, q_BTNH, k_BSKH, v_BSKH, grad_BTNH, k_BSKH, v_BSKH, *masks),
    )(random, q_BTKGH, k_BSKH, v_BSKH, grad_BTKGH, log_sum_BKGT, centre_BKGT)
    return None, q_grad_BTNH, k_grad_BSKH, v_grad_BSKH


_attend.defvjp(_attend_forward, _attend_backward)


def _keeps_masks(tiles: Tiles, q_BTNH: jax.Array, k_BSKH: jax.Array) -> bool:
    """Whether the masks are no larger than q, k, v and out together, so that memory stays linear in T.

    Not beyond head_dim 128, where `key_grads` would spill registers, nor beyond 2 GiB, as Pallas counts 4 GiB of bytes
    with signed 32-bit offsets.
    """
    linear = 2 * (q_BTNH.size + k_BSKH.size) * q_BTNH.dtype.itemsize
    return q_BTNH.shape[-1] <= 128 and _masks(tiles, q_BTNH).size <= min(linear, 2**31 - 1)


def _masks(tiles: Tiles, q_BTNH: jax.Array) -> jax.ShapeDtypeStruct:
    """Every decision, four to a byte, (B, N, T, S / 4); T and S reach to the end of the last tile."""
    B, T, N, _ = q_BTNH.shape
    queries, keys = max(tile.queries for tile in tiles), max(tile.keys for tile in tiles)
    return jax.ShapeDtypeStruct((B, N, _tiles(T, queries) * queries, _tiles(T, keys) * keys // 4), jnp.uint8)


def _of_masks(masks: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """What a program (tile, head, row) sees of (B, N, T, S / 4) or (B, K, G, T, S / 4): all of one head."""
    own = masks.shape[2:]
    return pl.BlockSpec((None, None, *own), lambda i, n, b: (b, n, *(0 for _ in own)))


def _cost(
    products: int, settings: _Settings, q_BTNH: jax.Array, *others: jax.Array | jax.ShapeDtypeStruct
) -> pl.CostEstimate:
    """So many products of visible pairs, each pair's exponential, every array once."""
    B, T, N, H = q_BTNH.shape
    visible = B * N * sum(min(t + 1, settings.window or T) for t in range(T))
    moved = sum(array.size * array.dtype.itemsize for array in (q_BTNH, *others))
    return pl.CostEstimate(flops=2 * products * visible * H, transcendentals=visible, bytes_accessed=moved)


def _blocks(T: int, G: int, H: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """What a program (query tile, query head, row) sees: all of one head of q, of k or v, and of the sums."""
    of_query = pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n, 0))
    of_key = pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n // G, 0))
    return of_query, of_key, pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))


def attention_forward(
    key_ref, q_ref, k_ref, v_ref, out_ref, log_sum_ref, masks_ref=None, *, settings: _Settings
) -> None:
    """The output of one tile of queries, the base-2 logarithms of their sums, and their masks if they are kept."""
    T, H = q_ref.shape
    tile, wide = settings.tiles.forward, accumulator(q_ref.dtype)
    i, n, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    t_Q, h_H = i * tile.queries + _iota(tile.queries), _iota(_padded(H))
    head_key = _head_key(key_ref, b * pl.num_programs(1) + n, b)
    q_QH = _load(q_ref, t_Q, h_H)

    def step(j, carry):
        out_QH, highest_Q, sum_Q = carry
        s_S = _positions(j, tile)
        k_SH, v_SH = _load(k_ref, s_S, h_H), _load(v_ref, s_S, h_H)
        scores_QS = _masked(_dot(q_QH, k_SH, 1, 1), i, j, tile, settings.window, -jnp.inf)
        new_Q = jnp.maximum(highest_Q, jnp.max(scores_QS, axis=1) * _log2_scale(H))
        probs_QS = jnp.exp2(scores_QS * _log2_scale(H) - new_Q[:, None])
        shrink_Q = jnp.exp2(highest_Q - new_Q)
        sum_Q = sum_Q * shrink_Q + jnp.sum(probs_QS, axis=1)
        if settings.rate:
            keep_QS, masks_QC = _keep(head_key, t_Q, j, tile, settings)
            probs_QS = jnp.where(keep_QS, probs_QS, 0.0)
            if settings.keeps_masks:
                triton.store(masks_ref.at[_byte_places(t_Q, j, tile)], masks_QC)
        out_QH = out_QH * shrink_Q[:, None] + _dot(probs_QS.astype(v_SH.dtype), v_SH, 1, 0)
        return out_QH, new_Q, sum_Q

    zero_Q = jnp.zeros(tile.queries, wide)
    carry = jnp.zeros((tile.queries, _padded(H)), wide), zero_Q + _LOWEST, zero_Q
    first, last = _key_tiles(i, tile, T, settings.window)
    out_QH, highest_Q, sum_Q = jax.lax.fori_loop(first, last, step, carry)
    _store(out_ref, t_Q, h_H, out_QH / (sum_Q * settings.kept)[:, None])
    triton.store(log_sum_ref.at[t_Q], highest_Q + jnp.log2(sum_Q), mask=t_Q < T)


def attention_query_grad(
    random_ref, q_ref, k_ref, v_ref, grad_ref, log_sum_ref, centre_ref, q_grad_ref, *, settings: _Settings
) -> None:
    """The gradient of one tile of queries: sum_s p_s (dp_s - centre) k_s / sqrt(H), dp_s = dout . v_s / kept or 0."""
    T, H = q_ref.shape
    tile, wide = settings.tiles.query_grad, accumulator(q_ref.dtype)
    i, n, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    t_Q, h_H = i * tile.queries + _iota(tile.queries), _iota(_padded(H))
    decide = _decisions(random_ref, b * pl.num_programs(1) + n, b, tile, settings)
    q_QH, grad_QH = _load(q_ref, t_Q, h_H), _load(grad_ref, t_Q, h_H)
    log_sum_Q = triton.load(log_sum_ref.at[t_Q], mask=t_Q < T, other=0.0)
    # Everything times `kept`, which the last line takes out.
    centre_Q = triton.load(centre_ref.at[t_Q], mask=t_Q < T, other=0.0) * settings.kept

    def step(j, q_grad_QH):
        s_S = _positions(j, tile)
        k_SH, v_SH = _load(k_ref, s_S, h_H), _load(v_ref, s_S, h_H)
        probs_QS = jnp.exp2(_dot(q_QH, k_SH, 1, 1) * _log2_scale(H) - log_sum_Q[:, None])
        probs_QS = _masked(probs_QS, i, j, tile, settings.window, 0.0)
        grads_QS = _dot(grad_QH, v_SH, 1, 1)
        if settings.rate:
            grads_QS = jnp.where(decide(t_Q, j), grads_QS, 0.0)
        grads_QS = probs_QS * (grads_QS - centre_Q[:, None])
        return q_grad_QH + _dot(grads_QS.astype(k_SH.dtype), k_SH, 1, 0)

    zero_QH = jnp.zeros((tile.queries, _padded(H)), wide)
    first, last = _key_tiles(i, tile, T, settings.window)
    q_grad_QH = jax.lax.fori_loop(first, last, step, zero_QH)
    _store(q_grad_ref, t_Q, h_H, q_grad_QH * (1.0 / (math.sqrt(H) * settings.kept)))


def attention_key_grads(
    random_ref, q_ref, k_ref, v_ref, grad_ref, log_sum_ref, centre_ref, k_grad_ref, v_grad_ref, *, settings: _Settings
) -> None:
    """The gradients of one tile of keys and values, summed over the query heads that share them."""
    T, G, H = q_ref.shape
    tile, wide = settings.tiles.key_grads, accumulator(q_ref.dtype)
    j, k, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    s_S, h_H = _positions(j, tile), _iota(_padded(H))
    k_SH, v_SH = _load(k_ref, s_S, h_H), _load(v_ref, s_S, h_H)
    first, last = _query_tiles(j, tile, T, settings.window)

    def head(g, carry):
        decide = _decisions(random_ref, (b * pl.num_programs(1) + k) * G + g, b, tile, settings, g)

        def step(i, carry):
            k_grad_SH, v_grad_SH = carry
            t_Q = i * tile.queries + _iota(tile.queries)
            q_QH, grad_QH = _load(q_ref, t_Q, h_H, g), _load(grad_ref, t_Q, h_H, g)
            log_sum_Q = triton.load(log_sum_ref.at[g, t_Q], mask=t_Q < T, other=0.0)
            centre_Q = triton.load(centre_ref.at[g, t_Q], mask=t_Q < T, other=0.0) * settings.kept
            probs_QS = jnp.exp2(_dot(q_QH, k_SH, 1, 1) * _log2_scale(H) - log_sum_Q[:, None])
            probs_QS = _masked(probs_QS, i, j, tile, settings.window, 0.0)
            grads_QS, kept_QS = _dot(grad_QH, v_SH, 1, 1), probs_QS
            if settings.rate:
                keep_QS = decide(t_Q, j)
                grads_QS, kept_QS = jnp.where(keep_QS, grads_QS, 0.0), jnp.where(keep_QS, probs_QS, 0.0)
            grads_QS = probs_QS * (grads_QS - centre_Q[:, None])
            v_grad_SH += _dot(kept_QS.astype(grad_QH.dtype), grad_QH, 0, 0)
            k_grad_SH += _dot(grads_QS.astype(q_QH.dtype), q_QH, 0, 0)
            return k_grad_SH, v_grad_SH

        return jax.lax.fori_loop(first, last, step, carry)

    zero_SH = jnp.zeros((tile.keys, _padded(H)), wide)
    k_grad_SH, v_grad_SH = jax.lax.fori_loop(0, G, head, (zero_SH, zero_SH))
    _store(k_grad_ref, s_S, h_H, k_grad_SH * (1.0 / (math.sqrt(H) * settings.kept)))
    _store(v_grad_ref, s_S, h_H, v_grad_SH * (1.0 / settings.kept))


def _tiles(count, size: int):
    """How many tiles of this size hold so many."""
    return (count + size - 1) // size


def _key_tiles(i, tile: Tile, T: int, window: int | None):
    """First and last + 1 of the tiles of keys that query tile i sees."""
    start, stop = i * tile.queries, jnp.minimum((i + 1) * tile.queries, T)
    first = 0 if window is None else jnp.maximum(start - window + 1, 0) // tile.keys
    return first, _tiles(stop, tile.keys)


def _query_tiles(j, tile: Tile, T: int, window: int | None):
    """First and last + 1 of the tiles of queries that see key tile j."""
    start, stop = j * tile.keys, (j + 1) * tile.keys
    last = T if window is None else jnp.minimum(stop + window - 1, T)
    return start // tile.queries, _tiles(last, tile.queries)


def _positions(j, tile: Tile) -> jax.Array:
    """Positions of the keys of tile j in the tile's order: every fourth, then the next ones of these, and so on."""
    c, quarter = _iota(tile.keys), tile.keys // 4
    return j * tile.keys + c % quarter * 4 + c // quarter


def _masked(x_QS: jax.Array, i, j, tile: Tile, window: int | None, hidden: float) -> jax.Array:
    """x with `hidden` where query tile i does not see key tile j; nothing is computed where it sees all of it."""
    t, s = i * tile.queries, j * tile.keys
    partly = s + tile.keys - 1 > t
    if window is not None:
        partly |= s <= t + tile.queries - 1 - window

    def mask(x_QS):
        t_QS, s_QS = (t + _iota(tile.queries))[:, None], _positions(j, tile)[None, :]
        visible_QS = s_QS <= t_QS if window is None else (s_QS <= t_QS) & (s_QS > t_QS - window)
        return jnp.where(visible_QS, x_QS, hidden)

    return jax.lax.cond(partly, mask, lambda x_QS: x_QS, x_QS)


def _decisions(random_ref, number, b, tile: Tile, settings: _Settings, *head) -> Callable:
    """Function (t_Q, j) -> which probabilities of the head of this number are kept, (Q, S): by the masks or the key."""
    if settings.keeps_masks:
        return lambda t_Q, j: _unpacked(triton.load(random_ref.at[*head, *_byte_places(t_Q, j, tile)]))
    head_key = _head_key(random_ref, number, b)
    return lambda t_Q, j: _keep(head_key, t_Q, j, tile, settings)[0]


def _byte_places(t_Q: jax.Array, j, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """The indices of a tile's bytes; those of a tile that forward skips hold anything, and its probabilities are 0."""
    return t_Q[:, None], (j * (tile.keys // 4) + _iota(tile.keys // 4))[None, :]


def _unpacked(masks_QC: jax.Array) -> jax.Array:
    """Which probabilities of a tile are kept, (Q, S), by its bytes."""
    words_QC = masks_QC.astype(jnp.uint32)
    pairs = jnp.stack([words_QC, words_QC >> jnp.uint32(2)], axis=-1)
    bits = jnp.stack([pairs, pairs >> jnp.uint32(1)], axis=-1)
    return _in_order(bits) & jnp.uint32(1) != 0


def _in_order(quads: jax.Array) -> jax.Array:
    """What (Q, S / 4, 2, 2) has of each four neighbouring keys, in the tile's order."""
    return quads.transpose(0, 2, 3, 1).reshape(quads.shape[0], -1)


def _keep(head_key, t_Q: jax.Array, j, tile: Tile, settings: _Settings) -> tuple[jax.Array, jax.Array]:
    """Which probabilities of a tile are kept, (Q, S), by the definition above, and their bytes, (Q, S / 4)."""
    quarter, bound, low_half = tile.keys // 4, threshold(settings.rate), jnp.uint32(RESOLUTION - 1)
    counter_S = j * quarter + _iota(quarter)
    low, high = _threefry_2x32(head_key, t_Q[:, None].astype(jnp.uint32), counter_S[None, :].astype(jnp.uint32))
    # For a byte, a half that reaches the threshold carries into bit 16: with comparisons, or after `stack`, ptxas took
    # more than 128 registers for head_dim 48, and one block fewer would fit.
    halves = (low & low_half, low >> jnp.uint32(16), high & low_half, high >> jnp.uint32(16))
    bits = [(half + jnp.uint32(RESOLUTION - bound)) >> jnp.uint32(16) << jnp.uint32(h) for h, half in enumerate(halves)]
    masks_QC = (bits[0] | bits[1] | bits[2] | bits[3]).astype(jnp.uint8)
    # For a tile, a half is compared as the upper half of a word: what is below it does not reach the threshold's lowest
    # bit. Both words go through one `stack`, or Triton moves each of them to another thread.
    words = jnp.stack([low, high], axis=-1)
    quads = jnp.stack([words << jnp.uint32(16), words], axis=-1)
    return _in_order(quads) >= jnp.uint32(bound << 16), masks_QC


def _head_key(key_ref, number, b) -> tuple[jax.Array, jax.Array]:
    """`fold_in(key, its number in the whole)`, the key of the head of row b that has this number here."""
    whole = number.astype(jnp.uint32) + key_ref[2] + jnp.uint32(b) * key_ref[3]
    return _threefry_2x32((key_ref[0], key_ref[1]), jnp.uint32(0), whole)


def _threefry_2x32(key, x0, x1):
    """Twenty rounds of Threefry-2x32 on uint32 counter words; the twin is in `torch_ref/random.py`."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))
            x1 = x1 ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + (schedule[(group + 2) % 3] + jnp.uint32(group + 1))
    return x0, x1


def _log2_scale(H: int) -> float:
    """What turns a product of q and k into a score whose powers are of 2."""
    return math.log2(math.e) / math.sqrt(H)


def _padded(H: int) -> int:
    """H as Triton wants it: a power of two, and the least that its products take."""
    return max(16, pl.next_power_of_2(H))


def _iota(size: int) -> jax.Array:
    return jax.lax.iota(jnp.int32, size)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The product of two matrices over these axes, accumulated in float32 or wider."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=accumulator(x.dtype))


def _load(ref, rows, h_H, head=None) -> jax.Array:
    """Rows of one head, (rows, padded H); zero outside."""
    T, H = ref.shape[0], ref.shape[-1]
    at = (rows[:, None], h_H[None, :]) if head is None else (rows[:, None], head, h_H[None, :])
    return triton.load(ref.at[at], mask=(rows < T)[:, None] & (h_H < H)[None, :], other=0.0)


def _store(ref, rows, h_H, value) -> None:
    """Write rows of one head in the array's dtype."""
    T, H = ref.shape
    mask = (rows < T)[:, None] & (h_H < H)[None, :]
    triton.store(ref.at[rows[:, None], h_H[None, :]], value.astype(ref.dtype), mask=mask)
