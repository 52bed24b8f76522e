"""Muon's orthogonalisation on meshes of eight host devices: `python -m parity_tests.muon_on_meshes FOLDER`.

XLA_FLAGS must ask for eight devices. Writes what each case's program sends, read from its compiled HLO, and what it
returned; stderr has a line before each case, so that what XLA says there can be told apart.
"""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl.muon.matrices import FROM_HEADS, FULLY_CONNECTED, OUT_IN, TO_HEADS, Matrix, as_stack, from_stack
from jax_impl.muon.newton_schulz import orthogonalize_via_newton_schulz
from jax_impl.muon.sharded import collective_bytes, orthogonalize_sharded, sharding_of, shardings_of
from jax_impl.muon.transforms import scale_by_muon
from parity_tests.collectives import collectives

AXES = ("data", "fsdp", "tensor")
MESHES = [(1, 8, 1), (2, 4, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2)]

# Shape, matrix and spec. No two sizes of a leaf are equal but those of the squares.
BLOCK = {
    "query": ((16, 8, 3), TO_HEADS, P("fsdp", "tensor")),
    "value": ((16, 8, 3), TO_HEADS, P("fsdp", "tensor")),
    "out": ((8, 3, 16), FROM_HEADS, P("tensor", None, "fsdp")),
    "gate": ((16, 40), FULLY_CONNECTED, P("fsdp", "tensor")),
    "up": ((16, 40), FULLY_CONNECTED, P("fsdp", "tensor")),
    "down": ((40, 16), FULLY_CONNECTED, P("tensor", "fsdp")),
}
MODEL = {f"{layer}/{name}": leaf for layer in range(2) for name, leaf in BLOCK.items()}
MIXED = {
    "attention/query": BLOCK["query"],
    "scanned by layers": ((8, 6, 10), FULLY_CONNECTED, P("fsdp", None, "tensor")),
    "scanned by layers alone": ((24, 5, 7), FULLY_CONNECTED, P(("tensor", "fsdp"))),
    "scanned by inputs": ((3, 16, 56), FULLY_CONNECTED, P(None, "fsdp", "tensor")),
    "one of the same": ((16, 56), FULLY_CONNECTED, P("fsdp", "tensor")),
    "torch's": ((48, 7), OUT_IN, P(("tensor", "fsdp"))),
    "square": ((24, 24), FULLY_CONNECTED, P("fsdp", "tensor")),
    "square the other way": ((24, 24), FULLY_CONNECTED, P("tensor", "fsdp")),
    "square by inputs": ((24, 24), FULLY_CONNECTED, P(("fsdp", "tensor"))),
    "experts within layers": ((3, 8, 12, 2, 5), Matrix((-3,), (-2, -1)), P(None, "data", "tensor")),
    "replicated": ((9, 5), FULLY_CONNECTED, P()),
    "on no mesh": ((5, 11), FULLY_CONNECTED, None),
    "empty": ((0, 8, 3), FULLY_CONNECTED, P(None, "fsdp")),
}
LAYERS = {"scanned": MIXED["scanned by layers alone"]}
SETS = {"block": BLOCK, "model": MODEL, "mixed": MIXED, "layers": LAYERS}


def values(leaves: dict) -> dict[str, np.ndarray]:
    """Gaussian leaves in float64."""
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape) for name, (shape, _, _) in leaves.items()}


def in_dtype(dtype: str):
    """The function of stacks that Muon would pass."""
    return lambda stacks: [orthogonalize_via_newton_schulz(stack, dtype=dtype) for stack in stacks]


def labelled(stacks: list) -> list:
    """Each entry times its place in its matrix, which no two share: exact, and what is in the wrong place shows."""
    return [stack * (1 + np.arange(math.prod(stack.shape[1:])).reshape(stack.shape[1:])) for stack in stacks]


def unsharded(leaves: dict, arrays: list) -> list:
    """The same update in float64 where nothing is said of a mesh."""
    done = []
    for x, (shape, matrix, _) in zip(arrays, leaves.values(), strict=True):
        done.append(from_stack(orthogonalize_via_newton_schulz(as_stack(x, matrix), dtype="float64"), matrix, shape))
    return done


def compiled(name: str, function, argument):
    """The compiled program of a case, announced on stderr."""
    print(f"== {name}", file=sys.stderr, flush=True)
    return jax.jit(function).lower(argument).compile()


def placed(leaves: dict, mesh, dtype: str = "float64") -> tuple[list, list]:
    """Arrays on a mesh, and their shardings."""
    shardings = [None if spec is None else NamedSharding(mesh, spec) for _, _, spec in leaves.values()]
    arrays = [x.astype(dtype) for x in values(leaves).values()]
    return [
        jnp.asarray(x) if s is None else jax.device_put(x, s) for x, s in zip(arrays, shardings, strict=True)
    ], shardings


def mesh_of(shape: tuple[int, ...], kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * len(AXES))


def sharded(
    name: str, folder: Path, leaves: dict, mesh, *, dtypes=("float64", "float64"), told_by="the caller", function=None
) -> dict:
    """Facts of one program of orthogonalize_sharded, whose results go to a file of the case's name."""
    matrices = [matrix for _, matrix, _ in leaves.values()]
    arrays, shardings = placed(leaves, mesh, dtypes[0])
    from_arrays, owned = shardings_of(dict(zip(leaves, arrays, strict=True))), []

    def orthogonalize(stacks: list) -> list:
        owned.extend(stack.shape for stack in stacks)
        return (function or in_dtype(dtypes[1]))(stacks)

    def update(arrays: list) -> list:
        told = {
            "the caller": shardings,
            "the types": [sharding_of(x) for x in arrays],
            "the arrays": [from_arrays(leaf, x) for leaf, x in zip(leaves, arrays, strict=True)],
        }
        return orthogonalize_sharded(arrays, matrices, told[told_by], orthogonalize)

    program = compiled(name, update, arrays)
    results = program(arrays)
    np.savez(folder / f"{name}.npz", **{leaf: np.asarray(x) for leaf, x in zip(leaves, results, strict=True)})
    hlo = program.as_text()
    return {
        "collectives": collectives(hlo),
        "loops": hlo.count(" while("),
        "paper": [
            [one.kind, one.dtype.itemsize, one.sent] for one in collective_bytes(arrays, matrices, shardings, dtypes[1])
        ],
        "owned": owned,
        # XLA makes an empty result anew, wherever it likes.
        "moved": [
            leaf
            for leaf, x, sharding in zip(leaves, results, shardings, strict=True)
            if x.size and sharding and not x.sharding.is_equivalent_to(sharding, x.ndim)
        ],
    }


def as_optax(name: str, folder: Path, leaves: dict, mesh, batched: bool) -> dict:
    """Facts of an update of `muon` in jit, told where the leaves lie by the caller in Auto mode and by types else."""
    params = dict(zip(leaves, placed(leaves, mesh)[0], strict=True))
    in_auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
    transformation = scale_by_muon(
        0.0,
        matrices=lambda path, leaf: leaves[path][1],
        nesterov=False,
        ns_dtype="float64",
        batched=batched,
        shardings=shardings_of(params) if in_auto else None,
    )
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    print(f"== {name}", file=sys.stderr, flush=True)
    for _ in range(3):
        results, state = update(params, state)
    np.savez(folder / f"{name}.npz", **{leaf: np.asarray(x) for leaf, x in results.items()})
    told = [(results, leaf) for leaf in leaves] + [(state.mu, leaf) for leaf in leaves]
    return {
        "collectives": collectives(update.lower(params, state).compile().as_text()),
        "moved": [leaf for tree, leaf in told if not tree[leaf].sharding.is_equivalent_to(params[leaf].sharding, 3)],
        "programs": update._cache_size(),
    }


def plain(name: str, function, arguments: list) -> dict:
    """Facts of a program that leaves the exchange to XLA."""
    hlo = compiled(name, function, arguments).as_text()
    return {"collectives": collectives(hlo), "loops": hlo.count(" while(")}


def main(folder: Path) -> None:
    cases = {f"model {shape}": sharded(f"model {shape}", folder, MODEL, mesh_of(shape)) for shape in MESHES}
    explicit = mesh_of((1, 4, 2), AxisType.Explicit)
    for name, leaves, mesh, options in [
        ("mixed", MIXED, mesh_of((1, 4, 2)), {"told_by": "the arrays"}),
        ("half", MODEL, mesh_of((2, 4, 1)), {"dtypes": ("float32", "bfloat16")}),
        ("layers", LAYERS, mesh_of((1, 4, 2)), {}),
        ("layers and replicas", LAYERS, mesh_of((2, 2, 2)), {}),
        ("labelled", MIXED, mesh_of((2, 2, 2)), {"function": labelled}),
        ("labelled, explicit", MIXED, explicit, {"function": labelled, "told_by": "the types"}),
    ]:
        cases[name] = sharded(name, folder, leaves, mesh, **options)
    with jax.set_mesh(explicit):
        cases["explicit, in a context"] = sharded(
            "explicit, in a context", folder, BLOCK, explicit, told_by="the types"
        )
    for name, mesh, batched in [
        ("optax", mesh_of((2, 4, 1)), True),
        ("optax, one by one", mesh_of((1, 4, 2)), False),
        ("optax, explicit", explicit, True),
    ]:
        cases[name] = as_optax(name, folder, BLOCK, mesh, batched)
    cases["naive"] = plain("naive", lambda arrays: unsharded(BLOCK, arrays), placed(BLOCK, mesh_of((1, 8, 1)))[0])
    mesh = mesh_of((1, 4, 2))
    stack = jax.device_put(jnp.zeros((8, 16, 40)), NamedSharding(mesh, P(None, "fsdp", "tensor")))
    whole = NamedSharding(mesh, P(("fsdp", "tensor")))
    cases["jump"] = plain("jump", lambda x: jax.lax.with_sharding_constraint(x, whole) * 2, stack)
    arrays, shardings = placed(BLOCK, mesh_of((2, 2, 2)))
    results = orthogonalize_sharded(arrays, [matrix for _, matrix, _ in BLOCK.values()], shardings, labelled)
    cases["outside jit"] = {"moved": [x.sharding != s for x, s in zip(results, shardings, strict=True)]}
    np.savez(folder / "outside jit.npz", **{leaf: np.asarray(x) for leaf, x in zip(BLOCK, results, strict=True)})
    of_a_type: list = []
    jax.jit(lambda x: of_a_type.append(sharding_of(x)) or x)(stack)
    cases["Auto mode"] = {"of a type": str(of_a_type[0]), "of its array": str(sharding_of(stack).spec)}
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(Path(sys.argv[1]))
