"""Causal grouped-query attention. The twin is `torch_ref/attention.py`; the letters are those of `model.py`."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl import exchange, random
from jax_impl.backend import HOPPER, machine
from jax_impl.products import accumulator, product
from recipe.config import PrecisionConfig

# Queries per block of explicit attention: a block skips the keys none of its queries sees.
QUERY_BLOCK = 128


class Places(NamedTuple):
    """Where the tokens of a batch stand."""

    cos_TR: jax.Array
    sin_TR: jax.Array
    """The angles of RoPE; the tables may have rows, (B, T, R)."""
    documents_BT: jax.Array | None
    """Number of each token's document within its row, int32, of which tokens see no other; None if rows are whole."""

    @property
    def packed(self) -> bool:
        """Whether rows have documents of their own."""
        return self.documents_BT is not None


def fused_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    documents_BT: jax.Array | None = None,
    *,
    window: int | None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """`attention` without its scores in memory, by cuDNN, or with dropout by our kernel; needs a GPU and 16 bits.

    Documents are a mask (B, 1, T, S), which cuDNN is given as 16 bits an element, and its gradient takes as much.
    ValueError for documents with dropout, of which our kernel knows nothing (`why_not_fused`).
    """
    if key is not None and rate > 0.0:
        if documents_BT is not None:
            raise ValueError(f"the kernel with dropout knows no documents, and rate is {rate}; call attention instead.")
        from jax_impl.attention_kernel import flash_attention  # here, for not every build of jaxlib has Triton

        return flash_attention(q_BTNH, k_BSKH, v_BSKH, window=window, rate=rate, key=key)
    local_window = None if window is None else (window - 1, 0)
    mask_B1TS = None if documents_BT is None else same_document(documents_BT, documents_BT)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=True, local_window_size=local_window, implementation="cudnn"
    )


def why_not_fused(precision: PrecisionConfig, dropout: float, packed: bool = False) -> str:
    """Why `fused_attention` cannot run at this dropout rate, of rows with documents if `packed`; empty if it can."""
    kernel = "the kernel with dropout" if dropout else "cuDNN's kernel"
    if not (machine().attention_kernel if dropout else machine().cudnn):
        which = f" of compute capability {HOPPER}" if dropout else ""
        return f"{kernel} needs an NVIDIA GPU{which}, this is a {machine().platform}"
    if jnp.dtype(precision.compute).itemsize != 2:
        return f"{kernel} needs precision.compute=bfloat16, not {precision.compute}"
    if dropout and packed:
        return f"{kernel} knows no documents within a row, and dropout is {dropout}"
    return ""


def attention_in_use(precision: PrecisionConfig, dropout: float, packed: bool = False) -> str:
    """Which attention runs, explicit or fused, at this dropout rate, of rows with documents if `packed`."""
    return "fused" if precision.attention == "fused" and not why_not_fused(precision, dropout, packed) else "explicit"


def visible(t: np.ndarray | jax.Array, s: np.ndarray, window: int | None) -> np.ndarray | jax.Array:
    """Whether a query at position t sees the key at position s: s <= t, and s > t - window if there is a window."""
    return (s <= t) if window is None else (s <= t) & (s > t - window)


def same_document(of_queries_BT: jax.Array, of_keys_BS: jax.Array) -> jax.Array:
    """Whether query and key are of one document, (B, 1, T, S)."""
    return of_queries_BT[:, None, :, None] == of_keys_BS[:, None, None, :]


def query_blocks(T: int, window: int | None) -> list[tuple[int, int, int]]:
    """(start, stop, first) of each block: queries start ... stop - 1 see no key before `first`."""
    starts = range(0, T, QUERY_BLOCK)
    firsts = [0 if window is None else max(0, start - window + 1) for start in starts]
    return [(start, min(start + QUERY_BLOCK, T), first) for start, first in zip(starts, firsts, strict=True)]


def attend_block(
    q_XGTH: jax.Array,
    k_XSH: jax.Array,
    v_XSH: jax.Array,
    start: int,
    first: int,
    *,
    window: int | None,
    same_X1TS: jax.Array | None = None,
    decided: jax.Array | None,
    rate: float,
) -> jax.Array:
    """Attention (X, G, T, H) of queries at positions start ... to keys at positions first ...; scores are (X, Q, S)."""
    X, G, T, H = q_XGTH.shape
    S, dtype = k_XSH.shape[1], q_XGTH.dtype
    t, s = start + np.arange(T)[:, None], first + np.arange(S)[None, :]
    q_XQH = q_XGTH.reshape(X, G * T, H)
    scores_XQS = product("xqh,xsh->xqs", q_XQH, k_XSH, accumulator(dtype)) / math.sqrt(H)
    seen = visible(t, s, window) if same_X1TS is None else visible(t, s, window) & same_X1TS
    scores_XGTS = jnp.where(seen, scores_XQS.reshape(X, G, T, S), -jnp.inf)
    probs_XGTS = jax.nn.softmax(scores_XGTS, axis=-1).astype(dtype)
    if decided is not None:
        probs_XGTS = random.drop(probs_XGTS, decided, rate, first)
    return product("xqs,xsh->xqh", probs_XGTS.reshape(X, G * T, S), v_XSH, dtype).reshape(X, G, T, H)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    documents_BT: jax.Array | None = None,
    *,
    window: int | None,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention, S = T, in blocks of queries; query t sees keys s <= t, and s > t - window if set.

    With `documents_BT` it sees those of its own document alone. `key` and `rate` drop probabilities; each row and query
    head has a mask of its own, queries by keys.
    Scores are computed again in the backward pass, and on a CPU a few (row, head) pairs at a time, so that they never
    leave the caches.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    G, blocks = N // K, query_blocks(T, window)
    # Laid out once, by key head: XLA would transpose b, t, k, g in every block and product.
    q_XGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G, T, H)
    k_XSH, v_XSH = (x_BSKH.swapaxes(1, 2).reshape(B * K, T, H) for x_BSKH in (k_BSKH, v_BSKH))
    documents_XT = None if documents_BT is None else jnp.repeat(documents_BT, K, axis=0)
    decided: list[jax.Array] = []
    if key is not None and rate > 0.0:
        head_keys = jax.vmap(random.fold_in, (None, 0))(key, exchange.head_numbers(B, N))
        for start, stop, first in blocks:
            of_head = functools.partial(
                random.decisions, rows=range(start, stop), columns=range(first, stop), rate=rate
            )
            decided.append(jax.vmap(of_head)(head_keys).reshape(B * K, G, stop - start, -1))

    @jax.checkpoint
    def attend(operands):
        q_XGTH, k_XSH, v_XSH, documents_XT, decided = operands
        # In pieces, whose gradients are pieces: that of a slice has zeros around it and would be added as a whole.
        edges = np.arange(QUERY_BLOCK, T, QUERY_BLOCK)
        q_pieces, k_pieces, v_pieces = (
            jnp.split(q_XGTH, edges, 2),
            jnp.split(k_XSH, edges, 1),
            jnp.split(v_XSH, edges, 1),
        )
        outputs = []
        for block, (start, stop, first) in enumerate(blocks):
            whole, part = divmod(first, QUERY_BLOCK)
            pieces = (k_pieces[whole : block + 1], v_pieces[whole : block + 1])
            k_seen_XSH, v_seen_XSH = (jnp.concatenate(x, axis=1)[:, part:] for x in pieces)
            same_X1TS, of_block = None, decided[block] if decided else None
            if documents_XT is not None:
                same_X1TS = same_document(documents_XT[:, start:stop], documents_XT[:, first:stop])
            seen = (q_pieces[block], k_seen_XSH, v_seen_XSH, start, first)
            out_XGTH = attend_block(*seen, window=window, same_X1TS=same_X1TS, decided=of_block, rate=rate)
            outputs.append(out_XGTH)
        return jnp.concatenate(outputs, axis=2)

    operands = q_XGTH, k_XSH, v_XSH, documents_XT, decided
    count = chunk_count(B * K, G * min(QUERY_BLOCK, T) * T)
    if count == 1:
        out_XGTH = attend(operands)
    else:
        out_XGTH = jax.lax.map(attend, jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), operands))
    return out_XGTH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def chunk_count(rows: int, scores: int) -> int:
    """Into how many equal chunks attention splits its rows, each with so many scores at once."""
    limit = machine().scores_at_once
    if limit is None:
        return 1
    fitting = (count for count in range(1, rows + 1) if rows % count == 0 and rows // count * scores <= limit)
    return next(fitting, rows)
