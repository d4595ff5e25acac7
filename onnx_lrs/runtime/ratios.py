"""How much faster, and how sure: ratios of latencies with intervals.

Rounds of one window of time share the sessions (how weights happen to lie in memory) and what else the machine did just
then, so they are not independent; windows, each with fresh sessions, nearly are. The bootstrap therefore draws windows,
and rounds within them. With few windows a percentile interval is too narrow; its quantiles are moved outwards by
Student's t (the expanded percentile interval of Hesterberg 2015, arXiv 1411.5279, section 4.2). No draw leaves the hull
of the windows, which holds their median with a probability of 1 - 2^(1 - n): 99.2 % for 8 windows, 87.5 % for 4. With
fewer than 8 the interval is Student's t for the mean of the windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.99  # of the intervals: at 0.95 one comparison in twenty of a model with itself would find a difference
FEWEST_WINDOWS = 8  # whose hull reaches LEVEL
RESAMPLES = 20_000
DRAWS = 100  # resamples of the rounds of each window
Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value, and between what it lies with a confidence of LEVEL."""

    value: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether a ratio is different from 1."""
        return not self.low <= 1.0 <= self.high


def ratios(windows: Sequence[Array], seed: int) -> tuple[Interval, ...]:
    """Return each model's latency as a fraction of the first one's, the first among them (1, exactly).

    Parameters
    ----------
    windows : sequence of ndarray, shape (rounds, models)
        Times of calls; a row is a round in which every model ran once. At least two windows.
    seed : int
        Of the bootstrap.

    Returns
    -------
    tuple of Interval
        The geometric mean over the windows of the ratios of the medians in each.
    """
    rng = np.random.default_rng(seed)
    logs = np.stack([_log_ratios(window, rng) for window in windows])  # (windows, 1 + DRAWS, models)
    low, high = _bootstrapped(logs, rng) if len(logs) >= FEWEST_WINDOWS else _by_student(logs[:, 0])
    values = np.exp([logs[:, 0].mean(axis=0), low, high])
    return tuple(Interval(*map(float, column)) for column in values.T)


def _bootstrapped(logs: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the ends of the intervals, (models,) each; ``logs`` are (windows, 1 + DRAWS, models)."""
    count = len(logs)
    picked = rng.integers(count, size=(RESAMPLES, count)), rng.integers(1, 1 + DRAWS, size=(RESAMPLES, count))
    tail = stats.norm.cdf(np.sqrt(count / (count - 1)) * stats.t.ppf((1 - LEVEL) / 2, count - 1))
    low, high = np.quantile(logs[picked].mean(axis=1), [tail, 1 - tail], axis=0)
    return low, high


def _by_student(logs: Array) -> tuple[Array, Array]:
    """Return the ends of the intervals, (models,) each; ``logs`` are (windows, models)."""
    mean, reach = logs.mean(axis=0), stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1) * stats.sem(logs, axis=0)
    return mean - reach, mean + reach


def _log_ratios(times: Array, rng: np.random.Generator) -> Array:
    """Return the logarithm of each median over the first model's: of the rounds, then of resamples of them."""
    rounds = rng.integers(len(times), size=(DRAWS, len(times)))
    medians = np.concatenate([np.median(times, axis=0)[None], np.median(times[rounds], axis=1)])
    return np.asarray(np.log(medians / medians[:, :1]), np.float64)
