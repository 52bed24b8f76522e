"""The commands that an installation has, `qwen-train-jax` and the rest, where no clone is around.

Each parses first and then imports its framework, so that `--help` and a mistyped flag answer at once.
"""

import importlib
import sys
from typing import NoReturn

from harness.cli import COMMANDS, end, leave
from harness.commands import checkpoint, data, generate, plot
from harness.commands.train import parse_run_config


def train_jax() -> NoReturn:
    """`qwen-train-jax`."""
    _train("jax_impl.train", "jax")


def train_torch() -> NoReturn:
    """`qwen-train-torch`."""
    _train("torch_ref.train", "torch")


def _train(module: str, framework: str) -> NoReturn:
    def main() -> None:
        config = parse_run_config(sys.argv[1:], framework=framework, prog=COMMANDS[module])
        importlib.import_module(module).train(config)

    end(main)


def generate_jax() -> NoReturn:
    """`qwen-generate-jax`."""
    _generate("jax_impl.generate")


def generate_torch() -> NoReturn:
    """`qwen-generate-torch`."""
    _generate("torch_ref.generate")


def _generate(module: str) -> NoReturn:
    def make_generator(*arguments):
        return importlib.import_module(module).make_generator(*arguments)

    leave(generate.run_command(module, make_generator))


def inspect_or_export() -> NoReturn:
    """`qwen-checkpoint`."""
    end(checkpoint.main)


def draw() -> NoReturn:
    """`qwen-plot`."""
    end(plot.main)


def build_or_check() -> NoReturn:
    """`qwen-data`."""
    end(data.main)


def compare_twins() -> NoReturn:
    """`qwen-parity`."""
    end(lambda: importlib.import_module("parity_tests.__main__").main())
