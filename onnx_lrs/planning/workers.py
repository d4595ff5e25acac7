"""Independent solves at the same time, with BLAS threads shared out so that results are the same to the bit as in turn.

How many threads BLAS uses decides how sums are rounded. So it depends on a solve's size alone: small ones get one
thread each and run side by side; large ones get all threads and run in turn where they share a process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from onnx_lrs.solvers.blas import LARGE, threads_for

Result = TypeVar("Result")
Executor = concurrent.futures.Executor


@dataclasses.dataclass(frozen=True)
class Task:
    """One solve: its size (rows of its largest matrix) and what the function is called with.

    ``arguments`` may be a function that makes them when the solve is about to begin: they may be large.
    """

    size: int
    arguments: tuple[Any, ...] | Callable[[], tuple[Any, ...]]

    def made(self) -> tuple[Any, ...]:
        """Return the arguments."""
        return self.arguments() if callable(self.arguments) else self.arguments


class Workers:
    """Maps functions over tasks; ``jobs`` threads of this process, or a given executor of any kind.

    Parameters
    ----------
    jobs : int
        Solves at the same time; 1: no threads at all.
    threads : int
        BLAS threads of a large solve.
    executor : concurrent.futures.Executor, optional
        Runs the solves instead. Functions and arguments are picklable. It is not shut down.
    """

    def __init__(self, jobs: int, threads: int, executor: Executor | None = None) -> None:
        self._threads = threads
        self._given = executor
        self._jobs = jobs
        self._own: Executor | None = None

    def __enter__(self) -> Workers:
        if self._given is None and self._jobs > 1:
            self._own = concurrent.futures.ThreadPoolExecutor(self._jobs, thread_name_prefix="onnx-lrs")
        return self

    def __exit__(self, *args: object) -> None:
        if self._own is not None:
            self._own.shutdown(cancel_futures=True)
            self._own = None

    def map(
        self,
        function: Callable[..., Result],
        tasks: Sequence[Task],
        most: int | None = None,
        done: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """Return the results in the order of the tasks; at most ``most`` solves run at once.

        ``done`` is told each result with its task's number when it is known, in this thread.
        """
        executor = self._given or self._own
        if executor is None or len(tasks) < 2:
            return [self._alone(function, number, task, done) for number, task in enumerate(tasks)]
        shared = isinstance(executor, concurrent.futures.ThreadPoolExecutor)
        apart = [i for i, task in enumerate(tasks) if shared and task.size >= LARGE]
        together = [i for i in range(len(tasks)) if i not in set(apart)]
        found: dict[int, Result] = {}
        # a limit of BLAS holds for the whole process: set around all, so that no solve lifts it for its neighbours
        with threads_for(0, self._threads) if shared else contextlib.nullcontext():
            for number, result in self._windowed(executor, function, [(i, tasks[i]) for i in together], most):
                found[number] = result
                if done is not None:
                    done(number, result)
        for number in apart:
            found[number] = self._alone(function, number, tasks[number], done)
        return [found[number] for number in range(len(tasks))]

    def _alone(
        self, function: Callable[..., Result], number: int, task: Task, done: Callable[[int, Result], None] | None
    ) -> Result:
        result = _limited(self._threads, task.size, function, task.made())
        if done is not None:
            with threads_for(0, self._threads):  # as beside other solves: what it computes may reach the file
                done(number, result)
        return result

    def _windowed(
        self,
        executor: Executor,
        function: Callable[..., Result],
        tasks: Sequence[tuple[int, Task]],
        most: int | None,
    ) -> Iterator[tuple[int, Result]]:
        """Yield the results in order, with no more than ``most`` tasks under way."""
        waiting: collections.deque[tuple[int, concurrent.futures.Future[Result]]] = collections.deque()
        try:
            for number, task in tasks:
                if most is not None and len(waiting) >= max(most, 1):
                    first, future = waiting.popleft()
                    yield first, future.result()
                future = executor.submit(_limited, self._threads, task.size, function, task.made())
                waiting.append((number, future))
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _limited(threads: int, size: int, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    """Call a function with BLAS limited to the threads of a solve of that size."""
    with threads_for(size, threads):
        return function(*arguments)
