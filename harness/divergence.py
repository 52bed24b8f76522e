"""Divergence: when a run has come to nothing, what is kept as evidence, and how it goes back and on.

Pure functions and records; `harness/loop.py` acts on them. What a framework alone can see, the tensors of one update,
`jax_impl/diagnosis.py` and `torch_ref/diagnosis.py` put into a `Diagnosis`.
"""

import bisect
import collections
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from recipe.config import ModelConfig, RunConfig, require
from recipe.durable import write_whole
from recipe.params import param_specs
from recipe.reading import short, take
from recipe.schedule import learning_rate_factors

Tensor = TypeVar("Tensor")

HISTORY = 100
"""Losses that the running median is over: enough that a batch's luck does not move it, few enough that it follows the
fall at a run's beginning."""
LOWEST_MEDIAN = 1.0
"""A smaller median counts as this many nats: near zero, a few times the usual loss is nothing to stop for."""
INPUT_NAMES = {
    "self_attn.o_proj": "self_attn.attention",
    "mlp.down_proj": "mlp.hidden",
    "post_attention_layernorm": "residual",
}
"""End of a module's path -> what its input is called, where no module puts that tensor out. The cotangent of such a tap
is what flows back through this module alone."""


def input_name(path: str) -> str | None:
    """What the input of the module at a Hugging Face path is called, if no module puts it out."""
    for end, name in INPUT_NAMES.items():
        if path.endswith("." + end):
            return path.removesuffix(end) + name
    return None


def streak_limit(most: int, steps: int) -> int:
    """Updates in a row that a run of so many steps bears: `most`, but never more than half of them, rounded up."""
    return min(most, math.ceil(steps / 2))


class LossWatch:
    """Sees every update's loss in order and says when the run has diverged.

    A loss diverges if it is not finite, or above `divergence_factor` times the median of the last `HISTORY` that did
    not. The first loss alone is history enough.
    """

    def __init__(
        self, config: RunConfig, records: Iterable[Mapping[str, Any]] = (), *, skipped: int | None = None
    ) -> None:
        """`records` of the run's log up to the state it goes on from, so that it is judged as if never interrupted;
        `skipped` is that state's count, should the log have lost it."""
        self.factor = config.divergence_factor
        self.most_skipped = streak_limit(config.max_skipped, config.steps)
        self.most_diverging = streak_limit(config.max_diverging, config.steps)
        self.step, self.skipped = 0, 0
        self.skipped_in_a_row, self.diverging_in_a_row = 0, 0
        self.recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=HISTORY)
        """The last steps and their losses."""
        self._usual: collections.deque[float] = collections.deque()
        self._sorted: list[float] = []
        self._not_finite_in_a_row = 0
        self._began: dict[str, int] = {}
        for record in records:
            loss, count = record.get("loss"), record.get("skipped")
            # The log may be damaged; a record without these two says nothing about an update.
            if record["kind"] == "train" and type(loss) in (float, int, type(None)) and type(count) is int:
                self.see(record["step"], math.nan if loss is None else loss, count)
        if skipped is not None:
            self.skipped = skipped

    @property
    def median(self) -> float | None:
        """Median of the last losses that did not diverge; None before the first."""
        if not self._sorted:
            return None
        middle = len(self._sorted) // 2
        return self._sorted[middle] if len(self._sorted) % 2 else sum(self._sorted[middle - 1 : middle + 1]) / 2

    @property
    def since(self) -> int | None:
        """First step of the present streak, of the longer one if updates are skipped and losses diverge."""
        return min(self._began.values(), default=None)

    def see(self, step: int, loss: float, skipped: int) -> None:
        """Note update `step`, from 1: its loss, and how many updates were skipped so far."""
        was_skipped, self.skipped, self.step = skipped > self.skipped, skipped, step
        try:
            loss = float(loss)
        except OverflowError:  # an integer of hundreds of digits, which JSON may hold
            loss = math.inf
        median, finite = self.median, math.isfinite(loss)
        diverging = not finite or (median is not None and loss > self.factor * max(median, LOWEST_MEDIAN))
        self.skipped_in_a_row = self._streak("skipped", self.skipped_in_a_row, was_skipped)
        self.diverging_in_a_row = self._streak("diverging", self.diverging_in_a_row, diverging)
        self._not_finite_in_a_row = 0 if finite else self._not_finite_in_a_row + 1
        self.recent.append((step, loss))
        if not diverging:
            self._usual.append(loss)
            bisect.insort(self._sorted, loss)
            if len(self._usual) > HISTORY:
                self._sorted.remove(self._usual.popleft())

    def _streak(self, kind: str, length: int, goes_on: bool) -> int:
        if not goes_on:
            self._began.pop(kind, None)
            return 0
        self._began.setdefault(kind, self.step)
        return length + 1

    def verdict(self) -> str | None:
        """Why the run is to stop after the update seen last; None if it may go on."""
        if self.skipped_in_a_row >= self.most_skipped:
            return f"{self.skipped_in_a_row} updates in a row were skipped: their gradients were not finite"
        count = self.diverging_in_a_row
        if count < self.most_diverging:
            return None
        if self._not_finite_in_a_row >= count or self.median is None:
            return f"the loss was not finite for {count} updates"
        step, loss = self.recent[-1]
        counted = "" if self.median >= LOWEST_MEDIAN else f", counted as {LOWEST_MEDIAN:g}"
        above = f"above {self.factor:g} times its running median ({self.median:.4g}{counted})"
        return f"the loss stayed {above} for {count} updates: {loss:.4g} at step {step}"


@dataclass(frozen=True)
class Diagnosis:
    """One batch under the trainer's parameters: how large everything is, and where numbers stop being finite.

    Weights, gradients and slots are norms by Hugging Face name; forward and backward say, in execution order, whether a
    module's result and what flows back through it was finite.
    """

    weights: dict[str, float]
    forward: dict[str, bool]
    loss: float
    backward: dict[str, bool]
    gradients: dict[str, float]
    grad_norm: float
    """Norm over all gradients, as the update takes it: in float32 it may overflow where none of them does."""
    slots: dict[str, dict[str, float]]
    micro_batch: int | None
    """Which micro-batch this shows: the first that is not finite; None if all are, and this is their mean."""

    @property
    def first(self) -> tuple[str, str] | None:
        """Pass and name of the first tensor that is not finite: weight, forward, backward, gradient, update, slot."""
        stages: dict[str, Mapping[str, float | bool]] = {
            "weight": self.weights,
            "forward": self.forward | {"loss": self.loss},
            "backward": self.backward,
            "gradient": self.gradients,
            "update": {"grad_norm": self.grad_norm},
            "slot": {f"{slot}.{name}": value for slot, norms in self.slots.items() for name, value in norms.items()},
        }
        return next(((stage, name) for stage, found in stages.items() for name, x in found.items() if _bad(x)), None)


def _bad(found: float | bool) -> bool:
    """Whether a tensor is not finite, by its norm or by what was seen of it."""
    return not found if isinstance(found, bool) else not math.isfinite(found)


def norm(array: np.ndarray) -> float:
    """Euclidean norm in float64, of the array over its largest magnitude, so that no square overflows; not finite if
    and only if an element is not."""
    largest = float(np.max(np.abs(array), initial=0.0))
    if not 0.0 < largest < math.inf:
        return largest
    return min(sys.float_info.max, largest * float(np.linalg.norm((array.astype(np.float64) / largest).ravel())))


def norms(
    tensors: Mapping[str, Tensor], model: ModelConfig, to_array: Callable[[Tensor], np.ndarray], *, backwards=False
) -> dict[str, float]:
    """Norm of each tensor by Hugging Face name, in the order of the parameters or `backwards`, one on the host at a
    time."""
    names = [name for name in param_specs(model) if name in tensors]
    return {name: norm(to_array(tensors[name])) for name in (reversed(names) if backwards else names)}


@dataclass(frozen=True)
class Rollback:
    """A return to an earlier state, as a state's run.json records it."""

    step: int
    """The update after which the run was found to have diverged."""
    to: int
    """Position of the state it returned to."""
    data_offset: int
    """Batches passed over so far, in this rollback and in those before it: update `step` reads batch step - 1 + this.
    """
    factor: float
    """What both learning rates were multiplied by."""
    reason: str


def batch_index(step: int, rollbacks: Sequence[Rollback]) -> int:
    """Index of the batch that update `step`, from 1, reads."""
    return step - 1 + (rollbacks[-1].data_offset if rollbacks else 0)


def next_rollback(
    config: RunConfig, rollbacks: Sequence[Rollback], *, step: int, to: int | None, reason: str
) -> Rollback | None:
    """The rollback from a divergence found after update `step` to the state at position `to`; None if the run is to
    stop, because that is what it is told, or no state is sound, or it has rolled back often enough.

    The batches of updates to + 1 ... step are passed over: update to + 1 now reads the one that step + 1 would have.
    """
    if config.on_divergence == "stop" or to is None or len(rollbacks) >= config.max_rollbacks:
        return None
    return Rollback(step, to, batch_index(step + 1, rollbacks) - to, config.rollback_factor, reason)


def rolled_back(config: RunConfig, rollbacks: Sequence[Rollback]) -> RunConfig:
    """The configuration that a run's trainer is built from after these rollbacks: both learning rates times the factor
    of each."""
    factor = math.prod(rollback.factor for rollback in rollbacks)
    muon = dataclasses.replace(config.muon, learning_rate=config.muon.learning_rate * factor)
    adamw = dataclasses.replace(config.adamw, learning_rate=config.adamw.learning_rate * factor)
    return dataclasses.replace(config, muon=muon, adamw=adamw)


def read_rollbacks(values: Mapping[str, Any], where: str) -> tuple[Rollback, ...]:
    """The rollbacks that a state's run.json records, none if it says nothing of them; UserError if they cannot be."""
    found: list[Rollback] = []
    for record in take(values, "rollbacks", list[dict], where, []):
        kinds = dict(step=int, to=int, data_offset=int, factor=float, reason=str)
        rollback = Rollback(**{name: take(record, name, kind, f"{where}: rollbacks") for name, kind in kinds.items()})
        require(
            0 <= rollback.to < rollback.step
            and rollback.data_offset == batch_index(rollback.step + 1, found) - rollback.to,
            f"{where}: a rollback from step {rollback.step} to {rollback.to} does not make data_offset="
            f"{rollback.data_offset}; use another copy of the state.",
        )
        require(
            0 < rollback.factor <= 1,
            f"{where}: a rollback's factor={rollback.factor} must lie above 0 and be at most 1; use another copy of "
            "the state.",
        )
        found.append(rollback)
    return tuple(found)


def save_evidence(
    config: RunConfig,
    watch: LossWatch,
    reason: str,
    diagnosis: Diagnosis | str,
    *,
    updates: int,
    last_good: tuple[str, int] | None,
    rollbacks: Sequence[Rollback],
    about: Mapping[str, Any],
) -> Path:
    """Write what is known of a divergence to divergence-N.json in the run folder, N the first that is free.

    `config` is the one the trainer was built from and `updates` its count of those applied; `last_good` is a state's
    path and position; a diagnosis that could not be made is a text that says why. JSON has no numbers that are not
    finite: they are the texts nan, inf and -inf.
    """
    numbered = (Path(config.out) / f"divergence-{number}.json" for number in itertools.count(1))
    file = next(path for path in numbered if not os.path.lexists(path))
    factor = float(learning_rate_factors(config.schedule, config.steps)[min(updates, config.steps - 1)])
    first_step = watch.since or watch.step
    evidence = {
        **about,
        "reason": reason,
        "step": watch.step,
        "first_step": first_step,
        "batch": batch_index(first_step, rollbacks),
        "losses": [{"step": step, "loss": loss} for step, loss in watch.recent],
        "running_median": watch.median,
        "learning_rates": {
            "muon": config.muon.learning_rate * factor,
            "adamw": config.adamw.learning_rate * factor,
        },
        "last_good": None if last_good is None else {"state": last_good[0], "position": last_good[1]},
        "rollbacks": [dataclasses.asdict(rollback) for rollback in rollbacks],
        "diagnosis": diagnosis if isinstance(diagnosis, str) else _described(diagnosis),
    }
    write_whole(file, (json.dumps(_plain(evidence), indent=2, allow_nan=False) + "\n").encode())
    return file


def _described(diagnosis: Diagnosis) -> dict[str, Any]:
    first = diagnosis.first
    return {
        "first_not_finite": None if first is None else {"pass": first[0], "tensor": first[1]},
        "micro_batch": diagnosis.micro_batch,
        "loss": diagnosis.loss,
        "grad_norm": diagnosis.grad_norm,
        "norms": {"weights": diagnosis.weights, "gradients": diagnosis.gradients, **diagnosis.slots},
    }


def _plain(value: Any) -> Any:
    """The value with texts for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def summary(
    watch: LossWatch, reason: str, diagnosis: Diagnosis | str, file: Path, *, rollbacks: Sequence[Rollback]
) -> str:
    """One line for the terminal: why, since when, what was the first tensor not finite, and where the rest lies."""
    first_step = watch.since or watch.step
    if isinstance(diagnosis, str):
        seen = f"no diagnosis ({short(diagnosis, 300)})"
    elif diagnosis.first is None:
        seen = "every tensor of that batch is finite"
    else:
        stage, name = diagnosis.first
        where = "" if diagnosis.micro_batch is None else f" of micro-batch {diagnosis.micro_batch}"
        seen = f"the first tensor not finite is {stage} {name}{where}"
    began = f"it began at step {first_step} with batch {batch_index(first_step, rollbacks)}"
    return f"divergence {reason}; {began}; {seen}; evidence in {short(str(file), 1000)}"
