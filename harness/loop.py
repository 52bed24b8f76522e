"""The training loop around either framework's train step: data, evaluation, logs, weights, samples.

A framework offers a `Trainer`; everything here is NumPy and the same for both, so their runs compare line by line.
"""

import contextlib
import dataclasses
import itertools
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import numpy as np

from harness.folders import load_folder, save_folder
from harness.hf_config import to_hf_config
from harness.plot import plot_runs
from harness.preflight import check_finite, check_place, check_prompts, mend_best, text_again
from harness.runlog import RunLog, check_tensorboard, read_metrics
from harness.state import TrainingState, clear_scratch, find_state, load_state, save_state
from recipe.baselines import ngram_baselines
from recipe.config import PROFILE_AFTER, RunConfig, UserError, require, to_dict
from recipe.data import Dataset, prepare
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

    def restore(self, slots: Mapping[str, Mapping[str, np.ndarray]], updates: int, skipped: int) -> None:
        """Put the optimizer and the counts where a saved run left them."""

    def generate(self, tokens: list[int], options) -> Iterable[int]:
        """New tokens after the prompt's."""

    def profile(self, folder: Path) -> contextlib.AbstractContextManager:
        """Trace the updates made inside into the folder."""


class Interruption:
    """Holds back Ctrl-C and SIGTERM, so that an update is never cut in half; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, self._handlers[number])
        print("stopping after this update; once more stops at once", file=sys.stderr)

    def leave(self) -> None:
        """End the process as the signal asks: exit code 130 or 143."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        assert self.signal is not None, "nothing asked to stop"
        raise SystemExit(128 + self.signal)


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
    picture, best weights, last state, samples.

    `make_trainer(config, weights)` builds the framework's `Trainer` on these weights. What can be known to be wrong
    raises UserError before the folder is made or touched. A run that came to nothing, after its state is saved, ends
    the process with one line and exit code 1.
    """
    folder = Path(config.out)
    to_hf_config(config.model)  # What cannot be saved must fail before it is trained.
    if config.tensorboard:
        check_tensorboard()
    with contextlib.ExitStack() as alone:
        state, position, best = None, 0, math.inf
        if config.resume:
            find_state(folder)
            alone.enter_context(_alone(folder))
            state = load_state(find_state(folder))
            finished = state.position == config.steps and (folder / "loss.png").exists()
            require(not finished, f"--resume {folder} is finished, all {config.steps} steps; begin a new run.")
            dataset = text_again(config, state)
        else:
            check_place(config)
            dataset = prepare(config.data, seed=config.seed, show_progress=True)
            if not config.init:
                config = fit_vocabulary(config, dataset.tokenizer.vocab_size)
        require(
            dataset.tokenizer.vocab_size <= config.model.vocab_size,
            f"the tokenizer has {dataset.tokenizer.vocab_size} tokens, the weights of {config.init or folder} only "
            f"{config.model.vocab_size} rows; pass the --data.tokenizer they came with.",
        )
        dataset.check_length(config.sequence_length)
        dataset.batch(0, **_batch_shape(config))
        check_prompts(config, dataset.tokenizer)
        if state is None:
            weights = load_folder(Path(config.init))[1] if config.init else init_params(config.model, config.seed)
            if config.init:
                check_finite(config, weights)
            trainer = make_trainer(config, weights)
            del weights  # The trainer has its own; these would stay as long as the run.
        else:
            clear_scratch(folder)
            state = load_state(folder / "last")
            trainer = make_trainer(config, state.weights)
            trainer.restore(state.slots, state.updates, state.skipped)
            position, best = state.position, state.best
            if math.isfinite(best):
                best = mend_best(config, state, dataset.tokenizer)
        baselines = ngram_baselines(dataset)
        about = dict(framework=framework, environment=trainer.environment)
        if state is None:
            folder.mkdir(parents=True, exist_ok=True)
            alone.enter_context(_alone(folder))
        with RunLog(folder, config, **about, resume_at=position if config.resume else None) as log:
            log.header(describe(config, trainer.environment))
            log.header(_describe_data(config, dataset))
            if state is not None:
                log.header([f"resumed    after step {position}: {state.updates} updates, {state.skipped} skipped"])
            else:
                log.log_baselines(baselines, dataset.bytes_per_token)
            with Interruption() as interruption:
                best = _optimize(config, dataset, trainer, log, interruption, position, best)
            _check_outcome(config, trainer, best)
            log.header(_samples(config, dataset, trainer, folder))
        picture = folder / "loss.png"
        plot_runs([folder], picture, baselines=baselines)
        print(f"validation {best:.4f} nats per token at best (interpolated bigram {baselines['bigram']:.4f})")
        kept = [str(folder / name) for name in ("best", "last") if (folder / name).exists()]
        print(f"weights    {short(' and '.join(kept), 2000)}; picture {short(str(picture), 1000)}")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run folder, so that nobody else writes to it; UserError if somebody does."""
    with locked(folder) as held:
        require(held is not False, f"{folder} is being trained by another process; wait for it, or stop it.")
        yield


def _check_outcome(config: RunConfig, trainer: Trainer, best: float) -> None:
    """End the process with exit code 1 if no update was applied, or if no evaluation gave a number."""
    updates, skipped = trainer.counts()
    if updates == 0:
        _fail(config, f"no update was applied: the gradients of all {skipped} were not finite")
    if not math.isfinite(best):
        _fail(config, "no validation loss was finite")


def _fail(config: RunConfig, reason: str) -> NoReturn:
    """One line on stderr and exit code 1; names the folders that are there."""
    kept = [f"{name}/" for name in ("best", "last") if (Path(config.out) / name).is_dir()]
    remedy = "lower --muon.learning_rate and --adamw.learning_rate, or look at the text, in a new run"
    raise SystemExit(f"error: {reason}; {short(config.out, 300)} keeps {' and '.join(kept) or 'the log'}; {remedy}.")


def _batch_shape(config: RunConfig) -> dict[str, int]:
    return dict(accumulation=config.accumulation, batch_size=config.batch_size, sequence_length=config.sequence_length)


def _describe_data(config: RunConfig, dataset: Dataset) -> list[str]:
    tokens = len(dataset.train_tokens)
    return [f"corpus     {dataset.said}"] * bool(dataset.said) + [
        f"text       {tokens:,} training tokens ({config.steps * config.tokens_per_step / tokens:.2f} epochs), "
        f"{len(dataset.validation_tokens):,} held out, vocabulary {dataset.tokenizer.vocab_size:,}, "
        f"split {config.data.split}"
    ]


def _optimize(
    config: RunConfig,
    dataset: Dataset,
    trainer: Trainer,
    log: RunLog,
    interruption: Interruption,
    position: int,
    best: float,
) -> float:
    """All updates from batch `position` on, with evaluations and saves between; returns the best validation loss."""
    folder = Path(config.out)

    def evaluate(step: int) -> None:
        nonlocal best
        batches = dataset.validation_batches(config.batch_size, config.sequence_length, config.data.validation_tokens)
        loss, accuracy = trainer.evaluate(batches)
        bits_per_byte = loss / math.log(2) / dataset.bytes_per_token
        perplexity = math.exp(loss) if loss < 700 else math.inf
        log.log_validation(step=step, loss=loss, accuracy=accuracy, perplexity=perplexity, bits_per_byte=bits_per_byte)
        if not math.isfinite(loss):
            log.header([f"warning: the validation loss after step {step} is {loss}, so best/ is left as it is"])
        if loss < best and step > 0:
            best = loss
            save_folder(folder / "best", config.model, trainer.weights(), dataset.tokenizer)

    def save() -> None:
        updates, skipped = trainer.counts()
        kept = dataclasses.replace(config, resume="")
        state = TrainingState(kept, trainer.weights(), trainer.slots(), updates, skipped, best, dataset.fingerprint)
        save_state(folder / "last", state, dataset.tokenizer, log.about)

    first = position + 1
    skipped, in_a_row = _skipped_in_a_row(folder) if position else (0, 0)
    too_many = f"{config.max_skipped} updates in a row were skipped: their gradients were not finite"
    if position == 0:
        evaluate(0)
    if position == config.steps and in_a_row >= config.max_skipped:
        _fail(config, too_many)
    pending, since = [], time.perf_counter()
    for step in _traced(range(first, config.steps + 1), config, trainer):
        pending.append((step, trainer.step(*dataset.batch(step - 1, **_batch_shape(config)))))
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
            if evaluating:
                evaluate(step)
            if saving or failing:
                save()  # After its step's records, which a resumed run goes on from.
            if failing:
                _fail(config, too_many)
            since = time.perf_counter()
        if stopping:
            interruption.leave()
    return best


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


def _samples(config: RunConfig, dataset: Dataset, trainer: Trainer, folder: Path) -> list[str]:
    """Write samples.txt, one text per prompt, and return its lines."""
    if config.sample_tokens == 0:
        return []
    texts = []
    for index, prompt in enumerate(config.prompts):
        tokens = dataset.tokenizer.encode_prompt(prompt)
        limit = config.model.max_position_embeddings - len(tokens)
        options = SamplingOptions(max_new_tokens=min(config.sample_tokens, limit), seed=config.seed + index, top_k=50)
        options = dataclasses.replace(options, stop_ids=(dataset.tokenizer.eos_id,))
        try:
            new = list(trainer.generate(tokens, options))
        except UserError as error:  # logits that are not finite; the run keeps its weights and its picture
            texts.append(f"{prompt} [{error}]")
            continue
        texts.append(dataset.tokenizer.decode([*tokens, *new]))
    (folder / "samples.txt").write_text("\n\n---\n\n".join(texts) + "\n", encoding="utf-8")
    return ["", *"\n---\n".join(texts).splitlines(), ""]
