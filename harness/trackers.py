"""Trackers of other people's: trackio or wandb get what metrics.jsonl gets, under the same names, if a run asks for it.

A tracker lives in a thread of its own, so that its network and its database hold up no update. Whatever it raises is
said once, and the run goes on without it.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recipe.config import RunConfig, require, to_dict
from recipe.reading import read_json, short

PROJECT = "qwen-from-scratch"
"""What the tracker files the runs under, unless WANDB_PROJECT or TRACKIO_PROJECT says another."""
WAITING = 10_000
"""Records that wait for a slow tracker at most; what comes then is left out."""
TO_FINISH = 30.0
"""Seconds that the end of a run waits for its tracker to have all."""
LONGEST_REASON = 200

Values = Mapping[str, float]
Begin = Callable[[Path, RunConfig, bool], tuple[Callable[[int, Values], Any], Callable[[], Any]]]


def check_tracker(name: str) -> None:
    """Raise `UserError` if that tracker's package is not installed, or would ask who one is."""
    require(
        importlib.util.find_spec(name) is not None,
        f"--track {name} needs {name}, which is not installed; run: pip install {name}, or leave the flag out.",
    )
    if name == "wandb":
        import wandb

        offline = wandb.setup().settings.mode != "online"
        require(
            offline or wandb.login(prompt=False),
            "--track wandb: this machine is not logged in; run: wandb login, or set WANDB_MODE=offline.",
        )


class Tracker:
    """One run of a tracker's, from its beginning to `finish`; no method raises or waits, but for that."""

    def __init__(self, folder: Path, config: RunConfig, *, resumed: bool) -> None:
        """Begin the run, or go on with it if it is resumed; `config.track` names the tracker, `folder` the run."""
        self.name = config.track
        self._records: queue.Queue[tuple[int, Values] | None] = queue.Queue(WAITING)
        self._failed = False
        arguments = (BEGIN[config.track], folder, config, resumed)
        self._thread = threading.Thread(target=self._work, args=arguments, name="tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Values) -> None:
        """Hand over what was measured after update `step`."""
        if not self._failed:
            try:
                self._records.put_nowait((step, dict(values)))
            except queue.Full:
                self._give_up(f"it is {WAITING:,} records behind")

    def finish(self) -> None:
        """Let the tracker's run end, and wait a while for that."""
        if self._failed:
            return
        with contextlib.suppress(queue.Full):
            self._records.put_nowait(None)
        self._thread.join(TO_FINISH)
        if self._thread.is_alive() and not self._failed:
            self._give_up(f"it has not finished in {TO_FINISH:.0f} s")

    def _work(self, begin: Begin, folder: Path, config: RunConfig, resumed: bool) -> None:
        try:
            log, finish = begin(folder, config, resumed)
            while (record := self._records.get()) is not None:
                log(*record)
            finish()
        except BaseException as error:  # whatever it raises: this is a run's thread no longer
            self._give_up(" ".join(f"{type(error).__name__}: {error}".split()))

    def _give_up(self, reason: str) -> None:
        """Say, once, that the run goes on without."""
        if not self._failed:
            self._failed = True
            said = f"warning: {self.name} is left out from here on ({short(reason, LONGEST_REASON)}); the run goes on"
            with contextlib.suppress(OSError, ValueError):
                print(said, file=sys.stderr, flush=True)


def _identity(folder: Path) -> str:
    """A name for the run that no other has, and that a resumed run has again: of its folder and when it began."""
    began = read_json(folder / "run.json").get("started")
    return hashlib.sha256(json.dumps([str(folder.resolve()), began]).encode()).hexdigest()[:16]


def _begin_wandb(folder: Path, config: RunConfig, resumed: bool) -> tuple[Callable, Callable]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.resolve().name,
        id=_identity(folder),
        resume="allow",
        dir=str(folder),
        config=to_dict(config),
        settings=wandb.Settings(console="off", silent=True),
    )
    # Its own steps may not go back, as those of a run that is rolled back or resumed do.
    run.define_metric("*", step_metric="step")
    return lambda step, values: run.log({"step": step, **values}), run.finish


def _begin_trackio(folder: Path, config: RunConfig, resumed: bool) -> tuple[Callable, Callable]:
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=folder.resolve().name,
        config=to_dict(config),
        resume="allow" if resumed else "never",
    )
    return lambda step, values: run.log(dict(values), step=step), run.finish


BEGIN: dict[str, Begin] = {"trackio": _begin_trackio, "wandb": _begin_wandb}
"""Name of a tracker -> what begins its run and returns how a record is logged and how the run ends."""
