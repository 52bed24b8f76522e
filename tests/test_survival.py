"""Runs of the real trainers that are killed, crowded, starved and damaged: what is gone on with ends bit for bit equal.

The nightly run (`-m slow`) does more of the same; SURVIVAL_KILLS says how many kills, and SURVIVAL_REPORT names a file
for what they met.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.runlog import read_metrics
from harness.state import EARLIER, find_state, load_state, set_aside, state_folders
from tests.survival import SMALL, Child, Nursery, differences, until, write_corpus

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and forks")

STEPS = 24
SCRIPTS = {"jax": "train_jax.py", "torch": "train_torch.py"}
NEW_SCRATCH = (".last-*", ".best-*", f"{EARLIER}/.*", ".metrics.jsonl")
"""What lies in a run's folder while something is saved, replaced, removed or cut."""


@dataclasses.dataclass
class Field:
    """Where runs are made and compared."""

    folder: Path
    nursery: Nursery
    corpus: Path
    whole: dict[str, Path] = dataclasses.field(default_factory=dict)
    """By framework, a run that nothing disturbed."""
    spans: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Seconds of such a run until its first update is logged, and from there to the end of its process; of the second
    one, which finds its programs compiled."""

    def beginning(self, framework: str, out: Path, *more: str) -> list[str]:
        """The command that begins the run."""
        flags = [*SMALL, "--steps", str(STEPS), "--eval_every", "3", "--save_every", "2", "--log_every", "1"]
        return [SCRIPTS[framework], *flags, "--data.corpus", str(self.corpus), "--out", str(out), *more]

    def going_on(self, framework: str, run: Path) -> list[str]:
        """The command that goes on with a run, or begins it again if it has no state."""
        if run.is_dir() and state_folders(run):
            return [SCRIPTS[framework], "--resume", str(run)]
        return self.beginning(framework, run)

    def undisturbed(self, framework: str) -> Path:
        """The run that all others are to equal."""
        if framework not in self.whole:
            for name in ("warm", "whole"):
                out, begun = self.folder / f"{framework}-{name}", time.monotonic()
                child, training = self.nursery.start(*self.beginning(framework, out)), training_in(out)
                until(lambda: child.ended(0.001) or training(), pause=0)  # noqa: B023 (called here)
                first = time.monotonic()
                code = self.nursery.exit_code(child)
                assert code == 0, child.log.read_text(encoding="utf-8")
                self.spans[framework] = first - begun, time.monotonic() - first
            assert not differences(self.folder / f"{framework}-warm", out)
            self.whole[framework] = out
        return self.whole[framework]


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Iterator[Field]:
    folder = tmp_path_factory.mktemp("survival")
    with Nursery(folder / "logs", folder / "cache") as nursery:
        yield Field(folder, nursery, write_corpus(folder / "corpus"))


@dataclasses.dataclass(frozen=True)
class Kill:
    """One death and what came of it."""

    aim: str
    stage: str
    """What lay in the folder then."""
    state: int | None
    """Position of the state to go on from; None if there was none."""
    lost: int
    """Records missing of those before that state."""


def stage_of(run: Path) -> str:
    """What a process was doing when it died, by what it left."""
    if not run.is_dir():
        return "before the folder"
    if not (run / "run.json").is_file():
        return "making the folder"
    for name, doing in (("last", "replacing last/"), ("best", "replacing best/")):
        if set_aside(run / name).exists() or ((run / EARLIER).is_dir() and not (run / "last").exists()):
            return doing
    for pattern, doing in zip(
        NEW_SCRATCH, ("writing last/", "writing best/", "removing an earlier state", "cutting the log"), strict=True
    ):
        if any(run.glob(pattern)):
            return doing
    if not state_folders(run):
        return "before the first save"
    if load_state(find_state(run)).position == STEPS:
        return "after the last save"
    return "between saves"


def look(run: Path, aim: str) -> Kill:
    """What a kill has left; asserts that a state which is there can be gone on from."""
    stage = stage_of(run)
    if not run.is_dir() or not state_folders(run):
        return Kill(aim, stage, None, 0)
    position = load_state(find_state(run)).position
    recorded = {record["step"] for record in read_metrics(run) if record["kind"] == "train"}
    return Kill(aim, stage, position, len(set(range(1, position + 1)) - recorded))


def training_in(run: Path) -> Callable[[], bool]:
    """Says whether a process that has yet to open the run's log has logged an update there."""
    log = run / "metrics.jsonl"
    before = log.stat().st_ino if log.is_file() else None
    seen: list[int] = []

    def training() -> bool:
        if not log.is_file() or log.stat().st_ino == before:
            return False
        updates = log.read_bytes().count(b'"kind": "train"')
        seen.append(updates)
        return updates > seen[0]

    return training


def await_moment(
    field: Field, child: Child, training: Callable[[], bool], framework: str, run: Path, aim: str, chance: random.Random
) -> bool:
    """Wait for the moment to kill; False if the process has ended before."""
    to_first, to_end = field.spans[framework]
    if aim == "anywhere":
        return not child.ended(chance.uniform(0, to_first + to_end))
    while not training():
        if child.ended(0.001):
            return False
    if aim == "while training":
        return not child.ended(chance.uniform(0, to_end))
    for _ in range(chance.randint(1, 8)):
        while not any(True for pattern in NEW_SCRATCH for _ in run.glob(pattern)):
            if child.ended(0.0002):
                return False
        if child.ended(chance.uniform(0, 0.03)):
            return False
    return True


AIMS = ("anywhere", "while training", "at a save", "at a save")


def survive(field: Field, framework: str, name: str, deaths: int, chance: random.Random) -> list[Kill]:
    """Kill a run so often, going on with it each time, and assert that its end is that of the undisturbed one."""
    expected, run = field.undisturbed(framework), field.folder / name
    kills: list[Kill] = []
    while True:
        aim, command = chance.choice(AIMS), field.going_on(framework, run)
        newest = kills[-1].state if kills else None
        training = training_in(run)
        child = field.nursery.start(*command)
        alive = len(kills) < deaths and await_moment(field, child, training, framework, run, aim, chance)
        if alive:
            child.signal(signal.SIGKILL)
        code, said = field.nursery.exit_code(child), child.log.read_text(encoding="utf-8")
        finished = code == 2 and "is finished" in said
        assert finished or code in (0, -signal.SIGKILL), f"{kills}: {said}"
        if newest is not None and "\nresumed " in said:
            assert f"resumed    after step {newest}:" in said, kills
        if code != -signal.SIGKILL:
            break
        kills.append(look(run, aim))
        assert kills[-1].lost == 0, kills
        assert newest is None or (kills[-1].state or -1) >= newest, kills
    assert differences(run, expected) == [], kills
    shutil.rmtree(run)
    return kills


def report(framework: str, series: list[list[Kill]]) -> dict:
    """What was met, counted; that nothing was unusable or different has been asserted."""
    kills = [kill for one in series for kill in one]
    return {
        "framework": framework,
        "kills": len(kills),
        "runs": len(series),
        "kills of a run": dict(sorted(Counter(map(len, series)).items())),
        "aims": dict(Counter(kill.aim for kill in kills)),
        "stages": dict(Counter(kill.stage for kill in kills).most_common()),
        "resumed from": dict(sorted(Counter(-1 if kill.state is None else kill.state for kill in kills).items())),
        "records lost": sum(kill.lost for kill in kills),
    }


def kills(field: Field, framework: str, count: int, seed: int) -> None:
    """So many kills, up to five a run, reported where that is asked for."""
    chance, series, left = random.Random(f"{framework} {seed}"), [], count
    while left > 0:
        series.append(survive(field, framework, f"{framework}-{len(series)}", min(left, chance.randint(1, 5)), chance))
        left -= len(series[-1])
    if named := os.environ.get("SURVIVAL_REPORT"):
        with open(named, "a", encoding="utf-8") as file:
            file.write(json.dumps(report(framework, series)) + "\n")


@pytest.mark.parametrize(("framework", "count"), [("jax", 4), ("torch", 8)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(field, framework, count):
    kills(field, framework, count, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_200_kills(field, framework):
    count = int(os.environ.get("SURVIVAL_KILLS", "200")) // 2
    kills(field, framework, count, seed=int(os.environ.get("SURVIVAL_SEED", "1")))
