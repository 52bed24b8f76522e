"""`--config FILE`: fields from TOML, YAML, JSON or a run.json, over the preset and under the flags; a mistake is a line
that names the file."""

import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import pytest

from harness.commands.train import EVERYDAY, TrainCommand, parse_run_config
from harness.config_file import LARGEST, read_config_file
from harness.hf_config import to_hf_config
from recipe.config import ModelConfig, RunConfig, UserError, to_dict
from recipe.presets import get_preset
from tests.test_cli import start, train_jax

pytestmark = pytest.mark.usefixtures("empty_folder")

TOML = """
preset = "seed"
steps = 20
prompts = ["a", "b"]
model.dropout = 0.25
[data]
corpus = "notes/"
max-tokens = 1_000
[muon]
learning_rate = 1e-3
nesterov = false
"""
YAML = """
preset: seed
steps: 20
prompts: [a, b]
model.dropout: 0.25
data:
  corpus: notes/
  max-tokens: 1_000
muon: {learning_rate: 1e-3, nesterov: false}
"""
JSON = {
    "preset": "seed",
    "steps": 20,
    "prompts": ["a", "b"],
    "model": {"dropout": 0.25},
    "data": {"corpus": "notes/", "max_tokens": 1000},
    "muon": {"learning_rate": 1e-3, "nesterov": False},
}
SAME = {
    "x.toml": TOML,
    "x.yaml": YAML,
    "x.yml": "\ufeff" + YAML,
    "x.json": json.dumps(JSON),
    "X.JSON": json.dumps(JSON),
}


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def config_of(*argv: str) -> RunConfig:
    return parse_run_config(list(argv), framework="jax")


def nested() -> RunConfig:
    seed = get_preset("seed")
    return dataclasses.replace(
        seed,
        steps=20,
        prompts=("a", "b"),
        model=dataclasses.replace(seed.model, dropout=0.25),
        data=dataclasses.replace(seed.data, corpus="notes/", max_tokens=1000),
        muon=dataclasses.replace(seed.muon, learning_rate=0.001, nesterov=False),
        out="runs/seed-jax",
    )


@pytest.mark.parametrize("name", SAME)
def test_the_same_fields_in_every_format(name):
    assert config_of("--config", write(name, SAME[name])) == nested()


def test_the_order_is_preset_file_flags():
    file = write("x.toml", 'preset = "seed"\nsteps = 20\n')
    assert config_of(f"--config={file}", "--steps", "7").steps == 7
    assert config_of("--steps", "7", "--config", file).batch_size == get_preset("seed").batch_size
    over = config_of("--config", file, "--preset", "tiny")
    assert over == dataclasses.replace(get_preset("tiny"), steps=20, out="runs/tiny-jax")
    assert config_of("--config", write("y.toml", "steps = 20\nout = 'mine'\n")) == dataclasses.replace(over, out="mine")


def test_help_shows_the_files_values_and_the_everyday_flags(capsys):
    with pytest.raises(SystemExit):
        config_of("--config", write("x.toml", "steps = 4321\n"), "--help")
    said = capsys.readouterr().out
    assert "(default: 4321)" in said and "those of --preset tiny and of x.toml." in said
    assert said.index(EVERYDAY) < said.index("--clip-norm")
    flags = {name[2:].replace("-", "_") for name in re.findall(r"--[\w.-]+", EVERYDAY)}
    sections = {"data.corpus", "data.tokenizer", "muon.learning_rate", "adamw.learning_rate", "precision.compute"}
    assert flags - {field.name for field in dataclasses.fields(TrainCommand)} == sections
    assert sections <= {f"{name}.{part}" for name, values in to_dict(RunConfig()).items() if name in (
        "data", "muon", "adamw", "precision") for part in values}  # fmt: skip


def run_json(folder: str, config: RunConfig) -> str:
    Path(folder).mkdir(parents=True)
    text = json.dumps({"framework": "torch", "config": to_dict(dataclasses.replace(config, out=folder))})
    return write(f"{folder}/run.json", text)


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_runs_file_gives_all_but_what_is_its_own(by_folder):
    file = run_json("runs/mine", nested())
    config = config_of("--config", "runs/mine" if by_folder else file, "--seed", "3")
    assert config == dataclasses.replace(nested(), seed=3)
    assert read_config_file(file).changes.keys() & {"out", "hosts", "resume"} == set()


def test_a_run_goes_on_with_the_file_it_began_with_and_no_other():
    begun = dataclasses.replace(nested(), out="runs/mine")
    Path("runs/mine/last").mkdir(parents=True)
    write("runs/mine/last/run.json", json.dumps({"format": 1, "config": to_dict(begun)}))
    wanted = dataclasses.replace(begun, resume="runs/mine")
    file = write("x.toml", TOML)
    assert config_of("--config", file, "--resume", "runs/mine") == wanted
    assert config_of("--config", "runs/mine/last/run.json", "--resume", "runs/mine") == wanted
    other = write("y.toml", "log_every = 3\nkeep = 5\n")
    assert config_of("--config", other, "--resume", "runs/mine") == dataclasses.replace(wanted, log_every=3, keep=5)
    with pytest.raises(UserError, match=r"cannot change steps=21 \(begun with 20\)"):
        config_of("--config", write("z.toml", "steps = 21\n"), "--resume", "runs/mine")


def test_weights_of_the_file_come_before_its_fields_and_those_of_a_flag_after():
    small = ModelConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
    )  # fmt: skip
    Path("w").mkdir()
    write("w/config.json", json.dumps(to_hf_config(small)))
    write("w/tokenizer.json", "{}")
    file = write("x.toml", 'init = "w"\n[model]\nmax_position_embeddings = 256\ndropout = 0.5\n')
    config = config_of("--config", file)
    wanted = dataclasses.replace(small, max_position_embeddings=256, dropout=0.5)
    assert (config.init, config.model, config.data.tokenizer) == ("w", wanted, "w")
    config = config_of("--config", write("y.toml", "[model]\nhidden_size = 64\ndropout = 0.5\n"), "--init", "w")
    assert (config.init, config.model) == ("w", dataclasses.replace(small, dropout=0.5))
    run_json("r", dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bpe")))
    config = config_of("--config", "r")
    assert (config.init, config.data.tokenizer) == ("w", "bpe")
    assert config_of("--config", "r", "--init", "w", "--model.dropout", "0").model == small


DEEP = 100_000
WRONG = {
    "unknown": ("x.toml", "stpes = 3\n", "stpes is no field of a configuration; did you mean steps?"),
    "unknown inside": ("x.toml", "[model]\ndroput = 1\n", "model.droput is no field"),
    "two of that name": ("x.toml", "lr = 3\n", "did you mean muon.learning_rate or adamw.learning_rate?"),
    "a section": ("x.toml", "model = 3\n", "model=3 must be an object"),
    "a value": ("x.toml", "[model]\ndropout = 2.0\n", "dropout=2.0 must lie in [0, 1)"),
    "a rule of two fields": ("x.toml", "sequence_length = 2000\n", "sequence_length=2000 exceeds"),
    "a type": ("x.toml", 'steps = "20"\n', "steps='20' must be a whole number"),
    "a date": ("x.toml", "[data]\ncorpus = 2024-01-01\n", "data.corpus=datetime.date(2024, 1, 1) must be a text"),
    "a number that is none": ("x.json", '{"clip_norm": NaN}', "clip_norm=nan must be a finite number"),
    "a preset": ("x.toml", 'preset = "sed"\n', "sed is unknown; did you mean seed?"),
    "a preset's type": ("x.toml", "preset = 3\n", "preset=3 must be a preset's name"),
    "resume": ("x.toml", 'resume = "runs/mine"\n', "sets resume, which is no setting of a file; pass --resume."),
    "TOML": ("x.toml", "a = 1\nsteps 3\n", "is not TOML (Expected '=' after a key in a key/value pair (at line 2, "),
    "TOML twice": ("x.toml", "steps = 1\nsteps = 2\n", "Cannot overwrite a value (at line 2, column 10)"),
    "TOML two ways": ("x.toml", "batch-size = 1\nbatch_size = 2\n", "has batch_size twice; leave one out."),
    "JSON": ("x.json", '{\n"steps": }', "is not JSON (Expecting value: line 2 column 10"),
    "JSON twice": ("x.json", '{"data": {"corpus": "a", "corpus": "b"}}', "has corpus twice; leave one out."),
    "JSON deep": ("x.json", "[" * DEEP + "]" * DEEP, "is not JSON (maximum recursion depth exceeded"),
    "JSON long": ("x.json", '{"steps": ' + "1" * 5000 + "}", "is not JSON (Exceeds the limit"),
    "JSON list": ("x.json", "[1]", "holds a list, not fields and values"),
    "YAML": ("x.yaml", "steps: 3\nmodel: [\n", "is not YAML (line 3: "),
    "YAML tab": (
        "x.yaml",
        "model:\n\tdropout: 0.1\n",
        "is not YAML (line 2: found character '\\t' that cannot start any",
    ),
    "YAML twice": ("x.yaml", "steps: 3\nseed: 1\nsteps: 4\n", "is not YAML (line 3: steps stands there twice)"),
    "YAML twice inside": ("x.yaml", "data:\n  corpus: a\n  corpus: b\n", "(line 3: corpus stands there twice)"),
    "YAML two ways": ("x.yaml", "data.corpus: a\ndata:\n  corpus: b\n", "has data.corpus twice"),
    "YAML section and value": ("x.yaml", "data: 3\ndata.corpus: a\n", "has data twice"),
    "YAML yes": ("x.yaml", "tensorboard: yes\n", "tensorboard='yes' must be True or False (bool)"),
    "YAML no value": ("x.yaml", "steps:\n", "steps=None must be a whole number"),
    "YAML tag": ("x.yaml", "steps: !!python/name:os.system\n", "(line 1: could not determine a constructor"),
    "YAML alias": ("x.yaml", "a: &a [1]\nb: *a\n", "(line 2: aliases are not read)"),
    "YAML control": ("x.yaml", "steps: \x01\n", "is not YAML (unacceptable character"),
    "YAML two documents": ("x.yaml", "steps: 3\n---\nsteps: 4\n", "(line 2: "),
    "YAML text": ("x.yaml", "steps 3\n", "holds a text, not fields and values"),
    "a number for a name": ("x.yaml", "3: 1\n", "3 is no field of a configuration"),
    "nothing": ("x.toml", "# steps = 3\n", "sets nothing; write e.g. steps, or leave the flag out."),
    "no ending": ("config", "steps = 3\n", "must end in .json, .toml, .yaml, .yml; name one of them"),
    "no text": ("x.toml", "\udcff", "is not TOML ('utf-8' codec can't decode byte 0xff"),
    "long": ("x.toml", "#" * (LARGEST + 1), f"has {LARGEST + 1:,} bytes, more than any configuration"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_one_line(case, empty_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_impl.train", types.SimpleNamespace(train=lambda config: None))
    name, text, line = WRONG[case]
    Path(name).write_text(text, encoding="utf-8", errors="surrogateescape")
    code, said = start(train_jax, "--config", name)
    assert (code, said.count("\n")) == (2, 1) and line in said and len(said) < 800
    assert case == "a preset" or said.startswith(f"error: --config {name}")
    assert [path.name for path in empty_folder.iterdir()] == [name]


@pytest.mark.parametrize(("path", "line"), [("x.toml", "is no file; name a"), (".", "is a folder without a run.json")])
def test_a_path_that_leads_to_no_file(path, line):
    code, said = start(train_jax, "--config", path)
    assert (code, said.count("\n")) == (2, 1) and line in said


def test_a_preset_would_change_nothing_of_a_run():
    run_json("r", nested())
    with pytest.raises(UserError, match=r"^--preset tiny would change nothing, as a run.json has every field; "):
        config_of("--config", "r", "--preset", "tiny")


NUMBERS = {"1e-3": 1e-3, "1E3": 1e3, "+.5": 0.5, "5.": 5.0, "1_0.5": 10.5, "2": 2}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_as_people_write_them_in_yaml(text):
    config = config_of("--config", write("x.yaml", f"clip_norm: {text}\ndata:\n  max_tokens: null\n"))
    assert config.clip_norm == NUMBERS[text] and config.data.max_tokens is None


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2024-01-01", "0x1F", "1e", "None", "0b1"])
def test_what_is_no_plain_value_in_yaml_is_a_text(text):
    assert config_of("--config", write("x.yaml", f"data: {{corpus: {text}}}\n")).data.corpus == text


def test_yaml_without_its_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match=r"^--config needs PyYAML for YAML, which is not installed; run: pip install "):
        config_of("--config", write("x.yaml", "steps: 3\n"))
    assert config_of("--config", write("x.toml", "steps = 3\n")).steps == 3
