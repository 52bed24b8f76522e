"""Several documents in a row of tokens, none of them cut: which go together, and which token is whose."""

from collections.abc import Sequence

import numpy as np

IGNORE = -100
"""The target of a token that nobody is trained on, as everywhere in the field."""


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's sum at most `capacity`: the longest first, each into the fullest row
    that still has room, of equals the first (Johnson, 1973: at most 11/9 of the fewest possible rows and one).

    No length may be above `capacity`. The same lengths give the same rows, in the order in which they were begun.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0
    """Bit r is set if a row has room for r more."""
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop(0)
            if not with_room[room]:
                rooms &= ~(1 << room)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        left = room - length
        if left:
            with_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


def documents_by_end(tokens: np.ndarray, end: int) -> np.ndarray:
    """Number of each token's document within its row (..., T), int32, where documents end with the token `end`."""
    ends = (tokens == end).astype(np.int32)
    return np.cumsum(ends, axis=-1, dtype=np.int32) - ends
