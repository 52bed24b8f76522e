"""A small training step compiled for an H100 as it is, and with one thing wrong at a time: a JSON line for each.

A process of its own, as benchmarks.plan.compile wants; tests/test_plan_gpu.py starts it.
"""

import dataclasses
import json
import types

from benchmarks.plan.__main__ import prepare
from benchmarks.plan.parts import costs
from benchmarks.plan.program import Program
from benchmarks.plan.report import summarise
from benchmarks.plan.targets import H100
from recipe.config import RunConfig
from recipe.presets import get_preset

PLANTED: dict[str, dict] = {
    "nothing": {},
    "compute in float32": {"precision": {"compute": "float32"}},
    "explicit attention": {"precision": {"attention": "explicit"}},
    "all logits at once": {"machine": {"tokens_at_once": 2**30}},
    "Newton-Schulz one by one": {"machine": {"batched_matrices": False}},
    "nothing donated": {"donated": False},
    "the branches of a CPU": {"backend": "cpu"},
}
"""What is wrong -> how it is planted."""


def configuration() -> RunConfig:
    """The seed's shape with two layers, without dropout."""
    seed = get_preset("seed")
    return dataclasses.replace(seed, model=dataclasses.replace(seed.model, num_hidden_layers=2, dropout=0.0))


def compile_planted(*, precision=None, machine=None, donated: bool = True, backend: str | None = None) -> dict:
    """The record of a compiled training step."""
    import jax

    import jax_impl.backend
    from benchmarks.plan.compile import compile_update, make_train_step

    def undonated(config):
        return types.SimpleNamespace(__wrapped__=jax.jit(make_train_step(config).__wrapped__.__wrapped__))

    config = configuration()
    config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, **(precision or {})))
    jax_impl.backend.MACHINES["gpu"] = dataclasses.replace(jax_impl.backend.GPU, **(machine or {}))
    compiled = compile_update(
        config,
        H100,
        options={"xla_gpu_enable_triton_gemm": False},
        make_step=make_train_step if donated else undonated,
        backend=backend,
    )
    program = Program(compiled.text)
    return summarise(
        program,
        costs(program, config, H100.rates, compiled.estimates),
        config,
        H100,
        devices=1,
        memory=compiled.memory,
        state_arrays=compiled.state_arrays,
        code=compiled.code,
    )


if __name__ == "__main__":
    prepare(H100, 1)
    for name, how in PLANTED.items():
        print(json.dumps({"planted": name, **compile_planted(**how)}), flush=True)
