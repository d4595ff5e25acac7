"""The knapsack over layers: never over budget, and as good as trying every combination."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lrs.planning.allocate import GAP, Choice, allocate


def best_loss(layers, budget):
    """Return the least total loss by enumeration, or None if no combination keeps the budget."""
    fits = [c for c in itertools.product(*layers) if sum(x.costs[0] for x in c) <= budget]
    return min((sum(x.loss for x in c) for c in fits), default=None)


def assert_optimal(layers, budget, tolerance=0.0, exact=False):
    """``tolerance``: relative part of the budget within which HiGHS may take a choice for too dear.

    ``exact``: whatever the largest loss on offer is.
    """
    chosen, best = allocate(layers, (budget,)), best_loss(layers, int(budget * (1 - tolerance)))
    assert (chosen is None) == (best_loss(layers, budget) is None)
    if chosen is None or best is None:
        return
    assert chosen is not None
    assert len(chosen) == len(layers)
    picked = [layer[i] for layer, i in zip(layers, chosen, strict=True)]
    assert sum(p.costs[0] for p in picked) <= budget
    largest = max(c.loss for layer in layers for c in layer)
    assert sum(p.loss for p in picked) <= best * (1 + 2 * GAP) + (0.0 if exact else 1e-12 * largest)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), power=st.sampled_from([1, 2]), share=st.sampled_from([0.98, 0.9, 0.75]))
def test_hopeless_choices_do_not_blur_the_others(data, power, share):
    """Losses over ten decades: HiGHS rounds on the scale of the largest."""
    errors = st.floats(-5, 1).map(lambda exponent: 10.0 ** (power * exponent))
    costs = st.integers(1, 60)
    layers = [
        [Choice((100,), 0.0), *data.draw(st.lists(st.builds(Choice, costs.map(lambda c: (c,)), errors), max_size=5))]
        for _ in range(5)
    ]
    assert_optimal(layers, int(share * 500), exact=True)


def choices(costs, losses):
    return st.lists(st.builds(Choice, costs.map(lambda cost: (cost,)), losses), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    layers=st.lists(choices(st.integers(0, 60), st.floats(0, 1)), min_size=1, max_size=5),
    budget=st.integers(0, 200),
)
def test_equals_enumeration(layers, budget):
    assert_optimal(layers, budget)


@settings(max_examples=100, deadline=None)
@given(
    layers=st.lists(choices(st.integers(1, 3), st.floats(1e-9, 1e-6)), min_size=1, max_size=5),
    budget=st.integers(1, 12),
)
def test_tiny_losses_count_as_much_as_large_ones(layers, budget):
    assert_optimal(layers, budget)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), unit=st.sampled_from([10**6, 10**8, 10**10]))
def test_costs_in_the_billions_keep_the_budget_exactly(data, unit):
    """MACs run into billions: a choice too dear by a single unit must not pass."""
    costs = st.builds(lambda many, few: unit * many + few, st.integers(0, 4), st.integers(0, 3))
    layers = data.draw(st.lists(choices(costs, st.floats(0, 1)), min_size=1, max_size=4))
    near = data.draw(st.integers(-3, 3))
    reachable = [sum(c.costs[0] for c in picked) for picked in itertools.product(*layers)]
    budget = max(data.draw(st.sampled_from(reachable)) + near, 0)
    assert_optimal(layers, budget, tolerance=1e-5)


def test_a_layer_too_dear_by_one_leaves_the_rest_as_good_as_possible():
    """Taking back one choice frees budget that another layer can use."""
    unit = 10**9
    layers = [
        [Choice((unit + 1,), 0.0), Choice((unit // 2,), 0.3)],
        [Choice((unit,), 0.0), Choice((unit // 4,), 0.5), Choice((unit // 2,), 0.29)],
        [Choice((unit // 2,), 0.1), Choice((0,), 0.4)],
    ]
    assert_optimal(layers, 2 * unit)


def test_the_budget_may_be_spent_to_the_last_unit():
    layers = [[Choice((7,), 0.0), Choice((3,), 1.0)], [Choice((5,), 0.0), Choice((2,), 1.0)]]
    assert allocate(layers, (12,)) == [0, 0]
    assert allocate(layers, (11,)) in ([0, 1], [1, 0])
    assert allocate(layers, (5,)) == [1, 1]
    assert allocate(layers, (4,)) is None


def test_no_layers():
    assert allocate([], (0,)) == []
    assert allocate([], (-1,)) is None


def test_a_budget_below_zero_is_infeasible():
    assert allocate([[Choice((0,), 1.0)]], (-1,)) is None


def test_losses_that_are_all_zero():
    chosen = allocate([[Choice((4,), 0.0), Choice((1,), 0.0)]] * 3, (6,))
    assert chosen is not None
    assert sum((4, 1)[i] for i in chosen) <= 6


@pytest.mark.parametrize("seed", range(4))
def test_fifty_layers_of_forty_choices(seed, capfd):
    """A network's size; the loss lies between the relaxed bound of the best multiplier and a small gap above it.

    Nothing may be written to the process's stdout, where the command line puts its JSON (HiGHS does on two of these).
    """
    rng = np.random.default_rng(seed)
    layers = []
    for size in rng.integers(10**4, 10**7, 50):
        costs = np.sort(rng.integers(1, size, 40))[::-1]
        losses = np.sort(rng.random(40)) ** 2 * rng.random()
        layers.append([Choice((int(c),), float(x)) for c, x in zip(costs, losses, strict=True)])
    budget = sum(layer[0].costs[0] for layer in layers) // 3
    chosen = allocate(layers, (budget,))
    assert chosen is not None
    assert sum(layer[i].costs[0] for layer, i in zip(layers, chosen, strict=True)) <= budget
    loss = sum(layer[i].loss for layer, i in zip(layers, chosen, strict=True))
    bound = max(
        sum(min(c.loss + price * c.costs[0] for c in layer) for layer in layers) - price * budget
        for price in np.geomspace(1e-9, 1e-5, 200)
    )
    assert bound <= loss <= 1.002 * bound
    assert capfd.readouterr().out == ""


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_several_limits_hold_at_once_and_the_loss_is_the_least(data):
    pair = st.tuples(st.integers(0, 9), st.integers(0, 9))
    one = st.lists(st.builds(Choice, pair, st.integers(0, 8).map(float)), min_size=1, max_size=4)
    layers = data.draw(st.lists(one, min_size=1, max_size=3))
    budgets = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    every = [list(picked) for picked in itertools.product(*layers)]
    fits = [p for p in every if all(sum(c.costs[k] for c in p) <= budgets[k] for k in range(2))]
    chosen = allocate(layers, budgets)
    if not fits:
        assert chosen is None
    else:
        assert chosen is not None
        picked = [layer[i] for layer, i in zip(layers, chosen, strict=True)]
        assert picked in fits
        assert sum(c.loss for c in picked) <= min(sum(c.loss for c in p) for p in fits) * (1 + 2 * GAP) + 1e-9
