"""The precision contract (`recipe.contract`) of a side that runs in this process, read from its framework."""

from typing import Literal

import jax
import torch

from recipe.config import PrecisionConfig, require
from recipe.contract import PrecisionContract, accumulation_of, xla_threads


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
        threads = xla_threads()
    else:
        # The torch side of these tests stays on the CPU.
        backend, name, version, x64 = "cpu", "cpu", f"torch {torch.__version__}", "True"
        threads = torch.get_num_threads()
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
        threads=str(threads),
    )
