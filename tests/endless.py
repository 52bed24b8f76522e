"""`python -m tests.endless`: a corpus of many gigabytes, generated, tokenised within bounded memory, and trained on.

The build is killed half way and goes on. Every step runs in a process of its own, whose peak memory the system tells.
Prints a table; docs/data.md has the one that was measured.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from recipe.config import DataConfig
from recipe.corpus import load_documents

SHOWN = 2**28
"""Bytes of generated text between two lines that say so."""
READ = """
import sys, time
from recipe.config import DataConfig
from recipe.data import prepare
began = time.monotonic()
dataset = prepare(DataConfig(corpus=sys.argv[1], split="hashed", cache_dir=sys.argv[2]), seed=0, show_progress=True)
print(f"{len(dataset.train_tokens)} {len(dataset.validation_tokens)} {time.monotonic() - began:.3f}", flush=True)
began = time.monotonic()
for step in range(int(sys.argv[3])):
    dataset.batch(step, accumulation=1, batch_size=32, sequence_length=512)
print(f"{time.monotonic() - began:.3f}", flush=True)
"""


class Step(NamedTuple):
    """A process that has ended: its standard output, seconds, and peak memory in MiB."""

    out: str
    seconds: float
    peak: float


def write_corpus(folder: Path, size: int, seed: int = 0) -> None:
    """Some `size` bytes in half a JSONL file of documents and half one text file: lines of the plays, drawn anew, and
    numbers, so that there are always new words."""
    lines = [line for text in load_documents(DataConfig()).texts for line in text.split("\n") if line]
    drawn = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "a.jsonl", "wb") as records, open(folder / "b.txt", "wb") as text:
        written = shown = number = 0
        while written < size:
            number += 1
            first = drawn.randrange(len(lines))
            body = lines[first : first + drawn.randrange(5, 60)] + drawn.choices(lines, k=drawn.randrange(5, 60))
            document = "\n".join([f"{number} {drawn.getrandbits(40):x}", *body]) + "\n"
            data = (json.dumps({"text": document}) if number % 2 else document).encode() + b"\n"
            written += (records if number % 2 else text).write(data)
            if written - shown >= SHOWN:
                shown = written
                print(f"generated {written:,} bytes", file=sys.stderr)


def run(arguments: list[str], until: Path | None = None, share: float = 0.5) -> Step:
    """Run a command to its end; or kill it when the build whose folder `until` holds has done a share of its files."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, encoding="utf-8")
    while until is not None and process.poll() is None:
        time.sleep(0.05)
        for progress in until.glob(".streaming-*/progress.json"):
            place = json.loads(progress.read_bytes())["place"]
            if place[0] >= 1 or place[1] >= share:
                process.send_signal(signal.SIGKILL)
                until = None
                break
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return Step(out, time.monotonic() - began, peak)


def main() -> None:
    """Generate, build, kill, go on, start again, check, train; print what each took."""
    parser = argparse.ArgumentParser(prog="python -m tests.endless")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder, which is removed at the end")
    parser.add_argument("--steps", type=int, default=10, help="updates of the tiny preset at the end; 0 for none")
    options = parser.parse_args()
    corpus, cache, size = options.folder / "corpus", options.folder / "cache", int(options.gigabytes * 1e9)
    options.folder.mkdir(parents=True)
    try:
        write_corpus(corpus, size)
        made = sum(file.stat().st_size for file in corpus.iterdir())
        read = ["-c", READ, str(corpus), str(cache)]
        killed = run([*read, "0"], until=cache, share=size / 4)
        resumed = run([*read, "0"])
        train, held_out, _ = resumed.out.split("\n")[0].split()
        again = run([*read, "500"])
        check = run(["-m", "harness.commands.data", "check", str(cache)])
        shards = len(list(cache.glob("*/*-0*.npy")))
        rows = [
            ("build, killed by SIGKILL", killed, ""),
            ("build, gone on to its end", resumed, f"{int(train):,} + {int(held_out):,} tokens, {shards} shards"),
            ("start with what is built, 500 batches of 32 x 512", again, " and ".join(again.out.split()[2:]) + " s"),
            ("check of every hash", check, ""),
        ]
        if options.steps:
            flags = f"--preset tiny --steps {options.steps} --data.split hashed --sample_tokens 0 --save_every 1000"
            place = ["--data.corpus", str(corpus), "--data.cache_dir", str(cache), "--out", str(options.folder / "run")]
            rows.append((f"{options.steps} updates of tiny in JAX", run(["train_jax.py", *flags.split(), *place]), ""))
        both = killed.seconds + resumed.seconds
        print(f"{made:,} bytes of text in {both / 60:.1f} min, {made / both / 1e6:.2f} MB/s\n")
        print("| step | seconds | peak MiB | |\n|---|---:|---:|---|")
        for name, step, note in rows:
            print(f"| {name} | {step.seconds:.1f} | {step.peak:.0f} | {note} |")
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
