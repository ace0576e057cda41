"""Run tasks in order: in this process, in processes on this machine, or on a Dask cluster.

Each is a context manager that yields `run_tasks(function, tasks)`, an iterator over (task, result).
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from config import UserError


@contextmanager
def this_process():
    """Run tasks in this process, where the text is too short to start others."""
    yield lambda function, tasks: ((task, function(task)) for task in tasks)


def ordered(
    submit: Callable[..., Any], max_in_flight: int, failure: Callable[[], Exception | None]
) -> Callable[[Callable, Iterable], Iterator[tuple[Any, Any]]]:
    """Return run_tasks over an executor.

    Args:
        submit: the executor's, which returns a future.
        max_in_flight: how many tasks are read ahead; it bounds the memory.
        failure: returns the error to raise where the executor will never answer again.
    """

    def result(future):
        while True:
            try:
                return future.result(timeout=3)
            except TimeoutError:
                if future.done():
                    return future.result()
                if error := failure():
                    raise error from None
            except concurrent.futures.CancelledError:  # by Dask's client, when its scheduler is gone
                raise ConnectionError("its scheduler is gone") from None

    def run_tasks(function, tasks):
        in_flight = deque()
        for task in tasks:
            in_flight.append((task, submit(function, task)))
            if len(in_flight) == max_in_flight:
                task, future = in_flight.popleft()
                yield task, result(future)
        while in_flight:
            task, future = in_flight.popleft()
            yield task, result(future)

    return run_tasks


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit when the parent does, also when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def local_pool(workers: int):
    """Run tasks in processes on this machine."""
    # spawn: this process has threads (of pyarrow, of downloads), and a fork would copy their locks
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # children start with it: no traceback of a half-started one
    try:
        for _ in range(workers):
            pool.submit(os.getpid)
    finally:
        signal.signal(signal.SIGINT, handler)

    def failure() -> Exception | None:
        processes = list((pool._processes or {}).values())
        return BrokenProcessPool() if any(process.exitcode is not None for process in processes) else None

    try:
        yield ordered(pool.submit, 2 * workers + 2, failure)
    except BrokenProcessPool:
        # A worker that is killed in the middle of a message leaves the pool's threads waiting for the rest, in both
        # directions (in part https://github.com/python/cpython/issues/94777): close the other ends.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool._result_queue._writer.close()
        # Newer Pythons close this end in that thread; two threads that close it at once raise "Bad file descriptor".
        pool._executor_manager_thread.join(2)
        if pool._executor_manager_thread.is_alive():
            pool._call_queue._reader.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def dask_cluster(address: str):
    """Run tasks on a Dask cluster, whose workers see the same files."""
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--cluster needs Dask: pip install -r requirements-extra.txt (distributed)") from None
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise UserError(f"cluster = {address}: no scheduler answers ({error}); the form is tcp://host:8786") from None
    start = f"in a checkout of this repository, with `PYTHONPATH=. dask worker {address}`"
    with client:
        if not (threads := sum(client.nthreads().values())):
            raise UserError(f"cluster = {address}: the scheduler has no workers; start some {start}")
        try:
            client.run(importlib.import_module, "flatgpt.data.encode")
        except ImportError as error:
            raise UserError(
                f"cluster = {address}: a worker cannot import flatGPT's code ({error}): start it {start}"
            ) from None
        yield ordered(
            lambda function, task: client.submit(function, task, pure=False),
            2 * threads + 2,
            lambda: ConnectionError("its scheduler is gone") if client.status == "closed" else None,
        )


def is_killed_worker(error: BaseException) -> bool:
    """Whether an executor raised the error because a worker was killed (on Dask: more often than it retries)."""
    return isinstance(error, BrokenProcessPool) or type(error).__name__ == "KilledWorker"  # distributed's
