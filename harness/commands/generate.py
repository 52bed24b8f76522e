"""`python -m jax_impl.generate` and `python -m torch_ref.generate`: their flags, and what they print.

A folder's generation_config.json gives the defaults of the flags.
"""

import functools
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from harness import cli, generation_config, web
from harness.api import SETTINGS, LanguageModel
from harness.folders import find_weights, steadily
from recipe.chat import ChatTemplate
from recipe.config import UserError, require
from recipe.sampling import Generator, SamplingOptions, make_batch


@dataclass(frozen=True, kw_only=True)  # by keyword, as the one required field comes after the inherited ones
class GenerateCommand(SamplingOptions):
    """Generate text from a checkpoint."""

    checkpoint: str
    """Run folder (its best weights are taken) or Hugging Face weights folder with a tokenizer.json."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue, may be repeated; without it you are asked for one after another."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """String that ends the text, which is cut before it; may be repeated. bash writes a line break as $'\\n'."""
    stop_ids: tyro.conf.Suppress[tuple[int, ...]] = ()
    """No flag: the tokenizer says which token ends a text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    interactive: bool = False
    """Ask for one prompt after another until an empty line."""
    chat: bool = False
    """Talk: each line is a turn of the user's, and the model's chat template joins all turns into the prompt."""
    web: bool = False
    """Serve a web page on this machine instead, for text or, with --chat, for a talk."""
    port: int = 7860
    """The page's port."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.port < 65536, f"port={self.port} must lie in 1 ... 65535; choose e.g. 7860.")


def run_command(module: str, make_generator: Callable[..., Generator]) -> int:
    """`python -m MODULE --checkpoint ... --prompt ...`: returns the exit code.

    `make_generator(config, precision, weights)` returns a framework's `Generator`.
    """

    def main() -> int:
        argv = sys.argv[1:]
        default, source = None, ""
        if named := cli.last_value(argv, "--checkpoint"):
            chosen = generation_config.defaults(find_weights(named))
            default = GenerateCommand(checkpoint=named, **chosen)
            source = f" The defaults below are those of {named}." if chosen else ""
        command = cli.parse(
            GenerateCommand,
            argv,
            default=default,
            prog=cli.called_as(f"python -m {module}"),
            description=f"Generate text from a checkpoint.{source}",
        )
        return generate_text(command, make_generator)

    return cli.run(main)


def generate_text(command: GenerateCommand, make_generator: Callable[..., Generator]) -> int:
    """Print the continuations of the prompts, or of each prompt typed in, or answer turn by turn.

    Returns the exit code: 2 if a line that was piped in had to be refused, after all others.
    """
    require(
        not command.chat or (command.samples == 1 and not command.prompt),
        "--chat has one answer to each line typed in; leave out --samples and --prompt.",
    )

    def read(folder: Path) -> LanguageModel:
        template = ChatTemplate(folder) if command.chat else None  # Without one the weights are not read.
        return LanguageModel(folder, make_generator, dtype=command.dtype, template=template)

    model = steadily(find_weights(command.checkpoint), read)
    options = model.options(**{name: getattr(command, name) for name in SETTINGS})
    if command.web:
        require(
            not command.prompt and options.samples == 1,
            "--web takes its prompts from the page, one text each; leave out --prompt and --samples.",
        )
        render = model.template.render if command.chat else None
        serve = functools.partial(web.serve, model.generator, model.tokenizer, options)
        serve(render=render, title=command.checkpoint, port=command.port)
        return 0
    messages: list[dict[str, str]] = []

    def continue_texts(prompts: Sequence[str]) -> None:
        tokens = [model.tokens(prompt) for prompt in prompts]
        make_batch(model.config, tokens, options)  # A prompt that does not fit must fail before anything is printed.
        texts = [prompt for prompt in prompts for _ in range(options.samples)]
        if len(texts) == 1:
            print(texts[0], end="", flush=True)
        for row, piece in model.pieces(tokens, options):
            texts[row] += piece
            if len(texts) == 1:
                print(piece, end="", flush=True)
        print("" if len(texts) == 1 else "\n---\n".join(texts))

    def answer(turn: str) -> None:
        asked = [*messages, {"role": "user", "content": turn}]
        text = ""
        for _, piece in model.pieces([model.tokens(asked)], options):
            print(piece, end="", flush=True)
            text += piece
        print()
        messages[:] = [*asked, {"role": "assistant", "content": text}]

    if command.prompt and not command.interactive:
        continue_texts(command.prompt)
        return 0
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # Bytes of another encoding are refused with the prompt.
    refused = False
    while line := _ask("you" if command.chat else "prompt"):
        try:
            answer(line) if command.chat else continue_texts([line])
        except UserError as error:
            refused = True
            print(f"error: {cli.one_line(str(error))}", file=sys.stderr)
    return 2 if refused and not sys.stdin.isatty() else 0


def _ask(what: str) -> str:
    """The next line typed, or piped in, perhaps with Windows' line ends; empty at the end."""
    try:
        return input(f"{what} (empty line ends) > " if sys.stdin.isatty() else "").removesuffix("\r")
    except EOFError:
        return ""
