"""Proof that `jax_impl` and `torch_ref` are the same model and the same training; the only place that imports both."""

import sys

# `python -m parity_tests.NAME` imports both before its module can say that one of them is missing.
if sys.argv[0] == "-m":
    from harness.cli import run

    def _look() -> None:
        import torch  # noqa: F401
        import transformers  # noqa: F401

    if code := run(_look):
        raise SystemExit(code)
