"""What a training run came to, read from its log."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harness.records import readable_records
from recipe.config import fits


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run came to, over all its updates, those before it was resumed among them."""

    folder: Path
    """Run folder: best/ and last/ hold weights, loss.png is the picture."""
    best: float
    """Lowest validation loss, nats per token: that of best/."""
    best_step: int
    """Update after which it was measured."""
    losses: np.ndarray = field(repr=False)
    """Training loss of each update, nats per token: float64 (steps,), NaN where it was not finite."""
    validation: tuple[tuple[int, float], ...] = field(repr=False)
    """(step, validation loss in nats per token), in order; NaN where it was not finite."""
    seconds: float
    """Time of the updates, the first one's compilation included, evaluations and saves left out."""
    tokens_per_second: float | None
    """Throughput of the updates that compiled nothing; None if there was none."""

    @property
    def picture(self) -> Path:
        """The run's loss.png."""
        return self.folder / "loss.png"

    def __repr__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens/s"
        return (
            f"<run {self.folder}: validation {self.best:.4f} nats per token at best, after step {self.best_step}; "
            f"{len(self.losses)} updates in {self.seconds:,.1f} s{speed}>"
        )


def read_result(folder: str | Path) -> RunResult:
    """The result of the run in a folder, so far; NaN and 0 for what its log does not hold."""
    records = readable_records(folder)
    trained = [record for record in records if record["kind"] == "train"]
    measured = [(r["step"], _number(r["loss"])) for r in records if r["kind"] == "validation"]
    finite = [(loss, step) for step, loss in measured if math.isfinite(loss)]
    best, best_step = min(finite, default=(math.nan, 0))
    timed = [(r["tok_s"], r["dt_ms"]) for r in trained if fits(r.get("tok_s"), float) and fits(r.get("dt_ms"), float)]
    milliseconds = sum(dt_ms for _, dt_ms in timed)
    return RunResult(
        folder=Path(folder),
        best=best,
        best_step=best_step,
        losses=np.array([_number(record["loss"]) for record in trained]),
        validation=tuple(measured),
        seconds=trained[-1]["seconds"] if trained else 0.0,
        tokens_per_second=sum(tok_s * dt_ms for tok_s, dt_ms in timed) / milliseconds if milliseconds else None,
    )


def _number(value: float | None) -> float:
    """A number of the log, in which what is not finite is null."""
    return math.nan if value is None else value
