"""safetensors files without the library: equal to it both ways, one tensor at a time, and damage is told apart."""

import io
import json
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness import tensors
from harness.tensors import StoredTensors, read_header, write_tensors
from recipe.config import UserError
from recipe.params import shapes_of

GENERATOR = np.random.default_rng(0)
ARRAYS = {
    "b": GENERATOR.standard_normal((3, 5)),
    "a": GENERATOR.standard_normal((2, 3, 4)).swapaxes(0, 2),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 4)),
}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_the_library_reads_what_we_write_and_we_what_it_writes(dtype, tmp_path):
    expected = {name: array.astype(dtype) for name, array in ARRAYS.items()}
    write_tensors(tmp_path / "ours", ARRAYS, ARRAYS, np.dtype(dtype).name)
    save_file({name: np.array(array, order="C") for name, array in expected.items()}, tmp_path / "theirs")
    theirs = load_file(tmp_path / "ours")
    ours = StoredTensors(read_header(tmp_path / "theirs"), "theirs")
    assert theirs.keys() == ours.keys() == expected.keys()
    assert shapes_of(ours) == shapes_of(expected)
    for name, array in expected.items():
        for read in (theirs[name], ours[name]):
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path, monkeypatch):
    write_tensors(tmp_path / "file", ARRAYS, ARRAYS, "float32")
    reads, fromfile = [], np.fromfile
    monkeypatch.setattr(
        np, "fromfile", lambda *args, count, **more: reads.append(count) or fromfile(*args, count=count, **more)
    )
    stored = StoredTensors(read_header(tmp_path / "file"), "file")
    assert "b" in stored and len(stored) == 4 and stored.shapes["b"] == (3, 5) and stored.nbytes == 4 * (15 + 24 + 1)
    assert stored.below("s").keys() == {"calar"}
    assert reads == []
    first, second = stored["b"], stored["b"]
    assert reads == [15, 15] and first is not second and first.flags.writeable


def test_a_file_is_never_overwritten(tmp_path):
    write_tensors(tmp_path / "file", ARRAYS, ["b"], "float32")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file", ARRAYS, ["a"], "float32")
    assert read_header(tmp_path / "file").keys() == {"b"}


def header(values: dict) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", "is not a safetensors file"),
    "text": (b"once upon a time there was a file", "its header is longer than the file"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "is not a safetensors file"),
    "a list": (struct.pack("<Q", 2) + b"[]", "is not a safetensors file"),
    "no offsets": (header({"x": {"dtype": "F32", "shape": [2]}}), "is not a safetensors file"),
    "sizes that do not fit": (header({"x": ENTRY | {"shape": [3]}}) + bytes(8), "x has 8 bytes"),
    "cut short": (header({"x": ENTRY}) + bytes(7), "is cut short"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told(case, tmp_path):
    content, message = DAMAGED[case]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "file")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("slow", [False, True])
def test_progress_is_shown_only_when_reading_takes_long(stream, slow, tmp_path, monkeypatch):
    """A bar on a terminal, lines elsewhere; the clock ticks a second per look, or stands still."""
    write_tensors(tmp_path / "file", ARRAYS, ARRAYS, "float32")
    stderr, seconds = stream(), iter(range(1000))
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(tensors, "PATIENCE", 0.0 if slow else 1000.0)
    monkeypatch.setattr(tensors.time, "monotonic", lambda: next(seconds))
    list(StoredTensors(read_header(tmp_path / "file"), "the file").values())
    said = stderr.getvalue()
    assert ("reading the file" in said) == slow
    assert ("\r" in said) == (slow and stream is Terminal)
