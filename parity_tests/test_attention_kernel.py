"""The flash kernels with dropout, interpreted on the CPU, against explicit attention in float64 under the masks that
the definition gives, which is written here a second time.

What compiles for a GPU is seen here only as far as Triton's own language; `test_gpu.py` runs the kernels.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AbstractMesh, AxisType

import jax_impl.attention
import torch_ref.attention
from jax_impl import exchange
from jax_impl.attention_kernel import Tile, Tiles, flash_attention, tiles_of
from parity_tests.compare.montecarlo import allowances, amplification
from parity_tests.compare.tolerance import check, check_all
from recipe.dropout import threshold
from torch_ref.random import threefry_2x32

KEY = (5, 4_000_000_007)
NAMES = ("out", "q", "k", "v")


WIDE, LONG, MIXED = Tile(32, 64), Tile(64, 32), Tile(16, 32)
SMALL = Tiles(Tile(16, 16), Tile(16, 16), Tile(16, 16))


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, window and rate of one attention; tiles for the interpreter, small ones for small sizes."""

    B: int
    T: int
    N: int
    K: int
    H: int
    window: int | None
    rate: float
    tiles: Tiles = SMALL

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """q, k, v and the output's gradient; exact in bfloat16, so that only the computation rounds."""
        generator = np.random.default_rng(self.T + self.H)
        query, key = (self.B, self.T, self.N, self.H), (self.B, self.T, self.K, self.H)
        shapes = {"q": query, "k": key, "v": key, "grad": query}
        return {name: exact(generator.standard_normal(shape)) for name, shape in shapes.items()}


CASES = {
    "one token": Case(2, 1, 4, 2, 8, None, 0.25),
    "own key alone": Case(2, 5, 4, 2, 8, 1, 0.1),
    "group of four": Case(2, 37, 4, 1, 32, 7, 0.25),
    "no dropout": Case(2, 37, 4, 2, 48, None, 0.0, Tiles(MIXED, WIDE, LONG)),
    "window of 64": Case(1, 130, 2, 1, 48, 64, 0.1, Tiles(WIDE, LONG, WIDE)),
    # With it the last query of a tile misses just the first key of another.
    "window of 95": Case(1, 130, 2, 2, 128, 95, 0.1, Tiles(LONG, WIDE, LONG)),
}


def exact(x: np.ndarray) -> np.ndarray:
    """x rounded to bfloat16, in float64."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def keep_mask(case: Case) -> np.ndarray:
    """The definition, (B, N, T, S): half s % 4 of the words of (head key, t, s // 4) reaches the threshold."""
    t, s = np.indices((case.T, case.T))
    keep_BNTS = np.empty((case.B, case.N, case.T, case.T), bool)
    for b, n in np.ndindex(case.B, case.N):
        words = threefry_2x32(threefry_2x32(KEY, 0, b * case.N + n), t, s // 4)
        halves = np.stack([half for word in words for half in (word & 0xFFFF, word >> 16)])
        keep_BNTS[b, n] = np.take_along_axis(halves, s[None] % 4, axis=0)[0] >= threshold(case.rate)
    return keep_BNTS


def explicit(case: Case) -> dict[str, np.ndarray]:
    """Output and gradients of torch's explicit attention in float64, all queries in one block."""
    B, T, N, K, H = case.B, case.T, case.N, case.K, case.H
    q, k, v = (torch.tensor(case.arrays[name], requires_grad=True) for name in "qkv")
    keep_BNTS = keep_mask(case) if case.rate else None
    out_XGTH = torch_ref.attention.attend_block(
        q.reshape(B, T, K, N // K, H).permute(0, 2, 3, 1, 4).reshape(B * K, N // K, T, H),
        *(x.transpose(1, 2).reshape(B * K, T, H) for x in (k, v)),
        start=0,
        first=0,
        window=case.window,
        keep_XGTS=None if keep_BNTS is None else torch.tensor(keep_BNTS.reshape(B * K, N // K, T, T)),
        rate=case.rate,
    )
    out_BTNH = out_XGTH.reshape(B, N, T, H).transpose(1, 2)
    grads = torch.autograd.grad(out_BTNH, (q, k, v), torch.tensor(case.arrays["grad"]))
    return {name: x.detach().numpy() for name, x in zip(NAMES, (out_BTNH, *grads), strict=True)}


@functools.cache
def truth_and_limits(name: str, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Explicit attention in float64, and what rounding may make of each array."""
    truths, kappas = amplification(lambda: explicit(CASES[name]), dtype)
    return truths, allowances(kappas, dtype)


def our_key() -> jax.Array:
    return jax.random.wrap_key_data(np.array(KEY, np.uint32), impl="threefry2x32")


# The interpreter's programs run once and take ten milliseconds; to optimize them takes seconds.
HASTILY = {"xla_backend_optimization_level": 0}


def attending(case: Case, tiles: Tiles, interpret: bool, keeps_masks: bool | None = None):
    """Function (q, k, v, the output's gradient) -> (output, the gradients of q, k, v) of the kernels."""
    how = {"window": case.window, "rate": case.rate, "key": our_key(), "tiles": tiles, "interpret": interpret}
    how |= {"keeps_masks": keeps_masks}

    def run(q, k, v, grad):
        out, pull_back = jax.vjp(functools.partial(flash_attention, **how), q, k, v)
        return out, *pull_back(grad)

    return jax.jit(run, compiler_options=HASTILY if interpret else None)


def kernel(
    case: Case,
    dtype: str,
    *,
    interpret: bool = True,
    tiles: Tiles | None = None,
    keeps_masks: bool | None = None,
) -> dict[str, np.ndarray]:
    """Output and gradients of the kernels."""
    with jax.enable_x64(dtype == "float64"):
        arrays = attending(case, tiles or case.tiles, interpret, keeps_masks)(
            *(jnp.asarray(case.arrays[name], dtype) for name in ("q", "k", "v", "grad"))
        )
        assert {x.dtype.name for x in arrays} == {dtype}
        return {name: np.asarray(x, np.float64) for name, x in zip(NAMES, arrays, strict=True)}


KEEPING = pytest.mark.parametrize("keeps_masks", [True, False], ids=["masks kept", "masks made again"])


@KEEPING
@pytest.mark.parametrize("name", CASES)
def test_float64_output_and_gradients(name, keeps_masks):
    truths, limits = truth_and_limits(name, "float64")
    check_all(kernel(CASES[name], "float64", keeps_masks=keeps_masks), truths, limits.get)


@pytest.mark.parametrize("name", ["own key alone", "no dropout", "window of 64"])
def test_bfloat16_is_as_good_as_its_roundings(name, record_property):
    record_property("largest error over allowance", check_in_bfloat16(name))


def check_in_bfloat16(name: str, *, interpret: bool = True) -> float:
    """The largest error over its allowance, with the tiles that a GPU is given."""
    case = CASES[name]
    truths, limits = truth_and_limits(name, "bfloat16")
    errors = check_all(kernel(case, "bfloat16", interpret=interpret, tiles=tiles_of(case.H)), truths, limits.get)
    return max(errors[each] / limits[each] for each in limits)


BITS = Case(2, 37, 4, 2, 64, None, 0.1)


def bits(tiles: Tiles, interpret: bool, keeps_masks: bool | None) -> dict[str, np.ndarray]:
    """BITS's mask as each kernel saw it, (B, N, T, S), out of attention with one-hot vectors; visible bits alone count.

    Scores are zero, so every probability of query t is 1 / (t + 1); position x is coordinate x.
    """
    B, T, N, K, H = BITS.B, BITS.T, BITS.N, BITS.K, BITS.H
    query, key = (B, T, N, H), (B, T, K, H)
    one_hot = np.eye(T, H)[None, :, None]
    run = attending(BITS, tiles, interpret, keeps_masks)

    def measure(q, k, v, grad) -> list[np.ndarray]:
        operands = zip((q, k, v, grad), (query, key, key, query), strict=True)
        arrays = run(*(jnp.asarray(np.broadcast_to(x, shape), jnp.bfloat16) for x, shape in operands))
        return [np.asarray(x, np.float64) for x in arrays]

    # out[t] = sum_s p_ts keep_ts e_s / kept
    out, *_ = measure(0.0, 0.0, one_hot, 0.0)
    found = {"forward": (out[..., :T] > 0).transpose(0, 2, 1, 3)}
    # dv[s] = sum_t p_ts keep_ts e_t / kept, a group's heads one at a time
    grads_N = [measure(0.0, 0.0, 0.0, one_hot * (np.arange(N) == n)[:, None])[3] for n in range(N)]
    kept_N = [grad_BSKH[:, :, n // (N // K), :T] > 0 for n, grad_BSKH in enumerate(grads_N)]
    found["key_grads"] = np.stack([kept_BST.swapaxes(1, 2) for kept_BST in kept_N], axis=1)
    # dq[t] = sum_s p_ts (keep_ts H / kept - mean) e_s / sqrt(H), mean = sum_s p_ts keep_ts H / kept = sum(out[t])
    out, q_grad, *_ = measure(0.0, one_hot, 1.0, 1.0)
    counts = np.arange(1.0, T + 1.0)[:, None, None]
    weights = q_grad[..., :T] * math.sqrt(H) * counts + out.sum(axis=-1, keepdims=True)
    # Either H / kept or nothing, up to rounding.
    found["query_grad"] = (weights > H / 2).transpose(0, 2, 1, 3)
    return found


def check_bits(tiles: Tiles, *, interpret: bool = True, keeps_masks: bool | None = None) -> None:
    visible = np.tril(np.ones((BITS.T, BITS.T), bool))
    expected = keep_mask(BITS) & visible
    assert 0 < (visible & ~expected).sum() < expected.sum()
    for name, found in bits(tiles, interpret, keeps_masks).items():
        np.testing.assert_array_equal(found & visible, expected, err_msg=name)


@KEEPING
@pytest.mark.parametrize("tiles", [Tiles(MIXED, LONG, WIDE), tiles_of(BITS.H)], ids=["small", "of a GPU"])
def test_every_bit_of_the_mask_is_the_definitions(tiles, keeps_masks):
    """In all three kernels, whatever their tiles."""
    check_bits(tiles, keeps_masks=keeps_masks)


@pytest.mark.parametrize(
    ("T", "H", "rate", "differentiate", "kept"),
    [
        # 4 heads of T^2 / 4 bytes against 2 (4 + 2) heads of 2 T H: up to T = 24 H.
        *((1152, 48, 0.1, True, True), (1216, 48, 0.1, True, False), (128, 144, 0.1, True, False)),
        *((512, 48, 0.0, True, False), (512, 48, 0.1, False, False)),
    ],
)
def test_masks_are_kept_where_they_are_small_and_wanted(T, H, rate, differentiate, kept):
    """Only for backward with dropout, and up to head_dim 128."""
    query, key = (jax.ShapeDtypeStruct((2, T, heads, H), jnp.bfloat16) for heads in (4, 2))
    attend = functools.partial(flash_attention, window=None, rate=rate, key=our_key())

    def run(q, k, v):
        return jax.vjp(attend, q, k, v)[0] if differentiate else attend(q, k, v)

    text = str(jax.make_jaxpr(run)(query, key, key))
    assert "name=attention_forward" in text
    assert (f"u8[2,4,{T},{T // 4}]" in text) == kept


def test_tiles_change_nothing_but_the_order_of_sums():
    name = "group of four"
    truths, limits = truth_and_limits(name, "float64")
    check_all(kernel(CASES[name], "float64", tiles=Tiles(WIDE, MIXED, LONG)), truths, limits.get)


@pytest.mark.parametrize("name", ["group of four", "window of 64"])
def test_explicit_attention_has_the_same_masks(name):
    """Under the same key; the other implementation is this side's own."""
    case = CASES[name]
    truths, limits = truth_and_limits(name, "float64")
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(case.arrays[each]) for each in "qkv")
        out = jax_impl.attention.attention(q, k, v, window=case.window, rate=case.rate, key=our_key())
    check(name, out, truths["out"], limits["out"])


def test_it_goes_through_jit_checkpoint_and_vmap():
    """Two attentions at once are what each is alone."""
    name = "own key alone"
    case = CASES[name]
    attend = functools.partial(flash_attention, window=case.window, rate=case.rate, tiles=case.tiles, interpret=True)

    def loss(arrays, key):
        return jnp.sum(jax.checkpoint(attend)(arrays["q"], arrays["k"], arrays["v"], key=key) * arrays["grad"])

    truths, limits = truth_and_limits(name, "float64")
    with jax.enable_x64(True):
        twice = {each: jnp.stack([jnp.zeros_like(x), x]) for each, x in case.arrays.items()}
        keys = jnp.stack([jax.random.key(1), our_key()])
        grads = jax.jit(jax.vmap(jax.grad(loss)), compiler_options=HASTILY)(twice, keys)
    check("the output", grads["grad"][1], truths["out"], limits["out"])
    for each in "qkv":
        check(each, grads[each][1], truths[each], limits[each])


# Until jax drops the backend; then the kernels move to what it offers instead.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("T", "H", "window", "rate"), [(512, 48, None, 0.1), (130, 32, 7, 0.1), (77, 96, None, 0.0), (4096, 128, None, 0.1)]
)
def test_it_lowers_for_a_gpu(T, H, window, rate):
    """Three kernels, none of which holds an array that Triton has no words for; no GPU is needed for that."""
    query, key = (jax.ShapeDtypeStruct((2, T, heads, H), jnp.bfloat16) for heads in (4, 2))

    def run(q, k, v, grad, words):
        random_key = jax.random.wrap_key_data(words, impl="threefry2x32")
        out, pull_back = jax.vjp(functools.partial(flash_attention, window=window, rate=rate, key=random_key), q, k, v)
        return out, pull_back(grad)

    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(query, key, key, query, jax.ShapeDtypeStruct((2,), jnp.uint32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3
    for name in ("attention_forward", "attention_query_grad", "attention_key_grads"):
        assert name in text


def test_what_it_cannot_do_is_said():
    q = jnp.zeros((1, 5, 2, 512), jnp.bfloat16)
    with pytest.raises(ValueError, match="head_dim=512 exceeds 256"):
        flash_attention(q, q, q, window=None)
    with pytest.raises(ValueError, match="drops every probability"):
        flash_attention(q[..., :48], q[..., :48], q[..., :48], window=None, rate=0.999999, key=our_key())


def test_on_a_mesh_a_part_of_the_heads_has_its_own_masks(monkeypatch):
    """The last two of three rows, of their heads the second half, forward and backward."""
    case = Case(3, 21, 4, 2, 8, None, 0.25)
    q, k, v, grad = (jnp.asarray(case.arrays[name], jnp.float32) for name in ("q", "k", "v", "grad"))
    run = functools.partial(
        flash_attention, window=None, rate=0.25, key=our_key(), tiles=SMALL, interpret=True, keeps_masks=False
    )
    whole, back = jax.vjp(run, q, k, v)
    row, heads, key_head = slice(1, 3), slice(2, 4), slice(1, 2)
    monkeypatch.setattr(exchange, "head_offsets", lambda B, N: (1 * case.N + 2, case.N - N))
    part, back_of_part = jax.vjp(run, q[row, :, heads], k[row, :, key_head], v[row, :, key_head])
    assert np.array_equal(part, whole[row, :, heads])
    of_part, of_whole = back_of_part(grad[row, :, heads]), back(grad)
    for ours, theirs, of in zip(of_part, of_whole, (heads, key_head, key_head), strict=True):
        assert np.array_equal(ours, theirs[row, :, of])
