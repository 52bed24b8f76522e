"""New tokens as text: whole characters alone, cut before stop strings."""

from collections.abc import Iterator, Sequence

import numpy as np

from recipe.sampling import Generator, SamplingOptions
from recipe.tokenizer import Tokenizer


class TextStream:
    """Turns the new tokens of a row into text: whole characters alone, and nothing from a stop string on."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        # Text of tokens[begin:shown] is out already; it is decoded again because a token's text may depend on the last.
        self.tokens, self.begin, self.shown = list(prompt), 0, len(prompt)
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that this token makes certain, perhaps none."""
        self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.begin : self.shown])
        text = self.tokenizer.decode(self.tokens[self.begin :])
        # A character may span several tokens: wait until it is whole.
        if text.endswith("\ufffd"):
            return ""
        self.begin, self.shown = self.shown, len(self.tokens)
        self.held += text[len(before) :]
        cuts = [self.held.index(string) for string in self.stop if string in self.held]
        if cuts:
            self.held, self.stopped = self.held[: min(cuts)], True
            return self.flush()
        # What may be the beginning of a stop string waits for the next token.
        waiting = max(
            (n for string in self.stop for n in range(1, len(string)) if self.held.endswith(string[:n])), default=0
        )
        certain, self.held = self.held[: len(self.held) - waiting], self.held[len(self.held) - waiting :]
        return certain

    def flush(self) -> str:
        """The text that was held back, now that no more tokens come."""
        held, self.held = self.held, ""
        return held


def text_pieces(
    generate: Generator, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], options: SamplingOptions
) -> Iterator[tuple[int, str]]:
    """(row, piece of new text) as it comes, cut before stop strings; rows as in `Generator.batch`."""
    streams = [TextStream(tokenizer, prompt, options.stop) for prompt in prompts for _ in range(options.samples)]
    done_B = np.zeros(len(streams), bool)
    for row, token in generate.stream(prompts, options, done_B):
        yield row, streams[row].push(token)
        done_B[row] |= streams[row].stopped
    for row, stream in enumerate(streams):
        yield row, stream.flush()
