"""Text generation in torch: `python -m torch_ref.generate --checkpoint runs/NAME --prompt "..."`.

Twin: `jax_impl/generate.py`.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from recipe.config import ModelConfig, PrecisionConfig
from recipe.generation import SamplingOptions, check_context, run_command
from torch_ref import random
from torch_ref.weights import from_hf


def filter_logits(logits_V: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Logits over temperature, -inf outside the k largest and outside the smallest set that reaches probability p."""
    logits_V = logits_V / temperature
    if top_k:
        kth = torch.topk(logits_V, min(top_k, logits_V.shape[-1]))[0][-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -math.inf)
    if top_p < 1.0:
        descending = torch.sort(logits_V, descending=True)[0]
        probs = torch.softmax(descending, dim=-1)
        # A token stays if those before it have not reached p yet; the first one always stays.
        stays = torch.cumsum(probs, dim=-1) - probs < top_p
        smallest = torch.min(torch.where(stays, descending, math.inf))
        logits_V = logits_V.masked_fill(logits_V < smallest, -math.inf)
    return logits_V


def sample_token(
    logits_V: torch.Tensor, key: random.Key, *, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Index of the next token: the largest logit at temperature 0, else the largest with Gumbel noise added."""
    if temperature == 0.0:
        return torch.argmax(logits_V)
    logits_V = filter_logits(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
    return torch.argmax(logits_V + random.gumbel(key, logits_V.shape, logits_V.device))


def make_generator(
    config: ModelConfig, precision: PrecisionConfig, weights: dict[str, np.ndarray]
) -> Callable[[list[int], SamplingOptions], Iterable[int]]:
    """`generate(tokens, options)`, an iterator over new tokens, on these weights.

    Every token recomputes the whole sequence.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = from_hf(weights, config, precision, device)

    @torch.no_grad()
    def next_token(tokens_L, key, **options):
        last_D = model.model(tokens_L[None])[0, -1]
        logits_V = F.linear(last_D, model.head_VD.to(last_D.dtype)).float()
        return sample_token(logits_V, random.fold_in(key, len(tokens_L)), **options)

    def generate(tokens: list[int], options: SamplingOptions) -> Iterator[int]:
        check_context(config, len(tokens), options)
        sequence = list(tokens)
        key = random.key(options.seed)
        choice = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
        for _ in range(options.max_new_tokens):
            token = int(next_token(torch.tensor(sequence, device=device), key, **choice))
            if token in options.stop_ids:
                return
            yield token
            sequence.append(token)

    return generate


if __name__ == "__main__":
    sys.exit(run_command("torch_ref.generate", make_generator))
