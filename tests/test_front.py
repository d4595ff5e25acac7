"""What other budgets would have cost: plans on the hull of loss over cost, counted as the rewritten model is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnx_lrs
from onnx_lrs import Budget, Config
from onnx_lrs.planning.allocate import Choice, supported
from onnx_lrs.planning.front import FAR, pareto, undominated, within_reach
from onnx_lrs.planning.plan import Curves, limits_of, make_plan
from onnx_lrs.planning.prices import Plan, cost_of
from onnx_lrs.report.result import ParetoPoint
from tests import small_nets as nets
from tests.test_plan import CHAINS, curve, loss_of
from tests.test_prices import NETS, subject_of


def totals(layers: list[list[Choice]], plan: list[int]) -> tuple[int, float]:
    picked = [own[c] for own, c in zip(layers, plan, strict=True)]
    return sum(c.costs[0] for c in picked), sum(c.loss for c in picked)


CHOICES = st.lists(st.builds(Choice, st.integers(-5, 60).map(lambda c: (c,)), st.floats(0, 1)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(layers=st.lists(CHOICES, min_size=1, max_size=4))
def test_the_plans_are_those_that_some_price_makes_best(layers):
    """None of all plans lies below the line between two neighbours, and the ends are the cheapest and the best."""
    found = [totals(layers, plan) for plan in supported(layers, 1000)]
    every = [totals(layers, list(p)) for p in itertools.product(*(range(len(own)) for own in layers))]
    assert found[0] == min(every, key=lambda point: (point[0], point[1]))
    assert found[-1][1] == pytest.approx(min(loss for _, loss in every))
    assert [cost for cost, _ in found] == sorted({cost for cost, _ in found})
    for (cost, loss), (more, less) in itertools.pairwise(found):
        for other, its in every:
            if cost <= other <= more:
                line = loss + (less - loss) * (other - cost) / (more - cost)
                assert its >= line - 1e-9


def test_a_few_plans_are_spread_over_all_of_them():
    rng = np.random.default_rng(0)
    layers = [[Choice((int(c),), float(1 / c)) for c in rng.choice(np.arange(1, 99), 8, False)] for _ in range(20)]
    every, few = supported(layers, 1000), supported(layers, 5)
    assert len(every) > 50
    assert len(few) == 5
    assert few[0] == every[0]
    assert few[-1] == every[-1]
    assert all(plan in every for plan in few)
    assert supported([], 5) == [[]]


POINTS = st.lists(st.builds(ParetoPoint, st.floats(0, 1), st.floats(0, 1), st.integers(0, 9)), max_size=12)


@given(POINTS)
def test_a_front_holds_what_nothing_beats(points):
    front = undominated(points)
    for point in points:
        assert any(p.fraction <= point.fraction and p.loss <= point.loss + 1e-12 for p in front)
    for one, other in itertools.pairwise(front):
        assert one.fraction <= other.fraction
        assert one.loss > other.loss


@pytest.mark.parametrize("kind", ["params", "macs", "size"])
@pytest.mark.parametrize("name", CHAINS)
def test_the_curve_counts_as_the_plan_does(name, kind):
    subject, better = subject_of(NETS[name]), 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        curves: Curves = {layer.node: curve(layer, rng) for layer in subject.layers}
        limits = limits_of(subject, {kind: 0.7}, None)
        plan, price = make_plan(subject, curves, limits), limits[0].price
        found = pareto(subject, curves, plan, Budget(**{kind: 0.7}), None)
        assert (found.kind, found.limit) == (kind, 0.7)
        assert found.chosen is not None
        assert found.chosen.fraction == cost_of(price, subject, plan) / price.before <= 0.7
        assert found.chosen.loss == pytest.approx(loss_of(plan))
        assert found.points[-1] == ParetoPoint(price.now / price.before, 0.0, 0)
        assert any(p.fraction <= found.chosen.fraction and p.loss <= found.chosen.loss for p in found.points)
        within = [p for p in found.points if p.fraction <= 0.7]
        better += within[-1].loss < 0.5 * found.chosen.loss
    assert better == 0  # make_plan is not beaten by half: a plan that the curve knew would have been taken


def test_latencies_far_below_the_plan_are_not_told():
    points = [ParetoPoint(fraction, 1 - fraction, 1) for fraction in (-0.1, 0.05, 0.19, 0.21, 0.4, 0.8)]
    assert [p.fraction for p in within_reach(points, points[4])] == [0.21, 0.4, 0.8]
    assert [p.fraction for p in within_reach(points, None)] == [0.05, 0.19, 0.21, 0.4, 0.8]
    assert FAR == 0.5


def test_a_run_without_a_report_has_no_curves():
    data = nets.as_floats(nets.pictures())
    plain = onnx_lrs.compress(nets.conv_net(), data=data, config=Config(budget=Budget(params=0.5), threads=1))
    assert plain.pareto is None
    assert {layer.curve for layer in plain.layers} == {()}


def test_where_layers_have_no_choice_the_original_is_the_only_plan():
    subject = subject_of(NETS["conv chain"])
    found = pareto(subject, {layer.node: [] for layer in subject.layers}, Plan({}), Budget(macs=1), None)
    assert (found.points, found.chosen) == ((ParetoPoint(1.0, 0.0, 0),), None)


def test_the_curves_of_a_run_hold_what_its_plan_took(tmp_path):
    data = nets.as_floats(nets.pictures())
    config = Config(budget=Budget(params=0.5), threads=1, report=tmp_path / "page.html", fit="independent")
    result = onnx_lrs.compress(nets.conv_net(), data=data, config=config)
    assert result.pareto is not None
    assert result.pareto.chosen in result.pareto.points
    assert result.pareto.chosen.fraction == pytest.approx(result.after.params / result.before.params)
    for layer in result.layers:
        chosen = [point for point in layer.curve if point.chosen]
        assert len(chosen) == (layer.form != "dense")
        for point in chosen:
            assert (point.form, point.rank, point.kept_channels) == (layer.form, layer.rank, layer.kept_channels)
            if layer.kept_outputs == layer.outputs:
                assert point.params == layer.params_after
        for form in {point.form for point in layer.curve}:
            own = [point for point in layer.curve if point.form == form and not point.chosen]
            assert [p.params for p in own] == sorted(p.params for p in own)
            assert [p.error for p in own] == sorted((p.error for p in own), reverse=True)


@pytest.mark.parametrize("method", ["lrs", "greedy", "hsvd", "channels", "magnitude"])
def test_the_weights_of_a_layer_are_told_apart(method):
    data, elements = nets.as_floats(nets.pictures()), method == "greedy"
    structure = "elements" if elements else "channels"
    config = Config(budget=Budget(params=0.5), threads=1, method=method, structure=structure, fit="independent")
    result = onnx_lrs.compress(nets.conv_net(), data=data, config=config)
    for layer in result.layers:
        rest = layer.params_after - layer.low_rank_params - layer.sparse_params
        assert bool(layer.low_rank_params) == bool(layer.rank)
        assert bool(layer.sparse_params) == bool(layer.kept_channels or layer.elements)
        assert (rest == 0) == (layer.form != "dense")
        if elements:
            assert layer.sparse_params == layer.elements
        elif layer.kept_channels:
            taps = layer.params_before // layer.outputs // layer.channels
            assert layer.sparse_params == layer.kept_outputs * layer.kept_channels * taps
