"""Run the requests of a server one at a time, in the order in which they arrive.

queue = ModelQueue(limit=20)
async for update in queue.stream(lambda: generate(...)): ...   # Place while it waits, then what generate yields
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from config import UserError, count_of

PLACE_SECONDS = 0.5  # after so long without an item, a request is told its place


class UnavailableError(UserError):
    """The server cannot take a request, or finish it, now."""

    status = 503  # of the answer in HTTP


class Place(NamedTuple):
    """The place of a request.

    Attributes:
        ahead: number of requests to finish before it starts; 0: it has started.
        waiting: number of requests that wait, this one included.
    """

    ahead: int
    waiting: int


class ModelQueue:
    """Runs one request at a time on a thread of its own, so that nothing else uses the model meanwhile.

    A request does not wait for its client to read the items: a slow client does not hold up the others. All methods
    but `close` are called in one event loop.

    Args:
        limit: maximum number of waiting requests.
    """

    def __init__(self, limit: int):
        self._limit, self._closing = limit, False
        self._jobs: list[Future] = []  # the first is running
        self._thread = ThreadPoolExecutor(1, "model")

    async def stream(self, work: Callable[[], Iterator]) -> AsyncIterator[Any]:
        """Run `work` on the model's thread when it is its turn. Yield its items.

        A Place is yielded first, and again if there is no item for a while, so that the caller can see whether its
        client is still there. Closing this iterator ends the work after its next item.

        Raises:
            UnavailableError: `limit` requests are waiting, or the queue was closed.
        """
        if len(self._jobs) > self._limit or self._closing:
            waiting = f"{count_of(self._limit, 'request')} {'are' if self._limit > 1 else 'is'} waiting"
            raise UnavailableError("the server is stopping" if self._closing else f"{waiting}: try again later")
        loop, items, abandoned = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def call(function: Callable, *arguments: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(function, *arguments)

        def run() -> None:
            with contextlib.closing(work()) as generator:
                for item in generator:
                    if self._closing:
                        raise UnavailableError("the server is stopping")
                    if abandoned.is_set():
                        return
                    call(items.put_nowait, item)

        def leave(job: Future) -> None:
            self._jobs.remove(job)
            items.put_nowait(job)  # after its items

        job = self._thread.submit(run)
        self._jobs.append(job)
        job.add_done_callback(lambda job: call(leave, job))
        try:
            yield self._place(job)
            while True:
                try:
                    async with asyncio.timeout(PLACE_SECONDS):
                        item = await items.get()
                except TimeoutError:
                    yield self._place(job)
                    continue
                if item is job:
                    if job.cancelled():
                        raise UnavailableError("the server is stopping")
                    job.result()  # raises what the work has raised
                    return
                yield item
        finally:
            abandoned.set()
            job.cancel()

    def _place(self, job: Future) -> Place:
        return Place(self._jobs.index(job) if job in self._jobs else 0, len(self._jobs) - 1)

    def close(self) -> None:
        """End all requests, and wait until the model is not in use."""
        self._closing = True
        self._thread.shutdown(cancel_futures=True)
