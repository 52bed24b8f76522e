"""Training steps traced, lowered and compiled for a device that is not here.

The process's own backend must be the CPU, `JAX_PLATFORMS=cpu`, which the command sets before jax is imported: else JAX
looks for a driver. The CUDA plugin is registered all the same.
"""

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.mesh import AbstractDevice
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.plan import machine_code
from benchmarks.plan.parts import Estimate
from benchmarks.plan.targets import Target
from jax_impl import sharding
from jax_impl.backend import machine
from jax_impl.train import TrainState, make_optimizer, make_train_step
from jax_impl.weights import flax_path
from recipe.config import RunConfig, require
from recipe.mesh import MeshShape, parse_mesh
from recipe.params import param_specs

OLDEST_CUDNN = 91_200
"""The first cuDNN of CUDA 13 that JAX's plugin asks for."""


@contextlib.contextmanager
def as_if_on(backend: str) -> Iterator[None]:
    """What is traced inside takes the branches of this backend, though the process has another.

    `jax_impl.backend` asks `jax.default_backend()`. JAX itself asks for cuDNN's version before it traces a call of
    it: a private name, replaced where no cuDNN is found, as only the version's number is used.
    """
    own, check = jax.default_backend, fused_attention_stablehlo.check_cudnn_version
    try:
        check()
    except RuntimeError:
        fused_attention_stablehlo.check_cudnn_version = lambda: OLDEST_CUDNN
    jax.default_backend = lambda: backend
    try:
        yield
    finally:
        jax.default_backend, fused_attention_stablehlo.check_cudnn_version = own, check


def abstract_arguments(config: RunConfig, mesh: Mesh | None = None) -> tuple[TrainState, Any, Any]:
    """State, inputs and targets of a training step as shapes, on a mesh laid out as the run lays them."""
    params: Any = {}
    for name, spec in param_specs(config.model).items():
        path = flax_path(name, spec.role)
        shape = spec.shape[::-1] if path.endswith(".kernel") else spec.shape
        params[path] = jax.ShapeDtypeStruct(shape, jnp.dtype(config.precision.params))
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    layout = sharding.layout_of(config)
    optimizer = make_optimizer(config, mesh)
    state = TrainState(params, jax.eval_shape(optimizer.init, params), count, count)
    tokens = jax.ShapeDtypeStruct((config.accumulation, config.batch_size, config.sequence_length), jnp.int32)
    if mesh is None:
        return state, tokens, tokens
    everywhere = NamedSharding(mesh, PartitionSpec())
    if layout:
        lies = sharding.state_shardings(layout, mesh, state)
        rows = NamedSharding(mesh, PartitionSpec(None, *layout.rows))
    else:
        lies, rows = jax.tree.map(lambda _: everywhere, state), everywhere
    state, tokens = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (state, tokens), (lies, rows)
    )
    return state, tokens, tokens


def trace(config: RunConfig, arguments: tuple, make_step=make_train_step, mesh: Mesh | None = None):
    """The jitted training step traced on these shapes; call it under `as_if_on`."""
    step = make_step(config, mesh).__wrapped__  # without what compiles it before its first run
    with jax.default_matmul_precision(config.precision.matmul):
        return step.trace(*arguments)


def stablehlo(config: RunConfig, target: Target, make_step=make_train_step) -> str:
    """What JAX hands to the compiler for this target, as text; needs no plugin of its."""
    with as_if_on(target.backend), _on_kind(target, None):
        traced = trace(config, abstract_arguments(config), make_step)
        return traced.lower(lowering_platforms=(target.platform or "cpu",)).as_text()


def device_mesh(target: Target, shape: MeshShape) -> Mesh:
    """A mesh of this shape of the target's devices."""
    devices, axes = shape.devices, {"axis_types": (AxisType.Auto,) * len(MeshShape._fields)}
    if not target.platform:
        require(
            len(jax.devices()) >= devices,
            f"--mesh {shape} exceeds this process's {len(jax.devices())} devices; set JAX_NUM_CPU_DEVICES={devices}.",
        )
        return Mesh(np.array(jax.devices()[:devices]).reshape(shape), MeshShape._fields, **axes)
    name = target.topology(devices)
    if target.platform == "cuda":
        how: dict[str, Any] = {"target_config": target.description, "topology": name}
        topology = topologies.get_topology_desc("", target.platform, **how)
    else:
        how = {"chips_per_host_bounds": (1, 1, 1)} if devices == 1 else {}  # libtpu takes 2 x 2 chips for a host
        topology = topologies.get_topology_desc(name, target.platform, **how)
    # As jax.make_mesh does: an axis may be a part of one of the torus's.
    grid = mesh_utils.create_device_mesh(tuple(shape), list(topology.devices), allow_split_physical_axes=True)
    return Mesh(grid, MeshShape._fields, **axes)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled training step and what the compiler says of it."""

    text: str
    """Optimized HLO."""
    memory: dict[str, int]
    """Bytes a device."""
    state_arrays: int
    seconds: dict[str, float]
    estimates: Mapping[tuple, Estimate]
    """What Pallas kernels say of themselves, by name and results."""
    code: Mapping[str, machine_code.Code]
    """Machine code of every kernel by name; empty where it cannot be had."""
    tokens_at_once: int
    """Tokens of the loss in a chunk, on the target."""


def compile_update(
    config: RunConfig,
    target: Target,
    *,
    options: Mapping[str, Any] | None = None,
    make_step=make_train_step,
    backend: str | None = None,
) -> Compiled:
    """The training step of this configuration, compiled for the target's devices that its mesh asks for.

    `backend` says whose branches are taken, if not the target's: for tests of what that would cost.
    """
    mesh = device_mesh(target, parse_mesh(config.mesh) or MeshShape())
    arguments = abstract_arguments(config, mesh)
    start = time.perf_counter()
    with as_if_on(backend or target.backend), _on_kind(target, mesh):
        traced = trace(config, arguments, make_step, mesh)
        lowered, tokens_at_once = traced.lower(), machine().tokens_at_once
    lowered_at = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder} if target.platform == "cuda" else {}
        if dump and jax.__version_info__ >= (0, 11):
            dump["xla_dump_emitter_re"] = ".*"  # since then PTX is left only where it is asked for
        try:
            compiled = lowered.compile(compiler_options=dict(options or {}) | dump)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '([^']*)'", str(error))
            require(unknown is None, f"--option {unknown and unknown[1]} is unknown to this XLA; choose another.")
            raise
        compiled_at = time.perf_counter()
        code = machine_code.read(Path(folder)) if dump else {}
    return Compiled(
        text=compiled.as_text(),
        memory=_memory(compiled.memory_analysis()),
        state_arrays=len(jax.tree.leaves(arguments[0])),
        seconds={"trace and lower": lowered_at - start, "compile": compiled_at - lowered_at},
        estimates=estimates(traced.jaxpr.jaxpr),
        code=code,
        tokens_at_once=tokens_at_once,
    )


def _on_kind(target: Target, mesh: Mesh | None):
    """Pallas asks the mesh for the device's kind when it is lowered."""
    if target.platform != "cuda":
        return contextlib.nullcontext()
    device = AbstractDevice(target.kind, target.cores, target.backend)
    shape = MeshShape()._asdict() if mesh is None else dict(mesh.shape)
    types = (AxisType.Auto,) * len(shape)
    return jax.sharding.use_abstract_mesh(
        AbstractMesh(tuple(shape.values()), tuple(shape), types, abstract_device=device)
    )


def _memory(stats) -> dict[str, int]:
    """Bytes of arguments, results, what of them is one, and temporaries."""
    names = {"arguments": "argument", "results": "output", "aliased": "alias", "temporaries": "temp"}
    sizes = {name: int(getattr(stats, f"{field}_size_in_bytes")) for name, field in names.items()}
    sizes["program"] = int(stats.generated_code_size_in_bytes)
    sizes["total"] = sizes["arguments"] + sizes["results"] - sizes["aliased"] + sizes["temporaries"]
    return sizes


def estimates(jaxpr) -> dict[tuple, Estimate]:
    """The `pl.CostEstimate` of every Pallas call in a traced program."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call" and (cost := equation.params.get("cost_estimate")) is not None:
            name = equation.params["name"]
            results = tuple(tuple(x.aval.shape) for x in equation.outvars)
            found[name, results] = Estimate(
                name, results, float(cost.flops), float(cost.bytes_accessed), float(cost.transcendentals)
            )
        for inner in _inner(equation):
            found |= estimates(inner)
    return found


def _inner(equation) -> Iterator:
    """The programs that an equation carries out."""
    for value in equation.params.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            program = getattr(part, "jaxpr", part)
            if hasattr(program, "eqns"):
                yield program
