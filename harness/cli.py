"""The command line: every field of a frozen dataclass is a flag, and every user's mistake is one line on stderr.

Exit codes: 0 done, 1 failed (also for want of room, memory or files), 2 the user's mistake, 75 another process of this
run was lost (try again), 141 the help's reader left,
129 SIGHUP, 130 Ctrl-C, 143 SIGTERM: the signal that ended the command, at whatever moment; the last line names it.
Nothing here imports a framework: `--help` is instant.
"""

import atexit
import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import itertools
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro

from harness.failures import MISTAKEN, USERS_MISTAKES, machine_says
from harness.interruption import SIGNALS, Interruption, Terminated
from harness.surroundings import git_commit
from recipe.config import UserError, expected, require
from recipe.presets import nearest_fields
from recipe.reading import short

T = TypeVar("T")

DISTRIBUTION = "qwen-from-scratch"
BOOLEANS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
LONGEST_LINE = 1500
"""Characters of an error's line; what is longer loses its middle."""
INTERRUPTED = 130  # 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell reports of any program whose reader left
FRAME = dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")
ASCII_RULE = re.compile(r"-{5,}")
"""What the frame is drawn with where stdout takes ASCII alone."""
SCRIPTS = {"train_jax.py": "jax_impl.train", "train_torch.py": "torch_ref.train"}
"""Scripts of a clone -> the modules that do the same."""
COMMANDS = {
    "jax_impl.train": "qwen-train-jax",
    "torch_ref.train": "qwen-train-torch",
    "jax_impl.generate": "qwen-generate-jax",
    "torch_ref.generate": "qwen-generate-torch",
    "harness.commands.checkpoint": "qwen-checkpoint",
    "harness.commands.plot": "qwen-plot",
    "harness.commands.data": "qwen-data",
    "parity_tests": "qwen-parity",
}
"""Modules -> the commands that an installation has for them."""
OF_TORCH = ("torch", "transformers")
WITHOUT = f"{{}} is not installed; run: pip install '{DISTRIBUTION}[torch]', or in a clone -e '.[torch]'."
WITHOUT_TORCH = WITHOUT.format("PyTorch")


def parse(kind: type[T], argv: Sequence[str], *, default: T | None = None, prog: str, description: str) -> T:
    """An instance of the dataclass `kind` from flags over `default`; the help text is the fields' docstrings.

    `--help` and `--version` print and exit 0. A mistake raises `UserError` with one line instead of tyro's box.
    """
    fields = {name: (hint, value) for name, hint, value in leaves(kind, default)}
    known = {name: field for name, field in fields.items() if not _marked(field[0], tyro.conf.Suppress)}
    given = {} if default is None else {"default": default}
    try:
        return _ask_tyro(tyro.cli, kind, _plain_booleans(argv, known), prog=prog, description=description, **given)
    except _Refused as refused:
        raise UserError(refused.reason or _one_line(refused.box, argv, known)) from None


def parse_command(kinds: Mapping[str, type], argv: Sequence[str], *, prog: str, description: str) -> Any:
    """An instance of the dataclass that the first word of `argv` names; `--help` lists the words."""
    name = argv[0] if argv else ""
    if name in kinds:
        return parse(kinds[name], argv[1:], prog=f"{prog} {name}", description=inspect.getdoc(kinds[name]) or "")
    with contextlib.suppress(_Refused):
        _ask_tyro(tyro.extras.subcommand_cli_from_dict, dict(kinds), argv, prog=prog, description=description)
    said = f"{name} is not a command" if name else "no command is given"
    raise UserError(f"{said}; choose {' or '.join(kinds)}, e.g. {prog} {next(iter(kinds))} --help.")


class _Refused(Exception):
    """tyro's error box, and the rule that was broken if a dataclass itself refused its values."""

    def __init__(self, reason: str | None, box: str) -> None:
        super().__init__(box)
        self.reason, self.box = reason, box


def _ask_tyro(ask: Callable[..., T], what: Any, argv: Sequence[str], **options: Any) -> T:
    """Call one of tyro's parsers; what it prints for `--help` may be piped into `head`."""
    box = io.StringIO()
    try:
        if "--version" in argv:
            print(version())
            raise SystemExit(0)
        with contextlib.redirect_stderr(box):
            return ask(what, args=list(argv), **options)
    except BrokenPipeError:
        _close_output()
        raise SystemExit(BROKEN_PIPE) from None
    except SystemExit as stop:
        if stop.code:
            text = ASCII_RULE.sub(" ", box.getvalue().translate(FRAME))
            raise _Refused(_reason(stop), " ".join(text.split())) from None
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _close_output()
            raise SystemExit(BROKEN_PIPE) from None
        raise


def _close_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end


def version() -> str:
    """The installed distribution's name and version, or what stands in for it in a bare clone."""
    try:
        return f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{DISTRIBUTION}, not installed: a clone at commit {git_commit() or 'unknown'}"


def called_as(default: str) -> str:
    """How a person goes on to the command `default`, `python SCRIPT` or `python -m MODULE`, from the one that runs now.

    After an installed command that is another installed command, and a script that is not here is named by its module.
    """
    words = shlex.split(default)
    module = SCRIPTS.get(words[1], words[-1])
    called = Path(sys.argv[0])
    if called.name.removesuffix(".exe") in COMMANDS.values():
        return COMMANDS.get(module, default)
    if words[1] not in SCRIPTS or Path(words[1]).is_file():
        return default
    return shlex.join(["python", sys.argv[0]] if called.name == words[1] else ["python", "-m", module])


def run(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit code; a signal, a user's mistake, or what the machine refuses, becomes one line
    on stderr, a bug keeps its traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A terminal that cannot show a character shows a question mark.
    try:
        with Interruption() as interruption, interruption.at_once():
            code = main() or 0
            if sys.stdout is not None:
                sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        return _last_line(INTERRUPTED, str(stop) or "interrupted")
    except Terminated as stop:
        return _last_line(stop.code, str(stop))
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # not some other pipe
            _close_output()
            print("stopped: nobody reads the output any more; send it to a file instead.", file=sys.stderr)
            return 1
        raise
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in OF_TORCH:
            raise
        code, message = MISTAKEN, WITHOUT.format("PyTorch" if name == "torch" else name)
    except UserError as error:
        code, message = MISTAKEN, str(error)
    except (OSError, MemoryError, RuntimeError, OverflowError, ValueError) as error:
        said = machine_says(error)
        if said is None:
            raise
        code, message = said
    finally:
        atexit.unregister(_end_quietly)
        atexit.register(_end_quietly)  # the first of those that then run
    return _last_line(code, f"error: {one_line(message)}")


def end(main: Callable[[], int | None]) -> NoReturn:
    """`run`, and with it the process."""
    leave(run(main))


def leave(code: int) -> NoReturn:
    """End the process with an exit code of `run`. After a signal nothing is torn down: XLA, cut short, crashes in that,
    and the exit code is lost."""
    if code in (128 + number for number in SIGNALS):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _end_quietly() -> None:
    """Let Ctrl-C end Python's own end, which takes a second with a framework loaded, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _last_line(code: int, line: str) -> int:
    """Print the line on stderr after all that is still to come on stdout, whichever is gone; returns the code."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _close_output()
    with contextlib.suppress(OSError):
        print(short(line, len(line)), file=sys.stderr)
    return code


def one_line(message: str) -> str:
    """A message as one printable line, however long and whatever is in the names that it repeats."""
    return short(" ".join(message.split()), LONGEST_LINE)


def last_value(argv: Sequence[str], flag: str) -> str | None:
    """The value that `flag` has on the command line, the last one if it stands there twice."""
    value = None
    for index, argument in enumerate(argv):
        if argument.startswith(flag + "="):
            value = argument.partition("=")[2]
        elif argument == flag and index + 1 < len(argv):
            value = argv[index + 1]
    return value


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


def _plain_booleans(argv: Sequence[str], known: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """`argv` with booleans as tyro spells them: `--web True` is `--web`, `--no-a.b` and `--a.b 0` are `--a.no-b`."""
    booleans = {name for name, (hint, value) in known.items() if hint is bool and value is not dataclasses.MISSING}
    plain, index = [], 0
    while index < len(argv):
        flag, has_value, text = argv[index].partition("=")
        index += 1
        name = flag[2:].replace("-", "_")
        negated = name.startswith("no_") and name[3:] in booleans and name not in known
        name = name[3:] if negated else name
        if not flag.startswith("--") or name not in booleans:
            plain.append(flag + has_value + text)
            continue
        if not has_value and index < len(argv) and not negated and not argv[index].startswith("-"):
            text, has_value = argv[index], "="
            index += 1
        require(
            not has_value or (text in BOOLEANS and not negated),
            f"{flag} {text} is not True or False (bool); choose {flag} alone"
            + ("." if negated else f" or --no-{flag[2:]}."),
        )
        section, dot, last = name.rpartition(".")
        off = negated or (has_value and not BOOLEANS[text])
        plain.append("--" + (f"{section}{dot}{'no_' if off else ''}{last}").replace("_", "-"))
    return plain


def _one_line(box: str, argv: Sequence[str], known: Mapping[str, tuple[Any, Any]]) -> str:
    """What tyro's error box says, in one line with flag, what is expected and an example."""
    flags = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    names = {flag: flag[2:].replace("-", "_") for flag in flags}
    for flag, name in names.items():
        section, dot, last = name.rpartition(".")
        positive = name.removeprefix("no_") if name.startswith("no_") else section + dot + last.removeprefix("no_")
        if name not in known and (positive == name or known.get(positive, (None,))[0] is not bool):
            near = _nearest_flags(name, known)
            return f"{flag} is unknown; {f'did you mean {near}? ' if near else ''}--help lists all."
    if stray := re.match(r"Unrecognized options Unrecognized options: (.*?)(?: Perhaps you| For full|$)", box):
        return f"{stray[1].split(', ')[0]!r} belongs to no flag; every argument is a flag and its value, see --help."
    if box.startswith("Required options"):
        for name, (hint, value) in known.items():
            flag = "--" + name.replace("_", "-")
            positional = _marked(hint, tyro.conf.Positional)
            if value is dataclasses.MISSING and (positional or name not in names.values()):
                shown = name.upper() if positional else flag
                if re.search(rf"(?<![\w-]){re.escape(shown)}(?![\w-])", box):
                    return f"{shown} is missing; it needs {expected(hint)}."
    if (found := re.search(r"--[\w.-]+", box)) and (name := found[0][2:].replace("-", "_")) in known:
        hint, value = known[name]
        if _marked(hint, tyro.conf.UseAppendAction):
            hint, value = get_args(get_args(hint)[0])[0], ""  # one element each time it stands there
        flag = "--" + name.replace("_", "-")
        example = "" if value in (None, "", (), dataclasses.MISSING) else f", e.g. {flag} {value}"
        dashed = next((word for word in _after(argv, flag) if word.startswith("-")), "")
        if box.startswith("Missing argument") and dashed and names.get(dashed, "") not in known:
            return f"{flag} needs a value, and {dashed!r} looks like a flag; write {flag}={shlex.quote(dashed)}."
        if box.startswith("Missing argument"):
            return f"{flag} needs a value: {expected(hint)}{example}."
        text = next((text for given, text in _pairs(argv) if names[given] == name), "")
        return f"{flag} {text} is not {expected(hint)}; choose one{example}."
    return box or "the command line cannot be read; see --help."


def _marked(hint: Any, marker: Any) -> bool:
    """Whether a field's type carries this mark of tyro's."""
    return marker in getattr(hint, "__metadata__", ())


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(flag, the word after it), the last one first, as the last one counts."""
    for word, following in reversed([*zip(argv, [*argv[1:], ""], strict=True)]):
        if word.startswith("--"):
            flag, has_value, text = word.partition("=")
            yield flag, text if has_value else following


def _after(argv: Sequence[str], flag: str) -> Iterator[str]:
    """The words that stand behind a flag."""
    return (word for given, word in itertools.pairwise(argv) if given.replace("_", "-") == flag)


def _nearest_flags(name: str, known: Mapping[str, Any]) -> str:
    """The flags with the same last part (`--learning-rate` has two) or initials (`--lr`), else one spelt alike."""
    return " or ".join("--" + field.replace("_", "-") for field in nearest_fields(name, known))


def _reason(stop: BaseException) -> str | None:
    """The message of the mistake that tyro met while it built a dataclass and turned into an exit."""
    error = stop.__cause__ or stop.__context__
    while error is not None:
        if isinstance(error, USERS_MISTAKES):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
