"""Text generation in JAX: `python -m jax_impl.generate --checkpoint runs/NAME --prompt "..."`.

The prompts of a batch are one compiled call. So is each chunk of new tokens, a loop on the device over steps of one
token per row. Twin: `torch_ref/generate.py`.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl import random
from jax_impl.backend import machine
from jax_impl.cache import KVCache
from jax_impl.model import Linear, Qwen3ForCausalLM
from jax_impl.products import accumulator, product_held
from jax_impl.weights import Params, bind
from recipe.config import ModelConfig, PrecisionConfig
from recipe.params import check_weights, param_specs
from recipe.sampling import CHUNK, COLDEST, NO_TOKEN, Batch, Generator, SamplingOptions

Layers = list[tuple[jax.Array, jax.Array]]


class DecodeState(NamedTuple):
    """What one step hands to the next: the cache, each row's last token and its position, tokens seen, who is done."""

    layers: Layers
    token_B: jax.Array
    position_B: jax.Array
    seen_BV: jax.Array
    done_B: jax.Array


def penalize(logits_V: jax.Array, seen_V: jax.Array, penalty: float) -> jax.Array:
    """Logits of tokens seen before over the penalty where positive, times it where negative (Keskar et al., 2019)."""
    return jnp.where(seen_V, jnp.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def filter_logits(logits_V: jax.Array, *, temperature: float, top_k: int, top_p: float, min_p: float) -> jax.Array:
    """Logits below the largest, over temperature; -inf outside the k largest, then outside the smallest set that
    reaches probability p, then where the probability is below min_p times the largest. Who ties with one kept stays."""
    logits_V = (logits_V - jnp.max(logits_V)) / max(temperature, COLDEST)
    if top_k:
        kth = jax.lax.top_k(logits_V, min(top_k, logits_V.shape[-1]))[0][-1]
        logits_V = jnp.where(logits_V < kth, -jnp.inf, logits_V)
    if top_p < 1.0:
        ascending = jnp.sort(logits_V)
        # The small ones first, whose sum float32 would lose beside the large ones; the last one always stays.
        stays = jnp.cumsum(jax.nn.softmax(ascending)) > 1.0 - top_p
        smallest = jnp.min(jnp.where(stays, ascending, ascending[-1]))
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    if min_p > 0.0:
        probs = jax.nn.softmax(logits_V)
        logits_V = jnp.where(probs < min_p * jnp.max(probs), -jnp.inf, logits_V)
    return logits_V


def sample_token(
    logits_V: jax.Array, seen_V: jax.Array, key, *, repetition_penalty: float, temperature: float, **filters
) -> jax.Array:
    """Index of the next token: the largest logit at temperature 0, else the largest with Gumbel noise added; NO_TOKEN
    where the largest is not finite, as it is if any is NaN."""
    if repetition_penalty != 1.0:
        logits_V = penalize(logits_V, seen_V, repetition_penalty)
    finite = jnp.isfinite(jnp.max(logits_V))
    if temperature > 0.0:
        logits_V = filter_logits(logits_V, temperature=temperature, **filters)
        logits_V = logits_V + random.gumbel(key, logits_V.shape)
    return jnp.where(finite, jnp.argmax(logits_V), NO_TOKEN)


class HeldLinear(Linear):
    """`Linear` as generation keeps it: weight_OI, torch's layout, rounded to the compute dtype once and for all."""

    def __init__(self, linear: Linear) -> None:
        self.weight, self.bias = nnx.Param(linear.kernel[...].T), linear.bias

    def multiply(self, x_MI: jax.Array) -> jax.Array:
        return product_held(self.weight[...], x_MI, x_MI.dtype)


def held_dtype(precision: PrecisionConfig) -> jnp.dtype:
    """The dtype in which weights and cache wait for the next step; their values are those of the compute dtype."""
    compute = jnp.dtype(precision.compute)
    return accumulator(compute) if machine().holds_wide else compute


def held_params(weights: Mapping[str, np.ndarray], config: ModelConfig, precision: PrecisionConfig) -> Params:
    """Parameters of `held_structure`; matrices, embedding and head are rounded to the compute dtype here."""
    check_weights(weights, config)
    params = {}
    for name, (_, role) in param_specs(config).items():
        param = jnp.asarray(weights[name], precision.params)
        if role in ("matrix", "embedding", "head"):
            param = param.astype(precision.compute).astype(held_dtype(precision))
        params[name] = param
    return params


@functools.lru_cache(maxsize=4)
def held_structure(config: ModelConfig, precision: PrecisionConfig) -> nnx.GraphDef:
    """The model without its parameters, every `Linear` a `HeldLinear`: all leaves have Hugging Face's names."""

    def build():
        model = Qwen3ForCausalLM(config, precision)
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, part in list(vars(block).items()):
                    if isinstance(part, Linear):
                        setattr(block, name, HeldLinear(part))
        return model

    graph, _ = nnx.split(nnx.eval_shape(build))
    return graph


def next_logits(
    model: Qwen3ForCausalLM, layers: Layers, token_B: jax.Array, position_B: jax.Array
) -> tuple[Layers, jax.Array]:
    """The cache's layers with each row's token at its position, and the logits of what follows it, float32 or wider."""
    cache = KVCache(layers, position_B)
    x_BD = model.model(token_B[:, None], cache=cache)[:, 0]
    return cache.layers, product_held(model.head_VD, x_BD, accumulator(x_BD.dtype))


@functools.partial(jax.jit, static_argnames="graph")
def prompt_logits(graph: nnx.GraphDef, params: Params, tokens_PT: jax.Array) -> jax.Array:
    """Logits (P, T, V) of what follows each token, float32 or wider."""
    return bind(graph, params)(tokens_PT)


@functools.partial(jax.jit, static_argnames=("graph", "slots", "dtype", "samples"))
def prefill(
    graph: nnx.GraphDef, params: Params, tokens_PT: jax.Array, *, slots: int, dtype: jnp.dtype, samples: int
) -> Layers:
    """The cache's layers after the prompts, with so many slots and each row repeated `samples` times."""
    model = bind(graph, params)
    cache = KVCache.empty(model.config, len(tokens_PT), slots, dtype)
    model.model(tokens_PT, cache=cache)
    return jax.tree.map(lambda x_BKSH: jnp.repeat(x_BKSH, samples, axis=0), cache.layers)


@functools.partial(jax.jit, static_argnames=("graph", "choice"), donate_argnames="state")
def decode(
    graph: nnx.GraphDef,
    params: Params,
    state: DecodeState,
    key_B: jax.Array,
    stop_ids: jax.Array,
    count: int,
    *,
    choice: tuple,
) -> tuple[DecodeState, jax.Array]:
    """The next tokens of each row (B, CHUNK), of which `count` are computed, fewer if all rows are done before.

    NO_TOKEN ends a row; what one that is done gets means nothing. `choice`: the keyword arguments of `sample_token`.
    """
    model = bind(graph, params)
    choose = jax.vmap(functools.partial(sample_token, **dict(choice)))

    def unfinished(carry):
        index, state, _ = carry
        return (index < count) & ~jnp.all(state.done_B)

    def step(carry):
        index, state, new_BC = carry
        layers, logits_BV = next_logits(model, state.layers, state.token_B, state.position_B)
        position_B = state.position_B + 1
        token_B = choose(logits_BV, state.seen_BV, jax.vmap(random.fold_in)(key_B, position_B)).astype(jnp.int32)
        done_B = state.done_B | jnp.isin(token_B, stop_ids) | (token_B == NO_TOKEN)
        legal_B = jnp.maximum(token_B, 0)
        seen_BV = state.seen_BV.at[np.arange(len(token_B)), legal_B].set(True)
        state = DecodeState(layers, legal_B, position_B, seen_BV, done_B)
        return index + 1, state, new_BC.at[:, index].set(token_B)

    new_BC = jnp.zeros((len(state.token_B), CHUNK), jnp.int32)
    _, state, new_BC = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, new_BC))
    return state, new_BC


def make_generator(config: ModelConfig, precision: PrecisionConfig, weights: dict[str, np.ndarray]) -> Generator:
    """`generate(tokens, options)`, an iterator over new tokens, on these weights; `generate.batch` for many prompts."""
    graph, params = held_structure(config, precision), held_params(weights, config, precision)

    def start(batch: Batch, options: SamplingOptions):
        shape = dict(slots=batch.slots, dtype=held_dtype(precision), samples=options.samples)
        with jax.default_matmul_precision(precision.matmul):
            layers = prefill(graph, params, batch.tokens_PT, **shape)
        token_B, position_B, seen_BV = map(jnp.array, (batch.token_B, batch.position_B, batch.seen_BV))
        state = DecodeState(layers, token_B, position_B, seen_BV, done_B=None)
        key_B = jnp.stack([random.key(options.seed, sample) for sample in batch.sample_B])
        stop_ids = np.array(options.stop_ids, np.int32)

        def advance(count: int, done_B: np.ndarray) -> np.ndarray:
            nonlocal state
            state = state._replace(done_B=jnp.array(done_B))
            with jax.default_matmul_precision(precision.matmul):
                state, new_BC = decode(graph, params, state, key_B, stop_ids, count, choice=options.choice)
            return np.asarray(new_BC)[:, :count]

        return advance

    def forward(tokens_PT: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision(precision.matmul):
            return np.asarray(prompt_logits(graph, params, tokens_PT))

    return Generator(config, start, forward)


if __name__ == "__main__":
    from harness.cli import leave
    from harness.commands.generate import run_command

    leave(run_command("jax_impl.generate", make_generator))
