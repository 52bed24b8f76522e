"""Train with JAX: `python train_jax.py --preset tiny`; `--help` lists every flag."""

import sys

from recipe.cli import parse_run_config, run


def main() -> None:
    """Parse first, then import JAX, so that `--help` and a mistyped flag answer at once."""
    config = parse_run_config(sys.argv[1:], framework="jax")
    from jax_impl.train import train

    train(config)


if __name__ == "__main__":
    sys.exit(run(main))
