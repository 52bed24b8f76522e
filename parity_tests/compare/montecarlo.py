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

from parity_tests.compare.precision import UNIT_ROUNDOFF, accumulation_of
from parity_tests.compare.tolerance import SAFETY, relative_error, wide

Arrays = dict[str, np.ndarray]

SEEDS = range(8)
"""Draws of the noise. An error of few elements (a loss, a norm's gradient) does not concentrate; the largest of 8 draws
of a normal is near one and a half deviations, SAFETY doubles it, and roundings scatter less than U(-1, 1) does."""

# Noise of 2**-24 is first order to seven digits and stands far above float64's own rounding, so that is where float64's
# amplification is measured. Lower precisions are measured at their own u: in bfloat16 the second order counts.
SMALLEST_NOISE = 2.0**-24

_EXACT = frozenset(
    """
    _conj_physical _reshape_copy _to_copy _unsafe_view abs alias amax amin arange cat ceil clamp clamp_max clamp_min
    clone complex constant_pad_nd copy_
    embedding empty empty_like empty_strided expand_copy fill_ flip floor full full_like gather hardtanh index
    index_select isinf isnan lift_fresh masked_fill masked_fill_ max max_pool2d_with_indices maximum min minimum neg
    new_empty new_empty_strided
    new_full new_ones new_zeros ones ones_like relu repeat resize_ roll scalar_tensor scatter select_backward
    select_scatter sgn sign slice_backward slice_scatter stack threshold_backward tril triu where zero_ zeros
    zeros_like
    """.split()
)


_SUMS = frozenset(
    "_adaptive_avg_pool2d _adaptive_avg_pool3d linalg_vector_norm logsumexp mean std sum var var_mean".split()
)
"""Operations whose every element sums as many of the first argument's as it is smaller."""


def _terms(name: str, args: tuple, out: torch.Tensor) -> int:
    """Number of terms that each element of `out` sums; 0 for an operation that sums nothing."""
    if name in ("mm", "bmm", "mv", "dot"):
        return args[0].shape[-1]
    if name in ("addmm", "addmv", "baddbmm"):
        return args[1].shape[-1]
    if name in _SUMS:
        return args[0].numel() // max(1, out.numel())
    if name == "nll_loss_forward":
        return args[1].numel()
    if name in ("_softmax", "_log_softmax"):
        return args[0].shape[args[1]]
    if name in ("_softmax_backward_data", "_log_softmax_backward_data"):
        return args[0].shape[args[2]]
    if name == "embedding_dense_backward":
        return int(torch.bincount(args[1].flatten()).max())
    if name == "convolution":
        return args[1][0].numel()
    if name == "convolution_backward":
        # Of the weight and the bias: every place of the output. Of the input: as many as the kernel has.
        small = out.shape == args[2].shape or out.ndim == 1
        return args[0].numel() // args[0].shape[1] if small else args[2].numel() // args[2].shape[1]
    if name in ("avg_pool2d", "avg_pool3d"):
        return math.prod(args[1])
    if name.startswith("_fft_"):
        return sum(max(1, args[0].shape[axis] - 1).bit_length() for axis in args[1])  # stages of a fast transform
    if name == "cumsum":
        return args[0].shape[args[1]] if args[0].ndim else 0
    return 0


def _in_own_dtype(name: str, out: torch.Tensor) -> bool:
    """Whether XLA, on a CPU, adds up in the dtype itself what torch does in a wider one.

    It does where a sum is the transpose of a broadcast (a bias) or of a gather (an embedding).
    """
    return name in ("sum", "embedding_dense_backward") or (name == "convolution_backward" and out.ndim == 1)


_FUSED = """
    _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data elu elu_backward gelu gelu_backward glu
    glu_backward hardsigmoid hardswish hardswish_backward leaky_relu_backward log_sigmoid_forward logsumexp mish
    mish_backward native_batch_norm native_batch_norm_backward native_group_norm native_group_norm_backward
    native_layer_norm native_layer_norm_backward sigmoid_backward silu silu_backward softplus softplus_backward
    tanh_backward _native_batch_norm_legit _native_batch_norm_legit_no_training
    """.split()
"""Operations that torch computes in one go and a port in several, each of which rounds."""


@functools.cache
def _decompositions() -> dict:
    """The operations above by what they are made of."""
    packets = [getattr(torch.ops.aten, name) for name in _FUSED if hasattr(torch.ops.aten, name)]
    return torch._decomp.get_decompositions(packets)


@functools.cache
def _kind(func) -> tuple[str, bool, bool]:
    """Name of an operation, whether it rounds nothing, whether it writes its result into an argument."""
    name = func.overloadpacket.__name__
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return name, is_view or name in _EXACT, any(alias is not None for alias in aliases)


class Mode(TorchDispatchMode):
    """A dispatch mode that leaves torch.compile's machinery, seconds to import, where it is."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _RoundingNoise(Mode):
    """Multiplies what arithmetic returns or writes by its noise."""

    def __init__(self, u: float, u_accumulator: float, seed: int, decompose: bool) -> None:
        super().__init__()
        self.u, self.u_accumulator = u, u_accumulator
        self.parts = _decompositions() if decompose else {}
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, shape, amplitude: float) -> torch.Tensor:
        return 1.0 + amplitude * self._uniform(shape)

    def _uniform(self, shape) -> torch.Tensor:
        return 2.0 * torch.rand(shape, dtype=torch.float64, generator=self.generator) - 1.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.parts:
            with self:
                return self.parts[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name, exact, in_place = _kind(func)
        if exact and not (name in ("abs", "sgn") and args[0].is_complex()):
            return out

        def perturb(x):
            if not (isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128)):
                return x
            accumulator = self.u if self.parts and _in_own_dtype(name, x) else self.u_accumulator
            amplitude = self.u + math.sqrt(_terms(name, args, x)) * accumulator
            noise = self.noise(x.shape, amplitude)
            if x.is_complex():  # a product's error is relative to the whole number, not to either part
                noise = torch.complex(noise, amplitude * self._uniform(x.shape))
            return x.mul_(noise) if in_place else x * noise

        if self.parts and name == "var_mean":
            # Many a port takes mean(x^2) - mean(x)^2: the errors of either, in float32 at least.
            variance, mean = out
            amplitude = (1.0 + math.sqrt(_terms(name, args, mean))) * self.u_accumulator
            square = mean * mean
            first = (variance + square) * self._uniform(variance.shape)
            second = 2.0 * square * self._uniform(variance.shape)
            return perturb(variance) + amplitude * (first - second), perturb(mean)
        if isinstance(out, torch.Tensor):
            return perturb(out)
        if name.startswith("_foreach") and out is None:  # in place over lists: the first one is what it writes
            for x in args[0]:
                x.mul_(self.noise(x.shape, self.u))
            return None
        return pytree.tree_map(perturb, out)


_active: list[_RoundingNoise] = []


@contextlib.contextmanager
def rounding_noise(
    u: float, seed: int, *, u_accumulator: float | None = None, decompose: bool = False
) -> Iterator[None]:
    """Context in which torch's float64 arithmetic rounds at random to u; sums accumulate in u_accumulator (else u).

    With `decompose` a fused operation (a softmax, a norm, GELU) rounds at each operation that it is made of, and a sum
    that is no product keeps its partial sums at u: what a port does that is as good as torch, and not torch.
    """
    mode = _RoundingNoise(u, u if u_accumulator is None else u_accumulator, seed, decompose)
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


def is_active() -> bool:
    """Whether the caller runs under `rounding_noise`."""
    return bool(_active)


def rounded(x: np.ndarray, roundings: float = 1.0) -> np.ndarray:
    """x as a cast to the dtype in question leaves it: noise of `roundings` times u under `rounding_noise`, else x."""
    if not _active:
        return x
    mode = _active[-1]
    with torch.utils._python_dispatch._disable_current_modes():
        return x * mode.noise(x.shape, roundings * mode.u).numpy()


def amplification(
    compute: Callable[[], Arrays], dtype: str = "float64", *, seeds: Iterable[int] = SEEDS, decompose: bool = False
) -> tuple[Arrays, dict[str, float]]:
    """What `compute` gives in float64, and kappa of each array: the largest relative error over the seeds, over u.

    `compute` calls torch in float64; what it would cast to a lower precision on the way in, it passes to `rounded`.
    `decompose`: see `rounding_noise`.
    """
    truths = {name: wide(truth) for name, truth in compute().items()}
    u = max(UNIT_ROUNDOFF[dtype], SMALLEST_NOISE)
    u_accumulator = u * UNIT_ROUNDOFF[accumulation_of(dtype)] / UNIT_ROUNDOFF[dtype]
    kappas = dict.fromkeys(truths, 0.0)
    for seed in seeds:
        with rounding_noise(u, seed, u_accumulator=u_accumulator, decompose=decompose):
            noisy = compute()
        for name, truth in truths.items():
            error = relative_error(noisy[name], truth)
            kappas[name] = max(kappas[name], error / u) if math.isfinite(error) else kappas[name]
    return truths, kappas


def allowances(kappas: dict[str, float], dtype: str, *, erring: int | None = None) -> dict[str, float]:
    """SAFETY * kappa * u for each array, times the number of `erring` computations that are compared.

    That number is 1 against a truth in higher precision, and 2 in float64, where the truth errs as well.
    """
    sides = erring or (2 if dtype == "float64" else 1)
    return {name: sides * SAFETY * kappa * UNIT_ROUNDOFF[dtype] for name, kappa in kappas.items()}
