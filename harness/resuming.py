"""Going on with a run: which of its states is sound, its text, its best/."""

import contextlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from harness.folders import load_folder, save_folder
from harness.manifest import check_files
from harness.model_card import training_card
from harness.peers import ALONE, Peers
from harness.records import readable_records
from harness.state import OtherVersion, TrainingState, clear_scratch, load_state, set_apart, state_folders
from harness.tensors import Damaged
from recipe.config import RunConfig, UserError, require
from recipe.data import Dataset, prepare
from recipe.params import check_weights
from recipe.reading import short
from recipe.tokenizer import Tokenizer, load_tokenizer

S = TypeVar("S")
T = TypeVar("T")


def text_again(config: RunConfig, saved_in: Path, state: TrainingState) -> Dataset:
    """The dataset of a run to go on with, read with the copy of its tokenizer beside the state.

    UserError, which says what to restore, if it cannot be had or is another than the run began with.
    """
    folder, saved = Path(config.out), None
    with contextlib.suppress(UserError):
        saved = load_tokenizer(saved_in)
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


def newest_sound(
    config: RunConfig,
    load: Callable[[Path], TrainingState],
    restore: Callable[[TrainingState], T],
    *,
    before: float = math.inf,
    peers: Peers = ALONE,
) -> tuple[T, TrainingState]:
    """What `restore` makes of the newest state, as `load` reads it, of which every byte is as it was written; and that.

    What was wrong with newer ones is said, and they are set apart, as are those whose position is not `before` the
    given one. UserError, and nothing is moved, if none is sound. Of several `peers` all call this, and all take the
    same state: what one of them cannot read, none does.
    """
    run = Path(config.out)
    wrong: dict[Path, str] = {}
    later: list[Path] = []
    if peers.is_chief:
        clear_scratch(run)
    peers.wait("to look for a state")
    for folder in state_folders(run):
        state, reason = _by_all(load, folder, (UserError, OSError), peers)
        if state is None:
            wrong[folder] = reason
            continue
        if state.position >= before:
            later.append(folder)
            continue
        restored, reason = _by_all(restore, state, (Damaged,), peers)
        if restored is None:
            wrong[folder] = reason
            continue
        for passed in later if peers.is_chief else ():
            set_apart(run, passed, "diverged")
        for damaged, reason in wrong.items() if peers.is_chief else ():
            apart = set_apart(run, damaged, "damaged")
            print(
                f"warning: {short(str(damaged))} is no state to go on from ({reason}); it is now {short(str(apart))}, "
                f"and the run goes on from {short(str(folder))}, after step {state.position}",
                file=sys.stderr,
            )
        peers.wait("for what was set apart")
        return restored, state
    reasons = "; ".join(wrong.values()) or "it has none that is early enough"
    raise UserError(f"--resume {run} holds no sound state: {reasons}.")


def _by_all(read: Callable[[S], T], what: S, wrong: tuple[type[Exception], ...], peers: Peers) -> tuple[T | None, str]:
    """What `read` makes of something; None and why, in every process, if it raises one of these errors in any."""
    found, reason = None, ""
    try:
        found = read(what)
    except OtherVersion:
        raise
    except wrong as error:
        reason = short(str(error).rstrip("."), 400)
    if peers.agree(bool(reason)) and not reason:
        return None, "another process cannot read it"
    return found, reason


def last_good(run: Path, *, before: int) -> tuple[Path, int] | None:
    """The newest state before that position that looks whole by all but its arrays, and its position."""
    for folder in state_folders(run):
        with contextlib.suppress(UserError, OSError):
            position = load_state(folder).position
            if position < before:
                return folder, position
    return None


def mend_best(config: RunConfig, state: TrainingState, tokenizer: Tokenizer) -> float:
    """The loss of the weights in best/, once every byte of them is seen to be as it was written.

    If they are not, last/ may hold the same; otherwise the best of the evaluations to come is kept, and that is said.
    What is damaged is set aside.
    """
    folder = Path(config.out)
    best = folder / "best"
    try:
        require(best.is_dir(), "it is not there")
        check_files(best, tensors=True)
        check_weights(load_folder(best)[1], config.model)
        load_tokenizer(best)
        return state.best
    except (UserError, OSError) as error:
        reason = short(str(error), 300)
    if os.path.lexists(best):
        set_apart(folder, best, "damaged")
    records = [record for record in readable_records(folder) if record["kind"] == "validation"]
    if any((record["step"], record.get("loss")) == (state.position, state.best) for record in records):
        about = {"step": state.position, "validation_loss": state.best}
        card = training_card(config, step=state.position, about=state.about, loss=state.best)
        save_folder(best, config.model, state.weights, tokenizer, about=about, card=card)
        said = "written again from last/, which is as good"
    else:
        said = f"lost, with its loss of {state.best:.4f}; the best of the evaluations to come is kept"
    print(f"warning: best/ cannot be read ({reason}); it is {said}", file=sys.stderr)
    return state.best if best.is_dir() else math.inf
