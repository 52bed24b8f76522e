"""Tokenizers: a byte-level BPE trained here, or anybody's tokenizer.json, through the `tokenizers` library.

`transformers` is not used: its AutoTokenizer would load torch into a JAX process.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from recipe.config import UserError, require
from recipe.hub import NotHad, tokenizer_folder
from recipe.reading import LARGEST_JSON, parse_json, read_json, short, take
from recipe.tokenizer_settings import END_OF_TEXT, add_tokens, encodable, read_settings, refuse_settings, special_tokens

# What other tokenizers call the end of a text, most specific first.
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")

LARGEST_ID = 10_000_000
"""No model has so many rows; published vocabularies end below 300,000."""

TRAVEL = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Files that stand beside a tokenizer.json and go where it goes, with additional_chat_templates/*.jinja."""
MORE_TEMPLATES = "additional_chat_templates"


class Tokenizer:
    """Text to token ids and back; `eos_id` ends a document.

    What a tokenizer.json stores of truncation, padding and BPE-dropout is switched off, so that a text has one encoding
    and a whole one. `companions` are the files that came beside it (name -> text), which `save` writes again.
    """

    def __init__(
        self,
        rust: RustTokenizer,
        eos_token: str,
        *,
        bos_token: str | None = None,
        companions: Mapping[str, str] | None = None,
    ) -> None:
        rust.no_truncation()
        rust.no_padding()
        if getattr(rust.model, "dropout", None) is not None:
            rust.model.dropout = None
        self.rust = rust
        self.eos_token, self.bos_token = eos_token, bos_token
        self.eos_id = cast(int, rust.token_to_id(eos_token))  # callers name a token it has
        self.bos_id = None if bos_token is None else rust.token_to_id(bos_token)
        self.companions = dict(companions or {})

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the largest id and one. Ids may have holes, and prompts ids of their own."""
        return 1 + max(*self.rust.get_vocab(with_added_tokens=True).values(), *self.encode_prompt(""), 0)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as they are stored: a byte is at most one."""
        return max(map(len, self.rust.get_vocab(with_added_tokens=True)))

    @property
    def identity(self) -> str:
        """The whole tokenizer as text, for cache keys."""
        return self.rust.to_str() + self.eos_token

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without any special tokens around them: a document's, or those of a rendered chat."""
        return self.rust.encode(encodable(text), add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue, with the special tokens that the tokenizer puts around one, such as BOS."""
        return self.rust.encode(encodable(text), add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` has them, in parallel."""
        encodings = self.rust.encode_batch_fast(list(map(encodable, texts)), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out."""
        return self.rust.decode(list(ids))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, the files that came beside it, and what AutoTokenizer needs in tokenizer_config.json.

        A setting that came with the tokenizer stays; absent ones are the class and the end-of-text token used here.
        """
        folder = Path(folder)
        for name, text in self.companions.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="")
        (folder / "tokenizer.json").write_text(self.rust.to_str(), encoding="utf-8")
        # Without the class, a folder whose model_type is qwen3 would be opened as Qwen2Tokenizer.
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "pad_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        theirs = parse_json(self.companions.get("tokenizer_config.json", "{}"), "tokenizer_config.json")
        settings |= {name: value for name, value in theirs.items() if value is not None or name not in settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of these texts: end-of-text is token 0, every byte has a token; deterministic."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer)
    return Tokenizer(rust, END_OF_TEXT)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """A tokenizer.json, a folder that holds one, or a name on the Hugging Face Hub; UserError if it is none of them.

    Special tokens that only the files beside it name are added as transformers adds them.
    """
    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        require(not path.exists(), f"{source} holds no tokenizer.json; name a folder that does, or the file itself.")
        file = _from_hub(str(source)) / "tokenizer.json"
    folder = file.parent
    _check_prefix(file)
    try:
        rust = RustTokenizer.from_file(str(file))
    except BaseException as error:  # the library raises bare Exception, and its panics are not even that
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = short(str(error))
        raise UserError(f"{file} is not a tokenizer.json ({reason}); name one written by tokenizers.") from None
    settings = read_settings(folder)
    where = str(folder)
    refuse_settings(settings, rust, where)
    add_tokens(rust, settings, where)
    rust.encode_special_tokens = take(settings, "split_special_tokens", bool, where, False)
    ids = rust.get_vocab(with_added_tokens=True).values()
    require(
        0 <= max(ids, default=-1) < LARGEST_ID,
        f"tokenizer {source} has {len(ids):,} tokens with ids up to {max(ids, default=0):,}; there must be some, below "
        f"{LARGEST_ID:,}. Fetch it again.",
    )
    if len(set(ids)) <= max(ids):  # The library numbers an added token by a count, which holes put out of step.
        whole = rust.to_str()
        try:
            again = RustTokenizer.from_str(whole).to_str()
        except Exception as error:  # the library raises bare Exception, for what it wrote itself
            again = short(str(error))
        require(again == whole, f"tokenizer {source} has holes in its ids, and other ids once it is saved; mend it.")
    named = special_tokens(settings, where)
    candidates = [named.get("eos_token"), *END_NAMES]
    eos = next((token for token in candidates if token and rust.token_to_id(token) is not None), None)
    if eos is None:
        raise UserError(f"tokenizer {source} has no end-of-text token (looked for {', '.join(END_NAMES)}); add one.")
    return Tokenizer(rust, eos, bos_token=named.get("bos_token"), companions=_companions(folder))


def _check_prefix(file: Path) -> None:
    """Raise UserError for a BPE whose merges lack its continuing_subword_prefix: the library cuts so many bytes off
    them unseen, and where that splits a character it ends the process."""
    if re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', file.read_bytes()) is None:
        return
    model = take(read_json(file), "model", dict, str(file), {})
    prefix, merges = model.get("continuing_subword_prefix"), take(model, "merges", list, f"{file}: model", [])
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    require(
        not isinstance(prefix, str)
        or all(isinstance(pair, list) and len(pair) == 2 and str(pair[1]).startswith(prefix) for pair in pairs),
        f"{file}: a merge continues a word without continuing_subword_prefix={short(repr(prefix))}; set that to null.",
    )


def _from_hub(name: str) -> Path:
    """The folder of a tokenizer on the Hub."""
    try:
        return tokenizer_folder(name)
    except NotHad as reason:
        raise UserError(
            f"tokenizer {short(name, 300)} is neither a file nor reachable on the Hugging Face Hub ({reason}); "
            "pass --data.tokenizer bpe, or the path of a tokenizer.json."
        ) from None


def _companions(folder: Path) -> dict[str, str]:
    """The files of TRAVEL that a folder holds."""
    found: dict[str, str] = {}
    for file in [folder / name for name in TRAVEL] + more_templates(folder):
        if file.is_file():
            found[str(file.relative_to(folder))] = utf8_text(file)
    return found


def utf8_text(file: Path) -> str:
    """A UTF-8 text file, line ends as they are; UserError if it is none or longer than any of its kind."""
    require(file.stat().st_size <= LARGEST_JSON, f"{file} is longer than any file of its kind; fetch it again.")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}); save it again.") from None


def more_templates(folder: Path) -> list[Path]:
    """The chat templates that a folder has besides its main one."""
    return sorted((folder / MORE_TEMPLATES).glob("*.jinja"))


def library_version() -> str:
    """Version of `tokenizers`, on which a trained BPE may depend."""
    return tokenizers.__version__
