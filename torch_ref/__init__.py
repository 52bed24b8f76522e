"""The model, Muon, training and generation in PyTorch: the reference. Its twin, file by file, is `jax_impl`."""

import sys

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as missing:
    line = "PyTorch is not installed; run: pip install 'qwen-from-scratch[torch]', or in a clone -e '.[torch]'."
    if sys.argv[0] == "-m":  # `python -m torch_ref.train`: the command that would print one line is not there yet
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    raise ModuleNotFoundError(line, name="torch") from missing
