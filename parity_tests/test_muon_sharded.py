"""Muon on a mesh: every matrix whole on one owner, and what is sent is what the formula says, read from the HLO."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_impl.muon.matrices import FULLY_CONNECTED, as_stack, fans
from jax_impl.muon.sharded import collective_bytes, orthogonalize_sharded, sharding_of, shardings_of
from parity_tests.compare.tolerance import check
from parity_tests.muon_on_meshes import (
    AXES,
    BLOCK,
    MESHES,
    MIXED,
    SETS,
    in_dtype,
    labelled,
    unsharded,
    values,
)
from parity_tests.newton_schulz_error import allowance, newton_schulz
from recipe.params import param_specs
from recipe.presets import get_preset

ROOT = Path(__file__).resolve().parents[1]
# Of each program of Newton-Schulz, which set of leaves it is given.
LEAVES = {f"model {mesh}": "model" for mesh in MESHES} | {
    **{"mixed": "mixed", "explicit, in a context": "block"},
    **{"half": "model", "layers": "layers", "layers and replicas": "layers"},
}
AS_OPTAX = {"optax": (3, 2), "optax, one by one": (2, 1), "optax, explicit": (2, 2)}
"""Updates of `scale_by_muon` in jit, the first on data x fsdp: their collectives, and programs for three of them. Specs
that name a mesh axis of size 1 or leave out trailing axes come back from jit in other words, for one more program."""
LABELLED = ["labelled", "labelled, explicit"]
IN_FLOAT64 = [name for name in LEAVES if name != "half"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """All cases, run once in a process of eight devices: facts by name, folder of results, stderr by name."""
    folder = tmp_path_factory.mktemp("meshes")
    # Machine code need not be good; the HLO is the same.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    # The first import plants the bug that `parity_tests.mutants` asks for, if it does.
    run = "import parity_tests.mutation, runpy; runpy.run_module('parity_tests.muon_on_meshes', run_name='__main__')"
    command = [sys.executable, "-c", run, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(part.split("\n", 1) for part in done.stderr.split("== ")[1:])
    return {"facts": json.loads((folder / "cases.json").read_text(encoding="utf-8")), "folder": folder, "said": said}


@functools.cache
def truths_of(key: str) -> dict[str, list]:
    """Of each leaf of a set its matrices, each with what a NumPy iteration makes of it and the float64 allowance."""
    stacks = {name: stack_of(x, SETS[key][name]) for name, x in values(SETS[key]).items()}
    return {name: [(x, newton_schulz(x), allowance(x, "float64")) for x in stack] for name, stack in stacks.items()}


def stack_of(leaf: np.ndarray, description: tuple) -> np.ndarray:
    """(n, fan_out, fan_in) of a leaf."""
    matrix = description[1]
    return as_stack(leaf, matrix).reshape(-1, *fans(leaf.shape, matrix)[::-1])


def sent(facts: dict) -> list:
    return sorted([one["kind"], one["width"], one["sent"]] for one in facts["collectives"])


@pytest.mark.parametrize("name", [*LEAVES, *LABELLED])
def test_what_is_sent_is_what_the_formula_says(runs, name):
    facts = runs["facts"][name]
    assert sent(facts) == sorted(facts["paper"])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_formula_by_hand(runs, mesh):
    """Two all-to-alls for all leaves whatever axes shard them, and one all-gather if there are replicas."""
    replicas, owners = mesh[0], mesh[1] * mesh[2]
    # By shape and division: query and value, out, gate and up, down; two layers of each, padded to eight.
    padded = 8 * (16 * 24 + 24 * 16 + 16 * 40 + 40 * 16) * 8
    each_way = padded // (owners * replicas) * (owners - 1) // owners
    back = padded // owners * (replicas - 1) // replicas
    expected = [["all-to-all", 8, each_way]] * 2 + [["all-gather", 8, back]] * (replicas > 1)
    assert sent(runs["facts"][f"model {mesh}"]) == sorted(expected)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_work_is_divided_by_all_devices(runs, mesh):
    """Of four, two, four and two matrices each of eight devices iterates one: replicas do not repeat each other."""
    owned = runs["facts"][f"model {mesh}"]["owned"]
    assert sorted(owned) == sorted([[1, 24, 16], [1, 16, 24], [1, 40, 16], [1, 16, 40]])


def test_axes_that_count_matrices_only_divide_the_work(runs):
    assert runs["facts"]["layers"]["collectives"] == [], "each device has three of 24 layers"
    assert runs["facts"]["layers"]["owned"] == [[3, 7, 5]]
    assert [kind for kind, *_ in sent(runs["facts"]["layers and replicas"])] == ["all-gather"]
    assert runs["facts"]["layers and replicas"]["owned"] == [[3, 7, 5]], "each of two replicas has three of six"


def test_a_narrow_result_travels_narrow(runs):
    assert [width for kind, width, _ in sent(runs["facts"]["half"])] == [2, 2, 4], "all-gather, all-to-all out, in"


@pytest.mark.parametrize("name", LEAVES)
def test_no_collective_is_in_the_iteration(runs, name):
    facts = runs["facts"][name]
    assert facts["loops"] >= len(facts["owned"]) > 0
    assert not [one for one in facts["collectives"] if one["in_loop"]]


def test_the_naive_update_has_them_there(runs):
    """What the test above looks for can be seen."""
    assert [one for one in runs["facts"]["naive"]["collectives"] if one["in_loop"]]
    assert not [one for one in runs["facts"]["naive"]["collectives"] if one["kind"] == "all-to-all"]


def test_nothing_is_replicated_for_want_of_a_way(runs):
    warned = [name for name, text in runs["said"].items() if "Involuntary full rematerialization" in text]
    assert warned == ["jump"], "XLA says it of the one program that was written to make it"
    assert set(LEAVES) < set(runs["said"])


@pytest.mark.parametrize("name", [*LEAVES, *LABELLED])
def test_results_lie_as_the_leaves(runs, name):
    assert runs["facts"][name]["moved"] == []


def check_leaves(name: str, key: str, results: dict, allow) -> None:
    """Every matrix of the results against its truth; `allow(matrix, its float64 allowance)` bounds the error."""
    assert set(results) == set(SETS[key])
    for leaf, truths in truths_of(key).items():
        assert results[leaf].shape == SETS[key][leaf][0]
        for index, (one, (x, truth, limit)) in enumerate(
            zip(stack_of(results[leaf], SETS[key][leaf]), truths, strict=True)
        ):
            check(f"{name} {leaf} {index}", one, truth, allow(x, limit))


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_values_are_those_of_whole_matrices(runs, name):
    results = dict(np.load(runs["folder"] / f"{name}.npz"))
    assert {x.dtype for x in results.values()} == {np.dtype("float64")}
    check_leaves(name, LEAVES[name], results, lambda _, limit: limit)


@pytest.mark.slow
def test_so_are_those_of_the_unsharded_update_and_without_a_mesh():
    """So sharded and unsharded differ by two allowances at most."""
    matrices = [matrix for _, matrix, _ in MIXED.values()]

    def update(arrays: list) -> tuple[list, list]:
        assert [sharding_of(x) for x in arrays] == nowhere
        return unsharded(MIXED, arrays), orthogonalize_sharded(arrays, matrices, nowhere, in_dtype("float64"))

    nowhere = [None] * len(MIXED)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in values(MIXED).values()]
        assert [sharding_of(x) for x in arrays] == nowhere
        for name, done in zip(["unsharded", "no mesh"], jax.jit(update)(arrays), strict=True):
            check_leaves(name, "mixed", dict(zip(MIXED, map(np.asarray, done), strict=True)), lambda _, limit: limit)
    assert collective_bytes(arrays, matrices, nowhere, "float64") == []


def test_values_in_bfloat16(runs):
    """To the error that rounding to bfloat16 makes, with the leaf's dtype given back."""
    results = dict(np.load(runs["folder"] / "half.npz"))
    assert {x.dtype for x in results.values()} == {np.dtype("float32")}
    check_leaves("half", "model", results, lambda x, _: allowance(x, "bfloat16"))


@pytest.mark.parametrize("name", AS_OPTAX)
def test_the_transformation_takes_the_same_way(runs, name):
    """And momentum and updates lie where the parameters do."""
    facts = runs["facts"][name]
    assert not [one for one in facts["collectives"] if one["in_loop"]] and facts["moved"] == []
    assert (len(facts["collectives"]), facts["programs"]) == AS_OPTAX[name]
    check_leaves(name, "block", dict(np.load(runs["folder"] / f"{name}.npz")), lambda _, limit: limit)


@pytest.mark.parametrize("name", [*LABELLED, "outside jit"])
def test_every_entry_is_in_its_place(runs, name):
    """Orthogonalisation commutes with a permutation of rows or columns, so the test above is blind to one."""
    results, leaves = np.load(runs["folder"] / f"{name}.npz"), BLOCK if name == "outside jit" else MIXED
    for leaf, x in values(leaves).items():
        [expected] = labelled([stack_of(x, leaves[leaf])])
        assert np.array_equal(stack_of(results[leaf], leaves[leaf]), expected), leaf


def test_results_lie_as_the_leaves_outside_jit_too(runs):
    assert not any(runs["facts"]["outside jit"]["moved"])


def test_a_type_tells_in_explicit_mode_only(runs):
    assert runs["facts"]["Auto mode"] == {"of a type": "None", "of its array": str(P(None, "fsdp", "tensor"))}


# Auto, whatever a release takes by default: only there may a spec leave an axis to XLA.
MESH = AbstractMesh((2, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def refusal(shape: tuple, spec: P, mesh: AbstractMesh = MESH) -> str:
    """The ValueError for a leaf of this shape and sharding, beside another that is whole on MESH."""
    leaf, shardings = jax.ShapeDtypeStruct(shape, "float32"), [NamedSharding(mesh, spec), NamedSharding(MESH, P())]
    with pytest.raises(ValueError) as caught:
        collective_bytes([leaf, leaf], [FULLY_CONNECTED] * 2, shardings, "float32")
    return str(caught.value)


def test_refusals():
    uneven = refusal((6, 8), P("fsdp", "tensor"))
    assert "(6, 8)" in uneven and "'fsdp'" in uneven and "6 is no multiple of the 4 devices along fsdp" in uneven
    assert "6 is no multiple of the 8 devices along data and fsdp" in refusal((6, 8), P(("data", "fsdp")))
    assert "for each of its axes" in refusal((8, 8), P(None, None, "fsdp"))
    assert "for each of its axes" in refusal((8, 8), P(P.UNCONSTRAINED))
    unlike = refusal((8, 8), P("fsdp"), AbstractMesh((2, 2, 2), AXES))
    assert "'fsdp': 4" in unlike and "'fsdp': 2" in unlike


def test_shardings_of_a_tree():
    tree = {"layers": [{"kernel": NamedSharding(MESH, P("fsdp"))}], "scale": np.ones(3)}
    told = shardings_of(tree)
    assert told("layers/0/kernel", None) == tree["layers"][0]["kernel"] and told("scale", None) is None
    with pytest.raises(ValueError, match=re.escape("layers/1/kernel is not in the tree")):
        told("layers/1/kernel", None)


def test_planning_needs_no_device():
    """Eight-way and 256-way, from shapes: a matrix for each owner costs what it weighs, and one alone as much."""
    leaf = jax.ShapeDtypeStruct((256, 1024, 3072), "float32")
    for ways in (8, 256):
        sharding = NamedSharding(AbstractMesh((1, ways, 1), AXES), P(None, "fsdp"))
        weight = leaf.size * 4
        way_in, way_out = collective_bytes([leaf], [FULLY_CONNECTED], [sharding], "bfloat16")
        assert way_in.sent == 2 * way_out.sent == weight // ways * (ways - 1) // ways
        assert (way_in.kind, way_in.axes, way_in.dtype.name) == ("all-to-all", ("fsdp",), "float32")
    alone = jax.ShapeDtypeStruct((1024, 3072), "float32")
    of_one = collective_bytes([alone], [FULLY_CONNECTED], [NamedSharding(sharding.mesh, P("fsdp"))], "bfloat16")
    assert [one.sent for one in of_one] == [way_in.sent, way_out.sent]


def test_the_leaves_are_awkward():
    """No two sizes of a leaf are equal but a square's, so no swapped axis survives."""
    for name, (shape, _, _) in {**MIXED, **BLOCK}.items():
        assert len(set(shape)) == len(shape) or "square" in name


def guide_rows() -> list[str]:
    """The table of docs/muon.md: Qwen3-0.6B's matrices, fsdp on the hidden axis and tensor on the other."""
    specs = {
        name: spec.shape for name, spec in param_specs(get_preset("qwen3-0.6b").model).items() if spec.role == "matrix"
    }
    leaves = [jax.ShapeDtypeStruct(shape[::-1], "float32") for shape in specs.values()]
    weight, rows = sum(leaf.size for leaf in leaves) * 4, []
    for mesh in MESHES:
        shardings = [
            NamedSharding(
                AbstractMesh(mesh, AXES),
                P("tensor", "fsdp") if ".o_proj." in name or ".down_proj." in name else P("fsdp", "tensor"),
            )
            for name in specs
        ]
        sent = collective_bytes(leaves, [FULLY_CONNECTED] * len(leaves), shardings, "bfloat16")
        ways = mesh[1] * mesh[2]
        padded = sent[0].sent * 8 * ways // (ways - 1)
        figures = [f"{one.sent / 1e6:.1f}" for one in sent] + ["–"] * (3 - len(sent))
        rows.append(
            f"| {', '.join(map(str, mesh))} | {len(sent)} | {' | '.join(figures)} | {padded / weight - 1:.1%} |"
        )
    return rows


def test_the_guide_has_the_formulas_figures():
    guide = (ROOT / "docs/muon.md").read_text(encoding="utf-8").splitlines()
    missing = [row for row in guide_rows() if row not in guide]
    assert not missing
