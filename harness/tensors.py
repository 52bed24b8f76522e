"""safetensors files, tensor by tensor: names, shapes and dtypes come from the headers, data only when asked for.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), and
the bytes of the tensors (https://github.com/huggingface/safetensors#format). Plain reads and writes of one tensor after
another keep one of them in memory; the library maps whole files, and mapped pages count as memory beside the parameters
made from them.
"""

import hashlib
import json
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from recipe.config import UserError, fits, require
from recipe.params import shapes_of
from recipe.reading import parse_json, short, some

DTYPES = {code: np.dtype(kind).newbyteorder("<") for code, kind in [("F64", "f8"), ("F32", "f4"), ("F16", "f2")]}
DTYPES["BF16"] = np.dtype(ml_dtypes.bfloat16)
CODES = {dtype.name: code for code, dtype in DTYPES.items()}

BITS = dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8)
BITS |= dict.fromkeys(["I16", "U16", "F16", "BF16"], 16) | dict.fromkeys(["I32", "U32", "F32"], 32)
BITS |= dict.fromkeys(["I64", "U64", "F64", "C64"], 64) | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of an element of every dtype of the format; those of `DTYPES` are read."""
WORD = 2**64
"""Sizes in a header are below it."""
PIECE = 2**22
"""Elements compared at once."""

# Reading shows nothing before this many seconds; without a terminal, a line each time they have passed again.
PATIENCE = 3.0
# A longer header is no header: the library's own limit, 100 MB.
LONGEST_HEADER = 100_000_000


class Damaged(UserError):
    """What was read is not what was written; another copy may be whole."""


class StoredTensor(NamedTuple):
    """Where one tensor lies, and what it must be where that is known."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    crc: str | None = None
    """CRC-32 of its bytes, by which `StoredTensors` know them."""
    name: str = ""
    """Its name in the file, for a message."""
    remedy: str = "Fetch or save it again"

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def read(self, begin: int, count: int) -> np.ndarray:
        """So many elements, flat, from the element `begin` on; UserError if the file has become shorter."""
        dtype = DTYPES[self.dtype]
        try:
            array = np.fromfile(self.file, dtype, count=count, offset=self.offset + begin * dtype.itemsize)
        except OSError as error:
            raise Damaged(f"{self.file} cannot be read ({error.strerror}); take another copy.") from None
        if len(array) != count:
            raise Damaged(f"{self.file} has become shorter while it was read; fetch or save it again.")
        return array

    def read_crc(self) -> str:
        """CRC-32 of its bytes on disk, a piece after another."""
        value, left = 0, self.nbytes
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            while left and (piece := stream.read(min(left, PIECE))):
                value, left = zlib.crc32(piece, value), left - len(piece)
        return as_hex(value)


class StoredTensors(Mapping[str, np.ndarray]):
    """Tensors on disk by name; indexing reads one, in its stored dtype, and keeps nothing. Damaged if it is another.

    Reads that take long show a bar on a terminal and a line now and then elsewhere, on stderr.
    """

    def __init__(self, entries: Mapping[str, StoredTensor], what: str) -> None:
        """`what` names them in the progress."""
        self.entries, self.what = dict(entries), what
        self._bar: tqdm | None = None
        self._said, self._done = 0.0, 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name; reads nothing."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.nbytes for entry in self.entries.values())

    def below(self, prefix: str) -> "StoredTensors":
        """Those whose names begin with the prefix, without it."""
        chosen = {name.removeprefix(prefix): e for name, e in self.entries.items() if name.startswith(prefix)}
        return StoredTensors(chosen, self.what)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        array = entry.read(0, math.prod(entry.shape))
        if entry.crc is not None and entry.crc != as_hex(zlib.crc32(array.view(np.uint8).data)):
            raise Damaged(f"{entry.file} is not what was written: {entry.name} has another CRC-32. {entry.remedy}.")
        self._progress(entry.nbytes)
        return array.reshape(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def _progress(self, count: int) -> None:
        if self._bar is None:
            options = dict(unit="B", unit_scale=True, delay=PATIENCE, disable=None)
            self._bar = tqdm(total=self.nbytes, desc=f"reading {self.what}", **options)
            self._said, self._done = time.monotonic(), 0
        self._done += count
        self._bar.update(count)
        if self._bar.disable and time.monotonic() - self._said > PATIENCE:
            print(f"reading {self.what}: {self._done / 1e9:.1f} of {self.nbytes / 1e9:.1f} GB", file=sys.stderr)
            self._said = time.monotonic()
        if self._done >= self.nbytes:
            self._bar.close()
            self._bar = None


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file; raises UserError if the file is damaged, cut short, or not of this format.

    What the safetensors library refuses is refused. Stricter than it, as the format's text is: no name twice, no field
    beside the three, an entry is an object, and the header begins with its brace.
    """

    def need(condition: bool, reason: str) -> None:
        require(condition, f"{file.name} is not a safetensors file ({reason}); fetch or save it again.")

    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        need(size >= 8, f"it has {size} bytes")
        length = int.from_bytes(stream.read(8), "little")
        need(length <= min(size - 8, LONGEST_HEADER), "its header is longer than the file, or than 100 MB")
        text = stream.read(length)
    need(text.startswith(b"{"), "its header is no JSON object")
    header = parse_json(text, f"the header of {file.name}", pairs=_each_once, integer=_natural)
    metadata = header.pop("__metadata__", None)
    need(metadata is None or fits(metadata, dict[str, str]), "its __metadata__ are no texts by name")
    need(_encodable([*header, *(metadata or {}), *(metadata or {}).values()]), "a text in its header is no Unicode")
    entries, ends = {}, {}
    for name, values in header.items():
        known = isinstance(values, dict) and values.keys() == {"dtype", "shape", "data_offsets"}
        need(known, f"{short(name)} has not the fields dtype, shape, data_offsets and no other")
        dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
        need(isinstance(dtype, str) and dtype in BITS, f"{short(name)} has the unknown dtype {short(repr(dtype))}")
        sizes = [*accumulate(shape, mul, initial=1), *shape] if fits(shape, list[int]) else [WORD]
        need(max(sizes) < WORD, f"{short(name)} has the shape {short(repr(shape))}")
        need(fits(offsets, list[int]) and len(offsets) == 2, f"{short(name)} has no two data_offsets")
        entry = StoredTensor(file, dtype, tuple(shape), 8 + length + offsets[0])
        held = offsets[1] - offsets[0]
        bits = math.prod(shape) * BITS[dtype]
        need(8 * held == bits, f"{short(name)} has {held:,} bytes, which {dtype} {short(str(entry.shape))} has not")
        entries[name], ends[name] = entry, 8 + length + offsets[1]
    end = 8 + length
    for name in sorted(entries, key=lambda name: (entries[name].offset, ends[name])):
        need(entries[name].offset == end, f"{short(name)} does not begin where the tensor before it ends")
        end = ends[name]
    require(end <= size, f"{file.name} is cut short: {size:,} bytes of {end:,}; fetch or save it again.")
    need(end == size, f"{size - end:,} bytes follow the last tensor")
    return entries


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same, in whatever dtypes; reads a piece of both after another."""
    count = math.prod(one.shape)
    for begin in range(0, count if one.shape == other.shape else 0, PIECE):
        a, b = (tensor.read(begin, min(PIECE, count - begin)) for tensor in (one, other))
        alike = one.dtype == other.dtype and a.tobytes() == b.tobytes()  # NaN too
        if not alike and not np.array_equal(a.astype(np.float64), b.astype(np.float64)):
            return False
    return one.shape == other.shape


def dtype_problems(entries: Mapping[str, StoredTensor]) -> list[str]:
    """Which tensors are of a dtype that is not read, one phrase each dtype."""
    other = sorted({entry.dtype for entry in entries.values()} - DTYPES.keys())
    names = {dtype: [name for name, entry in entries.items() if entry.dtype == dtype] for dtype in other}
    return [f"dtype {dtype}, not one of {', '.join(DTYPES)}: {some(names[dtype])}" for dtype in other]


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands there twice")
    return values


def _natural(digits: str) -> float:
    return float(digits) if digits.startswith("-") else int(digits)  # not even -0 is one to the library


def _encodable(texts: list[str]) -> bool:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False
    return True


def as_hex(crc: int) -> str:
    """A CRC-32 as eight digits."""
    return f"{crc:08x}"


def header_crc(file: Path) -> str:
    """CRC-32 of a file's first 8 bytes and its header; of all there is where the file is shorter."""
    with open(file, "rb") as stream:
        size = stream.read(8)
        length = min(int.from_bytes(size, "little"), LONGEST_HEADER)
        return as_hex(zlib.crc32(size + stream.read(length)))


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], names: Collection[str], dtype: str) -> dict[str, Any]:
    """A safetensors file of the named tensors, cast to `dtype` one by one and forced to disk.

    Returns what `harness/manifest.py` keeps of it, hashed as it is written: SHA-256, and CRC-32 of header and tensors.
    """
    stored, shapes = DTYPES[CODES[dtype]], shapes_of(tensors)
    end = 0
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    for name in names:
        start, end = end, end + math.prod(shapes[name]) * stored.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    beginning = struct.pack("<Q", len(text)) + text
    digest, crcs = hashlib.sha256(beginning), {}
    with open(file, "xb") as stream:
        stream.write(beginning)
        for name in names:
            data = np.ascontiguousarray(tensors[name], stored).reshape(-1).view(np.uint8).data
            stream.write(data)
            digest.update(data)
            crcs[name] = as_hex(zlib.crc32(data))
        stream.flush()
        os.fsync(stream.fileno())
    return {"sha256": digest.hexdigest(), "header": as_hex(zlib.crc32(beginning)), "tensors": crcs}
