"""What a training command line asks for: a preset, a run to resume or weights to begin with, and flags over it."""

import sys
from collections.abc import Callable, Sequence

from harness.cli import last_value, parse, run
from harness.configure import begun_from, ready
from recipe.config import RunConfig
from recipe.presets import PRESETS

FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}


def run_command(module: str, train: Callable[[RunConfig], object], *, framework: str) -> int:
    """`python -m MODULE`, which trains like train_jax.py or train_torch.py: returns the exit code."""

    def main() -> None:
        train(parse_run_config(sys.argv[1:], framework=framework, prog=f"python -m {module}"))

    return run(main)


def parse_run_config(argv: Sequence[str], *, framework: str, prog: str = "") -> RunConfig:
    """The run that `argv` asks for: a preset (or the run to resume), flags over it, then a run folder that is free.

    `framework` is "jax" or "torch" and names the automatic folder. Raises `UserError` or `FileExistsError` with one
    line for any mistake, and touches nothing.
    """
    resumed, init = last_value(argv, "--resume"), last_value(argv, "--init")
    default = begun_from(framework, preset=last_value(argv, "--preset") or "", resume=resumed or "", init=init or "")
    source = f"of the run in {resumed}" if resumed else f"those of --preset {default.preset}"
    if init and not resumed:
        source += f" and of the weights in {init}"
    config = parse(
        RunConfig,
        argv,
        default=default,
        prog=prog or f"train_{framework}.py",
        description=f"Train with {FRAMEWORKS[framework]}. Presets: {', '.join(PRESETS)}. "
        f"The defaults below are {source}.",
    )
    return ready(config, framework)
