"""The comparison of foreign models: whose array is whose, what is tapped, what is widened, what the verdict says."""

import dataclasses
import itertools
import json

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from parity_tests.compare import (
    CompareError,
    Fused,
    Rules,
    assert_same,
    compare_modules,
    copy_weights,
    copy_weights_to_torch,
    load_rules,
    save_rules,
    tap,
)
from parity_tests.compare import __main__ as command
from parity_tests.compare.program import Program, tracing
from parity_tests.compare.rules import arrangements, cut, join, rename

IN, HIDDEN, OUT, ROWS, LAYERS = 5, 7, 3, 4, 3
QUICK = dict(dtypes=("float64",), seeds=range(2))


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(0)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(IN, HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.last = torch.nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


class NnxNet(nnx.Module):
    def __init__(self, scale: float = 1.0) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(IN, HIDDEN, rngs=rngs)
        self.norm = nnx.LayerNorm(HIDDEN, epsilon=1e-5, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, OUT, rngs=rngs)
        self.scale = scale

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))) * self.scale)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.LayerNorm(epsilon=1e-5, name="norm")(linen.Dense(HIDDEN, name="first")(x))
        return linen.Dense(OUT, name="last")(jnp.tanh(x))


class EquinoxNet(equinox.Module):
    first: equinox.nn.Linear
    norm: equinox.nn.LayerNorm
    last: equinox.nn.Linear

    def __init__(self) -> None:
        one, two = jax.random.split(jax.random.key(0))
        self.first, self.last = equinox.nn.Linear(IN, HIDDEN, key=one), equinox.nn.Linear(HIDDEN, OUT, key=two)
        self.norm = equinox.nn.LayerNorm(HIDDEN)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def function(params, x):
    x = tap("first", x @ params["first"]["w"] + params["first"]["b"])
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = tap("norm", x * params["norm"]["gamma"] + params["norm"]["beta"])
    return jnp.tanh(x) @ params["last"]["w"] + params["last"]["b"]


def zeros() -> dict:
    return {
        "first": {"w": jnp.zeros((IN, HIDDEN)), "b": jnp.zeros(HIDDEN)},
        "norm": {"gamma": jnp.zeros(HIDDEN), "beta": jnp.zeros(HIDDEN)},
        "last": {"w": jnp.zeros((HIDDEN, OUT)), "b": jnp.zeros(OUT)},
    }


def linen_net():
    return LinenNet(), LinenNet().init(jax.random.key(0), numbers(ROWS, IN))


SIDES = {
    "nnx": (NnxNet, None, 3),
    "linen": (linen_net, None, 3),
    "linen in nnx": (lambda: nnx.bridge.ToNNX(LinenNet(), rngs=nnx.Rngs(0)).lazy_init(numbers(ROWS, IN)), None, 0),
    "linen, bound": (lambda: LinenNet().bind(linen_net()[1]), None, 3),
    "equinox": (EquinoxNet, lambda model, x: jax.vmap(model)(x), 3),
    "function": (lambda: (function, zeros()), None, 2),
}
"""Kind -> how it is made, how it is called, how many submodules' outputs can be seen in it."""


@pytest.mark.parametrize("kind", SIDES)
def test_weights_go_over_and_the_models_are_the_same(kind):
    make, call, seen = SIDES[kind]
    net = TorchNet()
    copied = copy_weights(net, make())
    assert copied.unplaced == () and len(copied.placed) == 6
    report = assert_same(copied.module, net, [numbers(ROWS, IN)], call=call, **QUICK)
    assert report.coverage.parameters == report.coverage.gradients == (6, 6)
    names = {row.name for row in report.rows}
    assert sum(f"forward {name}" in names for name in ("first", "norm", "last")) == seen
    assert {"gradient input.0", "forward output", "gradient last.bias", "weight norm.bias"} <= names
    assert ("backward first" in names) == bool(seen)


@pytest.mark.parametrize("kind", SIDES)
def test_and_back_bit_for_bit(kind):
    net, other = TorchNet(), TorchNet()
    copied = copy_weights(net, SIDES[kind][0]()).module
    assert copy_weights_to_torch(copied, other).module is other
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_weights_that_differ_are_the_first_divergence():
    report = compare_modules(NnxNet(), TorchNet(), [numbers(ROWS, IN)], **QUICK)
    assert report.exit_code == 1 and report.first_divergence.row.name == "weight first.weight"


def test_a_typo_in_the_rules_is_not_equal():
    net, port = TorchNet(), NnxNet()
    copy_weights(net, port)
    for rules, text in (
        ({"frist": "first"}, "'frist' matches nothing; did you mean 'first'?"),
        ({"last": "lats"}, "'lats' matches nothing; did you mean 'last'?"),
        ({"last": "lats"}, "parameters only in JAX: last.bias, last.kernel"),
        ({"last": "lats"}, "parameters only in torch: last.weight, last.bias"),
    ):
        report = compare_modules(port, net, [numbers(ROWS, IN)], rules, **QUICK)
        assert report.exit_code == 1 and report.headline == "Incomplete" and text in report.verdict()
    accepted = compare_modules(port, net, [numbers(ROWS, IN)], rules, partial=True, **QUICK)
    assert accepted.exit_code == 0 and "4 of 8 parameters" in accepted.verdict()
    with pytest.raises(AssertionError, match="incomplete: 4 of 8 parameters"):
        assert_same(port, net, [numbers(ROWS, IN)], rules, **QUICK)


def test_a_parameter_without_a_partner_is_not_equal():
    net, port = TorchNet(), NnxNet()
    copy_weights(net, port)
    port.extra = nnx.Param(jnp.ones(2))
    report = compare_modules(port, net, [numbers(ROWS, IN)], **QUICK)
    assert report.exit_code == 1 and "parameters only in JAX: extra" in report.verdict()
    assert compare_modules(port, net, [numbers(ROWS, IN)], Rules(ignore=["extra"]), **QUICK).exit_code == 0
    with pytest.raises(CompareError, match="extra of JAX has no place in torch"):
        copy_weights(net, port)
    assert copy_weights(net, port, partial=True).unplaced == ("extra of JAX has no place in torch",)


def test_a_torch_parameter_alone_is_not_equal_either():
    net, port = TorchNet(), NnxNet()
    copy_weights(net, port)
    net.extra = torch.nn.Parameter(torch.ones(2))
    report = compare_modules(port, net, [numbers(ROWS, IN)], **QUICK)
    assert report.exit_code == 1 and report.headline == "Incomplete"
    assert "6 of 7 parameters" in report.verdict() and "parameters only in torch: extra" in report.verdict()
    with pytest.raises(CompareError, match="extra of torch has no place in JAX"):
        copy_weights(net, port)


class TorchTokens(torch.nn.Module):
    """A table whose row 0 is padding, and a scale that is used and not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(IN, HIDDEN, padding_idx=0)
        self.scale = torch.nn.Parameter(torch.tensor(numbers(HIDDEN)))

    def forward(self, tokens):
        return self.table(tokens) * self.scale.detach()


class NnxRows(nnx.Embed):
    """A table one of whose rows is not trained."""

    stopped = -1

    def __call__(self, tokens):
        rows = super().__call__(tokens)
        return jnp.where((tokens == self.stopped)[..., None], jax.lax.stop_gradient(rows), rows)


class NnxTokens(nnx.Module):
    """The port; `stopped` is a token whose row is not trained, `trained` whether the scale is."""

    def __init__(self, stopped: int = -1, trained: bool = False) -> None:
        self.table = NnxRows(IN, HIDDEN, rngs=nnx.Rngs(0))
        self.table.stopped = stopped
        self.scale, self.trained = nnx.Param(jnp.zeros(HIDDEN)), trained

    def __call__(self, tokens):
        return self.table(tokens) * (self.scale[...] if self.trained else jax.lax.stop_gradient(self.scale[...]))


def test_a_padding_row_is_left_out_alone_and_what_torch_does_not_train_is_compared():
    net, tokens = TorchTokens(), np.array([[0, 1, 2], [2, 4, 0]])
    for options, diverging in (
        ({}, ""),
        ({"stopped": 2}, "gradient table.weight"),
        ({"trained": True}, "gradient scale"),
    ):
        port = copy_weights(net, NnxTokens(**options)).module
        report = compare_modules(port, net, [tokens], **QUICK)
        assert (report.first_divergence.row.name if report.exit_code else "") == diverging
        assert report.coverage.gradients == (2, 2) and any("row 0 of table.weight" in note for note in report.notes)


def test_the_command_ends_with_the_verdicts_exit_code(monkeypatch, capsys):
    net, port = TorchNet(), NnxNet()
    copy_weights(net, port)
    for module, code, text in (
        (port, 0, "no divergence: 6 of 6 parameters"),
        (NnxNet(), 1, "first divergence: weight"),
    ):
        pair = lambda module=module: (module, net, [numbers(ROWS, IN)])  # noqa: E731
        monkeypatch.setattr(command, "load_pair", lambda spec, pair=pair: pair)
        assert command.main(["here:pair", "--dtypes", "float64"]) == code
        assert capsys.readouterr().out.startswith(text)


def test_nothing_of_the_users_is_changed():
    net, port = TorchNet(), NnxNet()
    copy_weights(net, port)
    before, calls = nnx.to_pure_dict(nnx.state(port)), nnx.Linear.__call__
    before = jax.tree.map(np.array, before)
    compare_modules(port, net, [numbers(ROWS, IN)], dtypes=("float64", "float32", "bfloat16"), seeds=range(2))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(port)))
    assert nnx.Linear.__call__ is calls and not any("compared" in name for name in vars(port))
    assert all(one.grad is None and one.dtype == torch.float32 for one in net.parameters())
    assert not net.first._forward_hooks and jnp.float32(0.5).dtype == np.float32
    assert torch.get_default_dtype() == torch.float32 and not jax.config.jax_enable_x64


class TorchStack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(IN, IN) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class NnxStack(nnx.Module):
    """Stacked layers, one scan over them; `transform` is put around the layer's call."""

    def __init__(self, transform=lambda call: call) -> None:
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return nnx.Linear(IN, IN, rngs=nnx.Rngs(key))

        self.blocks = make(jax.random.split(jax.random.key(0), LAYERS))
        self.transform = transform

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(self.transform(lambda layer, x: layer(x))(layer, x))

        return run(x, self.blocks)


@pytest.mark.parametrize("transform", [lambda call: call, nnx.remat, nnx.jit], ids=["plain", "remat", "jit"])
def test_stacked_layers_are_compared_layer_by_layer(transform):
    net, port, rules = TorchStack(), NnxStack(transform), Rules(stacked={"blocks": "layers.{}"})
    copy_weights(net, port, rules)
    report = assert_same(port, net, [numbers(ROWS, IN)], rules, **QUICK)
    assert report.coverage.parameters == (6, 6) and report.coverage.outputs == (4, 4)
    assert f"backward layers.{LAYERS - 1}" in {row.name for row in report.rows}
    # Without the rule nothing has a partner, and that is said.
    with pytest.raises(CompareError, match="no name is common"):
        compare_modules(port, net, [numbers(ROWS, IN)], **QUICK)
    turned = NnxStack(transform)
    copy_weights(net, turned, rules)
    kernel = turned.blocks.kernel
    kernel[...] = kernel[...].at[1].set(kernel[...][1].T)
    found = compare_modules(turned, net, [numbers(ROWS, IN)], rules, **QUICK)
    assert found.first_divergence.row.name == "weight layers.1.weight"


@pytest.mark.parametrize("groups", [1, 2])
def test_fused_parts_are_compared_in_both_directions(groups):
    sizes = (4, 2, 2)

    class Apart(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(IN, size) for size in sizes)

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x) * 2, self.v(x) * 3], -1)

    class Joint(nnx.Module):
        def __init__(self) -> None:
            self.qkv = nnx.Linear(IN, sum(sizes), rngs=nnx.Rngs(0))

        def __call__(self, x):
            grouped = self.qkv(x).reshape(*x.shape[:-1], groups, -1)
            ends = np.cumsum([size // groups for size in sizes])[:-1]
            q, k, v = (part.reshape(*x.shape[:-1], -1) for part in jnp.split(grouped, ends, -1))
            return jnp.concatenate([q, k * 2, v * 3], -1)

    rules = Rules(
        fused={
            f"qkv.{ours}": Fused([f"{part}.{theirs}" for part in "qkv"], groups)
            for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
        }
    )
    net, port = Apart(), Joint()
    copy_weights(net, port, rules)
    report = assert_same(port, net, [numbers(ROWS, IN)], rules, **QUICK)
    assert report.coverage.parameters == (6, 6) == report.coverage.gradients
    wrong = dataclasses.replace(rules, fused={**rules.fused, "qkv.bias": Fused([f"{p}.bias" for p in "kqv"], groups)})
    if groups == 1:
        assert compare_modules(port, net, [numbers(ROWS, IN)], wrong, **QUICK).exit_code == 1
    other = Apart()
    copy_weights_to_torch(port, other, rules)
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(("groups", "axis"), list(itertools.product((1, 2), (0, 1))))
def test_cutting_undoes_joining(groups, axis):
    sizes = (2, 6, 4)
    parts = [numbers(*((size, 8) if axis == 0 else (8, size)), seed=size) for size in sizes]
    whole = join(parts, groups, axis)
    for part, again in zip(parts, cut(whole, sizes, groups, axis), strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize(
    ("leaf", "ours", "theirs", "owner"),
    [
        ("kernel", (5, 3), (3, 5), "Linear"),
        ("kernel", (4, 4), (4, 4), "Linear"),
        ("weight", (3, 5), (3, 5), "Linear"),
        ("kernel", (5, 2, 3), (6, 5), "Linear"),
        ("kernel", (2, 3, 5), (5, 6), "Linear"),
        ("kernel", (5, 3), (5, 3), "Conv1D"),
        ("kernel", (2, 4, 5, 3), (3, 5, 2, 4), "Conv2d"),
        ("kernel", (2, 4, 5, 3), (5, 3, 2, 4), "ConvTranspose2d"),
        ("kernel", (5, 3), (3, 5, 1, 1), "Conv2d"),
        ("bias", (2, 3), (6,), "Linear"),
        ("bias", (3, 1, 1), (3,), "Conv2d"),
    ],
)
def test_an_arrangement_is_undone_by_its_inverse(leaf, ours, theirs, owner):
    value = numbers(*ours)
    for one in arrangements(leaf, ours, theirs, owner):
        assert one.to_torch(value).shape == theirs
        np.testing.assert_array_equal(one.to_jax(one.to_torch(value), ours), value)


def test_a_square_kernel_is_transposed():
    (one,) = arrangements("kernel", (4, 4), (4, 4), "Linear")
    np.testing.assert_array_equal(one.to_torch(numbers(4, 4)), numbers(4, 4).T)


def test_names_go_by_the_longest_prefix_and_whole_parts():
    names = {"a": "x", "a.b": "y", "c.{}.d": "z.{}", "e{}": "f"}
    assert rename("a.c", names).name == "x.c" and rename("a.b.c", names).name == "y.c"
    assert rename("ab.c", names).name == "ab.c" and rename("c.11.d.kernel", names).name == "z.11.kernel"
    assert rename("a.input#2", names).name == "x.input#2"
    with pytest.raises(CompareError, match="write as many in both"):
        rename("e1.g", names)


def test_rules_are_kept_as_json(tmp_path):
    rules = Rules({"a": "b"}, {"s": "t.{}"}, {"q": Fused(["x", "y"], 2)}, {"*": "NHWC->NCHW"}, ["i"])
    save_rules(rules, tmp_path / "rules.json")
    assert load_rules(tmp_path / "rules.json") == rules
    save_rules(rules, tmp_path / "rules.json")
    with pytest.raises(CompareError, match="holds other rules"):
        save_rules(Rules(), tmp_path / "rules.json")
    assert json.loads((tmp_path / "rules.json").read_text(encoding="utf-8"))["fused"]["q"]["groups"] == 2


def traced(function, *args, dtype="float64"):
    with tracing(dtype):
        return Program(jax.make_jaxpr(function)(*[jnp.asarray(x, dtype) for x in args]), widen=dtype == "float64")


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.astype(jnp.float32),
        lambda x: x.astype("float32"),
        lambda x: x.astype(np.float32),
        lambda x: jax.nn.softmax(jnp.zeros(4, np.float32) + x.astype(np.float32)),
        lambda x: jax.nn.relu(x.astype("float32")) * 0.1,
        lambda x: jax.lax.dot(x[None], x[:, None], preferred_element_type=np.float32)[0],
        lambda x: x * (1.0 / (10_000.0 ** (jnp.arange(0, 4, 1, dtype=np.float32) / 4))),
        lambda x: jax.lax.scan(lambda c, y: (c + y.astype("float32"), y * 0.1), jnp.float32(0.0), x)[1],
        jax.jit(lambda x: jax.checkpoint(lambda y: y.astype("float32") + 1e-6)(x)),
    ],
)
def test_float32_inside_a_jax_model_means_float64_in_the_float64_pass(cast):
    x = np.linspace(0.1, 0.7, 4)
    program = traced(cast, x)
    with tracing("float64"):
        (out,), _ = program.run(program.constants(), [jnp.asarray(x)], None)
        assert out.dtype == np.float64 and not program.float32
        wide = np.asarray(out)
    narrow = np.asarray(cast(jnp.asarray(x, np.float32)), np.float64)
    difference = np.abs(wide - narrow).max()
    assert difference <= 2.0**-20, "the same numbers"
    # A number that float32 rounded has 29 zeros at its end in float64.
    assert (wide != wide.astype(np.float32)).any(), "and not float32's"


def test_a_literal_in_float32_is_what_was_written():
    x = np.linspace(0.1, 0.7, 4)
    program = traced(lambda x: x.astype("float32") * 0.1 + 1e-6, x)
    with tracing("float64"):
        (out,), _ = program.run(program.constants(), [jnp.asarray(x)], None)
    exact = x * 0.1 + 1e-6
    assert np.abs(np.asarray(out) / exact - 1.0).max() <= 2 * 2.0**-53


def test_taps_are_found_inside_jit_remat_vmap_and_scan():
    @jax.jit
    def inner(x):
        return tap("b", jnp.sin(x))

    def model(x):
        x = jax.checkpoint(inner)(tap("a", x * 2))
        x = jax.vmap(lambda row: tap("c", row + 1))(x)
        x, _ = jax.lax.scan(lambda c, _: (inner(tap("d", c)), None), x, None, length=3)
        return jax.lax.cond(x.sum() > 0, lambda y: tap("e", y), lambda y: y, x)

    x = numbers(2, 3)
    program = traced(model, x)
    with tracing("float64"):
        _, taps = program.run([], [jnp.asarray(x, jnp.float64)], None)
    assert {name: np.shape(value) for name, value in taps.items()} == {
        **dict.fromkeys("abc", (2, 3)),
        **dict.fromkeys(("d", "b#2"), (3, 2, 3)),
    }
    assert program.unreached == ["e"]
    np.testing.assert_array_equal(taps["c"], np.asarray(taps["b"]) + 1)


def test_a_scan_from_the_last_to_the_first_keeps_its_order():
    def model(x):
        return jax.lax.scan(lambda c, row: (tap("h", c + row), c), jnp.zeros(2), x, reverse=True)[1]

    x = numbers(3, 2)
    program = traced(model, x)
    with tracing("float64"):
        (out,), taps = program.run([], [jnp.asarray(x, jnp.float64)], None)
    later = np.cumsum(x[::-1].astype(np.float64), axis=0)[::-1]
    np.testing.assert_array_equal(np.asarray(taps["h"]), later)
    np.testing.assert_array_equal(np.asarray(out), np.concatenate([later[1:], np.zeros((1, 2))]))


def test_cotangents_of_taps_inside_a_scan_are_those_of_each_step():
    def model(x):
        return jax.lax.scan(lambda c, _: (tap("h", c * c), None), x, None, length=3)[0].sum()

    x = np.array([1.1, 0.9])
    program = traced(model, x)
    with tracing("float64"):
        run = lambda shift: program.run([], [jnp.asarray(x)], {"h": shift})[0][0]  # noqa: E731
        found = np.asarray(jax.grad(run)(jnp.zeros((3, 2))))
    # h3 = h2^2 = h1^4 = x^8
    expected = [4 * (x**2) ** 3, 2 * x**4, np.ones(2)]
    assert np.abs(found / expected - 1.0).max() <= 16 * 2.0**-53


class TorchTable(torch.nn.Module):
    """A linear layer behind a table that is rounded to float32 when it is made."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(IN, OUT)
        table = torch.tensor(np.sin(np.arange(IN) + 0.5).astype(np.float32))
        if where == "buffer":
            self.register_buffer("table", table)
        else:
            self.table = table

    def forward(self, x):
        return self.fc(x + self.table)


class NnxTable(nnx.Module):
    def __init__(self, shift: float = 0.0) -> None:
        self.fc, self.shift = nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), shift

    def __call__(self, x):
        return self.fc(x + jnp.sin(jnp.arange(IN, dtype=jnp.float32) + 0.5 + self.shift))


@pytest.mark.parametrize(("where", "named"), [("buffer", "torch's table"), ("attribute", "an array of shape (5,)")])
def test_a_float32_constant_on_one_side_is_named_and_no_formula(where, named):
    net, port = TorchTable(where), NnxTable()
    copy_weights(net, port)
    report = compare_modules(port, net, [numbers(ROWS, IN)], dtypes=("float64", "float32"), seeds=range(2))
    assert report.exit_code == 0 and named in report.explained and "not by a formula" in report.verdict()
    wrong = NnxTable(shift=2.0**-18)
    copy_weights(net, wrong)
    found = compare_modules(wrong, net, [numbers(ROWS, IN)], **QUICK)
    assert found.exit_code == 1 and found.first_divergence.row.name == "forward fc.input" and not found.explained
    if where == "buffer":
        exact = {"table": np.sin(np.arange(IN) + 0.5)}
        given = compare_modules(port, net, [numbers(ROWS, IN)], constants=exact, **QUICK)
        assert given.exit_code == 0 and not given.explained


class TorchNamed(torch.nn.Module):
    """Its norm has a name that begins as that of an input does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.ModuleDict({"input_norm": torch.nn.LayerNorm(IN), "out": torch.nn.Linear(IN, OUT)})

    def forward(self, x):
        return self.block["out"](self.block["input_norm"](x))


class NnxNamed(nnx.Module):
    def __init__(self, twice: bool = False) -> None:
        rngs = nnx.Rngs(0)
        norm, out = nnx.LayerNorm(IN, epsilon=1e-5, rngs=rngs), nnx.Linear(IN, OUT, rngs=rngs)
        self.block, self.twice = nnx.Dict(input_norm=norm, out=out), twice

    def __call__(self, x):
        rows = jnp.concatenate([x, x + 1]) if self.twice else x
        return self.block.out(self.block.input_norm(rows)[: len(x)])


def test_a_module_called_input_something_is_an_output():
    net, port = TorchNamed(), NnxNamed()
    copy_weights(net, port)
    assert assert_same(port, net, [numbers(ROWS, IN)], **QUICK).coverage.outputs == (3, 3)
    wide = NnxNamed(twice=True)
    copy_weights(net, wide)
    found = compare_modules(wide, net, [numbers(ROWS, IN)], **QUICK)
    assert found.first_divergence.row.name == "forward block.input_norm", "a shape of its own is not passed over"


def test_a_users_loss_is_compared():
    net, port = TorchNet(), NnxNet()
    copy_weights(net, port)
    target = numbers(ROWS, OUT, seed=1)
    ours = lambda out: ((out - target) ** 2).mean()  # noqa: E731
    theirs = lambda out: torch.nn.functional.mse_loss(out, torch.tensor(target).to(out.dtype))  # noqa: E731
    report = assert_same(port, net, [numbers(ROWS, IN)], loss=(ours, theirs), **QUICK)
    assert "forward loss" in {row.name for row in report.rows}
    wrong = compare_modules(port, net, [numbers(ROWS, IN)], loss=(lambda out: 1.5 * ours(out), theirs), **QUICK)
    assert wrong.first_divergence.row.name == "forward loss"


def test_the_report_says_what_is_worst():
    net, port = TorchNet(), NnxNet(scale=1.001)
    copy_weights(net, port)
    report = compare_modules(port, net, [numbers(ROWS, IN)], **QUICK)
    assert report.first_divergence.row.name == "forward last.input"
    worst = report.worst()
    assert len(worst) == 5 and worst[0][0].share("jax") >= worst[4][0].share("jax") > 1
    assert worst[0][0].name in report.worst_text() and worst[0][0].name in report.to_html()
    assert json.loads(report.to_json())["coverage"]["parameters"] == [6, 6]
    assert report.verdict().splitlines()[0].startswith("first divergence: forward last.input in jax, float64")
