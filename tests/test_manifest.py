"""Hashes of our own folders: a flipped bit anywhere is named, by file and tensor, and nothing is computed from it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from harness import cli
from harness.commands import checkpoint
from harness.folders import load_folder, save_folder
from harness.manifest import MANIFEST, check_files, file_hash, seal
from harness.state import SLOTS, load_state, save_state
from harness.tensors import Damaged, write_tensors
from recipe.config import UserError
from recipe.params import init_params
from recipe.tokenizer import load_tokenizer, train_bpe
from tests.test_checkpoint import MODEL
from tests.test_state import ABOUT, state

BITS = 1000
TEXT = "the quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> dict[str, Path]:
    """A state and a weights folder as a run writes them."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe([TEXT], 280)
    save_state(run / "last", state(), tokenizer, ABOUT)
    save_folder(run / "best", MODEL, init_params(MODEL, 0), tokenizer, about={"step": 4, "validation_loss": 1.5})
    return {"last": run / "last", "best": run / "best"}


def use(folder: Path) -> None:
    """All that a run or a generator reads of a folder."""
    if folder.name == "last":
        loaded = load_state(folder)
        for arrays in (loaded.weights, *(loaded.slots[slot] for slot in SLOTS)):
            for name in arrays:
                arrays[name]
    else:
        for _ in load_folder(folder)[1].values():
            pass
    load_tokenizer(folder)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def tensor_at(file: Path, byte: int) -> str | None:
    """The tensor that a byte of a file belongs to."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] <= byte - 8 - length < entry["data_offsets"][1]:
            return name
    return None


@pytest.mark.parametrize("part", ["last", "best"])
def test_every_flipped_bit_is_named_and_nothing_is_read_from_it(part, sealed, tmp_path, record_property):
    """Half of the bits anywhere, in proportion to the files; half in equal shares of every file."""
    folder = shutil.copytree(sealed[part], tmp_path / part)
    use(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) >= 6
    generator = np.random.default_rng(19)
    sizes = np.array([file.stat().st_size for file in files])
    drawn = [*generator.choice(len(files), BITS // 4, p=sizes / sizes.sum())]
    drawn += [index % len(files) for index in range(BITS // 4)]
    tensors = 0
    for index in drawn:
        file, bit = files[index], int(generator.integers(8 * sizes[index]))
        flip(file, bit)
        with pytest.raises(UserError) as caught:
            use(folder)
        said = str(caught.value)
        assert file.name in said and said.isprintable(), f"bit {bit} of {file.name}: {said}"
        assert isinstance(caught.value, Damaged) or file.suffix == ".json", said
        if file.suffix == ".safetensors" and (tensor := tensor_at(sealed[part] / file.name, bit // 8)):
            assert tensor in said
            tensors += 1
        flip(file, bit)
    use(folder)
    record_property("bits flipped, in tensors", f"{len(drawn)}, {tensors}")
    assert tensors > BITS // 8


@pytest.mark.parametrize("part", ["last", "best"])
def test_a_missing_file_is_named(part, sealed, tmp_path):
    for file in sorted(sealed[part].iterdir()):
        if file.name in ("run.json", MANIFEST):
            continue  # what has none is somebody else's
        folder = shutil.copytree(sealed[part], tmp_path / file.name / part)
        (folder / file.name).unlink()
        with pytest.raises(UserError, match=file.name):
            use(folder)


def test_inspect_looks_at_every_byte_and_goes_on_with_the_next_folder(sealed, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(sealed["last"].parent, tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["checkpoint", "inspect", str(run)])
    assert cli.run(checkpoint.main) == 0
    assert capsys.readouterr().out.count("files have the hashes they were written with") == 2
    flip(run / "best" / "model.safetensors", 8 * ((run / "best" / "model.safetensors").stat().st_size - 1))
    assert cli.run(checkpoint.main) == 2
    said = capsys.readouterr()
    assert "DAMAGED" in said.out and "files have the hashes" in said.out, "the other folder is told all the same"
    assert "model.safetensors is not what was written" in said.err and said.err.count("\n") == 1


def test_folders_without_hashes_load_as_before(tmp_path, sealed):
    """Other people's, and those of earlier versions: a state of format 1 has no hashes either."""
    save_folder(tmp_path / "theirs", MODEL, init_params(MODEL, 0))
    assert not (tmp_path / "theirs" / MANIFEST).exists() and check_files(tmp_path / "theirs") is None
    (tmp_path / "theirs" / MANIFEST).write_text('{"name": "a page"}', encoding="utf-8")
    use_weights = dict(load_folder(tmp_path / "theirs")[1].items())
    assert use_weights.keys() == init_params(MODEL, 0).keys()
    old = shutil.copytree(sealed["last"], tmp_path / "last")
    values = json.loads((old / "run.json").read_text(encoding="utf-8"))
    values = {name: value for name, value in values.items() if name not in ("files", "checksum", "rollbacks")}
    (old / "run.json").write_text(json.dumps(values | {"format": 1}), encoding="utf-8")
    assert load_state(old).position == state().position


def test_a_meant_change_is_said_how_to_keep(sealed, tmp_path):
    best = shutil.copytree(sealed["best"], tmp_path / "best")
    values = json.loads((best / "generation_config.json").read_text(encoding="utf-8"))
    (best / "generation_config.json").write_text(json.dumps(values | {"top_k": 5}), encoding="utf-8")
    with pytest.raises(Damaged, match=r"generation_config\.json .* if the change was meant, delete its manifest\.json"):
        load_folder(best)
    (best / MANIFEST).unlink()
    load_folder(best)


def test_a_file_is_hashed_as_it_is_written(tmp_path):
    """In one pass, and as any other program would hash it."""
    weights = init_params(MODEL, 0)
    known = write_tensors(tmp_path / "model.safetensors", weights, weights, "bfloat16")
    assert known["sha256"] == file_hash(tmp_path / "model.safetensors")
    assert known["tensors"].keys() == weights.keys()


def test_an_export_has_hashes_of_its_own(sealed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["checkpoint", "export", str(sealed["best"]), str(tmp_path / "out")])
    assert cli.run(checkpoint.main) == 0
    files = check_files(tmp_path / "out", tensors=True)
    assert files is not None and MANIFEST not in files and "tokenizer.json" in files


def unsealed(tmp_path) -> Path:
    save_folder(tmp_path / "theirs", MODEL, init_params(MODEL, 0), train_bpe([TEXT], 280))
    return tmp_path / "theirs"


def test_a_folder_without_hashes_is_told_to_be_damaged_by_what_can_be_seen(tmp_path):
    theirs = unsealed(tmp_path)
    (theirs / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_folder(theirs)
    (theirs / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_folder(theirs)
    (theirs / "tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(theirs)
    (theirs / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(theirs)


def test_an_optimizer_that_was_written_so_and_is_none_is_told(sealed, tmp_path):
    last = shutil.copytree(sealed["last"], tmp_path / "last")
    (last / "optimizer.safetensors").write_bytes(b"nonsense")
    values = json.loads((last / "run.json").read_text(encoding="utf-8"))
    del values["checksum"]
    seal(last, "run.json", values, {})
    with pytest.raises(UserError, match="go on from another copy of the state"):
        load_state(last)
