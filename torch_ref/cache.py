"""The cache of keys and values that decoding reads. The twin is `jax_impl/cache.py`."""

import math

import torch

from recipe.config import ModelConfig
from torch_ref.attention import visible
from torch_ref.products import accumulator


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
        scores_BKGS = torch.einsum("bkgh,bksh->bkgs", q_BKGH, k_BKSH).to(accumulator(dtype)) / math.sqrt(H)
        probs_BKGS = torch.softmax(
            scores_BKGS.masked_fill(~visible(t, s, window)[:, None, None], -math.inf), dim=-1
        ).to(dtype)
        return torch.einsum("bkgs,bksh->bkgh", probs_BKGS, v_BKSH).reshape(B, T, N, H)
