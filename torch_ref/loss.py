"""The loss, on all logits at once. The twin is `jax_impl/loss.py`."""

import torch
import torch.nn.functional as F

from recipe.packing import IGNORE
from torch_ref.products import accumulator


def weighted(targets: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets with 0 for IGNORE, and each token's weight: 0 where it was, else one by the share of those trained on.

    A mean of all tokens, whichever way they are divided, is by these weights one of the tokens that are trained on.
    """
    trained = targets != IGNORE
    count = trained.sum().clamp(min=1).to(dtype)
    weight = torch.full_like(count, targets.numel()) / count  # torch divides a plain number by its reciprocal
    return torch.where(trained, targets, 0), torch.where(trained, weight, torch.zeros_like(weight))


def cross_entropy(
    x_MD: torch.Tensor, head_VD: torch.Tensor, targets_M: torch.Tensor, weights_M: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of -log softmax(x head^T)[target] over the tokens, times their weights; unlike its twin, of all logits."""
    if weights_M is None:
        return F.cross_entropy(logits(x_MD, head_VD), targets_M)
    losses_M, _ = token_losses(x_MD, head_VD, targets_M)
    return (losses_M * weights_M).mean()


def token_losses(
    x_MD: torch.Tensor, head_VD: torch.Tensor, targets_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token, in float32 or wider, and whether its target had the largest logit; 0 and False for IGNORE."""
    logits_MV = logits(x_MD, head_VD)
    losses_M = F.cross_entropy(logits_MV, targets_M, reduction="none", ignore_index=IGNORE)
    return losses_M, logits_MV.argmax(-1) == targets_M


def logits(x: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """Logits in float32 or wider; the product rounds to the compute dtype first, which torch cannot avoid."""
    return F.linear(x, head_VD.to(x.dtype)).to(accumulator(x.dtype))
