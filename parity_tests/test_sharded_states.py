"""States of a mesh by Orbax: written on one mesh, read on others and on none, gathered for both frameworks.

That they are whole or absent whatever dies is in tests/test_sharded.py, by a trainer of plain NumPy.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import torch_ref.train
from harness import loop
from harness.resuming import newest_sound
from harness.runlog import read_metrics
from harness.state import ARRAYS, SHARDED, SLOTS, load_state, sharded_folder, state_folders
from jax_impl import sharded_states
from jax_impl.gather import GatherCommand, gather, main
from jax_impl.train import Trainer
from parity_tests.compare.tolerance import SAFETY, check
from parity_tests.states_on_meshes import READ_ON, a_config, begun, differing, of, read_again, save
from parity_tests.test_training import ROUNDINGS
from recipe.config import RunConfig, UserError
from recipe.contract import UNIT_ROUNDOFF
from recipe.lock import fcntl, locked
from recipe.params import slot_shapes
from tests.survival import SMALL, write_corpus

ROOT = Path(__file__).resolve().parents[1]


def in_a_process(devices: int, *arguments: str, expected: int = 0) -> str:
    """What `python -m parity_tests.states_on_meshes` says on so many devices."""
    # Machine code need not be good; the arrays are the same.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    # The first import plants the bug that `parity_tests.mutants` asks for, if it does.
    run = "import parity_tests.mutation, runpy, sys; sys.argv.pop(0); "
    run += "runpy.run_module('parity_tests.states_on_meshes', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", run, "states_on_meshes", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    """All cases, run once in a process of eight devices."""
    folder = tmp_path_factory.mktemp("states")
    in_a_process(8, str(folder))
    return json.loads((folder / "facts.json").read_text(encoding="utf-8")) | {"folder": folder}


PAIRS = [(written, read) for written, meshes in READ_ON.items() for read in meshes]


@pytest.mark.parametrize(("written", "read"), PAIRS)
def test_any_mesh_reads_what_another_wrote_bit_for_bit_and_lays_it_as_its_own(facts, written, read):
    assert facts["devices"] == 8
    expected = {"differing": [], "misplaced": [], "counts": [5, 1], "counted": [5]}
    assert facts["written on"][written][read] == expected


@pytest.mark.parametrize("written", READ_ON)
def test_weights_and_slots_are_read_one_at_a_time_and_best_is_as_gathered(facts, written):
    assert facts["written on"][written]["one at a time"] == facts["written on"][written]["best"] == []


def test_the_tree_is_the_same_whatever_the_mesh_and_orbax_alone_opens_it(facts):
    trees = [facts["written on"][mesh]["tree"] for mesh in READ_ON]
    assert trees[0] == trees[1]
    model = a_config(Path("run"), "").model
    slots = [name.partition(".") for name in slot_shapes(model)]
    assert {path.partition("/")[0] for path in trees[0]} == {"weights", *SLOTS}
    assert sorted(path for path in trees[0] if not path.startswith("weights/")) == sorted(
        f"{slot}/{name.removesuffix('.weight')}.kernel" if slot == "mu" else f"{slot}/{name}" for slot, _, name in slots
    )


def test_the_gathered_state_has_every_bit_and_all_that_was_said(facts):
    gathered = facts["gathered"]
    assert gathered["differing"] == gathered["said"] == []
    assert [Path(path).name for path in gathered["again"]] == ["last", "last"]


def test_every_file_with_another_bit_is_named(facts):
    said = facts["flipped"]["said"]
    assert any("/d/" in name for name in said), "how many files there are, TensorStore decides"
    assert all(f"{name} is not what was written" in line for name, line in said.items())
    assert facts["flipped"]["whole"] == []


def test_a_state_comes_from_the_hosts_memory_where_devices_have_no_room(facts):
    assert facts["from host memory"] == []


def test_a_snapshot_is_not_touched_by_later_updates(facts):
    assert facts["later"] == []


def test_torch_has_the_same_arrays(facts):
    state = load_state(facts["folder"] / "data=2,fsdp=4" / "last")
    trainer = torch_ref.train.Trainer(dataclasses.replace(state.config, mesh=""), state.weights)
    trainer.restore(state.slots, state.updates, state.skipped)
    assert differing(of(trainer), of(begun(dataclasses.replace(state.config, mesh=""))[0])) == []
    assert trainer.counts() == (5, 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> RunConfig:
    """A run on a mesh of one device that was killed before its sixth update, with states of the second and fourth."""
    folder = tmp_path_factory.mktemp("runs")
    config = a_config(folder / "run", "data=1")
    data = dataclasses.replace(config.data, corpus=str(corpus), bpe_vocab_size=264, validation_tokens=64)
    precision = dataclasses.replace(config.precision, params="float64", compute="float64", newton_schulz="float64")
    config = dataclasses.replace(
        config, steps=8, save_every=2, eval_every=4, log_every=1, accumulation=1, data=data, sample_tokens=0,
        precision=precision, model=dataclasses.replace(config.model, vocab_size=384, num_hidden_layers=1),
    )  # fmt: skip

    class Killed(BaseException):
        pass

    class Mortal(Trainer):
        def step(self, inputs_ABT, targets_ABT):
            if sum(self.counts()) == 5:
                raise Killed
            return super().step(inputs_ABT, targets_ABT)

    with pytest.raises(Killed):
        loop.run(config, framework="jax", make_trainer=Mortal)
    return config


@pytest.fixture
def copy(run, tmp_path) -> RunConfig:
    """A copy of it, to be gone on with."""
    shutil.copytree(run.out, tmp_path / "run")
    return dataclasses.replace(run, out=str(tmp_path / "run"), resume=str(tmp_path / "run"))


def losses(folder: str | Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if record["kind"] in ("train", "validation")]


def test_torch_goes_on_after_one_command(copy, monkeypatch, capsys):
    without = dataclasses.replace(copy, mesh="")
    with pytest.raises(UserError, match=re.escape(f"python -m jax_impl.gather {copy.out} once")):
        loop.run(without, framework="torch", make_trainer=torch_ref.train.Trainer)
    monkeypatch.setattr(sys, "argv", ["gather", copy.out])
    main()
    assert capsys.readouterr().out.splitlines()[-1] == f"{copy.out}/last"
    loop.run(without, framework="torch", make_trainer=torch_ref.train.Trainer)
    assert [folder.name for folder in state_folders(Path(copy.out))] == ["last", "0000000006"]
    assert len(losses(copy.out)) == 11


def apart_after(updates: int) -> float:
    """How far two orders of sums may have parted: the roundings of so many updates, none of them amplified."""
    return SAFETY * ROUNDINGS * updates * UNIT_ROUNDOFF["float64"]


@pytest.mark.slow
def test_torch_goes_on_as_jax_does(copy, tmp_path):
    without = dataclasses.replace(copy, mesh="")
    shutil.copytree(copy.out, tmp_path / "other")
    gather(GatherCommand(copy.out))
    loop.run(without, framework="torch", make_trainer=torch_ref.train.Trainer)
    other = dataclasses.replace(without, out=str(tmp_path / "other"), resume=str(tmp_path / "other"))
    loop.run(other, framework="jax", make_trainer=Trainer)
    assert not (Path(other.out) / SHARDED).exists(), "states of no mesh took the place of the mesh's"
    check("losses", np.array(losses(copy.out)), np.array(losses(other.out)), apart_after(4))


def test_the_newest_of_both_kinds_is_gone_on_from_and_a_damaged_one_is_passed_over(copy, capsys):
    state = sharded_folder(copy.out, 4)
    gathered = gather(GatherCommand(copy.out))
    data = next(path for path in (state / ARRAYS).rglob("d/*") if path.stat().st_size > 1000)
    data.write_bytes(data.read_bytes()[:-1] + b"\0")
    (gathered / "model.safetensors").write_bytes(b"")

    def load(folder: Path):
        state = load_state(folder)
        weights, slots = Trainer.read_sharded(state.arrays, state.config) if state.arrays else (state.weights, {})
        return dataclasses.replace(state, weights=weights, slots=slots)

    def restore(state):
        trainer = Trainer(copy, state.weights)
        trainer.restore(state.slots, state.updates, state.skipped)
        return trainer

    trainer, state = newest_sound(copy, load, restore)
    assert trainer.counts() == (2, 0) and state.position == 2
    warned = [line for line in capsys.readouterr().err.splitlines() if "no state to go on from" in line]
    assert len(warned) == 2 and all("after step 2" in line for line in warned) and data.name in warned[1]


def refusal(command: GatherCommand) -> str:
    with pytest.raises(UserError) as refused:
        gather(command)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_cannot_be_gathered_is_refused_and_nothing_is_written(copy, tmp_path):
    before = sorted(Path(copy.out).rglob("*"))
    assert "is not a folder; name a run folder" in refusal(GatherCommand(f"{copy.out}/nowhere"))
    line = refusal(GatherCommand(copy.out, position=3))
    assert "no state of a mesh after step 3; choose from 4, 2." in line
    line = refusal(GatherCommand(copy.out, position=2))
    assert (
        "has a newer state than that of step 2, in" in line and f"gather {copy.out} {copy.out}-2 --position 2" in line
    )
    assert "is there already" in refusal(GatherCommand(copy.out, str(tmp_path)))
    if fcntl is not None:
        with locked(Path(copy.out)):
            assert "is being trained by another process" in refusal(GatherCommand(copy.out))
    assert sorted(Path(copy.out).rglob("*")) == before


def test_an_older_state_is_gathered_elsewhere(copy, tmp_path):
    out = gather(GatherCommand(copy.out, str(tmp_path / "two"), position=2))
    assert out == tmp_path / "two" and load_state(out).position == 2
    assert not (Path(copy.out) / "last").exists()


def test_a_process_hears_of_damage_that_another_found(copy, monkeypatch):
    """Of two processes, of which this one finds nothing wrong."""
    state = sharded_folder(copy.out, 4)
    heard = []

    def gathered(mine):
        heard.append(bool(mine))
        return np.array([mine, True])

    monkeypatch.setattr(sharded_states.jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharded_states.multihost_utils, "process_allgather", gathered)
    with pytest.raises(sharded_states.Damaged, match="as process 1 says"):
        sharded_states.check_together(state)
    assert heard == [False]


def test_the_systems_error_is_told_from_tensorstores_words(monkeypatch, tmp_path):
    def full(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Failed to write "x": No space left on device [os_error_code=28]')

    def bug(*_, **__):
        raise ValueError("of another kind")

    config = a_config(tmp_path / "full", "data=1")
    trainer = begun(config)[0]
    monkeypatch.setattr(sharded_states.ocp.Checkpointer, "save", full)
    with pytest.raises(OSError) as said:
        save(config, trainer)
    assert said.value.errno == 28 and str(tmp_path) in said.value.filename
    monkeypatch.setattr(sharded_states.ocp.Checkpointer, "save", bug)
    with pytest.raises(ValueError, match="another kind"):
        save(config, trainer)
    assert state_folders(tmp_path / "full") == []


FLAGS = [
    *SMALL,
    "--batch_size",
    "8",
    "--model.dropout",
    "0.0",
    "--steps",
    "12",
    "--save_every",
    "2",
    "--eval_every",
    "4",
]
FLAGS += ["--log_every", "1", "--precision.params", "float64", "--precision.compute", "float64"]
FLAGS += ["--precision.newton_schulz", "float64"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_goes_from_1_to_8_to_4_to_1_devices(tmp_path, corpus):
    """Each time killed and gone on with on another mesh; and on the same one, bit for bit."""

    def part(run: Path, devices: int, mesh: str, stop: int) -> None:
        given = ["--resume", str(run)] if run.exists() else [*FLAGS, "--data.corpus", str(corpus), "--out", str(run)]
        in_a_process(devices, str(stop), *given, "--mesh", mesh, expected=9 if stop else 0)

    whole, moved, same = (tmp_path / name for name in ("whole", "moved", "same"))
    part(whole, 8, "data=2,fsdp=4", 0)
    for stop in (4, 8, 11, 0):
        part(same, 8, "data=2,fsdp=4", stop)
    assert losses(same) == losses(whole)
    for devices, mesh, stop in [(1, "", 4), (8, "fsdp=8", 7), (4, "data=2,fsdp=2", 10), (1, "", 0)]:
        part(moved, devices, mesh, stop)
    allowance = apart_after(12)
    check("losses", np.array(losses(moved)), np.array(losses(whole)), allowance)
    one, other = load_state(moved / "last"), load_state(state_folders(whole)[0])
    read = read_again(dataclasses.replace(other.config, mesh="", out=str(tmp_path / "read")), other)
    assert one.position == other.position == 12
    for part_of, arrays in of(read).items():
        for name, array in arrays.items():
            given = one.weights[name] if part_of == "weights" else one.slots[part_of][name]
            check(f"{part_of} {name}", given, array, allowance)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_gathering_holds_a_few_tensors_and_not_the_state(tmp_path):
    """One is read, transposed and written at a time, and Orbax's buffers hold some more."""
    in_a_process(8, "memory", str(tmp_path))
    largest, total, growth = json.loads(in_a_process(1, "memory", str(tmp_path)))
    print(f"\nlargest {largest:,}, state {total:,}, grown by {growth:,} bytes")
    assert 12 * largest < total and growth < total / 2
