"""Products on torch are `F.linear` and `einsum` on operands of one dtype. The twin is `jax_impl/products.py`."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: where sums, norms, softmax and loss are computed."""
    return torch.promote_types(dtype, torch.float32)


def product(spec: str, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Two-operand einsum on x's dtype, to which y is cast, returned in `dtype`.

    Sums are float32 or wider; unlike its twin it rounds to x's dtype before a wider `dtype`, which torch cannot avoid.
    """
    return torch.einsum(spec, x, y.to(x.dtype)).to(dtype)
