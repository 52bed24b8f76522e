"""Both sides behind one face: NumPy in, NumPy out, by Hugging Face name. Each class is used by every parity test."""

import contextlib
import functools
from collections.abc import Mapping

import jax
import numpy as np
import torch

import jax_impl.train
import jax_impl.weights
import torch_ref.train
import torch_ref.weights
from jax_impl import random as jax_random
from recipe.config import ModelConfig, PrecisionConfig, RunConfig
from torch_ref import random as torch_random

Arrays = dict[str, np.ndarray]


def x64(precision: PrecisionConfig):
    """Context in which JAX keeps float64 if the precision asks for it; float32 otherwise, whatever the process says."""
    return jax.enable_x64(precision.params == "float64")


class JaxModel:
    """jax_impl's model on given weights, every call jitted."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, weights: Arrays) -> None:
        self.model, self.precision = model, precision
        with self._settings():
            self.graph = jax_impl.weights.model_structure(model, precision)
            self.params = jax_impl.weights.from_hf(weights, model, precision)

    @contextlib.contextmanager
    def _settings(self):
        with x64(self.precision), jax.default_matmul_precision(self.precision.matmul):
            yield

    def weights(self) -> Arrays:
        return jax_impl.weights.to_hf(self.params)

    def logits(self, tokens_BT: np.ndarray, documents_BT: np.ndarray | None = None) -> np.ndarray:
        with self._settings():
            call = jax.jit(lambda params: jax_impl.weights.bind(self.graph, params)(tokens_BT, documents_BT))
            return np.asarray(call(self.params))

    def loss_and_grads(self, inputs_BT, targets_BT, dropout_seed: int | None = None) -> tuple[float, Arrays]:
        with self._settings():
            key = None if dropout_seed is None else jax_random.key(dropout_seed)

            def loss(params):
                return jax_impl.weights.bind(self.graph, params).loss(inputs_BT, targets_BT, dropout_key=key)

            value, grads = jax.jit(jax.value_and_grad(loss))(self.params)
            return float(value), jax_impl.weights.to_hf(grads)

    def evaluate(self, *batch_BT: np.ndarray) -> tuple[float, int]:
        with self._settings():
            call = jax.jit(lambda params: jax_impl.weights.bind(self.graph, params).evaluate(*batch_BT))
            loss, correct = call(self.params)
            return float(loss), int(correct)


class TorchModel:
    """torch_ref's model on given weights."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, weights: Arrays, device: str = "cpu") -> None:
        self.module, self.device = torch_ref.weights.from_hf(weights, model, precision, device), device

    def weights(self) -> Arrays:
        return torch_ref.weights.to_hf(dict(self.module.named_parameters()))

    def logits(self, *batch_BT: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.module(*self._tensors(*batch_BT)).cpu().numpy()

    def loss_and_grads(self, inputs_BT, targets_BT, dropout_seed: int | None = None) -> tuple[float, Arrays]:
        self.module.zero_grad()
        key = None if dropout_seed is None else torch_random.key(dropout_seed)
        loss = self.module.loss(*self._tensors(inputs_BT, targets_BT), dropout_key=key)
        loss.backward()
        grads = {name: parameter.grad for name, parameter in self.module.named_parameters()}
        return loss.item(), torch_ref.weights.to_hf(grads)

    def evaluate(self, *batch_BT: np.ndarray) -> tuple[float, int]:
        with torch.no_grad():
            loss, correct = self.module.evaluate(*self._tensors(*batch_BT))
            return loss.item(), int(correct)

    def _tensors(self, *tokens_BT: np.ndarray) -> list[torch.Tensor]:
        return [torch.tensor(tokens, device=self.device).long() for tokens in tokens_BT]


# Compiling an update takes far longer than running it, and tests of one configuration can share it.
_make_train_step = functools.cache(jax_impl.train.make_train_step)


class JaxTraining:
    """jax_impl's training, update by update."""

    def __init__(self, config: RunConfig, weights: Arrays) -> None:
        self.config = config
        with x64(config.precision):
            self.state = jax_impl.train.init_state(config, weights)
            self.train_step = _make_train_step(config)

    def step(self, *batch_ABT: np.ndarray) -> dict[str, float]:
        with x64(self.config.precision):
            self.state, metrics = self.train_step(self.state, *batch_ABT)
            return {name: float(value) for name, value in metrics.items()}

    def weights(self) -> Arrays:
        return jax_impl.weights.to_hf(self.state.params)

    def slots(self) -> dict[str, Arrays]:
        return jax_impl.weights.optimizer_slots(self.state.opt_state)

    def counts(self) -> tuple[int, int]:
        return int(self.state.step), int(self.state.skipped)

    def restore(self, slots: Mapping[str, Arrays], updates: int, skipped: int) -> None:
        with x64(self.config.precision):
            self.state = jax_impl.train.restore_state(self.state, slots, updates, skipped)


class TorchTraining:
    """torch_ref's training, update by update."""

    def __init__(self, config: RunConfig, weights: Arrays, device: str = "cpu") -> None:
        self.device = device
        self.state = torch_ref.train.init_state(config, weights, device)
        self.train_step = torch_ref.train.make_train_step(config)

    def step(self, *batch_ABT: np.ndarray) -> dict[str, float]:
        batch = [torch.tensor(tokens, device=self.device).long() for tokens in batch_ABT]
        self.state, metrics = self.train_step(self.state, *batch)
        return {name: float(value) for name, value in metrics.items()}

    def weights(self) -> Arrays:
        return torch_ref.weights.to_hf(dict(self.state.model.named_parameters()))

    def slots(self) -> dict[str, Arrays]:
        return torch_ref.weights.optimizer_slots(self.state.optimizer)

    def counts(self) -> tuple[int, int]:
        return self.state.step, self.state.skipped

    def restore(self, slots: Mapping[str, Arrays], updates: int, skipped: int) -> None:
        self.state = torch_ref.train.restore_state(self.state, slots, updates, skipped)
