"""Muon for an Equinox model, whose weights are (out, in); the gradients are accumulated over two halves of a batch."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from jax_impl.muon import MultiSteps, equinox_matrices, explain, muon, muon_or


class Model(eqx.Module):
    tokens: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.tokens = eqx.nn.Embedding(11, 16, key=keys[0])
        self.norm = eqx.nn.LayerNorm(16)
        self.mlp = eqx.nn.MLP(16, 16, 48, 2, key=keys[1])
        self.head = eqx.nn.Linear(16, 11, key=keys[2])

    def __call__(self, token):
        x = self.tokens(token)
        return self.head(x + self.mlp(self.norm(x)))


model = Model(jax.random.key(0))
tokens = jnp.arange(40).reshape(2, 20) ** 2 % 11

# An embedding's `weight` looks like a Linear's: only its name tells.
matrices = functools.partial(equinox_matrices, named={"tokens/weight": None, "head/weight": None})
params, static = eqx.partition(model, eqx.is_inexact_array)
print(explain(params, matrices))
transformation = muon_or(matrices, muon(0.02, gram=True), optax.adamw(0.003))
optimizer = MultiSteps(transformation, every_k_schedule=2)


def loss_of(params, row):
    logits = jax.vmap(eqx.combine(params, static))(row[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, row[1:]).mean()


@jax.jit
def micro_step(params, state, row):
    loss, grads = jax.value_and_grad(loss_of)(params, row)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


state = optimizer.init(params)
for step in range(120):
    params, state, loss = micro_step(params, state, tokens[step % 2])
    if step % 40 == 0 or step == 119:
        print(f"micro-step {step}: loss {loss:.3f}")
