"""Random numbers of the torch side: Threefry-2x32 keys derived from (seed, step, micro-batch, layer, site).

The same bits as `jax_impl/random.py`, so dropout masks and sampled tokens are equal in both frameworks. Algorithm:
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the derivation of keys and counters is that
of `jax.random` in its partitionable mode, for dropout that of `recipe/dropout.py`. 32-bit words live in int64 tensors,
which torch has on every device.
"""

import torch

from recipe.dropout import DECISIONS, kept_share, threshold
from torch_ref.products import accumulator

# Sites of dropout inside one layer. The embedding and the head count as layer `num_hidden_layers`.
EMBEDDING, ATTENTION_PROBABILITIES, ATTENTION_RESIDUAL, FFN_HIDDEN, FFN_RESIDUAL, HEAD = range(6)

Key = tuple[int, int] | tuple[torch.Tensor, torch.Tensor]
"""Two words; or two int64 tensors of them, as many keys at once, whose shape precedes that of what they make."""

_WORD = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry_2x32(key: tuple, x0, x1):
    """Twenty rounds of Threefry-2x32 on counter words x0, x1: Python ints or int64 tensors of values below 2**32."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0 = (x0 + k0) & _WORD
    x1 = (x1 + k1) & _WORD
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _WORD
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) & _WORD
            x1 = x1 ^ x0
        x0 = (x0 + schedule[(group + 1) % 3]) & _WORD
        x1 = (x1 + schedule[(group + 2) % 3] + group + 1) & _WORD
    return x0, x1


def key(seed: int, sample: int = 0) -> Key:
    """The root key of a seed and a sample's number, both below 2**32: the Threefry key words (sample, seed)."""
    return sample, seed


def fold_in(key: Key, *data: int | torch.Tensor) -> Key:
    """A new key for each integer below 2**32 in turn, e.g. `fold_in(key, step, micro_batch)`; tensors make many."""
    for word in data:
        key = threefry_2x32(key, 0, word)
    return key


def bits(key: Key, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform 32-bit words of the given shape, as int64."""
    counter = torch.arange(torch.Size(shape).numel(), dtype=torch.int64, device=device)
    high, low = threefry_2x32(key, counter >> 32, counter & _WORD)
    return (high ^ low).reshape(shape)


def keep_mask(key: Key, rows: range, columns: range, rate: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Boolean mask (..., rows, columns), True where the element stays: the decisions of `recipe.dropout`."""
    blocks = range(columns.start // DECISIONS, -(-columns.stop // DECISIONS))
    x0, x1 = (torch.arange(axis.start, axis.stop, dtype=torch.int64, device=device) for axis in (rows, blocks))
    k0, k1 = (word[..., None, None] if isinstance(word, torch.Tensor) else word for word in key)
    words = threefry_2x32((k0, k1), x0[:, None], x1[None, :])
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    first = columns.start % DECISIONS
    return halves.flatten(-2)[..., first : first + len(columns)] >= threshold(rate)


def uniform(key: Key, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform float32 in (0, 1): the upper 23 bits of a word, and a half, over 2**23."""
    return ((bits(key, shape, device) >> 9).float() + 0.5) * 2**-23


def gumbel(key: Key, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard Gumbel noise in float32; argmax(logits + gumbel) samples from softmax(logits)."""
    return -torch.log(-torch.log(uniform(key, shape, device)))


def dropout(x: torch.Tensor, rate: float, key: Key | None, *path: int) -> torch.Tensor:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); no key means no dropout."""
    if key is None or rate == 0.0:
        return x
    columns = x.shape[-1]
    keep = keep_mask(fold_in(key, *path), range(x.numel() // columns), range(columns), rate, x.device)
    return drop(x, keep.reshape(x.shape), rate)


def drop(x: torch.Tensor, keep: torch.Tensor, rate: float) -> torch.Tensor:
    """x / (1-rate) where `keep` is true, else zero; the rate as `recipe.dropout` rounds it."""
    scaled = (x.to(accumulator(x.dtype)) / kept_share(rate)).to(x.dtype)
    return torch.where(keep, scaled, 0.0)
