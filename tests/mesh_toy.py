"""The trainer of tests/test_loop.py as if it lay on a mesh: its states go to states/, as plain files."""

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from harness import loop
from harness.folders import load_folder
from harness.manifest import check_files
from harness.saving import LazyArrays, Snapshot, snapshot_of
from harness.state import SLOTS, TrainingState, load_state, state_folders
from recipe.config import RunConfig
from recipe.params import param_specs, slot_shapes
from tests.test_loop import Toy, records


class ToyShards:
    """Writes a file of weights and one of slots; of several processes each has the arrays whose turn it is."""

    def __init__(self, weights, slots, index: int = 0, count: int = 1, wait=lambda moment: None) -> None:
        self.index, self.count, self.wait = index, count, wait
        self.weights, self.slots = dict(weights), {slot: dict(arrays) for slot, arrays in slots.items()}

    def write(self, folder: Path, *, slots: bool) -> None:
        if self.index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self.wait("made")
        kinds = {"weights": list(self.weights.values())}
        if slots:
            kinds["slots"] = [array for arrays in self.slots.values() for array in arrays.values()]
        for kind, arrays in kinds.items():
            with open(folder / f"{kind}-{self.index}", "wb") as stream:
                stream.write(b"".join(array.tobytes() for array in arrays[self.index :: self.count]))
        self.wait("written")

    def read(self, folder: Path):
        slots = {slot: {name: x.shape for name, x in arrays.items()} for slot, arrays in self.slots.items()}
        return read_parts(folder, {name: x.shape for name, x in self.weights.items()}, slots)


def read_parts(folder: Path, weights: dict[str, tuple[int, ...]], slots: dict[str, dict[str, tuple[int, ...]]]):
    """Weights and slots of these shapes in a folder, as arrays that are read when asked for."""

    def arrays(kind: str, shapes: dict) -> dict[object, Callable[[], np.ndarray]]:
        files = sorted(folder.glob(f"{kind}-*"))
        ends, readers = [0] * len(files), {}
        for number, (name, shape) in enumerate(shapes.items()):
            turn = number % len(files)
            readers[name] = functools.partial(one, files[turn], ends[turn], shape)
            ends[turn] += 4 * math.prod(shape)
        return readers

    def one(file: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.fromfile(file, np.float32, math.prod(shape), offset=offset).reshape(shape)

    whole = {(slot, name): shape for slot, shapes in slots.items() for name, shape in shapes.items()}
    return LazyArrays(weights, lambda name: arrays("weights", weights)[name]()), {
        slot: LazyArrays(shapes, functools.partial(lambda slot, name: arrays("slots", whole)[slot, name](), slot))
        for slot, shapes in slots.items()
    }


def read_sharded(folder: Path, config: RunConfig):
    """As a trainer offers it, every byte looked at before the first array is."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {slot: {} for slot in SLOTS}
    for name, shape in slot_shapes(config.model).items():
        slot, _, parameter = name.partition(".")
        shapes[slot][parameter] = shape
    weights, slots = read_parts(folder, {name: spec.shape for name, spec in param_specs(config.model).items()}, shapes)

    def checked(name: str) -> np.ndarray:
        check_files(folder.parent, tensors=True)
        return weights[name]

    return LazyArrays(weights.shapes, checked), slots


class MeshToy(Toy):
    """That trainer, with snapshots for a mesh of one process."""

    def snapshot(self) -> Snapshot:
        plain = snapshot_of(_Plain(self))
        slots = {slot: dict(arrays) for slot, arrays in plain.slots.items()}
        return plain._replace(shards=ToyShards(dict(plain.weights), slots))


class _Plain:
    """A trainer without a snapshot of its own."""

    def __init__(self, trainer: Toy) -> None:
        self.weights, self.slots, self.counts = trainer.weights, trainer.slots, trainer.counts


def train(config: RunConfig, before_step=lambda position: None, kind: type[Toy] = MeshToy) -> Toy:
    """One run, or the rest of one; the trainer that did it."""
    made = []

    def make_trainer(*args):
        made.append(kind(*args))
        made[0].before_step = before_step
        return made[0]

    make_trainer.read_sharded = read_sharded
    loop.run(config, framework="toy", make_trainer=make_trainer)
    return made[0]


def newest(run: str | Path) -> TrainingState:
    """The newest state of a run, with its arrays."""
    state = load_state(state_folders(Path(run))[0])
    weights, slots = (state.weights, state.slots) if state.arrays is None else read_sharded(state.arrays, state.config)
    return TrainingState(
        state.config, dict(weights), {slot: dict(arrays) for slot, arrays in slots.items()}, state.updates,
        state.skipped, state.best, state.text,
    )  # fmt: skip


def assert_same_runs(a: str, b: str) -> None:
    """Records, newest states and best weights of two runs are equal, whatever kind of state they have."""
    assert records(a) == records(b)
    first, second = newest(a), newest(b)
    assert (first.updates, first.skipped, first.best) == (second.updates, second.skipped, second.best)
    for one, other in [(first.weights, second.weights), *((first.slots[s], second.slots[s]) for s in SLOTS)]:
        assert one.keys() == other.keys() != set()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)
    best_a, best_b = (load_folder(Path(run) / "best")[1] for run in (a, b))
    for name, weight in best_a.items():
        np.testing.assert_array_equal(weight, best_b[name], err_msg=name)
