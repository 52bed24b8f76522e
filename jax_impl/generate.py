"""Text generation in JAX: `python -m jax_impl.generate --checkpoint runs/NAME --prompt "..."`.

Twin: `torch_ref/generate.py`.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_impl import random
from jax_impl.model import contract
from jax_impl.weights import bind, from_hf, model_structure
from recipe.config import ModelConfig, PrecisionConfig
from recipe.generation import SamplingOptions, check_context, run_command

# Buffers grow by whole multiples of this many tokens, so that few lengths are compiled.
LENGTH_STEP = 128


def filter_logits(logits_V: jax.Array, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Logits over temperature, -inf outside the k largest and outside the smallest set that reaches probability p."""
    logits_V = logits_V / temperature
    if top_k:
        kth = jax.lax.top_k(logits_V, min(top_k, logits_V.shape[-1]))[0][-1]
        logits_V = jnp.where(logits_V < kth, -jnp.inf, logits_V)
    if top_p < 1.0:
        descending = jnp.sort(logits_V)[::-1]
        probs = jax.nn.softmax(descending)
        # A token stays if those before it have not reached p yet; the first one always stays.
        stays = jnp.cumsum(probs) - probs < top_p
        smallest = jnp.min(jnp.where(stays, descending, jnp.inf))
        logits_V = jnp.where(logits_V < smallest, -jnp.inf, logits_V)
    return logits_V


def sample_token(logits_V: jax.Array, key, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Index of the next token: the largest logit at temperature 0, else the largest with Gumbel noise added."""
    if temperature == 0.0:
        return jnp.argmax(logits_V)
    logits_V = filter_logits(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
    return jnp.argmax(logits_V + random.gumbel(key, logits_V.shape))


def make_generator(
    config: ModelConfig, precision: PrecisionConfig, weights: dict[str, np.ndarray]
) -> Callable[[list[int], SamplingOptions], Iterable[int]]:
    """`generate(tokens, options)`, an iterator over new tokens, on these weights.

    Every token recomputes the whole sequence, padded at the end to a compiled length: causal attention cannot see it.
    """
    graph = model_structure(config, precision)
    params = from_hf(weights, config, precision)

    @functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
    def next_token(params, tokens_L, length, key, **options):
        model = bind(graph, params)
        last_D = model.model(tokens_L[None])[0, length - 1]
        logits_V = contract("d,vd->v", last_D, model.head_VD, jnp.float32)
        return sample_token(logits_V, random.fold_in(key, length), **options)

    def generate(tokens: list[int], options: SamplingOptions) -> Iterator[int]:
        check_context(config, len(tokens), options)
        longest = math.ceil((len(tokens) + options.max_new_tokens) / LENGTH_STEP) * LENGTH_STEP
        buffer_L = np.zeros(min(longest, config.max_position_embeddings), np.int32)
        buffer_L[: len(tokens)] = tokens
        key = random.key(options.seed)
        choice = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
        for length in range(len(tokens), len(tokens) + options.max_new_tokens):
            with jax.default_matmul_precision(precision.matmul):
                token = int(next_token(params, buffer_L, length, key, **choice))
            if token in options.stop_ids:
                return
            yield token
            if length < len(buffer_L):
                buffer_L[length] = token

    return generate


if __name__ == "__main__":
    sys.exit(run_command("jax_impl.generate", make_generator))
