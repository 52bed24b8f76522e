"""The commands that the documents show: found in their Markdown, and held against the parsers that would read them.

Commands are the lines of a fenced block without a language, or with `sh`, and code spans of more than one word that
begin with a program. Comments of HTML, which no page shows, say what a reader knows of them:

    <!-- not run: REASON -->      the nightly test leaves them out, for this reason
    <!-- small: FLAGS -->         flags added to each where it is run
    <!-- names: A=B C=D -->       what stands for a placeholder
    <!-- flags of: COMMAND -->    the lines are flags of this command

Alone on a line, such a mark holds for the block or the rest of the paragraph that follows, inside a line for its
paragraph; `not run [WORD]:` for the commands that hold the word, and the others likewise.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import tyro
from packaging.requirements import InvalidRequirement, Requirement

from recipe.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTION = PROJECT["project"]["name"]
SCRIPTS = PROJECT["project"].get("scripts", {})

PYTHONS = ("python", "python3")
LAUNCHERS = ("srun", "mpirun", "gcloud")
"""They start our programs on many machines; their own flags are not looked at."""
OTHERS = ("hf", "xprof", "git", "cd", "bash", "tensorboard", "apt-get", "curl", "lm_eval")
"""Programs that are not ours and whose flags are not looked at."""
PROGRAMS = (*PYTHONS, *LAUNCHERS, *OTHERS, "make", "pip", "pytest", *SCRIPTS)
CLONES = ("llama.cpp/",)
"""Folders of other people's programs."""
UNSEEN = ("log.md", "mutants.md")
"""Documents of their day: what they say was true then."""

KINDS = ("not run", "small", "names", "flags of")
MARK = re.compile(rf"<!--\s*({'|'.join(KINDS)})\s*(?:\[([^\]]+)\])?\s*:\s*(.*?)\s*-->")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
FENCE = re.compile(r"^\s*```(\w*)\s*$")
SHELLS = ("", "sh", "bash", "console")
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
SPAN = re.compile(r"`([^`]+)`")
DOLLAR_QUOTED = re.compile(r"\$'((?:[^'\\]|\\.)*)'")


class Mark(NamedTuple):
    """What a comment says."""

    kind: str
    word: str
    text: str


@dataclass(frozen=True)
class Command:
    """One line of a block, continued lines joined, or one code span."""

    file: str
    line: int
    text: str
    marks: tuple[Mark, ...] = ()
    block: int = 0
    """Number of the fenced block in its file, from 1; 0 is a code span."""

    def marked(self, kind: str) -> list[str]:
        """The texts of its marks of a kind."""
        return [mark.text for mark in self.marks if mark.kind == kind and mark.word in self.text]

    @property
    def where(self) -> str:
        """For a message."""
        return f"{self.file}:{self.line}: {self.text}"

    def simple(self) -> list["Simple"]:
        """The commands that a shell would start for it, placeholders replaced; ValueError if it cannot be read."""
        text = self.text
        for names in self.marked("names"):
            for pair in shlex.split(names):
                name, _, value = pair.partition("=")
                text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", lambda _, value=value: value, text)
        return split(text)


class Simple(NamedTuple):
    """One command of a shell: variables, words, and the file it reads."""

    variables: dict[str, str]
    words: list[str]
    reads: str = ""


def documents(root: Path = ROOT) -> list[Path]:
    """The documents whose commands are looked at."""
    found = [root / "README.md", root / "CONTRIBUTING.md", root / "benchmarks" / "README.md"]
    return found + [path for path in sorted((root / "docs").glob("*.md")) if path.name not in UNSEEN]


def split(text: str) -> list[Simple]:
    """A line as a shell reads it: `&&`, `;`, `|` and `<` are known, and $'...'."""
    text = DOLLAR_QUOTED.sub(lambda found: shlex.quote(found[1].encode().decode("unicode_escape")), text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands, words, reads, variables = [], [], "", {}
    tokens = [*lexer, ";"]
    index = 0
    while index < len(tokens):
        token = tokens[index]
        index += 1
        if token in ("<", ">"):
            reads = tokens[index] if token == "<" else reads
            index += 1
        elif token and set(token) <= set("&|;"):
            if words:
                commands.append(Simple(variables, words, reads))
            words, reads, variables = [], "", {}
        elif not words and ASSIGNMENT.match(token):
            name, _, variables[name] = token.partition("=")
        elif token != "...":
            words.append(token)
    return commands


def begins_as_command(text: str) -> bool:
    """Whether the first word that is no assignment is a program."""
    words = [word for word in text.split() if not ASSIGNMENT.match(word)]
    return bool(words) and words[0].removeprefix(".venv/bin/") in PROGRAMS


def collect(path: Path) -> tuple[list[Command], list[str]]:
    """The commands of a document, and what is wrong with its blocks and marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    commands, wrong, pending, block, index = [], [], [], 0, 0
    while index < len(lines):
        if fence := FENCE.match(lines[index]):
            end = next((at for at in range(index + 1, len(lines)) if FENCE.match(lines[at])), len(lines))
            if fence[1] in SHELLS:
                block += 1
                found, faults = _of_block(name, index + 1, lines[index + 1 : end], fence[1], tuple(pending), block)
                commands, wrong = commands + found, wrong + faults
            index, pending = end + 1, []
            continue
        end = index
        while end < len(lines) and lines[end].strip() and not FENCE.match(lines[end]):
            end += 1
        paragraph = lines[index:end]
        wrong += [
            f"{name}:{index + 1 + at}: {comment} is no mark that tests/documented.py knows"
            for at, line in enumerate(paragraph)
            for comment in COMMENT.findall(line)
            if not MARK.fullmatch(comment)
            and difflib.get_close_matches(re.split(r"[:[]", comment[4:])[0].strip(), KINDS)
        ]
        found, pending = _of_paragraph(name, index + 1, paragraph, pending)
        commands += found
        index = max(end, index + 1)
    for command in commands:
        wrong += [f"{command.where}: a mark without a text" for mark in command.marks if not mark.text]
    return commands, wrong


def _of_block(
    name: str, first: int, lines: Sequence[str], language: str, marks: tuple[Mark, ...], block: int
) -> tuple[list[Command], list[str]]:
    """The commands of a fenced block, whose fence is on line `first`; none of a block of output."""
    joined: list[tuple[int, str]] = []
    carried = ""
    for number, line in enumerate(lines, first + 1):
        text = carried + line.strip()
        carried = text[:-1] if text.endswith("\\") else ""
        if not carried and text and not text.startswith("#"):
            joined.append((number, text))
    prefix = next((mark.text for mark in marks if mark.kind == "flags of"), "")
    if prefix:
        return [Command(name, number, f"{prefix} {text}", marks, block) for number, text in joined], []
    if prompted := [(number, text[2:]) for number, text in joined if text.startswith("$ ")]:
        joined = prompted
    known = [begins_as_command(text) for _, text in joined]
    if not any(known) and language in ("", "console"):
        return [], [f"{name}:{n}: flags of no command: {text}" for n, text in joined if text.startswith("--")][:1]
    wrong = [f"{name}:{at[0]}: no command: {at[1]}" for at, good in zip(joined, known, strict=True) if not good]
    return [Command(name, *at, marks, block) for at, good in zip(joined, known, strict=True) if good], wrong


def _of_paragraph(name: str, first: int, lines: Sequence[str], pending: list[Mark]) -> tuple[list[Command], list[Mark]]:
    """The code spans of a paragraph that are commands, and the marks for what follows it."""
    inside, rest = list(pending), list(lines)
    while rest and MARK.sub("", rest[0]).strip() == "":
        inside += map(Mark._make, MARK.findall(rest.pop(0)))
    if not rest:
        return [], inside
    after: list[Mark] = []
    while MARK.sub("", rest[-1]).strip() == "":
        after += map(Mark._make, MARK.findall(rest.pop()))
    inside += [Mark._make(mark) for line in rest for mark in MARK.findall(line)]
    first += len(lines) - len(rest) - len(after)
    # A table's cells may hold commands; a comment may hold anything.
    text = COMMENT.sub(lambda found: "\n" * found[0].count("\n"), "\n".join(rest))
    found = []
    for span in SPAN.finditer(text):
        words = " ".join(span[1].split())
        if begins_as_command(words) and len(words.split()) > 1:
            found.append(Command(name, first + text[: span.start()].count("\n"), words, tuple(inside)))
    return found, after


def problems(command: Command) -> list[str]:
    """What is wrong with a command, by the parsers that would read it; the working folder has what it names."""
    try:
        simple = command.simple()
    except ValueError as error:
        return [f"{command.where}: {error}"]
    found = []
    for one in simple:
        found += [f"{command.where}: {text}" for text in _check(one.words, command.block == 0)]
        if any(word.startswith(LAUNCHERS) for word in one.words[:1]) and not command.marked("not run"):
            found.append(f"{command.where}: {one.words[0]} cannot run here; mark it, <!-- not run: REASON -->")
    return found


def _check(words: Sequence[str], names: bool = False) -> Iterator[str]:
    """What is wrong with one command; with `names`, one without arguments is the name of a program and no more."""
    program, arguments = words[0].removeprefix(".venv/bin/"), list(words[1:])
    if broken := [word for word in arguments if re.search(r"\\[nt]", word)]:
        yield f"a shell makes no line break of {broken[0]!r}; write $'\\n'"
    if program in LAUNCHERS:
        yield from _started_by(program, arguments)
    elif program in PYTHONS and arguments[:1] == ["-m"]:
        yield from _check_module(arguments[1], arguments[2:], names)
    elif program in PYTHONS and arguments[0].startswith(CLONES):
        return
    elif program in PYTHONS and not (ROOT / arguments[0]).is_file():
        yield f"there is no file {arguments[0]}"
    elif program in PYTHONS and arguments[0].startswith("docs/examples/"):
        return  # without flags; a test of its own runs it
    elif program in PYTHONS:
        yield from _parsed(Path(arguments[0]).stem, arguments[0], arguments[1:])
    elif program == "pip":
        yield from _check_pip(arguments)
    elif program == "pytest":
        yield from _check_pytest(arguments)
    elif program == "make":
        yield from _check_make(arguments)
    elif program in SCRIPTS:
        yield from _check_script(program, arguments)
    elif program == "bash" and not (ROOT / arguments[0]).is_file():
        yield f"there is no file {arguments[0]}"
    elif program not in PROGRAMS:
        yield f"{program} is no program that tests/documented.py knows"


def _started_by(program: str, arguments: list[str]) -> Iterator[str]:
    """The command inside a launcher's."""
    if "python" in arguments:
        yield from _check(arguments[arguments.index("python") :])
        return
    inner = [word.removeprefix("--command=") for word in arguments if "python " in word]
    if not inner:
        yield f"{program} starts nothing of ours"
    for text in inner:
        for one in split(text):
            yield from _check(one.words)


def _check_module(name: str, arguments: list[str], names: bool) -> Iterator[str]:
    if name in ("venv", "build", "twine"):  # Python's own, and what the extra dev brings
        return
    if name == "pip":
        yield from _check_pip(arguments)
    elif name == "pytest":
        yield from _check_pytest(arguments)
    elif not _exists(name):
        yield f"there is no module {name}"
    elif arguments or not names:
        yield from _parsed(name, f"python -m {name}", arguments)


def _exists(name: str) -> bool:
    """Whether `python -m NAME` would find something to run; ours alone, so that nothing else is imported."""
    path = ROOT / name.replace(".", "/")
    return (path / "__main__.py").is_file() or path.with_suffix(".py").is_file()


class Parsed(BaseException):
    """Raised when the command line has been read, before anything is done."""


def _stop(*_, **__) -> NoReturn:
    raise Parsed


def _parsed(name: str, program: str, arguments: list[str]) -> Iterator[str]:
    """Run a module's `__main__` until it has read its command line; the line it prints if it refuses."""
    if (ROOT / name.replace(".", "/") / "__main__.py").is_file():
        name += ".__main__"
    source = (ROOT / name.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
    if not re.search(r"parse|run_command|command_line", source):
        if arguments:
            yield f"{program} reads no flags"
        return
    is_main = [
        node for node in ast.parse(source).body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    ]
    if not is_main:
        yield f"{program} runs nothing"
        return
    module = importlib.import_module(name)
    with _reading(program, arguments) as said:
        body = compile(ast.Module(is_main[0].body, []), str(module.__file__), "exec")
        exec(body, {**vars(module)})
    yield from said


def _check_script(program: str, arguments: list[str]) -> Iterator[str]:
    module, _, function = SCRIPTS[program].partition(":")
    with _reading(program, arguments) as said:
        getattr(importlib.import_module(module), function)()
    yield from said


@contextlib.contextmanager
def _reading(program: str, arguments: list[str]) -> Iterator[list[str]]:
    """What is run inside ends when it has read its command line; the list gets what it says against it."""
    said: list[str] = []
    tyro_cli, parse_args = tyro.cli, argparse.ArgumentParser.parse_args

    def read_flags(kind, *args, **options):
        value = tyro_cli(kind, *args, **options)
        if kind is not RunConfig:  # whose reader goes on to look at the folders that are named
            raise Parsed
        return value

    def read_arguments(self, *args, **options):
        parse_args(self, *args, **options)
        raise Parsed

    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [program, *arguments])
        patch.setattr(tyro, "cli", read_flags)
        patch.setattr(argparse.ArgumentParser, "parse_args", read_arguments)
        for side in ("jax_impl", "torch_ref"):
            patch.setattr(f"{side}.train.train", _stop)
        try:
            yield said
            said.append(f"{program} ended without having read its flags")
        except Parsed:
            pass
        except SystemExit as stop:
            if stop.code not in (0, None):
                said += err.getvalue().strip().splitlines()[-1:] or [f"exit code {stop.code}"]


def _check_pip(arguments: list[str]) -> Iterator[str]:
    """By pip's own parser; the extras are pyproject.toml's."""
    from pip._internal.commands import create_command

    while arguments[0].startswith("-"):
        arguments = arguments[1:]
    err = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(err):
            warnings.simplefilter("ignore")
            options, wanted = create_command(arguments[0]).parse_args(arguments[1:])
    except SystemExit:
        yield err.getvalue().strip().splitlines()[-1]
        return
    except Exception as error:
        yield f"pip {arguments[0]}: {error}"
        return
    for file in [*getattr(options, "requirements", []), *getattr(options, "constraints", [])]:
        if not (ROOT / file).is_file():
            yield f"there is no file {file}"
    for requirement in [*wanted, *getattr(options, "editables", [])]:
        if requirement.endswith(".whl"):
            continue
        try:
            read = Requirement(re.sub(r"^\.(?=\[|$)", DISTRIBUTION, requirement))
        except InvalidRequirement as error:
            yield f"{requirement}: {str(error).splitlines()[0]}"
            continue
        if read.name == DISTRIBUTION:
            for extra in read.extras - PROJECT["project"]["optional-dependencies"].keys():
                yield f"there is no extra {extra}"


def _check_pytest(arguments: list[str]) -> Iterator[str]:
    """Files and marks are there; flags are few."""
    parser = argparse.ArgumentParser("pytest", exit_on_error=False)
    parser.add_argument("files", nargs="*")
    for flag in ("-m", "-k", "-n", "-p", "--dist", "--junitxml", "--timeout"):
        parser.add_argument(flag, default="")
    for flag in ("-s", "-q", "-x", "-v", "-rs"):
        parser.add_argument(flag, action="store_true")
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        yield f"pytest: {error}"
        return
    yield from (f"pytest: {word} is unknown" for word in unknown)
    yield from (f"there is no file {file}" for file in options.files if not (ROOT / file.partition("::")[0]).exists())
    known = {mark.partition(":")[0] for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    yield from (
        f"there is no mark {word}" for word in set(re.findall(r"\w+", options.m)) - known - {"not", "and", "or"}
    )


def _check_make(arguments: list[str]) -> Iterator[str]:
    """The targets are there, the variables are read, and what they start is right."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in [word.partition("=")[0] for word in arguments if ASSIGNMENT.match(word)]:
        if f"$({name})" not in makefile:
            yield f"the Makefile reads no {name}"
    # A make around the tests hands its own variables on.
    theirs = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "PYTHON", "ARGS", "TORCH", "LOCK")
    alone = {name: value for name, value in os.environ.items() if name not in theirs}
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        yield done.stderr.strip().splitlines()[-1]
        return
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if line.startswith((".venv/bin/python -m", ".venv/bin/python train")) or ASSIGNMENT.match(line):
            for one in split(line):
                yield from _check(one.words)
