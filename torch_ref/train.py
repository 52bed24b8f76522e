"""Training in torch: one update is one function; the loop around it is `harness/loop.py`.

Twin: `jax_impl/train.py`.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harness import loop
from harness.divergence import Diagnosis
from harness.result import RunResult
from harness.saving import NO_ROOM, LazyArrays, Snapshot
from recipe.config import RunConfig
from recipe.packing import IGNORE
from recipe.schedule import learning_rate_factors
from torch_ref import random
from torch_ref.attention import attention_in_use, why_not_fused
from torch_ref.diagnosis import diagnose
from torch_ref.generate import make_generator
from torch_ref.hybrid import MuonWithAdamW, clip_by_global_norm
from torch_ref.loss import weighted
from torch_ref.model import Qwen3ForCausalLM
from torch_ref.weights import from_hf, optimizer_slots, restore_optimizer, slot_leaves, to_hf, to_hf_lazily


@dataclass
class TrainState:
    """All that an update changes; `step` counts the updates applied, `skipped` those left out as not finite."""

    model: Qwen3ForCausalLM
    optimizer: MuonWithAdamW
    step: int = 0
    skipped: int = 0


def make_schedule(config: RunConfig) -> Callable[[int], float]:
    """The learning-rate factor as a function of the updates applied so far."""
    factors = learning_rate_factors(config.schedule, config.steps).astype(config.precision.params)

    def schedule(count):
        return float(factors[min(count, config.steps - 1)])

    return schedule


def make_optimizer(config: RunConfig, model: Qwen3ForCausalLM) -> MuonWithAdamW:
    """The hybrid optimizer over the model's parameters."""
    ns_dtype = getattr(torch, config.precision.newton_schulz)
    # Proofs, in float64, go through AdamW operation by operation, whose roundings parity_tests/montecarlo.py can see.
    fused = config.precision.params == "float32"
    return MuonWithAdamW(model, config.muon, config.adamw, ns_dtype=ns_dtype, fused=fused)


def init_state(config: RunConfig, weights: Mapping[str, np.ndarray], device: str = "cpu") -> TrainState:
    """The state before the first update, on these weights."""
    model = from_hf(weights, config.model, config.precision, device)
    return TrainState(model, make_optimizer(config, model))


def restore_state(
    state: TrainState, slots: Mapping[str, Mapping[str, np.ndarray]], updates: int, skipped: int
) -> TrainState:
    """The state with its weights, and with optimizer and counts where a saved run left them."""
    restore_optimizer(state.optimizer, slots, updates)
    return TrainState(state.model, state.optimizer, updates, skipped)


def make_train_step(config: RunConfig) -> Callable[..., tuple[TrainState, dict[str, float]]]:
    """`train_step(state, inputs_ABT, targets_ABT, documents_ABT=None) -> state, metrics`; the state is changed in
    place. With documents no token sees another document's, and targets may be IGNORE.

    Mean gradient over the micro-batches, one clip over all parameters, Muon and AdamW. If the gradient's norm is not
    finite, nothing changes but the count of skipped updates.
    """
    schedule = make_schedule(config)

    def train_step(
        state: TrainState,
        inputs_ABT: torch.Tensor,
        targets_ABT: torch.Tensor,
        documents_ABT: torch.Tensor | None = None,
    ):
        A = inputs_ABT.shape[0]
        step_key = random.fold_in(random.key(config.seed), state.step + state.skipped)
        weights_ABT = None
        if documents_ABT is not None:
            targets_ABT, weights_ABT = weighted(targets_ABT, getattr(torch, config.precision.params))
        batch = inputs_ABT, targets_ABT, documents_ABT, weights_ABT
        state.model.zero_grad(set_to_none=True)
        total_loss = 0.0
        for index in range(A):
            key = random.fold_in(step_key, index) if config.model.dropout else None
            loss = state.model.loss(*(None if x is None else x[index] for x in batch), dropout_key=key)
            loss.backward()
            total_loss = total_loss + loss.detach()
        grads = [parameter.grad for parameter in state.model.parameters()]
        for grad in grads:
            grad.div_(A)

        grad_norm = clip_by_global_norm(grads, config.clip_norm)
        factor = schedule(state.step)
        if math.isfinite(grad_norm):
            state.optimizer.step(factor)
            state.step += 1
        else:
            state.skipped += 1
        lr = config.muon.learning_rate * factor
        return state, {"loss": total_loss / A, "grad_norm": grad_norm, "lr": lr, "skipped": state.skipped}

    return train_step


def make_evaluate(config: RunConfig) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`evaluate(model, inputs_BT, targets_BT, documents_BT=None) -> sum of losses, number of correct tokens`; with
    documents targets may be IGNORE.
    """

    @torch.no_grad()
    def evaluate(model, *batch):
        return model.evaluate(*batch)

    return evaluate


def _has_room(arrays: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    """Whether a GPU can hold a copy of these tensors beside all that training has needed so far; a CPU always can."""
    tensors = [tensor for part in arrays.values() for tensor in part.values()]
    if not tensors[0].is_cuda:
        return True
    _, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_reserved() + sum(tensor.nbytes for tensor in tensors) <= total


def _beside_updates(arrays: LazyArrays, device: str) -> LazyArrays:
    """The arrays, fetched from a GPU on a stream of their own: behind what is under way, beside what comes later."""
    if device == "cpu":
        return arrays
    stream, ready = torch.cuda.Stream(), torch.cuda.Event()
    ready.record()

    def read(name: str) -> np.ndarray:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            return arrays[name]

    return LazyArrays(arrays.shapes, read)


class Trainer:
    """The torch side of `harness.loop.Trainer`."""

    def __init__(self, config: RunConfig, weights: Mapping[str, np.ndarray]) -> None:
        self.config, self.device = config, "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = config.precision.matmul == "default"
        if config.precision.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(config.precision.deterministic)
        self.room: bool | None = None
        """Whether the device can hold a copy of the state; None before the first save."""
        self.state = init_state(config, weights, self.device)
        self.train_step, self.eval_step = make_train_step(config), make_evaluate(config)
        self.environment = {
            "backend": self.device,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "deterministic": config.precision.deterministic or self.device == "cpu",
            "attention": attention_in_use(config.precision, config.model.dropout, config.data.packed),
            "why_not_fused": why_not_fused(config.precision, config.model.dropout, config.data.packed),
        }

    def _tensors(self, *batch: np.ndarray) -> list[torch.Tensor]:
        return [torch.as_tensor(np.asarray(tokens, np.int64), device=self.device) for tokens in batch]

    def step(self, *batch_ABT: np.ndarray) -> dict[str, float]:
        batch = self._tensors(*batch_ABT)
        self.state, metrics = self.train_step(self.state, *batch)
        return metrics

    def evaluate(self, batches: Iterable[tuple[np.ndarray, ...]]) -> tuple[float, float]:
        loss, correct, tokens = 0.0, 0, 0
        for batch_BT in batches:
            batch = self._tensors(*batch_BT)
            batch_loss, batch_correct = self.eval_step(self.state.model, *batch)
            loss, correct = loss + float(batch_loss), correct + int(batch_correct)
            tokens += int(np.count_nonzero(batch_BT[1] != IGNORE))
        return loss / tokens, correct / tokens

    def weights(self) -> dict[str, np.ndarray]:
        return to_hf(dict(self.state.model.named_parameters()))

    def slots(self) -> dict[str, dict[str, np.ndarray]]:
        return optimizer_slots(self.state.optimizer)

    def snapshot(self) -> Snapshot:
        arrays: dict[str, dict[str, torch.Tensor]]
        arrays = {"weights": dict(self.state.model.named_parameters()), **slot_leaves(self.state.optimizer)}
        # Updates are in place. A copy on the device is made between two of them, and fetched beside those to come.
        if self.room is None:  # Asked once: later the peak holds a copy already.
            self.room = _has_room(arrays)
            if not self.room:
                print(NO_ROOM, file=sys.stderr)
        keep = self.device if self.room else "cpu"
        copies = {
            part: {name: x.detach().to(keep, copy=True) for name, x in tensors.items()}
            for part, tensors in arrays.items()
        }
        lazy = {part: _beside_updates(to_hf_lazily(copies[part]), keep) for part in arrays}
        return Snapshot(lazy.pop("weights"), lazy, *self.counts())

    def counts(self) -> tuple[int, int]:
        return self.state.step, self.state.skipped

    def restore(self, slots: Mapping[str, Mapping[str, np.ndarray]], updates: int, skipped: int) -> None:
        self.state = restore_state(self.state, slots, updates, skipped)

    def diagnose(self, *batch_ABT: np.ndarray, position: int | None = None) -> Diagnosis:
        position = sum(self.counts()) if position is None else position
        batch = self._tensors(*batch_ABT)
        return diagnose(self.config, self.state.model, self.slots(), position, *batch)

    def generate(self, tokens: list[int], options) -> Iterable[int]:
        return make_generator(self.config.model, self.config.precision, self.weights())(tokens, options)

    @contextlib.contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        """Trace the updates made inside: trace.json.gz for ui.perfetto.dev."""
        with torch.profiler.profile() as trace:
            yield
            if self.device == "cuda":
                torch.cuda.synchronize()
        folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(folder / "trace.json.gz"))


def train(config: RunConfig) -> RunResult:
    """Train as configured, leave the run folder `config.out`, and return what it came to."""
    return loop.run(config, framework="torch", make_trainer=Trainer)


if __name__ == "__main__":
    from harness.cli import leave
    from harness.commands.train import run_command

    leave(run_command("torch_ref.train", train, framework="torch"))
