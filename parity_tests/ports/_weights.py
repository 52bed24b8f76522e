"""Seeded torch modules, and their weights as the JAX layers hold them."""

from functools import reduce

import jax.numpy as jnp
import numpy as np
import torch


def settle(module, seed=0):
    """The torch module in eval mode, with norms, biases and running statistics away from 0 and 1."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += torch.from_numpy(0.3 * rng.standard_normal(parameter.shape)).float()
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer += torch.from_numpy(0.4 * rng.standard_normal(buffer.shape)).float()
            elif name.endswith("running_var"):
                buffer *= torch.from_numpy(rng.uniform(0.4, 1.7, buffer.shape)).float()
    return module.eval()


def sample(*shape, seed=1, scale=1.0):
    """Normal float32 inputs."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def array(tensor):
    """A torch tensor as a JAX array of its own."""
    return jnp.array(tensor.detach().numpy())


def linear(module):
    """Kernel and bias of a torch Linear or convolution: spatial, in, out."""
    kernel = module.weight.permute(*range(2, module.weight.ndim), 1, 0)
    return {"kernel": array(kernel)} | ({} if module.bias is None else {"bias": array(module.bias)})


def norm(module):
    """Scale, bias and running statistics of a torch normalisation."""
    leaves = {"scale": module.weight, "bias": getattr(module, "bias", None)}
    leaves |= {"mean": getattr(module, "running_mean", None), "var": getattr(module, "running_var", None)}
    return {name: array(leaf) for name, leaf in leaves.items() if leaf is not None}


def heads(module, n):
    """The query, key, value and out layers of nnx.MultiHeadAttention with n heads, from a torch MultiheadAttention."""
    width = module.embed_dim
    layers = {}
    for i, name in enumerate(("query", "key", "value")):
        weight, bias = (p[i * width : (i + 1) * width] for p in (module.in_proj_weight, module.in_proj_bias))
        layers[name] = {"kernel": array(weight.T).reshape(width, n, -1), "bias": array(bias).reshape(n, -1)}
    out = linear(module.out_proj)
    return layers | {"out": out | {"kernel": out["kernel"].reshape(n, -1, width)}}


def _child(node, key):
    return node[int(key)] if key.isdigit() else getattr(node, key)


def put(module, tree):
    """Sets the variables of an NNX module from a nested dict whose keys are paths with dots."""
    for path, value in tree.items():
        target = reduce(
            lambda node, key: node[int(key)] if key.isdigit() else getattr(node, key), path.split("."), module
        )
        if isinstance(value, dict):
            put(target, value)
        elif target.shape != value.shape:
            raise ValueError(f"{path}: {target.shape} is not {value.shape}")
        else:
            target.set_value(value)
    return module
