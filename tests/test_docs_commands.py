"""Every command that a document shows is what the program reads: held against the real parsers, and run every night."""

from pathlib import Path

import pytest

from harness.folders import save_folder
from harness.state import SLOTS, TrainingState, save_state
from recipe.config import ModelConfig, RunConfig
from recipe.params import init_params, slot_shapes
from recipe.presets import get_preset
from recipe.tokenizer import train_bpe
from tests import documented
from tests.documented import ROOT, collect, documents, problems

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
TALK = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
MODELS = ("Qwen3-0.6B", "path/to/Qwen3-0.6B", "path/to/a-chat-model")
RUNS = ("runs/mine", "runs/theirs")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory) -> Path:
    """A folder with what the documents' commands name: runs, weights, texts."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = train_bpe(["To be, or not to be"], 260)
    model = ModelConfig(vocab_size=384, **SMALL)
    weights = init_params(model, seed=0)
    slots = {slot: {} for slot in SLOTS}
    for name, shape in slot_shapes(model).items():
        slot, _, parameter = name.partition(".")
        slots[slot][parameter] = weights[parameter].reshape(shape) * 0
    for name in MODELS:
        save_folder(folder / name, model, weights, tokenizer)
        (folder / name / "chat_template.jinja").write_text(TALK, encoding="utf-8")
    for name in RUNS:
        config = RunConfig(**vars(get_preset("tiny")) | {"out": str(folder / name), "model": model})
        save_folder(folder / name / "best", model, weights, tokenizer, about={})
        state = TrainingState(config, weights, slots, updates=100, skipped=0, best=5.0, text="")
        save_state(folder / name / "last", state, tokenizer, {"framework": "jax"})
    return folder


@pytest.fixture
def reader(furnished, monkeypatch) -> Path:
    """The working folder, and the home, of who types the commands."""
    monkeypatch.chdir(furnished)
    monkeypatch.setenv("HOME", str(furnished))
    return furnished


def free_places(words: list[str]) -> list[Path]:
    """The folders of runs that a command would write and that are taken here."""
    places = [Path(word) for flag, word in zip(words, words[1:]) if flag == "--out"]
    return [place for place in places if place.is_dir()]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_its_program_reads(path, reader):
    commands, wrong = collect(path)
    for command in commands:
        taken = free_places(command.text.split())
        for place in taken:
            place.rename(f"{place}-aside")
        wrong += problems(command)
        for place in taken:
            Path(f"{place}-aside").rename(place)
    assert wrong == []


def test_the_documents_show_commands_of_every_kind():
    """The collector sees them: none of these could be lost without this test."""
    shown = [command.text for path in documents() for command in collect(path)[0]]
    expected = ["make train", "make test", "python train_jax.py --preset tiny --steps 320 --out runs/mine"]
    expected += ["python train_jax.py --data.corpus notes/ # your .txt, .md, .jsonl and .parquet files"]
    assert [text for text in expected if text not in {" ".join(text.split()) for text in shown}] == []
    for beginning in ("srun", "make parity ARGS=", "pip install -e", "python -m benchmarks.gpu", "python -m pytest"):
        assert any(text.startswith(beginning) for text in shown), beginning


PLANTED = {
    "an unknown flag": ("```\npython train_jax.py --stepz 3\n```", "--stepz is unknown"),
    "a value of another kind": ("```\npython train_jax.py --steps many\n```", "--steps many is not a whole number"),
    "a value out of range": ("```\npython -m jax_impl.generate --checkpoint runs/mine --top_p 2\n```", "top_p=2"),
    "an unknown choice": ("```\npython -m benchmarks.throughput --dtype float8\n```", "--dtype float8 is not"),
    "a flag that is missing": ("```\npython -m benchmarks.report A.jsonl --out BOTH\n```", "A.jsonl"),
    "a folder that is not there": ("```\npython train_jax.py --resume runs/nobody\n```", "runs/nobody"),
    "a missing module": ("```\npython -m harness.commands.nothing\n```", "no module harness.commands.nothing"),
    "a missing file": ("```\npython train_tensorflow.py\n```", "no file train_tensorflow.py"),
    "a missing target": ("```\nmake tea\n```", "No rule to make target 'tea'"),
    "an unread variable": ("```\nmake test ARG='-k muon'\n```", "reads no ARG"),
    "a wrong flag behind a target": ("```\nmake parity ARGS='--dtpye float64'\n```", "--dtpye is unknown"),
    "a missing extra": ("```\npip install -e '.[cuda99]'\n```", "no extra cuda99"),
    "an extra of the distribution": ("```\npip install 'qwen-from-scratch[cuda99]'\n```", "no extra cuda99"),
    "a wrong flag of pip": ("```\npip install --indx-url x torch\n```", "--indx-url"),
    "a missing test": ("```\npython -m pytest tests/test_nothing.py\n```", "no file tests/test_nothing.py"),
    "a missing mark": ("```\npython -m pytest -m slwo\n```", "no mark slwo"),
    "a wrong flag behind a launcher": (
        "<!-- not run: SLURM -->\n```\nsrun -N4 python train_jax.py --msh fsdp=8\n```",
        "--msh is unknown",
    ),
    "a launcher without a mark": ("```\nsrun -N4 python train_jax.py\n```", "mark it"),
    "a line break that the shell passes on": (
        '```\npython -m jax_impl.generate --checkpoint runs/mine --stop "\\n\\n"\n```',
        "makes no line break",
    ),
    "an argument where none is read": ("```\ncompare-models --nothing\n```", "--nothing"),
    "a slip among commands": ("```\npython train_jax.py\npytohn train_jax.py\n```", "no command: pytohn"),
    "flags of nothing": ("```\n--steps 3\n```", "flags of no command"),
    "a wrong span": ("Then `python train_jax.py --stepz\n3` trains.", "--stepz is unknown"),
    "a mark without a reason": ("<!-- not run: -->\n```\nmake test\n```", "a mark without a text"),
    "a mark with a slip": ("<!-- not rnu: needs SLURM -->\n```\nmake test\n```", "no mark"),
    "a quote that never ends": ("```\npython train_jax.py --prompts 'a\n```", "No closing quotation"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_wrong_command_is_seen(case, reader, tmp_path):
    text, expected = PLANTED[case]
    (tmp_path / "wrong.md").write_text(f"Some text.\n\n{text}\n", encoding="utf-8")
    commands, wrong = collect(tmp_path / "wrong.md")
    wrong += [problem for command in commands for problem in problems(command)]
    assert len(wrong) == 1 and expected in wrong[0], wrong


def test_marks_hold_for_what_follows_them(tmp_path):
    (tmp_path / "marks.md").write_text(
        "`make a` <!-- not run: one --> and\n`make b`\n\n<!-- small [c]: two -->\n`make c`\n<!-- names: A=x -->\n"
        "```sh\nmake A \\\n  d  # e\n\n$ make e\n```\n\n<!-- not run: three -->\n\n```\nmake f\n```\n`make g`\n",
        encoding="utf-8",
    )
    commands, wrong = collect(tmp_path / "marks.md")
    assert wrong == []
    assert [(command.line, command.text, [tuple(mark) for mark in command.marks]) for command in commands] == [
        (1, "make a", [("not run", "", "one")]),
        (2, "make b", [("not run", "", "one")]),
        (5, "make c", [("small", "c", "two")]),
        (11, "make e", [("names", "", "A=x")]),
        (17, "make f", [("not run", "", "three")]),
        (19, "make g", []),
    ]


def test_a_line_is_read_as_by_a_shell():
    line = "A=1 python x.py --stop $'\\n' \"a b\" < in.txt && pip install y | head # z"
    assert documented.split(line) == [
        ({"A": "1"}, ["python", "x.py", "--stop", "\n", "a b"], "in.txt"),
        ({}, ["pip", "install", "y"], ""),
        ({}, ["head"], ""),
    ]
