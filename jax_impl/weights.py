"""Between the common dict of Hugging Face names and the Flax model. One rule: the leaf is called `weight`, a Flax
`kernel` is its transpose. The twin is `torch_ref/weights.py`; no code converts between the frameworks directly."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from harness.saving import LazyArrays
from jax_impl.exchange import hold
from jax_impl.model import Qwen3ForCausalLM
from jax_impl.scan import joined
from jax_impl.sharding import place
from recipe.config import ModelConfig, PrecisionConfig
from recipe.params import check_weights, param_specs

Params = dict[str, jax.Array]
_STRIP = 16
"""Rows transposed at once: few enough that what is written stays in a core's cache."""


def hf_name(path: str) -> str:
    """Hugging Face's name of the parameter at a Flax path: `...q_proj.kernel` -> `...q_proj.weight`."""
    return path.removesuffix(".kernel") + ".weight" if path.endswith(".kernel") else path


def flax_path(name: str, role: str) -> str:
    """Inverse of `hf_name`: matrices are kernels, everything else keeps its name."""
    return name.removesuffix(".weight") + ".kernel" if role == "matrix" else name


def param_paths(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of each parameter, by Flax path."""
    return {flax_path(name, spec.role): name for name, spec in param_specs(config).items()}


def from_hf(
    weights: Mapping[str, np.ndarray],
    config: ModelConfig,
    precision: PrecisionConfig,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> Params:
    """Parameters by Flax path, in the parameter dtype; raises ValueError listing every wrong name or shape.

    Weights on disk are read one after another, so that never more than one is held twice. `shardings` says by path
    where on a mesh each is to lie.
    """
    check_weights(weights, config)
    where = shardings or {}
    return {
        path: from_array(weights[name], path, precision.params, where.get(path))
        for path, name in param_paths(config).items()
    }


def from_array(array: np.ndarray, path: str, dtype, where: NamedSharding | None = None) -> jax.Array:
    """The leaf of a Flax path from an array in torch's layout, in the given dtype, on a mesh if it is said where."""
    array = array.T if path.endswith(".kernel") else array
    return jnp.asarray(array, dtype) if where is None else place(np.asarray(array, dtype), where)


def to_hf(params: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """NumPy weights by Hugging Face name, in torch's layout; also of anything shaped and named like parameters."""
    return dict(to_hf_lazily(params).items())


def to_hf_lazily(params: Mapping[str, jax.Array | np.ndarray]) -> LazyArrays:
    """The same, each array fetched from the device when it is asked for."""
    paths = {hf_name(path): path for path in params}
    shapes = {name: hf_shape(path, params[path].shape) for name, path in paths.items()}
    return LazyArrays(shapes, lambda name: in_torch_layout(_whole(params[paths[name]]), paths[name]))


def _whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """All of an array on the host, also of one of several processes, each of which then calls this at the same time."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def hf_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the leaf of a Flax path in torch's layout, and of torch's in Flax's."""
    return shape[::-1] if path.endswith(".kernel") else shape


def in_torch_layout(array: np.ndarray, path: str) -> np.ndarray:
    """The leaf of a Flax path as torch has it, contiguous."""
    return _transposed(array) if path.endswith(".kernel") else np.ascontiguousarray(array)


def _transposed(matrix: np.ndarray) -> np.ndarray:
    """Its transpose in rows, made in strips, which is about twice as fast as at once."""
    transpose = np.empty(matrix.shape[::-1], matrix.dtype)
    for begin in range(0, len(matrix), _STRIP):
        transpose[:, begin : begin + _STRIP] = matrix[begin : begin + _STRIP].T
    return transpose


def slot_leaves(opt_state) -> dict[str, Params]:
    """Optimizer state by slot (mu, exp_avg, exp_avg_sq) and the parameter's path."""
    states = opt_state.inner_states
    muon_state, adam_state = states["muon"].inner_state[0], states["other"].inner_state[0]
    slots = {"mu": muon_state.mu, "exp_avg": adam_state.mu, "exp_avg_sq": adam_state.nu}
    return {slot: {path: leaf for path, leaf in tree.items() if _is_leaf(leaf)} for slot, tree in slots.items()}


def optimizer_slots(opt_state) -> dict[str, dict[str, np.ndarray]]:
    """Optimizer state by slot and Hugging Face name, in torch's layout."""
    return {slot: to_hf(leaves) for slot, leaves in slot_leaves(opt_state).items()}


def restore_optimizer(opt_state, slots: Mapping[str, Mapping[str, np.ndarray]], updates: int):
    """Inverse of `optimizer_slots`: the optimizer state with these slots, as it is after so many updates."""

    def leaf_of(slot, path, leaf):
        where = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
        return from_array(slots[slot][hf_name(path)], path, leaf.dtype, where)

    # The scalars count updates, for Adam's bias correction and both schedules; each its own buffer, to be donated.
    return with_slots(opt_state, leaf_of, lambda leaf: jnp.full_like(leaf, updates))


def with_slots(opt_state, leaf_of, count_of):
    """The optimizer state with `leaf_of(slot, path, leaf)` for each leaf of a slot, `count_of(leaf)` for each count."""

    def filled(tree, slot):
        return {path: leaf_of(slot, path, leaf) if _is_leaf(leaf) else leaf for path, leaf in tree.items()}

    muon, adamw = opt_state.inner_states["muon"], opt_state.inner_states["other"]
    muon_state, *muon_rest = muon.inner_state
    adam_state, *adam_rest = adamw.inner_state
    muon_state = muon_state._replace(mu=filled(muon_state.mu, "mu"))
    adam_state = adam_state._replace(mu=filled(adam_state.mu, "exp_avg"), nu=filled(adam_state.nu, "exp_avg_sq"))
    states = {
        "muon": muon._replace(inner_state=(muon_state, *muon_rest)),
        "other": adamw._replace(inner_state=(adam_state, *adam_rest)),
    }
    return jax.tree.map(lambda leaf: leaf if leaf.ndim else count_of(leaf), opt_state._replace(inner_states=states))


def _is_leaf(leaf) -> bool:
    """Whether it stands for an array, not for a parameter of the other optimizer."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def model_structure(config: ModelConfig, precision: PrecisionConfig, scan_layers: bool = False) -> nnx.GraphDef:
    """The model without its parameters, built without allocating any; its layers `scan.joined` if asked."""

    def build():
        model = Qwen3ForCausalLM(config, precision)
        if scan_layers:
            model.model.layers = joined(model.model.layers, config)
        return model

    graph, _ = nnx.split(nnx.eval_shape(build))
    return graph


def bind(
    graph: nnx.GraphDef, params: Mapping[str, jax.Array], rounded: Mapping[str, jax.Array] | None = None
) -> Qwen3ForCausalLM:
    """The model with these parameters, and with copies of some that have been rounded already; free under `jax.jit`."""
    values = dict(params) | {path: hold(path, params[path], copy) for path, copy in (rounded or {}).items()}
    parts = {tuple(int(part) if part.isdigit() else part for part in path.split(".")): x for path, x in values.items()}
    return nnx.merge(graph, nnx.State(traverse_util.unflatten_dict(parts)))
