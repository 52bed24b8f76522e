"""A loop over the layers is the same update as one layer after another, and a program that does not grow with them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_impl import backend, scan, sharding
from jax_impl.train import init_state, make_evaluate, make_train_step
from parity_tests import test_training
from parity_tests.cases import FLOAT64, random_weights
from parity_tests.sides import JaxTraining
from recipe.config import ModelConfig, PrecisionConfig, RunConfig
from recipe.contract import UNIT_ROUNDOFF
from recipe.mesh import parse_mesh
from recipe.params import init_params

ROOT = Path(__file__).resolve().parents[1]
WIDE = PrecisionConfig(params="float64", compute="float64", newton_schulz="float64")
MODEL = ModelConfig(
    vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, dropout=0.1, sliding_window=8, max_window_layers=2,
)  # fmt: skip
"""Two layers of each window: of one alone XLA would make no loop, and then fuses, and rounds, otherwise."""
RUN = RunConfig(model=MODEL, precision=WIDE, batch_size=8, sequence_length=32, accumulation=2, steps=4)


def after(config: RunConfig, updates: int = 1) -> dict[str, np.ndarray]:
    """What a run has after some updates: the last loss, an evaluation, the weights."""
    with jax.enable_x64(True):
        shape = parse_mesh(config.mesh)
        mesh = None if shape is None else sharding.make_mesh(shape)
        state, step = init_state(config, init_params(config.model, 0), mesh), make_train_step(config, mesh)
        size = (2, config.accumulation, config.batch_size, config.sequence_length)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, size, dtype=np.int32)
        for _ in range(updates):
            state, metrics = step(state, *sharding.placed(mesh, *tokens))
        sums = make_evaluate(config, mesh)(state.params, *sharding.placed(mesh, *tokens[:, 0]))
        named = {"loss": metrics["loss"], "evaluation": sums[0], "correct": sums[1], **state.params}
        return {name: np.asarray(x) for name, x in named.items()}


def differing(config: RunConfig, updates: int = 1) -> list[str]:
    """What is not bit for bit the same with and without the loop."""
    layers, loop = after(config, updates), after(dataclasses.replace(config, scan_layers=True), updates)
    assert layers.keys() == loop.keys()
    return [name for name in layers if layers[name].tobytes() != loop[name].tobytes()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_loop_gives_the_updates_of_the_reference():
    """Three updates in float64, with dropout and accumulation; a window of all keys changes nothing but the loops."""
    model = dataclasses.replace(test_training.MODEL, sliding_window=7, max_window_layers=1)
    assert [len(numbers) for numbers in scan.runs(model)] == [1, 2]
    config = dataclasses.replace(test_training.config(FLOAT64, 3), model=model, scan_layers=True)
    history = test_training.record(JaxTraining(config, random_weights(model)), 3)
    test_training.compare(history, test_training.truth(3), UNIT_ROUNDOFF["float64"], 3)


def test_a_loop_gives_the_same_bits(monkeypatch):
    """The short version: one update and an evaluation of two layers, compiled without optimisation."""
    quick = dataclasses.replace(backend.CPU, compiler_options=(("xla_backend_optimization_level", 0),))
    monkeypatch.setitem(backend.MACHINES, "cpu", quick)
    model = dataclasses.replace(MODEL, vocab_size=64, hidden_size=16, num_hidden_layers=2, max_window_layers=0)
    assert differing(dataclasses.replace(RUN, model=model, batch_size=2, accumulation=1)) == []


def test_layers_are_cut_where_their_window_changes():
    assert scan.runs(MODEL) == [range(0, 2), range(2, 4)]
    assert scan.runs(dataclasses.replace(MODEL, sliding_window=None)) == [range(0, 4)]
    assert scan.runs(dataclasses.replace(MODEL, max_window_layers=0)) == [range(0, 4)]


def test_parameters_come_back_from_their_stacks_under_their_names():
    config = dataclasses.replace(RUN, precision=PrecisionConfig(), scan_layers=True)
    params = init_state(config, init_params(MODEL, 0)).params
    stacks = scan.stacked(config)(params)
    assert stacks["model.layers.1.layer.self_attn.q_proj.kernel"].shape == (2, 32, 64)
    back = scan.unstacked(config)(stacks)
    assert back.keys() == params.keys() and all(np.array_equal(back[path], params[path]) for path in params)
    assert scan.stacked(RUN)(params).keys() == params.keys(), "without the loop there are none"


def operations(program) -> int:
    """Operations of a traced program that multiply, those inside others too."""
    count = 0
    for equation in program.eqns:
        count += equation.primitive.name == "dot_general"
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(part, "jaxpr", part)
            count += operations(inner) if hasattr(inner, "eqns") else 0
    return count


def test_the_program_does_not_grow_with_the_layers():
    def products(layers: int, scan_layers: bool) -> int:
        model = dataclasses.replace(MODEL, num_hidden_layers=layers, sliding_window=None, dropout=0.0)
        config = RunConfig(model=model, batch_size=2, sequence_length=8, scan_layers=scan_layers)
        params = init_state(config, init_params(model, 0)).params
        tokens = np.zeros((2, 8), np.int32)
        return operations(make_evaluate(config).__wrapped__.trace(params, tokens, tokens).jaxpr.jaxpr)

    assert products(2, True) == products(4, True)
    assert products(2, False) < products(4, False)


MORE: dict[str, dict] = {
    "one device": {},
    "remat": {"precision": dataclasses.replace(WIDE, remat=True)},
    "one micro-batch": {"accumulation": 1},
    "fsdp": {"mesh": "fsdp=4"},
    "by layer": {"mesh": "fsdp=2,tensor=2", "gather": "layer"},
    "by layer, remat": {"mesh": "fsdp=4", "gather": "layer", "precision": dataclasses.replace(WIDE, remat=True)},
    "data": {"mesh": "data=2,fsdp=2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_loop_gives_the_same_bits_on_every_way(name):
    """In a process of its own, which has as many devices as the mesh."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4" if "mesh" in MORE[name] else ""}
    code = f"import tests.test_scan as t, json; print(json.dumps(t.of({name!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def of(name: str) -> list[str]:
    """What differs after two updates of one of `MORE`."""
    return differing(dataclasses.replace(RUN, **MORE[name]), 2)
