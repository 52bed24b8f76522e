"""`python -m parity_tests`: the report of `parity_tests/twins.py` from the command line.

Exit code 0: every tensor is within what rounding explains; 1: the first that is not is printed; 2: a user's mistake.
"""

import sys

from harness import cli
from parity_tests.twins import TwinOptions, main

if __name__ == "__main__":
    description = "Compare jax_impl, torch_ref and transformers tensor by tensor."
    sys.exit(
        cli.run(
            lambda: main(cli.parse(TwinOptions, sys.argv[1:], prog="python -m parity_tests", description=description))
        )
    )
