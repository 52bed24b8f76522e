"""Rounding at random in torch_ref's rotary tables, which NumPy computes where the noise on torch does not reach."""

import contextlib
from collections.abc import Iterator

import numpy as np

import torch_ref.model
from parity_tests.compare.montecarlo import is_active, rounded


@contextlib.contextmanager
def rounded_rope_tables(frequency_roundings: float = 0.0) -> Iterator[None]:
    """Context in which torch_ref's cosines and sines pass through `rounded`, as a cast from float64 would.

    With `frequency_roundings` the rotary frequencies carry so many roundings too and their products with the positions
    one more, as in a table that was computed in the lower precision; both grow with the position.
    """
    original = torch_ref.model.rope_table

    def rope_table(config, length):
        cos_TR, sin_TR = original(config, length)
        if is_active() and frequency_roundings and length > 1:
            # The angle at position 1 is the frequency, at most 1.
            frequencies_R = rounded(np.arctan2(sin_TR[1], cos_TR[1]), frequency_roundings)
            angles_TR = rounded(np.arange(length)[:, None] * frequencies_R)
            cos_TR, sin_TR = np.cos(angles_TR), np.sin(angles_TR)
        return rounded(cos_TR), rounded(sin_TR)

    torch_ref.model.rope_table = rope_table
    try:
        yield
    finally:
        torch_ref.model.rope_table = original
