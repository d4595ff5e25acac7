"""Latencies kept to, and layers that do not pay taken back, by planted clocks: exact ones and those with noise."""

import types

import numpy as np
import pytest

from onnx_lrs.errors import BudgetError
from onnx_lrs.planning.prices import Plan
from onnx_lrs.planning.search import LAYER_SECONDS, SECONDS, TOLD, EndToEnd, together, within_latency, without
from onnx_lrs.progress import Silent
from onnx_lrs.solvers import Candidate

WHOLE = 1_000_000  # ns


class Planted(EndToEnd):
    """A network whose layers really save a known share of its time, read with noise."""

    def __init__(self, real, noise=0.0, seed=0):
        self._real, self._noise, self._rng, self._proven = real, noise, np.random.default_rng(seed), set()

    def _longer(self, plan, nodes, seconds):
        blur = self._noise * np.sqrt(LAYER_SECONDS / seconds) * self._rng.standard_normal()
        return sum(self._real[node] for node in nodes) + blur


def plan_of(shares, rank=8, loss=0.0):
    return Plan({node: Candidate("low-rank", rank, 1, loss, np.zeros(0, np.int64), 0.0) for node in shares})


def timing_of(shares):
    """Predicts that a plan takes longer without a layer by its share of WHOLE."""
    missing = lambda plan: sum(share for node, share in shares.items() if node not in plan.chosen)  # noqa: E731
    return types.SimpleNamespace(before=WHOLE, now=WHOLE, predict_ns=lambda plan: round(WHOLE * (1 + missing(plan))))


def kept(real, predicted, **more):
    return set(Planted(real, **more).without_idle(plan_of(predicted), timing_of(predicted)).chosen)


def names(count, share):
    return {f"{share}-{i}": share for i in range(count)}


@pytest.mark.parametrize("idle", [0.0, -0.01])
def test_without_noise_just_the_idle_layers_go(idle):
    predicted = names(5, 0.01) | names(4, 0.05)
    real = {node: idle if share == 0.01 else share for node, share in predicted.items()}
    assert kept(real, predicted) == set(names(4, 0.05))


def test_a_layer_that_is_idle_among_others_that_pay_goes_too():
    predicted = names(4, 0.04)
    real = {**predicted, "0.04-2": -0.001}
    assert kept(real, predicted) == set(predicted) - {"0.04-2"}


def test_what_is_predicted_to_save_nothing_goes_unasked():
    assert kept({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.5}) == {"b"}


def test_many_layers_that_save_less_than_noise_stay():
    """What a network of 40 small layers loses by layers taken back in error is less than what it saves by them."""
    predicted = names(40, 0.01)
    real = dict.fromkeys(predicted, 0.004)
    lost = []
    for seed in range(30):
        there = kept(real, predicted, noise=0.008, seed=seed)
        lost.append(0.004 * (len(predicted) - len(there)))
    assert np.mean(lost) < 0.01  # of 0.16
    assert max(lost) < 0.03


def test_what_seemed_idle_is_asked_together():
    """A clock that says of each group that it saves nothing is overruled by the longer look at all of them."""

    class Short(Planted):
        def _longer(self, plan, nodes, seconds):
            return -0.001 if seconds < SECONDS else super()._longer(plan, nodes, seconds)

    predicted = names(8, 0.01)
    found = Short(dict.fromkeys(predicted, 0.004)).without_idle(plan_of(predicted), timing_of(predicted))
    assert 0.004 * (len(predicted) - len(found.chosen)) <= 0.005


def test_layers_that_paid_once_are_not_asked_again():
    predicted = names(4, 0.04)
    clock = Planted(predicted)
    plan = clock.without_idle(plan_of(predicted), timing_of(predicted))
    clock._real = dict.fromkeys(predicted, -1.0)
    assert clock.without_idle(plan, timing_of(predicted)) == plan


def test_another_candidate_of_a_layer_that_paid_is_asked():
    predicted = names(4, 0.04)
    clock = Planted(predicted)
    clock.without_idle(plan_of(predicted), timing_of(predicted))
    clock._real = dict.fromkeys(predicted, -1.0)
    assert not clock.without_idle(plan_of(predicted, rank=16), timing_of(predicted)).chosen


# ------------------------------------------------------------------------------------------------ within a latency


class Desk:
    """Plans whose real latency is a known function of the limit that they were made for, down to a floor."""

    has_other_limits = False

    def __init__(self, real, floor=0.0, loss=lambda given: 0.0):
        self.timing = types.SimpleNamespace(calibrate=lambda plan, real: None)
        self._real, self._floor, self._loss, self.asked, self.never = real, floor, loss, [], ()

    def ceiling(self):
        return 1.0

    def plan(self, given, dense=frozenset()):
        if given < self._floor or dense:
            raise BudgetError("too tight", "")
        self.asked.append(given)
        return plan_of("a", rank=round(1e6 * given), loss=self._loss(given))

    def ratio(self, plan):
        return self._real(plan.chosen["a"].rank / 1e6) if plan.chosen else 1.0

    def without_idle(self, plan, timing):
        return without(plan, self.never)

    def found(self, wanted):
        return self.ratio(within_latency(self, self, wanted, Silent()))


@pytest.mark.parametrize("wanted", [0.3, 0.55, 0.8])
@pytest.mark.parametrize("off", [0.8, 1.0, 1.25])
def test_a_prediction_that_is_off_is_corrected(wanted, off):
    assert 0.95 * wanted <= Desk(lambda given: min(off * given, 1.0)).found(wanted) <= wanted


def test_over_a_jump_the_limit_is_halved_and_not_thrown_back_and_forth():
    """From 0.71 to 0.49 where a plan of many small layers changes."""
    desk = Desk(lambda given: given * (1.05 if given > 0.68 else 0.72))
    assert desk.found(0.7) == pytest.approx(0.68 * 0.72, rel=0.03)


def test_a_limit_near_the_least_possible_is_not_refused_too_early():
    desk = Desk(lambda given: 1.1 * given, floor=0.355)
    assert 0.37 <= desk.found(0.4) <= 0.4
    with pytest.raises(BudgetError, match=r"--latency 0\.38 was not reached"):
        Desk(lambda given: 1.1 * given, floor=0.355).found(0.38)


def test_of_the_plans_that_hold_the_one_of_least_loss_is_taken():
    """The looser one may be without layers that seemed idle, and make up for them elsewhere."""
    real = lambda given: 0.4 if given <= 0.5 else 0.49  # noqa: E731
    assert Desk(real, loss=lambda given: 0.1 if given <= 0.5 else 0.2).found(0.5) == 0.4
    assert Desk(real, loss=lambda given: 0.1 if given <= 0.5 else 0.05).found(0.5) == 0.49


def test_layers_that_were_idle_in_a_looser_plan_are_tried_before_a_latency_is_refused():
    desk = Desk(lambda given: given)
    desk.never = ("a",)
    assert desk.found(0.5) <= 0.5


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_every_layer_once_in_order_with_as_much_as_can_be_told(seed):
    rng = np.random.default_rng(seed)
    shares = {str(i): share for i, share in enumerate(np.sort(rng.random(30) ** 3 / 10))}
    groups = together(shares)
    assert [node for group in groups for node in group] == list(shares)
    small = [group for group in groups if shares[group[0]] < TOLD]
    assert all(len(group) == 1 for group in groups if group not in small)
    assert all(sum(shares[node] for node in group) >= TOLD for group in small[:-1])
    assert all(sum(shares[node] for node in group[:-1]) < TOLD for group in small)
    assert together({}) == []


def test_a_plan_without_some_layers_is_the_same_for_the_others():
    assert without(plan_of("abc"), "b").chosen.keys() == {"a", "c"}
