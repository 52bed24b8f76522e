"""Are two models the same in two frameworks? JAX (Flax NNX, Linen, Equinox, plain functions) against torch.

`compare_modules` runs both on the same inputs and compares weights, outputs, cotangents and gradients with the
float64 truth; `compare` does so for two functions of named arrays, `compare_training` for two training loops.
`assert_same` is the line for a test, `copy_weights` carries weights over by the same `Rules`. The guide is
`docs/compare.md`.

Nothing else of this project is imported, and transformers, Flax and Equinox only if a model of theirs is handed over.
"""

import importlib

_HOMES = {
    "compare": "functions",
    **dict.fromkeys(("compare_modules", "assert_same"), "modules"),
    **dict.fromkeys(("Rules", "Fused", "save_rules", "load_rules"), "rules"),
    **dict.fromkeys(("copy_weights", "copy_weights_to_torch"), "weights"),
    **dict.fromkeys(("compare_training", "jax_training", "torch_training"), "training"),
    "CompareError": "errors",
    "Report": "report",
    "tap": "program",
}
"""Public name -> the module it lives in, imported when it is asked for."""

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
