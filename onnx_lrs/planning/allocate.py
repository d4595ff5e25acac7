r"""Share a budget out over the layers: the multiple-choice knapsack, solved exactly by HiGHS.

.. math:: \min \sum_l \mathrm{loss}_{l,c(l)} \quad \text{s.t.} \quad \sum_l \mathrm{cost}_{l,c(l)} \le \mathrm{budget}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

GAP = 1e-4  # relative; the error curves themselves are not known better than that


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to build a layer: what it costs and what it loses."""

    cost: int
    loss: float


def allocate(layers: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """Return the index of the chosen :class:`Choice` of each layer, or None if even the cheapest ones exceed the budget."""
    if not layers:
        return [] if budget >= 0 else None
    if sum(min(c.cost for c in layer) for layer in layers) > budget:
        return None
    owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    cost = np.array([c.cost for layer in layers for c in layer], float)
    loss = np.array([c.loss for layer in layers for c in layer])
    pick_one = scipy.sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    solved = scipy.optimize.milp(
        loss / max(loss.max(), 1e-300),
        integrality=np.ones(len(owner)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(pick_one, 1, 1),
            scipy.optimize.LinearConstraint(cost[None, :] / max(budget, 1), -np.inf, 1),
        ],
        options={"mip_rel_gap": GAP},
    )
    if solved.x is None:
        return None
    chosen = [int(np.argmax(part)) for part in np.split(solved.x, np.flatnonzero(np.diff(owner)) + 1)]
    return _within(layers, chosen, budget)


def _within(layers: Sequence[Sequence[Choice]], chosen: list[int], budget: int) -> list[int]:
    """Undo what the solver's tolerance let pass: the budget holds exactly."""
    while sum(layer[c].cost for layer, c in zip(layers, chosen, strict=True)) > budget:
        swaps = [
            (other.loss - layer[c].loss, number, index)
            for number, (layer, c) in enumerate(zip(layers, chosen, strict=True))
            for index, other in enumerate(layer)
            if other.cost < layer[c].cost
        ]
        _, number, index = min(swaps)
        chosen[number] = index
    return chosen
