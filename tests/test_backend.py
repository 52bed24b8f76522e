"""The table of machines: which record is taken, that it follows the arrays, and that a run says what runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_impl.attention
import jax_impl.attention_kernel
from harness.telling import describe
from jax_impl import backend
from jax_impl.train import Trainer
from recipe.config import ModelConfig, PrecisionConfig, RunConfig
from recipe.params import init_params

MODEL = ModelConfig(
    vocab_size=53,
    hidden_size=30,
    intermediate_size=14,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    dropout=0.1,
)
FUSED = PrecisionConfig(compute="bfloat16", attention="fused")


def test_each_platform_has_its_record(monkeypatch):
    assert backend.machine() == backend.CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert backend.machine() == backend.GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    without = {"cudnn": False, "loss_kernel_up_to": 0, "attention_kernel": False}
    expected = dataclasses.replace(
        backend.GPU, platform="tpu", compiler_options=(), deterministic_options=(), **without
    )
    assert backend.machine() == expected, "no option of XLA's GPU compiler"


def test_the_record_is_that_of_the_arrays_device(monkeypatch):
    """In a process whose default is a GPU, arrays on the CPU are worked on as a CPU likes it."""
    array = jax.device_put(np.ones(3), jax.devices("cpu")[0])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with backend.on_device_of({"a": "no array", "b": array}):
        assert backend.machine() == backend.CPU
    assert backend.machine() == backend.GPU
    with backend.on_device_of(np.ones(3)):
        assert backend.machine() == backend.GPU


def test_the_named_default_device_counts(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        assert backend.machine() == backend.CPU


@pytest.mark.parametrize(
    ("platform", "precision", "dropout", "runs", "reason"),
    [
        ("gpu", FUSED, 0.0, "fused", ""),
        ("gpu", FUSED, 0.1, "fused", ""),
        ("gpu", dataclasses.replace(FUSED, compute="float32"), 0.0, "explicit", "not float32"),
        ("gpu", dataclasses.replace(FUSED, compute="float32"), 0.1, "explicit", "not float32"),
        ("gpu", dataclasses.replace(FUSED, attention="explicit"), 0.0, "explicit", ""),
        ("gpu", dataclasses.replace(FUSED, attention="explicit"), 0.1, "explicit", ""),
        ("cpu", FUSED, 0.0, "explicit", "cuDNN's kernel needs an NVIDIA GPU"),
        ("cpu", FUSED, 0.1, "explicit", "the kernel with dropout needs an NVIDIA GPU"),
        ("tpu", FUSED, 0.0, "explicit", "this is a tpu"),
    ],
)
def test_which_attention_runs_and_why(platform, precision, dropout, runs, reason, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert jax_impl.attention.attention_in_use(precision, dropout) == runs
    why = jax_impl.attention.why_not_fused(precision, dropout)
    assert reason in why and bool(reason) == bool(why)


def test_dropout_decides_between_the_fused_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(
        jax_impl.attention_kernel, "flash_attention", lambda *_, rate, **__: calls.append(("ours", rate))
    )
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, **how: calls.append(how["implementation"]))
    for rate, key in ((0.1, jax.random.key(0)), (0.0, jax.random.key(0)), (0.1, None)):
        jax_impl.attention.fused_attention(*jnp.zeros((3, 1, 5, 2, 8)), window=None, rate=rate, key=key)
    assert calls == [("ours", 0.1), "cudnn", "cudnn"]


def test_the_model_asks_the_same_question(monkeypatch):
    """What is recorded is what runs: on a GPU in 16 bits a fused kernel is called, and is told of dropout."""
    from jax_impl import model
    from jax_impl.weights import bind, from_hf, model_structure

    calls = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(model, "fused_attention", lambda q, *_, rate, **__: calls.append(("fused", rate)) or q)
    monkeypatch.setattr(model, "attention", lambda q, *_, rate, **__: calls.append(("explicit", rate)) or q)
    tokens_BT = jnp.zeros((1, 5), jnp.int32)
    for precision, key in (
        (FUSED, None),
        (FUSED, jax.random.key(0)),
        (dataclasses.replace(FUSED, compute="float32"), jax.random.key(0)),
    ):
        net = bind(model_structure(MODEL, precision), from_hf(init_params(MODEL, 0), MODEL, precision))
        net(tokens_BT, dropout_key=key)
    assert calls == [("fused", 0.0), ("fused", MODEL.dropout), ("explicit", MODEL.dropout)]


def test_a_run_says_what_runs():
    config = RunConfig(steps=10, model=MODEL, precision=FUSED)
    environment = Trainer(config, init_params(MODEL, 0)).environment
    assert environment["machine"] == dataclasses.asdict(backend.CPU) and environment["attention"] == "explicit"
    json.dumps(environment)  # goes into run.json
    said = [line for line in describe(config, environment) if line.startswith("attention")]
    why = "the kernel with dropout needs an NVIDIA GPU of compute capability 9.0, this is a cpu"
    assert said == [f"attention  explicit in training, although fused is asked for: {why}"]
    plain = dataclasses.replace(config, precision=PrecisionConfig())
    assert not [line for line in describe(plain, environment) if line.startswith("attention")]


@pytest.mark.parametrize("record", backend.MACHINES.values(), ids=backend.MACHINES.keys())
def test_the_compiler_knows_every_option(record):
    """XLA refuses a name or a value that it does not know, on whatever device it compiles for."""
    options = dict(record.compiler_options + record.deterministic_options)
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(Exception, match="not a valid bool value"):
        jax.jit(lambda x: x + 2, compiler_options={"xla_gpu_exclude_nondeterministic_ops": "true"})(1)
