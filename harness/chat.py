"""A model's own chat template, rendered as transformers does, which this project cannot import beside JAX.

The template comes with the weights, so it runs in a sandbox, and in a process with bounds on time and memory.
"""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.config import UserError, require
from recipe.reading import kind_of, parse_json, short, some, take
from recipe.tokenizer import more_templates, utf8_text
from recipe.tokenizer_settings import read_settings, special_tokens

SECONDS = 10
"""Time for one rendering, starting the process included; published templates take milliseconds."""
LIMITS = {"bytes": 512 * 2**20, "seconds": SECONDS, "characters": 4_000_000}
"""Memory, CPU time and text of one rendering; the longest context published has about a million tokens."""


class ChatTemplate:
    """The Jinja template of a tokenizer's folder, which transformers would take when no tools are given.

    That is chat_template.jinja (with additional_chat_templates/ beside it), else chat_template in
    tokenizer_config.json; of several the one named default. `UserError` if there is none, or none that is Jinja.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        self.source = _source(self.folder, settings)
        self.special_tokens = special_tokens(settings, str(self.folder))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the assistant's answer to these messages, each with `role` and `content`."""
        variables: dict[str, Any] = dict(messages=[*messages], tools=None, documents=None, add_generation_prompt=True)
        with self._lock:
            if self._process is None:
                self._start()
            answer = self._ask({"variables": variables | self.special_tokens})
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
        said = parse_json(answer, "the answer of harness/render.py")
        require("text" in said, f"the chat template of {self.folder} {trouble} ({short(said.get('error', ''), 300)}).")
        return said["text"]


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    process.wait()


def _source(folder: Path, settings: Mapping[str, Any]) -> str:
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
            f"--chat: {folder} has the chat templates {some(sorted(found))} and none named default; name one so.",
        )
        found = take(found, "default", str, f"{where}: chat_template")
    if not found:
        raise UserError(
            f"--chat: {folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "name a chat model's folder, or use --prompt."
        )
    return found
