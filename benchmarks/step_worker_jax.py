"""The JAX side of a pair of steps. Started by `benchmarks.pair`."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.step_worker import serve
from recipe.contract import FLOAT32_PROBE, NOT_THERE, float32_product, xla_threads


class Jax:
    """`benchmarks.step_worker.Framework` of this process."""

    def describe(self) -> dict[str, str]:
        arrays = jax.live_arrays()
        devices = sorted({device for array in arrays for device in array.devices()}, key=str) or jax.devices()
        backend = "cpu" if devices[0].platform == "cpu" else "gpu"
        with jax.default_device(devices[0]):
            probe = jnp.full((256, 256), FLOAT32_PROBE, jnp.float32) @ jnp.eye(256, dtype=jnp.float32)
        floats = {str(array.dtype) for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)}
        return {
            "framework": f"jax {jax.__version__}",
            "backend": backend,
            "device": devices[0].device_kind,
            "params": "/".join(sorted(floats)) or NOT_THERE,
            "matmul": float32_product(float(probe[0, 0])),
            "x64": str(bool(jax.config.jax_enable_x64)),
            "threads": NOT_THERE if backend == "gpu" else str(xla_threads()),
        }

    def wait(self, result: Any) -> None:
        # A step may return less than it computes: whatever is alive is waited for.
        jax.block_until_ready((result, jax.live_arrays()))

    def device_peak_bytes(self) -> int | None:
        stats = jax.devices()[0].memory_stats()
        return None if stats is None else stats.get("peak_bytes_in_use")

    def reset_device_peak(self) -> None:
        """XLA keeps one peak from start to end."""


if __name__ == "__main__":
    serve(Jax())
