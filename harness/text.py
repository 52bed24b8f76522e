"""New tokens as text: whole characters alone, cut before stop strings."""

from collections.abc import Iterator, Sequence

import numpy as np

from recipe.sampling import Generator, SamplingOptions
from recipe.tokenizer import Tokenizer


class TextStream:
    """Turns the new tokens of a row into text: whole characters alone until the end, and nothing from a stop string on.

    All pieces and `flush` together are the text that the tokenizer decodes, cut before the first stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        # Text of tokens[begin:shown] is out already; it is decoded again because a token's text may depend on the last.
        self.tokens, self.begin, self.shown = list(prompt), 0, len(prompt)
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that this token makes certain, perhaps none."""
        self.tokens.append(token)
        text, whole = self._new()
        if not whole:
            return ""
        self.begin, self.shown = self.shown, len(self.tokens)
        self._hold(text)
        # What may be the beginning of a stop string waits for the next token.
        waiting = max(
            (n for string in self.stop for n in range(1, len(string)) if self.held.endswith(string[:n])), default=0
        )
        certain = len(self.held) - (0 if self.stopped else waiting)
        piece, self.held = self.held[:certain], self.held[certain:]
        return piece

    def flush(self) -> str:
        """The text that was held back, now that no more tokens come; half a character is U+FFFD, as when decoded."""
        if not self.stopped:
            self._hold(self._new()[0])
        held, self.held, self.shown = self.held, "", len(self.tokens)
        return held

    def _new(self) -> tuple[str, bool]:
        """Text of the tokens that are not shown yet, and whether it ends with a whole character: one may span several
        tokens."""
        before = self.tokenizer.decode(self.tokens[self.begin : self.shown])
        text = self.tokenizer.decode(self.tokens[self.begin :])
        # A prompt of tokens may end inside a character, which new tokens make whole.
        shared = len(before)
        if before.endswith("\ufffd"):
            shared = next((n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), shared)
        return text[shared:], not text.endswith("\ufffd")

    def _hold(self, text: str) -> None:
        """Add to the text held back, and cut it before the first stop string."""
        self.held += text
        cuts = [self.held.index(string) for string in self.stop if string in self.held]
        if cuts:
            self.held, self.stopped = self.held[: min(cuts)], True


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
