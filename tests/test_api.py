"""Python's door without a framework: configurations, what a model is asked, what a run came to, and signals."""

import dataclasses
import inspect
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from harness.api import SETTINGS, LanguageModel, configuration, open_model
from harness.configure import ready
from harness.failures import RunFailed, exit_code
from harness.folders import save_folder
from harness.result import read_result
from recipe.config import ModelConfig, RunConfig, UserError, to_dict
from recipe.params import init_params, param_counts
from recipe.presets import seed, tiny
from recipe.sampling import Generator, SamplingOptions
from recipe.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    vocab_size=384, hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=6, max_position_embeddings=128,
)  # fmt: skip
ANSWER = " the fox é jumps"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog é"] * 3, 300)
    save_folder(folder / "best", MODEL, init_params(MODEL, 0), tokenizer)
    return folder


def logits_of(tokens_PT: np.ndarray) -> np.ndarray:
    """Logits (P, T, V) of a framework that is none: large numbers, as a softmax must bear them."""
    return 900 + 5 * np.sin(tokens_PT[..., None] * 3.0 + np.arange(MODEL.vocab_size))


def opened(folder: Path, dtype: str = "float32") -> tuple[LanguageModel, list[tuple]]:
    """A model that writes ANSWER, and what it was asked: the prompts, and the options."""
    asked = []

    def make_generator(config, precision, weights):
        assert (config, precision.compute, len(weights) > 0) == (MODEL, dtype, True)

        def start(batch, options):
            prompts = [row[: last + 1].tolist() for row, last in zip(batch.tokens_PT, batch.position_B, strict=False)]
            asked.append((prompts, options))
            written = iter([*model.tokenizer.encode(ANSWER), *[0] * 200])
            return lambda count, done_B: np.array([[next(written) for _ in range(count)]] * len(batch.token_B)).T.T

        return Generator(config, start, logits_of)

    model = open_model(folder, make_generator, dtype)
    return model, asked


def test_a_configuration_is_a_preset_and_the_changes_to_it():
    assert configuration("jax", "", "", {}) == tiny()
    assert configuration("torch", "seed", "", {"steps": 3}) == dataclasses.replace(seed(), steps=3)
    given = configuration("jax", "", "", {"model": {"dropout": 0.5}, "prompts": ["a"], "out": "x"})
    assert (given.model.dropout, given.prompts, given.out) == (0.5, ("a",), "x")
    for preset, changes, line in (
        ("tinny", {}, "did you mean tiny?"),
        ("", {"stpes": 1}, "stpes is no field of a configuration; did you mean steps?"),
        ("", {"init": "nowhere"}, "nowhere holds no config.json"),
        ("", {"resume": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(UserError, match=line.replace("?", r"\?")):
            configuration("jax", preset, "", changes)


def test_a_file_stands_between_the_preset_and_the_arguments(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("steps = 7\nbatch_size = 3\n[model]\ndropout = 0.25\n")
    given = configuration("jax", "seed", str(file), {"batch_size": 5})
    model = dataclasses.replace(seed().model, dropout=0.25)
    assert given == dataclasses.replace(seed(), steps=7, batch_size=5, model=model)
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(dataclasses.replace(given, out="x"))}))
    assert configuration("torch", "", str(tmp_path), {"steps": 8}) == dataclasses.replace(given, steps=8)
    file.write_text("stpes = 7\n")
    with pytest.raises(UserError, match=r"mine\.toml: stpes is no field of a configuration; did you mean steps\?"):
        configuration("jax", "", str(file), {})


def test_a_configuration_begins_with_the_weights_it_names(folder):
    best = str(folder / "best")
    given = configuration("jax", "", "", {"init": best, "sequence_length": 8})
    assert given.model == dataclasses.replace(MODEL, dropout=tiny().model.dropout)
    assert (given.init, given.data.tokenizer, given.sequence_length) == (best, best, 8)


def test_a_run_from_python_gets_its_folder_as_one_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ready(RunConfig(), "jax").out == str(Path("runs/tiny-jax"))
    (tmp_path / "runs/tiny-torch").mkdir(parents=True)
    (tmp_path / "runs/tiny-torch/notes").write_text("mine")
    assert ready(RunConfig(), "torch").out == str(Path("runs/tiny-torch-2"))
    with pytest.raises(FileExistsError, match="never overwrites any"):
        ready(RunConfig(out="runs/tiny-torch"), "jax")
    with pytest.raises(UserError, match="--mesh is JAX's"):
        ready(RunConfig(mesh="data=1"), "torch")


def test_a_model_writes_what_its_generator_says(folder):
    model, asked = opened(folder)
    assert repr(model) == f"<model {folder / 'best'}: {param_counts(MODEL).total:,} parameters, float32>"
    assert (model.config, model.folder) == (MODEL, folder / "best")
    assert model.generate("the") == ANSWER and "".join(model.stream("the")) == ANSWER
    prompts, options = asked[0]
    assert prompts == [model.tokenizer.encode("the")] and options == model.defaults
    assert options == SamplingOptions(stop_ids=(model.tokenizer.eos_id,))
    assert model.generate("the", stop="fox") == " the " == model.generate("the", stop=["fox", "jumps"])
    assert model.generate(["the", "fox"]) == [ANSWER] * 2 and model.generate(["the"]) == [ANSWER]
    assert model.generate("the", samples=3) == [ANSWER] * 3
    assert model.generate("the", max_new_tokens=1, top_k=4, seed=9) != ANSWER
    assert asked[-1][1] == dataclasses.replace(model.defaults, max_new_tokens=1, top_k=4, seed=9)


def test_a_model_samples_as_its_folder_says_unless_told(folder, tmp_path):
    save_folder(tmp_path, MODEL, init_params(MODEL, 0), train_bpe(["the fox"], 300))
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 20, "stop_strings": ["jumps"]}))
    model, asked = opened(tmp_path, "bfloat16")
    assert model.generate("the", top_p=0.5) == ANSWER.removesuffix("jumps")
    assert (asked[0][1].top_k, asked[0][1].top_p, asked[0][1].temperature) == (20, 0.5, 0.8)
    assert model.generate("the", stop=None) == ANSWER


def test_a_chat_goes_through_the_folders_template(folder, tmp_path):
    save_folder(tmp_path, MODEL, init_params(MODEL, 0), train_bpe(["the fox"], 300))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    model, asked = opened(tmp_path)
    few = {"max_new_tokens": 20}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert model.chat("a", **few) == ANSWER == model.chat(turns, **few) == "".join(model.stream(turns, **few))
    said = [model.tokenizer.decode(prompts[0]) for prompts, _ in asked]
    assert said == ["user: a\nassistant:"] + ["user: a\nassistant: b\nuser: c\nassistant:"] * 2
    with pytest.raises(UserError, match="there is no message to answer"):
        model.chat([])


def test_logits_and_loss_are_of_the_prompts_tokens(folder):
    model, _ = opened(folder)
    tokens = model.tokenizer.encode("the quick fox")
    assert model.tokens("the quick fox") == tokens == model.tokens(np.array(tokens))
    logits_TV = model.logits("the quick fox")
    assert (logits_TV.shape, logits_TV.dtype) == ((len(tokens), MODEL.vocab_size), np.float32)
    np.testing.assert_array_equal(logits_TV, logits_of(np.array(tokens)).astype(np.float32))
    np.testing.assert_array_equal(model.logits(tokens), logits_TV)
    # By Python's own sums, from the definition.
    exact = [[float(x) - 900 for x in row] for row in logits_TV]
    losses = [
        math.log(math.fsum(map(math.exp, row))) - row[token] for row, token in zip(exact, tokens[1:], strict=False)
    ]
    # Either side rounds each of V exponentials and sums, subtractions and a logarithm: fewer than 3 V roundings.
    bound = 3 * MODEL.vocab_size * 2.0**-53 * 900
    assert abs(model.loss("the quick fox") - math.fsum(losses) / len(losses)) <= bound


WRONG = {
    "temprature": (lambda m: m.generate("a", temprature=1.0), "temprature is no setting of generation; did you mean"),
    "far off": (lambda m: m.generate("a", zzz=1), "zzz is no setting of generation; there are max_new_tokens, "),
    "the tokenizer's": (lambda m: m.generate("a", stop_ids=(1,)), "stop_ids is no setting of generation"),
    "value": (lambda m: m.generate("a", temperature=-1.0), "temperature=-1.0 must be a finite number of at least 0"),
    "type": (lambda m: m.generate("a", top_k="4"), "top_k='4' must be a whole number"),
    "too long": (lambda m: m.generate("a", max_new_tokens=999), "exceed max_position_embeddings=128"),
    "empty": (lambda m: m.generate(""), "the prompt has no tokens"),
    "no prompt": (lambda m: m.generate([]), "there is no prompt"),
    "no text": (lambda m: m.generate([3]), r"the prompt \[3\] is no text"),
    "many to stream": (lambda m: m.stream("a", samples=2), "samples=2 are no single text to stream"),
    "half a character": (lambda m: m.logits("\ud83e"), "half of a character"),
    "no template": (lambda m: m.chat("a"), "has no chat template"),
    "floats": (lambda m: m.logits([1.5]), "is no text, no token ids and no messages"),
    "foreign token": (lambda m: m.logits([0, 384]), r"token \[384\] is none of the model's 384"),
    "negative token": (lambda m: m.logits([-1]), r"token \[-1\] is none"),
    "no tokens": (lambda m: m.logits([]), "0 tokens are no sequence"),
    "too many tokens": (lambda m: m.logits([0] * 129), "129 tokens are no sequence for the model"),
    "one token": (lambda m: m.loss([3]), "1 token has no next one to predict"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked_is_a_line(case, folder):
    ask, line = WRONG[case]
    with pytest.raises(UserError, match=line) as said:
        ask(opened(folder)[0])
    assert "\n" not in str(said.value)


def test_what_cannot_be_opened_is_a_line(folder):
    for name, dtype, line in (
        ("nowhere", "float32", "nowhere is not a folder"),
        (folder, "float16", "dtype='float16' is none to generate in; choose float32 or bfloat16"),
    ):
        with pytest.raises(UserError, match=line):
            opened(name, dtype)


def test_every_setting_is_explained():
    text = inspect.getdoc(LanguageModel.generate)
    assert SETTINGS and all(f"`{name}`" in text for name in SETTINGS)
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    for name in (*SETTINGS, "folder", "losses", "validation", "best", "best_step", "seconds", "tokens_per_second"):
        assert f"`{name}`" in page


RECORDS = [
    {"kind": "baselines", "step": 0, "uniform": 6.0},
    {"kind": "validation", "step": 0, "loss": 6.0, "accuracy": 0.0, "perplexity": 400.0},
    {"kind": "train", "step": 1, "loss": 6.0, "skipped": 0, "seconds": 9.0, "tok_s": None, "dt_ms": 9000.0},
    {"kind": "train", "step": 2, "loss": None, "skipped": 1, "seconds": 9.25, "tok_s": 400.0, "dt_ms": 250.0},
    {"kind": "validation", "step": 2, "loss": 5.5, "accuracy": 0.0, "perplexity": 245.0},
    {"kind": "resume", "step": 2},
    {"kind": "train", "step": 3, "loss": 5.0, "skipped": 1, "seconds": 10.0, "tok_s": 133.0, "dt_ms": 750.0},
    {"kind": "validation", "step": 3, "loss": None, "accuracy": 0.0, "perplexity": None},
]


def test_a_result_is_read_from_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    result = read_result(str(tmp_path))
    assert (result.folder, result.picture) == (tmp_path, tmp_path / "loss.png")
    np.testing.assert_array_equal(result.losses, [6.0, np.nan, 5.0])
    assert result.losses.dtype == np.float64
    assert (result.best, result.best_step, result.seconds) == (5.5, 2, 10.0)
    assert result.validation[:2] == ((0, 6.0), (2, 5.5)) and math.isnan(result.validation[2][1])
    assert result.tokens_per_second == (400.0 * 250 + 133.0 * 750) / 1000, "the first update compiles"
    assert repr(result) == (
        f"<run {tmp_path}: validation 5.5000 nats per token at best, after step 2; 3 updates in 10.0 s, 200 tokens/s>"
    )


def test_a_result_of_nothing_says_so(tmp_path):
    result = read_result(tmp_path)
    assert math.isnan(result.best) and (result.best_step, len(result.losses), result.seconds) == (0, 0, 0.0)
    assert result.tokens_per_second is None and repr(result).endswith("0 updates in 0.0 s>")


def test_a_failed_run_is_an_exception_with_the_commands_line(capsys):
    from harness.cli import run

    def fail():
        raise RunFailed("the loss was not finite; runs/x keeps last/")

    assert issubclass(RunFailed, RuntimeError) and exit_code(RunFailed("x")) == 1
    assert run(fail) == 1
    assert capsys.readouterr().err == "error: the loss was not finite; runs/x keeps last/\n"


STUCK = """
    import hashlib, os, signal, sys, threading, time
    from harness import interruption

    signal.signal(signal.SIGINT, signal.default_int_handler)
    interruption.TO_BEGIN = interruption.TO_END = 0.1

    def compute():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        while time.monotonic() - began < 0.5:  # calls in C, between which Python would hear
            hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))

    outer = interruption.Interruption(ends_process=sys.argv[1] == "command")
    inner = interruption.Interruption(where="while reading", ends_process=False)
    try:
        with outer, inner, inner.at_once():
            compute()
    except KeyboardInterrupt as stop:
        print(f"alive: {stop}")
"""


@pytest.mark.parametrize(("around", "code"), [("program", 0), ("command", 130)])
def test_only_a_command_ends_the_process_when_its_main_thread_hears_nothing(around, code):
    """One call in C takes about a second, the deadline is a tenth of one."""
    command = [sys.executable, "-c", textwrap.dedent(STUCK), around, str(2**21)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == code, done.stderr
    if around == "program":
        assert done.stdout == "alive: stopped by SIGINT while reading\n"
    else:
        assert (done.stdout, done.stderr) == ("", "stopped by SIGINT while reading\n")
