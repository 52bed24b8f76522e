"""Tokens in files of one size, NAME-00000.npy and so on: written one after another, read as one long text."""

import io
import itertools
import mmap
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipe.cache import file_hash
from recipe.durable import sync

SHARD_TOKENS = 2**26
"""Tokens of a shard, of each side all but the last: 128 MiB of uint16."""
HEADER = 128
"""Bytes of a shard before its tokens, whatever their number."""


class ShardWriter:
    """Appends tokens to the shards of one side; what `state` tells is on disk once `sync` is done.

    An open shard that holds more than `state` says is cut back to that: another process was killed there.
    """

    def __init__(self, folder: Path, side: str, dtype: np.dtype, state: dict[str, Any] | None = None) -> None:
        self.folder, self.side, self.dtype = folder, side, dtype
        self.shards: list[list] = [] if state is None else list(state["shards"])
        """[name, tokens, SHA-256] of each that is full, or closed at the end."""
        self.open_tokens: int = 0 if state is None else state["open_tokens"]
        if state is not None:
            self._cut_back()

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self.open_tokens + sum(tokens for _, tokens, _ in self.shards)

    @property
    def state(self) -> dict[str, Any]:
        """What a later writer goes on from, as JSON has it."""
        return {"shards": [list(shard) for shard in self.shards], "open_tokens": self.open_tokens}

    def append(self, tokens: np.ndarray) -> None:
        """Write tokens after the others; full shards are closed."""
        while len(tokens):
            room = SHARD_TOKENS - self.open_tokens
            self._write(tokens[:room])
            tokens = tokens[room:]
            if self.open_tokens == SHARD_TOKENS:
                self.close()

    def sync(self) -> None:
        """Force the open shard to disk."""
        if self.open_tokens:
            sync(self._open_file)

    def close(self) -> None:
        """Finish the open shard, if it has any tokens: its header says how many, it is forced to disk and hashed."""
        if not self.open_tokens:
            return
        file = self._open_file
        if self.open_tokens < SHARD_TOKENS:
            # Never in place: what is on disk of an open shard stays until it is closed.
            shorter = file.with_name(f".{file.name}.new")
            with open(file, "rb") as stream, open(shorter, "wb") as copy:
                copy.write(header(self.dtype, self.open_tokens))
                stream.seek(HEADER)
                shutil.copyfileobj(stream, copy)
            sync(shorter)
            shorter.replace(file)
        else:
            sync(file)
        self.shards.append([file.name, self.open_tokens, file_hash(file)])
        self.open_tokens = 0

    @property
    def _open_file(self) -> Path:
        return self.folder / f"{self.side}-{len(self.shards):05}.npy"

    def _write(self, tokens: np.ndarray) -> None:
        with open(self._open_file, "ab") as stream:
            if not self.open_tokens:
                stream.truncate(0)
                stream.write(header(self.dtype, SHARD_TOKENS))
            stream.write(tokens.astype(self.dtype).tobytes())
        self.open_tokens += len(tokens)

    def _cut_back(self) -> None:
        """Cut the open shard to its tokens and remove later ones; OSError if there is less of it."""
        if self.open_tokens:
            size = HEADER + self.open_tokens * self.dtype.itemsize
            with open(self._open_file, "r+b") as stream:
                if stream.seek(0, io.SEEK_END) < size:
                    raise OSError(f"{self._open_file} is shorter than it was")
                stream.truncate(size)
            sync(self._open_file)
        kept = {name for name, _, _ in self.shards} | ({self._open_file.name} if self.open_tokens else set())
        for file in self.folder.glob(f"{self.side}-*.npy"):
            if file.name not in kept:
                file.unlink()


def header(dtype: np.dtype, tokens: int) -> bytes:
    """The first HEADER bytes of a .npy file of so many tokens."""
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(stream, described)
    assert stream.tell() == HEADER, "a count of tokens never changes the header's length"
    return stream.getvalue()


class Shards:
    """Tokens of several shards as one text, mapped: nothing is in memory but what was just read.

    Files stay those that were opened, whatever takes their names later. Each is one open file.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], dtype: np.dtype) -> None:
        """`files` are paths with their numbers of tokens."""
        self.files, self.dtype = list(files), dtype
        self._ends = np.array(list(itertools.accumulate(tokens for _, tokens in files)), np.int64)
        self._maps = [_mapped(path) for path, _ in files]
        self._arrays = [
            np.frombuffer(mapped, dtype, tokens, HEADER) for mapped, (_, tokens) in zip(self._maps, files, strict=True)
        ]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, some: slice) -> np.ndarray:
        """A copy of the tokens of a slice without step."""
        start, stop, step = some.indices(len(self))
        assert step == 1, "tokens are read in order"
        return self.windows(np.array([start], np.int64), max(0, stop - start), self.dtype)[0]

    def windows(self, starts: np.ndarray, length: int, dtype: Any = np.int32) -> np.ndarray:
        """The tokens from each start on, (len(starts), length); a window may reach over shards."""
        windows = np.empty((len(starts), length), dtype)
        touched = set()
        for row, start in enumerate(starts.tolist()):
            shard, done = int(np.searchsorted(self._ends, start, side="right")), 0
            while done < length:
                first = start + done - (int(self._ends[shard - 1]) if shard else 0)
                piece = self._arrays[shard][first : first + length - done]
                windows[row, done : done + len(piece)] = piece
                touched.add(shard)
                done, shard = done + len(piece), shard + 1
        for shard in touched:
            _forget(self._maps[shard])
        return windows


def _mapped(file: Path) -> mmap.mmap:
    with open(file, "rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def _forget(mapped: mmap.mmap) -> None:
    """Give the pages that were read back to the system, which may keep them for the next reader."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
