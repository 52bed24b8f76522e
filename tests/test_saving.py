"""The thread that saves: one job at a time, its errors raised in the main thread, given up only if that is wanted."""

import threading

import numpy as np
import pytest

from harness.saving import LazyArrays, Saver


def fail() -> None:
    raise OSError("no room")


def finish(saver: Saver) -> None:
    """Let the job under way end without asking how."""
    assert saver._thread is not None
    saver._thread.join()


def test_jobs_run_one_after_another_beside_the_main_thread():
    begun, go_on, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go_on.wait()
        done.append(("first", threading.current_thread() is threading.main_thread()))

    with Saver() as saver:
        saver.submit(first)
        begun.wait()
        saver.look()  # waits for nothing
        assert saver.busy and not done
        threading.Timer(0.05, go_on.set).start()
        saver.submit(lambda: done.append(("second", len(done))))
    assert done == [("first", False), ("second", 1)] and not saver.busy


@pytest.mark.parametrize(
    "ask", [Saver.wait, Saver.look, lambda saver: saver.submit(fail)], ids=["wait", "look", "submit"]
)
def test_what_a_job_raises_is_raised_once(ask):
    with Saver() as saver:
        saver.submit(fail)
        finish(saver)
        with pytest.raises(OSError, match="no room"):
            ask(saver)
        saver.wait()


def test_the_end_of_the_block_waits_and_raises():
    with pytest.raises(OSError, match="no room"), Saver() as saver:
        saver.submit(fail)


def test_an_error_of_the_main_thread_is_not_replaced_by_the_jobs():
    with pytest.raises(ZeroDivisionError), Saver() as saver:
        saver.submit(fail)
        raise ZeroDivisionError


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_a_job_under_way_is_finished_however_the_block_is_left(error):
    leaving, read = threading.Event(), []

    def array(name: str) -> np.ndarray:
        leaving.wait()
        read.append(name)
        return np.zeros(2)

    arrays = LazyArrays({"a": (2,), "b": (2,)}, array)
    with pytest.raises(error), Saver() as saver:
        saver.submit(lambda: dict(arrays))
        threading.Timer(0.05, leaving.set).start()
        raise error
    assert read == ["a", "b"]
