"""config.json: transformers' defaults, types, what is refused, what is named, and what we write is what it opens."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cli
from harness.commands import checkpoint
from harness.folders import load_config, save_folder
from harness.hf_config import FIELDS, NEUTRAL, from_hf_config, to_hf_config, unused
from recipe.config import ModelConfig, UserError
from recipe.params import init_params

MODEL = ModelConfig(vocab_size=300, hidden_size=30, intermediate_size=14, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, rope_theta=12_345.0)  # fmt: skip
QWEN3 = to_hf_config(MODEL)
LLAMA = to_hf_config(dataclasses.replace(MODEL, qk_norm=False))
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("family", FIELDS)
def test_types_and_defaults_are_those_of_transformers(family):
    from transformers import AutoConfig

    theirs = type(AutoConfig.for_model(family))
    fields = {field.name: field for field in dataclasses.fields(theirs)}
    elsewhere = {"rope_theta", "rope_scaling", "layer_types"} - fields.keys()
    for name in FIELDS[family].keys() - elsewhere:
        hint, default = FIELDS[family][name]
        assert (type(None) in typing.get_args(hint)) == ("None" in str(fields[name].type)), f"null in {name}"
        assert default is dataclasses.MISSING or default == fields[name].default, name
    assert FIELDS[family]["rope_theta"].default == theirs().rope_parameters["rope_theta"]
    assert {name for name, field in FIELDS[family].items() if field.default is dataclasses.MISSING} == set(SIZES)


@pytest.mark.parametrize(("family", "values"), [("qwen3", QWEN3), ("llama", LLAMA)])
def test_what_is_absent_is_transformers_default_or_asked_for(family, values):
    from transformers import AutoConfig

    # 32 heads of keys, Qwen3's default, need as many queries.
    bare = {"model_type": family} | {name: values[name] for name in SIZES} | {"num_attention_heads": 32}
    bare |= {"hidden_size": 64}
    ours, theirs = from_hf_config(bare), AutoConfig.for_model(**bare)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "attention_bias", "initializer_range"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.sliding_window is None
    for name in ("model_type", *SIZES):
        with pytest.raises(UserError, match=f"does not say {name}"):
            from_hf_config({key: value for key, value in bare.items() if key != name})


WRONG = [
    (QWEN3, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type='yarn'"),
    (QWEN3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    (QWEN3, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    (QWEN3, {"rope_parameters": {"rope_theta": None}}, "rope_theta=None"),
    (QWEN3, {"rope_parameters": None, "rope_theta": None}, "rope_theta=None"),
    (QWEN3, {"rope_parameters": None, "rope_theta": 10**400}, "rope_theta=1000"),
    (QWEN3, {"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
    (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (QWEN3, {"hidden_size": "32"}, "hidden_size='32'"),
    (QWEN3, {"num_hidden_layers": 2.0}, "num_hidden_layers=2.0"),
    (QWEN3, {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    (QWEN3, {"vocab_size": 10**400}, "vocab_size=1000"),
    (QWEN3, {"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    (QWEN3, {"head_dim": None}, "head_dim=None"),
    (QWEN3, {"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    (QWEN3, {"rms_norm_eps": 1}, "rms_norm_eps=1 "),
    (QWEN3, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
    (QWEN3, {"layer_types": ["sliding_attention"] * 2}, "there is no window"),
    (QWEN3, {"layer_types": ["full_attention"]}, "names 1 layers of 2"),
    (QWEN3, {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    (QWEN3, {"is_causal": None}, "is_causal=None"),
    (QWEN3, {"attribute_map": {}}, "attribute_map"),
    (QWEN3, {"__class__": 1}, "__class__"),
    (QWEN3, {"pad_token_id": 300}, "pad_token_id=300"),
    (QWEN3, {"architectures": ["Qwen3ForSequenceClassification"]}, "ForSequenceClassification"),
    (QWEN3, {"model_type": "a\x1b[31m\n" * 99}, "model_type="),
    (LLAMA, {"hidden_size": 32}, "multiple of num_attention_heads"),
    (LLAMA, {"initializer_range": 1.5}, "initializer_range=1.5"),
    (LLAMA, {"sliding_window": 7}, "sliding_window=7"),
    (LLAMA, {"layer_types": ["sliding_attention"] * 2}, "there is no window"),
    *[(values, {name: ["a\x1b[31m\n" * 99]}, f"{name}=") for values in (QWEN3, LLAMA) for name in NEUTRAL],
]


@pytest.mark.parametrize(("values", "change", "message"), WRONG, ids=[next(iter(change)) for _, change, _ in WRONG])
def test_what_this_model_is_not_is_refused_in_one_line(values, change, message):
    with pytest.raises(UserError) as caught:
        from_hf_config(values | change)
    assert message in str(caught.value) and "config.json: " in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_the_neutral_values_are_accepted():
    for name, (neutral, _) in NEUTRAL.items():
        for value in neutral:
            for values in (QWEN3, LLAMA):
                if name not in FIELDS[values["model_type"]]:
                    assert from_hf_config(values | {name: value}) == from_hf_config(values), name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 77.0}}, {"rope_theta": 77.0}),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7}, {"rope_theta": 7.0}),
        ({"rope_scaling": {}}, {}),
        ({"hidden_act": "swish"}, {}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 6}),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2},
         {"sliding_window": 5, "max_window_layers": 0}),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
          "layer_types": ["full_attention", "sliding_attention"]}, {"sliding_window": 5, "max_window_layers": 1}),
        ({"use_sliding_window": True, "sliding_window": None}, {}),
        ({"architectures": ["Qwen3Model"]}, {}),
    ],
)  # fmt: skip
def test_what_can_be_expressed_is_read_as_transformers_reads_it(change, expected):
    assert from_hf_config(QWEN3 | change) == dataclasses.replace(MODEL, **expected)


def test_an_absent_window_is_that_of_qwen3():
    values = {name: value for name, value in QWEN3.items() if name not in ("sliding_window", "max_window_layers")}
    read = from_hf_config(values | {"use_sliding_window": True})
    assert (read.sliding_window, read.max_window_layers) == (4_096, 28)


def test_inspect_names_what_is_not_used(tmp_path, capsys, monkeypatch):
    save_folder(tmp_path, MODEL, init_params(MODEL, seed=0))
    values = QWEN3 | {"comment": 1, "attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr("sys.argv", ["checkpoint", "inspect", str(tmp_path)])
    assert cli.run(checkpoint.main) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("not used"))
    assert "attention_dropout=0.1 (in training alone" in line and "comment (unknown to transformers too)" in line
    assert unused(QWEN3) == [] and len(unused(values)) == 2


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"model_type": ' + "[" * 9_999, '{"model_type": ["qwen3"]}', "{}"])
def test_what_is_no_configuration_is_refused_by_the_command(text, tmp_path, capsys, monkeypatch):
    save_folder(tmp_path, MODEL, init_params(MODEL, seed=0))
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["checkpoint", "inspect", str(tmp_path)])
    assert cli.run(checkpoint.main) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and "config.json" in stderr


@settings(max_examples=150, deadline=None)
@given(
    heads=st.integers(1, 6),
    kv_heads=st.integers(1, 6),
    width=st.integers(1, 40),
    numbers=st.sampled_from([1, 0.5, 1e-6, 2, 1.0]),
    spread=st.sampled_from([0, 1, 0.02, 1.0, 1.5, 2]),
    window=st.sampled_from([None, 1, 7]),
    first=st.integers(0, 4),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_what_we_write_transformers_opens_and_we_read_back(
    heads, kv_heads, width, numbers, spread, window, first, flags
):
    from transformers import AutoConfig

    model = dataclasses.replace(
        MODEL, num_attention_heads=heads * kv_heads, num_key_value_heads=kv_heads, hidden_size=width,
        rms_norm_eps=numbers, rope_theta=numbers, initializer_range=spread, sliding_window=window,
        max_window_layers=first if window else 0, tie_word_embeddings=flags[0], attention_bias=flags[1],
        qk_norm=flags[2],
    )  # fmt: skip
    try:
        values = to_hf_config(model)
    except UserError:
        assert not model.qk_norm, "a Qwen3 can always be written"
        return
    AutoConfig.for_model(**json.loads(json.dumps(values)))
    assert from_hf_config(values) == model


def test_a_llama_that_transformers_would_not_open_is_not_written(tmp_path):
    for change in ({"hidden_size": 32}, {"initializer_range": 1.5}, {"sliding_window": 7}):
        with pytest.raises(UserError, match="Llama"):
            to_hf_config(dataclasses.replace(MODEL, qk_norm=False, **change))
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_config(tmp_path)
