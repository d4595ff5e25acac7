"""What other budgets would have cost: plans along the same error curves, none of them fitted."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lrs.calibration.subject import Subject
from onnx_lrs.config import Budget
from onnx_lrs.planning.plan import EXACT, Curves, Desk, limits_of, loss_of
from onnx_lrs.planning.prices import Plan, cost_of
from onnx_lrs.planning.timing import Timing
from onnx_lrs.report.result import Pareto, ParetoPoint

PLANS = 32  # of each kind of costs; a plan takes milliseconds
FAR = 0.5  # of the chosen plan's latency: what is predicted below was scaled to a network too different


def pareto(subject: Subject, curves: Curves, plan: Plan, budget: Budget, timing: Timing | None) -> Pareto:
    """Return plans from the smallest to the dense one, and the given one among them.

    The cost is latency where that decides, else the first limit of the budget. Other limits are left out of account:
    where one of them decided, the plan lies above the curve. Latencies are those known already; nothing is timed, and
    plans so fast that nothing is known of them are left out.

    Parameters
    ----------
    subject : Subject
        The model.
    curves : mapping of node to candidates
        What each layer may become, dense apart.
    plan : Plan
        The plan of the run; without layers where the original was kept.
    budget : Budget
        What was asked for; its first limit names the cost where latency does not decide.
    timing : Timing or None
        The price of latency where it decides.
    """
    kind = "latency" if timing is not None else next(iter(budget.limits), "params")
    (limit,) = limits_of(subject, {kind: 1.0}, timing)
    desk, whole = Desk(subject, curves, [limit], ()), max(limit.price.before, 1)
    found = [
        ParetoPoint(desk.cost(solved) / whole, solved.loss, len(solved.plan.chosen))
        for solved in desk.along(plan, PLANS)
    ]
    chosen = None
    if plan.chosen:
        chosen = ParetoPoint(cost_of(limit.price, subject, plan) / whole, loss_of(plan), len(plan.chosen))
        found.append(chosen)
    if timing is not None:
        found = within_reach(found, chosen)
    return Pareto(kind, budget.limits.get(kind), tuple(undominated(found)), chosen)


def within_reach(points: Sequence[ParetoPoint], chosen: ParetoPoint | None) -> list[ParetoPoint]:
    """Return the points whose latency can be told.

    What layers save is scaled to what the whole network took with the chosen plan. Laid on to much faster plans it may
    save more than there is.
    """
    least = 0.0 if chosen is None else FAR * max(chosen.fraction, 0.0)
    return [point for point in points if point.fraction > least]


def undominated(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Return the points that no other one beats in both cost and loss, by rising cost."""
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.fraction, p.loss, p.layers)):
        if not front or point.loss < front[-1].loss - EXACT:
            front.append(point)
    return front
