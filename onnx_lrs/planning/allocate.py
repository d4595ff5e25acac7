r"""Share a budget out over the layers: the multiple-choice knapsack, solved by HiGHS.

.. math:: \min \sum_l \mathrm{loss}_{l,c(l)} \quad \text{s.t.} \quad \sum_l \mathrm{cost}_{l,c(l)} \le \mathrm{budget}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

from onnx_lrs.native import STDERR, STDOUT, redirected

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
    if not layers:
        return [] if budget >= 0 else None
    smallest = sum(min(c.cost for c in layer) for layer in layers)
    limit = budget
    while limit >= smallest:
        chosen = _solve(layers, limit)
        over = sum(layer[c].cost for layer, c in zip(layers, chosen, strict=True)) - budget
        if over <= 0:
            return chosen
        limit -= over  # HiGHS forgives a relative 1e-6 of a constraint; we do not
    return [int(np.argmin([c.cost for c in layer])) for layer in layers] if smallest <= budget else None


def _solve(layers: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    sizes = [len(layer) for layer in layers]
    owner = np.repeat(np.arange(len(layers)), sizes)
    cost = np.array([c.cost for layer in layers for c in layer], float)
    loss = np.array([c.loss for layer in layers for c in layer])
    pick_one = scipy.sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    with redirected(STDOUT, STDERR):  # HiGHS 1.8 leaves debug prints on stdout
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
        raise RuntimeError(f"HiGHS found no plan for a feasible budget: {solved.message}")
    return [int(np.argmax(part)) for part in np.split(solved.x, np.cumsum(sizes)[:-1])]
