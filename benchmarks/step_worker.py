"""The loop of a process that times somebody's own training step. Imports no framework.

The function that is timed is called once, without arguments: it builds what the step needs and returns the step, or
the step and a dict of facts about it (`Facts`). The step is then called without arguments, one update a call.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.worker import HasMemory, answer_commands, memory_commands, reply_channel
from recipe.config import UserError, require
from recipe.contract import NOT_THERE, PrecisionContract

NOT_STATED = "not stated"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a function may say of its step."""

    items: float | None = None
    """What one step works through: tokens, images, rows."""
    unit: str = "items"
    dtype: str = NOT_STATED
    """Dtype that it computes in, as float32."""
    flops: float | None = None
    """Operations of one step, a multiply-add counting two."""

    def __post_init__(self) -> None:
        for name in ("items", "flops"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(
                value is None or (number and 0 < value < math.inf),
                f"{name}={value!r} of a step is not a positive number; give a number such as 4096.",
            )
        for name in ("unit", "dtype"):
            value = getattr(self, name)
            require(
                isinstance(value, str) and bool(value), f"{name}={value!r} of a step is not a text; write 'float32'."
            )


@dataclasses.dataclass(frozen=True)
class StepContract(PrecisionContract):
    """What a step computes with and on how much; what only its author knows is `NOT_THERE`."""

    dtype: str = NOT_STATED
    items: str = NOT_STATED
    unit: str = NOT_THERE


class Framework(HasMemory, Protocol):
    """What the framework says of this process and of what has run in it."""

    def describe(self) -> dict[str, str]:
        """Fields of `PrecisionContract`: framework, backend, device, params, matmul, x64, threads."""

    def wait(self, result: Any) -> None:
        """Until all that was started is finished, the result of the last step included."""


def load(reference: str) -> Callable[[], Any]:
    """The function that MODULE:FUNCTION or FILE.py:FUNCTION names; a file is run as a module of another name than
    `__main__`, so what stands under `if __name__ == "__main__"` is left out."""
    source, _, name = reference.rpartition(":")
    if source.endswith(".py"):
        file = Path(source).resolve()
        sys.path.insert(0, str(file.parent))  # as Python does for a script
        spec = importlib.util.spec_from_file_location(f"timed_{file.stem}", file)
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
    else:
        top = source.partition(".")[0]
        known = importlib.util.find_spec(top) is not None
        require(known, f"there is no module {top}; run where it lies, set PYTHONPATH, or write FILE.py:{name}.")
        found = importlib.import_module(source)
    for part in name.split("."):
        require(hasattr(found, part), f"{reference} does not exist: {source} has no {name}; name a function in it.")
        found = getattr(found, part)
    return found


def build(reference: str, items: float | None) -> tuple[Callable[[], Any], Facts]:
    """Call the function; its step, and what it says of it. `items` is for a step that does not say how many it has."""
    made = load(reference)()
    step, said = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    require(
        callable(step),
        f"{reference}() returned {type(step).__name__}, not a step; let it return a function that does one update "
        "a call, alone or with a dict of facts.",
    )
    require(isinstance(said, Mapping), f"{reference}() returned {type(said).__name__} beside its step; make it a dict.")
    known = [field.name for field in dataclasses.fields(Facts)]
    for name in said:
        near = difflib.get_close_matches(str(name), known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        require(name in known, f"{reference}() states {name!r}; {meant}Known are {', '.join(known)}.")
    return step, Facts(**{"items": items} | said)


def loss_of(result: Any) -> float | None:
    """The loss in what a step returned: the number itself, the only one in a tuple, or what a dict calls so."""
    value = result.get("loss") if isinstance(result, Mapping) else result
    if isinstance(value, tuple | list):
        numbers = [one for one in value if _is_number(one)]
        value = numbers[0] if len(numbers) == 1 else None
    if not _is_number(value):
        return None
    return float(value.detach() if hasattr(value, "detach") else value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or getattr(value, "ndim", None) == 0


class Stepper:
    """One step in this process, and the commands of its driver."""

    step: Callable[[], Any]
    facts: Facts

    def __init__(self, framework: Framework, job: Mapping[str, Any]) -> None:
        self.framework, self.reference, self.items = framework, job["reference"], job["items"]
        # The driver's clock reading: on Linux this clock is the machine's, the same in every process.
        self.launched = job["launched"]

    def start(self, _) -> dict[str, Any]:
        """Build the step: its contract, its facts, the seconds since the process was started."""
        self.step, self.facts = build(self.reference, self.items)
        seconds = time.perf_counter() - self.launched
        return self.contract({}) | {"facts": dataclasses.asdict(self.facts), "start_seconds": seconds}

    def contract(self, _) -> dict[str, dict[str, str]]:
        """What the step computes with, as the process shows it now."""
        facts = self.facts
        unknown = dict.fromkeys((field.name for field in dataclasses.fields(PrecisionContract)), NOT_THERE)
        stated = {"dtype": facts.dtype, "items": NOT_STATED if facts.items is None else f"{facts.items:g}"}
        stated |= {"unit": facts.unit, "side": self.reference}
        return {"contract": dataclasses.asdict(StepContract(**unknown | self.framework.describe() | stated))}

    def run(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Time so many updates, the last one finished before the clock stops."""
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(command["updates"]):
            result = self.step()
        self.framework.wait(result)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu_seconds": cpu, "loss": loss_of(result)}

    def guarded(self, do: Callable[[dict], dict]) -> Callable[[dict], dict]:
        """The command, but what its author got wrong is one line to the driver, the traceback on stderr."""

        def safely(command: dict) -> dict:
            try:
                return do(command)
            except UserError as error:
                return {"refused": str(error)}
            except Exception as error:
                traceback.print_exc()
                said = f"{type(error).__name__}: {error}"
                return {"refused": f"{self.reference} raised {said}; its traceback stands above."}

        return safely


def serve(framework: Framework) -> None:
    """Read the job from stdin, and then commands."""
    reply = reply_channel()
    job = json.loads(sys.stdin.readline())
    os.chdir(job["cwd"])
    sys.path += [path for path in job["path"] if path not in sys.path]
    stepper = Stepper(framework, job)
    commands = {"start": stepper.start, "run": stepper.run, "contract": stepper.contract, **memory_commands(framework)}
    answer_commands(reply, {name: stepper.guarded(do) for name, do in commands.items()})
