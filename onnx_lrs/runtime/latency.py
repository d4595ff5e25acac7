"""How long one call takes: both models in turn, so that a drifting machine slows both."""

from __future__ import annotations

import statistics
import time

from onnx_lrs.runtime.session import Feed, Session

WARM_UP = 3
ROUNDS = (10, 200)
SECONDS = 2.0


def interleaved(sessions: tuple[Session, Session], feed: Feed) -> tuple[float, float]:
    """Return the median latency of both sessions on one feed, in milliseconds.

    After a warm-up, rounds A B, B A, ... run for about two seconds (at least 10 rounds, at most 200).
    """
    for session in sessions * WARM_UP:
        session.run(feed)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while len(times[0]) < ROUNDS[0] or (time.perf_counter() < end and len(times[0]) < ROUNDS[1]):
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for which in order:
            start = time.perf_counter()
            sessions[which].run(feed)
            times[which].append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])
