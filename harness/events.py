"""TensorBoard event files, written by hand: a TFRecord per `Event` message, scalars only.

The common writers import torch wherever it is installed, and a JAX run must not load it. Formats: `event.proto` and
`summary.proto` of TensorBoard, `record_writer.h` of TensorFlow, the CRC-32C polynomial of RFC 3720.
"""

import struct
import time
from pathlib import Path


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) rotated and offset as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _bytes_field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


class EventFile:
    """One event file in a folder; `tensorboard --logdir` on the folder, or on one above it, shows its scalars."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        """A file that goes on with earlier ones names its `first_step`: from there TensorBoard forgets theirs."""
        self._file = open(folder / f"events.out.tfevents.{time.time():.6f}", "xb")  # noqa: SIM115 (closed in close)
        self._write(_bytes_field(3, b"brain.Event:2"))
        if first_step:
            session_start = struct.pack("<BB", 1 << 3, 1)
            self._write(_varint(2 << 3) + _varint(first_step) + _bytes_field(7, session_start))

    def add_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write one event with a value (stored in float32) per tag."""
        values = b""
        for tag, scalar in scalars.items():
            value = _bytes_field(1, tag.encode()) + struct.pack("<Bf", 2 << 3 | 5, scalar)
            values += _bytes_field(1, value)
        self._write(_varint(2 << 3) + _varint(step) + _bytes_field(5, values))

    def _write(self, event: bytes) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + struct.pack("<I", masked_crc32c(length)))
        self._file.write(event + struct.pack("<I", masked_crc32c(event)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
