"""The state of a training run: a weights folder with the optimizer's slots and the run's counts beside them.

optimizer.safetensors holds mu.NAME of every matrix, exp_avg.NAME and exp_avg_sq.NAME of every other parameter, by
Hugging Face name and in torch's layout; run.json holds the rest. Either framework goes on from it (docs/weights.md).
"""

import datetime
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.folders import load_folder, replacing, set_aside, write_json, write_weights_folder
from harness.tensors import StoredTensors, dtype_problems, read_header, write_tensors
from recipe.config import RunConfig, UserError, from_dict, require, to_dict
from recipe.params import check_weights, shape_problems, slot_shapes
from recipe.reading import read_json, short, some, take

FORMAT = 1
"""Raised when the meaning of the files changes."""
SLOTS = ("mu", "exp_avg", "exp_avg_sq")
YOUNGER = ("max_skipped", "deterministic")
"""Fields of the configuration that states of this format may lack, because they are older; they mean their default."""


@dataclass(frozen=True)
class TrainingState:
    """A run between two updates: all that either framework needs to go on with it."""

    config: RunConfig
    weights: Mapping[str, np.ndarray]
    slots: Mapping[str, Mapping[str, np.ndarray]]
    """Optimizer state by slot (`SLOTS`) and Hugging Face name, in torch's layout."""
    updates: int
    """Optimizer updates applied."""
    skipped: int
    """Updates left out because their gradient was not finite; each used up a batch."""
    best: float
    """Lowest validation loss so far, in nats per token; infinite before the first."""
    text: str
    """`Dataset.fingerprint` of what it is trained on."""

    @property
    def position(self) -> int:
        """Index of the next batch."""
        return self.updates + self.skipped


def save_state(folder: Path, state: TrainingState, tokenizer, about: Mapping[str, Any]) -> None:
    """Write a state whole or not at all, in the parameters' dtype; `about` says who wrote it and on what."""
    check_weights(state.weights, state.config.model)
    dtype = state.config.precision.params
    slots = {f"{slot}.{name}": array for slot in SLOTS for name, array in state.slots[slot].items()}
    with replacing(folder) as scratch:
        write_weights_folder(scratch, state.config.model, state.weights, tokenizer, dtype)
        write_tensors(scratch / "optimizer.safetensors", slots, slots, dtype)
        values = {
            "format": FORMAT,
            "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **about,
            "updates": state.updates,
            "skipped": state.skipped,
            "position": state.position,
            "seed": state.config.seed,
            "best_validation_loss": state.best if math.isfinite(state.best) else None,
            "training_text": state.text,
            "config": to_dict(state.config),
        }
        write_json(scratch / "run.json", values)


def load_state(folder: Path) -> TrainingState:
    """The state in a folder, its arrays still on disk; UserError if anything is missing or does not fit."""
    values, config = read_run(folder)
    where = str(Path(folder) / "run.json")
    updates, skipped, position = (take(values, name, int, where) for name in ("updates", "skipped", "position"))
    best, text = take(values, "best_validation_loss", float | None, where), take(values, "training_text", str, where)
    require(
        updates >= 0 <= skipped and updates + skipped == position,
        f"{folder}: {updates} updates and {skipped} skipped ones do not make position {position}; use another copy of "
        "the state.",
    )
    require(best is None or math.isfinite(best), f"{where}: best_validation_loss={best} is no number; mend it there.")
    _, weights = load_folder(folder)
    check_weights(weights, config.model)
    try:
        entries = read_header(Path(folder) / "optimizer.safetensors")
    except UserError as error:
        raise UserError(f"{folder}: {error}; go on from another copy of the state.") from None
    slots = StoredTensors(entries, str(folder))
    wrong = dtype_problems(entries) + shape_problems(slots.shapes, slot_shapes(config.model))
    require(not wrong, f"{folder}: the optimizer's state does not fit the model: {'; '.join(wrong)}. Use another copy.")
    return TrainingState(
        config=config,
        weights=weights,
        slots={slot: slots.below(f"{slot}.") for slot in SLOTS},
        updates=updates,
        skipped=skipped,
        best=math.inf if best is None else best,
        text=text,
    )


def read_run(folder: Path) -> tuple[dict, RunConfig]:
    """run.json of a state and the configuration in it; reads no array."""
    file = Path(folder) / "run.json"
    require(file.is_file(), f"{folder} holds no run.json; name the folder of a training state, e.g. runs/NAME/last.")
    values = read_json(file)
    found = values.get("format")
    require(
        found == FORMAT,
        f"{file} has format {short(repr(found))}, this version reads {FORMAT}; use the version it is of.",
    )
    return values, _read_config(take(values, "config", dict, str(file)), f"{file}, config")


def _read_config(values: dict, where: str) -> RunConfig:
    """The configuration that `to_dict` made these values of; UserError unless every field is there and no other.

    A field that is younger than the state has its default.
    """
    usual = to_dict(RunConfig())
    for section, fields in [("", usual), *((name, part) for name, part in usual.items() if isinstance(part, dict))]:
        given = take(values, section, dict, where) if section else values
        unknown = [f"{section}.{name}".strip(".") for name in given if name not in fields]
        require(not unknown, f"{where} has {some(unknown)}, unknown to this version; use the version it is of.")
        missing = [f"{section}.{name}".strip(".") for name in fields if name not in given and name not in YOUNGER]
        require(not missing, f"{where} does not say {some(missing)}; add it, or use the version it is of.")
    take(values, "prompts", list[str], where)
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def find_state(run: Path) -> Path:
    """Where a run folder keeps its state: last/, or what a run killed while replacing it had set aside."""
    require(Path(run).is_dir(), f"--resume {run} is not a folder; name a run folder, e.g. runs/tiny-jax.")
    last = Path(run) / "last"
    for candidate in (last, set_aside(last)):
        if (candidate / "run.json").is_file():
            return candidate
    raise UserError(f"--resume {run} holds no last/run.json, so no state to go on from; name another or begin anew.")


def clear_scratch(run: Path) -> None:
    """Put back what a killed run had set aside, and remove what it left half written."""
    for folder in (Path(run) / "best", Path(run) / "last"):
        if set_aside(folder).is_dir() and not folder.exists():
            set_aside(folder).rename(folder)
        for leftover in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(leftover)
