"""Cost where it is promised: memory of the compiled programs, compilations, donated buffers, steps nobody needs."""

import contextlib
import dataclasses
import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jax_impl.attention
import jax_impl.generate
import jax_impl.loss
import jax_impl.train
import torch_ref.generate
from jax_impl.backend import machine
from parity_tests.cases import AWKWARD, FLOAT32, random_tokens, random_weights, run_config
from parity_tests.sides import JaxModel, TorchModel
from recipe.config import PrecisionConfig
from recipe.sampling import CHUNK, SamplingOptions
from torch_ref.muon.newton_schulz import orthogonalize_via_newton_schulz as torch_newton_schulz

MODEL = dataclasses.replace(AWKWARD, num_hidden_layers=2)
COMPILE = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """The list of programs that XLA compiles meanwhile, one entry each."""
    found, counting = [], True

    def note(event, duration, **_):
        if counting and event == COMPILE:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    counting = False  # a listener cannot be taken away by a public function


def test_the_counter_counts():
    with compilations() as found:
        jax.jit(lambda x: x * 3.25 + 1)(jnp.arange(11.0))
        once = len(found)
        jax.jit(lambda x: x * 4.25 + 1)(jnp.arange(11.0))
    assert once >= 1 and len(found) > once


def temporaries(function, *shapes) -> int:
    """Bytes of temporary memory of the compiled function."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("which", ["loss and gradients", "losses of an evaluation"])
def test_all_logits_are_never_held(which):
    """From M tokens to 4M the temporaries grow by what depends on M x D; all logits are V / D = 64 times that."""
    D, V, M = 16, 1024, 2 * machine().tokens_at_once
    function = {
        "loss and gradients": jax.value_and_grad(jax_impl.loss.cross_entropy, argnums=(0, 1)),
        "losses of an evaluation": jax_impl.loss.token_losses,
    }[which]
    small, large = (
        temporaries(function, ((m, D), jnp.float32), ((V, D), jnp.float32), ((m,), jnp.int32)) for m in (M, 4 * M)
    )
    # Inputs, targets, weights and gradients in their chunks: less than ten arrays of M x D.
    assert large - small <= 10 * (3 * M) * D * 4 < (3 * M) * V * 4


@functools.cache
def trainer() -> jax_impl.train.Trainer:
    config = run_config(MODEL, FLOAT32, steps=50)
    return jax_impl.train.Trainer(config, random_weights(MODEL))


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return random_tokens(MODEL, 3, 2, 7, seed=seed), random_tokens(MODEL, 3, 2, 7, seed=seed + 1)


def test_a_run_compiles_everything_at_its_first_update_evaluation_and_save():
    training = trainer()

    def round_(seed):
        training.step(*batch(seed))
        training.evaluate([(x[0], y[0]) for x, y in (batch(seed), batch(seed + 2))])
        training.weights(), training.slots(), training.counts()

    round_(0)
    with compilations() as found:
        for seed in range(1, 5):
            round_(seed)
    assert found == []


def test_every_buffer_of_the_state_is_donated():
    training = trainer()
    before = jax.tree.leaves(training.state)
    training.step(*batch(0))
    assert len(before) > 20 and all(leaf.is_deleted() for leaf in before)


def test_generation_compiles_once_for_prompts_and_chunks_of_any_number():
    config, precision = MODEL, PrecisionConfig()
    generate = jax_impl.generate.make_generator(config, precision, random_weights(config))
    # A length of prompt is compiled in steps of 16 tokens; its cache in steps of 64.
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    generate.batch(prompts, SamplingOptions(max_new_tokens=40))
    with compilations() as found:
        generate.batch([[7], [8, 9]], SamplingOptions(max_new_tokens=27, seed=5))  # the last chunk has 12
        generate.batch(prompts, SamplingOptions(max_new_tokens=6, seed=6))  # and here 3
    assert found == []


def decode_state(rows: int, slots: int = 16):
    """A state of decoding with all rows done, and the rest of the arguments."""
    precision = PrecisionConfig()
    graph = jax_impl.generate.held_structure(MODEL, precision)
    params = jax_impl.generate.held_params(random_weights(MODEL), MODEL, precision)
    layers = jax_impl.generate.prefill(
        graph, params, np.ones((rows, 8), np.int32), slots=slots, dtype=jnp.dtype("float32"), samples=1
    )
    seen = jnp.zeros((rows, MODEL.vocab_size), bool)
    state = jax_impl.generate.DecodeState(
        layers, jnp.ones(rows, jnp.int32), jnp.full(rows, 7, jnp.int32), seen, jnp.ones(rows, bool)
    )
    keys = jnp.stack([jax_impl.generate.random.key(0, row) for row in range(rows)])
    return graph, params, state, keys


def test_once_all_rows_are_done_no_step_is_computed_in_jax_and_the_cache_is_donated():
    graph, params, state, keys = decode_state(rows=2)
    leaves = jax.tree.leaves(state)
    choice = SamplingOptions().choice
    after, _ = jax_impl.generate.decode(graph, params, state, keys, np.array([0], np.int32), CHUNK, choice=choice)
    np.testing.assert_array_equal(after.position_B, [7, 7])
    assert all(leaf.is_deleted() for leaf in leaves)


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_chunk_ends_with_its_last_row(side, monkeypatch):
    """Every token ends a row, so one step is enough; the chunks asked for hold 1, 2, 4 ... steps."""
    steps = []
    module = jax_impl.generate if side == "jax" else torch_ref.generate
    original = module.decode

    def decode(*args, **options):
        before = np.asarray(args[1 if side == "torch" else 2].position_B).copy()
        state, new = original(*args, **options)
        steps.append(int((np.asarray(state.position_B) - before).max()))
        return state, new

    monkeypatch.setattr(module, "decode", decode)
    generate = module.make_generator(MODEL, PrecisionConfig(), random_weights(MODEL))
    ends = tuple(range(MODEL.vocab_size))
    assert generate.batch([[1, 2], [3]], SamplingOptions(max_new_tokens=40, stop_ids=ends)) == [[], []]
    assert steps == [1]
    # A row that ends inside a chunk of 2: the third step, which the chunk has room for, is not made.
    steps.clear()
    options = SamplingOptions(max_new_tokens=40, temperature=0.0)
    tokens = list(generate([1, 2, 3], options))
    last = next(i for i in range(3, 40) if tokens[i] not in tokens[:i])
    steps.clear()
    found = list(generate([1, 2, 3], dataclasses.replace(options, stop_ids=(tokens[last],))))
    assert found == tokens[:last] and sum(steps) == last + 1


def products(function, *args) -> int:
    """Multiply-adds of all matrix products of the traced function."""

    def of(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
            for value in equation.params.values():
                for part in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(part, "jaxpr", part)
                    if hasattr(inner, "eqns"):
                        total += of(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        return total

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def test_keys_outside_causality_and_window_are_not_multiplied():
    """Q = 128 queries a block: T (T + Q) / 2 of the T^2 scores, and of a window w at most T (w + Q)."""
    T, Q, w, H = 512, jax_impl.attention.QUERY_BLOCK, 32, 8
    x = jnp.zeros((1, T, 1, H))
    full, windowed = (
        products(lambda x, window=window: jax_impl.attention.attention(x, x, x, window=window), x)
        for window in (None, w)
    )
    assert full == 2 * H * T * (T + Q) // 2
    assert windowed <= 2 * H * T * (w + Q) < full


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_newton_schulz_multiplies_on_the_short_side_in_torch(shape):
    """The Gram matrix of a tall matrix is its transpose's; parity_tests/test_newton_schulz.py counts JAX's FLOPs."""

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "bmm":
                grams.append(tuple(out.shape[-2:]))
            return out

    grams = []
    with Shapes():
        torch_newton_schulz(torch.tensor(np.random.default_rng(0).standard_normal(shape)), dtype=torch.float64)
    assert grams == [(16, 16)] * 5


def test_remat_keeps_less_in_torch_and_wraps_every_block_in_jax():
    """XLA:CPU drops the barriers before it schedules (docs/performance.md), so in JAX the program is read."""
    inputs, targets = random_tokens(MODEL, 2, 64), random_tokens(MODEL, 2, 64, seed=2)
    weights, kept, wrapped = random_weights(MODEL), {}, {}
    for remat in (False, True):
        precision = dataclasses.replace(FLOAT32, remat=remat)
        sizes = []

        def note(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        module = TorchModel(MODEL, precision, weights).module
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            module.loss(torch.tensor(inputs).long(), torch.tensor(targets).long())
        kept[remat] = sum(sizes)
        side = JaxModel(MODEL, precision, weights)
        loss = jax.make_jaxpr(
            lambda params, graph=side.graph: jax_impl.weights.bind(graph, params).loss(inputs, targets)
        )(side.params)
        wrapped[remat] = sum(equation.primitive.name.startswith(("remat", "checkpoint")) for equation in loss.eqns)
    assert kept[True] < kept[False] / 2
    # Without it norms, gates and attention are wrapped one by one; with it those of a block lie inside the block's.
    assert wrapped[True] == MODEL.num_hidden_layers + 1, "the blocks and the final norm"
    assert wrapped[False] > wrapped[True]
