"""Command lines: the top floor of the harness, which only the entries import."""
