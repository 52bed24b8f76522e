"""The state of a training run: a weights folder with the optimizer's slots and the run's counts beside them.

optimizer.safetensors holds mu.NAME of every matrix, exp_avg.NAME and exp_avg_sq.NAME of every other parameter, by
Hugging Face name and in torch's layout; run.json holds the rest, and the hashes of all. Either framework goes on from
it (docs/weights.md). A run folder has its newest state in last/ and the ones before it in earlier/POSITION/; a run on a
mesh has all in states/POSITION/, whose arrays lie in arrays/ as its framework divides them (`harness/sharded.py`).
"""

import contextlib
import dataclasses
import datetime
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from harness.divergence import Rollback, read_rollbacks
from harness.folders import load_folder, replacing, set_aside, write_weights_folder
from harness.manifest import FORMAT, RUN, check_files, is_sealed, manifest_of, remedy, seal, with_checks
from harness.tensors import Damaged, StoredTensors, dtype_problems, read_header, write_tensors
from recipe.config import RunConfig, UserError, from_dict, require, to_dict
from recipe.durable import make_folder, sync
from recipe.params import check_weights, shape_problems, shapes_of, slot_shapes
from recipe.reading import read_json, short, some, take

T = TypeVar("T")

SLOTS = ("mu", "exp_avg", "exp_avg_sq")
YOUNGER = (
    *("max_skipped", "deterministic", "keep"),
    *("divergence_factor", "max_diverging", "on_divergence", "max_rollbacks", "rollback_factor"),
    *("mesh", "gather", "scan_layers", "hosts", "track"),
    *("chat", "document_mask"),
)
"""Fields of the configuration that states of this format may lack, because they are older; they mean their default."""
EARLIER = "earlier"
"""Folder of a run for the states before the last one."""
SHARDED = "states"
"""Folder of a run for the states of a mesh."""
ARRAYS = "arrays"
"""Folder of such a state for its weights and slots."""
SHARDED_FIELD = "sharded"
"""Field of run.json that is true of such a state."""


class OtherVersion(UserError):
    """A state that is whole, but of another version of this project."""


class NotGathered(OtherVersion):
    """A state that is whole, but sharded, where it cannot be read."""


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
    rollbacks: tuple[Rollback, ...] = ()
    """Returns to earlier states so far, which move the data and lower the rates."""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """All that run.json says, of a state that was read."""
    arrays: Path | None = None
    """Of a sharded state that was read, the folder of its arrays; `weights` and `slots` are empty until they are."""

    @property
    def position(self) -> int:
        """Index of the next batch."""
        return self.updates + self.skipped


def save_state(
    folder: Path, state: TrainingState, tokenizer, about: Mapping[str, Any], *, keep_as: Path | None = None
) -> None:
    """Write a state whole or not at all, in the parameters' dtype; `about` says who wrote it and on what.

    The state that was there goes to `keep_as`, in a folder that exists, or away.
    """
    check_weights(state.weights, state.config.model)
    dtype = state.config.precision.params
    with replacing(folder, keep_as) as scratch:
        written = write_weights_folder(scratch, state.config.model, state.weights, tokenizer, dtype)
        slots = _Prefixed(state.slots)
        written["optimizer.safetensors"] = write_tensors(scratch / "optimizer.safetensors", slots, slots, dtype)
        seal(scratch, RUN, run_values(state, about), written)


def run_values(state: TrainingState, about: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json says of a state that is written now."""
    return {
        "format": FORMAT,
        "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **about,
        "updates": state.updates,
        "skipped": state.skipped,
        "position": state.position,
        "seed": state.config.seed,
        "best_validation_loss": state.best if math.isfinite(state.best) else None,
        "training_text": state.text,
        "rollbacks": [dataclasses.asdict(rollback) for rollback in state.rollbacks],
        "config": to_dict(state.config),
    }


class _Prefixed(Mapping[str, np.ndarray]):
    """Slots under one name each, SLOT.NAME, read when asked for."""

    def __init__(self, slots: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self.slots = slots
        self.shapes = {f"{slot}.{name}": shape for slot in SLOTS for name, shape in shapes_of(slots[slot]).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        slot, _, parameter = name.partition(".")
        return self.slots[slot][parameter]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def load_state(folder: Path) -> TrainingState:
    """The state in a folder, its arrays still on disk; UserError if anything is missing or does not fit.

    All but the arrays has been checked against its hashes, and an array that is another is Damaged when it is read.
    """
    file = Path(folder) / RUN
    values = _read(file)
    config, counts = _checked(file, values, lambda file, values: (_config_of(file, values), _counts_of(file, values)))
    if take(values, SHARDED_FIELD, bool, str(file), False):
        check_files(folder)
        return TrainingState(config=config, weights={}, slots={}, **counts, about=values, arrays=folder / ARRAYS)
    _, weights = load_folder(folder)
    check_weights(weights, config.model)
    try:
        entries = read_header(Path(folder) / "optimizer.safetensors")
    except UserError as error:
        raise UserError(f"{folder}: {error}; go on from another copy of the state.") from None
    slots = StoredTensors(with_checks(entries, manifest_of(Path(folder))), str(folder))
    wrong = dtype_problems(entries) + shape_problems(slots.shapes, slot_shapes(config.model))
    require(not wrong, f"{folder}: the optimizer's state does not fit the model: {'; '.join(wrong)}. Use another copy.")
    return TrainingState(
        config=config,
        weights=weights,
        slots={slot: slots.below(f"{slot}.") for slot in SLOTS},
        **counts,
        about=values,
    )


def read_run(folder: Path) -> tuple[dict, RunConfig]:
    """run.json of a state and the configuration in it; reads nothing else."""
    file = Path(folder) / RUN
    values = _read(file)
    return values, _checked(file, values, _config_of)


def _read(file: Path) -> dict:
    where = file.parent
    require(file.is_file(), f"{where} holds no run.json; name the folder of a training state, e.g. runs/NAME/last.")
    return read_json(file)


def _checked(file: Path, values: dict, check: Callable[[Path, dict], T]) -> T:
    """What `check` makes of the values in run.json; Damaged if they are not what was written."""
    whole = values.get("format") == 1 or is_sealed(file, values)
    try:
        result = check(file, values)
    except UserError as error:
        if whole:
            raise
        raise Damaged(str(error)) from None  # and no question of versions
    if not whole:
        raise Damaged(f"{file} is not what was written: its checksum is another's. {remedy(file.parent)}.")
    return result


def _config_of(file: Path, values: dict) -> RunConfig:
    """The configuration in run.json; UserError if the file is of another format, or says anything else there."""
    found = values.get("format")
    if found not in (1, FORMAT):
        reads = f"this version reads 1 and {FORMAT}; use the version it is of"
        raise OtherVersion(f"{file} has format {short(repr(found))}, {reads}.")
    return _read_config(take(values, "config", dict, str(file)), f"{file}, config")


def _counts_of(file: Path, values: dict) -> dict[str, Any]:
    """The counts in run.json and what else a state needs, as `TrainingState` has them; UserError if they cannot be."""
    where = str(file)
    updates, skipped, position = (take(values, name, int, where) for name in ("updates", "skipped", "position"))
    best, text = take(values, "best_validation_loss", float | None, where), take(values, "training_text", str, where)
    require(
        updates >= 0 <= skipped and updates + skipped == position,
        f"{file.parent}: {updates} updates and {skipped} skipped ones do not make position {position}; use another "
        "copy of the state.",
    )
    require(best is None or math.isfinite(best), f"{where}: best_validation_loss={best} is no number; mend it there.")
    return {
        "updates": updates,
        "skipped": skipped,
        "best": math.inf if best is None else best,
        "text": text,
        "rollbacks": read_rollbacks(values, where),
    }


def _read_config(values: dict, where: str) -> RunConfig:
    """The configuration that `to_dict` made these values of; UserError unless every field is there and no other.

    A field that is younger than the state has its default.
    """
    usual = to_dict(RunConfig())
    for section, fields in [("", usual), *((name, part) for name, part in usual.items() if isinstance(part, dict))]:
        if section in YOUNGER and section not in values:
            continue
        given = take(values, section, dict, where) if section else values
        unknown = [f"{section}.{name}".strip(".") for name in given if name not in fields]
        if unknown:
            raise OtherVersion(f"{where} has {some(unknown)}, unknown to this version; use the version it is of.")
        missing = [f"{section}.{name}".strip(".") for name in fields if name not in given and name not in YOUNGER]
        require(not missing, f"{where} does not say {some(missing)}; add it, or use the version it is of.")
    take(values, "prompts", list[str], where)
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def state_folders(run: Path) -> list[Path]:
    """Where a run folder may keep states, newest first: last/, what was set aside while it was replaced, earlier/, and
    those of a mesh among them by their positions.
    """
    return [folder for _, folder in _placed(Path(run))]


def _placed(run: Path) -> list[tuple[float, Path]]:
    """The folders of `state_folders` with their positions; of one that is not named after it, infinite if unknown."""
    last = run / "last"
    earlier = sorted((path for path in (run / EARLIER).glob("[0-9]*") if path.is_dir()), reverse=True)
    # One that was set aside while it was replaced counts if nothing took its place.
    sharded = {path.name.strip(".").removesuffix("-old"): path for path in (run / SHARDED).glob(".[0-9]*-old")}
    sharded |= {path.name: path for path in (run / SHARDED).glob("[0-9]*")}
    found = [path for path in (last, set_aside(last)) if os.path.lexists(path)] + earlier
    if not sharded:
        return [(_named_after(path.name) if path in earlier else math.inf, path) for path in found]
    placed = [(_named_after(path.name) if path in earlier else _position_in(path), path) for path in found]
    placed += [(_named_after(name), path) for name, path in sharded.items() if path.is_dir()]
    return sorted(placed, key=lambda one: -one[0])  # stable: of two of one position, last/ comes first


def _named_after(name: str) -> float:
    """The position that a folder is named after; of a name that is none, one before all."""
    return float(name) if name.isdigit() else -1.0


def _position_in(folder: Path) -> float:
    """The position that run.json says; infinite if that cannot be read, which is to be found out first."""
    try:
        return take(read_json(folder / RUN), "position", int, str(folder / RUN))
    except (UserError, OSError):
        return math.inf


def sharded_folder(run: Path, position: int) -> Path:
    """Where a mesh's state of a position lies; the names sort as the positions do."""
    return Path(run) / SHARDED / f"{position:010d}"


def earlier_folder(run: Path, position: int) -> Path:
    """Where the state of a position lies once it is not the last; the names sort as the positions do."""
    return Path(run) / EARLIER / f"{position:010d}"


def find_state(run: Path, look: Callable[[Path], T]) -> tuple[Path, T]:
    """The newest state of a run folder that `look` does not refuse, and what that returns.

    UserError if there is none, or if it is of another version.
    """
    require(Path(run).is_dir(), f"--resume {run} is not a folder; name a run folder, e.g. runs/tiny-jax.")
    reasons = []
    for folder in state_folders(run):
        try:
            return folder, look(folder)
        except OtherVersion:
            raise
        except (UserError, OSError) as error:
            reasons.append(short(str(error).rstrip("."), 400))
    require(not reasons, f"--resume {run} holds no sound state: {'; '.join(reasons)}.")
    raise UserError(
        f"--resume {run} holds no last/run.json, so no state to go on from; begin it again with the command it was "
        "begun with, or name another."
    )


def set_apart(run: Path, folder: Path, why: str) -> Path:
    """Move what cannot be gone on from out of the way, to the first free RUN/NAME-WHY-N, and return that."""
    name = folder.name.strip(".")
    numbered = (Path(run) / f"{name}-{why}-{number}" for number in itertools.count(1))
    apart = next(path for path in numbered if not os.path.lexists(path))
    folder.rename(apart)
    sync(Path(run))
    return apart


def place_of_last(run: Path, position: int, keep: int) -> Path | None:
    """Where last/ goes when the state of `position` replaces it: to earlier/, or away.

    Away if one state is kept, and if it is of the same position.
    """
    last = Path(run) / "last"
    if keep == 1 or not (last / RUN).is_file():
        return None
    before = take(read_json(last / RUN), "position", int, str(last / RUN))
    if before == position:
        return None
    make_folder(Path(run) / EARLIER)
    return earlier_folder(run, before)


def keep_newest(run: Path, count: int) -> None:
    """Remove the states of all but the newest `count` positions; last/ stays unless a mesh's states are newer."""
    placed = _placed(Path(run))
    kept = list(dict.fromkeys(position for position, _ in placed))[:count]
    for folder in [path for position, path in placed if position not in kept and not path.name.startswith(".")]:
        # A killed run must leave no half of a state under a state's name.
        gone = folder.with_name(f".{folder.name}-gone")
        folder.rename(gone)
        shutil.rmtree(gone)
    for name in (EARLIER, SHARDED):
        with contextlib.suppress(OSError):
            (Path(run) / name).rmdir()  # if it is empty


def clear_scratch(run: Path) -> None:
    """Put back what a killed run had set aside, and remove what it left half written."""
    for folder in (Path(run) / "best", Path(run) / "last"):
        if set_aside(folder).is_dir() and not folder.exists():
            set_aside(folder).rename(folder)
        for leftover in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(leftover)
    for aside in (Path(run) / SHARDED).glob(".[0-9]*-old"):
        folder = aside.with_name(aside.name.strip(".").removesuffix("-old"))
        if not folder.exists():
            aside.rename(folder)
    for name in (EARLIER, SHARDED):
        for leftover in (Path(run) / name).glob(".*"):
            shutil.rmtree(leftover)
