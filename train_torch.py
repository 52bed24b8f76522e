"""Train the PyTorch reference: `python train_torch.py --preset tiny`; `--help` lists every flag."""

import sys

from harness.cli import end
from harness.commands.train import parse_run_config


def main() -> None:
    """Parse first, then import PyTorch, so that `--help` and a mistyped flag answer at once."""
    config = parse_run_config(sys.argv[1:], framework="torch")
    from torch_ref.train import train

    train(config)


if __name__ == "__main__":
    end(main)
