"""How a run lies on a mesh of devices: two small tables over the logical axes of its parameters.

The tables say which mesh axis divides which axis, at rest and in use, and everything else follows: where parameters,
gradients and the optimizer's state lie, what is gathered before it is used, and what each device has to be told
(`exchange.py`, and of Muon's matrices `muon/sharded.py`; `traffic.py` counts the bytes).
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recipe.config import ModelConfig, RunConfig, require
from recipe.dropout import DECISIONS
from recipe.mesh import MeshShape, parse_mesh

AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("vocab", "hidden"),
    "lm_head.weight": ("vocab", "hidden"),
    "q_proj.kernel": ("hidden", "heads"),
    "k_proj.kernel": ("hidden", "heads"),
    "v_proj.kernel": ("hidden", "heads"),
    "o_proj.kernel": ("heads", "hidden"),
    "q_proj.bias": ("heads",),
    "k_proj.bias": ("heads",),
    "v_proj.bias": ("heads",),
    "gate_proj.kernel": ("hidden", "ffn"),
    "up_proj.kernel": ("hidden", "ffn"),
    "down_proj.kernel": ("ffn", "hidden"),
}
"""The logical axes of each parameter, in Flax's order; one that is not here is whole on every device."""
AT_REST = {"hidden": "fsdp", "heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
"""Which mesh axis divides a logical axis of what is kept: parameters, gradients, the optimizer's state."""
IN_USE = {"heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
"""Which of them are still divided where a product uses them; the others are gathered before."""
ROWS = ("data", "fsdp")
"""Mesh axes that divide the rows of a micro-batch."""


def summed_axis(path: str) -> str:
    """The logical axis over which a product with this parameter is a sum, if a mesh may divide it in use."""
    axis = (_axes(path) or ("",))[0]
    return axis if axis in IN_USE and path.endswith(".kernel") else ""


def is_matrix(path: str) -> bool:
    """Whether a parameter is a matrix or a table, of which products take a copy in the compute dtype."""
    return len(_axes(path)) == 2


def _axes(path: str) -> tuple[str, ...]:
    return AXES.get(".".join(path.split(".")[-2:]), ())


class Layout:
    """Where everything of a model lies on a mesh of a shape; no devices are needed for it."""

    def __init__(self, model: ModelConfig, shape: MeshShape, gather: str = "update") -> None:
        """`gather` is RunConfig's: when what fsdp divides is gathered, by update or by layer."""
        self.shape, self.gather = shape, gather
        self.notes: list[str] = []
        """One line for each axis of the model that is whole on every device because it does not divide."""
        sizes = {
            "hidden": (model.hidden_size,),
            "heads": (model.num_attention_heads, model.num_key_value_heads),
            "ffn": (model.intermediate_size,),
            "vocab": (model.vocab_size,),
        }
        self._divides: dict[str, str] = {}
        for axis, mesh_axis in AT_REST.items():
            ways = getattr(shape, mesh_axis)
            # A byte of dropout's decisions must not be shared by two devices.
            unit = DECISIONS if axis == "ffn" and model.dropout else 1
            if ways > 1 and any(size % (ways * unit) for size in sizes[axis]):
                each = " and ".join(map(str, sizes[axis]))
                self.notes.append(f"{mesh_axis}={ways} does not divide {axis} ({each}): whole on every device")
            elif ways > 1:
                self._divides[axis] = mesh_axis

    def spec(self, path: str) -> PartitionSpec:
        """The mesh axes of a parameter's axes at rest, in the one form that jit gives back."""
        names = [self._divides.get(axis) for axis in _axes(path)]
        while names and names[-1] is None:
            names.pop()
        return PartitionSpec(*names)

    @property
    def rows(self) -> PartitionSpec:
        """Of rows, the leading axis of a micro-batch."""
        return PartitionSpec(_squeezed(self.names(ROWS))) if self.names(ROWS) else PartitionSpec()

    def is_split(self, axis: str) -> bool:
        """Whether a logical axis is divided where it is used."""
        return axis in IN_USE and axis in self._divides

    def replicas(self, path: str) -> tuple[str, ...]:
        """The mesh axes over which a parameter is whole."""
        return tuple(name for name in self.names(MeshShape._fields) if name not in self.spec(path))

    def gathered_axis(self, path: str) -> int | None:
        """The axis of a parameter that fsdp divides; None if none."""
        spec = tuple(self.spec(path))
        return spec.index("fsdp") if "fsdp" in spec else None

    def ways(self, names: tuple[str, ...]) -> int:
        """Devices along these mesh axes."""
        return math.prod(getattr(self.shape, name) for name in names)

    def names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those along which there is more than one device."""
        return tuple(name for name in names if getattr(self.shape, name) > 1)

    def summed_over(self, path: str) -> tuple[str, ...]:
        """The mesh axes whose devices have a share each of a parameter's gradient, once `fsdp` is scattered."""
        names = tuple(name for name in self.names(ROWS) if name not in self.spec(path))
        # A head's norm is whole on every device, which uses it on heads of its own.
        of_heads = path.endswith(("q_norm.weight", "k_norm.weight")) and self.is_split("heads")
        return (*names, "tensor") if of_heads else names


@functools.lru_cache(maxsize=8)
def _layout(model: ModelConfig, mesh: str, gather: str) -> "Layout | None":
    shape = parse_mesh(mesh)
    return None if shape is None else Layout(model, shape, gather)


def layout_of(config: RunConfig) -> Layout | None:
    """The layout of a run; None without a mesh."""
    return _layout(config.model, config.mesh, config.gather)


def make_mesh(shape: MeshShape) -> Mesh:
    """The mesh of all devices of all processes; UserError if there are more or fewer."""
    found = jax.device_count()
    require(
        found == shape.devices,
        f"mesh={shape} needs {shape.devices} devices, and there {'is' if found == 1 else 'are'} {found}; choose a mesh "
        "of as many. On a CPU XLA_FLAGS=--xla_force_host_platform_device_count=N makes N.",
    )
    return jax.make_mesh(tuple(shape), MeshShape._fields, axis_types=(AxisType.Auto,) * 3)


def of_param(layout: Layout, mesh: Any, path: str) -> NamedSharding:
    """Where a parameter lies, its gradient, and whatever of the optimizer's is shaped like it."""
    return NamedSharding(mesh, layout.spec(path))


def state_shardings(layout: Layout, mesh: Any, state: Any) -> Any:
    """Where each leaf of a train state lies: what is below a parameter's path as that, all else everywhere."""

    def of(keys, _):
        paths = [key.key for key in keys if isinstance(getattr(key, "key", None), str) and "." in key.key]
        return of_param(layout, mesh, paths[-1] if paths else "")

    return jax.tree_util.tree_map_with_path(of, state)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host's array on the mesh; each process reads only what its own devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def placed(mesh: Mesh | None, *batches: np.ndarray) -> tuple[Any, ...]:
    """Tokens (..., B, T) of a batch on the mesh, their rows divided; those that do not divide are everybody's."""
    if mesh is None:
        return batches
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    *_, B, _ = batches[0].shape
    rows = tuple(name for name in ROWS if mesh.shape[name] > 1) if B % ways == 0 else ()
    spec = PartitionSpec(*[None] * (batches[0].ndim - 2), _squeezed(rows)) if rows else PartitionSpec()
    return tuple(place(batch, NamedSharding(mesh, spec)) for batch in batches)


def placed_rows(mesh: Mesh | None, count: int, *batches: np.ndarray) -> tuple[Any, ...]:
    """Tokens (A, B, T) of an update on the mesh, of whose B = `count` rows each process has those of `local_rows`."""
    if mesh is None:
        return batches
    rows = tuple(name for name in ROWS if mesh.shape[name] > 1)
    sharding = NamedSharding(mesh, PartitionSpec(None, _squeezed(rows)) if rows else PartitionSpec())
    first = local_rows(mesh, count).start

    def on_mesh(batch_ABT: np.ndarray) -> jax.Array:
        def of_device(index):
            micro_batches, rows, positions = index
            start, stop, _ = rows.indices(count)
            return batch_ABT[micro_batches, start - first : stop - first, positions]

        A, _, T = batch_ABT.shape
        return jax.make_array_from_callback((A, count, T), sharding, of_device)

    return tuple(map(on_mesh, batches))


def local_rows(mesh: Mesh, count: int) -> slice:
    """Which of so many rows this process's devices hold."""
    spec = PartitionSpec(ROWS)
    indices = NamedSharding(mesh, spec).addressable_devices_indices_map((count,)).values()
    bounds = [index[0].indices(count)[:2] for index in indices if index]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def _squeezed(names: tuple[str, ...]) -> Any:
    """One name alone instead of a tuple of one, as jit gives specs back."""
    return names[0] if len(names) == 1 else names
