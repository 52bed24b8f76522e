"""Between the common dict of Hugging Face names and the torch model, whose names and layout these are already.
The twin is `jax_impl/weights.py`; no code converts between the frameworks directly."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch

from harness.saving import LazyArrays
from recipe.config import ModelConfig, PrecisionConfig
from recipe.params import check_weights
from torch_ref.model import Qwen3ForCausalLM


def from_hf(
    weights: Mapping[str, np.ndarray], config: ModelConfig, precision: PrecisionConfig, device: str = "cpu"
) -> Qwen3ForCausalLM:
    """The model with these weights, in the parameter dtype; raises ValueError listing every wrong name or shape.

    Weights on disk are read one after another, so that never more than one is held twice.
    """
    check_weights(weights, config)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config, precision)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(from_array(weights[name]))
    return model


def from_array(array: np.ndarray) -> torch.Tensor:
    """A tensor of the array's own dtype; torch knows NumPy's bfloat16 only by its bits."""
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def to_hf(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """NumPy weights by Hugging Face name; also of anything shaped and named like parameters."""
    return dict(to_hf_lazily(tensors).items())


def to_hf_lazily(tensors: Mapping[str, torch.Tensor]) -> LazyArrays:
    """The same, each array fetched from the device when it is asked for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return LazyArrays(shapes, lambda name: to_array(tensors[name]))


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A copy as an array of the tensor's own dtype; inverse of `from_array`."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def slot_leaves(optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Optimizer state by slot (mu, exp_avg, exp_avg_sq) and Hugging Face name; zeros before the first update."""
    names = {parameter: name for name, parameter in optimizer.named_parameters.items()}
    slots = {"mu": optimizer.muon, "exp_avg": optimizer.adamw, "exp_avg_sq": optimizer.adamw}

    def leaf(half, parameter: torch.Tensor, slot: str) -> torch.Tensor:
        state = half.state[parameter]
        return state[slot] if slot in state else torch.zeros_like(parameter)

    return {
        slot: {
            names[parameter]: leaf(half, parameter, slot)
            for group in half.param_groups
            for parameter in group["params"]
        }
        for slot, half in slots.items()
    }


def optimizer_slots(optimizer) -> dict[str, dict[str, np.ndarray]]:
    """Optimizer state by slot and Hugging Face name."""
    return {slot: to_hf(leaves) for slot, leaves in slot_leaves(optimizer).items()}


def restore_optimizer(optimizer, slots: Mapping[str, Mapping[str, np.ndarray]], updates: int) -> None:
    """Inverse of `optimizer_slots`, in place: the optimizer with these slots, as it is after so many updates."""
    halves = {"mu": optimizer.muon, "exp_avg": optimizer.adamw, "exp_avg_sq": optimizer.adamw}
    for slot, half in halves.items():
        for name in slots[slot]:
            parameter = optimizer.named_parameters[name]
            half.state[parameter][slot] = from_array(slots[slot][name]).to(parameter)
            if half is optimizer.adamw:
                # Its bias correction counts updates, in float32 and where the kernel reads it.
                device = parameter.device if half.defaults["fused"] else "cpu"
                half.state[parameter]["step"] = torch.tensor(float(updates), dtype=torch.float32, device=device)
