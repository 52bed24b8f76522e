"""Runs of the real trainers that are killed, crowded, starved and damaged: what is gone on with ends bit for bit equal.

The nightly run (`-m slow`) does more of the same; SURVIVAL_KILLS says how many kills, and SURVIVAL_REPORT names a file
for what they met.
"""

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from harness import loop
from harness.folders import steadily
from harness.runlog import read_metrics
from harness.state import EARLIER, clear_scratch, find_state, load_state, set_aside, state_folders
from harness.tensors import Damaged
from recipe.config import UserError
from tests import soak
from tests.survival import SMALL, Child, Nursery, differences, write_corpus
from tests.test_loop import (  # noqa: F401
    Killed,
    Toy,
    assert_same_runs,
    config,
    elsewhere,
    kill_at,
    no_picture,
    train,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and forks")

STEPS = 24
PACKAGES = {"jax": "jax_impl", "torch": "torch_ref"}
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
    """Seconds of such a run until its first update is logged, and from there to the end of its process."""
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

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
            self.whole[framework] = self._timed(framework, f"{framework}-whole")
        return self.whole[framework]

    def take_time(self, framework: str) -> None:
        """Measure the spans again, now that the compiled programs are found."""
        again = self._timed(framework, f"{framework}-again")
        assert differences(again, self.undisturbed(framework)) == []

    def _timed(self, framework: str, name: str) -> Path:
        out, begun = self.folder / name, time.monotonic()
        child, training = self.nursery.start(*self.beginning(framework, out)), training_in(out)
        while not child.ended(0.001) and not training():
            pass
        first = time.monotonic()
        code = self.nursery.exit_code(child)
        assert code == 0, child.log.read_text(encoding="utf-8")
        self.spans[framework] = first - begun, time.monotonic() - first
        return out

    def broken_off(self, framework: str) -> Path:
        """A run that was killed when it had two states, both from after its first best weights; a new copy."""
        name = f"{framework}-broken-off"
        original, copy = self.folder / name, self.folder / f"{name}-{next(self.numbers)}"
        while not original.is_dir():
            child = self.nursery.start(*self.beginning(framework, original))
            two_states = False
            while not two_states and not child.ended(0.0002):
                two_states = any(int(state.name) >= 4 for state in original.glob(f"{EARLIER}/[0-9]*"))
            child.signal(signal.SIGKILL)
            if self.nursery.exit_code(child) == -signal.SIGKILL and not (original / "loss.png").exists():
                clear_scratch(original)
            else:  # It was done before this process had its turn.
                shutil.rmtree(original)
        shutil.copytree(original, copy)
        return copy


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
        if set_aside(run / name).exists():
            return doing
    if (run / EARLIER).is_dir() and not (run / "last").exists():
        return "replacing last/"
    for pattern, doing in zip(
        NEW_SCRATCH, ("writing last/", "writing best/", "removing an earlier state", "cutting the log"), strict=True
    ):
        if any(run.glob(pattern)):
            return doing
    if not state_folders(run):
        return "before the first save"
    if find_state(run, load_state)[1].position == STEPS:
        return "after the last save"
    return "between saves"


def look(run: Path, aim: str) -> Kill:
    """What a kill has left; asserts that a state which is there can be gone on from."""
    stage = stage_of(run)
    if not run.is_dir() or not state_folders(run):
        return Kill(aim, stage, None, 0)
    position = find_state(run, load_state)[1].position
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


AIMS = ("while training", "at a save", "at a save", "anywhere")


def survive(
    field: Field, framework: str, name: str, deaths: int, aims: Sequence[str], chance: random.Random
) -> list[Kill]:
    """Kill a run so often, going on with it each time, and assert that its end is that of the undisturbed one."""
    expected, run = field.undisturbed(framework), field.folder / name
    kills: list[Kill] = []
    while True:
        aim, command = chance.choice(aims), field.going_on(framework, run)
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


def kills(field: Field, framework: str, count: int, aims: Sequence[str], seed: int) -> None:
    """So many kills, up to five a run, reported where that is asked for."""
    chance, series, left = random.Random(f"{framework} {seed}"), [], count
    while left > 0:
        deaths = min(left, chance.randint(1, 5))
        series.append(survive(field, framework, f"{framework}-{len(series)}", deaths, aims, chance))
        left -= len(series[-1])
    if named := os.environ.get("SURVIVAL_REPORT"):
        with open(named, "a", encoding="utf-8") as file:
            file.write(json.dumps(report(framework, series)) + "\n")


def test_the_comparison_of_runs_sees_a_bit_a_record_and_what_is_left(field):
    whole, run = field.undisturbed("torch"), field.folder / "other"
    shutil.copytree(whole, run)
    assert differences(run, whole) == []
    flip(run / "last" / "optimizer.safetensors", random.Random(0))
    log = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(log[:5] + log[6:]), encoding="utf-8")
    (run / "samples.txt").write_text("the other\n", encoding="utf-8")
    (run / ".best-old").mkdir()
    assert differences(run, whole) == ["records", "last/optimizer.safetensors", "samples.txt", ".best-old is left"]


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(field):
    """In torch, which compiles nothing; tests/test_training_run.py kills JAX once."""
    kills(field, "torch", 7, AIMS[:3], seed=0)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_200_kills(field, framework):
    count = int(os.environ.get("SURVIVAL_KILLS", "200")) // 2
    field.undisturbed(framework)
    field.take_time(framework)
    kills(field, framework, count, AIMS, seed=int(os.environ.get("SURVIVAL_SEED", "1")))


def together(field: Field, *command: str) -> tuple[list[int], list[str]]:
    """The same command twice at once: exit codes and outputs, the better first."""
    children = [field.nursery.start(*command) for _ in range(2)]
    ended = [(field.nursery.exit_code(child), child.log.read_text(encoding="utf-8")) for child in children]
    return [code for code, _ in sorted(ended)], [said for _, said in sorted(ended)]


def is_refused(said: str, *reasons: str) -> bool:
    """Whether a command said one line alone, for one of these reasons."""
    lines = [line for line in said.splitlines() if not line.startswith(("tokenising", "waiting for another process"))]
    return len(lines) == 1 and lines[0].startswith("error: ") and any(reason in lines[0] for reason in reasons)


def pairs_of_resumptions(field: Field, framework: str, count: int) -> None:
    for _ in range(count):
        run = field.broken_off(framework)
        codes, said = together(field, *field.going_on(framework, run))
        assert codes == [0, 2], said
        assert is_refused(said[1], "is being trained by another process", "is finished"), said[1]
        assert differences(run, field.undisturbed(framework)) == []
        shutil.rmtree(run)


def pairs_of_beginnings(field: Field, framework: str, count: int) -> None:
    for number in range(count):
        run = field.folder / f"{framework}-twice"
        if number % 2:  # over what a run left that was killed before its first save
            run = field.broken_off(framework)
            shutil.rmtree(run / "last")
            shutil.rmtree(run / EARLIER)
        codes, said = together(field, *field.beginning(framework, run))
        assert codes == [0, 2], said
        assert is_refused(said[1], "is being trained by another process", "already holds files", "File exists"), said
        assert differences(run, field.undisturbed(framework)) == []
        shutil.rmtree(run)


def test_of_two_that_go_on_with_a_run_one_trains(field):
    pairs_of_resumptions(field, "torch", 1)


def test_of_two_that_begin_a_run_one_trains(field):
    pairs_of_beginnings(field, "torch", 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_20_pairs_of_each(field, framework):
    pairs_of_resumptions(field, framework, 20)
    pairs_of_beginnings(field, framework, 20)


def read_beside(field: Field, framework: str, steps: int, out: Path) -> None:
    """Look at a run that saves at every update, again and again until it is done, and compare it with a calm one."""
    rhythm = ["--save_every", "1", "--steps", str(steps)]
    calm, run = out / "calm", out / "run"
    code, said = field.nursery.run(*field.beginning(framework, calm, *rhythm))
    assert code == 0, said
    readers = {
        "inspect": ["-m", "harness.commands.checkpoint", "inspect", str(run)],
        "generate": [
            *("-m", f"{PACKAGES[framework]}.generate", "--checkpoint", str(run)),
            *("--prompt", "the", "--max_new_tokens", "2"),
        ],
        "plot": ["-m", "harness.commands.plot", str(run), "--out", str(out / "picture.png")],
    }
    rounds = 0
    while rounds == 0:  # again, should the run be done before this process had its turn
        shutil.rmtree(run, ignore_errors=True)
        child = field.nursery.start(*field.beginning(framework, run, *rhythm))
        while not (run / "best").is_dir() and not child.ended(0.01):
            pass
        while not child.ended():
            for name, command in readers.items():
                code, said = field.nursery.run(*command)
                assert code == 0, f"{name} beside a run: {said}"
            rounds += 1
        code = field.nursery.exit_code(child)
        assert code == 0, child.log.read_text(encoding="utf-8")
    assert differences(run, calm) == []


def test_whoever_reads_beside_a_run_is_answered_and_disturbs_nothing(field, tmp_path):
    read_beside(field, "torch", STEPS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_many_readers(field, framework, tmp_path):
    read_beside(field, framework, 20 * STEPS, tmp_path)


def replaced_so_often(times: int, folder: Path) -> Callable[[Path], str]:
    """A reader that finds a folder damaged and, `times` times, meanwhile replaced."""
    numbers = itertools.count()

    def read(found: Path) -> str:
        number = next(numbers)
        if number < times:
            shutil.move(folder, folder.with_name(f"old-{number}"))
            folder.mkdir()
            raise Damaged("two states at once")
        return (found / "value").read_text(encoding="utf-8")

    return read


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path):
    folder = tmp_path / "last"
    folder.mkdir()
    with pytest.raises(FileNotFoundError):  # once more, and then it is the folder as it stays
        steadily(folder, replaced_so_often(1, folder))
    with pytest.raises(UserError, match="is replaced faster than it can be read"):
        steadily(folder, replaced_so_often(1000, folder))
    (folder / "value").write_text("whole", encoding="utf-8")
    assert steadily(folder, replaced_so_often(0, folder)) == "whole"


def test_a_run_that_another_process_has_gone_on_with_is_not_begun_again(config, tmp_path):  # noqa: F811
    """Both saw a run without a state; while one of them made its trainer, the other was done."""
    with pytest.raises(Killed):
        train(config, kill_at(1))
    made = []

    def make_trainer(*args):
        made.append(Toy(*args))
        if len(made) == 1:
            loop.run(config, framework="toy", make_trainer=make_trainer)
        return made[0]

    with pytest.raises(UserError, match="has a state by now, by another process"):
        loop.run(config, framework="toy", make_trainer=make_trainer)
    train(elsewhere(config, tmp_path))
    assert_same_runs(config.out, str(tmp_path / "other"))


def flip(file: Path, chance: random.Random) -> None:
    """Turn over one bit of a file."""
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def flip_cache(field: Field, file: str, chance: random.Random) -> Path:
    """A copy of the cache with a bit of a file turned over."""
    cache = field.folder / f"cache-{next(field.numbers)}"
    shutil.copytree(field.folder / "cache", cache)
    (entry,) = cache.iterdir()
    flip(entry / file, chance)
    return cache


def test_flipped_bits_in_the_last_state_the_best_weights_and_the_tokens(field):
    """All at once: readers name what they meet, and the run goes on from the state before, as if nothing had been."""
    run, chance = field.broken_off("torch"), random.Random(0)
    earlier = max((run / EARLIER).iterdir())
    for file in ("last/optimizer.safetensors", "best/model.safetensors"):
        flip(run / file, chance)
    reader = ["-m", "torch_ref.generate", "--checkpoint", str(run), "--prompt", "the"]
    code, said = field.nursery.run(*reader)
    assert code == 2 and is_refused(said, "best/model.safetensors is not what was written"), said
    code, said = field.nursery.run("-m", "harness.commands.checkpoint", "inspect", str(run))
    assert code == 2 and said.count("DAMAGED") == 2 and said.count("error: ") == 1 and "Traceback" not in said, said
    cache = flip_cache(field, "train.npy", chance)
    code, said = field.nursery.run(*field.going_on("torch", run), "--data.cache_dir", str(cache))
    assert code == 0 and "is no state to go on from" in said and "warning: best/ cannot be read" in said, said
    assert f"resumed    after step {int(earlier.name)}:" in said and "tokenising training text" in said, said
    shutil.rmtree(run / "best-damaged-1")
    assert differences(run, field.undisturbed("torch")) == []


def test_flipped_bits_in_every_state(field):
    run, chance = field.broken_off("torch"), random.Random(1)
    for state in state_folders(run):
        flip(state / chance.choice(["run.json", "tokenizer.json", "optimizer.safetensors"]), chance)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    code, said = field.nursery.run(*field.going_on("torch", run))
    assert code == 2 and is_refused(said, "holds no sound state"), said
    assert before == sorted(path.relative_to(run) for path in run.rglob("*")), "nothing is moved"


FLIPPED = {
    "last": ("model.safetensors", "optimizer.safetensors", "run.json", "tokenizer.json", "config.json"),
    "best": ("model.safetensors", "manifest.json", "tokenizer.json", "config.json"),
    "cache": ("tokenizer.json", "train.npy", "validation.npy", "manifest.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize(("where", "file"), [(where, file) for where, files in FLIPPED.items() for file in files])
def test_a_flipped_bit_in_each_file(field, framework, where, file):
    chance, run = random.Random(f"{framework} {where} {file}"), field.broken_off(framework)
    command = field.going_on(framework, run)
    if where == "cache":
        command += ["--data.cache_dir", str(flip_cache(field, file, chance))]
    else:
        flip(run / where / file, chance)
    code, said = field.nursery.run(*command)
    named = {"last": "is no state to go on from", "best": "warning: best/ cannot be read", "cache": "tokenising"}
    assert code == 0 and named[where] in said, said
    shutil.rmtree(run / "best-damaged-1", ignore_errors=True)
    assert differences(run, field.undisturbed(framework)) == []


def test_a_soak_finds_what_grows():
    steady = [{"updates": 100 * n, **dict.fromkeys(soak.BOUNDED, 10 + n % 3)} for n in range(20)]
    assert soak.grown(steady) == []
    leaking = [each | {"open_files": 10 + each["updates"] // 500} for each in steady]
    assert soak.grown(leaking) == ["open_files"]
    rising = [{"updates": 100 * n, "rss_kib": 7 * n} for n in range(9)]
    assert round(soak.per_1000_updates(rising, "rss_kib")) == 70
    with pytest.raises(UserError, match="too few to see growth"):
        soak.SoakCommand(minutes=1)
