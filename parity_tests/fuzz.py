"""`python -m parity_tests.fuzz`: mutated files for every reader of foreign input, held against somebody else's reader.

Each input is read by a child process whose memory is bounded, in a folder of its own. A refusal in one line is right,
and so are the values that the other reader finds. A fault is anything else:

- traceback: an exception that the command line would not print as one line
- hang, crash: no answer in time, or the process died
- outside: a file written or read outside the folder, a program started, a connection
- differs: accepted, with other values than the other reader's
- accepts: accepted, though the other reader refuses
- refuses: a valid input, nothing wrong with it, refused

An input follows from (seed, target, number) alone; `--keep FOLDER` leaves the files of one input of each fault there.
With `--guided` (needs the package atheris) coverage of the readers guides the choices, and only the files tell them.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.cli import one_line
from harness.failures import USERS_MISTAKES
from parity_tests.fuzz_mutations import BY_SUFFIX, mutate_bytes

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10.0
"""An answer that takes longer is a hang."""
MEMORY = 3 * 2**30
"""Bytes that an input may make the process grow by."""
DEATHS = 25
"""Children that a target may cost before the rest of its inputs is left out."""
SLOW = 0.5
"""Seconds after which the other reader is not asked about what ours refused: it has no bound on time."""
KINDS = ("traceback", "hang", "crash", "outside", "differs", "accepts", "refuses")


Facts = dict[str, Any]


class NoOpinionError(Exception):
    """The other reader cannot be asked about this input."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One reader of foreign input. Its functions get a folder, which is also the current one."""

    name: str
    seeds: Callable[[Path], Iterator[None]]
    """Writes a valid input into the folder at each `next`."""
    mutable: tuple[str, ...]
    """Patterns of the files that are mutated."""
    ours: Callable[[Path], Facts]
    """Reads the folder as the project does; facts by name."""
    theirs: Callable[[Path, Facts], Facts]
    """The same facts as another library reads them, or what it raises. Gets ours too (none if refused), for what need
    not be equal but must lie within them."""
    share: float = 1.0
    """Inputs relative to the other targets', for what is slow."""


@dataclasses.dataclass
class Result:
    """What became of a target's inputs."""

    target: str
    inputs: int = 0
    refused: int = 0
    stricter: int = 0
    """Refused by ours alone."""
    equal: int = 0
    """Accepted by both, with the same values."""
    unknown: int = 0
    """Accepted by ours; the other reader could not be asked."""
    left_out: int = 0
    seconds: float = 0.0
    faults: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """Inputs by (kind, place)."""
    examples: dict[tuple[str, str], tuple[int, str, str]] = dataclasses.field(default_factory=dict)
    """Number, description and values of the input with the shortest description, by (kind, place)."""

    def add(self, number: int, said: str, answer: dict[str, Any]) -> None:
        """Count one input's answer."""
        self.inputs += 1
        name = answer["outcome"]
        if name in KINDS:
            fault = name, answer["place"]
            self.faults[fault] += 1
            if fault not in self.examples or len(said) < len(self.examples[fault][1]):
                self.examples[fault] = number, said, answer.get("values", "")
        else:
            setattr(self, name, getattr(self, name) + 1)
            self.refused += name == "stricter"


# The child


class Choices(random.Random):
    """Choices made by a fuzzer's bytes, and at random once they are used up."""

    def __init__(self, provider: Any) -> None:
        super().__init__(provider.remaining_bytes())
        self.provider = provider

    def random(self) -> float:
        return self.getrandbits(16) / 2**16

    def getrandbits(self, k: int) -> int:
        if self.provider.remaining_bytes() == 0:
            return super().getrandbits(k)
        return self.provider.ConsumeUInt((k + 7) // 8) & ((1 << k) - 1)


class Watch:
    """Sees, through Python's audit events, what is opened, removed or started while ours reads."""

    HARMLESS = tuple({str(ROOT), sys.prefix, sys.base_prefix, "/dev/null", "/dev/urandom", "/proc/", "/sys/", "/usr/"})
    CHANGES = "os.remove os.rename os.mkdir os.rmdir os.link os.symlink os.truncate os.chmod os.chown".split()
    STARTS = "subprocess.Popen os.system os.exec os.posix_spawn socket.connect socket.bind pickle.find_class".split()

    def __init__(self, allowed: Sequence[Path]) -> None:
        self.allowed, self.active, self.seen = tuple(map(str, allowed)), False, ""
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.active or self.seen:
            return
        if event == "subprocess.Popen" and arguments[0] == sys.executable:
            return  # a child of ours that bounds what a template does
        if event in self.STARTS:
            self.seen = f"{event} {arguments[:2]!r}"[:120]
        elif event in self.CHANGES:
            names = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            for name in filter(self.outside, names):
                self.seen = f"{event} {name!r}"[:120]
        elif event == "open" and self.outside(arguments[0]):
            writes = set(arguments[1] or "") & set("wax+") or (arguments[2] or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            if writes or not str(arguments[0]).startswith(self.HARMLESS):
                self.seen = f"{'written' if writes else 'read'}: {arguments[0]!r}"[:120]
        if self.seen:
            raise PermissionError(self.seen)

    def outside(self, name: Any) -> bool:
        if isinstance(name, int) or name is None:
            return False
        path = os.path.abspath(os.fsdecode(name))
        return path != "/dev/null" and not any(path == a or path.startswith(a + os.sep) for a in self.allowed)


def place_of(error: BaseException) -> str:
    """Type of an exception and the last line of ours that it passed."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    ours = [frame for frame in ours if "/parity_tests/" not in frame.filename and "/.venv" not in frame.filename]
    where = f" {Path(ours[-1].filename).relative_to(ROOT)} {ours[-1].name}" if ours else ""
    return type(error).__name__ + where


def answer(target: Target, folder: Path, watch: Watch, say: Any) -> dict[str, Any]:
    """Read one input by both readers: `outcome`, and for a fault its `place`."""
    begun, ours, refusal = time.monotonic(), {}, None
    watch.active, watch.seen = True, ""
    try:
        ours = target.ours(folder)
    except USERS_MISTAKES as error:
        refusal = error
    except Exception as error:
        if not watch.seen:
            return {"outcome": "traceback", "place": place_of(error)}
    finally:
        watch.active = False
    if watch.seen:
        return {"outcome": "outside", "place": watch.seen.replace(str(folder.parents[1]), "")}
    if refusal is not None:
        line = one_line(str(refusal))
        if not line.isprintable() or not line:
            return {"outcome": "traceback", "place": f"no line fit to print: {place_of(refusal)}"}
        if time.monotonic() - begun > SLOW:
            return {"outcome": "refused", "place": line}
    say("theirs")
    try:
        theirs = target.theirs(folder, ours)
    except (NoOpinionError, RecursionError, MemoryError):
        return {"outcome": "refused" if refusal else "unknown", "place": str(refusal)}
    except Exception as error:
        if refusal is not None:
            return {"outcome": "refused", "place": str(refusal)}
        said = " ".join(ascii(str(error).replace(str(folder), ""))[1:60].split())
        return {"outcome": "accepts", "place": f"{type(error).__name__}: {said}"}
    if refusal is not None:
        return {"outcome": "stricter", "place": str(refusal)}
    differing = [name for name in sorted({*ours, *theirs}) if not same(ours.get(name), theirs.get(name))]
    if not differing:
        return {"outcome": "equal"}
    name = differing[0]
    said = f"{name}" + (f" and {len(differing) - 1} more" if len(differing) > 1 else "")
    return {"outcome": "differs", "place": said, "values": parting(ours.get(name), theirs.get(name))}


def parting(ours: Any, theirs: Any) -> str:
    """Two values from where they first part."""
    a, b = ascii(ours), ascii(theirs)
    first = max(0, next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0) - 10)
    return f"ours {a[first : first + 60]}, theirs {b[first : first + 60]}"


def same(a: Any, b: Any) -> bool:
    """Equal, or both NaN."""
    return a == b or (a != a and b != b)


def seeds_of(target: Target, folder: Path) -> list[Path]:
    """The target's valid inputs, each in a folder of its own."""
    made, found = folder / "made", []
    made.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(made)
    for number, _ in enumerate(target.seeds(made)):
        found.append(Path(shutil.copytree(made, folder / str(number))))
    with contextlib.suppress(Exception):  # once without a watch: libraries import much of themselves when first asked
        target.theirs(made, target.ours(made))
    os.chdir(before)
    return found


def mutated(target: Target, seeds: Sequence[Path], case: Path, number: int, choose: random.Random) -> str:
    """Put a seed into the folder `case` with one to three things wrong, the first inputs with none; returns what."""
    shutil.rmtree(case, ignore_errors=True)
    seed = number if number < len(seeds) else choose.randrange(len(seeds))
    shutil.copytree(seeds[seed], case)
    if number < len(seeds):
        return f"seed {number} as it is"
    names = sorted({str(file.relative_to(case)) for pattern in target.mutable for file in case.glob(pattern)})
    said = []
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        file = case / choose.choice(names)
        data, what = BY_SUFFIX.get(file.suffix, mutate_bytes)(file.read_bytes(), choose)
        file.write_bytes(data)
        said.append(f"{file.relative_to(case)}: {what}")
    return f"seed {seed}, " + "; ".join(said)


def child() -> None:
    """Answer for the inputs that standard input asks for, and write what happens to a report line by line."""
    work = json.load(sys.stdin)
    root = Path(work["root"])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    os.environ |= dict.fromkeys(["TMPDIR", "MPLCONFIGDIR"], str(root / "tmp"))
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    stderr = os.fdopen(os.dup(2), "w", encoding="utf-8")
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the process's life)
    atheris = importlib.import_module("atheris") if work["guided"] else None
    with atheris.instrument_imports(include=["recipe", "harness"]) if atheris else contextlib.nullcontext():
        targets = importlib.import_module(work["module"]).TARGETS
    case, file = root / "case" / "folder", os.open(root / "report", os.O_WRONLY | os.O_APPEND)
    watch = Watch([case, root / "tmp"])

    def say(**line: Any) -> None:
        os.write(file, json.dumps(line).encode() + b"\n")

    def one(target: Target, seeds: Sequence[Path], number: int, choose: random.Random) -> None:
        said = mutated(target, seeds, case, number, choose)
        bound_memory()
        say(target=target.name, number=number, said=said, phase="ours")
        faulthandler.dump_traceback_later(work["seconds"], exit=True, file=stderr)
        os.chdir(case)
        begun = time.monotonic()
        found = answer(target, case, watch, lambda phase: say(phase=phase))
        faulthandler.cancel_dump_traceback_later()
        os.chdir(root)
        if number < len(seeds) and found["outcome"] in ("refused", "stricter"):
            found["outcome"] = "refuses"
        fault = found["outcome"], found.get("place")
        if work["keep"] and found["outcome"] in KINDS and fault not in kept:
            shutil.copytree(case, Path(work["keep"]) / f"{target.name}-{number}", dirs_exist_ok=True)
        kept.add(fault)
        say(answer=found, seconds=time.monotonic() - begun)

    kept: set[tuple[str, str | None]] = set()
    for name, first, count in work["inputs"]:
        seeds = seeds_of(targets[name], root / name)
        if atheris is None:
            for number in range(first, first + count):
                one(targets[name], seeds, number, random.Random(f"{work['seed']} {name} {number}"))
            continue
        numbers = iter(range(first, first + count))

        def guided(data: bytes, name=name, seeds=seeds, numbers=numbers) -> None:
            number = next(numbers, None)
            if number is None:
                say(done=True)
                os._exit(0)
            one(targets[name], seeds, number, Choices(atheris.FuzzedDataProvider(data)))

        flags = [
            "-max_len=512",
            "-len_control=0",
            "-timeout=86400",
            "-rss_limit_mb=0",
            f"-seed={work['seed'] + first + 1}",
        ]
        atheris.Setup([sys.argv[0], *flags], guided)
        atheris.Fuzz()  # does not come back
    say(done=True)


def bound_memory() -> None:
    """Let the process grow by MEMORY and no more."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


# The parent


def fuzz(
    names: Sequence[str],
    inputs: int,
    *,
    seed: int = 0,
    keep: Path | None = None,
    guided: bool = False,
    module: str = "parity_tests.fuzz_targets",
    seconds: float = SECONDS,
) -> list[Result]:
    """Try `inputs` mutated inputs on each target (fewer on a slow one), in a child that begins anew where one dies.

    `module` has the `TARGETS`; an input that takes `seconds` is a hang.
    """
    targets = importlib.import_module(module).TARGETS
    options = {
        "seed": seed,
        "guided": guided,
        "module": module,
        "seconds": seconds,
        "keep": keep and str(keep.resolve()),
    }
    work = [(name, 0, max(1, round(inputs * targets[name].share))) for name in names]
    results = {name: Result(name) for name in names}
    deaths: Counter[str] = Counter()
    while work:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            root = Path(folder)
            report, errors = root / "report", root / "errors"
            report.touch()
            (root / "tmp").mkdir()
            task = options | {"root": folder, "inputs": work[:1] if guided else work}
            with errors.open("w", encoding="utf-8") as stderr:
                command = [sys.executable, "-c", "from parity_tests import fuzz; fuzz.child()"]
                code = subprocess.run(command, input=json.dumps(task), text=True, stderr=stderr, cwd=ROOT).returncode
            lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
            said = errors.read_text(encoding="utf-8", errors="replace")
            last = read_report(lines, results)
            if keep is not None and lines and lines[-1].get("phase") == "ours" and last is not None:
                to = keep / f"{last['target']}-{last['number']}"
                shutil.copytree(root / "case" / "folder", to, dirs_exist_ok=True)
        if lines and "done" in lines[-1]:
            work = work[1:] if guided else []
            continue
        if last is None:
            raise RuntimeError(f"the child ended with {code} before its first input:\n{said[-3000:]}")
        name, number = last["target"], last["number"]
        if lines[-1].get("phase") == "ours":
            kind = "hang" if "Timeout (" in said else "crash"
            results[name].add(number, last["said"], {"outcome": kind, "place": place_in(said) or f"exit {code}"})
        elif "phase" in lines[-1]:
            results[name].add(number, last["said"], {"outcome": "unknown"})
        deaths[name] += 1
        while work[0][0] != name:
            work.pop(0)
        _, begin, count = work.pop(0)
        left = begin + count - number - 1
        if deaths[name] > DEATHS:
            results[name].left_out = left
        elif left:
            work.insert(0, (name, number + 1, left))
    return list(results.values())


def read_report(lines: Sequence[dict[str, Any]], results: dict[str, Result]) -> dict[str, Any] | None:
    """Count the answers in a child's report; returns its last input."""
    last = None
    for line in lines:
        if "target" in line:
            last = line
        elif "answer" in line and last is not None:
            results[last["target"]].add(last["number"], last["said"], line["answer"])
            results[last["target"]].seconds += line["seconds"]
    return last


def place_in(said: str) -> str:
    """The innermost line of ours in what faulthandler wrote."""
    for line in said.splitlines():
        if f'File "{ROOT}' in line and "/parity_tests/" not in line and "/.venv" not in line:
            file, _, rest = line.strip().removeprefix(f'File "{ROOT}/').partition('"')
            return f"{file} {rest.rpartition(' in ')[2]}"
    return ""


def table(results: Sequence[Result]) -> Iterator[str]:
    """The counts, then each fault with the shortest example."""
    yield (
        f"{'target':<10} {'inputs':>7} {'refused':>8} {'stricter':>8} {'equal':>7} {'unknown':>7} "
        + " ".join(f"{kind:>9}" for kind in KINDS)
        + f" {'places':>6} {'ms each':>7}"
    )
    for r in results:
        kinds = [sum(count for (kind, _), count in r.faults.items() if kind == each) for each in KINDS]
        each = 1e3 * r.seconds / max(1, r.inputs)
        yield (
            f"{r.target:<10} {r.inputs:>7,} {r.refused:>8,} {r.stricter:>8,} {r.equal:>7,} {r.unknown:>7,} "
            + " ".join(f"{count:>9,}" for count in kinds)
            + f" {len(r.faults):>6} {each:>7.1f}"
            + (f"  {r.left_out:,} left out after {DEATHS} deaths" if r.left_out else "")
        )
    for r in results:
        yield from faults(r)


def faults(result: Result) -> Iterator[str]:
    """A target's faults, the most frequent first."""
    for (kind, place), count in result.faults.most_common():
        number, said, values = result.examples[kind, place]
        yield f"{result.target}: {kind}, {count:,} times: {place}\n    e.g. number {number}: {said}"
        if values:
            yield f"    {values}"


def main() -> int:
    """Exit code 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", help="one of the targets, may be repeated; all without it")
    parser.add_argument("--inputs", type=int, default=10_000, help="mutated inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of one input of each fault")
    parser.add_argument("--guided", action="store_true", help="coverage-guided choices; needs atheris")
    options = parser.parse_args()
    targets = importlib.import_module("parity_tests.fuzz_targets").TARGETS
    found = []
    for name in options.target or targets:
        found += fuzz([name], options.inputs, seed=options.seed, keep=options.keep, guided=options.guided)
        print(f"{name}: {found[-1].inputs:,} inputs, {found[-1].faults.total():,} faulty", file=sys.stderr, flush=True)
    print("\n".join(table(found)))
    return int(any(result.faults for result in found))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
