"""An update on a mesh of host devices, in a process of its own; started by `benchmarks.scaling`.

XLA_FLAGS must ask for the devices. Reads the run's configuration as a line of JSON, answers with what the compiled
program is, and then with the wall and CPU seconds of one update for every further line.
"""

import json
import sys
import time

import jax

from benchmarks import job
from benchmarks.plan.parts import costs
from benchmarks.plan.program import Program
from benchmarks.plan.traffic import formula, travels
from jax_impl import sharding
from jax_impl.train import init_state, make_train_step
from recipe.config import from_dict
from recipe.mesh import MeshShape, parse_mesh
from recipe.params import init_params


def main() -> None:
    """Answer on standard output, a line of JSON each time."""
    config = from_dict(json.loads(sys.stdin.readline()))
    shape = parse_mesh(config.mesh)
    mesh = None if shape is None else sharding.make_mesh(shape)
    state, step = init_state(config, init_params(config.model, config.seed), mesh), make_train_step(config, mesh)
    batch = sharding.placed(mesh, *job.make_batch(config, 0))
    begin = time.process_time()
    with jax.default_matmul_precision(config.precision.matmul):  # as `step` compiles it, so only once
        compiled = step.__wrapped__.lower(state, *batch).compile()
    facts = {"compile_seconds": time.process_time() - begin}
    program, memory = Program(compiled.as_text()), compiled.memory_analysis()
    found = travels(costs(program, config, None), shape or MeshShape())
    state, metrics = step(state, *batch)
    facts |= {
        "loss": float(metrics["loss"]),
        "sent": sum(one["sent"] for one in found),
        "collectives": sum(one["launches"] for one in found),
        "formula": sum(one["sent"] for one in formula(config, None)),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        state, metrics = step(state, *batch)
        jax.block_until_ready((state, metrics))
        print(json.dumps({"wall": time.perf_counter() - start, "cpu": time.process_time() - used}), flush=True)


if __name__ == "__main__":
    main()
