"""The loop around training, driven by a trainer of plain NumPy: killed, interrupted and resumed runs lose nothing."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import harness.state
from harness import loop
from harness.folders import load_folder
from harness.runlog import read_metrics
from harness.state import load_state
from recipe.config import DataConfig, ModelConfig, RunConfig, UserError
from recipe.params import slot_shapes

STEPS = 12
SKIPPED = 3
"""Index of the batch that the trainer below skips."""


class Toy:
    """Weights and slots that depend on every batch so far and on its place in the run."""

    def __init__(self, config: RunConfig, weights) -> None:
        self.environment = {"device": "abacus"}
        self._weights = {name: np.array(weight) for name, weight in weights.items()}
        self._slots = {name: np.zeros(shape, np.float32) for name, shape in slot_shapes(config.model).items()}
        self.updates = self.skipped = 0
        self.seen: list[int] = []
        self.before_step = lambda position: None

    def step(self, inputs_ABT, targets_ABT):
        position = self.updates + self.skipped
        self.before_step(position)
        self.seen.append(int(inputs_ABT.sum()))
        noise = np.float32(np.sin(self.seen[-1] + self.updates))
        if position == SKIPPED:
            self.skipped += 1
        else:
            for array in (*self._weights.values(), *self._slots.values()):
                array *= np.float32(0.9)
                array += noise
            self.updates += 1
        return {"loss": noise, "grad_norm": noise, "lr": 0.1 * self.updates, "skipped": self.skipped}

    def evaluate(self, batches):
        return float(5.0 - np.sin(self.updates)), 0.5  # lowest at the second of three

    def weights(self):
        return {name: weight.copy() for name, weight in self._weights.items()}

    def slots(self):
        return {
            slot: {name.removeprefix(slot + "."): a for name, a in self._slots.items() if name.startswith(slot + ".")}
            for slot in harness.state.SLOTS
        }

    def counts(self):
        return self.updates, self.skipped

    def restore(self, slots, updates, skipped):
        self._slots = {f"{slot}.{name}": np.array(a) for slot, arrays in slots.items() for name, a in arrays.items()}
        self.updates, self.skipped = updates, skipped

    def generate(self, tokens, options):
        return []


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own may catch it."""


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes most of such a run's time; tests/test_runlog.py looks at the picture."""
    monkeypatch.setattr(loop, "plot_runs", lambda folders, picture, baselines: picture.touch())


@pytest.fixture
def config(tmp_path) -> RunConfig:
    corpus = tmp_path / "corpus.txt"
    words = np.random.default_rng(0).choice("a quick brown fox jumps over the lazy dog".split(), 2000)
    corpus.write_text(" ".join(words))
    model = ModelConfig(
        vocab_size=384, hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2,
    )  # fmt: skip
    data = DataConfig(corpus=str(corpus), bpe_vocab_size=300, validation_tokens=64, cache_dir=str(tmp_path / "cache"))
    return RunConfig(
        out=str(tmp_path / "run"), steps=STEPS, batch_size=2, sequence_length=8, eval_every=4, save_every=3,
        log_every=1, sample_tokens=0, model=model, data=data,
    )  # fmt: skip


def train(config: RunConfig, before_step=lambda position: None) -> Toy:
    """One run, or the rest of one; the trainer that did it."""
    made = []

    def make_trainer(*args):
        made.append(Toy(*args))
        made[0].before_step = before_step
        return made[0]

    loop.run(config, framework="toy", make_trainer=make_trainer)
    return made[0]


def elsewhere(config: RunConfig, tmp_path: Path) -> RunConfig:
    return dataclasses.replace(config, out=str(tmp_path / "other"))


def resumed(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, resume=config.out)


def kill_at(wanted: int):
    def before_step(position: int) -> None:
        if position == wanted:
            raise Killed

    return before_step


def records(folder: str) -> list[dict]:
    """What a run measured, without the clock's part."""
    clock = {"tok_s", "dt_ms", "seconds"}
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(folder) if r["kind"] != "resume"]


def assert_same_runs(a: str, b: str) -> None:
    assert records(a) == records(b)
    first, second = load_state(Path(a) / "last"), load_state(Path(b) / "last")
    assert (first.updates, first.skipped, first.best) == (second.updates, second.skipped, second.best)
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(weight, second.weights[name], err_msg=name)
    for slot in harness.state.SLOTS:
        assert first.slots[slot].keys() == second.slots[slot].keys() != set()
        for name, array in first.slots[slot].items():
            np.testing.assert_array_equal(array, second.slots[slot][name], err_msg=f"{slot} {name}")
    best_a, best_b = (load_folder(Path(run) / "best")[1] for run in (a, b))
    for name, weight in best_a.items():
        np.testing.assert_array_equal(weight, best_b[name], err_msg=name)


@pytest.mark.parametrize("position", [3, 5, 8, 11])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(position, config, tmp_path):
    whole = train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(position))
    assert load_state(Path(config.out) / "last").position == position // 3 * 3
    rest = train(resumed(config))
    assert rest.seen == whole.seen[position // 3 * 3 :]
    assert_same_runs(config.out, str(tmp_path / "other"))


def test_what_a_resumed_run_makes_again_is_kept_aside(config):
    with pytest.raises(Killed):
        train(config, kill_at(8))
    before = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    train(resumed(config))
    after = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    undone = (Path(config.out) / "undone.jsonl").read_text().splitlines()
    assert [(json.loads(line)["kind"], json.loads(line)["step"]) for line in undone] == [
        *(("train", 7), ("train", 8), ("validation", 8))
    ]
    assert before == after[: len(before) - 3] + undone
    steps = [json.loads(line)["step"] for line in after if '"train"' in line]
    assert steps == list(range(1, STEPS + 1))
    (mark,) = [json.loads(line) for line in after if '"resume"' in line]
    assert (mark["step"], mark["framework"], mark["environment"]) == (6, "toy", {"device": "abacus"})


def test_a_run_may_be_killed_and_resumed_again_and_again(config, tmp_path):
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(4))
    for position in (3, 5, 7, 10):
        with pytest.raises(Killed):
            train(resumed(config), kill_at(position))
    train(resumed(config))
    assert_same_runs(config.out, str(tmp_path / "other"))


def send(number: int) -> None:
    """Signal this process and wait until it has been handled: Python may put handlers off, and two become one."""
    before = signal.getsignal(number)
    signal.raise_signal(number)
    for _ in range(10_000):
        if signal.getsignal(number) != before:
            return
        time.sleep(0.001)
    pytest.fail(f"signal {number} was not handled within ten seconds")


@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_run_after_a_whole_update(number, leaves, config, tmp_path, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(leaves) as left:
        train(config, lambda position: send(number) if position == 4 else None)
    assert number != signal.SIGTERM or left.value.code == 143
    assert "stopping after this update" in capsys.readouterr().err
    assert load_state(Path(config.out) / "last").position == 5 and records(config.out)[-1]["step"] == 5
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    train(resumed(config))
    train(elsewhere(config, tmp_path))
    assert_same_runs(config.out, str(tmp_path / "other"))


def test_a_second_signal_acts_at_once(config):
    def impatient(position: int) -> None:
        if position == 4:
            send(signal.SIGINT)
            send(signal.SIGINT)

    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config, impatient)
    finally:
        signal.signal(signal.SIGINT, before)
    assert load_state(Path(config.out) / "last").position == 3


@pytest.mark.parametrize("write", ["write_tensors", "write_json"])
def test_a_run_killed_while_saving_goes_on_from_the_state_before(write, config, tmp_path, monkeypatch):
    train(elsewhere(config, tmp_path))
    original = getattr(harness.state, write)

    def die(file, *args):
        if len(list(Path(config.out).glob("last"))) == 1:
            raise Killed
        return original(file, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(harness.state, write, die)
        train(config)
    assert load_state(Path(config.out) / "last").position == 3
    train(resumed(config))
    assert_same_runs(config.out, str(tmp_path / "other"))


def test_a_run_killed_between_the_two_renames_goes_on(config, tmp_path):
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(8))
    run = Path(config.out)
    (run / "last").rename(run / ".last-old")
    (run / ".last-half").mkdir()
    train(resumed(config))
    assert_same_runs(config.out, str(tmp_path / "other"))
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["best", "last"]


def test_a_finished_run_is_not_resumed(config):
    train(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    with pytest.raises(UserError, match="is finished, all 12 steps"):
        train(resumed(config))
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before


def test_a_run_killed_after_its_last_update_gets_its_picture(config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "plot_runs", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
        train(config)
    assert train(resumed(config)).seen == []
    assert (Path(config.out) / "loss.png").is_file()


def test_another_text_is_refused_and_nothing_touched(config):
    with pytest.raises(Killed):
        train(config, kill_at(8))
    Path(config.data.corpus).write_text("another text altogether. " * 500)
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    with pytest.raises(UserError, match="the training text is not the one it began with"):
        train(resumed(config))
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before


def test_weights_to_begin_with(config, tmp_path):
    done = train(config)
    init = str(Path(config.out) / "last")
    data = dataclasses.replace(config.data, tokenizer=init)
    seen = []
    begun = dataclasses.replace(elsewhere(config, tmp_path), init=init, data=data)

    def make_trainer(config, weights):
        seen.append({name: np.array(weight) for name, weight in weights.items()})
        raise Killed

    with pytest.raises(Killed):
        loop.run(begun, framework="toy", make_trainer=make_trainer)
    for name, weight in done.weights().items():
        np.testing.assert_array_equal(seen[0][name], weight)


def test_a_tokenizer_too_large_for_the_weights_to_begin_with_is_refused(config, tmp_path):
    train(config)
    data = dataclasses.replace(config.data, bpe_vocab_size=257)
    small = dataclasses.replace(config, out=str(tmp_path / "small"), init=str(Path(config.out) / "best"), data=data)
    small = small.with_vocab_size(250)
    with pytest.raises(UserError, match=r"tokenizer has .* tokens, the weights of .* only 250 rows"):
        train(small)
    assert not (tmp_path / "small").exists()
