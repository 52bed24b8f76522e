"""Muon on this model's matrices and AdamW on the rest, with the clip before both; `muon/` is for anybody's model.

torch weights are (fan_out, fan_in), as Newton-Schulz wants them.
"""

from collections.abc import Mapping

import torch

from recipe.config import AdamWConfig, MuonConfig
from recipe.params import ParamSpec, decays, param_specs
from torch_ref.muon import KELLER_JORDAN, Muon


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
            coefficients=KELLER_JORDAN[:1] * muon_config.ns_steps,
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
