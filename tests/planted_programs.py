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
    "nothing donated": {"step": "undonated"},
    "nothing, with a kernel": {"step": "with_kernel", "warps": 8},
    "a kernel that spills": {"step": "with_kernel", "warps": 1},
    "the branches of a CPU": {"backend": "cpu"},
}
"""What is wrong -> how it is planted."""


def configuration() -> RunConfig:
    """The seed's shape with two layers, without dropout."""
    seed = get_preset("seed")
    return dataclasses.replace(seed, model=dataclasses.replace(seed.model, num_hidden_layers=2, dropout=0.0))


SIDE = 128
"""Of the square that the planted kernel holds: 64 values a thread for 8 warps, 512 for one, of 255 registers."""


def compile_planted(*, precision=None, machine=None, step="sound", warps=8, backend=None) -> dict:
    """The record of a compiled training step."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    import jax_impl.backend
    from benchmarks.plan.compile import compile_update, make_train_step

    def function(config):
        return make_train_step(config).__wrapped__.__wrapped__

    def undonated(config, mesh):
        return types.SimpleNamespace(__wrapped__=jax.jit(function(config)))

    def centre(x_ref, y_ref):
        x = x_ref[...]
        y_ref[...] = x - jnp.max(x)  # holds the whole square until the maximum is known

    def with_kernel(config, mesh):
        def train_step(state, inputs_ABT, targets_ABT):
            kernel = pl.pallas_call(
                centre,
                out_shape=jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32),
                name="centre",
                cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=0, transcendentals=0),  # it multiplies nothing
                compiler_params=triton.CompilerParams(num_warps=warps),
            )
            state, metrics = function(config)(state, inputs_ABT, targets_ABT)
            square = inputs_ABT.reshape(-1)[: SIDE * SIDE].reshape(SIDE, SIDE).astype(jnp.float32)
            return state, metrics | {"centred": kernel(square)}

        return types.SimpleNamespace(__wrapped__=jax.jit(train_step, donate_argnums=0))

    steps = {"sound": make_train_step, "undonated": undonated, "with_kernel": with_kernel}
    config = configuration()
    config = dataclasses.replace(config, precision=dataclasses.replace(config.precision, **(precision or {})))
    jax_impl.backend.MACHINES["gpu"] = dataclasses.replace(jax_impl.backend.GPU, **(machine or {}))
    compiled = compile_update(
        config,
        H100,
        options={"xla_gpu_enable_triton_gemm": False},
        make_step=steps[step],
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
