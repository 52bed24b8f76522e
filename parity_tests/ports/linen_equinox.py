"""Ports to Linen, to Equinox and to plain functions of a tree of parameters."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ._weights import array, heads, linear, norm, sample, settle
from .port import Pair, Port

# --- Linen: an MLP with the names that Linen gives ---


class LinenMlp(linen.Module):
    """Three dense layers with ELU between."""

    widths: tuple[int, ...]
    bug: str = ""

    @linen.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            if i:
                x = jax.nn.celu(x, 0.5) if self.bug == "alpha" else linen.elu(x)
            if self.bug == "stop_gradient" and i == 2:
                x = jax.lax.stop_gradient(x)
            x = linen.Dense(width)(x)
        return linen.elu(x) if self.bug == "last_activation" else x


def linen_mlp(bug=""):
    """Dense_0, Dense_1, Dense_2 against the first, third and fifth of a Sequential; one kernel is square."""
    torch.manual_seed(40)
    layers = nn.Linear(10, 17), nn.ELU(), nn.Linear(17, 17), nn.ELU(), nn.Linear(17, 6)
    theirs = settle(nn.Sequential(*layers))
    params = {f"Dense_{i}": linear(theirs[2 * i]) for i in range(3)}
    if bug == "transposed":
        params["Dense_1"]["kernel"] = params["Dense_1"]["kernel"].T
    names = {f"Dense_{i}": str(2 * i) for i in range(3)}
    return Pair((LinenMlp((17, 17, 6), bug), {"params": params}), theirs, (sample(5, 10),), {"names": names})


# --- Linen: a CNN with batch statistics ---


class LinenCnn(linen.Module):
    """Two convolutions with batch norm, the mean over space and a head."""

    classes: int
    bug: str = ""

    @linen.compact
    def __call__(self, x, train: bool = False):
        eps = 1e-3 if self.bug == "eps" else 1e-5
        for i, width in enumerate((7, 9)):
            pad = "SAME" if self.bug == "same_padding" and i == 1 else 1
            x = linen.Conv(width, (3, 3), strides=1 + i, padding=pad, use_bias=False, name=f"conv{i}")(x)
            x = linen.BatchNorm(use_running_average=not train, epsilon=eps, name=f"bn{i}")(x)
            x = linen.swish(x) if self.bug == "swish" else linen.hard_swish(x)
        x = jnp.max(x, axis=(1, 2)) if self.bug == "max_pool" else jnp.mean(x, axis=(1, 2))
        return linen.Dense(self.classes, name="head")(x)


class TorchCnn(nn.Module):
    """The same network."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.Hardswish())
        self.body = nn.Sequential(
            nn.Conv2d(7, 9, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(9), nn.Hardswish()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(9, classes)

    def forward(self, x):
        """Logits of the classes."""
        return self.fc(self.pool(self.body(self.stem(x))).flatten(1))


def linen_cnn(bug=""):
    """Batch statistics in a collection of their own; a flag `train`."""
    torch.manual_seed(41)
    theirs = settle(TorchCnn(5))
    params, stats, names = {"head": linear(theirs.fc)}, {}, {"head": "fc"}
    for i, name in enumerate(("stem", "body")):
        conv, bn = getattr(theirs, name)[:2]
        leaves = norm(bn)
        params |= {f"conv{i}": linear(conv), f"bn{i}": {"scale": leaves["scale"], "bias": leaves["bias"]}}
        stats[f"bn{i}"] = {"mean": leaves["mean"], "var": leaves["var"]}
        names |= {f"conv{i}": f"{name}.0", f"bn{i}": f"{name}.1"}
    x = sample(2, 4, 8, 10)
    options = {"jax_inputs": {"x": x.transpose(0, 2, 3, 1).copy(), "train": False}}
    layouts = {f"{n}{i}{suffix}": "NHWC->NCHW" for n in ("conv", "bn") for i in range(2) for suffix in ("", ".input")}
    side = LinenCnn(5, bug), {"params": params, "batch_stats": stats}
    return Pair(side, theirs, (x,), {"names": names, "layouts": layouts}, options)


# --- Linen: a scanned stack ---


class ScanBlock(linen.Module):
    """A pre-norm residual MLP, as linen.scan wants it."""

    hidden: int
    bug: str = ""

    @linen.compact
    def __call__(self, x, _):
        h = linen.LayerNorm(epsilon=1e-6 if self.bug == "eps" else 1e-5, name="norm")(x)
        h = linen.gelu(linen.Dense(self.hidden, name="fc1")(h), approximate=self.bug == "tanh_gelu")
        h = linen.Dense(x.shape[-1], name="fc2")(h)
        return (jax.lax.stop_gradient(x) if self.bug == "skip_detached" else x) + h, None


class ScanStack(linen.Module):
    """Blocks whose parameters have a leading axis, and a head."""

    depth: int
    hidden: int
    dout: int
    bug: str = ""

    @linen.compact
    def __call__(self, x):
        axes, rngs = {"params": 0}, {"params": True}
        reverse = self.bug == "reversed"
        stack = linen.scan(ScanBlock, variable_axes=axes, split_rngs=rngs, length=self.depth, reverse=reverse)
        x, _ = stack(self.hidden, self.bug, name="blocks")(x, None)
        return linen.Dense(self.dout, name="head")(x)


class TorchScanBlock(nn.Module):
    """The same block."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        """x and its residual."""
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class TorchStack(nn.Module):
    """Three blocks and a head."""

    def __init__(self, dim, hidden, dout):
        super().__init__()
        self.layers = nn.ModuleList(TorchScanBlock(dim, hidden) for _ in range(3))
        self.head = nn.Linear(dim, dout)

    def forward(self, x):
        """The head of what the blocks give."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def linen_scan(bug=""):
    """linen.scan against a ModuleList of three."""
    torch.manual_seed(42)
    theirs = settle(TorchStack(13, 22, 5))
    layers = [{"norm": norm(x.norm), "fc1": linear(x.fc1), "fc2": linear(x.fc2)} for x in theirs.layers]
    if bug == "layers_swapped":
        layers[0], layers[1] = layers[1], layers[0]
    params = {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), "head": linear(theirs.head)}
    side = ScanStack(3, 22, 5, bug), {"params": params}
    return Pair(side, theirs, (sample(4, 13),), {"stacked": {"blocks": "layers.{}"}})


# --- Linen: a transformer block with setup() ---


class LinenBlock(linen.Module):
    """Causal attention and an MLP, both pre-norm, made in setup()."""

    dim: int
    hidden: int
    n: int
    bug: str = ""

    def setup(self):
        self.ln1 = linen.LayerNorm(epsilon=1e-5)
        self.ln2 = linen.LayerNorm(epsilon=1e-5)
        self.attn = linen.MultiHeadDotProductAttention(num_heads=self.n, qkv_features=self.dim)
        self.up = linen.Dense(self.hidden)
        self.down = linen.Dense(self.dim)

    def __call__(self, x):
        mask = linen.make_causal_mask(x[..., 0])
        if self.bug == "mask_off_by_one":
            mask = jnp.tril(jnp.ones_like(mask), 1)
        h = self.ln1(x)
        x = x + self.attn(h, x if self.bug == "keys_not_normed" else h, h, mask=mask)
        h = linen.relu(self.up(self.ln1(x) if self.bug == "same_norm_twice" else self.ln2(x)))
        return x + self.down(h)


class TorchCausalBlock(nn.Module):
    """nn.TransformerEncoderLayer with its causal mask."""

    def __init__(self, dim, hidden, n):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(dim, n, hidden, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x):
        """The block over x."""
        return self.layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype))


def linen_block(bug=""):
    """linen.MultiHeadDotProductAttention, whose kernels are (D, N, H)."""
    torch.manual_seed(43)
    theirs = settle(TorchCausalBlock(14, 29, 2))
    layer = theirs.layer
    params = {"ln1": norm(layer.norm1), "ln2": norm(layer.norm2), "attn": heads(layer.self_attn, 2)}
    params |= {"up": linear(layer.linear1), "down": linear(layer.linear2)}
    if bug == "value_bias_rolled":
        params["attn"]["value"]["bias"] = jnp.roll(params["attn"]["value"]["bias"], 1, axis=0)
    names = {"attn": "layer.self_attn", "attn.out": "layer.self_attn.out_proj", "ln1": "layer.norm1"}
    names |= {"ln2": "layer.norm2", "up": "layer.linear1", "down": "layer.linear2"}
    parts = [f"attn.{p}" for p in ("query", "key", "value")]
    fused = {
        "layer.self_attn.in_proj_weight": [f"{p}.kernel" for p in parts],
        "layer.self_attn.in_proj_bias": [f"{p}.bias" for p in parts],
    }
    side = LinenBlock(14, 29, 2, bug), {"params": params}
    return Pair(side, theirs, (sample(2, 7, 14),), {"names": names, "fused": fused})


# --- Equinox: an MLP under vmap ---


class GatedMlp(eqx.Module):
    """An eqx.nn.MLP and a gate, for one vector."""

    mlp: eqx.nn.MLP
    gate: eqx.nn.Linear
    bug: str = eqx.field(static=True, default="")

    def __call__(self, x):
        gate = jax.nn.softmax(self.gate(x)) if self.bug == "softmax_gate" else jax.nn.sigmoid(self.gate(x))
        return gate * self.mlp(x) + (0.5 * gate if self.bug == "gate_leaks" else 0.0)


class TorchGatedMlp(nn.Module):
    """The same for a batch."""

    def __init__(self, din, width, dout):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(din, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, dout)
        )
        self.gate = nn.Linear(din, dout)

    def forward(self, x):
        """The gated output."""
        return torch.sigmoid(self.gate(x)) * self.mlp(x)


def _exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _equinox(module, layers):
    """The Equinox module with weights and biases of torch layers, by a function that picks each layer."""
    for pick, layer in layers:
        pairs = [(lambda m, pick=pick: pick(m).weight, array(layer.weight))]
        if layer.bias is not None:
            pairs.append((lambda m, pick=pick: pick(m).bias, array(layer.bias).reshape(pick(module).bias.shape)))
        for where, leaf in pairs:
            module = eqx.tree_at(where, module, leaf)
    return module


def eqx_mlp(bug=""):
    """eqx.nn.MLP under jax.vmap; its layers are every other one of torch's."""
    torch.manual_seed(44)
    theirs = settle(TorchGatedMlp(9, 16, 7))
    activation = jax.nn.gelu if bug == "tanh_gelu" else _exact_gelu
    mlp = eqx.nn.MLP(9, 7, 16, 2, activation=activation, key=jax.random.key(0))
    ours = GatedMlp(mlp, eqx.nn.Linear(9, 7, key=jax.random.key(1)), bug)
    picks = [(lambda m, i=i: m.mlp.layers[i], theirs.mlp[2 * i]) for i in range(3)]
    ours = _equinox(ours, [*picks, (lambda m: m.gate, theirs.gate)])
    if bug == "transposed":
        ours = eqx.tree_at(lambda m: m.mlp.layers[1].weight, ours, ours.mlp.layers[1].weight.T)
    names = {f"mlp.layers.{i}": f"mlp.{2 * i}" for i in range(3)}
    return Pair(ours, theirs, (sample(5, 9),), {"names": names}, {"call": lambda m, x: jax.vmap(m)(x)})


# --- Equinox: a convolutional network ---


class EqxConvNet(eqx.Module):
    """A convolution, group norm, a strided convolution, max pool and a head, for one image."""

    conv1: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    conv2: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    head: eqx.nn.Linear
    bug: str = eqx.field(static=True, default="")

    def __init__(self, bug=""):
        key1, key2, key3 = jax.random.split(jax.random.key(0), 3)
        self.conv1 = eqx.nn.Conv2d(3, 6, (3, 5), padding=(1, 2), key=key1)
        self.norm = eqx.nn.GroupNorm(2 if bug == "groups" else 3, 6, eps=1e-5)
        self.conv2 = eqx.nn.Conv2d(
            6, 8, 3, stride=2, padding=((0, 1), (0, 1)) if bug == "stride_offset" else 1, key=key2
        )
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.head = eqx.nn.Linear(8 * 2 * 3, 5, key=key3)
        self.bug = bug

    def __call__(self, x):
        x = self.norm(jax.nn.relu(self.conv1(x)))
        x = self.pool(jax.nn.softplus(self.conv2(x)))
        if self.bug == "flatten_order":
            x = jnp.moveaxis(x, 0, -1)
        return jax.nn.log_softmax(self.head(jnp.ravel(x)))


class TorchConvNet(nn.Module):
    """The same for a batch."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, (3, 5), padding=(1, 2))
        self.norm = nn.GroupNorm(3, 6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.head = nn.Linear(8 * 2 * 3, 5)

    def forward(self, x):
        """Log probabilities of the classes."""
        x = self.norm(F.relu(self.conv1(x)))
        x = self.pool(F.softplus(self.conv2(x)))
        return self.head(x.flatten(1)).log_softmax(-1)


def eqx_conv_net(bug=""):
    """Channels first on both sides; Equinox's biases of convolutions are (C, 1, 1)."""
    torch.manual_seed(45)
    theirs = settle(TorchConvNet())
    picks = [
        (lambda m, name=name: getattr(m, name), getattr(theirs, name)) for name in ("conv1", "norm", "conv2", "head")
    ]
    ours = _equinox(EqxConvNet(bug), picks)
    if bug == "kernel_axes":
        ours = eqx.tree_at(lambda m: m.conv2.weight, ours, ours.conv2.weight.swapaxes(2, 3))
    return Pair(ours, theirs, (sample(2, 3, 8, 12),), None, {"call": lambda m, x: jax.vmap(m)(x)})


# --- Equinox: a transformer block ---


class EqxBlock(eqx.Module):
    """Causal attention and an MLP, both post-norm, for one sequence."""

    attention: eqx.nn.MultiheadAttention
    norm1: eqx.nn.LayerNorm
    linear1: eqx.nn.Linear
    linear2: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    bug: str = eqx.field(static=True, default="")

    def __init__(self, dim, hidden, n, bug=""):
        key1, key2, key3 = jax.random.split(jax.random.key(0), 3)
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(n, dim, **biases, key=key1)
        self.norm1 = eqx.nn.LayerNorm(dim)
        self.linear1 = eqx.nn.Linear(dim, hidden, key=key2)
        self.linear2 = eqx.nn.Linear(hidden, dim, key=key3)
        self.norm2 = eqx.nn.LayerNorm(dim)
        self.bug = bug

    def __call__(self, x):
        length = x.shape[0]
        mask = jnp.tril(jnp.ones((length, length), bool), k=1 if self.bug == "mask_off_by_one" else 0)
        a = self.attention(x, x, x, mask=None if self.bug == "not_causal" else mask)
        x = jax.vmap(self.norm1)(x + a)
        h = jax.vmap(self.linear2)(jax.nn.relu(jax.vmap(self.linear1)(x)))
        if self.bug == "norm_reused":
            return jax.vmap(self.norm1)(x + h)
        return jax.vmap(self.norm2)(x + h)


class TorchPostNormBlock(nn.Module):
    """A post-norm nn.TransformerEncoderLayer with its causal mask."""

    def __init__(self, dim, hidden, n):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(dim, n, hidden, dropout=0.0, batch_first=True)

    def forward(self, x):
        """The block over x."""
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.block(x, src_mask=mask)


def eqx_block(bug=""):
    """eqx.nn.MultiheadAttention with biases; the whole is mapped over the batch, the layers over the sequence."""
    torch.manual_seed(46)
    theirs = settle(TorchPostNormBlock(20, 27, 4))
    layer, mha = theirs.block, theirs.block.self_attn
    same = ("norm1", "norm2", "linear1", "linear2")
    picks = [(lambda m, name=name: getattr(m, name), getattr(layer, name)) for name in same]
    ours = _equinox(EqxBlock(20, 27, 4, bug), [*picks, (lambda m: m.attention.output_proj, mha.out_proj)])
    for name, weight, bias in zip(
        "query key value".split(), *(p.chunk(3) for p in (mha.in_proj_weight, mha.in_proj_bias)), strict=True
    ):
        rolled = jnp.roll(array(weight), 1, axis=0) if (bug, name) == ("query_rolled", "query") else array(weight)
        ours = eqx.tree_at(lambda m, name=name: getattr(m.attention, f"{name}_proj").weight, ours, rolled)
        ours = eqx.tree_at(lambda m, name=name: getattr(m.attention, f"{name}_proj").bias, ours, array(bias))
    names = {name: f"block.{name}" for name in same}
    names |= {"attention": "block.self_attn", "attention.output_proj": "block.self_attn.out_proj"}
    fused = {
        f"block.self_attn.in_proj_{kind}": [f"attention.{p}_proj.{kind}" for p in ("query", "key", "value")]
        for kind in ("weight", "bias")
    }
    options = {"call": lambda m, x: jax.vmap(m)(x)}
    return Pair(ours, theirs, (sample(2, 5, 20),), {"names": names, "fused": fused}, options)


# --- a function: an LSTM ---


def lstm_apply(params, x, bug=""):
    """The last hidden state of an LSTM through a head."""
    from parity_tests.compare import tap

    def dense(p, a):
        return a @ p["w"] + p["b"]

    def step(carry, x_t):
        h, c = carry
        i, f, g, o = jnp.split(dense(params["ih"], x_t) + dense(params["hh"], h), 4, axis=-1)
        if bug == "gate_order":
            f, g = g, f
        if bug == "forget_bias":
            f = f + 1.0
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        if bug == "cell_detached":
            c = jax.lax.stop_gradient(c)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), None

    zeros = jnp.zeros((x.shape[0], params["hh"]["w"].shape[0]), x.dtype)
    (h, c), _ = jax.lax.scan(step, (zeros, zeros), jnp.moveaxis(x, 1, 0))
    return tap("head", dense(params["head"], c if bug == "cell_for_hidden" else h))


class TorchLstm(nn.Module):
    """nn.LSTMCell in a loop."""

    def __init__(self, din, hidden, dout):
        super().__init__()
        self.cell = nn.LSTMCell(din, hidden)
        self.head = nn.Linear(hidden, dout)

    def forward(self, x):
        """The head of the last hidden state."""
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])


def function_lstm(bug=""):
    """A function of a dict of parameters, with a scan, against nn.LSTMCell in a loop."""
    torch.manual_seed(47)
    theirs = settle(TorchLstm(6, 11, 4))
    params = {"head": {"w": array(theirs.head.weight.T), "b": array(theirs.head.bias)}}
    for name in ("ih", "hh"):
        weight, bias = getattr(theirs.cell, f"weight_{name}"), getattr(theirs.cell, f"bias_{name}")
        params[name] = {"w": array(weight.T), "b": array(bias)}
    names = {f"{n}.w": f"cell.weight_{n}" for n in ("ih", "hh")} | {f"{n}.b": f"cell.bias_{n}" for n in ("ih", "hh")}

    def apply(params, x):
        return lstm_apply(params, x, bug)

    return Pair((apply, params), theirs, (sample(3, 7, 6),), {"names": names})


# --- a function: residual layers and a whitening ---


def residual_apply(params, x, bug=""):
    """Standardises x by its own columns, then residual layers from a list of parameters."""
    ddof = 0 if bug == "ddof" else 1
    x = (x - x.mean(axis=0)) / jnp.std(x, axis=0, ddof=ddof)
    for i, layer in enumerate(params["layers"]):
        slope = 1.0 if bug == "beta" else 2.0
        h = jax.nn.softplus(slope * (x @ layer["w"] + layer["b"])) / slope
        if bug == "detached" and i == 1:
            h = jax.lax.stop_gradient(h)
        x = h if bug == "no_first_residual" and i == 0 else x + h
    return x @ params["out"]["w"]


class TorchResidual(nn.Module):
    """The same network."""

    def __init__(self, dim, dout):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dout, bias=False)

    def forward(self, x):
        """The output of the last layer."""
        x = (x - x.mean(0)) / x.std(0)
        for layer in self.layers:
            x = x + F.softplus(layer(x), beta=2.0)
        return self.out(x)


def function_residual(bug=""):
    """A function without a tap; its layers are a list of dicts with square matrices."""
    torch.manual_seed(48)
    theirs = settle(TorchResidual(8, 3))
    layers = [{"w": array(layer.weight.T), "b": array(layer.bias)} for layer in theirs.layers]
    if bug == "transposed":
        layers[2]["w"] = layers[2]["w"].T
    params = {"layers": layers, "out": {"w": array(theirs.out.weight.T)}}

    def apply(params, x):
        return residual_apply(params, x, bug)

    return Pair((apply, params), theirs, (sample(7, 8) * np.float32(3.0),))


_SCANNED = tuple(f"forward layers.0.{name}" for name in ("norm.input", "norm", "fc1", "fc2.input", "fc2"))

PORTS = (
    Port(
        "linen_mlp",
        linen_mlp,
        {
            "alpha": ("forward 1", "forward 2.input", "forward 2"),
            "last_activation": ("forward output",),
            "stop_gradient": ("backward 3", "backward 2"),
            "transposed": ("weight 2.weight",),
        },
    ),
    Port(
        "linen_cnn",
        linen_cnn,
        {
            "eps": ("forward stem.1",),
            "same_padding": ("forward body.0",),
            "swish": ("forward stem.2", "forward stem", "forward body.0.input", "forward body.0"),
            "max_pool": ("forward pool", "forward fc.input", "forward fc"),
        },
    ),
    Port(
        "linen_scan",
        linen_scan,
        {
            "eps": ("forward layers.0.norm", "forward layers.0", "forward head", "forward output"),
            "tanh_gelu": ("forward layers.0.fc2.input", "forward layers.0.fc2", "forward layers.0", "forward head"),
            "reversed": (*_SCANNED, "forward layers.0.input", "forward layers.0", "forward head"),
            "skip_detached": ("backward layers.1", "backward layers.1.fc2", "gradient layers.1.fc2.bias"),
            "layers_swapped": ("weight layers.0.norm.weight",),
        },
    ),
    Port(
        "linen_block",
        linen_block,
        {
            "mask_off_by_one": ("forward layer.self_attn",),
            "keys_not_normed": ("forward layer.self_attn",),
            "same_norm_twice": ("forward layer.norm1", "forward layer.norm2", "forward layer.linear1"),
            "value_bias_rolled": ("weight layer.self_attn.in_proj_bias",),
        },
    ),
    Port(
        "eqx_mlp",
        eqx_mlp,
        {
            "tanh_gelu": ("forward mlp.1", "forward mlp.2.input", "forward mlp.2"),
            "softmax_gate": ("forward output",),
            "gate_leaks": ("forward output",),
            "transposed": ("weight mlp.2.weight",),
        },
    ),
    Port(
        "eqx_conv_net",
        eqx_conv_net,
        {
            "groups": ("forward norm",),
            "stride_offset": ("forward conv2",),
            "flatten_order": ("forward head.input", "forward head"),
            "kernel_axes": ("weight conv2.weight",),
        },
    ),
    Port(
        "eqx_block",
        eqx_block,
        {
            "mask_off_by_one": ("forward block.self_attn",),
            "not_causal": ("forward block.self_attn",),
            "norm_reused": ("forward block.norm1", "forward block.norm2", "forward block", "forward output"),
            "query_rolled": ("weight block.self_attn.in_proj_weight",),
        },
    ),
    Port(
        "function_lstm",
        function_lstm,
        {
            "gate_order": ("forward cell", "forward head.input", "forward head"),
            "forget_bias": ("forward cell", "forward head.input", "forward head"),
            "cell_for_hidden": ("forward head.input", "forward head"),
            "cell_detached": ("backward cell", "gradient cell.bias_hh"),
        },
    ),
    Port(
        "function_residual",
        function_residual,
        {
            "ddof": ("forward layers.0.input", "forward layers.0", "forward output"),
            "beta": ("forward layers.1.input", "forward layers.1", "forward output"),
            "no_first_residual": ("forward layers.1.input", "forward layers.1", "forward output"),
            "detached": ("backward layers.1", "gradient layers.1.bias"),
            "transposed": ("weight layers.2.weight",),
        },
    ),
)
