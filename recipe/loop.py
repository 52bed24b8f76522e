"""The training loop around either framework's train step: data, evaluation, logs, weights, samples.

A framework offers a `Trainer`; everything here is NumPy and the same for both, so their runs compare line by line.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from recipe.checkpoint import save_folder
from recipe.config import PROFILE_AFTER, RunConfig, require, to_dict
from recipe.data import Dataset, ngram_baselines, prepare
from recipe.params import init_params, param_counts
from recipe.runlog import RunLog, plot_runs

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
    lines.append("device     " + ", ".join(f"{name} {value}" for name, value in environment.items()))
    lines.append(f"folder     {config.out}")
    return lines


def fit_vocabulary(config: RunConfig, tokenizer_size: int) -> RunConfig:
    """The configuration with room for the tokenizer: rows rounded up to a multiple of 128, never fewer than asked."""
    rows = max(config.model.vocab_size, math.ceil(tokenizer_size / 128) * 128)
    return config.with_vocab_size(rows)


def run(config: RunConfig, *, framework: str, make_trainer) -> None:
    """Train as configured and leave a run folder: logs, picture, best and last weights, samples.

    `make_trainer(config, weights)` builds the framework's `Trainer` on these initial weights.
    """
    folder = Path(config.out)
    require(not folder.exists() or not any(folder.iterdir()), f"--out {folder} already holds files; name a new folder.")
    dataset = prepare(config.data, seed=config.seed, show_progress=True)
    config = fit_vocabulary(config, dataset.tokenizer.vocab_size)
    dataset.batch(0, **_batch_shape(config))  # A sequence longer than the text must fail before a folder is made.
    trainer = make_trainer(config, init_params(config.model, config.seed))
    baselines = ngram_baselines(dataset)
    with RunLog(folder, config, framework=framework, environment=trainer.environment) as log:
        log.header(describe(config, trainer.environment))
        log.header([_describe_data(config, dataset)])
        log.log_baselines(baselines, dataset.bytes_per_token)
        best = _optimize(config, dataset, trainer, log)
        log.header(_samples(config, dataset, trainer, folder))
    picture = folder / "loss.png"
    plot_runs([folder], picture, baselines=baselines)
    print(f"validation {best:.4f} nats per token at best (interpolated bigram {baselines['bigram']:.4f})")
    print(f"weights    {folder / 'best'} and {folder / 'last'}; picture {picture}")


def _batch_shape(config: RunConfig) -> dict[str, int]:
    return dict(accumulation=config.accumulation, batch_size=config.batch_size, sequence_length=config.sequence_length)


def _describe_data(config: RunConfig, dataset: Dataset) -> str:
    tokens = len(dataset.train_tokens)
    return (
        f"text       {tokens:,} training tokens ({config.steps * config.tokens_per_step / tokens:.2f} epochs), "
        f"{len(dataset.validation_tokens):,} held out, vocabulary {dataset.tokenizer.vocab_size:,}, "
        f"split {config.data.split}"
    )


def _optimize(config: RunConfig, dataset: Dataset, trainer: Trainer, log: RunLog) -> float:
    """All updates, with evaluations between them; returns the best validation loss."""
    folder, best = Path(config.out), math.inf

    def evaluate(step: int) -> None:
        nonlocal best
        batches = dataset.validation_batches(config.batch_size, config.sequence_length, config.data.validation_tokens)
        loss, accuracy = trainer.evaluate(batches)
        bits_per_byte = loss / math.log(2) / dataset.bytes_per_token
        perplexity = math.exp(loss) if loss < 700 else math.inf
        log.log_validation(step=step, loss=loss, accuracy=accuracy, perplexity=perplexity, bits_per_byte=bits_per_byte)
        if loss < best and step > 0:
            best = loss
            save_folder(folder / "best", config.model, trainer.weights(), dataset.tokenizer)

    try:
        evaluate(0)
        pending, since = [], time.perf_counter()
        for step in _traced(range(1, config.steps + 1), config, trainer):
            pending.append((step, trainer.step(*dataset.batch(step - 1, **_batch_shape(config)))))
            last = step == config.steps or step % config.eval_every == 0
            # Reading a result waits for the device, so several updates are read at once where they are fast.
            due = time.perf_counter() - since > SECONDS_BETWEEN_RECORDS
            if last or due or step == 1 or step % config.log_every == 0:
                records = [(done, {name: float(x) for name, x in metrics.items()}) for done, metrics in pending]
                seconds = (time.perf_counter() - since) / len(records)
                for done, metrics in records:
                    log.log_step(step=done, seconds=seconds, tokens=config.tokens_per_step, **metrics)
                pending = []
                if last:
                    evaluate(step)
                since = time.perf_counter()
    finally:
        # Also on Ctrl-C: what was learnt is kept.
        with contextlib.suppress(KeyboardInterrupt):
            save_folder(folder / "last", config.model, trainer.weights(), dataset.tokenizer)
    return best


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
    from recipe.generation import SamplingOptions

    if config.sample_tokens == 0:
        return []
    texts = []
    for index, prompt in enumerate(config.prompts):
        tokens = dataset.tokenizer.encode(prompt)
        limit = config.model.max_position_embeddings - len(tokens)
        options = SamplingOptions(max_new_tokens=min(config.sample_tokens, limit), seed=config.seed + index, top_k=50)
        options = dataclasses.replace(options, stop_ids=(dataset.tokenizer.eos_id,))
        new = list(trainer.generate(tokens, options))
        texts.append(dataset.tokenizer.decode([*tokens, *new]))
    (folder / "samples.txt").write_text("\n\n---\n\n".join(texts) + "\n")
    return ["", *"\n---\n".join(texts).splitlines(), ""]
