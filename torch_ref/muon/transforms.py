"""Muon's parts as functions on tensors, each with its source; `alias.py` makes an optimizer of them.

Updates and weights are (..., fan_out, fan_in), torch's layout. Semantics are Keller Jordan's,
https://kellerjordan.github.io/posts/muon/; `torch.optim.Muon` forces bfloat16 and clamps where Jordan adds eps.
"""

from typing import Literal

import torch

Momentum = Literal["average", "heavy_ball"]


def scale_by_momentum(
    grad: torch.Tensor, mu: torch.Tensor, beta: float, *, momentum: Momentum = "average", nesterov: bool = True
) -> torch.Tensor:
    """The direction that Newton-Schulz takes; `mu` is updated in place, in its own dtype.

    "average", mu <- beta mu + (1 - beta) g without bias correction, and with Nesterov the direction
    beta mu + (1 - beta) g with the new mu (Jordan); "heavy_ball", mu <- beta mu + g and g + beta mu (Moonlight, dion).
    """
    wide = torch.promote_types(torch.promote_types(grad.dtype, mu.dtype), torch.float32)
    grad, held = grad.to(wide), mu.to(wide)
    held = held.lerp_(grad, 1.0 - beta) if momentum == "average" else held.mul_(beta).add_(grad)
    if held is not mu:
        mu.copy_(held)
    if not nesterov:
        return held
    return grad.lerp(held, beta) if momentum == "average" else grad.add(held, alpha=beta)


def fan_ratio(fan_in: int, fan_out: int, *, clamped: bool = True) -> float:
    """sqrt(max(1, fan_out / fan_in)), so that an update keeps the RMS of what flows through it.

    Jordan's rule; `clamped=False` leaves the maximum out, as dion does (Bernstein, https://jeremybernste.in/writing/deriving-muon).
    """
    ratio = fan_out / max(fan_in, 1)
    return max(1.0, ratio) ** 0.5 if clamped else ratio**0.5


def consistent_rms(fan_in: int, fan_out: int, *, rms: float = 0.2) -> float:
    """rms sqrt(max(fan_in, fan_out)): an orthogonal matrix then has entries of that RMS, AdamW's.

    Moonlight, https://arxiv.org/abs/2502.16982, equation 4. Of Gaussian matrices Jordan's five steps leave singular
    values below one in the root mean square, and so an RMS of 0.17 to 0.20 (96 x 96 to 1024 x 3072).
    """
    return rms * max(fan_in, fan_out) ** 0.5


def scale_by_neuron_norm(update_OI: torch.Tensor, nu_O1: torch.Tensor, beta: float, eps: float = 1e-8) -> torch.Tensor:
    """NorMuon's second moment: each output neuron's update over the root of its average square; the norm is kept.

    nu <- beta nu + (1 - beta) mean over inputs of u^2;  s = u / (sqrt(nu) + eps);  s ||u||_F / (||s||_F + eps).
    `nu_O1` is updated in place.

    https://arxiv.org/abs/2510.05491, as the authors' code and dion have it: a neuron is always an output (nanochat
    takes the longer side), there is no bias correction, and the Frobenius norm is the one before (the paper's text
    makes it 0.2 sqrt(fan_in fan_out)).
    """

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(torch.sum(x * x, dim=(-2, -1), keepdim=True))

    wide = update_OI.to(nu_O1.dtype)
    nu_O1.lerp_(torch.mean(torch.square(wide), dim=-1, keepdim=True), 1.0 - beta)
    even = wide / (torch.sqrt(nu_O1) + eps)
    return (even * (norm(wide) / (norm(even) + eps))).to(update_OI.dtype)


def cautious_decayed_weights(update: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weights where decay does not work against the update, u w >= 0, and zero elsewhere.

    https://arxiv.org/abs/2510.12402. By signs: the product of two small numbers may vanish.
    """
    return torch.where(torch.sign(update) * torch.sign(weight) >= 0, weight, 0.0)


@torch.no_grad()
def clip_qk(weight_OI: torch.Tensor, max_logits: torch.Tensor, threshold: float = 100.0, power: float = 0.5) -> None:
    """QK-clip, the clip of MuonClip: heads whose largest logit passed the threshold have their rows scaled down.

    In place, after the optimizer's step. A head with logit s gets the factor min(1, threshold / s) to `power`: 0.5 for
    queries and for keys that go together; 1 for queries whose keys are shared by several heads, and such keys are left
    alone. Kimi K2, https://arxiv.org/abs/2507.20534, section 2.1, which leaves shared parts of keys alone.
    """
    factor = torch.clamp(threshold / max_logits.to(weight_OI.dtype), max=1.0) ** power
    weight_OI.mul_(factor.repeat_interleave(weight_OI.shape[0] // len(factor))[:, None])
