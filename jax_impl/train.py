"""Training in JAX: one update is one jitted function; the loop around it is `harness/loop.py`.

Twin: `torch_ref/train.py`.
"""

import contextlib
import ctypes
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from harness import loop
from harness.divergence import Diagnosis
from harness.result import RunResult
from harness.saving import NO_ROOM, Snapshot
from jax_impl import exchange, random, scan, sharded_states, sharding
from jax_impl.attention import attention_in_use, why_not_fused
from jax_impl.backend import has_room, machine, on_device_of
from jax_impl.diagnosis import diagnose
from jax_impl.generate import make_generator
from jax_impl.hybrid import clip_by_global_norm, muon_with_adamw
from jax_impl.loss import weighted
from jax_impl.processes import joined, meet
from jax_impl.weights import (
    Params,
    bind,
    from_hf,
    hf_shape,
    model_structure,
    optimizer_slots,
    param_paths,
    restore_optimizer,
    slot_leaves,
    to_hf,
    to_hf_lazily,
    with_slots,
)
from recipe.config import RunConfig
from recipe.mesh import parse_mesh
from recipe.packing import IGNORE
from recipe.params import param_specs
from recipe.schedule import learning_rate_factors


class TrainState(NamedTuple):
    """All that an update changes; `step` counts the updates applied, `skipped` those left out as not finite."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    skipped: jax.Array


def make_schedule(config: RunConfig) -> Callable[[jax.Array], jax.Array]:
    """The learning-rate factor as a function of the updates applied so far."""
    factors = learning_rate_factors(config.schedule, config.steps).astype(config.precision.params)

    def schedule(count):
        return jnp.asarray(factors)[jnp.minimum(count, config.steps - 1)]

    return schedule


def make_optimizer(config: RunConfig, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """The hybrid optimizer for this model's parameters, on a mesh if there is one."""
    ns_dtype = jnp.dtype(config.precision.newton_schulz)
    schedule, layout = make_schedule(config), sharding.layout_of(config)
    shardings = (lambda path, _: sharding.of_param(layout, mesh, path)) if layout else None
    return muon_with_adamw(
        config.muon, config.adamw, config.model, schedule=schedule, ns_dtype=ns_dtype, shardings=shardings
    )


def init_state(config: RunConfig, weights: Mapping[str, np.ndarray], mesh: Mesh | None = None) -> TrainState:
    """The state before the first update, on these weights, laid on the mesh if there is one."""
    layout = sharding.layout_of(config)
    where = {path: sharding.of_param(layout, mesh, path) for path in param_paths(config.model)} if layout else {}
    params = from_hf(weights, config.model, config.precision, where)
    begin = functools.partial(_begun, config, mesh)
    if layout is None:
        return begin(params)
    # Compiled, so that every part is made where it lies.
    shardings = sharding.state_shardings(layout, mesh, jax.eval_shape(begin, params))
    return jax.jit(begin, out_shardings=shardings)(params)


def _begun(config: RunConfig, mesh: Mesh | None, params: Params) -> TrainState:
    """The state of these parameters that nothing has updated."""
    return TrainState(params, make_optimizer(config, mesh).init(params), *jnp.zeros((2,), jnp.int32))


def abstract_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """Shape, dtype and sharding of every leaf of the state; nothing is computed or allocated."""
    dtype, specs, layout = config.precision.params, param_specs(config.model), sharding.layout_of(config)
    params = {
        path: jax.ShapeDtypeStruct(hf_shape(path, specs[name].shape), dtype)
        for path, name in param_paths(config.model).items()
    }
    state = jax.eval_shape(functools.partial(_begun, config, mesh), params)
    if layout is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: here, state)
    else:
        where = sharding.state_shardings(layout, mesh, state)
    return jax.tree.map(lambda leaf, where: leaf.update(sharding=where), state, where)


def restore_sharded(target: TrainState, folder: Path, updates: int, skipped: int) -> TrainState:
    """The state whose arrays a mesh has left in a folder, laid as those of the target are, from `abstract_state`."""
    arrays = sharded_states.restore(folder, {"weights": target.params, **slot_leaves(target.opt_state)})

    def count(leaf, value):
        return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

    opt_state = with_slots(
        target.opt_state, lambda slot, path, _: arrays[slot][path], lambda leaf: count(leaf, updates)
    )
    return TrainState(arrays["weights"], opt_state, count(target.step, updates), count(target.skipped, skipped))


def restore_state(
    state: TrainState, slots: Mapping[str, Mapping[str, np.ndarray]], updates: int, skipped: int
) -> TrainState:
    """The state with its weights, and with optimizer and counts where a saved run left them."""
    opt_state = restore_optimizer(state.opt_state, slots, updates)
    return TrainState(
        state.params, opt_state, jnp.full_like(state.step, updates), jnp.full_like(state.skipped, skipped)
    )


def make_train_step(
    config: RunConfig, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step(state, inputs_ABT, targets_ABT, documents_ABT=None) -> state, metrics`, jitted; the state's buffers
    are donated. With documents no token sees another document's, and targets may be IGNORE.

    Mean gradient over the micro-batches, one clip over all parameters, Muon and AdamW. If the gradient's norm is not
    finite, nothing changes but the count of skipped updates.
    """
    graph = model_structure(config.model, config.precision, scan_layers=config.scan_layers)
    in_layers, apart = scan.stacked(config), scan.unstacked(config)
    optimizer, schedule, layout = make_optimizer(config, mesh), make_schedule(config), sharding.layout_of(config)
    specs = {path: layout.spec(path) for path in param_paths(config.model)} if layout else {}
    rows = PartitionSpec(None, *layout.rows) if layout else PartitionSpec()

    def loss(params, rounded, batch, key):
        return bind(graph, params, rounded).loss(*batch, dropout_key=key)

    options = machine().compiler_options
    if config.precision.deterministic:
        options += machine().deterministic_options

    def mean_gradient(params: Params, step_key: jax.Array, batch: tuple):
        """Loss and gradient, the means over all micro-batches; on a mesh each device has its rows and parts."""
        A = batch[0].shape[0]
        # Matrices are rounded once for all micro-batches; torch does it in each, as it comes to them.
        variables, rounded = exchange.in_use(in_layers(params), config.precision.compute, A > 1 or config.scan_layers)

        def gradient(index, batch):
            key = random.fold_in(step_key, index) if config.model.dropout else None
            return jax.value_and_grad(loss)(variables, exchange.in_turn(rounded, index), batch, key)

        def add_gradient(total, micro_batch):
            return jax.tree.map(jnp.add, total, gradient(*micro_batch)), None

        if A == 1:
            total = gradient(0, jax.tree.map(lambda x: x[0], batch))  # no second copy of the gradients to add them in
        else:
            zero = (jnp.zeros((), config.precision.params), jax.tree.map(jnp.zeros_like, variables))
            total, _ = jax.lax.scan(add_gradient, zero, (jnp.arange(A), batch))
        mean_loss, grads = exchange.reduced(*jax.tree.map(lambda x: x / A, total))
        return mean_loss, apart(grads)

    mean_gradient = exchange.over_devices(
        layout, mesh, mean_gradient, (specs, PartitionSpec(), rows), (PartitionSpec(), specs)
    )
    norm_of = functools.partial(exchange.norm, layout, mesh) if layout else optax.tree.norm

    def train_step(
        state: TrainState, inputs_ABT: jax.Array, targets_ABT: jax.Array, documents_ABT: jax.Array | None = None
    ):
        step_key = random.fold_in(random.key(config.seed), state.step + state.skipped)
        weights_ABT = None
        if documents_ABT is not None:
            targets_ABT, weights_ABT = weighted(targets_ABT, config.precision.params)
        batch = inputs_ABT, targets_ABT, documents_ABT, weights_ABT
        mean_loss, grads = mean_gradient(state.params, step_key, batch)

        grads, grad_norm = clip_by_global_norm(grads, config.clip_norm, norm_of)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1, state.skipped)
        unchanged = state._replace(skipped=state.skipped + 1)
        finite = jnp.isfinite(grad_norm)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, unchanged)
        lr = config.muon.learning_rate * schedule(state.step)
        return new_state, {"loss": mean_loss, "grad_norm": grad_norm, "lr": lr, "skipped": new_state.skipped}

    lies = None
    if layout:  # where it lay before, in the same words, or the next update would be another program
        state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
        lies = (state, sharding.of_param(layout, mesh, ""))
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=lies, compiler_options=dict(options))
    return _with_precision(jitted, config)


def make_evaluate(config: RunConfig, mesh: Mesh | None = None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`evaluate(params, inputs_BT, targets_BT, documents_BT=None) -> sum of losses, number of correct tokens`, jitted;
    with documents targets may be IGNORE.
    """
    graph = model_structure(config.model, config.precision, scan_layers=config.scan_layers)
    in_layers, layout = scan.stacked(config), sharding.layout_of(config)

    @jax.jit
    def evaluate(params, *batch):
        # Rows that do not divide are everybody's.
        divided = layout is not None and len(batch[0]) % layout.shape.rows == 0

        def sums(params, batch):
            params, rounded = exchange.in_use(in_layers(params), config.precision.compute, config.scan_layers)
            return exchange.sums_over_rows(bind(graph, params, rounded).evaluate(*batch), divided)

        specs = {path: layout.spec(path) for path in params} if layout else {}
        rows = layout.rows if layout and divided else PartitionSpec()
        on_devices = exchange.over_devices(layout, mesh, sums, (specs, rows), (PartitionSpec(),) * 2)
        return on_devices(params, batch)

    return _with_precision(evaluate, config)


def _with_precision(function, config: RunConfig):
    """The jitted function, traced and run under the configured precision of float32 products.

    Compiled before its first run, so that the two do not need their memory at once; torch compiles nothing here.
    """
    compiled = False

    @functools.wraps(function)
    def with_precision(*args):
        nonlocal compiled
        with jax.default_matmul_precision(config.precision.matmul), on_device_of(args):
            if not compiled:
                function.lower(*args).compile()  # the call below finds the program
                _return_freed_memory()
                meet("compiled")
                compiled = True
            return function(*args)

    return with_precision


def _return_freed_memory() -> None:
    """Return to the system what XLA's compiler has freed, hundreds of MiB that glibc's malloc would keep."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: None)(0)


def _bytes_here(array: jax.Array) -> int:
    """Bytes that one device has of an array."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


@jax.jit
def _copied(arrays):
    """New buffers with the same content."""
    return jax.tree.map(jnp.copy, arrays)


class Trainer:
    """The JAX side of `harness.loop.Trainer`."""

    read_sharded = staticmethod(sharded_states.read_sharded)

    def __init__(self, config: RunConfig, weights: Mapping[str, np.ndarray]) -> None:
        if config.precision.params == "float64":
            jax.config.update("jax_enable_x64", True)
        if config.out:
            # Shared by all runs beside this one, so that a second run starts without compiling.
            jax.config.update("jax_compilation_cache_dir", str(Path(config.out).resolve().parent / ".jax-cache"))
        self.config = config
        self.room: bool | None = None
        """Whether the device can hold a copy of the state; None before the first save."""
        shape = parse_mesh(config.mesh)
        self.mesh = None if shape is None else sharding.make_mesh(shape)
        """The mesh of all devices, of all processes; None for one device."""
        B = config.batch_size
        self.rows_of_batch = slice(B) if self.mesh is None else sharding.local_rows(self.mesh, B)
        """Rows of a micro-batch that this process's devices hold, and `step` is given."""
        stored = isinstance(weights, sharded_states.StoredArrays)  # `restore` reads them with the slots
        self.state = abstract_state(config, self.mesh) if stored else init_state(config, weights, self.mesh)
        self.train_step, self.eval_step = make_train_step(config, self.mesh), make_evaluate(config, self.mesh)
        device = jax.devices()[0]
        self.environment = {
            "backend": device.platform,
            "device": device.device_kind,
            "jax": jax.__version__,
            "x64": jax.config.jax_enable_x64,
            "deterministic": config.precision.deterministic or not machine().deterministic_options,
            "attention": attention_in_use(config.precision, config.model.dropout, config.data.packed),
            "why_not_fused": why_not_fused(config.precision, config.model.dropout, config.data.packed),
            "machine": dataclasses.asdict(machine()),
        }
        if layout := sharding.layout_of(config):
            self.environment |= {"mesh": str(layout.shape), "not_divided": layout.notes}

    def step(self, *batch_ABT: np.ndarray) -> dict[str, jax.Array]:
        batch = sharding.placed_rows(self.mesh, self.config.batch_size, *batch_ABT)
        self.state, metrics = self.train_step(self.state, *batch)
        return metrics

    def evaluate(self, batches: Iterable[tuple[np.ndarray, ...]]) -> tuple[float, float]:
        loss, correct, tokens = 0.0, 0, 0
        for batch_BT in batches:
            batch = sharding.placed(self.mesh, *batch_BT)
            batch_loss, batch_correct = self.eval_step(self.state.params, *batch)
            loss, correct = loss + float(batch_loss), correct + int(batch_correct)
            tokens += int(np.count_nonzero(batch_BT[1] != IGNORE))
        return loss / tokens, correct / tokens

    def weights(self) -> dict[str, np.ndarray]:
        return to_hf(self.state.params)

    def slots(self) -> dict[str, dict[str, np.ndarray]]:
        return optimizer_slots(self.state.opt_state)

    def snapshot(self) -> Snapshot:
        arrays = {"weights": self.state.params, **slot_leaves(self.state.opt_state)}
        # The next update is given the state's own buffers. A copy on the device is made between two updates, in order.
        if self.room is None:  # Asked once: later the peak holds a copy already.
            self.room = has_room(sum(_bytes_here(array) for array in jax.tree.leaves(arrays)))
            if not self.room:
                print(NO_ROOM, file=sys.stderr)
        if self.mesh is not None:
            copies = _copied(arrays) if self.room else sharded_states.in_host_memory(arrays)
            lazy = {part: to_hf_lazily(copies[part]) for part in arrays}
            shards = sharded_states.Shards(copies, self.config)
            return Snapshot(lazy.pop("weights"), lazy, *self.counts(), shards)
        copies = _copied(arrays) if self.room else jax.tree.map(np.array, arrays)
        lazy = {part: to_hf_lazily({path: copies[part][path] for path in arrays[part]}) for part in arrays}
        return Snapshot(lazy.pop("weights"), lazy, *self.counts())

    def counts(self) -> tuple[int, int]:
        return int(self.state.step), int(self.state.skipped)

    def restore(self, slots: Mapping[str, Mapping[str, np.ndarray]], updates: int, skipped: int) -> None:
        stored = next((part for part in slots.values() if isinstance(part, sharded_states.StoredArrays)), None)
        if stored is not None:
            self.state = restore_sharded(self.state, stored.folder, updates, skipped)
        else:
            self.state = restore_state(self.state, slots, updates, skipped)

    def diagnose(self, *batch_ABT: np.ndarray, position: int | None = None) -> Diagnosis:
        position = sum(self.counts()) if position is None else position
        return diagnose(self.config, self.state.params, self.slots(), position, *batch_ABT)

    def generate(self, tokens: list[int], options) -> Iterable[int]:
        return make_generator(self.config.model, self.config.precision, self.weights())(tokens, options)

    @contextlib.contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        """Trace the updates made inside: XProf's files, and perfetto_trace.json.gz for ui.perfetto.dev."""
        jax.block_until_ready(self.state)
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            yield
            jax.block_until_ready(self.state)


def train(config: RunConfig) -> RunResult:
    """Train as configured, leave the run folder `config.out`, and return what it came to."""
    with joined(config.hosts) as peers:
        if shape := parse_mesh(config.mesh):
            sharding.make_mesh(shape)  # before the text is read
        return loop.run(config, framework="jax", make_trainer=Trainer, peers=peers)


if __name__ == "__main__":
    from harness.cli import leave
    from harness.commands.train import run_command

    leave(run_command("jax_impl.train", train, framework="jax"))
