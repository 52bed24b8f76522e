"""The mesh that a run's devices form, by name: `data=2,fsdp=4,tensor=1`; `jax_impl/sharding.py` lays arrays on it."""

import math
from typing import NamedTuple


class MeshShape(NamedTuple):
    """Devices along each axis.

    data: rows of a micro-batch are divided, and everything else is on each.
    fsdp: rows are divided, and so is what is kept of each matrix; fully sharded data parallelism.
    tensor: heads, the feed-forward layer's width and the vocabulary are divided; every device sees all rows.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def rows(self) -> int:
        """Into how many parts the rows of a micro-batch are divided."""
        return self.data * self.fsdp

    @property
    def devices(self) -> int:
        """Devices in all."""
        return math.prod(self)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self._asdict().items())


def parse_mesh(text: str) -> MeshShape | None:
    """The shape that `data=2,fsdp=4,tensor=1` names; axes left out have one device. None for an empty text.

    Raises ValueError for anything else, with the value, the rule and the remedy.
    """
    if not text:
        return None
    sizes: dict[str, int] = {}
    remedy = (
        f"mesh={text[:100]!r} must be AXIS=DEVICES with commas between, each axis at most once, of "
        f"{', '.join(MeshShape._fields)}; choose e.g. data=2,fsdp=4,tensor=1."
    )
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MeshShape._fields or name in sizes or not _is_count(size):
            raise ValueError(remedy)
        sizes[name] = int(size)
    return MeshShape(**sizes)


def _is_count(text: str) -> bool:
    """Whether this is a number of devices, from 1 to 999,999."""
    return text.isascii() and text.isdigit() and len(text) < 7 and int(text) > 0
