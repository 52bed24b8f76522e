"""One program for all layers: their parameters in stacks, and a loop over them instead of one layer after another.

Outside an update every parameter keeps its name and its own array; inside, `stacked` joins those of layers that see the
same window, and `unstacked` takes their gradients apart again.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_impl import exchange
from recipe.config import ModelConfig, RunConfig

_LAYERS = "model.layers."


def runs(config: ModelConfig) -> list[range]:
    """The layers, cut where the window that they see changes: a loop's rounds are all the same program."""
    grouped = itertools.groupby(range(config.num_hidden_layers), key=config.window_of_layer)
    return [range((layers := list(group))[0], layers[-1] + 1) for _, group in grouped]


class Layers(nnx.Module):
    """Layers of one window; `layer` is one of them, whose parameters are the stacks of all (L, ...)."""

    def __init__(self, layer: Any, numbers: range) -> None:
        self.layer, self.numbers = layer, numbers

    def __call__(self, x_BTD: jax.Array, *, remat: bool, **rest: Any) -> jax.Array:
        """The hidden states (B, T, D) after all of them; `rest` is what each is given beside."""
        graph, stacks = nnx.split(self.layer)

        def one(x_BTD, number_and_parts):
            number, parts = number_and_parts
            layer = nnx.merge(graph, parts)
            for module in (layer, layer.self_attn, layer.mlp):
                module.layer = number
            # Forward and backward are loops of their own, so nothing has to keep XLA from merging the two.
            call = exchange.checkpoint(functools.partial(layer, **rest), remat, prevent_cse=False)
            return call(x_BTD), None

        return jax.lax.scan(one, x_BTD, (jnp.arange(self.numbers.start, self.numbers.stop), stacks))[0]


def checkpoint(call: functools.partial, remat: bool) -> Callable:
    """A layer's call as `exchange.checkpoint` has it differentiated; of `Layers`, each layer's."""
    if isinstance(call.func, Layers):
        return functools.partial(call, remat=remat)
    return exchange.checkpoint(call, remat)


def joined(layers: Any, config: ModelConfig) -> nnx.List:
    """A model's layers as one `Layers` for each window."""
    return nnx.List([Layers(layers[numbers.start], numbers) for numbers in runs(config)])


Change = Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]


def stacked(config: RunConfig) -> Change:
    """Parameters by path -> those of a model with `joined` layers, if this run's is one."""

    def stack(params):
        done = {path: x for path, x in params.items() if not path.startswith(_LAYERS)}
        for run, numbers in enumerate(runs(config.model)):
            for name in _names(params, numbers.start):
                done[f"{_LAYERS}{run}.layer.{name}"] = jnp.stack([params[f"{_LAYERS}{n}.{name}"] for n in numbers])
        return done

    return stack if config.scan_layers else dict


def unstacked(config: RunConfig) -> Change:
    """The inverse of `stacked`, for gradients."""

    def unstack(grads):
        done = {path: x for path, x in grads.items() if not path.startswith(_LAYERS)}
        for run, numbers in enumerate(runs(config.model)):
            for name in _names(grads, run):
                own = name.removeprefix("layer.")
                done |= {f"{_LAYERS}{n}.{own}": grads[f"{_LAYERS}{run}.{name}"][i] for i, n in enumerate(numbers)}
        return done

    return unstack if config.scan_layers else dict


def _names(params: Mapping[str, jax.Array], number: int) -> list[str]:
    """What stands below a layer."""
    above = f"{_LAYERS}{number}."
    return [path.removeprefix(above) for path in params if path.startswith(above)]
