"""Progress of long work: a bar on a terminal, a line now and then otherwise."""

import sys
import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

EVERY = 5.0
"""Seconds between two lines where there is no terminal; work shorter than that says nothing."""


def progress(items: Sequence, what: str) -> Iterator:
    """The items one by one, shown on stderr as they come."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, leave=False)
        return
    shown = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - shown > EVERY:
            print(f"{what}: {count} of {len(items)}", file=sys.stderr, flush=True)
            shown = time.monotonic()
