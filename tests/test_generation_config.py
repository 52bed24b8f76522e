"""generation_config.json: every field that transformers knows is honoured, refused or harmless; end tokens count."""

import json

import pytest
from transformers import GenerationConfig

from harness import generation_config
from harness.generation_config import HARMLESS, NEUTRAL, READ, defaults, notes, stop_ids, with_stop
from recipe.config import UserError
from recipe.sampling import SamplingOptions
from recipe.tokenizer import train_bpe

TOKENIZER = train_bpe(["the quick brown fox"] * 3, 280)


def write(folder, text, name="generation_config.json") -> None:
    (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))


def test_every_field_of_transformers_has_its_place():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert len(fields) > 50, "the class was read"
    assert not fields - READ - set(NEUTRAL) - set(HARMLESS)
    for one, other in ((READ, NEUTRAL), (READ, HARMLESS), (NEUTRAL, HARMLESS)):
        assert not set(one) & set(other)


def test_what_transformers_writes_by_itself_is_neutral(tmp_path):
    GenerationConfig().save_pretrained(tmp_path)
    assert defaults(tmp_path) == {} and notes(tmp_path) == []
    write(tmp_path, dict.fromkeys([*READ, *NEUTRAL, *HARMLESS]))
    assert defaults(tmp_path) == {}, "null never asks for anything"
    write(tmp_path, {name: values[0] for name, values in NEUTRAL.items() if values})
    assert defaults(tmp_path) == {}


CHOSEN = {
    '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": true}': dict(temperature=0.6, top_k=20, top_p=0.95),
    '{"do_sample": false, "temperature": 0.6}': dict(temperature=0.0),
    '{"do_sample": null, "min_p": 1}': dict(min_p=1),
    '{"max_new_tokens": 7, "max_length": 20}': dict(max_new_tokens=7),
    '{"repetition_penalty": 1.1, "bos_token_id": 5}': dict(repetition_penalty=1.1),
    '{"stop_strings": "end"}': dict(stop=("end",)),
    '{"stop_strings": ["a", "b"], "num_beams": 1}': dict(stop=("a", "b")),
    "{}": {},
}


@pytest.mark.parametrize("text", CHOSEN)
def test_what_its_makers_chose_are_the_defaults(text, tmp_path):
    write(tmp_path, text)
    assert defaults(tmp_path) == CHOSEN[text]
    assert SamplingOptions(**defaults(tmp_path))


OTHER = {
    "num_beams": 4, "num_return_sequences": 2, "no_repeat_ngram_size": 3, "min_length": 5, "min_new_tokens": 1,
    "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "top_h": 0.4, "guidance_scale": 1.5,
    "encoder_repetition_penalty": 1.2, "bad_words_ids": [[5]], "suppress_tokens": [5], "begin_suppress_tokens": [5],
    "sequence_bias": [[[5], 1.0]], "forced_bos_token_id": 5, "forced_eos_token_id": [5], "token_healing": True,
    "exponential_decay_length_penalty": [15, 1.6], "watermarking_config": {"bias": 2.5}, "penalty_alpha": 0.6,
    "dola_layers": "low", "constraints": [5], "force_words_ids": [[5]], "num_beam_groups": 2, "max_time": 1.0,
    "use_mtp": True, "cache_implementation": "quantized", "encoder_no_repeat_ngram_size": 2,
    "forced_decoder_ids": [[1, 5]],
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_cannot_be_done_is_refused_and_inspect_says_so(name, tmp_path):
    for value in (OTHER[name], "x", [[]], 1e9, {"a": 1}):
        write(tmp_path, {name: value})
        with pytest.raises(UserError, match=name) as caught:
            defaults(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        assert any(f"generate refuses {caught.value}" == line for line in notes(tmp_path))


WRONG = [
    *({name: value} for name in generation_config.SAMPLING for value in ("1", [1], {}, True, -1e9)),
    {"top_k": 1.5}, {"top_p": 1.5}, {"temperature": 1e400}, {"do_sample": "yes"}, {"do_sample": 1},
    {"stop_strings": 5}, {"stop_strings": [5]}, {"stop_strings": [""]},
]  # fmt: skip


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_a_wrong_value_is_one_line_with_the_file(values, tmp_path):
    write(tmp_path, values)
    with pytest.raises(UserError) as caught:
        defaults(tmp_path)
    assert "generation_config.json" in str(caught.value) and "\n" not in str(caught.value)
    assert next(iter(values)) in str(caught.value) or "stop string" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"', "[" * 20_000, '{"top_k": ' + "9" * 5000 + "}"])
def test_a_damaged_file_is_one_line(text, tmp_path):
    write(tmp_path, text)
    for read in (defaults, lambda folder: stop_ids(folder, TOKENIZER)):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


STOPS = {
    "nothing": ({}, (0,)),
    "a number": ({"generation_config.json": {"eos_token_id": 5}}, (0, 5)),
    "a list": ({"generation_config.json": {"eos_token_id": [7, 5]}}, (0, 5, 7)),
    "the model's": ({"config.json": {"eos_token_id": [3]}}, (0, 3)),
    "generation's before the model's": (
        {"generation_config.json": {"eos_token_id": 5}, "config.json": {"eos_token_id": 3}}, (0, 5)),
    "null is none": ({"generation_config.json": {"eos_token_id": None}, "config.json": {"eos_token_id": 3}}, (0, 3)),
    "never": ({"generation_config.json": {"eos_token_id": -1}}, (0,)),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_all_that_end_a_text_are_found(case, tmp_path):
    files, expected = STOPS[case]
    for name, values in files.items():
        write(tmp_path, values, name)
    assert stop_ids(tmp_path, TOKENIZER) == expected


@pytest.mark.parametrize("value", ["5", [5, "6"], 5.0, True, {"a": 5}])
def test_an_end_token_that_is_no_id_is_one_line(value, tmp_path):
    write(tmp_path, {"eos_token_id": value})
    with pytest.raises(UserError, match="eos_token_id"):
        stop_ids(tmp_path, TOKENIZER)


def test_a_fine_tuned_model_ends_at_its_documents_end_too():
    for given, expected in ((None, 3), (3, 3), ([3], 3), (5, [5, 3]), ([5, 3], [5, 3]), ([5, 6], [5, 6, 3])):
        assert with_stop({"eos_token_id": given, "top_k": 2}, 3) == {"eos_token_id": expected, "top_k": 2}
    assert with_stop({}, 3) == {"eos_token_id": 3}
