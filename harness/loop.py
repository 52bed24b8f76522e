"""The training loop around either framework's train step: data, evaluation, logs, weights, samples.

A framework offers a `Trainer`; everything here is NumPy and the same for both, so their runs compare line by line.
"""

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from harness.cli import called_as
from harness.divergence import (
    Diagnosis,
    LossWatch,
    Rollback,
    batch_index,
    next_rollback,
    rolled_back,
    save_evidence,
    summary,
)
from harness.failures import RunFailed
from harness.finished import finished
from harness.folders import load_folder, save_folder
from harness.hf_config import to_hf_config
from harness.interruption import Interruption, Terminated
from harness.model_card import training_card
from harness.peers import ALONE, Peers
from harness.plot import plot_runs
from harness.preflight import (
    check_begun,
    check_finite,
    check_place,
    check_prompts,
    check_room,
    is_begun,
)
from harness.records import lacks_validation, readable_records
from harness.result import RunResult, read_result
from harness.resuming import last_good, mend_best, newest_sound, text_again
from harness.runlog import RunLog, SilentLog, check_tensorboard
from harness.saving import Saver, Snapshot, snapshot_of
from harness.sharded import save_gathered, save_sharded
from harness.state import (
    SHARDED,
    NotGathered,
    TrainingState,
    clear_scratch,
    find_state,
    keep_newest,
    load_state,
    place_of_last,
    save_state,
    set_apart,
    state_folders,
)
from harness.surroundings import config_differences, differences
from harness.telling import conclude, describe, describe_data
from harness.together import Together
from harness.trackers import check_tracker
from recipe.baselines import ngram_baselines
from recipe.config import PROFILE_AFTER, HostsConfig, RunConfig, UserError, require, to_dict
from recipe.data import Dataset, prepare
from recipe.durable import make_folder, write_whole
from recipe.hub import weights_folder
from recipe.lock import locked
from recipe.params import init_params
from recipe.reading import flat, short
from recipe.sampling import SamplingOptions

# Plain lines and bars show a record at least this often, however long a step takes.
SECONDS_BETWEEN_RECORDS = 1.0
PICTURE = "loss.png"


class Trainer(Protocol):
    """What a framework brings: it owns parameters and optimizer state."""

    environment: dict
    """Device, backend and library versions, for the run log."""

    def step(self, *batch_ABT: np.ndarray) -> Mapping:
        """One optimizer update on inputs_ABT, targets_ABT and, if the dataset has them, documents_ABT: loss, grad_norm,
        lr and skipped, as scalars that `float` may wait for."""

    def evaluate(self, batches: Iterable[tuple[np.ndarray, ...]]) -> tuple[float, float]:
        """Mean loss in nats per token that is trained on and accuracy over the batches, without dropout."""

    def weights(self) -> dict[str, np.ndarray]:
        """The parameters by Hugging Face name."""

    def slots(self) -> dict[str, dict[str, np.ndarray]]:
        """The optimizer's state by slot and Hugging Face name."""

    def counts(self) -> tuple[int, int]:
        """Updates applied and updates skipped."""

    def snapshot(self) -> Snapshot:
        """A copy of weights, slots and counts as they are now, which another thread may read while updates go on."""

    def restore(self, slots: Mapping[str, Mapping[str, np.ndarray]], updates: int, skipped: int) -> None:
        """Put the optimizer and the counts where a saved run left them."""

    def generate(self, tokens: list[int], options) -> Iterable[int]:
        """New tokens after the prompt's."""

    def diagnose(self, *batch_ABT: np.ndarray, position: int | None = None) -> Diagnosis:
        """Norms and finiteness of everything in update `position` (from 0) on this batch; changes nothing."""

    def profile(self, folder: Path) -> contextlib.AbstractContextManager:
        """Trace the updates made inside into the folder."""


def fit_vocabulary(config: RunConfig, tokenizer_size: int) -> RunConfig:
    """The configuration with room for the tokenizer: rows rounded up to a multiple of 128, never fewer than asked."""
    rows = max(config.model.vocab_size, math.ceil(tokenizer_size / 128) * 128)
    return config.with_vocab_size(rows)


def run(config: RunConfig, *, framework: str, make_trainer, peers: Peers = ALONE) -> RunResult:
    """Train as configured, from the beginning or from where `config.resume` stopped, and leave a run folder: logs,
    picture, best weights, last states, samples. Returns what it came to.

    `make_trainer(config, weights)` builds the framework's `Trainer` on these weights; `make_trainer.read_sharded`, if
    there is one, makes weights and slots of a mesh's arrays, for such a trainer and its `restore`. What can be known to
    be wrong raises UserError before the folder is made or touched. A run that came to nothing raises `RunFailed`, one
    that a signal stops KeyboardInterrupt or `Terminated`; each of them is a line that says how to go on.

    Of several `peers` every process calls this with the same configuration but for `hosts`. The chief has the folder,
    the log and the picture; a process that loses another says so in one line and is ended at once, with exit code 75.
    """
    to_hf_config(config.model)  # What cannot be saved must fail before it is trained.
    if config.tensorboard:
        check_tensorboard()
    if config.track:
        check_tracker(config.track)
    with Interruption(ends_process=False) as interruption, contextlib.ExitStack() as alone:
        return _Run(config, framework, make_trainer, interruption, alone, peers).run()


class _Stopping(Exception):
    """Breaks off an evaluation."""


class _Run:
    """One run from its first look at the folder to its picture."""

    def __init__(
        self,
        config: RunConfig,
        framework: str,
        make_trainer,
        interruption: Interruption,
        alone: contextlib.ExitStack,
        peers: Peers,
    ) -> None:
        # Where this process stands among others is no part of the run, whose states any number may go on with.
        self.config = dataclasses.replace(config, hosts=HostsConfig())
        self.framework, self.make_trainer = framework, make_trainer
        self.interruption, self.alone, self.peers = interruption, alone, peers
        self.several = peers.count > 1
        self.together = Together(peers, interruption, self._remedy)
        self.folder = Path(config.out)
        command = called_as(f"python train_{framework}.py")
        self.resume_command = f"{command} --resume {shlex.quote(config.out)}{_flags(config.hosts)}"
        self.began = time.perf_counter()
        self.position, self.best = 0, math.inf
        self.rollbacks: tuple[Rollback, ...] = ()
        self.begun = False
        """Whether the folder has a run that was killed before its first save, which this one begins again."""
        self.state: TrainingState | None = None
        """What the run goes on from, if it does."""

    def run(self) -> RunResult:
        """All of it."""
        interruption, folder, chief = self.interruption, self.folder, self.peers.is_chief
        interruption.where, interruption.remedy = "while reading the text", self._again()
        if self.several:
            interruption.doing = f"at most {self.config.log_every} more updates"
            self.peers.expect(self.together.last_words)
        with interruption.at_once(), self.together.unless_lost():
            with self.together.stretch():
                self.together.compare("configuration", lambda: json.dumps(flat(to_dict(self.config))))
            with self.together.stretch():
                self.dataset = self._read(self._newest() if self.config.resume else None)
            with self.together.stretch():
                self.together.compare("text", lambda: self.dataset.fingerprint)
            with self.together.stretch():
                interruption.where = "before going on" if self.config.resume else "before the first update"
                self.trainer = self._go_on() if self.config.resume else self._begin()
                baselines = ngram_baselines(self.dataset) if chief else {}
            with self.together.stretch():
                log = self._open_log()
        with self._last_word(), log as self.log, Saver() as self.saver, self.together.unless_lost():
            if chief:
                self._introduce(baselines)
            while reason := self._optimize():
                self._roll_back(reason)
            self.saver.wait()
            interruption.where = "after the last update"
            if self.together.stopping():
                self.together.leave()
            if not math.isfinite(self.best):
                self._fail("no validation loss was finite")
            with interruption.at_once():
                self.log.header(self._samples())
                if chief:
                    plot_runs([folder], folder / PICTURE, baselines=baselines)
                self.peers.part()
        result = read_result(folder)
        if chief:
            lines = conclude(result, self.framework, baselines, time.perf_counter() - self.began)
            print("\n".join(short(line, len(line)) for line in lines))
        return result

    def _open_log(self) -> RunLog | SilentLog:
        """The chief's log, whose records the others read with it."""
        at = self.position if self.state else None
        if not self.peers.is_chief:
            return SilentLog(self.folder, at)
        about: dict[str, Any] = dict(framework=self.framework, environment=self.trainer.environment)
        if at is not None:
            (self.folder / PICTURE).unlink(missing_ok=True)  # of when it was interrupted; a finished run has its own
        return RunLog(self.folder, self.config, **about, resume_at=at, again=self.begun and at is None)

    def _introduce(self, baselines: dict[str, float]) -> None:
        """The lines that a run begins or goes on with."""
        log = self.log
        log.header(describe(self.config, self.trainer.environment))
        log.header(describe_data(self.config, self.dataset))
        if self.state is not None:
            log.header(self._describe_resumed(self.state))
            self._log_lost_rollback()
        else:
            log.log_baselines(baselines, self.dataset.bytes_per_token)

    def _newest(self) -> tuple[Path, TrainingState]:
        """The state to go on from, and where it lies; the chief holds the folder."""
        return self._hold() if self.peers.is_chief else find_state(self.folder, self._load)

    @contextlib.contextmanager
    def _last_word(self) -> Iterator[None]:
        """End a run that a signal ends with a line that is true: a state may have been written meanwhile.

        By then all is written, so there is time for the picture so far; another signal ends that, too.
        """
        try:
            yield
        except (KeyboardInterrupt, Terminated):
            if self.interruption.signal is None:
                raise
            if self.peers.is_chief and not self.interruption.hurries and self.position < self.config.steps:
                self._draw_so_far()
            self.interruption.leave()

    def _draw_so_far(self) -> None:
        """The picture of a run that is interrupted, if it has an update to show; nothing that fails here is told."""
        picture = self.folder / PICTURE
        with contextlib.suppress(Exception):
            if any(record["kind"] == "train" for record in readable_records(self.folder)):
                plot_runs([self.folder], picture, baselines=None)
                print(f"picture    {short(str(picture), 1000)}, so far", flush=True)

    def _go_on_with(self) -> str:
        """How to go on with a run that has a state."""
        return f"go on with: {self.resume_command}{', and the other processes likewise' if self.several else ''}"

    def _remedy(self) -> str:
        """How to go on with this run as its folder is now."""
        return self._go_on_with() if self.config.resume or state_folders(self.folder) else self._again()

    def _again(self) -> str:
        """How to go on with a run that has saved nothing yet."""
        return self._go_on_with() if self.config.resume else "the same command begins it again"

    def _hold(self) -> tuple[Path, TrainingState]:
        """Hold the folder to go on in; its newest state, and where that lies."""
        find_state(self.folder, self._load)
        self.alone.enter_context(_alone(self.folder))
        chosen, state = find_state(self.folder, self._load)
        complete = state.position == self.config.steps and finished(self.folder, self.config)
        require(not complete, f"--resume {self.folder} is finished, all {self.config.steps} steps; begin a new run.")
        return chosen, state

    def _read(self, newest: tuple[Path, TrainingState] | None) -> Dataset:
        """The text, after all that can be known to be wrong has been looked at."""
        config, folder = self.config, self.folder
        if newest is not None:
            dataset = text_again(config, *newest)
        else:
            if self.peers.is_chief:
                check_place(config)
                if folder.is_dir():
                    with _alone(folder):
                        pass  # Whoever trains there is to be met before the text is read.
            dataset = prepare(config.data, seed=config.seed, show_progress=self.peers.is_chief)
            if not config.init:
                self.config = config = fit_vocabulary(config, dataset.tokenizer.vocab_size)
            self.begun = self.peers.is_chief and is_begun(folder)
            if self.begun:
                check_begun(config)
        require(
            dataset.tokenizer.vocab_size <= config.model.vocab_size,
            f"the tokenizer has {dataset.tokenizer.vocab_size} tokens, the weights of {config.init or folder} only "
            f"{config.model.vocab_size} rows; pass the --data.tokenizer they came with.",
        )
        dataset.check_length(config.sequence_length)
        dataset.batch(0, **_batch_shape(config))
        check_prompts(config, dataset)
        return dataset

    def _begin(self) -> Trainer:
        """A trainer on new weights or on those of --init, and the folder, held."""
        config = self.config
        weights = load_folder(weights_folder(config.init))[1] if config.init else init_params(config.model, config.seed)
        if config.init:
            check_finite(config, weights)
        trainer = self.make_trainer(config, weights)
        if not self.peers.is_chief:
            return trainer
        make_folder(self.folder)
        self.alone.enter_context(_alone(self.folder))
        if self.begun:
            # Another process may have been here since, and left what is to be gone on from.
            require(
                is_begun(self.folder),
                f"--out {self.folder} has a state by now, by another process; go on with: {self.resume_command}.",
            )
            clear_scratch(self.folder)
            if (self.folder / "best").exists():
                set_apart(self.folder, self.folder / "best", "undone")
        return trainer

    def _go_on(self) -> Trainer:
        """A trainer on the newest sound state, and best/ looked at."""
        trainer, self.state = newest_sound(self.config, self._load, self._restore, peers=self.peers)
        if self.peers.is_chief:
            keep_newest(self.folder, self.config.keep)  # One that was killed may have left one more.
        self.position, self.best, self.rollbacks = self.state.position, self.state.best, self.state.rollbacks
        self.interruption.where = f"after step {self.position}"
        if math.isfinite(self.best):
            best = mend_best(self.config, self.state, self.dataset.tokenizer) if self.peers.is_chief else self.best
            self.best = float(self.peers.tell(repr(best)))
        return trainer

    def _load(self, folder: Path) -> TrainingState:
        """The state in a folder; UserError if it is sharded and this framework does not read that."""
        state = load_state(folder)
        if state.arrays is None:
            return state
        read = getattr(self.make_trainer, "read_sharded", None)
        if read is None:
            raise NotGathered(
                f"--resume {self.folder}: its newest state, after step {state.position}, is a mesh's, divided over "
                f"devices; run python -m jax_impl.gather {shlex.quote(str(self.folder))} once, then this again."
            )
        weights, slots = read(state.arrays, state.config)
        return dataclasses.replace(state, weights=weights, slots=slots)

    def _restore(self, state: TrainingState, rollbacks: Sequence[Rollback] | None = None) -> Trainer:
        """A trainer where the state left one, at the rates of these rollbacks or of the state's."""
        config = rolled_back(self.config, state.rollbacks if rollbacks is None else rollbacks)
        trainer = self.make_trainer(config, state.weights)
        trainer.restore(state.slots, state.updates, state.skipped)
        return trainer

    def _describe_resumed(self, state: TrainingState) -> list[str]:
        """Where the run goes on, and what is not as it was when the state was written."""
        lines = [f"resumed    after step {state.position}: {state.updates} updates, {state.skipped} skipped"]
        lines += differences(state.about, self.log.about)
        lines += config_differences(state.config, self.config)
        if state.rollbacks:
            lines.append(
                f"rollbacks  {len(state.rollbacks)}, the last one because {short(state.rollbacks[-1].reason, 300)}"
            )
        return lines

    def _optimize(self) -> str | None:
        """All updates from the run's position on, with evaluations and saves between; why they are of no use, if so."""
        config, interruption, log = self.config, self.interruption, self.log
        watch = self.watch = LossWatch(config, log.records, skipped=self.trainer.counts()[1])
        if reason := watch.verdict():
            return reason
        first = self.position + 1
        if self.position == 0:
            with interruption.at_once():
                self._evaluate(0)
        elif self._evaluation_due(self.position) and self._evaluate_again():
            self._save(best=True, state=True)
        pending, since, overdue = [], time.perf_counter(), False
        steps = range(first, config.steps + 1)
        for step in _traced(steps, config, self.trainer) if self.peers.is_chief else steps:
            # Until the first update is done, which is compiled before, nothing is lost by leaving.
            with interruption.at_once() if step == first else contextlib.nullcontext():
                pending.append((step, self.trainer.step(*self._batch(step))))
            self.saver.look()
            stopping, last = not self.several and interruption.signal is not None, step == config.steps
            evaluating = self._evaluation_due(step)
            overdue = overdue or step % config.save_every == 0
            # Reading a result waits for the device, so several updates are read at once where they are fast. No clock
            # decides what several processes do together: they stop where one of them reads.
            due = not self.several and time.perf_counter() - since > SECONDS_BETWEEN_RECORDS
            if not (evaluating or overdue or stopping or due or step == first or step % config.log_every == 0):
                continue
            reason = self._record(pending, since)
            pending, self.position = [], step
            interruption.where = f"after step {step}"
            if reason is not None:
                return reason
            better = evaluating and self._evaluate(step)
            stopping = self.together.stopping() or stopping
            # A state is not given up for one that may have gone wrong, unless it is the last that can be written.
            saving = stopping or last or (overdue and watch.since is None)
            if better or saving:
                self._save(best=better, state=saving)  # After its step's records.
                overdue = overdue and not saving
            if stopping and not last:
                self.saver.wait()
                self.together.leave()
            since = time.perf_counter()
        return None

    def _record(self, pending: Sequence[tuple[int, Mapping]], since: float) -> str | None:
        """Log these updates, begun at `since` by the clock; why the run is to stop, if it is."""
        reason = None
        # All are read before the first is written, and before the clock: that waits for the device.
        records: list[tuple[int, dict[str, Any]]]
        records = [(step, {name: float(x) for name, x in metrics.items()}) for step, metrics in pending]
        seconds = (time.perf_counter() - since) / len(pending)
        for step, metrics in records:
            self.log.log_step(step=step, seconds=seconds, tokens=self.config.tokens_per_step, **metrics)
            if reason is None:  # What was computed after that moves no rollback.
                self.watch.see(step, metrics["loss"], int(metrics["skipped"]))
                reason = self.watch.verdict()
        return reason

    def _roll_back(self, reason: str) -> None:
        """Keep the evidence of a divergence, and go back to the last sound state and on with other batches at smaller
        rates; or end the run, if it is not to do that, has done it too often, or has no such state.
        """
        config, watch = self.config, self.watch
        self.saver.wait()
        self.peers.wait("for the last state")
        began = watch.since or watch.step
        diagnosis: Diagnosis | str
        try:
            diagnosis = self.trainer.diagnose(*self._batch(began, whole=True), position=began - 1)
        except Exception as error:  # whatever is wrong with it, the reason to stop matters more
            diagnosis = f"{type(error).__name__}: {error}"
        # The loss of update `began` is that of the weights before it, so the state in between may be bad itself.
        before = began - 1
        good = last_good(self.folder, before=before)
        if good is None:
            before, good = began, last_good(self.folder, before=began)
        if self.peers.is_chief:
            file = save_evidence(
                rolled_back(config, self.rollbacks),
                watch,
                reason,
                diagnosis,
                updates=self.trainer.counts()[0],
                last_good=None if good is None else (str(good[0]), good[1]),
                rollbacks=self.rollbacks,
                about=self.log.about,
            )
            self.log.header([summary(watch, reason, diagnosis, file, rollbacks=self.rollbacks)])

        def again(to: int | None) -> Rollback | None:
            return next_rollback(config, self.rollbacks, step=watch.step, to=to, reason=reason)

        rollback = again(None if good is None else good[1])
        if rollback is None:
            self._fail(reason)
        del self.trainer  # Its memory is the next one's.
        slower = (*self.rollbacks, rollback)
        self.trainer, state = newest_sound(
            config, self._load, lambda state: self._restore(state, slower), before=before, peers=self.peers
        )
        rollback = again(state.position)  # A state that was good by its headers may have been damaged.
        assert rollback is not None, "the answer does not depend on the state"
        self.rollbacks, self.position = (*self.rollbacks, rollback), state.position
        self.interruption.where = f"after step {self.position}"
        self._save(best=False, state=True)
        self.saver.wait()
        if not self.peers.is_chief:
            self.peers.wait("for the log")
        self.log.rollback(state.position, _recorded(rollback))
        if self.peers.is_chief:
            self.peers.wait("for the log")
        rates = rolled_back(config, self.rollbacks)
        said = f"rolled back to step {state.position}; update {state.position + 1} reads batch "
        said += (
            f"{batch_index(state.position + 1, self.rollbacks)}, and the rates are {rates.muon.learning_rate:.3g} and "
        )
        said += f"{rates.adamw.learning_rate:.3g} ({len(self.rollbacks)} of {config.max_rollbacks} rollbacks)"
        self.log.header([said])

    def _log_lost_rollback(self) -> None:
        """Record the rollback that the state was saved by, should the run have died before it could."""
        if self.rollbacks and self.rollbacks[-1].to == self.position:
            values = _recorded(self.rollbacks[-1])
            logged = [r for r in self.log.records if r["kind"] == "rollback" and r["step"] == self.position]
            if not any(values.items() <= record.items() for record in logged):
                self.log.rollback(self.position, values)

    def _batch(self, step: int, *, whole: bool = False) -> tuple[np.ndarray, ...]:
        """Inputs, targets and perhaps documents of an update; unless `whole`, only the rows that this process's devices
        hold are read."""
        rows = None if whole else getattr(self.trainer, "rows_of_batch", None)
        return self.dataset.batch(batch_index(step, self.rollbacks), **_batch_shape(self.config), rows=rows)

    def _evaluation_due(self, step: int) -> bool:
        return step == self.config.steps or step % self.config.eval_every == 0

    def _until_stopped(self, batches: Iterable) -> Iterator:
        """The batches of an evaluation, which a signal breaks off: the run that goes on makes it again."""
        for batch in batches:
            if self.together.stopping():
                raise _Stopping
            yield batch

    def _evaluate(self, step: int) -> bool:
        """Measure and record; whether the weights are the best so far, which then must be kept."""
        config, dataset = self.config, self.dataset
        batches = dataset.validation_batches(config.batch_size, config.sequence_length, config.data.validation_tokens)
        try:
            loss, accuracy = self.trainer.evaluate(self._until_stopped(batches))
        except _Stopping:
            return False
        bits_per_byte = loss / math.log(2) / dataset.bytes_per_token
        perplexity = math.exp(loss) if loss < 700 else math.inf
        self.log.log_validation(
            step=step, loss=loss, accuracy=accuracy, perplexity=perplexity, bits_per_byte=bits_per_byte
        )
        if not math.isfinite(loss):
            self.log.header([f"warning: the validation loss after step {step} is {loss}, so best/ is left as it is"])
        if not loss < self.best or self.trainer.counts()[0] == 0:
            return False
        self.best = loss
        return True

    def _evaluate_again(self) -> bool:
        """Measure the state that the run goes on from, if that was broken off; whether its weights are the best so far.

        A run may also have died after it had measured that and before it had saved it.
        """
        if lacks_validation(self.log.records, self.position):
            return self._evaluate(self.position)
        found = [r["loss"] for r in self.log.records if r["kind"] == "validation" and r["step"] == self.position]
        if found[0] is None or not found[0] < self.best or self.trainer.counts()[0] == 0:
            return False
        self.best = found[0]
        return True

    def _save(self, *, best: bool, state: bool) -> None:
        """Write the best weights, the last state, or both, as they are now, beside the updates to come."""
        config, folder, tokenizer, log = self.config, self.folder, self.dataset.tokenizer, self.log
        kept = dataclasses.replace(config, resume="")
        lowest, text, step, rollbacks = self.best, self.dataset.fingerprint, self.position, self.rollbacks
        dataset = self.dataset
        card = training_card(
            kept,
            step=step,
            about=log.about,
            loss=lowest,
            bits_per_byte=lowest / math.log(2) / dataset.bytes_per_token,
            tokens=(len(dataset.train_tokens), len(dataset.validation_tokens)),
        )
        self.saver.wait()
        snapshot = snapshot_of(self.trainer)
        if snapshot.shards is None and not self.peers.is_chief:
            return  # What all hold whole, the chief writes.

        def keep_best(weights: Mapping[str, np.ndarray]) -> None:
            about = {"step": step, "validation_loss": lowest}
            save_folder(folder / "best", config.model, weights, tokenizer, about=about, card=card)

        def write() -> None:
            check_room(config, best=best, state=state)
            log.sync()
            values = TrainingState(
                kept, snapshot.weights, snapshot.slots, snapshot.updates, snapshot.skipped, lowest, text, rollbacks
            )
            if snapshot.shards is not None and state:
                save_sharded(
                    folder, values, snapshot.shards, tokenizer, log.about, save_best=keep_best if best else None
                )
            elif snapshot.shards is not None:
                save_gathered(folder, snapshot.weights, snapshot.shards, keep_best)
            else:
                if best:
                    keep_best(snapshot.weights)
                if state:
                    aside = place_of_last(folder, values.position, config.keep)
                    save_state(folder / "last", values, tokenizer, log.about, keep_as=aside)
                    keep_newest(folder, config.keep)
            if state:
                self.interruption.remedy = self._go_on_with()

        first = state and not state_folders(folder)
        self.saver.submit(write)
        if first:
            self.saver.wait()  # From here on there is something to go on from, and what is wrong with the disk shows.

    def _fail(self, reason: str) -> NoReturn:
        """Raise `RunFailed`: why, what the folder keeps, how to go on."""
        self.peers.part()
        if not self.peers.is_chief:
            raise SystemExit(1)
        kept = [f"{name}/" for name in ("best", "last", SHARDED) if (self.folder / name).is_dir()]
        remedy = "lower --muon.learning_rate and --adamw.learning_rate, or look at the text, in a new run"
        if state_folders(self.folder) and len(self.rollbacks) < self.config.max_rollbacks:
            remedy += f"; or go back and on with: {self.resume_command} --on_divergence rollback"
        where = short(self.config.out, 300)
        raise RunFailed(f"{reason}; {where} keeps {' and '.join(kept) or 'the log'}; {remedy}.")

    def _samples(self) -> list[str]:
        """Write samples.txt, one text per prompt, and return its lines."""
        config, dataset = self.config, self.dataset
        if config.sample_tokens == 0:
            return []
        texts = []
        for index, prompt in enumerate(config.prompts):
            tokens = dataset.encode_prompt(prompt)
            limit = config.model.max_position_embeddings - len(tokens)
            options = SamplingOptions(
                max_new_tokens=min(config.sample_tokens, limit), seed=config.seed + index, top_k=50
            )
            options = dataclasses.replace(options, stop_ids=(dataset.tokenizer.eos_id,))
            try:
                new = list(self.trainer.generate(tokens, options))
            except UserError as error:  # logits that are not finite; the run keeps its weights and its picture
                texts.append(f"{prompt} [{error}]")
                continue
            texts.append(dataset.tokenizer.decode([*tokens, *new]))
        if self.peers.is_chief:
            write_whole(self.folder / "samples.txt", ("\n\n---\n\n".join(texts) + "\n").encode())
        return ["", *"\n---\n".join(texts).splitlines(), ""]


def _flags(hosts: HostsConfig) -> str:
    """The flags with which a process takes its place among the others again."""
    flags = {f"--hosts.{name}": value for name, value in dataclasses.asdict(hosts).items()}
    defaults = dataclasses.asdict(HostsConfig())
    return "".join(
        f" {flag} {shlex.quote(str(value))}"
        for flag, value in flags.items()
        if value != defaults[flag.removeprefix("--hosts.")]
    )


def _recorded(rollback: Rollback) -> dict[str, Any]:
    """What the log says of a rollback, in a record whose step is the one it led to."""
    values = dataclasses.asdict(rollback)
    del values["to"]
    return {"diverged_at": values.pop("step")} | values


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run folder, so that nobody else writes to it; UserError if somebody does."""
    with locked(folder) as held:
        if held is None:
            said = f"note: {short(str(folder))} has no locks; see to it that no other process trains there"
            print(said, file=sys.stderr)
        require(held is not False, f"{folder} is being trained by another process; wait for it, or stop it.")
        yield


def _batch_shape(config: RunConfig) -> dict[str, Any]:
    return dict(accumulation=config.accumulation, batch_size=config.batch_size, sequence_length=config.sequence_length)


def _traced(steps: Iterable[int], config: RunConfig, trainer: Trainer) -> Iterator[int]:
    """The steps; the trainer traces `profile_steps` of them after the first PROFILE_AFTER."""
    with contextlib.ExitStack() as trace:
        for done, step in enumerate(steps):
            if config.profile_steps and done == PROFILE_AFTER:
                trace.enter_context(trainer.profile(Path(config.out) / "profile"))
            if done == PROFILE_AFTER + config.profile_steps:
                trace.close()
            yield step
