"""What both frameworks must agree on, written once and in NumPy: config, data order, initial weights, schedule, logs."""
