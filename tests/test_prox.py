"""The proximal maps against their definition: optimality conditions, grids, perturbations, and what convexity promises.

Z is ``prox_f(x)`` if and only if ``x - Z`` is a subgradient of f at Z. For ``t`` times a norm that means: the dual norm
of ``x - Z`` is at most t, and ``<x - Z, Z> = t ||Z||``.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnx_lrs.solvers.activation import LINEAR, RELU, Activation, clip, leaky_relu
from onnx_lrs.solvers.prox import below, group_norms, group_soft, largest, singular_soft, soft, through, to_ball

WIDE, TALL = (4, 12), (12, 6)
TAPS = 3
THRESHOLDS = (0.0, 0.3, 1.0, 2.5, 100.0)

# name -> (map with a threshold, norm, dual norm)
NORMS = {
    "soft": (soft, lambda x: np.abs(x).sum(), lambda x: np.abs(x).max()),
    "group_soft": (
        lambda x, t: group_soft(x, t, TAPS),
        lambda x: sum(np.linalg.norm(x[:, g : g + TAPS]) for g in range(0, x.shape[1], TAPS)),
        lambda x: max(np.linalg.norm(x[:, g : g + TAPS]) for g in range(0, x.shape[1], TAPS)),
    ),
    "singular_soft": (
        lambda x, t: singular_soft(x, t)[0],
        lambda x: np.linalg.norm(x, "nuc"),
        lambda x: np.linalg.norm(x, 2),
    ),
}


def materials():
    rng = np.random.default_rng(0)
    low = rng.standard_normal((4, 2)) @ rng.standard_normal((2, 12))
    one_zero_group = rng.standard_normal(WIDE)
    one_zero_group[:, 3:6] = 0
    return {
        "wide": rng.standard_normal(WIDE),
        "tall": rng.standard_normal(TALL),
        "square": rng.standard_normal((6, 6)),
        "rank 2": low,
        "rank 2, tall": np.ascontiguousarray(low[:, :6].repeat(3, axis=0)),
        "zero": np.zeros(WIDE),
        "zero, tall": np.zeros(TALL),
        "one row": rng.standard_normal((1, 6)),
        "zero group": one_zero_group,
        "equal singular values": np.hstack([np.eye(3), np.zeros((3, 3))]),
    }


MATERIAL = materials()


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", MATERIAL)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.filterwarnings("error")
def test_what_is_taken_away_is_a_subgradient(kind, name, threshold):
    prox, norm, dual = NORMS[kind]
    x = MATERIAL[name]
    z = prox(x, threshold)
    taken, scale = x - z, 1e-7 * max(np.linalg.norm(x), 1.0)
    assert z.shape == x.shape
    assert dual(taken) <= threshold + scale
    assert np.vdot(taken, z) == pytest.approx(threshold * norm(z), abs=scale * max(threshold, 1.0))


@pytest.mark.parametrize("kind", NORMS)
def test_no_perturbation_is_better(kind):
    prox, norm, _ = NORMS[kind]
    rng = np.random.default_rng(1)
    for name, threshold in itertools.product(("wide", "tall", "rank 2"), (0.3, 1.0, 2.5)):
        x = MATERIAL[name]
        z = prox(x, threshold)
        value = threshold * norm(z) + 0.5 * np.sum((z - x) ** 2)
        for size in (1.0, 1e-2, 1e-4):
            for _ in range(20):
                other = z + size * rng.standard_normal(x.shape)
                assert threshold * norm(other) + 0.5 * np.sum((other - x) ** 2) >= value - 1e-9


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.1])
def test_soft_on_a_grid(threshold):
    grid = np.linspace(-3, 3, 6001)
    for x in np.linspace(-2, 2, 41):
        best = grid[np.argmin(threshold * np.abs(grid) + 0.5 * (grid - x) ** 2)]
        assert soft(np.array([x]), threshold)[0] == pytest.approx(best, abs=1.01e-3)


@pytest.mark.parametrize("name", MATERIAL)
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_the_singular_values_left_are_the_old_ones_less_the_threshold(name, threshold):
    x = MATERIAL[name]
    z, values = singular_soft(x, threshold)
    left = np.linalg.svd(x, compute_uv=False) - threshold
    np.testing.assert_allclose(values, left[left > 1e-7], atol=1e-7)
    assert (np.diff(values) <= 0).all()
    assert np.linalg.matrix_rank(z, tol=1e-8) == len(values)


def test_group_norms_are_those_of_the_channels_columns():
    x = MATERIAL["wide"]
    np.testing.assert_allclose(group_norms(x, 3), [np.linalg.norm(x[:, g : g + 3]) for g in (0, 3, 6, 9)], rtol=1e-14)
    np.testing.assert_allclose(group_norms(x, 1), np.linalg.norm(x, axis=0), rtol=1e-14)
    np.testing.assert_allclose(group_norms(x, 12), [np.linalg.norm(x)], rtol=1e-14)


def test_group_soft_with_one_column_a_group_and_one_row_is_soft():
    x = np.random.default_rng(2).standard_normal((1, 20))
    np.testing.assert_allclose(group_soft(x, 0.7, 1), soft(x, 0.7), atol=1e-15)


def test_groups_go_as_a_whole_and_keep_their_direction():
    x = MATERIAL["wide"]
    norms = group_norms(x, TAPS)
    threshold = float(np.sort(norms)[1])  # two of four groups are at or below it
    z = group_soft(x, threshold, TAPS)
    kept = group_norms(z, TAPS)
    assert np.count_nonzero(kept) == 2
    for g in np.flatnonzero(kept):
        block, old = z[:, 3 * g : 3 * g + 3], x[:, 3 * g : 3 * g + 3]
        np.testing.assert_allclose(block, old * (1 - threshold / norms[g]), rtol=1e-12)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("name", MATERIAL)
def test_no_threshold_changes_nothing_and_an_infinite_one_leaves_nothing(kind, name):
    prox, _, _ = NORMS[kind]
    x = MATERIAL[name]
    # the Gram matrix resolves singular values down to 1e-8 of the largest
    np.testing.assert_allclose(prox(x, 0.0), x, atol=1e-7 if kind == "singular_soft" else 1e-14)
    assert not prox(x, np.inf).any()


# --- projections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.0, 0.5, 3.0, 100.0])
def test_to_ball_is_the_nearest_point_of_the_ball(radius):
    """P is the projection of x onto a convex set if and only if <x - P, z - P> <= 0 for every z of the set."""
    rng = np.random.default_rng(3)
    x, centre = rng.standard_normal((2, 3, 4))
    p = to_ball(x, centre, radius)
    assert np.linalg.norm(p - centre) <= radius * (1 + 1e-14)
    for _ in range(50):
        step = rng.standard_normal((3, 4))
        z = centre + radius * rng.random() * step / np.linalg.norm(step)
        assert np.vdot(x - p, z - p) <= 1e-10
    if np.linalg.norm(x - centre) <= radius:
        np.testing.assert_array_equal(p, x)


def test_to_ball_of_its_centre():
    centre = np.ones((2, 3))
    np.testing.assert_array_equal(to_ball(centre.copy(), centre, 0.0), centre)


@pytest.mark.parametrize("limit", [0.25, np.random.default_rng(4).standard_normal((3, 4))])
def test_below_is_the_nearest_point_under_the_limit(limit):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 4))
    p = below(x, limit)
    assert (p <= limit).all()
    for _ in range(50):
        z = limit - rng.exponential(size=(3, 4))
        assert np.vdot(x - p, z - p) <= 1e-12
    np.testing.assert_array_equal(p[x <= limit], x[x <= limit])


# --- what is not convex ---------------------------------------------------------------------------------------------


ACTIVATIONS = {
    "linear": LINEAR,
    "relu": RELU,
    "relu6": clip(0, 6),
    "hardtanh": clip(-1, 1),
    "between": clip(0.5, 1.25),
    "at most": clip(-np.inf, 0.75),
    "at least": clip(-0.5, np.inf),
    "constant": clip(0.5, 0.5),
    "leaky": leaky_relu(0.1),
    "leaky, steep": leaky_relu(2.5),
    "not monotone": Activation("zigzag", (-1.0, 0.0, 1.5), (0.5, -1.0, 2.0, 0.0), (1.5, 0.0, 0.0, 3.0)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rho", [1e-3, 0.1, 1.0, 7.0, 1e3])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_through_against_a_fine_grid(name, rho, dtype):
    activation = ACTIVATIONS[name]
    rng = np.random.default_rng(6)
    v = rng.uniform(-3, 8, 60).astype(dtype)
    a = activation(rng.uniform(-4, 9, 60).astype(dtype))
    a[::7] = rng.uniform(-4, 9, len(a[::7]))  # what phi cannot give
    grid = np.unique(np.concatenate([np.linspace(-60, 60, 120001), activation.breaks]))

    def cost(z):
        return (a - activation(z)) ** 2 + rho * (z - v) ** 2

    found = through(v, a, rho, activation)
    assert found.dtype == dtype
    v, a, exact = v.astype(float), a.astype(float), found.astype(float)
    at_grid = activation(grid)
    least = np.array([np.min((y - at_grid) ** 2 + rho * (grid - x) ** 2) for y, x in zip(a, v, strict=True)])
    step = 1e-3
    rounding = (1e-12 if dtype == np.float64 else 1e-6) * (100 + rho)
    assert (cost(exact) <= least + rounding).all()
    assert (cost(exact) >= least - (10 + rho) * step**2 - rounding).all()  # it comes as near as its mesh lets it


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_through_where_the_answer_is_known(dtype):
    v = np.array([2.0, -1.0, 0.0, -1.0, -10.0, 1.0], dtype)
    a = np.array([2.0, 0.0, 0.0, 3.0, 1.0, 0.0], dtype)
    #  both agree, off and stays off, nothing, worth crossing, not worth crossing, shrunk toward 0
    exact = np.array([2.0, -1.0, 0.0, 1.0, -10.0, 0.5], dtype)
    np.testing.assert_allclose(through(v, a, 1.0, RELU), exact, atol=1e-7)
    #  above and stays above, just up to the limit, far away, below as with a ReLU
    v, a = np.array([9.0, 4.0, 30.0, 2.0], dtype), np.array([6.0, 9.0, 0.0, 4.0], dtype)
    np.testing.assert_allclose(through(v, a, 1.0, clip(0, 6)), np.array([9.0, 6.0, 30.0, 3.0], dtype), atol=1e-6)
    #  below 0: argmin (a - z / 2)^2 + (z - v)^2 = (a / 2 + v) / (5 / 4)
    v, a = np.array([-2.0, -1.0, 3.0], dtype), np.array([-1.0, -1.5, 1.0], dtype)
    np.testing.assert_allclose(through(v, a, 1.0, leaky_relu(0.5)), np.array([-2.0, -1.4, 2.0], dtype), atol=1e-6)
    np.testing.assert_allclose(through(v, a, 3.0, LINEAR), (a + 3 * v) / 4, atol=1e-6)


@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_through_a_relu_is_the_two_cases_of_the_book(rho):
    rng = np.random.default_rng(7)
    v, a = rng.standard_normal((2, 50, 8)).astype("f4")
    a = np.maximum(a, 0)
    above, under = np.maximum((a + rho * v) / (1 + rho), 0), np.minimum(v, 0)
    cheaper = (a - above) ** 2 + rho * (above - v) ** 2 <= a**2 + rho * (under - v) ** 2
    np.testing.assert_allclose(through(v, a, rho, RELU), np.where(cheaper, above, under), atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_through_leaves_what_fits_already_and_its_operands(name):
    activation = ACTIVATIONS[name]
    v = np.random.default_rng(8).uniform(-3, 8, (9, 7)).astype("f4")
    a = activation(v)
    kept = v.copy(), a.copy()
    found = through(v, a, 0.5, activation)
    np.testing.assert_allclose(found, v, atol=1e-5)
    np.testing.assert_array_equal((v, a), kept)


@settings(max_examples=200, deadline=None)
@given(scores=arrays(np.float64, st.integers(0, 12), elements=st.sampled_from([0.0, 1.0, 2.0, -1.0])), data=st.data())
def test_largest_takes_the_count_and_of_equal_ones_the_earlier(scores, data):
    count = data.draw(st.integers(0, len(scores) + 2))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    exact = np.zeros(len(scores), bool)
    exact[order[:count]] = True
    np.testing.assert_array_equal(largest(scores, count), exact)


def test_largest_of_a_matrix_has_its_shape():
    scores = np.array([[3.0, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(largest(scores, 3), [[True, False], [True, True]])
    np.testing.assert_array_equal(largest(scores, 1), [[True, False], [False, False]])
    assert largest(scores, 99).all()
    assert not largest(scores, 0).any()


# --- what they have in common ---------------------------------------------------------------------------------------

CENTRE = np.full((4, 6), 0.5)
CONVEX = {
    "soft": lambda x: soft(x, 0.7),
    "group_soft": lambda x: group_soft(x, 0.7, 3),
    "singular_soft": lambda x: singular_soft(x, 0.7)[0],
    "singular_soft, tall": lambda x: singular_soft(np.ascontiguousarray(x.T), 0.7)[0],
    "to_ball": lambda x: to_ball(x, CENTRE.astype(x.dtype), 1.5),
    "below": lambda x: below(x, CENTRE.astype(x.dtype)),
}
VALUES = arrays(np.float64, (4, 6), elements=st.floats(-4, 4, allow_subnormal=False))


@pytest.mark.parametrize("kind", CONVEX)
@settings(max_examples=60, deadline=None)
@given(x=VALUES, y=VALUES)
def test_convex_maps_never_move_points_apart(kind, x, y):
    prox = CONVEX[kind]
    assert np.linalg.norm(prox(x) - prox(y)) <= np.linalg.norm(x - y) + 1e-7


@pytest.mark.parametrize("kind", ["to_ball", "below"])
@settings(max_examples=60, deadline=None)
@given(x=VALUES)
def test_projections_change_nothing_the_second_time(kind, x):
    once = CONVEX[kind](x)
    np.testing.assert_allclose(CONVEX[kind](once), once, atol=1e-14)


@pytest.mark.parametrize("kind", [*CONVEX, "through"])
def test_float32_stays_float32_and_nothing_is_changed_in_place(kind):
    narrow = MATERIAL["wide"][:, :6].astype(np.float32)
    before = narrow.copy()
    prox = CONVEX.get(kind, lambda x: through(x, np.abs(x), 0.5, RELU))
    found = prox(narrow)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(narrow, before)
    np.testing.assert_allclose(found, prox(narrow.astype(np.float64)), atol=2e-5)


def test_the_singular_values_of_float32_are_float32():
    assert singular_soft(MATERIAL["tall"].astype(np.float32), 0.5)[1].dtype == np.float32
    assert group_norms(MATERIAL["wide"].astype(np.float32), 3).dtype == np.float32
