"""`python -m jax_impl.gather RUN [OUT]` writes a mesh's state as the one that both frameworks read, RUN/last.

One tensor is in memory at a time. torch's `--resume RUN` and transformers' `from_pretrained("RUN/last")` work after it.
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from harness.cli import leave, parse, run
from harness.manifest import CHECKSUM, FILES
from harness.saving import LazyArrays
from harness.state import (
    SHARDED_FIELD,
    TrainingState,
    clear_scratch,
    find_state,
    load_state,
    place_of_last,
    read_run,
    run_values,
    save_state,
    sharded_folder,
    state_folders,
)
from harness.tensors import PATIENCE
from jax_impl.sharded_states import check_together, read_sharded
from recipe.config import require
from recipe.lock import locked
from recipe.tokenizer import load_tokenizer


@dataclass(frozen=True)
class GatherCommand:
    """What to gather."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = ""
    """Folder to write, which must not exist; RUN/last by default."""
    position: int | None = None
    """Of the state to gather; of the newest by default."""


def gather(command: GatherCommand) -> Path:
    """Write the state; the folder it is in. UserError, and nothing is written, if it cannot be had."""
    folder = Path(command.run)
    require(folder.is_dir(), f"{folder} is not a folder; name a run folder, e.g. runs/tiny-jax.")
    with locked(folder) as held:
        require(held is not False, f"{folder} is being trained by another process; wait for it, or stop it.")
        clear_scratch(folder)
        chosen, state = _chosen(folder, command.position)
        out = Path(command.out) if command.out else folder / "last"
        if command.out:
            require(not out.exists(), f"{out} is there already; name a folder that is not.")
        else:
            newest = find_state(folder, read_run)[0]
            require(
                state.position == _position(newest),
                f"{folder} has a newer state than that of step {state.position}, in {newest}, so it cannot be last/; "
                "name a folder for it, e.g. "
                f"python -m jax_impl.gather {folder} {folder}-{state.position} --position {state.position}.",
            )
        if state.arrays is None:
            return chosen
        check_together(chosen)
        weights, slots = read_sharded(state.arrays, state.config)
        count = len(weights) + sum(map(len, slots.values()))
        with tqdm(total=count, desc="gathering", unit="tensor", delay=PATIENCE, disable=None) as bar:
            counted = {slot: _counted(arrays, bar) for slot, arrays in slots.items()}
            whole = dataclasses.replace(state, weights=_counted(weights, bar), slots=counted)
            aside = None if command.out else place_of_last(folder, state.position, state.config.keep)
            save_state(out, whole, load_tokenizer(chosen), _about(state), keep_as=aside)
    return out


def _chosen(run: Path, position: int | None) -> tuple[Path, TrainingState]:
    """The newest state of a run that looks sound, or the mesh's of that position."""
    if position is None:
        return find_state(run, load_state)
    folder = sharded_folder(run, position)
    there = [_position(state) for state in state_folders(run) if state.parent == folder.parent]
    require(
        folder.is_dir(),
        f"{run} has no state of a mesh after step {position}; choose from {', '.join(map(str, there)) or 'none'}.",
    )
    return folder, load_state(folder)


def _position(folder: Path) -> int:
    return read_run(folder)[0]["position"]


def _about(state: TrainingState) -> dict:
    """Who trained it and on what, as the mesh's run.json says."""
    written = {*run_values(state, {}), SHARDED_FIELD, FILES, CHECKSUM}
    return {name: value for name, value in state.about.items() if name not in written}


def _counted(arrays: LazyArrays, bar: tqdm) -> Mapping[str, np.ndarray]:
    """The same arrays; each one that is read is counted."""

    def read(name: str) -> np.ndarray:
        array = arrays[name]
        bar.update()
        return array

    return LazyArrays(arrays.shapes, read)


def main() -> None:
    """`python -m jax_impl.gather RUN [OUT] [--position N]`."""
    description = "Write the state of a run on a mesh as one that both frameworks and transformers read."
    command = parse(GatherCommand, sys.argv[1:], prog="python -m jax_impl.gather", description=description)
    print(gather(command))


if __name__ == "__main__":
    leave(run(main))
