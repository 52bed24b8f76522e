"""The weights folder: what is written comes back, Hugging Face opens it, and what does not fit is named at once."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness import cli, folders
from harness.commands import checkpoint
from harness.folders import find_weights, load_folder, save_folder
from harness.hf_config import from_hf_config, to_hf_config
from recipe.config import ModelConfig, UserError
from recipe.params import check_weights, init_params
from recipe.tokenizer import load_tokenizer, train_bpe

MODEL = ModelConfig(vocab_size=300, hidden_size=30, intermediate_size=14, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, rope_theta=12_345.0)  # fmt: skip
VARIANTS = [
    MODEL,
    dataclasses.replace(MODEL, tie_word_embeddings=False, attention_bias=True),
    dataclasses.replace(MODEL, sliding_window=7, max_window_layers=1),
    dataclasses.replace(MODEL, qk_norm=False),
]


@pytest.mark.parametrize("model", VARIANTS)
def test_a_saved_folder_comes_back_bit_for_bit(model, tmp_path):
    weights = init_params(model, seed=3)
    save_folder(tmp_path / "folder", model, weights)
    loaded_model, loaded = load_folder(tmp_path / "folder")
    assert loaded_model == model
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name], weight)


@pytest.mark.parametrize("model", VARIANTS)
def test_transformers_reads_the_same_configuration(model, tmp_path):
    from transformers import AutoConfig

    save_folder(tmp_path / "folder", model, init_params(model, seed=0))
    theirs = AutoConfig.from_pretrained(tmp_path / "folder")
    assert theirs.rope_parameters["rope_theta"] == model.rope_theta
    assert (theirs.head_dim, theirs.tie_word_embeddings) == (model.head_dim, model.tie_word_embeddings)
    if model.qk_norm:
        windowed = [model.window_of_layer(layer) is not None for layer in range(model.num_hidden_layers)]
        assert [kind == "sliding_attention" for kind in theirs.layer_types] == windowed
        assert from_hf_config(theirs.to_dict()) == model


def test_both_spellings_of_rope_theta_are_read():
    values = to_hf_config(MODEL)
    old = {name: value for name, value in values.items() if name != "rope_parameters"}
    new = {name: value for name, value in values.items() if name != "rope_theta"}
    assert from_hf_config(old).rope_theta == from_hf_config(new).rope_theta == 12_345.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type='yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_the_model_cannot_express_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_hf_config(to_hf_config(MODEL) | change)


def test_every_wrong_weight_is_named_at_once(tmp_path):
    weights = init_params(MODEL, seed=0)
    save_folder(tmp_path / "folder", MODEL, weights)
    broken = load_file(tmp_path / "folder" / "model.safetensors")
    del broken["model.norm.weight"]
    broken["stranger"] = np.zeros(2, np.float32)
    broken["model.embed_tokens.weight"] = np.zeros((299, 30), np.float32)
    save_file(broken, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_folder(tmp_path / "folder")
    for part in (
        "missing model.norm.weight (30,)",
        "unexpected stranger (2,)",
        "misshapen model.embed_tokens.weight (299, 30) for (300, 30)",
    ):
        assert part in str(caught.value)


def shard(folder, weights: dict[str, np.ndarray], count: int = 2) -> list[str]:
    """Replace model.safetensors by so many shards and their index, written by safetensors itself; the files' names."""
    (folder / "model.safetensors").unlink()
    weight_map, files = {}, []
    for index, names in enumerate(np.array_split(np.array(list(weights)), count), start=1):
        files.append(f"model-0000{index}-of-0000{count}.safetensors")
        save_file({str(name): weights[name] for name in names}, folder / files[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(map(str, names), files[-1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def test_sharded_and_bfloat16_weights_are_read(tmp_path):
    weights = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in init_params(MODEL, seed=1).items()}
    save_folder(tmp_path / "folder", MODEL, weights)
    shard(tmp_path / "folder", weights)
    _, loaded = load_folder(tmp_path / "folder")
    for name, weight in weights.items():
        assert loaded[name].dtype == weight.dtype
        np.testing.assert_array_equal(loaded[name], weight)


def test_everything_wrong_with_shards_is_said_at_once(tmp_path):
    """From the headers alone: one shard absent, one cut short, a tensor twice, a shape, a dtype, a stranger."""
    folder, weights = tmp_path / "folder", init_params(MODEL, seed=0)
    save_folder(folder, MODEL, weights)
    files = shard(folder, weights, count=4)
    (folder / files[3]).unlink()
    (folder / files[2]).write_bytes((folder / files[2]).read_bytes()[:-4])
    names = [list(load_file(folder / file)) for file in files[:2]]
    second = {name: weights[name] for name in names[1]} | {names[0][0]: weights[names[0][0]]}
    second[names[1][0]] = np.zeros((3, 2), np.float32)
    second[names[1][1]] = weights[names[1][1]].astype(np.int32)
    second["stranger"] = np.zeros(2, np.float32)
    save_file(second, folder / files[1])
    with pytest.raises(UserError) as caught:
        load_folder(folder)
    for part in (
        f"absent, though the index names them: {files[3]}",
        f"{files[2]} is cut short",
        f"in two files: {names[0][0]}",
        f"misshapen {names[1][0]} (3, 2) for",
        f"dtype I32, not one of F64, F32, F16, BF16: {names[1][1]}",
        "unexpected stranger (2,)",
    ):
        assert part in str(caught.value)
    assert "missing" not in str(caught.value), "one complaint about an unreadable file is enough"


def test_large_weights_are_saved_in_shards(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(folders, "SHARD_BYTES", 10_000)
    weights = init_params(MODEL, seed=0)
    save_folder(tmp_path / "folder", MODEL, weights)
    files = sorted(path.name for path in (tmp_path / "folder").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    # The embedding alone is 36,000 bytes and has a file to itself; the others share.
    assert sorted(len(load_file(tmp_path / "folder" / file)) for file in files)[0] == 1 < len(files) < len(weights)
    _, loaded = load_folder(tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name], weight)
        np.testing.assert_array_equal(theirs.get_parameter(name).detach().numpy(), weight)


EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TABLES = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for n in range(2)}


def bare(weights):
    """Names as the model without its head has them, those of a published embedding model."""
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def without(weights, *names):
    return {name: weight for name, weight in weights.items() if name not in names}


STORED = {
    "as it is": lambda w: w,
    "the head twice": lambda w: w | {HEAD: w[EMBEDDING]},
    "the head alone": lambda w: without(w, EMBEDDING) | {HEAD: w[EMBEDDING]},
    "the head twice, with a negative zero": lambda w: (
        w | {EMBEDDING: np.where(w[EMBEDDING] > 1, w[EMBEDDING], np.float32(0)), HEAD: 0 * w[EMBEDDING] - 0.0}
    ),
    "rotary tables": lambda w: w | TABLES,
    "no prefix": bare,
    "no prefix, rotary tables, the head alone": lambda w: bare(without(w, EMBEDDING) | TABLES) | {HEAD: w[EMBEDDING]},
    "one name without prefix": lambda w: without(w, NORM) | {"norm.weight": w[NORM]},
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", STORED)
def test_what_others_store_is_loaded_as_transformers_loads_it(case, count, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, weights = tmp_path / "folder", init_params(MODEL, seed=0)
    save_folder(folder, MODEL, weights)
    stored = STORED[case](weights)
    if count == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        shard(folder, stored, count)
    _, loaded = load_folder(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.keys() == weights.keys()
    for name in weights:
        np.testing.assert_array_equal(loaded[name], theirs.get_parameter(name).detach().numpy())


def nudged(weight):
    """One element off by one rounding, the last one, so that every piece is looked at."""
    weight = weight.copy()
    weight[-1, -1] = np.nextafter(weight[-1, -1], np.float32(9))
    return weight


QUANTISED = {f"{name}_scale_inv": np.ones((1, 1), np.float32) for name in (EMBEDDING, NORM)}
MISFITS = {
    "another head": (lambda w: w | {HEAD: nudged(w[EMBEDDING])}, "though tie_word_embeddings is true; set it false"),
    "a head of another shape": (lambda w: w | {HEAD: w[EMBEDDING][1:]}, "though tie_word_embeddings is true"),
    "a head of another dtype": (lambda w: w | {HEAD: w[EMBEDDING].astype(np.int32)}, "dtype I32, not one of"),
    "with and without prefix": (lambda w: w | {"norm.weight": w[NORM]}, f"{NORM} is there twice"),
    "another model": (lambda w: {f"transformer.h.{n}\n\x1b[2J": w[NORM] for n in range(900)}, "and 895 more"),
    "too few": (lambda w: {NORM: w[NORM]}, "holds 1 tensors, too few for num_hidden_layers=2"),
    "quantised": (lambda w: w | QUANTISED, "It is quantised; fetch it in bfloat16"),
    "eight bits": (lambda w: {n: x.astype(np.int8) for n, x in w.items()}, "It is quantised"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_one_short_line(case, tmp_path, monkeypatch):
    monkeypatch.setattr("harness.tensors.PIECE", 100)
    folder, weights = tmp_path / "folder", init_params(MODEL, seed=0)
    save_folder(folder, MODEL, weights)
    change, message = MISFITS[case]
    save_file(change(weights), folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_folder(folder)
    said = str(caught.value)
    assert message in said and said.isprintable() and len(said) < 1500


INDEXES = {
    "no index": ([], "holds a list"),
    "no map": ({}, "does not say weight_map"),
    "a list": ({"weight_map": ["a"]}, "weight_map=['a'] must be an object"),
    "numbers": ({"weight_map": {NORM: 3}}, "must be an object, each value a text"),
    "above": ({"weight_map": {NORM: "../other/model.safetensors"}}, "names what is no file of its folder"),
    "elsewhere": ({"weight_map": {NORM: "/etc/passwd"}}, "names what is no file of its folder: /etc/passwd"),
    "a null": ({"weight_map": {NORM: "a\0b"}}, "names what is no file of its folder"),
    "the folder": ({"weight_map": {NORM: ""}}, "cannot be read: Is a directory"),
    "a long name": ({"weight_map": {NORM: "a" * 5000}}, "cannot be read: File name too long"),
    "half a character": ({"weight_map": {NORM: "\ud800"}}, r"is no file of its folder: \ud800"),
    "control characters": ({"weight_map": {NORM: "\x1b[2J\n"}}, r"is no file of its folder: \x1b"),
    "another file": ({"weight_map": {NORM: "one", EMBEDDING: "two"}}, "not in the file that the index names"),
    "thousands absent": ({"weight_map": {str(n): f"shard-{n}" for n in range(3000)}}, "and 2,995 more"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_is_not_taken_on_trust(case, tmp_path):
    folder, weights = tmp_path / "folder", init_params(MODEL, seed=0)
    save_folder(folder, MODEL, weights)
    (folder / "model.safetensors").unlink()
    save_file({EMBEDDING: weights[EMBEDDING]}, folder / "one")
    save_file(without(weights, EMBEDDING), folder / "two")
    values, message = INDEXES[case]
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        load_folder(folder)
    said = str(caught.value)
    assert message in said and said.isprintable() and len(said) < 1500


def test_a_billion_layers_are_refused_before_names_are_made(tmp_path):
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=0))
    values = json.loads((tmp_path / "folder" / "config.json").read_text()) | {"num_hidden_layers": 10_000}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="too few for num_hidden_layers=10,000"):
        load_folder(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 10**9}))
    with pytest.raises(UserError, match="num_hidden_layers=1000000000 must be at most"):
        load_folder(tmp_path / "folder")
    with pytest.raises(UserError, match="too few for num_hidden_layers=16,384"):
        check_weights({}, dataclasses.replace(MODEL, num_hidden_layers=2**14))
    with pytest.raises(UserError, match="num_attention_heads=1000000000 must be at most"):
        dataclasses.replace(MODEL, num_attention_heads=10**9)


def test_windows_that_are_not_in_the_last_layers_are_refused():
    values = to_hf_config(dataclasses.replace(MODEL, sliding_window=7, max_window_layers=1))
    assert from_hf_config(values | {"layer_types": ["full_attention", "sliding_attention"]}).max_window_layers == 1
    with pytest.raises(UserError, match="only the last layers may have the window"):
        from_hf_config(values | {"layer_types": ["sliding_attention", "full_attention"]})


@pytest.mark.parametrize("command", [["inspect"], ["export"]], ids=["inspect", "export"])
def test_the_commands_refuse_in_one_line(command, tmp_path, capsys, monkeypatch):
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=0))
    folder = str(tmp_path / "folder")
    lines = {"inspect": ([str(tmp_path)], "holds no config.json"), "export": ([folder, folder], "exists already")}
    arguments, message = lines[command[0]]
    for argv, part in (
        (command + arguments, message),
        (["convert"], "is not a command"),
        ([], "choose inspect or export"),
    ):
        monkeypatch.setattr("sys.argv", ["checkpoint", *argv])
        assert cli.run(checkpoint.main) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ") and stderr.count("\n") == 1 and part in stderr


def test_export_changes_the_dtype_and_nothing_else(tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights, out = init_params(MODEL, seed=0), tmp_path / "out"
    tokenizer = train_bpe(["To be, or not to be, that is the question.\n" * 20], 300)
    save_folder(tmp_path / "run" / "best", MODEL, weights, tokenizer)
    values = json.loads((tmp_path / "run" / "best" / "config.json").read_text()) | {"unknown_to_us": 7}
    (tmp_path / "run" / "best" / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr("sys.argv", ["checkpoint", "export", str(tmp_path / "run"), str(out)])
    assert cli.run(checkpoint.main) == 0 and capsys.readouterr().out == f"{out}\n"
    assert json.loads((out / "config.json").read_text()) == values | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    model, exported = load_folder(out)
    assert model == MODEL
    for name, weight in weights.items():
        assert exported[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(exported[name], weight.astype(ml_dtypes.bfloat16))
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert {str(parameter.dtype) for parameter in theirs.parameters()} == {"torch.bfloat16"}
    assert AutoTokenizer.from_pretrained(out)("that")["input_ids"] == tokenizer.encode("that")


def test_inspect_says_what_a_folder_holds(tmp_path, capsys, monkeypatch):
    weights = init_params(MODEL, seed=0)
    weights["model.norm.weight"][3] = np.nan
    save_folder(tmp_path / "best", MODEL, weights)
    monkeypatch.setattr("sys.argv", ["checkpoint", "inspect", str(tmp_path)])
    assert cli.run(checkpoint.main) == 0
    said = capsys.readouterr().out
    for part in (
        str(tmp_path / "best"),
        "hidden_size=30",
        "rope_theta=12345.0",
        "F32",
        "NOT FINITE: model.norm.weight",
    ):
        assert part in said
    total = sum(weight.size for weight in weights.values())
    assert f"{total:,} (" in said and f"{len(weights)} tensors" in said and f"{4 * total:,} bytes" in said


def test_a_failed_save_leaves_the_old_folder(tmp_path):
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=0))
    before = (tmp_path / "folder" / "model.safetensors").read_bytes()
    with pytest.raises(UserError):
        save_folder(tmp_path / "folder", MODEL, {})
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == before
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=1))
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_tokenizer_travels_and_transformers_opens_it(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_bpe(["To be, or not to be, that is the question.\n" * 20], 300)
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=0), tokenizer)
    text = "not that, but zebras\n"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert theirs(text)["input_ids"] == tokenizer.encode(text) == load_tokenizer(tmp_path / "folder").encode(text)
    assert theirs.eos_token_id == tokenizer.eos_id == 0
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["eos_token_id"] == 0


def test_a_run_folder_means_its_best_weights(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        find_weights(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no config\.json, best/ or last/"):
        find_weights(str(tmp_path))
    save_folder(tmp_path / "last", MODEL, init_params(MODEL, seed=0))
    assert find_weights(str(tmp_path)) == tmp_path / "last"
    save_folder(tmp_path / "best", MODEL, init_params(MODEL, seed=0))
    assert find_weights(str(tmp_path)) == tmp_path / "best"
    assert find_weights(str(tmp_path / "last")) == tmp_path / "last"


def test_a_save_that_fails_leaves_nothing_and_the_folder_as_it_was(tmp_path, monkeypatch):
    save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=0))
    before = {path: path.read_bytes() for path in (tmp_path / "folder").iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_weights", full)
    with pytest.raises(OSError, match="No space left"):
        save_folder(tmp_path / "folder", MODEL, init_params(MODEL, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert {path: path.read_bytes() for path in (tmp_path / "folder").iterdir()} == before
