"""config.json, key by key: what transformers opens from the folder is what we compute, or we refuse in one line.

Two searches. One reads transformers' source for every field that it asks a configuration for; each must stand in our
tables. The other deletes, nulls and changes each key of folders that transformers wrote, adds every key of the first
search, and holds our logits and our reading against `from_pretrained` of that folder.
"""

import ast
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from harness import folders
from harness.folders import load_folder, save_folder
from harness.hf_config import FIELDS, HARMLESS, NEUTRAL, RESERVED, from_hf_config
from parity_tests import twins
from parity_tests.cases import FLOAT32, FLOAT64, random_tokens, random_weights
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import relative_error
from parity_tests.rope_noise import rounded_rope_tables
from parity_tests.sides import TorchModel
from recipe.config import ModelConfig, UserError
from recipe.contract import UNIT_ROUNDOFF
from recipe.reading import read_json

ROOT = Path(transformers.__file__).parent
READERS = """
    models/qwen3/modeling_qwen3 models/llama/modeling_llama modeling_utils modeling_layers masking_utils cache_utils
    utils/generic utils/output_capturing models/auto/auto_factory quantizers/auto integrations/sdpa_attention
    integrations/hub_kernels generation/utils fusion_mapping conversion_mapping core_model_loading
    models/qwen3/configuration_qwen3 models/llama/configuration_llama configuration_utils modeling_rope_utils
    integrations/heterogeneity/configuration_utils models/auto/configuration_auto
    """.split()
"""The modules of transformers between a folder of a Qwen3 or a Llama and its logits and text."""
CONFIGS = {"config", "config_dict", "text_config", "decoder_config", "layer_config", "effective_config"}
CONFIG_CLASSES = {
    "PreTrainedConfig", "RotaryEmbeddingConfigMixin", "HeterogeneousConfigMixin", "Qwen3Config", "LlamaConfig",
}  # fmt: skip
NO_FIELDS = {
    "config_class": "of a model class",
    "features_only": "of timm backbones, which no Qwen3 or Llama is",
    "num_channels": "of timm backbones",
    "out_indices": "of timm backbones",
    "pretrained_cfg": "of timm backbones",
    **dict.fromkeys(("get", "items", "pop", "values"), "a dict's method"),
    **dict.fromkeys(("revision", "trust_remote_code", "code_revision"), "an argument of from_pretrained"),
    **dict.fromkeys(("init_kwargs", "optional", "get_config_class", "fget"), "of a helper class"),
}
"""Names that the search finds and that no config.json holds."""


class _Search(ast.NodeVisitor):
    """Every `config.NAME`, `getattr(config, "NAME")`, `config["NAME"]`, `config.get("NAME")` and `"NAME" in config`."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.of_config = False
        """Whether `self` and `kwargs` are a configuration here."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.of_config = self.of_config, node.name in CONFIG_CLASSES
        self.generic_visit(node)
        self.of_config = before

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.is_config(node.value):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.add(node.value, node.slice)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for operator, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, (ast.In, ast.NotIn)):
                self.add(right, node.left)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[owner, name, *_]):
                self.add(owner, name)
            case ast.Call(func=ast.Attribute(value=owner, attr="get" | "pop" | "setdefault"), args=[name, *_]):
                self.add(owner, name)
        self.generic_visit(node)

    def add(self, owner: ast.expr, name: ast.expr) -> None:
        if self.is_config(owner) and isinstance(name, ast.Constant) and isinstance(name.value, str):
            self.names.add(name.value)

    def is_config(self, node: ast.expr) -> bool:
        match node:
            case ast.Name(id=name):
                return name in CONFIGS or (self.of_config and name == "self")
            case ast.Attribute(attr=name):
                return name == "config"
            case ast.Call(func=ast.Attribute(attr=name)):
                return name == "get_text_config"
        return False


@functools.cache
def fields_read() -> frozenset[str]:
    """Every field that transformers may read of a Qwen3's or Llama's config.json."""
    search = _Search()
    for reader in READERS:
        search.visit(ast.parse((ROOT / f"{reader}.py").read_text(encoding="utf-8")))
    # What is popped from the keywords of the configuration's own making.
    kwargs = _Search()
    kwargs.is_config = lambda node: isinstance(node, ast.Name) and node.id == "kwargs"  # type: ignore[method-assign]
    for reader in ("configuration_utils", "modeling_rope_utils"):
        for node in ast.walk(ast.parse((ROOT / f"{reader}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in ("__post_init__", "convert_rope_params_to_dict"):
                kwargs.visit(node)
    of_classes = {name for cls in (Qwen3Config, LlamaConfig) for name in dir(cls)}
    names = search.names | kwargs.names - {"pop", "get", "items"} | of_classes
    names |= GenerationConfig._get_default_generation_params().keys()
    return frozenset(name for name in names if not name.startswith("__")) - NO_FIELDS.keys()


def test_every_field_that_transformers_reads_is_in_a_table():
    known = {"model_type", *FIELDS["qwen3"], *FIELDS["llama"], *NEUTRAL, *HARMLESS, *RESERVED}
    assert not fields_read() - known, "decide for each: honoured, refused unless neutral, or harmless"


def test_the_search_finds_what_it_is_for():
    found = fields_read()
    assert {"hidden_size", "is_causal", "rope_theta", "rope_scaling", "attention_chunk_size", "auto_map"} <= found
    assert {"transformers_weights", "quantization_config", "kv_sharing_modes", "temperature", "attribute_map"} <= found


TOKENS = random_tokens(ModelConfig(vocab_size=53), 1, 40)
"""Longer than every window and every number that stands for an original length."""
SIZES = dict(
    vocab_size=53, hidden_size=30, intermediate_size=14, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
BASES = {
    "qwen3-window": Qwen3Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "qwen3-tied": Qwen3Config(**SIZES, tie_word_embeddings=True, attention_bias=True, rms_norm_eps=1e-3),
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}),
    "llama-heads": LlamaConfig(**SIZES | dict(num_key_value_heads=6, head_dim=5 + 1, hidden_size=36)),
}  # fmt: skip
"""Folders that transformers writes."""
OLD = ("llama-heads", "qwen3-tied")
"""Of these, what transformers 4 wrote: rope_theta and torch_dtype at the top."""
THETA = 77.0
ROPES: list[Any] = [
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 2.0, "rope_type": "default"},
    {"type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": THETA},
    {"rope_theta": THETA},
    {"rope_theta": 77},
    {"rope_theta": None},
    {"rope_theta": "77"},
    {"rope_theta": True},
    {"rope_theta": -1.0},
    {"rope_theta": 10**400},
    {"rope_type": None},
    {"rope_type": 7},
    {"type": "default"},
    {"rope_type": "default", "factor": 4.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "partial_rotary_factor": 1.0},
    {"mrope_section": [1, 1, 2]},
    {"full_attention": {"rope_type": "default", "rope_theta": THETA}},
    {"full_attention": {"rope_theta": THETA}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}},
    {}, [], "yarn", 2.0, False,
]  # fmt: skip
_FULL, _SLIDING = "full_attention", "sliding_attention"
EXTRAS: dict[str, list[Any]] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [THETA, 77, None, "77", True, 0, -1.0, [77.0], 10**400],
    "layer_types": [
        [_FULL] * 3, [_SLIDING] * 3, [_FULL, _FULL, _SLIDING], [_SLIDING, _FULL, _SLIDING], [_FULL] * 2, [_FULL] * 4,
        ["chunked_attention"] * 3, ["attention"] * 3, ["linear_attention"] * 3, [_FULL, _SLIDING, 3], _FULL, {}, [],
    ],
    "hidden_act": ["swish", "SiLU", "gelu", "relu", "quick_gelu", "swiglu", ["silu"]],
    "sliding_window": [None, 0, 1, 3, 4096, -1, 3.0, "3", True],
    "use_sliding_window": [True, False, None, "true"],
    "max_window_layers": [0, 1, 2, 3, 28, -1, None, 1.0],
    "architectures": [None, [], ["Qwen3Model"], ["LlamaForCausalLM"], ["Qwen3ForCausalLM"], ["BertModel"], "x", [1],
                      ["Qwen3ForSequenceClassification"], ["LLaMAForCausalLM"]],
    "model_type": ["qwen2", "qwen3_moe", "mistral", "gpt2", "qwen3", "llama", "", None, 3, ["qwen3"]],
    "quantization_config": [{}, {"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}],
    "transformers_weights": ["other.safetensors", "model.safetensors", ""],
    "per_layer_config": [{"0": {"num_attention_heads": 3}}, {0: {"sliding_window": 2}}, {}],
    "attribute_map": [{"hidden_size": "intermediate_size"}],
    "auto_map": [{"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}],
    "kv_sharing_modes": [["store", "reuse", "reuse"]],
    "text_config": [{"hidden_size": 8}],
    "dtype": ["bfloat16", "float16", "float99", "float8_e4m3fn", 16],
    "torch_dtype": ["float64", "int8"],
    "eos_token_id": [1, [1, 2], "1", -1, 10**6],
    "pad_token_id": [0, 52, 53, -1, -54, 1.0],
    "num_hidden_layers": [10**9],
    "num_attention_heads": [10**18],
    "id2label": [{"0": "a"}, {"0": 3}, []],
    "problem_type": ["regression", "other"],
    "attention_dropout": [0.5, 0, "0.5"],
    "pretraining_tp": [2, 1, "2"],
    "comment": ["of nobody's", None, {"is_causal": False}],
    "__class__": ["x"],
}  # fmt: skip
"""Values that mean something for a key, whether the folder has it or not."""


def neighbours(value: Any) -> list[Any]:
    """Null, values of other types, and values of the same type that mean something else."""
    other: list[Any] = [None, {}, [], [value], "x", str(value), True, False, 0, 1]
    if isinstance(value, bool):
        return [*other, not value]
    if isinstance(value, int):
        return [*other, value + 1, value - 1, 2 * value, -value, float(value), value + 0.5, 10**30]
    if isinstance(value, float):
        return [*other, 2.0 * value, 10.0 * value, -value, float("nan"), float("inf"), round(value), 1e300]
    if isinstance(value, str):
        return [*other, value.upper(), value + "2"]
    if isinstance(value, list):
        return [*other, value[::-1], value[1:], value + value[-1:]]
    return other


def changes(values: dict[str, Any], added: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every change of one key, and what it leaves of the file."""
    for key in values:
        yield f"{key} deleted", {name: value for name, value in values.items() if name != key}
    extras = {key: EXTRAS.get(key, []) + neighbours(value) for key, value in values.items()}
    extras |= {key: EXTRAS[key] for key in EXTRAS.keys() - values.keys()}
    dropped = GenerationConfig._get_default_generation_params()  # unseen, whatever its value
    extras |= {key: [7] if key in dropped else [None, True, "x"] for key in added if key not in extras}
    for key, variants in extras.items():
        seen = set()
        for value in variants:
            if repr(value) not in seen:
                seen.add(repr(value))
                yield f"{key}={value!r:.60}", values | {key: value}


def pairs(values: dict[str, Any], count: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Two changes at once, drawn from those of the keys that act together."""
    together = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types", "use_sliding_window", "sliding_window",
                "max_window_layers", "head_dim", "num_key_value_heads", "num_hidden_layers")  # fmt: skip
    acting = [change for change in changes(values, []) if change[0].split("=")[0].split(" ")[0] in together]
    generator = np.random.default_rng(seed)
    for first, second in generator.integers(0, len(acting), (count, 2)):
        (one, left), (two, right) = acting[first], acting[second]
        both = {key: value for key, value in left.items() if key in right or key not in values}
        both |= {key: value for key, value in right.items() if key not in values or value != values[key]}
        yield f"{one} and {two}", both


class Judged(NamedTuple):
    """What became of a folder here: refused, or a model; and what is wrong with that, if anything."""

    accepted: bool
    wrong: str = ""


class Bench:
    """A folder that transformers wrote, whose config.json is exchanged."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.file = folder, folder / "config.json"
        config = BASES[name]
        model = (Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM)(config)
        weights = random_weights(from_hf_config(config.to_dict()))
        state = {name: torch.tensor(weight, dtype=torch.float32) for name, weight in weights.items()}
        model.load_state_dict(state, strict=False)
        model.save_pretrained(folder)
        self.values = read_json(self.file)
        if name in OLD:
            self.values |= {"rope_theta": self.values.pop("rope_parameters")["rope_theta"]}
            self.values |= {"torch_dtype": self.values.pop("dtype")}
        self.ours: dict[ModelConfig, tuple[np.ndarray, float]] = {}

    def judge(self, values: dict[str, Any]) -> Judged:
        self.file.write_text(json.dumps(values), encoding="utf-8")
        try:
            model, stored = load_folder(self.folder)
        except UserError as error:
            text = str(error)
            plain = text.isprintable() and len(text) < 2000
            return Judged(False, "" if plain else f"no short line: {text[:80]!r}")
        except Exception as error:
            return Judged(False, f"{type(error).__name__}: {error}")
        weights = {name: np.asarray(weight, np.float64) for name, weight in stored.items()}
        try:
            theirs, report = self.load()
            with torch.no_grad():
                expected = theirs(torch.tensor(TOKENS).long(), use_cache=False, return_dict=True).logits.numpy()
        except Exception as error:
            return Judged(True, f"transformers refuses: {type(error).__name__}: {error!s:.80}")
        if report["missing_keys"] or report["mismatched_keys"] or report["unexpected_keys"]:
            return Judged(True, f"transformers lacks or drops weights: {report}")
        read = reading(theirs.config)
        ours = {name: getattr(model, name) for name in read if name not in ("windows", "qk_norm")}
        ours |= {"windows": [model.window_of_layer(layer) for layer in range(model.num_hidden_layers)]}
        ours |= {"qk_norm": model.qk_norm}
        if different := {name: (ours[name], read[name]) for name in read if ours[name] != read[name]}:
            return Judged(True, f"another reading: {different}")
        if model not in self.ours:
            self.ours[model] = measure(model, weights)
        logits, allowed = self.ours[model]
        error = relative_error(logits, expected[:, : logits.shape[1]])
        return Judged(True, "" if error <= allowed else f"other logits: {error:.1e}, allowed {allowed:.1e}")

    def load(self) -> tuple[Any, dict]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )


def measure(model: ModelConfig, weights: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """Our float32 logits, and how far transformers' may be from them: twice the larger share, as in
    test_transformers.py."""
    tokens = TOKENS[:, : model.max_position_embeddings]

    def compute() -> dict[str, np.ndarray]:
        return {"logits": TorchModel(model, FLOAT64, weights).logits(tokens)}

    with rounded_rope_tables(max(1.0, twins.frequency_error(model) / UNIT_ROUNDOFF["float32"])):
        kappas = amplification(compute, "float32")[1]
    allowed = allowances(kappas, "float32", erring=2)["logits"]
    return TorchModel(model, FLOAT32, weights).logits(tokens), allowed


def reading(config) -> dict[str, Any]:
    """transformers' own reading of a folder, in the fields of `ModelConfig`."""
    shared = {name: getattr(config, name) for name in (*SIZES, "rms_norm_eps", "tie_word_embeddings", "attention_bias")}
    kinds = getattr(config, "layer_types", None) or [_FULL] * config.num_hidden_layers
    return shared | {
        "rope_theta": config.rope_parameters["rope_theta"],
        "initializer_range": config.initializer_range,
        "windows": [config.sliding_window if kind == _SLIDING else None for kind in kinds],
        "qk_norm": config.model_type == "qwen3",
    }


@pytest.fixture(autouse=True)
def quiet():
    """Hundreds of folders are opened, of matrices that one thread multiplies fastest: no bars, no advice on each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.mark.parametrize("part", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", BASES)
def test_a_changed_key_is_read_as_transformers_reads_it_or_refused(base, part, tmp_path, record_property):
    """All changes take two minutes; every fourth, another quarter for each base, when nothing is said."""
    bench = Bench(base, tmp_path)
    assert bench.judge(bench.values) == Judged(True)
    index = list(BASES).index(base)
    added = sorted(fields_read())[index::4]
    cases = [*changes(bench.values, added), *pairs(bench.values, 40, seed=index)]
    judged = {change: bench.judge(values) for change, values in cases[index % part :: part]}
    wrong = {change: verdict.wrong for change, verdict in judged.items() if verdict.wrong}
    record_property("cases", len(judged))
    record_property("accepted", sum(verdict.accepted for verdict in judged.values()))
    print(f"\n{base}: {len(judged)} changes, {sum(v.accepted for v in judged.values())} accepted, {len(wrong)} wrong")
    assert not wrong, "\n".join(f"{change}: {text}" for change, text in wrong.items())


WINDOWED = ModelConfig(**SIZES, sliding_window=5, max_window_layers=1, rope_theta=500.0, tie_word_embeddings=False)


def report_of(folder: Path, monkeypatch, misread, **change):
    """The report on a folder, with a change of its config.json, whose configuration is misread on our side alone."""
    save_folder(folder, WINDOWED, random_weights(WINDOWED))
    file = folder / "config.json"
    file.write_text(json.dumps(read_json(file) | change), encoding="utf-8")
    monkeypatch.setattr(folders, "from_hf_config", lambda values: misread)
    options = twins.TwinOptions(
        weights=str(folder), dtype=("float32",), batch_size=1, sequence_length=12, backward=False
    )
    return twins.compare_twins(options)


@pytest.mark.parametrize(
    ("misread", "change"),
    [
        ({"rope_theta": 1000.0}, {}),
        ({"sliding_window": None}, {}),
        ({}, {"is_causal": False}),
        ({}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    ],
)
def test_the_third_opinion_does_not_hang_on_our_reading(misread, change, tmp_path, monkeypatch):
    found = report_of(tmp_path, monkeypatch, dataclasses.replace(WINDOWED, **misread), **change)
    assert found.exit_code == 1
    assert found.first_divergence.side == "transformers", "our two sides agree in the mistake"


def test_a_folder_that_transformers_does_not_open_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="transformers does not open") as caught:
        report_of(tmp_path / "folder", monkeypatch, WINDOWED, num_attention_heads="six\n" * 99)
    assert str(caught.value).isprintable()


def test_a_padding_token_has_a_gradient_in_the_comparison(tmp_path, monkeypatch):
    save_folder(tmp_path, WINDOWED, random_weights(WINDOWED))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(read_json(file) | {"pad_token_id": 3}), encoding="utf-8")
    options = twins.TwinOptions(weights=str(tmp_path), dtype=("float32",), batch_size=1, sequence_length=12)
    subject = twins.make_subject(options)
    tokens = np.full_like(subject.tokens, 3)
    report = twins.compare_subject(dataclasses.replace(subject, tokens=tokens), ("float32",), title="padding")
    assert report.exit_code == 0, report.verdict()
