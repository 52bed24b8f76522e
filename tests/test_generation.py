"""What both frameworks share of generation: batches, chunks, stop strings, text as it comes. No framework is needed."""

import dataclasses

import numpy as np
import pytest

from harness.text import TextStream, text_pieces
from recipe.config import ModelConfig
from recipe.sampling import CHUNK, Generator, SamplingOptions, make_batch
from recipe.tokenizer import train_bpe

CONFIG = ModelConfig(vocab_size=400, max_position_embeddings=128)
TOKENIZER = train_bpe(["the quick brown fox jumps over the lazy dog"] * 3, 300)


class Script:
    """A framework's `start` that writes given tokens, row by row, and records what it was asked for."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows, self.counts, self.done = rows, [], []

    def __call__(self, batch, options):
        written = 0

        def advance(count, done_B):
            nonlocal written
            self.counts.append(count)
            self.done.append(done_B.tolist())
            written += count
            return np.array([row[written - count : written] for row in self.rows])

        return advance


def write(texts: list[str], tail: int = 60) -> Script:
    """A script of these texts, each followed by the word end over and over."""
    return Script(*[(TOKENIZER.encode(text) + TOKENIZER.encode(" end") * tail)[:tail] for text in texts])


def read(script: Script, options: SamplingOptions, prompt: str = "the") -> list[str]:
    """The texts of a script's rows, from pieces."""
    generate = Generator(CONFIG, script)
    texts = [""] * len(script.rows)
    for row, piece in text_pieces(generate, TOKENIZER, [TOKENIZER.encode(prompt)] * len(texts), options):
        assert "\ufffd" not in piece
        texts[row] += piece
    return texts


def test_prompts_are_padded_at_the_end_and_samples_stand_together():
    options = SamplingOptions(max_new_tokens=60, samples=2)
    batch = make_batch(CONFIG, [[5, 6, 7], [9]], options)
    assert batch.tokens_PT.shape == (2, 16) and batch.slots == 64
    assert batch.tokens_PT[:, :4].tolist() == [[5, 6, 7, 0], [9, 0, 0, 0]]
    assert batch.token_B.tolist() == [7, 7, 9, 9] and batch.position_B.tolist() == [2, 2, 0, 0]
    assert batch.sample_B == [0, 1, 0, 1]
    # The padding is token 0 and was never seen.
    assert [np.flatnonzero(seen_V).tolist() for seen_V in batch.seen_BV] == [[5, 6, 7]] * 2 + [[9]] * 2


@pytest.mark.parametrize(("length", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_short_prompts_are_padded_less(length, padded):
    config = dataclasses.replace(CONFIG, max_position_embeddings=1024)
    batch = make_batch(config, [[1], [1] * length], SamplingOptions(max_new_tokens=150))
    assert batch.tokens_PT.shape == (2, padded) and batch.slots == (256 if length > 42 else 192)


def test_the_cache_never_exceeds_the_models_positions():
    batch = make_batch(CONFIG, [[1] * 70], SamplingOptions(max_new_tokens=58))
    assert batch.slots == 128 == batch.tokens_PT.shape[1]
    with pytest.raises(ValueError, match="max_position_embeddings=128"):
        make_batch(CONFIG, [[1], [1] * 70], SamplingOptions(max_new_tokens=59))
    with pytest.raises(ValueError, match="no prompt"):
        make_batch(CONFIG, [], SamplingOptions())


def test_chunks_double_up_to_the_limit_and_end_with_the_tokens_asked_for():
    script = Script([3] * 100)
    assert list(Generator(CONFIG, script)([1], SamplingOptions(max_new_tokens=100))) == [3] * 100
    assert script.counts == [1, 2, 4, 8, 16, CHUNK, CHUNK, 5]


def test_a_row_that_is_done_is_left_alone_and_the_rest_goes_on():
    script = Script([3, 9, 4, 4, 4, 4, 4], [3, 3, 3, 3, 9, 4, 4])
    options = SamplingOptions(max_new_tokens=100, stop_ids=(9,))
    assert Generator(CONFIG, script).batch([[1], [2]], options) == [[3], [3] * 4]
    assert script.done == [[False, False], [False, False], [True, False]]
    assert script.counts == [1, 2, 4], "when all rows are done, nothing more is asked for"


def test_text_comes_as_soon_as_its_characters_are_whole():
    text = " fox \U0001f98a jumps"
    stream = TextStream(TOKENIZER, TOKENIZER.encode("the"))
    tokens = TOKENIZER.encode(text)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == text and stream.flush() == ""
    fox = next(index for index, piece in enumerate(pieces) if "\U0001f98a" in piece)
    assert pieces[fox - 3 : fox] == [""] * 3, "four bytes, four tokens"


def test_text_is_cut_before_the_first_stop_string():
    options = SamplingOptions(max_new_tokens=60, stop=("lazy", " end", "jumps over"))
    texts = read(write([" quick brown fox jumps over the lazy dog", " dog"]), options)
    assert texts == [" quick brown fox ", " dog"]


def test_a_stop_string_over_several_tokens_never_shows():
    script = write([" fox jumps over the lazy"])
    generate, options = Generator(CONFIG, script), SamplingOptions(max_new_tokens=60, stop=("ps over the",))
    shown = ""
    for _, piece in text_pieces(generate, TOKENIZER, [TOKENIZER.encode("the")], options):
        shown += piece
        assert " fox jum".startswith(shown), "not even its beginning"
    assert shown == " fox jum"


def test_the_beginning_of_a_stop_string_that_goes_on_otherwise_is_text():
    options = SamplingOptions(max_new_tokens=len(TOKENIZER.encode(" fox jumps over")), stop=("over the moon",))
    assert read(write([" fox jumps over"]), options) == [" fox jumps over"]


def test_a_stop_string_ends_its_row_alone():
    script = write([" fox", " lazy dog jumps over the fox"])
    options = SamplingOptions(max_new_tokens=60, stop=("fox",))
    assert read(script, options) == [" ", " lazy dog jumps over the "]
    assert script.counts[-1] < 32, "and nothing is computed once all rows are done"


def test_tokens_alone_refuse_stop_strings():
    generate = Generator(CONFIG, write(["fox"]))
    for call in (lambda o: list(generate([1], o)), lambda o: generate.batch([[1]], o)):
        with pytest.raises(ValueError, match="text_pieces"):
            call(SamplingOptions(stop=("x",)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("min_p", 1.1), ("min_p", -0.1), ("repetition_penalty", 0.0), ("repetition_penalty", float("nan")),
     ("samples", 0), ("stop", ("a", ""))],
)  # fmt: skip
def test_bad_options_are_refused(field, value):
    with pytest.raises(ValueError, match=field if field != "stop" else "stop string is empty"):
        dataclasses.replace(SamplingOptions(), **{field: value})


RANDOM = np.random.default_rng(0)
WORDS = train_bpe(["the quick brown fox é ü 你好 \U0001f98a ทดสอบ"] * 5, 330)
SEQUENCES = [RANDOM.integers(0, WORDS.vocab_size, RANDOM.integers(1, 40)).tolist() for _ in range(300)]
"""Random tokens, half of which end inside a character or hold bytes that are none."""


def test_pieces_and_what_was_held_back_are_the_text_that_is_decoded():
    cut = 0
    for tokens in SEQUENCES:
        stream = TextStream(WORDS, [])
        assert "".join(map(stream.push, tokens)) + stream.flush() + stream.flush() == WORDS.decode(tokens)
        cut += WORDS.decode(tokens).endswith("\ufffd")
    assert cut > 50, "these are what flush is about"


def test_a_prompt_of_tokens_may_end_inside_a_character():
    for tokens, split in zip(SEQUENCES, RANDOM.integers(0, 40, len(SEQUENCES)), strict=True):
        stream = TextStream(WORDS, tokens[:split])
        new = "".join(map(stream.push, tokens[split:])) + stream.flush()
        before, whole = WORDS.decode(tokens[:split]), WORDS.decode(tokens)
        same = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        assert new == whole[same:]


def test_a_stop_string_is_found_wherever_it_stands():
    for tokens, place in zip(SEQUENCES, RANDOM.random(len(SEQUENCES)), strict=True):
        text = WORDS.decode(tokens)
        begin = int(place * len(text))
        stop = text[begin : begin + 2]
        stream, shown = TextStream(WORDS, [], (stop,) if stop else ()), ""
        for token in tokens:
            shown += stream.push(token)
            if stream.stopped:
                break
        assert shown + stream.flush() == (text[: text.index(stop)] if stop else text)
