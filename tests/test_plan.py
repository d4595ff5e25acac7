"""The plan of a whole model: within its limits to the last unit, and near the best of all plans there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnx_lrs.calibration.subject import Subject
from onnx_lrs.errors import BudgetError
from onnx_lrs.graph.layers import Layer
from onnx_lrs.planning.plan import Curves, Desk, limits_of, make_plan
from onnx_lrs.planning.prices import Plan, alive_after, cost_of
from onnx_lrs.solvers import Candidate
from tests.test_prices import NETS, subject_of

CHAINS = ("conv chain", "gemm chain without bias", "branches", "matmul")
COUNTS = 3  # candidates of each form


def curve(layer: Layer, rng: np.random.Generator) -> list[Candidate]:
    """Return ranks and nested channels of random losses that fall as they grow."""
    found, order = [], rng.permutation(layer.channels)
    scale = np.exp(rng.standard_normal(2))
    for part in sorted(rng.choice(np.arange(0.1, 0.9, 0.1), COUNTS, replace=False)):
        rank = max(int(part * min(layer.out, layer.d) / 2), 1)
        kept = max(int(part * layer.channels), 1)
        low = rank * (layer.out + layer.d), float(scale[0] * (1 - part) ** 2)
        few = kept * layer.taps * layer.out, float(scale[1] * (1 - part) ** 2)
        found.append(Candidate("low-rank", rank, *low, np.zeros(0, np.int64), 0.0))
        found.append(Candidate("channels", 0, *few, np.sort(order[:kept]), 0.0))
    return found


def loss_of(plan: Plan) -> float:
    return sum(c.loss if c.loss <= 1 else 1 + np.log(c.loss) for c in plan.chosen.values())


def best_of_all(subject: Subject, curves: Curves, limit) -> float:
    """Return the least loss of any plan within a limit, by trying all."""
    least = np.inf
    for picked in itertools.product(*[[None, *curves[layer.node]] for layer in subject.layers]):
        plan = Plan({la.node: c for la, c in zip(subject.layers, picked, strict=True) if c is not None})
        if loss_of(plan) < least and cost_of(limit.price, subject, plan) <= limit.most:
            least = loss_of(plan)
    return least


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("name", CHAINS)
def test_what_layers_save_each_other_is_seen(name, kind):
    subject = subject_of(NETS[name])
    gaps, gained = [], 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        curves = {layer.node: curve(layer, rng) for layer in subject.layers}
        first = subject.layers[0].node  # as the first Conv of a network: too few channels to drop any
        curves[first] = [c for c in curves[first] if c.form != "channels"]
        limits = limits_of(subject, {kind: float(rng.uniform(0.35, 0.7))}, None)
        desk = Desk(subject, curves, limits, ())
        blind = desk.starts()[0]
        assert desk.is_within(blind)
        plan = make_plan(subject, curves, limits)
        assert cost_of(limits[0].price, subject, plan) <= limits[0].most
        assert loss_of(plan) <= blind.loss + 1e-9
        least = best_of_all(subject, curves, limits[0])
        gained += loss_of(plan) < 0.99 * blind.loss and bool(alive_after(subject, plan))
        if blind.loss - least > 1e-3 * blind.loss:  # allocate's own gap is less
            gaps.append((loss_of(plan) - least) / (blind.loss - least))
    if name != "branches":  # where two readers have to give up the same channels for a filter to die
        assert gained, "nothing was to be gained: nothing was tested"
        assert np.mean(gaps) < 0.25  # of the way from the knapsack that sees nothing of it to the best of all plans


def test_two_limits_hold_at_once_with_dead_filters():
    subject, died = subject_of(NETS["conv chain"]), 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        curves = {layer.node: curve(layer, rng) for layer in subject.layers}
        limits = limits_of(subject, {"params": 0.5, "macs": 0.45}, None)
        plan = make_plan(subject, curves, limits)
        assert all(cost_of(limit.price, subject, plan) <= limit.most for limit in limits)
        died += bool(alive_after(subject, plan))
    assert died


def test_layers_that_shall_stay_dense_do():
    subject = subject_of(NETS["conv chain"])
    rng = np.random.default_rng(0)
    curves = {layer.node: curve(layer, rng) for layer in subject.layers}
    plan = make_plan(subject, curves, limits_of(subject, {"params": 0.7}, None), {subject.layers[1].node})
    assert subject.layers[1].node not in plan.chosen
    assert plan.chosen
    assert subject.layers[1].node in make_plan(subject, curves, limits_of(subject, {"params": 0.7}, None)).chosen


def test_what_only_dead_filters_make_possible_is_found():
    """All layers keep half of their channels: a quarter of the weights, where the sum of the layers says a half."""
    subject = subject_of(NETS["conv chain"])
    curves = {}
    for layer in subject.layers:
        half = np.arange(layer.channels // 2)
        curves[layer.node] = [Candidate("channels", 0, len(half) * layer.taps * layer.out, 0.1, half, 0.0)]
    limits = limits_of(subject, {"params": 0.35}, None)
    plan = make_plan(subject, curves, limits)
    assert len(plan.chosen) == len(subject.layers)
    assert cost_of(limits[0].price, subject, plan) <= limits[0].most
    with pytest.raises(BudgetError, match=r"leave 0\.3\d\d of the params"):
        make_plan(subject, curves, limits_of(subject, {"params": 0.2}, None))
