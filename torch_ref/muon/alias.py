"""Muon whole, as a torch optimizer."""

from typing import Literal

import torch

from torch_ref.muon.batches import orthogonalize
from torch_ref.muon.newton_schulz import KELLER_JORDAN, Coefficients
from torch_ref.muon.transforms import (
    Momentum,
    cautious_decayed_weights,
    consistent_rms,
    fan_ratio,
    scale_by_momentum,
    scale_by_neuron_norm,
)

Scale = Literal["fan_ratio", "unclamped_fan_ratio", "consistent_rms"]


class Muon(torch.optim.Optimizer):
    """Muon for matrices: -lr * (scale * NS(momentum) + weight_decay * weight).

    As it stands it is Keller Jordan's, with scale sqrt(max(1, fan_out / fan_in)). A parameter's first axis after
    `stacked` ones that count layers is fan_out, all that follow are fan_in, so that convolutions are flattened; a
    parameter with fewer than two raises ValueError. Arguments are those of the parts:

    coefficients, eps, ns_dtype, gram, batched: `orthogonalize`.  beta, momentum, nesterov: `scale_by_momentum`.
    mu_dtype: dtype of the state; None is the parameters', but float32 if theirs is narrower.
    neuron_beta: NorMuon, by `scale_by_neuron_norm`; None leaves it out.
    scale: "fan_ratio" or "unclamped_fan_ratio" (`fan_ratio`), "consistent_rms".
    weight_decay: decoupled.  cautious: decay by `cautious_decayed_weights`.
    """

    def __init__(
        self,
        params,
        lr: float,
        beta: float = 0.95,
        *,
        stacked: int = 0,
        momentum: Momentum = "average",
        nesterov: bool = True,
        coefficients: Coefficients = KELLER_JORDAN,
        eps: float = 1e-7,
        ns_dtype: torch.dtype = torch.bfloat16,
        mu_dtype: torch.dtype | None = None,
        gram: bool = False,
        neuron_beta: float | None = None,
        scale: Scale = "fan_ratio",
        weight_decay: float = 0.0,
        cautious: bool = False,
        batched: bool | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, nesterov=nesterov, weight_decay=weight_decay))
        self.newton_schulz = dict(coefficients=coefficients, eps=eps, dtype=ns_dtype, gram=gram, batched=batched)
        self.stacked, self.momentum, self.mu_dtype = stacked, momentum, mu_dtype
        self.neuron_beta, self.cautious = neuron_beta, cautious
        self.scale = {
            "fan_ratio": fan_ratio,
            "unclamped_fan_ratio": lambda fan_in, fan_out: fan_ratio(fan_in, fan_out, clamped=False),
            "consistent_rms": consistent_rms,
        }[scale]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim < stacked + 2 or not weight.is_floating_point():
                    raise ValueError(
                        f"A parameter {tuple(weight.shape)} of {weight.dtype} is no matrix (fan_out, fan_in): give it "
                        f"to another optimizer."
                    )

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            directions = []
            for weight in weights:
                state = self.state[weight]
                if "mu" not in state:
                    narrowest = torch.promote_types(weight.dtype, torch.float32)
                    state["mu"] = torch.zeros_like(weight, dtype=self.mu_dtype or narrowest)
                direction = scale_by_momentum(
                    weight.grad, state["mu"], group["beta"], momentum=self.momentum, nesterov=group["nesterov"]
                )
                directions.append(direction.flatten(self.stacked + 1))
            for weight, update_OI in zip(weights, orthogonalize(directions, **self.newton_schulz), strict=True):
                if self.neuron_beta is not None:
                    state = self.state[weight]
                    if "nu" not in state:
                        state["nu"] = torch.zeros_like(update_OI[..., :1])
                    update_OI = scale_by_neuron_norm(update_OI, state["nu"], self.neuron_beta)
                fan_out, fan_in = update_OI.shape[-2:]
                scale, update = self.scale(fan_in, fan_out), update_OI.reshape(weight.shape)
                if self.cautious:
                    decayed = cautious_decayed_weights(update, weight)
                    weight.sub_(decayed, alpha=group["lr"] * group["weight_decay"])
                elif group["weight_decay"]:
                    weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)
        return loss
