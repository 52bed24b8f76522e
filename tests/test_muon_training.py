"""The comparison of optimizers: a toy run from end to end, what it resumes, its arithmetic by hand, what it refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import muon_training
from benchmarks.muon_training import OPTIMIZERS, TrainingConfig, time_against, updates_that_fit
from benchmarks.muon_variants import VARIANTS, make_optimizer
from harness import cli
from jax_impl.hybrid import muon_with_adamw
from jax_impl.weights import from_hf
from parity_tests.compare.tolerance import SAFETY, check
from recipe.config import ModelConfig, MuonConfig, RunConfig
from recipe.contract import UNIT_ROUNDOFF
from recipe.params import init_params

MODEL = ModelConfig(vocab_size=300, hidden_size=18, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8)  # fmt: skip
SQUARE, TALL = "model.layers.0.self_attn.q_proj.kernel", "model.layers.0.mlp.down_proj.kernel"
SIZES = ["--steps", "5", "--batch_size", "2", "--sequence_length", "16", "--validation_tokens", "64", "--rounds", "3"]
GRID = ["--muon_rates", "0.01,0.02", "--adamw_rates", "0.001,0.002", "--seeds", "1,2", "--compute", "float32"]


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"{n * n} is the square of {n}, as you may check.\n" for n in range(2_000)))
    data = {"corpus": str(corpus), "bpe_vocab_size": 270, "cache_dir": str(folder / "cache")}
    overrides = {"model": {**vars(MODEL)}, "data": data}
    flags = [*SIZES, *GRID, "--overrides", json.dumps(overrides), "--out", str(folder / "toy")]
    muon_training.main([*flags, "--optimizers", "adamw,muon"])
    return folder / "toy", flags


@pytest.mark.slow
def test_a_toy_run_leaves_lines_a_table_and_a_picture(finished):
    out, _ = finished
    session, *lines = lines_of(out)
    assert {"git_commit", "versions", "cpu", "command", "date", "settings", "baselines"} <= session.keys()
    runs = [line for line in lines if line["kind"] == "run"]
    # Two rates each on the tuning's seed, then the best on two seeds: at equal updates, and perhaps at equal time.
    assert [(run["optimizer"], run["seed"]) for run in runs[:8]] == [
        *(("adamw", 0), ("adamw", 0), ("muon", 0), ("muon", 0)),
        *(("adamw", 1), ("muon", 1), ("adamw", 2), ("muon", 2)),
    ]
    for name in ("adamw", "muon"):
        tuning = {run["rate"]: run["loss"] for run in runs[:4] if run["optimizer"] == name}
        assert len(tuning) == 2 and {run["rate"] for run in runs[4:] if run["optimizer"] == name} == {
            min(tuning, key=tuning.__getitem__)
        }
    assert all(4.0 < run["loss"] < np.log(384) + 0.3 for run in runs)
    (timing,) = (line for line in lines if line["kind"] == "timing")
    assert {name: len(seconds) for name, seconds in timing["seconds"].items()} == {"adamw": 3, "muon": 3}
    table = out.with_suffix(".md").read_text()
    losses = [run["loss"] for run in runs if (run["optimizer"], run["steps"]) == ("muon", 5)][2:]
    assert f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" in table
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(finished, monkeypatch, capsys):
    out, flags = finished
    file = out.with_suffix(".jsonl")
    before = file.read_bytes()
    file.write_bytes(before + b'{"kind": "run", "optim')  # what a kill leaves
    monkeypatch.setattr(muon_training.Bench, "trial", lambda *_: pytest.fail("something ran again"))
    muon_training.main([*flags, "--optimizers", "adamw,muon"])
    assert file.read_bytes() == before and out.with_suffix(".md").read_text() in capsys.readouterr().out


def some_leaves(seed: int) -> dict[str, jax.Array]:
    """A leaf of each kind: matrices nearly square and tall, an embedding, a norm; few compile faster."""
    whole = from_hf(init_params(MODEL, seed), MODEL, RunConfig().precision)
    return {path: whole[path] for path in (SQUARE, TALL, "model.embed_tokens.weight", "model.norm.weight")}


@functools.cache
def second_update(name: str) -> dict[str, jax.Array]:
    """What the variant adds to these leaves at its second update."""
    config, params, grads = RunConfig(model=MODEL), some_leaves(1), some_leaves(2)

    @jax.jit
    def run(params, grads):
        optimizer = make_optimizer(config, name, jnp.float32(0.02), jnp.float32(0.004))
        _, state = optimizer.update(grads, optimizer.init(params), params)
        turned = jax.tree.map(lambda grad: grad**2 - 0.3 * grad, grads)
        return optimizer.update(turned, state, params)[0]

    return run(params, grads)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_variant_steps_and_is_another(name):
    updates, plain = second_update(name), second_update("muon")
    assert all(bool(jnp.all(jnp.isfinite(update)) & jnp.any(update != 0)) for update in updates.values())
    changed = {path for path in plain if bool(jnp.any(updates[path] != plain[path]))}
    if name in ("adamw", "adamw_fast"):
        assert changed == plain.keys()
    else:
        # The rest of the model has the same AdamW; only the long matrix takes the Gram form.
        assert changed == {"muon": set(), "gram": {TALL}}.get(name, {SQUARE, TALL})


def test_plain_muon_is_the_projects_own_update():
    config, params, grads = RunConfig(model=MODEL, muon=MuonConfig(learning_rate=0.03)), some_leaves(1), some_leaves(2)
    own = muon_with_adamw(config.muon, config.adamw, MODEL, schedule=lambda _: jnp.float32(0.5))
    ours = make_optimizer(config, "muon", jnp.float32(0.03 * 0.5), jnp.float32(config.adamw.learning_rate * 0.5))
    theirs, mine = (jax.jit(lambda g, p, o=o: o.update(g, o.init(p), p)[0])(grads, params) for o in (own, ours))
    for path, update in theirs.items():
        # The rates are multiplied in another order: a rounding or two.
        check(path, np.asarray(mine[path]), np.asarray(update), 2 * SAFETY * UNIT_ROUNDOFF["float32"])


def test_time_by_hand():
    # Half of the time in each round, however slow the round was: twice the updates.
    ratio = time_against([1.0, 5.0, 2.0], [2.0, 10.0, 4.0])
    assert ratio == {"low": 0.5, "median": 0.5, "high": 0.5} and updates_that_fit(120, ratio) == 240
    # A ratio whose quartiles have one between them, or that is one to a hundredth, is none.
    assert updates_that_fit(120, {"low": 0.9, "median": 0.95, "high": 1.01}) == 120
    assert updates_that_fit(120, {"low": 1.001, "median": 1.002, "high": 1.003}) == 120
    assert updates_that_fit(120, {"low": 1.1, "median": 1.2, "high": 1.3}) == 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizers", "muon,adamm"], "adamm is unknown"),
        (["--optimizers", "muon,muon"], "names one twice"),
        (["--optimizers", "adamw"], "must have muon"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--muon_rates", "0.1,x"], "0.1,x is not like"),
        (["--adamw_rates", "0.1,0"], "0.1,0 is not like"),
        (["--muon_rates", "0.1"], "1 and --adamw_rates 4"),
        (["--seeds", "1,-1"], "1,-1 is not like"),
        (["--overrides", '{"model": {"width": 3}}'], "no field model.['width']"),
    ],
)
def test_a_mistake_is_one_line(flags, message, capsys):
    assert cli.run(lambda: muon_training.main(flags)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_file_of_other_settings_is_refused(finished, tmp_path, capsys):
    _, flags = finished
    assert cli.run(lambda: muon_training.main([*flags, "--batch_size", "3"])) == 2
    assert "has runs of batch_size=2, not 3" in capsys.readouterr().err
    (tmp_path / "else.jsonl").write_text('{"kind": "row"}\n')
    assert cli.run(lambda: muon_training.main(["--out", str(tmp_path / "else")])) == 2
    assert "is not this benchmark's" in capsys.readouterr().err


def test_the_table_of_variants_is_whole():
    assert tuple(VARIANTS) == OPTIMIZERS == tuple(TrainingConfig().names)
