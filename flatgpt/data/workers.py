"""Who does the tasks: this process, a pool of processes, or a Dask cluster, behind one executor interface.

Each is a context manager that gives a WorkerPool.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

from config import UserError


@dataclass(frozen=True)
class WorkerPool:
    """An executor and how to work with it.

    Args:
        max_in_flight: how many tasks to keep in it.
        failure: the error to raise where it will never answer again.
    """

    executor: concurrent.futures.Executor
    max_in_flight: int
    failure: Callable[[], Exception | None] = lambda: None

    def result(self, future: concurrent.futures.Future):
        """What the task gave, or raises."""
        while True:
            try:
                return future.result(timeout=3)
            except TimeoutError:
                if future.done():
                    return future.result()
                if why := self.failure():
                    raise why from None
            except concurrent.futures.CancelledError:  # by Dask's client, when its scheduler is gone
                raise ConnectionError("its scheduler is gone") from None


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, also when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def local_pool(workers: int):
    """Processes on this machine."""
    # spawn: this process has threads (of pyarrow, of downloads), and a fork would copy their locks
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker)
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # children start with it: no traceback of a half-started one
    try:
        for _ in range(workers):
            pool.submit(os.getpid)
    finally:
        signal.signal(signal.SIGINT, ours)
    try:
        yield WorkerPool(pool, 2 * workers + 2, lambda: BrokenProcessPool() if _dead(pool) else None)
    except BrokenProcessPool:
        # Killed in the middle of a message, a worker leaves the pool's threads waiting for the rest, in both directions
        # (in part https://github.com/python/cpython/issues/94777): nobody is left, so close the other ends.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool._result_queue._writer.close()
        # Newer Pythons close this end in that thread: two who close at once can meet "Bad file descriptor".
        pool._executor_manager_thread.join(2)
        if pool._executor_manager_thread.is_alive():
            pool._call_queue._reader.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _dead(pool: concurrent.futures.ProcessPoolExecutor) -> bool:
    return any(process.exitcode is not None for process in list((pool._processes or {}).values()))


class _Here(concurrent.futures.Executor):
    def submit(self, call, *args) -> concurrent.futures.Future:
        future = concurrent.futures.Future()
        future.set_result(call(*args))
        return future


@contextmanager
def here():
    """This process, for texts too small to start others for."""
    yield WorkerPool(_Here(), 1)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def dask_cluster(address: str):
    """A Dask cluster, whose workers see the same files."""
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--cluster needs Dask: pip install -r requirements-extra.txt (distributed)") from None
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as why:
        raise UserError(f"cluster = {address}: no scheduler answers ({why}); the form is tcp://host:8786") from None
    with client:
        slots = sum(client.nthreads().values())
        if not slots:
            raise UserError(
                f"cluster = {address}: the scheduler has no workers; start some with "
                f"`PYTHONPATH=. dask worker {address}` in a checkout of this repository"
            )
        try:
            client.run(importlib.import_module, "flatgpt.data.encode")
        except ImportError as why:
            raise UserError(
                f"cluster = {address}: a worker cannot import flatGPT's code ({why}): start it in a checkout, with "
                f"PYTHONPATH=. dask worker {address}"
            ) from None
        yield WorkerPool(client.get_executor(), 2 * slots + 2, lambda: _closed(client))


def _closed(client) -> Exception | None:
    return ConnectionError("its scheduler is gone") if client.status == "closed" else None


def died(why: BaseException) -> bool:
    """Whether an executor gives this error because a worker was killed (more often than Dask retries)."""
    broken = isinstance(why, BrokenProcessPool)
    return broken or type(why).__name__ == "KilledWorker"  # distributed's, not imported for this
