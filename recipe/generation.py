"""Sampling options, their command line, and the prompt loop; the decoding itself is each framework's `generate.py`."""

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from recipe import cli
from recipe.checkpoint import find_weights, load_folder
from recipe.config import ModelConfig, PrecisionConfig, require


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose the next token, and when to stop."""

    max_new_tokens: int = 100
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the largest (greedy)."""
    top_k: int = 0
    """Keep the k largest logits; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach p; 1 keeps all."""
    seed: int = 0
    """Seeds the Gumbel noise: the same seed gives the same text in both frameworks."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text; they are not returned."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, f"max_new_tokens={self.max_new_tokens} must be at least 1; choose e.g. 100.")
        require(
            0 <= self.temperature < float("inf"),
            f"temperature={self.temperature} must be a finite number of at least 0; 0 is greedy.",
        )
        require(self.top_k >= 0, f"top_k={self.top_k} must be at least 0; 0 keeps every token.")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 keeps every token.")
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32); choose e.g. 0.")


@dataclass(frozen=True)
class GenerateCommand:
    """Generate text from a checkpoint."""

    checkpoint: str
    """Run folder (its best weights are taken) or Hugging Face weights folder with a tokenizer.json."""
    prompt: str = ""
    """Text to continue; without it you are asked for one after another."""
    max_new_tokens: int = 100
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the largest (greedy)."""
    top_k: int = 0
    """Keep the k largest logits; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach p; 1 keeps all."""
    seed: int = 0
    """The same seed gives the same text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    interactive: bool = False
    """Ask for one prompt after another until an empty line."""


def check_context(config: ModelConfig, prompt_tokens: int, options: SamplingOptions) -> None:
    """Raise ValueError for an empty prompt, or one that with its continuation exceeds the model's positions."""
    require(prompt_tokens > 0, "the prompt has no tokens; give at least one character.")
    total, limit = prompt_tokens + options.max_new_tokens, config.max_position_embeddings
    require(
        total <= limit,
        f"prompt ({prompt_tokens}) + max_new_tokens ({options.max_new_tokens}) = {total} tokens exceed "
        f"max_position_embeddings={limit}; shorten the prompt or lower --max-new-tokens.",
    )


def run_command(module: str, make_generator: Callable[..., Callable[..., Iterable[int]]]) -> int:
    """`python -m MODULE --checkpoint ... --prompt ...`: returns the exit code.

    `make_generator(config, precision, weights)` returns a function from (tokens, options) to new tokens.
    """

    def main() -> None:
        command = cli.parse(
            GenerateCommand, sys.argv[1:], prog=f"python -m {module}", description="Generate text from a checkpoint."
        )
        generate_text(command, make_generator)

    return cli.run(main)


def generate_text(command: GenerateCommand, make_generator: Callable[..., Callable[..., Iterable[int]]]) -> None:
    """Print the continuation of the prompt token by token, or of each prompt typed in."""
    from recipe.tokenizer import load_tokenizer

    folder = find_weights(command.checkpoint)
    tokenizer = load_tokenizer(folder)
    config, weights = load_folder(folder)
    require(
        tokenizer.vocab_size <= config.vocab_size,
        f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size} rows; "
        "use the tokenizer.json the weights came with.",
    )
    shared = {field.name for field in dataclasses.fields(SamplingOptions)} & set(vars(command))
    options = SamplingOptions(**{name: getattr(command, name) for name in shared}, stop_ids=(tokenizer.eos_id,))
    generate = make_generator(config, PrecisionConfig(compute=command.dtype), weights)

    def answer(prompt: str) -> None:
        tokens, shown = tokenizer.encode(prompt), prompt
        check_context(config, len(tokens), options)
        print(prompt, end="", flush=True)
        for token in generate(tokens, options):
            tokens.append(token)
            text = tokenizer.decode(tokens)
            # A character may span several tokens: wait until it is whole.
            if not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print()

    if command.prompt and not command.interactive:
        answer(command.prompt)
        return
    while prompt := _ask():
        try:
            answer(prompt)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def _ask() -> str:
    """The next line typed, or piped in; empty at the end."""
    try:
        return input("prompt (empty line ends) > " if sys.stdin.isatty() else "")
    except EOFError:
        return ""
