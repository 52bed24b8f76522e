"""Registers, spills and shared memory of compiled kernels: the PTX that XLA leaves, read by ptxas, and its launch plan.

Standard library and NVIDIA's assembler.
"""

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ARCHITECTURE = "sm_90a"


class Code(NamedTuple):
    """What ptxas says of a kernel, and how XLA launches it."""

    registers: int
    """A thread's."""
    spilled: int
    """Bytes a thread stores to and loads from memory for want of registers."""
    shared: int = 0
    """Bytes a block."""
    grid: tuple[int, ...] = ()
    threads: int = 0
    """Of a block."""


_ENTRY = re.compile(
    r"Compiling entry function '([^']+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    r"([^\n]*)",
    re.DOTALL,
)
_LAUNCH = re.compile(
    r"\] *([\w.\-]+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\] +shared_memory: (\d+) bytes",
)


def read(folder: Path) -> dict[str, Code]:
    """Every kernel that XLA dumped into this folder (`xla_dump_to`), by name; empty without ptxas."""
    assembler = _assembler()
    if assembler is None:
        return {}
    launches = {}
    for file in sorted(folder.glob("*thunk_sequence*.txt")):
        for name, grid, threads, shared in _LAUNCH.findall(file.read_text(encoding="utf-8")):
            launches[name] = _numbers(grid), _numbers(threads)[0], int(shared)
    found = {}
    for file in sorted(folder.glob("*.ptx")):
        if not file.stat().st_size:
            continue
        command = [assembler, "-v", f"-arch={ARCHITECTURE}", str(file), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        for name, code in entries(said).items():
            grid, threads, dynamic = launches.get(name, ((), 0, 0))
            found[name] = code._replace(shared=max(code.shared, dynamic), grid=grid, threads=threads)
    return found


def entries(said: str) -> dict[str, Code]:
    """What `ptxas -v` prints, by kernel."""
    found = {}
    for name, stores, loads, registers, rest in _ENTRY.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = Code(int(registers), int(stores) + int(loads), int(shared.group(1)) if shared else 0)
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _assembler() -> str | None:
    """ptxas of the package nvidia-cuda-nvcc, else the machine's own."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvcc") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    own = next((str(file.locate()) for file in files if file.name == "ptxas"), None)
    return own or shutil.which("ptxas")
