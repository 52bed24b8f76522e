"""Text generation in torch: `python -m torch_ref.generate --checkpoint runs/NAME --prompt "..."`.

The prompts of a batch are one call, and then a plain loop computes one token per row and step. Twin:
`jax_impl/generate.py`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from recipe.config import ModelConfig, PrecisionConfig
from recipe.params import param_specs
from recipe.sampling import COLDEST, NO_TOKEN, Batch, Generator, SamplingOptions
from torch_ref import random
from torch_ref.cache import KVCache
from torch_ref.model import Qwen3ForCausalLM
from torch_ref.products import accumulator
from torch_ref.weights import from_hf

Layers = list[tuple[torch.Tensor, torch.Tensor]]


class DecodeState(NamedTuple):
    """What one step hands to the next: the cache, each row's last token and its position, tokens seen, who is done."""

    layers: Layers
    token_B: torch.Tensor
    position_B: torch.Tensor
    seen_BV: torch.Tensor
    done_B: torch.Tensor


def penalize(logits_V: torch.Tensor, seen_V: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits of tokens seen before over the penalty where positive, times it where negative (Keskar et al., 2019)."""
    return torch.where(seen_V, torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def filter_logits(
    logits_V: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """Logits below the largest, over temperature; -inf outside the k largest, then outside the smallest set that
    reaches probability p, then where the probability is below min_p times the largest. Who ties with one kept stays."""
    logits_V = (logits_V - torch.max(logits_V)) / max(temperature, COLDEST)
    if top_k:
        kth = torch.topk(logits_V, min(top_k, logits_V.shape[-1]))[0][-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -math.inf)
    if top_p < 1.0:
        ascending = torch.sort(logits_V)[0]
        # The small ones first, whose sum float32 would lose beside the large ones; the last one always stays.
        stays = torch.cumsum(torch.softmax(ascending, dim=-1), dim=-1) > 1.0 - top_p
        smallest = torch.min(torch.where(stays, ascending, ascending[-1]))
        logits_V = logits_V.masked_fill(logits_V < smallest, -math.inf)
    if min_p > 0.0:
        probs = torch.softmax(logits_V, dim=-1)
        logits_V = logits_V.masked_fill(probs < min_p * torch.max(probs), -math.inf)
    return logits_V


def sample_token(
    logits_V: torch.Tensor,
    seen_V: torch.Tensor,
    key: random.Key,
    *,
    repetition_penalty: float,
    temperature: float,
    **filters,
) -> torch.Tensor:
    """Index of the next token: the largest logit at temperature 0, else the largest with Gumbel noise added; NO_TOKEN
    where the largest is not finite, as it is if any is NaN."""
    if repetition_penalty != 1.0:
        logits_V = penalize(logits_V, seen_V, repetition_penalty)
    finite = torch.isfinite(torch.max(logits_V))
    if temperature > 0.0:
        logits_V = filter_logits(logits_V, temperature=temperature, **filters)
        logits_V = logits_V + random.gumbel(key, logits_V.shape, logits_V.device)
    return torch.where(finite, torch.argmax(logits_V), NO_TOKEN)


def held_model(
    weights: dict[str, np.ndarray], config: ModelConfig, precision: PrecisionConfig, device: str
) -> Qwen3ForCausalLM:
    """The model; matrices, embedding and head are rounded to the compute dtype here and nowhere later."""
    model = from_hf(weights, config, precision, device)
    parameters = dict(model.named_parameters())
    for name, (_, role) in param_specs(config).items():
        if role in ("matrix", "embedding", "head"):
            parameters[name].data = parameters[name].data.to(getattr(torch, precision.compute))
    return model


@torch.no_grad()
def next_logits(
    model: Qwen3ForCausalLM, layers: Layers, token_B: torch.Tensor, position_B: torch.Tensor
) -> tuple[Layers, torch.Tensor]:
    """The cache's layers with each row's token at its position, and the logits of what follows it, float32 or wider."""
    cache = KVCache(layers, position_B)
    x_BD = model.model(token_B[:, None], cache=cache)[:, 0]
    return cache.layers, F.linear(x_BD, model.head_VD).to(accumulator(x_BD.dtype))


@torch.no_grad()
def prompt_logits(model: Qwen3ForCausalLM, tokens_PT: torch.Tensor) -> torch.Tensor:
    """Logits (P, T, V) of what follows each token, float32 or wider."""
    return model(tokens_PT)


@torch.no_grad()
def prefill(
    model: Qwen3ForCausalLM, tokens_PT: torch.Tensor, *, slots: int, dtype: torch.dtype, samples: int
) -> Layers:
    """The cache's layers after the prompts, with so many slots and each row repeated `samples` times."""
    cache = KVCache.empty(model.config, len(tokens_PT), slots, dtype, tokens_PT.device)
    model.model(tokens_PT, cache=cache)
    return [tuple(x_BKSH.repeat_interleave(samples, dim=0) for x_BKSH in layer) for layer in cache.layers]


@torch.no_grad()
def decode(
    model: Qwen3ForCausalLM, state: DecodeState, key_B: list[random.Key], stop_ids: torch.Tensor, count: int, *, choice
) -> tuple[DecodeState, torch.Tensor]:
    """The next tokens of each row (B, count), fewer if all rows are done before.

    NO_TOKEN ends a row; what one that is done gets means nothing. `choice`: the keyword arguments of `sample_token`.
    """

    def step(state):
        layers, logits_BV = next_logits(model, state.layers, state.token_B, state.position_B)
        position_B = state.position_B + 1
        keys = [random.fold_in(key, position) for key, position in zip(key_B, position_B.tolist(), strict=True)]
        rows = zip(logits_BV, state.seen_BV, keys, strict=True)
        token_B = torch.stack([sample_token(*row, **dict(choice)) for row in rows])
        done_B = state.done_B | torch.isin(token_B, stop_ids) | (token_B == NO_TOKEN)
        legal_B = torch.clamp(token_B, min=0)
        seen_BV = state.seen_BV.scatter(1, legal_B[:, None], True)
        return DecodeState(layers, legal_B, position_B, seen_BV, done_B), token_B

    new = []
    while len(new) < count and not state.done_B.all():
        state, token_B = step(state)
        new.append(token_B)
    return state, torch.stack(new, dim=1)


def make_generator(config: ModelConfig, precision: PrecisionConfig, weights: dict[str, np.ndarray]) -> Generator:
    """`generate(tokens, options)`, an iterator over new tokens, on these weights; `generate.batch` for many prompts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = held_model(weights, config, precision, device)

    def start(batch: Batch, options: SamplingOptions):
        arrays = batch.tokens_PT, batch.token_B, batch.position_B, batch.seen_BV
        tokens_PT, token_B, position_B, seen_BV = (torch.tensor(array, device=device) for array in arrays)
        shape = dict(slots=batch.slots, dtype=getattr(torch, precision.compute), samples=options.samples)
        layers = prefill(model, tokens_PT, **shape)
        state = DecodeState(layers, token_B, position_B, seen_BV, done_B=None)
        key_B = [random.key(options.seed, sample) for sample in batch.sample_B]
        stop_ids = torch.tensor(options.stop_ids, dtype=torch.int64, device=device)

        def advance(count: int, done_B: np.ndarray) -> np.ndarray:
            nonlocal state
            state = state._replace(done_B=torch.tensor(done_B, device=device))
            state, new_BC = decode(model, state, key_B, stop_ids, count, choice=options.choice)
            return new_BC.cpu().numpy()

        return advance

    def forward(tokens_PT: np.ndarray) -> np.ndarray:
        return prompt_logits(model, torch.tensor(tokens_PT, device=device)).cpu().numpy()

    return Generator(config, start, forward)


if __name__ == "__main__":
    from harness.cli import leave
    from harness.commands.generate import run_command

    leave(run_command("torch_ref.generate", make_generator))
