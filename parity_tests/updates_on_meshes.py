"""Whole updates on meshes of eight host devices: `python -m parity_tests.updates_on_meshes FOLDER CASE ...`.

XLA_FLAGS must ask for eight devices. Of each case, NAME.npz holds what `record` of the reference holds after each
update, and cases.json what its program sends, how many programs there were, and where things lie; stderr has a line
before each case.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from jax_impl import sharding, train
from jax_impl.traffic import sent
from jax_impl.weights import optimizer_slots, to_hf
from parity_tests.cases import FLOAT32, FLOAT64, random_tokens, random_weights, run_config
from parity_tests.collectives import collectives
from recipe.config import AdamWConfig, ModelConfig, MuonConfig, PrecisionConfig, RunConfig
from recipe.mesh import parse_mesh

DIVIDES = ModelConfig(
    vocab_size=136,
    hidden_size=24,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=6,
    max_position_embeddings=64,
    dropout=0.1,
)
"""Every axis divides by eight, and no two are of one size."""
OTHER = dataclasses.replace(
    DIVIDES, tie_word_embeddings=False, attention_bias=True, sliding_window=5, max_window_layers=1, dropout=0.0
)
UNEVEN = dataclasses.replace(
    DIVIDES, vocab_size=135, intermediate_size=62, num_attention_heads=6, num_key_value_heads=3, qk_norm=False
)
"""No axis but the hidden one divides by two: the feed-forward layer for the sake of its dropout."""
MODELS = {"divides": DIVIDES, "other": OTHER, "uneven": UNEVEN}
REMAT = dataclasses.replace(FLOAT64, remat=True)
CASES: dict[str, tuple[str, str, str, PrecisionConfig]] = {
    "data": ("divides", "data=8", "update", FLOAT64),
    "fsdp": ("divides", "fsdp=8", "update", FLOAT64),
    "data-fsdp": ("divides", "data=2,fsdp=4", "update", FLOAT64),
    "tensor": ("divides", "tensor=8", "update", FLOAT64),
    "all": ("divides", "data=2,fsdp=2,tensor=2", "update", FLOAT64),
    "by-layer": ("divides", "fsdp=4,tensor=2", "layer", FLOAT64),
    "other": ("other", "data=2,fsdp=2,tensor=2", "layer", REMAT),
    "uneven": ("uneven", "data=2,fsdp=2,tensor=2", "update", FLOAT64),
    "half": ("divides", "fsdp=4,tensor=2", "update", dataclasses.replace(FLOAT32, compute="bfloat16")),
}
"""Model, mesh, gather and precision."""
UPDATES = 3
ROWS, LENGTH = 8, 41
"""With them the loss is two chunks where a device has all rows, the second one padded."""


def config_of(case: str) -> RunConfig:
    """Accumulation, a clip that clips, both optimizers, warm-up and cosine."""
    model, mesh, gather, precision = CASES[case]
    return run_config(
        MODELS[model],
        precision,
        steps=10,
        accumulation=2,
        batch_size=ROWS,
        sequence_length=LENGTH,
        clip_norm=0.5,
        seed=3,
        muon=MuonConfig(learning_rate=0.02),
        adamw=AdamWConfig(learning_rate=0.01),
        mesh=mesh,
        gather=gather,
    )


def batches(model: ModelConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of each update."""
    shape = 2, ROWS, LENGTH
    return [tuple(random_tokens(model, *shape, seed=10 + 2 * step + which) for which in (0, 1))
            for step in range(UPDATES)]  # fmt: skip


def run(case: str, folder: Path) -> dict:
    """Facts of one case; what its updates gave goes to a file."""
    print(f"== {case}", file=sys.stderr, flush=True)
    config = config_of(case)
    shape = parse_mesh(config.mesh)
    assert shape is not None
    mesh, layout = sharding.make_mesh(shape), sharding.layout_of(config)
    state = train.init_state(config, random_weights(config.model), mesh)
    step = train.make_train_step(config, mesh)
    began = jax.tree.map(lambda x: x.sharding, state)
    history, facts = {}, {}
    for number, batch in enumerate(batches(config.model)):
        batch = sharding.placed(mesh, *batch)
        if not facts:
            with jax.default_matmul_precision(config.precision.matmul):  # as `step` compiles it, so only once
                compiled = step.__wrapped__.lower(state, *batch).compile()
            facts = {
                "collectives": collectives(compiled.as_text()),
                "arguments": compiled.memory_analysis().argument_size_in_bytes,
                "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            }
        state, metrics = step(state, *batch)
        entry = {name: np.array(float(value)) for name, value in metrics.items()} | to_hf(state.params)
        slots = optimizer_slots(state.opt_state)
        entry |= {f"{slot} {name}": array for slot, arrays in slots.items() for name, array in arrays.items()}
        history |= {f"{number}/{name}": array for name, array in entry.items()}
    evaluate, (inputs_ABT, targets_ABT) = train.make_evaluate(config, mesh), batches(config.model)[0]
    for rows in (ROWS, 3):
        sums = evaluate(state.params, *sharding.placed(mesh, inputs_ABT[0, :rows], targets_ABT[0, :rows]))
        named = zip(("loss", "correct"), sums, strict=True)
        history |= {f"evaluate/{rows} {name}": np.array(float(x)) for name, x in named}
    np.savez(folder / f"{case}.npz", **history)
    moved = jax.tree.leaves(jax.tree.map(lambda x, sharding: x.sharding != sharding, state, began))
    return facts | {
        "paper": [one._asdict() | {"width": np.dtype(jax.numpy.dtype(one.dtype)).itemsize} for one in sent(config)],
        "programs": step.__wrapped__._cache_size(),
        "moved": sum(moved),
        "counts": sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state)),
        "not divided": layout.notes if layout else [],
        "kept": dict(Counter({path: x.addressable_shards[0].data.nbytes for path, x in state.params.items()})),
    }


def main(folder: Path, cases: list[str]) -> None:
    facts = {case: run(case, folder) for case in cases}
    (folder / "cases.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(Path(sys.argv[1]), sys.argv[2:])
