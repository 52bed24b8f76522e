"""Ports of transformers' encoders to Flax NNX: BERT, RoBERTa, T5, ViT and CLIP's text tower."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from ._language_weights import arrays, load, randomise
from .port import Pair, Port


def padded(vocabulary, lengths, seed, pad):
    """Random token ids (batch, time) padded at the end, and the mask of those that are not padding."""
    length = max(lengths)
    ids = np.random.default_rng(seed).integers(5, vocabulary, (len(lengths), length))
    mask = (np.arange(length)[None] < np.array(lengths)[:, None]).astype(np.int64)
    return np.where(mask == 1, ids, pad), mask


def attend(q, k, v, heads, scale, mask=None, bias=0.0):
    """Softmax attention; mask says which keys are seen, bias is added to the scores."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(*out.shape[:2], -1)


class PaddedEmbed(nnx.Embed):
    """Embedding whose row of padding gets no gradient, as in torch."""

    def __init__(self, size, features, padding, rngs):
        super().__init__(size, features, rngs=rngs)
        self.padding = padding

    def __call__(self, ids):
        x = super().__call__(ids)
        return jnp.where((ids == self.padding)[..., None], jax.lax.stop_gradient(x), x)


class BertAttention(nnx.Module):
    """Self-attention of BERT before its output projection."""

    def __init__(self, config, bug, rngs):
        self.heads, self.bug = config.num_attention_heads, bug
        size = config.hidden_size
        self.query, self.key, self.value = (nnx.Linear(size, size, rngs=rngs) for _ in range(3))

    def __call__(self, x, mask):
        scale = (x.shape[-1] if self.bug == "scale-of-hidden-size" else x.shape[-1] // self.heads) ** -0.5
        seen = None if self.bug == "padding-ignored" else mask[:, None, None, :] > 0
        value = self.value(x)
        if self.bug == "value-stopped":
            value = jax.lax.stop_gradient(value)
        return attend(self.query(x), self.key(x), value, self.heads, scale, seen)


class BertLayer(nnx.Module):
    """Layer of BERT: norms come after the residual sums."""

    def __init__(self, config, bug, rngs):
        size, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.bug = bug
        self.attn = BertAttention(config, bug, rngs)
        self.attn_out = nnx.Linear(size, size, rngs=rngs)
        self.attn_norm = nnx.LayerNorm(size, epsilon=eps, rngs=rngs)
        self.up = nnx.Linear(size, inner, rngs=rngs)
        self.down = nnx.Linear(inner, size, rngs=rngs)
        self.out_norm = nnx.LayerNorm(size, epsilon=eps, rngs=rngs)

    def __call__(self, x, mask):
        h = self.attn_out(self.attn(x, mask))
        x = x + self.attn_norm(h) if self.bug == "norm-before-sum" else self.attn_norm(x + h)
        h = self.down(jax.nn.gelu(self.up(x), approximate=self.bug == "gelu-tanh"))
        return self.out_norm(h if self.bug == "residual-missing" else x + h)


class Bert(nnx.Module):
    """BERT; RoBERTa if the positions are counted from the padding."""

    def __init__(self, config, bug, rngs, roberta=False):
        size, padding = config.hidden_size, config.pad_token_id
        self.padding, self.roberta, self.bug = padding, roberta, bug
        # As users write it: some stop the gradient of the padding row, as torch does, and some do not.
        if roberta:
            self.word = PaddedEmbed(config.vocab_size, size, padding, rngs)
            self.position = PaddedEmbed(config.max_position_embeddings, size, padding, rngs)
        else:
            self.word = nnx.Embed(config.vocab_size, size, rngs=rngs)
            self.position = nnx.Embed(config.max_position_embeddings, size, rngs=rngs)
        self.token_type = nnx.Embed(config.type_vocab_size, size, rngs=rngs)
        eps = 1e-6 if bug == "eps" else config.layer_norm_eps
        self.embed_norm = nnx.LayerNorm(size, epsilon=eps, rngs=rngs)
        self.layers = nnx.List([BertLayer(config, bug, rngs) for _ in range(config.num_hidden_layers)])
        self.pooler = nnx.Linear(size, size, rngs=rngs)

    def positions(self, ids):
        """The position of every token, (batch, time) or (1, time)."""
        counted = jnp.arange(ids.shape[1])[None]
        if not self.roberta:
            return counted
        if self.bug == "padding-counted":
            return counted + self.padding + 1
        real = (ids != self.padding).astype(jnp.int32)
        start = 0 if self.bug == "positions-from-zero" else self.padding
        return jnp.cumsum(real, axis=1) * real + start

    def __call__(self, input_ids, attention_mask, token_type_ids=None):
        if token_type_ids is None or self.bug == "token-types-ignored":
            token_type_ids = jnp.zeros_like(input_ids)
        x = self.word(input_ids) + self.position(self.positions(input_ids))
        if self.bug != "token-types-dropped":
            x = x + self.token_type(token_type_ids)
        x = self.embed_norm(x)
        for layer in self.layers:
            x = layer(x, attention_mask)
        pooled = self.pooler(x[:, -1] if self.bug == "last-token-pooled" else x[:, 0])
        if self.bug != "pooler-without-tanh":
            pooled = jnp.tanh(pooled)
        return {"last_hidden_state": x, "pooler_output": pooled}


BERT_NAMES = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
    "layers.{}": "encoder.layer.{}",
    "layers.{}.attn": "encoder.layer.{}.attention.self",
    "layers.{}.attn_out": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attn_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.up": "encoder.layer.{}.intermediate.dense",
    "layers.{}.down": "encoder.layer.{}.output.dense",
    "layers.{}.out_norm": "encoder.layer.{}.output.LayerNorm",
}


def bert(bug=""):
    """BertModel with padding and two kinds of token."""
    config = transformers.BertConfig(
        vocab_size=73,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=32,
        type_vocab_size=2,
        attn_implementation="eager",
    )
    module = randomise(transformers.BertModel(config), 11)
    weights = arrays(module)
    if bug == "query-and-key-loaded-swapped":
        for i in range(2):
            for leaf in ("weight", "bias"):
                query, key = (f"encoder.layer.{i}.attention.self.{name}.{leaf}" for name in ("query", "key"))
                weights[query], weights[key] = weights[key], weights[query]
    model = load(Bert(config, bug, nnx.Rngs(0)), weights, BERT_NAMES)
    ids, mask = padded(73, (17, 11, 14), 11, config.pad_token_id)
    types = (np.arange(17)[None] >= np.array([[6], [4], [9]])).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return Pair(model, module, inputs, {"names": BERT_NAMES})


def roberta(bug=""):
    """RobertaModel, whose positions leave the padding out."""
    config = transformers.RobertaConfig(
        vocab_size=69,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=76,
        max_position_embeddings=34,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    module = randomise(transformers.RobertaModel(config), 12)
    model = load(Bert(config, bug, nnx.Rngs(0), roberta=True), arrays(module), BERT_NAMES)
    ids, mask = padded(69, (12, 20), 12, config.pad_token_id)
    return Pair(model, module, {"input_ids": ids, "attention_mask": mask}, {"names": BERT_NAMES})


class T5Norm(nnx.Module):
    """Root mean square norm without mean and bias."""

    def __init__(self, size, eps, bug):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps, self.bug = eps, bug

    def __call__(self, x):
        if self.bug == "mean-subtracted":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return self.weight * (x * jax.lax.rsqrt(variance + self.eps))


class T5Attention(nnx.Module):
    """Attention of T5: its scores are not scaled, and have a bias of relative positions."""

    def __init__(self, config, bug, rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.scale = config.d_kv**-0.5 if bug == "scores-scaled" else 1.0
        self.q, self.k, self.v = (linear(config.d_model, inner) for _ in range(3))
        self.o = linear(inner, config.d_model)

    def __call__(self, x, mask, bias):
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.heads, self.scale, mask, bias))


class T5FeedForward(nnx.Module):
    """Gated feed-forward part of T5 1.1."""

    def __init__(self, config, bug, rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.bug = bug
        self.wi_0, self.wi_1 = linear(config.d_model, config.d_ff), linear(config.d_model, config.d_ff)
        self.wo = linear(config.d_ff, config.d_model)

    def __call__(self, x):
        gate, linear = self.wi_0(x), self.wi_1(x)
        if self.bug == "gate-swapped":
            gate, linear = linear, gate
        return self.wo(jax.nn.gelu(gate, approximate=self.bug != "gelu-exact") * linear)


class T5Block(nnx.Module):
    """Block of T5's encoder."""

    def __init__(self, config, bug, rngs):
        self.attn_norm = T5Norm(config.d_model, config.layer_norm_epsilon, bug)
        self.attn = T5Attention(config, bug, rngs)
        self.ff_norm = T5Norm(config.d_model, config.layer_norm_epsilon, bug)
        self.ff = T5FeedForward(config, bug, rngs)

    def __call__(self, x, mask, bias):
        x = x + self.attn(self.attn_norm(x), mask, bias)
        return x + self.ff(self.ff_norm(x))


class T5Encoder(nnx.Module):
    """T5's encoder."""

    def __init__(self, config, bug, rngs):
        self.buckets, self.farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.bug = bug
        self.embed = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.relative_bias = nnx.Embed(self.buckets, config.num_heads, rngs=rngs)
        self.blocks = nnx.List([T5Block(config, bug, rngs) for _ in range(config.num_layers)])
        self.final_norm = T5Norm(config.d_model, config.layer_norm_epsilon, bug)

    def bucket(self, length):
        """The bucket of every pair of query (row) and key (column)."""
        ahead = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
        if self.bug == "direction-reversed":
            ahead = -ahead
        half = self.buckets // 2
        exact = half // 2
        distance = jnp.abs(ahead)
        far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.farthest / exact)
        far = jnp.minimum(exact + (far * (half - exact)).astype(jnp.int32), half - 1)
        near = distance <= exact + 1 if self.bug == "buckets-off" else distance < exact
        return jnp.where(ahead > 0, half, 0) + jnp.where(near, distance, far)

    def __call__(self, input_ids, attention_mask):
        mask = None if self.bug == "padding-ignored" else attention_mask[:, None, None, :].astype(bool)
        bias = self.relative_bias(self.bucket(input_ids.shape[1])).transpose(2, 0, 1)
        if self.bug == "bias-stopped":
            bias = jax.lax.stop_gradient(bias)
        x = self.embed(input_ids)
        if self.bug == "embedding-scaled":
            x = x * x.shape[-1] ** 0.5
        for i, block in enumerate(self.blocks):
            x = block(x, mask, 0.0 if i and self.bug == "bias-in-first-layer-only" else bias)
        return self.final_norm(x)


def t5(bug=""):
    """T5EncoderModel with gated feed-forward parts."""
    config = transformers.T5Config(
        vocab_size=77,
        d_model=38,
        d_kv=9,
        d_ff=66,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=50,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )
    module = randomise(transformers.T5EncoderModel(config), 13)
    attention, feed_forward = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    names = {
        "embed": "encoder.embed_tokens",
        "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "final_norm": "encoder.final_layer_norm",
        "blocks.{}": "encoder.block.{}",
        "blocks.{}.attn_norm": f"{attention}.layer_norm",
        "blocks.{}.attn": f"{attention}.SelfAttention",
        "blocks.{}.ff_norm": f"{feed_forward}.layer_norm",
        "blocks.{}.ff": f"{feed_forward}.DenseReluDense",
    }
    for block in module.encoder.block:
        block.layer[0].SelfAttention.q.weight.data.mul_(config.d_kv**-0.5)  # T5 scales its weights, not its scores
    table = module.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    table.data.mul_(20.0)  # a bias of scores is of the order of one, unlike an embedding
    model = load(T5Encoder(config, bug, nnx.Rngs(0)), arrays(module), names)
    ids, mask = padded(77, (24, 15), 13, config.pad_token_id)
    return Pair(model, module, {"input_ids": ids, "attention_mask": mask}, {"names": names})


class VitEmbeddings(nnx.Module):
    """Patches, the class token before them, and positions."""

    def __init__(self, config, bug, rngs):
        size, patch = config.hidden_size, config.patch_size
        rows, columns = (side // patch for side in config.image_size)
        self.bug = bug
        self.projection = nnx.Conv(
            config.num_channels, size, (patch, patch), strides=(patch, patch), padding="VALID", rngs=rngs
        )
        self.cls_token = nnx.Param(jnp.zeros((1, 1, size)))
        self.position_embeddings = nnx.Param(jnp.zeros((1, rows * columns + 1, size)))

    def __call__(self, images):
        x = self.projection(images)
        if self.bug == "patches-by-columns":
            x = x.transpose(0, 2, 1, 3)
        if self.bug == "patches-stopped":
            x = jax.lax.stop_gradient(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, x.shape[-1]))
        if self.bug == "positions-of-patches-only":
            return jnp.concatenate([token, x + self.position_embeddings[:, 1:]], axis=1)
        return jnp.concatenate([token, x], axis=1) + self.position_embeddings[...]


class VitBlock(nnx.Module):
    """Block of ViT around Flax's own attention."""

    def __init__(self, config, bug, rngs):
        size, inner = config.hidden_size, config.intermediate_size
        self.bug = bug
        eps = 1e-6 if bug == "eps" else config.layer_norm_eps
        self.layernorm_before = nnx.LayerNorm(size, epsilon=eps, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.num_attention_heads, size, decode=False, rngs=rngs)
        self.layernorm_after = nnx.LayerNorm(size, epsilon=eps, rngs=rngs)
        self.fc1 = nnx.Linear(size, inner, rngs=rngs)
        self.fc2 = nnx.Linear(inner, size, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.layernorm_before(x))
        h = x if self.bug == "second-norm-missing" else self.layernorm_after(x)
        return x + self.fc2(jax.nn.gelu(self.fc1(h), approximate=self.bug == "gelu-tanh"))


class Vit(nnx.Module):
    """ViT with a classifier."""

    def __init__(self, config, bug, rngs):
        self.bug = bug
        self.embeddings = VitEmbeddings(config, bug, rngs)
        self.blocks = nnx.List([VitBlock(config, bug, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.classifier = nnx.Linear(config.hidden_size, config.num_labels, rngs=rngs)

    def __call__(self, images):
        x = self.embeddings(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.classifier(x.mean(axis=1) if self.bug == "mean-classified" else x[:, 0])


def vit(bug=""):
    """ViTForImageClassification on images that are wider than high."""
    config = transformers.ViTConfig(
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=72,
        image_size=(24, 30),
        patch_size=6,
        num_labels=7,
    )
    module = randomise(transformers.ViTForImageClassification(config), 14)
    names = {
        "embeddings": "vit.embeddings",
        "embeddings.projection": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "blocks.{}": "vit.layers.{}",
        "blocks.{}.attention.query": "vit.layers.{}.attention.q_proj",
        "blocks.{}.attention.key": "vit.layers.{}.attention.k_proj",
        "blocks.{}.attention.value": "vit.layers.{}.attention.v_proj",
        "blocks.{}.attention.out": "vit.layers.{}.attention.o_proj",
        "blocks.{}.fc1": "vit.layers.{}.mlp.fc1",
        "blocks.{}.fc2": "vit.layers.{}.mlp.fc2",
    }
    weights = arrays(module)
    if bug == "kernel-turned":
        kernel = "vit.embeddings.patch_embeddings.projection.weight"
        weights[kernel] = weights[kernel].swapaxes(0, 1)
    model = load(Vit(config, bug, nnx.Rngs(0)), weights, names)
    images = np.random.default_rng(14).normal(size=(2, 3, 24, 30)).astype(np.float32)
    rules = {"names": names, "layouts": {"embeddings.projection": "NHWC->NCHW"}}
    return Pair(model, module, [images], rules, {"jax_inputs": [images.transpose(0, 2, 3, 1)]})


class ClipAttention(nnx.Module):
    """Attention of CLIP."""

    def __init__(self, config, bug, rngs):
        self.heads, self.bug = config.num_attention_heads, bug
        size = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nnx.Linear(size, size, rngs=rngs) for _ in range(4))

    def __call__(self, x, mask):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.bug == "query-stopped":
            q = jax.lax.stop_gradient(q)
        return self.out_proj(attend(q, k, v, self.heads, (x.shape[-1] // self.heads) ** -0.5, mask))


class ClipBlock(nnx.Module):
    """Block of CLIP, named as OpenAI did."""

    def __init__(self, config, bug, rngs):
        size, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.bug = bug
        self.ln_1, self.ln_2 = (nnx.LayerNorm(size, epsilon=eps, rngs=rngs) for _ in range(2))
        self.attn = ClipAttention(config, bug, rngs)
        self.c_fc = nnx.Linear(size, inner, rngs=rngs)
        self.c_proj = nnx.Linear(inner, size, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        h = self.c_fc(self.ln_2(x))
        h = jax.nn.gelu(h, approximate=False) if self.bug == "gelu-not-quick" else h * jax.nn.sigmoid(1.702 * h)
        return x + self.c_proj(h)


class ClipText(nnx.Module):
    """CLIP's text tower: causal, pooled at the end-of-text token; returns a tuple."""

    def __init__(self, config, bug, rngs):
        self.end, self.bug = config.eos_token_id, bug
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.positional_embedding = nnx.Param(jnp.zeros((config.max_position_embeddings, config.hidden_size)))
        self.resblocks = nnx.List([ClipBlock(config, bug, rngs) for _ in range(config.num_hidden_layers)])
        self.ln_final = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, input_ids, attention_mask):
        length = input_ids.shape[1]
        mask = attention_mask[:, None, None, :] > 0
        if self.bug == "padding-ignored":
            mask = jnp.ones_like(mask)
        if self.bug != "not-causal":
            mask = mask & jnp.tril(jnp.ones((length, length), bool))
        start = 1 if self.bug == "positions-from-one" else 0
        x = self.token_embedding(input_ids) + self.positional_embedding[start : start + length]
        for block in self.resblocks:
            x = block(x, mask)
        hidden = self.ln_final(x)
        end = jnp.argmax(input_ids == self.end, axis=-1)
        if self.bug == "last-token-pooled":
            end = jnp.full_like(end, length - 1)
        pooled = (x if self.bug == "pooled-before-norm" else hidden)[jnp.arange(len(end)), end]
        return hidden, pooled


def clip_text(bug=""):
    """CLIPTextModel with padded texts."""
    config = transformers.CLIPTextConfig(
        vocab_size=62,
        hidden_size=32,
        intermediate_size=84,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=26,
        bos_token_id=60,
        eos_token_id=61,
        pad_token_id=1,
    )
    module = randomise(transformers.CLIPTextModel(config), 15)
    names = {
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final": "final_layer_norm",
        "resblocks.{}": "encoder.layers.{}",
        "resblocks.{}.attn": "encoder.layers.{}.self_attn",
        "resblocks.{}.ln_1": "encoder.layers.{}.layer_norm1",
        "resblocks.{}.ln_2": "encoder.layers.{}.layer_norm2",
        "resblocks.{}.c_fc": "encoder.layers.{}.mlp.fc1",
        "resblocks.{}.c_proj": "encoder.layers.{}.mlp.fc2",
    }
    model = load(ClipText(config, bug, nnx.Rngs(0)), arrays(module), names)
    ids, mask = padded(60, (9, 16, 13), 15, config.pad_token_id)
    ids[np.arange(3), [8, 15, 12]] = 61
    mask[1, 1:3] = 0  # padding after the end alone would be hidden by causality
    return Pair(model, module, {"input_ids": ids, "attention_mask": mask}, {"names": names})


def first(*names):
    """Names of the forward pass."""
    return tuple(f"forward {name}" for name in names)


BERT_ATTENTION = first("encoder.layer.0.attention.self", "encoder.layer.0.attention.output.dense")
BERT_GELU = first(
    "encoder.layer.0.intermediate.intermediate_act_fn",
    "encoder.layer.0.intermediate",
    "encoder.layer.0.output.dense.input",
    "encoder.layer.0.output.dense",
)
T5_ATTENTION = first("encoder.block.0.layer.0.SelfAttention.o.input", "encoder.block.0.layer.0.SelfAttention.o")
T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
CLIP_ATTENTION = first("encoder.layers.0.self_attn.out_proj.input", "encoder.layers.0.self_attn.out_proj")

PORTS = (
    Port(
        "bert",
        bert,
        {
            "gelu-tanh": BERT_GELU,
            "padding-ignored": BERT_ATTENTION,
            "scale-of-hidden-size": BERT_ATTENTION,
            "token-types-ignored": first("embeddings.token_type_embeddings"),
            "token-types-dropped": first(
                "embeddings.token_type_embeddings", "embeddings.LayerNorm.input", "embeddings.LayerNorm"
            ),
            "norm-before-sum": first(
                "encoder.layer.0.attention.output.LayerNorm.input", "encoder.layer.0.attention.output.LayerNorm"
            ),
            "eps": first("embeddings.LayerNorm"),
            "residual-missing": first("encoder.layer.0.output.LayerNorm.input", "encoder.layer.0.output.LayerNorm"),
            "pooler-without-tanh": first("pooler.activation", "pooler", "output.pooler_output"),
            "last-token-pooled": first("pooler.dense.input", "pooler.dense"),
            "query-and-key-loaded-swapped": ("weight encoder.layer.0.attention.self.query.weight",),
            "value-stopped": ("backward encoder.layer.1.attention.self.value",),
        },
    ),
    Port(
        "roberta",
        roberta,
        {
            "positions-from-zero": first("embeddings.position_embeddings"),
            "padding-counted": first("embeddings.position_embeddings"),
            "gelu-tanh": BERT_GELU,
            "padding-ignored": BERT_ATTENTION,
            "eps": first("embeddings.LayerNorm"),
        },
    ),
    Port(
        "t5-encoder",
        t5,
        {
            "scores-scaled": T5_ATTENTION,
            "padding-ignored": T5_ATTENTION,
            "buckets-off": first(T5_BIAS),
            "direction-reversed": first(T5_BIAS, "encoder.block.0.layer.0.SelfAttention.o.input"),
            "bias-in-first-layer-only": first(
                "encoder.block.1.layer.0.SelfAttention.o.input", "encoder.block.1.layer.0.SelfAttention.o"
            ),
            "bias-stopped": (f"backward {T5_BIAS}", f"gradient {T5_BIAS}.weight"),
            "mean-subtracted": first("encoder.block.0.layer.0.layer_norm"),
            "gelu-exact": first(
                "encoder.block.0.layer.1.DenseReluDense.act",
                "encoder.block.0.layer.1.DenseReluDense.wo.input",
                "encoder.block.0.layer.1.DenseReluDense.wo",
            ),
            "gate-swapped": first(
                "encoder.block.0.layer.1.DenseReluDense.act",
                "encoder.block.0.layer.1.DenseReluDense.wo.input",
                "encoder.block.0.layer.1.DenseReluDense.wo",
            ),
            "embedding-scaled": first(
                "encoder.block.0.input",
                "encoder.block.0.layer.0.layer_norm.input",
                "encoder.block.0.layer.0.layer_norm",
                "encoder.block.0",
            ),
        },
    ),
    Port(
        "vit",
        vit,
        {
            "patches-by-columns": first("vit.embeddings"),
            "positions-of-patches-only": first("vit.embeddings"),
            "kernel-turned": ("weight vit.embeddings.patch_embeddings.projection.weight",),
            "patches-stopped": (
                "backward vit.embeddings.patch_embeddings.projection",
                "gradient vit.embeddings.patch_embeddings.projection.bias",
            ),
            "eps": first("vit.layers.0.layernorm_before"),
            "second-norm-missing": first(
                "vit.layers.0.layernorm_after", "vit.layers.0.mlp.fc1.input", "vit.layers.0.mlp.fc1"
            ),
            "gelu-tanh": first("vit.layers.0.mlp.activation_fn", "vit.layers.0.mlp.fc2.input", "vit.layers.0.mlp.fc2"),
            "mean-classified": first("classifier.input", "classifier"),
        },
    ),
    Port(
        "clip-text",
        clip_text,
        {
            "gelu-not-quick": first(
                "encoder.layers.0.mlp.activation_fn", "encoder.layers.0.mlp.fc2.input", "encoder.layers.0.mlp.fc2"
            ),
            "not-causal": CLIP_ATTENTION,
            "padding-ignored": CLIP_ATTENTION,
            "positions-from-one": first(
                "embeddings", "encoder.layers.0.layer_norm1.input", "encoder.layers.0.layer_norm1"
            ),
            "last-token-pooled": first("output.pooler_output"),
            "pooled-before-norm": first("output.pooler_output"),
            "query-stopped": ("backward encoder.layers.1.self_attn.q_proj",),
        },
    ),
)
