"""How long one call takes: models in turn, so that a drifting machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

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
    for session, feed in zip(sessions, feeds, strict=True):
        for _ in range(WARM_UP):
            session.run(feed)
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < ROUNDS[0] or (time.perf_counter() < end and len(rounds) < ROUNDS[1]):
        times = [0.0] * len(sessions)
        order = range(len(sessions))
        for which in order if len(rounds) % 2 == 0 else reversed(order):
            if between is not None:
                between()
            start = time.perf_counter()
            sessions[which].run(feeds[which])
            times[which] = 1e3 * (time.perf_counter() - start)
        rounds.append(times)
    return np.array(rounds)
