"""What XLA makes of an update on a device that is not here: compiled ahead of time, read, never run (docs/plan.md)."""
