"""Timing of both implementations side by side; see README.md."""
