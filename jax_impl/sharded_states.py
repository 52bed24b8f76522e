"""States of a mesh on disk, by Orbax: each process writes its own shards, and any mesh reads them.

The tree is the same whatever the mesh, and `orbax.checkpoint.StandardCheckpointer` opens it: weights, mu, exp_avg and
exp_avg_sq, each by Flax path. What else belongs to a state, and that it is whole or absent, is `harness/sharded.py`.
"""

import errno
import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from harness.manifest import check_files
from harness.saving import LazyArrays
from harness.state import SLOTS
from harness.tensors import Damaged
from jax_impl.weights import Params, hf_shape, in_torch_layout, param_paths
from recipe.config import RunConfig
from recipe.params import param_specs, slot_shapes

WEIGHTS = "weights"
_NUMBERS = itertools.count()
"""Of the waits for each other, which all processes count alike."""


class StoredArrays(LazyArrays):
    """Weights or one slot of a state on disk, by Hugging Face name in torch's layout, each read when asked for.

    To put them on devices, `restore` reads what each process needs of them instead.
    """

    def __init__(
        self, folder: Path, part: str, shapes: Mapping[str, tuple[int, ...]], paths: Mapping[str, str]
    ) -> None:
        """`part` is a branch of the tree in `folder`, `paths` says each name's Flax path."""
        self.folder = folder
        reader = _checkpointer("read", processes={jax.process_index()})

        def read(name: str) -> np.ndarray:
            path = paths[name]
            # What is there says its dtype; the one given here is not asked for.
            leaf = {part: {path: jax.ShapeDtypeStruct(hf_shape(path, shapes[name]), np.float32)}}
            as_numpy = {part: {path: ocp.RestoreArgs(restore_type=np.ndarray)}}
            tree = reader.restore(folder, args=ocp.args.PyTreeRestore(leaf, as_numpy, partial_restore=True))
            return in_torch_layout(tree[part][path], path)

        super().__init__(shapes, read)


class Shards:
    """`harness.saving.Shards` of a copy of the weights and slots on a mesh."""

    def __init__(self, parts: Mapping[str, Params], config: RunConfig) -> None:
        """`parts` has weights and slots by Flax path."""
        self.index, self.count = jax.process_index(), jax.process_count()
        self._parts, self._config = {part: dict(arrays) for part, arrays in parts.items()}, config

    def write(self, folder: Path, *, slots: bool) -> None:
        tree = self._parts if slots else {WEIGHTS: self._parts[WEIGHTS]}
        saver = _checkpointer(f"save-{next(_NUMBERS)}")
        try:
            saver.save(folder.absolute(), args=ocp.args.PyTreeSave(tree), force=True)
        except ValueError as error:  # TensorStore's, with the system's error in words
            raise _of_the_system(error, folder) from error

    def read(self, folder: Path) -> tuple[StoredArrays, dict[str, StoredArrays]]:
        return read_sharded(folder, self._config)

    def wait(self, moment: str) -> None:
        name = f"{moment} {next(_NUMBERS)}"
        ocp.multihost.sync_global_processes(name, processes=set(range(self.count)))


def read_sharded(folder: Path, config: RunConfig) -> tuple[StoredArrays, dict[str, StoredArrays]]:
    """Weights and slots of such a tree, for this process alone; nothing is read yet."""
    folder, specs = folder.absolute(), param_specs(config.model)
    paths = {name: path for path, name in param_paths(config.model).items()}
    slots: dict[str, dict[str, tuple[int, ...]]] = {slot: {} for slot in SLOTS}
    for name, shape in slot_shapes(config.model).items():
        slot, _, parameter = name.partition(".")
        slots[slot][parameter] = shape
    weights = StoredArrays(folder, WEIGHTS, {name: spec.shape for name, spec in specs.items()}, paths)
    return weights, {slot: StoredArrays(folder, slot, shapes, paths) for slot, shapes in slots.items()}


def restore(folder: Path, targets: Mapping[str, Mapping[str, Any]]) -> dict[str, Params]:
    """The arrays of a tree, each as its target says, a ShapeDtypeStruct with a sharding on whatever mesh.

    Every process reads the parts that its own devices hold, after each has hashed a share of the files; Damaged, in all
    of them, if one file is not as it was written.
    """
    check_together(folder.parent)
    tree = {part: dict(leaves) for part, leaves in targets.items()}
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    return _checkpointer(f"restore-{next(_NUMBERS)}").restore(folder.absolute(), args=ocp.args.PyTreeRestore(tree, how))


def in_host_memory(parts: Mapping[str, Params]) -> dict[str, Params]:
    """A copy of each device's part in the memory of its host, waited for."""

    def copy(array: jax.Array) -> jax.Array:
        return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"), may_alias=False)

    return jax.block_until_ready(
        {part: {path: copy(x) for path, x in arrays.items()} for part, arrays in parts.items()}
    )


def check_together(state: Path) -> None:
    """Look at every byte of a state, each process at its share of the files; Damaged in all if one is in any."""
    index, count, found = jax.process_index(), jax.process_count(), None
    try:
        check_files(state, tensors=True, part=(index, count))
    except Damaged as error:
        found = error
    if count > 1:
        wrong = np.flatnonzero(multihost_utils.process_allgather(np.array(found is not None)))
        if found is None and len(wrong):
            found = Damaged(f"{state} is not what was written, as process {wrong[0]} says.")
    if found is not None:
        raise found


def _checkpointer(name: str, processes: Iterable[int] | None = None) -> ocp.Checkpointer:
    """Orbax's writer and reader, for this one use by all processes or those given.

    With the processes named they wait for each other by messages, not by a program on all devices, which must not be
    begun in a thread beside the updates.
    """
    active = set(range(jax.process_count()) if processes is None else processes)
    chief = 0 if processes is None else min(active)
    options = ocp.options.MultiprocessingOptions(
        primary_host=chief, active_processes=active, barrier_sync_key_prefix=name
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _of_the_system(error: ValueError, folder: Path) -> Exception:
    """The system's error that TensorStore says in words, as an OSError; else the error itself."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
        if f"{os.strerror(number)}" in str(error):
            return OSError(number, os.strerror(number), str(folder))
    return error
