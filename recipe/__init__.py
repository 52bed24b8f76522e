"""What both frameworks must agree on, written once, in NumPy: config, data order, initial weights, sampling."""
