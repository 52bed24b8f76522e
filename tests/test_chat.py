"""Chat templates: the prompt that transformers renders, refusals in one line."""

import json

import pytest
from transformers import AutoTokenizer

from harness.chat import ChatTemplate
from recipe.tokenizer import train_bpe

# What real templates use: special tokens, loops with controls, whitespace control, JSON, namespaces, refusals.
TEMPLATE = """{{- bos_token }}
{%- set seen = namespace(users=0) %}
{% for message in messages %}
    {% if message.role == 'user' %}
        {%- set seen.users = seen.users + 1 %}
    {% endif %}
    {%- if message.role not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
{{ '<|im_start|>' + message['role'] }}
{{ message.content | trim }}{{ eos_token }}
    {% if loop.last %}{% break %}{% endif %}
{% endfor %}
{{ {"n": seen.users, "s": "<é>"} | tojson }}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Who goes <there>? "},
    {"role": "assistant", "content": "A friend."},
    {"role": "user", "content": "Name him."},
]


@pytest.fixture
def folder(tmp_path):
    train_bpe(["who goes there"], 300).save(tmp_path)
    return tmp_path


def settings(folder, **changes) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def place(folder, where: str) -> None:
    """Put the template where checkpoints have it."""
    settings(folder, bos_token={"content": "<|endoftext|>", "__type": "AddedToken"})
    if where == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        settings(folder, chat_template=several if where == "list" else TEMPLATE)


@pytest.mark.parametrize("where", ["file", "setting", "list"])
def test_the_prompt_is_the_one_that_transformers_renders(folder, where):
    place(folder, where)
    theirs = AutoTokenizer.from_pretrained(folder)
    for count in range(1, len(MESSAGES) + 1):
        expected = theirs.apply_chat_template(MESSAGES[:count], tokenize=False, add_generation_prompt=True)
        assert ChatTemplate(folder).render(MESSAGES[:count]) == expected
    assert expected.startswith("<|endoftext|>") and '{"n": 2, "s": "<é>"}' in expected


def test_a_folder_without_a_template_is_refused(folder):
    with pytest.raises(ValueError, match=r"has no chat template .* use --prompt"):
        ChatTemplate(folder)


def test_a_template_that_is_broken_or_refuses_is_told(folder):
    place(folder, "file")
    with pytest.raises(ValueError, match=r"refuses these messages .no role ghost"):
        ChatTemplate(folder).render([{"role": "ghost", "content": "boo"}])
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match="not valid Jinja"):
        ChatTemplate(folder)


def test_a_template_runs_in_a_sandbox(folder):
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(ValueError, match="refuses these messages"):
        ChatTemplate(folder).render([])
