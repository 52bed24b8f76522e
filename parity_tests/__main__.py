"""`python -m parity_tests`: the report of `parity_tests/twins.py` from the command line.

Exit code 0: every tensor is within what rounding explains; 1: the first that is not is printed; 2: a user's mistake.
"""

import sys

from harness import cli


def main() -> int:
    """The frameworks are imported here, so that a missing one is one line too."""
    from parity_tests import twins

    description = "Compare jax_impl, torch_ref and transformers tensor by tensor."
    prog = cli.called_as("python -m parity_tests")
    return twins.main(cli.parse(twins.TwinOptions, sys.argv[1:], prog=prog, description=description))


if __name__ == "__main__":
    cli.end(main)
