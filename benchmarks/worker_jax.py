"""The JAX side of a benchmark, `jax_impl` as training runs it. Started by `benchmarks.throughput`."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.worker import PROBE, serve
from jax_impl import model
from jax_impl.train import Trainer
from recipe.config import RunConfig


class JaxSide:
    """`jax_impl.train.Trainer` behind the face of `benchmarks.worker.Side`."""

    def __init__(self, config: RunConfig, mode: str, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self.trainer = Trainer(config, weights)

    def describe(self) -> dict:
        config, backend = self.config, jax.default_backend()
        precision, dropout = config.precision, config.model.dropout
        fused = precision.attention == "fused" and not dropout and model.has_fused_attention(precision.compute)
        with jax.default_matmul_precision(precision.matmul):
            product = jnp.full((256, 256), PROBE, jnp.float32) @ jnp.eye(256, dtype=jnp.float32)
        single = "--xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", "")
        contract = {
            "backend": backend,
            "threads": None if backend == "gpu" else 1 if single else len(os.sched_getaffinity(0)),
            "params_dtype": "/".join(sorted({str(leaf.dtype) for leaf in self.trainer.state.params.values()})),
            "compute_dtype": precision.compute,
            "newton_schulz_dtype": precision.newton_schulz,
            "float32_products": "float32" if float(product[0, 0]) == PROBE else "tf32",
            "dropout": dropout,
            "matmul": precision.matmul,
            "x64": jax.config.jax_enable_x64,
            "attention": "cuDNN flash" if fused else f"blocks of {model.QUERY_BLOCK} queries",
            "loss": f"chunks of {model.LOGITS_AT_ONCE} float32 logits",
        }
        return {"contract": contract, "environment": self.trainer.environment}

    def weights(self) -> dict[str, np.ndarray]:
        return self.trainer.weights()

    def received(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(tokens), np.int32)

    def update(self, inputs_ABT: np.ndarray, targets_ABT: np.ndarray) -> dict:
        return self.trainer.step(inputs_ABT, targets_ABT)

    def synchronize(self, metrics: dict) -> None:
        jax.block_until_ready((self.trainer.state, metrics))

    def square_product(self, size: int):
        dtype = jnp.dtype(self.config.precision.compute)
        key = jax.random.key(self.config.seed)
        x, y = (jax.random.normal(k, (size, size), jnp.float32).astype(dtype) for k in jax.random.split(key))
        # As `jax_impl.model.contract` does: XLA's CPU backend has bfloat16 kernels only for float32 results.
        result = jnp.float32 if jax.default_backend() == "cpu" else dtype
        multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=result))

        def run(count: int) -> None:
            with jax.default_matmul_precision(self.config.precision.matmul):
                products = [multiply(x, y) for _ in range(count)]
            jax.block_until_ready(products)

        return run

    def device_peak_bytes(self) -> int | None:
        stats = jax.devices()[0].memory_stats()
        return None if stats is None else stats.get("peak_bytes_in_use")


if __name__ == "__main__":
    serve(JaxSide)
