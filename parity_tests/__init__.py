"""Proof that `jax_impl` and `torch_ref` are the same model and the same training; the only place that imports both."""

import sys

from harness.cli import run

if (
    sys.argv[0] == "-m"
):  # `python -m parity_tests.NAME`, whose module imports both before it can say that one is missing

    def _look() -> None:
        import torch  # noqa: F401
        import transformers  # noqa: F401

    if code := run(_look):
        raise SystemExit(code)
