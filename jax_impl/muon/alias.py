"""Muon whole: the chain people use, the hybrid with another optimizer, and gradient accumulation around it."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jax_impl.muon.batches import Shardings
from jax_impl.muon.matrices import Matrices, by_default, path_of
from jax_impl.muon.newton_schulz import KELLER_JORDAN, Coefficients
from jax_impl.muon.transforms import (
    Momentum,
    add_cautious_decayed_weights,
    scale_by_consistent_rms,
    scale_by_fan_ratio,
    scale_by_muon,
    scale_by_neuron_norm,
)

Scale = Literal["fan_ratio", "unclamped_fan_ratio", "consistent_rms"]


def muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | jax.Array = 0.95,
    *,
    matrices: Matrices | None = None,
    momentum: Momentum = "average",
    nesterov: bool = True,
    coefficients: Coefficients = KELLER_JORDAN,
    eps: float | jax.Array = 1e-7,
    ns_dtype: jax.typing.DTypeLike = "bfloat16",
    mu_dtype: jax.typing.DTypeLike | None = None,
    gram: bool = False,
    neuron_beta: float | None = None,
    scale: Scale = "fan_ratio",
    weight_decay: float | jax.Array = 0.0,
    cautious: bool = False,
    batched: bool | None = None,
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """Muon for matrices: -learning_rate * (scale * NS(momentum) + weight_decay * weight).

    As it stands it is Keller Jordan's, with scale sqrt(max(1, fan_out / fan_in)). Every leaf must be a matrix: see
    `muon_or` for the others. Arguments are those of the parts:

    beta, momentum, nesterov, coefficients, eps, ns_dtype, mu_dtype, gram, batched, shardings: `scale_by_muon`.
    neuron_beta: NorMuon, by `scale_by_neuron_norm`; None leaves it out.
    scale: "fan_ratio" or "unclamped_fan_ratio" (`scale_by_fan_ratio`), "consistent_rms" (`scale_by_consistent_rms`).
    weight_decay: decoupled; 0.0 leaves it out, and `update` needs no parameters.
    cautious: decay by `add_cautious_decayed_weights`.

    `optax.inject_hyperparams(muon)(learning_rate=...)` works as it is, also inside `muon_or`; functions such as
    `matrices` and `shardings` must be named there: `static_args=("matrices",)`.
    """
    scales = {
        "fan_ratio": lambda: scale_by_fan_ratio(matrices=matrices),
        "unclamped_fan_ratio": lambda: scale_by_fan_ratio(matrices=matrices, clamped=False),
        "consistent_rms": lambda: scale_by_consistent_rms(matrices=matrices),
    }
    if scale not in scales:
        raise ValueError(f"scale={scale!r} must be one of {', '.join(scales)}.")
    decay = add_cautious_decayed_weights if cautious else optax.add_decayed_weights
    # Traced numbers always decay: a program cannot depend on what they will be.
    is_zero = isinstance(weight_decay, int | float) and weight_decay == 0
    return optax.chain(
        scale_by_muon(
            beta,
            matrices=matrices,
            momentum=momentum,
            nesterov=nesterov,
            coefficients=coefficients,
            eps=eps,
            ns_dtype=ns_dtype,
            mu_dtype=mu_dtype,
            gram=gram,
            batched=batched,
            shardings=shardings,
        ),
        *([] if neuron_beta is None else [scale_by_neuron_norm(neuron_beta, matrices=matrices)]),
        scales[scale](),
        *([] if is_zero else [decay(weight_decay)]),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon_or(
    matrices: Matrices, muon: optax.GradientTransformation, other: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The hybrid: `muon` for the leaves that are matrices, `other` (AdamW) for all the rest, by `optax.partition`.

    The rule is said once: a `muon` that was given no `matrices` takes these, also inside `optax.inject_hyperparams`.
    """
    inner = optax.with_extra_args_support(muon)

    def init_fn(params):
        with by_default(matrices):
            return inner.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        with by_default(matrices):
            return inner.update(updates, state, params, **extra_args)

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: "other" if matrices(path_of(keys), leaf) is None else "muon", params
        )

    told = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return optax.partition({"muon": told, "other": other}, labels)


class MultiSteps(optax.MultiSteps):
    """`optax.MultiSteps` whose optimizer runs only when its update is applied.

    optax's own runs it at each micro-step and drops the result, Newton-Schulz included: right, and `every_k_schedule`
    times the work. Arguments, state and results are optax's. Under `jax.vmap` a condition computes both sides.
    """

    def __init__(self, opt: optax.GradientTransformation, every_k_schedule: Any, *args: Any, **kwargs: Any) -> None:
        inner = optax.with_extra_args_support(opt)

        def update_fn(updates, state, params=None, *, is_applied, **extra_args):
            def run():
                new_updates, new_state = inner.update(updates, state, params, **extra_args)
                # As optax: Adam's moments of bfloat16 parameters would become float32 with such gradients.
                return new_updates, optax.tree.cast_like(new_state, state)

            def wait():
                zeros, _ = jax.eval_shape(run)
                return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), zeros), state

            return jax.lax.cond(is_applied, run, wait)

        super().__init__(
            optax.GradientTransformationExtraArgs(inner.init, update_fn), every_k_schedule, *args, **kwargs
        )
        self._every = every_k_schedule if callable(every_k_schedule) else lambda _: every_k_schedule

    def update(self, updates, state, params=None, **extra_args):
        """As `optax.MultiSteps.update`: zeros until the last micro-step, then the update by the mean gradient."""
        is_applied = state.mini_step == jnp.asarray(self._every(state.gradient_step)) - 1
        return super().update(updates, state, params, is_applied=is_applied, **extra_args)
