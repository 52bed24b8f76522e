"""The configurations, weights and tokens of the tests: awkward sizes, norms away from one, O(1) activations.

No two of B=2 T=7 D=30 N=6 K=2 H=4 F=14 V=53 are equal, so no swapped axis survives; norm scales of exactly one would
hide swapped q_norm and k_norm, and short sequences hide wrong rotary frequencies.
"""

import dataclasses

import numpy as np

from recipe.config import ModelConfig, PrecisionConfig, RunConfig
from recipe.params import param_specs

FLOAT64 = PrecisionConfig(params="float64", compute="float64", newton_schulz="float64")
FLOAT32 = PrecisionConfig(params="float32", compute="float32", newton_schulz="float32")
BFLOAT16 = PrecisionConfig(params="float32", compute="bfloat16", newton_schulz="bfloat16")
PRECISIONS = {"float64": FLOAT64, "float32": FLOAT32, "bfloat16": BFLOAT16}

AWKWARD = ModelConfig(
    vocab_size=53,
    hidden_size=30,
    intermediate_size=14,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
)
ROWS, LENGTH = 2, 7

VARIANTS = {
    "plain": AWKWARD,
    "untied": dataclasses.replace(AWKWARD, tie_word_embeddings=False),
    "bias": dataclasses.replace(AWKWARD, attention_bias=True),
    "window": dataclasses.replace(AWKWARD, sliding_window=3, max_window_layers=1),
    "no-qk-norm": dataclasses.replace(AWKWARD, qk_norm=False),
    "square": dataclasses.replace(AWKWARD, hidden_size=24),
    "mha": dataclasses.replace(AWKWARD, num_key_value_heads=6),
    "everything": dataclasses.replace(
        AWKWARD, tie_word_embeddings=False, attention_bias=True, sliding_window=5, max_window_layers=2, dropout=0.1
    ),
}
"""Models by what is special about them."""


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float64 weights (exact in float32) that keep activations O(1): matrices and head N(0, 1/fan_in), embeddings and
    biases N(0, 1), norm scales 1 + 0.3 N(0, 1)."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, (shape, role) in param_specs(model).items():
        normal = generator.standard_normal(shape)
        scale = shape[-1] ** -0.5 if role in ("matrix", "head") else 1.0
        weight = 1.0 + 0.3 * normal if role == "norm" else scale * normal
        weights[name] = weight.astype(np.float32).astype(np.float64)
    if model.tie_word_embeddings:
        # A tied table is also the head: scaled so that logits stay O(1).
        name = "model.embed_tokens.weight"
        weights[name] = (weights[name] * model.hidden_size**-0.5).astype(np.float32).astype(np.float64)
    return weights


def random_tokens(model: ModelConfig, *shape: int, seed: int = 1) -> np.ndarray:
    """int32 tokens below the vocabulary, of the given shape."""
    return np.random.default_rng(seed).integers(0, model.vocab_size, shape).astype(np.int32)


def run_config(model: ModelConfig, precision: PrecisionConfig, **fields) -> RunConfig:
    """A small training run of this model: 3 micro-batches of 2 x 7 tokens per update unless told otherwise."""
    settings = dict(steps=10, accumulation=3, batch_size=ROWS, sequence_length=LENGTH) | fields
    return RunConfig(model=model, precision=precision, **settings)
