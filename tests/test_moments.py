"""Moments: streaming equals the direct formula, merging is the union of samples, and a large mean costs no digits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lrs.solvers import Accumulator, Moments, merge
from onnx_lrs.solvers.moments import FLUSH_ROWS, permuted

# The Gram of one flush is a float32 product: its rounding is at most rows * 2^-24 of sqrt(h_ii h_jj) (1.2e-4 for 2048
# rows) and about sqrt(rows) * 2^-24 = 3e-6 in practice. Centring adds the square of one float32 ulp of the mean.
PRECISION = 1e-5


def direct(x):
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    return Moments(len(x), mean, (x - mean).T @ (x - mean) / len(x))


def streamed(x, sizes=None):
    sums = Accumulator(x.shape[1])
    for chunk in np.split(x, np.cumsum(sizes)[:-1]) if sizes else [x]:
        sums.add(chunk)
    return sums.moments()


def sample(rng, n, d, level=0.0, scale=1.0):
    mixed = rng.standard_normal((n, d)) @ (np.eye(d) + 0.5 * rng.standard_normal((d, d)) / np.sqrt(d))
    return (level + scale * mixed).astype(np.float32)


def assert_close_to_direct(found, x):
    exact = direct(x)
    spread = np.sqrt(np.diagonal(exact.cov))
    ulp = np.spacing(np.abs(exact.mean).astype(np.float32)).astype(np.float64)
    assert found.count == len(x)
    assert found.cov.dtype == found.mean.dtype == np.float64
    half_ulp = 2.0**-24  # of the centred values, which are float32
    np.testing.assert_array_less(
        np.abs(found.mean - exact.mean), half_ulp * spread + 1e-12 * np.abs(exact.mean) + 1e-30
    )
    bound = PRECISION * np.outer(spread, spread) + np.outer(ulp, ulp)
    np.testing.assert_array_less(np.abs(found.cov - exact.cov), bound + 1e-30)


def assert_same(a, b, rtol=1e-12):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=rtol, atol=rtol * np.abs(b.mean).max())
    np.testing.assert_allclose(a.cov, b.cov, rtol=0, atol=rtol * np.abs(b.cov).max())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=6).filter(sum),
    d=st.integers(1, 8),
    level=st.sampled_from([0.0, 1.0, 1e3]),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_chunking_gives_the_direct_moments(sizes, d, level, scale, seed):
    x = sample(np.random.default_rng(seed), sum(sizes), d, level, scale)
    assert_close_to_direct(streamed(x, sizes), x)


def test_agrees_with_numpy_cov():
    x = sample(np.random.default_rng(0), 3000, 6, level=5.0)
    exact = np.cov(x.astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(streamed(x, [1000] * 3).cov, exact, atol=PRECISION * exact.max())


def test_a_mean_ten_thousand_times_the_spread_costs_no_digits():
    """E[x^2] - E[x]^2 in float32 would be off by 1e8 * 2^-24 = 6 here, where the covariance itself is about 1."""
    x = sample(np.random.default_rng(1), 2 * FLUSH_ROWS + 17, 5, level=1e4)
    assert_close_to_direct(streamed(x, [FLUSH_ROWS, FLUSH_ROWS, 17]), x)


def test_drifting_batches_are_merged_exactly():
    """Each flush is centred on its own mean, so the differences between the means must come back."""
    rng = np.random.default_rng(2)
    parts = [sample(rng, FLUSH_ROWS, 4, level) for level in (-50.0, 0.0, 200.0)]
    x = np.concatenate(parts)
    assert_close_to_direct(streamed(x, [FLUSH_ROWS] * 3), x)


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_columns_than_entries(n):
    x = sample(np.random.default_rng(3), n, 7, level=2.0)
    found = streamed(x)
    assert_close_to_direct(found, x)
    assert np.linalg.matrix_rank(found.cov, tol=1e-5) == n - 1


def test_a_dead_entry_has_no_variance_and_no_covariance():
    x = sample(np.random.default_rng(4), 5000, 4)
    x[:, 2] = 0.0
    found = streamed(x, [2500, 2500])
    assert not found.cov[2].any()
    assert not found.cov[:, 2].any()
    assert found.mean[2] == 0.0


def test_a_constant_entry_has_almost_no_variance():
    x = sample(np.random.default_rng(5), 5000, 3)
    x[:, 1] = np.float32(0.1)
    assert 0 <= streamed(x, [2500, 2500]).cov[1, 1] < np.spacing(np.float32(0.1)) ** 2


def test_the_covariance_is_symmetric_and_nearly_positive():
    x = sample(np.random.default_rng(6), 300, 40) @ np.ones((40, 40), np.float32)  # rank one
    cov = streamed(x).cov
    np.testing.assert_allclose(cov, cov.T, rtol=1e-14)
    assert np.linalg.eigvalsh(cov).min() > -PRECISION * np.trace(cov)


def test_nothing_added_is_an_error():
    with pytest.raises(ValueError, match="no columns"):
        Accumulator(3).moments()
    empty = Accumulator(3)
    empty.add(np.zeros((0, 3), np.float32))
    with pytest.raises(ValueError, match="no columns"):
        empty.moments()


def test_a_spent_accumulator_gives_nothing_more():
    sums = Accumulator(3)
    sums.add(np.ones((4, 3), np.float32))
    sums.moments()
    with pytest.raises(ValueError, match="no columns"):
        sums.moments()


def test_columns_are_not_changed():
    x = sample(np.random.default_rng(7), 3000, 3, level=4.0)
    kept = x.copy()
    streamed(x)
    np.testing.assert_array_equal(x, kept)


sizes_and_levels = st.tuples(st.integers(1, 40), st.sampled_from([0.0, 3.0, 1e3]))


@settings(max_examples=40, deadline=None)
@given(a=sizes_and_levels, b=sizes_and_levels, c=sizes_and_levels, seed=st.integers(0, 99))
def test_merging_is_the_union_commutes_and_associates(a, b, c, seed):
    rng = np.random.default_rng(seed)
    parts = [sample(rng, n, 4, level).astype(np.float64) for n, level in (a, b, c)]
    one, two, three = (direct(p) for p in parts)
    union = direct(np.concatenate(parts))
    assert_same(merge(merge(one, two), three), union)
    assert_same(merge(one, merge(two, three)), union)
    assert_same(merge(one, two), merge(two, one))


def test_merging_equals_accumulating_everything():
    x = sample(np.random.default_rng(8), 5000, 5, level=10.0)
    merged = merge(streamed(x[:1800]), streamed(x[1800:]))
    assert_close_to_direct(merged, x)


def test_merging_leaves_its_arguments_alone():
    rng = np.random.default_rng(9)
    one, two = direct(sample(rng, 9, 3)), direct(sample(rng, 5, 3))
    before = one.cov.copy(), one.mean.copy(), two.cov.copy(), two.mean.copy()
    merge(one, two)
    for kept, now in zip(before, (one.cov, one.mean, two.cov, two.mean), strict=True):
        np.testing.assert_array_equal(kept, now)


def test_permuted_moments_are_those_of_permuted_columns():
    rng = np.random.default_rng(10)
    x = sample(rng, 50, 6, level=2.0)
    order = rng.permutation(6)
    found, exact = permuted(direct(x), order), direct(x[:, order])
    assert_same(found, exact)


def test_the_metric_is_centred_only_when_a_bias_absorbs_the_mean():
    x = sample(np.random.default_rng(11), 60, 4, level=3.0).astype(np.float64)
    m = direct(x)
    np.testing.assert_allclose(m.second(affine=True), np.cov(x, rowvar=False, bias=True), rtol=1e-10)
    np.testing.assert_allclose(m.second(affine=False), x.T @ x / len(x), rtol=1e-10)


# ---------------------------------------------------------------- pairs of columns and responses


def paired(x, y, sizes):
    sums = Accumulator(x.shape[1], y.shape[1])
    for columns, responses in zip(np.split(x, np.cumsum(sizes)[:-1]), np.split(y, np.cumsum(sizes)[:-1]), strict=True):
        sums.add(columns, responses)
    return sums.paired()


def assert_paired(found, x, y):
    moments, mean, cross = found
    assert_close_to_direct(moments, x)
    exact_x, exact_y = direct(x), direct(y)
    x, y = x.astype(np.float64), y.astype(np.float64)
    spreads = [np.sqrt(np.diagonal(m.cov)) for m in (exact_y, exact_x)]
    ulps = [np.spacing(np.abs(m.mean).astype(np.float32)).astype(np.float64) for m in (exact_y, exact_x)]
    np.testing.assert_allclose(mean, exact_y.mean, rtol=1e-9, atol=1e-7 * (spreads[0].max() + 1e-12))
    exact = (y - exact_y.mean).T @ (x - exact_x.mean) / len(x)
    bound = PRECISION * np.outer(*spreads) + np.outer(*ulps) + 1e-30
    np.testing.assert_array_less(np.abs(cross - exact), bound)
    assert (mean.dtype, cross.dtype) == (np.float64, np.float64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=6).filter(sum),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    levels=st.tuples(st.sampled_from([0.0, 1e3]), st.sampled_from([0.0, -1e3])),
    seed=st.integers(0, 99),
)
def test_the_covariance_of_pairs_in_any_chunks(sizes, shape, levels, seed):
    rng = np.random.default_rng(seed)
    x = sample(rng, sum(sizes), shape[0], levels[0])
    y = (x @ rng.standard_normal(shape) + sample(rng, sum(sizes), shape[1], levels[1])).astype(np.float32)
    assert_paired(paired(x, y, sizes), x, y)


def test_pairs_whose_means_are_large_and_drift():
    """Each flush is centred on its own means; E[y x] - E[y] E[x] in float32 would be off by 6 here."""
    rng = np.random.default_rng(12)
    sizes = (FLUSH_ROWS, FLUSH_ROWS + 5, 17)
    x = np.concatenate([sample(rng, n, 4, level) for n, level in zip(sizes, (1e4, 1.001e4, 0.998e4), strict=True)])
    y = np.concatenate([sample(rng, n, 3, level) for n, level in zip(sizes, (-5e3, -4.9e3, -5.2e3), strict=True)])
    assert_paired(paired(x, y, sizes), x, y)


def test_linear_responses_have_the_cross_covariance_of_the_weight():
    rng = np.random.default_rng(13)
    x, weight, bias = sample(rng, 5000, 6, 3.0), rng.standard_normal((4, 6)), rng.standard_normal(4)
    moments, mean, cross = paired(x, (x @ weight.T + bias).astype(np.float32), [5000])
    np.testing.assert_allclose(cross, weight @ moments.cov, atol=1e-5)
    np.testing.assert_allclose(mean, weight @ moments.mean + bias, atol=1e-5)


def test_responses_change_no_bit_of_the_moments():
    rng = np.random.default_rng(14)
    x, y = sample(rng, 5000, 6, 3.0), sample(rng, 5000, 2)
    found = paired(x, y, [2500, 2500])[0]
    np.testing.assert_array_equal(found.cov, streamed(x, [2500, 2500]).cov)
    np.testing.assert_array_equal(found.mean, streamed(x, [2500, 2500]).mean)
    with pytest.raises(ValueError, match="no columns"):
        Accumulator(3, 2).paired()
