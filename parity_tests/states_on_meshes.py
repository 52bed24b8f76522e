"""Run by parity_tests/test_sharded_states.py in processes of their own: states written on one mesh and read on others.

`python -m parity_tests.states_on_meshes FOLDER` writes facts.json there, of eight devices; with a RUN, STEPS and flags
it trains as train_jax.py does and stops as one who is killed before update STEPS.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from harness import loop
from harness.commands.train import parse_run_config
from harness.folders import load_folder, save_folder
from harness.manifest import manifest_of
from harness.sharded import save_gathered, save_sharded
from harness.state import ARRAYS, SLOTS, TrainingState, load_state, sharded_folder
from harness.tensors import Damaged
from jax_impl import sharding
from jax_impl.gather import GatherCommand, gather
from jax_impl.train import Trainer
from recipe.config import DataConfig, ModelConfig, RunConfig
from recipe.params import param_specs, slot_shapes
from recipe.tokenizer import train_bpe

READ_ON = {
    "data=2,fsdp=4": ("data=2,fsdp=4", "fsdp=2,tensor=4", ""),
    "tensor=8": ("fsdp=8",),
}
"""By the mesh that a state is written on, those that it is read on; the last is one device alone."""
MODEL = ModelConfig(
    vocab_size=264, hidden_size=24, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8, head_dim=6,
)  # fmt: skip


def a_config(run: Path, mesh: str) -> RunConfig:
    data = DataConfig(cache_dir=str(run.parent / "cache"))
    return RunConfig(out=str(run), batch_size=8, sequence_length=16, model=MODEL, data=data, mesh=mesh, steps=40)


def noise(shapes: dict, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def begun(config: RunConfig) -> tuple[Trainer, dict[str, dict[str, np.ndarray]]]:
    """A trainer with weights and slots of noise after 5 updates and a skipped one; those arrays by part."""
    parts: dict[str, dict] = {"weights": noise({n: s.shape for n, s in param_specs(config.model).items()}, 0)}
    for name, array in noise(slot_shapes(config.model), 1).items():
        slot, _, parameter = name.partition(".")
        parts.setdefault(slot, {})[parameter] = array
    trainer = Trainer(config, parts["weights"])
    trainer.restore({slot: parts[slot] for slot in SLOTS}, 5, 1)
    return trainer, parts


def of(trainer: Trainer) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a trainer by part."""
    return {"weights": trainer.weights(), **trainer.slots()}


def differing(one: dict, other: dict) -> list[str]:
    """Names of arrays that differ in a bit or in their dtype."""
    names = {f"{part} {name}" for part in one for name in one[part]} ^ {f"{p} {n}" for p in other for n in other[p]}
    both = [(part, name) for part in one.keys() & other.keys() for name in one[part].keys() & other[part].keys()]
    return sorted(names) + [
        f"{part} {name}"
        for part, name in both
        if one[part][name].dtype != other[part][name].dtype or one[part][name].tobytes() != other[part][name].tobytes()
    ]


def misplaced(trainer: Trainer) -> list[str]:
    """Leaves of a trainer's state that do not lie where those of a new one do."""
    layout, state = sharding.layout_of(trainer.config), trainer.state
    if layout is None:
        return [str(leaf.shape) for leaf in jax.tree.leaves(state) if len(leaf.devices()) != 1]
    wanted = jax.tree.leaves(sharding.state_shardings(layout, trainer.mesh, state))
    leaves = jax.tree.leaves(state)
    return [str(leaf.shape) for leaf, where in zip(leaves, wanted, strict=True) if leaf.sharding != where]


def save(config: RunConfig, trainer: Trainer, *, in_host_memory: bool = False) -> Path:
    """The trainer's state in its run folder, and its weights in best/; the state's folder."""
    run, tokenizer = Path(config.out), train_bpe(["a quick brown fox"], 260)
    trainer.room = not in_host_memory
    snapshot = trainer.snapshot()
    values = TrainingState(config, snapshot.weights, snapshot.slots, snapshot.updates, snapshot.skipped, 2.5, "text")

    def save_best(weights) -> None:
        save_folder(run / "best", config.model, weights, tokenizer, about={"step": 6})

    about = {"framework": "jax", "environment": trainer.environment}
    save_sharded(run, values, snapshot.shards, tokenizer, about, save_best=save_best)
    return sharded_folder(run, 6)


def read_again(config: RunConfig, state: TrainingState) -> Trainer:
    """A trainer on another mesh, as harness/loop.py makes one."""
    weights, slots = Trainer.read_sharded(state.arrays, state.config)
    trainer = Trainer(config, weights)
    trainer.restore(slots, state.updates, state.skipped)
    return trainer


def written_and_read(folder: Path, written_on: str) -> dict:
    """Facts of a state written on a mesh and read on all."""
    config = a_config(folder / written_on, written_on)
    trainer, parts = begun(config)
    place = save(config, trainer)
    state, facts = load_state(place), {}
    for mesh in READ_ON[written_on]:
        again = read_again(dataclasses.replace(config, mesh=mesh), state)
        facts[mesh] = {
            "differing": differing(of(again), parts),
            "misplaced": misplaced(again),
            "counts": again.counts(),
            "counted": sorted({int(x) for x in jax.tree.leaves(again.state.opt_state) if x.ndim == 0}),
        }
    weights, slots = Trainer.read_sharded(state.arrays, config)
    lazily = {"weights": dict(weights.items()), **{slot: dict(arrays.items()) for slot, arrays in slots.items()}}
    facts["one at a time"] = differing(lazily, parts)
    facts["best"] = differing(
        {"weights": dict(load_folder(Path(config.out) / "best")[1])}, {"weights": parts["weights"]}
    )
    tree = ocp.StandardCheckpointer().restore(place / ARRAYS)
    facts["tree"] = sorted(f"{part}/{path}" for part, leaves in tree.items() for path in leaves)
    return facts


def gathered(folder: Path) -> dict:
    """Facts of the state that both frameworks read, made of one of them."""
    run = folder / "data=2,fsdp=4"
    _, parts = begun(a_config(run, ""))
    last = gather(GatherCommand(str(run)))
    state = load_state(last)
    found = {"weights": dict(state.weights), **{slot: dict(arrays) for slot, arrays in state.slots.items()}}
    before, after = load_state(sharded_folder(run, 6)).about, state.about
    kept = [name for name in before if name not in ("files", "checksum", "saved", "sharded")]
    again = gather(GatherCommand(str(run)))  # what is there already is not written again
    return {
        "differing": differing(found, parts),
        "said": [name for name in kept if before[name] != after.get(name)] + ["sharded"] * ("sharded" in after),
        "again": [str(last), str(again)],
    }


def flipped(folder: Path) -> dict:
    """What reading says of a state with another bit, by file."""
    config = a_config(folder / "flipped", "data=2,fsdp=4")
    trainer, parts = begun(config)
    place, said = save(config, trainer), {}
    for name in [*(manifest_of(place) or {})][::2]:
        data = (place / name).read_bytes()
        other = bytearray(data)
        other[len(data) // 2] ^= 4
        (place / name).write_bytes(other)
        try:
            read_again(config, load_state(place))
            said[name] = ""
        except Damaged as error:
            said[name] = str(error)
        (place / name).write_bytes(data)
    return {"said": said, "whole": differing(of(read_again(config, load_state(place))), parts)}


def from_host_memory(folder: Path) -> list[str]:
    """In what a state differs that was copied to the host because the devices have no room."""
    config = a_config(folder / "host", "data=2,fsdp=4")
    trainer, parts = begun(config)
    state = load_state(save(config, trainer, in_host_memory=True))
    return differing(of(read_again(config, state)), parts)


def later_updates_do_not_show(folder: Path) -> list[str]:
    """In what a snapshot that is written after the state was given up differs from the state then."""
    config = a_config(folder / "later", "data=2,fsdp=4")
    trainer, parts = begun(config)
    snapshot = trainer.snapshot()
    jax.block_until_ready(jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)(trainer.state))
    (folder / "later").mkdir()
    snapshot.shards.write(folder / "later" / ARRAYS, slots=True)
    read = snapshot.shards.read(folder / "later" / ARRAYS)
    lazily = {"weights": dict(read[0].items()), **{slot: dict(arrays.items()) for slot, arrays in read[1].items()}}
    save_gathered(
        folder / "later", snapshot.weights, snapshot.shards, lambda weights: lazily.update(best=dict(weights))
    )
    return differing(lazily, parts | {"best": parts["weights"]})


def main(folder: Path) -> None:
    facts = {
        "devices": jax.device_count(),
        "written on": {mesh: written_and_read(folder, mesh) for mesh in READ_ON},
        "gathered": gathered(folder),
        "flipped": flipped(folder),
        "from host memory": from_host_memory(folder),
        "later": later_updates_do_not_show(folder),
    }
    shutil.rmtree(folder / "cache", ignore_errors=True)
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def gather_growth(folder: Path) -> None:
    """Print the bytes of the largest tensor, those of a state, and by how many gathering made this process larger.

    Run twice: the first time it writes the state.
    """
    model = dataclasses.replace(MODEL, vocab_size=8192, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4)
    config = dataclasses.replace(a_config(folder / "large", "fsdp=8"), model=model)
    if not (folder / "large").is_dir():
        save(config, begun(config)[0])
        return
    sizes = {name: 4 * math.prod(spec.shape) for name, spec in param_specs(model).items()}
    total = sum(sizes.values()) + sum(4 * math.prod(shape) for shape in slot_shapes(model).values())
    before = _resident("VmRSS")
    gather(GatherCommand(str(folder / "large")))
    print(json.dumps([max(sizes.values()), total, _resident("VmHWM") - before]))


def _resident(field: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def train_until(stop: int, flags: list[str]) -> None:
    """Train as `train_jax.py` would, and end at once before update `stop`, from 1, is begun; never with 0."""

    class Stopped(Trainer):
        def step(self, inputs_ABT, targets_ABT):
            if stop and sum(self.counts()) == stop - 1:
                sys.stdout.flush()
                os._exit(9)
            return super().step(inputs_ABT, targets_ABT)

    loop.run(parse_run_config(flags, framework="jax"), framework="jax", make_trainer=Stopped)


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        gather_growth(Path(sys.argv[2]))
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        train_until(int(sys.argv[1]), sys.argv[2:])
