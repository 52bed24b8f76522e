"""Presets: each returns a `RunConfig`. `--preset NAME` starts from one; every field can still be overridden."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recipe.config import AdamWConfig, DataConfig, ModelConfig, MuonConfig, PrecisionConfig, RunConfig, require, to_dict
from recipe.reading import flat, short


def tiny() -> RunConfig:
    """Minutes on a laptop's CPU: `make train`, or `python train_jax.py --preset tiny`.

    Measured on two shared cores of an AMD EPYC 7003: 8.2 minutes, some 3,000 tokens/s, 4.45 nats per token and 2.04
    bits per byte on the held-out plays.
    """
    return RunConfig(
        preset="tiny",
        steps=320,
        batch_size=16,
        sequence_length=256,
        eval_every=50,
        model=ModelConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
        ),
        muon=MuonConfig(learning_rate=0.02),
        adamw=AdamWConfig(learning_rate=0.004),
        # Many CPUs have no bfloat16 units, and emulating them is slower than float32.
        precision=PrecisionConfig(newton_schulz="float32"),
    )


def seed() -> RunConfig:
    """The seed notebook's model and recipe, corrected (docs/notebook.md): `python train_jax.py --preset seed`.

    32,150,976 parameters, 13,271,040 of them under Muon. 500 updates are the notebook's 2,000 micro-batches.
    Meant for a GPU; its corpus is on the Hugging Face Hub, so offline add `--data.corpus shakespeare`
    and `--data.tokenizer bpe`.
    """
    return RunConfig(
        preset="seed",
        steps=500,
        accumulation=4,
        batch_size=24,
        sequence_length=512,
        eval_every=125,
        model=ModelConfig(
            vocab_size=49_152,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=48,
            max_position_embeddings=512,
            dropout=0.1,
        ),
        muon=MuonConfig(learning_rate=0.01),
        adamw=AdamWConfig(learning_rate=0.001, weight_decay=0.1),
        data=DataConfig(
            corpus="hub:HuggingFaceTB/smollm-corpus/cosmopedia-v2",
            tokenizer="HuggingFaceTB/SmolLM-135M",
            max_documents=2_000,
            max_characters=3_000,
            max_tokens=500_000,
            validation_fraction=0.1,
        ),
        precision=PrecisionConfig(compute="bfloat16", attention="fused"),
        prompts=("The history of", "Once upon a time", "In this section"),
    )


def _qwen3(name: str, *, hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> RunConfig:
    return RunConfig(
        preset=name,
        steps=1_000,
        accumulation=4,
        batch_size=8,
        sequence_length=2_048,
        model=ModelConfig(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40_960,
            rope_theta=1_000_000.0,
            tie_word_embeddings=tied,
        ),
        data=DataConfig(tokenizer="Qwen/Qwen3-0.6B"),
        precision=PrecisionConfig(compute="bfloat16", attention="fused"),
    )


def qwen3_0_6b() -> RunConfig:
    """Qwen3-0.6B's shape: 596,049,920 parameters."""
    return _qwen3("qwen3-0.6b", hidden=1024, ffn=3072, layers=28, heads=16, tied=True)


def qwen3_1_7b() -> RunConfig:
    """Qwen3-1.7B's shape."""
    return _qwen3("qwen3-1.7b", hidden=2048, ffn=6144, layers=28, heads=16, tied=True)


def qwen3_4b() -> RunConfig:
    """Qwen3-4B's shape."""
    return _qwen3("qwen3-4b", hidden=2560, ffn=9728, layers=36, heads=32, tied=True)


def qwen3_8b() -> RunConfig:
    """Qwen3-8B's shape."""
    return _qwen3("qwen3-8b", hidden=4096, ffn=12288, layers=36, heads=32, tied=False)


def qwen3_14b() -> RunConfig:
    """Qwen3-14B's shape."""
    return _qwen3("qwen3-14b", hidden=5120, ffn=17408, layers=40, heads=40, tied=False)


def qwen3_32b() -> RunConfig:
    """Qwen3-32B's shape."""
    return _qwen3("qwen3-32b", hidden=5120, ffn=25600, layers=64, heads=64, tied=False)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "seed": seed,
    "qwen3-0.6b": qwen3_0_6b,
    "qwen3-1.7b": qwen3_1_7b,
    "qwen3-4b": qwen3_4b,
    "qwen3-8b": qwen3_8b,
    "qwen3-14b": qwen3_14b,
    "qwen3-32b": qwen3_32b,
}


def get_preset(name: str) -> RunConfig:
    """The preset of that name; an unknown one raises `ValueError` naming the nearest."""
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
    require(
        name in PRESETS, f"--preset {name} is unknown; did you mean {nearest[0]}? The presets are {', '.join(PRESETS)}."
    )
    return PRESETS[name]()


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with these fields changed, as in `changed(tiny(), {"steps": 20, "model": {"dropout": 0.1}})`.

    A list stands for a tuple, as in JSON and TOML; of a section only the fields named change. Every value is checked as
    that of a flag is; an unknown field is a `UserError` that names the nearest.
    """
    return _changed(config, changes, "", list(flat(to_dict(config))))


def _changed(part: Any, changes: Mapping[str, Any], prefix: str, known: list[str]) -> Any:
    """A configuration or a section of it, whose name and a dot are `prefix`, with these fields changed."""
    fields = [field.name for field in dataclasses.fields(part)]
    values = {}
    for name, value in changes.items():
        full = short(f"{prefix}{name}")
        near = nearest_fields(f"{prefix}{name}", known) if name not in fields else []
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(fields)}."
        require(name in fields, f"{full} is no field of a configuration; {hint}")
        old = getattr(part, name)
        if dataclasses.is_dataclass(old) and not isinstance(value, type(old)):
            inner = next(field for field in known if field.startswith(f"{name}."))
            require(
                isinstance(value, Mapping),
                f"{full}={short(repr(value))} must be an object with fields such as {inner}; name the one to change.",
            )
            value = _changed(old, value, f"{name}.", known)
        values[name] = tuple(value) if isinstance(old, tuple) and isinstance(value, list) else value
    return dataclasses.replace(part, **values)


def nearest_fields(name: str, known: Iterable[str]) -> list[str]:
    """The dotted names in `known` that end alike (`learning_rate` has two) or have these initials (`lr`), else the one
    spelt most alike; none if none is near."""
    last = name.rpartition(".")[2]
    ends = {field: field.rpartition(".")[2] for field in known}
    same = [field for field, end in ends.items() if end == last]
    initials = [f for f, end in ends.items() if len(last) > 1 and "".join(w[0] for w in end.split("_")) == last]
    return same or initials or difflib.get_close_matches(name, ends, n=1, cutoff=0.8)
