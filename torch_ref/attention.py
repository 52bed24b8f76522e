"""Causal grouped-query attention. The twin is `jax_impl/attention.py`; the letters are those of `model.py`."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from recipe.config import PrecisionConfig
from torch_ref import random
from torch_ref.products import accumulator, product

# Queries per block of explicit attention: a block skips the keys none of its queries sees.
QUERY_BLOCK = 128


class Places(NamedTuple):
    """Where the tokens of a batch stand."""

    cos_TR: torch.Tensor
    sin_TR: torch.Tensor
    """The angles of RoPE; the tables may have rows, (B, T, R)."""
    documents_BT: torch.Tensor | None
    """Number of each token's document within its row, of which tokens see no other; None if rows are whole."""

    @property
    def packed(self) -> bool:
        """Whether rows have documents of their own."""
        return self.documents_BT is not None


def fused_attention(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    documents_BT: torch.Tensor | None = None,
    *,
    window: int | None,
    rate: float = 0.0,
    key: random.Key | None = None,
) -> torch.Tensor:
    """`attention` through torch's SDPA; ValueError with dropout, whose masks it does not have (`why_not_fused`).

    A window or documents are a mask (T, S) or (B, 1, T, S), with which SDPA has fewer kernels to choose from.
    """
    if key is not None and rate > 0.0:
        raise ValueError(f"SDPA cannot drop probabilities by our masks, and rate is {rate}; call attention instead.")
    position = torch.arange(q_BTNH.shape[1], device=q_BTNH.device)
    mask = None
    if window is not None or documents_BT is not None:
        mask = visible(position[:, None], position[None, :], window)
    if mask is not None and documents_BT is not None:
        mask = mask & same_document(documents_BT, documents_BT)
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out_BNTH.transpose(1, 2)


def why_not_fused(precision: PrecisionConfig, dropout: float, packed: bool = False) -> str:
    """Why `fused_attention` cannot run at this dropout rate, of rows with documents if `packed`; empty if it can."""
    return f"torch's SDPA would draw other masks than ours, and dropout is {dropout}" if dropout else ""


def attention_in_use(precision: PrecisionConfig, dropout: float, packed: bool = False) -> str:
    """Which attention runs, explicit or fused, at this dropout rate, of rows with documents if `packed`."""
    return "fused" if precision.attention == "fused" and not why_not_fused(precision, dropout, packed) else "explicit"


def visible(t: torch.Tensor, s: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether a query at position t sees the key at position s: s <= t, and s > t - window if there is a window."""
    return (s <= t) if window is None else (s <= t) & (s > t - window)


def same_document(of_queries_BT: torch.Tensor, of_keys_BS: torch.Tensor) -> torch.Tensor:
    """Whether query and key are of one document, (B, 1, T, S)."""
    return of_queries_BT[:, None, :, None] == of_keys_BS[:, None, None, :]


def query_blocks(T: int, window: int | None) -> list[tuple[int, int, int]]:
    """(start, stop, first) of each block: queries start ... stop - 1 see no key before `first`."""
    starts = range(0, T, QUERY_BLOCK)
    firsts = [0 if window is None else max(0, start - window + 1) for start in starts]
    return [(start, min(start + QUERY_BLOCK, T), first) for start, first in zip(starts, firsts, strict=True)]


def attend_block(
    q_XGTH: torch.Tensor,
    k_XSH: torch.Tensor,
    v_XSH: torch.Tensor,
    start: int,
    first: int,
    *,
    window: int | None,
    same_X1TS: torch.Tensor | None = None,
    keep_XGTS: torch.Tensor | None,
    rate: float,
) -> torch.Tensor:
    """Attention (X, G, T, H) of queries at positions start ... to keys at positions first ...; scores are (X, Q, S)."""
    X, G, T, H = q_XGTH.shape
    S, dtype = k_XSH.shape[1], q_XGTH.dtype
    t = start + torch.arange(T, device=q_XGTH.device)[:, None]
    s = first + torch.arange(S, device=q_XGTH.device)[None, :]
    q_XQH = q_XGTH.reshape(X, G * T, H)
    scores_XQS = product("xqh,xsh->xqs", q_XQH, k_XSH, accumulator(dtype)) / math.sqrt(H)
    seen = visible(t, s, window) if same_X1TS is None else visible(t, s, window) & same_X1TS
    scores_XGTS = scores_XQS.reshape(X, G, T, S).masked_fill(~seen, -math.inf)
    probs_XGTS = torch.softmax(scores_XGTS, dim=-1).to(dtype)
    if keep_XGTS is not None:
        probs_XGTS = random.drop(probs_XGTS, keep_XGTS, rate)
    # Its rows by query and then by group: the order in which v's gradient is summed.
    return product("xgts,xsh->xtgh", probs_XGTS, v_XSH, dtype).transpose(1, 2)


def attention(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    documents_BT: torch.Tensor | None = None,
    *,
    window: int | None,
    rate: float = 0.0,
    key: random.Key | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention, S = T, in blocks of queries; query t sees keys s <= t, and s > t - window if set.

    With `documents_BT` it sees those of its own document alone. `key` and `rate` drop probabilities; each row and query
    head has a mask of its own, queries by keys.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    G, blocks = N // K, query_blocks(T, window)
    q_BTKGH, outputs = q_BTNH.reshape(B, T, K, G, H), []
    documents_XT = None if documents_BT is None else documents_BT.repeat_interleave(K, dim=0)
    head_keys = None
    if key is not None and rate > 0.0:
        head_keys = random.fold_in(key, torch.arange(B * N, device=q_BTNH.device))
    for start, stop, first in blocks:
        queries, S = stop - start, stop - first
        q_XGTH = q_BTKGH[:, start:stop].permute(0, 2, 3, 1, 4).reshape(B * K, G, queries, H)
        k_XSH = k_BSKH[:, first:stop].permute(0, 2, 3, 1).reshape(B * K, H, S).mT
        v_XSH = v_BSKH[:, first:stop].transpose(1, 2).reshape(B * K, S, H)
        same_X1TS, keep_XGTS = None, None
        if documents_XT is not None:
            same_X1TS = same_document(documents_XT[:, start:stop], documents_XT[:, first:stop])
        if head_keys is not None:
            keep = random.keep_mask(head_keys, range(start, stop), range(first, stop), rate, q_BTNH.device)
            keep_XGTS = keep.reshape(B * K, G, queries, S)
        operands = q_XGTH, k_XSH, v_XSH, start, first
        out_XGTH = attend_block(*operands, window=window, same_X1TS=same_X1TS, keep_XGTS=keep_XGTS, rate=rate)
        outputs.append(out_XGTH.reshape(B, K, G, queries, H).permute(0, 3, 1, 2, 4))
    return torch.cat(outputs, dim=1).reshape(B, T, N, H)
