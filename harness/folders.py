"""The weights folder, as Hugging Face lays it out: config.json, generation_config.json, model.safetensors (or shards
and their index), tokenizer. Both frameworks, transformers and vLLM-style readers open it.
"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from harness.tensors import CODES, DTYPES, StoredTensor, StoredTensors, read_header, write_tensors
from recipe.config import Dtype, ModelConfig, UserError, require
from recipe.params import check_weights, param_specs, shape_problems, shapes_of

SHARD_BYTES = 5_000_000_000
"""Weights above this are split, as Hugging Face's readers like them."""

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


def save_folder(
    folder: Path, config: ModelConfig, weights: Mapping[str, np.ndarray], tokenizer=None, *, dtype: Dtype = "float32"
) -> None:
    """Write the folder whole or not at all: a finished one replaces its predecessor by renaming."""
    check_weights(weights, config)
    with replacing(folder) as scratch:
        write_weights_folder(scratch, config, weights, tokenizer, dtype)


def load_folder(folder: Path) -> tuple[ModelConfig, StoredTensors]:
    """Configuration and weights of a folder, single or sharded; a weight is read, in its stored dtype, when asked for.

    Whatever is wrong with files, names, shapes and dtypes is found from the headers and raised at once, as UserError.
    """
    folder = Path(folder)
    config = load_config(folder)
    expected = {name: spec.shape for name, spec in param_specs(config).items()}
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    require(
        whole.is_file() or index.is_file(),
        f"{folder} holds neither {whole.name} nor {index.name}; save the weights as safetensors.",
    )
    weight_map = dict.fromkeys(expected, whole.name) if whole.is_file() else read_json(index)["weight_map"]
    entries: dict[str, StoredTensor] = {}
    wrong: list[str] = []
    for file in sorted(set(weight_map.values())):
        try:
            header = read_header(folder / file)
        except (FileNotFoundError, UserError) as error:
            wrong.append(str(error) if isinstance(error, UserError) else f"{file} is absent, though the index names it")
            for name in [name for name in expected if weight_map.get(name) == file]:
                del expected[name]  # one complaint about the file is enough
            continue
        wrong += [f"{name} is both in {entries[name].file.name} and in {file}" for name in header if name in entries]
        entries |= header
    if config.tie_word_embeddings:
        entries.pop("lm_head.weight", None)  # a copy of the embedding, which some folders hold
    wrong += [
        f"{n} has dtype {e.dtype}, not one of {', '.join(DTYPES)}" for n, e in entries.items() if e.dtype not in DTYPES
    ]
    wrong += shape_problems({name: entry.shape for name, entry in entries.items()}, expected)
    require(not wrong, f"{folder} does not hold its model: {'; '.join(wrong)}. Fetch or save it again.")
    return config, StoredTensors(entries, str(folder))


def load_config(folder: Path) -> ModelConfig:
    """The model of a folder's config.json."""
    file = Path(folder) / "config.json"
    require(file.is_file(), f"{folder} holds no config.json; name a run's best/ or last/, or a Hugging Face folder.")
    return from_hf_config(read_json(file))


def find_weights(path: str | Path) -> Path:
    """The weights folder meant by `path`: itself, or the best weights of a run folder, or its last ones."""
    folder = Path(path)
    require(folder.is_dir(), f"{path} is not a folder; name a run folder or a Hugging Face weights folder.")
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"{path} holds no config.json, best/ or last/; name a finished run.")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` if the block ends well, and vanishes if it does not."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch)
        raise
    scratch.chmod(0o755)  # mkdtemp's is the owner's alone; a checkpoint is an ordinary folder
    if folder.exists():
        # Whoever is killed between the two renames finds the predecessor where it was set aside.
        shutil.rmtree(set_aside(folder), ignore_errors=True)
        folder.rename(set_aside(folder))
        scratch.rename(folder)
        shutil.rmtree(set_aside(folder))
    else:
        scratch.rename(folder)


def set_aside(folder: Path) -> Path:
    """Where the predecessor of `folder` lies while it is replaced."""
    return folder.with_name(f".{folder.name}-old")


def write_weights_folder(
    folder: Path, config: ModelConfig, weights: Mapping[str, np.ndarray], tokenizer, dtype: Dtype
) -> None:
    """The files of a weights folder, in a folder that exists."""
    eos_id = None if tokenizer is None else tokenizer.eos_id
    write_json(folder / "config.json", to_hf_config(config, eos_id, dtype))
    write_json(folder / "generation_config.json", {"do_sample": True, "eos_token_id": eos_id})
    write_weights(folder, weights, dtype)
    if tokenizer is not None:
        tokenizer.save(folder)


def write_weights(folder: Path, weights: Mapping[str, np.ndarray], dtype: Dtype) -> None:
    """model.safetensors, or shards of at most SHARD_BYTES (a larger tensor has its own) and their index."""
    sizes = {name: math.prod(shape) * DTYPES[CODES[dtype]].itemsize for name, shape in shapes_of(weights).items()}
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", weights, shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, weights, names, dtype)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def read_json(file: Path) -> dict:
    """The object in a JSON file; UserError if it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); fetch or save it again.") from None


def write_json(file: Path, values: Mapping) -> None:
    """Indented JSON; a value that is not finite raises ValueError."""
    file.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
