"""Tokenizers: a byte-level BPE trained here, or anybody's tokenizer.json, through the `tokenizers` library.

`transformers` is not used: its AutoTokenizer would load torch into a JAX process.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from recipe.config import UserError, require
from recipe.reading import read_json, take

END_OF_TEXT = "<|endoftext|>"
# What other tokenizers call the end of a text, most specific first.
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")


class Tokenizer:
    """Text to token ids and back; `eos_id` ends a document."""

    def __init__(self, rust: RustTokenizer, eos_token: str) -> None:
        self.rust = rust
        self.eos_token = eos_token
        self.eos_id = cast(int, rust.token_to_id(eos_token))  # callers name a token it has

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.rust.get_vocab_size(with_added_tokens=True)

    @property
    def identity(self) -> str:
        """The whole tokenizer as text, for cache keys."""
        return self.rust.to_str() + self.eos_token

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without any special tokens around them."""
        return self.rust.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in parallel."""
        return [encoding.ids for encoding in self.rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out."""
        return self.rust.decode(list(ids))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and a tokenizer_config.json that transformers' AutoTokenizer opens."""
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(self.rust.to_str(), encoding="utf-8")
        # Without the class, a folder whose model_type is qwen3 would be opened as Qwen2Tokenizer.
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "pad_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
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
    """A tokenizer.json, a folder that holds one, or a name on the Hugging Face Hub; UserError if it is none of them."""
    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            rust = RustTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is not a tokenizer.json ({error}); name one written by tokenizers.") from None
        folder = file.parent
    else:
        require(not path.exists(), f"{source} holds no tokenizer.json; name a folder that does, or the file itself.")
        rust, folder = _from_hub(str(source)), None
    return Tokenizer(rust, _eos_token(rust, folder, str(source)))


def _from_hub(name: str) -> RustTokenizer:
    try:
        return RustTokenizer.from_pretrained(name)
    except Exception as error:  # offline, unknown, private: the library raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer {name} is neither a file nor reachable on the Hugging Face Hub ({reason}); "
            "pass --data.tokenizer bpe, or the path of a tokenizer.json."
        ) from None


def _eos_token(rust: RustTokenizer, folder: Path | None, source: str) -> str:
    """The end-of-text token: what tokenizer_config.json says, else the first usual name that the tokenizer knows."""
    settings_file = folder / "tokenizer_config.json" if folder else None
    candidates = list(END_NAMES)
    if settings_file is not None and settings_file.is_file():
        eos = take(read_json(settings_file), "eos_token", str | dict | None, str(settings_file), None)
        if isinstance(eos, dict):
            eos = take(eos, "content", str, f"{settings_file}: eos_token")
        candidates[:0] = [] if eos is None else [eos]
    for token in candidates:
        if rust.token_to_id(token) is not None:
            return token
    raise UserError(f"tokenizer {source} has no end-of-text token (looked for {', '.join(END_NAMES)}); add one.")


def library_version() -> str:
    """Version of `tokenizers`, on which a trained BPE may depend."""
    return tokenizers.__version__
