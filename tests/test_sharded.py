"""States of a mesh, by a trainer of plain NumPy: whole or absent, found by position among the others, passed over where
they are damaged. With Orbax and devices: parity_tests/test_sharded_states.py."""

import dataclasses
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from harness import loop
from harness.commands import checkpoint
from harness.folders import load_folder, save_folder
from harness.manifest import RUN, check_files, manifest_of
from harness.preflight import is_begun, is_taken
from harness.sharded import save_gathered, save_sharded
from harness.state import (
    ARRAYS,
    SHARDED,
    TrainingState,
    clear_scratch,
    keep_newest,
    load_state,
    save_state,
    sharded_folder,
    state_folders,
)
from harness.tensors import Damaged
from recipe.config import RunConfig, UserError
from recipe.durable import fcntl
from recipe.params import init_params, slot_shapes
from recipe.tokenizer import load_tokenizer, train_bpe
from tests import test_every_moment, test_power
from tests.mesh_toy import MeshToy, ToyShards, assert_same_runs, newest, read_sharded, train
from tests.power import Power
from tests.test_every_moment import REAPER
from tests.test_every_moment import unwatched as unwatched
from tests.test_loop import Killed, Toy, config, elsewhere, kill_at, no_picture, resumed  # noqa: F401
from tests.test_power import root as root


def folders(run: str | Path) -> list[str]:
    """Its states, newest first."""
    return [str(path.relative_to(run)) for path in state_folders(Path(run))]


def flip(file: Path) -> None:
    """Another bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("position", [5, 8])
@pytest.mark.parametrize(("before", "after"), [(MeshToy, MeshToy), (Toy, MeshToy), (MeshToy, Toy)])
def test_a_killed_run_goes_on_whether_the_mesh_is_the_same_or_there_is_none(position, before, after, config, tmp_path):  # noqa: F811
    train(elsewhere(config, tmp_path), kind=Toy)
    with pytest.raises(Killed):
        train(config, kill_at(position), kind=before)
    train(resumed(config), kind=after)
    assert_same_runs(config.out, str(tmp_path / "other"))
    assert len(folders(config.out)) == config.keep


def test_the_states_of_a_mesh_are_kept_by_number_and_have_hashes_of_all(config):  # noqa: F811
    train(dataclasses.replace(config, keep=3))
    assert folders(config.out) == [f"{SHARDED}/{position:010d}" for position in (12, 9, 6)]
    state = sharded_folder(config.out, 12)
    files = {path.relative_to(state).as_posix() for path in state.rglob("*") if path.is_file()}
    known = manifest_of(state)
    assert known.keys() == files - {RUN} and load_tokenizer(state).vocab_size <= config.model.vocab_size
    for name, values in known.items():
        assert (values.get("size") == (state / name).stat().st_size) == name.startswith(f"{ARRAYS}/")
    assert load_state(state).about["sharded"] is True


@pytest.mark.parametrize("what", ["a bit of an array", "an array's end", "an array", RUN, "tokenizer.json"])
def test_a_damaged_state_is_said_and_passed_over(what, config, tmp_path, capsys):  # noqa: F811
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(8))
    state = sharded_folder(config.out, 6)
    array = state / ARRAYS / "weights-0"
    if what == "an array's end":
        array.write_bytes(array.read_bytes()[:-1])
        said = f"it has {array.stat().st_size:,} bytes of {array.stat().st_size + 1:,}"
    elif what == "an array":
        array.unlink()
        said = "is missing"
    else:
        flip(array if "bit" in what else state / what)
        said = "is not JSON" if what == RUN else "it has another SHA-256"
    train(resumed(config))
    assert_same_runs(config.out, str(tmp_path / "other"))
    warned = [line for line in capsys.readouterr().err.splitlines() if "no state to go on from" in line]
    assert len(warned) == 1 and "after step 3" in warned[0] and (what == RUN or said in warned[0])
    assert (Path(config.out) / "0000000006-damaged-1" / ARRAYS).is_dir()


def test_a_framework_that_cannot_read_the_newest_state_says_what_to_do_and_touches_nothing(config):  # noqa: F811
    with pytest.raises(Killed):
        train(config, kill_at(8))
    before = sorted(Path(config.out).rglob("*"))
    with pytest.raises(UserError) as refused:
        loop.run(resumed(config), framework="torch", make_trainer=Toy)
    line = str(refused.value)
    assert "\n" not in line and f"python -m jax_impl.gather {config.out} once" in line and "after step 6" in line
    assert sorted(Path(config.out).rglob("*")) == before


def test_a_framework_that_cannot_read_the_newest_state_goes_on_from_no_older_one(config):  # noqa: F811
    with pytest.raises(Killed):
        train(config, kill_at(5), kind=Toy)
    with pytest.raises(Killed):
        train(resumed(config), kill_at(8))
    assert folders(config.out) == [f"{SHARDED}/0000000006", "last"]
    with pytest.raises(UserError, match="after step 6, is a mesh's"):
        loop.run(resumed(config), framework="torch", make_trainer=Toy)


def test_inspect_looks_at_every_byte_of_a_meshs_states_too(config, monkeypatch, capsys):  # noqa: F811
    train(config)
    states = [sharded_folder(config.out, position) for position in (12, 9)]
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", config.out])
    checkpoint.main()
    said = capsys.readouterr().out
    assert said.count("sound      6 files") == 1 and said.count("sound      4 files") == 2
    size = sum(path.stat().st_size for path in (states[0] / ARRAYS).iterdir())
    assert f"arrays     of mesh {config.mesh}, {size:,} bytes, 2 file(s)" in said
    assert "state      step 12 of 12: 11 updates, 1 skipped" in said and "step 9 of 12" in said
    flip(states[1] / ARRAYS / "slots-0")
    with pytest.raises(UserError, match="slots-0 is not what was written"):
        checkpoint.main()
    monkeypatch.setattr(sys, "argv", ["checkpoint", "inspect", str(states[0])])
    checkpoint.main()


def gathered(run: str, position: int) -> None:
    """Write last/ from the mesh's state, as jax_impl.gather does."""
    chosen = sharded_folder(run, position)
    state = load_state(chosen)
    weights, slots = read_sharded(state.arrays, state.config)
    save_state(Path(run) / "last", dataclasses.replace(state, weights=weights, slots=slots), load_tokenizer(chosen), {})


def test_of_two_states_of_one_position_last_comes_first_and_both_are_one(config, tmp_path):  # noqa: F811
    train(elsewhere(config, tmp_path), kind=Toy)
    with pytest.raises(Killed):
        train(config, kill_at(8))
    gathered(config.out, 6)
    assert folders(config.out) == ["last", f"{SHARDED}/0000000006", f"{SHARDED}/0000000003"]
    keep_newest(Path(config.out), 2)
    assert len(folders(config.out)) == 3
    loop.run(resumed(config), framework="torch", make_trainer=Toy)
    assert_same_runs(config.out, str(tmp_path / "other"))
    assert folders(config.out) == ["last", "earlier/0000000009"] and not (Path(config.out) / SHARDED).exists()


def test_an_older_last_goes_when_a_mesh_has_newer_states(config):  # noqa: F811
    with pytest.raises(Killed):
        train(config, kill_at(5), kind=Toy)
    train(resumed(config))
    assert folders(config.out) == [f"{SHARDED}/0000000012", f"{SHARDED}/0000000009"]
    assert not (Path(config.out) / "last").exists()


def test_a_last_that_cannot_be_read_is_looked_at_first(config):  # noqa: F811
    train(config)
    last = Path(config.out) / "last"
    last.mkdir()
    (last / RUN).write_text("{}", encoding="utf-8")
    (Path(config.out) / SHARDED / "7th").mkdir()
    assert folders(config.out)[0] == "last" and folders(config.out)[-1] == f"{SHARDED}/7th"


@pytest.mark.parametrize("there", [False, True])
def test_a_state_that_was_set_aside_while_it_was_replaced_is_put_back(there, config):  # noqa: F811
    train(config)
    state = sharded_folder(config.out, 12)
    aside = state.with_name(f".{state.name}-old")
    shutil.copytree(state, aside)
    if not there:
        shutil.rmtree(state)
        assert folders(config.out)[0] == f"{SHARDED}/{aside.name}"
    clear_scratch(Path(config.out))
    assert folders(config.out) == [f"{SHARDED}/0000000012", f"{SHARDED}/0000000009"] and not aside.exists()


def test_a_state_of_the_same_position_is_replaced(config):  # noqa: F811
    train(config)
    state = sharded_folder(config.out, 12)
    loaded = load_state(state)
    weights, slots = read_sharded(loaded.arrays, loaded.config)
    ones = {name: np.ones_like(weights[name]) for name in weights}
    save_sharded(Path(config.out), loaded, ToyShards(ones, slots), load_tokenizer(state), {}, save_best=None)
    assert (newest(config.out).weights["model.norm.weight"] == 1).all()
    assert not list(state.parent.glob(".*"))


def test_a_run_killed_before_its_first_state_is_named_is_begun_again(config, tmp_path):  # noqa: F811
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(1))
    (Path(config.out) / SHARDED / ".0000000003-new" / ARRAYS).mkdir(parents=True)
    assert is_begun(Path(config.out)) and not is_taken(Path(config.out))
    train(config)
    assert_same_runs(config.out, str(tmp_path / "other"))
    assert is_taken(Path(config.out)) and not is_begun(Path(config.out))
    assert is_taken(Path(config.out) / RUN)


def together(count: int, call) -> list[BaseException | None]:
    """`call(index, wait)` in a thread for each process; what each of them raised."""
    barrier, raised = threading.Barrier(count, timeout=60), [None] * count

    def work(index: int) -> None:
        try:
            call(index, lambda moment: barrier.wait())
        except BaseException as error:
            raised[index] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def a_state(config: RunConfig) -> TrainingState:  # noqa: F811
    slots: dict[str, dict] = {}
    for number, (name, shape) in enumerate(slot_shapes(config.model).items()):
        slot, _, parameter = name.partition(".")
        slots.setdefault(slot, {})[parameter] = np.full(shape, number, np.float32)
    return TrainingState(config, init_params(config.model, 0), slots, 4, 1, 2.0, "text")


@pytest.mark.parametrize("both", [True, False], ids=["with a state", "alone"])
def test_of_several_processes_each_writes_its_part_and_the_chief_the_rest(both, config, tmp_path):  # noqa: F811
    """The best weights, which none has whole, are read back by the chief, one at a time."""
    state, tokenizer = a_state(config), train_bpe(["a quick brown fox"], 260)
    run, seen = tmp_path / "run", []

    def save_best(weights) -> None:
        seen.append(type(weights).__name__)
        save_folder(run / "best", config.model, weights, tokenizer, about={"step": 5})

    def save(index: int, wait) -> None:
        shards = ToyShards(state.weights, state.slots, index, 3, wait)
        mine = dataclasses.replace(state, weights={})  # no process has them whole
        if both:
            save_sharded(run, mine, shards, tokenizer, {"framework": "toy"}, save_best=save_best)
        else:
            save_gathered(run, mine.weights, shards, save_best)

    assert together(3, save) == [None] * 3
    assert seen == ["LazyArrays"]
    for name, weight in load_folder(run / "best")[1].items():
        np.testing.assert_array_equal(weight, state.weights[name])
    assert {path.name for path in run.iterdir()} == ({"best", SHARDED} if both else {"best"})
    if both:
        folder = sharded_folder(run, 5)
        assert len(check_files(folder, tensors=True)) == len([path for path in folder.rglob("*") if path.is_file()]) - 1
        parts = [check_files(folder, tensors=True, part=(index, 3)) for index in range(3)]
        assert parts[0] == parts[1] == parts[2] == manifest_of(folder)
        assert all("size" in known for name, known in parts[0].items() if name.startswith(ARRAYS))
        assert not list(folder.glob("[0-9].json")) and load_state(folder).about["framework"] == "toy"
        found = newest(run)
        assert all(
            (found.slots[slot][name] == x).all() for slot in state.slots for name, x in state.slots[slot].items()
        )


def test_a_share_of_the_files_is_looked_at_by_each(config):  # noqa: F811
    train(config)
    folder = sharded_folder(config.out, 12)
    flip(folder / ARRAYS / "weights-0")
    damaged = []
    for index in range(4):
        try:
            check_files(folder, tensors=True, part=(index, 4))
        except Damaged as error:
            damaged.append(str(error))
    assert len(damaged) == 1 and "weights-0" in damaged[0]


@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_of_several_processes_cannot_write_leaves_no_half(failing, config, tmp_path):  # noqa: F811
    state, tokenizer = a_state(config), train_bpe(["a quick brown fox"], 260)

    class Full(ToyShards):
        def write(self, folder, *, slots):
            if self.index == failing:
                raise OSError(28, "No space left on device")
            super().write(folder, slots=slots)

    def save(index: int, wait) -> None:
        shards = Full(state.weights, state.slots, index, 2, wait)
        save_sharded(tmp_path, state, shards, tokenizer, {}, save_best=None)

    raised = together(2, save)
    assert isinstance(raised[failing], OSError) and all(raised)
    assert state_folders(tmp_path) == [] and not list((tmp_path / SHARDED).iterdir())


def test_a_save_to_which_no_other_process_comes_leaves_no_folder(config, tmp_path):  # noqa: F811
    def wait(*_: object) -> None:
        raise RuntimeError("nobody came")

    state, tokenizer = a_state(config), train_bpe(["a quick brown fox"], 260)
    with pytest.raises(RuntimeError, match="nobody came"):
        save_sharded(tmp_path, state, ToyShards(state.weights, state.slots, 0, 2, wait), tokenizer, {}, save_best=None)
    assert not list((tmp_path / SHARDED).iterdir())


@pytest.fixture
def on_a_mesh(monkeypatch):
    """The tests of every moment and of power loss, with this trainer."""
    for module in (test_every_moment, test_power):
        monkeypatch.setattr(module, "train", train)
        monkeypatch.setattr(module, "assert_same_runs", assert_same_runs)


@pytest.mark.usefixtures("on_a_mesh")
@pytest.mark.parametrize("stride", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_dies_at_any_file_operation_is_resumed_bit_for_bit(stride, config, tmp_path):  # noqa: F811
    """Death as tests/test_every_moment.py has it, at every `stride`-th operation."""
    run, config = Path(config.out), dataclasses.replace(config, steps=6, eval_every=2, save_every=2)
    train(elsewhere(config, tmp_path))
    REAPER.watch(run)
    train(config)
    unsaved, moments = 0, range(0, REAPER.seen, stride)
    for moment in moments:
        REAPER.watch(None)
        shutil.rmtree(run, ignore_errors=True)
        REAPER.watch(run, moment)
        with pytest.raises(Killed):
            train(config)
        REAPER.watch(None)
        if not state_folders(run):
            unsaved += 1
            if run.is_dir():
                assert not is_taken(run), moment
            train(config)
        elif not (run / "loss.png").exists():
            train(resumed(config))
        assert_same_runs(str(run), str(tmp_path / "other"))
        assert {path.name for path in run.iterdir() if path.is_dir()} <= {"best", SHARDED, "best-undone-1"}, moment
        assert len(state_folders(run)) <= config.keep and not list(run.rglob(".*")), moment
    assert 0 < unsaved < len(moments)


DURABLE = pytest.mark.skipif(fcntl is None, reason="where no folder can be forced to disk, nothing is promised")


@DURABLE
def test_whenever_power_is_lost_during_a_save_one_of_two_states_is_whole(config, root, tmp_path):  # noqa: F811
    state, tokenizer = a_state(dataclasses.replace(config, keep=1)), train_bpe(["a quick brown fox"], 260)
    shards, run, found = ToyShards(state.weights, state.slots), root / "run", []
    save_sharded(run, state, shards, tokenizer, {}, save_best=None)
    with Power(root, tmp_path / "images") as power:
        save_sharded(run, dataclasses.replace(state, updates=9), shards, tokenizer, {}, save_best=None)
    for _, operation, assumption, image in power.images():
        shutil.rmtree(root)
        shutil.copytree(image, root)
        clear_scratch(run)
        sound = state_folders(run)
        assert sound, f"{operation} ({assumption})"
        assert len(check_files(sound[0], tensors=True)) == 4, f"{operation} ({assumption})"
        found.append(load_state(sound[0]).position)
        assert found[-1] == 10 if operation == "the end" else found[-1] in (5, 10), f"{operation} ({assumption})"
    assert set(found) == {5, 10}


@pytest.mark.usefixtures("on_a_mesh")
@DURABLE
@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 6])
def test_a_run_that_loses_power_goes_on_bit_for_bit(steps, config, root, tmp_path, capsys):  # noqa: F811
    config = dataclasses.replace(config, steps=steps, eval_every=2, save_every=1)
    train(elsewhere(config, tmp_path))
    config = dataclasses.replace(config, out=str(root / "run"))
    with Power(root, tmp_path / "images") as power:
        train(config)
    outcomes = test_power.check_images(power, config, tmp_path, capsys)
    assert {0, steps} <= set(outcomes)
