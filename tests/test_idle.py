"""Layers that do not make a network faster are taken back, by clocks that are less exact than what a layer saves."""

import types

import numpy as np
import pytest

from onnx_lrs.planning.prices import Plan
from onnx_lrs.planning.search import LAYER_SECONDS, SECONDS, TOLD, EndToEnd, together, without

WHOLE = 1_000_000  # ns


class Planted(EndToEnd):
    """A network whose layers really save a known share of its time, read with noise."""

    def __init__(self, real, noise=0.0, seed=0):
        self._real, self._noise, self._rng, self._proven = real, noise, np.random.default_rng(seed), set()

    def _longer(self, plan, nodes, seconds):
        blur = self._noise * np.sqrt(LAYER_SECONDS / seconds) * self._rng.standard_normal()
        return sum(self._real[node] for node in nodes) + blur


def plan_of(shares):
    return Plan(dict.fromkeys(shares))


def timing_of(shares):
    """Predicts that a plan takes longer without a layer by its share of WHOLE."""
    missing = lambda plan: sum(share for node, share in shares.items() if node not in plan.chosen)  # noqa: E731
    return types.SimpleNamespace(before=WHOLE, predict_ns=lambda plan: round(WHOLE * (1 + missing(plan))))


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
