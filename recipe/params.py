"""The parameter contract: Hugging Face name -> shape and role, the initial weights, the counts, the FLOPs.

Shapes are torch's, (fan_out, fan_in) = (O, I); `weights.py` of each framework translates from here.
"""

import zlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from recipe.config import AdamWConfig, ModelConfig, require
from recipe.reading import some

Role = Literal["matrix", "embedding", "head", "norm", "bias"]


class ParamSpec(NamedTuple):
    """Shape of one parameter and what it is to the optimizers."""

    shape: tuple[int, ...]
    role: Role


class ParamCounts(NamedTuple):
    """Number of parameters: all, those under Muon, those under AdamW."""

    total: int
    muon: int
    adamw: int


def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the model by its Hugging Face name, in the order of the forward pass."""
    hidden, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, key_value = config.num_attention_heads * head, config.num_key_value_heads * head
    specs = {"model.embed_tokens.weight": ParamSpec((config.vocab_size, hidden), "embedding")}
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}."
        specs[block + "input_layernorm.weight"] = ParamSpec((hidden,), "norm")
        projections = {"q": (query, hidden), "k": (key_value, hidden), "v": (key_value, hidden), "o": (hidden, query)}
        for name, shape in projections.items():
            specs[block + f"self_attn.{name}_proj.weight"] = ParamSpec(shape, "matrix")
            if config.attention_bias:
                specs[block + f"self_attn.{name}_proj.bias"] = ParamSpec(shape[:1], "bias")
        if config.qk_norm:
            specs[block + "self_attn.q_norm.weight"] = ParamSpec((head,), "norm")
            specs[block + "self_attn.k_norm.weight"] = ParamSpec((head,), "norm")
        specs[block + "post_attention_layernorm.weight"] = ParamSpec((hidden,), "norm")
        specs[block + "mlp.gate_proj.weight"] = ParamSpec((ffn, hidden), "matrix")
        specs[block + "mlp.up_proj.weight"] = ParamSpec((ffn, hidden), "matrix")
        specs[block + "mlp.down_proj.weight"] = ParamSpec((hidden, ffn), "matrix")
    specs["model.norm.weight"] = ParamSpec((hidden,), "norm")
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = ParamSpec((config.vocab_size, hidden), "head")
    return specs


def init_params(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Initial weights in float32: norms one, biases zero, the rest normal with deviation `initializer_range`.

    Each array has a generator of its own, keyed by (seed, name), so adding a parameter moves no other.
    """
    weights = {}
    for name, (shape, role) in param_specs(config).items():
        if role == "norm":
            weights[name] = np.ones(shape, np.float32)
        elif role == "bias":
            weights[name] = np.zeros(shape, np.float32)
        else:
            generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
            weights[name] = generator.standard_normal(shape, np.float32) * np.float32(config.initializer_range)
    return weights


def shapes_of(tensors: Mapping[str, np.ndarray]) -> Mapping[str, tuple[int, ...]]:
    """Shape by name; a mapping that knows its `shapes`, as one of tensors on disk does, reads none for it."""
    known = getattr(tensors, "shapes", None)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()} if known is None else known


def shape_problems(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unexpected or misshapen among these shapes, one phrase each with a few names and their count."""
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in shapes]
    unexpected = [f"{name} {shape}" for name, shape in shapes.items() if name not in expected]
    misshapen = [
        f"{name} {shapes[name]} for {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    return [f"{kind} {some(names)}" for kind, names in found.items() if names]


def expected_shapes(config: ModelConfig, stored: int, where: str) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name; UserError, before a name is made, if there are fewer tensors than layers."""
    layers = config.num_hidden_layers
    require(
        layers <= stored,
        f"{where} holds {stored:,} tensors, too few for num_hidden_layers={layers:,}; use the config.json of these "
        "weights.",
    )
    return {name: spec.shape for name, spec in param_specs(config).items()}


def check_weights(weights: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    """Raise UserError with all that is missing, unexpected and misshapen at once; reads none from disk."""
    wrong = shape_problems(shapes_of(weights), expected_shapes(config, len(weights), "the model"))
    require(
        not wrong, "the weights do not fit the model: " + "; ".join(wrong) + ". Use the config.json they came with."
    )


def decays(role: Role, config: AdamWConfig) -> bool:
    """Whether AdamW's weight decay pulls on parameters of this role: embeddings and head, the rest if asked."""
    return role in ("embedding", "head") or config.decay_norms


def slot_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every optimizer slot: mu.NAME of the matrices, exp_avg.NAME and exp_avg_sq.NAME of the rest."""
    specs = param_specs(config)
    shapes = {f"mu.{name}": spec.shape for name, spec in specs.items() if spec.role == "matrix"}
    for slot in ("exp_avg", "exp_avg_sq"):
        shapes |= {f"{slot}.{name}": spec.shape for name, spec in specs.items() if spec.role != "matrix"}
    return shapes


def param_counts(config: ModelConfig) -> ParamCounts:
    """Parameters in all, under Muon (role matrix) and under AdamW (every other role)."""
    specs = param_specs(config).values()
    total = sum(int(np.prod(spec.shape)) for spec in specs)
    muon = sum(int(np.prod(spec.shape)) for spec in specs if spec.role == "matrix")
    return ParamCounts(total, muon, total - muon)


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward per token, a multiply-add counting two.

    6 per weight of every matrix product (the head included, the embedding look-up not), and for attention
    12 * heads * head_dim * (keys a query sees on average), the causal half only; recomputation is not counted.
    """
    specs = param_specs(config)
    weights = sum(int(np.prod(spec.shape)) for spec in specs.values() if spec.role == "matrix")
    weights += config.vocab_size * config.hidden_size
    positions = np.arange(1, sequence_length + 1)
    keys = 0.0
    for layer in range(config.num_hidden_layers):
        window = config.window_of_layer(layer)
        keys += float(np.mean(positions if window is None else np.minimum(positions, window)))
    return 6.0 * weights + 12.0 * config.num_attention_heads * config.head_dim * keys


def newton_schulz_flops(config: ModelConfig, ns_steps: int = 5) -> float:
    """Operations of one update's Newton-Schulz: steps * (4 n^2 m + 2 n^3) per matrix of sides n <= m."""
    flops = 0.0
    for shape, role in param_specs(config).values():
        if role == "matrix":
            n, m = sorted(shape)
            flops += ns_steps * (4.0 * n * n * m + 2.0 * n**3)
    return flops
