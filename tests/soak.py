"""`python -m tests.soak --minutes 60`: a run that saves at every update, for a long time, and what it holds meanwhile.

JAX trains a small model with `--save_every 1` and `--keep 2`. Every half minute memory, open files, threads and the
folder are looked at, several times, as a save holds some of them for a moment: the least counts. At the end the
summary is written as JSON and printed, and the exit code is 1 if open files, threads or what lies in the folder have
grown, if anything is left that should not be, or if the run did not end as SIGTERM asks. Linux alone.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import cli
from harness.manifest import check_files
from harness.state import state_folders
from recipe.config import UserError, require
from tests.survival import ROOT, SMALL, leftovers, settings, write_corpus

GLANCES, PAUSE = 40, 0.02
"""How often a sample looks, and the seconds between."""
STEPS = 1_000_000
"""More updates than an hour has time for."""
BOUNDED = ("open_files", "threads", "entries", "folder_kib")
"""What must not grow; the log does, numbers gain digits by bytes, and memory is judged by the reader."""
SETTLING = 2
"""First samples left out: what a process needs once, it may take late."""


@dataclass(frozen=True)
class SoakCommand:
    """Train for a long time with a save at every update, and see whether anything grows."""

    minutes: float = 60.0
    """How long to train."""
    every: float = 30.0
    """Seconds between samples."""
    out: str = "soak.json"
    """File for the summary."""

    def __post_init__(self) -> None:
        samples = 60 * self.minutes / self.every if self.every > 0 else 0
        require(
            samples >= 2 * SETTLING + 4,
            f"minutes={self.minutes} and every={self.every} make {samples:.0f} samples, too few to see growth; choose "
            "a longer time, or a smaller --every.",
        )


def glance(pid: int, run: Path) -> dict[str, int]:
    """What a process and its folder hold now."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    entries, size = _folder(run)
    return {
        "rss_kib": int(status.partition("VmRSS:")[2].split()[0]),
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "entries": entries,
        "folder_kib": -(-size // 1024),
    }


def _folder(run: Path) -> tuple[int, int]:
    """Files and folders in a run, and the bytes of all but its logs."""
    entries = size = 0
    for above, folders, files in os.walk(run):
        entries += len(folders) + len(files)
        for name in files:
            try:
                size += 0 if name.endswith(".jsonl") else os.stat(os.path.join(above, name)).st_size
            except FileNotFoundError:  # replaced since
                continue
    return entries, size


def sample(pid: int, run: Path) -> dict[str, int]:
    """The least of several glances, and the updates logged so far."""
    glances = []
    for _ in range(GLANCES):
        glances.append(glance(pid, run))
        time.sleep(PAUSE)
    least = {name: min(each[name] for each in glances) for name in glances[0]}
    return {"updates": updates_of(run), **least}


def updates_of(run: Path) -> int:
    """The last update in a run's log."""
    with open(run / "metrics.jsonl", "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
        steps = [json.loads(line)["step"] for line in log.read().split(b"\n")[1:-1]]
    return max(steps, default=0)


def grown(samples: list[Mapping[str, int]]) -> list[str]:
    """Which of what is bounded has grown: its least in the last quarter is above its most in the first."""
    quarter = max(2, len(samples) // 4)
    first, last = samples[:quarter], samples[-quarter:]
    return [name for name in BOUNDED if min(each[name] for each in last) > max(each[name] for each in first)]


def per_1000_updates(samples: list[Mapping[str, int]], name: str) -> float:
    """Slope of the line of least squares through the samples."""
    updates = np.array([each["updates"] for each in samples], np.float64)
    return 1000 * float(np.polyfit(updates, [each[name] for each in samples], 1)[0])


def soak(command: SoakCommand, folder: Path) -> dict:
    """Train in a folder for the command's time; the summary."""
    corpus, run = write_corpus(folder / "corpus"), folder / "run"
    flags = [*SMALL, "--steps", str(STEPS), "--save_every", "1", "--keep", "2", "--eval_every", "5"]
    flags += ["--log_every", "1000", "--data.corpus", str(corpus), "--out", str(run)]
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "train_jax.py", *flags], cwd=ROOT, env=settings(folder / "cache"), stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    samples: list[Mapping[str, int]] = []
    begun = time.monotonic()
    try:
        while process.poll() is None and not (run / "last" / "run.json").is_file():
            time.sleep(0.1)
        end = time.monotonic() + 60 * command.minutes
        while process.poll() is None and time.monotonic() < end:
            samples.append(sample(process.pid, run))
            time.sleep(max(0.0, min(command.every, end - time.monotonic())))
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    said = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    settled = samples[SETTLING:]
    enough = len(settled) >= 4
    wrong = [f"exit code {code}, not {128 + signal.SIGTERM}"] * (code != 128 + signal.SIGTERM)
    wrong += [f"{name} grew" for name in (grown(settled) if enough else [])] or ["too few samples"] * (not enough)
    wrong += [f"{name} is left" for name in (leftovers(run) if run.is_dir() else [])]
    states = state_folders(run)
    wrong += [f"{len(states)} states, not 2"] * (len(states) != 2)
    for state in states:
        try:
            check_files(state, tensors=True)
        except UserError as error:
            wrong.append(str(error))
    names = list(samples[0])[1:] if samples else []
    return {
        "minutes": round((time.monotonic() - begun) / 60, 2),
        "updates": samples[-1]["updates"] if samples else 0,
        "first": samples[0] if samples else {},
        "settled": settled[0] if enough else {},
        "last": samples[-1] if samples else {},
        "per_1000_updates": {name: round(per_1000_updates(settled, name), 4) for name in names} if enough else {},
        "wrong": wrong,
        "last_line": said[-1] if said else "",
        "samples": samples,
    }


def table(summary: Mapping) -> list[str]:
    """The summary in Markdown."""
    lines = [f"{summary['updates']:,} updates, each saved, in {summary['minutes']} minutes", ""]
    lines += ["| | first | settled | last | per 1,000 updates |", "|---|--:|--:|--:|--:|"]
    for name, slope in summary["per_1000_updates"].items():
        first, settled, last = (f"{summary[when][name]:,}" for when in ("first", "settled", "last"))
        lines.append(f"| {name.replace('_', ' ')} | {first} | {settled} | {last} | {slope:+,.4f} |")
    return [*lines, "", *(f"wrong: {what}" for what in summary["wrong"])]


def main() -> int:
    """`python -m tests.soak`; 1 if something grew, was left, or went wrong."""
    command = cli.parse(SoakCommand, sys.argv[1:], prog="python -m tests.soak", description=SoakCommand.__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        summary = soak(command, Path(folder))
    about = {"command": dataclasses.asdict(command)}
    Path(command.out).write_text(json.dumps(about | summary, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(summary)))
    return int(bool(summary["wrong"]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
