"""Tasks that run elsewhere: their results come in order, few are read ahead, and an executor that died is an error."""

import concurrent.futures

import pytest

from flatgpt.data import workers


class Executor:
    """Runs a task when its result is asked for; remembers what was submitted."""

    def __init__(self, error: BaseException | None = None):
        self.submitted, self.error = [], error

    def submit(self, function, task):
        self.submitted.append(task)
        return self.Future(self, function, task)

    class Future:
        def __init__(self, executor, function, task):
            self.executor, self.call = executor, lambda: function(task)

        def done(self) -> bool:
            return self.executor.error is None

        def result(self, timeout=None):
            if self.executor.error:
                raise self.executor.error
            return self.call()


def test_results_come_in_order_and_few_tasks_are_read_ahead():
    executor = Executor()
    run_tasks = workers.ordered(executor.submit, 4, lambda: None)
    for n, found in enumerate(run_tasks(lambda task: task * task, range(20))):
        assert found == (n, n * n)
        assert executor.submitted == list(range(min(20, n + 4)))
    assert list(run_tasks(str, [])) == []
    with workers.this_process() as run_tasks:
        assert list(run_tasks(str, range(3))) == [(0, "0"), (1, "1"), (2, "2")]


@pytest.mark.parametrize(
    ("error", "failure", "raised", "message"),
    [
        (ValueError("of the task"), None, ValueError, "of the task"),
        (TimeoutError(), ConnectionError("it died"), ConnectionError, "it died"),
        (concurrent.futures.CancelledError(), None, ConnectionError, "its scheduler is gone"),
    ],
)
def test_executor_that_never_answers_is_an_error(error, failure, raised, message):
    run_tasks = workers.ordered(Executor(error).submit, 2, lambda: failure)
    with pytest.raises(raised, match=message):
        list(run_tasks(str, range(5)))
