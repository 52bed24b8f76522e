"""Orthogonalising a list: which matrices share one call."""

import collections

import torch

from torch_ref.muon.newton_schulz import KELLER_JORDAN, Coefficients, orthogonalize_via_newton_schulz


def orthogonalize(
    updates: list[torch.Tensor],
    *,
    coefficients: Coefficients = KELLER_JORDAN,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
    gram: bool = False,
    batched: bool | None = None,
) -> list[torch.Tensor]:
    """Each (..., fan_out, fan_in) update with singular values near one, in its own dtype.

    coefficients, eps, dtype, gram: see `orthogonalize_via_newton_schulz`.
    batched: True lets matrices that are alike when laid wide share one batched product, as accelerators like it; False
        gives each its own, which is faster on a CPU. None: batched unless the updates are on a CPU.
    """
    options = dict(coefficients=coefficients, eps=eps, dtype=dtype, gram=gram)
    in_batches = any(update.device.type != "cpu" for update in updates) if batched is None else batched
    stacks = _in_batches(updates, options) if in_batches else _one_by_one(updates, options)
    # Out of `dtype` before any scaling: a factor applied in bfloat16 would cost 2e-3.
    return [stack.to(update.dtype) for stack, update in zip(stacks, updates, strict=True)]


def _one_by_one(stacks: list[torch.Tensor], options: dict) -> list[torch.Tensor]:
    """Each matrix in a call of its own; those of one stack one after another."""

    def one(x_OI: torch.Tensor) -> torch.Tensor:
        return orthogonalize_via_newton_schulz(x_OI, **options)

    return [
        one(stack)
        if stack.ndim == 2
        else torch.stack([one(x_OI) for x_OI in stack.flatten(0, -3)]).reshape(stack.shape)
        for stack in stacks
    ]


def _in_batches(stacks: list[torch.Tensor], options: dict) -> list[torch.Tensor]:
    """Matrices that are alike when laid wide in one call, whatever stack they are from."""
    groups = collections.defaultdict(list)
    for index, stack in enumerate(stacks):
        groups[tuple(sorted(stack.shape[-2:]))].append(index)
    done = list(stacks)
    for (short, long), indices in groups.items():
        are_tall = [stacks[i].shape[-2] > short for i in indices]
        wide = [stacks[i].mT if is_tall else stacks[i] for i, is_tall in zip(indices, are_tall, strict=True)]
        batch = torch.cat([stack.reshape(-1, short, long) for stack in wide])
        batch = orthogonalize_via_newton_schulz(batch, **options)
        taken = 0
        for i, is_tall, stack in zip(indices, are_tall, wide, strict=True):
            count = stack.numel() // (short * long)
            part = batch[taken : taken + count].reshape(stack.shape)
            done[i], taken = part.mT if is_tall else part, taken + count
    return done
