"""Chat templates: the prompt that transformers renders, refusals in one line, bounds on time and memory."""

import json
import time

import pytest
from transformers import AutoTokenizer

from recipe import chat
from recipe.chat import ChatTemplate
from recipe.config import UserError
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


TEMPLATES = {
    "the date": "{{ strftime_now('%Y') }}{% if strftime_now is defined %} today{% endif %}",
    "what is learned": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}{{ x }}"
    "{% endfor %}",
    "no tools": "{{ tools is none }}{{ tools is defined }}{% if tools is not none %}TOOLS{% endif %}",
    "no documents": "{{ documents is none }}{{ documents is defined }}{% if documents %}DOCUMENTS{% endif %}",
    "tokens with names": "{{ bos_token }}|{{ pad_token }}|{{ image_token }}|{{ sep_token }}|{{ extra_special_tokens }}",
    "unknown names": "{{ nobody }}{{ nobody is defined }}{{ enable_thinking | default(true) }}",
    "a dict": "{% set d = dict(a=1, b=[2]) %}{{ d | tojson(indent=2) }}{{ dict.fromkeys('ab', 0) }}",
    "a namespace": "{% set n = namespace(self=1, k=[]) %}{% set n.k = n.k + [1] %}{{ n.k }}{{ n.self }}",
    "JSON": "{{ {'é': '<', 'a': none} | tojson }}{{ [1, 2] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "white space": "  {% if true %}\n  a\n  {% endif %}\n\r\n b {{- ' c' -}} \n",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}"
    "{{ m['content'] }}{% endfor %}",
    "macros": "{% macro say(m) %}{{ m.role | upper }}{{ caller() }}{% endmacro %}"
    "{% call say(messages[0]) %}!{% endcall %}",
    "python's methods": "{{ messages[-1].content.strip().split(' ')[-1].rstrip('.') }}{{ messages[0].get('name') }}",
    "slices": "{{ messages[::-1][0].role }}{{ messages[1:] | length }}"
    "{{ messages | map(attribute='role') | join(',') }}",
    "the prompt": "{{ add_generation_prompt }}{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
}
"""What other templates use."""


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_template_sees_what_transformers_shows_it(folder, case):
    settings(folder, bos_token="<|endoftext|>", image_token="<img>", extra_special_tokens=["a", "b"])
    (folder / "chat_template.jinja").write_text(TEMPLATES[case], newline="")
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(folder).render(MESSAGES) == expected


LAYOUTS = {
    "file": {"chat_template.jinja": "file"},
    "file and more": {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "more"},
    "more, default among them": {"additional_chat_templates/default.jinja": "more"},
    "a file goes before settings": {"chat_template.jinja": "file", "tokenizer_config.json": {"chat_template": "set"}},
    "more go before settings": {"additional_chat_templates/default.jinja": "more",
                                "tokenizer_config.json": {"chat_template": "set"}},
    "settings": {"tokenizer_config.json": {"chat_template": "set"}},
    "settings, by name": {"tokenizer_config.json": {"chat_template": {"default": "set", "tool_use": "no"}}},
    "settings, a list": {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "set"}]}},
    "older settings": {"special_tokens_map.json": {"bos_token": "<b>", "cls_token": {"content": "<c>"}},
                       "chat_template.jinja": "{{ bos_token }}{{ cls_token }}{{ eos_token }}"},
    "a processor's file": {"chat_template.json": {"chat_template": "no"},
                           "tokenizer_config.json": {"chat_template": "set"}},
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_template_is_found_where_transformers_finds_it(folder, case):
    for name, value in LAYOUTS[case].items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            settings(folder, **value)
        else:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(folder).render(MESSAGES) == expected


WRONG = {
    "broken": ("{% for %}", "not valid Jinja"),
    "a tag of nobody's": ("{% sparkle %}", "not valid Jinja"),
    "no such end": ("{% generation %}", "not valid Jinja"),
    "brackets without end": ("{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}", "the chat template of"),
    "its own refusal": ("{{ raise_exception('no role\n' + messages[0].role) }}", "no role"),
    "a number by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "text and number": ("{{ 'a' + 1 }}", "TypeError"),
    "a filter of nobody's": ("{{ messages | sparkle }}", "sparkle"),
    "another template": ("{% include 'x' %}", "loader"),
    "undefined": ("{{ nobody.name }}", "undefined"),
    "out of the sandbox": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "what it was given": ("{{ messages.append(1) }}", "unsafe"),
    "a private name": ("{% set n = namespace(_x=1) %}", "_x"),
    "a macro without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "a range": ("{{ range(10 ** 9) }}", "Range too big"),
    "much text": ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
    "much text later": ("{{ messages[0].content * 10 ** 10 }}", "MemoryError"),
    "much text in pieces": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "longer than"),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 2 s"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_whatever_a_template_does_is_one_line_within_bounds(folder, case, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 2)
    template, words = WRONG[case]
    (folder / "chat_template.jinja").write_text(template)
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        ChatTemplate(folder).render(MESSAGES)
    assert words in str(caught.value) and len(str(caught.value)) < 600
    assert "\n" not in str(caught.value), "not even one of the template's"
    assert time.monotonic() - begun < 30, "a busy machine is slow; the loop would take an hour"


def test_after_a_turn_that_was_too_much_the_talk_goes_on(folder, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 2)
    inner = "{% for j in range(99999) %}{% endfor %}"
    outer = "{% for i in range(99999 if messages[0].content == 'x' else 1) %}" + inner + "{% endfor %}ok"
    (folder / "chat_template.jinja").write_text(outer)
    template = ChatTemplate(folder)
    for _ in range(2):
        with pytest.raises(UserError, match="takes more than"):
            template.render([{"role": "user", "content": "x"}])
        assert template.render([{"role": "user", "content": "y \ud800"}]) == "ok"


NAMED = [[{"name": "default"}], [{"name": 1, "template": "x"}], {"default": 5}, {"tool_use": "x"}]


@pytest.mark.parametrize("value", [5, True, "", [], {}, [5], *NAMED])
def test_a_template_of_another_type_is_refused_in_one_line(folder, value):
    settings(folder, chat_template=value)
    with pytest.raises(UserError) as caught:
        ChatTemplate(folder)
    assert "\n" not in str(caught.value) and "chat" in str(caught.value)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_a_template_that_is_no_text_is_refused_in_one_line(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"is not UTF-8 .byte 3."):
        ChatTemplate(folder)


def test_a_turn_costs_little_once_the_process_is_there(folder):
    place(folder, "file")
    template = ChatTemplate(folder)
    template.render(MESSAGES)
    process = template._process
    for _ in range(3):
        template.render(MESSAGES)
    assert template._process is process, "no process for each turn"
