"""Steps without a framework, and a worker that times them: `benchmarks.pair` without JAX's and torch's seconds.

`python -m tests.plain_steps` is the worker.
"""

import os

from benchmarks.step_worker import serve

SETTINGS = {"matmul": "float32"}
FACTS = {"items": 4, "unit": "rows", "dtype": "float32", "flops": 8.0}


class Plain:
    """A framework that computes nothing; the process says what it would."""

    waited = 0

    def describe(self) -> dict[str, str]:
        known = {"framework": f"plain {os.getpid()}", "backend": "cpu", "device": "cpu", "params": "float32"}
        return known | {"x64": "False", "threads": "1"} | SETTINGS

    def wait(self, result) -> None:
        Plain.waited += 1

    def device_peak_bytes(self) -> None:
        return None

    def reset_device_peak(self) -> None:
        """There is none."""


def counting(facts=FACTS):
    """A step whose loss is how often it was called."""
    calls = 0

    def step():
        nonlocal calls
        calls += 1
        return {"loss": float(calls), "waited": Plain.waited}

    return step, facts


def silent():
    return lambda: None


def more_items():
    return counting(FACTS | {"items": 8})


def failing():
    raise RuntimeError("no such data")


def failing_later():
    def step():
        raise RuntimeError("out of luck")

    return step, FACTS


def narrowing():
    """Computes with another precision from its first update on."""

    def step():
        SETTINGS["matmul"] = "TF32"

    return step, FACTS


def takes_an_argument(x):
    return lambda: x


def printing():
    print("this is no reply")
    return counting()


if __name__ == "__main__":
    from tests import plain_steps  # the module that the steps are found in, and whose settings they change

    serve(plain_steps.Plain())
