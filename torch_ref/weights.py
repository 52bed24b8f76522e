"""Between the common dict of Hugging Face names and the torch model, whose names and layout these are already.
The twin is `jax_impl/weights.py`; no code converts between the frameworks directly."""

from collections.abc import Mapping

import numpy as np
import torch

from recipe.config import ModelConfig, PrecisionConfig
from recipe.params import check_weights
from torch_ref.model import Qwen3ForCausalLM


def from_hf(
    weights: Mapping[str, np.ndarray], config: ModelConfig, precision: PrecisionConfig, device: str = "cpu"
) -> Qwen3ForCausalLM:
    """The model with these weights, in the parameter dtype; raises ValueError listing every wrong name or shape."""
    check_weights(weights, config)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config, precision)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(np.asarray(weights[name], precision.params)))
    return model


def to_hf(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """NumPy weights by Hugging Face name; also of anything shaped and named like parameters."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def optimizer_slots(optimizer) -> dict[str, dict[str, np.ndarray]]:
    """Optimizer state by slot (mu, exp_avg, exp_avg_sq) and Hugging Face name."""
    names = {parameter: name for name, parameter in optimizer.named_parameters.items()}
    slots = {"mu": optimizer.muon, "exp_avg": optimizer.adamw, "exp_avg_sq": optimizer.adamw}
    return {
        slot: to_hf({names[parameter]: state[slot] for parameter, state in half.state.items()})
        for slot, half in slots.items()
    }
