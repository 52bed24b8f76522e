"""Muon as optax transformations, in small parts: momentum and orthogonalisation, fan ratio, alias, hybrid with AdamW.

Flax kernels are (..., fan_in, fan_out); Newton-Schulz wants (..., fan_out, fan_in): `scale_by_muon` is the door.
Semantics are the seed notebook's (Keller Jordan's Muon); `optax.contrib.muon` corrects the bias of its momentum and
is a different optimizer (docs/muon.md).
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_impl.backend import machine
from jax_impl.newton_schulz import orthogonalize_via_newton_schulz
from jax_impl.weights import hf_name
from recipe.config import AdamWConfig, ModelConfig, MuonConfig
from recipe.params import decays, param_specs


class ScaleByMuonState(NamedTuple):
    """Momentum of every matrix, shaped and named like the parameters."""

    mu: optax.Updates


def orthogonalize_all(updates: optax.Updates, **newton_schulz) -> optax.Updates:
    """Orthogonalise every (fan_in, fan_out) leaf; on a GPU, leaves that are alike when laid wide share one call."""
    rounds_gram = not machine().lays_out_products
    orthogonalize = functools.partial(orthogonalize_via_newton_schulz, rounds_gram=rounds_gram, **newton_schulz)
    leaves, tree = jax.tree.flatten(updates)
    groups = collections.defaultdict(list)
    for index, update_IO in enumerate(leaves):
        groups[min(update_IO.shape), max(update_IO.shape)].append(index)
    for indices in groups.values():
        # The wide layout of weight_OI: a tall weight's is its transpose, which is the kernel as it stands.
        are_wide = [leaves[i].shape[-1] > leaves[i].shape[-2] for i in indices]
        wide = [leaves[i] if is_wide else leaves[i].mT for i, is_wide in zip(indices, are_wide, strict=True)]
        orthogonal = orthogonalize(jnp.stack(wide)) if machine().batched_matrices else map(orthogonalize, wide)
        for i, is_wide, matrix in zip(indices, are_wide, orthogonal, strict=True):
            # Out of ns_dtype before any scaling: a factor applied in bfloat16 would cost 2e-3.
            leaves[i] = (matrix if is_wide else matrix.mT).astype(leaves[i].dtype)
    return jax.tree.unflatten(tree, leaves)


def scale_by_muon(
    beta: float = 0.95, *, nesterov: bool = True, ns_steps: int = 5, eps: float = 1e-7, ns_dtype=jnp.bfloat16
) -> optax.GradientTransformation:
    """Momentum, then orthogonalisation of every leaf; a leaf is a matrix (fan_in, fan_out).

    mu <- beta mu + (1 - beta) g, without bias correction; with Nesterov the direction is beta mu + (1 - beta) g,
    taken with the new mu. The state is kept in the gradients' dtype, Newton-Schulz runs in `ns_dtype`.
    """

    def init_fn(params):
        return ScaleByMuonState(mu=optax.tree.zeros_like(params))

    def update_fn(updates, state, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, beta, order=1)
        direction = optax.tree.update_moment(updates, mu, beta, order=1) if nesterov else mu
        return orthogonalize_all(direction, steps=ns_steps, eps=eps, dtype=ns_dtype), ScaleByMuonState(mu)

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_fan_ratio() -> optax.GradientTransformation:
    """Scale each update by sqrt(max(1, fan_out / fan_in)), so that it keeps the RMS of what flows through it."""
    return optax.stateless_with_tree_map(
        lambda update_IO, _: update_IO * max(1.0, update_IO.shape[-1] / update_IO.shape[-2]) ** 0.5
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: float = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    eps: float = 1e-7,
    ns_dtype=jnp.bfloat16,
    weight_decay: float | None = None,
) -> optax.GradientTransformation:
    """Muon for matrices: -learning_rate * (sqrt(max(1, fan_out/fan_in)) * NS(momentum) + weight_decay * weight)."""
    return optax.chain(
        scale_by_muon(beta, nesterov=nesterov, ns_steps=ns_steps, eps=eps, ns_dtype=ns_dtype),
        scale_by_fan_ratio(),
        *([optax.add_decayed_weights(weight_decay)] if weight_decay else []),
        optax.scale_by_learning_rate(learning_rate),
    )


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


def label_params(params: dict[str, jax.Array], model: ModelConfig) -> dict[str, str]:
    """'muon' for each parameter whose role is matrix, 'adamw' for every other one."""
    specs = param_specs(model)
    return {path: "muon" if specs[hf_name(path)].role == "matrix" else "adamw" for path in params}


def muon_with_adamw(
    muon_config: MuonConfig,
    adamw_config: AdamWConfig,
    model: ModelConfig,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    ns_dtype=jnp.bfloat16,
) -> optax.GradientTransformation:
    """Muon on the matrices and AdamW on the rest; `schedule` maps the update's count to the learning-rate factor."""
    specs = param_specs(model)

    def decayed(params):
        # Inside `partition` the matrices are empty nodes, so the mask is made by mapping over what is left.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: decays(specs[hf_name(path[0].key)].role, adamw_config), params
        )

    return optax.partition(
        {
            "muon": muon(
                lambda count: muon_config.learning_rate * schedule(count),
                muon_config.beta,
                nesterov=muon_config.nesterov,
                ns_steps=muon_config.ns_steps,
                eps=muon_config.eps,
                ns_dtype=ns_dtype,
                weight_decay=muon_config.weight_decay or None,
            ),
            "adamw": optax.chain(
                scale_by_adam(adamw_config.beta1, adamw_config.beta2, adamw_config.eps),
                optax.add_decayed_weights(adamw_config.weight_decay, mask=decayed),
                optax.scale_by_learning_rate(lambda count: adamw_config.learning_rate * schedule(count)),
            ),
        },
        lambda params: label_params(params, model),
    )


def clip_by_global_norm(grads: optax.Updates, max_norm: float) -> tuple[optax.Updates, jax.Array]:
    """Clipped gradients and their norm before: scaled by min(1, max_norm / (norm + 1e-6)), torch's definition.

    `optax.clip_by_global_norm` leaves out the 1e-6, a relative difference of 1e-7 that a float64 proof would see.
    """
    norm = optax.tree.norm(grads)
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * factor, grads), norm
