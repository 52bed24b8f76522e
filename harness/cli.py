"""The command line: every field of a frozen dataclass is a flag, and every user's mistake is one line on stderr.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 130 Ctrl-C, 143 SIGTERM. Nothing here imports a framework: `--help`
is instant.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from recipe.config import UserError, require

T = TypeVar("T")

USERS_MISTAKES = (
    *(UserError, FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError),
)


def parse(kind: type[T], argv: Sequence[str], *, default: T | None = None, prog: str, description: str) -> T:
    """An instance of the dataclass `kind` from flags over `default`; the help text is the fields' docstrings.

    `--help` prints and exits 0. A mistake raises `UserError` with one line instead of tyro's box.
    """
    if not {"-h", "--help"} & set(argv):
        _check_arguments(kind, argv, default)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                kind,
                args=list(argv),
                prog=prog,
                description=description,
                config=(tyro.conf.FlagConversionOff,),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_reason(stop) or _flatten(box.getvalue())) from None


def run(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit code; a user's mistake becomes one line on stderr, a bug keeps its traceback."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # not some other pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
            print("stopped: nobody reads the output any more; send it to a file instead.", file=sys.stderr)
            return 1
        raise
    except USERS_MISTAKES as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


def leaves(kind: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted field name, type, default or MISSING) of every field that is not itself a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        value = getattr(default, field.name, field.default)
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint, value


def _check_arguments(kind: Any, argv: Sequence[str], default: Any) -> None:
    """Raise `UserError` for an unknown flag, a missing value, or one that is not of its field's type."""
    known = {name: (hint, value) for name, hint, value in leaves(kind, default)}
    takes_positional = any(_marked(hint, tyro.conf.Positional) for hint, _ in known.values())
    index, given = 0, set()
    while index < len(argv):
        argument = argv[index]
        index += 1
        if not argument.startswith("--"):
            require(takes_positional, f"{argument!r} belongs to no flag; every argument is a flag and its value.")
            continue
        flag, has_value, text = argument.partition("=")
        name = flag[2:].replace("-", "_")
        require(name in known, f"{flag} is unknown; did you mean {_nearest_flags(name, known)}? --help lists all.")
        hint, value = known[name]
        given.add(name)
        if _marked(hint, tyro.conf.UseAppendAction):
            hint, value = get_args(get_args(hint)[0])[0], ""  # one element each time it stands there
        if get_origin(hint) is tuple:
            while not has_value and index < len(argv) and not argv[index].startswith("--"):
                index += 1
            continue
        example = "" if value in (None, "", dataclasses.MISSING) else f", e.g. {flag} {value}"
        if not has_value:
            missing = index == len(argv) or argv[index].startswith("--")
            require(not missing, f"{flag} needs a value: {_expected(hint)}{example}.")
            text = argv[index]
            index += 1
        require(_parses(text, hint), f"{flag} {text} is not {_expected(hint)}; choose one{example}.")
    for name, (hint, value) in known.items():
        if value is dataclasses.MISSING and name not in given and get_origin(hint) is not Annotated:
            raise UserError(f"--{name.replace('_', '-')} is missing; it needs {_expected(hint)}.")


def _marked(hint: Any, marker: Any) -> bool:
    """Whether a field's type carries this mark of tyro's."""
    return get_origin(hint) is Annotated and marker in hint.__metadata__


def _nearest_flags(name: str, leaves: dict[str, Any]) -> str:
    """The flags with the same last part (`--learning-rate` has two), else the one spelt most alike."""
    same = [leaf for leaf in leaves if leaf.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = same or difflib.get_close_matches(name, leaves, n=1, cutoff=0.0)
    return " or ".join("--" + leaf.replace("_", "-") for leaf in nearest)


def _expected(hint: Any) -> str:
    """A field's type in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("None" if part is NoneType else _expected(part) for part in get_args(hint))
    return {int: "a whole number (int)", float: "a number (float)", bool: "True or False (bool)"}.get(
        hint, "a text (str)"
    )


def _parses(text: str, hint: Any) -> bool:
    """Whether `text` reads as a value of the type."""
    if get_origin(hint) is Literal:
        return text in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(text == "None" if part is NoneType else _parses(text, part) for part in get_args(hint))
    if hint is bool:
        return text in ("True", "False")
    if hint in (int, float):
        with contextlib.suppress(ValueError):
            hint(text)
            return True
        return False
    return True


def _reason(stop: BaseException) -> str | None:
    """The message of the mistake that tyro met while it built a dataclass and turned into an exit."""
    error = stop.__cause__ or stop.__context__
    while error is not None:
        if isinstance(error, USERS_MISTAKES):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _flatten(box: str) -> str:
    """The text of tyro's error box in one line, without its frame, title and footer."""
    rows = [line.strip("│ ") for line in box.splitlines()]
    body = itertools.takewhile(lambda row: not row.startswith("─"), rows[1:])
    return " ".join(body) or "the command line cannot be read; see --help."
