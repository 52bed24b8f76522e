"""Muon as a torch optimizer, in small parts: momentum and orthogonalisation, fan ratio, shell, hybrid with AdamW.

torch weights are (..., fan_out, fan_in), as Newton-Schulz wants them. Semantics are the seed notebook's (Keller
Jordan's Muon); `torch.optim.Muon` forces bfloat16 and clamps where the seed adds eps (docs/muon.md).
"""

import collections
import functools
from collections.abc import Mapping

import torch

from recipe.config import AdamWConfig, MuonConfig
from recipe.params import ParamSpec, decays, param_specs
from torch_ref.newton_schulz import orthogonalize_via_newton_schulz


def orthogonalize_all(updates: list[torch.Tensor], **newton_schulz) -> list[torch.Tensor]:
    """Orthogonalise every (fan_out, fan_in) update; on a GPU, those that are alike when laid wide share one call."""
    orthogonalize = functools.partial(orthogonalize_via_newton_schulz, **newton_schulz)
    orthogonalized = list(updates)
    groups = collections.defaultdict(list)
    for index, update_OI in enumerate(updates):
        groups[min(update_OI.shape), max(update_OI.shape)].append(index)
    for indices in groups.values():
        # The wide layout of weight_OI: a tall weight's is its transpose.
        are_wide = [updates[i].shape[-2] <= updates[i].shape[-1] for i in indices]
        wide = [updates[i] if is_wide else updates[i].mT for i, is_wide in zip(indices, are_wide, strict=True)]
        orthogonal = orthogonalize(torch.stack(wide)) if takes_batches(wide[0].device) else map(orthogonalize, wide)
        for i, is_wide, matrix in zip(indices, are_wide, orthogonal, strict=True):
            # Out of ns_dtype before any scaling: a factor applied in bfloat16 would cost 2e-3.
            orthogonalized[i] = (matrix if is_wide else matrix.mT).to(updates[i].dtype)
    return orthogonalized


def takes_batches(device: torch.device) -> bool:
    """Whether stacked matrices are multiplied faster; on a CPU they are not, and the stack is a copy of them all."""
    return device.type != "cpu"


def fan_ratio(weight_OI: torch.Tensor) -> float:
    """sqrt(max(1, fan_out / fan_in)), so that an update keeps the RMS of what flows through it."""
    return max(1.0, weight_OI.shape[-2] / weight_OI.shape[-1]) ** 0.5


class Muon(torch.optim.Optimizer):
    """Muon for matrices: -lr * (sqrt(max(1, fan_out/fan_in)) * NS(momentum) + weight_decay * weight).

    mu <- beta mu + (1 - beta) g, without bias correction; with Nesterov the direction is beta mu + (1 - beta) g,
    taken with the new mu. The state is kept in the gradients' dtype, Newton-Schulz runs in `ns_dtype`.
    """

    def __init__(
        self,
        params,
        lr: float,
        beta: float = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        eps: float = 1e-7,
        ns_dtype: torch.dtype = torch.bfloat16,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, nesterov=nesterov, weight_decay=weight_decay))
        self.newton_schulz = dict(steps=ns_steps, eps=eps, dtype=ns_dtype)

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
                mu = self.state[weight].setdefault("mu", torch.zeros_like(weight))
                mu.lerp_(weight.grad, 1.0 - group["beta"])
                directions.append(weight.grad.lerp(mu, group["beta"]) if group["nesterov"] else mu)
            for weight, update in zip(weights, orthogonalize_all(directions, **self.newton_schulz), strict=True):
                if group["weight_decay"]:
                    weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * fan_ratio(weight))
        return loss


def adamw_groups(
    named_parameters: Mapping[str, torch.nn.Parameter], specs: Mapping[str, ParamSpec], config: AdamWConfig
) -> list[dict]:
    """AdamW's parameter groups, those that decay and those that do not; the matrices, Muon's, are left out."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in named_parameters.items():
        if specs[name].role != "matrix":
            groups[decays(specs[name].role, config)].append(parameter)
    return [
        {"params": params, "weight_decay": config.weight_decay if decayed else 0.0}
        for decayed, params in groups.items()
    ]


class MuonWithAdamW:
    """Muon on the matrices and AdamW on the rest; `step(factor)` takes the learning-rate factor of the update."""

    def __init__(
        self,
        model: torch.nn.Module,
        muon_config: MuonConfig,
        adamw_config: AdamWConfig,
        *,
        ns_dtype: torch.dtype = torch.bfloat16,
        fused: bool = False,
    ) -> None:
        """`fused` runs AdamW as torch's one kernel, a third faster than an operation at a time."""
        specs = param_specs(model.config)
        self.named_parameters = dict(model.named_parameters())
        self.muon = Muon(
            [parameter for name, parameter in self.named_parameters.items() if specs[name].role == "matrix"],
            lr=muon_config.learning_rate,
            beta=muon_config.beta,
            nesterov=muon_config.nesterov,
            ns_steps=muon_config.ns_steps,
            eps=muon_config.eps,
            ns_dtype=ns_dtype,
            weight_decay=muon_config.weight_decay,
        )
        self.adamw = torch.optim.AdamW(
            adamw_groups(self.named_parameters, specs, adamw_config),
            lr=adamw_config.learning_rate,
            betas=(adamw_config.beta1, adamw_config.beta2),
            eps=adamw_config.eps,
            fused=fused,
        )
        self.learning_rates = (muon_config.learning_rate, adamw_config.learning_rate)

    def step(self, factor: float) -> None:
        """One update of both optimizers at `factor` times their peak learning rates."""
        for optimizer, learning_rate in zip((self.muon, self.adamw), self.learning_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            optimizer.step()


def clip_by_global_norm(grads: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Clip gradients in place and return their norm before: scaled by min(1, max_norm / (norm + 1e-6))."""
    # Row by row, and the rows' norms in float64: in one go torch's float32 norm of a large matrix on a CPU is off by up
    # to 2e-2 (docs/log.md).
    rows = [torch.linalg.vector_norm(grad, dim=-1) for grad in grads]
    norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows])
    norm = torch.linalg.vector_norm(norms).to(grads[0].dtype)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(factor)
    return norm
