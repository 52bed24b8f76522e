"""Monte-Carlo arithmetic: how far rounding moves a result, measured by rounding at random in float64.

Under `rounding_noise` every floating-point result that torch computes, forward and backward, is multiplied by
1 + a U(-1, 1) element by element. a is the unit round-off u of the dtype in question; where an operation sums K terms
it is u + sqrt(K) u_acc, u_acc of the accumulator, the probabilistic bound of Higham and Mary (SIAM J. Sci. Comput. 41,
2019). Views, copies, gathers, comparisons, signs and maxima round nothing and get no noise. In bfloat16 every operation
is taken to round to bfloat16, which is more than happens: norms, softmax, RoPE and loss run in float32.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ref.model
from parity_tests.tolerance import SAFETY, relative_error
from recipe.contract import UNIT_ROUNDOFF, accumulation_of

Arrays = dict[str, np.ndarray]

SEEDS = range(8)
"""Draws of the noise. An error of few elements (a loss, a norm's gradient) does not concentrate; the largest of 8 draws
of a normal is near one and a half deviations, SAFETY doubles it, and roundings scatter less than U(-1, 1) does."""

# Noise of 2**-24 is first order to seven digits and stands far above float64's own rounding, so that is where float64's
# amplification is measured. Lower precisions are measured at their own u: in bfloat16 the second order counts.
SMALLEST_NOISE = 2.0**-24

_EXACT = frozenset(
    """
    _reshape_copy _to_copy _unsafe_view abs alias amax amin arange cat clamp_min clone constant_pad_nd copy_
    embedding empty empty_like empty_strided expand_copy fill_ flip full full_like gather index index_select
    isinf isnan lift_fresh masked_fill masked_fill_ max maximum min minimum neg new_empty new_empty_strided
    new_full new_ones new_zeros ones ones_like relu repeat resize_ roll scalar_tensor scatter select_backward
    select_scatter sgn sign slice_backward slice_scatter stack threshold_backward tril triu where zero_ zeros
    zeros_like
    """.split()
)


def _terms(name: str, args: tuple, out: torch.Tensor) -> int:
    """Number of terms that each element of `out` sums; 0 for an operation that sums nothing."""
    if name in ("mm", "bmm", "mv", "dot"):
        return args[0].shape[-1]
    if name in ("addmm", "addmv", "baddbmm"):
        return args[1].shape[-1]
    if name in ("sum", "mean", "linalg_vector_norm", "logsumexp"):
        return args[0].numel() // max(1, out.numel())
    if name == "nll_loss_forward":
        return args[1].numel()
    if name in ("_softmax", "_log_softmax"):
        return args[0].shape[args[1]]
    if name in ("_softmax_backward_data", "_log_softmax_backward_data"):
        return args[0].shape[args[2]]
    if name == "embedding_dense_backward":
        return int(torch.bincount(args[1].flatten()).max())
    return 0


@functools.cache
def _kind(func) -> tuple[str, bool, bool]:
    """Name of an operation, whether it rounds nothing, whether it writes its result into an argument."""
    name = func.overloadpacket.__name__
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return name, is_view or name in _EXACT, any(alias is not None for alias in aliases)


class _RoundingNoise(TorchDispatchMode):
    """Multiplies what arithmetic returns or writes by its noise."""

    def __init__(self, u: float, u_accumulator: float, seed: int) -> None:
        super().__init__()
        self.u, self.u_accumulator = u, u_accumulator
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, shape, amplitude: float) -> torch.Tensor:
        uniform = torch.rand(shape, dtype=torch.float64, generator=self.generator)
        return 1.0 + amplitude * (2.0 * uniform - 1.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, exact, in_place = _kind(func)
        if exact:
            return out

        def perturb(x):
            if not (isinstance(x, torch.Tensor) and x.dtype == torch.float64):
                return x
            terms = _terms(name, args, x)
            noise = self.noise(x.shape, self.u + math.sqrt(terms) * self.u_accumulator)
            return x.mul_(noise) if in_place else x * noise

        if isinstance(out, torch.Tensor):
            return perturb(out)
        if name.startswith("_foreach") and out is None:  # in place over lists: the first one is what it writes
            for x in args[0]:
                x.mul_(self.noise(x.shape, self.u))
            return None
        return pytree.tree_map(perturb, out)


_active: list[_RoundingNoise] = []


@contextlib.contextmanager
def rounding_noise(u: float, seed: int, *, u_accumulator: float | None = None) -> Iterator[None]:
    """Context in which torch's float64 arithmetic rounds at random to u; sums accumulate in u_accumulator (else u)."""
    mode = _RoundingNoise(u, u if u_accumulator is None else u_accumulator, seed)
    _active.append(mode)
    try:
        with mode:
            yield
    finally:
        _active.pop()


@contextlib.contextmanager
def noise_of(dtype: str, compute: str) -> Iterator[None]:
    """Context in which the active noise, if any, is that of `dtype`, in a measurement made for `compute`."""
    if not _active:
        yield
        return
    mode = _active[-1]
    before = mode.u, mode.u_accumulator
    scale = max(UNIT_ROUNDOFF[compute], SMALLEST_NOISE) / UNIT_ROUNDOFF[compute]
    mode.u = scale * UNIT_ROUNDOFF[dtype]
    mode.u_accumulator = scale * UNIT_ROUNDOFF[accumulation_of(dtype)]
    try:
        yield
    finally:
        mode.u, mode.u_accumulator = before


def rounded(x: np.ndarray, roundings: float = 1.0) -> np.ndarray:
    """x as a cast to the dtype in question leaves it: noise of `roundings` times u under `rounding_noise`, else x."""
    if not _active:
        return x
    mode = _active[-1]
    with torch.utils._python_dispatch._disable_current_modes():
        return x * mode.noise(x.shape, roundings * mode.u).numpy()


@contextlib.contextmanager
def rounded_rope_tables(frequency_roundings: float = 0.0) -> Iterator[None]:
    """Context in which torch_ref's cosines and sines pass through `rounded`, as a cast from float64 would.

    With `frequency_roundings` the rotary frequencies carry so many roundings too and their products with the positions
    one more, as in a table that was computed in the lower precision; both grow with the position.
    """
    original = torch_ref.model.rope_table

    def rope_table(config, length):
        cos_TR, sin_TR = original(config, length)
        if _active and frequency_roundings and length > 1:
            # The angle at position 1 is the frequency, at most 1.
            frequencies_R = rounded(np.arctan2(sin_TR[1], cos_TR[1]), frequency_roundings)
            angles_TR = rounded(np.arange(length)[:, None] * frequencies_R)
            cos_TR, sin_TR = np.cos(angles_TR), np.sin(angles_TR)
        return rounded(cos_TR), rounded(sin_TR)

    torch_ref.model.rope_table = rope_table
    try:
        yield
    finally:
        torch_ref.model.rope_table = original


def amplification(
    compute: Callable[[], Arrays], dtype: str = "float64", *, seeds: Iterable[int] = SEEDS
) -> tuple[Arrays, dict[str, float]]:
    """What `compute` gives in float64, and kappa of each array: the largest relative error over the seeds, over u.

    `compute` calls torch in float64; what it would cast to a lower precision on the way in, it passes to `rounded`.
    """
    truths = {name: np.array(truth, np.float64) for name, truth in compute().items()}
    u = max(UNIT_ROUNDOFF[dtype], SMALLEST_NOISE)
    u_accumulator = u * UNIT_ROUNDOFF[accumulation_of(dtype)] / UNIT_ROUNDOFF[dtype]
    kappas = dict.fromkeys(truths, 0.0)
    for seed in seeds:
        with rounding_noise(u, seed, u_accumulator=u_accumulator):
            noisy = compute()
        for name, truth in truths.items():
            kappas[name] = max(kappas[name], relative_error(noisy[name], truth) / u)
    return truths, kappas


def allowances(kappas: dict[str, float], dtype: str, *, erring: int | None = None) -> dict[str, float]:
    """SAFETY * kappa * u for each array, times the number of `erring` computations that are compared.

    That number is 1 against a truth in higher precision, and 2 in float64, where the truth errs as well.
    """
    sides = erring or (2 if dtype == "float64" else 1)
    return {name: sides * SAFETY * kappa * UNIT_ROUNDOFF[dtype] for name, kappa in kappas.items()}
