"""Requests to stop a run: signals, and the end of its time. Standard library only."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time


class StopRequest:
    """Notes SIGINT, SIGTERM, SIGUSR1 (Slurm's warning) and the end of a run's time, for the loop to look at.

    A second SIGINT ends the process at once, whatever it is doing; so does a SIGTERM after one among ranks.

    Args:
        max_minutes: from here on, None: no end.
        among_ranks: a SIGTERM that is not even noted ends the process, before torchrun would kill it: it waits in a
            collective for a rank that is gone, where Python's handlers do not run.
    """

    TIME_IS_UP = 1  # below every signal that is noted
    GRACE = 25.0  # seconds; torchrun kills after 30, or after what this variable says
    if (_seconds := os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")).isdecimal():
        GRACE = max(0.0, float(_seconds) - 5)

    def __init__(self, max_minutes: float | None = None, among_ranks: bool = False):
        self.signal: int | None = None
        self.end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._among_ranks, self._parent = among_ranks, os.getppid()
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _note(self, number: int, frame) -> None:
        self.signal = number

    def _watch(self) -> None:
        """The system writes each signal's number to the socket when it comes, also while the main thread waits in C."""
        interrupts = 0
        with self._reader:
            while number := self._reader.recv(1):
                # torchrun passes its first Ctrl-C on as it is, the second as SIGTERM
                again = self._among_ranks and interrupts and number[0] == signal.SIGTERM
                interrupts += bool(again) or number[0] == signal.SIGINT
                if interrupts == 2:
                    os.write(2, b"interrupted twice: leaving at once; earlier checkpoints stay\n")
                    os._exit(128 + signal.SIGINT)
                if number[0] == signal.SIGTERM and self._among_ranks:
                    grace = threading.Timer(self.GRACE, self._leave_unless_noted)
                    grace.daemon = True
                    grace.start()

    def _leave_unless_noted(self) -> None:
        if self.signal is None:
            os._exit(128 + signal.SIGTERM)

    def reason(self) -> int:
        """What asks the loop to end: a signal's number, TIME_IS_UP, or 0 for nothing."""
        if self._among_ranks and os.getppid() != self._parent:  # torchrun is gone, and nobody could stop us
            return signal.SIGTERM
        return self.signal or (self.TIME_IS_UP if time.monotonic() >= self.end else 0)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # ends the thread
