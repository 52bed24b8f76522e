"""Runs of the real trainers in processes of their own, to be killed: how they are begun, gone on with, and compared.

A process that has imported a framework and runs nothing (`python -m tests.survival`) forks one for each command, so
that a run costs no imports. It has one thread, and JAX has not begun in it.
"""

import contextlib
import importlib
import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from harness.manifest import MANIFEST, RUN
from harness.runlog import read_metrics
from harness.state import state_folders
from recipe.reading import read_json

ROOT = Path(__file__).resolve().parents[1]
SMALL = """--accumulation 1 --batch_size 2 --sequence_length 16 --prompts the --sample_tokens 2
--model.hidden_size 16 --model.intermediate_size 20 --model.num_hidden_layers 1 --model.num_attention_heads 2
--model.num_key_value_heads 1 --model.head_dim 6 --model.vocab_size 384 --model.dropout 0.1
--data.bpe_vocab_size 384 --data.validation_tokens 64""".split()
"""Flags of the smallest run that has every part of a large one."""
IMPORTED = {
    "train_jax.py": ("jax_impl.train", "harness.commands.train", "matplotlib.figure"),
    "train_torch.py": ("torch_ref.train", "torch._inductor", "harness.commands.train", "matplotlib.figure"),
}
"""What a run imports, by script, and most of what it waits for."""
KEPT = re.compile(
    r"run\.json|(metrics|undone)\.jsonl|best(-undone-\d+)?|last|earlier|loss\.png|samples\.txt|last-damaged-\d+"
)
"""What the folder of a run that is done may hold."""
OF_THE_CLOCK = {"tok_s", "dt_ms", "seconds"}
OF_THE_STATE = ("updates", "skipped", "position", "best_validation_loss", "training_text", "rollbacks")


def write_corpus(folder: Path) -> Path:
    """A small text in six files, in a folder that is made."""
    words = "the quick brown fox jumps over the lazy dog and runs away into the dark green forest".split()
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(6):
        lines = [" ".join(generator.choice(words, 9)) + "." for _ in range(40)]
        (folder / f"{index}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def settings(cache: Path) -> dict[str, str]:
    """The environment of a command: one compute thread, no network, everything compiled kept."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "QWEN_FROM_SCRATCH_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


class Child(NamedTuple):
    """A command under way."""

    pid: int
    handle: int
    """A descriptor that can be read once it has ended."""
    log: Path
    """Its output and its errors."""

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it ends within that time."""
        return bool(select.select([self.handle], [], [], seconds)[0])

    def signal(self, number: int) -> None:
        """Send it a signal; its number is nobody else's until its exit code has been asked for."""
        os.kill(self.pid, number)


class Nursery:
    """Runs commands in children of a process that has imported what they need; a context manager."""

    def __init__(self, logs: Path, cache: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._count = logs, 0
        self._running: set[Child] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.survival"], cwd=ROOT, env=settings(cache), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, *argv: str) -> Child:
        """Begin `python ARGV`: a script of the project's root, or -m and a module."""
        self._count += 1
        log = self._logs / f"{self._count}.txt"
        pid = self._ask({"argv": argv, "log": str(log)})
        child = Child(pid, os.pidfd_open(pid), log)
        self._running.add(child)
        return child

    def exit_code(self, child: Child) -> int:
        """Its exit code, once it has ended; negative for a signal's number. To be asked for once."""
        code = self._ask({"pid": child.pid})
        os.close(child.handle)
        self._running.discard(child)
        return code

    def run(self, *argv: str) -> tuple[int, str]:
        """Exit code and output, errors among it, of a command that is waited for."""
        child = self.start(*argv)
        return self.exit_code(child), child.log.read_text(encoding="utf-8")

    def _ask(self, request: dict) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_) -> None:
        for child in self._running:
            child.signal(signal.SIGKILL)
            os.close(child.handle)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    """Fork a child for each request to start one, and tell how children have ended."""
    for line in sys.stdin:
        request = json.loads(line)
        if "argv" in request:
            for name in IMPORTED.get(request["argv"][0], ()):
                importlib.import_module(name)
            threads = len(os.listdir("/proc/self/task"))
            assert threads == 1, f"{threads} threads: a fork carries over but one"
            answer = os.fork()
            if answer == 0:
                _become(request["argv"], request["log"])
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
        print(json.dumps(answer), flush=True)


def _become(argv: Sequence[str], log: str) -> NoReturn:
    """Be the command, in a child, and end."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nowhere, 0), (handle, 1), (handle, 2)):
        os.dup2(descriptor, target)
    code: object = 1
    try:
        if argv[0] == "-m":
            sys.argv = list(argv[1:])
            sys.modules.pop(argv[1], None)
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(argv)
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def measured(run: Path) -> list[dict]:
    """The records of a run without the clock's part, and without those of its resumptions."""
    records = [record for record in read_metrics(run) if record["kind"] != "resume"]
    return [{name: value for name, value in record.items() if name not in OF_THE_CLOCK} for record in records]


def leftovers(run: Path) -> list[str]:
    """What lies in the folder of a run that is done and should not."""
    hidden = [path.relative_to(run).as_posix() for path in run.rglob(".*")]
    return sorted({*hidden, *(path.name for path in run.iterdir() if not KEPT.fullmatch(path.name))})


def differences(run: Path, expected: Path) -> list[str]:
    """In what two runs that are done differ: records, states, best weights byte for byte, samples; none if in nothing.

    Left out are clocks, and what names the process.
    """
    found = [] if measured(run) == measured(expected) else ["records"]
    folders = [{path.relative_to(one).as_posix(): path for path in _folders(one)} for one in (run, expected)]
    if folders[0].keys() != folders[1].keys():
        found.append(f"{sorted(folders[0])} instead of {sorted(folders[1])}")
    for name in sorted(folders[0].keys() & folders[1].keys()):
        found += [f"{name}/{file}" for file in _differing(folders[0][name], folders[1][name])]
    samples = [(one / "samples.txt").read_bytes() for one in (run, expected)]
    found += ["samples.txt"] * (samples[0] != samples[1])
    found += [f"{name} is left" for name in leftovers(run)]
    return found


def _folders(run: Path) -> Iterator[Path]:
    yield from (run / "best", *state_folders(run))


def _differing(folder: Path, expected: Path) -> Iterator[str]:
    """Files in which two folders of weights differ."""
    files = [{path.relative_to(one).as_posix(): path for path in one.rglob("*")} for one in (folder, expected)]
    yield from sorted(files[0].keys() ^ files[1].keys())
    for name in sorted(files[0].keys() & files[1].keys()):
        one, other = (of[name] for of in files)
        if name in (RUN, MANIFEST):
            said = [
                {key: read_json(file).get(key) for key in (*OF_THE_STATE, "step", "validation_loss")}
                for file in (one, other)
            ]
            if said[0] != said[1]:
                yield name
        elif one.is_file() and _without_title(one) != _without_title(other):
            yield name


def _without_title(file: Path) -> bytes:
    """A file's bytes; of a model card without its heading, which is the name of the run's folder."""
    data = file.read_bytes()
    return re.sub(rb"(?m)^# .*$", b"", data, count=1) if file.name == "README.md" else data


if __name__ == "__main__":
    _serve()
