"""The collectives of a compiled program, read from its HLO: kind, bytes that leave a device, how often it runs."""

import math
import re
from collections.abc import Iterator

_COLLECTIVE = re.compile(r"= (.*?) (all-[\w-]+?|ragged-all-to-all|reduce-scatter|collective-[\w-]+?)(?:-start)?\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|calls|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"([a-z]+)(\d+)\w*\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count\\?"?: ?\{\\?"n\\?": ?\\?"(\d+)')


def collectives(hlo: str) -> list[dict]:
    """Each collective of a compiled program: kind, bytes of an element, devices in a group, bytes that leave a device
    at one time, how often it runs (a loop's trips counted), and whether it is in a loop.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = name if line.startswith("ENTRY ") else entry
            lines = computations.setdefault(name, [])
        lines.append(line)

    def walk(name: str, times: int, in_loop: bool) -> Iterator[dict]:
        for line in computations[name][1:]:
            if match := _COLLECTIVE.search(line):
                arrays = [
                    (int(bits) // 8, math.prod(int(size) for size in sizes.split(",") if size))
                    for _, bits, sizes in _ARRAY.findall(match[1])
                ]
                size, devices = sum(width * size for width, size in arrays), _devices(line)
                yield {
                    "kind": match[2],
                    "width": arrays[0][0],
                    "devices": devices,
                    "sent": _sent(match[2], size, devices),
                    "times": times,
                    "in_loop": in_loop,
                }
                continue
            inner = _CALLED.findall(line)
            inner += [name for many in _BRANCHES.findall(line) for name in re.findall(r"[\w.-]+", many)]
            is_loop = " while(" in line
            trips = int(match[1]) if is_loop and (match := _TRIPS.search(line)) else 1
            for called in dict.fromkeys(inner):
                yield from walk(called, times * trips, in_loop or is_loop)

    return list(walk(entry, 1, False))


def _devices(line: str) -> int:
    """Devices in a group; 0 for collective-permute, which has pairs."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):  # as jax 0.12 prints them
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"\w+", match[2]))
    return 0


def _sent(kind: str, result: int, devices: int) -> int:
    """Bytes that leave a device, from those of the result: of a ring of g devices (g-1)/g of the whole, for an
    all-reduce twice; a reduce-scatter's result is a g-th of it."""
    if not devices:
        return result
    if kind == "reduce-scatter":
        return result * (devices - 1)
    return result * (devices - 1) // devices * (2 if kind == "all-reduce" else 1)
