"""What a run tells a person: at its beginning what is not the preset's, at its end what it came to and what to do next.

All of the configuration and of the surroundings stands in run.json.
"""

import itertools
import shlex
from collections.abc import Mapping

from harness.cli import called_as
from harness.preflight import disk_need
from harness.result import RunResult
from harness.state import SHARDED
from recipe.config import RunConfig, to_dict
from recipe.data import Dataset
from recipe.params import param_counts
from recipe.presets import PRESETS
from recipe.reading import flat, short

ELSEWHERE = ("machine", "attention", "why_not_fused", "not_divided")
"""Of a trainer's environment what has its own line, or stands in run.json alone."""
MODULES = {"jax": "jax_impl", "torch": "torch_ref"}
DIFFERENCES = 250
"""Characters of the fields that are listed: three lines of a terminal. One value has 80 at most."""
PATH = 300
"""Characters of a path in a line."""


def describe(config: RunConfig, environment: Mapping) -> list[str]:
    """The lines a run begins with: what is not the preset's, parameters, device, folder."""
    counts = param_counts(config.model)
    shown = {name: value for name, value in environment.items() if name not in ELSEWHERE}
    lines = [
        f"run        {_differences(config)}",
        f"parameters {counts.total:,} ({counts.muon:,} under Muon, {counts.adamw:,} under AdamW)",
        "device     " + ", ".join(f"{name} {value}" for name, value in shown.items()),
    ]
    if config.precision.attention == "fused" and environment.get("attention") == "explicit":
        lines.append(f"attention  explicit in training, although fused is asked for: {environment['why_not_fused']}")
    lines += [f"mesh       {note}" for note in environment.get("not_divided", [])]
    lines.append(f"folder     {short(config.out, PATH)} (run.json: the whole configuration)")
    return [short(line, len(line)) for line in lines]  # a path may hold what a terminal cannot show


def _differences(config: RunConfig) -> str:
    """The preset and the first fields that are not its own; of weights to begin with the model goes unsaid."""
    preset = flat(to_dict(PRESETS.get(config.preset, RunConfig)()))
    mine = flat(to_dict(config))
    unsaid = {"preset", "out", "resume"}
    if config.init:
        unsaid |= {name for name in mine if name.startswith("model.") and name != "model.dropout"}
        unsaid |= {"data.tokenizer"} if config.data.tokenizer == config.init else set()
    parts = [f"{name}={_value(mine[name])}" for name in mine if mine[name] != preset[name] and name not in unsaid]
    lengths = itertools.accumulate(len(part) + 2 for part in parts)
    fitting = sum(length <= DIFFERENCES for length in lengths)
    more = f" and {len(parts) - fitting} more" if fitting < len(parts) else ""
    return f"preset {config.preset}" + (f", but {', '.join(parts[:fitting])}{more}" if parts else "")


def _value(value: object) -> str:
    """A field's value, a tuple as a list of it is written."""
    return short(str(list(value) if isinstance(value, tuple) else value)) or "''"


def describe_data(config: RunConfig, dataset: Dataset) -> list[str]:
    """The lines on the text, and on the room that its run needs."""
    tokens, said = len(dataset.train_tokens), dataset.describe(config.sequence_length)
    epochs = dataset.epochs(config.steps * config.accumulation * config.batch_size, config.sequence_length)
    split = "" if config.data.split == "documents" else f", split {config.data.split}"
    return [f"corpus     {said}"] * bool(said) + [
        f"text       {tokens:,} training tokens ({epochs:.2f} epochs), "
        f"{len(dataset.validation_tokens):,} held out, vocabulary {dataset.tokenizer.vocab_size:,}{split}",
        f"disk       {disk_need(config)}",
    ]


def conclude(result: RunResult, framework: str, baselines: Mapping[str, float], seconds: float) -> list[str]:
    """The lines a finished run ends with; `seconds` is what this process took in all."""
    folder = result.folder
    speed = "" if result.tokens_per_second is None else f"; updates at {result.tokens_per_second:,.0f} tokens/s"
    kept = [str(folder / name) for name in ("best", "last", SHARDED) if (folder / name).exists()]
    here, module = shlex.quote(str(folder)), MODULES.get(framework, framework)
    return [
        f"validation {result.best:.4f} nats per token at best, after step {result.best_step} "
        f"(interpolated bigram {baselines['bigram']:.4f})",
        f"time       {duration(seconds)} in all{speed}",
        f"weights    {short(' and '.join(kept), 2000)}",
        f"picture    {short(str(result.picture), 1000)}",
        f"generate   {called_as(f'python -m {module}.generate')} --checkpoint {here}",
        f"train on   {called_as(f'python train_{framework}.py')} --config {here} "
        f"--init {shlex.quote(str(folder / 'best'))}",
    ]


def duration(seconds: float) -> str:
    """A time as people say it: 7.3 s, 12 min 05 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
