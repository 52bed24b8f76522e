"""Python's door, as far as it has no framework: configurations, and a model that generates. docs/python.md shows it.

`jax_impl/api.py` and `torch_ref/api.py` have the same names and add what trains and computes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness import generation_config
from harness.config_file import read_config_file
from harness.configure import begun_from
from harness.folders import find_weights, load_config, load_folder, steadily
from harness.text import text_pieces
from recipe.chat import ChatTemplate
from recipe.config import Dtype, PrecisionConfig, RunConfig, require
from recipe.params import param_counts
from recipe.presets import changed, nearest_fields
from recipe.reading import short
from recipe.sampling import Generator, SamplingOptions
from recipe.tokenizer import load_tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text to go on with, token ids, or the messages of a chat, each with `role` and `content`."""
SETTINGS = [field.name for field in dataclasses.fields(SamplingOptions) if field.name != "stop_ids"]
"""Keyword arguments of `LanguageModel.generate` and its like; which tokens end a text is the tokenizer's to say."""


def configuration(framework: str, preset: str, file: str, changes: Mapping[str, Any]) -> RunConfig:
    """What `make_config` of a framework returns: the run to resume, or the preset, the file's fields and the weights to
    begin with, and the changes over all."""
    start = {name: str(changes.get(name, "")) for name in ("resume", "init")}
    read = read_config_file(file) if file else None
    config, _ = begun_from(framework, preset=preset, file=read, **start)
    asked = {name: value for name, value in changes.items() if name not in start}
    return changed(config, asked | ({"preset": preset} if preset else {}))


class LanguageModel:
    """A model and its tokenizer, to generate text with and to ask for logits; `load` makes one.

    Every method raises `UserError` for a prompt or a setting that cannot be, and for logits that are not finite.
    """

    def __init__(
        self,
        folder: Path,
        make_generator: Callable[..., Generator],
        *,
        dtype: Dtype = "float32",
        template: ChatTemplate | None = None,
    ) -> None:
        """Read a weights folder; `make_generator(config, precision, weights)` is a framework's."""
        self.folder, self.dtype = Path(folder), dtype
        self.tokenizer = load_tokenizer(folder)
        rows = load_config(folder).vocab_size
        require(
            self.tokenizer.vocab_size <= rows,
            f"{folder}: the tokenizer's ids need {self.tokenizer.vocab_size} rows, the model has {rows}; use the "
            "tokenizer.json the weights came with.",
        )
        self.config, weights = load_folder(folder)
        stop_ids = generation_config.stop_ids(folder, self.tokenizer)
        self.defaults = SamplingOptions(**generation_config.defaults(folder) | {"stop_ids": stop_ids})
        """The sampling that the folder's generation_config.json asks for."""
        self.generator = make_generator(self.config, PrecisionConfig(compute=dtype), weights)
        if template is not None:
            self.template = template

    def __repr__(self) -> str:
        return f"<model {self.folder}: {param_counts(self.config).total:,} parameters, {self.dtype}>"

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The folder's chat template; UserError if it has none."""
        return ChatTemplate(self.folder)

    def generate(self, prompts: str | Sequence[str], **settings: Any) -> str | list[str]:
        """The text after a prompt, or a list of texts for a list of prompts or for several `samples`: those of the
        first prompt, then those of the second ...

        Settings are `max_new_tokens`, `temperature` (0 is greedy), `top_k`, `top_p`, `min_p`, `repetition_penalty`,
        `seed`, `samples` and `stop` (a string or several, before which a text is cut); what is not given is as the
        folder's generation_config.json says. The same seed gives the same text in both frameworks.
        """
        options = self.options(**settings)
        given = [prompts] if isinstance(prompts, str) else prompts
        strange = [prompt for prompt in given if not isinstance(prompt, str)]
        require(not strange, f"the prompt {short(repr(strange[:1]))} is no text; `stream` also takes token ids.")
        texts = [""] * len(given) * options.samples
        for row, piece in self.pieces([self.tokens(prompt) for prompt in given], options):
            texts[row] += piece
        return texts[0] if isinstance(prompts, str) and options.samples == 1 else texts

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """The same text in pieces, as they come; together they are what `generate`, or `chat`, returns."""
        options = self.options(**settings)
        require(options.samples == 1, f"samples={options.samples} are no single text to stream; leave it out.")
        return (piece for _, piece in self.pieces([self.tokens(prompt)], options) if piece)

    def chat(self, messages: str | Sequence[Mapping[str, str]], **settings: Any) -> str:
        """The assistant's answer to the messages, each with `role` and `content`, by the folder's own template; a text
        is one message of the user's. UserError if the folder has no template."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        require(len(turns) > 0, "there is no message to answer; give at least one, with role and content.")
        return "".join(self.stream(turns, **settings))

    def logits(self, prompt: Prompt) -> np.ndarray:
        """Logits (T, V), float32: row t, softmax taken, is the distribution of the token after the first t + 1 of the
        prompt's T, so that the last row is what generation draws from. A text counts as `tokens` cuts it."""
        return self.generator.logits(self.tokens(prompt))

    def loss(self, prompt: Prompt) -> float:
        """Mean loss of the prompt's second token to its last, in nats per token."""
        tokens = self.tokens(prompt)
        require(len(tokens) > 1, f"{len(tokens)} token has no next one to predict; give at least two.")
        logits_TV = self.generator.logits(tokens)[:-1].astype(np.float64)
        logits_TV -= logits_TV.max(axis=1, keepdims=True)
        chosen_T = np.take_along_axis(logits_TV, np.array(tokens[1:])[:, None], axis=1)[:, 0]
        return float(np.mean(np.log(np.exp(logits_TV).sum(axis=1)) - chosen_T))

    def tokens(self, prompt: Prompt) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts around one to go on with, of a chat by its
        template, or the ids that are given."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(prompt)
        messages = [part for part in prompt if isinstance(part, Mapping)]
        if messages and len(messages) == len(prompt):
            return self.tokenizer.encode(self.template.render(messages))
        ids = [int(part) for part in prompt if isinstance(part, int | np.integer)]
        require(
            len(ids) == len(prompt),
            f"the prompt {short(repr(prompt))} is no text, no token ids and no messages; give one of the three.",
        )
        return ids

    def options(self, **settings: Any) -> SamplingOptions:
        """The folder's own sampling with these settings; UserError for one that is none or of no use."""
        for name in settings:
            near = nearest_fields(name, SETTINGS)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(SETTINGS)}."
            require(name in SETTINGS, f"{name} is no setting of generation; {hint}")
        if "stop" in settings:
            stop = settings["stop"]
            settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        return dataclasses.replace(self.defaults, **settings)

    def pieces(self, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> Iterator[tuple[int, str]]:
        """(row, piece of new text) as it comes; rows are those of the first prompt's samples, then the second's."""
        return text_pieces(self.generator, self.tokenizer, prompts, options)


def open_model(
    name: str | Path, make_generator: Callable[..., Generator], dtype: Literal["float32", "bfloat16"]
) -> LanguageModel:
    """What `load` of a framework returns, while a run may be replacing the folder."""
    require(dtype in ("float32", "bfloat16"), f"dtype={dtype!r} is none to generate in; choose float32 or bfloat16.")
    return steadily(find_weights(name), lambda folder: LanguageModel(folder, make_generator, dtype=dtype))
