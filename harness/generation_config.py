"""generation_config.json: how a folder's makers sample, which tokens end its texts, and what cannot be done here.

Every field that transformers knows is one of four: a default of our flags (`defaults`), an end token (`stop_ids`),
refused unless neutral (`NEUTRAL`), or without effect on the text (`HARMLESS`). Any other is named by `notes`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recipe.config import UserError, require
from recipe.reading import read_json, short, take
from recipe.sampling import SamplingOptions
from recipe.tokenizer import Tokenizer
from recipe.tokenizer_settings import tokenizer_notes, unknown_fields

SAMPLING = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
}
"""Fields that are flags of the same name, with their types."""
READ = {*SAMPLING, "do_sample", "stop_strings", "eos_token_id"}

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), (1.0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha"), (0.0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ([], {})),
    **dict.fromkeys(("force_words_ids", "constraints"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "max_time", "top_h"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "dola_layers", "watermarking_config"), ()),
    **dict.fromkeys(("token_healing", "use_mtp"), (False,)),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window"),
}  # fmt: skip
"""Fields that change the text in a way not written here -> their values that do not; null never does."""

HARMLESS = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), "pads, or begins without a prompt"),
    **dict.fromkeys(("early_stopping", "length_penalty", "diversity_penalty", "low_memory"), "of beams alone"),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values"), "leaves the order of finite logits as it is"),
    **dict.fromkeys(("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
                     "disable_compile", "continuous_batching_config"), "is about speed"),
    **dict.fromkeys(("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
                     "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
                     "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "speculation_type",
                     "assistant_ensemble_weight"), "of a second model, for speed"),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits",
                     "return_dict_in_generate", "return_legacy_cache"), "says what else is returned"),
    **dict.fromkeys(("transformers_version", "generation_kwargs", "_from_model_config"), "says where it came from"),
    "max_length": "max_new_tokens, which always has a value here, goes before it",
}  # fmt: skip
"""Fields that change no text, with the reason."""


def defaults(folder: Path) -> dict[str, Any]:
    """The values of `SamplingOptions` that a folder's makers chose; fields they do not name are absent.

    `do_sample` false is temperature 0. `UserError` names the first field that is of a wrong type or cannot be done.
    """
    file, values = _read(folder)
    chosen: dict[str, Any] = {
        name: take(values, name, hint, str(file)) for name, hint in SAMPLING.items() if values.get(name) is not None
    }
    if take(values, "do_sample", bool | None, str(file), None) is False:
        chosen["temperature"] = 0.0
    strings = take(values, "stop_strings", str | list[str] | None, str(file), None)
    if strings:
        chosen["stop"] = (strings,) if isinstance(strings, str) else tuple(strings)
    for name, neutral in NEUTRAL.items():
        value = values.get(name)
        require(
            value is None or any(value == other and isinstance(value, bool) == isinstance(other, bool)
                                 for other in neutral),
            f"{file}: {name}={short(repr(value))} is not supported; set it to "
            f"{' or '.join(map(repr, neutral[:1])) or 'null'}, or remove it.",
        )  # fmt: skip
    try:
        dataclasses.replace(SamplingOptions(), **chosen)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return chosen


def stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's, and all that generation_config.json names, else config.json."""
    found = {tokenizer.eos_id}
    for file, values in (_read(folder), _read(folder, "config.json")):
        ids = take(values, "eos_token_id", int | list[int] | None, str(file), None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
            break
    # transformers takes a negative one for a token that never comes.
    return tuple(sorted(token for token in found if token >= 0))


def with_stop(values: Mapping[str, Any], eos_id: int) -> dict[str, Any]:
    """A generation_config.json whose texts end at `eos_id`, too."""
    ids = values.get("eos_token_id")
    given = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return {**values, "eos_token_id": eos_id if given in ([], [eos_id]) else [*given, *({eos_id} - {*given})]}


def notes(folder: Path) -> list[str]:
    """Lines on the fields of tokenizer and generation files that nothing here acts upon."""
    known: Iterable[str] = (*READ, *NEUTRAL, *HARMLESS)
    lines = tokenizer_notes(Path(folder)) + unknown_fields(_read(folder)[1], known, "generation_config.json")
    try:
        defaults(folder)
    except UserError as error:
        lines.append(f"generate refuses {error}")
    return lines


def _read(folder: Path, name: str = "generation_config.json") -> tuple[Path, dict[str, Any]]:
    file = Path(folder) / name
    return file, read_json(file) if file.is_file() else {}
