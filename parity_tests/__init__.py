"""Proof that `jax_impl` and `torch_ref` are the same model and the same training; the only place that imports both."""
