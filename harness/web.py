"""A web page on this machine for trying a checkpoint: text to continue, or a chat where the model has a template."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.cli import one_line
from harness.text import text_pieces
from recipe.config import UserError, require
from recipe.sampling import Generator, SamplingOptions
from recipe.tokenizer import Tokenizer

# Field of SamplingOptions -> its Gradio component and that component's arguments.
CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "max_new_tokens": ("Number", {"label": "New tokens at most", "precision": 0, "minimum": 1}),
    "temperature": ("Slider", {"label": "Temperature, 0 is greedy", "minimum": 0.0, "maximum": 2.0, "step": 0.05}),
    "top_k": ("Number", {"label": "Top-k, 0 keeps all", "precision": 0, "minimum": 0}),
    "top_p": ("Slider", {"label": "Top-p, 1 keeps all", "minimum": 0.01, "maximum": 1.0, "step": 0.01}),
    "min_p": ("Slider", {"label": "Min-p, 0 keeps all", "minimum": 0.0, "maximum": 1.0, "step": 0.01}),
    "repetition_penalty": ("Slider", {"label": "Repetition penalty", "minimum": 0.5, "maximum": 2.0, "step": 0.05}),
    "seed": ("Number", {"label": "Seed", "precision": 0, "minimum": 0}),
}


LONGEST_PROMPT = 1_000_000
"""Characters of a prompt, or of all turns of a talk: a million take seconds to tokenise, and no context holds more."""
LARGEST_REQUEST = 8 * LONGEST_PROMPT
"""Bytes of a request: a prompt of four-byte characters and as many of everything else."""
POSTS = tuple(f"/gradio_api/{name}" for name in ("queue/join", "run/", "api/", "call/", "cancel", "reset"))
"""What the page sends; Gradio has more, such as uploads, which this page has no use for."""


class Guard:
    """ASGI middleware in front of Gradio: only this page's own requests, under this machine's own names.

    A page elsewhere may have its host name resolve to 127.0.0.1 and would then speak to this one as if it were its own;
    the Host header tells. What goes wrong in a request is one line here and a status there.
    """

    def __init__(self, app: Callable[..., Any], port: int) -> None:
        self.app, self.hosts = app, {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Mapping[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        begun = False

        async def watched(message: Mapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            try:
                await self.app(scope, receive, watched)
                return
            except Exception as error:
                said = f"{type(error).__name__} in {scope['path']}: {error}"
                print(f"error: {one_line(said)}", file=sys.stderr)
                refusal = 400, "this request cannot be read"
            if begun:
                return
        status, reason = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": reason.encode()})

    def _refusal(self, scope: Mapping[str, Any]) -> tuple[int, str] | None:
        """Status and reason, if the request is not to be answered."""
        headers = [(name.decode("latin-1"), value.decode("latin-1").lower()) for name, value in scope["headers"]]
        named = [value for name, value in headers if name == "host"]
        if scope["type"] != "http" or len(named) != 1 or named[0] not in self.hosts:
            return 421, f"this page answers to {' and '.join(sorted(self.hosts))} alone"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST" or not scope["path"].startswith(POSTS):
            return 403, "this page takes nothing here"
        length = next((value for name, value in headers if name == "content-length"), "")
        if not length.isdecimal() or int(length) > LARGEST_REQUEST:
            return 413, f"a request has at most {LARGEST_REQUEST} bytes, and says how many"
        return None


def serve(
    generate: Generator,
    tokenizer: Tokenizer,
    options: SamplingOptions,
    *,
    render: Callable[[Sequence[Mapping[str, str]]], str] | None,
    title: str,
    port: int,
) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C; with `render`, which makes a prompt of messages, it is a chat.

    The controls begin at `options`; `title` is where the model lies, and the page is called as the model is.
    `UserError` if Gradio is not installed or the port is taken.
    """
    name = model_name(title)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # It would ask its makers for the newest version.
    try:
        import gradio
        from starlette.middleware import Middleware
    except ModuleNotFoundError:
        raise UserError("--web needs Gradio, which is not installed; run: pip install -e '.[web]'") from None

    controls = [
        getattr(gradio, kind)(value=getattr(options, name), **arguments) for name, (kind, arguments) in CONTROLS.items()
    ]

    longest = min(LONGEST_PROMPT, generate.config.max_position_embeddings * tokenizer.longest_token)

    def texts(read: Callable[[], list[int]], characters: int, values: Sequence[Any]) -> Iterator[str]:
        """The text so far, again and again, after the tokens that `read` makes of so many characters."""
        try:
            for name, value in zip(CONTROLS, values, strict=True):
                require(value is not None, f"{name} is empty; enter a number.")
            chosen = dataclasses.replace(options, **dict(zip(CONTROLS, values, strict=True)))
            require(characters <= longest, f"{characters:,} characters are more than {longest:,}; shorten the text.")
            yield ""
            yield from growing(piece for _, piece in text_pieces(generate, tokenizer, [read()], chosen))
        except UserError as error:
            # Not gradio.Error, after which the page goes on showing its stop button.
            gradio.Warning(str(error), title="Not possible")

    def continue_prompt(prompt: str, *values: Any) -> Iterator[str]:
        yield from (prompt + text for text in texts(lambda: tokenizer.encode_prompt(prompt), len(prompt), values))

    def answer(turn: str, history: list[dict[str, Any]], *values: Any) -> Iterator[str]:
        assert render is not None, "only a chat answers"
        messages = [{"role": said["role"], "content": _text(said["content"])} for said in history]
        messages.append({"role": "user", "content": turn})
        characters = sum(len(message["content"]) for message in messages)
        yield from texts(lambda: tokenizer.encode(render(messages)), characters, values)

    accordion = gradio.Accordion("Sampling", open=False)  # the button stays in sight
    page: gradio.Blocks
    if render is None:
        page = gradio.Interface(
            continue_prompt,
            inputs=gradio.Textbox(label="Prompt", lines=3),
            outputs=gradio.Textbox(label="Text", lines=20),
            additional_inputs=controls,
            additional_inputs_accordion=accordion,
            title=name,
            description=f"At most {longest:,} characters.",
            flagging_mode="never",
            analytics_enabled=False,
        )
    else:
        page = gradio.ChatInterface(
            answer,
            chatbot=gradio.Chatbot(label="Talk", buttons=["copy"]),  # and none that shares the talk with the world
            additional_inputs=controls,
            additional_inputs_accordion=accordion,
            title=name,
            description=f"At most {longest:,} characters.",
            analytics_enabled=False,
        )
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            quiet=True,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(Guard, port=port)]},
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none is fetched
        )
    except OSError:
        raise UserError(f"--port {port} is taken; choose another, e.g. --port {port + 1}.") from None
    print(f"open {url} in a browser; Ctrl-C ends", flush=True)
    page.block_thread()


def growing(pieces: Iterable[str]) -> Iterator[str]:
    """The text so far, after each piece; half a character at its end, of which nothing more will come, is left out."""
    text = ""
    for piece in pieces:
        text += piece
        yield text.rstrip("\ufffd")


def model_name(place: str) -> str:
    """What people call the model of a folder or a Hub name: the last part, of a run's folder `best` the run's own."""
    path = Path(place).resolve()
    return path.parent.name if path.name in ("best", "last") else path.name or place


def _text(content: str | Sequence[Mapping[str, str]]) -> str:
    """A message's text, which Gradio keeps in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
