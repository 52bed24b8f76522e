"""`python locks/write.py REPORT LOCK`: the packages of a report of pip's as lines NAME==VERSION (docs/install.md)."""

import json
import re
import sys
from pathlib import Path

OURS = "qwen-from-scratch"
OF_CUDA = re.compile(r"(nvidia|cuda)-|triton$")
"""Packages that PyTorch's CUDA build names by exact version itself."""


def lines(report: dict) -> list[str]:
    """Sorted; 2.13.0 for 2.13.0+cpu, as either build has that version."""
    found = {}
    for package in report["install"]:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        if name != OURS and not OF_CUDA.match(name):
            found[name] = package["metadata"]["version"].partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


if __name__ == "__main__":
    report, lock = map(Path, sys.argv[1:])
    values = json.loads(report.read_text(encoding="utf-8"))
    python = ".".join(values["environment"]["python_full_version"].split(".")[:2])
    header = f"# What CI runs on Python {python}; written by `make lock`."
    lock.write_text("\n".join([header, *lines(values)]) + "\n", encoding="utf-8")
