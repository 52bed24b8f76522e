"""The training loop around either framework's train step: data, evaluation, logs, weights, samples.

A framework offers a `Trainer`; everything here is NumPy and the same for both, so their runs compare line by line.
"""

import contextlib
import dataclasses
import itertools
import math
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from harness.folders import load_folder, save_folder
from harness.hf_config import to_hf_config
from harness.interruption import Interruption
from harness.plot import plot_runs
from harness.preflight import (
    check_begun,
    check_finite,
    check_place,
    check_prompts,
    check_room,
    disk_need,
    is_begun,
)
from harness.resuming import mend_best, newest_sound, text_again
from harness.runlog import RunLog, check_tensorboard, read_metrics
from harness.saving import Saver, Snapshot
from harness.state import TrainingState, find_state, keep_newest, load_state, place_of_last, save_state
from recipe.baselines import ngram_baselines
from recipe.config import PROFILE_AFTER, RunConfig, UserError, require, to_dict
from recipe.data import Dataset, prepare
from recipe.durable import make_folder, write_whole
from recipe.lock import locked
from recipe.params import init_params, param_counts
from recipe.reading import short
from recipe.sampling import SamplingOptions

# Plain lines and bars show a record at least this often, however long a step takes.
SECONDS_BETWEEN_RECORDS = 1.0


class Trainer(Protocol):
    """What a framework brings: it owns parameters and optimizer state."""

    environment: dict
    """Device, backend and library versions, for the run log."""

    def step(self, inputs_ABT: np.ndarray, targets_ABT: np.ndarray) -> Mapping:
        """One optimizer update; loss, grad_norm, lr and skipped, as scalars that `float` may wait for."""

    def evaluate(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
        """Mean loss in nats per token and accuracy over the batches, without dropout."""

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

    def profile(self, folder: Path) -> contextlib.AbstractContextManager:
        """Trace the updates made inside into the folder."""


def describe(config: RunConfig, environment: Mapping) -> list[str]:
    """The lines a run begins with: configuration, parameter counts, device, precision, folder."""
    counts = param_counts(config.model)
    parts = {name: value for name, value in to_dict(config).items() if isinstance(value, dict)}
    flat = {name: value for name, value in to_dict(config).items() if name not in parts}
    lines = ["run        " + ", ".join(f"{name}={value}" for name, value in flat.items())]
    lines += [f"{part:<10} " + ", ".join(f"{name}={value}" for name, value in parts[part].items()) for part in parts]
    lines.append(f"parameters {counts.total:,} ({counts.muon:,} under Muon, {counts.adamw:,} under AdamW)")
    shown = {
        name: value for name, value in environment.items() if name not in ("machine", "attention", "why_not_fused")
    }
    lines.append("device     " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    if config.precision.attention == "fused" and environment.get("attention") == "explicit":
        lines.append(f"attention  explicit in training, although fused is asked for: {environment['why_not_fused']}")
    lines.append(f"folder     {config.out}")
    return [short(line, len(line)) for line in lines]  # a path may hold what a terminal cannot show


def fit_vocabulary(config: RunConfig, tokenizer_size: int) -> RunConfig:
    """The configuration with room for the tokenizer: rows rounded up to a multiple of 128, never fewer than asked."""
    rows = max(config.model.vocab_size, math.ceil(tokenizer_size / 128) * 128)
    return config.with_vocab_size(rows)


def run(config: RunConfig, *, framework: str, make_trainer) -> None:
    """Train as configured, from the beginning or from where `config.resume` stopped, and leave a run folder: logs,
    picture, best weights, last states, samples.

    `make_trainer(config, weights)` builds the framework's `Trainer` on these weights. What can be known to be wrong
    raises UserError before the folder is made or touched. A run that came to nothing ends the process with one line and
    exit code 1, one that a signal stops with a line that says how to go on.
    """
    to_hf_config(config.model)  # What cannot be saved must fail before it is trained.
    if config.tensorboard:
        check_tensorboard()
    with Interruption() as interruption, contextlib.ExitStack() as alone:
        _Run(config, framework, make_trainer, interruption, alone).run()


class _Run:
    """One run from its first look at the folder to its picture."""

    def __init__(
        self, config: RunConfig, framework: str, make_trainer, interruption: Interruption, alone: contextlib.ExitStack
    ) -> None:
        self.config, self.framework, self.make_trainer = config, framework, make_trainer
        self.interruption, self.alone = interruption, alone
        self.folder = Path(config.out)
        self.resume_command = f"python train_{framework}.py --resume {shlex.quote(config.out)}"
        self.position, self.best = 0, math.inf
        self.state: TrainingState | None = None
        """What the run goes on from, if it does."""

    def run(self) -> None:
        """All of it."""
        interruption, folder = self.interruption, self.folder
        again = "go on with" if self.config.resume else "nothing was learnt yet; begin again with"
        interruption.remedy = f"{again} the same command"
        interruption.where = "while reading the text"
        with interruption.at_once():
            chosen = self._hold() if self.config.resume else None
            self.dataset = self._read(chosen)
            interruption.where = "before the first update"
            self.trainer = self._go_on() if self.config.resume else self._begin()
            baselines = ngram_baselines(self.dataset)
        about = dict(framework=self.framework, environment=self.trainer.environment)
        resume_at = self.position if self.state else None
        with RunLog(folder, self.config, **about, resume_at=resume_at) as self.log, Saver() as self.saver:
            self.log.header(describe(self.config, self.trainer.environment))
            self.log.header(_describe_data(self.config, self.dataset))
            self.log.header([f"disk       {disk_need(self.config)}"])
            if self.state is not None:
                state = self.state
                self.log.header(
                    [f"resumed    after step {self.position}: {state.updates} updates, {state.skipped} skipped"]
                )
            else:
                self.log.log_baselines(baselines, self.dataset.bytes_per_token)
            self._optimize()
            self.saver.wait()
            if interruption.signal is not None:
                interruption.leave()
            self._check_outcome()
            with interruption.at_once():
                self.log.header(self._samples())
                picture = folder / "loss.png"
                plot_runs([folder], picture, baselines=baselines)
        print(f"validation {self.best:.4f} nats per token at best (interpolated bigram {baselines['bigram']:.4f})")
        kept = [str(folder / name) for name in ("best", "last") if (folder / name).exists()]
        print(f"weights    {short(' and '.join(kept), 2000)}; picture {short(str(picture), 1000)}")

    def _hold(self) -> Path:
        """Hold the folder to go on in, and look for its newest state."""
        find_state(self.folder)
        self.alone.enter_context(_alone(self.folder))
        chosen = find_state(self.folder)
        finished = load_state(chosen).position == self.config.steps and (self.folder / "loss.png").exists()
        require(not finished, f"--resume {self.folder} is finished, all {self.config.steps} steps; begin a new run.")
        return chosen

    def _read(self, chosen: Path | None) -> Dataset:
        """The text, after all that can be known to be wrong has been looked at."""
        config, folder = self.config, self.folder
        if chosen is not None:
            dataset = text_again(config, load_state(chosen), chosen)
        else:
            check_place(config)
            dataset = prepare(config.data, seed=config.seed, show_progress=True)
            if not config.init:
                self.config = config = fit_vocabulary(config, dataset.tokenizer.vocab_size)
            if is_begun(folder):
                check_begun(config)
        require(
            dataset.tokenizer.vocab_size <= config.model.vocab_size,
            f"the tokenizer has {dataset.tokenizer.vocab_size} tokens, the weights of {config.init or folder} only "
            f"{config.model.vocab_size} rows; pass the --data.tokenizer they came with.",
        )
        dataset.check_length(config.sequence_length)
        dataset.batch(0, **_batch_shape(config))
        check_prompts(config, dataset.tokenizer)
        return dataset

    def _begin(self) -> Trainer:
        """A trainer on new weights or on those of --init, and the folder, held."""
        config = self.config
        weights = load_folder(Path(config.init))[1] if config.init else init_params(config.model, config.seed)
        if config.init:
            check_finite(config, weights)
        trainer = self.make_trainer(config, weights)
        make_folder(self.folder)
        self.alone.enter_context(_alone(self.folder))
        return trainer

    def _go_on(self) -> Trainer:
        """A trainer on the newest sound state, and best/ looked at."""

        def restore(state: TrainingState) -> Trainer:
            trainer = self.make_trainer(self.config, state.weights)
            trainer.restore(state.slots, state.updates, state.skipped)
            return trainer

        trainer, self.state = newest_sound(self.config, restore)
        keep_newest(self.folder, self.config.keep)  # One that was killed may have left one more.
        self.position, self.best = self.state.position, self.state.best
        if math.isfinite(self.best):
            self.best = mend_best(self.config, self.state, self.dataset.tokenizer)
        return trainer

    def _optimize(self) -> None:
        """All updates from the run's position on, with evaluations and saves between."""
        config, interruption, log = self.config, self.interruption, self.log
        first = self.position + 1
        skipped, in_a_row = _skipped_in_a_row(self.folder) if self.position else (0, 0)
        too_many = f"{config.max_skipped} updates in a row were skipped: their gradients were not finite"
        if self.position == 0:
            self._evaluate(0)
        if self.position == config.steps and in_a_row >= config.max_skipped:
            self._fail(too_many)
        pending, since = [], time.perf_counter()
        for step in _traced(range(first, config.steps + 1), config, self.trainer):
            # Until the first update is done, which is compiled before, nothing is lost by leaving.
            with interruption.at_once() if step == first else contextlib.nullcontext():
                pending.append((step, self.trainer.step(*self._batch(step))))
            self.saver.look()
            stopping, last = interruption.signal is not None, step == config.steps
            evaluating = last or step % config.eval_every == 0
            saving = last or stopping or step % config.save_every == 0
            # Reading a result waits for the device, so several updates are read at once where they are fast.
            due = time.perf_counter() - since > SECONDS_BETWEEN_RECORDS
            if evaluating or saving or due or step == first or step % config.log_every == 0:
                records: list[tuple[int, dict[str, Any]]]
                failing = False
                records = [(done, {name: float(x) for name, x in metrics.items()}) for done, metrics in pending]
                seconds = (time.perf_counter() - since) / len(records)
                for done, metrics in records:
                    log.log_step(step=done, seconds=seconds, tokens=config.tokens_per_step, **metrics)
                    in_a_row = in_a_row + 1 if metrics["skipped"] > skipped else 0
                    skipped = metrics["skipped"]
                    failing = failing or in_a_row >= config.max_skipped
                pending = []
                self.position = step
                interruption.where = f"after step {step}"
                interruption.remedy = f"go on with: {self.resume_command}"
                better = evaluating and self._evaluate(step)
                if better or saving or failing:
                    self._save(best=better, state=saving or failing)  # After its step's records.
                if failing:
                    self.saver.wait()
                    self._fail(too_many)
                since = time.perf_counter()
            if interruption.signal is not None:
                if self.position < step or not saving:
                    continue
                self.saver.wait()
                interruption.leave()

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of an update."""
        return self.dataset.batch(step - 1, **_batch_shape(self.config))

    def _evaluate(self, step: int) -> bool:
        """Measure and record; whether the weights are the best so far, which then must be kept."""
        config, dataset = self.config, self.dataset
        batches = dataset.validation_batches(config.batch_size, config.sequence_length, config.data.validation_tokens)
        loss, accuracy = self.trainer.evaluate(batches)
        bits_per_byte = loss / math.log(2) / dataset.bytes_per_token
        perplexity = math.exp(loss) if loss < 700 else math.inf
        self.log.log_validation(
            step=step, loss=loss, accuracy=accuracy, perplexity=perplexity, bits_per_byte=bits_per_byte
        )
        if not math.isfinite(loss):
            self.log.header([f"warning: the validation loss after step {step} is {loss}, so best/ is left as it is"])
        if not loss < self.best or step == 0:
            return False
        self.best = loss
        return True

    def _save(self, *, best: bool, state: bool) -> None:
        """Write the best weights, the last state, or both, as they are now, beside the updates to come."""
        config, folder, tokenizer, log = self.config, self.folder, self.dataset.tokenizer, self.log
        kept = dataclasses.replace(config, resume="")
        lowest, text, step = self.best, self.dataset.fingerprint, self.position
        self.saver.wait()
        snapshot = self.trainer.snapshot().checked(self.saver.check)

        def write() -> None:
            check_room(config, best=best, state=state)
            log.sync()
            if best:
                about = {"step": step, "validation_loss": lowest}
                save_folder(folder / "best", config.model, snapshot.weights, tokenizer, about=about)
            if state:
                values = TrainingState(
                    kept, snapshot.weights, snapshot.slots, snapshot.updates, snapshot.skipped, lowest, text
                )
                aside = place_of_last(folder, values.position, config.keep)
                save_state(folder / "last", values, tokenizer, log.about, keep_as=aside)
                keep_newest(folder, config.keep)

        self.saver.submit(write)

    def _check_outcome(self) -> None:
        """End the process with exit code 1 if no update was applied, or if no evaluation gave a number."""
        updates, skipped = self.trainer.counts()
        if updates == 0:
            self._fail(f"no update was applied: the gradients of all {skipped} were not finite")
        if not math.isfinite(self.best):
            self._fail("no validation loss was finite")

    def _fail(self, reason: str) -> NoReturn:
        """One line on stderr and exit code 1; names the folders that are there."""
        kept = [f"{name}/" for name in ("best", "last") if (self.folder / name).is_dir()]
        remedy = "lower --muon.learning_rate and --adamw.learning_rate, or look at the text, in a new run"
        where = short(self.config.out, 300)
        raise SystemExit(f"error: {reason}; {where} keeps {' and '.join(kept) or 'the log'}; {remedy}.")

    def _samples(self) -> list[str]:
        """Write samples.txt, one text per prompt, and return its lines."""
        config, tokenizer = self.config, self.dataset.tokenizer
        if config.sample_tokens == 0:
            return []
        texts = []
        for index, prompt in enumerate(config.prompts):
            tokens = tokenizer.encode_prompt(prompt)
            limit = config.model.max_position_embeddings - len(tokens)
            options = SamplingOptions(
                max_new_tokens=min(config.sample_tokens, limit), seed=config.seed + index, top_k=50
            )
            options = dataclasses.replace(options, stop_ids=(tokenizer.eos_id,))
            try:
                new = list(self.trainer.generate(tokens, options))
            except UserError as error:  # logits that are not finite; the run keeps its weights and its picture
                texts.append(f"{prompt} [{error}]")
                continue
            texts.append(tokenizer.decode([*tokens, *new]))
        write_whole(self.folder / "samples.txt", ("\n\n---\n\n".join(texts) + "\n").encode())
        return ["", *"\n---\n".join(texts).splitlines(), ""]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run folder, so that nobody else writes to it; UserError if somebody does."""
    with locked(folder) as held:
        require(held is not False, f"{folder} is being trained by another process; wait for it, or stop it.")
        yield


def _batch_shape(config: RunConfig) -> dict[str, int]:
    return dict(accumulation=config.accumulation, batch_size=config.batch_size, sequence_length=config.sequence_length)


def _describe_data(config: RunConfig, dataset: Dataset) -> list[str]:
    tokens = len(dataset.train_tokens)
    return [f"corpus     {dataset.said}"] * bool(dataset.said) + [
        f"text       {tokens:,} training tokens ({config.steps * config.tokens_per_step / tokens:.2f} epochs), "
        f"{len(dataset.validation_tokens):,} held out, vocabulary {dataset.tokenizer.vocab_size:,}, "
        f"split {config.data.split}"
    ]


def _skipped_in_a_row(folder: Path) -> tuple[int, int]:
    """Updates skipped so far, by a run's log, and how many of them since the last one that was applied."""
    counts = [0, *(record.get("skipped", 0) for record in read_metrics(folder) if record["kind"] == "train")]
    rising = [after > before for before, after in itertools.pairwise(counts)]
    return counts[-1], sum(1 for _ in itertools.takewhile(bool, reversed(rising)))


def _traced(steps: Iterable[int], config: RunConfig, trainer: Trainer) -> Iterator[int]:
    """The steps; the trainer traces `profile_steps` of them after the first PROFILE_AFTER."""
    with contextlib.ExitStack() as trace:
        for done, step in enumerate(steps):
            if config.profile_steps and done == PROFILE_AFTER:
                trace.enter_context(trainer.profile(Path(config.out) / "profile"))
            if done == PROFILE_AFTER + config.profile_steps:
                trace.close()
            yield step
