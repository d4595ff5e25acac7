r"""Share budgets out over the layers: the multiple-choice knapsack, solved by HiGHS.

.. math:: \min \sum_l \mathrm{loss}_{l,c(l)} \quad \text{s.t.} \quad
          \sum_l \mathrm{cost}_{k,l,c(l)} \le \mathrm{budget}_k \quad \text{for every limit } k
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray

from onnx_lrs.native import STDOUT, redirected

CUTS = 50  # over-budget plans refused before the cheapest one is taken
GAP = 1e-4  # relative; the error curves themselves are not known better than that
WIDE = 30.0  # times the total, a loss on offer: HiGHS is exact to 1e-6 of the largest one, whatever its gap


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to build a layer: what it costs under each limit, and what it loses."""

    costs: tuple[int, ...]
    loss: float


def allocate(layers: Sequence[Sequence[Choice]], budgets: Sequence[int]) -> list[int] | None:
    """Return the index of the chosen :class:`Choice` of each layer, or None if the budgets cannot be kept.

    The budgets hold exactly, in integers; the total loss is within GAP of the least possible.
    """
    useful = [_undominated(layer) for layer in layers]
    chosen = _allocate([[layer[i] for i in kept] for layer, kept in zip(layers, useful, strict=True)], budgets)
    return None if chosen is None else [kept[c] for kept, c in zip(useful, chosen, strict=True)]


def _undominated(layer: Sequence[Choice]) -> list[int]:
    """Return the choices that no other one beats in every cost and in loss, by rising cost."""
    kept: list[int] = []
    costs = np.array([c.costs for c in layer], np.int64).reshape(len(layer), -1)
    for index in sorted(range(len(layer)), key=lambda i: (*layer[i].costs, layer[i].loss)):
        better = (costs[kept] <= costs[index]).all(axis=1) & (
            np.array([layer[k].loss for k in kept]) <= layer[index].loss
        )
        if not better.any():
            kept.append(index)
    return kept


def _allocate(layers: Sequence[Sequence[Choice]], budgets: Sequence[int]) -> list[int] | None:
    cheapest = [min(range(len(layer)), key=lambda i: (layer[i].costs, layer[i].loss)) for layer in layers]
    within = _fits(layers, cheapest, budgets)
    if len(budgets) == 1 and not within:
        return None
    refused: list[list[int]] = []
    for _ in range(CUTS):
        chosen = _solve(layers, budgets, refused)
        if chosen is None:
            break
        if _fits(layers, chosen, budgets):
            return chosen
        refused.append(chosen)  # HiGHS forgives a relative 1e-6 of a constraint; we do not
    return cheapest if within else None


def _fits(layers: Sequence[Sequence[Choice]], chosen: Sequence[int], budgets: Sequence[int]) -> bool:
    picked = [layer[c].costs for layer, c in zip(layers, chosen, strict=True)]
    return all(sum(costs[k] for costs in picked) <= budget for k, budget in enumerate(budgets))


def _columns(layers: Sequence[Sequence[Choice]]) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """Return the owner (n,), the costs (limits, n) and the loss (n,) of all choices in a row."""
    owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    costs = np.array([c.costs for layer in layers for c in layer], float).T
    return owner, costs, np.array([c.loss for layer in layers for c in layer])


def _solve(
    layers: Sequence[Sequence[Choice]], budgets: Sequence[int], refused: Sequence[Sequence[int]]
) -> list[int] | None:
    """Return the best plan, other than the refused ones; None if there is no other.

    No choice that loses more than a whole plan does is in a better one. They are left out and it is solved again, or
    hopeless choices would set the scale on which HiGHS rounds.
    """
    if not layers:
        return []
    starts = np.cumsum([0, *(len(layer) for layer in layers)])
    owner, costs, loss = _columns(layers)
    limits = [_one_each(owner), *_within(costs, budgets), *(_other_than(plan, starts) for plan in refused)]
    chosen, offered = None, np.ones(len(owner), bool)
    while (picked := _picked(loss, offered, limits)) is not None:
        better = [int(np.argmax(picked[a:b])) for a, b in itertools.pairwise(starts)]
        total = float(loss[starts[:-1] + better].sum())
        if chosen is None or total < float(loss[starts[:-1] + chosen].sum()):
            chosen = better
        if loss[offered].max() <= WIDE * total:
            break
        offered &= loss <= total
    return chosen


def _picked(
    loss: NDArray[np.float64], offered: NDArray[np.bool_], limits: Sequence[scipy.optimize.LinearConstraint]
) -> NDArray[np.float64] | None:
    """Return HiGHS's answer, (n,) of 0 and 1, made of what is offered; None if there is none."""
    with redirected(STDOUT, None):  # HiGHS leaves debug prints there
        solved = scipy.optimize.milp(
            loss / max(loss[offered].max(), 1e-300),
            integrality=np.ones(len(loss)),
            bounds=scipy.optimize.Bounds(0, offered.astype(float)),
            constraints=limits,
            options={"mip_rel_gap": GAP},
        )
    found: NDArray[np.float64] | None = solved.x
    return found


def _one_each(owner: NDArray[np.intp]) -> scipy.optimize.LinearConstraint:
    places = owner, np.arange(len(owner))
    return scipy.optimize.LinearConstraint(scipy.sparse.csr_array((np.ones(len(owner)), places)), 1, 1)


def _within(costs: NDArray[np.float64], budgets: Sequence[int]) -> Iterator[scipy.optimize.LinearConstraint]:
    for cost, budget in zip(costs, budgets, strict=True):
        scale = max(abs(budget), 1e-3 * np.abs(cost).max(initial=0.0), 1)  # it may be next to nothing, or below
        yield scipy.optimize.LinearConstraint(cost[None, :] / scale, -np.inf, budget / scale)


def _other_than(plan: Sequence[int], starts: NDArray[np.int64]) -> scipy.optimize.LinearConstraint:
    cut = np.zeros((1, int(starts[-1])))
    cut[0, starts[:-1] + plan] = 1.0
    return scipy.optimize.LinearConstraint(cut, -np.inf, len(plan) - 1)
