"""NNX ports of feed-forward, attention, recurrent and mixture blocks."""

from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from ._weights import array, heads, linear, norm, put, sample, settle
from .port import Pair, Port

# --- an MLP with dropout ---


class Mlp(nnx.Module):
    """Linear, GELU, dropout, linear."""

    def __init__(self, din, dmid, dout, *, rngs, bug=""):
        self.fc1 = nnx.Linear(din, dmid, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.fc2 = nnx.Linear(dmid, dout, rngs=rngs)
        self.bug = bug

    def __call__(self, x, deterministic=False):
        h = nnx.gelu(self.fc1(x), approximate=self.bug == "tanh_gelu")
        h = self.drop(h, deterministic=deterministic)
        if self.bug == "stop_gradient":
            h = jax.lax.stop_gradient(h)
        if self.bug == "missing_bias":
            return h @ self.fc2.kernel[...]
        return self.fc2(h)


def mlp(bug=""):
    """The MLP; the JAX side is called with deterministic=True."""
    torch.manual_seed(0)
    layers = OrderedDict(fc1=nn.Linear(11, 29), act=nn.GELU(), drop=nn.Dropout(0.1), fc2=nn.Linear(29, 7))
    theirs = settle(nn.Sequential(layers))
    ours = put(Mlp(11, 29, 7, rngs=nnx.Rngs(0), bug=bug), {"fc1": linear(theirs.fc1), "fc2": linear(theirs.fc2)})
    if bug == "rolled_kernel":
        ours.fc1.kernel.set_value(jnp.roll(ours.fc1.kernel[...], 1, axis=1))
    x = sample(5, 11)
    return Pair(ours, theirs, (x,), options={"jax_inputs": {"x": x, "deterministic": True}})


# --- a pre-norm encoder layer, attention written out ---


class SelfAttention(nnx.Module):
    """Softmax attention over n heads with four separate projections."""

    def __init__(self, dim, n, *, rngs, bug=""):
        self.q = nnx.Linear(dim, dim, rngs=rngs)
        self.k = nnx.Linear(dim, dim, rngs=rngs)
        self.v = nnx.Linear(dim, dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)
        self.n, self.bug = n, bug

    def __call__(self, x):
        def split(a):
            if self.bug == "head_split":
                return a.reshape(*a.shape[:-1], -1, self.n).swapaxes(-1, -2)
            return a.reshape(*a.shape[:-1], self.n, -1)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        width = x.shape[-1] if self.bug == "scale" else q.shape[-1]
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(width).astype(q.dtype)
        weights = jax.nn.softmax(scores, axis=-2 if self.bug == "softmax_axis" else -1)
        return self.out(jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(x.shape))


class EncoderBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim, hidden, n, *, rngs, bug=""):
        self.ln1 = nnx.LayerNorm(dim, epsilon=1e-6 if bug == "eps" else 1e-5, rngs=rngs)
        self.attn = SelfAttention(dim, n, rngs=rngs, bug=bug)
        self.ln2 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.fc1 = nnx.Linear(dim, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, dim, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        if self.bug == "post_norm":
            x = self.ln1(x + self.attn(x))
            return self.ln2(x + self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))
        a = self.attn(self.ln1(x))
        x = a if self.bug == "no_residual" else x + a
        h = jax.nn.gelu(self.fc1(self.ln2(x)), approximate=self.bug == "tanh_gelu")
        return x + self.fc2(h)


def encoder_layer(bug=""):
    """The block against nn.TransformerEncoderLayer(norm_first=True)."""
    torch.manual_seed(1)
    theirs = settle(
        nn.TransformerEncoderLayer(15, 3, 31, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    )
    mha = theirs.self_attn
    tree = {"ln1": norm(theirs.norm1), "ln2": norm(theirs.norm2), "attn.out": linear(mha.out_proj)}
    tree |= {"fc1": linear(theirs.linear1), "fc2": linear(theirs.linear2)}
    order = "kqv" if bug == "swapped_query_key" else "qkv"
    for name, weight, bias in zip(order, mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True):
        tree[f"attn.{name}"] = {"kernel": array(weight.T), "bias": array(bias)}
    ours = put(EncoderBlock(15, 31, 3, rngs=nnx.Rngs(0), bug=bug), tree)
    names = {"attn": "self_attn", "attn.out": "self_attn.out_proj", "ln1": "norm1", "ln2": "norm2"}
    names |= {"fc1": "linear1", "fc2": "linear2"}
    fused = {
        "self_attn.in_proj_weight": ["attn.q.kernel", "attn.k.kernel", "attn.v.kernel"],
        "self_attn.in_proj_bias": ["attn.q.bias", "attn.k.bias", "attn.v.bias"],
    }
    return Pair(ours, theirs, (sample(2, 7, 15),), {"names": names, "fused": fused})


# --- nnx.MultiHeadAttention ---


def fused_heads(theirs, ours):
    """The rule for in_proj of a torch MultiheadAttention whose projections NNX holds apart."""
    return {
        f"{theirs}.in_proj_{a}": [f"{ours}.{p}.{b}" for p in ("query", "key", "value")]
        for a, b in (("weight", "kernel"), ("bias", "bias"))
    }


class CrossAttention(nnx.Module):
    """Attention from x to a padded memory."""

    def __init__(self, dim, n, *, rngs, bug=""):
        self.attn = nnx.MultiHeadAttention(num_heads=n, in_features=dim, decode=False, rngs=rngs)
        self.bug = bug

    def __call__(self, x, memory, keep):
        if self.bug == "mask_shifted":
            keep = jnp.roll(keep, 1, axis=-1)
        if self.bug == "no_mask":
            return self.attn(x, memory)
        if self.bug == "scaled_query":
            x = x * x.shape[-1] ** -0.5
        return self.attn(x, memory, mask=keep[:, None, None, :])


class TorchCrossAttention(nn.Module):
    """nn.MultiheadAttention with a mask of what to keep."""

    def __init__(self, dim, n):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, n, batch_first=True)

    def forward(self, x, memory, keep):
        """The attended values alone."""
        return self.attn(x, memory, memory, key_padding_mask=~keep, need_weights=False)[0]


def multihead_attention(bug=""):
    """nnx.MultiHeadAttention with kernels (D, N, H) against nn.MultiheadAttention."""
    torch.manual_seed(2)
    theirs = settle(TorchCrossAttention(21, 3))
    ours = put(CrossAttention(21, 3, rngs=nnx.Rngs(0), bug=bug), {"attn": heads(theirs.attn, 3)})
    if bug == "kernel_heads":
        kernel = ours.attn.key.kernel[...]
        ours.attn.key.kernel.set_value(kernel.reshape(21, 7, 3).swapaxes(1, 2))
    if bug == "out_heads_first":
        kernel = ours.attn.out.kernel[...]
        ours.attn.out.kernel.set_value(kernel.reshape(7, 3, 21).swapaxes(0, 1))
    keep = np.arange(9) < np.array([[6], [8]])
    names = {"attn.out": "attn.out_proj"}
    rules = {"names": names, "fused": fused_heads("attn", "attn")}
    return Pair(ours, theirs, (sample(2, 5, 21), sample(2, 9, 21, seed=2), keep), rules)


# --- a post-norm stack ---


class PostNormLayer(nnx.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, dim, hidden, n, *, rngs, bug=""):
        self.self_attn = nnx.MultiHeadAttention(num_heads=n, in_features=dim, decode=False, rngs=rngs)
        self.linear1 = nnx.Linear(dim, hidden, rngs=rngs)
        self.linear2 = nnx.Linear(hidden, dim, rngs=rngs)
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-12 if bug == "eps" else 1e-5, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        y = self.norm1(x + self.self_attn(x))
        h = self.linear1(y)
        h = nnx.gelu(h, approximate=False) if self.bug == "gelu" else nnx.relu(h)
        if self.bug == "residual_before_norm":
            return self.norm2(x + self.linear2(h))
        return self.norm2(y + self.linear2(h))


class PostNormStack(nnx.Module):
    """Layers one after the other and a last norm."""

    def __init__(self, dim, hidden, n, depth, *, rngs, bug=""):
        self.layers = nnx.List(
            PostNormLayer(dim, hidden, n, rngs=rngs, bug=bug if i == 1 else "") for i in range(depth)
        )
        self.final_norm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        for layer in self.layers:
            x = self.layers[0](x) if self.bug == "first_layer_twice" else layer(x)
        return x if self.bug == "no_final_norm" else self.final_norm(x)


def encoder_stack(bug=""):
    """Two layers against nn.TransformerEncoder; the bugs are in the second."""
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(15, 5, 37, dropout=0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(15), enable_nested_tensor=False)
    for i, part in enumerate(theirs.layers):
        for p in part.parameters():
            if p.ndim == 2:
                p.data += 0.2 * (i + 1) * torch.randn_like(p) / p.shape[1] ** 0.5
    settle(theirs)
    tree = {"final_norm": norm(theirs.norm)}
    for i, part in enumerate(theirs.layers):
        tree[f"layers.{i}.self_attn"] = heads(part.self_attn, 5)
        tree |= {f"layers.{i}.{name}": linear(getattr(part, name)) for name in ("linear1", "linear2")}
        tree |= {f"layers.{i}.{name}": norm(getattr(part, name)) for name in ("norm1", "norm2")}
    ours = put(PostNormStack(15, 37, 5, 2, rngs=nnx.Rngs(0), bug=bug), tree)
    names = {"layers.{}.self_attn.out": "layers.{}.self_attn.out_proj", "final_norm": "norm"}
    fused = {k: v for i in range(2) for k, v in fused_heads(f"layers.{i}.self_attn", f"layers.{i}.self_attn").items()}
    return Pair(ours, theirs, (sample(2, 6, 15),), {"names": names, "fused": fused})


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to a memory and an MLP, each followed by its norm."""

    def __init__(self, dim, hidden, n, *, rngs, bug=""):
        self.self_attention = nnx.MultiHeadAttention(num_heads=n, in_features=dim, decode=False, rngs=rngs)
        self.cross_attention = nnx.MultiHeadAttention(num_heads=n, in_features=dim, decode=False, rngs=rngs)
        self.fc1 = nnx.Linear(dim, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, dim, rngs=rngs)
        self.norms = nnx.List(nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs) for _ in range(3))
        self.bug = bug

    def __call__(self, x, memory):
        length = x.shape[1]
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool), 1 if self.bug == "mask_off_by_one" else 0)
        x = self.norms[0](x + self.self_attention(x, mask=None if self.bug == "not_causal" else causal))
        if self.bug == "memory_detached":
            memory = jax.lax.stop_gradient(memory)
        crossed = self.cross_attention(x, memory)
        x = self.norms[1](crossed if self.bug == "no_cross_residual" else x + crossed)
        return self.norms[2](x + self.fc2(nnx.relu(self.fc1(x))))


class TorchDecoder(nn.Module):
    """nn.TransformerDecoderLayer after a projection of the memory, with its causal mask."""

    def __init__(self, dim, hidden, n):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(dim, n, hidden, dropout=0.0, batch_first=True)
        self.project = nn.Linear(10, dim)

    def forward(self, x, memory):
        """The decoded sequence."""
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), diagonal=1)
        return self.layer(x, self.project(memory), tgt_mask=mask)


class Decoder(nnx.Module):
    """A projection of the memory and a decoder layer."""

    def __init__(self, dim, hidden, n, *, rngs, bug=""):
        self.project = nnx.Linear(10, dim, rngs=rngs)
        self.layer = DecoderLayer(dim, hidden, n, rngs=rngs, bug=bug)

    def __call__(self, x, memory):
        return self.layer(x, self.project(memory))


def decoder_layer(bug=""):
    """A decoder layer with memory against nn.TransformerDecoderLayer."""
    torch.manual_seed(4)
    theirs = settle(TorchDecoder(18, 35, 3))
    layer = theirs.layer
    tree = {"project": linear(theirs.project)}
    tree |= {f"layer.norms.{i}": norm(getattr(layer, f"norm{i + 1}")) for i in range(3)}
    tree |= {"layer.fc1": linear(layer.linear1), "layer.fc2": linear(layer.linear2)}
    tree["layer.self_attention"] = heads(layer.self_attn, 3)
    tree["layer.cross_attention"] = heads(layer.multihead_attn, 3)
    ours = put(Decoder(18, 35, 3, rngs=nnx.Rngs(0), bug=bug), tree)
    names = {"layer.self_attention": "layer.self_attn", "layer.cross_attention": "layer.multihead_attn"}
    names |= {f"{a}.out": f"{b}.out_proj" for a, b in tuple(names.items())}
    names |= {"layer.fc1": "layer.linear1", "layer.fc2": "layer.linear2"}
    names |= {f"layer.norms.{i}": f"layer.norm{i + 1}" for i in range(3)}
    fused = fused_heads("layer.self_attn", "layer.self_attention")
    fused |= fused_heads("layer.multihead_attn", "layer.cross_attention")
    return Pair(ours, theirs, (sample(2, 7, 18), sample(2, 5, 10, seed=2)), {"names": names, "fused": fused})


# --- SwiGLU behind a norm that computes in float32 ---


class RMSNorm(nnx.Module):
    """Root mean square norm, in float32 whatever comes in."""

    def __init__(self, dim, eps=1e-6, bug=""):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
        self.eps, self.bug = eps, bug

    def __call__(self, x):
        h = x.astype(jnp.float32)
        mean_square = jnp.mean(h * h, axis=-1, keepdims=True)
        if self.bug == "eps_outside":
            h = h / (jnp.sqrt(mean_square) + jnp.float32(self.eps))
        else:
            h = h * jax.lax.rsqrt(mean_square + jnp.float32(self.eps))
        scale = self.scale[...]
        if self.bug == "one_plus_scale":
            scale = 1.0 + scale
        return h.astype(x.dtype) * scale


class SwiGlu(nnx.Module):
    """x + down(silu(gate) * up) of the normed x."""

    def __init__(self, dim, hidden, *, rngs, bug=""):
        self.norm = RMSNorm(dim, eps=1e-5 if bug == "eps" else 1e-6, bug=bug)
        self.gate = nnx.Linear(dim, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(dim, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, use_bias=False, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        h = self.norm(x)
        gate, up = self.gate(h), self.up(h)
        if self.bug == "swapped_gate_up":
            gate, up = up, gate
        return x + self.down(nnx.silu(gate) * up)


class TorchRMSNorm(nn.Module):
    """Root mean square norm, in float32 whatever comes in."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        """The scaled x over its root mean square."""
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return h.to(x.dtype) * self.weight


class TorchSwiGlu(nn.Module):
    """The same block with gate and up in one matrix."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = TorchRMSNorm(dim)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        """x and what the gate lets through."""
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


def swiglu(bug=""):
    """SwiGLU with small inputs, so that epsilon matters; gate and up are one matrix in torch."""
    torch.manual_seed(5)
    theirs = settle(TorchSwiGlu(13, 33))
    tree = {"norm.scale": array(theirs.norm.weight), "down": linear(theirs.down)}
    for name, weight in zip(("gate", "up"), theirs.gate_up.weight.chunk(2), strict=True):
        tree[f"{name}.kernel"] = array(weight.T)
    ours = put(SwiGlu(13, 33, rngs=nnx.Rngs(0), bug=bug), tree)
    fused = {"gate_up.weight": ["gate.kernel", "up.kernel"]}
    return Pair(ours, theirs, (sample(3, 5, 13, scale=0.01),), {"fused": fused})


# --- tokens, positions and a masked mean ---


class Classifier(nnx.Module):
    """The mean embedding of the tokens that are kept, then a linear head."""

    def __init__(self, vocab, length, dim, classes, *, rngs, bug=""):
        self.tokens = nnx.Embed(vocab, dim, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (length, dim)))
        self.head = nnx.Linear(dim, classes, rngs=rngs)
        self.bug = bug

    def __call__(self, ids, keep):
        start = 1 if self.bug == "position_off_by_one" else 0
        x = self.tokens(ids) + self.positions[start : start + ids.shape[1]]
        if self.bug == "mask_off_by_one":
            keep = jnp.pad(keep[:, 1:], ((0, 0), (0, 1)))
        total = jnp.where(keep[..., None], x, 0.0).sum(axis=1)
        count = ids.shape[1] if self.bug == "divisor" else keep.sum(axis=1, keepdims=True)
        pooled = total / count
        return self.head(jax.lax.stop_gradient(pooled) if self.bug == "stop_gradient" else pooled)


class TorchClassifier(nn.Module):
    """The same classifier."""

    def __init__(self, vocab, length, dim, classes):
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Parameter(0.5 * torch.randn(length, dim))
        self.head = nn.Linear(dim, classes)

    def forward(self, ids, keep):
        """Logits of the classes."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        kept = keep.unsqueeze(-1).to(x.dtype)
        return self.head((x * kept).sum(1) / kept.sum(1))


def classifier(bug=""):
    """Integer tokens and a bool mask."""
    torch.manual_seed(6)
    theirs = settle(TorchClassifier(23, 12, 17, 5))
    tree = {"tokens.embedding": array(theirs.tokens.weight), "head": linear(theirs.head)}
    tree["positions"] = array(theirs.positions)
    ours = put(Classifier(23, 12, 17, 5, rngs=nnx.Rngs(0), bug=bug), tree)
    ids = np.random.default_rng(3).integers(0, 23, (4, 9))
    return Pair(ours, theirs, (ids, np.arange(9) < np.array([[9], [4], [7], [2]])))


# --- a GRU in a scan ---


class Gru(nnx.Module):
    """A GRU over time; the three gates are one matrix."""

    def __init__(self, din, hidden, *, rngs, bug=""):
        self.ih = nnx.Linear(din, 3 * hidden, rngs=rngs)
        self.hh = nnx.Linear(hidden, 3 * hidden, rngs=rngs)
        self.hidden, self.bug = hidden, bug

    def __call__(self, x):
        def step(h, projected):
            ri, zi, ni = jnp.split(projected, 3, axis=-1)
            rh, zh, nh = jnp.split(self.hh(h), 3, axis=-1)
            if self.bug == "gate_order":
                ri, zi, rh, zh = zi, ri, zh, rh
            r, z = jax.nn.sigmoid(ri + rh), jax.nn.sigmoid(zi + zh)
            if self.bug == "reset_before_product":
                nh = (r * h) @ self.hh.kernel[:, -self.hidden :] + self.hh.bias[-self.hidden :]
            else:
                nh = r * nh
            n = jnp.tanh(ni + nh)
            new = z * n + (1 - z) * h if self.bug == "update_gate" else (1 - z) * n + z * h
            return (h if self.bug == "state_not_carried" else new), new

        h0 = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        _, out = jax.lax.scan(step, h0, self.ih(x).swapaxes(0, 1))
        return out.swapaxes(0, 1)


class GruTagger(nnx.Module):
    """A GRU and a linear head at each step."""

    def __init__(self, din, hidden, dout, *, rngs, bug=""):
        self.rnn = Gru(din, hidden, rngs=rngs, bug=bug)
        self.head = nnx.Linear(hidden, dout, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


class TorchGruTagger(nn.Module):
    """The same tagger."""

    def __init__(self, din, hidden, dout):
        super().__init__()
        self.rnn = nn.GRU(din, hidden, batch_first=True)
        self.head = nn.Linear(hidden, dout)

    def forward(self, x):
        """One output a step."""
        return self.head(self.rnn(x)[0])


def gru(bug=""):
    """jax.lax.scan over time against nn.GRU."""
    torch.manual_seed(7)
    theirs = settle(TorchGruTagger(9, 13, 4))
    tree = {"head": linear(theirs.head)}
    for name in ("ih", "hh"):
        weight, bias = getattr(theirs.rnn, f"weight_{name}_l0"), getattr(theirs.rnn, f"bias_{name}_l0")
        tree[f"rnn.{name}"] = {"kernel": array(weight.T), "bias": array(bias)}
    ours = put(GruTagger(9, 13, 4, rngs=nnx.Rngs(0), bug=bug), tree)
    names = {
        f"rnn.{n}.{a}": f"rnn.{b}_{n}_l0" for n in ("ih", "hh") for a, b in (("kernel", "weight"), ("bias", "bias"))
    }
    return Pair(ours, theirs, (sample(3, 8, 9),), {"names": names})


# --- one layer used three times ---


class Refiner(nnx.Module):
    """The same residual layer three times over."""

    def __init__(self, dim, dout, *, rngs, bug=""):
        self.refine = nnx.Linear(dim, dim, rngs=rngs)
        if bug == "not_shared":
            self.again = nnx.Linear(dim, dim, rngs=rngs)
        self.head = nnx.Linear(dim, dout, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        for i in range(2 if self.bug == "once_too_few" else 3):
            layer = self.again if self.bug == "not_shared" and i else self.refine
            y = nnx.tanh(layer(x))
            if self.bug == "stop_gradient" and i == 1:
                y = jax.lax.stop_gradient(y)
            x = y if self.bug == "no_last_residual" and i == 2 else x + y
        return self.head(x)


class TorchRefiner(nn.Module):
    """The same refiner."""

    def __init__(self, dim, dout):
        super().__init__()
        self.refine = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, dout)

    def forward(self, x):
        """The refined x through the head."""
        for _ in range(3):
            x = x + torch.tanh(self.refine(x))
        return self.head(x)


def refiner(bug=""):
    """A module that is called three times; its kernel is square."""
    torch.manual_seed(8)
    theirs = settle(TorchRefiner(19, 6))
    tree = {"refine": linear(theirs.refine), "head": linear(theirs.head)}
    if bug == "not_shared":
        tree["again"] = linear(theirs.refine)
    if bug == "transposed":
        tree["refine"] = tree["refine"] | {"kernel": tree["refine"]["kernel"].T}
    return Pair(put(Refiner(19, 6, rngs=nnx.Rngs(0), bug=bug), tree), theirs, (sample(4, 19),))


# --- two experts ---


class Mixture(nnx.Module):
    """Experts weighted by a softmax gate."""

    def __init__(self, dim, dout, n, *, rngs, bug=""):
        self.router = nnx.Linear(dim, n, use_bias=False, rngs=rngs)
        self.experts = nnx.List(nnx.Linear(dim, dout, rngs=rngs) for _ in range(n))
        self.bug = bug

    def __call__(self, x):
        logits = self.router(x)
        gate = jax.nn.softmax(logits, axis=0 if self.bug == "softmax_axis" else -1)
        if self.bug == "sigmoid":
            gate = jax.nn.sigmoid(logits)
        if self.bug == "gate_detached":
            gate = jax.lax.stop_gradient(gate)
        outs = jnp.stack([expert(x) for expert in self.experts], axis=-1)
        if self.bug == "experts_swapped":
            outs = outs[..., ::-1]
        return jnp.einsum("bdn,bn->bd", outs, gate)


class TorchMixture(nn.Module):
    """The same mixture."""

    def __init__(self, dim, dout, n):
        super().__init__()
        self.gate = nn.Linear(dim, n, bias=False)
        self.experts = nn.ModuleList(nn.Linear(dim, dout) for _ in range(n))

    def forward(self, x):
        """The weighted sum."""
        weights = self.gate(x).softmax(-1)
        return sum(weights[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def mixture(bug=""):
    """Two experts and a gate."""
    torch.manual_seed(9)
    theirs = settle(TorchMixture(14, 9, 2))
    tree = {"router": linear(theirs.gate)} | {f"experts.{i}": linear(e) for i, e in enumerate(theirs.experts)}
    ours = put(Mixture(14, 9, 2, rngs=nnx.Rngs(0), bug=bug), tree)
    return Pair(ours, theirs, (sample(5, 14),), {"names": {"router": "gate"}})


# --- rematerialised blocks with a custom derivative ---


@jax.custom_vjp
def squared_relu(x):
    """relu(x) squared."""
    return jnp.square(jax.nn.relu(x))


@jax.custom_vjp
def squared_relu_wrong(x):
    """relu(x) squared, with half its derivative."""
    return jnp.square(jax.nn.relu(x))


squared_relu.defvjp(lambda x: (squared_relu(x), x), lambda x, g: (2.0 * jax.nn.relu(x) * g,))
squared_relu_wrong.defvjp(lambda x: (squared_relu_wrong(x), x), lambda x, g: (jax.nn.relu(x) * g,))


class ResidualBlock(nnx.Module):
    """x + down(relu(up(norm(x)))^2), computed again in the backward pass."""

    def __init__(self, dim, hidden, *, rngs, bug=""):
        self.norm = nnx.LayerNorm(dim, epsilon=1e-5, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(dim, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)
        self.bug = bug

    @nnx.remat
    def __call__(self, x):
        h = self.up(self.norm(x))
        h = squared_relu_wrong(h) if self.bug == "wrong_vjp" else squared_relu(h)
        if self.bug == "skip_detached":
            x = jax.lax.stop_gradient(x)
        out = self.down(h)
        return out if self.bug == "no_residual" else x + out


class RematTower(nnx.Module):
    """Two blocks that keep no activations."""

    def __init__(self, dim, hidden, *, rngs, bug=""):
        self.block0 = ResidualBlock(dim, hidden, rngs=rngs)
        self.block1 = ResidualBlock(dim, hidden, rngs=rngs, bug=bug)

    def __call__(self, x):
        return self.block1(self.block0(x))


class TorchResidualBlock(nn.Module):
    """The same block."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x):
        """x and its residual."""
        return x + self.down(torch.relu(self.up(self.norm(x))).square())


def remat_tower(bug=""):
    """Rematerialised NNX blocks; the bugs are in the second."""
    torch.manual_seed(10)
    theirs = settle(nn.Sequential(TorchResidualBlock(12, 25), TorchResidualBlock(12, 25)))
    tree = {}
    for i, block in enumerate(theirs):
        tree[f"block{i}"] = {"norm": norm(block.norm), "up": linear(block.up), "down": linear(block.down)}
    ours = put(RematTower(12, 25, rngs=nnx.Rngs(0), bug=bug), tree)
    return Pair(ours, theirs, (sample(3, 5, 12),), {"names": {"block0": "0", "block1": "1"}})


# --- jit inside the model ---


@partial(jax.jit, static_argnames="window")
def window_mean(x, window):
    """The mean of the last `window` steps, this one among them; at the start of those there are."""
    total = jnp.cumsum(x, axis=1)
    total = total - jnp.pad(total, ((0, 0), (window, 0), (0, 0)))[:, : x.shape[1]]
    count = jnp.minimum(jnp.arange(1, x.shape[1] + 1), window)
    return total / count[:, None]


class WindowModel(nnx.Module):
    """A jitted projection, a jitted window mean and a head."""

    def __init__(self, dim, hidden, dout, *, rngs, bug=""):
        self.encode = nnx.Linear(dim, hidden, rngs=rngs)
        self.decode = nnx.Linear(hidden, dout, rngs=rngs)
        self.bug = bug

    @nnx.jit
    def embed(self, x):
        """The projected and squashed x."""
        slope = 0.1 if self.bug == "slope" else 0.01
        return jax.nn.leaky_relu(self.encode(x), slope)

    def __call__(self, x):
        h = self.embed(x)
        if self.bug == "not_causal":
            mean = window_mean(h[:, ::-1], 3)[:, ::-1]
        elif self.bug == "whole_divisor":
            mean = window_mean(h, 3) * (jnp.minimum(jnp.arange(1, h.shape[1] + 1), 3) / 3)[:, None].astype(h.dtype)
        else:
            mean = window_mean(h, 4 if self.bug == "window" else 3)
        return self.decode(h + mean)


class TorchWindowModel(nn.Module):
    """The same model with an explicit loop."""

    def __init__(self, dim, hidden, dout):
        super().__init__()
        self.encode = nn.Linear(dim, hidden)
        self.act = nn.LeakyReLU()
        self.decode = nn.Linear(hidden, dout)

    def forward(self, x):
        """One output a step."""
        h = self.act(self.encode(x))
        mean = torch.stack([h[:, max(0, t - 2) : t + 1].mean(1) for t in range(h.shape[1])], dim=1)
        return self.decode(h + mean)


def jit_inside(bug=""):
    """nnx.jit on a method and jax.jit on a function, both inside the model."""
    torch.manual_seed(11)
    theirs = settle(TorchWindowModel(8, 21, 5))
    tree = {"encode": linear(theirs.encode), "decode": linear(theirs.decode)}
    return Pair(put(WindowModel(8, 21, 5, rngs=nnx.Rngs(0), bug=bug), tree), theirs, (sample(2, 7, 8),))


# --- an autoencoder whose decoder is its encoder transposed ---


class TiedAutoencoder(nnx.Module):
    """tanh(x W + b) W^T + c."""

    def __init__(self, dim, hidden, *, rngs, bug=""):
        self.encoder = nnx.Linear(dim, hidden, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(dim))
        self.bug = bug

    def __call__(self, x):
        code = jnp.tanh(self.encoder(x))
        kernel = self.encoder.kernel[...]
        if self.bug == "tie_detached":
            kernel = jax.lax.stop_gradient(kernel)
        if self.bug == "no_tanh":
            code = self.encoder(x)
        out = code @ kernel.T
        return out - self.bias if self.bug == "bias_sign" else out + self.bias


class TorchTiedAutoencoder(nn.Module):
    """The same autoencoder."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.encoder = nn.Linear(dim, hidden)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        """The reconstruction."""
        return torch.tanh(self.encoder(x)) @ self.encoder.weight + self.bias


def tied_autoencoder(bug=""):
    """One matrix used in both directions."""
    torch.manual_seed(12)
    theirs = settle(TorchTiedAutoencoder(16, 11))
    tree = {"encoder": linear(theirs.encoder), "bias": array(theirs.bias)}
    return Pair(put(TiedAutoencoder(16, 11, rngs=nnx.Rngs(0), bug=bug), tree), theirs, (sample(6, 16),))


PORTS = (
    Port(
        "nnx_mlp",
        mlp,
        {
            "tanh_gelu": ("forward act", "forward drop.input", "forward drop"),
            "missing_bias": ("forward fc2", "forward output"),
            "rolled_kernel": ("weight fc1.weight",),
            "stop_gradient": ("backward drop", "backward act", "backward fc1"),
        },
    ),
    Port(
        "nnx_encoder_layer",
        encoder_layer,
        {
            "eps": ("forward norm1",),
            "scale": ("forward self_attn",),
            "head_split": ("forward self_attn",),
            "softmax_axis": ("forward self_attn",),
            "no_residual": ("forward norm2.input", "forward norm2"),
            "post_norm": ("forward norm1.input", "forward norm1"),
            "tanh_gelu": ("forward dropout", "forward linear2.input", "forward linear2"),
            "swapped_query_key": ("weight self_attn.in_proj_weight",),
        },
    ),
    Port(
        "nnx_multihead_attention",
        multihead_attention,
        {
            "mask_shifted": ("forward attn",),
            "no_mask": ("forward attn",),
            "scaled_query": ("forward attn.input", "forward attn"),
            "kernel_heads": ("weight attn.in_proj_weight",),
            "out_heads_first": ("weight attn.out_proj.weight",),
        },
    ),
    Port(
        "nnx_encoder_stack",
        encoder_stack,
        {
            "eps": ("forward layers.1.norm2", "forward layers.1"),
            "gelu": ("forward layers.1.dropout", "forward layers.1.linear2.input", "forward layers.1.linear2"),
            "residual_before_norm": ("forward layers.1.norm2.input", "forward layers.1.norm2"),
            "first_layer_twice": ("forward layers.1.self_attn", "forward layers.1", "forward norm", "forward output"),
            "no_final_norm": ("forward norm", "forward output"),
        },
    ),
    Port(
        "nnx_decoder_layer",
        decoder_layer,
        {
            "mask_off_by_one": ("forward layer.self_attn",),
            "not_causal": ("forward layer.self_attn",),
            "no_cross_residual": ("forward layer.norm2.input", "forward layer.norm2"),
            "memory_detached": ("backward project",),
        },
    ),
    Port(
        "nnx_swiglu",
        swiglu,
        {
            "eps": ("forward norm",),
            "eps_outside": ("forward norm",),
            "one_plus_scale": ("forward norm",),
            "swapped_gate_up": ("forward down.input", "forward down"),
        },
    ),
    Port(
        "nnx_classifier",
        classifier,
        {
            "position_off_by_one": ("forward head.input", "forward head"),
            "mask_off_by_one": ("forward head.input", "forward head"),
            "divisor": ("forward head.input", "forward head"),
            "stop_gradient": ("backward tokens", "gradient tokens.weight"),
        },
    ),
    Port(
        "nnx_gru",
        gru,
        {
            "gate_order": ("forward rnn",),
            "reset_before_product": ("forward rnn",),
            "state_not_carried": ("forward rnn",),
            "update_gate": ("forward rnn",),
        },
    ),
    Port(
        "nnx_refiner",
        refiner,
        {
            "not_shared": (
                "gradient refine.weight",
                "gradient refine.bias",
                "weight again.kernel",
                "weight again.bias",
            ),
            "once_too_few": ("forward refine", "forward head.input", "forward head"),
            "no_last_residual": ("forward head.input", "forward head"),
            "stop_gradient": ("backward refine#2", "backward refine", "gradient refine.bias", "gradient refine.weight"),
            "transposed": ("weight refine.weight",),
        },
    ),
    Port(
        "nnx_mixture",
        mixture,
        {
            "softmax_axis": ("forward output",),
            "sigmoid": ("forward output",),
            "experts_swapped": ("forward output",),
            "gate_detached": ("backward gate", "gradient gate.weight"),
        },
    ),
    Port(
        "nnx_remat_tower",
        remat_tower,
        {
            "wrong_vjp": ("backward 1.up", "backward 1.norm", "backward 0", "gradient 1.up.bias"),
            "skip_detached": ("backward 0", "gradient 0.down.bias"),
            "no_residual": ("forward 1", "forward output"),
        },
    ),
    Port(
        "nnx_jit_inside",
        jit_inside,
        {
            "slope": ("forward act", "forward decode.input", "forward decode"),
            "window": ("forward decode.input", "forward decode"),
            "not_causal": ("forward decode.input", "forward decode"),
            "whole_divisor": ("forward decode.input", "forward decode"),
        },
    ),
    Port(
        "nnx_tied_autoencoder",
        tied_autoencoder,
        {
            "tie_detached": ("gradient encoder.weight",),
            "no_tanh": ("forward output",),
            "bias_sign": ("forward output",),
        },
    ),
)
