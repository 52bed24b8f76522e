"""A model's own chat template, rendered as transformers does, which this project cannot import beside JAX."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipe.config import UserError, require
from recipe.reading import read_json


class ChatTemplate:
    """The Jinja template of a tokenizer's folder: chat_template.jinja, else chat_template in tokenizer_config.json."""

    def __init__(self, folder: Path) -> None:
        from jinja2 import TemplateError

        self.folder = Path(folder)
        file, settings_file = self.folder / "chat_template.jinja", self.folder / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        require(
            bool(source),
            f"--chat: {folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "name a chat model's folder, or use --prompt.",
        )
        self.special_tokens = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name, token in settings.items()
            if name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
            and token is not None
        }
        try:
            self.template = _environment().from_string(source)
        except TemplateError as error:
            raise UserError(f"the chat template of {folder} is not valid Jinja ({error}); mend it.") from None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that asks for the assistant's answer to these messages, each with `role` and `content`."""
        from jinja2 import TemplateError

        try:
            return self.template.render(messages=messages, add_generation_prompt=True, **self.special_tokens)
        except TemplateError as error:
            raise UserError(f"the chat template of {self.folder} refuses these messages ({error}).") from None


def _environment():
    """Jinja as transformers sets it up; the template comes with the weights, so it runs in a sandbox."""
    from jinja2 import TemplateError, ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML.
    environment.globals["raise_exception"] = raise_exception
    return environment
