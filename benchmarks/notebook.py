"""The seed notebook's own way through an update, where it differs from `torch_ref`'s; docs/notebook.md has the rest.

Each matrix takes its turn through Muon, keys and values are copied for every query head, and all logits of a
micro-batch are held in float32. The model's mathematics is `torch_ref`'s, so that the losses of all modes agree.
"""

import math

import torch
import torch.nn.functional as F

from torch_ref.muon.newton_schulz import KELLER_JORDAN


def repeat_kv(x_BSKH: torch.Tensor, groups: int) -> torch.Tensor:
    """Each key or value head as often as query heads share it, (B, S, K * groups, H), as a copy."""
    return x_BSKH.repeat_interleave(groups, dim=2)


def attention(q_BTNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor, *, explicit: bool) -> torch.Tensor:
    """Causal attention over repeated heads, (B, T, N, H): torch's SDPA, or with `explicit` all T x T scores."""
    groups, T = q_BTNH.shape[2] // k_BSKH.shape[2], q_BTNH.shape[1]
    heads = q_BTNH, repeat_kv(k_BSKH, groups), repeat_kv(v_BSKH, groups)
    q_BNTH, k_BNSH, v_BNSH = (x.transpose(1, 2) for x in heads)
    if not explicit:
        return F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, is_causal=True).transpose(1, 2)
    scores_BNTS = q_BNTH @ k_BNSH.mT / math.sqrt(q_BNTH.shape[-1])
    future_TS = torch.ones(T, T, dtype=torch.bool, device=q_BTNH.device).triu(1)
    # Under autocast the softmax comes out in float32.
    probs_BNTS = torch.softmax(scores_BNTS.masked_fill(future_TS, -math.inf), dim=-1)
    return (probs_BNTS.to(v_BNSH.dtype) @ v_BNSH).transpose(1, 2)


def newton_schulz(x_OI: torch.Tensor, *, steps: int, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """The iteration on one matrix, every operation in `dtype`; the notebook puts it under torch.compile."""
    a, b, c = KELLER_JORDAN[0]
    x = x_OI.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """The notebook's Muon: a Python loop over matrices, one Newton-Schulz each; it overwrites the gradients."""

    def __init__(self, params, *, lr: float, beta: float, nesterov: bool, orthogonalize) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, nesterov=nesterov))
        self.orthogonalize = orthogonalize

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            for weight in group["params"]:
                mu = self.state[weight].setdefault("mu", torch.zeros_like(weight))
                mu.lerp_(weight.grad, 1.0 - group["beta"])
                direction = weight.grad.lerp_(mu, group["beta"]) if group["nesterov"] else mu
                factor = max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.add_(self.orthogonalize(direction).to(weight.dtype), alpha=-group["lr"] * factor)


class TextTokenDataset(torch.utils.data.Dataset):
    """The notebook's training text: a list of tokens, a window at every offset, tensors made one window at a time."""

    def __init__(self, tokens: list[int], sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length

    def __len__(self) -> int:
        return len(self.tokens) - self.sequence_length

    def __getitem__(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        stop = start + self.sequence_length
        return torch.tensor(self.tokens[start:stop]), torch.tensor(self.tokens[start + 1 : stop + 1])
