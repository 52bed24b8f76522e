"""A model's own chat template, rendered as transformers does, which this project cannot import beside JAX.

The template comes with the weights, so it runs in a sandbox, and in a process with bounds on time and memory.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.config import UserError, require
from recipe.reading import kind_of, parse_json, short, some, take
from recipe.tokenizer import Tokenizer, more_templates, utf8_text
from recipe.tokenizer_settings import read_settings, special_tokens

SECONDS = 10
"""Time for one rendering, starting the process included; published templates take milliseconds."""
LIMITS = {"bytes": 512 * 2**20, "seconds": SECONDS, "characters": 4_000_000}
"""Memory, CPU time and text of one rendering; the longest context published has about a million tokens."""
GENERATION = re.compile(r"{%[-+]?\s*generation\b")
"""How a template begins to say what the assistant wrote."""
Span = tuple[int, int]


class ChatTemplate:
    """The Jinja template of a tokenizer's folder, which transformers would take when no tools are given.

    That is chat_template.jinja (with additional_chat_templates/ beside it), else chat_template in
    tokenizer_config.json; of several the one named default. `UserError` if there is none, or none that is Jinja;
    `flag` is what asks for it, `remedy` what else can be done.
    """

    def __init__(self, folder: Path, *, flag: str = "--chat", remedy: str = "use --prompt", shown: str = "") -> None:
        """`shown` is the folder's name in messages, if it has another."""
        settings = read_settings(Path(folder))
        self.folder = shown or str(folder)
        self.source = _source(Path(folder), settings, flag, remedy, self.folder)
        self.special_tokens = special_tokens(settings, self.folder)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the assistant's answer to these messages, each with `role` and `content`."""
        return self._render(messages, add_generation_prompt=True)

    def conversation(self, messages: Sequence[Mapping[str, Any]], ends: Sequence[str] = ()) -> tuple[str, list[Span]]:
        """A whole conversation as text, and the (first, past the last) characters of what the assistant wrote in it.

        `{% generation %}` says what that is. In a template without it, it is each of the assistant's contents, with
        what follows if that is one of the special tokens `ends`; such a template must write contents as they are, or
        without the white space around them. `UserError` if it does not.
        """
        names = _unheard_of(self.source + json.dumps(messages, ensure_ascii=False))
        if GENERATION.search(self.source):
            marks = next(names), next(names)
            return _without(self._render(messages, marks=marks), *marks)
        text = self._render(messages)
        said = {next(names): turn["content"] for turn in messages if turn["role"] == "assistant"}
        standing_in = iter(said)
        named = [{**turn, "content": next(standing_in)} if turn["role"] == "assistant" else turn for turn in messages]
        pieces = re.split(f"({'|'.join(said)})", self._render(named)) if said else [text]
        for contents in (said, {name: content.strip() for name, content in said.items()}):
            written = [str(contents.get(piece, piece)) for piece in pieces]
            if pieces[1::2] == [*said] and "".join(written) == text:
                break
        else:
            raise UserError(
                f"the chat template of {self.folder} does not write the assistant's words as they are, so nobody knows "
                "which tokens are its; put {% generation %} around them there, or leave out what it rewrites."
            )
        edges = [0, *itertools.accumulate(map(len, written))]
        end_of_turn = re.compile(rf"\s*(?:{'|'.join(map(re.escape, ends)) or '(?!)'})")
        spans = []
        for first, end in zip(edges[1::2], edges[2::2], strict=False):
            token = end_of_turn.match(text, end)
            spans.append((first, token.end() if token else end))
        return text, spans

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        marks: tuple[str, str] | None = None,
    ) -> str:
        variables: dict[str, Any] = dict(messages=[*messages], tools=None, documents=None)
        variables |= {"add_generation_prompt": add_generation_prompt, **self.special_tokens}
        with self._lock:
            if self._process is None:
                self._start()
            answer = self._ask({"variables": variables, "marks": marks})
        return self._text(answer, "refuses these messages")

    def _start(self) -> None:
        # Not a fork: this process may hold a framework's threads and gigabytes. -P leaves our folder off the path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("render.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, self._process)
        self._text(self._ask({"template": self.source, "limits": LIMITS}), "is not valid Jinja")

    def _ask(self, question: Mapping[str, Any]) -> bytes:
        """The process's answer to this line; nothing if it ended, or had to be ended, before it answered."""
        assert self._process is not None and self._process.stdin and self._process.stdout, "it was started with pipes"
        clock = threading.Timer(SECONDS, self._process.kill)
        clock.start()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            clock.cancel()
        if not answer:
            _end(self._process)
            self._process = None
        return answer

    def _text(self, answer: bytes, trouble: str) -> str:
        bounds = f"{SECONDS} s and {LIMITS['bytes'] // 2**20} MB"
        require(
            bool(answer), f"the chat template of {self.folder} takes more than {bounds}, the most it is given; mend it."
        )
        said = parse_json(answer, "the answer of recipe/render.py")
        require("text" in said, f"the chat template of {self.folder} {trouble} ({short(said.get('error', ''), 300)}).")
        return said["text"]


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    process.wait()


def template_of(tokenizer: Tokenizer, name: str) -> ChatTemplate:
    """The template that came with a tokenizer, as a folder in which it is saved has it; `UserError` if none did."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        how = dict(flag="data.chat", remedy="pass it as --init or --data.tokenizer", shown=name)
        return ChatTemplate(Path(scratch), **how)


def _unheard_of(text: str) -> Iterator[str]:
    """Names that a text does not hold, of private letters and a number."""
    return (name for number in itertools.count() if (name := f"\ue000{number}\ue001") not in text)


def _without(text: str, before: str, after: str) -> tuple[str, list[Span]]:
    """A text without its marks, and what stood between them; of marks within marks the outer ones count."""
    pieces, spans, depth, length, first = [], list[Span](), 0, 0, 0
    for piece in re.split(f"({before}|{after})", text):
        if piece == before:
            first, depth = first if depth else length, depth + 1
        elif piece == after:
            depth -= 1
            spans += [(first, length)] * (depth == 0)
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _source(folder: Path, settings: Mapping[str, Any], flag: str, remedy: str, shown: str) -> str:
    """The template's text, wherever the folder keeps it."""
    where = str(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    found: Any = {part.stem: utf8_text(part) for part in more_templates(folder)}
    if file.is_file():
        found = utf8_text(file) if not found else found | {"default": utf8_text(file)}
    found = found or take(settings, "chat_template", str | list | dict | None, where, None)
    if isinstance(found, list):
        for entry in found:
            require(isinstance(entry, dict), f"{where}: chat_template lists {kind_of(entry)}, not an object; mend it.")
        part = f"{where}: chat_template"
        found = {take(entry, "name", str, part): take(entry, "template", str, part) for entry in found}
    if isinstance(found, dict) and found:
        require(
            "default" in found,
            f"{flag}: {shown} has the chat templates {some(sorted(found))} and none named default; name one so.",
        )
        found = take(found, "default", str, f"{where}: chat_template")
    if not found:
        raise UserError(
            f"{flag}: {shown} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            f"name a chat model's folder, or {remedy}."
        )
    return found
