"""Rows of several documents: neither half lets one see another, and both take the mean of the tokens trained on.

The third opinion is `one_update.py`; a fourth is each document alone.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_impl.attention
import jax_impl.loss
import jax_impl.train
import torch_ref.attention
import torch_ref.train
from jax_impl import backend, loss_kernel
from parity_tests import one_update, updates_on_meshes
from parity_tests.cases import FLOAT32, FLOAT64, random_tokens, random_weights
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import check, check_all
from parity_tests.rope_noise import rounded_rope_tables
from parity_tests.sides import Arrays, JaxModel, JaxTraining, TorchModel, TorchTraining
from parity_tests.test_loss_kernel import KERNEL, operands
from parity_tests.test_one_update import RUNS, allowed, record, third
from recipe.config import DataConfig, PrecisionConfig, RunConfig
from recipe.packing import IGNORE

SIDES = {"jax": JaxModel, "torch": TorchModel}
TRAININGS = {"jax": JaxTraining, "torch": TorchTraining}
# Of each row of four tokens which document each is of. The first micro-batch trains on one token, the second on five.
DOCUMENTS = np.array([[[0, 0, 1, 1], [0, 0, 0, 1]], [[0, 0, 0, 0], [0, 1, 2, 2]]], np.int32)
TRAINED = np.array([[[0, 0, 0, 1], [0, 0, 0, 0]], [[1, 0, 1, 1], [0, 0, 1, 1]]], bool)
MODEL = dataclasses.replace(RUNS["no-default"].model, vocab_size=40, dropout=0.0, sliding_window=5)
LENGTHS = (2, 6, 1)
"""Documents of a row of three blocks of queries; the second lies in two of them."""
WHERE = np.repeat(np.arange(3), LENGTHS).astype(np.int32)[None]


@pytest.fixture
def short_blocks(monkeypatch):
    for library in (jax_impl.attention, torch_ref.attention):
        monkeypatch.setattr(library, "QUERY_BLOCK", 4)


def packed(run: RunConfig) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Two updates; in the second no token of the first micro-batch is trained on."""
    shape, made = (run.accumulation, run.batch_size, run.sequence_length), []
    for step in range(2):
        inputs, targets = (random_tokens(run.model, *shape, seed=30 + 2 * step + which) for which in (0, 1))
        trained = TRAINED.copy()
        trained[0] &= step == 0
        made.append((inputs, np.where(trained, targets, IGNORE).astype(np.int32), DOCUMENTS))
    return made


@pytest.mark.parametrize("name", ["no-default", pytest.param("switches", marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", TRAININGS)
def test_whole_updates_equal_the_third_opinion(side, name):
    """Dropout, a window and biases in one run; micro-batches of one and of five trained tokens, and of none."""
    check_all(record(TRAININGS[side], RUNS[name], packed), third(name, packed), allowed(name, packed).get)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scan", "remat"])
def test_other_orders_of_work_are_the_same_update(how):
    run = RUNS["no-default"]
    other = {
        "scan": dataclasses.replace(run, scan_layers=True),
        "remat": dataclasses.replace(run, precision=dataclasses.replace(FLOAT64, remat=True)),
    }[how]
    for side in ("jax",) if how == "scan" else ("jax", "torch"):
        known = allowed("no-default", packed).get
        check_all(record(TRAININGS[side], other, packed), record(TorchTraining, run, packed), known)


def alone(side: JaxModel | TorchModel, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits of each document by itself, one after another."""
    ends = np.cumsum(LENGTHS)
    return np.concatenate([side.logits(part) for part in np.split(tokens_BT, ends[:-1], axis=1)], axis=1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("short_blocks")
def test_documents_of_a_row_are_as_if_each_were_alone(side):
    weights, tokens = random_weights(MODEL), random_tokens(MODEL, 1, sum(LENGTHS))

    def compute() -> Arrays:
        return {"logits": TorchModel(MODEL, FLOAT64, weights).logits(tokens, WHERE)}

    with rounded_rope_tables():
        limit = allowances(amplification(compute)[1], "float64")["logits"]
    ours = SIDES[side](MODEL, FLOAT64, weights)
    # Positions are those of the row: RoPE turns by their differences, so both err by roundings of their own angles.
    check("logits", ours.logits(tokens, WHERE), alone(TorchModel(MODEL, FLOAT64, weights), tokens), 2 * limit)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("short_blocks")
def test_no_bit_of_another_document_is_seen(side):
    weights, tokens = random_weights(MODEL), random_tokens(MODEL, 1, sum(LENGTHS)) % 20
    ours = SIDES[side](MODEL, FLOAT64, weights)
    logits = ours.logits(tokens, WHERE)
    other = np.where(WHERE == 1, tokens + 20, tokens)
    np.testing.assert_array_equal((ours.logits(other, WHERE) != logits).any(-1), WHERE == 1)


@pytest.mark.parametrize("side", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("short_blocks")
def test_no_gradient_reaches_another_document(side):
    """Of the embedding only the rows of a document's own tokens have a gradient of its loss."""
    weights, tokens = random_weights(MODEL), random_tokens(MODEL, 1, sum(LENGTHS)) % 20
    run = dataclasses.replace(RUNS["no-default"], accumulation=1, batch_size=1, sequence_length=9, model=MODEL)
    for document in range(3):
        other = np.where(document == WHERE, tokens + 20, tokens)
        training = TRAININGS[side](run, weights)
        training.step(*(x[None] for x in (other, np.where(document == WHERE, tokens, IGNORE), WHERE)))
        moment = training.slots()["exp_avg"]["model.embed_tokens.weight"]
        np.testing.assert_array_equal(np.unique(other[document == WHERE]), np.flatnonzero(moment.any(-1)))


@pytest.mark.parametrize("side", SIDES)
def test_an_evaluation_leaves_out_what_is_ignored(side):
    model = dataclasses.replace(RUNS["no-default"].model, dropout=0.0)
    weights, (inputs, targets, documents) = random_weights(model), packed(RUNS["no-default"])[0]
    ours = SIDES[side](model, FLOAT64, weights)
    loss, correct = ours.evaluate(inputs[1], targets[1], documents[1])
    theirs = one_update.loss(model, weights, inputs[1], targets[1], None, documents[1]).real

    def compute() -> Arrays:
        torch_side = TorchModel(model, FLOAT64, weights)
        return {"loss": np.array(torch_side.evaluate(inputs[1], targets[1], documents[1])[0])}

    check("loss", loss, 5 * theirs, allowances(amplification(compute)[1], "float64")["loss"])
    best = ours.logits(inputs[1], documents[1]).argmax(-1)
    assert correct == (best == targets[1]).sum()
    assert ours.evaluate(inputs[1], np.where(TRAINED[1], best, IGNORE), documents[1])[1] == 5


@pytest.mark.parametrize(
    "trainer", [pytest.param(jax_impl.train.Trainer, marks=pytest.mark.slow), torch_ref.train.Trainer]
)
def test_a_trainer_divides_by_the_tokens_trained_on(trainer):
    """Two batches of one and of five such tokens: the mean over six, and a step's loss is the same mean."""
    model = dataclasses.replace(RUNS["no-default"].model, dropout=0.0)
    run = dataclasses.replace(RUNS["no-default"], model=model, precision=FLOAT32)
    run = dataclasses.replace(run, data=DataConfig(document_mask=True))
    weights, batch = random_weights(model), packed(run)[0]
    ours = trainer(run, weights)
    loss, accuracy = ours.evaluate(zip(*batch, strict=True))
    diagnosis = ours.diagnose(*batch)
    step = float(ours.step(*batch)["loss"])

    def compute() -> Arrays:
        losses = [
            one_update.loss(model, weights, *part, None, where, 6).real for *part, where in zip(*batch, strict=True)
        ]
        return {"loss": np.array(sum(losses))}

    def torch_loss() -> Arrays:
        return {
            "loss": np.array(TorchTraining(dataclasses.replace(run, precision=FLOAT64), weights).step(*batch)["loss"])
        }

    limit = allowances(amplification(torch_loss, "float32")[1], "float32", erring=2)["loss"]
    for value in (loss, step, diagnosis.loss):
        check("loss", value, compute()["loss"], limit)
    assert accuracy * 6 in range(7) and diagnosis.micro_batch is None


@pytest.mark.usefixtures("short_blocks")
def test_sdpa_sees_the_same_documents():
    heads = [torch.tensor(x) for x in np.random.default_rng(0).standard_normal((3, 1, 9, 2, 8))]
    for window in (None, 5):
        results = {}
        for attend in (torch_ref.attention.attention, torch_ref.attention.fused_attention):
            leaves = [x.clone().requires_grad_() for x in heads]
            out = attend(*leaves, torch.tensor(WHERE), window=window)
            out.square().sum().backward()
            results[attend] = {"out": out.detach().numpy()} | {
                n: x.grad.numpy() for n, x in zip("qkv", leaves, strict=True)
            }
        explicit, fused = results.values()

        def compute(window=window) -> Arrays:
            leaves = [x.clone().requires_grad_() for x in heads]
            out = torch_ref.attention.attention(*leaves, torch.tensor(WHERE), window=window)
            out.square().sum().backward()
            return {"out": out.detach().numpy()} | {n: x.grad.numpy() for n, x in zip("qkv", leaves, strict=True)}

        check_all(fused, explicit, allowances(amplification(compute)[1], "float64", erring=2).get)


@pytest.mark.usefixtures("short_blocks")
def test_cudnn_is_given_the_same_documents(monkeypatch):
    """jax.nn's own reference of what cuDNN is asked for, on any machine."""
    own = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *heads, **how: own(*heads, **how | {"implementation": "xla"})
    )
    heads = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 9, 2, 8)), jnp.float32)
    for window in (None, 5):
        fused, explicit = (
            jax.jit(functools.partial(attend, window=window))(*heads, WHERE)
            for attend in (jax_impl.attention.fused_attention, jax_impl.attention.attention)
        )

        def compute(window=window) -> Arrays:
            wide = [torch.tensor(np.asarray(x, np.float64)) for x in heads]
            return {"out": torch_ref.attention.attention(*wide, torch.tensor(WHERE), window=window).numpy()}

        limit = allowances(amplification(compute, "float32")[1], "float32", erring=2)["out"]
        check("out", np.asarray(fused), np.asarray(explicit), limit)


def test_which_attention_takes_documents(monkeypatch):
    """cuDNN and SDPA do; a kernel with dropout does not, and says so."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    precision = PrecisionConfig(compute="bfloat16", attention="fused")
    assert jax_impl.attention.attention_in_use(precision, 0.0, True) == "fused"
    assert jax_impl.attention.attention_in_use(precision, 0.1, True) == "explicit"
    assert "knows no documents" in jax_impl.attention.why_not_fused(precision, 0.1, True)
    assert torch_ref.attention.attention_in_use(precision, 0.0, True) == "fused"
    assert torch_ref.attention.attention_in_use(precision, 0.1, True) == "explicit"
    with pytest.raises(ValueError, match="knows no documents"):
        q = jnp.zeros((1, 5, 2, 8))
        key = jax.random.key(0)
        jax_impl.attention.fused_attention(q, q, q, jnp.zeros((1, 5), int), window=None, rate=0.1, key=key)


def test_a_recorded_run_says_which_attention_it_had(monkeypatch):
    config = dataclasses.replace(RUNS["no-default"], data=DataConfig(document_mask=True))
    config = dataclasses.replace(config, precision=dataclasses.replace(FLOAT32, compute="bfloat16", attention="fused"))
    said = []
    with mock.patch.object(jax_impl.train, "attention_in_use", lambda *args: said.append(args) or "explicit"):
        jax_impl.train.Trainer(config, random_weights(config.model))
    assert said == [(config.precision, 0.2, True)]


@pytest.mark.parametrize("form", ["chunks", pytest.param("kernel", marks=pytest.mark.slow)])
def test_weights_of_tokens_in_the_loss_kernel_and_in_chunks(form, monkeypatch):
    """Of three chunks, the last one padded, against torch; weights of which some are zero."""
    monkeypatch.setitem(backend.MACHINES, "cpu", dataclasses.replace(KERNEL, tokens_at_once=40))
    x, head, targets = operands(101, 53, 30)
    weights = np.random.default_rng(1).integers(0, 4, 101).astype(np.float64)

    def compute() -> Arrays:
        leaves = [torch.tensor(array).requires_grad_() for array in (x, head)]
        value = torch_ref.loss.cross_entropy(*leaves, torch.tensor(targets).long(), torch.tensor(weights))
        value.backward()
        return {"loss": value.detach().numpy(), "x": leaves[0].grad.numpy(), "head": leaves[1].grad.numpy()}

    truths, kappas = amplification(compute)
    function = {
        "kernel": loss_kernel.loss_and_gradients,
        "chunks": jax.value_and_grad(jax_impl.loss.cross_entropy, argnums=(0, 1)),
    }[form]
    with jax.enable_x64(True):
        value, (grad_x, grad_head) = jax.jit(lambda *args: function(*args))(x, head, targets, weights)
        ours = {"loss": value, "x": grad_x, "head": grad_head}
        check_all({k: np.asarray(v) for k, v in ours.items()}, truths, allowances(kappas, "float64", erring=2).get)
        plain = jax_impl.loss.cross_entropy(jnp.asarray(x), jnp.asarray(head), targets, jnp.asarray(weights))
        check("loss", float(plain), truths["loss"], allowances(kappas, "float64", erring=2)["loss"])


@pytest.mark.parametrize("counts", [(0, 7), (3, 7), (7, 7)])
def test_weights_are_one_by_the_share_that_is_trained_on(counts):
    trained, M = counts
    targets = np.where(np.arange(M) < trained, 5, IGNORE)
    ours = jax_impl.loss.weighted(jnp.asarray(targets), "float32")
    theirs = torch_ref.loss.weighted(torch.tensor(targets), torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b.numpy())
    np.testing.assert_array_equal(ours[0], np.where(targets == IGNORE, 0, 5))
    np.testing.assert_array_equal(ours[1], np.where(targets == IGNORE, 0, np.float32(M) / np.float32(max(1, trained))))


ON_A_MESH = """
import sys
import jax
import numpy as np
from jax_impl import sharding, train
from jax_impl.weights import to_hf
from parity_tests.cases import random_weights
from parity_tests.test_packing import mesh_run, mesh_batch
from recipe.mesh import parse_mesh

jax.config.update("jax_enable_x64", True)
run = mesh_run(sys.argv[2])
mesh = sharding.make_mesh(parse_mesh(run.mesh))
state, step = train.init_state(run, random_weights(run.model), mesh), train.make_train_step(run, mesh)
batch = mesh_batch(run)
state, metrics = step(state, *sharding.placed(mesh, *batch))
evaluate = train.make_evaluate(run, mesh)
sums = evaluate(state.params, *sharding.placed(mesh, *(x[0] for x in batch)))
values = {name: np.array(value) for name, value in metrics.items()} | to_hf(state.params)
np.savez(sys.argv[1], **values, total=np.array(sums[0]), correct=np.array(sums[1]))
"""


def mesh_run(case: str) -> RunConfig:
    return dataclasses.replace(updates_on_meshes.config_of(case), scan_layers=case == "all")


def mesh_batch(run: RunConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of three documents each; one row in four has a hundred times the trained tokens of the others."""
    shape = run.accumulation, run.batch_size, run.sequence_length
    inputs, targets = (random_tokens(run.model, *shape, seed=which) for which in (0, 1))
    draw = np.random.default_rng(5)
    share = np.where(np.arange(run.batch_size) % 4 == 0, 0.9, 0.01)[:, None]
    targets = np.where(draw.random(shape) < share, targets, IGNORE).astype(np.int32)
    edges = np.sort(draw.integers(1, shape[-1], (*shape[:-1], 1, 2)), axis=-1)
    return inputs, targets, (np.arange(shape[-1])[:, None] >= edges).sum(-1).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all", "by-layer", "other"])
def test_devices_of_a_mesh_count_the_trained_tokens_of_all(case, tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", ON_A_MESH, str(tmp_path / "found.npz"), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "found.npz", allow_pickle=False))
    run = dataclasses.replace(mesh_run(case), mesh="")
    batch = mesh_batch(run)

    def compute() -> Arrays:
        training = TorchTraining(run, random_weights(run.model))
        metrics = {name: np.array(value) for name, value in training.step(*batch).items()}
        total, correct = TorchModel(run.model, FLOAT64, training.weights()).evaluate(*(x[0] for x in batch))
        return metrics | training.weights() | {"total": np.array(total), "correct": np.array(correct)}

    truths, kappas = amplification(compute)
    check_all(found, truths, allowances({name: max(1.0, k) for name, k in kappas.items()}, "float64").get)
