"""Muon on this model's matrices and AdamW on the rest, with the clip before both; `muon/` is for anybody's model.

Flax kernels are (fan_in, fan_out); Newton-Schulz wants (fan_out, fan_in): `muon.orthogonalize` is the door.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_impl.backend import machine
from jax_impl.muon import FULLY_CONNECTED, KELLER_JORDAN, Matrix, muon, muon_or
from jax_impl.muon.batches import Shardings
from jax_impl.weights import hf_name
from recipe.config import AdamWConfig, ModelConfig, MuonConfig
from recipe.params import decays, param_specs


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, whose state it keeps, with bias corrections that float32 does not spoil.

    optax computes 1 - b2^t by subtraction: 3e-5 off for b2 = 0.999 at the first updates, a hundred times torch's error.
    """

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, order=1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, order=2)

        def direction(m, v):
            # 1 - b^t = -expm1(t log b); the logarithm is Python's, in float64.
            logs = [math.log(b) if b > 0.0 else -math.inf for b in (b1, b2)]
            correction1, correction2 = (-jnp.expm1(count.astype(v.dtype) * log) for log in logs)
            return (m / correction1) / (jnp.sqrt(v / correction2) + eps)

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update_fn)


def qwen_matrices(path: str, leaf: Any, *, model: ModelConfig) -> Matrix | None:
    """The rule of `muon.matrices` for this model: each parameter whose role is matrix is a kernel (fan_in, fan_out)."""
    return FULLY_CONNECTED if param_specs(model)[hf_name(path)].role == "matrix" else None


def muon_with_adamw(
    muon_config: MuonConfig,
    adamw_config: AdamWConfig,
    model: ModelConfig,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    ns_dtype: jax.typing.DTypeLike = "bfloat16",
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """Muon on the matrices and AdamW on the rest; `schedule` maps the update's count to the learning-rate factor.

    `shardings` says by path where the matrices of a mesh lie, as `muon.orthogonalize` wants it.
    """
    specs = param_specs(model)
    matrices = functools.partial(qwen_matrices, model=model)

    def decayed(params):
        # Inside `partition` the matrices are empty nodes, so the mask is made by mapping over what is left.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: decays(specs[hf_name(path[0].key)].role, adamw_config), params
        )

    def build() -> optax.GradientTransformation:
        return muon_or(
            matrices,
            muon(
                lambda count: muon_config.learning_rate * schedule(count),
                muon_config.beta,
                nesterov=muon_config.nesterov,
                coefficients=KELLER_JORDAN[:1] * muon_config.ns_steps,
                eps=muon_config.eps,
                ns_dtype=ns_dtype,
                weight_decay=muon_config.weight_decay,
                batched=machine().batched_matrices,
                shardings=shardings,
            ),
            optax.chain(
                scale_by_adam(adamw_config.beta1, adamw_config.beta2, adamw_config.eps),
                optax.add_decayed_weights(adamw_config.weight_decay, mask=decayed),
                optax.scale_by_learning_rate(lambda count: adamw_config.learning_rate * schedule(count)),
            ),
        )

    # Built where an update is traced, which is where the machine is known.
    return optax.GradientTransformation(
        lambda params: build().init(params), lambda grads, state, params=None: build().update(grads, state, params)
    )


def clip_by_global_norm(
    grads: optax.Updates, max_norm: float, norm_of: Callable[[optax.Updates], jax.Array] = optax.tree.norm
) -> tuple[optax.Updates, jax.Array]:
    """Clipped gradients and their norm before: scaled by min(1, max_norm / (norm + 1e-6)), torch's definition.

    `optax.clip_by_global_norm` leaves out the 1e-6, a relative difference of 1e-7 that a float64 proof would see.
    """
    norm = norm_of(grads)
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * factor, grads), norm
