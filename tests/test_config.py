"""Configuration, presets, parameter contract and schedule: what both frameworks take for granted."""

import dataclasses
import json
import math
from typing import get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.config import (
    AdamWConfig,
    DataConfig,
    HostsConfig,
    ModelConfig,
    MuonConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    UserError,
    divisors,
    from_dict,
    to_dict,
)
from recipe.params import init_params, newton_schulz_flops, param_counts, param_specs, train_flops_per_token
from recipe.presets import PRESETS, get_preset
from recipe.sampling import SamplingOptions
from recipe.schedule import learning_rate_factors

PARTS = [ModelConfig, MuonConfig, AdamWConfig, ScheduleConfig, DataConfig, PrecisionConfig, RunConfig]

# No two sizes equal: D=30 F=14 N=6 K=2 H=4 V=53, three layers.
AWKWARD = ModelConfig(
    vocab_size=53,
    hidden_size=30,
    intermediate_size=14,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
)


def fields_of(kind: type) -> list[tuple[type, str]]:
    return [(part, name) for part in PARTS for name, hint in get_type_hints(part).items() if hint is kind]


FLOATS, INTS = fields_of(float), fields_of(int)


def test_the_field_lists_below_are_not_empty():
    assert len(FLOATS) >= 17 and len(INTS) >= 18


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize(("part", "name"), FLOATS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_no_float_is_nan_infinite_or_negative(part, name, value):
    with pytest.raises(ValueError, match=rf"{name}={value}\b.*\bchoose\b"):
        part(**{name: value})


@pytest.mark.parametrize(("part", "name"), INTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_no_int_is_negative(part, name):
    with pytest.raises(ValueError, match=rf"{name}=-1 .*\bchoose\b"):
        part(**{name: -1})


@pytest.mark.parametrize(("part", "name"), INTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_no_int_is_larger_than_any_array(part, name):
    with pytest.raises(UserError, match=rf"{name}=100000000000000000000 must .*\bchoose\b"):
        part(**{name: 10**20})


ZERO_IS_FINE = {"max_window_layers", "profile_steps", "sample_tokens", "seed"}


@pytest.mark.parametrize(("part", "name"), INTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_zero_counts_only_where_it_means_something(part, name):
    if name in ZERO_IS_FINE:
        assert getattr(part(**{name: 0}), name) == 0
    else:
        with pytest.raises(ValueError, match=f"{name}=0 "):
            part(**{name: 0})


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (ModelConfig, {"num_attention_heads": 8, "num_key_value_heads": 3}, "choose 1 or 2 or 4 or 8"),
        (ModelConfig, {"num_attention_heads": 2, "num_key_value_heads": 4}, "choose 1 or 2"),
        (ModelConfig, {"head_dim": 7}, "head_dim=7 must be even"),
        (ModelConfig, {"sliding_window": 0}, "sliding_window=0"),
        (ModelConfig, {"dropout": 1.0}, "dropout=1.0"),
        (ModelConfig, {"dropout": 7e-6}, "dropout=7e-06 must be 0 or a rate that 16 bits tell from 0 and 1"),
        (ModelConfig, {"dropout": 0.999995}, "dropout=0.999995 must be 0 or a rate that 16 bits tell"),
        (AdamWConfig, {"beta2": 1.0}, "beta2=1.0"),
        (MuonConfig, {"beta": 1.0}, "beta=1.0"),
        (ScheduleConfig, {"final_factor": 1.01}, "final_factor=1.01"),
        (ScheduleConfig, {"warmup_fraction": 1.0}, "warmup_fraction=1.0"),
        (DataConfig, {"bpe_vocab_size": 256}, "bpe_vocab_size=256 must be at least 257"),
        (DataConfig, {"max_documents": 0}, "max_documents=0"),
        (DataConfig, {"max_characters": -3}, "max_characters=-3"),
        (DataConfig, {"max_tokens": 0}, "max_tokens=0"),
        (DataConfig, {"validation_fraction": 0.0}, "validation_fraction=0.0 must lie above 0 .*choose e.g. 0.05"),
        (DataConfig, {"validation_fraction": 1.0}, "validation_fraction=1.0 must lie above 0 and below 1"),
        (DataConfig, {"max_documents": 10**20}, "max_documents=1000.* below 2147483648"),
        (DataConfig, {"corpus": " "}, "names nothing; choose e.g. 'shakespeare'"),
        (PrecisionConfig, {"params": "float64"}, "set both or neither"),
        (RunConfig, {"seed": 2**32}, "seed=4294967296"),
        (RunConfig, {"sequence_length": 1025}, "lower the one or raise the other"),
        (RunConfig, {"divergence_factor": 1.0}, "divergence_factor=1.0 must be a finite number above 1; choose e.g. 3"),
        (RunConfig, {"rollback_factor": 0.0}, "rollback_factor=0.0 must be a finite number above 0 and at most 1"),
        (RunConfig, {"rollback_factor": 1.5}, "rollback_factor=1.5 must be a finite number above 0 and at most 1"),
    ],
)
def test_rules_between_fields(part, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        part(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (PrecisionConfig, {"params": "float16"}, "precision.params='float16' must be one of float32, "),
        (ModelConfig, {"vocab_size": 2.5}, "vocab_size=2.5 must be a whole number (int); choose e.g. 8192."),
        (ModelConfig, {"vocab_size": True}, "vocab_size=True must be a whole number (int)"),
        (RunConfig, {"steps": "3"}, "steps='3' must be a whole number (int); choose e.g. 100."),
        (RunConfig, {"clip_norm": True}, "clip_norm=True must be a number (float); choose e.g. 1.0."),
        (RunConfig, {"prompts": ["a"]}, "prompts=['a'] must be a tuple, each part a text (str)"),
        (RunConfig, {"prompts": ("a", 3)}, "prompts=('a', 3) must be a tuple"),
        (RunConfig, {"out": None}, "out=None must be a text (str)"),
        (RunConfig, {"model": {}}, "model={} must be a ModelConfig; choose another."),
        (ModelConfig, {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be True or False (bool)"),
        (ModelConfig, {"qk_norm": 1}, "qk_norm=1 must be True or False (bool)"),
        (ModelConfig, {"sliding_window": 7.0}, "sliding_window=7.0 must be a whole number (int) or None"),
        (MuonConfig, {"ns_steps": 5.0}, "muon.ns_steps=5.0 must be a whole number (int); choose e.g. 5."),
        (AdamWConfig, {"decay_norms": 0}, "adamw.decay_norms=0 must be True or False"),
        (ScheduleConfig, {"final_factor": "0"}, "schedule.final_factor='0' must be a number (float)"),
        (HostsConfig, {"heartbeat": 0}, "hosts.heartbeat=0 must be a whole number above 0;"),
        (HostsConfig, {"coordinator": "nowhere"}, "hosts.coordinator=nowhere must be ADDRESS:PORT or auto;"),
        (HostsConfig, {"coordinator": "a:1"}, "hosts.coordinator=a:1 needs --hosts.count and --hosts.index"),
        (HostsConfig, {"count": 2}, "hosts.count and hosts.index need --hosts.coordinator ADDRESS:PORT"),
        (HostsConfig, {"coordinator": "a:1", "count": 2, "index": 2}, "hosts.index=2 must lie in [0, hosts.count=2);"),
        (DataConfig, {"split": "x"}, "data.split='x' must be one of documents, hashed, leaking-windows;"),
        (SamplingOptions, {"top_k": 2.5}, "top_k=2.5 must be a whole number (int); choose e.g. 0."),
        (SamplingOptions, {"stop": "ab"}, "stop='ab' must be a tuple, each part a text (str)"),
        (ModelConfig, {"max_window_layers": -1}, "=-1 must be a whole number of at least 0; choose e.g. 0."),
        (ModelConfig, {"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be a finite number above 0; choose e.g. 1e-06."),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_at_birth(part, values, message):
    with pytest.raises(UserError) as caught:
        part(**values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_fields_type_is_one_that_the_check_knows():
    for part in [*PARTS, SamplingOptions]:
        assert dataclasses.replace(part()) == part()
    assert ModelConfig(rope_theta=10_000, sliding_window=3).rope_theta == 10_000, "a float may be written as an int"


def test_run_json_is_checked_like_everything_else():
    values = to_dict(RunConfig())
    with pytest.raises(UserError, match=r"precision\.params='float16'"):
        from_dict(values | {"precision": values["precision"] | {"params": "float16"}})


def test_the_limits_themselves_are_allowed():
    ModelConfig(num_attention_heads=6, num_key_value_heads=6, sliding_window=1, dropout=0.0)
    ScheduleConfig(final_factor=1.0, warmup_fraction=0.0)
    DataConfig(bpe_vocab_size=257, max_documents=1, max_characters=1, max_tokens=1)
    PrecisionConfig(params="float64", compute="float64")
    RunConfig(seed=2**32 - 1, sequence_length=1024, rollback_factor=1.0, keep=1, max_rollbacks=1)


def test_a_config_cannot_be_changed():
    for part in PARTS:
        config = part()
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(part)[0].name, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    config = get_preset(name)
    assert config.preset == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="stepz"):
        from_dict(to_dict(RunConfig()) | {"stepz": 3})
    with pytest.raises(ValueError, match="steps=0"):
        from_dict(to_dict(RunConfig()) | {"steps": 0})


@pytest.mark.parametrize(("typo", "nearest"), [("tinny", "tiny"), ("qwen3-0.6B", "qwen3-0.6b"), ("", ""), ("?", "")])
def test_an_unknown_preset_names_the_nearest(typo, nearest):
    with pytest.raises(ValueError, match=f"did you mean {nearest}.*The presets are tiny, seed"):
        get_preset(typo)


def test_tokens_per_step_and_vocabulary():
    config = RunConfig(accumulation=3, batch_size=5, sequence_length=7)
    assert config.tokens_per_step == 105
    other = config.with_vocab_size(11)
    assert other.model.vocab_size == 11
    assert dataclasses.replace(other, model=config.model) == config


@given(st.integers(1, 2000))
def test_divisors_are_those_that_divide(n):
    found = divisors(n)
    assert found == sorted(found) and all(n % d == 0 for d in found)
    assert len(found) == sum(n % d == 0 for d in range(1, n + 1))


def test_the_window_starts_at_its_layer():
    config = dataclasses.replace(AWKWARD, sliding_window=5, max_window_layers=1)
    assert [config.window_of_layer(layer) for layer in range(3)] == [None, 5, 5]
    assert [AWKWARD.window_of_layer(layer) for layer in range(3)] == [None] * 3


# Totals of the published checkpoints (tied tables counted once), and the seed notebook's printed counts.
PUBLISHED = {
    "seed": (32_150_976, 13_271_040, 18_879_936),
    "qwen3-0.6b": (596_049_920, None, None),
    "qwen3-1.7b": (1_720_574_976, None, None),
    "qwen3-4b": (4_022_468_096, None, None),
    "qwen3-8b": (8_190_735_360, None, None),
    "qwen3-14b": (14_768_307_200, None, None),
    "qwen3-32b": (32_762_123_264, None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    counts = param_counts(get_preset(name).model)
    for ours, published in zip(counts, PUBLISHED[name], strict=True):
        assert published in (None, ours)
    assert counts.muon + counts.adamw == counts.total


def test_every_preset_but_tiny_has_a_published_count():
    assert set(PRESETS) - {"tiny"} == set(PUBLISHED)


def test_the_contract_of_one_awkward_model():
    specs = param_specs(AWKWARD)
    block = {
        "input_layernorm.weight": ((30,), "norm"),
        "self_attn.q_proj.weight": ((24, 30), "matrix"),
        "self_attn.k_proj.weight": ((8, 30), "matrix"),
        "self_attn.v_proj.weight": ((8, 30), "matrix"),
        "self_attn.o_proj.weight": ((30, 24), "matrix"),
        "self_attn.q_norm.weight": ((4,), "norm"),
        "self_attn.k_norm.weight": ((4,), "norm"),
        "post_attention_layernorm.weight": ((30,), "norm"),
        "mlp.gate_proj.weight": ((14, 30), "matrix"),
        "mlp.up_proj.weight": ((14, 30), "matrix"),
        "mlp.down_proj.weight": ((30, 14), "matrix"),
    }
    expected = {"model.embed_tokens.weight": ((53, 30), "embedding"), "model.norm.weight": ((30,), "norm")}
    for layer in range(3):
        expected |= {f"model.layers.{layer}.{name}": spec for name, spec in block.items()}
    assert specs == expected


def test_switches_add_and_remove_parameters():
    names = set(param_specs(AWKWARD))
    biased = param_specs(dataclasses.replace(AWKWARD, attention_bias=True))
    added = {name: biased[name] for name in set(biased) - names}
    for layer in range(3):
        for projection, width in {"q": 24, "k": 8, "v": 8, "o": 30}.items():
            assert added.pop(f"model.layers.{layer}.self_attn.{projection}_proj.bias") == ((width,), "bias")
    assert not added
    untied = param_specs(dataclasses.replace(AWKWARD, tie_word_embeddings=False))
    assert set(untied) - names == {"lm_head.weight"} and untied["lm_head.weight"] == ((53, 30), "head")
    plain = set(param_specs(dataclasses.replace(AWKWARD, qk_norm=False)))
    removed = {f"model.layers.{layer}.self_attn.{part}_norm.weight" for layer in range(3) for part in "qk"}
    assert names - plain == removed and plain < names


def test_initial_weights_follow_the_contract():
    config = dataclasses.replace(AWKWARD, attention_bias=True, tie_word_embeddings=False, initializer_range=0.5)
    weights, specs = init_params(config, seed=3), param_specs(config)
    assert list(weights) == list(specs)
    drawn = []
    for name, (shape, role) in specs.items():
        assert weights[name].shape == shape and weights[name].dtype == np.float32
        if role == "norm":
            assert np.all(weights[name] == 1)
        elif role == "bias":
            assert np.all(weights[name] == 0)
        else:
            drawn.append(weights[name].ravel())
    pooled = np.concatenate(drawn).astype(np.float64) / 0.5
    # Mean of n normals has deviation 1/sqrt(n), their variance sqrt(2/n): five deviations, seed fixed.
    assert abs(pooled.mean()) < 5 / math.sqrt(pooled.size)
    assert abs(pooled.var() - 1) < 5 * math.sqrt(2 / pooled.size)


def test_initial_weights_depend_on_seed_and_name_alone():
    weights, again, other = (init_params(AWKWARD, seed) for seed in (1, 1, 2))
    more = init_params(dataclasses.replace(AWKWARD, num_hidden_layers=5, attention_bias=True), 1)
    for name, (_, role) in param_specs(AWKWARD).items():
        assert np.array_equal(weights[name], again[name]) and np.array_equal(weights[name], more[name])
        assert role == "norm" or not np.any(weights[name] == other[name])
    first, second = (weights[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert not np.any(first == second)


def test_flops_counted_by_hand():
    matrices = 3 * (2 * 24 * 30 + 2 * 8 * 30 + 3 * 14 * 30)
    # Four positions see 1, 2, 3 and 4 keys: 2.5 on average in each of three layers; N*H = 24.
    assert train_flops_per_token(AWKWARD, 4) == 6 * (matrices + 53 * 30) + 12 * 24 * 3 * 2.5
    windowed = dataclasses.replace(AWKWARD, sliding_window=2, max_window_layers=1)
    assert train_flops_per_token(windowed, 4) == 6 * (matrices + 53 * 30) + 12 * 24 * (2.5 + 1.75 + 1.75)
    per_layer = 2 * (4 * 24**2 * 30 + 2 * 24**3) + 2 * (4 * 8**2 * 30 + 2 * 8**3) + 3 * (4 * 14**2 * 30 + 2 * 14**3)
    assert newton_schulz_flops(AWKWARD, ns_steps=7) == 7 * 3 * per_layer


def test_the_schedule_of_twenty_updates():
    factors = learning_rate_factors(ScheduleConfig(warmup_fraction=0.2, final_factor=0.1), 20)
    assert factors.dtype == np.float64 and factors.shape == (20,)
    assert factors[:5].tolist() == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[-1] == 0.1
    halfway = learning_rate_factors(ScheduleConfig(warmup_fraction=0.2, final_factor=0.1), 24)  # warm-up 5, 5 + 9 = 14
    assert halfway[14] == 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))


@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(0, 1))
def test_the_schedule_rises_then_falls_to_its_end(steps, warmup_fraction, final_factor):
    config = ScheduleConfig(warmup_fraction=warmup_fraction, final_factor=final_factor)
    factors = learning_rate_factors(config, steps)
    warmup = round(warmup_fraction * steps)
    assert factors.shape == (steps,) and np.all(factors <= 1) and np.all(factors[:warmup] > 0)
    assert np.all(np.diff(factors[:warmup]) > 0) and np.all(np.diff(factors[warmup:]) <= 0)
    assert factors[max(0, warmup - 1)] == 1.0
    if steps - warmup >= 2:
        assert factors[warmup] == 1.0 and factors[-1] == final_factor
