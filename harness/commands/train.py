"""What a training command line asks for: a preset, a run to resume or weights to begin with, a file of fields over it,
and flags over that."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.cli import last_value, parse, run
from harness.config_file import read_config_file
from harness.configure import begun_from, ready
from recipe.config import RunConfig
from recipe.presets import PRESETS

FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}
EVERYDAY = """Everyday flags:
  --preset NAME  --config FILE  --out FOLDER  --resume RUN  --init WEIGHTS
  --data.corpus TEXT  --data.tokenizer NAME  --steps INT  --batch-size INT  --accumulation INT
  --sequence-length INT  --muon.learning-rate FLOAT  --adamw.learning-rate FLOAT  --precision.compute DTYPE"""
"""Flags that most runs need, shown before all others."""


@dataclass(frozen=True)
class TrainCommand(RunConfig):
    """A run, and where else its fields are written down."""

    config: str = ""
    """File of fields, over the preset and under the flags: TOML, YAML or JSON, nested as in a run.json, which may be
    named too, as may its folder (docs/commands.md)."""

    def run_config(self) -> RunConfig:
        """The run alone."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)})


def run_command(module: str, train: Callable[[RunConfig], object], *, framework: str) -> int:
    """`python -m MODULE`, which trains like train_jax.py or train_torch.py: returns the exit code."""

    def main() -> None:
        train(parse_run_config(sys.argv[1:], framework=framework, prog=f"python -m {module}"))

    return run(main)


def parse_run_config(argv: Sequence[str], *, framework: str, prog: str = "") -> RunConfig:
    """The run that `argv` asks for: a preset (or the run to resume), a file's fields and flags over it, then a run
    folder that is free.

    `framework` is "jax" or "torch" and names the automatic folder. Raises `UserError` or `FileExistsError` with one
    line for any mistake, and touches nothing.
    """
    preset, resumed, init, named = (
        last_value(argv, f"--{flag}") or "" for flag in ("preset", "resume", "init", "config")
    )
    file = read_config_file(named) if named else None
    default, source = begun_from(framework, preset=preset, resume=resumed, init=init, file=file)
    command = parse(
        TrainCommand,
        argv,
        default=TrainCommand(**{field.name: getattr(default, field.name) for field in dataclasses.fields(default)}),
        prog=prog or f"train_{framework}.py",
        description=f"Train with {FRAMEWORKS[framework]}. Presets: {', '.join(PRESETS)}. "
        f"The defaults below are {source}.\n\n{EVERYDAY}",
    )
    config = command.run_config()
    if init and not resumed:
        config = dataclasses.replace(config, init=default.init)  # with the commit, if it is the Hub's
    return ready(config, framework)
