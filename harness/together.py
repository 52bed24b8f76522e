"""What the processes of one run do at the same moments: meet, compare, stop, and end if one is lost."""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from harness.failures import RunFailed, exit_code
from harness.interruption import Interruption
from harness.peers import LOST, Peers, end_at_once
from recipe.config import require
from recipe.reading import some


class Together:
    """A run's side of its peers; of a run of one process nothing here waits or sends."""

    def __init__(self, peers: Peers, interruption: Interruption, remedy: Callable[[], str]) -> None:
        """`remedy()` says how to go on with the run as it is by then."""
        self.peers, self.interruption, self.remedy = peers, interruption, remedy

    @contextlib.contextmanager
    def stretch(self) -> Iterator[None]:
        """A stretch at whose end the processes meet, also those that it failed in: all of them go on, or all leave."""
        try:
            yield
        except Exception as error:
            if self.peers.lost(error) is None:
                self.peers.agree(exit_code(error))
                self.peers.part()
            raise
        if code := self.peers.agree(0):
            self.peers.part()
            print("stopped: another process of this run refused to go on, and says why", file=sys.stderr)
            raise SystemExit(code)

    @contextlib.contextmanager
    def unless_lost(self) -> Iterator[None]:
        """End the process at once if what it does breaks off because another process is lost."""
        try:
            yield
        except RunFailed:  # in all of them
            raise
        except Exception as error:
            reason = self.peers.lost(error)
            if reason is not None:
                end_at_once(*self.last_words(reason))
            raise

    def last_words(self, reason: str) -> tuple[int, str]:
        """Exit code and line of a process that lost another one, or that a signal had told to stop before."""
        me, interruption = f"process {self.peers.index} of {self.peers.count}", self.interruption
        if interruption.signal is not None:
            name, code = signal.Signals(interruption.signal).name, 128 + interruption.signal
            return code, f"{me}: stopped by {name} {interruption.where}; {self.remedy()}"
        return LOST, f"{me}: lost a peer {interruption.where} ({reason}); {self.remedy()}"

    def compare(self, what: str, value: Callable[[], str]) -> None:
        """Raise UserError in a process that has another one of this than the chief; a configuration is a JSON object
        of its fields, and those that differ are named.
        """
        if self.peers.count == 1:
            return
        mine = value()
        chiefs = self.peers.tell(mine)
        said = ""
        if mine != chiefs and what == "configuration":
            old, new = json.loads(chiefs), json.loads(mine)
            differing = [name for name in new if old.get(name) != new[name]]
            said = f": {some(f'{name}={new[name]} and not {old.get(name)}' for name in differing)}"
        require(
            mine == chiefs,
            f"process {self.peers.index} has another {what} than process 0{said}; start all processes of a run "
            "with the same flags, on the same text.",
        )

    def stopping(self) -> bool:
        """Whether a signal has come, to any process: all ask at the same moments."""
        number = self.peers.agree(self.interruption.signal or 0)
        if number:
            self.interruption.take_over(number)
        return number != 0

    def leave(self) -> NoReturn:
        """End the run as a signal asked, in all processes; the chief says how to go on."""
        self.peers.part()
        if self.peers.is_chief:
            self.interruption.leave()
        raise SystemExit(128 + (self.interruption.signal or 0))
