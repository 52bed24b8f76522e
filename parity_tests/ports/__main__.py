"""`python -m parity_tests.ports`: the table of false alarms and of missed bugs."""

import argparse
import sys
from pathlib import Path

from .table import measure, ports, show, table


def main() -> int:
    """Measure, print the table, write it if asked to; returns 0 if every verdict is right."""
    parser = argparse.ArgumentParser("python -m parity_tests.ports", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these ports alone")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--out", default="", metavar="FILE", help="write the table there")
    options = parser.parse_args()
    unknown = [name for name in options.only if name not in ports()]
    if unknown:
        parser.error(f"--only {unknown[0]} is no port; known are {', '.join(ports())}.")
    outcomes = show(measure(options.only, options.workers))
    text = table(outcomes)
    print(text)
    if options.out:
        Path(options.out).write_text(text, encoding="utf-8")
    return 0 if all(one.right for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
