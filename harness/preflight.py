"""What is looked at before a run begins or goes on: its place, its prompts, its weights, its text, its best/.

What can be known to be wrong raises UserError here, before a folder is made and an hour is spent.
"""

import contextlib
import itertools
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from harness.folders import load_folder, save_folder
from harness.runlog import read_metrics
from harness.state import TrainingState, find_state
from harness.tensors import CODES, DTYPES
from recipe.config import RunConfig, UserError, require
from recipe.data import Dataset, prepare
from recipe.params import check_weights, param_counts
from recipe.reading import short, some
from recipe.tokenizer import Tokenizer, load_tokenizer


def check_place(config: RunConfig) -> None:
    """Raise UserError if the run folder is taken, or cannot be made, or has no room for the weights."""
    folder = Path(config.out)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        require(not taken, f"--out {folder} already holds files; name a new folder.")
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        require(above.is_dir(), f"--out {folder} lies under {above}, which is a file; choose a folder's path.")
        require(os.access(above, os.W_OK | os.X_OK), f"--out {folder}: {above} may not be written to; choose another.")
        longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        long = [part for part in folder.parts if len(os.fsencode(part)) > longest]
        require(not long, f"--out {short(str(folder))} has a name of more than {longest} bytes; choose a shorter one.")
        free = shutil.disk_usage(above).free
    except OSError as error:
        raise UserError(f"--out {short(str(folder))} cannot be a folder ({error.strerror}); choose another.") from None
    counts = param_counts(config.model)
    # best/ in float32; last/ has the weights, one slot a number under Muon and two under AdamW.
    needed = 4 * counts.total + _dtype(config).itemsize * (counts.total + counts.muon + 2 * counts.adamw)
    require(
        needed <= free,
        f"--out {folder} needs some {needed / 1e9:,.1f} GB for best/ and last/, and {above} has {free / 1e9:,.1f} GB "
        "left; make room, or choose another.",
    )


def _dtype(config: RunConfig) -> np.dtype:
    """NumPy's dtype of the parameters."""
    return np.dtype(DTYPES[CODES[config.precision.params]])


def check_prompts(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if a prompt of the samples cannot be continued; that shows only after training otherwise."""
    limit = config.model.max_position_embeddings
    for prompt in config.prompts if config.sample_tokens else ():
        shown = short(repr(prompt))
        try:
            tokens = len(tokenizer.encode_prompt(prompt))
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


def text_again(config: RunConfig, state: TrainingState) -> Dataset:
    """The dataset of a run to go on with, read with the run's own copy of its tokenizer.

    UserError, which says what to restore, if it cannot be had or is another than the run began with.
    """
    folder, saved = Path(config.out), None
    with contextlib.suppress(UserError):
        saved = load_tokenizer(find_state(folder))
    try:
        given = None if config.data.tokenizer == "bpe" else saved
        dataset = prepare(config.data, seed=config.seed, show_progress=True, tokenizer=given)
    except UserError as error:
        raise UserError(f"--resume {folder} needs the text it began with, so restore that; it says: {error}") from None
    require(
        state.text == dataset.fingerprint,
        f"--resume {folder}: the training text is not the one it began with; restore {config.data.corpus}, or "
        "begin a new run.",
    )
    require(
        saved is None or saved.identity == dataset.tokenizer.identity,
        f"--resume {folder}: its tokenizer.json is not that of its text; go on from another copy of the state.",
    )
    return dataset


def mend_best(config: RunConfig, state: TrainingState, tokenizer: Tokenizer) -> float:
    """The loss of the weights in best/, once they are seen to be there.

    If they are not, last/ may hold the same; otherwise the best of the evaluations to come is kept, and that is said.
    What is damaged is set aside.
    """
    folder = Path(config.out)
    best = folder / "best"
    try:
        require(best.is_dir(), "it is not there")
        check_weights(load_folder(best)[1], config.model)
        load_tokenizer(best)
        return state.best
    except (UserError, OSError) as error:
        reason = short(str(error), 300)
    if os.path.lexists(best):
        names = (folder / f"best-damaged-{number}" for number in itertools.count(1))
        best.rename(next(name for name in names if not os.path.lexists(name)))
    records = [record for record in read_metrics(folder) if record["kind"] == "validation"]
    if any((record["step"], record.get("loss")) == (state.position, state.best) for record in records):
        save_folder(best, config.model, state.weights, tokenizer)
        said = "written again from last/, which is as good"
    else:
        said = f"lost, with its loss of {state.best:.4f}; the best of the evaluations to come is kept"
    print(f"warning: best/ cannot be read ({reason}); it is {said}", file=sys.stderr)
    return state.best if best.is_dir() else math.inf
