r"""Share a budget out over the layers: the multiple-choice knapsack, by Lagrange bound and dynamic programming.

.. math:: \min \sum_l \mathrm{loss}_{l,c(l)} \quad \text{s.t.} \quad \sum_l \mathrm{cost}_{l,c(l)} \le \mathrm{budget}

A price on cost gives a plan and a lower bound. Every plan's loss is that bound, plus the price of the budget it leaves,
plus the sum of its layers' ``loss + price * cost`` above the layer's minimum; so only choices and partial plans whose
sum stays below the gap need to be looked at, and those that another one beats in both cost and loss are dropped
(Nemhauser and Ullmann, 1969). Costs are integers throughout: the budget holds exactly. (HiGHS, tried
first, forgives a relative 1e-6 and writes to the process's stdout, where the JSON goes.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GAP = 1e-4  # relative; the error curves themselves are not known better than that
PLANS = 20_000  # partial plans kept at most; beyond that those of nearly equal loss share one, within the gap

Costs = Sequence[NDArray[np.int64]]
Losses = Sequence[NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to build a layer: what it costs and what it loses."""

    cost: int
    loss: float


def allocate(layers: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """Return the index of each layer's :class:`Choice`, or None if even the cheapest ones exceed the budget."""
    costs = [np.array([c.cost for c in layer], np.int64) for layer in layers]
    losses = [np.array([c.loss for c in layer], np.float64) for layer in layers]
    if sum(int(cost.min()) for cost in costs) > budget:
        return None
    price, chosen = _priced(costs, losses, budget)
    if price == 0:
        return chosen
    _spend_rest(costs, losses, budget, chosen)
    return _improved(costs, losses, budget, price, chosen)


def _priced(costs: Costs, losses: Losses, budget: int) -> tuple[float, list[int]]:
    """Return about the lowest price at which every layer for itself chooses a plan within the budget, and that plan."""

    def pick(price: float) -> tuple[list[int], int]:
        picked = [int(np.lexsort((cost, loss + price * cost))[0]) for cost, loss in zip(costs, losses, strict=True)]
        return picked, sum(int(cost[i]) for cost, i in zip(costs, picked, strict=True))

    chosen, spent = pick(0.0)
    if spent <= budget:
        return 0.0, chosen
    low, high = 0.0, 2 * max(float(np.ptp(loss)) for loss in losses)  # at that price the cheapest choices win
    for _ in range(100):
        price = (low + high) / 2
        low, high = (low, price) if pick(price)[1] <= budget else (price, high)
    return high, pick(high)[0]


def _spend_rest(costs: Costs, losses: Losses, budget: int, chosen: list[int]) -> None:
    """Change one layer at a time, the one that gains most, while something fits into what the plan leaves."""
    while True:
        left = budget - sum(int(cost[i]) for cost, i in zip(costs, chosen, strict=True))
        gains = [
            np.where(cost <= cost[i] + left, loss[i] - loss, 0.0)
            for cost, loss, i in zip(costs, losses, chosen, strict=True)
        ]
        layer = int(np.argmax([gain.max() for gain in gains]))
        if gains[layer].max() <= 0:
            return
        chosen[layer] = int(np.argmax(gains[layer]))


def _improved(costs: Costs, losses: Losses, budget: int, price: float, chosen: list[int]) -> list[int]:
    """Return the best plan, or ``chosen`` if none is better by more than the gap."""
    values = [loss + price * cost for cost, loss in zip(costs, losses, strict=True)]
    floors = np.array([value.min() for value in values])
    best = sum(float(loss[i]) for loss, i in zip(losses, chosen, strict=True))
    rounding = 1e-13 * (sum(float(np.abs(value).max()) for value in values) + price * budget)
    room = best * (1 - GAP) - (floors.sum() - price * budget) + rounding
    rest = sum(int(cost.min()) for cost in costs)
    spent, lost, floor = np.zeros(1, np.int64), np.zeros(1), 0.0
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for cost, loss, value in zip(costs, losses, values, strict=True):
        rest -= int(cost.min())
        floor += float(value.min())
        use = np.flatnonzero(value - value.min() <= room)
        total, sacrificed = (spent[:, None] + cost[use]).ravel(), (lost[:, None] + loss[use]).ravel()
        live = np.flatnonzero((total + rest <= budget) & (sacrificed + price * total - floor <= room))
        kept = live[_front(total[live], sacrificed[live], best * GAP / len(costs))]
        trail.append((kept // max(len(use), 1), use[kept % max(len(use), 1)]))
        spent, lost = total[kept], sacrificed[kept]
    if not len(lost) or lost[-1] >= best:
        return chosen
    found, state = [], len(lost) - 1
    for parents, picks in reversed(trail):
        found.append(int(picks[state]))
        state = int(parents[state])
    return found[::-1]


def _front(spent: NDArray[np.int64], lost: NDArray[np.float64], grain: float) -> NDArray[np.int64]:
    """Return which partial plans no other one beats in cost and loss, by rising cost and falling loss."""
    order: NDArray[np.int64] = np.lexsort((lost, spent))
    reached = np.minimum.accumulate(lost[order])
    order = order[np.concatenate([[True], reached[1:] < reached[:-1]])] if len(order) else order
    if len(order) <= PLANS or grain <= 0:
        return order
    cells = np.floor(lost[order] / grain)
    kept: NDArray[np.int64] = order[np.concatenate([[True], cells[1:] < cells[:-1]])]
    return kept
