"""Training steps of one small network, in JAX and in torch, timed against each other by

python -m benchmarks.throughput --jax-step docs/examples/throughput_steps.py:jax_step \\
    --torch-step docs/examples/throughput_steps.py:torch_step

A function builds what a step needs and returns the step, and what must be the same on both sides. Each is called in a
process of its own, so each imports its own framework.
"""

import itertools

import numpy as np

BATCH, SHAPES = 256, list(itertools.pairwise((64, 512, 512, 10)))
random = np.random.default_rng(0)
X = random.standard_normal((BATCH, 64), dtype=np.float32)
Y = random.integers(0, 10, BATCH)
WEIGHTS = [random.standard_normal(shape, dtype=np.float32) / shape[0] ** 0.5 for shape in SHAPES]
# Backward takes two products for each of the forward pass, but the input needs no gradient.
FLOPS = 2 * BATCH * (3 * sum(i * o for i, o in SHAPES) - 64 * 512)
FACTS = {"items": BATCH, "unit": "rows", "dtype": "float32", "flops": FLOPS}


def jax_step():
    import jax
    import jax.numpy as jnp
    import optax

    optimizer, x, y = optax.adam(1e-3), jnp.asarray(X), jnp.asarray(Y)

    def loss_of(weights):
        hidden = x
        for weight in weights[:-1]:
            hidden = jax.nn.relu(hidden @ weight)
        return optax.losses.softmax_cross_entropy_with_integer_labels(hidden @ weights[-1], y).mean()

    @jax.jit
    def update(weights, state):
        loss, grads = jax.value_and_grad(loss_of)(weights)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state, loss

    weights = [jnp.asarray(weight) for weight in WEIGHTS]
    state = optimizer.init(weights)

    def step():
        nonlocal weights, state
        weights, state, loss = update(weights, state)
        return loss

    return step, FACTS


def torch_step(compiled=False):
    import torch

    layers = [torch.nn.Linear(*shape, bias=False) for shape in SHAPES]
    for layer, weight in zip(layers, WEIGHTS, strict=True):
        layer.weight.data = torch.tensor(weight.T.copy())
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimizer, x, y = torch.optim.Adam(model.parameters(), lr=1e-3), torch.tensor(X), torch.tensor(Y)

    def loss_of():
        return torch.nn.functional.cross_entropy(model(x), y)

    if compiled:
        loss_of = torch.compile(loss_of)

    def step():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    return step, FACTS


def torch_compiled_step():
    return torch_step(compiled=True)
