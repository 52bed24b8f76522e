"""Models of anybody's, in shapes alone, and by hand how each of their leaves is read as matrices (fan_out, fan_in).

Nothing of `jax_impl.muon.matrices` says how: what Muon does depends on gradients, and these are drawn here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl.muon import Matrix, equinox_matrices, flax_matrices, two_axes

# For programs that run once: they compile in two thirds of the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def label(value: Any) -> str:
    return getattr(value, "__name__", str(value))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        hidden = nn.LayerNorm(name="norm")(x)
        hidden = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=21, name="attention")(hidden)
        return x + nn.Dense(10, name="down")(nn.Dense(14, name="up")(hidden)), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens, images):
        x, _ = LinenBlock(name="block")(nn.Embed(11, 10)(tokens))
        return nn.Dense(13, name="lm_head")(x), nn.Conv(7, (3, 5))(images), nn.Conv(4, (3,), name="conv_1d")(images[0])


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return nn.Dense(6, name="head")(scan(name="layers")(x, None)[0])


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(10, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 10, 21, decode=False, rngs=rngs)
        self.up = nnx.Linear(10, 14, rngs=rngs)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 10, rngs=rngs)
        self.convs = nnx.List([nnx.Conv(2, 7, (3, 5), rngs=rngs), nnx.Conv(7, 4, 3, rngs=rngs)])
        self.block = NNXBlock(rngs)
        self.lm_head = nnx.Linear(10, 13, rngs=rngs)


class NNXStack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=4)(nnx.vmap(NNXBlock))(rngs)
        self.head = nnx.Linear(10, 6, rngs=rngs)


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(10)
        self.attention = eqx.nn.MultiheadAttention(3, 10, qk_size=5, vo_size=7, use_query_bias=True, key=key)
        self.mlp = eqx.nn.MLP(10, 6, 14, 1, key=key)


class EquinoxModel(eqx.Module):
    embedding: eqx.nn.Embedding
    convs: list[eqx.nn.Conv2d]
    block: EquinoxBlock

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(11, 10, key=key)
        self.convs = [eqx.nn.Conv2d(2, 7, (3, 5), key=key)]
        self.block = EquinoxBlock(key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layers:
    up: Any
    rest: tuple
    frozen: flax.core.FrozenDict


class Reading(NamedTuple):
    """How a leaf is read: into matrices of this shape, (fan_out, fan_in)."""

    matrices: Callable[[np.ndarray], list[np.ndarray]]
    fan_out: int
    fan_in: int


def each(reading: Reading) -> Reading:
    """The same for a leaf whose first axis counts layers."""
    return reading._replace(matrices=lambda x: [matrix for layer in x for matrix in reading.matrices(layer)])


DENSE_UP, DENSE_DOWN = Reading(lambda x: [x.T], 14, 10), Reading(lambda x: [x.T], 10, 14)
# (in, heads, head_dim) and (heads, head_dim, out): 3 heads of 7.
QUERY, OUT = Reading(lambda x: [x.reshape(10, 21).T], 21, 10), Reading(lambda x: [x.reshape(21, 10).T], 10, 21)
BLOCK = {f"attention/{name}/kernel": QUERY for name in ("query", "key", "value")} | {
    "attention/out/kernel": OUT,
    "up/kernel": DENSE_UP,
}
LINEN_BLOCK = BLOCK | {"down/kernel": DENSE_DOWN}
EQUINOX_BLOCK = {
    "attention/query_proj/weight": Reading(lambda x: [x], 15, 10),
    "attention/key_proj/weight": Reading(lambda x: [x], 15, 10),
    "attention/value_proj/weight": Reading(lambda x: [x], 21, 10),
    "attention/output_proj/weight": Reading(lambda x: [x], 10, 21),
    "mlp/layers/0/weight": Reading(lambda x: [x], 14, 10),
    "mlp/layers/1/weight": Reading(lambda x: [x], 6, 14),
}


def under(start: str, table: dict[str, Reading]) -> dict[str, Reading]:
    return {f"{start}/{path}": reading for path, reading in table.items()}


class Model(NamedTuple):
    params: Any
    """Shapes and dtypes."""
    matrices: Any
    """The rule."""
    table: dict[str, Reading]
    """The matrices; every other leaf is the other optimizer's."""


def shapes(*shape: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def linen(module: nn.Module, *inputs: Any) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def equinox(build: Callable[[Any], Any]) -> Any:
    return eqx.filter(eqx.filter_eval_shape(build, jax.random.key(0)), lambda x: hasattr(x, "dtype"))


@functools.cache
def model(name: str) -> Model:
    if name == "dict":
        params = {"up": shapes(10, 14), "down": shapes(14, 10), "scale": shapes(10), "none": None, "number": shapes()}
        return Model(params, two_axes, {"up": DENSE_UP, "down": DENSE_DOWN})
    if name == "containers":
        rest = ([shapes(14, 10), None], Matrix(shapes(10), shapes(14, 10)))
        params = Layers(shapes(10, 14), rest, flax.core.freeze({"up": shapes(10, 14), "scale": shapes(3)}))
        table = {"up": DENSE_UP, "rest/0/0": DENSE_DOWN, "rest/1/fan_out": DENSE_DOWN, "frozen/up": DENSE_UP}
        return Model(params, two_axes, table)
    if name == "Linen":
        params = linen(LinenModel(), jnp.zeros((1, 4), int), jnp.zeros((1, 8, 8, 2)))
        convolutions = {
            "Conv_0/kernel": Reading(lambda x: [x.reshape(30, 7).T], 7, 30),
            "conv_1d/kernel": Reading(lambda x: [x.reshape(6, 4).T], 4, 6),
        }
        return Model(params, flax_matrices, convolutions | under("block", LINEN_BLOCK))
    if name == "Linen, scanned":
        params = linen(LinenStack(), jnp.zeros((1, 4, 10)))
        table = {"head/kernel": Reading(lambda x: [x.T], 6, 10)}
        table |= {path: each(reading) for path, reading in under("layers", LINEN_BLOCK).items()}
        return Model(params, functools.partial(flax_matrices, stacked={"layers": 1}), table)
    if name == "NNX, stacked":
        params = nnx.state(nnx.eval_shape(lambda: NNXStack(nnx.Rngs(0))), nnx.Param)
        table = {path: each(reading) for path, reading in under("layers", BLOCK).items()}
        rule = functools.partial(flax_matrices, stacked={"layers": 1}, named={"head/kernel": None})
        return Model(params, rule, table)
    if name.startswith("NNX"):
        params = nnx.state(nnx.eval_shape(lambda: NNXModel(nnx.Rngs(0))), nnx.Param)
        convolutions = {
            "convs/0/kernel": Reading(lambda x: [x.reshape(30, 7).T], 7, 30),
            "convs/1/kernel": Reading(lambda x: [x.reshape(21, 4).T], 4, 21),
        }
        table = convolutions | under("block", BLOCK)
        return Model(nnx.to_pure_dict(params) if name.endswith("pure") else params, flax_matrices, table)
    if name == "Equinox":
        table = {"convs/0/weight": Reading(lambda x: [x.reshape(7, 30)], 7, 30)} | under("block", EQUINOX_BLOCK)
        return Model(equinox(EquinoxModel), equinox_matrices, table)
    assert name == "Equinox, stacked"
    params = equinox(lambda key: eqx.filter_vmap(EquinoxBlock)(jax.random.split(key, 4)))
    table = {path: each(reading) for path, reading in EQUINOX_BLOCK.items()}
    return Model(params, functools.partial(equinox_matrices, stacked=1), table)


MODELS = ["dict", "containers", "Linen", "Linen, scanned", "NNX", "NNX, pure", "NNX, stacked"]
MODELS += ["Equinox", "Equinox, stacked"]


def drawn(params: Any, seed: int = 3, scale: float = 1.0) -> Any:
    """Arrays for these shapes, exact in their dtypes."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * generator.standard_normal(x.shape), x.dtype), params)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Leaves in float64 by path, NNX's `value` left out: read here by NNX's own means where it is NNX's."""
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(x, np.float64) for keys, x in leaves}
