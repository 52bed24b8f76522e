"""A snapshot is the state of its update, bit for bit, whenever it is read and in whatever thread.

JAX's next update is given the buffers of the state, torch's changes them in place; a snapshot that were no copy would
be deleted in the one and of a later update in the other. What it should hold comes from a run without snapshots.
"""

import dataclasses
import errno
import functools
import gc
import os
import threading
import time

import jax
import numpy as np
import pytest
import torch

import jax_impl.train
import torch_ref.train
from harness.saving import NO_ROOM, Saver, Snapshot
from harness.state import SLOTS, TrainingState, load_state, save_state
from parity_tests.cases import AWKWARD, PRECISIONS, random_tokens, random_weights, run_config
from parity_tests.sides import x64
from recipe.params import slot_shapes

MODEL = dataclasses.replace(AWKWARD, num_hidden_layers=1)
SIDES = {"jax": jax_impl.train, "torch": torch_ref.train}
ROOM = {"jax": "has_room", "torch": "_has_room"}
BEFORE, AFTER = 2, 3
"""Updates before a snapshot is taken, and from then until it is read."""
ONCE = [(side, "float32") for side in SIDES]
KINDS = [
    *(*ONCE, ("torch", "float64"), ("torch", "bfloat16")),
    *(pytest.param(("jax", precision), marks=pytest.mark.slow) for precision in ("float64", "bfloat16")),
]
"""Framework and precision; those that JAX compiles another update for are slow."""


@functools.cache
def trainer_of(side: str, precision: str):
    """One for all tests of a kind, so that its update is compiled once."""
    before = jax.config.jax_enable_x64
    try:
        return SIDES[side].Trainer(run_config(MODEL, PRECISIONS[precision], accumulation=1), random_weights(MODEL))
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture
def kind(request):
    """A trainer before its first update; its framework and precision."""
    side, precision = request.param
    trainer = trainer_of(side, precision)
    with x64(PRECISIONS[precision]):
        trainer.state, trainer.room = SIDES[side].init_state(trainer.config, random_weights(MODEL)), None
        yield trainer, side, precision


def update(trainer, count: int) -> None:
    """So many updates, each on batches of its own."""
    shape = (trainer.config.accumulation, trainer.config.batch_size, trainer.config.sequence_length)
    for _ in range(count):
        position = sum(trainer.counts())
        tokens = [random_tokens(MODEL, *shape, seed=10 + 2 * position + which) for which in (0, 1)]
        trainer.step(*tokens)


def held(trainer) -> dict[str, np.ndarray]:
    """A copy of everything in a trainer; none of its buffers is referred to afterwards, so all may be donated."""
    arrays = {"weights": trainer.weights(), **trainer.slots()}
    return {f"{part}.{name}": np.array(array) for part in arrays for name, array in arrays[part].items()}


@functools.cache
def without_snapshots(side: str, precision: str) -> tuple[dict, dict]:
    """What a trainer holds after BEFORE updates and after AFTER more."""
    trainer = trainer_of(side, precision)
    trainer.state = SIDES[side].init_state(trainer.config, random_weights(MODEL))
    update(trainer, BEFORE)
    first = held(trainer)
    update(trainer, AFTER)
    return first, held(trainer)


def read(snapshot: Snapshot) -> dict[str, np.ndarray]:
    parts = {"weights": snapshot.weights, **snapshot.slots}
    return {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def in_a_thread(job) -> None:
    with Saver() as saver:
        saver.submit(job)


def assert_same_bits(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("room", [True, False], ids=["copied on the device", "no room, copied to the host"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join, indirect=True)
def test_a_snapshot_read_later_in_another_thread_is_the_state_of_its_update(kind, room, monkeypatch):
    trainer, side, precision = kind
    earlier, later = without_snapshots(side, precision)
    trainer.state = SIDES[side].init_state(trainer.config, random_weights(MODEL))
    asked = []
    monkeypatch.setattr(SIDES[side], ROOM[side], lambda size: (asked.append(size), room)[1])
    update(trainer, BEFORE)
    snapshot = trainer.snapshot()
    update(trainer, AFTER)
    found: dict[str, np.ndarray] = {}
    in_a_thread(lambda: found.update(read(snapshot)))
    assert len(asked) == 1 and (snapshot.updates, snapshot.skipped) == (BEFORE, 0)
    assert_same_bits(found, earlier)
    assert_same_bits(held(trainer), later)  # a snapshot changes no update
    assert any(found[name].tobytes() != later[name].tobytes() for name in found), "the updates change something"


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("kind", ONCE, ids="-".join, indirect=True)
def test_whether_there_is_room_is_asked_once_and_said_if_not(kind, room, monkeypatch, capsys):
    """The most memory in use so far would hold the first copy already when the second is made."""
    trainer, side, _ = kind
    answers = [room, not room]
    monkeypatch.setattr(SIDES[side], ROOM[side], lambda size: answers.pop(0))
    for _ in range(2):
        trainer.snapshot()
    assert answers == [not room]
    assert capsys.readouterr().err == ("" if room else NO_ROOM + "\n")


@pytest.mark.parametrize("kind", ONCE, ids="-".join, indirect=True)
def test_a_snapshot_knows_all_names_and_shapes_before_it_is_read(kind):
    trainer, _, _ = kind
    snapshot = trainer.snapshot()  # before the first update, too
    weights, slots = trainer.weights(), slot_shapes(MODEL)
    assert snapshot.weights.shapes == {name: array.shape for name, array in weights.items()}
    found = {f"{slot}.{name}": shape for slot in SLOTS for name, shape in snapshot.slots[slot].shapes.items()}
    assert found == slots
    assert not any(array.any() for slot in SLOTS for array in snapshot.slots[slot].values())


def live_bytes(side: str) -> int:
    """Bytes of all arrays of a framework that somebody can still reach."""
    gc.collect()
    if side == "jax":
        return sum(array.nbytes for array in jax.live_arrays())
    return sum(tensor.nbytes for tensor in gc.get_objects() if issubclass(type(tensor), torch.Tensor))


@pytest.mark.parametrize("kind", ONCE, ids="-".join, indirect=True)
def test_a_snapshot_is_gone_when_its_job_is_done(kind):
    """Also before anybody waits for the job, which may be hundreds of updates later."""
    trainer, side, _ = kind
    update(trainer, 1)
    size = sum(array.nbytes for array in read(trainer.snapshot()).values())
    before = live_bytes(side)
    reading, go_on = threading.Event(), threading.Event()

    def job(snapshot: Snapshot) -> None:
        read(snapshot)
        reading.set()
        go_on.wait()

    def save(saver: Saver) -> None:
        saver.submit(functools.partial(job, trainer.snapshot()))

    with Saver() as saver:
        save(saver)
        reading.wait()
        during = live_bytes(side)
        go_on.set()
        while saver.busy:
            time.sleep(0.001)
        after = live_bytes(side)
    assert (during - before, after - before) == (size, 0)


@pytest.mark.parametrize("kind", ONCE, ids="-".join, indirect=True)
def test_a_full_disk_is_raised_between_updates_and_the_state_before_stays(kind, tmp_path, monkeypatch):
    trainer, side, _ = kind

    def save(snapshot: Snapshot) -> None:
        counts = snapshot.updates, snapshot.skipped
        state = TrainingState(trainer.config, snapshot.weights, snapshot.slots, *counts, 0.5, "text")
        save_state(tmp_path / "last", state, tokenizer=None, about={})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Saver() as saver:
        for failing in (False, True):
            update(trainer, 1)
            monkeypatch.setattr("os.fsync", full if failing else os.fsync)
            snapshot = trainer.snapshot()
            job = functools.partial(save, snapshot)
            saver.submit(job)
            update(trainer, 1)
            if not failing:
                saver.wait()
        with pytest.raises(OSError, match="No space left on device"):
            while True:
                saver.look()
                update(trainer, 1)
        saver.look()  # once
    assert [path.name for path in tmp_path.iterdir()] == ["last"] and load_state(tmp_path / "last").updates == 1
    before, size = live_bytes(side), sum(array.nbytes for array in read(snapshot).values())
    del snapshot, job
    assert live_bytes(side) == before - size  # nor does the error hold it
