"""The job every worker gets, and what all of them must agree on before their times may stand in one table.

Imports no framework. Weights come from `recipe.params.init_params`, batches from `make_batch`; a worker reports the
fingerprints of what actually arrived in its framework.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from recipe.config import RunConfig, from_dict, require, to_dict
from recipe.contract import (
    NOT_THERE,
    UNIT_ROUNDOFF,
    PrecisionContract,
    openmp_threads,
    require_same,
    xla_threads,
)
from recipe.params import newton_schulz_flops, param_counts, train_flops_per_token
from recipe.presets import get_preset

MUST_AGREE = (
    *("backend", "threads", "params", "compute", "newton_schulz", "matmul"),
    *("dropout", "tokens_per_update", "weights", "batches"),
)
"""Fields of a worker's contract that must be the same in all workers; the others are recorded only."""

MAKE_ALIKE = "Nothing was timed; make them agree (threads: --threads, OMP_NUM_THREADS, XLA_FLAGS) or drop a mode."


@dataclasses.dataclass(frozen=True)
class WorkContract(PrecisionContract):
    """What a worker computes with, and the work that arrived in it."""

    loss: str
    """How many logits are held at once, and in what dtype."""
    tokens_per_update: int | str = NOT_THERE
    weights: str = NOT_THERE
    batches: str = NOT_THERE
    """Fingerprints; the worker's loop adds them."""


FLOP_FORMULA = (
    "FLOPs of an update = tokens * (6 * weights of all matrix products, head included + "
    "12 * layers * heads * head_dim * mean keys a query sees, causal half only) + "
    "Newton-Schulz steps * sum over matrices n x m, n <= m, of (4 n^2 m + 2 n^3); a multiply-add counts 2"
)

ROUNDS_THE_LOSS = "-lce"
"""How the modes end whose loss is torch's linear_cross_entropy, which rounds it to the compute dtype."""

PARTS = {
    "optimizer": "clip, Muon and AdamW",
    "newton_schulz": "Newton-Schulz within it",
    "cross_entropy": "head and loss, forward and backward",
    "attention": "scores to weighted values, forward and backward",
}
"""The parts of an update that are timed alone."""

# Values stored in the compute dtype one after another along a block: norm, projection, QK-norm, RoPE, probabilities,
# weighted values, output projection, residual sum; norm, gate, SiLU, product, down projection, residual sum.
STORED_PER_BLOCK = 14


def resolve(
    preset: str,
    *,
    batch_size: int | None,
    sequence_length: int | None,
    accumulation: int | None,
    overrides: str,
    **rest,
) -> RunConfig:
    """The preset with the benchmark's settings over it; `rest` holds dropout, seed and the precision's fields.

    None is the preset's own size or dropout.
    """
    values = to_dict(get_preset(preset))
    sizes = {"batch_size": batch_size, "sequence_length": sequence_length, "accumulation": accumulation}
    values |= {name: size for name, size in sizes.items() if size is not None} | {"seed": rest["seed"], "out": ""}
    if rest["dropout"] is not None:
        values["model"]["dropout"] = rest["dropout"]
    values["precision"] |= {
        "params": "float32",
        **{name: rest[name] for name in ("compute", "newton_schulz", "matmul", "attention")},
    }
    try:
        extra = json.loads(overrides or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--overrides {overrides} is not JSON ({error}); write e.g. {_EXAMPLE}.") from None
    for name, value in extra.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            unknown = sorted(value.keys() - values[name].keys())
            require(not unknown, f"--overrides has no field {name}.{unknown[:1]}; write e.g. {_EXAMPLE}.")
            values[name] |= value
        else:
            require(name in values, f"--overrides has no field {name!r}; write e.g. {_EXAMPLE}.")
            values[name] = value
    return from_dict(values)


_EXAMPLE = """'{"model": {"num_hidden_layers": 1}}'"""


def make_batch(config: RunConfig, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (A, B, T), int32: random tokens, a pure function of the seed and the index."""
    generator = np.random.Generator(np.random.Philox(key=[config.seed, index]))
    shape = (config.accumulation, config.batch_size, config.sequence_length + 1)
    tokens = generator.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return np.ascontiguousarray(tokens[..., :-1]), np.ascontiguousarray(tokens[..., 1:])


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """CRC-32 over names, shapes, dtypes and bytes, in the order of the names."""
    crc = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        crc = zlib.crc32(f"{name} {array.shape} {array.dtype}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8), crc)
    return f"{crc:08x}"


def flops_per_update(config: RunConfig) -> float:
    """Operations of one update as `FLOP_FORMULA` states; elementwise work and recomputation count nothing."""
    per_token = train_flops_per_token(config.model, config.sequence_length)
    return config.tokens_per_step * per_token + newton_schulz_flops(config.model, config.muon.ns_steps)


def part_flops(config: RunConfig) -> dict[str, float]:
    """The share of each of `PARTS` in `flops_per_update`; the optimizer's elementwise work counts nothing."""
    model, tokens = config.model, config.tokens_per_step
    newton_schulz = newton_schulz_flops(model, config.muon.ns_steps)
    # All that `train_flops_per_token` counts beside attention is 6 per weight of a product, the tied head included.
    products = param_counts(model).muon + model.vocab_size * model.hidden_size
    attention = train_flops_per_token(model, config.sequence_length) - 6.0 * products
    return {
        "optimizer": newton_schulz,
        "newton_schulz": newton_schulz,
        "cross_entropy": tokens * 6.0 * model.vocab_size * model.hidden_size,
        "attention": tokens * attention,
    }


def check_foreseen(config: RunConfig, modes: Sequence[str], *, cpus: int, on_gpu: bool) -> None:
    """Raise `UserError` for what settings and environment tell before any worker starts; `cpus` is what each may use.

    What the workers find is checked by `check_contracts`, half a minute later.
    """
    needs_torch = [mode for mode in modes if mode != "jax"]
    for package, users in {"torch": needs_torch, "transformers": [mode for mode in modes if mode == "hf"]}.items():
        if users and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"mode {users[0]} needs {package}", name=package)
    chunked = [mode for mode in modes if mode.endswith(ROUNDS_THE_LOSS)]
    if chunked:
        version = importlib.metadata.version("torch")
        require(
            tuple(map(int, version.split(".")[:2])) >= (2, 13),
            f"mode {chunked[0]} needs torch's linear_cross_entropy in chunks, which torch {version} lacks; install "
            "torch 2.13 or drop the mode.",
        )
    if "seed" in modes:
        require(config.model.sliding_window is None, "mode seed has no sliding window; drop the mode or the window.")
        decay = config.muon.weight_decay
        require(decay == 0, f"mode seed has no muon.weight_decay={decay}; set it to 0 or drop the mode.")
    compiled = [mode for mode in modes if mode.startswith("torch-compile") or mode == "seed"]
    if compiled and not on_gpu and os.environ.get("TORCHDYNAMO_DISABLE", "0") == "0":
        require(
            any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
            f"mode {compiled[0]} needs a C++ compiler, and there is none here; install g++ or leave the mode out, "
            "e.g. --modes jax,torch-eager.",
        )
    sides = [
        foreseen(
            mode,
            # torch.optim.Muon iterates in bfloat16 whatever the parameters are.
            newton_schulz="bfloat16" if mode == "hf" else config.precision.newton_schulz,
            threads=NOT_THERE if on_gpu else foreseen_threads("jax" if mode == "jax" else "torch", cpus),
        )
        for mode in modes
    ]
    require_same(*sides, fields=("threads", "newton_schulz"), remedy=MAKE_ALIKE)


def foreseen_threads(framework: str, cpus: int) -> str:
    """Compute threads that a worker of this framework will have on so many CPUs in this environment."""
    return str({"jax": xla_threads, "torch": openmp_threads}[framework](cpus))


def foreseen(side: str, **known: str) -> PrecisionContract:
    """A contract of what is known of a side before it runs."""
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(PrecisionContract)), NOT_THERE)
    return PrecisionContract(**nothing | {"side": side} | known)


def check_contracts(contracts: Mapping[str, Mapping]) -> None:
    """Raise ValueError naming every field of `MUST_AGREE` on which the modes differ."""
    sides = [WorkContract(**{**contract, "side": mode}) for mode, contract in contracts.items()]
    require_same(*sides, fields=MUST_AGREE, remedy=MAKE_ALIKE)


def rounding_error(config: RunConfig) -> float:
    """Expected relative error of the last hidden state in the compute dtype, roundings taken as independent.

    Each stored value adds u^2 to the variance, each sum of K products K/2 times the square of float32's u (K partial
    sums, the k-th of size sqrt(k), against a result of size sqrt(K)).
    """
    model = config.model
    heads = model.num_attention_heads * model.head_dim
    sums = 2 * model.hidden_size + model.head_dim + config.sequence_length + heads + model.intermediate_size
    stored, added = UNIT_ROUNDOFF[config.precision.compute] ** 2, UNIT_ROUNDOFF["float32"] ** 2 / 2
    block = STORED_PER_BLOCK * stored + sums * added
    return math.sqrt(model.num_hidden_layers * block + 2 * stored + model.hidden_size * added)


def first_update_allowances(
    config: RunConfig, firsts: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, float]:
    """How far two correct sides may differ: the first loss, absolute in nats, and its gradient's norm, relative.

    Loss: its derivatives by a token's logits sum to at most 2 in size, the logits of fresh weights have deviation
    sqrt(D) * initializer_range, and the float32 sums over V and over the tokens add their own part; no credit is
    taken for averaging over tokens. Gradient: three products for each of the forward pass, and the norm's own sum of
    P squares in float32, whose k-th partial sum is k/P of the whole: u sqrt(P/3), halved by the root. Twice, for two
    sides. `firsts` are the first updates by mode: a loss that a mode rounds may be off by its unit roundoff more.
    """
    model, error, unit = config.model, rounding_error(config), UNIT_ROUNDOFF["float32"]
    logits = math.sqrt(model.hidden_size) * model.initializer_range
    sums = math.sqrt(model.vocab_size) + math.sqrt(config.tokens_per_step) * math.log(model.vocab_size)
    norm = math.sqrt(3) * error + unit * math.sqrt(param_counts(model).total / 3) / 2
    rounded = [first["loss"] for mode, first in (firsts or {}).items() if mode.endswith(ROUNDS_THE_LOSS)]
    loss = 2 * (2 * logits * error + unit * sums) + UNIT_ROUNDOFF[config.precision.compute] * max(rounded, default=0.0)
    return {"loss": loss, "grad_norm": 2 * norm}


def check_first_updates(config: RunConfig, firsts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the largest differences of loss and gradient norm; raise ValueError if one exceeds its allowance."""
    losses, norms = (np.array([first[key] for first in firsts.values()]) for key in ("loss", "grad_norm"))
    # NumPy's extremes hand a nan on, Python's may lose it.
    differences = {"loss": float(losses.max() - losses.min()), "grad_norm": float(norms.max() / norms.min() - 1)}
    for key, allowed in first_update_allowances(config, firsts).items():
        values = ", ".join(f"{first[key]:.9g} in {mode}" for mode, first in firsts.items())
        require(
            bool(differences[key] <= allowed),  # false for nan
            f"these workers do not compute the same thing: the first update's {key} is {values}, a difference of "
            f"{differences[key]:.3g} where rounding explains {allowed:.3g}. Nothing was compared; mend one side.",
        )
    return differences
