"""TensorBoard's events hold float32: what does not fit is left out, and no number ends a run."""

import dataclasses
import json
import math
import struct

import numpy as np
import pytest

from harness.runlog import EventFile, RunLog, read_metrics
from tests.test_runlog import WITH_EVENTS, scalars

LARGEST = (2 - 2**-23) * 2.0**127
"""float32's."""


def single(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


LEFT_OUT = {
    "1e300": 1e300,
    "-1e300": -1e300,
    "an integer of 400 digits": 10**400,
    "the same below zero": -(10**400),
    "just above the largest": math.nextafter(LARGEST, math.inf),
    "rounds to infinity": 3.4028235677973366e38,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "NumPy's inf": np.float32(math.inf),
    "NumPy's nan": np.float64(math.nan),
}
HELD = {
    "zero": 0.0,
    "negative": -2.5,
    "the largest": LARGEST,
    "the lowest": -LARGEST,
    "below float32's least": 1e-320,
    "an integer": 10**30,
    "NumPy's": np.float32(0.1),
    "a count": 2**62,
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_float32_cannot_hold_is_left_out(case, tmp_path):
    events = EventFile(tmp_path)
    events.add_scalars(1, {"train/loss": LEFT_OUT[case], "train/lr": 0.5})
    events.add_scalars(2, {"train/loss": LEFT_OUT[case]})
    events.add_scalars(3, {"train/loss": 1.0})
    events.close()
    assert scalars(tmp_path) == [(1, {"train/lr": 0.5}), (3, {"train/loss": 1.0})]


@pytest.mark.parametrize("case", HELD)
def test_what_float32_can_hold_is_written(case, tmp_path):
    events = EventFile(tmp_path)
    events.add_scalars(1, {"train/loss": HELD[case]})
    events.close()
    assert scalars(tmp_path) == [(1, {"train/loss": single(float(HELD[case]))})]


@pytest.mark.parametrize("step", [0, 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1])
def test_a_step_is_written_exactly(step, tmp_path):
    events = EventFile(tmp_path, first_step=step)
    events.add_scalars(step, {"train/loss": 1.0})
    events.close()
    assert scalars(tmp_path)[-1] == (step, {"train/loss": 1.0})


@pytest.mark.parametrize("loss", [-1.0, 0.0, 88.0, 88.8, 700.0, 1000.0, 1e300, math.inf, math.nan])
def test_no_loss_or_perplexity_ends_a_run(loss, tmp_path):
    """exp(88.8) is beyond float32 and exp(710) beyond float64."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    config = dataclasses.replace(WITH_EVENTS, steps=2**31 - 1)
    with RunLog(tmp_path / "run", config, framework="jax", environment={}) as log:
        log.log_step(step=2**31 - 1, loss=loss, grad_norm=loss, lr=0.0, skipped=2**30, seconds=2.0, tokens=2**62)
        log.log_validation(step=2**31 - 1, loss=loss, accuracy=0.0, perplexity=perplexity, bits_per_byte=loss)
    (_, train), (step, validation) = scalars(tmp_path / "run")
    assert step == 2**31 - 1 and train["train/tokens"] == 2.0**62
    held = {"validation/accuracy": 0.0}
    held |= {f"validation/{name}": single(loss) for name in ("loss", "bits_per_byte") if abs(loss) <= LARGEST}
    held |= {"validation/perplexity": single(perplexity)} if perplexity <= LARGEST else {}
    assert validation == held
    record = read_metrics(tmp_path / "run")[-1]
    assert record["perplexity"] == (perplexity if math.isfinite(perplexity) else None)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
