"""Tokenizers of others: the ids that transformers' AutoTokenizer has from the same folder, or one line that refuses."""

import json

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models
from transformers import AutoTokenizer, Qwen3Config

from harness.folders import save_folder
from harness.generation_config import notes
from recipe.config import ModelConfig, UserError
from recipe.data import encode_texts
from recipe.params import init_params
from recipe.tokenizer import Tokenizer, load_tokenizer, train_bpe
from recipe.tokenizer_settings import QWEN_PATTERN

TEXTS = ("who goes there, my friend?", "<s>who</s> <pad>goes[x]  there", "<|endoftext|>\n\ncafe\u0301 12345 don't", "")
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [300], "tokens": ["<s>"]}},
}
ADDED = {"content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "<|endoftext|>"}  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
LEVELS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
QWEN = {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, LEVELS]}}


@pytest.fixture(scope="module")
def trained():
    text = "who goes there, my friend, and who goes home <s> 1 2 3, the quick brown fox jumps over the lazy dog"
    tokenizer = train_bpe([text] * 3, 300)
    assert tokenizer.vocab_size == 300, "so that the id of <s> is 300"
    return json.loads(tokenizer.rust.to_str())


@pytest.fixture
def folder(tmp_path):
    Qwen3Config().save_pretrained(tmp_path)
    return tmp_path


def write(folder, trained, file=(), settings=(), **others) -> None:
    """A folder of this tokenizer with fields changed; `others` are more JSON files by name."""
    bos = [{"id": 300, **ADDED}]
    values = {**trained, "added_tokens": [*trained["added_tokens"], *bos], **dict(file)}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    chosen = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **dict(settings)}
    (folder / "tokenizer_config.json").write_text(json.dumps(chosen))
    for name, value in others.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def with_model(trained, **changes):
    return {"model": {**trained["model"], **changes}}


FILES = {
    "as it is": {},
    "truncation": {"truncation": TRUNCATION},
    "padding": {"padding": PADDING},
    "a BOS": {"post_processor": BOS},
    "a normalizer": {"normalizer": {"type": "Lowercase"}},
    "a pre-tokenizer": QWEN,
    "all": {"truncation": TRUNCATION, "padding": PADDING, "post_processor": BOS, **QWEN},
}
SETTINGS = {
    "Qwen's class": {"tokenizer_class": "Qwen2Tokenizer"},
    "Qwen's class, as transformers 4 wrote it": {"tokenizer_class": "Qwen2TokenizerFast", "pad_token": "<pad>"},
    "BOS asked for": {"add_bos_token": True, "bos_token": "<s>"},
    "EOS asked for": {"add_eos_token": True},
    "no special tokens in texts": {"split_special_tokens": True},
    "a new named token": {"pad_token": "<pad>"},
    "a new token of its own name": {"image_token": "<pad>"},
    "new tokens without a name": {"extra_special_tokens": ["<pad>", "[x]"]},
    "the older list": {"additional_special_tokens": ["<pad>"]},
    "new tokens with names": {"extra_special_tokens": {"image_token": "<pad>"}},
    "a decoder": {"added_tokens_decoder": {"301": ADDED | {"content": "<pad>", "lstrip": True, "special": False}}},
    "other flags": {"added_tokens_decoder": {"300": ADDED | {"rstrip": True}}},
    "an object": {"eos_token": ADDED | {"content": "</s>", "__type": "AddedToken"}},
    "harmless fields": {"model_max_length": 3, "padding_side": "left", "clean_up_tokenization_spaces": True,
                        "legacy": False, "errors": "strict", "max_length": 4, "truncation_side": "left"},
}  # fmt: skip


def same(folder) -> None:
    """Ours and transformers' have the same ids, texts and tokens around prompts."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode_prompt(text) == ids, text
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode_batch(TEXTS) == list(map(ours.encode, TEXTS))
    assert ours.eos_id == theirs.eos_token_id
    assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize("case", FILES)
def test_what_a_file_holds_acts_as_in_transformers(case, folder, trained):
    write(folder, trained, file=FILES[case])
    same(folder)


@pytest.mark.parametrize("case", SETTINGS)
def test_what_stands_beside_a_file_acts_as_in_transformers(case, folder, trained):
    write(folder, trained, file=QWEN, settings=SETTINGS[case])
    same(folder)


@pytest.mark.parametrize("pad", ["<pad>", {**ADDED, "content": "<pad>"}])
def test_older_files_beside_it_act_as_in_transformers(pad, folder, trained):
    older = {"eos_token": "</s>", "pad_token": pad, "bos_token": "<s>"}
    write(folder, trained, special_tokens_map=older, added_tokens={"[x]": 303, "<pad>": 302})
    same(folder)
    settings = {"added_tokens_decoder": {"300": ADDED}, "pad_token": "<unk>"}
    write(folder, trained, settings=settings, special_tokens_map=older)
    same(folder)


REFUSED = {
    "Qwen's class with other parts": ({"tokenizer_class": "Qwen2Tokenizer"}, "Qwen's own normalizer, pre_tokenizer"),
    "files by version": ({"fast_tokenizer_files": ["tokenizer.4.json"]}, "fast_tokenizer_files"),
    "a mended regex": ({"fix_mistral_regex": True}, "fix_mistral_regex"),
    "clean-up all the same": (
        {"clean_up_tokenization_spaces": True,
         "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}, "clean_up"),
    "eos is a number": ({"eos_token": 5}, "eos_token"),
    "eos without content": ({"eos_token": {"id": 5}}, "content"),
    "a list of numbers": ({"extra_special_tokens": [5]}, "special token"),
    "ids that are none": ({"added_tokens_decoder": {"x": ADDED}}, "added_tokens_decoder"),
    "a decoder that is a list": ({"added_tokens_decoder": [ADDED]}, "added_tokens_decoder"),
    "a flag that is text": ({"added_tokens_decoder": {"300": ADDED | {"lstrip": "no"}}}, "lstrip"),
    "half a character": ({"pad_token": "\ud800"}, "U+D800"),
    "a class that is a list": ({"tokenizer_class": ["x"]}, "tokenizer_class"),
    "split that is text": ({"split_special_tokens": "false"}, "split_special_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(case, folder, trained):
    settings, words = REFUSED[case]
    write(folder, trained, settings=settings)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_that_cannot_be_what_it_says_is_refused_in_one_line(folder, trained):
    others = {
        "more rows than any model": {"vocab": trained["model"]["vocab"] | {"zz": 2**31}, "merges": []},
        "a merge of nothing": {"merges": [["x", "yy"]]},
        "the library panics": {"continuing_subword_prefix": "longer than any token of it"},
        "the library would end the process": {"continuing_subword_prefix": "\t"},
        "another kind": {"type": "Sparkle"},
    }
    for case, changes in others.items():
        write(folder, trained, file=with_model(trained, **changes) | {"added_tokens": []})
        with pytest.raises(UserError) as caught:
            load_tokenizer(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500, case


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("text", ["", "[]", "{", '{"eos_token": [1]}', '"x"', "[" * 20_000, "\xff"])
def test_a_damaged_file_beside_it_is_refused_in_one_line(name, text, folder, trained):
    write(folder, trained)
    (folder / f"{name}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bpe_dropout_is_switched_off_and_said(folder, trained):
    write(folder, trained, file=with_model(trained, dropout=0.5) | {"truncation": TRUNCATION})
    text = "who goes there, my friend, and who goes home" * 5
    assert len({tuple(load_tokenizer(folder).encode(text)) for _ in range(5)}) == 1
    assert "tokenizer.json: truncation, model.dropout switched off" in notes(folder)


def test_a_field_that_nobody_knows_is_named(folder, trained):
    write(folder, trained, file={"sparkle": 1}, settings={"glitter\n": 1, "padding_side": "left"})
    (folder / "generation_config.json").write_text('{"glow": 1, "temperature": 0.5}')
    said = notes(folder)
    assert [line for line in said if "sparkle" in line] and [line for line in said if "glow" in line]
    assert [line for line in said if r"glitter\n" in line] and not any("padding_side" in line for line in said)


def holed() -> Tokenizer:
    """Five tokens, whose largest id is 70,000."""
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 70_000, "ab": 3, "c": 9}
    return Tokenizer(RustTokenizer(models.BPE(vocab=vocab, merges=[("a", "b")])), "<|endoftext|>")


def test_ids_with_holes_need_rows_up_to_the_largest():
    tokenizer = holed()
    assert tokenizer.vocab_size == 70_001
    tokens = encode_texts(tokenizer, ["bab", "c"])
    assert tokens.tolist() == [70_000, 3, 0, 9, 0], "no id is cut to sixteen bits"


def test_a_tokenizer_that_would_be_another_once_saved_is_refused(folder):
    """The library takes the number of tokens for the next id, and numbers anew when it reads what it wrote."""
    small = json.loads(train_bpe(["who goes"], 262).rust.to_str())
    vocab = {token: number for token, number in small["model"]["vocab"].items() if token not in ("Y", "Ã")}
    file = with_model(small, vocab=vocab, merges=[]) | {"added_tokens": [{"id": 0, **ADDED, "content": "who"}]}
    decoder = {"0": ADDED, "300": ADDED | {"content": "<q>"}}
    named = {"unk_token": "who", "bos_token": "</s>", "pad_token": "zz"}
    write(folder, small, file=file, settings={**named, "added_tokens_decoder": decoder})
    with pytest.raises(UserError, match="holes in its ids, and other ids once it is saved"):
        load_tokenizer(folder)


def test_a_tokenizer_that_could_not_be_read_again_is_refused(folder, trained, monkeypatch):
    """Damaged files were seen that the library reads, and then cannot read what it wrote of them."""

    class Unreadable:
        from_file = staticmethod(RustTokenizer.from_file)

        @staticmethod
        def from_str(text):
            raise Exception("a merge of nothing")

    monkeypatch.setattr("recipe.tokenizer.RustTokenizer", Unreadable)
    vocab = {token: number + (number > 9) for token, number in trained["model"]["vocab"].items()}
    write(folder, trained, file=with_model(trained, vocab=vocab) | {"added_tokens": []})
    with pytest.raises(UserError, match="holes in its ids, and other ids once it is saved"):
        load_tokenizer(folder)


def test_an_id_that_only_the_post_processor_has_needs_a_row(folder, trained):
    beyond = BOS | {"special_tokens": {"<s>": {"id": "<s>", "ids": [999], "tokens": ["<s>"]}}}
    write(folder, trained, file={"post_processor": beyond})
    assert load_tokenizer(folder).encode_prompt("who")[0] == 999 and load_tokenizer(folder).vocab_size == 1000


def test_half_a_surrogate_pair_is_refused_and_named():
    tokenizer = train_bpe(["ab"], 257)
    for call in (tokenizer.encode, tokenizer.encode_prompt, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match=r"character 3 of the text, U\+D83E"):
            call("ab\ud83e")


TRAVELLERS = {
    "chat_template.jinja": "{{ messages }}\r\n",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "special_tokens_map.json": '{"bos_token": "<s>"}',
    "added_tokens.json": '{"<s>": 300}',
}


def test_what_came_beside_a_tokenizer_goes_where_it_goes(folder, trained, tmp_path):
    write(folder, trained, settings={"pad_token": "<pad>", "chat_template": "{{ 1 }}", "eos_token": None})
    (folder / "additional_chat_templates").mkdir()
    for name, text in TRAVELLERS.items():
        (folder / name).write_bytes(text.encode())
    sampling = {"temperature": 0.6, "eos_token_id": [5, 6], "bos_token_id": 300}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    first = load_tokenizer(folder)
    model = ModelConfig(vocab_size=384, hidden_size=6, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=1, head_dim=6)  # fmt: skip
    once, twice = tmp_path / "once", tmp_path / "twice"
    save_folder(once, model, init_params(model, 0), first)
    save_folder(twice, model, init_params(model, 0), load_tokenizer(once))
    for saved in (once, twice):
        for name, text in TRAVELLERS.items():
            assert (saved / name).read_bytes() == text.encode()
        settings = json.loads((saved / "tokenizer_config.json").read_text())
        assert settings["pad_token"] == "<pad>" and settings["chat_template"] == "{{ 1 }}"
        assert settings["eos_token"] == "<|endoftext|>", "the one that ended the documents"
        assert json.loads((saved / "generation_config.json").read_text()) == sampling | {"eos_token_id": [5, 6, 0]}
        config = json.loads((saved / "config.json").read_text())
        assert config["bos_token_id"] == 300 and config["eos_token_id"] == 0
        assert load_tokenizer(saved).identity == first.identity
        same(saved)
    assert sorted(path.name for path in once.iterdir()) == sorted(path.name for path in twice.iterdir())


def test_a_tokenizer_trained_here_leaves_the_two_files_it_always_did(tmp_path):
    train_bpe(["ab"], 257).save(tmp_path)
    load_tokenizer(tmp_path).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
