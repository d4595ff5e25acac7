"""The one iteration loop: when it stops, what it drops, what it keeps."""

import itertools

import numpy as np
import pytest

from onnx_lrs.solvers.loop import Step, iterate


def script(*steps):
    """An advance that goes through ``steps``; the state counts them."""

    def advance(state, number):
        assert state == number  # it gets the iterate before, and its number
        return state + 1, steps[number]

    return advance


def halving(state, number):
    following = state / 2
    return following, Step(following, primal=following, dual=2 * following)


def test_it_ends_at_the_tolerance_of_both_residuals():
    run = iterate(halving, 1.0, np.inf, 100, 2.0**-9)
    assert run.converged
    assert len(run.steps) == 10  # the dual residual is twice the primal one
    assert run.last == run.best == 2.0**-10
    assert max(run.residuals[-1]) <= 2.0**-9 < max(run.residuals[-2])


@pytest.mark.parametrize(("primal", "dual"), [(0.0, 1.0), (1.0, 0.0)])
def test_one_small_residual_is_not_enough(primal, dual):
    run = iterate(lambda state, number: (state, Step(1.0, primal, dual)), 0, np.inf, 7, 0.5)
    assert not run.converged
    assert len(run.steps) == 7


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_it_ends_at_the_step_limit(steps):
    run = iterate(halving, 1.0, np.inf, steps, 0.0)
    assert not run.converged
    assert (run.last, len(run.steps), len(run.history), len(run.residuals)) == (2.0**-steps, steps, steps, steps)


DAMAGED = {
    "value nan": Step(np.nan, 1.0, 1.0),
    "primal nan": Step(1.0, np.nan, 1.0),
    "dual nan": Step(1.0, 1.0, np.nan),
    "primal inf": Step(1.0, np.inf, 1.0),
    "dual inf": Step(1.0, 1.0, np.inf),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_damaged_iterate_ends_the_loop_and_is_dropped(name, after):
    good = [Step(5.0 - i, 1.0, 1.0) for i in range(after)]
    run = iterate(script(*good, DAMAGED[name]), 0, np.inf, 100, 1e-3)
    assert not run.converged
    assert run.last == run.best == after
    assert run.steps == tuple(good)


def test_an_infinite_value_is_an_iterate_that_is_not_feasible():
    run = iterate(script(Step(np.inf, 1, 1), Step(2.0, 1, 1), Step(np.inf, 1, 1)), 0, np.inf, 3, 0.0)
    assert (run.last, run.best) == (3, 2)
    assert run.history == (np.inf, 2.0, np.inf)


def test_the_best_iterate_is_kept_whatever_comes_after():
    for values in itertools.permutations((1.0, 2.0, 3.0, 4.0)):
        run = iterate(script(*(Step(v, 1, 1) for v in values)), 0, np.inf, 4, 0.0)
        assert run.best == int(np.argmin(values)) + 1
        assert (run.last, run.history) == (4, values)


def test_the_start_is_best_if_nothing_is_lower_than_its_value():
    steps = [Step(3.0, 1, 1), Step(1.0, 1, 1), Step(2.0, 1, 1)]
    assert iterate(script(*steps), 0, 1.0, 3, 0.0).best == 0  # of equal ones the earlier
    assert iterate(script(*steps), 0, 1.5, 3, 0.0).best == 2


def test_residuals_and_history_are_those_of_the_steps():
    steps = (Step(3.0, 0.5, 0.1), Step(2.0, 0.2, 0.4), Step(1.0, 0.0, 0.0))
    run = iterate(script(*steps), 0, np.inf, 10, 0.05)
    assert run.converged
    assert run.history == (3.0, 2.0, 1.0)
    assert run.residuals == ((0.5, 0.1), (0.2, 0.4), (0.0, 0.0))
