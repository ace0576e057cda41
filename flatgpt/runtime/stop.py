"""Requests to stop a run: signals and the time limit. Standard library only."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time


class StopRequest:
    """Records SIGINT, SIGTERM, SIGUSR1 (Slurm's warning) and the time limit. The training loop calls `reason`.

    A second SIGINT ends the process immediately. With several ranks, a SIGTERM after a SIGINT does the same: torchrun
    forwards its second Ctrl-C as SIGTERM.

    Args:
        max_minutes: time limit, counted from now; None: no limit.
        among_ranks: whether torchrun started several ranks. The process then exits GRACE seconds after a SIGTERM that
            Python's handler has not recorded, before torchrun kills it. Handlers do not run while the main thread waits
            in a collective for a rank that has exited.
    """

    TIME_IS_UP = 1  # smaller than all signal numbers: the maximum over ranks prefers a signal
    GRACE = 25.0  # seconds; torchrun kills after 30 s, or after the seconds in this environment variable
    if (_seconds := os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")).isdecimal():
        GRACE = max(0.0, float(_seconds) - 5)

    def __init__(self, max_minutes: float | None = None, among_ranks: bool = False):
        self.signal: int | None = None
        self.end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._among_ranks, self._parent = among_ranks, os.getppid()
        numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}  # Windows has no SIGUSR1
        self._handlers = {number: signal.signal(number, self._record) for number in numbers}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def _record(self, number: int, frame) -> None:
        self.signal = number

    def _watch(self) -> None:
        """Read signal numbers from the wakeup socket, which gets them even while the main thread is blocked in C."""
        interrupts = 0
        with self._reader:
            while number := self._reader.recv(1):
                terminated = number[0] == signal.SIGTERM and self._among_ranks
                interrupts += number[0] == signal.SIGINT or (terminated and interrupts > 0)
                if interrupts == 2:
                    os.write(2, b"interrupted twice: exiting now; earlier checkpoints are kept\n")
                    os._exit(128 + signal.SIGINT)
                if terminated:
                    grace = threading.Timer(self.GRACE, self._exit_unless_recorded)
                    grace.daemon = True
                    grace.start()

    def _exit_unless_recorded(self) -> None:
        if self.signal is None:
            os._exit(128 + signal.SIGTERM)

    def reason(self) -> int:
        """Return the reason to stop: a signal number or TIME_IS_UP; 0 if there is none."""
        if self._among_ranks and os.getppid() != self._parent:  # torchrun has ended and can no longer stop this process
            return signal.SIGTERM
        return self.signal or (self.TIME_IS_UP if time.monotonic() >= self.end else 0)

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # ends the thread
