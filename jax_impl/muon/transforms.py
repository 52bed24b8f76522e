"""Muon as optax transformations, in small parts, each with its source.

Every factory takes `matrices`, the function that says which axes of a leaf are inputs and outputs (`matrices.py`).
Without it the rule is that of the `muon_or` around it, else that each leaf has two axes, (fan_in, fan_out), as a Flax
kernel has. A leaf that is no matrix is refused by `init`.
Semantics are Keller Jordan's, https://kellerjordan.github.io/posts/muon/; `optax.contrib.muon` corrects the bias of
its momentum and is a different optimizer.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_impl.muon.batches import Shardings, orthogonalize
from jax_impl.muon.matrices import Matrices, Matrix, fans, map_matrices, path_of
from jax_impl.muon.newton_schulz import KELLER_JORDAN, Coefficients, checked

Momentum = Literal["average", "heavy_ball"]


class ScaleByMuonState(NamedTuple):
    """Momentum of every matrix, shaped and named like the parameters."""

    mu: optax.Updates


def scale_by_muon(
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
    batched: bool | None = None,
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """Momentum, then orthogonalisation of every leaf.

    momentum: "average", mu <- beta mu + (1 - beta) g without bias correction, and with Nesterov the direction
        beta mu + (1 - beta) g with the new mu (Jordan); "heavy_ball", mu <- beta mu + g and g + beta mu (Moonlight,
        dion). The two directions are multiples of each other, so that only eps tells them apart.
    coefficients, eps, ns_dtype, gram: Newton-Schulz's, see `orthogonalize_via_newton_schulz`.
    mu_dtype: dtype of the state; None is the parameters', but float32 if theirs is narrower, where an average of 20
        gradients would stand still for want of digits. Sums are taken in float32 or wider in any case.
    batched, shardings: see `orthogonalize`.

    Updates have the gradients' dtype. Give dtypes by name: `optax.inject_hyperparams` takes jnp.bfloat16, which can be
    called, for a schedule.
    """
    _require(momentum in ("average", "heavy_ball"), f"momentum={momentum!r} must be 'average' or 'heavy_ball'.")
    _require_fraction("beta", beta)
    _require_rate("eps", eps)
    for name, dtype in (("ns_dtype", ns_dtype), ("mu_dtype", mu_dtype or "float32")):
        _require_floating(name, dtype)
    rows = checked(coefficients)

    def init_fn(params):
        def zeros(leaf, _):
            return jnp.zeros_like(leaf, dtype=mu_dtype or jnp.result_type(leaf, jnp.float32))

        return ScaleByMuonState(mu=map_matrices(zeros, matrices, params))

    def update_fn(updates, state, params=None):
        del params
        weight = 1 - beta if momentum == "average" else 1.0
        updates = jax.tree.map(jnp.asarray, updates)  # NumPy's float64 is JAX's float32 where x64 is off

        def mix(grad, mu):
            wide = jnp.promote_types(jnp.promote_types(grad.dtype, mu.dtype), jnp.float32)
            return (weight * grad.astype(wide) + beta * mu.astype(wide)).astype(wide)

        mu = jax.tree.map(mix, updates, state.mu)
        direction = jax.tree.map(mix, updates, mu) if nesterov else mu
        whole = orthogonalize(
            direction,
            matrices,
            coefficients=rows,
            eps=eps,
            dtype=ns_dtype,
            gram=gram,
            batched=batched,
            shardings=shardings,
        )
        stored = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        return jax.tree.map(lambda new, grad: new.astype(grad.dtype), whole, updates), ScaleByMuonState(stored)

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_fan_ratio(*, matrices: Matrices | None = None, clamped: bool = True) -> optax.GradientTransformation:
    """Scale each update by sqrt(max(1, fan_out / fan_in)), so that it keeps the RMS of what flows through it.

    Jordan's rule; `clamped=False` leaves the maximum out, as dion does (Bernstein, https://jeremybernste.in/writing/deriving-muon).
    """

    def factor(fan_in: int, fan_out: int) -> float:
        ratio = fan_out / max(fan_in, 1)
        return max(1.0, ratio) ** 0.5 if clamped else ratio**0.5

    return _scale_by(factor, matrices)


def scale_by_consistent_rms(rms: float = 0.2, *, matrices: Matrices | None = None) -> optax.GradientTransformation:
    """Scale each update by rms sqrt(max(fan_in, fan_out)): an orthogonal matrix then has entries of that RMS, AdamW's.

    Moonlight, https://arxiv.org/abs/2502.16982, equation 4. Of Gaussian matrices Jordan's five steps leave singular
    values below one in the root mean square, and so an RMS of 0.17 to 0.20 (96 x 96 to 1024 x 3072).
    """
    _require_rate("rms", rms)
    return _scale_by(lambda fan_in, fan_out: rms * max(fan_in, fan_out) ** 0.5, matrices)


def _scale_by(factor: Callable[[int, int], float], matrices: Matrices | None) -> optax.GradientTransformation:
    def scale(update: jax.Array, matrix: Matrix) -> jax.Array:
        return update * factor(*fans(update.shape, matrix))

    return optax.stateless(lambda updates, _: map_matrices(scale, matrices, updates))


class ScaleByNeuronNormState(NamedTuple):
    """Average square of each output neuron's update; shaped like the parameters, with one entry for all inputs."""

    nu: optax.Updates


def scale_by_neuron_norm(
    beta: float | jax.Array = 0.95, eps: float | jax.Array = 1e-8, *, matrices: Matrices | None = None
) -> optax.GradientTransformation:
    """NorMuon's second moment: each output neuron's update over the root of its average square; the norm is kept.

    nu <- beta nu + (1 - beta) mean over inputs of u^2;  s = u / (sqrt(nu) + eps);  s ||u||_F / (||s||_F + eps).

    https://arxiv.org/abs/2510.05491, as the authors' code and dion have it: a neuron is always an output (nanochat
    takes the longer side), there is no bias correction, and the Frobenius norm is the one before (the paper's text
    makes it 0.2 sqrt(fan_in fan_out)). Place it after `scale_by_muon`.
    """
    _require_fraction("beta", beta)
    _require_rate("eps", eps)

    def init_fn(params):
        def zeros(leaf, matrix):
            shape = [1 if axis in matrix.fan_in else leaf.shape[axis] for axis in range(-leaf.ndim, 0)]
            return jnp.zeros(shape, jnp.result_type(leaf, jnp.float32))

        return ScaleByNeuronNormState(nu=map_matrices(zeros, matrices, params))

    def update_fn(updates, state, params=None):
        del params

        def moment(update, matrix, nu):
            fan_in = max(fans(update.shape, matrix)[0], 1)
            square = jnp.sum(jnp.square(update.astype(nu.dtype)) / fan_in, axis=matrix.fan_in, keepdims=True)
            return (beta * nu + (1 - beta) * square).astype(nu.dtype)

        def scale(update, matrix, nu):
            def norm(x):
                return jnp.sqrt(jnp.sum(x * x, axis=matrix.fan_in + matrix.fan_out, keepdims=True))

            wide = update.astype(nu.dtype)
            even = wide / (jnp.sqrt(nu) + eps)
            return (even * (norm(wide) / (norm(even) + eps))).astype(update.dtype)

        nu = map_matrices(moment, matrices, updates, state.nu)
        return map_matrices(scale, matrices, updates, nu), ScaleByNeuronNormState(nu)

    return optax.GradientTransformation(init_fn, update_fn)


def add_cautious_decayed_weights(weight_decay: float | jax.Array) -> optax.GradientTransformation:
    """Weight decay where it does not work against the update: u + weight_decay * w wherever u w >= 0, else u.

    https://arxiv.org/abs/2510.12402. Place it where `optax.add_decayed_weights` stands, before the learning rate.
    """

    def update_fn(updates, params):
        if params is None:
            raise ValueError("Cautious decay needs the parameters: call update(grads, state, params).")

        def decay(update, weight):
            # By signs: the product of two small numbers may vanish.
            agrees = jnp.sign(update) * jnp.sign(weight).astype(update.dtype) >= 0
            return update + jnp.where(agrees, weight_decay * weight, 0).astype(update.dtype)

        return jax.tree.map(decay, updates, params)

    return optax.stateless(update_fn)


class Heads(NamedTuple):
    """Where a leaf that makes queries or keys has its heads, for `clip_qk`."""

    attention: str
    """Name of the attention layer in `max_logits`."""
    axis: int
    """Axis whose equal parts are the heads."""
    power: float = 0.5
    """Exponent of a head's factor: 0.5 for queries and for keys that go together; 1 for queries whose keys are shared
    by several heads, and such keys are left alone."""


def clip_qk(
    heads: Callable[[str, Any], Heads | None], threshold: float | jax.Array = 100.0
) -> optax.GradientTransformationExtraArgs:
    """QK-clip, the clip of MuonClip: heads whose largest logit passed the threshold have their weights scaled down.

    Last in a chain, where updates are what is added to the weights. The model hands over its largest logits:
    `update(grads, state, params, max_logits={attention: (heads,)})`. A head with logit s gets the factor
    min(1, threshold / s) to `Heads.power`, on its part of the updated weight, so that query times key is scaled by it
    once. Kimi K2, https://arxiv.org/abs/2507.20534, section 2.1, which leaves shared parts of keys alone.

    heads: path and leaf to `Heads`, or None for a leaf that makes neither queries nor keys.
    """
    _require(
        not isinstance(threshold, int | float) or threshold > 0,
        f"threshold={threshold} must be above 0; Kimi K2 takes 100.",
    )

    def update_fn(updates, state, params=None, *, max_logits: Mapping[str, jax.Array] | None = None, **_):
        if params is None or max_logits is None:
            raise ValueError("clip_qk needs parameters and logits: update(grads, state, params, max_logits={...}).")

        def clip(keys, update, weight):
            found = heads(path_of(keys), weight)
            if found is None:
                return update
            _require(
                found.attention in max_logits,
                f"max_logits has no {found.attention!r}, as {path_of(keys)} needs, but {', '.join(max_logits)}.",
            )
            logits = jnp.asarray(max_logits[found.attention], jnp.result_type(weight, jnp.float32))
            axis, size = found.axis % weight.ndim, weight.shape[found.axis]
            if logits.ndim != 1 or size % logits.shape[0]:
                raise ValueError(
                    f"{path_of(keys)} {weight.shape} has {size} columns on axis {found.axis}, not a multiple of "
                    f"the {logits.shape} logits of {found.attention}: one logit for each head."
                )
            # The largest logit of a head may be negative; it passed nothing.
            factor = jnp.repeat((threshold / jnp.maximum(threshold, logits)) ** found.power, size // logits.shape[0])
            factor = factor.reshape([-1 if place == axis else 1 for place in range(weight.ndim)])
            clipped = (weight + update) * factor - weight
            return jnp.where(factor < 1, clipped, update).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(clip, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_fraction(name: str, value: Any) -> None:
    """Python's numbers are checked; what `inject_hyperparams` traces cannot be."""
    _require(
        not isinstance(value, int | float) or 0 <= value < 1, f"{name}={value} must lie in [0, 1); choose e.g. 0.95."
    )


def _require_floating(name: str, dtype: Any) -> None:
    try:
        # What `inject_hyperparams` makes of jnp.bfloat16 is an array.
        is_floating = not isinstance(dtype, jax.Array) and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    _require(is_floating, f"{name}={dtype!r} must name a floating dtype, such as 'float32', 'bfloat16' or 'float16'.")


def _require_rate(name: str, value: Any) -> None:
    _require(not isinstance(value, int | float) or value >= 0, f"{name}={value} must be at least 0.")
