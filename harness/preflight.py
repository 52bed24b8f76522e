"""What is looked at before a run begins: its place and the room there, its prompts, its weights.

What can be known to be wrong raises UserError here, before a folder is made and an hour is spent.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from harness.manifest import RUN
from harness.state import SHARDED, state_folders
from harness.tensors import CODES, DTYPES
from recipe.config import RunConfig, UserError, require, to_dict
from recipe.data import Dataset
from recipe.params import param_counts
from recipe.reading import flat, read_json, short, some, take

LEFT = re.compile(
    r"\.?(run\.json|(metrics|undone)(-damaged-\d+)?\.jsonl|divergence-\d+\.json)(\.new)?"
    r"|\.(best|last)-.*|best(-undone-\d+)?|profile|wandb|events\.out\.tfevents\..*"
)
"""What lies in the folder of a run that was killed before its first save."""


def is_taken(folder: Path) -> bool:
    """Whether a place holds what a new run must not touch: anything but a run that was killed before its first save."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        return True
    left = {path.name for path in folder.iterdir() if not LEFT.fullmatch(path.name)}
    return bool(left - {SHARDED}) or bool(left and state_folders(folder))


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run that was killed before its first save, so that nothing in it can be gone on from."""
    return (folder / RUN).is_file() and not is_taken(folder) and not state_folders(folder)


def begun_with(folder: Path, config: RunConfig, *, but: Collection[str] = ()) -> list[str]:
    """How the configuration of a run in a folder differs from another, but for its place and the fields named."""
    values = read_json(folder / RUN)
    begun = flat(take(values, "config", dict, str(folder / RUN)))
    return [
        f"{name}={short(repr(begun.get(name)))} instead of {short(repr(value))}"
        for name, value in flat(json.loads(json.dumps(to_dict(config)))).items()
        if begun.get(name) != value and name not in ("out", *but)
    ]


def check_begun(config: RunConfig) -> None:
    """Raise UserError if the run killed before its first save, in whose folder this one is to begin, was another."""
    differing = begun_with(Path(config.out), config)
    require(
        not differing,
        f"--out {config.out} holds a run that was killed before its first save, begun with {'; '.join(differing)}; "
        "pass the same flags to begin it again, or name a new folder.",
    )


def check_place(config: RunConfig) -> None:
    """Raise UserError if the run folder is taken, or cannot be made, or has no room for the weights."""
    folder = Path(config.out)
    try:
        require(not is_taken(folder), f"--out {folder} already holds files; name a new folder.")
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        require(above.is_dir(), f"--out {folder} lies under {above}, which is a file; choose a folder's path.")
        require(os.access(above, os.W_OK | os.X_OK), f"--out {folder}: {above} may not be written to; choose another.")
        longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        long = [part for part in folder.parts if len(os.fsencode(part)) > longest]
        require(not long, f"--out {short(str(folder))} has a name of more than {longest} bytes; choose a shorter one.")
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise UserError(f"--out {short(str(folder))} cannot be a folder ({error.strerror}); choose another.") from None
    needed = _most_at_once(config)
    require(
        needed <= free,
        f"--out {folder} needs some {needed / 1e9:,.1f} GB for best/ and {config.keep + 1} states, one of them being "
        f"written, and {above} has {free / 1e9:,.1f} GB left; make room, choose another, or lower --keep.",
    )


def _sizes(config: RunConfig) -> tuple[int, int]:
    """Bytes of best/, in float32, and of a state: weights, one slot a number under Muon and two under AdamW."""
    counts = param_counts(config.model)
    return 4 * counts.total, _dtype(config).itemsize * (counts.total + counts.muon + 2 * counts.adamw)


def _most_at_once(config: RunConfig) -> int:
    """Bytes of a run folder while its last file is written: best/, the states kept, and one more of either."""
    best, state = _sizes(config)
    return best + config.keep * state + max(best, state)


def disk_need(config: RunConfig) -> str:
    """What a run needs on disk, in words."""
    best, state = _sizes(config)
    free = shutil.disk_usage(config.out).free
    most = _gb(_most_at_once(config))
    return f"up to {most} of {_gb(free)} free: {config.keep} + 1 states of {_gb(state)}, best/ {_gb(best)}"


def check_room(config: RunConfig, *, best: bool, state: bool) -> None:
    """Raise OSError, before anything is written, if there is no room for the best weights or the state to be saved."""
    needed = max(size for size, wanted in zip(_sizes(config), (best, state), strict=True) if wanted)
    free = shutil.disk_usage(config.out).free
    if free < needed:
        said = f"{config.out} (a save needs {_gb(needed)}, and {_gb(free)} are left)"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), said)


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _dtype(config: RunConfig) -> np.dtype:
    """NumPy's dtype of the parameters."""
    return np.dtype(DTYPES[CODES[config.precision.params]])


def check_prompts(config: RunConfig, dataset: Dataset) -> None:
    """Raise UserError if a prompt of the samples cannot be continued; that shows only after training otherwise."""
    limit = config.model.max_position_embeddings
    for prompt in config.prompts if config.sample_tokens else ():
        shown = short(repr(prompt))
        try:
            tokens = len(dataset.encode_prompt(prompt))
        except UserError as error:
            raise UserError(f"--prompts {shown}: {error}") from None
        require(tokens > 0, f"--prompts {shown} has no tokens; pass a text, or --sample_tokens 0 for no samples.")
        require(
            tokens < limit,
            f"--prompts {shown} has {tokens} tokens, and model.max_position_embeddings={limit} leaves no room to go "
            "on; pass a shorter one, or --sample_tokens 0 for no samples.",
        )


def check_finite(config: RunConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Raise UserError if weights to begin with are not finite in the parameters' dtype: no update would be applied."""
    with np.errstate(over="ignore"):
        wrong = [name for name in weights if not np.isfinite(weights[name].astype(_dtype(config), copy=False)).all()]
    require(
        not wrong,
        f"--init {config.init} has numbers that are not finite in {config.precision.params}, in {some(wrong)}; begin "
        "with other weights.",
    )
