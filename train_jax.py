"""Train with JAX: `python train_jax.py --preset tiny`; `--help` lists every flag."""

import sys

from harness.cli import end
from harness.commands.train import parse_run_config


def main() -> None:
    """Parse first, then import JAX, so that `--help` and a mistyped flag answer at once."""
    config = parse_run_config(sys.argv[1:], framework="jax")
    from jax_impl.train import train

    train(config)


if __name__ == "__main__":
    end(main)
