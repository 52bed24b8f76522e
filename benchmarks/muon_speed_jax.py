"""The JAX rows of `benchmarks.muon_speed`: whole updates as one jitted function each, their state donated."""

import functools
from collections.abc import Callable
from typing import Any

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


ROWS: dict[str, tuple[Build, str]] = {
    "ours": (lambda dtype: muon(LEARNING_RATE, BETA, ns_dtype=dtype), "float32"),
    "ours-gram": (lambda dtype: muon(LEARNING_RATE, BETA, ns_dtype=dtype, gram=True), "float32"),
    "ours-batched": (lambda dtype: muon(LEARNING_RATE, BETA, ns_dtype=dtype, batched=True), "float32"),
    "optax": (theirs, "float32"),
    "optax-bfloat16": (theirs, "bfloat16"),
}
"""Row -> its optimizer by the Newton-Schulz dtype, and the dtype of its weights and gradients."""


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
            "backend": backend,
            "device": jax.devices()[0].device_kind,
            "threads": NOT_THERE if backend == "gpu" else str(xla_threads()),
        }

    def received(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(x).T for name, x in self.gradients.items()}

    def prepare(self, row: str) -> None:
        if row in self.states:
            return
        build, given = ROWS[row]
        optimizer = build(self.dtype)

        @functools.partial(jax.jit, donate_argnums=0)
        def update(state, gradients):
            weights, held = state
            changes, held = optimizer.update(gradients, held, weights)
            return optax.apply_updates(weights, changes), held

        weights = jax.tree.map(lambda x: jnp.zeros_like(x, given), self.gradients)
        self.states[row] = jax.block_until_ready((weights, optimizer.init(weights)))
        self.updates[row] = update

    def update(self, row: str) -> None:
        gradients = self.narrow if ROWS[row][1] == "bfloat16" else self.gradients
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
