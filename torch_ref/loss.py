"""The loss, on all logits at once. The twin is `jax_impl/loss.py`."""

import torch
import torch.nn.functional as F

from torch_ref.products import accumulator


def cross_entropy(x_MD: torch.Tensor, head_VD: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(x head^T)[target] over the tokens; unlike its twin it holds all logits."""
    return F.cross_entropy(logits(x_MD, head_VD), targets_M)


def token_losses(
    x_MD: torch.Tensor, head_VD: torch.Tensor, targets_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token, in float32 or wider, and whether its target had the largest logit."""
    logits_MV = logits(x_MD, head_VD)
    return F.cross_entropy(logits_MV, targets_M, reduction="none"), logits_MV.argmax(-1) == targets_M


def logits(x: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Logits in float32 or wider; the product rounds to the compute dtype first, which torch cannot avoid."""
    return F.linear(x, head_VD.to(x.dtype)).to(accumulator(x.dtype))
