"""Orthogonalisation of leaves that lie on a mesh: whole matrices change hands, and no collective is in the iteration.

A mesh divides a leaf in three ways. W is the product of the mesh axes that shard its matrices (axes of fan_in, of
fan_out, of both), C of those that shard axes which count matrices (layers), D of those over which it is replicated.
W D devices hold the same n/C matrices, W of them a part each, and share their work:

    take     each of the D replicas takes its share of the matrices                             nothing is sent
    way in   all-to-all over W: each device becomes the owner of n/(C W D) whole matrices       P/(W D) (W-1)/W
    iterate  on the owner, as on one device                                                     nothing is sent
    way out  all-to-all over W: the parts go back to where they lie                             P/(W D) (W-1)/W
    spread   all-gather over D: the replicas have all of it again                               P/W (D-1)/D

in bytes that leave a device. P is what those n/C matrices weigh, padded, in the dtype that travels: the leaf's on the
way in, then that of the result. Leaves of one dtype, matrix shape and division make a stack, and each stack is padded
with zero matrices to a multiple of W D of them: a stack of one matrix costs as much as one of W D.

All stacks that the same mesh axes shard, on whichever sides, share one all-to-all each way (one for each dtype), and
all that are replicated over the same axes one all-gather. Mesh axes of size 1 do not count.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_impl.muon.matrices import Matrix, as_stack, fans, from_stack, path_of

_all_to_all = functools.partial(jax.lax.all_to_all, split_axis=0, concat_axis=0, tiled=True)
_all_gather = functools.partial(jax.lax.all_gather, axis=0, tiled=True)


class Collective(NamedTuple):
    """A collective over axes of the mesh, and the bytes that leave each device in it."""

    kind: str
    axes: tuple[str, ...]
    dtype: jnp.dtype
    sent: int


def orthogonalize_sharded(
    leaves: Sequence[jax.Array],
    matrices: Sequence[Matrix],
    shardings: Sequence[NamedSharding | None],
    orthogonalize_stacks: Callable[[list[jax.Array]], list[jax.Array]],
) -> list[jax.Array]:
    """The leaves with each matrix orthogonalised, in their own dtypes and shardings.

    To be called inside jit: outside it compiles anew each time.

    matrices: as `matrix_of` gives them, with axes counted from the end.
    shardings: one for each leaf, all on one mesh, over whose axes this is a `jax.shard_map`; None is a leaf that no
        mesh axis shards. If all are None there is no mesh, and all is done here.
    orthogonalize_stacks: takes stacks (n, fan_out, fan_in) that lie whole on one device, zero matrices among them, and
        gives as many of the same shapes; what it gives travels back in its own dtype, so bfloat16 halves the bytes.

    Raises ValueError for shardings on unlike meshes, and for an axis that its mesh axes do not divide.
    """
    mesh, stacks = _plan(leaves, matrices, shardings)
    senders, replicas = [stack.senders for stack in stacks], [stack.replicas for stack in stacks]
    members = [place for places in stacks.values() for place in places]

    def on_a_device(*given: jax.Array) -> list[jax.Array]:
        here = dict(zip(members, given, strict=True))
        parts = [[as_stack(here[place], matrices[place]) for place in places] for places in stacks.values()]
        received = _fused(_all_to_all, senders, [stack.take(leaf) for stack, leaf in zip(stacks, parts, strict=True)])
        whole = orthogonalize_stacks([stack.join(x) for stack, x in zip(stacks, received, strict=True)])
        returned = _fused(_all_to_all, senders, [stack.divide(x) for stack, x in zip(stacks, whole, strict=True)])
        spread = _fused(_all_gather, replicas, [x.reshape(1, -1) for x in returned])
        for places, gathered in zip(stacks.values(), spread, strict=True):
            ends = itertools.accumulate(here[place].size for place in places)
            for place, flat in zip(places, jnp.split(gathered.reshape(-1), list(ends)), strict=False):
                here[place] = from_stack(flat, matrices[place], here[place].shape).astype(here[place].dtype)
        return list(here.values())

    run = on_a_device
    if mesh is not None:
        specs = [sharding.spec if (sharding := shardings[place]) else PartitionSpec() for place in members]
        # JAX's check of what is replicated does not know that an all-gather makes alike what differed.
        run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=tuple(specs), out_specs=specs, check_vma=False))
    done = dict(zip(members, run(*(leaves[place] for place in members)), strict=True))
    # Empty leaves stay away: jaxlib 0.11.2 crashes while it compiles a shard_map of one.
    return [done.get(place, leaf) for place, leaf in enumerate(leaves)]


def collective_bytes(
    leaves: Sequence[Any],
    matrices: Sequence[Matrix],
    shardings: Sequence[NamedSharding | None],
    dtype: jax.typing.DTypeLike,
) -> list[Collective]:
    """What `orthogonalize_sharded` sends, by the formula at the top of this file.

    leaves: anything with shape and dtype; dtype: that of what orthogonalize_stacks gives.
    """
    sent: dict[tuple, int] = {}
    for stack, places in _plan(leaves, matrices, shardings)[1].items():
        received = stack.owned(sum(places.values())) * math.prod(stack.shape) // stack.w
        for way, kind, axes, width, parts in (
            ("in", "all-to-all", stack.senders, stack.dtype, stack.w - 1),
            ("out", "all-to-all", stack.senders, jnp.dtype(dtype), stack.w - 1),
            ("out", "all-gather", stack.replicas, jnp.dtype(dtype), stack.w * (stack.d - 1)),
        ):
            if parts:
                key = (way, kind, axes, width)
                sent[key] = sent.get(key, 0) + received * parts * width.itemsize
    return [Collective(kind, axes, width, total) for (_, kind, axes, width), total in sent.items()]


class _Stack(NamedTuple):
    """What leaves that travel as one stack have in common."""

    dtype: jnp.dtype
    shape: tuple[int, int]  # of a matrix: fan_out, fan_in
    sides: tuple[tuple[tuple[str, ...], int], ...]  # mesh axes and size here of each axis of fan_out, then of fan_in
    senders: tuple[str, ...]  # mesh axes that shard a matrix, in the order of the mesh, and their sizes
    sizes: tuple[int, ...]
    replicas: tuple[str, ...]  # mesh axes over which it is replicated
    d: int

    @property
    def w(self) -> int:
        return math.prod(self.sizes)

    def owned(self, count: int) -> int:
        """Matrices that each owner has if there are `count`, padding included."""
        return -(-count // (self.w * self.d))

    def take(self, leaves: list[jax.Array]) -> jax.Array:
        """The part here of all matrices -> (W, elements): what this replica sends to each owner."""
        parts = jnp.concatenate([leaf.reshape(-1, math.prod(self.shape) // self.w) for leaf in leaves])
        parts = jnp.pad(parts, ((0, self.owned(len(parts)) * self.w * self.d - len(parts)), (0, 0)))
        share = parts.reshape(self.d, self.w, -1)
        return share[jax.lax.axis_index(self.replicas) if self.replicas else 0]

    def join(self, received: jax.Array) -> jax.Array:
        """(W, elements) -> (owned, fan_out, fan_in)."""
        received_shape, order = self._route()
        return received.reshape(received_shape).transpose(order).reshape(-1, *self.shape)

    def divide(self, whole: jax.Array) -> jax.Array:
        """Inverse of `join`."""
        received_shape, order = self._route()
        whole = whole.reshape([received_shape[axis] for axis in order])
        return whole.transpose([order.index(axis) for axis in range(len(order))]).reshape(self.w, -1)

    def _route(self) -> tuple[list[int], list[int]]:
        """The shape (senders, owned, axes of a part) of what an owner receives, and the order that makes it whole."""
        owned = len(self.sizes)
        order = [owned]
        for axis, (names, _) in enumerate(self.sides):
            order += [*map(self.senders.index, names), owned + 1 + axis]
        return [*self.sizes, -1, *(size for _, size in self.sides)], order


def _plan(
    leaves: Sequence[Any], matrices: Sequence[Matrix], shardings: Sequence[NamedSharding | None]
) -> tuple[Mesh | AbstractMesh | None, dict[_Stack, dict[int, int]]]:
    """The mesh, or None; and the leaves of each stack, place in the list -> matrices on a device; not the empty."""
    meshes = [sharding.mesh for sharding in shardings if sharding]
    if len(shapes := {str(dict(mesh.shape)) for mesh in meshes}) > 1:
        raise ValueError(f"The leaves lie on unlike meshes, {' and '.join(sorted(shapes))}; place them all on one.")
    mesh = next((mesh for mesh in meshes if isinstance(mesh, Mesh)), meshes[0] if meshes else None)
    sizes = {name: size for name, size in mesh.shape.items() if size > 1} if mesh else {}
    stacks: dict[_Stack, dict[int, int]] = {}
    for place, (leaf, matrix, sharding) in enumerate(zip(leaves, matrices, shardings, strict=True)):
        spec, axes, here = tuple(sharding.spec) if sharding else (), [], []
        if len(spec) > len(leaf.shape) or PartitionSpec.UNCONSTRAINED in spec:
            raise ValueError(f"A leaf {tuple(leaf.shape)} needs mesh axes, or None, for each of its axes, not {spec}.")
        for size, entry in itertools.zip_longest(leaf.shape, spec):
            names = tuple(name for name in ((entry,) if isinstance(entry, str) else entry or ()) if name in sizes)
            ways = math.prod(sizes[name] for name in names)
            if size % ways:
                raise ValueError(
                    f"A leaf {tuple(leaf.shape)} cannot be sharded by {PartitionSpec(*spec)}: {size} is no multiple "
                    f"of the {ways} devices along {' and '.join(names)}. Do not shard that axis, or pad it."
                )
            axes.append(names)
            here.append(size // ways)
        of_matrix = (*matrix.fan_out, *matrix.fan_in)
        senders = tuple(name for name in sizes if any(name in axes[axis] for axis in of_matrix))
        replicas = tuple(name for name in sizes if not any(name in names for names in axes))
        stack = _Stack(
            jnp.dtype(leaf.dtype),
            fans(tuple(leaf.shape), matrix)[::-1],
            tuple((axes[axis], here[axis]) for axis in of_matrix),
            senders,
            tuple(sizes[name] for name in senders),
            replicas,
            math.prod(sizes[name] for name in replicas),
        )
        if math.prod(here):
            count = math.prod(here) // math.prod(here[axis] for axis in of_matrix)
            stacks.setdefault(stack, {})[place] = count
    return mesh, stacks


def _fused(exchange: Callable, axes: list[tuple[str, ...]], buffers: list[jax.Array]) -> list[jax.Array]:
    """`exchange(buffer, axes)` of buffers (rows, columns), in one for all of the same axes and dtype."""
    done, alike = list(buffers), dict[tuple, list[int]]()
    for place, (names, buffer) in enumerate(zip(axes, buffers, strict=True)):
        if names:
            alike.setdefault((names, buffer.dtype), []).append(place)
    for (names, dtype), places in alike.items():
        flat = jnp.concatenate([buffers[place] for place in places], axis=1)
        # As bits: XLA:CPU widens bfloat16 to float32 before it sends it.
        bits = jax.lax.bitcast_convert_type(flat, f"uint{8 * dtype.itemsize}")
        flat = jax.lax.bitcast_convert_type(exchange(bits, names), dtype)
        ends = itertools.accumulate(buffers[place].shape[1] for place in places)
        for place, part in zip(places, jnp.split(flat, list(ends), axis=1), strict=False):
            done[place] = part
    return done


def sharding_of(leaf: Any) -> NamedSharding | None:
    """The sharding of a concrete array, or of a type in Explicit mode; None for a leaf that lies on no mesh.

    None too for a tracer on a mesh with Auto axes, whose type does not tell: there the sharding must be given.
    """
    traced = isinstance(leaf, jax.core.Tracer)
    sharding = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", leaf)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    if traced and any(kind != AxisType.Explicit for kind in sharding.mesh.axis_types):
        return None
    return sharding


def shardings_of(tree: Any) -> Callable[[str, Any], NamedSharding | None]:
    """`(path, leaf) -> sharding`, by path, as the arrays of this tree lie, or as this tree of shardings says."""
    of = {path_of(keys): sharding_of(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def sharding(path: str, leaf: Any) -> NamedSharding | None:
        if path not in of:
            raise ValueError(
                f"{path} is not in the tree given to shardings_of, which has {', '.join(of) or 'no leaf'}."
            )
        return of[path]

    return sharding
