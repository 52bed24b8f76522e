"""Newton-Schulz orthogonalisation: the heart of Muon, as one pure function."""

import torch

# Keller Jordan's quintic, tuned for slope at zero: https://kellerjordan.github.io/posts/muon/
KELLER_JORDAN_COEFFS = (3.4445, -4.7750, 2.0315)


def orthogonalize_via_newton_schulz(
    x_OI: torch.Tensor,
    *,
    steps: int = 5,
    coeffs: tuple[float, float, float] = KELLER_JORDAN_COEFFS,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Replace the singular values of each matrix by values near one: U S V^T -> about U V^T.

    x_OI has shape (..., fan_out, fan_in); leading axes are a batch. A square matrix must come as (fan_out, fan_in),
    since the iteration works on X X^T. X = x / (||x||_F + eps), then `steps` times

        A = X X^T,  B = b A + c A A,  X = a X + B X

    on the wide orientation. X, A and B are stored in `dtype`, each rounded once: `baddbmm` adds before it rounds, and
    takes the coefficients in float32. Returns `dtype`.
    """
    a, b, c = coeffs
    wide = torch.promote_types(dtype, torch.float32)

    tall = x_OI.shape[-2] > x_OI.shape[-1]
    x = (x_OI.mT if tall else x_OI).to(wide)
    norm = torch.sqrt(torch.sum(x * x, dim=(-2, -1), keepdim=True))
    x = (x / (norm + eps)).to(dtype)
    batch_shape = x.shape[:-2]
    x = x.reshape(-1, *x.shape[-2:])

    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)

    x = x.reshape(*batch_shape, *x.shape[-2:])
    return x.mT if tall else x
