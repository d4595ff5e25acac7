r"""Share budgets out over the layers: the multiple-choice knapsack, solved by HiGHS.

.. math:: \min \sum_l \mathrm{loss}_{l,c(l)} \quad \text{s.t.} \quad
          \sum_l \mathrm{cost}_{k,l,c(l)} \le \mathrm{budget}_k \quad \text{for every limit } k
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray

from onnx_lrs.native import STDOUT, redirected

CUTS = 50  # over-budget plans refused before the cheapest one is taken
GAP = 1e-4  # relative; the error curves themselves are not known better than that
ROUNDING, ROUNDED = 1e-9, 64  # what counts as nothing in a relaxed plan; most plans that it is rounded to
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


def supported(layers: Sequence[Sequence[Choice]], most: int) -> list[list[int]]:
    """Return plans that are best at some price of a unit of the first cost, from the cheapest to that of least loss.

    These are the plans on the lower convex hull of loss over cost: from the cheapest choices on, the step of one layer
    that saves the most loss a unit of cost comes first. No knapsack is solved. At most so many, spread evenly along
    the steps; each plan is the index of the chosen :class:`Choice` of each layer.
    """
    hulls = [_hull(own) for own in layers]
    steps = [
        ((own[a].loss - own[b].loss) / (own[b].costs[0] - own[a].costs[0]), number, b)
        for number, (own, hull) in enumerate(zip(layers, hulls, strict=True))
        for a, b in itertools.pairwise(hull)
    ]
    steps.sort(key=lambda step: -step[0])  # of one layer they fall along its hull, so they stay in order
    chosen = [hull[0] for hull in hulls]
    stops = set(np.linspace(0, len(steps), min(most, len(steps) + 1)).round().astype(int).tolist())
    found = [list(chosen)] if 0 in stops else []
    for done, (_, number, index) in enumerate(steps, start=1):
        if layers[number][index].loss < layers[number][chosen[number]].loss:  # slopes may be equal but for rounding
            chosen[number] = index
        if done in stops:
            found.append(list(chosen))
    return found


def _hull(layer: Sequence[Choice]) -> list[int]:
    """Return the choices on the lower convex hull of loss over the first cost, by rising cost and falling loss."""
    kept: list[int] = []
    for i in sorted(range(len(layer)), key=lambda i: (layer[i].costs[0], layer[i].loss)):
        if kept and layer[i].loss >= layer[kept[-1]].loss:
            continue
        while len(kept) > 1 and _is_above(*(layer[k] for k in (kept[-2], kept[-1], i))):
            kept.pop()
        kept.append(i)
    return kept


def _is_above(left: Choice, middle: Choice, right: Choice) -> bool:
    """Return whether the middle one is on or above the line between the others."""
    first = (middle.loss - left.loss) * (right.costs[0] - left.costs[0])
    return first >= (right.loss - left.loss) * (middle.costs[0] - left.costs[0])


def _undominated(layer: Sequence[Choice]) -> list[int]:
    """Return the choices that no other one beats in every cost and in loss, by rising cost."""
    costs = np.array([c.costs for c in layer], np.int64).reshape(len(layer), -1)
    loss = np.array([c.loss for c in layer])
    order = np.lexsort((loss, *costs.T[::-1]))
    if costs.shape[1] == 1:  # each has to lose less than all that cost no more
        least = np.minimum.accumulate(loss[order])
        return [int(i) for i in order[np.append(True, loss[order][1:] < least[:-1])]]
    kept: list[int] = []
    for index in order:
        if not ((costs[kept] <= costs[index]).all(axis=1) & (loss[kept] <= loss[index])).any():
            kept.append(int(index))
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


def _solve(
    layers: Sequence[Sequence[Choice]], budgets: Sequence[int], refused: Sequence[Sequence[int]]
) -> list[int] | None:
    """Return the best plan, other than the refused ones; None if there is no other.

    No choice that loses more than a whole plan does is in a better one. They are left out and it is solved again, or
    hopeless choices would set the scale on which HiGHS rounds.
    """
    if not layers:
        return []
    program = _program(layers, budgets, refused)
    chosen, offered = None, _hopeful(program, lambda plan: plan not in refused and _fits(layers, plan, budgets))
    while (picked := _picked(program, offered)) is not None:
        better = [int(np.argmax(picked[a:b])) for a, b in itertools.pairwise(program.starts)]
        total = program.total(better)
        if chosen is None or total < program.total(chosen):
            chosen = better
        if program.loss[offered].max() <= WIDE * total:
            break
        offered &= program.loss <= total
    return chosen


@dataclasses.dataclass(frozen=True)
class _Program:
    """All choices in a row: losses (n,), those of layer l from starts[l] on; rows @ x <= most, (m, n) and (m,)."""

    loss: NDArray[np.float64]
    starts: NDArray[np.int64]
    rows: NDArray[np.float64]
    most: NDArray[np.float64]

    @property
    def owner(self) -> NDArray[np.intp]:
        """The layer of every choice, (n,)."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def one_each(self) -> scipy.sparse.csr_array:
        """The rows that sum the choices of each layer, (layers, n)."""
        return scipy.sparse.csr_array((np.ones(len(self.loss)), (self.owner, np.arange(len(self.loss)))))

    def total(self, plan: Sequence[int]) -> float:
        """Return what a plan loses."""
        return float(self.loss[self.starts[:-1] + plan].sum())


def _program(layers: Sequence[Sequence[Choice]], budgets: Sequence[int], refused: Sequence[Sequence[int]]) -> _Program:
    starts = np.cumsum([0, *(len(layer) for layer in layers)])
    costs = np.array([c.costs for layer in layers for c in layer], float).T
    largest = 1e-3 * np.abs(costs).max(axis=1, initial=0.0)  # a budget may be next to nothing, or below
    scales = np.maximum(np.maximum(np.abs(np.array(budgets, float)), largest), 1.0)
    cuts = np.zeros((len(refused), int(starts[-1])))
    for cut, plan in zip(cuts, refused, strict=True):
        cut[starts[:-1] + plan] = 1.0
    rows = np.vstack([costs / scales[:, None], cuts])
    most = np.array([*(np.array(budgets, float) / scales), *(len(plan) - 1 for plan in refused)])
    return _Program(np.array([c.loss for layer in layers for c in layer]), starts, rows, most)


def _hopeful(program: _Program, is_allowed: Callable[[list[int]], bool]) -> NDArray[np.bool_]:
    r"""Return which choices may be in a plan that loses less than the relaxed problem's, rounded; (n,) of bool.

    With prices :math:`p \ge 0` on the rows of :math:`A x \le b`, every plan within the limits loses at least

    .. math:: \sum_l \min_{j \in l} (\mathrm{loss}_j + p^T a_j) - p^T b

    and one that holds choice j as much more as j exceeds its layer's minimum by. Those of the linear relaxation leave a
    few choices a layer; HiGHS does the same for itself, and takes several times as long for it.
    """
    scale = max(program.loss.max(), 1e-300)
    with redirected(STDOUT, None):
        relaxed = scipy.optimize.linprog(
            program.loss / scale, program.rows, program.most, program.one_each, np.ones(len(program.starts) - 1)
        )
    every = np.ones(len(program.loss), bool)
    if relaxed.x is None:
        return every
    halves = [np.flatnonzero(relaxed.x[a:b] > ROUNDING).tolist() for a, b in itertools.pairwise(program.starts)]
    if math.prod(map(len, halves)) > ROUNDED:
        return every
    totals = [program.total(plan) for plan in map(list, itertools.product(*halves)) if is_allowed(plan)]
    if not totals:
        return every
    prices = scale * np.maximum(-relaxed.ineqlin.marginals, 0.0)
    priced = program.loss + prices @ program.rows
    least = np.minimum.reduceat(priced, program.starts[:-1])
    paid = float(prices @ program.most)
    bound, reached = float(least.sum()) - paid, min(totals)
    return np.asarray(bound + priced - least[program.owner] <= reached + ROUNDING * (reached + abs(paid)), bool)


def _picked(program: _Program, offered: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """Return HiGHS's answer, (n,) of 0 and 1, made of what is offered; None if there is none."""
    with redirected(STDOUT, None):  # HiGHS leaves debug prints there
        solved = scipy.optimize.milp(
            program.loss / max(program.loss[offered].max(), 1e-300),
            integrality=np.ones(len(program.loss)),
            bounds=scipy.optimize.Bounds(0, offered.astype(float)),
            constraints=[
                scipy.optimize.LinearConstraint(program.one_each, 1, 1),
                scipy.optimize.LinearConstraint(program.rows, -np.inf, program.most),
            ],
            options={"mip_rel_gap": GAP},
        )
    found: NDArray[np.float64] | None = solved.x
    return found
