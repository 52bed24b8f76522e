"""JAX's processes of one run: how they find each other, agree, and end.

`jax.distributed` connects them: a service in process 0, to which each sends heartbeats. Its client ends a process by
abort() once the service reports a lost one or is gone itself; Python hears nothing of that, so a handler of SIGABRT
has the last word. What they agree on goes through the devices' own collectives, which a dead peer breaks at once.
"""

import atexit
import contextlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from harness.failures import MISTAKEN, exit_code
from harness.peers import ALONE, LastWords, Peers, hush
from recipe.config import HostsConfig, UserError, require
from recipe.reading import short

JOIN = 300
"""Seconds in which all processes must have come."""
PART = 60
"""Seconds in which the service takes leave of all of them; they have waited for each other before."""
OF_A_PEER = re.compile(
    "gloo|nccl|socket|connection|coordination|heartbeat|barrier|another task|peer"
    "|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED",
    re.IGNORECASE,
)
"""In the texts of errors that a lost process causes in the others."""
_WORDS = LastWords()
ABORTED = "JAX's runtime ended this process, and says why above"


class Processes:
    """`harness.peers.Peers` by JAX's collectives over all devices."""

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self.parted = False

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def agree(self, value: int) -> int:
        return int(np.max(multihost_utils.process_allgather(np.int32(value))))

    def tell(self, text: str) -> str:
        said = np.frombuffer(text.encode(), np.uint8)
        length = self.agree(len(said) if self.is_chief else 0)
        padded = np.zeros(length, np.uint8)
        if self.is_chief:
            padded[:] = said
        return multihost_utils.broadcast_one_to_all(padded).tobytes().decode()

    def wait(self, name: str) -> None:
        multihost_utils.sync_global_devices(name)

    def part(self) -> None:
        if not self.parted:
            self.wait("part")  # has no time limit; the service's own leave has
            self.parted = True
            with contextlib.suppress(Exception):
                jax.distributed.shutdown()
            _WORDS.forget()

    def lost(self, error: BaseException) -> str | None:
        text = str(error)
        # What a collective raises where its result is read is a ValueError.
        named = isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]+: ", text)
        return _one_line(text) if named and OF_A_PEER.search(text) else None

    def expect(self, last_words: Callable[[str], tuple[int, str]]) -> None:
        _WORDS.say(lambda: last_words(ABORTED))


def meet(name: str) -> None:
    """Wait until all processes of the run are here, if there are several.

    The first collective of some devices gives its processes 30 s to come, on a CPU; the later ones any time.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def joined(hosts: HostsConfig) -> Iterator[Peers]:
    """The peers of this process while the block runs, `ALONE` without `hosts.coordinator`.

    A process that leaves by an error ends without waiting for the others, whose next collective then breaks.
    """
    peers = join(hosts)
    try:
        yield peers
    except BaseException as error:
        if isinstance(peers, Processes) and not peers.parted:
            atexit.register(_leave, exit_code(error))
        raise
    peers.part()


def _leave(code: int) -> None:
    """End before JAX's own handlers of the end, which wait for all processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def join(hosts: HostsConfig) -> Peers:
    """Connect with the other processes, before JAX's backend is used; UserError if they cannot be found."""
    if not hosts.coordinator:
        return ALONE
    auto = hosts.coordinator == "auto"
    if not auto:
        _check_address(hosts)
    # The service for preemptions would take SIGTERM, which harness/interruption.py answers.
    jax.config.update("jax_enable_preemption_service", False)
    # Of other backends it moves nothing.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _WORDS.say(lambda: (MISTAKEN, f"error: {_not_met(hosts)}"))
    try:
        jax.distributed.initialize(
            None if auto else hosts.coordinator,
            hosts.count,
            hosts.index,
            initialization_timeout=JOIN,
            heartbeat_timeout_seconds=hosts.heartbeat,
            shutdown_timeout_seconds=PART,
        )
        peers = Processes()
        require(not auto or peers.count > 1, "--hosts.coordinator auto found one process; leave it out.")
        peers.agree(0)  # Whoever is late now is late for JAX too, which waits 30 s for the first meeting.
    except (RuntimeError, ValueError, OSError, ImportError, KeyError) as error:
        _WORDS.forget()
        if isinstance(error, UserError):
            raise
        raise UserError(_no_cluster(error) if auto else f"{_not_met(hosts)} ({_one_line(str(error))})") from None
    hush(peers)
    return peers


def _check_address(hosts: HostsConfig) -> None:
    """Raise UserError for an address that names no port or no machine: JAX would wait for it."""
    name, _, port = hosts.coordinator.rpartition(":")
    wrong = "" if port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16 else "its port is none"
    if not wrong:
        try:
            socket.getaddrinfo(name.strip("[]"), int(port))
        except (OSError, UnicodeError):
            wrong = "no machine of that name is known here"
    require(
        not wrong,
        f"--hosts.coordinator {short(hosts.coordinator)} cannot be reached: {wrong}; give ADDRESS:PORT of process 0.",
    )


def _not_met(hosts: HostsConfig) -> str:
    address = short(hosts.coordinator)
    who = f"process {hosts.index} of {hosts.count}" if hosts.count else "this process"
    return (
        f"--hosts.coordinator {address}: {who} did not meet the others within {JOIN} s; start all of them, each with "
        "its own --hosts.index, with an address of process 0's machine and a port that is free there"
    )


def _no_cluster(error: Exception) -> str:
    reason = _one_line(str(error))
    found = "" if "should be defined" in reason or "must be defined" in reason else f" ({reason})"
    return (
        f"--hosts.coordinator auto found no cluster of SLURM, Open MPI, GKE or a TPU pod{found}; give "
        "--hosts.coordinator ADDRESS:PORT, --hosts.count and --hosts.index."
    )


def _one_line(text: str) -> str:
    return short(" ".join(text.split()).rstrip("."), 300)
