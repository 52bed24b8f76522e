"""The precision contract: what decides a run's rounding. Every report records it; runs that differ are not compared."""

import dataclasses
import os
from collections.abc import Collection
from typing import Literal

import jax
import torch

from recipe.config import PrecisionConfig, require

NOT_THERE = "-"
"""Value of a field that the side has no such thing for; it agrees with everything."""

MUST_AGREE = ("backend", "params", "compute", "newton_schulz", "matmul", "accumulation", "attention", "dropout")
"""Fields that must be equal; the others are recorded only."""


@dataclasses.dataclass(frozen=True)
class PrecisionContract:
    """What one side of a comparison computes with."""

    side: str
    framework: str
    """Framework and version."""
    backend: str
    """cpu or gpu."""
    device: str
    params: str
    """Dtype of stored parameters and optimizer state."""
    compute: str
    """Dtype of the operands of matrix products."""
    newton_schulz: str
    matmul: str
    """What a float32 product is: float32, or the narrower format it may be cut to (TF32, bfloat16)."""
    x64: str
    """Whether the framework keeps float64."""
    accumulation: str
    """Dtype that products of the compute dtype are summed in."""
    attention: str
    dropout: str
    """none, or where the masks come from."""
    threads: str
    """Compute threads."""


def accumulation_of(compute: str) -> str:
    """float32 for the narrow dtypes, else the dtype itself."""
    return "float32" if compute == "bfloat16" else compute


def float32_products(framework: Literal["jax", "torch"], backend: str) -> str:
    """What this process makes of a float32 product, read from the framework's own setting."""
    if framework == "torch":
        setting = torch.get_float32_matmul_precision()
        if backend == "gpu":
            return "TF32" if setting != "highest" or torch.backends.cuda.matmul.allow_tf32 else "float32"
        return {"highest": "float32", "high": "TF32", "medium": "bfloat16"}[setting]
    setting = jax.config.jax_default_matmul_precision
    if backend == "cpu" and setting in (None, "default", "fastest", "high", "highest", "float32"):
        return "float32"  # XLA's CPU backend has nothing narrower
    full = setting in ("highest", "float32")
    return "float32" if full else "TF32"


def process_contract(
    framework: Literal["jax", "torch"],
    side: str,
    precision: PrecisionConfig,
    *,
    dropout: str = "none",
    params: str | None = None,
    newton_schulz: str | None = None,
    attention: str | None = None,
) -> PrecisionContract:
    """The contract of a side that runs in this process, now; call it under the settings that the side runs under."""
    if framework == "jax":
        device = jax.devices()[0]
        backend, name, version = device.platform, device.device_kind, f"jax {jax.__version__}"
        x64 = str(bool(jax.config.jax_enable_x64))
        threads = _xla_threads()
    else:
        # The torch side of these tests stays on the CPU.
        backend, name, version, x64 = "cpu", "cpu", f"torch {torch.__version__}", "True"
        threads = str(torch.get_num_threads())
    require(
        precision.compute != "float64" or x64 == "True",
        f"{side} is to compute in float64, but jax_enable_x64 is off; switch it on (jax.enable_x64(True)).",
    )
    return PrecisionContract(
        side=side,
        framework=version,
        backend=backend,
        device=name,
        params=params or precision.params,
        compute=precision.compute,
        newton_schulz=newton_schulz or precision.newton_schulz,
        matmul=float32_products(framework, backend),
        x64=x64,
        accumulation=accumulation_of(precision.compute),
        attention=attention or precision.attention,
        dropout=dropout,
        threads=threads,
    )


def _xla_threads() -> str:
    single = "--xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", "")
    return "1" if single else f"up to {os.cpu_count()}"


def require_same(a: PrecisionContract, b: PrecisionContract, *, except_for: Collection[str] = ()) -> None:
    """Raise `UserError` with one line unless both contracts agree in `MUST_AGREE`, `except_for` left out."""
    differences = []
    for name in MUST_AGREE:
        left, right = getattr(a, name), getattr(b, name)
        if name not in except_for and left != right and NOT_THERE not in (left, right):
            differences.append(f"{name} is {left} in {a.side} and {right} in {b.side}")
    require(
        not differences,
        "these runs are not comparable: " + "; ".join(differences) + ". Set both sides alike, or compare each with the "
        "float64 truth in a report of its own.",
    )
