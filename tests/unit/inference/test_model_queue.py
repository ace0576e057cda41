"""ModelQueue: order, limit, and clients that leave."""

import asyncio
import contextlib
import threading

import pytest

from config import UserError
from flatgpt.inference.model_queue import ModelQueue, Place, UnavailableError

WAIT = 60  # seconds, to detect hangs


class Work:
    """A request of three items. Its items are made when `allowed` is set."""

    def __init__(self, log: list, name: str):
        self.log, self.name, self.allowed = log, name, threading.Event()

    def __call__(self):
        try:
            for n in range(3):
                assert self.allowed.wait(WAIT)
                self.log.append((self.name, n))
                yield n
        finally:
            self.log.append((self.name, "closed"))


async def read(queue: ModelQueue, work) -> tuple[list[Place], list]:
    """Return the places and the items of a request."""
    updates = [update async for update in queue.stream(work)]
    places = [update for update in updates if isinstance(update, Place)]
    return places, [update for update in updates if not isinstance(update, Place)]


async def start(queue: ModelQueue, work) -> asyncio.Task:
    """Start a request, which is then in the queue."""
    task = asyncio.create_task(read(queue, work))
    await asyncio.sleep(0)  # no waiting: the task runs up to its first await
    return task


def test_one_at_a_time_in_order_and_never_more_than_the_limit():
    async def run():
        queue, log = ModelQueue(2), []
        works = [Work(log, name) for name in "abc"]
        tasks = [await start(queue, work) for work in works]
        with pytest.raises(UnavailableError, match="2 requests are waiting: try again later"):
            await anext(queue.stream(Work(log, "d")))
        for work in reversed(works):  # the last one may start first, and does not
            work.allowed.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks), WAIT)
        assert [items for _, items in results] == [[0, 1, 2]] * 3
        assert [places[0] for places, _ in results] == [Place(0, 0), Place(1, 1), Place(2, 2)]
        assert log == [(name, item) for name in "abc" for item in (0, 1, 2, "closed")]
        queue.close()

    asyncio.run(run())


def test_clients_that_leave_make_room():
    """One that waits is never started; one that is served ends after its next item. Nothing is started before that."""

    async def run():
        queue, log = ModelQueue(2), []
        first, second, third = (Work(log, name) for name in "abc")
        tasks = [await start(queue, work) for work in (first, second, third)]
        for task in tasks[:2]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        second.allowed.set()
        third.allowed.set()
        await asyncio.sleep(0)
        assert log == []
        first.allowed.set()
        assert (await asyncio.wait_for(tasks[2], WAIT))[1] == [0, 1, 2]
        assert log[:2] == [("a", 0), ("a", "closed")]
        assert [name for name, _ in log[2:]] == ["c"] * 4
        queue.close()

    asyncio.run(run())


def test_an_error_is_the_clients_and_the_next_is_served():
    def broken():
        yield 0
        raise UserError("broken")

    async def run():
        queue, work = ModelQueue(1), Work([], "a")
        with pytest.raises(UserError, match="broken"):
            await read(queue, broken)
        work.allowed.set()
        assert (await read(queue, work))[1] == [0, 1, 2]
        queue.close()

    asyncio.run(run())


def test_closing_ends_what_runs_and_what_waits():
    async def run():
        queue, log = ModelQueue(1), []
        first, second = Work(log, "a"), Work(log, "b")
        tasks = [await start(queue, work) for work in (first, second)]
        closing = asyncio.create_task(asyncio.to_thread(queue.close))
        for task in reversed(tasks):  # the one that runs ends after its next item
            if task is tasks[0]:
                first.allowed.set()
            with pytest.raises(UnavailableError, match="the server is stopping"):
                await asyncio.wait_for(task, WAIT)
        await closing
        assert log == [("a", 0), ("a", "closed")]
        with pytest.raises(UnavailableError, match="stopping"):
            await read(queue, second)

    asyncio.run(run())
