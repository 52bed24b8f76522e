"""What runs the facts of `recipe/`: the training loop, its records, what lies on disk, generation as people meet it."""
