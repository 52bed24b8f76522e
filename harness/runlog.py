"""The log of a run: run.json, metrics.jsonl, TensorBoard events or a tracker if asked for, lines or a bar on the
terminal."""

import contextlib
import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.records import cut_log, is_finite, read_record, readable_records
from harness.surroundings import surroundings
from harness.trackers import Tracker
from recipe.config import RunConfig, UserError, require, to_dict
from recipe.durable import make_folder, sync, write_whole


def step_line(
    step: int, steps: int, *, loss: float, grad_norm: float, lr: float, skipped: int, tok_s: float | None, dt_ms: float
) -> str:
    """The text of one training line, the same in both frameworks; throughput is unknown while the step compiles."""
    speed = "-" if tok_s is None else f"{tok_s:,.0f}"
    line = f"{_progress(step, steps)} | loss {_number(loss)} | grad_norm {_number(grad_norm)} | lr {lr:.3e}"
    return line + f" | tok/s {speed} | dt {dt_ms:,.0f} ms" + (f" | skipped {skipped}" if skipped else "")


def validation_line(
    step: int, steps: int, *, loss: float, accuracy: float, perplexity: float, bits_per_byte: float
) -> str:
    """The text of one evaluation, the same in both frameworks."""
    line = f"{_progress(step, steps)} | val loss {_number(loss)} | accuracy {accuracy:.2%}"
    return line + f" | ppl {_number(perplexity, ',.2f')} | bits/byte {_number(bits_per_byte)}"


def _number(value: float, form: str = ".4f") -> str:
    """The text of a number, which may have hundreds of digits in a run that diverges."""
    return f"{value:{form}}" if abs(value) < 1e9 else f"{value:.3e}"


def _progress(step: int, steps: int) -> str:
    width = len(str(steps))
    return f"step {step:0{width}d}/{steps} ({step / steps:.1%})"


class RunLog:
    """Writes a run's folder and reports its progress; a context manager.

    On a terminal, training shows as a bar on stderr; otherwise, or when stdout goes elsewhere, as lines on stdout.
    """

    def __init__(
        self,
        folder: str | Path,
        config: RunConfig,
        *,
        framework: str,
        environment: dict[str, Any],
        resume_at: int | None = None,
        again: bool = False,
    ) -> None:
        """Make the folder and write run.json; `environment` holds at least "device". Never overwrites a run.

        With `resume_at` go on with a run's log after that step, whatever has become of the log; later records go to
        undone.jsonl. With `again` begin anew in the folder of a run that never saved a state, whose records go there.
        """
        self.folder = Path(folder)
        self._config = config
        self._steps = config.steps
        self._lock = threading.Lock()
        self._first, self._last_step, self._tokens, self._elapsed = True, 0, 0, 0.0
        self.about = about = {"framework": framework, **surroundings(), "environment": environment}
        if resume_at is not None:
            cut = cut_log(self.folder, resume_at)
        else:
            if not again:
                _refuse_to_overwrite(self.folder)
            make_folder(self.folder)
            text = json.dumps(about | {"config": to_dict(config)}, indent=2, allow_nan=False)
            write_whole(self.folder / "run.json", text.encode() + b"\n")
            cut = cut_log(self.folder, -1)
            if again:
                for events in self.folder.glob("events.out.tfevents.*"):
                    events.unlink()  # TensorBoard would draw both runs as one
        self.records = cut.records
        """What the log held when the run began or went on, in order; later records are not added."""
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        if resume_at is not None:
            self._stand_at(resume_at)
            self._write({"kind": "resume", "step": resume_at} | about)
        first_step = 0 if resume_at is None else resume_at + 1
        self._events = EventFile(self.folder, first_step) if config.tensorboard else None
        self._tracker = Tracker(self.folder, config, resumed=resume_at is not None) if config.track else None
        progress = dict(unit="step", disable=None, dynamic_ncols=True, leave=True)
        self._bar = tqdm(total=config.steps, initial=self._last_step, **progress)
        self._show_lines = self._bar.disable or not sys.stdout.isatty()
        self._since_line = _Interval()
        if again:
            of = "of a run that ended before its first save"
            self._print(f"again      begun anew; undone.jsonl has the {cut.undone:,} records {of}")
        if cut.said:
            self._print(cut.said)

    def _stand_at(self, step: int) -> None:
        """Count from the step on, after which `records` end."""
        trained = [record for record in self.records if record["kind"] == "train"]
        self._last_step, self._tokens = step, step * self._config.tokens_per_step
        self._elapsed = trained[-1]["seconds"] if trained else 0.0

    def rollback(self, step: int, values: Mapping[str, Any]) -> None:
        """Go back to a step: its later records go to undone.jsonl, and a record of kind rollback says why."""
        with self._lock:
            self._metrics.close()
            cut = cut_log(self.folder, step)
            self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self.records = cut.records
        self._stand_at(step)
        self._first, self._since_line = True, _Interval()  # a trainer made anew compiles again
        self._write({"kind": "rollback", "step": step} | _finite(values))
        if self._tracker is not None:
            self._tracker.log(step, {"rollback/diverged_at": values["diverged_at"]})
        if self._events is not None:
            self._events.close()
            self._events = EventFile(self.folder, step + 1)
        if not self._bar.disable:
            self._bar.n = self._bar.last_print_n = step
            self._bar.initial = min(self._bar.initial, step)
            self._bar.refresh()
        if cut.said:
            self._print(cut.said)

    def sync(self) -> None:
        """Force the records so far to disk; any thread may ask for it while another one logs.

        Each is flushed when it is written, so the file's name is enough. Events are left out: they repeat the records.
        """
        with contextlib.suppress(FileNotFoundError):  # a log that somebody removes costs no state
            sync(self.folder / "metrics.jsonl")

    def header(self, lines: list[str]) -> None:
        """Print lines above the progress: the configuration, counts, device."""
        for line in lines:
            self._print(line)

    def log_baselines(self, nats: dict[str, float], bytes_per_token: float) -> None:
        """Record and print losses to beat, in nats per token and bits per byte; the plot draws them as lines."""
        self._record("baselines", 0, **nats)
        per_byte = [f"{loss / math.log(2) / bytes_per_token:.3f}" for loss in nats.values()]
        texts = [f"{name} {loss:.3f}" for name, loss in nats.items()]
        self._print(f"to beat    {', '.join(texts)} nats/token ({', '.join(per_byte)} bits/byte)")

    def log_step(
        self, *, step: int, loss: float, grad_norm: float, lr: float, skipped: int, seconds: float, tokens: int
    ) -> None:
        """Record update `step` (from 1); `seconds` and `tokens` are those of all updates since the last call.

        `lr` is Muon's rate, `skipped` counts the updates skipped so far. A line appears every `log_every` updates, at
        the first and at the last. The first call holds the compilation, so its throughput is unknown.
        """
        first, self._first = self._first, False
        updates = step - self._last_step
        require(updates > 0, f"step={step} does not follow step {self._last_step}; log each update once, in order.")
        self._last_step = step
        self._tokens += tokens
        self._elapsed += seconds
        tok_s = None if first or seconds == 0 else tokens / seconds
        values: dict[str, Any]
        values = {"loss": float(loss), "grad_norm": float(grad_norm), "lr": float(lr), "skipped": int(skipped)}
        timing = {"tok_s": tok_s, "dt_ms": 1e3 * seconds / updates}
        self._record("train", step, **values, **timing, tokens=self._tokens, seconds=self._elapsed)

        self._since_line.add(updates, seconds, tokens)
        self._bar.update(updates)
        if first or step % self._config.log_every == 0 or step == self._steps:
            line_tok_s = None if first else self._since_line.tok_s
            line = step_line(step, self._steps, **values, tok_s=line_tok_s, dt_ms=self._since_line.dt_ms)
            if self._show_lines:
                self._print(line)
            speed = "-" if line_tok_s is None else f"{line_tok_s:,.0f}"
            self._bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.3e}, {speed} tok/s")
            self._since_line = _Interval()

    def log_validation(
        self, *, step: int, loss: float, accuracy: float, perplexity: float, bits_per_byte: float
    ) -> None:
        """Record and print an evaluation after update `step`: nats per token, a share, exp(loss), bits per byte."""
        values = {
            "loss": float(loss),
            "accuracy": float(accuracy),
            "perplexity": float(perplexity),
            "bits_per_byte": float(bits_per_byte),
        }
        self._record("validation", step, **values)
        self._print(validation_line(step, self._steps, **values))

    def close(self) -> None:
        """Close the bar and the files; they are complete up to the last record at any time."""
        self._bar.close()
        self._metrics.close()
        if self._events is not None:
            self._events.close()
        if self._tracker is not None:
            self._tracker.finish()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, kind: str, step: int, **values: float | int | None) -> None:
        """One flushed line of JSON, in which a value that is not finite is null, and the same values as events."""
        finite = _finite(values)
        self._write({"kind": kind, "step": step} | finite)
        scalars = {f"{kind}/{name}": x for name, x in finite.items() if x is not None}
        if self._events is not None:
            self._events.add_scalars(step, scalars)
        if self._tracker is not None:
            self._tracker.log(step, scalars)

    def _write(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()

    def _print(self, line: str) -> None:
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line)  # moves the bar out of the way


class SilentLog:
    """The log of a process that is not the chief of its run: it has the records, and writes and prints nothing."""

    about: Mapping[str, Any] = {}

    def __init__(self, folder: str | Path, resume_at: int | None = None) -> None:
        """With `resume_at` go on with the records up to that step, which the chief's log keeps."""
        self.folder = Path(folder)
        self.records = [] if resume_at is None else self._up_to(resume_at)

    def _up_to(self, step: int) -> list[dict[str, Any]]:
        return [record for record in readable_records(self.folder) if record["step"] <= step]

    def rollback(self, step: int, values: Mapping[str, Any]) -> None:
        """Go back to a step, once the chief's log has."""
        self.records = self._up_to(step)

    def sync(self) -> None:
        pass

    def header(self, lines: list[str]) -> None:
        pass

    def log_baselines(self, nats: dict[str, float], bytes_per_token: float) -> None:
        pass

    def log_step(self, **values: float) -> None:
        pass

    def log_validation(self, **values: float) -> None:
        pass

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class EventFile:
    """A TensorBoard event file; `tensorboard --logdir` on its folder, or on one above it, shows its scalars.

    Of the package `tensorboard` it uses the messages and the record writer, which import no framework. Its
    `EventFileWriter` would import TensorFlow where that is installed, and writes from a thread, some seconds late.
    """

    LARGEST = float(np.finfo(np.float32).max)

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        """A file that goes on with earlier ones names its `first_step`: from there TensorBoard forgets theirs."""
        check_tensorboard()
        from tensorboard.compat.proto import event_pb2, summary_pb2  # half a second, for whoever asks for events only
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._file = RecordWriter(open(folder / f"events.out.tfevents.{time.time():.6f}", "xb"))  # noqa: SIM115
        self._write(file_version="brain.Event:2")
        if first_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=first_step, session_log=start)

    def add_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Write one event with a value per tag; TensorBoard stores float32, so what that cannot hold is left out."""
        held = {tag: float(scalar) for tag, scalar in scalars.items() if abs(scalar) <= self.LARGEST}
        if held:
            values = [self._summary.Value(tag=tag, simple_value=scalar) for tag, scalar in held.items()]
            self._write(step=step, summary=self._summary(value=values))

    def _write(self, **content) -> None:
        self._file.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_tensorboard() -> None:
    """Raise `UserError` if the package that writes events is not installed."""
    try:
        import tensorboard  # noqa: F401 (loads nothing but its version)
    except ImportError:
        remedy = "run: pip install -e '.[tensorboard]', or leave the flag out"
        raise UserError(f"--tensorboard True needs tensorboard, which is not installed; {remedy}.") from None


@dataclass
class _Interval:
    """Updates, time and tokens since the last line."""

    updates: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def add(self, updates: int, seconds: float, tokens: int) -> None:
        self.updates += updates
        self.seconds += seconds
        self.tokens += tokens

    @property
    def tok_s(self) -> float | None:
        return None if self.seconds == 0 else self.tokens / self.seconds

    @property
    def dt_ms(self) -> float:
        return 1e3 * self.seconds / self.updates


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run in order; a last line that a killed run left unfinished is dropped."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a run folder of train_jax.py or train_torch.py.")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(read_record(line, f"line {number} of {path}"))
        except UserError as error:
            remedy = "The log is damaged; mend the line, or move the file away: a run goes on without it."
            raise UserError(f"{str(error).partition(';')[0]}. {remedy}") from None
    return records


def _finite(value: Any) -> Any:
    """The value with None for every number that JSON cannot hold, or that overflows float64."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, int | float) and not is_finite(value) else value


def _refuse_to_overwrite(folder: Path) -> None:
    for name in ("run.json", "metrics.jsonl"):
        if os.path.lexists(folder / name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder / name))
