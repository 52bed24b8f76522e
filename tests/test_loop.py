"""The loop around training, driven by a trainer of plain NumPy: killed, interrupted and resumed runs lose nothing."""

import dataclasses
import json
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import harness.state
from harness import loop
from harness.failures import RunFailed, machine_says
from harness.folders import load_folder, save_folder
from harness.manifest import seal
from harness.plot import plot_runs
from harness.runlog import read_metrics
from harness.state import load_state, state_folders
from recipe.config import DataConfig, ModelConfig, RunConfig, UserError
from recipe.lock import fcntl, locked
from recipe.params import init_params, slot_shapes
from recipe.reading import read_json
from recipe.tokenizer import load_tokenizer, train_bpe

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


EMPTY_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\0IEND\xaeB`\x82"


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run's own may catch it."""


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes most of such a run's time; tests/test_runlog.py looks at the picture."""
    monkeypatch.setattr(loop, "plot_runs", lambda folders, picture, baselines: picture.write_bytes(EMPTY_PNG))


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


class Unfinished(float):
    """A number that a device is still computing: reading it moves the clock."""

    clock: list[float]

    def __float__(self):
        self.clock[0] += 40.0
        return float.__add__(self, 0.0)


def test_an_update_takes_until_its_result_can_be_read(config, monkeypatch):
    """A framework hands out what is not computed yet; what only asking for it costs is no time of an update."""
    clock = [0.0]
    monkeypatch.setattr(Unfinished, "clock", clock, raising=False)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])

    class Device(Toy):
        def step(self, *batch):
            metrics = super().step(*batch)
            return metrics | {"loss": Unfinished(metrics["loss"])}

    loop.run(config, framework="toy", make_trainer=Device)
    trained = [record for record in read_metrics(config.out) if record["kind"] == "train"]
    assert [record["dt_ms"] for record in trained] == [40_000.0] * STEPS


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


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGINT is not ignored: a shell that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_run_after_a_whole_update(number, leaves, config, tmp_path, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(leaves) as left:
        train(config, lambda position: signal.raise_signal(number) if position == 4 else None)
    assert number != signal.SIGTERM or left.value.code == 143
    assert "stopping after this update" in capsys.readouterr().err
    assert load_state(Path(config.out) / "last").position == 5 and records(config.out)[-1]["step"] == 5
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    train(resumed(config))
    train(elsewhere(config, tmp_path))
    assert_same_runs(config.out, str(tmp_path / "other"))


@pytest.mark.usefixtures("heard")
def test_a_second_signal_acts_at_once(config):
    def impatient(position: int) -> None:
        if position == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, impatient)
    assert load_state(Path(config.out) / "last").position == 3


@pytest.mark.parametrize("write", ["write_tensors", "seal"])
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
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["best", "earlier", "last"]


def test_the_best_weights_that_a_killed_run_had_set_aside_are_put_back(config, tmp_path, capsys):
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(10))
    (Path(config.out) / "best").rename(Path(config.out) / ".best-old")
    train(resumed(config))
    assert "warning" not in capsys.readouterr().err
    assert_same_runs(config.out, str(tmp_path / "other"))


@pytest.mark.parametrize("file", ["run.json", "model.safetensors"])
def test_a_run_without_a_sound_state_is_refused_and_nothing_is_moved(file, config):
    """A garbled run.json shows at once, a flipped bit of a tensor when it is read."""
    with pytest.raises(Killed):
        train(config, kill_at(8))
    for state in state_folders(Path(config.out)):
        data = bytearray((state / file).read_bytes())
        data[-3] ^= 1
        (state / file).write_bytes(data)
    before = {path.name for path in Path(config.out).iterdir()}
    with pytest.raises(UserError, match=r"holds no sound state: .*(not JSON|is not what was written)"):
        train(resumed(config))
    assert {path.name for path in Path(config.out).iterdir()} == before


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


def refusal(config: RunConfig) -> str:
    """The one line with which a run is refused, its folder untouched."""
    before = sorted(Path(config.out).parent.rglob("*")) if Path(config.out).parent.is_dir() else None
    with pytest.raises(UserError) as caught:
        train(config)
    assert str(caught.value).isprintable()
    if before is not None:
        built = [path for path in Path(config.out).parent.rglob("*") if "cache" not in path.parts]
        assert sorted(built) == [path for path in before if "cache" not in path.parts]
    return str(caught.value)


def with_prompts(*prompts: str, **fields):
    return lambda config, tmp_path: dataclasses.replace(config, sample_tokens=5, prompts=prompts, **fields)


def with_data(**fields):
    return lambda config, tmp_path: dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def with_out(name: str):
    return lambda config, tmp_path: dataclasses.replace(config, out=str(tmp_path / name))


def with_one_number(value: float, name: str = "model.layers.0.mlp.down_proj.weight", dtype: str = "float32"):
    """Begin with weights of which one number is `value`."""

    def change(config: RunConfig, tmp_path: Path) -> RunConfig:
        weights = {key: weight.astype(dtype) for key, weight in init_params(config.model, 0).items()}
        weights[name].flat[3] = value
        save_folder(tmp_path / "init", config.model, weights, dtype=dtype)
        return dataclasses.replace(config, init=str(tmp_path / "init"))

    return change


KNOWN_BEFORE = {
    "an empty prompt": (with_prompts("a", ""), "--prompts '' has no tokens"),
    "a prompt that fills the model": (with_prompts("fox " * 2000), "leaves no room to go on"),
    "a prompt that is not Unicode": (with_prompts("a\udcff"), "is half of a character"),
    "held-out text shorter than a window": (with_data(validation_fraction=0.0001), "the held-out text has"),
    "training text shorter than a window": (with_data(validation_fraction=0.9999), "the training text has"),
    "too few windows to leak": (with_data(split="leaking-windows", max_tokens=9), "leaves one window"),
    "a NaN to begin with": (with_one_number(np.nan), "not finite in float32, in model.layers.0.mlp.down_proj.weight"),
    "an infinity": (with_one_number(-np.inf, "model.embed_tokens.weight"), "in model.embed_tokens.weight;"),
    "too large for the dtype": (with_one_number(1e300, dtype="float64"), "not finite in float32"),
    "a name too long": (with_out("n" * 300), "cannot be a folder"),
    "a name too long, further in": (with_out("new/" + "n" * 300), "has a name of more than 255 bytes"),
    "below a file": (with_out("corpus.txt/run"), "which is a file"),
    "a file": (with_out("corpus.txt"), "already holds files"),
}


@pytest.mark.parametrize("case", KNOWN_BEFORE)
def test_what_can_be_known_before_training_is_refused_before_a_folder_is_made(case, config, tmp_path):
    change, message = KNOWN_BEFORE[case]
    assert message in refusal(change(config, tmp_path))


def test_prompts_do_not_matter_without_samples_and_the_longest_fits(config, tmp_path):
    train(dataclasses.replace(config, prompts=("",), sample_tokens=0))
    room = config.model.max_position_embeddings - 1
    tokenizer = load_tokenizer(Path(config.out) / "last")
    prompt = tokenizer.decode([tokenizer.encode("fox")[0]] * room)
    while len(tokenizer.encode(prompt)) > room:
        prompt = prompt[:-1]
    train(dataclasses.replace(elsewhere(config, tmp_path), prompts=(prompt,), sample_tokens=5))


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("shutil.disk_usage", (10**9, 10**9, 1000), "GB left; make room"),
        ("os.access", False, "may not be written to"),
    ],
)
def test_a_place_without_room_or_leave_is_refused(name, answer, message, config, monkeypatch):
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(
        f"harness.preflight.{name}", lambda *args: usage(*answer) if isinstance(answer, tuple) else answer
    )
    assert message in refusal(config)


class Diverging(Toy):
    """Skips the batches in `bad`, and measures a validation loss that is no number in the evaluations `lost`."""

    bad: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()

    def step(self, inputs_ABT, targets_ABT):
        if self.updates + self.skipped not in self.bad:
            return super().step(inputs_ABT, targets_ABT)
        self.skipped += 1
        return {"loss": np.nan, "grad_norm": np.nan, "lr": 0.1, "skipped": self.skipped}

    def evaluate(self, batches):
        position = self.updates + self.skipped
        return (np.nan, 0.0) if position in self.lost else super().evaluate(batches)


def diverge(config: RunConfig, bad, lost=()) -> None:
    trainer = type("Bad", (Diverging,), {"bad": frozenset(bad), "lost": frozenset(lost)})
    loop.run(config, framework="toy", make_trainer=trainer)


# Never more than half of a run's updates, of which there are twelve.
FAILED = {
    "no update applied": (range(STEPS), (), 20, "6 updates in a row were skipped: their gradients were not finite", 0),
    "from the first on": (range(STEPS), (), 5, "5 updates in a row were skipped", 0),
    "from the seventh on": (range(6, STEPS), (), 4, "4 updates in a row were skipped", 6),
    "no evaluation gave a number": ((), range(STEPS + 1), 20, "no validation loss was finite", 12),
}


@pytest.mark.parametrize("log_every", [1, 7])
@pytest.mark.parametrize("case", FAILED)
def test_a_run_that_comes_to_nothing_says_so_and_keeps_its_last_good_state(case, log_every, config):
    bad, lost, most, message, position = FAILED[case]
    config = dataclasses.replace(config, max_skipped=most, log_every=log_every)
    with pytest.raises(RunFailed) as ended:
        diverge(config, bad, lost)
    line = str(ended.value)
    assert message in line and line.isprintable() and machine_says(ended.value) == (1, line)
    run = Path(config.out)
    assert ("best/" in line) == (run / "best").is_dir()
    assert ("last/" in line) == bool(position) == bool(state_folders(run)) == ("--on_divergence rollback" in line)
    if position:
        assert load_state(run / "last").position == position
        again = resumed(config)
    else:
        again = config  # nothing was saved, so the same command begins it again
    evidence = sorted(run.glob("divergence-*.json"))
    assert len(evidence) == (case != "no evaluation gave a number")
    with pytest.raises(RunFailed) as ended:
        diverge(again, bad, lost)
    assert str(ended.value).partition(";")[0] == line.partition(";")[0]
    assert len(sorted(run.glob("divergence-*.json"))) == 2 * len(evidence)


ENDED_WELL = {"one": [4], "often, never five in a row": [0, 1, 2, 3, 5, 6, 7, 8], "the last ones": [8, 9, 10, 11]}


@pytest.mark.parametrize("case", ENDED_WELL)
def test_a_few_skipped_updates_are_left_out_and_the_run_goes_on(case, config):
    diverge(dataclasses.replace(config, max_skipped=5), set(ENDED_WELL[case]) - {SKIPPED})
    state = load_state(Path(config.out) / "last")
    assert state.position == STEPS and (Path(config.out) / "best").is_dir()


def test_an_evaluation_without_a_number_is_said_and_is_not_the_best(config, capsys):
    diverge(config, (), [8])
    out = capsys.readouterr().out
    assert out.count("warning: the validation loss after step 8 is nan") == 1 == out.count("warning")
    assert np.isfinite(load_state(Path(config.out) / "last").best)


@pytest.mark.parametrize("odd", ["\u6f22 \u00e9", "$a^$", b"caf\xe9\n\x1b[31m".decode("utf-8", "surrogateescape")])
def test_a_run_goes_to_its_end_whatever_its_paths_are_called(odd, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "plot_runs", plot_runs)
    corpus = Path(config.data.corpus).rename(tmp_path / f"{odd}.txt")
    data = dataclasses.replace(config.data, corpus=str(corpus))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the picture then has a box for it
        train(dataclasses.replace(config, out=str(tmp_path / odd), data=data))
    assert (tmp_path / odd / "loss.png").is_file()
    said = capsys.readouterr().out
    said.encode()
    assert "\x1b" not in said


def test_the_samples_are_utf_8_whatever_the_locale(config, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    train(dataclasses.replace(config, sample_tokens=5, prompts=("caf\u00e9 \ufffd \u6f22",)))
    assert "caf\u00e9 \ufffd \u6f22" in (Path(config.out) / "samples.txt").read_text(encoding="utf-8")


@pytest.fixture
def killed(config, tmp_path):
    """A run with somebody's tokenizer, killed after the state of step 9; the best evaluation was that of step 8."""
    words = Path(config.data.corpus).read_text(encoding="utf-8")
    (tmp_path / "init").mkdir()
    train_bpe([words], 280).save(tmp_path / "init")
    data = dataclasses.replace(config.data, tokenizer=str(tmp_path / "init"))
    config = dataclasses.replace(config, data=data)
    train(elsewhere(config, tmp_path))
    with pytest.raises(Killed):
        train(config, kill_at(10))
    return config


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_is_resumed_with_nothing_but_its_folder_and_its_text(killed, tmp_path, cached):
    shutil.rmtree(tmp_path / "init")
    if not cached:
        shutil.rmtree(tmp_path / "cache")
    train(resumed(killed))
    assert_same_runs(killed.out, str(tmp_path / "other"))
    tokenizers = [
        (run / part / "tokenizer.json").read_bytes()
        for run in (Path(killed.out), tmp_path / "other")
        for part in ("best", "last")
    ]
    assert len(set(tokenizers)) == 1


def damage_best(how: str, best: Path) -> None:
    weights = best / "model.safetensors"
    if how == "deleted":
        shutil.rmtree(best)
    elif how == "emptied":
        shutil.rmtree(best)
        best.mkdir()
    elif how == "a file":
        shutil.rmtree(best)
        best.write_bytes(b"")
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "garbled":
        weights.write_bytes(b"nonsense")
    else:
        (best / how).unlink()


HOW = ("deleted", "emptied", "a file", "cut short", "garbled", "config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_best_is_set_aside_and_that_is_said(killed, how, capsys):
    best = Path(killed.out) / "best"
    loss = load_state(Path(killed.out) / "last").best
    damage_best(how, best)
    train(resumed(killed))
    warning = capsys.readouterr().err.splitlines()
    assert len([line for line in warning if f"it is lost, with its loss of {loss:.4f}" in line]) == 1
    assert (best.parent / "best-damaged-1").exists() == (how != "deleted")
    load_folder(best)


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_best_is_written_again_where_last_is_as_good(config, how, capsys):
    config = dataclasses.replace(config, eval_every=2, save_every=2)
    with pytest.raises(Killed):
        train(config, kill_at(3))
    best, last = Path(config.out) / "best", Path(config.out) / "last"
    state = load_state(last)
    (row,) = [r for r in records(config.out) if r["kind"] == "validation" and r["step"] == state.position]
    assert row["loss"] == state.best, "or the toy's losses have changed"
    before = dict(load_folder(best)[1].items())
    damage_best(how, best)
    with pytest.raises(Killed):
        train(resumed(config), kill_at(2))
    assert "written again from last/" in capsys.readouterr().err
    for name, weight in load_folder(best)[1].items():
        np.testing.assert_array_equal(weight, before[name])
    assert f"Validation loss {state.best:.4f} nats" in (best / "README.md").read_text(encoding="utf-8")


def test_a_text_that_is_gone_says_what_to_restore(killed, tmp_path):
    Path(killed.data.corpus).unlink()
    message = refusal(resumed(killed))
    assert "needs the text it began with, so restore that" in message and "corpus.txt does not exist" in message


def test_another_tokenizer_in_the_state_is_refused(killed):
    for state in state_folders(Path(killed.out)):
        train_bpe(["something else entirely"], 270).save(state)
        values = read_json(state / "run.json")
        del values["checksum"]
        seal(state, "run.json", values, {})
    assert "the training text is not the one it began with" in refusal(resumed(killed))


@pytest.mark.skipif(fcntl is None, reason="nobody can tell without locks")
@pytest.mark.parametrize("begun", [True, False])
def test_a_run_has_one_process_at_a_time(config, begun):
    """A second one, while the first trains or while it begins."""
    if begun:
        with pytest.raises(Killed):
            train(config, kill_at(8))
    before = None

    def intrude(position: int) -> None:
        nonlocal before
        if before is None:
            before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
            if begun:
                with pytest.raises(UserError, match="is being trained by another process; wait for it, or stop it"):
                    train(resumed(config))
            assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before
            with locked(Path(config.out)) as held:
                assert held is False

    train(resumed(config) if begun else config, intrude)
    assert before and [r["step"] for r in records(config.out) if r["kind"] == "train"] == list(range(1, STEPS + 1))
    with locked(Path(config.out)) as held:
        assert held
    assert not [path for path in Path(config.out).iterdir() if path.name.startswith(".")]


def test_samples_that_cannot_be_written_cost_neither_weights_nor_picture(config, monkeypatch):
    """Logits may be infinite although every loss was a number; that shows when all else is done."""

    def generate(self, tokens, options):
        raise UserError("the logits are not finite")

    monkeypatch.setattr(Toy, "generate", generate)
    train(dataclasses.replace(config, steps=3, sample_tokens=4, prompts=("fox",)))
    run = Path(config.out)
    assert (run / "samples.txt").read_text(encoding="utf-8") == "fox [the logits are not finite]\n"
    assert (run / "loss.png").exists() and (run / "last" / "run.json").is_file()
