"""Ports of transformers' language models to Flax NNX: GPT-2, Llama, Qwen3, Mistral, GPT-NeoX and Gemma."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from ._language_weights import arrays, load, randomise
from .port import Pair, Port


def tokens(vocabulary, batch, length, seed):
    """Random token ids."""
    return np.random.default_rng(seed).integers(3, vocabulary, (batch, length))


def attend(q, k, v, mask, scale, bug=""):
    """Softmax attention of heads (batch, time, heads, size), k and v possibly with fewer heads."""
    groups = q.shape[2] // k.shape[2]
    if bug == "gqa-tiled":
        k, v = jnp.tile(k, (1, 1, groups, 1)), jnp.tile(v, (1, 1, groups, 1))
    else:
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    if bug == "value-stopped":
        v = jax.lax.stop_gradient(v)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-2 if bug == "softmax-over-queries" else -1)
    out = jnp.einsum("bnts,bsnh->btnh", probabilities, v)
    return out.reshape(*out.shape[:2], -1)


def causal(length, bug="", window=None):
    """Which keys (columns) a query (row) sees."""
    ahead = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    mask = ahead <= (1 if bug == "mask-off-by-one" else 0)
    if window is not None and bug != "window-ignored":
        mask &= ahead > -(window + 1 if bug == "window-off-by-one" else window)
    return mask


def rope(x, theta, bug=""):
    """Rotary positions, halves rotated against each other."""
    size = x.shape[-1]
    frequencies = 1.0 / theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    if bug == "rope-interleaved":
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    a, b = jnp.split(x, 2, axis=-1)
    if bug == "rope-backwards":
        sin = -sin
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class RMSNorm(nnx.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size, eps):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x):
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return self.weight * h.astype(x.dtype)


class Gpt2Attention(nnx.Module):
    """Attention of GPT-2, with q, k and v from one projection."""

    def __init__(self, config, bug, rngs):
        self.heads, self.bug = config.n_head, bug
        self.c_attn = nnx.Linear(config.n_embd, 3 * config.n_embd, rngs=rngs)
        self.c_proj = nnx.Linear(config.n_embd, config.n_embd, rngs=rngs)
        self.dropout = nnx.Dropout(config.resid_pdrop, rngs=rngs)

    def __call__(self, x, mask):
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in jnp.split(self.c_attn(x), 3, axis=-1))
        if self.bug == "query-and-key-swapped":
            q, k = k, q
        scale = 1.0 if self.bug == "scale-missing" else q.shape[-1] ** -0.5
        return self.dropout(self.c_proj(attend(q, k, v, mask, scale)))


class Gpt2Block(nnx.Module):
    """Block of GPT-2."""

    def __init__(self, config, bug, rngs):
        norm = partial(nnx.LayerNorm, config.n_embd, rngs=rngs)
        eps = config.layer_norm_epsilon
        self.bug = bug
        self.ln_1 = norm(epsilon=1e-6 if bug == "eps" else eps, use_bias=bug != "bias-dropped")
        self.attn = Gpt2Attention(config, bug, rngs)
        self.ln_2 = norm(epsilon=eps)
        self.fc = nnx.Linear(config.n_embd, config.n_inner, rngs=rngs)
        self.proj = nnx.Linear(config.n_inner, config.n_embd, rngs=rngs)
        self.dropout = nnx.Dropout(config.resid_pdrop, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        h = jax.nn.gelu(self.fc(self.ln_2(x)), approximate=self.bug != "gelu-exact")
        h = self.dropout(self.proj(h))
        return h if self.bug == "residual-missing" else x + h


class Gpt2(nnx.Module):
    """GPT-2 with its head tied to the embedding."""

    def __init__(self, config, bug, rngs):
        self.bug = bug
        self.wte = nnx.Embed(config.vocab_size, config.n_embd, rngs=rngs)
        self.wpe = nnx.Embed(config.n_positions, config.n_embd, rngs=rngs)
        self.dropout = nnx.Dropout(config.embd_pdrop, rngs=rngs)
        self.blocks = nnx.List([Gpt2Block(config, bug, rngs) for _ in range(config.n_layer)])
        self.ln_f = nnx.LayerNorm(config.n_embd, epsilon=config.layer_norm_epsilon, rngs=rngs)
        if bug == "head-untied":
            self.lm_head = nnx.Linear(config.n_embd, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, input_ids):
        length = input_ids.shape[1]
        positions = self.wpe(jnp.arange(length) + (1 if self.bug == "positions-from-one" else 0))
        if self.bug == "positions-frozen":
            positions = jax.lax.stop_gradient(positions)
        x = self.dropout(self.wte(input_ids) + positions)
        mask = causal(length, self.bug)
        for block in self.blocks:
            x = block(x, mask)
        x = self.ln_f(x)
        return self.lm_head(x) if self.bug == "head-untied" else self.wte.attend(x)


def gpt2(bug=""):
    """GPT2LMHeadModel."""
    config = transformers.GPT2Config(
        vocab_size=89, n_positions=40, n_embd=48, n_layer=2, n_head=3, n_inner=88, attn_implementation="eager"
    )
    module = randomise(transformers.GPT2LMHeadModel(config), 1)
    names = {
        "wte": "transformer.wte",
        "wpe": "transformer.wpe",
        "dropout": "transformer.drop",
        "ln_f": "transformer.ln_f",
        "blocks.{}": "transformer.h.{}",
        "blocks.{}.fc": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.proj": "transformer.h.{}.mlp.c_proj",
    }
    weights = arrays(module)
    if bug == "head-untied":
        weights["lm_head.weight"] = weights["lm_head.weight"].copy()
    model = load(Gpt2(config, bug, nnx.Rngs(0)), weights, names)
    model.eval()
    return Pair(model, module, [tokens(89, 2, 19, 1)], {"names": names})


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config, bug, rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.size, self.bug = size, bug
        self.scale = (config.hidden_size // heads) ** -0.5 if bug == "scale-of-hidden-size" else size**-0.5
        self.theta = 10000.0 if bug == "theta" else config.rope_parameters["rope_theta"]
        self.q_proj = linear(config.hidden_size, heads * size)
        self.k_proj = linear(config.hidden_size, groups * size)
        self.v_proj = linear(config.hidden_size, groups * size)
        self.o_proj = linear(heads * size, config.hidden_size)

    def __call__(self, x, mask):
        q, k, v = (f(x).reshape(*x.shape[:2], -1, self.size) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rope(q, self.theta, self.bug), rope(k, self.theta, self.bug)
        return self.o_proj(attend(q, k, v, mask, self.scale, self.bug))


class Mlp(nnx.Module):
    """Gated MLP."""

    def __init__(self, config, activation, bug, rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.activation, self.bug = activation, bug
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.bug == "gate-and-up-swapped":
            gate, up = up, gate
        return self.down_proj(self.activation(gate) * up)


class Block(nnx.Module):
    """Block of Llama and those after it; `norm` makes a norm."""

    def __init__(self, config, bug, rngs, norm=RMSNorm, activation=jax.nn.silu):
        eps = config.rms_norm_eps
        self.bug = bug
        self.input_layernorm = norm(config.hidden_size, 1e-6 if bug == "eps" else eps)
        self.self_attn = Attention(config, bug, rngs)
        self.post_attention_layernorm = norm(config.hidden_size, eps)
        self.mlp = Mlp(config, activation, bug, rngs)

    def __call__(self, x, mask):
        h = self.input_layernorm(x)
        if self.bug == "residual-after-norm":
            x = h
        x = x + self.self_attn(h, mask)
        h = self.mlp(self.post_attention_layernorm(x))
        if self.bug == "residual-stopped":
            x = jax.lax.stop_gradient(x)
        return h if self.bug == "residual-missing" else x + h


class Llama(nnx.Module):
    """Llama; with head=False the base model, whose output is that of the last norm."""

    def __init__(self, config, bug, rngs, head=True):
        self.window, self.bug = getattr(config, "sliding_window", None), bug
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Block(config, bug, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs) if head else None

    def __call__(self, input_ids):
        mask = causal(input_ids.shape[1], self.bug, self.window)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        return x if self.lm_head is None else self.lm_head(x)


LLAMA_NAMES = {"embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm"}


def llama_config(**changes):
    """A small Llama whose sizes are all different."""
    sizes = {
        "vocab_size": 83,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    return transformers.LlamaConfig(**(sizes | changes))


def llama(bug=""):
    """LlamaForCausalLM, its head untied."""
    config = llama_config()
    module = randomise(transformers.LlamaForCausalLM(config), 2)
    weights = arrays(module)
    if bug == "gate-and-up-loaded-swapped":
        for i in range(2):
            gate, up = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up"))
            weights[gate], weights[up] = weights[up], weights[gate]
    model = load(Llama(config, bug, nnx.Rngs(0)), weights, LLAMA_NAMES)
    return Pair(model, module, [tokens(83, 2, 23, 2)], {"names": LLAMA_NAMES})


class ScannedLlama(nnx.Module):
    """Llama whose layers are one block with stacked weights, scanned."""

    def __init__(self, config, bug, rngs):
        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def blocks(rngs):
            return Block(config, bug, rngs)

        self.bug = bug
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = blocks(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, input_ids):
        mask = causal(input_ids.shape[1], self.bug)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, reverse=self.bug == "layers-from-last")
        def forward(x, layer):
            return layer(x, mask)

        x = forward(self.embed_tokens(input_ids), self.layers)
        return self.lm_head(self.norm(x))


def scanned_llama(bug=""):
    """LlamaForCausalLM against scanned layers."""
    config = llama_config(num_hidden_layers=3, num_attention_heads=4, attn_implementation="eager", use_cache=False)
    module = randomise(transformers.LlamaForCausalLM(config), 3)
    names = {"embed_tokens": "model.embed_tokens", "norm": "model.norm"}
    stacked = {"layers": "model.layers.{}"}
    weights = arrays(module)
    if bug == "stack-reversed":
        first, last = "model.layers.0.", "model.layers.2."
        for name in [name for name in weights if name.startswith(first)]:
            other = last + name.removeprefix(first)
            weights[name], weights[other] = weights[other], weights[name]
    model = load(ScannedLlama(config, bug, nnx.Rngs(0)), weights, names, stacked, 3)
    return Pair(model, module, [tokens(83, 2, 17, 3)], {"names": names, "stacked": stacked})


def mistral(bug=""):
    """MistralModel with a sliding window shorter than the sequence."""
    config = transformers.MistralConfig(
        vocab_size=71,
        hidden_size=36,
        intermediate_size=68,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        sliding_window=7,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        use_cache=False,
    )
    module = randomise(transformers.MistralModel(config), 4)
    model = load(Llama(config, bug, nnx.Rngs(0), head=False), arrays(module))
    return Pair(model, module, {"input_ids": tokens(71, 2, 29, 4)})


class QwenAttention(nnx.Module):
    """Attention of Qwen3: queries and keys are normed per head, then rotated."""

    def __init__(self, config, bug, rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.size, self.bug = size, bug
        self.scale = 1.0 if bug == "scale-missing" else size**-0.5
        self.theta = 10000.0 if bug == "theta" else config.rope_parameters["rope_theta"]
        self.wq, self.wk, self.wv = (linear(config.hidden_size, n * size) for n in (heads, groups, groups))
        self.wo = linear(heads * size, config.hidden_size)
        self.q_norm, self.k_norm = RMSNorm(size, config.rms_norm_eps), RMSNorm(size, config.rms_norm_eps)

    def __call__(self, x, mask):
        q, k, v = (f(x).reshape(*x.shape[:2], -1, self.size) for f in (self.wq, self.wk, self.wv))
        if self.bug == "norms-swapped":
            q, k = self.k_norm(q), self.q_norm(k)
        elif self.bug != "norm-after-rope":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, self.theta, self.bug), rope(k, self.theta, self.bug)
        if self.bug == "norm-after-rope":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.bug == "key-stopped":
            k = jax.lax.stop_gradient(k)
        return self.wo(attend(q, k, v, mask, self.scale, self.bug))


class QwenBlock(nnx.Module):
    """Block of Qwen3, the MLP written into it."""

    def __init__(self, config, bug, rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.bug = bug
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = QwenAttention(config, bug, rngs)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x, mask):
        x = x + self.attn(self.norm1(x), mask)
        h = self.norm2(x)
        activation = jax.nn.gelu if self.bug == "gelu-for-silu" else jax.nn.silu
        return x + self.down(activation(self.gate(h)) * self.up(h))


class Qwen(nnx.Module):
    """Qwen3 with its head tied to the embedding."""

    def __init__(self, config, bug, rngs):
        self.bug = bug
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.blocks = nnx.List([QwenBlock(config, bug, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, input_ids):
        x = self.embed(input_ids)
        mask = causal(input_ids.shape[1], self.bug)
        for block in self.blocks:
            x = block(x, mask)
        table = self.embed.embedding[...]
        if self.bug == "head-stopped":
            table = jax.lax.stop_gradient(table)
        return self.norm(x) @ table.T


def qwen(bug=""):
    """Qwen3ForCausalLM."""
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=44,
        intermediate_size=60,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=12,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        attn_implementation="eager",
        use_cache=False,
    )
    module = randomise(transformers.Qwen3ForCausalLM(config), 5)
    names = {
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "blocks.{}": "model.layers.{}",
        "blocks.{}.norm1": "model.layers.{}.input_layernorm",
        "blocks.{}.norm2": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.attn": "model.layers.{}.self_attn",
        **{f"blocks.{{}}.attn.w{p}": f"model.layers.{{}}.self_attn.{p}_proj" for p in "qkvo"},
        **{f"blocks.{{}}.{p}": f"model.layers.{{}}.mlp.{p}_proj" for p in ("gate", "up", "down")},
    }
    model = load(Qwen(config, bug, nnx.Rngs(0)), arrays(module), names)
    return Pair(model, module, [tokens(97, 2, 21, 5)], {"names": names})


class NeoXAttention(nnx.Module):
    """Attention of GPT-NeoX with projections of its own for q, k and v; a part of each head is rotated."""

    def __init__(self, config, bug, rngs):
        size = config.hidden_size // config.num_attention_heads
        self.heads, self.bug = config.num_attention_heads, bug
        self.theta = config.rope_parameters["rope_theta"]
        part = 1.0 if bug == "rotary-part-ignored" else config.rope_parameters["partial_rotary_factor"]
        self.rotated = int(size * part)
        self.q, self.k, self.v, self.dense = (
            nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs) for _ in range(4)
        )

    def rotate(self, x):
        """Rotates the first part of each head."""
        turned, passed = jnp.split(x, [self.rotated], axis=-1)
        return jnp.concatenate([rope(turned, self.theta, self.bug), passed], axis=-1)

    def __call__(self, x, mask):
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        return self.dense(attend(self.rotate(q), self.rotate(k), v, mask, q.shape[-1] ** -0.5, self.bug))


class NeoXBlock(nnx.Module):
    """Block of GPT-NeoX: attention and MLP side by side."""

    def __init__(self, config, bug, rngs):
        norm = partial(nnx.LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.bug = bug
        self.ln1, self.ln2 = norm(), norm()
        self.attention = NeoXAttention(config, bug, rngs)
        self.up = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.down = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x, mask):
        attention = self.attention(self.ln1(x), mask)
        h = self.ln2(x + attention if self.bug == "residual-not-parallel" else x)
        h = self.down(jax.nn.gelu(self.up(h), approximate=self.bug == "gelu-tanh"))
        if self.bug == "attention-stopped":
            attention = jax.lax.stop_gradient(attention)
        return x + attention + h


class NeoX(nnx.Module):
    """GPT-NeoX with an untied head."""

    def __init__(self, config, bug, rngs):
        self.bug = bug
        self.embed_in = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([NeoXBlock(config, bug, rngs) for _ in range(config.num_hidden_layers)])
        self.final_layer_norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.embed_out = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, input_ids):
        x = self.embed_in(input_ids)
        mask = causal(input_ids.shape[1], self.bug)
        for layer in self.layers:
            x = layer(x, mask)
        return self.embed_out(self.final_layer_norm(x))


def neox(bug=""):
    """GPTNeoXForCausalLM, whose q, k and v are fused head by head."""
    heads = 4
    config = transformers.GPTNeoXConfig(
        vocab_size=79,
        hidden_size=48,
        intermediate_size=76,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        tie_word_embeddings=False,
        use_cache=False,
    )
    module = randomise(transformers.GPTNeoXForCausalLM(config), 6)
    head = "embed_out" if hasattr(module, "embed_out") else "lm_head"
    names = {
        "embed_in": "gpt_neox.embed_in",
        "embed_out": head,
        "final_layer_norm": "gpt_neox.final_layer_norm",
        "layers.{}": "gpt_neox.layers.{}",
        "layers.{}.ln1": "gpt_neox.layers.{}.input_layernorm",
        "layers.{}.ln2": "gpt_neox.layers.{}.post_attention_layernorm",
        "layers.{}.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "layers.{}.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    }
    weights = arrays(module)
    fused = {}
    for i in range(2):
        prefix = f"gpt_neox.layers.{i}.attention"
        for leaf, jax_leaf in (("weight", "kernel"), ("bias", "bias")):
            whole = weights[f"{prefix}.query_key_value.{leaf}"]
            if bug == "heads-not-interleaved":
                parts = np.split(whole, 3, axis=-1)
            else:
                split = whole.reshape(*whole.shape[:-1], heads, 3, -1)
                parts = [split[..., j, :].reshape(*whole.shape[:-1], -1) for j in range(3)]
            for name, part in zip("qkv", parts, strict=True):
                weights[f"{prefix}.{name}.{leaf}"] = part
            fused[f"{prefix}.query_key_value.{leaf}"] = {
                "parts": [f"layers.{i}.attention.{name}.{jax_leaf}" for name in "qkv"],
                "groups": heads,
            }
    model = load(NeoX(config, bug, nnx.Rngs(0)), weights, names)
    return Pair(model, module, [tokens(79, 2, 18, 6)], {"names": names, "fused": fused})


class GemmaNorm(nnx.Module):
    """Gemma's root mean square norm, whose weight is centred at zero."""

    def __init__(self, size, eps, bug=""):
        self.weight = nnx.Param(jnp.zeros(size))
        self.eps, self.bug = eps, bug

    def __call__(self, x):
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (h * (weight if self.bug == "norm-without-one" else 1.0 + weight)).astype(x.dtype)


class GemmaEmbed(nnx.Module):
    """Gemma's embedding, scaled by the root of its size, and the head tied to it, which is not."""

    def __init__(self, vocabulary, size, bug, rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocabulary, size)))
        self.scale, self.bug = 1.0 if bug == "embedding-unscaled" else size**0.5, bug

    def __call__(self, ids):
        return self.embedding[...][ids] * self.scale

    def attend(self, x):
        """The logits."""
        return x @ self.embedding[...].T * (self.scale if self.bug == "head-scaled" else 1.0)


class Gemma(nnx.Module):
    """Gemma."""

    def __init__(self, config, bug, rngs):
        norm = partial(GemmaNorm, bug=bug)
        activation = partial(jax.nn.gelu, approximate=bug != "gelu-exact")
        self.embed_tokens = GemmaEmbed(config.vocab_size, config.hidden_size, bug, rngs)
        self.layers = nnx.List([Block(config, bug, rngs, norm, activation) for _ in range(config.num_hidden_layers)])
        self.norm = GemmaNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, input_ids):
        x = self.embed_tokens(input_ids)
        mask = causal(input_ids.shape[1])
        for layer in self.layers:
            x = layer(x, mask)
        return self.embed_tokens.attend(self.norm(x))


def gemma(bug=""):
    """GemmaForCausalLM with one head of keys and values."""
    config = transformers.GemmaConfig(
        vocab_size=67,
        hidden_size=42,
        intermediate_size=58,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=None,
        use_cache=False,
        attn_implementation="eager",
    )
    module = randomise(transformers.GemmaForCausalLM(config), 7, norm_mean=0.0)
    model = load(Gemma(config, bug, nnx.Rngs(0)), arrays(module), LLAMA_NAMES)
    return Pair(model, module, [tokens(67, 3, 13, 7)], {"names": LLAMA_NAMES})


def first(*names):
    """Names of the forward pass."""
    return tuple(f"forward {name}" for name in names)


GPT2_ATTENTION = first("transformer.h.0.attn.c_proj.input", "transformer.h.0.attn.c_proj", "transformer.h.0.attn")
ATTENTION = first("model.layers.0.self_attn.o_proj.input", "model.layers.0.self_attn.o_proj")
GATE = first("model.layers.0.mlp.down_proj.input", "model.layers.0.mlp.down_proj")
MISTRAL_ATTENTION = first("layers.0.self_attn.o_proj.input", "layers.0.self_attn.o_proj")
NEOX_ATTENTION = first("gpt_neox.layers.0.attention.dense.input", "gpt_neox.layers.0.attention.dense")
AFTER_ATTENTION = first("model.layers.0.post_attention_layernorm.input", "model.layers.0.post_attention_layernorm")

PORTS = (
    Port(
        "gpt2",
        gpt2,
        {
            "gelu-exact": first(
                "transformer.h.0.mlp.act", "transformer.h.0.mlp.c_proj.input", "transformer.h.0.mlp.c_proj"
            ),
            "positions-from-one": first("transformer.wpe", "transformer.drop", "transformer.h.0.ln_1.input"),
            "positions-frozen": ("backward transformer.wpe", "gradient transformer.wpe.weight"),
            "eps": first("transformer.h.0.ln_1"),
            "bias-dropped": ("weight transformer.h.0.ln_1.bias", "forward transformer.h.0.ln_1"),
            "query-and-key-swapped": GPT2_ATTENTION,
            "scale-missing": GPT2_ATTENTION,
            "mask-off-by-one": GPT2_ATTENTION,
            "residual-missing": first("transformer.h.0", "transformer.h.1.ln_1"),
            "head-untied": (
                "weight lm_head.weight",
                "weight transformer.wte.weight",
                "gradient lm_head.weight",
                "gradient transformer.wte.weight",
            ),
        },
    ),
    Port(
        "llama",
        llama,
        {
            "rope-interleaved": ATTENTION,
            "rope-backwards": ATTENTION,
            "gqa-tiled": ATTENTION,
            "theta": ATTENTION,
            "mask-off-by-one": ATTENTION,
            "eps": first("model.layers.0.input_layernorm"),
            "gate-and-up-swapped": GATE,
            "gate-and-up-loaded-swapped": ("weight model.layers.0.mlp.gate_proj.weight",),
            "residual-after-norm": AFTER_ATTENTION,
            "value-stopped": ("backward model.layers.1.self_attn.v_proj",),
        },
    ),
    Port(
        "llama-scanned",
        scanned_llama,
        {
            "layers-from-last": first("model.layers.0.input", "model.layers.0.input_layernorm"),
            "stack-reversed": ("weight model.layers.0.self_attn.q_proj.weight",),
            "residual-missing": first("model.layers.0", "model.layers.1.input_layernorm"),
            "residual-stopped": (
                "backward model.layers.2.post_attention_layernorm.input",
                "backward model.layers.2.self_attn",
                "backward model.layers.2.self_attn.o_proj",
            ),
            "softmax-over-queries": ATTENTION,
            "rope-interleaved": ATTENTION,
        },
    ),
    Port(
        "mistral",
        mistral,
        {
            "window-off-by-one": MISTRAL_ATTENTION,
            "window-ignored": MISTRAL_ATTENTION,
            "gqa-tiled": MISTRAL_ATTENTION,
            "theta": MISTRAL_ATTENTION,
            "scale-of-hidden-size": MISTRAL_ATTENTION,
            "residual-after-norm": first(
                "layers.0.post_attention_layernorm.input", "layers.0.post_attention_layernorm"
            ),
        },
    ),
    Port(
        "qwen3",
        qwen,
        {
            "norms-swapped": first("model.layers.0.self_attn.q_norm.input", "model.layers.0.self_attn.q_norm"),
            "norm-after-rope": first("model.layers.0.self_attn.q_norm.input", "model.layers.0.self_attn.q_norm"),
            "scale-missing": ATTENTION,
            "theta": ATTENTION,
            "gelu-for-silu": GATE,
            "key-stopped": ("backward model.layers.1.self_attn.k_norm",),
            "head-stopped": ("gradient model.embed_tokens.weight", "gradient lm_head.weight"),
        },
    ),
    Port(
        "gpt-neox",
        neox,
        {
            "rotary-part-ignored": NEOX_ATTENTION,
            "rope-interleaved": NEOX_ATTENTION,
            "heads-not-interleaved": ("weight gpt_neox.layers.0.attention.query_key_value.weight",),
            "residual-not-parallel": first("gpt_neox.layers.0.post_attention_layernorm"),
            "gelu-tanh": first(
                "gpt_neox.layers.0.mlp.act",
                "gpt_neox.layers.0.mlp.dense_4h_to_h.input",
                "gpt_neox.layers.0.mlp.dense_4h_to_h",
            ),
            "attention-stopped": ("backward gpt_neox.layers.1.attention", "backward gpt_neox.layers.1.attention.dense"),
        },
    ),
    Port(
        "gemma",
        gemma,
        {
            "embedding-unscaled": first("model.embed_tokens"),
            "norm-without-one": first("model.layers.0.input_layernorm"),
            "gelu-exact": first("model.layers.0.mlp.act_fn", *(name.removeprefix("forward ") for name in GATE)),
            "scale-of-hidden-size": ATTENTION,
            "head-scaled": first("lm_head", "output.logits", "output"),
        },
    ),
)
