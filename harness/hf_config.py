"""config.json, as Hugging Face writes it, and `ModelConfig`: one into the other.

Every field that transformers reads on its way to a Qwen3's or Llama's logits stands in one of the tables below:
honoured, refused unless neutral, or harmless; `parity_tests/test_config_keys.py` finds them in transformers' source.
"""

from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Literal, NamedTuple

from recipe.config import ModelConfig, UserError, require
from recipe.reading import short, some, take

WHERE = "config.json"


class Field(NamedTuple):
    """A field that is honoured: its type, and what transformers' configuration class takes where it is absent."""

    hint: Any
    default: Any = MISSING


_COMMON = {
    "vocab_size": Field(int),
    "hidden_size": Field(int),
    "intermediate_size": Field(int),
    "num_hidden_layers": Field(int),
    "num_attention_heads": Field(int),
    "hidden_act": Field(str, "silu"),
    "initializer_range": Field(float, 0.02),
    "rms_norm_eps": Field(float, 1e-6),
    "tie_word_embeddings": Field(bool, False),
    "attention_bias": Field(bool, False),
    "rope_theta": Field(float | None, 10_000.0),
    "rope_parameters": Field(dict | None, None),
    "rope_scaling": Field(dict | None, None),
    "layer_types": Field(list[str] | None, None),
    "architectures": Field(list[str] | None, None),
    "pad_token_id": Field(int | None, None),
}
FIELDS: dict[str, dict[str, Field]] = {
    "qwen3": _COMMON
    | {
        "num_key_value_heads": Field(int | None, 32),
        "head_dim": Field(int, 128),
        "max_position_embeddings": Field(int, 32_768),
        "use_sliding_window": Field(bool, False),
        "sliding_window": Field(int | None, 4_096),
        "max_window_layers": Field(int, 28),
        "attention_dropout": Field(float, 0.0),
    },
    "llama": _COMMON
    | {
        "num_key_value_heads": Field(int | None, None),
        "head_dim": Field(int | None, None),
        "max_position_embeddings": Field(int, 2_048),
        "attention_dropout": Field(float | None, 0.0),
    },
}
"""Per family, the fields that are honoured. A null stands for another one, or for none, where the hint allows it.

The five sizes that a model is known by have defaults in transformers too, but a file without them is a damaged one.
"""

_TO_MODEL = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "initializer_range",
)

_NONE, _OFF, _WAYS = (None,), (None, False), (None, "eager", "sdpa")
NEUTRAL: dict[str, tuple[tuple, str]] = {
    "is_causal": ((True,), "a query here sees only what is before it"),
    "use_bidirectional_attention": (_OFF, "a query here sees only what is before it"),
    "is_encoder_decoder": ((False,), "this model has no encoder"),
    "add_cross_attention": (_OFF, "this model has no encoder"),
    "mlp_bias": ((False,), "the MLP here has no bias"),
    "partial_rotary_factor": ((None, 1, 1.0), "RoPE here turns the whole head"),
    "sliding_window": (_NONE, "Llama has no sliding window"),
    "use_sliding_window": (_OFF, "Llama has no sliding window"),
    "attention_chunk_size": (_NONE, "attention here has no chunks"),
    "kv_sharing_modes": (_NONE, "each layer here has its own keys and values"),
    "per_layer_config": (_NONE, "all layers here are alike"),
    "mlp_layer_types": (_NONE, "all MLPs here are dense"),
    "number_of_conv_states": (_NONE, "this model has no convolution"),
    "first_k_dense_replace": (_NONE, "all MLPs here are dense"),
    "num_local_experts": (_NONE, "all MLPs here are dense"),
    "qk_head_dim": (_NONE, "queries, keys and values here have one width"),
    "num_heads": (_NONE, "it contradicts num_attention_heads or repeats it"),
    "embed_dim": (_NONE, "it contradicts hidden_size or repeats it"),
    "unpadded_vocab_size": (_NONE, "the head here has vocab_size rows"),
    "logits_mup_width_multiplier": (_NONE, "logits here are not scaled"),
    "quantization_config": (_NONE, "weights here are plain floats"),
    "compression_config": (_NONE, "weights here are plain floats"),
    "transformers_weights": (_NONE, "it names other weights than the folder's usual ones"),
    "configuration_files": ((), "it names another configuration than this file"),
    "fusion_config": (_NONE, "it changes modules"),
    "return_dict": ((None, True), "transformers' own model fails then"),
    "attn_implementation": (_WAYS, "transformers opens no other everywhere"),
    "_attn_implementation": (_WAYS, "transformers opens no other everywhere"),
    "experts_implementation": ((None, "eager"), "all MLPs here are dense"),
    "_experts_implementation": ((None, "eager"), "all MLPs here are dense"),
    "distributed_config": (_NONE, "weights here lie in one place"),
    **dict.fromkeys(("text_config", "decoder", "generator", "text_encoder", "encoder", "vision_config"),
                    (_NONE, "this model is not a part of another")),
    **dict.fromkeys(("num_mtp_layers", "num_nextn_predict_layers"), ((None, 0), "this model predicts one token")),
    **dict.fromkeys(("mtp_layer_types", "mtp_mlp_layer_types", "mtp_per_layer_config", "mtp_hidden_states_first",
                     "chain_hidden_post_norm"), (_NONE, "this model predicts one token")),
}  # fmt: skip
"""What this model does not have: the values that ask for nothing, and what there is instead."""

_Dtype = Literal["float64", "float32", "float16", "bfloat16", "double", "float", "half"]
_Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
_TEXTS, _CLASSES, _MADE = "how a text is written", "for classifiers", "how it was computed or saved"
HARMLESS: dict[str, tuple[Any, str]] = {
    "attention_dropout": (None, "in training alone, where model.dropout says it"),
    "pretraining_tp": (int | None, "slices of a product"),
    "original_max_position_embeddings": (None, "for scaled RoPE, which is refused"),
    "max_window_layers": (None, "Llama has no sliding window"),
    "dtype": (_Dtype | None, "each weight has its own"),
    "torch_dtype": (_Dtype | None, "each weight has its own"),
    "eos_token_id": (int | list[int] | None, _TEXTS),
    "bos_token_id": (int | None, _TEXTS),
    "pad_token_id": (int | None, "in training alone, where no row is skipped"),
    "use_cache": (bool, _TEXTS),
    "sep_token_id": (None, _TEXTS),
    "decoder_start_token_id": (None, _TEXTS),
    **dict.fromkeys("""
        assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty
        do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
        exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
        no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
        num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
        suppress_tokens target_lookbehind temperature top_k top_p typical_p
        """.split(), (None, _TEXTS)),
    "problem_type": (_Problem | None, _CLASSES),
    "id2label": (dict[str, str] | None, _CLASSES),
    "label2id": (dict[str, int] | None, _CLASSES),
    "num_labels": (int, _CLASSES),
    **dict.fromkeys(("classifier_dropout", "hidden_dropout", "token_classification_bias"), (None, _CLASSES)),
    "output_hidden_states": (bool | None, "the form of transformers' output"),
    **dict.fromkeys(("output_attentions", "tie_last_hidden_states"), (None, "the form of transformers' output")),
    **dict.fromkeys(("init_std", "initializer_factor"), (None, "initializer_range says it")),
    "auto_map": (None, "no code of a folder's is run"),
    "chunk_size_feed_forward": (int, _MADE),
    "gradient_checkpointing": (None, _MADE),
    "transformers_version": (str | None, _MADE),
    "architectures": (None, _MADE),
    **dict.fromkeys("""
        name_or_path _name_or_path _commit_hash _output_attentions _attn_implementation_autoset
        _attn_implementation_internal _experts_implementation_internal
        """.split(), (None, _MADE)),
}  # fmt: skip
"""What cannot change a logit: the type that transformers demands, if any, and why not."""

RESERVED = frozenset(
    """
    _auto_class _check_received_keys _decode_special_floats _dict_from_json_file _encode_special_floats _get_config_dict
    _get_files_timestamps _get_generation_parameters _getattr_without_heterogeneous_validation
    _hasattr_without_heterogeneous_validation _heterogeneity_spec _iter_config_keys_with_heterogeneous_adjustment
    _post_init_done _remove_keys_not_serialized _rope_type_labels _update_heterogeneous_to_dict_output
    _upload_modified_files _validate_axial_rope_parameters _validate_default_rope_parameters
    _validate_dynamic_rope_parameters _validate_linear_rope_parameters _validate_llama3_rope_parameters
    _validate_longrope_rope_parameters _validate_proportional_rope_parameters _validate_yarn_rope_parameters
    allow_global_per_layer_attribute_access attribute_map base_config_key base_model_ep_plan base_model_fsdp_plan
    base_model_pp_plan base_model_tp_plan convert_rope_params_to_dict default_config_fields default_rope_type
    default_theta dict_dtype_to_str extra_config_files extra_files from_dict from_json_file from_pretrained
    get_config_dict get_mtp_config get_text_config ignore_keys_at_rope_validation is_custom_code is_heterogeneous
    is_remote_code nested_rope_parameter_keys per_layer_attributes push_to_hub register_for_auto_class save_pretrained
    serialize_explicit_per_layer_config standardize_rope_params sub_configs sub_configs_defaults to_dict to_diff_dict
    to_json_file to_json_string update update_from_string use_return_dict validate validate_architecture
    validate_layer_type validate_output_attentions validate_rope validate_token_ids
    """.split()
)
"""Parts of transformers' configuration class, which a field of the same name would replace."""


def to_hf_config(config: ModelConfig, eos_id: int | None = None, dtype: str = "float32") -> dict:
    """The model as a config.json that transformers 4 and 5 read; without QK-norm it is a Llama.

    A model that Llama's configuration class does not allow raises `UserError`.
    """
    windowed = config.sliding_window is not None
    if not config.qk_norm:
        require(not windowed, "Hugging Face's Llama has no sliding window; set model.qk_norm or drop the window.")
        _check_llama(config)
    family = "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    values = {
        "architectures": [family],
        "model_type": "qwen3" if config.qk_norm else "llama",
        **{name: getattr(config, name) for name in _TO_MODEL},
        # An int, which a ModelConfig may hold, is no number to transformers.
        "rms_norm_eps": float(config.rms_norm_eps),
        "initializer_range": float(config.initializer_range),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if config.qk_norm:
        values |= {
            "use_sliding_window": windowed,
            "sliding_window": config.sliding_window,
            "max_window_layers": config.max_window_layers if windowed else config.num_hidden_layers,
        }
    return values


def from_hf_config(values: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a Qwen3 or Llama config.json: what transformers would compute, or `UserError`."""
    family = take(values, "model_type", str, WHERE)
    require(
        family in FIELDS,
        f"{WHERE}: model_type={short(repr(family))} is not supported; use a Qwen3 or Llama folder.",
    )
    _check_others(values, family)
    fields = {name: take(values, name, hint, WHERE, default) for name, (hint, default) in FIELDS[family].items()}
    _check_numbers(fields)
    act, names = fields["hidden_act"], fields["architectures"]
    require(
        act in ("silu", "swish"),
        f"{WHERE}: hidden_act={short(repr(act))} must be 'silu', the one activation of this model; use another folder.",
    )
    # The first Llamas spell it LLaMAForCausalLM; a bare Model lacks the head, which a tied one does not need.
    known = not names or any(name.casefold() in (f"{family}forcausallm", f"{family}model") for name in names)
    require(
        known, f"{WHERE}: architectures={short(repr(names))} is not {family}'s language model; use a folder of one."
    )
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    try:
        if family == "llama" and fields["head_dim"] is None:
            fields["head_dim"] = fields["hidden_size"] // max(1, fields["num_attention_heads"])
        model = ModelConfig(
            **{name: fields[name] for name in _TO_MODEL},
            **_window(fields),
            rope_theta=_rope_theta(fields),
            qk_norm=family == "qwen3",
        )
        if family == "llama":
            _check_llama(model)
    except UserError as error:
        absent = [f"{name}={fields[name]}" for name in _TO_MODEL if name not in values]
        note = f" Absent, and so transformers' default: {some(absent)}." if absent else ""
        raise UserError(f"{WHERE}: {error}{note}") from None
    vocabulary, pad = fields["vocab_size"], fields["pad_token_id"]
    require(
        pad is None or -vocabulary <= pad < vocabulary,
        f"{WHERE}: pad_token_id={pad} is no row of a table of {vocabulary}; set it to null.",
    )
    return model


def unused(values: Mapping[str, Any]) -> list[str]:
    """The fields of a config.json that nobody acts upon, and those that act in training alone."""
    honoured = {"model_type", *FIELDS.get(values.get("model_type", ""), {})}
    unknown = [name for name in values if name not in honoured | HARMLESS.keys() | NEUTRAL.keys()]
    dropout = values.get("attention_dropout")
    in_training = [f"attention_dropout={dropout} ({HARMLESS['attention_dropout'][1]})"] if dropout else []
    return in_training + [f"{name} (unknown to transformers too)" for name in unknown]


def _check_others(values: Mapping[str, Any], family: str) -> None:
    """Refuse what is not honoured and would act."""
    for name, value in values.items():
        require(
            name not in RESERVED and not name.startswith("__"),
            f"{WHERE}: {short(name)} is a part of transformers' configuration class and no field; take it out.",
        )
        if name in FIELDS[family]:
            continue
        if name in NEUTRAL:
            _check_neutral(name, value, WHERE)
        hint, _ = HARMLESS.get(name, (None, ""))
        if hint is not None:
            take(values, name, hint, WHERE)


def _check_neutral(name: str, value: object, where: str) -> None:
    neutral, reason = NEUTRAL[name]
    require(
        any(type(value) is type(one) and value == one for one in neutral),
        f"{where}: {name}={short(repr(value))} is not supported, as {reason}; use a folder without it.",
    )


def _check_numbers(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        require(
            not isinstance(value, int) or abs(value) <= _LARGEST,
            f"{WHERE}: {name}={short(repr(value))} must be at most {_LARGEST}, beyond any model's; mend it there.",
        )
    for name in ("rms_norm_eps", "initializer_range"):
        require(
            isinstance(fields[name], float),
            f"{WHERE}: {name}={fields[name]} must be written as {fields[name]}.0, or transformers refuses it.",
        )


_LARGEST = 2**40
"""No number of a configuration is beyond this; `ModelConfig` bounds what is counted one by one."""


def _check_llama(model: ModelConfig) -> None:
    """Raise `UserError` where `ModelConfig` allows more than transformers' Llama."""
    width, heads, spread = model.hidden_size, model.num_attention_heads, model.initializer_range
    require(
        width % heads == 0,
        f"hidden_size={width} must be a multiple of num_attention_heads={heads} for transformers' Llama; choose e.g. "
        f"{-(-width // heads) * heads}, or set model.qk_norm.",
    )
    require(
        spread <= 1.0,
        f"initializer_range={spread} must be at most 1 for transformers' Llama; choose 0.02, or set model.qk_norm.",
    )


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies; `UserError` for whatever else the two places for RoPE ask."""
    rope: Mapping[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = fields[name] or {}
        for key in ("rope_type", "type"):
            kind = take(given, key, str, name, "default")
            require(
                kind == "default",
                f"{name}: rope_type={short(repr(kind))} is not supported; only 'default' rotary embeddings are.",
            )
        _check_neutral("partial_rotary_factor", given.get("partial_rotary_factor"), name)
        strange = given.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        require(not strange, f"{name}: {some(sorted(strange))} is not supported; only rope_type and rope_theta are.")
        rope = given or rope  # Where both say something, transformers lets rope_scaling win.
    theta = take(rope, "rope_theta", float, "rope_parameters", fields["rope_theta"])
    require(theta is not None and abs(theta) < 1e300, f"rope_theta={short(repr(theta))} is no number; mend it there.")
    return float(theta)


def _window(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sliding window as ModelConfig has it; transformers goes by layer_types where there are any."""
    layers, kinds = fields["num_hidden_layers"], fields["layer_types"]
    window = fields.get("sliding_window") if fields.get("use_sliding_window") else None
    first = fields.get("max_window_layers", layers)
    if kinds is not None:
        full = kinds.count("full_attention")
        require(
            kinds == ["full_attention"] * full + ["sliding_attention"] * (len(kinds) - full),
            f"layer_types={short(repr(kinds))} is not supported; only the last layers may have the window.",
        )
        require(len(kinds) == layers, f"layer_types names {len(kinds)} layers of {layers}; make it as many.")
        require(
            full == layers or window is not None,
            "layer_types has sliding_attention, but there is no window; set use_sliding_window and sliding_window.",
        )
        first = first if min(first, layers) == full else full
    return {} if window is None else {"sliding_window": window, "max_window_layers": first}
