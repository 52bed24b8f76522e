"""Two processes of two devices each, over loopback, that save together and are killed: the newest whole state is used.

All of it is slow; tests/test_sharded.py has the same by threads and plain files.
"""

import random
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.manifest import check_files, manifest_of
from harness.peers import LOST
from harness.records import readable_records
from harness.state import SHARDED, find_state, load_state, sharded_folder, state_folders
from tests.survival import SMALL, measured
from tests.test_processes import Group, start, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

STEPS = 24
FLAGS = [*SMALL, "--batch_size", "8", "--model.num_key_value_heads", "2", "--model.intermediate_size", "24"]
FLAGS += f"--model.dropout 0.0 --steps {STEPS} --log_every 1 --eval_every 3 --save_every 2".split()


class Pair(Group):
    """Two processes of one run, of two devices each, on a mesh of four."""

    def __init__(self, folder: Path, *flags: str, mesh: str = "data=2,fsdp=2") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs, self.run = [folder / f"process-{index}.txt" for index in range(2)], folder / "run"
        self.processes = [
            start(folder, log, *flags, "--mesh", mesh, "--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", "2",
                  "--hosts.index", str(index), "--hosts.heartbeat", "20", devices=2)
            for index, log in enumerate(self.logs)
        ]  # fmt: skip

    def said(self) -> str:
        return "\n".join(log.read_text(encoding="utf-8") for log in self.logs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder with a run that nothing disturbed, in whole/."""
    folder = tmp_path_factory.mktemp("processes")
    with Pair(folder, *FLAGS) as pair:
        assert pair.codes() == [0, 0], pair.said()
    (folder / "run").rename(folder / "whole")
    return folder


def test_each_process_has_written_its_own_part(whole):
    state = sharded_folder(whole / "whole", STEPS)
    written = [sum(f"ocdbt.process_{index}/d/" in name for name in manifest_of(state)) for index in (0, 1)]
    assert min(written) > 0
    assert check_files(state, tensors=True) and not list(state.glob("[0-9]*.json"))
    assert (whole / "whole" / "best" / "model.safetensors").is_file()


def saving(run: Path) -> Callable[[], bool]:
    """Whether a state is being written."""
    return lambda: any(True for _ in (run / SHARDED).glob(".[0-9]*-new"))


KILLED = {"worker": [1], "coordinator": [0], "all": [0, 1]}


@pytest.mark.parametrize("who", KILLED)
def test_whoever_is_killed_during_a_save_the_newest_whole_state_is_gone_on_from(who, whole):
    chance, run, flags, newest, met = random.Random(who), whole / "run", [], None, []
    shutil.rmtree(run, ignore_errors=True)
    for _ in range(4):
        flags = ["--resume", str(run)] if run.is_dir() and state_folders(run) else FLAGS
        with Pair(whole, *flags) as pair:
            for _ in range(chance.randint(1, 3)):
                wait_for(saving(run), *pair.processes)
                wait_for(lambda: not saving(run)(), *pair.processes)
            wait_for(saving(run), *pair.processes)
            wait_for(lambda: chance.random() < 0.2, *pair.processes)
            met.append(sorted(path.name for path in (run / SHARDED).glob(".*")))
            pair.send(signal.SIGKILL, *KILLED[who])
            assert set(pair.codes(but=KILLED[who])) <= {LOST}, pair.said()
        if newest is not None:
            assert f"\nresumed    after step {newest}:" in pair.said()
        if not (run.is_dir() and state_folders(run)):
            continue
        folder, state = find_state(run, load_state)
        assert newest is None or state.position >= newest
        newest = state.position
        check_files(folder, tensors=True)
        logged = {record["step"] for record in readable_records(run) if record["kind"] == "train"}
        assert set(range(1, newest + 1)) <= logged, "no record before the state is lost"
    with Pair(whole, "--resume", str(run)) as pair:
        assert pair.codes() == [0, 0], pair.said()
    print(f"\n{who} killed while there were {met}; ended from step {newest}")
    assert f"\nresumed    after step {newest}:" in pair.said()
    assert measured(run) == measured(whole / "whole")
    assert [path.name for path in state_folders(run)] == [path.name for path in state_folders(whole / "whole")]
    assert not list(run.rglob(".*"))
    one = start(whole, whole / "one.txt", "--resume", str(run), "--mesh", "", devices=1)
    assert one.wait(500) == 2 and "is finished" in (whole / "one.txt").read_text(encoding="utf-8")


def test_one_device_goes_on_with_what_two_processes_saved(whole):
    run = whole / "run"
    shutil.rmtree(run, ignore_errors=True)
    with Pair(whole, *FLAGS) as pair:
        wait_for(lambda: sharded_folder(run, 8).is_dir(), *pair.processes)
        pair.send(signal.SIGKILL, 0, 1)
        pair.codes()
    one = start(whole, whole / "one.txt", "--resume", str(run), "--mesh", "", devices=1)
    assert one.wait(500) == 0, (whole / "one.txt").read_text(encoding="utf-8")
    steps = [record["step"] for record in measured(run)]
    assert steps == [record["step"] for record in measured(whole / "whole")]
    assert state_folders(run)[0].name == "last"
