"""`--profile_steps`: which updates are traced, and that each framework leaves a trace that opens."""

import contextlib
import gzip
import json

import pytest

from harness.loop import _traced
from recipe.config import PROFILE_AFTER, RunConfig


class RecordingTrainer:
    """Notes what happens between the beginning and the end of a trace."""

    def __init__(self) -> None:
        self.events = []

    @contextlib.contextmanager
    def profile(self, folder):
        self.events.append(f"begin {folder}")
        try:
            yield
        finally:
            self.events.append("end")


@pytest.mark.parametrize("first", [1, 41], ids=["new", "resumed"])
def test_the_steps_after_the_warm_up_are_traced(first):
    trainer = RecordingTrainer()
    for step in _traced(range(first, first + 8), RunConfig(out="here", profile_steps=2), trainer):
        trainer.events.append(step)
    begin = first + PROFILE_AFTER
    traced = ["begin here/profile", begin, begin + 1, "end"]
    assert trainer.events == [*range(first, begin), *traced, *range(begin + 2, first + 8)]


def test_a_run_that_stops_early_ends_its_trace():
    trainer = RecordingTrainer()
    steps = _traced(range(1, 9), RunConfig(out="here", profile_steps=3), trainer)
    for step in steps:
        if step == PROFILE_AFTER + 1:
            steps.close()
    assert trainer.events == ["begin here/profile", "end"]


def test_nothing_is_traced_unless_asked_for():
    trainer = RecordingTrainer()
    assert list(_traced(range(1, 9), RunConfig(), trainer)) == list(range(1, 9)) and trainer.events == []


def test_a_trace_needs_enough_steps():
    with pytest.raises(ValueError, match=f"profile_steps=5 needs steps of at least {PROFILE_AFTER + 5}"):
        RunConfig(steps=PROFILE_AFTER + 4, profile_steps=5)


def names_in(file) -> set[str]:
    with gzip.open(file) as stream:
        return {event["name"] for event in json.load(stream)["traceEvents"] if "name" in event}


def test_torch_leaves_a_trace(tmp_path):
    import torch

    from torch_ref.train import Trainer

    with Trainer.profile(type("OnCpu", (), {"device": "cpu"})(), tmp_path / "profile"):
        torch.ones(3, 3) @ torch.ones(3, 3)
    assert "aten::matmul" in names_in(tmp_path / "profile" / "trace.json.gz")


def test_jax_leaves_a_trace(tmp_path):
    import jax

    from jax_impl.train import Trainer

    product = jax.jit(lambda x: x @ x)
    with Trainer.profile(type("WithState", (), {"state": ()})(), tmp_path / "profile"):
        product(jax.numpy.ones((3, 3))).block_until_ready()
    [trace] = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert any("PjitFunction" in name for name in names_in(trace))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
