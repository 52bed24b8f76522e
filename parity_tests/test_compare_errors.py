"""Mistakes of somebody who compares a port: each is one line that says what to do, and each is seen here."""

import json
import re
from pathlib import Path

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
    compare,
    compare_modules,
    copy_weights,
    copy_weights_to_torch,
    load_rules,
    save_rules,
)
from parity_tests.compare import __main__ as command

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
LONGEST = 400
"""Characters of a message: five lines of a terminal."""


class Net(nnx.Module):
    """Two layers of a user's; torch's has the same names."""

    def __init__(self, drop: float = 0.0, norm: bool = False) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs) if norm else None
        self.drop = nnx.Dropout(drop, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        h = self.first(x)
        h = h if self.norm is None else self.norm(h)
        return self.last(self.drop(nnx.relu(h)))


class TorchNet(torch.nn.Module):
    """The original."""

    def __init__(self, drop: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 6)
        self.norm = torch.nn.BatchNorm1d(6, eps=1e-5) if norm else None
        self.drop = torch.nn.Dropout(drop)
        self.last = torch.nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        h = h if self.norm is None else self.norm(h)
        return self.last(self.drop(torch.relu(h)))


class LinenNet(linen.Module):
    drop: float = 0.0

    @linen.compact
    def __call__(self, x, deterministic=False):
        h = linen.relu(linen.Dense(6, name="first")(x))
        h = linen.Dropout(self.drop)(h, deterministic=deterministic) if self.drop else h
        return linen.Dense(3, name="last")(h)


class LinenNorm(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        return linen.BatchNorm(use_running_average=not train, name="norm")(x)


class TorchNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x)


class EquinoxNet(equinox.Module):
    first: equinox.nn.Linear
    drop: equinox.nn.Dropout
    last: equinox.nn.Linear

    def __init__(self, drop: float = 0.0) -> None:
        self.first = equinox.nn.Linear(4, 6, key=jax.random.key(0))
        self.drop = equinox.nn.Dropout(drop)
        self.last = equinox.nn.Linear(6, 3, key=jax.random.key(1))

    def __call__(self, x, key=None):
        return self.last(self.drop(jax.nn.relu(self.first(x)), key=key))


class Fusing(torch.nn.Module):
    """q, k and v in one parameter, as torch's attention has them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.in_proj = torch.nn.Linear(4, width, bias=False)

    def forward(self, x):
        return self.in_proj(x)


class Separate(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.q, self.k, self.v = (nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(3))

    def __call__(self, x):
        return jnp.concatenate([self.q(x), self.k(x), self.v(x)], -1)


class Table(torch.nn.Module):
    """A module with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("table", torch.ones(3))

    def forward(self, x):
        return self.linear(x) * self.table


def original(**options):
    """The original with the same weights every time, dropout off."""
    torch.manual_seed(0)
    return TorchNet(**options).eval()


def pair(**options):
    """The port with the original's weights."""
    theirs = original(**options)
    ours = Net(**options)
    ours.eval()
    copy_weights(theirs, ours)
    return ours, theirs


def models(rules=None, inputs=None, **options):
    """A comparison of the right pair with something wrong about it."""
    options.setdefault("dtypes", ("float64",))
    return compare_modules(*pair(), [X] if inputs is None else inputs, rules, seeds=range(2), **options)


def against(jax_side, theirs=None, inputs=None, **options):
    """A comparison of a wrong JAX side with the original."""
    options.setdefault("dtypes", ("float64",))
    theirs = original() if theirs is None else theirs
    return compare_modules(jax_side, theirs, [X] if inputs is None else inputs, seeds=range(2), **options)


def linen_net(drop=0.0):
    net = LinenNet(drop)
    return net, net.init(jax.random.key(0), X, deterministic=True)


def equinox_net(drop=0.0):
    return EquinoxNet(drop), original()


def linen_norm():
    """Linen's batch norm that is left in training, and torch's."""
    net = LinenNorm()
    return net, net.init(jax.random.key(0), X, train=False)


def bridged():
    """A Linen module inside an NNX one, dropout on."""
    return nnx.bridge.ToNNX(LinenNet(0.5), rngs=nnx.Rngs(0)).lazy_init(X)


def batched(model, x):
    return jax.vmap(model)(x)


def plain(function, theirs=None, **options):
    """A function of a weight and the input against a torch layer."""
    theirs = torch.nn.Linear(4, 3, bias=False) if theirs is None else theirs
    params = {"weight": theirs.weight.detach().numpy()}
    return against((lambda params, x: function(params["weight"], x), params), theirs, **options)


def with_key(model, x):
    return jax.vmap(lambda row: model(row, jax.random.key(0)))(x)


def functions(reference, candidate, **options):
    return compare(lambda dtype: reference, lambda dtype: candidate, **{"dtypes": ("float64",), **options})


def mixed_device():
    with torch.device("meta"):
        return TorchNet().eval()


class Outputs(nnx.Module):
    """The right net with its result in a dict."""

    def __init__(self, net) -> None:
        self.net = net

    def __call__(self, x):
        return {"logits": self.net(x), "extra": x}


def half_precision(values):
    return {name: torch.tensor(value).bfloat16() for name, value in values.items()}


def with_grad(values):
    return {name: torch.tensor(value, requires_grad=True) * 1 for name, value in values.items()}


def base_model():
    """A base model of transformers', whose result is an object with `last_hidden_state`."""
    from transformers import LlamaConfig, LlamaModel

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=0, num_attention_heads=2, vocab_size=11)
    theirs = LlamaModel(LlamaConfig(**sizes)).eval()

    def forward(params, tokens):
        x = params["embed_tokens"]["weight"][tokens]
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + theirs.config.rms_norm_eps)
        return x * params["norm"]["weight"]

    params = {"embed_tokens": {"weight": np.zeros((11, 8), np.float32)}, "norm": {"weight": np.ones(8, np.float32)}}
    ours = copy_weights(theirs, (forward, params)).module
    return against(ours, theirs, [np.arange(6).reshape(2, 3)])


def linen_pair(drop=0.0):
    theirs = original()
    return copy_weights(theirs, linen_net(drop)).module, theirs


def equinox_pair(drop=0.0):
    theirs = original()
    return copy_weights(theirs, EquinoxNet(drop)).module, theirs


def trained():
    """Batch norm in training on both sides, where it uses the batch's own statistics."""
    ours, theirs = pair(norm=True)
    ours.train()
    return against(ours, theirs.train())


NUMBERS = {"a": X}
FUSED = {"in_proj.weight": ["q.kernel", "k.kernel", "v.kernel"]}

ERRORS = {
    # The JAX side
    "a Linen module without variables": (lambda: against(LinenNet()), "pass (module, variables)"),
    "variables without params": (lambda: against((LinenNet(), {})), "pass (module, module.init(key, x))"),
    "params themselves as variables": (
        lambda: against((LinenNet(), linen_net()[1]["params"])),
        "pass (module, module.init(key, x))",
    ),
    "an NNX class": (lambda: against(Net), "pass an NNX module"),
    "the JAX module twice": (lambda: compare_modules(Net(), Net(), [X]), "torch.nn.Module second"),
    "swapped arguments": (lambda: compare_modules(*pair()[::-1], [X]), "pass the JAX module first"),
    "a function without params": (lambda: against((lambda params, x: x, {})), "pass a pytree of arrays"),
    "a function alone": (lambda: against(lambda x: x), "(function, params)"),
    "params that are no arrays": (lambda: against((lambda params, x: x, {"w": "text"})), "pass a pytree of arrays"),
    "a Linen bridge with dropout": (lambda: against(bridged()), "deterministic=True"),
    "NNX dropout left on": (lambda: against(Net(drop=0.5)), "call module.eval()"),
    "Linen dropout left on": (lambda: against(linen_net(0.5)), "deterministic=True"),
    "Equinox dropout left on": (
        lambda: against(*equinox_net(0.5), call=with_key),
        "equinox.nn.inference_mode",
    ),
    "Equinox dropout without a key": (lambda: against(*equinox_net(0.5), call=batched), "equinox.nn.inference_mode"),
    "Equinox without vmap": (lambda: against(*equinox_net()), "jax.vmap"),
    "Linen batch norm in training": (
        lambda: against(linen_norm(), TorchNorm().eval(), call=lambda model, x: model(x, train=True)),
        "use_running_average=True",
    ),
    "the JAX side returns text": (lambda: plain(lambda w, x: "text"), "return one"),
    "the JAX side returns nothing": (lambda: plain(lambda w, x: None), "return one"),
    "the JAX side leaves JAX": (lambda: plain(lambda w, x: jnp.asarray(np.asarray(x) @ w.T)), "jax.numpy"),
    "the JAX side branches on a value": (lambda: plain(lambda w, x: x if x.sum() > 0 else -x), "jax.numpy"),
    "the JAX side fails": (lambda: plain(lambda w, x: x.no_such_method()), "check the inputs, jax_inputs and call="),
    "call is no function": (lambda: models(call="apply"), "call="),
    # The torch side
    "torch dropout left on": (lambda: against(Net(), TorchNet(0.5)), "call module.eval() first"),
    "a float16 module": (lambda: against(Net(), TorchNet().eval().half()), "module.float()"),
    "a module on the meta device": (lambda: against(Net(), mixed_device()), "load them first"),
    "a torch function": (lambda: against(Net(), torch.relu), "torch.nn.Module second"),
    "torch batch norm in training on one row": (
        lambda: against(Net(norm=True), TorchNet(norm=True), [X[:1]]),
        "module.eval()",
    ),
    # Inputs
    "inputs of other names": (lambda: models(inputs={"tokens": X}), "dict of keyword arguments"),
    "too many inputs": (lambda: models(inputs=[X, X]), "list of its arguments"),
    "no inputs": (lambda: models(inputs=[]), "list of its arguments"),
    "a list of numbers": (lambda: models(inputs=[1.0, 2.0]), "list of its arguments"),
    "an input of another width": (lambda: models(inputs=[X[:, :3]]), "list of its arguments"),
    "an input of text": (lambda: models(inputs=["text"]), "list of its arguments"),
    "an array of text": (lambda: models(inputs=[np.array(["text"])]), "pass numbers"),
    "a float16 input": (lambda: models(inputs=[X.astype(np.float16)]), "pass it as float32"),
    "a ragged list": (lambda: models(inputs=[[[1.0, 2.0], [3.0]]]), "lists of one length"),
    "a key that is no name": (lambda: models(inputs={1: X}), "names of arguments"),
    "jax_inputs of other names": (lambda: models(jax_inputs={"tokens": X}), "jax_inputs"),
    "jax_inputs of another width": (lambda: models(jax_inputs=[X[:, :3]]), "jax_inputs"),
    # Options
    "a dtype that is not compared": (lambda: models(dtypes=("float16",)), "must be some of float64"),
    "an unknown dtype": (lambda: models(dtypes=("float65",)), "must be some of float64"),
    "a dtype as an object": (lambda: models(dtypes=torch.float32), "must be some of float64"),
    "no dtypes": (lambda: models(dtypes=()), "must be some of float64"),
    "no seeds": (lambda: compare_modules(*pair(), [X], dtypes=("float64",), seeds=()), "seeds"),
    "a loss that is no pair": (lambda: models(loss=lambda out: out.sum()), "two functions"),
    "a loss that is a pair of one": (lambda: models(loss=(lambda out: out.sum(), None)), "two functions"),
    "a loss that fails in torch": (lambda: models(loss=(lambda out: out.sum(), lambda out: out.total())), "loss"),
    "a loss that fails in JAX": (lambda: models(loss=(lambda out: out.total(), lambda out: out.sum())), "loss"),
    "a loss that is no scalar": (lambda: models(loss=(lambda out: out, lambda out: out)), "scalar"),
    "a loss that is no array": (lambda: models(loss=(lambda out: 1.0, lambda out: 1.0)), "scalar"),
    "constants that name no buffer": (lambda: models(constants={"table": X}), "one of its buffers"),
    "constants of another shape": (
        lambda: against(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), Table(), constants={"table": X}, rules={"": "linear"}),
        "shape",
    ),
    # Rules
    "no names in common": (
        lambda: against(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))),
        "pass rules={JAX path: torch path}",
    ),
    "rules that are a list": (lambda: models(rules=["first"]), "Rules(names=...)"),
    "name_map that is a list": (lambda: models(name_map=["first"]), "name_map"),
    "names that are no names": (lambda: models(rules={"first": 1}), "must map names to names"),
    "stacked that is a list": (lambda: Rules(stacked=["layers"]), "must map names to names"),
    "stacked without {}": (lambda: Rules(stacked={"layers": "blocks"}), "'layers.{}'"),
    "a layout of other letters": (lambda: Rules(layouts={"*": "NHWC->NCHX"}), "'NHWC->NCHW'"),
    "a layout without an arrow": (lambda: Rules(layouts={"*": "NHWC"}), "'NHWC->NCHW'"),
    "fused that is a list": (lambda: Rules(fused=["q", "k"]), "must map a parameter"),
    "fused that is text": (lambda: Rules(fused={"in_proj": "qkv"}), "must be a list of parameters"),
    "fused of one part": (lambda: Fused(["q"]), "at least two"),
    "fused in no groups": (lambda: Fused(["q", "k"], groups=0), "at least 1"),
    "fused parts that are text": (lambda: Fused("qkv"), "list of parameters"),
    "ignore that is text": (lambda: Rules(ignore="first"), "must be a list"),
    "ignore of numbers": (lambda: Rules(ignore=[1]), "must be a list"),
    "{} in the key alone": (lambda: models(rules={"{}": "first"}), "as many in both"),
    "{} in the target alone": (lambda: models(rules={"first": "{}"}), "as many in both"),
    "fused of what the JAX side lacks": (
        lambda: against(Separate(), Fusing(), rules=Rules(fused={"in_proj.weight": ["q.kernel", "k.kernell"]})),
        "did you mean 'k.kernel'?",
    ),
    "fused of what the torch side lacks": (
        lambda: compare_modules(
            nnx.Linear(4, 12, use_bias=False, rngs=nnx.Rngs(0)),
            torch.nn.Linear(4, 12, bias=False),
            [X],
            Rules(fused={"kernel": ["weight", "wieght"]}),
        ),
        "did you mean 'weight'?",
    ),
    "fused of other sizes": (lambda: against(Separate(), Fusing(16), rules=Rules(fused=FUSED)), "parts that it holds"),
    "fused in groups that do not divide": (
        lambda: against(Separate(), Fusing(), rules=Rules(fused={"in_proj.weight": Fused(FUSED["in_proj.weight"], 3)})),
        "groups",
    ),
    # Weights
    "weights that find no place": (lambda: copy_weights(TorchNet(), Net(norm=True)), "partial=True"),
    "weights of another shape": (
        lambda: copy_weights(torch.nn.Linear(4, 5), nnx.Linear(4, 3, rngs=nnx.Rngs(0))),
        "layout rule",
    ),
    "weights of another shape, back": (
        lambda: copy_weights_to_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), torch.nn.Linear(4, 5)),
        "layout rule",
    ),
    "weights copied the wrong way round": (
        lambda: copy_weights(*pair()),
        "copy_weights takes (torch_module, jax_side)",
    ),
    "weights copied the wrong way round, back": (
        lambda: copy_weights_to_torch(*pair()[::-1]),
        "copy_weights_to_torch (jax_side, torch_module)",
    ),
    "weights of nothing": (lambda: copy_weights(None, Net()), "copy_weights takes (torch_module, jax_side)"),
    "weights copied by a typo": (
        lambda: copy_weights(TorchNet(), Net(), {"frist": "first"}),
        "did you mean 'first'?",
    ),
    # Two functions
    "a function that returns text": (lambda: functions("text", NUMBERS), "return a dict of arrays"),
    "a function that returns None": (lambda: functions(NUMBERS, None), "return a dict of arrays"),
    "a function that returns an empty dict": (lambda: functions({}, NUMBERS), "return a dict of arrays"),
    "a function that returns text by name": (lambda: functions(NUMBERS, {"a": "text"}), "return numbers"),
    "a function that returns objects by name": (lambda: functions(NUMBERS, {"a": object()}), "return numbers"),
    "a function that is none": (lambda: compare(NUMBERS, NUMBERS), "function"),
    "functions without a name in common": (lambda: functions({"a": X}, {"b": X}), "name_map="),
    "a function without a dtype": (lambda: compare(lambda: NUMBERS, lambda: NUMBERS), "dtype"),
}
"""What somebody does -> (the call, what the message must hold)."""


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_one_line_with_a_remedy(name):
    call, remedy = ERRORS[name]
    with pytest.raises(CompareError) as caught:
        call()
    message = str(caught.value)
    assert remedy in message
    assert "\n" not in message and len(message) < LONGEST
    assert message.endswith((".", "?"))


ACCEPTED = {
    "one array instead of a list": lambda: models(inputs=X),
    "keyword inputs": lambda: models(inputs={"x": X}),
    "an input as nested lists": lambda: models(inputs=[X.tolist()]),
    "inputs of torch": lambda: models(inputs=[torch.tensor(X, requires_grad=True)]),
    "inputs of JAX": lambda: models(inputs=[jnp.asarray(X)]),
    "a dtype as text": lambda: models(dtypes="float64"),
    "a dict of outputs": lambda: against(Outputs(pair()[0]), pair()[1], rules={"net": ""}),
    "a base model of transformers": base_model,
    "a compiled module": lambda: against(pair()[0], torch.compile(pair()[1])),
    "a bound Linen module": lambda: against(linen_pair()[0][0].bind(linen_pair()[0][1]), linen_pair()[1]),
    "Linen dropout, deterministic": lambda: against(*linen_pair(0.5), jax_inputs={"x": X, "deterministic": True}),
    "Equinox dropout, inference": lambda: against(
        equinox.nn.inference_mode(equinox_pair(0.5)[0]), equinox_pair(0.5)[1], call=batched
    ),
    "batch norm in training": trained,
    "torch tensors with a gradient": lambda: functions(with_grad(NUMBERS), NUMBERS),
    "torch tensors in bfloat16": lambda: functions(half_precision(NUMBERS), half_precision(NUMBERS)),
    "a list of arrays": lambda: functions([X, X], [X, X]),
    "a single array": lambda: functions(X, jnp.asarray(X)),
}
"""What looks like a mistake and is none -> the comparison, which finds the two sides equal."""


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_no_mistake_is_compared(name):
    report = ACCEPTED[name]()
    assert report.exit_code == 0, report.verdict()
    assert report.rows


def other_shape():
    theirs = original()
    ours = Net()
    copy_weights(theirs, ours)
    ours.last = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    return against(ours, theirs)


FOUND = {
    "weights never copied": (lambda: against(Net(), pair()[1]), "weight first.weight"),
    "another shape": (other_shape, "shape (6, 5) instead of (3, 6)"),
    "a shape of two functions": (lambda: functions({"a": X}, {"a": X.T}), "shape (4, 3) instead of (3, 4)"),
    "a key that names nothing": (lambda: models({"frist": "last"}), "did you mean 'first'?"),
    "a target that names nothing": (lambda: models({"first": "lsat"}), "did you mean 'last'?"),
    "a name_map key that names nothing": (lambda: functions(NUMBERS, NUMBERS, name_map={"b": "a"}), "name_map key 'b'"),
    "a name_map target that names nothing": (
        lambda: functions(NUMBERS | {"c": X}, NUMBERS | {"b": X}, name_map={"b": "d"}),
        "name_map value 'd'",
    ),
    "a stacked key that names nothing": (lambda: models(Rules(stacked={"layers": "layers.{}"})), "stacked rule"),
    "an ignored name that is none": (lambda: models(Rules(ignore=["frist"])), "did you mean 'first'?"),
    "a layout of what is not there": (lambda: models(Rules(layouts={"frist": "ab->ba"})), "did you mean 'first'?"),
    "a fused key that names nothing": (
        lambda: models(Rules(fused={"in_proj.weight": ["first.kernel", "last.kernel"]})),
        "fused rule 'in_proj.weight' matches nothing",
    ),
    "a parameter of JAX alone": (lambda: against(pair(norm=True)[0], pair()[1]), "parameters only in JAX: norm."),
    "values that are no numbers": (lambda: functions({"a": X}, {"a": X * np.nan}), "nan"),
}
"""What is no error and not equal either -> (the comparison, what its verdict must hold)."""


@pytest.mark.parametrize("name", FOUND)
def test_a_wrong_pair_is_a_verdict_and_no_error(name):
    compared, text = FOUND[name]
    report = compared()
    assert report.exit_code == 1
    assert text in report.verdict()


PORT = """
def pair():
    import numpy as np, torch
    import parity_tests.compare as compare
    theirs = torch.nn.Linear(4, 3)
    params = {"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}
    function = lambda params, x: x @ params["weight"].T + params["bias"]
    return compare.copy_weights(theirs, (function, params)).module, theirs, np.ones((2, 4), np.float32)

def with_rules():
    return *pair(), {"weight": "weight"}

def keys():
    return dict(zip(("jax_side", "torch_module", "input"), pair()))

def few():
    return {"inputs": []}

def broken():
    raise RuntimeError("no luck\\nand more lines")

def ending():
    raise SystemExit(0)

def copying():
    from flax import nnx
    import torch
    import parity_tests.compare as compare
    rngs = nnx.Rngs(0)
    copied = compare.copy_weights(torch.nn.Linear(4, 3), nnx.Linear(4, 3, use_bias=False, rngs=rngs))

def text():
    return "text"

number = 3
"""

COMMAND = {
    "no colon": (["port.py"], "must be MODULE:FUNCTION"),
    "no function's name": (["port.py:"], "must be MODULE:FUNCTION"),
    "no such file": (["no_port.py:pair"], "name the file that holds pair"),
    "no such module": (["no_port_of_mine:pair"], "No module named 'no_port_of_mine'"),
    "no such function": (["port.py:par"], "has no function par"),
    "no function at all": (["port.py:number"], "has no function number"),
    "a module that does not compile": (["broken.py:pair"], "cannot be imported: SyntaxError"),
    "a function that fails": (["port.py:broken"], "RuntimeError: no luck; it must return the pair"),
    "a file that ends Python": (["ending.py:pair"], "under if __name__ == '__main__'"),
    "a function that ends Python": (["port.py:ending"], "SystemExit: 0; it must return the pair"),
    "weights that find no place": (["port.py:copying"], "error: bias of torch has no place in JAX; say in rules"),
    "a function that returns text": (["port.py:text"], "must return (jax_side, torch_module, inputs)"),
    "a function that returns an unknown key": (["port.py:keys"], "the key 'input'; known are jax_side"),
    "a function that returns too few keys": (["port.py:few"], "no jax_side, torch_module"),
    "a folder that holds files": (["port.py:pair", "--out", "full"], "name a new folder"),
    "a folder that is a file": (["port.py:pair", "--out", "port.py"], "is a file; name a new folder"),
    "rules that are not there": (["port.py:pair", "--rules", "no.json"], "name a file of save_rules"),
    "rules that are no JSON": (["port.py:pair", "--rules", "port.py"], "is no JSON"),
    "rules that are a list": (["port.py:pair", "--rules", "list.json"], "must hold an object"),
    "rules with an unknown field": (
        ["port.py:pair", "--rules", "unknown.json"],
        "field name; known are names, stacked",
    ),
    "rules with a wrong value": (["port.py:pair", "--rules", "wrong.json"], "must map names to names"),
    "rules in both places": (["port.py:with_rules", "--rules", "good.json"], "use one"),
    "an unknown dtype": (["port.py:pair", "--dtypes", "float8"], "must be some of float64"),
}
"""What is typed -> what the one line on stderr must hold."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where somebody's port and rules lie."""
    files = {
        "port.py": PORT,
        "broken.py": "def pair(:\n",
        "ending.py": "def pair():\n    return None\n\nraise SystemExit(0)\n",
        "list.json": "[]",
        "unknown.json": json.dumps({"name": {}}),
        "wrong.json": json.dumps({"names": []}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    save_rules(Rules(names={"weight": "weight"}), tmp_path / "good.json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.sys, "path", list(command.sys.path))
    yield tmp_path
    for name in ("port", "broken", "ending"):
        command.sys.modules.pop(name, None)


@pytest.mark.parametrize("name", COMMAND)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(name, folder, capsys):
    arguments, text = COMMAND[name]
    before = sorted(folder.rglob("*"))
    assert command.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert text in told.err
    assert re.fullmatch(r"error: [^\n]+\.\n", told.err) and len(told.err) < LONGEST
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == before


def test_the_command_compares_and_writes(folder, capsys):
    assert command.main(["port.py:pair", "--dtypes", "float64", "--out", "report", "--rules", "good.json"]) == 0
    assert "no divergence" in capsys.readouterr().out
    assert {"report.json", "report.html"} <= {path.name for path in Path("report").iterdir()}


def test_rules_are_not_written_over(tmp_path):
    path = tmp_path / "rules.json"
    rules = Rules(names={"a": "b"}, fused=FUSED, layouts={"*": "NHWC->NCHW"}, ignore=["table"])
    save_rules(rules, path)
    save_rules(rules, path)
    assert load_rules(path) == rules
    with pytest.raises(CompareError, match="holds other rules; remove it, or name a new file"):
        save_rules(Rules(), path)
