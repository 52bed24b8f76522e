"""Whether a run whose last step is saved has all that comes after: its picture and its samples, whole."""

import zlib
from pathlib import Path

from recipe.config import RunConfig

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def finished(folder: str | Path, config: RunConfig) -> bool:
    """Whether loss.png is a whole picture and samples.txt, where samples are asked for, holds something."""
    if not _whole_png(_bytes(Path(folder) / "loss.png")):
        return False
    return not (config.sample_tokens and config.prompts) or bool(_bytes(Path(folder) / "samples.txt").strip(b"\0 \r\n"))


def _whole_png(data: bytes) -> bool:
    """Whether every chunk up to the last, IEND, has the checksum it says, and nothing follows."""
    if not data.startswith(SIGNATURE):
        return False
    start, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 8 + length
        if len(data) < end + 4 or zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        start = end + 4
    return start == len(data)


def _bytes(file: Path) -> bytes:
    """The bytes of a file; none if it is none or cannot be read."""
    try:
        return file.read_bytes() if file.is_file() else b""
    except OSError:
        return b""
