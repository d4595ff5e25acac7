"""What an error of a layer makes of the outputs: planted laws, bounds, and a layer that is the output."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

import onnx_lrs
from onnx_lrs import Budget, Config
from onnx_lrs.planning import course
from onnx_lrs.planning.plan import carried, limits_of, make_plan
from onnx_lrs.planning.sensitivity import BOUND, POWERS, PROBE_ERRORS, laws, probes_of
from onnx_lrs.solvers import Candidate
from tests import small_nets as nets
from tests.test_prices import subject_of

MIDDLE = float(np.exp(np.mean(np.log(PROBE_ERRORS))))


def points(scale: float, power: float, errors: tuple[float, ...] = PROBE_ERRORS) -> tuple[tuple[float, float], ...]:
    return tuple((error, scale * error**power) for error in errors)


def laws_of(measured, bound=BOUND):
    """Return the laws where all points are of one kind of form."""
    found = laws({node: {"low-rank": own} for node, own in measured.items()}, bound)
    return {node: kinds["low-rank"] for node, kinds in found.items()}


@given(st.lists(st.tuples(st.floats(0.5, 2.0), st.floats(*POWERS)), min_size=1, max_size=6))
def test_a_planted_law_is_found(planted):
    found = laws_of({str(n): points(*law) for n, law in enumerate(planted)}, bound=1e6)
    for n, (scale, power) in enumerate(planted):
        for error in (PROBE_ERRORS[0], 0.003, 0.03, 0.5):
            assert found[str(n)].loss(error) == pytest.approx(scale * error**power)
        assert found[str(n)].loss(0.0) == 0.0


@given(st.floats(0.5, 2.0), st.floats(*POWERS), st.floats(1e-9, 1.0))
def test_a_network_answers_to_errors_below_the_probes_in_proportion(scale, power, share):
    found = laws_of({"own": points(scale, power)}, bound=1e6)["own"]
    assert found.loss(share * PROBE_ERRORS[0]) == pytest.approx(share * scale * PROBE_ERRORS[0] ** power)


def test_between_two_probes_their_own_power_counts():
    """A layer whose small errors arrive as they are, and whose large ones grow."""
    own = [(0.001, 0.001), (0.01, 0.01), (0.1, 1.0)]
    found = laws_of({"own": own})["own"]
    assert [found.loss(error) for error, _ in own] == pytest.approx([change for _, change in own])
    assert found.loss(0.003) == pytest.approx(0.003)
    assert found.loss(0.1 * 10**-0.5) == pytest.approx(0.1)
    assert found.loss(0.2) == pytest.approx(4.0)


@given(
    st.lists(st.tuples(st.floats(1e-4, 0.9), st.floats(1e-9, 1e3)), min_size=1, max_size=3, unique_by=lambda p: p[0])
)
def test_a_larger_error_never_does_less(measured):
    found = laws_of({"own": sorted(measured)})["own"]
    errors = np.geomspace(1e-6, 1.0, 60)
    losses = [found.loss(error) for error in errors]
    assert all(one < other for one, other in itertools.pairwise(losses))


@given(st.dictionaries(st.text(max_size=2), st.tuples(st.floats(1e-9, 1e9), st.floats(-3, 4)), min_size=1, max_size=7))
def test_levels_stay_near_their_median_and_in_order(planted):
    measured = {node: points(*law) for node, law in planted.items()}
    free, bounded = laws_of(measured, np.inf), laws_of(measured)
    median = np.exp(np.median([np.log(law.loss(MIDDLE)) for law in free.values()]))
    for node, law in bounded.items():
        assert 1 / BOUND <= law.loss(MIDDLE) / median * (1 + 1e-9) <= BOUND * (1 + 1e-6)
        assert POWERS[0] <= law.power <= POWERS[1]
        for other in bounded:
            if free[node].loss(MIDDLE) < free[other].loss(MIDDLE):
                assert law.loss(MIDDLE) <= bounded[other].loss(MIDDLE) * (1 + 1e-9)


def test_outputs_that_do_not_move_or_blow_up_are_at_the_bounds():
    usual = {name: points(1.0, 1.0) for name in "abc"}
    found = laws_of(usual | {"dead": [(0.01, 0.0), (0.1, 0.0)], "wild": [(0.01, np.inf), (0.1, np.nan)]})
    assert found["a"].loss(MIDDLE) == pytest.approx(MIDDLE)
    assert found["dead"].loss(MIDDLE) == pytest.approx(MIDDLE / BOUND)
    assert found["wild"].loss(MIDDLE) == pytest.approx(MIDDLE * BOUND)
    assert laws_of({"dead": [(0.01, 0.0)], "wild": [(0.1, np.nan)]}) == laws_of({}) == {}


def test_every_kind_of_form_follows_its_own_law():
    net = {"layer": {"low-rank": points(1.0, 1.0), "channels": points(4.0, 1.0)}}
    some = [Candidate(form, 1, 1, 0.05, np.zeros(0, np.int64), 0.0) for form in ("spatial", "channels", "tucker")]
    (found,) = carried({"layer": some}, net).values()
    assert [c.at_outputs for c in found] == pytest.approx([0.05, 0.2, 0.05])
    assert [c.loss for c in found] == [0.05] * 3


@pytest.mark.parametrize("lost", [0.0, np.nan, np.inf, None])
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_with_one_usable_probe_bends_like_the_others(lost, first):
    usual = {name: points(1.0, 1.6) for name in "abc"}
    low, *_, high = points(0.5, 1.0)
    other = [] if lost is None else [(low[0] if first else high[0], lost)]
    own = [*other, high] if first else [low, *other]
    found = laws_of(usual | {"own": own}, bound=1e6)["own"]
    kept = high if first else low
    assert found.loss(kept[0]) == pytest.approx(kept[1])
    for error in (0.002, 0.02, 0.3):
        assert found.loss(error) == pytest.approx(kept[1] * (error / kept[0]) ** 1.6)


def test_probes_are_next_to_what_plans_lose_and_apart():
    def of(*losses: float) -> list[float]:
        return [c.loss for c in probes_of([Candidate("low-rank", 1, 1, x, np.zeros(0, np.int64), 0.0) for x in losses])]

    assert of(1e-4, 0.0012, 0.009, 0.05, 0.12, 0.7) == [0.0012, 0.009, 0.12]
    assert of(3e-4, 0.009, 0.05, 0.12, 0.7) == [3e-4, 0.009, 0.12]
    assert of(0.006, 0.009, 0.05) == [0.009, 0.05]
    assert of(0.0, 0.02, 0.05) == [0.05]
    assert of(0.02) == [0.02]
    assert of(0.0) == of() == []


def test_an_error_of_the_last_layer_is_that_of_the_outputs(monkeypatch):
    """On fewer samples than the error was measured on, so nearly."""
    seen = {}
    real = course.carried

    def noted(curves, measured):
        seen.update(measured)
        return real(curves, measured)

    monkeypatch.setattr(course, "carried", noted)
    rng = np.random.default_rng(0)
    net = nets.one_gemm(48, 48, nets.weight(rng, 48, 48))
    x = 10 * rng.standard_normal((600, 48)).astype(np.float32)
    onnx_lrs.compress(net, data=x, config=Config(budget=Budget(params=0.5), multiple=4, threads=1))
    (kinds,) = seen.values()
    assert set(kinds) == {"low-rank", "channels"}
    for error, change in itertools.chain(*kinds.values()):
        assert change == pytest.approx(error, rel=0.3)


def test_what_a_candidate_makes_of_the_outputs_decides_the_plan():
    """Two equal layers with the same curve; an error of the first hardly reaches the outputs, or that of the second."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", [a, w], [b]) for a, w, b in (("x", "v", "h"), ("h", "w", "y"))]
    ends = [[(name, onnx.TensorProto.FLOAT, ["N", 16])] for name in "xy"]
    subject = subject_of(nets.build(nodes, {name: nets.weight(rng, 16, 16) for name in "vw"}, *ends))
    curves = {
        layer.node: [Candidate("low-rank", 4, layer.out * layer.d // 2, 0.05, np.zeros(0, np.int64), 0.0)]
        for layer in subject.layers
    }
    for dull in curves:
        found = carried(curves, {node: {"low-rank": points(0.1 if node == dull else 1.0, 1.0)} for node in curves})
        assert list(make_plan(subject, found, limits_of(subject, {"params": 0.8}, None)).chosen) == [dull]


def test_a_dry_run_tells_a_layer_s_own_error_not_what_it_makes_of_the_outputs(monkeypatch):
    known = []
    real = course.carried

    def noted(curves, measured):
        found = real(curves, measured)
        known.extend((c.loss, c.at_outputs) for some in found.values() for c in some)
        return found

    monkeypatch.setattr(course, "carried", noted)
    x = nets.as_floats(nets.pictures(60))
    config = Config(budget=Budget(params=0.5), multiple=2, threads=1, dry_run=True)
    result = onnx_lrs.compress(nets.conv_net(), data=x, config=config)
    told = {layer.error for layer in result.layers if layer.form != "dense"}
    assert told
    for error in told:
        assert any(error == pytest.approx(np.sqrt(loss), rel=1e-9) for loss, _ in known)
        assert not any(error == pytest.approx(np.sqrt(at_outputs), rel=1e-9) for _, at_outputs in known)
