"""Where an update's numbers stop being finite: one batch with every module tapped, once, after a run has diverged.
The twin is `torch_ref/diagnosis.py`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from harness.divergence import Diagnosis, input_name, norms
from jax_impl import random
from jax_impl.backend import machine, on_device_of
from jax_impl.hybrid import clip_by_global_norm
from jax_impl.loss import weighted
from jax_impl.model import Qwen3ForCausalLM
from jax_impl.weights import Params, bind, hf_name, model_structure
from recipe.config import RunConfig


class Pass(NamedTuple):
    """One micro-batch: whether each tap was finite, forward and backward, with the loss and the gradients."""

    forward: dict[str, bool]
    loss: jax.Array
    backward: dict[str, bool]
    grads: dict[str, jax.Array]

    def is_finite(self) -> bool:
        tensors = (self.loss, *self.grads.values())
        return all((*self.forward.values(), *self.backward.values(), *map(_is_finite, tensors)))


def diagnose(
    config: RunConfig,
    params: Params,
    slots: Mapping[str, Mapping[str, np.ndarray]],
    position: int,
    inputs_ABT: np.ndarray,
    targets_ABT: np.ndarray,
    documents_ABT: np.ndarray | None = None,
) -> Diagnosis:
    """What update `position`, from 0, computes of this batch before its optimizer; nothing is changed.

    It shows the first micro-batch that is not finite, else the mean of all.
    """
    with jax.default_matmul_precision(config.precision.matmul), on_device_of(params):
        A, micro_batch, total = inputs_ABT.shape[0], None, None
        step_key = random.fold_in(random.key(config.seed), position)
        tapped_pass = _make_tapped_pass(config)
        batch: tuple = inputs_ABT, targets_ABT
        if documents_ABT is not None:
            targets, weights_ABT = weighted(jnp.asarray(targets_ABT), config.precision.params)
            batch = inputs_ABT, targets, documents_ABT, weights_ABT
        for index in range(A):
            key = random.fold_in(step_key, index) if config.model.dropout else None
            shown = tapped_pass(params, [x[index] for x in batch], key)
            if not shown.is_finite():
                micro_batch, loss, grads = index, shown.loss, shown.grads
                break
            added = (shown.loss, shown.grads)
            total = added if total is None else jax.tree.map(jnp.add, total, added)
        else:
            loss, grads = jax.tree.map(lambda x: x / A, total)
        grad_norm = jax.jit(lambda grads: clip_by_global_norm(grads, config.clip_norm)[1])(grads)
        return Diagnosis(
            weights=norms({hf_name(path): x for path, x in params.items()}, config.model, np.asarray),
            forward=shown.forward,
            loss=float(loss),
            backward=shown.backward,
            gradients=norms({hf_name(path): x for path, x in grads.items()}, config.model, np.asarray, backwards=True),
            grad_norm=float(grad_norm),
            slots={slot: norms(arrays, config.model, np.asarray) for slot, arrays in slots.items()},
            micro_batch=micro_batch,
        )


def _make_tapped_pass(config: RunConfig) -> Callable[..., Pass]:
    """`tapped_pass(params, batch, key)`: one micro-batch, forward and backward, compiled as training
    is.

    What a tap saw leaves the compiled function as the gradient of its probe, also out of a rematerialised block.
    """
    graph = model_structure(config.model, config.precision)
    order: dict[str, None] = {}

    def loss(params, probes, batch, key):
        model = bind(graph, params)

        def tap(name, x):
            order[name] = None  # a jitted function returns dicts sorted by key
            return x if probes is None else _tap(x, probes[name])

        with _tapped(model, tap):
            return model.loss(*batch, dropout_key=key)

    options = dict(machine().compiler_options)
    if config.precision.deterministic:
        options |= dict(machine().deterministic_options)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=options)

    def tapped_pass(params, batch, key):
        if not order:
            jax.eval_shape(loss, params, None, batch, key)
        probes = {name: jnp.zeros(2) for name in order}
        value, (grads, seen) = compiled(params, probes, batch, key)
        forward, backward = ({name: not seen[name][i] for name in order} for i in range(2))
        return Pass(forward, value, dict(reversed(backward.items())), grads)

    return tapped_pass


@jax.custom_vjp
def _tap(x: jax.Array, probe: jax.Array) -> jax.Array:
    """x itself. The gradient of `probe` is not zero where x, and where what flows back through it, is not finite."""
    return x


def _tap_forward(x, probe):
    return x, jnp.isfinite(x).all()


def _tap_backward(finite, cotangent):
    both = jnp.stack([finite, jnp.isfinite(cotangent).all()])
    return cotangent, jnp.where(both, 0.0, 1.0)


_tap.defvjp(_tap_forward, _tap_backward)


@contextlib.contextmanager
def _tapped(model: Qwen3ForCausalLM, tap: Callable[[str, jax.Array], jax.Array]) -> Iterator[None]:
    """Context in which what each module returns, and what some are given, goes on as `tap(name, x)`; the model is
    traced in it.

    A module that hands on its child's very output has no tap of its own.
    """
    paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    last = None

    def tapped(call):
        def __call__(self, x, *args, **kwargs):
            nonlocal last
            name, path = input_name(paths[id(self)]), paths[id(self)]
            out = call(self, x if name is None else tap(name, x), *args, **kwargs)
            last = out if out is last else tap(path, out)
            return last

        return __call__

    with contextlib.ExitStack() as patches:
        for kind in {type(module) for _, module in nnx.iter_modules(model) if "__call__" in vars(type(module))}:
            patches.callback(setattr, kind, "__call__", kind.__call__)
            type.__setattr__(kind, "__call__", tapped(kind.__call__))
        yield


def _is_finite(x: jax.Array) -> bool:
    return bool(jnp.isfinite(x).all())
