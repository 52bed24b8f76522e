"""The JAX side of a benchmark, `jax_impl` as training runs it. Started by `benchmarks.throughput`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.job import WorkContract
from benchmarks.worker import Part, serve
from jax_impl import attention, loss, random
from jax_impl.backend import machine
from jax_impl.hybrid import clip_by_global_norm, qwen_matrices
from jax_impl.muon import KELLER_JORDAN, orthogonalize
from jax_impl.train import Trainer, make_optimizer
from recipe.config import RunConfig
from recipe.contract import FLOAT32_PROBE, NOT_THERE, accumulation_of, dropout_of, float32_product, xla_threads


class JaxSide:
    """`jax_impl.train.Trainer` behind the face of `benchmarks.worker.Side`."""

    def __init__(self, config: RunConfig, mode: str, weights: dict[str, np.ndarray]) -> None:
        self.config = config
        self.trainer = Trainer(config, weights)
        precision = config.precision
        self.fused = attention.attention_in_use(precision, config.model.dropout) == "fused"

    def describe(self) -> dict:
        config, backend = self.config, machine().platform
        precision = config.precision
        fused = "flash with our dropout" if config.model.dropout else "cuDNN flash"
        with jax.default_matmul_precision(precision.matmul):
            product = jnp.full((256, 256), FLOAT32_PROBE, jnp.float32) @ jnp.eye(256, dtype=jnp.float32)
        contract = WorkContract(
            side="jax",
            framework=f"jax {jax.__version__}",
            backend=backend,
            device=jax.devices()[0].device_kind,
            params="/".join(sorted({str(leaf.dtype) for leaf in self.trainer.state.params.values()})),
            compute=precision.compute,
            newton_schulz=precision.newton_schulz,
            matmul=float32_product(float(product[0, 0])),
            x64=str(bool(jax.config.jax_enable_x64)),
            accumulation=accumulation_of(precision.compute),
            attention=fused if self.fused else f"blocks of {attention.QUERY_BLOCK} queries",
            dropout=dropout_of(config.model.dropout),
            threads=NOT_THERE if backend == "gpu" else str(xla_threads()),
            loss="logits in tiles, in no memory"
            if loss.is_in_kernel(precision.compute, config.model.hidden_size)
            else f"float32 logits of {machine().tokens_at_once} tokens at once",
        )
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
        # As `jax_impl.products.product` does: XLA's CPU backend has bfloat16 kernels only for float32 results.
        result = jnp.float32 if machine().lays_out_products else dtype
        multiply = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=result))
        return self._repeat(lambda: multiply(x, y))

    def _repeat(self, *calls: Callable) -> Callable[[int], None]:
        """A function that makes these calls so many times, under the configured precision, and waits."""
        # Dispatch is asynchronous, and the CPU backend would run calls that do not depend on each other side by side.
        wait = jax.block_until_ready if machine().platform == "cpu" else lambda out: out

        def run(count: int) -> None:
            with jax.default_matmul_precision(self.config.precision.matmul):
                for _ in range(count):
                    for call in calls:
                        out = wait(call())
                jax.block_until_ready(out)

        return run

    def parts(self) -> dict[str, Part]:
        config, shape = self.config, self.config.model
        A, B, T = config.accumulation, config.batch_size, config.sequence_length
        dtype, keys = jnp.dtype(config.precision.compute), iter(jax.random.split(jax.random.key(config.seed), 6))

        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

        optimizer = make_optimizer(config)

        @functools.partial(jax.jit, donate_argnums=0)
        def update(state, grads):
            grads, norm = clip_by_global_norm(grads, config.clip_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), norm

        def optimize():
            self.trainer.state, norm = update(self.trainer.state, grads)
            return self.trainer.state, norm

        grads = jax.tree.map(jnp.copy, self.trainer.state.params)
        matrices = {path: grad for path, grad in grads.items() if qwen_matrices(path, grad, model=shape)}
        newton_schulz = jax.jit(
            functools.partial(
                orthogonalize,
                coefficients=KELLER_JORDAN[:1] * config.muon.ns_steps,
                eps=config.muon.eps,
                dtype=config.precision.newton_schulz,
                batched=machine().batched_matrices,
            )
        )

        head_VD = normal(shape.vocab_size, shape.hidden_size).astype(config.precision.params)
        x_MD, targets_M = normal(B * T, shape.hidden_size), jnp.arange(B * T) % shape.vocab_size
        # Loss and gradients are both returned: what is not needed would not be computed.
        cross_entropy = jax.jit(jax.value_and_grad(loss.cross_entropy, argnums=(0, 1)))

        key = random.key(config.seed) if shape.dropout else None
        q_BTNH, out_grad = (normal(B, T, shape.num_attention_heads, shape.head_dim) for _ in range(2))
        k_BSKH, v_BSKH = (normal(B, T, shape.num_key_value_heads, shape.head_dim) for _ in range(2))

        @functools.partial(jax.jit, static_argnames="window")
        def attend(q_BTNH, k_BSKH, v_BSKH, out_grad, window):
            def forward(q, k, v):
                attend = attention.fused_attention if self.fused else attention.attention
                return attend(q, k, v, window=window, rate=shape.dropout, key=key)

            out_BTNH, pull_back = jax.vjp(forward, q_BTNH, k_BSKH, v_BSKH)
            return out_BTNH, pull_back(out_grad)

        layers = [
            functools.partial(attend, q_BTNH, k_BSKH, v_BSKH, out_grad, window=shape.window_of_layer(layer))
            for layer in range(shape.num_hidden_layers)
        ]
        return {
            "optimizer": (1, self._repeat(optimize)),
            "newton_schulz": (1, self._repeat(lambda: newton_schulz(matrices))),
            "cross_entropy": (A, self._repeat(lambda: cross_entropy(x_MD, head_VD, targets_M))),
            "attention": (A, self._repeat(*layers)),
        }

    def device_peak_bytes(self) -> int | None:
        stats = jax.devices()[0].memory_stats()
        return None if stats is None else stats.get("peak_bytes_in_use")

    def reset_device_peak(self) -> None:
        """XLA keeps one peak from start to end."""


if __name__ == "__main__":
    serve(JaxSide)
