"""Measured times go to the parts of their instructions, and a device that is not the paper's is said."""

import json
import subprocess
import sys
from types import SimpleNamespace as Space

import pytest

from benchmarks.plan.measured import by_part, kernel_seconds, profile_events, reached

STEP = "jit_train_step"
EVENTS = [
    *((STEP, "fusion.1", 3.0), (STEP, "fusion.1", 1.0), (STEP, "while.1", 9.0)),
    *(("jit_other", "fusion.1", 5.0), (STEP, "gemm.2", 8.0)),
]


def cost(
    name: str, part: str, *, times: int, seconds: float, flops: float = 0.0, size: float = 0.0, memory: bool = True
):
    launch = Space(instruction=Space(name=name, target=""), times=times, bytes=size)
    return Space(
        launch=launch,
        part=part,
        flops=flops,
        seconds=seconds,
        alone=(0.0, seconds, 0.0) if memory else (seconds, 0.0, 0.0),
    )


FOUND = [
    cost("fusion.1", "norms", times=2, seconds=1.0, size=64.0),
    cost("gemm.2", "linear", times=1, seconds=4.0, flops=512.0, memory=False),
    cost("copy.3", "norms", times=1, seconds=0.25, size=8.0),
]


def test_only_launches_of_the_training_step_count():
    assert kernel_seconds(EVENTS, ["fusion.1", "gemm.2", "copy.3"]) == {"fusion.1": 4.0, "gemm.2": 8.0}


def test_parts_add_up_their_instructions():
    parts = by_part(FOUND, kernel_seconds(EVENTS, ["fusion.1", "gemm.2"]))
    assert list(parts) == ["linear", "norms"], "the longest first"
    assert parts["norms"] == {"launches": 3, "paper": 2.25, "measured": 4.0}
    assert parts["linear"] == {"launches": 1, "paper": 4.0, "measured": 8.0}


def test_what_each_resource_reached_is_work_over_time():
    # 2 launches of 64 bytes in 4 s; 512 FLOP in 8 s; a launch of which nothing was seen says nothing.
    assert reached(FOUND, {"fusion.1": 4.0, "gemm.2": 8.0}) == {"memory": 32.0, "products": 64.0}
    assert reached(FOUND, {"fusion.1": 1e-5}) == {}, "too short"


def test_events_without_an_instruction_are_no_kernels():
    events = [Space(stats=[("hlo_op", "a"), ("hlo_module", "m")], duration_ns=5), Space(stats=[], duration_ns=7)]
    assert list(profile_events(Space(planes=[Space(lines=[Space(events=events)])]))) == [("m", "a", 5e-9)]


@pytest.mark.slow
def test_a_measurement_on_this_machine(tmp_path):
    small = {"model": {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 128}}
    shape = "--preset tiny --batch_size 1 --sequence_length 16 --updates 2 --dtype float32"
    command = [sys.executable, "-m", "benchmarks.plan.measured", *shape.split(), "--out", str(tmp_path / "x")]
    command += ["--overrides", json.dumps(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert {"head and loss", "linear layers", "attention", "Newton-Schulz"} <= record["parts"].keys()
    measured = sum(part["measured"] for part in record["parts"].values())
    assert measured > 0 and len(record["unseen"]) < 10, "nearly every instruction was seen"
    assert "The paper times are of NVIDIA H100 80GB HBM3, this ran on cpu." in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "never overwritten" in again.stderr
