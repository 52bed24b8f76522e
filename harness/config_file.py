"""`--config FILE`: fields of a run written down, in JSON, TOML or YAML, nested as in run.json; a run.json is one, too.

`preset` in it names what the others are changes of. Every mistake is one line with the file, and the line where the
format's reader knows it.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.config import RunConfig, UserError, require
from recipe.presets import changed
from recipe.reading import kind_of, short

LARGEST = 1_000_000
"""Bytes; a run.json has some 4,000."""
LONGEST_PATH = 300
OF_ITS_RUN = ("out", "resume", "hosts")
"""Fields of a run.json that another run does not take over."""


@dataclass(frozen=True)
class ConfigFile:
    """What a file says: its preset, if it names one, and the fields to change, nested and with plain names."""

    path: str
    preset: str | None
    changes: Mapping[str, Any]
    is_run: bool
    """Whether it is a run's run.json, which has every field."""

    @property
    def init(self) -> str:
        """The weights that it names to begin with; empty if it names none."""
        named = self.changes.get("init", "")
        return named if isinstance(named, str) else ""

    def over(self, config: RunConfig) -> RunConfig:
        """The configuration with the file's fields; UserError, which begins with the file, for one that is wrong."""
        try:
            return changed(config, self.changes)
        except UserError as error:
            raise UserError(f"--config {short(self.path, LONGEST_PATH)}: {error}") from None


class _Twice(Exception):
    """A name stands twice in one object; the text is the name."""


def read_config_file(path: str) -> ConfigFile:
    """The file at a path, or the run.json of a run folder; UserError for whatever is wrong with it.

    Names may be dotted (`data.corpus`) where the format lets them, and have - for _, as flags do.
    """
    file, name = Path(path), f"--config {short(path, LONGEST_PATH)}"
    if file.is_dir():
        file = file / "run.json"
        require(file.is_file(), f"{name} is a folder without a run.json; name a file, or a run's folder.")
    suffix = file.suffix.lower()
    require(suffix in READERS, f"{name} must end in {', '.join(READERS)}; name one of them, or a run's folder.")
    require(file.is_file(), f"{name} is no file; name a {', '.join(READERS)}, or a run's folder.")
    size = file.stat().st_size
    require(size <= LARGEST, f"{name} has {size:,} bytes, more than any configuration; name another.")
    is_run = False
    try:
        values = READERS[suffix](file.read_bytes().decode("utf-8-sig"))
        if isinstance(values, dict) and isinstance(values.get("config"), dict):
            is_run = True
            values = {field: value for field, value in values["config"].items() if field not in OF_ITS_RUN}
        changes = _nested(values) if isinstance(values, dict) else {}
    except UserError:
        raise
    except _Twice as twice:
        raise UserError(f"{name} has {short(str(twice))} twice; leave one out.") from None
    except (ValueError, RecursionError) as error:  # also what is no UTF-8, and numbers of thousands of digits
        said = " ".join(str(error).split())
        raise UserError(f"{name} is not {suffix[1:].upper()} ({short(said, LONGEST_PATH)}); mend it there.") from None
    require(isinstance(values, dict), f"{name} holds {kind_of(values)}, not fields and values; write e.g. steps.")
    require(bool(changes), f"{name} sets nothing; write e.g. steps, or leave the flag out.")
    require("resume" not in changes, f"{name} sets resume, which is no setting of a file; pass --resume.")
    preset = changes.pop("preset", None)
    require(
        preset is None or isinstance(preset, str),
        f"{name}: preset={short(repr(preset))} must be a preset's name; choose e.g. tiny.",
    )
    return ConfigFile(path, preset, changes, is_run)


def _nested(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The fields with dotted names taken apart and - for _; `_Twice` for what comes by two ways."""
    found: dict[Any, Any] = {}
    for path, value in _fields(values):
        here = found
        for section in path[:-1]:
            here = here.setdefault(section, {})
            if not isinstance(here, dict):
                raise _Twice(section)
        if path[-1] in here:
            raise _Twice(".".join(map(str, path)))
        here[path[-1]] = value
    return found


def _fields(values: Mapping[Any, Any], above: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The names that lead to each value, and that value."""
    for name, value in values.items():
        path = (*above, *(name.replace("-", "_").split(".") if isinstance(name, str) else [name]))
        if isinstance(value, Mapping):
            yield from _fields(value, path)
        else:
            yield path, value


def _read_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise _Twice(name)
            found[name] = value
        return found

    return json.loads(text, object_pairs_hook=once)


def _read_yaml(text: str) -> Any:
    """YAML with the plain values of its version 1.2: 1e-3 is a number, and yes, no, 1:30 and 2024-01-01 are texts."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError(
            "--config needs PyYAML for YAML, which is not installed; run: pip install pyyaml, or write TOML or JSON."
        ) from None

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for billions of values
                event = self.peek_event()
                raise yaml.composer.ComposerError(None, None, "aliases are not read", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            for place, name in enumerate(names):
                if name in names[:place]:
                    mark = node.value[place][0].start_mark
                    raise yaml.constructor.ConstructorError(None, None, f"{name} stands there twice", mark)
            return super().construct_mapping(node, deep=deep)

    for kind, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
        ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"^(?:{pattern})$"), list(first))
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1}: {error.problem}" if mark else str(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


READERS: dict[str, Callable[[str], Any]] = {
    ".json": _read_json,
    ".toml": tomllib.loads,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}
"""Endings of a file's name -> what reads it."""
