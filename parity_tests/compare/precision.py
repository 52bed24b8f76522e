"""The dtypes that are compared, their unit round-off, and what this process makes of a product."""

import importlib.metadata
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import torch

from parity_tests.compare.errors import require

DTYPES = ("float64", "float32", "bfloat16")
UNIT_ROUNDOFF = {dtype: float(jnp.finfo(dtype).eps) / 2 for dtype in DTYPES}
"""Largest relative error of one rounding to nearest: half the distance from 1 to the next number."""

_PACKAGES = ("jax", "jaxlib", "flax", "equinox", "optax", "torch", "transformers", "numpy")


def accumulation_of(dtype: str) -> str:
    """Dtype in which products of this dtype are summed: float32 for bfloat16, else the dtype itself."""
    return "float32" if dtype == "bfloat16" else dtype


def check_dtypes(dtypes) -> tuple[str, ...]:
    """The dtypes as a tuple of names; raises `CompareError` for none and for those that are not compared."""
    dtypes = tuple(dtypes) if isinstance(dtypes, Iterable) and not isinstance(dtypes, str) else (dtypes,)
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    require(
        bool(dtypes) and not unknown,
        f"dtypes={[str(dtype) for dtype in dtypes]} must be some of {', '.join(DTYPES)}; name those.",
    )
    return dtypes


def versions() -> dict[str, str]:
    """Versions of the installed packages that can change a comparison."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settings(dtype: str) -> dict[str, dict[str, str]]:
    """What each framework's side computes with in this process, by side."""
    device = jax.devices()[0]
    return {
        f"jax {dtype}": {
            "framework": f"jax {jax.__version__}",
            "device": f"{device.platform}: {device.device_kind}",
            "dtype": dtype,
            "float32 products": "highest",
        },
        f"torch {dtype}": {
            "framework": f"torch {torch.__version__}",
            "device": "cpu",
            "dtype": dtype,
            "float32 products": torch.get_float32_matmul_precision(),
        },
    }
