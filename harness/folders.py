"""The weights folder, as Hugging Face lays it out: config.json, generation_config.json, model.safetensors (or shards
and their index), tokenizer. Both frameworks, transformers and vLLM-style readers open it.
"""

import contextlib
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from harness.generation_config import with_stop
from harness.hf_config import from_hf_config, to_hf_config
from harness.manifest import MANIFEST, as_json, check_files, seal, with_checks
from harness.tensors import (
    CODES,
    DTYPES,
    StoredTensor,
    StoredTensors,
    dtype_problems,
    read_header,
    same_values,
    write_tensors,
)
from recipe.config import Dtype, ModelConfig, UserError, require
from recipe.durable import make_folder, sync, sync_below
from recipe.hub import weights_folder
from recipe.params import check_weights, expected_shapes, shape_problems, shapes_of
from recipe.reading import read_json, short, some, take

T = TypeVar("T")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROTARY_TABLE = "rotary_emb.inv_freq"
"""Ends the names of what old Llamas store beside their weights: a function of the configuration."""
SHARD_BYTES = 5_000_000_000
"""Weights above this are split, as Hugging Face's readers like them."""
READINGS = 20
"""How often a folder is read that is replaced again and again meanwhile."""


def save_folder(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer=None,
    *,
    dtype: Dtype = "float32",
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder whole or not at all: a finished one replaces its predecessor by renaming.

    With `about`, which may be empty, it gets a manifest: that, and the hash of every file.
    """
    check_weights(weights, config)
    with replacing(folder) as scratch:
        written = write_weights_folder(scratch, config, weights, tokenizer, dtype)
        if about is not None:
            seal(scratch, MANIFEST, about, written)


def load_folder(folder: Path) -> tuple[ModelConfig, StoredTensors]:
    """Configuration and weights of a folder, single or sharded; a weight is read, in its stored dtype, when asked for.

    Whatever is wrong with files, names, shapes and dtypes is found from the headers and raised at once, as UserError.
    As in transformers, a name may lack `model.`, rotary tables of old Llamas are left out, and a tied model may hold
    its embedding under the head's name or under both; two that differ are refused. Of a folder of ours that has hashes
    every other file is checked now, and each tensor when it is read; what is not as it was written is Damaged.
    """
    folder = Path(folder)
    hashes = check_files(folder)
    config = load_config(folder)
    entries, lost, wrong = _read_headers(folder)
    entries = with_checks(entries, hashes)
    entries = {name: entry for name, entry in entries.items() if not name.endswith(ROTARY_TABLE)}
    stored = len(entries) + len(lost)
    _refuse(folder, wrong if stored < config.num_hidden_layers else [])
    expected = expected_shapes(config, stored, str(folder))
    for name in [name for name in entries if name not in expected and f"model.{name}" in expected]:
        full = f"model.{name}"
        wrong += [f"{full} is there twice, once without model."] if full in entries else []
        entries[full] = entries.pop(name)
    wrong += dtype_problems(entries)
    head = entries.pop(HEAD, None) if config.tie_word_embeddings else None
    if head is not None:
        entries.setdefault(EMBEDDING, head)
    readable = {name: shape for name, shape in expected.items() if not {name, name.removeprefix("model.")} & lost}
    wrong += shape_problems({name: entry.shape for name, entry in entries.items()}, readable)
    quantised = any("scale" in name or "qweight" in name or "absmax" in name for name in entries)
    quantised |= any(entry.dtype[:2] in ("F8", "F4", "F6", "I8", "U8") for entry in entries.values())
    remedy = "It is quantised; fetch it in bfloat16, float16 or float32" if quantised else "Fetch or save it again"
    _refuse(folder, wrong, remedy)
    require(
        head is None or same_values(head, entries[EMBEDDING]),
        f"{folder}: {HEAD} is another matrix than {EMBEDDING}, though tie_word_embeddings is true; set it false in "
        "config.json, or leave the head out of the file.",
    )
    return config, StoredTensors(entries, str(folder))


def _refuse(folder: Path, wrong: list[str], remedy: str = "Fetch or save it again") -> None:
    """Raise `UserError` if anything is wrong."""
    require(not wrong, f"{folder} does not hold its model: {'; '.join(wrong)}. {remedy}.")


def _read_headers(folder: Path) -> tuple[dict[str, StoredTensor], set[str], list[str]]:
    """The tensors of a folder's files, the names that the index puts into unreadable ones, and what is wrong."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    require(
        whole.is_file() or index.is_file(),
        f"{folder} holds neither {whole.name} nor {index.name}; save the weights as safetensors.",
    )
    if whole.is_file():
        try:
            return read_header(whole), set(), []
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    weight_map = take(read_json(index), "weight_map", dict[str, str], str(index))
    files = sorted(set(weight_map.values()))
    strange = [f for f in files if not f.isprintable() or Path(f).is_absolute() or ".." in Path(f).parts]
    require(not strange, f"{index} names what is no file of its folder: {some(strange)}; fetch it again.")
    headers: dict[str, dict[str, StoredTensor]] = {}
    absent, wrong = [], []
    for file in files:
        try:
            headers[file] = read_header(folder / file)
        except FileNotFoundError:
            absent.append(file)
        except OSError as error:
            wrong.append(f"{short(file)} cannot be read: {error.strerror}")
        except UserError as error:
            wrong.append(str(error).rstrip("."))
    entries: dict[str, StoredTensor] = {}
    twice = []
    for header in headers.values():
        twice += [name for name in header if name in entries]
        entries |= header
    lost = {name for name, file in weight_map.items() if file not in headers}
    elsewhere = [name for name, file in weight_map.items() if name not in lost and name not in headers[file]]
    wrong += [f"absent, though the index names them: {some(absent)}"] if absent else []
    wrong += [f"in two files: {some(twice)}"] if twice else []
    wrong += [f"not in the file that the index names: {some(elsewhere)}"] if elsewhere else []
    return entries, lost, wrong


def load_config(folder: Path) -> ModelConfig:
    """The model of a folder's config.json."""
    file = Path(folder) / "config.json"
    require(file.is_file(), f"{folder} holds no config.json; name a run's best/ or last/, or a Hugging Face folder.")
    return from_hf_config(read_json(file))


def find_weights(path: str | Path) -> Path:
    """The weights folder meant by `path`: itself, the best weights of a run folder or its last ones, or the Hub's."""
    folder = weights_folder(path)
    require(folder.is_dir(), f"{path} is not a folder; name a run folder or a Hugging Face weights folder.")
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"{path} holds no config.json, best/ or last/; name a finished run.")


def steadily(folder: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of a folder; again, if it failed and the folder was replaced meanwhile, by a run that saves.

    Such a reader finds files missing, or the files of two states, which looks like damage.
    """
    for _ in range(READINGS):
        before = _identity(folder)
        try:
            return read(folder)
        except (UserError, OSError):
            if _identity(folder) == before:
                raise
    raise UserError(f"{folder} is replaced faster than it can be read; try again, or when its run has ended.")


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from the next of its name; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextlib.contextmanager
def replacing(folder: Path, keep_as: Path | None = None) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` if the block ends well, and vanishes if it does not.

    The predecessor goes to `keep_as`, in a folder that exists, or away. Everything is on disk before it has its name,
    and has its name on disk before anything older is removed, so a power cut leaves one or the other, whole.
    """
    folder = Path(folder)
    make_folder(folder.parent)
    scratch = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    scratch.mkdir()
    try:
        yield scratch
        sync_below(scratch)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    put_in_place(scratch, folder, keep_as)


def put_in_place(scratch: Path, folder: Path, keep_as: Path | None = None) -> None:
    """Give what is on disk already its name beside it; the predecessor goes to `keep_as` or, after that, away."""
    aside = keep_as or set_aside(folder)
    if folder.exists():
        # Whoever is killed between the two renames finds the predecessor where it was set aside.
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    scratch.rename(folder)
    sync(aside.parent)
    sync(folder.parent)
    if keep_as is None:
        shutil.rmtree(aside, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Where the predecessor of `folder` lies while it is replaced."""
    return folder.with_name(f".{folder.name}-old")


def write_weights_folder(
    folder: Path, config: ModelConfig, weights: Mapping[str, np.ndarray], tokenizer, dtype: Dtype
) -> dict[str, dict[str, Any]]:
    """The files of a weights folder, in a folder that exists, with all that came beside the tokenizer.

    How its makers sample stays as it was, and the token that ended the training documents ends texts, too. Returns what
    `write_weights` does.
    """
    eos_id = None if tokenizer is None else tokenizer.eos_id
    bos_id = None if tokenizer is None else tokenizer.bos_id
    write_json(folder / "config.json", to_hf_config(config, eos_id, dtype) | {"bos_token_id": bos_id})
    written = write_weights(folder, weights, dtype)
    sampling: dict[str, Any] = {"do_sample": True, "eos_token_id": None}
    if tokenizer is not None:
        tokenizer.save(folder)
        theirs = folder / "generation_config.json"
        sampling = with_stop(read_json(theirs) if theirs.is_file() else sampling, tokenizer.eos_id)
    write_json(folder / "generation_config.json", sampling)
    return written


def write_weights(folder: Path, weights: Mapping[str, np.ndarray], dtype: Dtype) -> dict[str, dict[str, Any]]:
    """model.safetensors, or shards of at most SHARD_BYTES (a larger tensor has its own) and their index.

    Returns the hashes of the files of tensors, by file name, for `harness.manifest.seal`.
    """
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
        return {"model.safetensors": write_tensors(folder / "model.safetensors", weights, shards[0], dtype)}
    weight_map: dict[str, str] = {}
    written = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written[file] = write_tensors(folder / file, weights, names, dtype)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return written


def write_json(file: Path, values: Mapping) -> None:
    """Indented JSON; a value that is not finite raises ValueError."""
    file.write_bytes(as_json(values))
