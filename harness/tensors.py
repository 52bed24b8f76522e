"""safetensors files, tensor by tensor: names, shapes and dtypes come from the headers, data only when asked for.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets), and
the bytes of the tensors (https://github.com/huggingface/safetensors#format). Plain reads and writes of one tensor after
another keep one of them in memory; the library maps whole files, and mapped pages count as memory beside the parameters
made from them.
"""

import json
import math
import os
import struct
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from recipe.config import UserError, require
from recipe.params import shapes_of

DTYPES = {code: np.dtype(kind).newbyteorder("<") for code, kind in [("F64", "f8"), ("F32", "f4"), ("F16", "f2")]}
DTYPES["BF16"] = np.dtype(ml_dtypes.bfloat16)
CODES = {dtype.name: code for code, dtype in DTYPES.items()}

# Reading shows nothing before this many seconds; without a terminal, a line each time they have passed again.
PATIENCE = 3.0
# A longer header is no header: the library's own limit, 100 MB.
LONGEST_HEADER = 100_000_000


class StoredTensor(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class StoredTensors(Mapping[str, np.ndarray]):
    """Tensors on disk by name; indexing reads one, in its stored dtype, and keeps nothing.

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
        count, dtype = math.prod(entry.shape), DTYPES[entry.dtype]
        array = np.fromfile(entry.file, dtype, count=count, offset=entry.offset).reshape(entry.shape)
        self._progress(entry.nbytes)
        return array

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
    """Every tensor of a file; raises UserError if the file is damaged, cut short, or not of this format."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries, end = {}, 0
        for name, tensor in header.items():
            start, stop = tensor["data_offsets"]
            entry = StoredTensor(file, tensor["dtype"], tuple(tensor["shape"]), 8 + length + start)
            if entry.dtype in DTYPES and stop - start != entry.nbytes:
                raise ValueError(f"{name} has {stop - start} bytes")
            entries[name], end = entry, max(end, 8 + length + stop)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file.name} is not a safetensors file ({error})") from None
    require(end <= size, f"{file.name} is cut short: {size:,} bytes of {end:,}")
    return entries


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], names: Collection[str], dtype: str) -> None:
    """A safetensors file of the named tensors, cast to `dtype` one by one and forced to disk."""
    stored, shapes = DTYPES[CODES[dtype]], shapes_of(tensors)
    end = 0
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    for name in names:
        start, end = end, end + math.prod(shapes[name]) * stored.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            np.ascontiguousarray(tensors[name], stored).tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())
