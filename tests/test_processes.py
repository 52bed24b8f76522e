"""JAX's processes of one run, over loopback: how they meet, that they compute what one computes, how they end.

In the normal suite two of them; more of them, and other moments, are slow.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import pytest

from harness.peers import ALONE, LOST
from harness.records import readable_records
from harness.state import find_state, load_state, state_folders
from jax_impl import processes
from jax_impl.processes import joined
from recipe.config import HostsConfig, UserError
from tests.survival import ROOT, SMALL, measured, settings, write_corpus

SMALL_FLOAT64 = [*SMALL, "--precision.params", "float64", "--precision.compute", "float64"]
PATIENCE = 500
"""Seconds after which a test gives up; nothing is measured with it."""


# How JAX's processes meet.
@pytest.fixture
def meeting(monkeypatch) -> Callable[[BaseException | None], None]:
    """`jax.distributed.initialize` raises this, and nothing is set in this process."""
    monkeypatch.setattr(processes, "hush", lambda peers: None)
    monkeypatch.setattr(processes.jax.config, "update", lambda name, value: None)

    def raises(error: BaseException | None) -> None:
        def initialize(*args, **kwargs):
            if error is not None:
                raise error

        monkeypatch.setattr(jax.distributed, "initialize", initialize)

    return raises


AUTO, PLAIN = HostsConfig("auto"), HostsConfig("127.0.0.1:1234", 2, 1)


@pytest.mark.parametrize(
    ("hosts", "error", "said"),
    [
        (AUTO, ValueError("coordinator_address should be defined."), "found no cluster of SLURM, Open MPI, GKE or"),
        (AUTO, RuntimeError("no\ncontroller"), r"a TPU pod \(no controller\); give --hosts.coordinator ADDRESS:PORT"),
        (PLAIN, RuntimeError("DEADLINE\nEXCEEDED"), r"process 1 of 2 did not meet the others .* \(DEADLINE EXCEEDED\)"),
        (AUTO, None, "auto found one process; leave it out"),
        (HostsConfig("127.0.0.1:x", 2, 1), None, "its port is none; give ADDRESS:PORT of process 0"),
        (HostsConfig("127.0.0.1:70000", 2, 1), None, "its port is none"),
        (HostsConfig("no-such-machine.invalid:1", 2, 1), None, "no machine of that name is known here"),
    ],
)
def test_who_does_not_meet_the_others_says_so_in_one_line(hosts, error, said, meeting):
    meeting(error)
    with pytest.raises(UserError, match=said) as refused, joined(hosts):
        raise AssertionError
    assert "\n" not in str(refused.value)
    assert processes._WORDS._words is None, "an abort is the system's again"


def test_a_run_of_one_process_meets_nobody():
    with joined(HostsConfig()) as alone:
        assert alone is ALONE


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce\nfailed: reset."),
            "UNKNOWN: Gloo all-reduce failed: reset",
        ),
        (ValueError("UNKNOWN: Gloo AllGather failed"), "UNKNOWN: Gloo AllGather failed"),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed"), "INTERNAL: NCCL operation failed"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), None),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ"), None),
        (ValueError("the peer is of another shape"), None),
        (KeyError("gloo"), None),
    ],
)
def test_which_errors_say_that_a_process_is_lost(error, reason):
    assert processes.Processes().lost(error) == reason


# Real ones.
class Group:
    """Processes of one run, each of one device, and their logs; a context manager."""

    def __init__(
        self,
        folder: Path,
        count: int,
        *flags: str,
        mesh: str = "",
        heartbeat: int = 100,
        launcher: Callable[[int, int], dict[str, str]] | None = None,
    ) -> None:
        """All of them, begun: `folder` has the text, their caches and their logs, and the run in run/.

        `launcher(index, count)` has the variables by which they find each other, instead of flags.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [folder / f"process-{index}.txt" for index in range(count)]
        self.run = folder / "run"
        flags = (*flags, "--mesh", mesh or f"data={count}", "--hosts.heartbeat", str(heartbeat))
        address = ("--hosts.coordinator", "auto" if launcher else f"127.0.0.1:{port}")
        self.processes = []
        for index, log in enumerate(self.logs):
            place = () if launcher else ("--hosts.count", str(count), "--hosts.index", str(index))
            more = launcher(index, count) if launcher else {}
            self.processes.append(start(folder, log, *flags, *address, *place, more=more))

    def send(self, number: int, *indices: int) -> float:
        """Send a signal to these processes; when."""
        for index in indices:
            self.processes[index].send_signal(number)
        return time.monotonic()

    def codes(self, *, but: Sequence[int] = ()) -> list[int]:
        """The exit codes of all others, once they have ended."""
        return [one.wait(PATIENCE) for index, one in enumerate(self.processes) if index not in but]

    def last_line(self, index: int) -> str:
        return self.logs[index].read_text(encoding="utf-8").splitlines()[-1]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def start(
    folder: Path,
    log: Path,
    *flags: str,
    out: str = "run",
    devices: int = 1,
    more: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen:
    """`train_jax.py`, whose output goes to the log, on so many devices of a CPU."""
    if not (folder / "text").exists():
        write_corpus(folder / "text")
    # Machine code need not be good; it is the same in all.
    xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    own = {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    new = () if "--resume" in flags else ("--data.corpus", str(folder / "text"), "--out", str(folder / out))
    with open(log, "wb") as output:
        command = [sys.executable, "train_jax.py", *new, *flags]
        environment = settings(folder / "cache") | own | more
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def wait_for(happened: Callable[[], object], *processes: subprocess.Popen) -> None:
    """Wait until something has happened; none of the processes may end before."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert all(process.poll() is None for process in processes), "ended"
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.01)


def trained(run: Path, steps: int) -> Callable[[], bool]:
    """Whether a run has records of so many updates."""
    return lambda: sum(record["kind"] == "train" for record in readable_records(run)) >= steps


def test_two_processes_compute_what_one_does_and_one_that_is_killed_ends_the_other(tmp_path):
    """In float64 and to the last bit: the devices do the same, and two numbers have one sum."""
    as_one_then_killed(tmp_path, "--model.dropout", "0.0", "--muon.ns_steps", "1")


@pytest.mark.slow
def test_two_processes_draw_the_masks_that_one_does(tmp_path):
    as_one_then_killed(tmp_path, "--accumulation", "2", "--batch_size", "4")


@pytest.mark.slow
def test_four_processes_compute_what_one_does(tmp_path):
    """Two of them have the same rows, and sums are of two numbers."""
    as_one_then_killed(tmp_path, "--batch_size", "4", count=4, mesh="data=2,tensor=2")


@pytest.mark.slow
def test_four_processes_have_the_loss_of_one_but_for_the_order_of_sums(tmp_path):
    """A batch's loss is a sum of four devices' sums, all above 0: three additions on either side, with a rounding each,
    and the division by the tokens."""
    processes, one = as_one_then_killed(tmp_path, "--batch_size", "4", count=4, mesh="data=2,fsdp=2", exact=False)
    for kind, step in (("validation", 0), ("train", 1)):
        loss, same = (
            next(r["loss"] for r in records if (r["kind"], r["step"]) == (kind, step)) for records in (processes, one)
        )
        assert abs(loss - same) <= 2 * (3 + 1) * 2.0**-53 * same


def as_one_then_killed(
    tmp_path: Path, *more: str, count: int = 2, mesh: str = "data=2", exact: bool = True
) -> list[list[dict]]:
    """The first records of several processes, of which one is then killed, and of one that has all their devices."""
    flags = [*SMALL_FLOAT64, *more, *"--steps 100000 --log_every 1 --eval_every 100000 --save_every 2".split()]
    with Group(tmp_path, count, *flags, mesh=mesh) as group:
        wait_for(trained(group.run, 6), *group.processes)
        group.send(signal.SIGKILL, 1)
        assert group.codes(but=[1]) == [LOST] * (count - 1)
        said = group.last_line(0)
        assert said.startswith(f"process 0 of {count}: lost a peer after step "), said
        assert f"; go on with: python train_jax.py --resume {group.run} --hosts.coordinator" in said
        assert find_state(group.run, load_state)[1].position >= 2, "a sound state is left"
    alone = start(tmp_path, tmp_path / "alone.txt", *flags, "--mesh", mesh, out="alone", devices=count)
    with contextlib.closing(Killing(alone)):
        wait_for(trained(tmp_path / "alone", 6), alone)
    first, second = ([r for r in measured(run) if r["step"] <= 6] for run in (group.run, tmp_path / "alone"))
    assert len(first) == len(second) == 1 + 1 + 6
    assert first == second or not exact
    return [first, second]


class Killing:
    """Kills a process when it is closed."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


MOMENTS = {
    "update": "--log_every 10 --eval_every 1000000 --save_every 50",
    "evaluation": "--log_every 10 --eval_every 1 --save_every 1000000 --data.validation_fraction 0.5 "
    "--data.validation_tokens 1000",
    "save": "--log_every 10 --eval_every 1000000 --save_every 1",
}
"""Flags of a run that does little else."""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("lost", ["worker", "coordinator"])
def test_all_end_when_one_is_killed(lost, moment, count, tmp_path):
    flags = [*SMALL, "--batch_size", str(count), *f"--steps 100000 {MOMENTS[moment]}".split()]
    dead = 0 if lost == "coordinator" else count - 1
    with Group(tmp_path, count, *flags, heartbeat=20) as group:
        wait_for(trained(group.run, 60), *group.processes)
        report(group, group.send(signal.SIGKILL, dead), dead, f"{lost} killed in {moment}, {count} processes")


def report(group: Group, began: float, dead: int, what: str) -> None:
    """See all others end as they should, and print after how many seconds."""
    codes, seconds = {}, {}
    others = [index for index in range(len(group.processes)) if index != dead]
    while len(codes) < len(others):
        for index in others:
            code = group.processes[index].poll()
            if code is not None and index not in codes:
                codes[index], seconds[index] = code, time.monotonic() - began
        assert time.monotonic() - began < PATIENCE, f"{what}: {codes}"
        time.sleep(0.01)
    print(f"\n{what}: {', '.join(f'{seconds[index]:.2f} s' for index in others)}; {group.last_line(others[0])}")
    assert codes == dict.fromkeys(others, LOST)
    for index in others:
        assert group.last_line(index).startswith(f"process {index} of {len(group.processes)}: lost a peer "), what


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_all_end_when_one_is_killed_while_they_compile(dead, tmp_path):
    flags = [*SMALL, *"--steps 100000 --model.num_hidden_layers 4".split()]
    with Group(tmp_path, 2, *flags, heartbeat=20) as group:
        wait_for(lambda: "to beat" in group.logs[0].read_text(encoding="utf-8"), *group.processes)
        report(group, group.send(signal.SIGKILL, dead), dead, f"process {dead} killed while they compile")


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_all_end_when_one_hangs(dead, tmp_path):
    """Nothing resets a connection to it; only its heartbeat is missed."""
    flags = [*SMALL, *f"--steps 100000 {MOMENTS['update']}".split()]
    with Group(tmp_path, 2, *flags, heartbeat=10) as group:
        wait_for(trained(group.run, 60), *group.processes)
        report(group, group.send(signal.SIGSTOP, dead), dead, f"process {dead} stopped, heartbeat 10 s")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to"),
    [(signal.SIGTERM, [1]), (signal.SIGINT, [0]), (signal.SIGTERM, [0, 1, 2, 3]), (signal.SIGHUP, [3])],
)
def test_a_signal_to_any_of_four_stops_all_with_one_state(number, to, tmp_path):
    flags = [*SMALL, "--batch_size", "4", *f"--steps 100000 {MOMENTS['update']}".split()]
    with Group(tmp_path, 4, *flags) as group:
        wait_for(trained(group.run, 60), *group.processes)
        began = group.send(number, *to)
        assert group.codes() == [128 + number] * 4
        print(f"\n{signal.Signals(number).name} to {to}: {time.monotonic() - began:.2f} s")
        position = find_state(group.run, load_state)[1].position
        assert group.last_line(0).startswith(f"stopped by {signal.Signals(number).name} after step {position}; go on")
        said = [group.logs[index].read_text(encoding="utf-8").count("process ") for index in (1, 2, 3)]
        assert said == [int(index in to) for index in (1, 2, 3)], "one line from those that had it"


@pytest.mark.slow
def test_four_processes_go_on_with_a_run_bit_for_bit(tmp_path):
    flags = [*SMALL_FLOAT64, "--batch_size", "4", *"--steps 40 --log_every 10 --eval_every 20 --save_every 10".split()]
    with Group(tmp_path, 4, *flags) as group:
        assert group.codes() == [0] * 4
        (tmp_path / "run").rename(tmp_path / "whole")
    with Group(tmp_path, 4, *flags) as group:
        wait_for(lambda: state_folders(group.run), *group.processes)
        group.send(signal.SIGKILL, 2)
        assert set(group.codes(but=[2])) <= {LOST, 0}
    with Group(tmp_path, 4, "--resume", str(tmp_path / "run")) as group:
        assert set(group.codes()) <= {0, 2}, "done, or done before it was killed"
    assert [r for r in measured(tmp_path / "run") if r["kind"] == "train"] == [
        r for r in measured(tmp_path / "whole") if r["kind"] == "train"
    ]


def slurm(index: int, count: int) -> dict[str, str]:
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    return job | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}


def open_mpi(index: int, count: int) -> dict[str, str]:
    job = {"OMPI_MCA_orte_hnp_uri": f"{os.getpid() * 2**12}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": str(count)}
    return job | {"OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index)}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_processes_find_each_other_by_what_their_launcher_says(launcher, tmp_path):
    with Group(tmp_path, 2, *SMALL, "--steps", "2", launcher=launcher) as group:
        assert group.codes() == [0, 0]
    assert (tmp_path / "run" / "loss.png").is_file()
    assert len([r for r in measured(tmp_path / "run") if r["kind"] == "train"]) == 2
