"""Correct ports between JAX and PyTorch, and bugs that can be planted in them."""
