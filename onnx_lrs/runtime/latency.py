"""How long one call takes: models in turn, so that a drifting machine slows all of them."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.runtime.session import Feed, Session

WARM_UP = 3
ROUNDS = (10, 200)
SECONDS = 2.0


def fast_quarter(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the lower quartile of the rounds: what calls take that other work on the machine did not disturb."""
    return np.asarray(np.quantile(times, 0.25, axis=0), np.float64)


def interleaved(sessions: tuple[Session, Session], feed: Feed) -> tuple[float, float]:
    """Return the median latency of both sessions on one feed, in milliseconds.

    After a warm-up, rounds A B, B A, ... run for about two seconds (at least 10 rounds, at most 200).
    """
    first, second = np.median(times_in_turn(sessions, (feed, feed), SECONDS), axis=0)
    return float(first), float(second)


def times_in_turn(
    sessions: Sequence[Session], feeds: Sequence[Feed], seconds: float, between: Callable[[], object] | None = None
) -> NDArray[np.float64]:
    """Return the time of every call in milliseconds, shape (rounds, sessions).

    After a warm-up every session runs once a round, forwards and backwards in turn, for about ``seconds`` (at least 10
    rounds, at most 200). ``between`` is called before each timed call.
    """
    calls = [functools.partial(session.run, feed) for session, feed in zip(sessions, feeds, strict=True)]
    return calls_in_turn(calls, seconds, ROUNDS, there_and_back(len(calls)), between)


def there_and_back(count: int) -> Iterator[Sequence[int]]:
    """Yield the orders 0, 1, ... and ..., 1, 0 in turn: of two calls each comes behind itself as often as the other."""
    return itertools.cycle([range(count), range(count)[::-1]])


def drawn(count: int, rng: np.random.Generator) -> Iterator[Sequence[int]]:
    """Yield orders of ``count`` calls at random.

    A call is cheaper behind itself, where its weights are still in the cache. There and back the middle one of three
    never comes behind itself; drawn, every one does so equally often.
    """
    while True:
        yield [int(which) for which in rng.permutation(count)]


def calls_in_turn(
    calls: Sequence[Callable[[], object]],
    seconds: float,
    limits: tuple[int, int],
    orders: Iterable[Sequence[int]],
    between: Callable[[], object] | None = None,
) -> NDArray[np.float64]:
    """Return the milliseconds of every call, shape (rounds, calls), float64.

    ``limits`` are the least and most rounds; in each the calls run once, in the next one of the ``orders``.
    """
    for call in calls:
        for _ in range(WARM_UP):
            call()
    rounds: list[list[float]] = []
    end, turns = time.perf_counter() + seconds, iter(orders)
    while len(rounds) < limits[0] or (time.perf_counter() < end and len(rounds) < limits[1]):
        times = [0.0] * len(calls)
        for which in next(turns):
            if between is not None:
                between()
            start = time.perf_counter()
            calls[which]()
            times[which] = 1e3 * (time.perf_counter() - start)
        rounds.append(times)
    return np.array(rounds)
