"""config.json, as Hugging Face writes it, and `ModelConfig`: one into the other."""

from collections.abc import Mapping

from recipe.config import ModelConfig, require

# Fields that ModelConfig and Qwen3's config.json have in common, name for name.
_SHARED = (
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


def to_hf_config(config: ModelConfig, eos_id: int | None = None, dtype: str = "float32") -> dict:
    """The model as a config.json that transformers 4 and 5 read; without QK-norm it is a Llama."""
    windowed = config.sliding_window is not None
    require(
        config.qk_norm or not windowed,
        "Hugging Face's Llama has no sliding window; set model.qk_norm or drop the window.",
    )
    family = "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"
    values = {
        "architectures": [family],
        "model_type": "qwen3" if config.qk_norm else "llama",
        **{name: getattr(config, name) for name in _SHARED},
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


def from_hf_config(values: Mapping) -> ModelConfig:
    """The ModelConfig of a Qwen3 or Llama config.json; what this model cannot express raises ValueError."""
    family = values.get("model_type")
    require(family in ("qwen3", "llama"), f"model_type={family!r} is not supported; use a Qwen3 or Llama folder.")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", f"rope_type={kind!r} is not supported; only 'default' rotary embeddings are.")
    require(values.get("hidden_act", "silu") == "silu", f"hidden_act={values.get('hidden_act')!r} must be 'silu'.")
    require(
        not (family == "llama" and values.get("mlp_bias")), "mlp_bias=true is not supported; the MLP here has no bias."
    )
    shared = {name: values[name] for name in _SHARED if values.get(name) is not None}
    shared.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    shared.setdefault("num_key_value_heads", values["num_attention_heads"])
    shared.setdefault("tie_word_embeddings", False)
    window = {}
    if family == "qwen3" and values.get("use_sliding_window") and values.get("sliding_window"):
        window = {"sliding_window": values["sliding_window"], "max_window_layers": values.get("max_window_layers", 28)}
        layers = shared["num_hidden_layers"]
        usual = [
            "sliding_attention" if layer >= window["max_window_layers"] else "full_attention" for layer in range(layers)
        ]
        kinds = values.get("layer_types") or usual
        require(kinds == usual, f"layer_types={kinds} is not supported; only the last layers may have the window.")
    theta = float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))
    return ModelConfig(**shared, **window, rope_theta=theta, qk_norm=family == "qwen3")
