"""Run a function on tasks in this process, in worker processes or on a Dask cluster. Results are in task order."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import queue
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from config import UserError

RESUMABLE = "run the same command again to resume"


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_this_process(function: Callable, tasks: Iterable) -> Iterator[tuple]:
    """Yield (task, function(task)) in the order of the tasks."""
    return ((task, function(task)) for task in tasks)


def in_order(submit: Callable[..., Any], max_in_flight: int, function: Callable, tasks: Iterable) -> Iterator:
    """Yield (task, function(task)) in the order of the tasks.

    Args:
        submit: an executor's submit method, which returns a future.
        max_in_flight: maximum number of submitted tasks; limits memory.
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
    """Start worker processes on this machine, and yield in_order bound to them.

    Each worker has its own pipe, so that reading fails as soon as the worker is killed. A ProcessPoolExecutor can wait
    forever if a worker is killed while it sends a message (https://github.com/python/cpython/issues/94777 in part).
    """
    # spawn, because fork would copy the locks of this process's threads (pyarrow, downloads)
    context = multiprocessing.get_context("spawn")
    processes, idle = [], queue.SimpleQueue()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit this; only this process handles Ctrl-C
    for _ in range(workers):
        connection, other_end = context.Pipe()
        processes.append(context.Process(target=_worker_loop, args=(other_end,), daemon=True))
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
            problem = "a worker was killed, perhaps out of memory (use fewer with --workers N)"
            raise UserError(f"{problem}; {RESUMABLE}") from None
        finally:
            idle.put(connection)
        if error:
            raise error
        return result

    threads = ThreadPoolExecutor(workers)  # each thread waits for the result of one worker
    try:
        yield functools.partial(in_order, functools.partial(threads.submit, call), 2 * workers + 2)
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)


def _worker_loop(connection: Connection) -> None:
    """Run the tasks received through the connection, until its other end is closed."""
    with suppress(EOFError, OSError):
        while True:
            function, task = connection.recv()
            try:
                reply = function(task), None
            except Exception as error:
                error.add_note(traceback.format_exc())
                reply = None, error
            connection.send(reply)


@contextmanager
def dask_cluster(address: str) -> Iterator[Callable]:
    """Connect to a Dask cluster, whose workers have access to the same files, and yield in_order bound to it."""
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError("--cluster needs Dask: pip install -r requirements-extra.txt (distributed)") from None
    try:
        client = Client(address, timeout="10s")
        client.wait_for_workers(1, timeout=10)
        client.run(importlib.import_module, "flatgpt.data.sources")
    except (OSError, ValueError, ImportError) as error:
        start = f"start workers in a checkout of this repository with `PYTHONPATH=. dask worker {address}`"
        raise UserError(f"cluster = {address} (for example tcp://host:8786): {error}; {start}") from None
    with client:
        submit, threads = functools.partial(client.submit, pure=False), sum(client.nthreads().values())
        try:
            yield functools.partial(in_order, submit, 2 * threads + 2)
        except (KilledWorker, CancelledError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"the cluster at {address} lost a task ({reason}); {RESUMABLE}") from None
