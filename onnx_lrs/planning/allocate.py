r"""Share a budget out over the layers: the multiple-choice knapsack, solved by HiGHS.

.. math:: \min \sum_l \mathrm{loss}_{l,c(l)} \quad \text{s.t.} \quad \sum_l \mathrm{cost}_{l,c(l)} \le \mathrm{budget}
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

from onnx_lrs.native import STDERR, STDOUT, redirected

CUTS = 50  # over-budget plans refused before the cheapest one is taken
GAP = 1e-4  # relative; the error curves themselves are not known better than that


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to build a layer: what it costs and what it loses."""

    cost: int
    loss: float


def allocate(layers: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """Return the index of the chosen :class:`Choice` of each layer, or None if even the cheapest exceed the budget.

    The budget holds exactly, in integers; the total loss is within GAP of the least possible.
    """
    useful = [_undominated(layer) for layer in layers]
    chosen = _allocate([[layer[i] for i in kept] for layer, kept in zip(layers, useful, strict=True)], budget)
    return None if chosen is None else [kept[c] for kept, c in zip(useful, chosen, strict=True)]


def _undominated(layer: Sequence[Choice]) -> list[int]:
    """Return the choices that no other one beats in cost and loss, by rising cost."""
    kept: list[int] = []
    for index in sorted(range(len(layer)), key=lambda i: (layer[i].cost, layer[i].loss)):
        if not kept or layer[index].loss < layer[kept[-1]].loss:
            kept.append(index)
    return kept


def _allocate(layers: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    cheapest = [0] * len(layers)
    if _total(layers, cheapest) > budget:
        return None
    refused: list[list[int]] = []
    for _ in range(CUTS):
        chosen = _solve(layers, budget, refused)
        if chosen is None or _total(layers, chosen) <= budget:
            return chosen or cheapest
        refused.append(chosen)  # HiGHS forgives a relative 1e-6 of a constraint; we do not
    return cheapest


def _total(layers: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> int:
    return sum(layer[c].cost for layer, c in zip(layers, chosen, strict=True))


def _solve(layers: Sequence[Sequence[Choice]], budget: int, refused: Sequence[Sequence[int]]) -> list[int] | None:
    """Return the plan HiGHS finds, other than the refused ones; None if there is no other."""
    if not layers:
        return []
    starts = np.cumsum([0, *(len(layer) for layer in layers)])
    owner = np.repeat(np.arange(len(layers)), np.diff(starts))
    cost = np.array([c.cost for layer in layers for c in layer], float)
    loss = np.array([c.loss for layer in layers for c in layer])
    pick_one = scipy.sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    limits = [scipy.optimize.LinearConstraint(pick_one, 1, 1)]
    limits.append(scipy.optimize.LinearConstraint(cost[None, :] / max(budget, 1), -np.inf, budget / max(budget, 1)))
    for plan in refused:
        cut = np.zeros((1, len(owner)))
        cut[0, starts[:-1] + plan] = 1.0
        limits.append(scipy.optimize.LinearConstraint(cut, -np.inf, len(layers) - 1))
    with redirected(STDOUT, STDERR):  # HiGHS leaves debug prints on stdout
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
