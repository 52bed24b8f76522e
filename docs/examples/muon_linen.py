"""Muon for a Flax Linen model: attention and MLP kernels by Muon, all the rest by AdamW."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jax_impl.muon import explain, flax_matrices, muon, muon_or


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 16, name="embed")(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(16, name="down")(nn.relu(nn.Dense(48, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(11, name="head")(x)


model = Model()
tokens = jnp.arange(40).reshape(2, 20) ** 2 % 11
params = model.init(jax.random.key(0), tokens)

matrices = functools.partial(flax_matrices, named={"head/kernel": None})  # heads are AdamW's, as embeddings are
print(explain(params, matrices))
schedule = optax.cosine_decay_schedule(0.02, 60)
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    muon_or(matrices, muon(schedule, weight_decay=0.1), optax.adamw(0.003)),
)


def loss_of(params):
    logits = model.apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@jax.jit
def update(params, state):
    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state = optimizer.init(params)
for step in range(60):
    params, state, loss = update(params, state)
    if step % 20 == 0 or step == 59:
        print(f"update {step}: loss {loss:.3f}")
