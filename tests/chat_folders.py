"""Chat models' tokenizer folders for tests: a small BPE, and templates in the shapes that published ones have."""

import json
from pathlib import Path

from tokenizers import AddedToken

from recipe.tokenizer import Tokenizer, train_bpe

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'
 + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# A system message of its own, contents without the white space around them, no line between turns.
TRIMMING = """{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>' }}
{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As Qwen3's: of earlier answers the thinking is dropped, the last one has it, if only an empty one.
THINKING = """{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.user %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# The same with the words that a template marks for training, thinking among them.
MARKING = THINKING.replace(
    "        {{- '<|im_start|>assistant\\n' }}\n", "        {{- '<|im_start|>assistant\\n' }}{% generation %}\n"
).replace(
    "        {{- content + '<|im_end|>\\n' }}\n",
    "        {{- content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\n",
)
# Plain words instead of special tokens around the turns, and the end of text after an answer.
PLAIN = """{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}{% else %}
A: {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "trimming": TRIMMING, "thinking": THINKING, "marking": MARKING, "plain": PLAIN}
WORDS = (
    "system user assistant Who goes there? A friend. Two words, and more of them: Be kind. Schöne Grüße 日本 Q A think "
)


def chat_tokenizer(template: str | None) -> Tokenizer:
    """A BPE with the special tokens of ChatML and this template."""
    rust = train_bpe([WORDS * 3], 330).rust
    rust.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    companions = {"tokenizer_config.json": json.dumps(settings)}
    if template is not None:
        companions["chat_template.jinja"] = template
    return Tokenizer(rust, "<|im_end|>", bos_token="<|endoftext|>", companions=companions)


def chat_folder(folder: Path, template: str | None) -> Path:
    """It in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    chat_tokenizer(template).save(folder)
    return folder


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    said = [{"role": "system", "content": system}] if system is not None else []
    return said + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def write_talks(file: Path, talks: list) -> Path:
    """JSONL of these conversations; what is no list of messages is a record as it is."""
    records = [{"messages": talk} if isinstance(talk, list) else talk for talk in talks]
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    file.write_text(text, encoding="utf-8")
    return file
