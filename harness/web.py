"""A web page on this machine for trying a checkpoint: text to continue, or a chat where the model has a template."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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

    The controls begin at `options`. `UserError` if Gradio is not installed or the port is taken.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # It would ask its makers for the newest version.
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError("--web needs Gradio, which is not installed; run: pip install -e '.[web]'") from None

    controls = [
        getattr(gradio, kind)(value=getattr(options, name), **arguments) for name, (kind, arguments) in CONTROLS.items()
    ]

    def texts(prompt: str, values: Sequence[Any]) -> Iterator[str]:
        """The text so far, again and again, for these values of the controls."""
        try:
            for name, value in zip(CONTROLS, values, strict=True):
                require(value is not None, f"{name} is empty; enter a number.")
            chosen = dataclasses.replace(options, **dict(zip(CONTROLS, values, strict=True)))
            text = ""
            yield text
            for _, piece in text_pieces(generate, tokenizer, [tokenizer.encode(prompt)], chosen):
                text += piece
                yield text
        except UserError as error:
            # Not gradio.Error, after which the page goes on showing its stop button.
            gradio.Warning(str(error), title="Not possible")

    def continue_prompt(prompt: str, *values: Any) -> Iterator[str]:
        yield from (prompt + text for text in texts(prompt, values))

    def answer(turn: str, history: list[dict[str, Any]], *values: Any) -> Iterator[str]:
        assert render is not None, "only a chat answers"
        messages = [{"role": said["role"], "content": _text(said["content"])} for said in history]
        yield from texts(render([*messages, {"role": "user", "content": turn}]), values)

    accordion = gradio.Accordion("Sampling", open=True)
    page: gradio.Blocks
    if render is None:
        page = gradio.Interface(
            continue_prompt,
            inputs=gradio.Textbox(label="Prompt", lines=3),
            outputs=gradio.Textbox(label="Text", lines=20),
            additional_inputs=controls,
            additional_inputs_accordion=accordion,
            title=title,
            flagging_mode="never",
            analytics_enabled=False,
        )
    else:
        page = gradio.ChatInterface(
            answer,
            chatbot=gradio.Chatbot(buttons=["copy"]),  # and none that shares the talk with the world
            additional_inputs=controls,
            additional_inputs_accordion=accordion,
            title=title,
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
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none is fetched
        )
    except OSError:
        raise UserError(f"--port {port} is taken; choose another, e.g. --port {port + 1}.") from None
    print(f"open {url} in a browser; Ctrl-C ends", flush=True)
    page.block_thread()


def _text(content: str | Sequence[Mapping[str, str]]) -> str:
    """A message's text, which Gradio keeps in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
