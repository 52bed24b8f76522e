"""JAX from Python: `from jax_impl.api import load, make_config, train`; docs/python.md shows it.

Twin: `torch_ref/api.py`.
"""

from pathlib import Path
from typing import Any, Literal

from harness.api import LanguageModel, configuration, open_model
from harness.configure import ready
from harness.failures import RunFailed
from harness.result import RunResult
from jax_impl import generate
from jax_impl import train as training
from recipe.config import RunConfig, UserError

__all__ = ["LanguageModel", "RunConfig", "RunFailed", "RunResult", "UserError", "load", "make_config", "train"]


def make_config(preset: str = "", *, file: str | Path = "", **changes: Any) -> RunConfig:
    """A run's configuration: a preset's (tiny if none is named) with these fields changed.

    Names are those of `RunConfig`, that is of the flags; of a section give the fields to change, as in
    `model={"dropout": 0.1}`. `file` is a run.json, or fields in TOML, YAML or JSON as the flag --config has them, over
    the preset and under the other arguments. `resume="runs/mine"` begins with that run's configuration instead,
    `init=FOLDER` with the model of those weights. Raises `UserError`, with the nearest name for an unknown one.
    """
    return configuration("jax", preset, str(file), changes)


def train(config: RunConfig) -> RunResult:
    """Train as configured and return what it came to: losses, best, folder.

    The run folder is `config.out`, which must be free, or the first free of runs/PRESET-jax, -2, -3 ...
    Raises `UserError` or `FileExistsError`, before anything is written, for what cannot be; `RunFailed` if the run came
    to nothing; KeyboardInterrupt after Ctrl-C, which ends it after the update under way, its state saved. Each of them
    is one line that says how to go on.
    """
    return training.train(ready(config, "jax"))


def load(name: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32") -> LanguageModel:
    """The model of a run folder (its best weights), of a Hugging Face weights folder or name, computing in `dtype`.

    Raises `UserError` for a folder that is none, or whose files do not hold what they should.
    """
    return open_model(name, generate.make_generator, dtype)
