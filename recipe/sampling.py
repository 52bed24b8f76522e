"""How a token is chosen, how a batch of prompts is padded, and when a row stops; the same for both frameworks.

A framework brings `start(batch, options)`, which fills the cache and returns `advance`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recipe.config import ModelConfig, check_types, require

# Prompts and caches are padded to whole multiples of this many tokens, so that few lengths are compiled. Short prompts
# are padded to multiples of a quarter of it, because padding is computed like the rest.
LENGTH_STEP = 64

# New tokens come in chunks of 1, 2, 4 ... up to this many: the first at once, the later ones without much waiting.
CHUNK = 32

COLDEST = 2.0**-126
"""Lower temperatures count as this one, float32's smallest normal number; only what ties with the largest is drawn."""
NO_TOKEN = -1
"""Stands for the token that logits of NaN or infinity do not choose."""


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose the next token, and when to stop."""

    max_new_tokens: int = 100
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the largest (greedy)."""
    top_k: int = 0
    """Keep the k largest logits, and what ties with the smallest of them; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach p, and what ties with its smallest; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this times as probable as the most probable one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occur in prompt or new text; 1 does nothing."""
    seed: int = 0
    """Seeds the Gumbel noise: the same seed gives the same text in both frameworks."""
    samples: int = 1
    """Continuations of each prompt; the first one is what a single one would be."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text; they are not returned."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; it is cut before the first one."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.max_new_tokens > 0, f"max_new_tokens={self.max_new_tokens} must be at least 1; choose e.g. 100.")
        require(
            0 <= self.temperature < float("inf"),
            f"temperature={self.temperature} must be a finite number of at least 0; 0 is greedy.",
        )
        require(self.top_k >= 0, f"top_k={self.top_k} must be at least 0; 0 keeps every token.")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 keeps every token.")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1]; 0 keeps every token.")
        require(
            0 < self.repetition_penalty < float("inf"),
            f"repetition_penalty={self.repetition_penalty} must be a finite number above 0; 1 penalises nothing.",
        )
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32); choose e.g. 0.")
        require(self.samples > 0, f"samples={self.samples} must be at least 1; choose e.g. 1.")
        require("" not in self.stop, "a stop string is empty and would end every text at once; leave it out.")

    @property
    def choice(self) -> tuple[tuple[str, float], ...]:
        """The keyword arguments of `sample_token`, hashable."""
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
        return tuple((name, getattr(self, name)) for name in names)


@dataclass(frozen=True)
class Batch:
    """P prompts, padded at the end, and the B = P * samples rows that continue them, samples of a prompt together."""

    tokens_PT: np.ndarray
    slots: int
    """S, the length of the cache: room for the longest prompt and all new tokens."""
    token_B: np.ndarray
    """Each prompt's last token: the first one that decoding reads."""
    position_B: np.ndarray
    """Where it stands in its row."""
    sample_B: list[int]
    """Which of its prompt's samples a row is."""
    seen_BV: np.ndarray
    """Which tokens occur in the row."""


def make_batch(config: ModelConfig, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> Batch:
    """The batch of these prompts; ValueError for one that is empty or does not fit."""
    require(len(prompts) > 0, "there is no prompt; give at least one.")
    for prompt in prompts:
        check_context(config, len(prompt), options)
    longest = max(map(len, prompts))
    slots = min(_round_up(longest + options.max_new_tokens, LENGTH_STEP), config.max_position_embeddings)
    padded = _round_up(longest, LENGTH_STEP if longest > LENGTH_STEP else LENGTH_STEP // 4)
    tokens_PT = np.zeros((len(prompts), min(padded, slots)), np.int32)
    seen_PV = np.zeros((len(prompts), config.vocab_size), bool)
    for index, prompt in enumerate(prompts):
        tokens_PT[index, : len(prompt)] = prompt
        seen_PV[index, prompt] = True
    last_P = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    token_P = tokens_PT[np.arange(len(prompts)), last_P]
    token_B, position_B, seen_BV = (np.repeat(x, options.samples, axis=0) for x in (token_P, last_P, seen_PV))
    return Batch(tokens_PT, slots, token_B, position_B, [*range(options.samples)] * len(prompts), seen_BV)


def _round_up(length: int, step: int) -> int:
    return math.ceil(length / step) * step


NOT_FINITE = (
    "the logits are not finite, so they choose no token; look for NaN in the weights with "
    "`python -m harness.commands.checkpoint inspect FOLDER`, or take dtype float32 if they overflow."
)

Advance = Callable[[int, np.ndarray], np.ndarray]
"""`advance(count, done_B)` computes the next `count` tokens of each row (B, count), NO_TOKEN where logits choose none.
What a done row gets means nothing; once all rows are done there may be fewer columns."""


class Generator:
    """`generate(tokens, options)` iterates over new tokens; `batch` and `stream` take many prompts at once.

    A row's tokens depend on its prompt, the options, the seed and its number among the samples of that prompt, and on
    nothing else in the batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        start: Callable[[Batch, SamplingOptions], Advance],
        forward: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """`forward(tokens_PT)` gives the logits (P, T, V) of what follows each token, if the framework offers it."""
        self.config, self.start, self.forward = config, start, forward

    def __call__(self, tokens: Sequence[int], options: SamplingOptions) -> Iterator[int]:
        """New tokens after this prompt, as they come; stop strings need `text_pieces`."""
        require(options.samples == 1, f"samples={options.samples} are no single sequence; use generate.batch.")
        return (token for _, token in self.stream([tokens], _without_strings(options)))

    def batch(self, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[list[int]]:
        """New tokens of each prompt's samples: those of the first prompt, then those of the second ..."""
        rows: list[list[int]] = [[] for _ in range(len(prompts) * options.samples)]
        for row, token in self.stream(prompts, _without_strings(options)):
            rows[row].append(token)
        return rows

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (T, V), float32, of what follows each of these tokens and those before it; UserError unless they are
        the model's tokens, and fit."""
        rows, limit = self.config.vocab_size, self.config.max_position_embeddings
        require(
            0 < len(tokens) <= limit,
            f"{len(tokens)} tokens are no sequence for the model; give 1 to max_position_embeddings={limit}.",
        )
        strange = [token for token in tokens if not 0 <= token < rows]
        require(not strange, f"token {strange[:1]} is none of the model's {rows}; give numbers from 0 to {rows - 1}.")
        assert self.forward is not None, "asked of a framework that offers it"
        # Few lengths are compiled; what stands after a token has no part in its row.
        tokens_PT = np.zeros((1, min(_round_up(len(tokens), LENGTH_STEP), limit)), np.int32)
        tokens_PT[0, : len(tokens)] = tokens
        return np.array(self.forward(tokens_PT)[0, : len(tokens)], np.float32)

    def stream(
        self, prompts: Sequence[Sequence[int]], options: SamplingOptions, done_B: np.ndarray | None = None
    ) -> Iterator[tuple[int, int]]:
        """(row, new token) step by step; a row ends at a stop token, or when the caller sets its flag in `done_B`.

        Raises UserError where logits are not finite.
        """
        batch = make_batch(self.config, prompts, options)
        if done_B is None:
            done_B = np.zeros(len(batch.token_B), bool)
        advance = self.start(batch, options)
        left, count = options.max_new_tokens, 1
        while left and not done_B.all():
            count = min(count, left, CHUNK)
            for token_B in advance(count, done_B).T.tolist():
                for row, token in enumerate(token_B):
                    if not done_B[row]:
                        require(token != NO_TOKEN, NOT_FINITE)
                        if token in options.stop_ids:
                            done_B[row] = True
                        else:
                            yield row, token
            left, count = left - count, 2 * count


def _without_strings(options: SamplingOptions) -> SamplingOptions:
    require(not options.stop, f"stop={options.stop} are strings, and here are only tokens; use text_pieces.")
    return options


def check_context(config: ModelConfig, prompt_tokens: int, options: SamplingOptions) -> None:
    """Raise ValueError for an empty prompt, or one that with its continuation exceeds the model's positions."""
    require(prompt_tokens > 0, "the prompt has no tokens; give at least one character.")
    total, limit = prompt_tokens + options.max_new_tokens, config.max_position_embeddings
    require(
        total <= limit,
        f"prompt ({prompt_tokens}) + max_new_tokens ({options.max_new_tokens}) = {total} tokens exceed "
        f"max_position_embeddings={limit}; shorten the prompt or lower --max-new-tokens.",
    )
