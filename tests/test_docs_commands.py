"""Every command that a document shows is what the program reads: held against the real parsers, and run every night."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.folders import save_folder
from harness.state import SLOTS, TrainingState, save_state, state_folders
from recipe.config import ModelConfig, RunConfig
from recipe.params import init_params, slot_shapes
from recipe.presets import get_preset
from recipe.tokenizer import train_bpe
from tests import documented
from tests.documented import ROOT, collect, documents, problems

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
TALK = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
MODELS = ("Qwen3-0.6B", "path/to/Qwen3-0.6B", "path/to/a-chat-model", "path/to/SmolLM2-135M-Instruct")
TURNS = [{"role": "user", "content": "To be?"}, {"role": "assistant", "content": "Or not to be."}]
FILES = {"mine.toml": 'preset = "tiny"\n', "talks.jsonl": 40 * (json.dumps({"messages": TURNS}) + "\n")}
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
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
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


def taken_places(words: list[str]) -> list[Path]:
    """The folders that a command would write and that are taken here."""
    places = [Path(word) for flag, word in zip(words, [*words[1:], ""], strict=True) if flag == "--out"]
    return [place for place in places if place.is_dir()]


def results(words: list[str]) -> list[Path]:
    """The files of results that a command would write and that are here."""
    outs = [Path(word) for flag, word in zip(words, [*words[1:], ""], strict=True) if flag == "--out"]
    return [file for out in outs for file in out.parent.glob(f"{out.name}.*") if file.is_file()]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_its_program_reads(path, reader):
    commands, wrong = collect(path)
    for command in commands:
        taken = taken_places(command.text.split())
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


OVERRIDES = json.dumps({"model": {**SMALL, "vocab_size": 384}})
SMALL_MODEL = [word for name, value in SMALL.items() for word in (f"--model.{name}", str(value))]
UPDATES = "--steps 2 --accumulation 1 --batch_size 2 --sequence_length 16 --eval_every 2 --save_every 1 --log_every 1"
UPDATES = [*UPDATES.split(), "--sample_tokens", "2"]
TEXT = "--data.max_characters 3000 --data.max_tokens 3000 --data.validation_tokens 64 --data.bpe_vocab_size 384".split()
ONCE = "--rounds 1 --warmup 1 --threads 1"
ONE_ROUND = f"{ONCE} --overrides '{OVERRIDES}'"
FLAGS = {
    "benchmarks.throughput": "--preset tiny --batch_size 1 --sequence_length 16 --accumulation 1 --round_seconds 0 "
    f"{ONE_ROUND}",
    "benchmarks.generation": f"--preset tiny --batch_sizes 1 --prompt_tokens 4 --new_tokens 4 {ONE_ROUND}",
    "benchmarks.gpu": "--dry_run --stage newton-schulz",
    "benchmarks.input_pipeline": "--preset tiny --vocabulary 384 --rounds 1 --batches 2",
    "benchmarks.muon_speed": "--preset tiny --layers 1 --rounds 1 --rows ours,optax",
    "benchmarks.muon_training": "--preset tiny --steps 2 --batch_size 1 --sequence_length 16 --optimizers muon,adamw "
    "--muon_rates 0.01 --adamw_rates 0.004 --seeds 1 --validation_tokens 64 --rounds 1 "
    f"--overrides '{OVERRIDES}'",
    "benchmarks.plan": f"--preset tiny --batch_size 8 --sequence_length 32 --target host --overrides '{OVERRIDES}'",
    "benchmarks.plan_torch": "--preset tiny --batch_size 1 --sequence_length 32 --accumulation 1",
    "benchmarks.report": "",
    "benchmarks.roofline": "",
    "benchmarks.saving": f"--batch_size 1 --sequence_length 16 --accumulation 1 --rounds 1 --overrides '{OVERRIDES}'",
    "benchmarks.scaling": f"--devices 1 2 --sequence_length 16 --rounds 1 --overrides '{OVERRIDES}'",
    "harness.commands.checkpoint": "",
    "harness.commands.data": "",
    "harness.commands.plot": "",
    "jax_impl.gather": "",
    "jax_impl.generate": "--max_new_tokens 4",
    "torch_ref.generate": "--max_new_tokens 4",
    "parity_tests": "--batch_size 1 --sequence_length 8 --steps 0 --dtype float64",
    "parity_tests.example": "",
    "parity_tests.fuzz": "--inputs 5",
    "parity_tests.ports": "--only vision --workers 1",
    "parity_tests.whole_run": "--seeds 1 --steps 2",
    "tests.endless": "--gigabytes 0.002 --steps 1",
    "tests.soak": "--minutes 0.3 --every 2",
}
"""What makes a command small, by module; the last of two equal flags counts."""


def is_run(command: documented.Command, words: list[str]) -> bool:
    """Whether the night runs it: not what installs, what starts commands that are here themselves, or tests, which have
    runs of their own; nor what names a program and no more."""
    program = words[0].removeprefix(".venv/bin/")
    module = words[2] if program in documented.PYTHONS and words[1] == "-m" else ""
    ours = (module or program) not in ("venv", "pip", "make", "pytest", *documented.OTHERS)
    return ours and (command.block > 0 or len(words) > 3 or not module)


def nightly() -> dict[str, list[documented.Command]]:
    """What one reader types one after the other: a block's commands, or a code span."""
    found: dict[str, list[documented.Command]] = {}
    seen = set()
    for path in documents():
        for command in collect(path)[0]:
            ours = any(is_run(command, one.words) for one in command.simple())
            new = (command.text, command.marks) not in seen
            seen.add((command.text, command.marks))
            if ours and new:
                found.setdefault(f"{command.file}-{command.block or f'line-{command.line}'}", []).append(command)
    return found


NIGHTLY = nightly()
NOT_RUN = [(command, reason) for some in NIGHTLY.values() for command in some for reason in command.marked("not run")]


@pytest.mark.slow
@pytest.mark.parametrize("command, reason", NOT_RUN, ids=[command.text[:60] for command, _ in NOT_RUN])
def test_what_is_not_run(command, reason):
    pytest.skip(f"{command.where}: {reason}")


def made_small(command: documented.Command, words: list[str]) -> list[str]:
    """The words for Python, with flags that make a run of them short."""
    more = [word for text in command.marked("small") for word in text.split()]
    module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
    if "--jax-step" in words:
        return [*words[1:], *ONCE.split(), "--round_seconds", "0", *more]
    if module in FLAGS:
        return words[1:] + documented.split(f"x {FLAGS[module]}")[0].words[1:] + more
    entry = {"jax_impl.train": "train_jax", "torch_ref.train": "train_torch"}.get(module, module)
    assert entry in ("train_jax", "train_torch"), f"{command.where}: say in FLAGS how it is made small"
    given = words[3 if words[1] == "-m" else 2 :]
    flags = [] if {"--resume", "--help", "--tyro-print-completion"} & {*given} else [*UPDATES]
    begun = "--init" in given
    flags += SMALL_MODEL if flags and not begun else []
    flags += ["--data.corpus", "shakespeare", *TEXT] if flags and "--data.corpus" not in given else []
    flags += ["--data.tokenizer", "bpe"] if flags and not begun and "--data.tokenizer" not in given else []
    flags += "--mesh data=2,fsdp=2 --batch_size 4".split() if "--mesh" in given else []
    flags += ["--steps", "14"] if "--profile_steps" in given else []
    return [str(ROOT / f"{entry}.py"), *given, *flags, *more]


def run(words: list[str], folder: Path, reads: str = "", **variables: str) -> str:
    """What Python prints, run there; it must end with 0."""
    flags = os.environ.get("XLA_FLAGS", "") + (" --xla_force_host_platform_device_count=4" if "--mesh" in words else "")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "XLA_FLAGS": flags} | variables
    given = (folder / reads).read_text(encoding="utf-8") if reads else ""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def stop(run_folder: Path) -> None:
    """Make of a finished run one that was stopped before its last save."""
    states = state_folders(run_folder)
    if len(states) > 1:
        shutil.rmtree(states[0])
        states[1].rename(run_folder / "last")


@pytest.fixture(scope="module")
def trained(furnished, tmp_path_factory) -> Path:
    """The same folder with runs that have been trained, a while, and texts and results to look at."""
    folder = tmp_path_factory.mktemp("night") / "reader"
    shutil.copytree(furnished, folder)
    for name, entry in zip(RUNS, ("train_jax.py", "train_torch.py"), strict=True):
        shutil.rmtree(folder / name)
        flags = [*UPDATES, *SMALL_MODEL, *TEXT, "--data.tokenizer", "bpe", "--steps", "4", "--out", name]
        run([str(ROOT / entry), *flags], folder)
        stop(folder / name)
    for place in ("notes", "texts"):
        shutil.copytree(ROOT / "docs", folder / place, ignore=shutil.ignore_patterns("*.png"))
    lines = [json.dumps({"text": text}) for text in (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")]
    (folder / "texts" / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "prompts.txt").write_text("ROMEO:\n", encoding="utf-8")
    shutil.copy(folder / MODELS[0] / "tokenizer.json", folder / "path" / "to")
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples")
    (folder / "benchmarks" / "results").mkdir(parents=True)
    for name, result in zip("AB", ("cpu-tiny-bfloat16", "cpu-tiny-bfloat16-again"), strict=True):
        shutil.copy(ROOT / "benchmarks" / "results" / f"{result}.jsonl", folder / f"benchmarks/results/{name}.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("place", NIGHTLY)
def test_every_command_runs(place, trained, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(trained, folder)
    for command in NIGHTLY[place]:
        if command.marked("not run"):
            continue
        for one in command.simple():
            words = [word.replace("~", str(folder)) for word in one.words]
            if not is_run(command, words):
                continue
            with contextlib.chdir(folder):
                for taken in taken_places(words):
                    shutil.rmtree(taken)
                for result in results(words):
                    result.unlink()
                if "--resume" in words:
                    stop(Path(words[words.index("--resume") + 1]))
            variables = {name: value for name, value in one.variables.items() if name != "XLA_FLAGS"}
            run(made_small(command, words), folder, one.reads, **variables)
