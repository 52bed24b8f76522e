"""The README.md of a weights folder: what the model is, how it was trained, how good it is, how to use it, in Hugging
Face's form. The same run gives the same text; whatever its names and paths hold is no markup in it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.config import ModelConfig, RunConfig
from recipe.mixture import parse_mixture
from recipe.params import param_counts
from recipe.reading import short

README = "README.md"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
MADE_WITH = ("jax", "flax", "optax", "torch", "transformers", "numpy", "tokenizers")
"""Versions that a card shows, of those that a run records."""
LONGEST = 500
"""Characters of a name or path in a card; what is longer loses its middle."""

HELD_OUT = {
    "documents": "whole documents, which it was not trained on",
    "hashed": "documents that a hash of their text picks, which it was not trained on",
    "leaking-windows": "windows of text that overlap those it was trained on: this loss measures memory, not how well "
    "it predicts new text",
}
"""What the validation loss is measured on, by `data.split`."""


def training_card(
    config: RunConfig,
    *,
    step: int,
    about: Mapping[str, Any],
    loss: float | None = None,
    bits_per_byte: float | None = None,
    tokens: tuple[int, int] | None = None,
) -> str:
    """The card of a run's weights as they were after update `step`.

    `about` says what the run ran on, as run.json does; `loss` is the validation loss of these weights in nats per
    token, None if nobody measured it; `tokens` are those to train on and those held out.
    """
    return _card(
        _quoted(Path(config.out).name or "model"),
        config.model,
        _front_matter(config.model, datasets=_datasets(config.data.corpus), base=_base_model(config.init)),
        [
            *_quality(config, step, loss, bits_per_byte),
            *_training(config, step),
            *_data(config, tokens),
            *_made_with(about),
        ],
    )


def weights_card(name: str, model: ModelConfig) -> str:
    """The card of weights of which nothing is known but the model they are of."""
    said = "They were written again by this project; what they were trained on is not known to it."
    return _card(_quoted(name), model, _front_matter(model), ["## Training", "", said, ""])


def exported(card: str, dtype: str) -> str:
    """A card of weights that were written again in another dtype."""
    return f"{card}\n## Export\n\nThese weights are that model's, rounded to {dtype}.\n"


def _card(title: str, model: ModelConfig, front: list[str], middle: list[str]) -> str:
    """The parts of a card that every one has, around what is known of this one."""
    counts = param_counts(model)
    family = "Qwen3" if model.qk_norm else "Llama"
    fields: tuple[str, ...] = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    )
    fields += ("head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "tie_word_embeddings")
    fields += ("sliding_window",) if model.sliding_window is not None else ()
    lines = [
        *front,
        f"# {title}",
        "",
        f"A language model of {counts.total:,} parameters in the form of {family}, which continues text.",
        "",
        *middle,
        "## Model",
        "",
        "| field | value |",
        "|---|---|",
        *(f"| `{field}` | {getattr(model, field)} |" for field in fields),
        "",
        "## Use",
        "",
        "With the path of this folder for `FOLDER`:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")',
        'tokens = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))",
        "```",
        "",
        "or with qwen-from-scratch: `python -m jax_impl.generate --checkpoint FOLDER --prompt Once`, and",
        "`python -m torch_ref.generate` likewise.",
        "",
        "## Limitations",
        "",
        "It writes what is likely after its training text, true or not, and repeats what that text says, prejudice",
        "included; nobody has judged what it writes. It was trained to continue text, not to follow instructions,",
        "unless something above says so. No licence is given for these weights: whoever passes them on adds one that",
        "the training text allows, `license:` in the lines at the top of this file, and deletes `manifest.json`, which",
        "holds the hash of this file as it was written.",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(model: ModelConfig, datasets: list[str] | None = None, base: str = "") -> list[str]:
    """The lines in YAML that Hugging Face reads; each text is a JSON string, which YAML's double quotes read alike."""
    tags = ["qwen3" if model.qk_norm else "llama", "muon", "qwen-from-scratch"]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", *_listed(tags)]
    if datasets:
        lines += ["datasets:", *_listed(datasets)]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    return [*lines, "---", ""]


def _listed(texts: list[str]) -> list[str]:
    return [f"- {json.dumps(text)}" for text in texts]


def _datasets(corpus: str) -> list[str]:
    """The data sets of the Hub that a corpus names."""
    mixture = parse_mixture(corpus)
    sources = [corpus] if mixture is None else [term.corpus for term in mixture]
    names = ["/".join(source.removeprefix("hub:").split("/")[:2]) for source in sources if source.startswith("hub:")]
    return [name for name in dict.fromkeys(names) if HUB_NAME.fullmatch(name)]


def _base_model(init: str) -> str:
    """The Hub's name of the weights that a run began with, if it is one and no folder here."""
    name = init.partition("@")[0]
    return name if HUB_NAME.fullmatch(name) and not Path(init).exists() else ""


def _quality(config: RunConfig, step: int, loss: float | None, bits_per_byte: float | None) -> list[str]:
    after = f"after update {step:,} of {config.steps:,}"
    if loss is None or not math.isfinite(loss):
        return [f"The weights are those {after}; their validation loss was not measured.", ""]
    bits = "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits per byte"
    return [
        f"Validation loss {loss:.4f} nats per token{bits}, {after}. It is measured on {HELD_OUT[config.data.split]}.",
        "",
    ]


def _training(config: RunConfig, step: int) -> list[str]:
    muon, adamw, schedule, precision = config.muon, config.adamw, config.schedule, config.precision
    several = "es" if config.accumulation > 1 else ""
    begun = f"weights of {_quoted(config.init)}" if config.init else f"new weights, seed {config.seed}"
    return [
        "## Training",
        "",
        f"- from {begun}",
        f"- {step:,} updates of {config.tokens_per_step:,} tokens ({config.accumulation} micro-batch{several} of "
        f"{config.batch_size} rows of {config.sequence_length}), {step * config.tokens_per_step:,} tokens in all",
        f"- Muon on the matrices of the blocks: learning rate {muon.learning_rate:g}, momentum {muon.beta:g}, weight "
        f"decay {muon.weight_decay:g}",
        f"- AdamW on all others: learning rate {adamw.learning_rate:g}, betas {adamw.beta1:g} and {adamw.beta2:g}, "
        f"weight decay {adamw.weight_decay:g}",
        f"- schedule: linear warm-up over {schedule.warmup_fraction:g} of the {config.steps:,} updates, then a cosine "
        f"to {schedule.final_factor:g} of the rates",
        f"- gradient norm clipped at {config.clip_norm:g}, dropout {config.model.dropout:g}",
        f"- parameters in {precision.params}, products in {precision.compute}, Newton-Schulz in "
        f"{precision.newton_schulz}",
        "",
    ]


def _data(config: RunConfig, tokens: tuple[int, int] | None) -> list[str]:
    data = config.data
    tokenizer = f"trained on it, {data.bpe_vocab_size:,} tokens" if data.tokenizer == "bpe" else _quoted(data.tokenizer)
    limits = {name: getattr(data, name) for name in ("max_documents", "max_characters", "max_tokens")}
    cut = [f"{name.replace('_', ' ')} {value:,}" for name, value in limits.items() if value is not None]
    share = f"- held out: {data.validation_fraction:.3g} of it, split `{data.split}`"
    return [
        "## Data",
        "",
        f"- corpus: {_quoted(data.corpus)}" + (f", {', '.join(cut)}" if cut else ""),
        f"- tokenizer: {tokenizer}",
        share if tokens is None else f"{share}: {tokens[0]:,} tokens to train on and {tokens[1]:,} held out",
        "",
    ]


def _made_with(about: Mapping[str, Any]) -> list[str]:
    """What it ran on; a run's records may lack any of it."""
    versions, environment = about.get("versions"), about.get("environment")
    versions = versions if isinstance(versions, Mapping) else {}
    device = environment.get("device") if isinstance(environment, Mapping) else None
    shown = [f"{name} {versions[name]}" for name in MADE_WITH if name in versions]
    framework, python = (_quoted(str(about.get(name) or "unknown")) for name in ("framework", "python"))
    lines = [
        f"- framework: {framework}, Python {python}",
        f"- versions: {_quoted(', '.join(shown) or 'unknown')}",
        f"- device: {_quoted(str(device or 'unknown'))}",
        f"- commit of qwen-from-scratch: {_quoted(str(about.get('git_commit') or 'unknown'))}",
    ]
    return ["## Made with", "", *lines, ""]


def _quoted(text: str) -> str:
    """A text as a code span, in which nothing is markup."""
    shown = short(text, LONGEST)
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown[:1] in ("`", " ", "") or shown[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
