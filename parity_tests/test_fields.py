"""Every field matters: for each leaf of RunConfig and of SamplingOptions, changing it alone changes the result.

Fields that an update reads are changed in torch; that JAX obeys them too is what `test_one_update.py` shows, whose run
has none of them at its default. Sampling is changed in both halves. No field is left out: the last test counts them.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import jax_impl.attention
import jax_impl.generate
import jax_impl.train
import torch_ref.generate
import torch_ref.train
from harness import loop
from harness.cli import leaves
from harness.failures import RunFailed
from harness.runlog import read_metrics
from jax_impl import backend
from parity_tests.cases import AWKWARD, FLOAT32, random_tokens, random_weights
from parity_tests.sides import JaxModel, TorchModel, TorchTraining
from parity_tests.test_one_update import ELSEWHERE, RUN, RUNS
from parity_tests.test_promises import jax_ops, torch_ops
from recipe.config import DataConfig, ModelConfig, RunConfig, UserError
from recipe.data import prepare
from recipe.params import init_params, slot_shapes
from recipe.sampling import SamplingOptions
from recipe.tokenizer import train_bpe

DEFAULT = RunConfig()


def changed(config: Any, name: str, value: Any) -> Any:
    """The configuration with one leaf, a dotted name, set."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


# What an update reads: set back to its default, one at a time, in the run of the third opinion.
UPDATES = {name: value for name, _, value in leaves(RunConfig, DEFAULT)
           if name.partition(".")[0] in ("model", "muon", "adamw", "schedule")
           and name.rpartition(".")[2] not in ELSEWHERE} | {
    "steps": 12, "clip_norm": 1.0, "seed": 0,
}  # fmt: skip
SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
UPDATES |= {f"model.{name}": 2 * getattr(RUN.model, name) for name in (*SHAPES, "num_key_value_heads")}
UPDATES["model.num_key_value_heads"] = 3
UPDATES["model.num_attention_heads"] = 4
# The window is None by default, and then nobody asks from which layer on.
UPDATES["model.max_window_layers"] = 0


@functools.cache
def after_updates(run: RunConfig) -> list[np.ndarray]:
    """Loss and weights after three updates of torch's."""
    training = TorchTraining(run, random_weights(run.model))
    shape, values = (run.accumulation, run.batch_size, run.sequence_length), []
    for step in range(3):
        metrics = training.step(*(random_tokens(RUN.model, *shape, seed=2 * step + which) for which in (1, 2)))
        values.append(np.array([metrics["loss"], metrics["lr"]]))
    return [*values, *training.weights().values()]


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_reads(name):
    runs = [run for run in RUNS.values() if functools.reduce(getattr, name.split("."), run) != UPDATES[name]]
    assert any(not same(after_updates(run), after_updates(changed(run, name, UPDATES[name]))) for run in runs)


# What the draw of the weights and the check of a length read.
def test_the_initial_weights_read_their_deviation_and_the_seed():
    name = "model.layers.0.mlp.up_proj.weight"
    first = init_params(AWKWARD, 0)[name]
    wider = init_params(dataclasses.replace(AWKWARD, initializer_range=0.04), 0)[name]
    np.testing.assert_array_equal(wider, 2 * first)
    assert not np.array_equal(init_params(AWKWARD, 1)[name], first)


@pytest.mark.parametrize("side", [JaxModel, TorchModel])
def test_positions_are_a_limit(side):
    model = dataclasses.replace(AWKWARD, max_position_embeddings=6)
    for length in (6, 7):
        with contextlib.nullcontext() if length == 6 else pytest.raises(UserError, match="max_position_embeddings=6"):
            side(model, FLOAT32, random_weights(model)).logits(random_tokens(model, 1, length))


# What becomes tokens.
@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    words = np.random.default_rng(0).choice("a quick brown fox jumps over the lazy dog".split(), (40, 60))
    records = [{"text": " ".join(row), "other": " ".join(reversed(row))} for row in words]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "first.jsonl").write_text(lines, encoding="utf-8")
    (folder / "second.jsonl").write_text(lines.replace("fox", "wolf"), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    train_bpe(["some other text of foxes"], 280).save(folder / "tokenizer")
    return folder


def data_config(texts: Path, **fields) -> DataConfig:
    base = dict(corpus=str(texts / "first.jsonl"), bpe_vocab_size=300, validation_tokens=64, validation_fraction=0.2)
    return DataConfig(**base | dict(cache_dir=str(texts / "cache")) | fields)


DATA: dict[str, Callable[[Path], Any]] = {
    "corpus": lambda texts: str(texts / "second.jsonl"),
    "text_field": lambda texts: "other",
    "tokenizer": lambda texts: str(texts / "tokenizer"),
    "bpe_vocab_size": lambda texts: 270,
    "max_documents": lambda texts: 9,
    "max_characters": lambda texts: 50,
    "max_tokens": lambda texts: 100,
    "split": lambda texts: "leaking-windows",
    "validation_fraction": lambda texts: 0.4,
    "validation_tokens": lambda texts: 128,
    "document_mask": lambda texts: True,
}


def prepared(config: DataConfig) -> list[np.ndarray]:
    dataset = prepare(config, seed=0, show_progress=False)
    batches = dataset.validation_batches(2, 8, config.validation_tokens)
    return [dataset.train_tokens, *dataset.batch(0, accumulation=1, batch_size=2, sequence_length=8),
            *(array for batch in batches for array in batch)]  # fmt: skip


@pytest.mark.parametrize("field", DATA)
def test_the_tokens_depend_on(field, texts):
    config = data_config(texts)
    other = dataclasses.replace(config, **{field: DATA[field](texts)})
    assert getattr(other, field) != getattr(config, field)
    assert not same(prepared(config), prepared(other))
    assert same(prepared(config), prepared(dataclasses.replace(config)))


def test_the_cache_lies_where_it_is_put(texts, tmp_path):
    config = data_config(texts, cache_dir=str(tmp_path / "elsewhere"))
    assert same(prepared(config), prepared(data_config(texts)))
    assert list((tmp_path / "elsewhere").glob("*/train.npy"))


# How it is computed: read from the programs.
def jax_program(**fields) -> str:
    precision = dataclasses.replace(FLOAT32, **fields)
    model = dataclasses.replace(AWKWARD, num_hidden_layers=1)
    with jax.enable_x64("float64" in fields.values()), jax.default_matmul_precision(precision.matmul):
        side = JaxModel(model, precision, random_weights(model))
        tokens = random_tokens(model, 1, 5)
        return str(
            jax.make_jaxpr(lambda params: jax_impl.weights.bind(side.graph, params).loss(tokens, tokens))(side.params)
        )


def torch_program(**fields) -> dict:
    precision = dataclasses.replace(FLOAT32, **fields)
    model = dataclasses.replace(AWKWARD, num_hidden_layers=1)
    tokens = torch.tensor(random_tokens(model, 1, 5)).long()
    module = TorchModel(model, precision, random_weights(model)).module
    return torch_ops(lambda: module.loss(tokens, tokens).backward())


PRECISION = {"compute": "bfloat16", "remat": True}


@pytest.mark.parametrize("field", PRECISION)
def test_both_programs_depend_on(field):
    for program in (jax_program, torch_program):
        assert program() == program() != program(**{field: PRECISION[field]})
    wide = dict(params="float64", compute="float64")
    assert jax_program(**wide) != jax_program() and torch_program(**wide) != torch_program()


@pytest.mark.parametrize("params", ["float32", "float64"])
def test_parameters_are_kept_in_their_dtype(params):
    precision = dataclasses.replace(FLOAT32, params=params, compute=params)
    for side in (JaxModel, TorchModel):
        assert {x.dtype.name for x in side(AWKWARD, precision, random_weights(AWKWARD)).weights().values()} == {params}


def test_products_depend_on_their_precision():
    assert jax_program(matmul="default") != jax_program()
    for matmul in ("default", "highest"):
        run = changed(RUN, "precision", dataclasses.replace(FLOAT32, matmul=matmul))
        assert torch_ref.train.Trainer(run, random_weights(run.model)).environment["tf32"] == (matmul == "default")


def test_deterministic_is_asked_of_both_frameworks(monkeypatch):
    # Trainers for a GPU that is not there: one is asked for its options, the other for torch's own switch.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    asked = []
    monkeypatch.setattr(
        jax, "jit", lambda function, compiler_options=None, **_: asked.append(compiler_options) or function
    )
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    weights, seen = random_weights(RUN.model), {}
    try:
        for value in (True, False):
            run = changed(RUN, "precision", dataclasses.replace(FLOAT32, deterministic=value))
            jax_impl.train.make_train_step(run)
            torch_ref.train.Trainer(run, weights)
            seen[value] = (
                asked[-1].get("xla_gpu_exclude_nondeterministic_ops"),
                torch.are_deterministic_algorithms_enabled(),
            )
        assert seen == {True: (True, True), False: (None, False)}
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_newton_schulz_runs_in_its_dtype():
    results = {}
    for dtype in ("float32", "bfloat16"):
        run = changed(RUN, "precision", dataclasses.replace(FLOAT32, newton_schulz=dtype))
        results[dtype] = after_updates(run)
        optimizer = jax_impl.train.make_optimizer(run)
        state = jax_impl.train.init_state(run, random_weights(run.model))
        found = jax_ops(
            lambda g, s, p, optimizer=optimizer: optimizer.update(g, s, p), state.params, state.opt_state, state.params
        )
        assert (("rounding", "bfloat16") in found) == (dtype == "bfloat16")
    assert not same(*results.values())


def test_attention_is_fused_where_it_can_be(monkeypatch):
    seen = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: seen.append(1) or sdpa(*a, **k)
    )
    torch_program(), torch_program(attention="fused")
    assert seen == [1]
    monkeypatch.setitem(backend.MACHINES, "cpu", backend.GPU)
    for attention in ("explicit", "fused"):
        precision = dataclasses.replace(FLOAT32, compute="bfloat16", attention=attention)
        assert jax_impl.attention.attention_in_use(precision, 0.0) == attention


# What the loop reads: files, records, lines.
class Counting:
    """A trainer that trains nothing and notes what it is asked for."""

    def __init__(self, config: RunConfig, weights) -> None:
        self.environment, self.config, self.asked = {"device": "abacus"}, config, []
        self._weights = {name: np.array(weight) for name, weight in weights.items()}
        self.updates = self.skipped = 0

    def step(self, inputs_ABT, targets_ABT):
        self.asked.append(("step", inputs_ABT.shape, int(inputs_ABT.sum())))
        # Batches 3 to 6 are skipped.
        if 3 <= self.updates + self.skipped < 7:
            self.skipped += 1
        else:
            self.updates += 1
        return {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "skipped": self.skipped}

    def evaluate(self, batches):
        self.asked.append(("evaluate", sum(inputs.size for inputs, _ in batches)))
        return 5.0 - 0.1 * self.updates, 0.5

    def weights(self):
        self.asked.append(("weights",))
        return dict(self._weights)

    def slots(self):
        self.asked.append(("slots",))
        shapes = slot_shapes(self.config.model)
        return {slot: {name.removeprefix(slot + "."): np.zeros(shape, np.float32) for name, shape in shapes.items()
                       if name.startswith(slot + ".")} for slot in ("mu", "exp_avg", "exp_avg_sq")}  # fmt: skip

    def counts(self):
        return self.updates, self.skipped

    def generate(self, tokens, options):
        self.asked.append(("generate", tuple(tokens), options.max_new_tokens, options.seed))
        return []

    @contextlib.contextmanager
    def profile(self, folder):
        self.asked.append(("profile", sum(entry[0] == "step" for entry in self.asked)))
        yield
        self.asked.append(("profiled", sum(entry[0] == "step" for entry in self.asked)))


LOOP = {
    "steps": 13,
    "accumulation": 2,
    "batch_size": 3,
    "sequence_length": 9,
    "log_every": 5,
    "eval_every": 5,
    "save_every": 5,
    "prompts": ("dog",),
    "sample_tokens": 3,
    "max_skipped": 3,
    "profile_steps": 2,
    "tensorboard": True,
    "track": "wandb",
    "seed": 1,
    "preset": "seed",
}


@pytest.mark.parametrize("field", ["nothing", *LOOP])
def test_a_run_depends_on(field, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "plot_runs", lambda folders, picture, baselines: picture.touch())
    monkeypatch.setattr(loop, "check_tracker", lambda name: None)
    tracked = {"wandb": lambda folder, *_: (lambda *_: None, lambda: (folder / "tracked").touch())}
    monkeypatch.setattr("harness.trackers.BEGIN", tracked)
    model = ModelConfig(vocab_size=384, hidden_size=6, intermediate_size=4, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=2)  # fmt: skip
    base = RunConfig(
        steps=12, batch_size=2, sequence_length=8, log_every=4, eval_every=4, save_every=4, sample_tokens=2,
        prompts=("fox",), model=model, data=data_config(texts),
    )  # fmt: skip

    def outcome(config: RunConfig, name: str) -> tuple:
        config, made = dataclasses.replace(config, out=str(tmp_path / name)), []

        def make_trainer(*args):
            made.append(Counting(*args))
            return made[0]

        with contextlib.suppress(RunFailed):
            loop.run(config, framework="toy", make_trainer=make_trainer)
        timing = ("seconds", "tok_s", "dt_ms")
        records = [{k: v for k, v in record.items() if k not in timing} for record in read_metrics(config.out)]
        files = sorted(path.name.partition(".tfevents")[0] for path in Path(config.out).rglob("*"))
        run = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))["config"]["preset"]
        lines = [
            line.partition(" | tok/s")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("step")
        ]
        return made[0].asked, records, files, run, lines

    first = outcome(base, "first")
    other = outcome(base if field == "nothing" else dataclasses.replace(base, **{field: LOOP[field]}), "other")
    assert (first == other) == (field == "nothing")


# How a token is chosen.
SAMPLING = {
    "max_new_tokens": 9,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.3,
    "min_p": 0.5,
    "repetition_penalty": 1.9,
    "seed": 1,
    "samples": 2,
    "stop_ids": tuple(range(0, 53, 2)),
    "stop": ("x",),
}
GENERATE = {"jax": jax_impl.generate, "torch": torch_ref.generate}


@functools.cache
def generator(side: str):
    weights = random_weights(AWKWARD)
    return GENERATE[side].make_generator(AWKWARD, RunConfig().precision, weights)


@functools.cache
def sampled(side: str, options: SamplingOptions) -> list[list[int]]:
    return generator(side).batch([[1, 2, 3], [4]], options)


@pytest.mark.parametrize("side", GENERATE)
@pytest.mark.parametrize("field", SAMPLING)
def test_the_tokens_chosen_depend_on(field, side):
    base = SamplingOptions(max_new_tokens=12)
    options = dataclasses.replace(base, **{field: SAMPLING[field]})
    if field == "stop":
        # Strings are for text; tests/test_generation.py cuts texts before them.
        with pytest.raises(UserError, match="only tokens"):
            generator(side).batch([[1]], options)
    else:
        assert sampled(side, base) == sampled(side, base) != sampled(side, options)
    if field == "samples":
        first, second, *_ = sampled(side, options)
        assert first != second, "samples of one prompt differ from each other"


# Who shows which field.
OTHERS = {
    "out": "every test of the loop has a folder of its own",
    "init": "tests/test_loop.py::test_weights_to_begin_with",
    "resume": "tests/test_loop.py::test_a_killed_run_resumed_equals_an_uninterrupted_one",
    "keep": "tests/test_may_differ.py::test_another_number_of_states_is_kept_from_then_on",
    "divergence_factor": "tests/test_divergence.py::test_the_factor_decides",
    "max_diverging": "tests/test_divergence.py::test_the_limits_decide",
    "on_divergence": "tests/test_divergence.py::test_a_run_that_may_not_roll_back_stops",
    "max_rollbacks": "tests/test_divergence.py::test_a_run_that_may_not_roll_back_stops",
    "rollback_factor": "tests/test_divergence.py::test_a_rollback_passes_over_the_batches_it_has_seen",
    "mesh": "parity_tests/test_sharding.py",
    "gather": "parity_tests/test_sharding.py",
    "scan_layers": "tests/test_scan.py",
    **{f"hosts.{name}": "tests/test_hosts.py" for name in ("coordinator", "count", "index", "heartbeat")},
    "model.initializer_range": "test_the_initial_weights_read_their_deviation_and_the_seed",
    "model.max_position_embeddings": "test_positions_are_a_limit",
    "data.cache_dir": "test_the_cache_lies_where_it_is_put",
    "data.chat": "tests/test_chat_data.py::test_batches_are_a_function_of_the_step_and_use_each_row_once_an_epoch",
    "precision.params": "test_parameters_are_kept_in_their_dtype",
    "precision.newton_schulz": "test_newton_schulz_runs_in_its_dtype",
    "precision.matmul": "test_products_depend_on_their_precision",
    "precision.attention": "test_attention_is_fused_where_it_can_be",
    "precision.deterministic": "test_deterministic_is_asked_of_both_frameworks",
}


def test_every_field_is_shown_to_matter():
    shown = {*UPDATES, *LOOP, *OTHERS, *(f"data.{name}" for name in DATA), *(f"precision.{name}" for name in PRECISION)}
    assert shown == {name for name, _, _ in leaves(RunConfig, DEFAULT)}
    assert set(SAMPLING) == {field.name for field in dataclasses.fields(SamplingOptions)}
