"""The model, Muon, training and generation in JAX, Flax NNX and optax. Its twin, file by file, is `torch_ref`."""
