"""Stand-in."""

import contextlib
import signal
import sys


class Interruption:
    def __init__(self):
        self.signal = None
        self.remedy = self.where = ""
        self.now = False

    def __enter__(self):
        self._handlers = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *args):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self):
        yield

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, self._handlers[number])
        print("stopping after this update; once more stops at once", file=sys.stderr)

    def leave(self):
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
