"""Saving a run that lies on a mesh: each process writes its own part of the arrays, the chief all else, and the name.

RUN/states/POSITION/ holds arrays/, in the format of the framework's own library and to be read on any mesh, and beside
it run.json and the tokenizer, as RUN/last/ does. All of it is written under another name, hashed and forced to disk;
then a rename makes it a state. All processes see one file system, and what another host has written is as safe there
from a power cut as that system makes a file that was closed.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.folders import put_in_place
from harness.manifest import RUN, as_json, file_hash, seal
from harness.saving import Shards
from harness.state import ARRAYS, SHARDED_FIELD, TrainingState, keep_newest, run_values, sharded_folder
from recipe.durable import make_folder, sync_below
from recipe.reading import read_json

Weights = Mapping[str, np.ndarray]


def save_sharded(
    run: Path,
    state: TrainingState,
    shards: Shards,
    tokenizer,
    about: Mapping[str, Any],
    *,
    save_best: Callable[[Weights], None] | None,
) -> None:
    """Write a state whole or not at all, then remove those that are too many; called by every process.

    `save_best`, if there is one, saves the weights elsewhere before the state has its name, and is the chief's alone.
    """
    folder = sharded_folder(run, state.position)
    scratch = folder.with_name(f".{folder.name}-new")
    save_best = _unless_at_hand(save_best, state.weights, shards)
    with _shared(scratch, shards):
        shards.write(scratch / ARRAYS, slots=True)
        hashes = _hashes(scratch, shards)
        if shards.index:
            return
        if save_best is not None:
            save_best(shards.read(scratch / ARRAYS)[0])
        tokenizer.save(scratch)
        seal(scratch, RUN, run_values(state, about) | {SHARDED_FIELD: True}, hashes)
        sync_below(scratch)
    put_in_place(scratch, folder)
    keep_newest(run, state.config.keep)


def save_gathered(run: Path, weights: Weights, shards: Shards, save_best: Callable[[Weights], None]) -> None:
    """Have the chief save the weights of a mesh, which no process has whole: they go by way of the disk.

    So no process holds more than one whole tensor, and nothing travels between devices, where updates go on.
    """
    if _unless_at_hand(save_best, weights, shards) is None:
        return
    scratch = run / ".best-arrays"
    with _shared(scratch, shards):
        shards.write(scratch, slots=False)
        if shards.index == 0:
            save_best(shards.read(scratch)[0])
    if shards.index == 0:
        shutil.rmtree(scratch)


def _unless_at_hand(
    save_best: Callable[[Weights], None] | None, weights: Weights, shards: Shards
) -> Callable[[Weights], None] | None:
    """Save the weights now if this is the only process, which has them all; else what is left for later."""
    if save_best is None or shards.count > 1:
        return save_best
    save_best(weights)
    return None


@contextlib.contextmanager
def _shared(folder: Path, shards: Shards) -> Iterator[None]:
    """A new folder for all processes, which the chief removes if the block does not end well."""
    if shards.index == 0:
        make_folder(folder.parent)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    try:
        shards.wait("a folder for the arrays")
        yield
    except BaseException:
        if shards.index == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _hashes(folder: Path, shards: Shards) -> dict[str, dict[str, Any]]:
    """What the manifest of a state keeps of its arrays' files, by name; each process reads a share of them."""
    files = sorted(path for path in (folder / ARRAYS).rglob("*") if path.is_file())
    hashes = {
        path.relative_to(folder).as_posix(): {"sha256": file_hash(path), "size": path.stat().st_size}
        for path in files[shards.index :: shards.count]
    }
    if shards.index:
        (folder / f"{shards.index}.json").write_bytes(as_json(hashes))
    shards.wait("hashes")
    for other in range(1, 1 if shards.index else shards.count):
        file = folder / f"{other}.json"
        hashes |= read_json(file)
        file.unlink()
    return hashes
