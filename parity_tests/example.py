"""An example for your own model: a Flax port of transformers' T5 feed-forward block, shown to be the original.

`python -m parity_tests.example [--out FOLDER]` prints the report and exits 0 if every tensor agrees, else 1.
"""

import sys
from dataclasses import dataclass

import jax
import numpy as np
import torch
from flax import nnx
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5LayerFF

from harness import cli
from parity_tests.compare import compare_modules, copy_weights
from parity_tests.compare.report import Report

FEATURES, HIDDEN = 24, 40

NAME_MAP = {
    "norm": "layer_norm",
    "wide": "DenseReluDense.wi",
    "narrow": "DenseReluDense.wo",
    "activation": "DenseReluDense.act",
}
"""Path in the Flax module -> path in the torch module."""


class Relu(nnx.Module):
    """A module of its own, so that its output has a name that can be compared."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)


class FlaxFeedForward(nnx.Module):
    """x + narrow(relu(wide(norm(x)))): the port, as a user would write it."""

    def __init__(self, eps: float, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(FEATURES, epsilon=eps, rngs=rngs)
        self.wide = nnx.Linear(FEATURES, HIDDEN, use_bias=False, rngs=rngs)
        self.activation = Relu()
        self.narrow = nnx.Linear(HIDDEN, FEATURES, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.narrow(self.activation(self.wide(self.norm(x))))


def torch_feed_forward() -> T5LayerFF:
    """transformers' block, with weights and norm scales away from their defaults."""
    torch.manual_seed(0)
    config = T5Config(d_model=FEATURES, d_ff=HIDDEN, dropout_rate=0.0, feed_forward_proj="relu")
    block = T5LayerFF(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, parameter.shape[-1] ** -0.5)
    return block


def flax_feed_forward(block: T5LayerFF, *, eps: float = 1e-6) -> FlaxFeedForward:
    """The port with the block's weights."""
    return copy_weights(block, FlaxFeedForward(eps, nnx.Rngs(0)), NAME_MAP).module


def make_report(*, eps: float = 1e-6, dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")) -> Report:
    """The comparison; another `eps` than the block's 1e-6 is a bug for the report to find."""
    block = torch_feed_forward()
    # Small inputs, as after an embedding: beside large ones a wrong eps would be a rounding error.
    x = 0.02 * np.random.default_rng(1).standard_normal((2, 5, FEATURES)).astype(np.float32)
    return compare_modules(flax_feed_forward(block, eps=eps), block, [x], NAME_MAP, dtypes=dtypes)


@dataclass(frozen=True)
class ExampleOptions:
    """Compare a Flax port with transformers' block."""

    out: str = ""
    """Folder for report.json, report.html and the pictures; nothing is written without it."""
    eps: float = 1e-6
    """Of the port's norm; another value is a bug, and the report names the norm."""


def main(options: ExampleOptions) -> int:
    """Print the report and return its exit code."""
    report = make_report(eps=options.eps)
    report.show(options.out)
    return report.exit_code


if __name__ == "__main__":
    options = dict(prog="python -m parity_tests.example", description="A report on a model that is not ours.")
    cli.end(lambda: main(cli.parse(ExampleOptions, sys.argv[1:], **options)))
