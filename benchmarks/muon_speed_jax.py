"""The JAX rows of `benchmarks.muon_speed`: whole updates as one jitted function each, their state donated."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.muon_speed_worker import BETA, LEARNING_RATE, serve
from jax_impl.backend import machine
from jax_impl.muon import muon
from recipe.contract import NOT_THERE, xla_threads

Build = Callable[[str], optax.GradientTransformation]


def theirs(dtype: str) -> optax.GradientTransformation:
    """optax's own, which iterates in the dtype of its gradients and has no setting for another."""
    return optax.contrib.muon(LEARNING_RATE, beta=BETA)


class Row(NamedTuple):
    """How one row is built."""

    build: Build
    """The optimizer by the Newton-Schulz dtype."""
    given: str = "float32"
    """Dtype of its weights and gradients."""
    options: bool = True
    """Whether it is compiled with the options of a training step on this machine."""


ROWS = {
    "ours": Row(lambda dtype: muon(LEARNING_RATE, BETA, ns_dtype=dtype)),
    "ours-gram": Row(lambda dtype: muon(LEARNING_RATE, BETA, ns_dtype=dtype, gram=True)),
    "ours-batched": Row(lambda dtype: muon(LEARNING_RATE, BETA, ns_dtype=dtype, batched=True)),
    "ours-default": Row(lambda dtype: muon(LEARNING_RATE, BETA, ns_dtype=dtype), options=False),
    "optax": Row(theirs),
    "optax-bfloat16": Row(theirs, given="bfloat16"),
}


class JaxRows:
    """See `benchmarks.muon_speed_worker.Rows`; matrices lie as Flax kernels do, (fan_in, fan_out)."""

    def __init__(self, gradients: dict[str, np.ndarray], dtype: str) -> None:
        self.dtype = dtype
        self.gradients = {name: jnp.asarray(x.T) for name, x in gradients.items()}
        self.narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.gradients)
        self.states: dict[str, Any] = {}
        self.updates: dict[str, Callable[[Any, Any], Any]] = {}

    def describe(self) -> dict[str, Any]:
        backend = machine().platform
        return {
            "framework": f"jax {jax.__version__}, optax {optax.__version__}",
            "compiler_options": dict(machine().compiler_options),
            "backend": backend,
            "device": jax.devices()[0].device_kind,
            "threads": NOT_THERE if backend == "gpu" else str(xla_threads()),
        }

    def received(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(x).T for name, x in self.gradients.items()}

    def prepare(self, row: str) -> None:
        if row in self.states:
            return
        optimizer = ROWS[row].build(self.dtype)
        options = dict(machine().compiler_options) if ROWS[row].options else None

        @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
        def update(state, gradients):
            weights, held = state
            changes, held = optimizer.update(gradients, held, weights)
            return optax.apply_updates(weights, changes), held

        weights = jax.tree.map(lambda x: jnp.zeros_like(x, ROWS[row].given), self.gradients)
        self.states[row] = jax.block_until_ready((weights, optimizer.init(weights)))
        self.updates[row] = update

    def update(self, row: str) -> None:
        gradients = self.narrow if ROWS[row].given == "bfloat16" else self.gradients
        self.states[row] = jax.block_until_ready(self.updates[row](self.states[row], gradients))

    def weights(self, row: str) -> dict[str, np.ndarray]:
        return {name: np.asarray(x, np.float32).T for name, x in self.states[row][0].items()}

    def square_product(self, size: int, dtype: str) -> Callable[[int], None]:
        x, y = (jax.random.normal(key, (size, size)).astype(dtype) for key in jax.random.split(jax.random.key(0)))
        # As in `benchmarks.worker_jax`: XLA's CPU backend has bfloat16 kernels only for float32 results.
        result = jnp.float32 if machine().lays_out_products else dtype
        multiply = jax.jit(lambda x, y: jnp.matmul(x, y, precision="highest", preferred_element_type=result))

        def run(count: int) -> None:
            for _ in range(count):
                product = jax.block_until_ready(multiply(x, y))
            del product

        return run


if __name__ == "__main__":
    serve(JaxRows)
