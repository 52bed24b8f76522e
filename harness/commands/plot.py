"""`python -m harness.commands.plot RUN [RUN ...] --out PNG` overlays runs, JAX beside torch."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from harness.cli import called_as, end, parse
from harness.plot import plot_runs
from recipe.config import require


@dataclass(frozen=True)
class PlotConfig:
    """What to plot."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders."""
    out: str = "runs.png"
    """PNG file to write."""


def main() -> None:
    """`python -m harness.commands.plot RUN [RUN ...] --out PNG`."""
    prog = called_as("python -m harness.commands.plot")
    config = parse(PlotConfig, sys.argv[1:], prog=prog, description="Overlay runs in one picture.")
    require(len(config.runs) > 0, "no run folder is given; name at least one, e.g. runs/tiny-jax.")
    plot_runs(list(config.runs), config.out)
    print(config.out)


if __name__ == "__main__":
    end(main)
