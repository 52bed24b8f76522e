"""Muon on models of anybody's: dicts, Linen, NNX, Equinox, layers in stacks; whose leaves it takes, along which axes.

As what optax expects of it, it is held in test_muon_behaviour.py.
"""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_impl.muon import (
    FROM_HEADS,
    FULLY_CONNECTED,
    TO_HEADS,
    Matrix,
    clip_qk,
    equinox_matrices,
    explain,
    flax_matrices,
    muon,
    muon_or,
    orthogonalize,
    scale_by_neuron_norm,
)
from jax_impl.muon.matrices import path_of
from parity_tests.compare.tolerance import check
from parity_tests.newton_schulz_error import KELLER_JORDAN, allowance, newton_schulz
from recipe.contract import UNIT_ROUNDOFF
from tests.muon_models import BLOCK, MODELS, NNXBlock, Reading, by_path, drawn, jit, label, model, shapes

RATE, BETA = 0.25, 0.95
# The other optimizer's step is a power of two, so that what it does to a gradient is exact.
OTHER = optax.sgd(0.5)

SIGMA = np.linspace(0.0, 1.0, 200_001)
IMAGE = functools.reduce(lambda x, row: row[0] * x + row[1] * x**3 + row[2] * x**5, KELLER_JORDAN, SIGMA)


def check_orthogonal(name: str, value: np.ndarray, direction: np.ndarray, dtype: str = "float32") -> None:
    """Newton-Schulz's result to rounding, with singular values where the quintic takes those of the direction."""
    truth, limit = newton_schulz(direction), allowance(direction, dtype)
    check(name, value, truth, limit)
    start = np.linalg.svd(direction / np.linalg.norm(direction), compute_uv=False)
    reachable = IMAGE[np.searchsorted(SIGMA, start.min()) : np.searchsorted(SIGMA, start.max(), side="right")]
    # Between two points of the grid; and rounding moves no singular value further than its norm.
    margin = np.abs(np.diff(reachable)).max() + limit * np.linalg.norm(truth)
    values = np.linalg.svd(value, compute_uv=False)
    assert reachable.min() - margin < values.min() and values.max() < reachable.max() + margin, name


def check_first_update(table: dict[str, Reading], updates: dict, grads: dict, dtype: str = "float32") -> None:
    """Every leaf of the first update by the hybrid, against the model's table."""
    assert updates.keys() == grads.keys() and table.keys() < grads.keys()
    for path, grad in grads.items():
        if path not in table:
            np.testing.assert_array_equal(updates[path], -0.5 * grad, err_msg=path)
            continue
        reading = table[path]
        scale = max(1.0, reading.fan_out / reading.fan_in) ** 0.5
        pairs = zip(reading.matrices(updates[path]), reading.matrices(grad), strict=True)
        for index, (update, matrix) in enumerate(pairs):
            assert update.shape == (reading.fan_out, reading.fan_in)
            # Nesterov's first direction is beta (1 - beta) g + (1 - beta) g.
            check_orthogonal(f"{path} {index}", update / -(RATE * scale), (1 - BETA**2) * matrix, dtype)


# A pure dict of NNX's has the State's leaves, in the same batches.
CASES = [(name, batched) for name in MODELS for batched in (False, True) if (name, batched) != ("NNX, pure", True)]


@pytest.mark.parametrize(
    ("name", "batched"), CASES, ids=lambda value: {True: "batched", False: "one by one"}.get(value, value)
)
def test_every_matrix_is_orthogonal_along_its_axes_and_the_rest_is_the_others(name, batched):
    params, matrices, table = model(name)
    grads = drawn(params)
    both = muon_or(matrices, muon(RATE, matrices=matrices, ns_dtype="float32", batched=batched), OTHER)
    updates = jit(lambda grads: both.update(grads, both.init(params), params)[0])(grads)
    chex.assert_trees_all_equal_structs(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    check_first_update(table, by_path(updates), by_path(grads))


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
def test_nnx_optimizer(batched):
    """The whole way, from the model's gradients to the model's parameters, in the default bfloat16."""
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: NNXBlock(nnx.Rngs(0))), nnx.Param, ...)
    module = nnx.merge(graph, drawn(params), rest)
    transformation = muon_or(flax_matrices, muon(RATE, matrices=flax_matrices, batched=batched), OTHER)
    optimizer = nnx.jit(lambda module: nnx.Optimizer(module, transformation, wrt=nnx.Param))(module)
    traces = []

    @nnx.jit
    def step(module, optimizer, grads):
        traces.append(1)
        return optimizer.update(module, grads)

    before, grads = by_path(nnx.state(module, nnx.Param)), drawn(params, 4)
    updates = by_path(step(module, optimizer, grads))
    check_first_update(BLOCK, updates, by_path(grads), "bfloat16")
    for path, value in by_path(nnx.state(module, nnx.Param)).items():
        check(path, value, before[path] + updates[path], UNIT_ROUNDOFF["float32"])
    step(module, optimizer, grads)
    assert len(traces) == 1


def test_explain_says_of_each_leaf_what_the_table_says():
    for name in MODELS:
        params, matrices, table = model(name)
        lines = explain(params, matrices).splitlines()
        leaves = by_path(drawn(params))
        assert len(lines) == len(leaves)
        for line, (path, leaf) in zip(sorted(lines), sorted(leaves.items()), strict=True):
            assert line.startswith(path) and str(leaf.shape) in line
            if path in table:
                count = len(table[path].matrices(leaf))
                scale = max(1.0, table[path].fan_out / table[path].fan_in) ** 0.5
                assert f"muon   {count} x ({table[path].fan_out}, {table[path].fan_in}), scale {scale:.3g}" in line
            else:
                assert line.endswith("other")
    assert explain({}) == ""


def test_boxes_of_linen_are_looked_into():
    """`nn.with_partitioning` puts each kernel into a box whose `value` it is, as NNX's variables do."""
    kernel = nn.Partitioned(jnp.ones((10, 3, 7)), names=("embed", "heads", None))
    lines = explain({"value": {"kernel": kernel}}, flax_matrices)
    assert lines.split() == ["value/kernel", *"(10, 3, 7)".split(), "muon", "1", "x", "(21,", "10),", "scale", "1.45"]


# What the rules say of single leaves.
CONVOLUTION_2D, CONVOLUTION_1D = Matrix((-4, -3, -2), (-1,)), Matrix((-3, -2), (-1,))
FLAX_LEAVES = [
    ("up/kernel", (10, 14), {}, FULLY_CONNECTED),
    ("kernel", (10, 14), {}, FULLY_CONNECTED),
    ("value/kernel", (10, 3, 7), {}, TO_HEADS),
    ("attention/q_proj/kernel", (10, 3, 7), {}, TO_HEADS),
    ("attention/o_proj/kernel", (3, 7, 10), {}, FROM_HEADS),
    ("out/kernel", (10, 14), {}, FULLY_CONNECTED),
    ("ConvBlock_0/Dense_0/kernel", (10, 14), {}, FULLY_CONNECTED),
    ("ConvBlock_0/Conv_0/kernel", (3, 5, 2, 7), {}, CONVOLUTION_2D),
    ("convs/1/kernel", (3, 2, 7), {}, CONVOLUTION_1D),
    ("lm_head/kernel", (10, 13), {}, None),
    ("up/bias", (10, 14), {}, None),
    ("Embed_0/embedding", (11, 10), {}, None),
    ("layers/up/kernel", (4, 10, 14), {"stacked": 1}, FULLY_CONNECTED),
    ("layers/value/kernel", (4, 10, 3, 7), {"stacked": {"layers": 1}}, TO_HEADS),
    ("model/layers/up/kernel", (4, 10, 14), {"stacked": {"layers": 1}}, FULLY_CONNECTED),
    ("layers/experts/up/kernel", (4, 5, 10, 14), {"stacked": {"layers": 1, "layers/experts": 2}}, FULLY_CONNECTED),
    ("layers_1/up/kernel", (10, 14), {"stacked": {"layers": 1}}, FULLY_CONNECTED),
    ("layers/Conv_0/kernel", (4, 3, 5, 2, 7), {"stacked": 1}, CONVOLUTION_2D),
    ("head/kernel", (10, 13), {"named": {"head/kernel": None}}, None),
    ("overhead/kernel", (10, 13), {"named": {"head/kernel": None}}, FULLY_CONNECTED),
    ("a/head/kernel", (3, 10, 13), {"named": {"kernel": None, "head/kernel": TO_HEADS}}, TO_HEADS),
    ("head/bias", (10, 13), {"named": {"head/bias": FULLY_CONNECTED}}, FULLY_CONNECTED),
]
LINEAR, WINDOW = Matrix((-1,), (-2,)), Matrix((-3, -2, -1), (-4,))
EQUINOX_LEAVES = [
    ("mlp/layers/0/weight", (14, 10), {}, LINEAR),
    ("convs/0/weight", (7, 2, 3, 5), {}, WINDOW),
    ("conv/weight", (7, 2, 3), {}, Matrix((-2, -1), (-3,))),
    ("layers/0/weight", (4, 14, 10), {"stacked": 1}, LINEAR),
    ("layers/conv/weight", (4, 7, 2, 3, 5), {"stacked": {"layers": 1}}, WINDOW),
    ("norm/weight", (10,), {}, None),
    ("layers/final/weight", (4, 10), {"stacked": 1}, None),
    ("input_layernorm/weight", (10, 14), {}, None),
    ("embedding/weight", (11, 10), {}, None),
    ("lm_head/weight", (13, 10), {}, None),
    ("linear/bias", (14, 10), {}, None),
    ("tokens/weight", (11, 10), {"named": {"tokens/weight": None}}, None),
]
LEAVES = [(flax_matrices, *row) for row in FLAX_LEAVES] + [(equinox_matrices, *row) for row in EQUINOX_LEAVES]


@pytest.mark.parametrize(("rule", "path", "shape", "options", "found"), LEAVES, ids=label)
def test_a_rule_says_of_a_leaf(rule, path, shape, options, found):
    assert rule(path, shapes(*shape), **options) == found


@pytest.mark.parametrize(
    ("rule", "path", "shape", "options", "remedies"),
    [
        (flax_matrices, "mixer/kernel", (3, 10, 14), {}, ["stacked=1", "Matrix((-3, -2), (-1,))"]),
        (flax_matrices, "ConvNet_0/up/kernel", (3, 10, 14), {}, ["stacked=1"]),
        # Scanned layers of experts have as many axes as a convolution.
        (flax_matrices, "layers/up/kernel", (4, 5, 10, 14), {}, ["stacked=1", "Matrix((-4, -3, -2), (-1,))"]),
        (flax_matrices, "layers/up/kernel", (4, 5, 10, 14), {"stacked": 1}, ['named={"layers/up/kernel"']),
        (flax_matrices, "layers/query/kernel", (4, 10, 3, 7), {}, ["stacked=1"]),
        (flax_matrices, "head/kernel", (10, 13), {"stacked": 1}, ['stacked={"layers": 1}', '{"head/kernel": None}']),
        (flax_matrices, "kernel", (), {}, ['named={"kernel": None}']),
        (equinox_matrices, "layers/0/weight", (4, 14, 10), {}, ["stacked=1", "Matrix((-2, -1), (-3,))"]),
        (equinox_matrices, "stem/weight", (7, 2, 3, 5), {}, ["Matrix((-3, -2, -1), (-4,))"]),
    ],
    ids=label,
)
def test_axes_that_cannot_be_told_are_refused(rule, path, shape, options, remedies):
    with pytest.raises(ValueError) as refused:
        rule(path, shapes(*shape), **options)
    for part in (path, str(shape), *remedies):
        assert part in str(refused.value)


def test_paths_name_an_attentions_value_and_leave_out_a_variables():
    params = {"value": {"kernel": nnx.Param(jnp.ones((2, 3)))}, "query": [jnp.ones(4)]}
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert paths == ["query/0", "value/kernel"]
    assert path_of((jax.tree_util.DictKey("value"),)) == "value"
    assert path_of((jax.tree_util.GetAttrKey("value"),)) == "value"


NO_MATRIX = {
    "one axis": ({"scale": np.ones(10, np.float32)}, None, ["scale (10,)", "two_axes", "muon_or"]),
    "three axes": ({"a": [np.ones((3, 4, 5), np.float32)]}, None, ["a/0 (3, 4, 5)", "two_axes", "matrices="]),
    "a number": ({"temperature": 1.0}, None, ["temperature ()", "two_axes", "muon_or"]),
    "complex": ({"a": np.ones((4, 6), np.complex64)}, None, ["a (4, 6) is complex64", "another optimizer"]),
    "integers": ({"a": np.ones((4, 6), np.int8)}, None, ["a (4, 6) is int8", "another optimizer"]),
    "truths": ({"a": np.ones((4, 6), bool)}, None, ["a (4, 6) is bool", "another optimizer"]),
    "Flax's bias": (
        {"up": {"bias": np.ones(10, np.float32)}},
        functools.partial(flax_matrices, stacked=0),
        ["up/bias (10,)", "flax_matrices", "muon_or"],
    ),
    "an axis twice": ({"a": np.ones((4, 6))}, lambda *_: Matrix((0,), (-2,)), ["a (4, 6)", "Matrix", "of 2"]),
    "an axis too many": ({"a": np.ones((4, 6))}, lambda *_: Matrix((0,), (2,)), ["a (4, 6)", "Matrix"]),
    "an axis too early": ({"a": np.ones((4, 6))}, lambda *_: Matrix((-3,), (1,)), ["a (4, 6)", "Matrix"]),
    "no input": ({"a": np.ones((4, 6))}, lambda *_: Matrix((), (1,)), ["a (4, 6)", "Matrix"]),
    "axes bare": ({"a": np.ones((4, 6))}, lambda *_: Matrix(-2, -1), ["a (4, 6)", "return e.g. Matrix((-2,), (-1,))"]),
    "a mask": ({"a": np.ones((4, 6))}, lambda *_: True, ["a (4, 6) is True", "Matrix((-2,), (-1,))", "None"]),
}


@pytest.mark.parametrize("what", NO_MATRIX)
def test_what_is_no_matrix_is_refused_by_init(what):
    params, matrices, parts = NO_MATRIX[what]
    for factory in (muon(RATE, matrices=matrices), scale_by_neuron_norm(matrices=matrices)):
        with pytest.raises(ValueError) as refused:
            factory.init(params)
        assert [part for part in parts if part not in str(refused.value)] == []
    with pytest.raises(ValueError, match=re.escape(parts[0])):
        orthogonalize(params, matrices)


def test_muon_alone_refuses_a_model():
    for name in ("Linen", "NNX, stacked", "Equinox"):
        params, matrices, _ = model(name)
        with pytest.raises(ValueError, match=r"\(\d.*give it to another optimizer \(muon_or\)"):
            muon(RATE, matrices=matrices).init(params)


BAD_ARGUMENTS = [
    (muon, dict(beta=1.5), "beta=1.5", "0.95"),
    (muon, dict(beta=-0.1), "beta=-0.1", "0.95"),
    (muon, dict(beta=float("nan")), "beta=nan", "0.95"),
    (muon, dict(neuron_beta=1.0), "beta=1.0", "0.95"),
    (muon, dict(eps=-1), "eps=-1", "at least 0"),
    (muon, dict(scale="frobenius"), "scale='frobenius'", "fan_ratio, unclamped_fan_ratio, consistent_rms"),
    (muon, dict(momentum="sum"), "momentum='sum'", "'average' or 'heavy_ball'"),
    (muon, dict(ns_dtype="bfloat17"), "ns_dtype='bfloat17'", "'bfloat16'"),
    (muon, dict(ns_dtype="int8"), "ns_dtype='int8'", "'bfloat16'"),
    (muon, dict(ns_dtype="complex64"), "ns_dtype='complex64'", "'bfloat16'"),
    (muon, dict(mu_dtype="float33"), "mu_dtype='float33'", "'float32'"),
    (muon, dict(coefficients=()), "coefficients=()", "rows (a, b, c)"),
    (muon, dict(coefficients=((3.4445, -4.7750),)), "coefficients=((3.4445, -4.775),)", "rows (a, b, c)"),
    (muon, dict(coefficients=(3.4445, -4.7750, 2.0315)), "coefficients=(3.4445,", "rows (a, b, c)"),
    (muon, dict(coefficients="jordan"), "coefficients='jordan'", "KELLER_JORDAN"),
    (muon, dict(coefficients=5), "coefficients=5", "KELLER_JORDAN"),
    (scale_by_neuron_norm, dict(eps=-1e-8), "eps=-1e-08", "at least 0"),
    (clip_qk, dict(threshold=0), "threshold=0", "100"),
]


@pytest.mark.parametrize(("factory", "arguments", "value", "remedy"), BAD_ARGUMENTS, ids=label)
def test_bad_arguments_are_refused_where_they_are_given(factory, arguments, value, remedy):
    first = {muon: [RATE], clip_qk: [lambda *_: None], scale_by_neuron_norm: []}[factory]
    with pytest.raises(ValueError) as refused:
        factory(*first, **arguments)
    assert value in str(refused.value) and remedy in str(refused.value) and "\n" not in str(refused.value)


def test_orthogonalize_takes_a_table_as_a_list_and_refuses_an_empty_one():
    tree = {"a": drawn(shapes(4, 6))}
    as_list, as_tuple = (orthogonalize(tree, coefficients=table) for table in ([[2, -1.5, 0.5]], ((2, -1.5, 0.5),)))
    np.testing.assert_array_equal(as_list["a"], as_tuple["a"])
    with pytest.raises(ValueError, match="coefficients"):
        orthogonalize(tree, coefficients=())
