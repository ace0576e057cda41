"""Run a function on tasks, and return the results in order: in this process, in others, or on a Dask cluster."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import queue
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from config import UserError


class WorkersLostError(UserError):
    """The workers were killed, or cannot be reached any more."""


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def in_this_process(function: Callable, tasks: Iterable) -> Iterator[tuple]:
    """Yield (task, function(task))."""
    return ((task, function(task)) for task in tasks)


def in_order(submit: Callable[..., Any], max_in_flight: int, function: Callable, tasks: Iterable) -> Iterator:
    """Yield (task, function(task)) in the order of the tasks.

    Args:
        submit: an executor's, which returns a future.
        max_in_flight: how many tasks are read ahead; it bounds the memory.
    """
    in_flight = deque()
    for task in tasks:
        in_flight.append((task, submit(function, task)))
        if len(in_flight) == max_in_flight:
            task, future = in_flight.popleft()
            yield task, future.result()
    for task, future in in_flight:
        yield task, future.result()


@contextmanager
def local_pool(workers: int) -> Iterator[Callable]:
    """Start processes on this machine; gives in_order for them.

    Each has a pipe of its own, whose other end breaks when the process is killed, whatever it was doing then. With a
    ProcessPoolExecutor a process that is killed in the middle of a message leaves this one waiting for the rest
    (in part https://github.com/python/cpython/issues/94777).
    """
    # spawn: this process has threads (of pyarrow, of downloads), and a fork would copy their locks
    context = multiprocessing.get_context("spawn")
    processes, idle = [], queue.SimpleQueue()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process: the others start without it
    for _ in range(workers):
        connection, other_end = context.Pipe()
        processes.append(context.Process(target=_answer, args=(other_end,), daemon=True))
        processes[-1].start()
        other_end.close()
        idle.put(connection)
    signal.signal(signal.SIGINT, handler)

    def call(function, task):
        connection = idle.get()
        try:
            connection.send((function, task))
            result, error = connection.recv()
        except (EOFError, OSError):
            raise WorkersLostError("a worker was killed, perhaps for memory (fewer: --workers N)") from None
        finally:
            idle.put(connection)
        if error:
            raise error
        return result

    threads = ThreadPoolExecutor(workers)  # each waits for the answer of a process
    try:
        yield functools.partial(in_order, functools.partial(threads.submit, call), 2 * workers + 2)
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)


def _answer(connection: Connection) -> None:
    """Do the tasks that come through the connection, until the process at its other end closes it or is killed."""
    with suppress(EOFError, OSError):
        while True:
            function, task = connection.recv()
            try:
                answer = function(task), None
            except Exception as error:
                error.add_note(traceback.format_exc())
                answer = None, error
            connection.send(answer)


@contextmanager
def dask_cluster(address: str) -> Iterator[Callable]:
    """Connect to a Dask cluster, whose workers see the same files; gives in_order for it."""
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError("--cluster needs Dask: pip install -r requirements-extra.txt (distributed)") from None
    try:
        client = Client(address, timeout="10s")
        client.wait_for_workers(1, timeout=10)
        client.run(importlib.import_module, "flatgpt.data.sources")
    except (OSError, ValueError, ImportError) as error:
        start = f"in a checkout of this repository, with `PYTHONPATH=. dask worker {address}`"
        raise UserError(f"cluster = {address} (tcp://host:8786, say): {error}; start workers {start}") from None
    with client:
        submit, threads = functools.partial(client.submit, pure=False), sum(client.nthreads().values())
        try:
            yield functools.partial(in_order, submit, 2 * threads + 2)
        except (KilledWorker, CancelledError, OSError) as error:
            raise WorkersLostError(f"the cluster at {address} lost a task ({error})") from None
