"""The convex programs of the field's methods, written down once more in cvxpy: what the tests compare against.

For small problems only. cvxpy is optional (the extra ``check``) and imported where it is used. Plain arrays in, plain
arrays out, in the caller's units and with none of the solvers' code.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from onnx_lrs.solvers.activation import RELU
from onnx_lrs.solvers.problem import Array, Problem

Norm = Literal["nuclear", "entries"]


def constrained(problem: Problem, eps: float, norm: Norm) -> tuple[float, Array, Array]:
    """Return the least norm, U (out, d) and b' (out,) of the program of :mod:`ddlr` or :mod:`nettrim`.

    ``min ||U||`` (nuclear norm or sum of absolute entries) subject to ``||(U x + b' - A)_Om||_F <= eps`` and
    ``U x + b' <= V`` elsewhere; METHODS 6.3 and 6.4. ``eps`` in the units of the outputs.

    Raises
    ------
    ImportError
        If cvxpy is not installed: ``pip install "onnx-lrs[check]"``.
    ValueError
        If no matrix satisfies the constraints.
    """
    cp = _cvxpy()

    assert problem.columns is not None
    x = problem.columns.inputs.astype(np.float64)
    bias = np.zeros(problem.out) if problem.bias is None else problem.bias
    v = x @ problem.weight.T + bias
    given = problem.columns.outputs
    y = v if given is None else given.astype(np.float64)
    relu = problem.activation == RELU
    on = (y > 0 if relu else np.ones(y.shape, bool)).astype(np.float64)
    limit = np.zeros_like(v) if given is None else v
    weight = cp.Variable(problem.weight.shape)
    free: Any = cp.Variable(problem.out) if problem.affine else cp.Constant(bias)
    response = x @ weight.T + np.ones((len(x), 1)) @ cp.reshape(free, (1, problem.out), order="C")
    rules = [cp.norm(cp.multiply(on, response - y), "fro") <= eps]
    if relu and not on.all():
        rules.append(cp.multiply(1 - on, response - limit) <= 0)
    program = cp.Problem(cp.Minimize(cp.normNuc(weight) if norm == "nuclear" else cp.sum(cp.abs(weight))), rules)
    value = _solved(program)
    return value, np.asarray(weight.value), np.broadcast_to(np.asarray(free.value), (problem.out,)).copy()


def low_rank_plus_groups(target: Array, inputs: Array, taps: int, l1: float, l2: float) -> tuple[float, Array, Array]:
    """Return the optimum, L and S of :mod:`admm`'s program with the identity for the activation (arXiv 1807.10119).

    ``min 1/2 ||Y - M X||_F^2 / n + l1 sum_g sqrt(taps) ||S_g||_F + l2 ||L||_*`` with ``M = L + S``; Y ``target``
    (n, out), X ``inputs`` (n, d), groups of ``taps`` neighbouring columns.

    Raises
    ------
    ImportError
        If cvxpy is not installed: ``pip install "onnx-lrs[check]"``.
    """
    cp = _cvxpy()

    n, d = inputs.shape
    low = cp.Variable((target.shape[1], d))
    sparse = cp.Variable((target.shape[1], d))
    fit = cp.sum_squares(target - inputs @ (low + sparse).T) / (2 * n)
    groups = [cp.norm(sparse[:, g : g + taps], "fro") for g in range(0, d, taps)]
    goal = fit + l1 * np.sqrt(taps) * sum(groups) + l2 * cp.normNuc(low)
    value = _solved(cp.Problem(cp.Minimize(goal)))
    return value, np.asarray(low.value), np.asarray(sparse.value)


def _solved(program: Any) -> float:
    """Return the optimum by Clarabel (interior point); nuclear norms become semidefinite cones."""
    value = float(program.solve(solver="CLARABEL"))
    if program.status not in ("optimal", "optimal_inaccurate") or not np.isfinite(value):
        raise ValueError(f"the program is {program.status}")
    return value


def _cvxpy() -> Any:
    """Return the module, untyped: its functions are not declared to the type checker."""
    import cvxpy

    return cvxpy
