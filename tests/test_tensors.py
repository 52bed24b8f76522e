"""safetensors files without the library: equal to it both ways, one tensor at a time, and damage is told apart."""

import io
import json
import random
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load_file, save, save_file

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


def entry(**changes) -> bytes:
    return header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


DAMAGED = {
    "empty": (b"", "it has 0 bytes"),
    "text": (b"once upon a time there was a file", "its header is longer than the file"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "the header of file is not JSON"),
    "deep JSON": (struct.pack("<Q", 90_000) + b'{"x":' + b"[" * 89_995, "the header of file is not JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
    "no offsets": (header({"x": {"dtype": "F32", "shape": [2]}}), "x has not the fields"),
    "sizes that do not fit": (entry(shape=[3]) + bytes(8), "x has 8 bytes"),
    "huge sizes": (entry(shape=[2**63, 2**63]) + bytes(8), "x has the shape"),
    "cut short": (entry() + bytes(7), "is cut short"),
    "longer": (entry() + bytes(9), "1 bytes follow the last tensor"),
    "control characters": (header({"\n\x1b[2J" * 99: {}}), r"\(\\n\\x1b"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told(case, tmp_path):
    content, message = DAMAGED[case]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_header(tmp_path / "file")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_a_file_that_shrinks_after_its_header_was_read_is_told(tmp_path):
    write_tensors(tmp_path / "file", ARRAYS, ARRAYS, "float32")
    stored = StoredTensors(read_header(tmp_path / "file"), "file")
    with open(tmp_path / "file", "r+b") as stream:
        stream.truncate(stored.entries["a"].offset + 5)
    with pytest.raises(UserError, match="has become shorter while it was read"):
        stored["a"]


PIECES = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"1", b"9", b"-", b"-0", b"1.0", b"1e5", b"1e999", b"NaN", b" "),
    *(b"null", b"true", b"[]", b"{}", b'"F32"', b'"I8"', b'"F4"', b'"b"', b'"a"', b"__metadata__", b"\\ud800", b"\xff"),
    *(b"18446744073709551616", b"9223372036854775808", b"\x00", b"\n", "é".encode()),
]
VALUES = [0, 1, 4, 8, 16, 40, 60, 100, -1, 2.0, True, None, "x", 2**63, 2**64, [], {}, "F32", "F16", "BF16", "I8", "F4"]


def mutated(raw: bytes, generator: random.Random) -> bytes:
    """The file with a byte, its length, pieces or spans of its header, or a value in it changed."""
    length = int.from_bytes(raw[:8], "little")
    text, data = bytearray(raw[8 : 8 + length]), raw[8 + length :]
    kind = generator.randrange(7)
    if kind == 0:
        position = generator.randrange(len(raw))
        return raw[:position] + bytes([generator.randrange(256)]) + raw[position + 1 :]
    if kind == 1:
        return raw[: generator.randrange(len(raw))] if generator.random() < 0.5 else raw + bytes(3)
    if kind == 2:
        values = json.loads(text)
        fields, value = generator.choice([v for v in values.values() if "dtype" in v]), generator.choice(VALUES)
        name = generator.choice(["dtype", "shape", "data_offsets", "data_offsets", "extra"])
        old = fields.get(name)
        if isinstance(old, list) and old and generator.random() < 0.8:
            old[generator.randrange(len(old))] = value
        else:
            fields[name] = value
        if generator.random() < 0.2:
            values["__metadata__"] = value
        text = bytearray(json.dumps(values).encode())
    for _ in range(generator.randrange(1, 4) if kind > 2 else 0):
        begin, end = sorted(generator.randrange(len(text) + 1) for _ in range(2))
        if kind == 3:
            text[begin : begin + generator.randrange(3)] = generator.choice(PIECES)
        elif kind == 4:
            text[begin:begin] = generator.choice(PIECES)
        elif kind == 5:
            text[begin:begin] = text[begin:end]
        else:
            del text[begin : min(end, begin + 8)]
    return struct.pack("<Q", len(text) if generator.random() < 0.8 else length) + text + data


STRICTER = ("stands there twice", "and no other", "is no JSON object")
"""Why a file may be refused here that the library takes: see `read_header`."""


def test_mutated_files_are_read_as_the_library_reads_them_or_refused(tmp_path):
    """Names, dtypes, shapes and bytes equal, and never a file that it refuses."""
    generator, file = random.Random(14), tmp_path / "file"
    whole = [save(ARRAYS, metadata={"format": "pt", "k": "v"}), save({"y": np.arange(3, dtype="f4"), "x": np.ones(8)})]
    accepted = refused = 0
    for _ in range(3000):
        content = mutated(generator.choice(whole), generator)
        file.write_bytes(content)
        try:
            theirs = dict(deserialize(content))
        except SafetensorError:
            theirs = None
        try:
            ours = read_header(file)
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 400
            assert theirs is None or any(reason in str(error) for reason in STRICTER), (error, content)
            continue
        assert theirs is not None, content
        accepted += 1
        assert ours.keys() == theirs.keys()
        for name, stored in ours.items():
            data = content[stored.offset : stored.offset + stored.nbytes]
            expected = [*theirs[name]["shape"]], theirs[name]["dtype"], bytes(theirs[name]["data"])
            assert ([*stored.shape], stored.dtype, data) == expected
    assert accepted > 100 and refused > 1000, "both must occur"


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
