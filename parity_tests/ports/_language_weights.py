"""Weights of transformers' models: random ones away from their initialisation, and their copy into an NNX model."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers.pytorch_utils import Conv1D

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def randomise(module, seed, norm_mean=1.0, embedding_std=0.05):
    """Gives every parameter a random value far from its initial one, and returns the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            owner = module.get_submodule(name.rpartition(".")[0])
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(norm_mean + 0.3 * noise)
            elif isinstance(owner, torch.nn.Embedding) or not name.endswith("weight"):
                parameter.copy_(embedding_std * noise)
            else:
                fan_in = parameter.shape[0] if isinstance(owner, Conv1D) else parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
    return module.eval()


def arrays(module):
    """Every weight of the torch module, matrices turned to JAX's layout: inputs before outputs."""
    found = {}
    for name, value in module.state_dict().items():
        owner = module.get_submodule(name.rpartition(".")[0])
        array = value.detach().numpy().copy()
        if isinstance(owner, torch.nn.Conv2d) and array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif isinstance(owner, torch.nn.Linear) and array.ndim == 2:
            array = array.T
        found[name] = array
    return found


def renamed(path, names):
    """The torch name of a JAX path by the rule with the longest prefix; "{}" stands for one component."""
    parts = path.split(".")
    parts[-1] = LEAVES.get(parts[-1], parts[-1])
    for pattern in sorted(names, key=lambda pattern: -pattern.count(".")):
        wanted = pattern.split(".")
        if len(wanted) <= len(parts) and all(w in ("{}", p) for w, p in zip(wanted, parts, strict=False)):
            holes = [p for w, p in zip(wanted, parts, strict=False) if w == "{}"]
            return ".".join([names[pattern].format(*holes), *parts[len(wanted) :]])
    return ".".join(parts)


def load(model, weights, names=None, stacked=None, layers=0):
    """Copies the weights, named as in torch, into the NNX model and returns it."""
    names, stacked = names or {}, stacked or {}
    filled = []
    for parts, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = ".".join(map(str, parts))
        head = next((prefix for prefix in stacked if path.startswith(prefix + ".")), None)
        if head is None:
            value = weights[renamed(path, names)].reshape(parameter.get_value().shape)
        else:
            rest = renamed(path[len(head) + 1 :], {})
            value = np.stack([weights[f"{stacked[head].format(i)}.{rest}"] for i in range(layers)])
        assert value.shape == parameter.get_value().shape, (path, value.shape)
        filled.append((parts, parameter.replace(jnp.asarray(value))))
    nnx.update(model, nnx.from_flat_state(filled))
    return model
