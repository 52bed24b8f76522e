"""Correct ports from torch to JAX, each with bugs that can be planted in it."""
