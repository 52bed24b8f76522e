"""The precision contract: what decides a run's rounding.

Reports and benchmarks record it and refuse to compare what differs. No framework is asked here: whoever runs one
fills the contract in.
"""

import dataclasses
import os
from collections.abc import Collection
from typing import Literal

from recipe.config import require

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

FLOAT32_PROBE = 1.0 + 2.0**-13
"""A float32 that TF32, with its 10 bits of fraction, and bfloat16 round to 1."""

NOT_THERE = "-"
"""Value of a field that the side has no such thing for; it agrees with everything."""

MUST_AGREE = ("backend", "params", "compute", "newton_schulz", "matmul", "accumulation", "attention", "dropout")
"""Fields that must be equal where values are compared; the others are recorded only."""

SET_ALIKE = "Set both sides alike, or compare each with the float64 truth in a report of its own."


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
    """What runs, not what was asked for: explicit, fused, or the kernel's own name."""
    dropout: str
    """none, or where the masks come from."""
    threads: str
    """Compute threads of a CPU."""


def accumulation_of(compute: str) -> str:
    """float32 for the narrow dtypes, else the dtype itself."""
    return "float32" if compute == "bfloat16" else compute


def dropout_of(rate: float) -> str:
    """Where our models take their masks from at this rate."""
    return "Threefry, keyed by place" if rate else "none"


def float32_product(probed: float) -> Literal["float32", "TF32"]:
    """What a float32 product is, told from what became of `FLOAT32_PROBE` times one."""
    return "float32" if probed == FLOAT32_PROBE else "TF32"


def cpus_in_reach() -> int:
    """CPUs that this process may run on; all of them where the system cannot pin a process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def xla_threads(cpus: int | None = None) -> int:
    """Threads of XLA's CPU backend, which can be told to use one and else takes every CPU in reach, or these."""
    single = "--xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", "")
    return 1 if single else cpus or cpus_in_reach()


def openmp_threads(cpus: int | None = None) -> int:
    """Threads torch should be set to: OpenMP's own variable decides, else the CPUs in reach, or these.

    Left alone, torch takes MKL's count, which is capped by the cores MKL sees.
    """
    return int(os.environ.get("OMP_NUM_THREADS", cpus or cpus_in_reach()))


def require_same(
    *contracts: PrecisionContract,
    fields: Collection[str] = MUST_AGREE,
    except_for: Collection[str] = (),
    remedy: str = SET_ALIKE,
) -> None:
    """Raise `UserError` with one line unless all contracts agree in `fields`, `except_for` left out."""
    differences = []
    for name in fields:
        values = [getattr(contract, name) for contract in contracts]
        if name not in except_for and len(set(values) - {NOT_THERE}) > 1:
            sides = (f"{value} in {contract.side}" for value, contract in zip(values, contracts, strict=True))
            differences.append(f"{name} is " + ", ".join(sides))
    require(not differences, "these runs are not comparable: " + "; ".join(differences) + ". " + remedy)
