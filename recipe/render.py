"""A program that renders a chat template, in a process of its own with bounds on memory and time, for `recipe.chat`.

It reads one JSON object a line and answers each by {"text"} or {"error"}: first {"template", "limits"}, then
{"variables"} as often as asked, with {"marks"} to put around what the template says is the assistant's. Only Jinja and
the standard library are imported: the template comes with the weights, and what it is given is nobody else's memory.
"""

import contextlib
import datetime
import json
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import ext, nodes, utils
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationBlock(ext.Extension):
    """`{% generation %}`, with which templates mark the assistant's words for training: the body is rendered, between
    its marks, as they are at the time."""

    tags = {"generation"}  # noqa: RUF012 -- as Jinja's own extensions have it
    marks = ("", "")

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller):
        return self.marks[0] + caller() + self.marks[1]


class Namespace(utils.Namespace):
    """Jinja's namespace, which as transformers' takes no name that begins with an underscore."""

    def __init__(*args, **attributes):  # a template may name an attribute self
        self, args = args[0], args[1:]
        attributes = dict(*args, **attributes)
        for name in attributes:
            Namespace.check(name)
        utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        Namespace.check(name)
        utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class Dict:
    """`dict` as transformers gives it to templates: it can be called, and nothing else but `fromkeys` reached."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return datetime.datetime.now().strftime(form)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson  # Jinja's own escapes HTML.
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


def bound(bytes_: int, seconds: int) -> None:
    """Give this process so much memory, and so many more seconds of CPU time; where the system has no such bounds, the
    process that waits for the answer still has a clock."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (bytes_, resource.RLIM_INFINITY))
        used = resource.getrusage(resource.RUSAGE_SELF)
        end = int(used.ru_utime + used.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))


def render(template: jinja2.Template, variables: Mapping[str, Any], characters: int) -> str:
    """The template's text; ValueError as soon as it is longer than so many characters."""
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > characters:
            raise ValueError(f"its text is longer than {characters:,} characters")
    return "".join(pieces)


def failure(error: BaseException) -> dict[str, str]:
    """The answer that says why there is no text."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {"error": f"line {error.lineno}: {error.message}"}
    if isinstance(error, jinja2.TemplateError | ValueError):
        return {"error": str(error)[:1000]}
    return {"error": traceback.format_exception_only(error)[-1][:1000].strip()}


def main() -> None:
    """Answer line after line until there are no more."""
    template, limits = None, {}
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if template is None:
                limits = asked["limits"]
                bound(limits["bytes"], limits["seconds"])
                template = environment().from_string(asked["template"])
                answer = {"text": ""}
            else:
                bound(limits["bytes"], limits["seconds"])
                GenerationBlock.marks = asked["marks"] or ("", "")
                answer = {"text": render(template, asked["variables"], limits["characters"])}
        except Exception as error:  # whatever a stranger's template does
            answer = failure(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
