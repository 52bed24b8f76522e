"""Where an update's numbers stop being finite: one batch with every module tapped, once, after a run has diverged.
The twin is `jax_impl/diagnosis.py`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from harness.divergence import Diagnosis, input_name, norms
from recipe.config import RunConfig
from torch_ref import random
from torch_ref.hybrid import clip_by_global_norm
from torch_ref.loss import weighted
from torch_ref.model import Qwen3ForCausalLM
from torch_ref.weights import to_array


class Pass(NamedTuple):
    """One micro-batch: whether each tap was finite, forward and backward, with the loss and the gradients."""

    forward: dict[str, bool]
    loss: torch.Tensor
    backward: dict[str, bool]
    grads: dict[str, torch.Tensor]

    def is_finite(self) -> bool:
        tensors = (self.loss, *self.grads.values())
        return all((*self.forward.values(), *self.backward.values(), *map(_is_finite, tensors)))


def diagnose(
    config: RunConfig,
    model: Qwen3ForCausalLM,
    slots: Mapping[str, Mapping[str, np.ndarray]],
    position: int,
    inputs_ABT: torch.Tensor,
    targets_ABT: torch.Tensor,
    documents_ABT: torch.Tensor | None = None,
) -> Diagnosis:
    """What update `position`, from 0, computes of this batch before its optimizer; nothing is changed.

    It shows the first micro-batch that is not finite, else the mean of all.
    """
    A, micro_batch = inputs_ABT.shape[0], None
    total: dict[str, torch.Tensor] = {}
    batch: tuple[torch.Tensor, ...] = inputs_ABT, targets_ABT
    if documents_ABT is not None:
        targets, weights_ABT = weighted(targets_ABT, getattr(torch, config.precision.params))
        batch = inputs_ABT, targets, documents_ABT, weights_ABT
    step_key = random.fold_in(random.key(config.seed), position)
    for index in range(A):
        key = random.fold_in(step_key, index) if config.model.dropout else None
        shown = _tapped_pass(model, [x[index] for x in batch], key)
        if not shown.is_finite():
            micro_batch, loss, grads = index, shown.loss, shown.grads
            break
        added = {"loss": shown.loss} | shown.grads
        total = {name: total[name] + x if total else x for name, x in added.items()}
    else:
        grads = {name: x / A for name, x in total.items()}
        loss = grads.pop("loss")
    gradients = norms(grads, config.model, to_array, backwards=True)
    grad_norm = clip_by_global_norm(list(grads.values()), config.clip_norm)  # in place, so after their own norms
    return Diagnosis(
        weights=norms(dict(model.named_parameters()), config.model, to_array),
        forward=shown.forward,
        loss=float(loss),
        backward=shown.backward,
        gradients=gradients,
        grad_norm=float(grad_norm),
        slots={slot: norms(arrays, config.model, np.asarray) for slot, arrays in slots.items()},
        micro_batch=micro_batch,
    )


def _tapped_pass(model: Qwen3ForCausalLM, batch: list[torch.Tensor], key: random.Key | None) -> Pass:
    """One micro-batch, forward and backward."""
    forward: dict[str, bool] = {}
    backward: dict[str, bool] = {}

    def tap(name, x):
        x = x.view_as(x)  # so that the gradient is what flows back through this tap alone
        forward[name] = _is_finite(x)
        x.register_hook(lambda grad: backward.__setitem__(name, _is_finite(grad)))
        return x

    with _tapped(model, tap):
        loss = model.loss(*batch, dropout_key=key)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()))
    backward = {name: backward[name] for name in reversed(forward)}
    return Pass(forward, loss.detach(), backward, dict(zip(named, grads, strict=True)))


@contextlib.contextmanager
def _tapped(model: Qwen3ForCausalLM, tap: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Context in which what each module returns, and what some are given, goes on as `tap(name, x)`.

    A module that hands on its child's very output has no tap of its own.
    """
    last = None

    def entered(path, args):
        name = input_name(path)
        return args if name is None else (tap(name, args[0]), *args[1:])

    def left(path, out):
        nonlocal last
        last = out if out is last else tap(path, out)
        return last

    with contextlib.ExitStack() as hooks:
        for path, part in model.named_modules():
            hooks.enter_context(part.register_forward_pre_hook(lambda _, args, path=path: entered(path, args)))
            hooks.enter_context(part.register_forward_hook(lambda _, args, out, path=path: left(path, out)))
        yield


def _is_finite(x: torch.Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())
