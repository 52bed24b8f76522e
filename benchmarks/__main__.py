"""`python -m benchmarks` is `python -m benchmarks.throughput`."""

import sys

from benchmarks.throughput import command_line

sys.exit(command_line())
