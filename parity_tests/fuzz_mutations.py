"""What may be wrong with a file: structured mutations of JSON, JSON lines, safetensors, chat templates and bytes.

Each takes the file's bytes and a source of choices, and returns other bytes and what was done, in words. The source is
`random.Random`, or anything with its methods, so that a coverage-guided fuzzer can make the choices.
"""

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

TEXTS = [
    *(
        "",
        " ",
        "a",
        "0",
        "32",
        "1e-6",
        "false",
        "null",
        "None",
        "../outside",
        "/etc/hostname",
        "é",
        "e\u0301",
        "\ufeff",
    ),
    *("\u2028", "\x85", "\x0b", "\r\n", "\r", "\n", "\t", "\0", "\x1b[31m", "\x7f", "\u202e", "\ufffd", "\U0010ffff"),
    *("\ud800", "\udcff", "👩\u200d👩\u200d👧", "ﷺ", "<|endoftext|>", "</s>", "{{ 1/0 }}", "a" * 5000, "ab\n" * 300),
]
"""Texts that somebody's reader once stumbled on."""
NUMBERS = [
    *(0, -1, 1, 2, 3, 8, 64, 257, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**9, 10**30, 10**400, 0.0, -0.0, 0.5, 1.0),
    *(2.0, 1e-6, 1e-300, 1e300, math.inf, -math.inf, math.nan),
]
WHOLES: list[Any] = [None, True, False, [], {}, [None], [[]], [0], [0, 1], [2.5], ["a"], {"a": None}, {"content": None}]
FIELDS: dict[str, list[Any]] = {
    "rope_scaling": [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        *({"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 500.0}, {"factor": 2.0}),
    ],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "dynamic", "factor": 2.0}],
    **{"rope_theta": [500, 1e6], "partial_rotary_factor": [0.5], "is_causal": [False], "mlp_bias": [True]},
    **{"use_bidirectional_attention": [True], "sliding_window": [3, 4096], "use_sliding_window": [True, False]},
    **{"max_window_layers": [0, 1, 28], "head_dim": [8, 16], "tie_word_embeddings": [True, False]},
    "layer_types": [["full_attention"] * 2, ["sliding_attention", "full_attention"], ["sliding_attention"] * 2],
    **{"hidden_act": ["gelu", "swish", "relu"], "attention_bias": [True], "pretraining_tp": [2], "num_experts": [4]},
    **{"quantization_config": [{"quant_method": "fp8"}], "model_type": ["llama", "qwen2", "qwen3_moe"]},
    **{"eos_token_id": [0, 1, [0, 1], [7]], "bos_token_id": [0, 1], "add_bos_token": [True], "add_eos_token": [True]},
    **{"add_prefix_space": [True], "do_lower_case": [True], "eos_token": ["a", {"content": "b"}, "no such token"]},
    **{"bos_token": ["a"], "pad_token": ["a"], "extra_special_tokens": [{"x": "a"}, ["b"]], "model_max_length": [4]},
    "tokenizer_class": ["Qwen2Tokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast"],
    **{"clean_up_tokenization_spaces": [True], "split_special_tokens": [True], "auto_map": [{"AutoTokenizer": "a.b"}]},
    "added_tokens_decoder": [{"1": {"content": "th", "special": True}}, {"900": {"content": "new"}}],
    "truncation": [{"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}],
    "padding": [
        {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
        | {"pad_token": "a"}
    ],
    "normalizer": [{"type": "Lowercase"}, {"type": "NFC"}, {"type": "Prepend", "prepend": "_"}],
    "post_processor": [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A"}}],
        }
        | {"pair": [{"Sequence": {"id": "A"}}], "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}}}
        | {"pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]}
    ],
    **{"data_offsets": [[0, 4], [4, 0], [0, 10**12]], "dtype": ["F32", "I8", "F8_E4M3"], "shape": [[1], [-1], [2.0]]},
    **{"__metadata__": [{"a": 1}, {"a": "b"}, 3], "format": [2, "1"], "position": [1], "step": ["1"], "text": ["b"]},
}
"""Fields that some reader acts on, and what may stand there."""
FRAGMENTS = [
    *(
        "{{ 1/0 }}",
        "{{ 'a' * 10**10 }}",
        "{{ 9**9**9 }}",
        "{{ 10**5000 }}",
        "{{ x.y.z }}",
        "{{ x() }}",
        "{{ messages }}",
    ),
    *("{{ messages[99].role }}", "{{ 'a' + 1 }}", "{{ messages[0].content.nope() }}", "{{ [1, 2] | sum }}", "{%", "}}"),
    *(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ '%d' % 'a' }}",
        "{{ none }}",
    ),
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include 'a' %}", "{% import 'a' as b %}"),
    *("{{ strftime_now('%Y') }}", "{{ raise_exception('no\n\x1b[31m') }}", "{% generation %}a{% endgeneration %}"),
    *(
        "{{ tools }}",
        "{{ tools is defined }}",
        "{{ documents is none }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ '\ud800' }}",
    ),
    *(
        "{{ messages | map(attribute='role') | list }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ bos_token }}",
    ),
    *(
        "{% set a = messages.append(1) %}",
        "{{ 'é' | upper }}",
        "{# ",
        "{% if enable_thinking is defined %}x{% endif %}",
    ),
    *("{{ '{:9999999999}'.format(1) }}", "{{ range(10**9) | list | length }}", "{% break %}", "{{ lipsum(10**7) }}"),
]
"""Parts of chat templates, the published ones' and the ill-meant ones'."""

Chooser = random.Random
Mutated = tuple[bytes, str]


def odd(choose: Chooser) -> Any:
    """Any odd JSON value."""
    return choose.choice(choose.choice([TEXTS, NUMBERS, WHOLES, *choose.choices(list(FIELDS.values()))]))


def spot(value: Any, choose: Chooser) -> tuple[Any, Any, str] | None:
    """A container inside a JSON value, a key or index of it, and the way there; None if there is none."""
    found, way = None, ""
    while isinstance(value, dict | list) and value and (found is None or choose.random() < 0.6):
        key = choose.choice(list(value)) if isinstance(value, dict) else choose.randrange(len(value))
        way += f".{key}" if isinstance(value, dict) else f"[{key}]"
        found, value = (value, key), value[key]
    return None if found is None else (*found, way[:80])


def mutate_value(value: Any, choose: Chooser) -> tuple[Any, str]:
    """A JSON value (changed in place where it can be) with one thing wrong."""
    place = spot(value, choose)
    if place is None or choose.random() < 0.02:
        value = odd(choose)
        return value, f"all = {shown(value)}"
    owner, key, way = place
    here, what = (
        owner[key],
        choose.choice(["delete", "odd", "perturb", "perturb", "swap", "add", "add", "nest", "known"]),
    )
    if what == "delete":
        del owner[key]
        return value, f"{way} deleted"
    if what == "swap":
        other, name, there = spot(value, choose) or place
        owner[key], other[name] = json.loads(json.dumps([other[name], here]))
        return value, f"{way} swapped with {there}"
    if what == "add":
        owner = owner if isinstance(owner, dict) else value
        key = choose.choice([*FIELDS, *TEXTS[:10]])
        new = choose.choice(FIELDS.get(key, WHOLES))
        if isinstance(owner, list):
            owner.insert(choose.randrange(len(owner) + 1), new)
        else:
            owner[key] = new
        return value, f"{key} = {shown(new)} added to {way}"
    if what == "known":
        new = choose.choice(FIELDS[key]) if key in FIELDS else odd(choose)
    elif what == "nest":
        new = choose.choice([[here], {"a": here}, [here, here]])
    elif what == "perturb" and isinstance(here, str):
        new = mutate_text(here, choose)
    elif what == "perturb" and isinstance(here, list):
        new = choose.choice([choose.sample(here, len(here)), here[: choose.randrange(len(here) + 1)], here * 2])
    elif what == "perturb" and isinstance(here, int | float):
        new = choose.choice([not here, here + 1, here - 1, -here, here * 2, float(here), str(here), here + 0.5, 10**9])
    else:
        new = odd(choose)
    owner[key] = new
    return value, f"{way} = {shown(new)}"


def shown(value: Any) -> str:
    """A value in a description."""
    text = ascii(value)
    return text if len(text) < 90 else text[:60] + "..."


def mutate_text(text: str, choose: Chooser) -> str:
    """A text with an odd one put in, or in the place of a part; a template with a fragment of one."""
    first, last = sorted(choose.choices(range(len(text) + 1), k=2))
    template = "{%" in text or "{{" in text
    new = choose.choice(FRAGMENTS if template and choose.random() < 0.7 else TEXTS)
    if template and choose.random() < 0.7:  # between its blocks, so that it stays one
        first = choose.choice(
            [n for n in range(len(text) + 1) if text[:n].endswith(("}}", "%}")) or n in (0, len(text))]
        )
        last = first
    return text[:first] + new + text[choose.choice([first, first, last]) :]


def mutate_json(data: bytes, choose: Chooser) -> Mutated:
    """A JSON file with one thing wrong: a value, a name that stands twice, thousands of brackets, or its bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, choose)
    what = choose.random()
    if what < 0.06:
        return mutate_bytes(data, choose)
    if what < 0.08:
        deep = choose.choice(['{"a":' * 9999, "[" * 99999, "[" * 900 + "]" * 900])
        return data.rstrip()[:-1] + b', "deep": ' + deep.encode() + b"}", "deep brackets"
    if what < 0.11 and isinstance(value, dict) and value:
        name, new = choose.choice(list(value)), odd(choose)
        text = f"{json.dumps(value)[:-1]}, {json.dumps(name)}: {json.dumps(new)}}}"
        return text.encode(), f"{name} stands twice, then as {shown(new)}"
    value, said = mutate_value(value, choose)
    plain = choose.random() < 0.5
    return json.dumps(value, ensure_ascii=plain, indent=None if plain else 1).encode("utf-8", "surrogatepass"), said


def mutate_lines(data: bytes, choose: Chooser) -> Mutated:
    """JSON lines with one thing wrong: a line's value, its end, or the file's bytes."""
    lines = data.split(b"\n")
    index, what = choose.randrange(len(lines)), choose.random()
    if what < 0.5 and lines[index]:
        lines[index], said = mutate_json(lines[index], choose)
        if what < 0.4:
            lines[index] = lines[index].replace(b"\n", b" ")
        return b"\n".join(lines), f"line {index + 1}: {said}"
    if what < 0.8:
        object_ = json.dumps({"text": choose.choice(TEXTS)}, ensure_ascii=choose.random() < 0.5)
        new = choose.choice([object_, object_, choose.choice([*TEXTS, "null", "3", "[]", '{"text": null}', "{}"])])
        lines.insert(index, new.encode("utf-8", "surrogatepass"))
        return b"\n".join(lines), f"line {index + 1}: {shown(new)} put in"
    return mutate_bytes(data, choose)


def mutate_tensors(data: bytes, choose: Chooser) -> Mutated:
    """A safetensors file with one thing wrong in its header's JSON, its length, or its bytes."""
    what = choose.random()
    if what < 0.2 or len(data) < 8:
        return mutate_bytes(data, choose)
    (length,) = struct.unpack("<Q", data[:8])
    header, body, said = data[8 : 8 + length], data[8 + length :], "length"
    if what < 0.9:
        header, said = mutate_json(header, choose)
        header += b" " * choose.choice([0, -len(header) % 8])
    length = len(header) + (choose.choice([-1, 1, 8, 10**6, 2**62]) if what > 0.95 else 0)
    return struct.pack("<Q", max(0, length)) + header + body, said


def mutate_plain(data: bytes, choose: Chooser) -> Mutated:
    """A text file, or a chat template, with one thing wrong."""
    try:
        text = data.decode()
    except ValueError:
        return mutate_bytes(data, choose)
    if choose.random() < 0.15:
        return mutate_bytes(data, choose)
    new = mutate_text(text, choose)
    first = next((n for n, (a, b) in enumerate(zip(text, new, strict=False)) if a != b), min(len(text), len(new)))
    return new.encode("utf-8", "surrogatepass"), f"at {first}: {shown(new[first : first + 60])}"


def mutate_bytes(data: bytes, choose: Chooser) -> Mutated:
    """Bytes flipped, cut, put in, taken out, repeated or overwritten; often near the end, where footers are."""
    size = len(data)
    low = max(0, size - 300) if choose.random() < 0.4 else 0
    at, length = choose.randrange(low, size + 1), choose.choice([1, 2, 8, 64])
    noise = (
        choose.choice([b"\0", b"\xff", b"\x80", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"}", choose.randbytes(4)]) * length
    )
    what = choose.choice(["flip", "cut", "insert", "remove", "repeat", "overwrite", "append", "empty"])
    if what == "empty" and choose.random() < 0.8:
        what = "flip"
    results = {
        "flip": data[:at] + bytes(b ^ (1 << choose.randrange(8)) for b in data[at : at + 1]) + data[at + 1 :],
        "cut": data[:at],
        "insert": data[:at] + noise + data[at:],
        "remove": data[:at] + data[at + length :],
        "repeat": data[:at] + data[at : at + length] * 2 + data[at + length :],
        "overwrite": data[:at] + noise[:length] + data[at + length :],
        "append": data + noise,
        "empty": b"",
    }
    return results[what], f"bytes: {what} at {at:,} of {size:,}"


BY_SUFFIX: dict[str, Callable[[bytes, Chooser], Mutated]] = {
    **{".json": mutate_json, ".jsonl": mutate_lines, ".safetensors": mutate_tensors},
    **{".jinja": mutate_plain, ".txt": mutate_plain, ".md": mutate_plain},
}
"""How a file of this suffix is mutated; any other as bytes."""
