"""Learning-rate factors, one per optimizer update."""

import numpy as np

from recipe.config import ScheduleConfig


def learning_rate_factors(config: ScheduleConfig, steps: int) -> np.ndarray:
    """Factors in (0, 1] of length `steps`, float64: linear warm-up, then a cosine from 1 to `final_factor`.

    Update i of the W = round(warmup_fraction * steps) warm-up updates has factor (i + 1) / W, so the first one
    already moves the weights; the last update has exactly `final_factor` (or 1 if there is nothing to decay over).
    """
    step = np.arange(steps, dtype=np.float64)
    warmup = round(config.warmup_fraction * steps)
    progress = np.clip((step - warmup) / max(1, steps - 1 - warmup), 0.0, 1.0)
    cosine = config.final_factor + (1.0 - config.final_factor) * 0.5 * (1.0 + np.cos(np.pi * progress))
    return np.where(step < warmup, (step + 1.0) / max(1, warmup), cosine)
