"""`python -m benchmarks` is `python -m benchmarks.throughput`."""

from harness import cli


def main() -> int:
    """The frameworks are imported here, so that a missing one is one line."""
    from benchmarks.throughput import command_line

    return command_line()


if __name__ == "__main__":
    cli.end(main)
