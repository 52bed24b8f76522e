"""The weights folder, as Hugging Face lays it out: config.json, generation_config.json, model.safetensors, tokenizer.

Both frameworks, transformers and vLLM-style readers open it. Weights travel as `dict[str, np.ndarray]`.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from recipe.config import ModelConfig, UserError, require
from recipe.params import check_weights

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


def to_hf_config(config: ModelConfig, eos_id: int | None = None) -> dict:
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
        "torch_dtype": "float32",
        "dtype": "float32",
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
    theta = float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))
    return ModelConfig(**shared, **window, rope_theta=theta, qk_norm=family == "qwen3")


def save_folder(folder: Path, config: ModelConfig, weights: Mapping[str, np.ndarray], tokenizer=None) -> None:
    """Write the folder whole or not at all: a finished one replaces its predecessor by renaming."""
    check_weights(weights, config)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    eos_id = None if tokenizer is None else tokenizer.eos_id
    (scratch / "config.json").write_text(json.dumps(to_hf_config(config, eos_id), indent=2) + "\n")
    generation = {"do_sample": True, "eos_token_id": eos_id}
    (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    as_float32 = {name: np.ascontiguousarray(weight, np.float32) for name, weight in weights.items()}
    save_file(as_float32, scratch / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(scratch)
    # mkdtemp and safetensors write for the owner alone; a checkpoint is an ordinary folder.
    scratch.chmod(0o755)
    (scratch / "model.safetensors").chmod(0o644)
    if folder.exists():
        old = folder.with_name(f".{folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old)
    else:
        scratch.rename(folder)


def load_folder(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Configuration and weights (stored dtype, bfloat16 widened to float32) of a folder, single or sharded."""
    folder = Path(folder)
    config_file = folder / "config.json"
    require(
        config_file.is_file(), f"{folder} holds no config.json; name a run's best/ or last/, or a Hugging Face folder."
    )
    config = from_hf_config(json.loads(config_file.read_text()))
    files = sorted(folder.glob("*.safetensors"))
    require(bool(files), f"{folder} holds no .safetensors file; save the weights as safetensors.")
    weights = {}
    for file in files:
        with safe_open(file, framework="numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 - a safetensors file is not a dict
                weights[name] = _read(shard, name)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    check_weights(weights, config)
    return config, weights


def _read(shard, name: str) -> np.ndarray:
    tensor = shard.get_tensor(name)
    return tensor.astype(np.float32) if tensor.dtype.name == "bfloat16" else tensor


def find_weights(path: str) -> Path:
    """The weights folder meant by `path`: itself, or the best weights of a run folder, or its last ones."""
    folder = Path(path)
    require(
        folder.is_dir(), f"--checkpoint {path} is not a folder; name a run folder or a Hugging Face weights folder."
    )
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"--checkpoint {path} holds no config.json, best/ or last/; name a finished run.")
