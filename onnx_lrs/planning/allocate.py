r"""Share budgets out over the layers: the multiple-choice knapsack, solved by HiGHS.

.. math:: \min \sum_l \mathrm{loss}_{l,c(l)} \quad \text{s.t.} \quad
          \sum_l \mathrm{cost}_{k,l,c(l)} \le \mathrm{budget}_k \quad \text{for every limit } k
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray

from onnx_lrs.native import STDOUT, redirected

CUTS = 50  # over-budget plans refused before the cheapest one is taken
GAP = 1e-4  # relative; the error curves themselves are not known better than that


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
    """Return the plan HiGHS finds, other than the refused ones; None if there is no other."""
    if not layers:
        return []
    starts = np.cumsum([0, *(len(layer) for layer in layers)])
    owner, costs, loss = _columns(layers)
    pick_one = scipy.sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    limits = [scipy.optimize.LinearConstraint(pick_one, 1, 1)]
    for cost, budget in zip(costs, budgets, strict=True):
        scale = max(abs(budget), 1e-3 * np.abs(cost).max(initial=0.0), 1)  # it may be next to nothing, or below
        limits.append(scipy.optimize.LinearConstraint(cost[None, :] / scale, -np.inf, budget / scale))
    for plan in refused:
        cut = np.zeros((1, len(owner)))
        cut[0, starts[:-1] + plan] = 1.0
        limits.append(scipy.optimize.LinearConstraint(cut, -np.inf, len(layers) - 1))
    with redirected(STDOUT, None):  # HiGHS leaves debug prints there
        solved = scipy.optimize.milp(
            loss / max(loss.max(), 1e-300),
            integrality=np.ones(len(owner)),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=limits,
            options={"mip_rel_gap": GAP},
        )
    if solved.x is None:
        return None
    return [int(np.argmax(solved.x[a:b])) for a, b in itertools.pairwise(starts)]
