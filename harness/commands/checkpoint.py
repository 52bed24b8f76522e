"""`python -m harness.commands.checkpoint`: `inspect FOLDER` says what a folder holds, `export FOLDER OUT` writes it in
another dtype."""

import dataclasses
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from harness import cli, generation_config
from harness.folders import find_weights, load_folder, replacing, steadily, write_json, write_weights
from harness.hf_config import unused
from harness.manifest import MANIFEST, RUN, check_files, manifest_of, seal
from harness.model_card import README, exported, training_card, weights_card
from harness.state import ARRAYS, TrainingState, load_state, read_run, state_folders
from harness.tensors import Damaged
from recipe.config import Dtype, ModelConfig, UserError, require
from recipe.hub import weights_folder
from recipe.params import param_counts
from recipe.reading import read_json, short, some, take


@dataclass(frozen=True)
class InspectCommand:
    """Say what a folder holds."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Weights folder, training state, run folder, or OWNER/NAME on the Hub."""


@dataclass(frozen=True)
class ExportCommand:
    """Write weights in another dtype."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Weights folder, run folder (its best weights are taken), or OWNER/NAME on the Hub."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write; it must not exist."""
    dtype: Dtype = "bfloat16"
    """Dtype of the weights written."""


def inspect(folder: Path) -> list[str]:
    """Lines that say what a folder holds: model, parameters, files, and of a state also steps, slots and norms."""
    hashes = check_files(folder, tensors=True)
    if hashes is not None and (folder / ARRAYS).is_dir():
        return _inspect_sharded(folder, hashes)
    config, weights = load_folder(folder)
    entries = weights.entries.values()
    files, dtypes = {entry.file for entry in entries}, {entry.dtype for entry in entries}
    lines = [
        *_model_lines(folder, config),
        f"weights    {_summary(weights)}, {', '.join(sorted(dtypes))}, {weights.nbytes:,} bytes, {len(files)} file(s)",
    ]
    if hashes is not None:
        lines.append(_sound(hashes))
    if idle := unused(read_json(folder / "config.json")):
        lines.append(f"not used   of config.json: {some(idle)}")
    lines += [f"not used   {note}" for note in generation_config.notes(folder)]
    if (folder / "run.json").is_file():
        state = load_state(folder)
        lines.append(_state_line(folder, state))
        lines += [f"{slot:<10} {_summary(arrays)}" for slot, arrays in state.slots.items()]
    return lines


def _inspect_sharded(folder: Path, hashes: Mapping[str, Mapping]) -> list[str]:
    """The same of a mesh's state, whose arrays no code without JAX reads; every byte of theirs has been hashed."""
    state = load_state(folder)
    sizes = [known["size"] for known in hashes.values() if "size" in known]
    return [
        *_model_lines(folder, state.config.model),
        f"arrays     of mesh {state.config.mesh}, {sum(sizes):,} bytes, {len(sizes)} file(s)",
        _sound(hashes),
        _state_line(folder, state),
    ]


def _model_lines(folder: Path, config: ModelConfig) -> list[str]:
    counts = param_counts(config)
    fields = [f"{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)]
    return [
        f"folder     {folder}",
        "model      " + ", ".join(fields),
        f"parameters {counts.total:,} ({counts.muon:,} of Muon's, {counts.adamw:,} of AdamW's)",
    ]


def _sound(hashes: Mapping) -> str:
    return f"sound      {len(hashes)} files have the hashes they were written with"


def _state_line(folder: Path, state: TrainingState) -> str:
    values, where = read_run(folder)[0], str(folder / "run.json")
    counted = f"step {state.position} of {state.config.steps}: {state.updates} updates, {state.skipped} skipped"
    by, at = (short(take(values, name, str, where, "?")) for name in ("framework", "saved"))
    return f"state      {counted}, best validation loss {state.best:.4f}, by {by} at {at}"


def _summary(tensors: Mapping[str, np.ndarray]) -> str:
    norms = {name: float(np.linalg.norm(tensor.astype(np.float64))) for name, tensor in tensors.items()}
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return f"{len(norms)} tensors of norm {math.hypot(*norms.values()):.6g}" + (
        f", NOT FINITE: {', '.join(bad)}" if bad else ""
    )


def export(folder: Path, out: Path, dtype: Dtype) -> None:
    """The folder again with its weights in `dtype`, one by one; its tokenizer and the rest of config.json stay."""
    require(not out.exists(), f"{out} exists already; choose a new folder.")
    config, weights = load_folder(folder)
    card = exported(_card(folder, config), dtype)
    with replacing(out) as scratch:
        written = write_weights(scratch, weights, dtype)
        write_json(scratch / "config.json", read_json(folder / "config.json") | {"dtype": dtype, "torch_dtype": dtype})
        for file in folder.iterdir():
            ours = file.name in ("config.json", RUN, MANIFEST, "model.safetensors.index.json")
            if file.suffix in (".json", ".txt", ".jinja", ".model") and not ours:
                shutil.copy(file, scratch)
        (scratch / README).write_text(card, encoding="utf-8", newline="")
        seal(scratch, MANIFEST, {}, written)


def _card(folder: Path, config: ModelConfig) -> str:
    """The model card that this project gave a folder, or that one of a training state or of somebody else's gets."""
    if README in (manifest_of(folder) or {}):
        return (folder / README).read_text(encoding="utf-8")  # as it was written: loading the folder has hashed it
    if not (folder / RUN).is_file():
        return weights_card(folder.resolve().name, config)
    values, run = read_run(folder)
    return training_card(run, step=load_state(folder).position, about=values)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is one of weights or a mesh's state, not one that holds such."""
    return (folder / "config.json").is_file() or (folder / ARRAYS).is_dir()


def main() -> None:
    """`python -m harness.commands.checkpoint inspect FOLDER` or `export FOLDER OUT [--dtype DTYPE]`."""
    command = cli.parse_command(
        {"inspect": InspectCommand, "export": ExportCommand},
        sys.argv[1:],
        prog=cli.called_as("python -m harness.commands.checkpoint"),
        description="Look into a folder of weights, or write it again.",
    )
    if isinstance(command, ExportCommand):
        export(find_weights(command.folder), Path(command.out), command.dtype)
        print(command.out)
        return
    folder = weights_folder(command.folder)
    parts = [folder / "best", *state_folders(folder)]
    inside = [part for part in parts if _is_ours(part)]
    damaged = []
    for part in [folder] if _is_ours(folder) else inside or [find_weights(folder)]:
        try:
            print("\n".join(steadily(part, inspect)))
        except (UserError, OSError) as error:
            if part in inside and not part.exists():
                continue  # A run beside this command has removed it, or moved it on.
            if not isinstance(error, Damaged):
                raise
            print(f"folder     {part}\nDAMAGED    {error}")
            damaged.append(str(error))
    require(not damaged, "; ".join(damaged))


if __name__ == "__main__":
    cli.end(main)
