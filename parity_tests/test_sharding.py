"""Updates on meshes of eight devices against the float64 reference on one, and what is sent against the formula."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_impl import exchange, sharding, train
from jax_impl.traffic import sent
from jax_impl.weights import param_paths
from parity_tests.cases import random_weights
from parity_tests.compare.tolerance import check, relative_error
from parity_tests.sides import TorchModel, TorchTraining
from parity_tests.test_training import PROBE, ROUNDINGS, SAFETY
from parity_tests.updates_on_meshes import CASES, LENGTH, ROWS, UPDATES, batches, config_of
from recipe.config import RunConfig, UserError
from recipe.contract import UNIT_ROUNDOFF
from recipe.mesh import MeshShape, parse_mesh
from recipe.params import param_specs
from recipe.presets import get_preset

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ["all", "other"]
NIGHTLY = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in ALWAYS]
ON_EVERY_MESH = [*ALWAYS, *NIGHTLY]
IN_FLOAT64 = [case for case in ON_EVERY_MESH if case in ALWAYS or CASES[case.values[0]][3].params == "float64"]


@functools.cache
def outcome(folder: Path, case: str) -> dict:
    """Facts of a case, what it returned, and what XLA said, run in a process of eight devices."""
    # Machine code need not be good; the program is the same.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    # The first import plants the bug that `parity_tests.mutants` asks for, if it does.
    module = "parity_tests.updates_on_meshes"
    code = f"import parity_tests.mutation, runpy; runpy.run_module({module!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, str(folder), case]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads((folder / "cases.json").read_text(encoding="utf-8"))[case]
    return facts | {"said": done.stderr, "results": dict(np.load(folder / f"{case}.npz"))}


@pytest.fixture(scope="module")
def of_case(tmp_path_factory):
    """`outcome` in a folder of its own."""
    return functools.partial(outcome, tmp_path_factory.mktemp("meshes"))


@functools.cache
def reference(model: str, probe: int | None = None) -> dict[str, np.ndarray]:
    """What torch's one device gives after each update in float64, and its evaluations; moved by noise if `probe`."""
    config = config_of(next(case for case in CASES if CASES[case][0] == model and CASES[case][3].params == "float64"))
    weights = random_weights(config.model)
    if probe is not None:
        generator = np.random.default_rng(probe)
        noise = {name: PROBE * generator.uniform(-1.0, 1.0, weight.shape) for name, weight in weights.items()}
        weights = {name: weight * (1.0 + noise[name]) for name, weight in weights.items()}
    training = TorchTraining(dataclasses.replace(config, mesh="", gather="update"), weights)
    history = {}
    for number, batch in enumerate(batches(config.model)):
        entry = {name: np.array(value) for name, value in training.step(*batch).items()} | training.weights()
        slots = training.slots()
        entry |= {f"{slot} {name}": array for slot, arrays in slots.items() for name, array in arrays.items()}
        history |= {f"{number}/{name}": np.array(array) for name, array in entry.items()}
    inputs_ABT, targets_ABT = batches(config.model)[0]
    end = TorchModel(config.model, config.precision, training.weights())
    for rows in (ROWS, 3):
        loss, correct = end.evaluate(inputs_ABT[0, :rows], targets_ABT[0, :rows])
        history |= {f"evaluate/{rows} loss": np.array(loss), f"evaluate/{rows} correct": np.array(correct)}
    return history


@functools.cache
def amplification(model: str) -> dict[str, float]:
    """What becomes of a relative change of PROBE in the weights, by name, the largest of three and of steps so far."""
    kappas: dict[str, float] = {}
    for name, truth in reference(model).items():
        step, _, what = name.partition("/")
        before = kappas.get(f"{int(step) - 1}/{what}", 1.0) if step.isdigit() else 1.0
        moved = [relative_error(reference(model, probe)[name], truth) / PROBE for probe in range(3)]
        kappas[name] = max(before, *moved)
    return kappas


@pytest.mark.parametrize("case", IN_FLOAT64)
def test_updates_are_those_of_one_device(of_case, case):
    """Loss, norm, every parameter and slot after each update, and evaluations, whose rows may not divide."""
    model, results = CASES[case][0], of_case(case)["results"]
    truth = reference(model)
    assert results.keys() == truth.keys()
    for name, expected in truth.items():
        step = int(name.partition("/")[0]) if name[0].isdigit() else UPDATES - 1
        u = UNIT_ROUNDOFF["float64"]
        allowance = SAFETY * ROUNDINGS * (step + 1) * amplification(model)[name] * u
        check(f"{case}: {name}", results[name], expected, allowance)
    norms = [float(results[f"{step}/grad_norm"]) for step in range(UPDATES)]
    assert max(norms) > config_of(case).clip_norm, "the clip must have clipped"


@pytest.mark.slow
def test_updates_in_bfloat16_are_no_worse_than_one_devices(of_case):
    """Against the float64 truth, root mean square over all tensors, beside the reference's own in bfloat16."""
    config, results = dataclasses.replace(config_of("half"), mesh=""), of_case("half")["results"]
    training, truth = TorchTraining(config, random_weights(config.model)), reference("divides")
    ours, theirs = [], []
    for number, batch in enumerate(batches(config.model)):
        training.step(*batch)
        for name, weight in training.weights().items():
            key = f"{number}/{name}"
            ours.append(relative_error(results[key], truth[key]))
            theirs.append(relative_error(weight, truth[key]))
    rms = [math.sqrt(np.mean(np.square(errors))) for errors in (ours, theirs)]
    assert rms[0] <= SAFETY * rms[1], f"{rms[0]:.2e} on the mesh, {rms[1]:.2e} on one device"


@pytest.mark.parametrize("case", ON_EVERY_MESH)
def test_what_is_sent_is_what_the_formula_says(of_case, case):
    """Bytes by kind and width, loops counted by their trips.

    XLA:CPU widens 16-bit sums to float32, and merges gathers by layer that give the same, forward and backward.
    """
    facts, found, paper, fewest = of_case(case), Counter(), Counter(), Counter()
    for one in facts["collectives"]:
        found[one["kind"], one["width"]] += one["sent"] * one["times"]
    for one in facts["paper"]:
        widened = 2 if one["kind"] == "all-reduce" and one["width"] == 2 else 1
        key, merges = (one["kind"], widened * one["width"]), one["part"] == "weights" and one["times"] > 1
        paper[key] += widened * one["bytes"] * one["times"]
        fewest[key] += widened * one["bytes"] * (1 if merges else one["times"])
    assert found.keys() == (+paper).keys()
    wrong = [key for key in found if not fewest[key] <= found[key] <= paper[key]]
    assert not wrong, (found, paper)
    if config_of(case).gather == "update":
        assert found == +paper


@pytest.mark.parametrize("case", ON_EVERY_MESH)
def test_muon_takes_its_own_way(of_case, case):
    """Two all-to-alls for all matrices, and one all-gather if there are replicas: nothing fell back to another way."""
    facts, shape = of_case(case), parse_mesh(CASES[case][1])
    assert shape is not None
    kinds = Counter(one["kind"] for one in facts["collectives"] if one["kind"] == "all-to-all")
    of_paper = [one["kind"] for one in facts["paper"] if one["part"] == "muon"]
    assert kinds["all-to-all"] == of_paper.count("all-to-all") == (0 if shape.data == 8 else 2)
    assert not [one for one in facts["collectives"] if one["kind"] == "all-to-all" and one["in_loop"]]


@pytest.mark.parametrize("case", ON_EVERY_MESH)
def test_three_updates_are_one_program_and_nothing_moves(of_case, case):
    facts = of_case(case)
    assert (facts["programs"], facts["moved"]) == (1, 0)
    assert "Involuntary full rematerialization" not in facts["said"]


@pytest.mark.parametrize("case", ON_EVERY_MESH)
def test_a_device_keeps_its_share(of_case, case):
    """What a program is given on each device: parts of parameters and slots, rows, and the counts."""
    facts, config = of_case(case), config_of(case)
    layout, specs = sharding.layout_of(config), param_specs(config.model)
    assert layout is not None
    width = np.dtype(config.precision.params).itemsize
    shares = {
        path: math.prod(specs[name].shape) * width // layout.ways(tuple(x for x in layout.spec(path) if x))
        for path, name in param_paths(config.model).items()
    }
    assert facts["kept"] == shares
    of_muon = {path for path, name in param_paths(config.model).items() if specs[name].role == "matrix"}
    slots = sum(share * (1 if path in of_muon else 2) for path, share in shares.items())
    tokens = 2 * 4 * config.tokens_per_step // layout.shape.rows
    assert facts["arguments"] == sum(shares.values()) + slots + tokens + 4 * facts["counts"]


def zeros(config: RunConfig) -> dict[str, np.ndarray]:
    return {name: np.zeros(spec.shape) for name, spec in param_specs(config.model).items()}


@pytest.mark.parametrize(("case", "bits"), [("by-layer", "uint64"), ("half", "uint16")])
def test_weights_travel_narrow_and_by_layer_again_in_the_backward_pass(case, bits):
    """In the program before XLA merges what is the same on a CPU: as often as the formula says, per micro-batch."""
    config = config_of(case)
    layout, shape = sharding.layout_of(config), parse_mesh(config.mesh)
    assert layout is not None and shape is not None
    mesh = jax.sharding.AbstractMesh(tuple(shape), MeshShape._fields)
    with jax.enable_x64(config.precision.params == "float64"):
        shapes = jax.eval_shape(lambda: train.init_state(dataclasses.replace(config, mesh=""), zeros(config)))
        lies = sharding.state_shardings(layout, mesh, shapes)
        state = jax.tree.map(lambda x, lie: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lie), shapes, lies)
        tokens = jax.ShapeDtypeStruct((2, ROWS, LENGTH), np.int32)
        jaxpr = train.make_train_step(config, mesh).__wrapped__.trace(state, tokens, tokens).jaxpr.jaxpr
    times = sum(one.times for one in sent(config) if one.part == "weights")
    assert times == gathered_as_bits(jaxpr, bits) * (config.accumulation if config.gather == "layer" else 1)


def gathered_as_bits(jaxpr, bits: str) -> int:
    """Gathers of copies in a traced program; those of the parameters themselves are read by nobody."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "all_gather" and eqn.invars[0].aval.dtype == bits
        inner = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(list(eqn.params.values()))]
        count += sum(gathered_as_bits(leaf, bits) for leaf in inner if hasattr(leaf, "eqns"))
    return count


@pytest.mark.slow
def test_a_mesh_of_one_device_changes_nothing():
    """A mesh whose axes all have one device takes the same way, sends nothing, and computes the same bits."""
    config = dataclasses.replace(config_of("data"), mesh="data=1,tensor=1")
    results = []
    with jax.enable_x64(True):
        for mesh_config in (config, dataclasses.replace(config, mesh="")):
            mesh = jax.make_mesh((1, 1, 1), MeshShape._fields, devices=jax.devices()[:1]) if mesh_config.mesh else None
            state = train.init_state(mesh_config, random_weights(config.model), mesh)
            step = train.make_train_step(mesh_config, mesh)
            for batch in batches(config.model):
                state, metrics = step(state, *sharding.placed(mesh, *batch))
            numbers = [float(metrics["loss"]), float(metrics["grad_norm"])]
            results.append([*numbers, *map(np.asarray, state.params.values())])
            assert step.__wrapped__._cache_size() == 1
    for ours, theirs in zip(*results, strict=True):
        assert np.array_equal(ours, theirs)


# Where things lie.
def layout(mesh: str, **model) -> sharding.Layout:
    return sharding.Layout(dataclasses.replace(get_preset("qwen3-0.6b").model, **model), parse_mesh(mesh))


def test_the_tables_by_hand():
    q, down = "model.layers.3.self_attn.q_proj.kernel", "model.layers.3.mlp.down_proj.kernel"
    table, norm = "model.embed_tokens.weight", "model.norm.weight"
    spec = jax.sharding.PartitionSpec
    both = layout("data=2,fsdp=4,tensor=2")
    assert [both.spec(path) for path in (q, down, table, norm)] == [
        spec("fsdp", "tensor"), spec("tensor", "fsdp"), spec("tensor", "fsdp"), spec()
    ]  # fmt: skip
    rows = layout("data=2,fsdp=4")
    assert [rows.spec(path) for path in (q, down, table, norm)] == [
        spec("fsdp"), spec(None, "fsdp"), spec(None, "fsdp"), spec()
    ]  # fmt: skip
    assert (rows.rows, layout("fsdp=4").rows, layout("tensor=4").rows) == (spec(("data", "fsdp")), spec("fsdp"), spec())
    assert both.replicas(q) == ("data",) and both.replicas(norm) == ("data", "fsdp", "tensor")
    assert layout("data=1").spec(q) == spec(), "an axis of one device has no name"


def test_what_does_not_divide_is_whole_and_said():
    found = layout("fsdp=3,tensor=16")
    assert found.notes == [
        "fsdp=3 does not divide hidden (1024): whole on every device",
        "tensor=16 does not divide heads (16 and 8): whole on every device",
    ]
    assert not found.is_split("heads") and found.is_split("ffn") and found.is_split("vocab")
    assert layout("tensor=3").notes[1] == "tensor=3 does not divide vocab (151936): whole on every device"
    # Four decisions of dropout are a byte.
    assert layout("tensor=2", intermediate_size=3076).is_split("ffn")
    assert not layout("tensor=2", intermediate_size=3076, dropout=0.1).is_split("ffn")


def test_a_mesh_of_other_devices_is_refused():
    count = jax.device_count()
    with pytest.raises(UserError, match=rf"mesh=data={count + 1},fsdp=1,tensor=1 needs {count + 1} devices, and there"):
        sharding.make_mesh(MeshShape(data=count + 1))


def test_without_a_mesh_nothing_is_sent():
    config = get_preset("tiny")
    assert sent(config) == [] and sharding.layout_of(config) is None and exchange.here() is None
    assert sent(dataclasses.replace(config, mesh="data=1,fsdp=1")) == []


def test_the_formula_at_full_size():
    """Qwen3-0.6B on eight devices by fsdp: some 1.05 GB of weights, 2.1 of gradients, 0.3 of Muon, as on paper."""
    config = dataclasses.replace(get_preset("qwen3-0.6b"), mesh="fsdp=8")
    elements = sum(math.prod(spec.shape) for spec in param_specs(config.model).values() if len(spec.shape) == 2)
    by_part = Counter()
    for one in sent(config):
        by_part[one.part, one.kind] += one.bytes * one.times
    assert by_part["weights", "all-gather"] == elements * 2 * 7 // 8
    assert by_part["gradients", "reduce-scatter"] == elements * 4 * 7 // 8
    by_layer = Counter()
    for one in sent(dataclasses.replace(config, gather="layer")):
        by_layer[one.part, one.kind] += one.bytes * one.times
    # Four micro-batches: every weight twice in each, the tied table too; its gradient twice, the others' once.
    table = config.model.vocab_size * config.model.hidden_size
    assert by_layer["weights", "all-gather"] == 8 * by_part["weights", "all-gather"]
    assert by_layer["gradients", "reduce-scatter"] == 4 * (elements + table) * 4 * 7 // 8
    assert by_layer["muon", "all-to-all"] == by_part["muon", "all-to-all"]


NO_MESHES = ["data", "data=0", "data=-1", "data=2,data=4", "rows=2", "data=2;fsdp=4", "data=two", "data=²", ","]


@pytest.mark.parametrize("text", [*NO_MESHES, "data=1000000"])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="must be AXIS=DEVICES"):
        RunConfig(mesh=text)


def test_a_mesh_is_read_in_any_order():
    assert parse_mesh("tensor=2, data=3") == MeshShape(3, 1, 2) and parse_mesh("") is None
    assert str(parse_mesh("fsdp=4")) == "data=1,fsdp=4,tensor=1"
    with pytest.raises(UserError, match="batch_size=8 does not divide among the data \\* fsdp = 6 devices"):
        RunConfig(mesh="data=2,fsdp=3", batch_size=8)
    assert RunConfig(mesh="data=2,tensor=3", batch_size=8).mesh
