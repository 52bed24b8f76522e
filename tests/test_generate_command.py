"""The generate command as people meet it: prompts from shells and pipes, terminals, a folder's own settings."""

import io
import json
import sys

import numpy as np
import pytest

from harness.commands.generate import run_command
from harness.folders import save_folder
from recipe.config import ModelConfig
from recipe.params import init_params
from recipe.sampling import Generator
from recipe.tokenizer import load_tokenizer, train_bpe

MODEL = ModelConfig(
    vocab_size=384, hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=6, max_position_embeddings=128,
)  # fmt: skip
ANSWER = " the fox é"
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog é"] * 3, 300)
    save_folder(tmp_path / "model", MODEL, init_params(MODEL, 0), tokenizer)
    return tmp_path / "model"


@pytest.fixture
def command(folder, monkeypatch, capfd):
    """Call the command with a generator that writes ANSWER and records what it was asked."""
    asked = []

    def make_generator(config, precision, weights):
        tokens = load_tokenizer(folder).encode(ANSWER)

        def start(batch, options):
            asked.append((batch.tokens_PT, batch.position_B, options))
            written = iter([*tokens, *[0] * 200])
            return lambda count, done_B: np.array([[next(written) for _ in range(count)]] * len(batch.token_B))

        return Generator(config, start)

    def call(*arguments, given=b"", encoding="utf-8"):
        monkeypatch.setattr("sys.argv", ["generate", "--checkpoint", str(folder), *arguments])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding=encoding, newline="\n"))
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            code = run_command("generate", make_generator)
            out.flush()
        return code, out.buffer.getvalue().decode(encoding), capfd.readouterr().err

    call.asked = asked
    return call


def test_a_prompt_that_no_encoding_has_is_one_line(command):
    for prompt in ("caf\udce9", "\ud83e", "a\udfff"):
        code, out, err = command("--prompt", "fine", "--prompt", prompt)
        assert code == 2 and out == "" and err.count("\n") == 1 and "half of a character" in err


PIPES = {
    b"the\nfox\n": (0, ["the", "fox"]),
    b"the\r\nfox\r\n\r\nnever\r\n": (0, ["the", "fox"]),
    b"the": (0, ["the"]),
    b"": (0, []),
    b"the\ncaf\xe9\nfox\n": (2, ["the", "fox"]),
    "\ud83e\nfox\n".encode("utf-8", "surrogatepass"): (2, ["fox"]),
    b"\xff\xfe\n": (2, []),
    b"the \x00 \x1b\n": (0, ["the \x00 \x1b"]),
}


@pytest.mark.parametrize("given", PIPES)
def test_prompts_come_through_a_pipe(command, given):
    code, prompts = PIPES[given]
    ended, out, err = command(given=given)
    assert (ended, out) == (code, "".join(f"{prompt}{ANSWER}\n" for prompt in prompts))
    assert err.count("\n") == (code == 2) == err.count("half of a character")


def test_a_terminal_that_cannot_show_a_character_shows_a_question_mark(command):
    code, out, err = command("--prompt", "the", encoding="ascii")
    assert (code, out, err) == (0, "the the fox ?\n", "")


def test_a_prompt_like_a_flag_is_told_how_it_is_written(command):
    code, _, err = command("--prompt", "-item")
    assert code == 2 and "write --prompt=-item." in err and err.count("\n") == 1
    assert command("--prompt=-item")[:2] == (0, f"-item{ANSWER}\n")


def test_a_folder_generates_as_its_makers_say_and_flags_override(command, folder):
    chosen = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 3, "stop_strings": ["fox"], "eos_token_id": [7, 5]}
    (folder / "generation_config.json").write_text(json.dumps(chosen))
    assert command("--prompt", "a", "--top_k", "4", "--stop", "x")[:2] == (0, "a the \n")
    options = command.asked[-1][2]
    assert (options.temperature, options.top_k, options.max_new_tokens) == (0.6, 4, 3)
    assert options.stop == ("fox", "x") and options.stop_ids == (0, 5, 7)
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    command("--prompt", "a")
    assert command.asked[-1][2].temperature == 0.0
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    code, _, err = command("--prompt", "a")
    assert code == 2 and "num_beams=4" in err and err.count("\n") == 1


def test_a_prompt_begins_as_its_tokenizer_begins_texts_and_a_rendered_chat_does_not(command, folder):
    values = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": BOS}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    first = []
    for arguments in (("--prompt", "the"), ("--chat",)):
        assert command(*arguments, given=b"the\n")[0] == 0
        first.append(int(command.asked[-1][0][0, 0]))
    assert first == [1, load_tokenizer(folder).encode("the")[0]]


def test_a_turn_that_a_template_refuses_is_said_and_the_talk_goes_on(command, folder):
    (folder / "chat_template.jinja").write_text("{{ 1 / (messages[-1].content | length - 1) }}")
    code, out, err = command("--chat", given=b"xx\nx\nxxx\n")
    assert code == 2 and out == f"{ANSWER}\n" * 2 and err.count("\n") == 1 and "ZeroDivisionError" in err
    assert sys.stdin.closed is False
