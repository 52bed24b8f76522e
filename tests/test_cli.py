"""The command line: presets and flags, one line and exit 2 for each mistake, and nothing touched."""

import contextlib
import dataclasses
import errno
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest

import train_jax
import train_torch
from harness import cli
from harness.cli import WITHOUT_TORCH, called_as, parse, run, version
from harness.commands.generate import GenerateCommand
from harness.commands.train import parse_run_config
from harness.hf_config import to_hf_config
from recipe.config import ModelConfig, require, to_dict
from recipe.presets import PRESETS, get_preset
from recipe.sampling import SamplingOptions

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {"jax": train_jax, "torch": train_torch}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(entry: types.ModuleType, *argv: str) -> tuple[int, str]:
    """Exit code and stderr of an entry script on these arguments."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", [entry.__name__, *argv])
        code = run(entry.main)
    return code, stderr.getvalue()


def test_without_flags_it_is_the_tiny_preset():
    expected = dataclasses.replace(get_preset("tiny"), out="runs/tiny-jax")
    assert parse_run_config([], framework="jax") == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_nothing_but_the_folder(name):
    config = parse_run_config(["--preset", name], framework="torch")
    assert config == dataclasses.replace(get_preset(name), out=f"runs/{name}-torch")


def test_every_field_is_a_flag_with_either_separator():
    """Each leaf, set by its flag to the value another preset has, arrives; with - and with _."""
    wanted = dataclasses.replace(get_preset("seed"), out="somewhere")
    for separator in "-_":
        argv = []
        for section, value in to_dict(wanted).items():
            leaves = {f"{section}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {section: value}
            for name, leaf in leaves.items():
                argv.append("--" + name.replace("_", separator))
                argv += leaf if isinstance(leaf, tuple) else [str(leaf)]
        assert len(argv) > 2 * 50
        assert parse_run_config(argv, framework="jax") == wanted


def test_flags_override_the_preset_wherever_they_stand():
    config = parse_run_config(["--steps=7", "--preset", "seed", "--model.qk-norm", "False"], framework="jax")
    assert (config.preset, config.steps, config.model.qk_norm) == ("seed", 7, False)
    assert config.model.hidden_size == get_preset("seed").model.hidden_size


MISTAKES = {
    "--stepz 3": ["--stepz", "--steps"],
    "--learning-rate 1": ["--muon.learning-rate", "--adamw.learning-rate"],
    "--hidden_size 64": ["--model.hidden-size"],
    "--stpes 3": ["--stpes is unknown; did you mean --steps? --help lists all."],
    "--lr 1": ["did you mean --muon.learning-rate or --adamw.learning-rate?"],
    "--config x": ["--config x must end in .json, .toml, .yaml, .yml"],
    "--konfig x": ["--konfig is unknown; did you mean --config?"],
    "--wandb": ["--wandb is unknown; --help lists all."],
    "--no-steps": ["--no-steps is unknown; --help lists all."],
    "--precision.remat=maybe": ["--precision.remat maybe is not True or False", "--no-precision.remat"],
    "--no-precision.remat False": ["'False' belongs to no flag"],
    "-x 3": ["'-x' belongs to no flag"],
    "--model.sequence-length 8": ["--sequence-length"],
    "--preset sed": ["sed", "seed"],
    "--preset": ["--preset"],
    "--steps abc": ["--steps", "abc", "int", "320"],
    "--steps 1.5": ["--steps", "1.5", "int"],
    "--steps": ["--steps", "int"],
    "--steps --seed 3": ["--steps", "int"],
    "--steps=": ["--steps", "int"],
    "--muon.beta x": ["--muon.beta", "x", "float"],
    "--model.qk-norm yes": ["--model.qk-norm", "yes", "True or False"],
    "--data.split x": ["--data.split", "documents, hashed, leaking-windows"],
    "--data.max-tokens x": ["--data.max-tokens", "int", "None"],
    "tiny": ["tiny"],
    "--steps 3 4": ["4"],
    "--steps 0": ["steps=0"],
    "--steps -5": ["steps=-5"],
    "--log-every 0": ["log_every=0"],
    "--clip-norm nan": ["clip_norm=nan"],
    "--clip-norm inf": ["clip_norm=inf"],
    "--muon.learning-rate nan": ["muon.learning_rate=nan"],
    "--adamw.learning-rate nan": ["adamw.learning_rate=nan"],
    "--adamw.learning-rate inf": ["adamw.learning_rate=inf"],
    "--adamw.learning-rate -1e-3": ["adamw.learning_rate=-0.001"],
    "--schedule.final-factor nan": ["schedule.final_factor=nan"],
    "--model.num-key-value-heads 4": ["num_attention_heads=6", "num_key_value_heads=4", "1", "2", "3", "6"],
    "--model.head-dim 5": ["head_dim=5", "even"],
    "--sequence-length 1025": ["sequence_length=1025", "max_position_embeddings=1024"],
    "--seed -1": ["seed=-1"],
    "--prompts -x": ["-x"],
}


@pytest.mark.parametrize("framework", ENTRIES)
@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2_and_touches_nothing(line, framework, empty_folder):
    code, stderr = start(ENTRIES[framework], *line.split())
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n")
    assert not set("│╭─") & set(stderr)
    for part in MISTAKES[line]:
        assert part in stderr
    assert not any(empty_folder.iterdir())


BOOLEANS = {
    **{f"--muon.nesterov {text}": ("muon.nesterov", True) for text in ("True", "true", "1")},
    **{f"--muon.nesterov {text}": ("muon.nesterov", False) for text in ("False", "false", "0")},
    "--no-muon.nesterov": ("muon.nesterov", False),
    "--muon.no-nesterov": ("muon.nesterov", False),
    "--precision.remat": ("precision.remat", True),
    "--precision.remat=true": ("precision.remat", True),
    "--precision.remat --no-precision.remat": ("precision.remat", False),
    "--precision.remat False --precision.remat True": ("precision.remat", True),
    "--no-model.tie_word_embeddings": ("model.tie_word_embeddings", False),
    "--model.qk-norm=0": ("model.qk_norm", False),
}


@pytest.mark.parametrize("line", BOOLEANS)
def test_a_boolean_is_written_as_anywhere(line):
    config = parse_run_config([*line.split(), "--steps", "7"], framework="jax")
    name, value = BOOLEANS[line]
    section, _, field = name.partition(".")
    assert getattr(getattr(config, section), field) is value and config.steps == 7


def test_the_commands_own_booleans_too():
    read = {"prog": "command", "description": "Try."}
    for line, web in {"--web": True, "--no-web": False, "--web True": True, "--web=0": False, "": False}.items():
        assert parse(GenerateCommand, ["--checkpoint", "x", *line.split(), "--chat"], **read).web is web


def test_sampling_options_are_flags_of_the_command_and_stop_ids_is_none():
    read = {"prog": "command", "description": "Try."}
    flags = "--checkpoint x --temperature 0 --top_k 5 --top-p 0.9 --min_p 0.1 --samples 2 --seed 3 --stop a --stop b"
    command = parse(GenerateCommand, flags.split(), **read)
    sampling = {field.name: getattr(command, field.name) for field in dataclasses.fields(SamplingOptions)}
    assert SamplingOptions(**sampling) == SamplingOptions(
        temperature=0, top_k=5, top_p=0.9, min_p=0.1, samples=2, seed=3, stop=("a", "b")
    )
    with pytest.raises(ValueError, match="--stop-ids is unknown"):
        parse(GenerateCommand, ["--checkpoint", "x", "--stop-ids", "3"], **read)
    with pytest.raises(ValueError, match=r"top_p=2\.0 must lie"):
        parse(GenerateCommand, ["--checkpoint", "x", "--top_p", "2"], **read)


COMMANDS = {
    "train_jax.py": "usage: train_jax.py",
    "-m jax_impl.train": "usage: python -m jax_impl.train",
    "-m torch_ref.train": "usage: python -m torch_ref.train",
    "-m harness.commands.plot": "usage: python -m harness.commands.plot [-h] RUN [RUN ...]",
    "-m harness.commands.checkpoint": "usage: python -m harness.commands.checkpoint [-h] {inspect,export}",
    "-m harness.commands.data": "usage: python -m harness.commands.data [-h] {build,check}",
    "-m harness.commands.checkpoint export": "usage: python -m harness.commands.checkpoint export [-h] FOLDER OUT",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_version(command):
    for flag in ("--help", "--version"):
        line = [sys.executable, *command.split(), flag]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(COMMANDS[command] if flag == "--help" else "qwen-from-scratch")


def test_the_version_in_a_bare_clone(monkeypatch):
    assert version() == f"{cli.DISTRIBUTION} {importlib.metadata.version(cli.DISTRIBUTION)}"
    monkeypatch.setattr(cli, "DISTRIBUTION", "qwen-not-installed")
    assert version().startswith("qwen-not-installed, not installed: a clone at commit ")


def test_help_that_nobody_reads_ends_in_silence():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as pipe:
        line = [sys.executable, "train_jax.py", "--help"]
        done = subprocess.run(line, stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_shell_gets_its_completion(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Command, ["--tyro-print-completion", "bash"], prog="command", description="Try.")
    assert stop.value.code in (0, None) and "--checkpoint" in capsys.readouterr().out


def without(name: str, folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m WORDS` where a package is not installed."""
    (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})")
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-m", *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    return done.returncode, done.stdout, done.stderr


NEED_TORCH = (
    *("torch_ref.generate", "torch_ref.train", "parity_tests", "parity_tests.whole_run", "parity_tests.example"),
    *("benchmarks.input_pipeline --batches 1",),
)


@pytest.mark.parametrize("line", NEED_TORCH)
def test_a_module_that_needs_torch_says_so_without_it(line, empty_folder):
    assert without("torch", empty_folder, *line.split()) == (2, "", f"error: {WITHOUT_TORCH}\n")


def test_transformers_is_told_from_torch(empty_folder):
    code, out, err = without("transformers", empty_folder, "parity_tests.whole_run")
    assert (code, out) == (2, "") and err.startswith("error: transformers is not installed; run: pip install")


@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.input_pipeline", "benchmarks.generation"])
def test_help_of_the_benchmarks_needs_no_torch(module, empty_folder):
    code, out, err = without("torch", empty_folder, module, "--help")
    assert (code, err) == (0, "") and out.startswith("usage: ")


def test_another_missing_module_is_a_bug():
    def missing():
        raise ModuleNotFoundError("No module named 'x'", name="x")

    with pytest.raises(ModuleNotFoundError):
        run(missing)


def test_a_rule_of_the_config_is_told_in_its_own_words():
    with pytest.raises(ValueError) as rule:
        ModelConfig(num_attention_heads=6, num_key_value_heads=4)
    _, stderr = start(train_jax, "--model.num-key-value-heads", "4")
    assert stderr == f"error: {rule.value}\n"


def test_a_folder_that_holds_anything_is_refused(empty_folder):
    (empty_folder / "mine").mkdir()
    (empty_folder / "mine-2").mkdir()
    (empty_folder / "mine" / "note.txt").write_text("kept")
    (empty_folder / "mine-2" / ".hidden").write_text("kept")
    code, stderr = start(train_jax, "--out", "mine")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "--out mine already holds files" in stderr and "--out mine-3." in stderr
    assert sorted(p.name for p in empty_folder.rglob("*")) == [".hidden", "mine", "mine-2", "note.txt"]


@pytest.mark.parametrize(
    ("out", "part"), [("file", "is a file"), ("file/x/y", "lies under file"), (".", "--out runs/new")]
)
def test_a_path_that_cannot_be_a_new_folder_is_refused(out, part, empty_folder):
    (empty_folder / "file").write_text("kept")
    code, stderr = start(train_jax, "--out", out)
    assert (code, stderr.count("\n")) == (2, 1) and part in stderr


def test_an_empty_or_absent_folder_is_taken_as_named(empty_folder):
    (empty_folder / "mine").mkdir()
    assert parse_run_config(["--out", "mine"], framework="jax").out == "mine"
    assert parse_run_config(["--out", "a/b"], framework="jax").out == "a/b"
    assert [p.name for p in empty_folder.iterdir()] == ["mine"]


def test_an_automatic_name_that_is_taken_is_numbered(empty_folder):
    for expected in ("runs/tiny-jax", "runs/tiny-jax-2", "runs/tiny-jax-3"):
        out = Path(parse_run_config([], framework="jax").out)
        assert str(out) == expected
        out.mkdir(parents=True)
        (out / "run.json").write_text("{}")
    assert parse_run_config([], framework="torch").out == "runs/tiny-torch"


@pytest.fixture
def begun(empty_folder):
    """A run folder with a state: only what the command line reads of it."""
    config = dataclasses.replace(get_preset("tiny"), out="elsewhere", steps=50, seed=9)
    (empty_folder / "mine" / "last").mkdir(parents=True)
    (empty_folder / "mine" / "last" / "run.json").write_text(json.dumps({"format": 1, "config": to_dict(config)}))
    return dataclasses.replace(config, out="mine", resume="mine")


def test_a_run_is_resumed_as_it_was_begun(begun):
    for framework in ENTRIES:
        assert parse_run_config(["--resume", "mine"], framework=framework) == begun
    same = ["--resume=mine", "--steps", "50", "--model.hidden_size", "192", "--preset", "tiny"]
    assert parse_run_config(same, framework="jax") == begun
    flags = ["--log_every", "7", "--save-every", "9", "--tensorboard", "True"]
    free = parse_run_config(["--resume", "mine", *flags], framework="jax")
    assert free == dataclasses.replace(begun, log_every=7, save_every=9, tensorboard=True)


CONFLICTS = {
    "--seed 3": ["seed=3 (begun with 9)"],
    "--steps 60": ["steps=60 (begun with 50)", "the learning-rate schedule spans all steps"],
    "--model.hidden_size 64": ["model.hidden_size=64 (begun with 192)"],
    "--batch-size 4 --accumulation 2": ["batch_size=4 (begun with 16)", "accumulation=2 (begun with 1)"],
    "--data.corpus stdlib": ["data.corpus=stdlib (begun with shakespeare)"],
    "--muon.learning_rate 0.1": ["muon.learning_rate=0.1"],
    "--precision.compute bfloat16": ["precision.compute=bfloat16"],
    "--preset seed": ["preset=seed (begun with tiny)"],
    "--out other": ["out=other"],
}


@pytest.mark.parametrize("line", CONFLICTS)
def test_what_would_make_another_run_is_refused(line, begun, empty_folder):
    code, stderr = start(train_torch, "--resume", "mine", *line.split())
    assert code == 2 and stderr.count("\n") == 1
    for part in [*CONFLICTS[line], "--init mine/last"]:
        assert part in stderr
    assert sorted(path.name for path in empty_folder.rglob("*")) == ["last", "mine", "run.json"]


@pytest.mark.parametrize(("folder", "part"), [("nowhere", "is not a folder"), (".", "holds no last/run.json")])
def test_only_a_run_with_a_state_is_resumed(folder, part, empty_folder):
    code, stderr = start(train_jax, "--resume", folder)
    assert (code, stderr.count("\n")) == (2, 1) and part in stderr


def test_a_state_set_aside_by_a_killed_run_is_found(begun, empty_folder):
    (empty_folder / "mine" / "last").rename(empty_folder / "mine" / ".last-old")
    assert parse_run_config(["--resume", "mine"], framework="jax") == begun


def test_weights_to_begin_with_bring_model_and_tokenizer(empty_folder):
    model = ModelConfig(vocab_size=300, max_position_embeddings=128, rope_theta=5e5)
    (empty_folder / "weights").mkdir()
    (empty_folder / "weights" / "config.json").write_text(json.dumps(to_hf_config(model)))
    config = parse_run_config(["--init", "weights", "--model.dropout", "0.1"], framework="jax")
    assert config.model == dataclasses.replace(model, dropout=0.1) and config.sequence_length == 128
    assert (config.init, config.data.tokenizer, config.out) == ("weights", "bpe", "runs/tiny-jax")
    (empty_folder / "weights" / "tokenizer.json").write_text("{}")
    assert parse_run_config(["--init", "weights"], framework="jax").data.tokenizer == "weights"
    code, stderr = start(train_jax, "--init", "nowhere")
    assert (code, stderr.count("\n")) == (2, 1) and "nowhere holds no config.json" in stderr


def test_the_entries_hand_the_config_to_their_framework(monkeypatch):
    for framework, package in (("jax", "jax_impl"), ("torch", "torch_ref")):
        seen = []
        fake = types.ModuleType(f"{package}.train")
        fake.train = seen.append
        monkeypatch.setitem(sys.modules, f"{package}.train", fake)
        assert start(ENTRIES[framework], "--steps", "3") == (0, "")
        assert seen == [dataclasses.replace(get_preset("tiny"), steps=3, out=f"runs/tiny-{framework}")]


def test_without_torch_the_line_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch_ref.train", raising=False)

    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torch_ref" and name != "torch_ref":
                raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(sys, "meta_path", [NoTorch(), *sys.meta_path])
    code, stderr = start(train_torch)
    assert (code, stderr) == (2, f"error: {WITHOUT_TORCH}\n")


def test_help_shows_the_presets_defaults_at_once():
    """In a process of its own: every flag with its docstring and this preset's default, and no framework imported."""
    program = """
        import sys
        import train_jax, train_torch
        for entry in (train_jax, train_torch):
            try:
                entry.main()
            except SystemExit as stop:
                assert stop.code == 0
        print("loaded", sorted({"jax", "flax", "torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), "--preset", "seed", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "--steps INT Optimizer updates. (default: 500)" in text
    assert "--model.hidden-size INT Width of the residual stream (D). (default: 384)" in text
    assert "train_jax.py" in text and "train_torch.py" in text and ", ".join(PRESETS) in text
    assert text.endswith("loaded []")
    assert done.stderr == ""


def test_ctrl_c_is_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_exit_code_of_main_is_kept():
    assert run(lambda: None) == 0
    assert run(lambda: 1) == 1


def test_a_long_message_stays_one_line(capsys):
    assert run(lambda: require(False, "value\nrule\n  remedy")) == 2
    assert capsys.readouterr().err == "error: value rule remedy\n"


@pytest.mark.parametrize(
    "bug",
    [
        lambda: np.zeros(3).reshape(2, 2),
        lambda: int("x"),
        lambda: np.zeros(3) + np.zeros(4),
        lambda: {}["missing"],
        lambda: exec("int('x')", {"__name__": "recipe.module"}),  # in our own code, but not raised on purpose
    ],
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises((ValueError, LookupError)):
        run(bug)


def test_a_missing_file_is_the_users_mistake(capsys, empty_folder):
    assert run(lambda: (empty_folder / "corpus.txt").read_text() and None) == 2
    stderr = capsys.readouterr().err
    assert "corpus.txt" in stderr and stderr.count("\n") == 1


def fail(error: BaseException):
    def main():
        raise error

    return main


def refusal(number: int, *files: str) -> OSError:
    return OSError(number, os.strerror(number), *files)


MACHINE = {
    "disk full": (fail(refusal(errno.ENOSPC, "a/b")), 1, "a/b: No space left on device; make room"),
    "disk full, says numpy": (fail(OSError("100 requested and 20 written")), 1, "No space left on device; make room"),
    "quota": (fail(refusal(errno.EDQUOT)), 1, "make room"),
    "read-only": (fail(refusal(errno.EROFS, "a")), 2, "a: Read-only file system; choose a place that can be written"),
    "a long name": (lambda: Path("a" * 5000).write_text(""), 2, "File name too long; choose a shorter name"),
    "not permitted": (fail(refusal(errno.EACCES, "a")), 2, "a: Permission denied; choose another place"),
    "open files": (fail(refusal(errno.EMFILE)), 1, "Too many open files; raise the limit"),
    "two names": (fail(OSError(errno.EEXIST, "x", "a", None, "b")), 2, "a and b: File exists"),
    "a circle of links": (lambda: [Path("x").symlink_to("x"), Path("x").read_text()], 2, "mend the symbolic links"),
    "control characters": (fail(refusal(errno.ENOSPC, "\x1b[2J\n")), 1, r"\x1b[2J"),
    "no home": (fail(RuntimeError("Could not determine home directory.")), 2, "set HOME"),
    "memory": (fail(MemoryError()), 1, "out of memory; choose smaller sizes"),
    "numpy's memory": (lambda: np.empty(10**18, np.uint8), 1, "out of memory (Unable to allocate"),
    "XLA's memory": (fail(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes")), 1, "out of memory"),
    "torch's memory": (fail(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), 1, "out of memory"),
    "a huge list": (lambda: [0] * 10**20, 2, "a size is beyond any machine's"),
    "a huge array": (lambda: np.empty(10**20), 2, "a size is beyond any machine's"),
    "a huge shape": (lambda: np.empty((2**40, 2**40)), 2, "a size is beyond any machine's"),
    "a huge range": (lambda: np.arange(10**30, 10**31), 2, "a size is beyond any machine's"),
    "a huge token": (lambda: np.int32(2**40), 2, "a size is beyond any machine's"),
}


@pytest.mark.parametrize("case", MACHINE)
def test_what_the_machine_refuses_is_one_line_with_a_remedy(case, capsys):
    main, code, message = MACHINE[case]
    assert run(main) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1
    assert stderr[:-1].isprintable()


@pytest.mark.parametrize(
    "error",
    [refusal(errno.EBADF), refusal(errno.ECHILD), OSError("strange"), RuntimeError("x"), OverflowError("math range")],
    ids=repr,
)
def test_another_error_of_the_machine_is_a_bug(error):
    with pytest.raises(type(error)):
        run(fail(error))


def test_a_home_that_is_not_there_is_told(monkeypatch, capsys):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for a user that the machine does not know
    assert run(lambda: Path.home() and None) == 2
    assert "set HOME" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("program", ["print('x')", "print('x' * 10**6)"])
def test_output_to_a_full_disk_is_one_line(program):
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-c", f"from harness.cli import run; exit(run(lambda: {program}))"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "No space left on device" in done.stderr


def test_output_that_nobody_reads_ends_the_command_in_one_line():
    endless = "import itertools; from harness.cli import run; exit(run(lambda: [print(n) for n in itertools.count()]))"
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", endless], **piped) as command:
        assert command.stdout.readline() == "0\n"
        command.stdout.close()
        stderr = command.stderr.read()
    assert command.returncode == 1
    assert stderr.startswith("stopped: nobody reads the output") and stderr.count("\n") == 1


def test_a_broken_pipe_that_is_not_the_output_is_a_bug():
    def write_to_a_dead_worker():
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb", buffering=0) as pipe:
            pipe.write(b"job")

    with pytest.raises(BrokenPipeError):
        run(write_to_a_dead_worker)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command with a required flag."""

    checkpoint: str
    """Where from."""
    top_k: int = 0
    """How many."""


def test_a_repeatable_flag_takes_one_value_each_time():
    read = {"prog": "command", "description": "Try."}
    flags = ["--checkpoint", "x", "--prompt", "a b", "--prompt=--c", "--stop", "d"]
    command = parse(GenerateCommand, flags, **read)
    assert (command.prompt, command.stop) == (("a b", "--c"), ("d",))
    for wrong, message in (
        (["--prompt", "a", "b"], "'b' belongs to no flag"),
        (["--prompt"], "--prompt needs a value"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(GenerateCommand, ["--checkpoint", "x", *wrong], **read)


def test_parse_serves_other_commands():
    read = {"prog": "command", "description": "Try."}
    assert parse(Command, ["--checkpoint", "x", "--top-k", "3"], **read) == Command("x", 3)
    with pytest.raises(ValueError, match=r"^--checkpoint is missing; it needs a text \(str\)\.$"):
        parse(Command, ["--top-k", "3"], **read)
    with pytest.raises(ValueError, match=r"^--top-k x is not a whole number \(int\); choose one, e.g. --top-k 0\.$"):
        parse(Command, ["--checkpoint", "x", "--top-k", "x"], **read)


@pytest.mark.parametrize(
    ("argv0", "default", "shown"),
    [
        ("train_jax.py", "python train_torch.py", "python train_torch.py"),
        ("/venv/bin/pytest", "python train_jax.py", "python train_jax.py"),
        ("/venv/bin/pytest", "python -m harness.commands.plot", "python -m harness.commands.plot"),
        ("/venv/bin/qwen-train-jax", "python train_jax.py", "qwen-train-jax"),
        ("qwen-train-torch.exe", "python -m torch_ref.generate", "qwen-generate-torch"),
        ("/venv/bin/qwen-generate-jax", "python -m harness.commands.checkpoint", "qwen-checkpoint"),
        ("/venv/bin/qwen-parity", "python -m benchmarks", "python -m benchmarks"),
    ],
)
def test_a_command_names_the_next_as_it_was_called_itself(argv0, default, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", [argv0])
    monkeypatch.chdir(ROOT)
    assert called_as(default) == shown


def test_a_script_that_is_not_here_is_named_by_its_path_or_its_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/a b/train_jax.py"])
    assert called_as("python train_jax.py") == "python '/a b/train_jax.py'"
    assert called_as("python train_torch.py") == "python -m torch_ref.train"
    monkeypatch.setattr(sys, "argv", ["/site-packages/jax_impl/train.py"])
    assert called_as("python train_jax.py") == "python -m jax_impl.train"
    assert called_as("python -m jax_impl.generate") == "python -m jax_impl.generate"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "many"], "--steps many is not a whole number (int); choose one, e.g. --steps 320."),
        (["stray"], "'stray' belongs to no flag; every argument is a flag and its value, see --help."),
    ],
)
def test_a_mistake_is_one_line_where_stdout_takes_ascii_alone(arguments, line, monkeypatch):
    """The frame around it is then drawn with other signs."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(ValueError) as refused:
        parse_run_config(arguments, framework="jax")
    assert str(refused.value) == line
