"""The weights folder, as Hugging Face lays it out: config.json, generation_config.json, model.safetensors (or shards
and their index), tokenizer. Both frameworks, transformers and vLLM-style readers open it.

`python -m recipe.checkpoint inspect FOLDER` says what a folder holds, `export FOLDER OUT` writes it in another dtype.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from recipe import cli
from recipe.config import Dtype, ModelConfig, UserError, require
from recipe.params import check_weights, param_counts, param_specs, shape_problems
from recipe.tensors import CODES, DTYPES, StoredTensors, read_header, shapes_of, write_tensors

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
    entries, wrong = {}, []
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


def find_weights(path: str) -> Path:
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
    _write_weights(folder, weights, dtype)
    if tokenizer is not None:
        tokenizer.save(folder)


def _write_weights(folder: Path, weights: Mapping[str, np.ndarray], dtype: Dtype) -> None:
    """model.safetensors, or shards of at most SHARD_BYTES (a larger tensor has its own) and their index."""
    sizes = {name: math.prod(shape) * DTYPES[CODES[dtype]].itemsize for name, shape in shapes_of(weights).items()}
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", weights, shards[0], dtype)
        return
    weight_map = {}
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


@dataclass(frozen=True)
class InspectCommand:
    """Which folder to describe."""

    folder: tyro.conf.Positional[str]
    """Weights folder, training state, or run folder."""


@dataclass(frozen=True)
class ExportCommand:
    """What to write where."""

    folder: tyro.conf.Positional[str]
    """Weights folder, or run folder (its best weights are taken)."""
    out: tyro.conf.Positional[str]
    """Folder to write; it must not exist."""
    dtype: Dtype = "bfloat16"
    """Dtype of the weights written."""


def inspect(folder: Path) -> list[str]:
    """Lines that say what a folder holds: model, parameters, files, and of a state also steps, slots and norms."""
    from recipe.state import load_state, read_run  # which imports this module

    config, weights = load_folder(folder)
    counts, entries = param_counts(config), weights.entries.values()
    files, dtypes = {entry.file for entry in entries}, {entry.dtype for entry in entries}
    fields = [f"{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)]
    lines = [
        f"folder     {folder}",
        "model      " + ", ".join(fields),
        f"parameters {counts.total:,} ({counts.muon:,} of Muon's, {counts.adamw:,} of AdamW's)",
        f"weights    {_summary(weights)}, {', '.join(sorted(dtypes))}, {weights.nbytes:,} bytes, {len(files)} file(s)",
    ]
    if (folder / "run.json").is_file():
        state, (values, _) = load_state(folder), read_run(folder)
        counted = f"step {state.position} of {state.config.steps}: {state.updates} updates, {state.skipped} skipped"
        written = f"by {values['framework']} at {values['saved']}"
        lines.append(f"state      {counted}, best validation loss {state.best:.4f}, {written}")
        lines += [f"{slot:<10} {_summary(arrays)}" for slot, arrays in state.slots.items()]
    return lines


def _summary(tensors: StoredTensors) -> str:
    norms = {name: float(np.linalg.norm(tensor.astype(np.float64))) for name, tensor in tensors.items()}
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return f"{len(norms)} tensors of norm {math.hypot(*norms.values()):.6g}" + (
        f", NOT FINITE: {', '.join(bad)}" if bad else ""
    )


def export(folder: Path, out: Path, dtype: Dtype) -> None:
    """The folder again with its weights in `dtype`, one by one; its tokenizer and the rest of config.json stay."""
    require(not out.exists(), f"{out} exists already; choose a new folder.")
    _, weights = load_folder(folder)
    with replacing(out) as scratch:
        _write_weights(scratch, weights, dtype)
        write_json(scratch / "config.json", read_json(folder / "config.json") | {"dtype": dtype, "torch_dtype": dtype})
        for file in folder.iterdir():
            ours = file.name in ("config.json", "run.json", "model.safetensors.index.json")
            if file.suffix in (".json", ".txt", ".jinja", ".model") and not ours:
                shutil.copy(file, scratch)


def main() -> None:
    """`python -m recipe.checkpoint inspect FOLDER` or `export FOLDER OUT [--dtype DTYPE]`."""
    name, *arguments = sys.argv[1:] or [""]
    prog = "python -m recipe.checkpoint"
    if name == "inspect":
        command = cli.parse(InspectCommand, arguments, prog=f"{prog} inspect", description="Say what a folder holds.")
        folder = Path(command.folder)
        inside = [part for part in (folder / "best", folder / "last") if (part / "config.json").is_file()]
        for part in [folder] if (folder / "config.json").is_file() else inside or [find_weights(folder)]:
            print("\n".join(inspect(part)))
    elif name == "export":
        command = cli.parse(
            ExportCommand, arguments, prog=f"{prog} export", description="Write weights in another dtype."
        )
        export(find_weights(command.folder), Path(command.out), command.dtype)
        print(command.out)
    else:
        raise UserError(f"{name or 'no command'} is not a command; use: {prog} inspect FOLDER, or export FOLDER OUT.")


if __name__ == "__main__":
    sys.exit(cli.run(main))
