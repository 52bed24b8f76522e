"""Muon for a Flax NNX model whose layers are stacked: (layers, ...) leaves are that many matrices."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_impl.muon import explain, flax_matrices, muon, muon_or

LAYERS = 3


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 48, rngs=rngs)
        self.down = nnx.Linear(48, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 16, rngs=rngs)
        self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block))(rngs)
        self.head = nnx.Linear(16, 11, rngs=rngs)

    def __call__(self, tokens):
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            self.embed(tokens), self.layers
        )
        return self.head(x)


model = Model(nnx.Rngs(0))
tokens = jnp.arange(40).reshape(2, 20) ** 2 % 11

matrices = functools.partial(flax_matrices, stacked={"layers": 1}, named={"head/kernel": None})
print(explain(nnx.state(model, nnx.Param), matrices))
transformation = muon_or(matrices, muon(0.02), optax.adamw(0.003))
optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)


@nnx.jit
def update(model, optimizer):
    def loss_of(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


for step in range(60):
    loss = update(model, optimizer)
    if step % 20 == 0 or step == 59:
        print(f"update {step}: loss {loss:.3f}")
jax.block_until_ready(loss)
