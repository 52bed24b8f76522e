"""What both sides' dropout masks are: a pure function of the key, the row, the column and the rate.

Row r and column c of a mask take the 16-bit half number c % 4 of the Threefry block with counter words (r, c // 4);
the halves are the low and the high one of the first word, then those of the second. The element stays if its half is
at least `threshold(rate)`.
"""

DECISIONS = 4
"""Decisions of one Threefry block of two 32-bit words."""
RESOLUTION = 2**16
"""A decision's 16 bits tell so many rates apart."""


def threshold(rate: float) -> int:
    """How many of the 65,536 values of a half drop the element: the rate rounded to a multiple of 2^-16."""
    return round(rate * RESOLUTION)


def kept_share(rate: float) -> float:
    """The exact probability that an element stays, by which those that stay are divided."""
    return 1.0 - threshold(rate) / RESOLUTION
