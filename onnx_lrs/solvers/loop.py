"""The only iteration loop: tolerance on both residuals, a guard against NaN and overflow, the best iterate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Generic, TypeVar

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Step:
    """What one iteration reached: the value to be lowered (inf while infeasible) and the relative residuals."""

    value: float
    primal: float = 0.0
    dual: float = 0.0


@dataclasses.dataclass(frozen=True)
class Run(Generic[State]):
    """How a loop ended: the last and the best iterate (lowest value; the first one if none is finite)."""

    last: State
    best: State
    steps: tuple[Step, ...]
    converged: bool

    @property
    def history(self) -> tuple[float, ...]:
        """The values, one a step."""
        return tuple(step.value for step in self.steps)

    @property
    def residuals(self) -> tuple[tuple[float, float], ...]:
        """Primal and dual residual, one pair a step."""
        return tuple((step.primal, step.dual) for step in self.steps)


def iterate(
    advance: Callable[[State, int], tuple[State, Step]], start: State, value: float, steps: int, tolerance: float
) -> Run[State]:
    """Advance from ``start`` until both residuals are at most ``tolerance`` or ``steps`` are done.

    Parameters
    ----------
    advance : callable
        Takes an iterate and its number, returns the next one with what it reached.
    start : State
        The first iterate; ``value`` is its value (inf if it is not feasible).
    steps, tolerance
        The limits. An iterate with values that are not finite ends the loop and is dropped.
    """
    best, lowest = start, value
    state = start
    done: list[Step] = []
    for number in range(steps):
        following, step = advance(state, number)
        if math.isnan(step.value) or not math.isfinite(step.primal + step.dual):
            return Run(state, best, tuple(done), False)
        state = following
        done.append(step)
        if step.value < lowest:
            best, lowest = state, step.value
        if max(step.primal, step.dual) <= tolerance:
            return Run(state, best, tuple(done), True)
    return Run(state, best, tuple(done), False)
