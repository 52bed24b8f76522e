"""The model, Muon, training and generation in PyTorch: the reference. Its twin, file by file, is `jax_impl`."""
