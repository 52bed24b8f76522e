"""The model, Muon, training and generation in PyTorch: the reference. Its twin, file by file, is `jax_impl`."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("PyTorch is not installed; run: pip install -e '.[torch]'", name="torch") from missing
