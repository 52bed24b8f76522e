"""Kinds of models that a port may be of: the correct one is let through, a wrong one is not, what cannot be is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from parity_tests.compare.errors import CompareError
from parity_tests.compare.modules import compare_modules
from parity_tests.compare.rules import Rules

QUICK = {"dtypes": ("float64",), "seeds": range(2)}


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def dense(module):
    """Kernel and bias of a torch Linear."""
    return {"kernel": array(module.weight.T), "bias": array(module.bias)}


def sample(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def apply(p, x):
    return x @ p["kernel"] + p["bias"]


class Of(nn.Module):
    """A module whose forward is a function of it and its inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# Each gives (JAX side, torch module, inputs, keyword arguments); `wrong` is a factor, 1 in the correct port.


def weight_norm(wrong):
    """The old kind, which keeps a computed tensor that deepcopy refuses."""
    with pytest.warns(FutureWarning):
        theirs = nn.utils.weight_norm(nn.Linear(5, 4))
    params = {"g": array(theirs.weight_g), "v": array(theirs.weight_v), "b": array(theirs.bias)}

    def ours(p, x):
        return x @ (wrong * p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=1, keepdims=True)).T + p["b"]

    return (ours, params), theirs, [sample(3, 5)], {"rules": {"g": "weight_g", "v": "weight_v", "b": "bias"}}


def table(theta):
    position, wave = torch.arange(9.0)[:, None], torch.exp(torch.arange(3.0) * -np.log(theta) / 3)
    return torch.cat([torch.sin(position * wave), torch.cos(position * wave)], -1)


def own_table(theta):
    """The same in float64."""
    position, wave = np.arange(9.0)[:, None], np.exp(np.arange(3.0) * -np.log(theta) / 3)
    return np.concatenate([np.sin(position * wave), np.cos(position * wave)], -1)


def stored_table(wrong):
    """A buffer in float32 among the weights; JAX makes its own in float64."""
    theirs = Of(lambda self, x: self.l(x + self.table), l=nn.Linear(6, 2))
    theirs.register_buffer("table", table(1e4))
    own = own_table(1e4 * wrong)
    return (lambda p, x: apply(p["l"], x + own), {"l": dense(theirs.l)}), theirs, [sample(2, 9, 6)], {}


def array_in_nnx(wrong):
    """A table that is a bare array of the NNX module, each side's own rounding of it."""
    theirs = Of(lambda self, x: self.l(x + self.table), l=nn.Linear(6, 2))
    theirs.register_buffer("table", table(1e4))

    class Ours(nnx.Module):
        def __init__(self):
            self.l = nnx.Linear(6, 2, rngs=nnx.Rngs(0))
            self.table = nnx.data(jnp.asarray(own_table(1e4 * wrong), jnp.float32))

        def __call__(self, x):
            return self.l(x + self.table)

    ours = Ours()
    ours.l.kernel[...], ours.l.bias[...] = dense(theirs.l).values()
    return ours, theirs, [sample(2, 9, 6)], {}


def complex_weights(wrong):
    """Parameters and a cast that are complex."""
    theirs = Of(lambda self, x: torch.fft.ifft(self.l(x.to(torch.complex64))), l=nn.Linear(5, 4, dtype=torch.complex64))

    def ours(p, x):
        return jnp.fft.ifft(wrong * apply(p["l"], x.astype(jnp.complex64)))

    return (ours, {"l": dense(theirs.l)}), theirs, [sample(3, 5)], {}


def whole_constants(wrong):
    """A captured NumPy array of int64 that a float32 program takes for int32."""
    theirs = Of(lambda self, x: self.l(x)[:, torch.tensor([1, 0])], l=nn.Linear(5, 2))
    index = np.array([1, -100])

    def ours(p, x):
        return wrong * apply(p["l"], x)[:, jnp.where(index < 0, 0, index)]

    return (ours, {"l": dense(theirs.l)}), theirs, [sample(3, 5)], {"dtypes": ("float64", "float32")}


def recurrent(wrong):
    """A Linen cell, whose carry is float32 by default."""
    theirs = Of(lambda self, x: self.r(x)[0], r=nn.LSTM(5, 3, batch_first=True))
    with torch.no_grad():
        theirs.r.bias_hh_l0.zero_()
    gates, params = "ifgo", {}
    for gate, i, h, b in zip(
        gates, *(one.detach().chunk(4) for one in (*theirs.r._flat_weights[:2], theirs.r.bias_ih_l0)), strict=True
    ):
        params |= {f"i{gate}": {"kernel": array(i.T)}, f"h{gate}": {"kernel": array(h.T), "bias": wrong * array(b)}}
    fused = {
        "r.weight_ih_l0": [f"cell.i{gate}.kernel" for gate in gates],
        "r.weight_hh_l0": [f"cell.h{gate}.kernel" for gate in gates],
        "r.bias_ih_l0": [f"cell.h{gate}.bias" for gate in gates],
    }
    side = linen.RNN(linen.OptimizedLSTMCell(3)), {"params": {"cell": params}}
    return side, theirs, [sample(2, 3, 5)], {"rules": Rules(fused=fused, ignore=["r.bias_hh_l0"])}


def recurrent_nnx(wrong):
    """An NNX cell, whose first carry counts random numbers up, though it draws none."""
    theirs = Of(lambda self, x: self.r(x)[0], r=nn.LSTM(5, 3, batch_first=True))
    with torch.no_grad():
        theirs.r.bias_hh_l0.zero_()
    ours = nnx.RNN(nnx.OptimizedLSTMCell(5, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    ours.cell.dense_i.kernel[...] = array(theirs.r.weight_ih_l0.T)
    ours.cell.dense_h.kernel[...] = array(theirs.r.weight_hh_l0.T) * wrong
    ours.cell.dense_h.bias[...] = array(theirs.r.bias_ih_l0)
    names = {"dense_i.kernel": "weight_ih_l0", "dense_h.kernel": "weight_hh_l0", "dense_h.bias": "bias_ih_l0"}
    rules = Rules({f"cell.{mine}": f"r.{other}" for mine, other in names.items()}, ignore=["r.bias_hh_l0"])
    return ours, theirs, [sample(2, 3, 5)], {"rules": rules}


def ensemble(wrong):
    """Members under nn.vmap, which all take in the same array."""
    theirs = Of(lambda self, x: sum(one(x) for one in self.m), m=nn.ModuleList(nn.Linear(5, 2) for _ in range(3)))

    class Ours(linen.Module):
        @linen.compact
        def __call__(self, x):
            axes, rngs = {"params": 0}, {"params": True}
            member = linen.vmap(linen.Dense, variable_axes=axes, split_rngs=rngs, in_axes=None, axis_size=3)
            return wrong * member(2, name="m")(x).sum(0)

    params = {"m": jax.tree.map(lambda *one: jnp.stack(one), *map(dense, theirs.m))}
    return (Ours(), {"params": params}), theirs, [sample(3, 5)], {"rules": Rules(stacked={"m": "m.{}"})}


class Step(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(5, name="l")(x)), None


def one_layer_scanned(wrong):
    """One layer, run by a scan at every step."""

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.l(x))
        return x

    theirs = Of(forward, l=nn.Linear(5, 5))

    class Ours(linen.Module):
        @linen.compact
        def __call__(self, x):
            scan = linen.scan(Step, variable_broadcast="params", split_rngs={"params": False}, length=3)
            return wrong * scan(name="s")(x, None)[0]

    return (Ours(), {"params": {"s": {"l": dense(theirs.l)}}}), theirs, [sample(3, 5)], {"rules": {"s.l": "l"}}


def masked_logits(wrong):
    """An output with infinities."""
    banned = np.array([False, True])
    theirs = Of(lambda self, x: self.l(x).masked_fill(torch.tensor(banned), -torch.inf), l=nn.Linear(5, 2))

    def ours(p, x):
        return jnp.where(banned, -jnp.inf, wrong * apply(p["l"], x))

    return (ours, {"l": dense(theirs.l)}), theirs, [sample(3, 5)], {}


def forces(wrong):
    """A model that differentiates inside."""

    def forward(self, x):
        energy = torch.tanh(self.l(x)).sum()
        return energy, -torch.autograd.grad(energy, x, create_graph=True)[0]

    theirs = Of(forward, l=nn.Linear(5, 2))

    def energy(x, p):
        return jnp.tanh(apply(p["l"], x)).sum()

    def ours(p, x):
        return energy(x, p), -wrong * jax.grad(energy)(x, p)

    return (ours, {"l": dense(theirs.l)}), theirs, [sample(3, 5)], {}


def square_images(wrong):
    """NHWC and NCHW of one shape, without a rule."""
    theirs = Of(lambda self, x: self.b(torch.relu(self.a(x))).mean((2, 3)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))

    class Ours(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(4, (1, 1), name="b")(wrong * linen.relu(linen.Conv(4, (1, 1), name="a")(x)))
            return x.mean((1, 2))

    def conv(module):
        return {"kernel": array(module.weight.permute(2, 3, 1, 0)), "bias": array(module.bias)}

    x = sample(4, 4, 4, 4)
    side = Ours(), {"params": {"a": conv(theirs.a), "b": conv(theirs.b)}}
    options = {"jax_inputs": [x.transpose(0, 2, 3, 1).copy()], "dtypes": ("float64", "bfloat16")}
    return side, theirs, [x], options


def several_in_one_argument(wrong):
    """A tuple of states, as a cell takes them."""
    theirs = Of(lambda self, x, state: self.l(x) * state[0] + state[1]["c"], l=nn.Linear(5, 2))
    inputs = [sample(3, 5), (torch.ones(3, 2) * 1.5, {"c": sample(3, 2)})]

    def ours(p, x, state):
        return apply(p["l"], x) * state[0] * wrong + state[1]["c"]

    return (ours, {"l": dense(theirs.l)}), theirs, inputs, {}


KINDS = (
    several_in_one_argument,
    weight_norm,
    stored_table,
    array_in_nnx,
    complex_weights,
    whole_constants,
    recurrent,
    recurrent_nnx,
    ensemble,
    one_layer_scanned,
    masked_logits,
    forces,
    square_images,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_correct_port_is_let_through_and_a_wrong_one_is_not(kind):
    ours, theirs, inputs, options = kind(1.0)
    report = compare_modules(ours, theirs, inputs, **(QUICK | options))
    assert report.exit_code == 0, report.verdict()
    ours, theirs, inputs, options = kind(1.001)
    assert compare_modules(ours, theirs, inputs, **(QUICK | options | {"dtypes": ("float64",)})).exit_code == 1


def _plain():
    theirs = nn.Sequential(nn.Linear(5, 2))
    return (lambda p, x: apply(p["0"], x), {"0": dense(theirs[0])}), theirs, [sample(3, 5)]


def test_what_a_checkpoint_runs_again_is_no_output():
    theirs = Of(
        lambda self, x: torch.utils.checkpoint.checkpoint(self.l, x, use_reentrant=False).tanh(), l=nn.Linear(5, 2)
    )
    side = (lambda p, x: jnp.tanh(apply(p["l"], x)), {"l": dense(theirs.l)})
    report = compare_modules(side, theirs, [sample(3, 5)], **QUICK)
    assert report.exit_code == 0 and not any("#2" in note for note in report.notes)


def test_outputs_of_other_names_on_both_sides_are_incomplete():
    theirs = Of(lambda self, x: {"y": self.l(x), "aux": x.sum()}, l=nn.Linear(5, 2))
    side = (lambda p, x: {"y": apply(p["l"], x), "extra": 2 * x.sum()}, {"l": dense(theirs.l)})
    report = compare_modules(side, theirs, [sample(3, 5)], **QUICK)
    assert report.exit_code == 1 and "output.aux" in report.verdict() and "output.extra" in report.verdict()


def test_no_number_on_either_side_is_no_comfort():
    theirs = Of(lambda self, x: self.l(x) / 0 * 0, l=nn.Linear(5, 2))
    side = (lambda p, x: apply(p["l"], x) / 0 * 0, {"l": dense(theirs.l)})
    report = compare_modules(side, theirs, [sample(3, 5)], **QUICK)
    assert report.exit_code == 1 and "not a number on the torch side itself" in report.verdict()


def _scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(5, 2)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_scripted, "TorchScript"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "they are lazy; call it once first"),
        (lambda: Of(lambda self, x: nn.functional.dropout(self.l(x)), l=nn.Linear(5, 2)), "draws random numbers"),
    ],
)
def test_a_torch_module_that_cannot_be_compared_is_refused(make, message):
    ours, _, inputs = _plain()
    with pytest.raises(CompareError) as raised:
        compare_modules(ours, make(), inputs, rules={"0": "l"}, **QUICK)
    assert message in str(raised.value)


def test_a_variance_as_the_mean_of_squares_is_let_through_where_the_mean_is_large():
    theirs = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
    scale, bias = array(theirs[0].weight), array(theirs[0].bias)

    def ours(p, x):
        mean = x.mean(-1, keepdims=True)
        variance = (x * x).mean(-1, keepdims=True) - mean * mean
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * p["0"]["scale"] + p["0"]["bias"]
        return apply(p["1"], x)

    side = (ours, {"0": {"scale": scale, "bias": bias}, "1": dense(theirs[1])})
    report = compare_modules(side, theirs, [sample(6, 8) + 40], seeds=range(4))
    assert report.exit_code == 0, report.verdict()
