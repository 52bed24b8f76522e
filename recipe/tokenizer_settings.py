"""What stands beside a tokenizer.json: special tokens and settings, read as transformers reads them.

A field is honoured, harmless for the reason in `SETTINGS_HARMLESS`, refused, or named by `tokenizer_notes`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as RustTokenizer

from recipe.config import UserError, require
from recipe.reading import kind_of, parse_json, read_json, short, some, take

END_OF_TEXT = "<|endoftext|>"

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that transformers knows by name; others, such as image_token, belong to one tokenizer."""

QWEN = "Qwen2Tokenizer"
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")
"""Classes with which transformers takes a tokenizer.json as it is."""
CLASS_TOKENS = {
    QWEN: {"eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
    "GPT2Tokenizer": {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
"""The special tokens that a class of transformers has where its settings name none."""

SETTINGS_READ = {
    *TOKEN_NAMES,
    *("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "chat_template"),
    *("tokenizer_class", "split_special_tokens", "add_prefix_space", "fast_tokenizer_files", "fix_mistral_regex"),
    *("clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
}
"""Fields of tokenizer_config.json that are honoured, or refused where they ask for what is not done here."""
SETTINGS_HARMLESS = {
    **dict.fromkeys(("add_bos_token", "add_eos_token"), "transformers drops it where there is a tokenizer.json"),
    **dict.fromkeys(("model_max_length", "max_len", "max_length", "truncation_side", "truncation_strategy", "stride"),
                    "acts where somebody asks for truncation"),
    **dict.fromkeys(("padding_side", "pad_to_multiple_of", "pad_token_type_id", "pad_token_type"),
                    "acts where somebody asks for padding"),
    **dict.fromkeys(("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "name_or_path",
                     "is_local", "local_files_only", "backend", "init_inputs", "from_slow", "processor_class",
                     "auto_map", "device_map"), "says where it came from"),
    **dict.fromkeys(("legacy", "sp_model_kwargs", "use_default_system_prompt", "errors", "trim_offsets",
                     "spaces_between_special_tokens", "use_fast"), "of tokenizers without a tokenizer.json"),
    **dict.fromkeys(("model_input_names", "return_token_type_ids", "response_template", "response_schema",
                     "chat_control_tokens", "verbose"), "says in what form an answer comes"),
}  # fmt: skip
"""Fields that change no token, with the reason."""
FILE_READ = {
    *("version", "truncation", "padding", "added_tokens"),
    *("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"),
}
"""Fields of tokenizer.json, which the library acts upon; truncation and padding are switched off after loading."""


def encodable(text: str) -> str:
    """The text; UserError if it holds half of a surrogate pair, which no encoding has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"character {error.start + 1} of the text, U+{code:04X}, is half of a character or a byte that is not of "
            "the terminal's encoding; write the text in UTF-8."
        ) from None
    return text


def read_settings(folder: Path | None) -> dict[str, Any]:
    """tokenizer_config.json, and as transformers has it: tokens of the older special_tokens_map.json and
    added_tokens.json, if `added_tokens_decoder` does not say them all."""
    if folder is None:
        return {}
    file, older, added = (
        folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    settings = read_json(file) if file.is_file() else {}
    if "added_tokens_decoder" not in settings:
        settings |= read_json(older) if older.is_file() else {}
        if added.is_file():
            contents = special_tokens(settings, str(older)).values()
            ids = read_json(added)
            settings["added_tokens_decoder"] = {
                str(take(ids, content, int, str(added))): {"content": content, "special": content in contents,
                                                           "normalized": content not in contents}
                for content in ids
            }  # fmt: skip
    model = folder / "config.json"
    if settings.get("tokenizer_class") is None and model.is_file() and read_json(model).get("model_type") == "qwen3":
        settings["tokenizer_class"] = QWEN  # which AutoTokenizer takes for such a model
    return settings


def special_tokens(settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """Name -> text of the special tokens, as chat templates see them."""
    return {name: token.content for name, token in _named_tokens(settings, where).items()}


def _named_tokens(settings: Mapping[str, Any], where: str) -> dict[str, AddedToken]:
    named = {**_class_tokens(settings, where), **{name: settings[name] for name in TOKEN_NAMES if name in settings}}
    more = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and name not in TOKEN_NAMES and isinstance(value, str | dict)
    }
    extra = _extra_tokens(settings, where)
    more |= extra if isinstance(extra, dict) else {}
    return {
        name: _token(value, f"{where}: {name}", special=True)
        for name, value in (named | more).items()
        if value is not None
    }


def _class_tokens(settings: Mapping[str, Any], where: str) -> dict[str, str]:
    name = take(settings, "tokenizer_class", str | None, where, None) or ""
    return CLASS_TOKENS.get(name.removesuffix("Fast"), {})


def _extra_tokens(settings: Mapping[str, Any], where: str) -> list | dict:
    """Special tokens without a name, as a list, or with names of their own, as a dict."""
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if extra := take(settings, name, list | dict | None, where, None):
            return extra
    return []


def _token(value: Any, where: str, *, special: bool) -> AddedToken:
    """A special token, which files give as a text or as an object."""
    if isinstance(value, str):
        return AddedToken(encodable(value), special=special)
    require(isinstance(value, dict), f"{where} is {kind_of(value)}, not a text or an object; mend it there.")
    flags = {
        name: take(value, name, bool, where)
        for name in ("single_word", "lstrip", "rstrip", "normalized")
        if name in value
    }
    return AddedToken(
        encodable(take(value, "content", str, where)), special=take(value, "special", bool, where, special), **flags
    )


def add_tokens(rust: RustTokenizer, settings: Mapping[str, Any], where: str) -> None:
    """Add the tokens that only the settings name, in transformers' order, which decides their ids."""
    decoder = take(settings, "added_tokens_decoder", dict, where, {})
    require(
        all(key.isdecimal() for key in decoder), f"{where}: added_tokens_decoder has a name that is no id; mend it."
    )
    known = {repr(token) for token in rust.get_added_tokens_decoder().values()}
    tokens = [_token(decoder[key], f"{where}: added token {key}", special=False) for key in sorted(decoder, key=int)]
    adding = [token for token in tokens if repr(token) not in known]
    seen = {token.content for token in (*rust.get_added_tokens_decoder().values(), *adding)}
    extra = _extra_tokens(settings, where)
    listed = [_token(value, f"{where}: a special token", special=True) for value in extra if isinstance(extra, list)]
    for token in (*_named_tokens(settings, where).values(), *listed):
        if token.content not in seen:
            seen.add(token.content)
            adding.append(token)
    rust.add_tokens(adding)


def refuse_settings(settings: Mapping[str, Any], rust: RustTokenizer, where: str) -> None:
    """Raise `UserError` for what transformers would act upon and this project does not."""
    files = take(settings, "fast_tokenizer_files", list[str], where, [])
    require(
        set(files) <= {"tokenizer.json"},
        f"{where}: fast_tokenizer_files={short(repr(files))} names tokenizers for versions of transformers; remove it.",
    )
    require(
        not take(settings, "fix_mistral_regex", bool | None, where, None),
        f"{where}: fix_mistral_regex=true is not supported; mend the pre_tokenizer in tokenizer.json and remove it.",
    )
    cleans = take(settings, "clean_up_tokenization_spaces", bool | None, where, None)
    even = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    require(
        not cleans or (isinstance(rust.model, models.BPE) and not take(settings, even, bool | None, where, None)),
        f"{where}: clean_up_tokenization_spaces=true is not supported with this kind of tokenizer; set it to false.",
    )
    prefix = take(settings, "add_prefix_space", bool | None, where, None)
    name = take(settings, "tokenizer_class", str | None, where, None) or ""
    if name.removesuffix("Fast") == QWEN:
        parts = _parts(rust)
        other = [part for part, value in _qwens(bool(prefix)).items() if value != parts[part]]
        require(
            not other,
            f"{where}: with tokenizer_class={name} transformers puts Qwen's own {', '.join(other)} in the place of "
            "tokenizer.json's; set it to PreTrainedTokenizerFast to use the file as it is.",
        )


def _qwens(prefix: bool) -> dict[str, Any]:
    """What `_parts` says of the tokenizer that Qwen2Tokenizer builds around a vocabulary, with `add_prefix_space`."""
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    levels = {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]},
        "decoder": "ByteLevel",
        "model": {"type": "BPE", "byte_fallback": False, "ignore_merges": False, "unk_token": None},
    }


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _parts(rust: RustTokenizer) -> dict[str, Any]:
    """The parts of a tokenizer that decide its tokens, without what only moves offsets."""

    def plain(pairs: list) -> dict:
        return {name: value for name, value in pairs if name != "trim_offsets"}

    def state(part: Any) -> Any:
        return None if part is None else parse_json(part.__getstate__(), "a part of the tokenizer", pairs=plain)

    model = rust.model
    return {
        "normalizer": state(rust.normalizer),
        "pre_tokenizer": state(rust.pre_tokenizer),
        "decoder": (state(rust.decoder) or {}).get("type"),
        "model": {"type": type(model).__name__}
        | {name: getattr(model, name, None) for name in ("byte_fallback", "ignore_merges", "unk_token")},
    }


def tokenizer_notes(folder: Path) -> list[str]:
    """Lines on what the tokenizer's files say and nothing here acts upon, or transformers reads otherwise."""
    notes = []
    file = folder / "tokenizer.json"
    if file.is_file():
        values = read_json(file)
        off = [name for name in ("truncation", "padding") if values.get(name) is not None]
        model = values.get("model")
        off += ["model.dropout"] if isinstance(model, dict) and model.get("dropout") else []
        notes += [f"tokenizer.json: {', '.join(off)} switched off"] if off else []
        notes += unknown_fields(values, FILE_READ, "tokenizer.json")
    settings = read_settings(folder)
    if settings:
        known = {name for name in settings if name.endswith("_token")} | SETTINGS_READ | set(SETTINGS_HARMLESS)
        notes += unknown_fields(settings, known, "tokenizer_config.json")
        name = take(settings, "tokenizer_class", str | None, str(folder), None)
        if name is None or name.removesuffix("Fast") not in (QWEN, *(known.removesuffix("Fast") for known in GENERIC)):
            notes.append(
                f"tokenizer_config.json: tokenizer_class={name}, for which transformers may build parts of its own; "
                "here tokenizer.json is taken as it is"
            )
    return notes


def unknown_fields(values: Iterable[str], known: Iterable[str], file: str) -> list[str]:
    """A line that names the fields of a file that nothing here knows, or none."""
    unknown = sorted(set(values) - set(known))
    return [f"{file}: {some(unknown)} not known here and without effect"] if unknown else []
