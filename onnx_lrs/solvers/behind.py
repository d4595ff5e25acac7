"""What a layer gives behind its activation phi, on sampled columns: targets and errors.

What phi sees is ``u = scale * y + offset``: ``y = W x + b`` the layer's own output, ``scale`` and ``offset`` what the
graph does to it on the way (a BatchNormalization, a shortcut).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.solvers.activation import LINEAR, RELU
from onnx_lrs.solvers.problem import AnyFactors, Array, Columns, Problem

Floats = NDArray[np.float32]
BLOCK = 4096  # columns multiplied at a time, so that nothing of (n, out) is held twice


def bias_of(problem: Problem) -> Array:
    """Return the layer's bias, zeros if it has none; shape (out,)."""
    return np.zeros(problem.out) if problem.bias is None else np.asarray(problem.bias, np.float64)


def pre_activation(problem: Problem, columns: Columns) -> Floats:
    """Return what the layer itself should give, (n, out) float32, before scale and offset: given, or ``W x + b``."""
    if columns.outputs is not None:
        return columns.outputs
    return columns.inputs @ problem.weight.T.astype(np.float32) + bias_of(problem).astype(np.float32)


def argument(problem: Problem, values: Floats, columns: Columns) -> Floats:
    """Return ``scale * values + offset``, what the activation sees where the layer gives ``values``; (n, out) float32.

    The values themselves where there is neither scale nor offset.
    """
    if problem.scale is not None:
        values = values * problem.scale.astype(np.float32)
    return values if columns.offset is None else values + columns.offset


def unargument(problem: Problem, values: Floats, columns: Columns) -> Floats:
    """Return what the layer has to give for the activation to see ``values``: the inverse of :func:`argument`."""
    if columns.offset is not None:
        values = values - columns.offset
    if problem.scale is not None:
        values = np.divide(values, problem.scale.astype(np.float32), dtype=np.float32)
    return values


def respond(problem: Problem, factors: AnyFactors, columns: Columns) -> Floats:
    """Return what the factors give, bias included, (n, out) float32."""
    row = (bias_of(problem) + factors.bias_shift).astype(np.float32)
    return columns.inputs @ factors.dense().T.astype(np.float32) + row


def output_error(problem: Problem, factors: AnyFactors, columns: Columns) -> float:
    """Return ||y - y'||_F / ||y - mean y||_F of the layer's own output on sampled columns; 0 for 0 / 0."""
    wanted = pre_activation(problem, columns)
    mean = wanted.mean(axis=0, dtype=np.float64).astype(np.float32)
    lost = float(np.square(wanted - respond(problem, factors, columns), dtype=np.float64).sum())
    total = float(np.square(wanted - mean, dtype=np.float64).sum())
    return float(np.sqrt(lost / total)) if total > 0 else 0.0


def is_plain(problem: Problem) -> bool:
    """Return whether the activation is nothing or a ReLU, and sees the layer's output as it is."""
    offsets = [c.offset for c in (problem.columns, problem.checks) if c is not None]
    bare = problem.scale is None and all(offset is None for offset in offsets)
    return bare and problem.activation in (LINEAR, RELU)


def plain(problem: Problem) -> Problem:
    """Return the problem as methods see it that know a ReLU right behind the layer: anything else counts as linear."""
    if is_plain(problem):
        return problem
    columns, checks = (None if c is None else without_offset(c) for c in (problem.columns, problem.checks))
    return dataclasses.replace(problem, activation=LINEAR, scale=None, columns=columns, checks=checks)


def without_offset(columns: Columns) -> Columns:
    """Return the columns with nothing added behind the layer."""
    return dataclasses.replace(columns, offset=None)


def activation_error(problem: Problem, factors: AnyFactors, columns: Columns) -> float:
    """Return ||phi(u) - phi(u')||_F / ||phi(u)||_F on sampled columns, phi being what follows the layer; 0 for 0 / 0.

    ``u' = scale * (E x + b + bias_shift) + offset`` in float32, a block of columns at a time, summed in float64.
    """
    near = factors.dense().T.astype(np.float32)
    row = (bias_of(problem) + factors.bias_shift).astype(np.float32)
    lost = total = 0.0
    for start in range(0, len(columns.inputs), BLOCK):
        block = _part(columns, slice(start, start + BLOCK))
        exact = _response(problem, pre_activation(problem, block), block)
        found = _response(problem, block.inputs @ near + row, block)
        lost += float(np.square(exact - found, dtype=np.float64).sum())
        total += float(np.square(exact, dtype=np.float64).sum())
    return float(np.sqrt(lost / total)) if total > 0 else 0.0


def response_norm(problem: Problem, columns: Columns) -> float:
    """Return ||phi(u)||_F over sampled columns."""
    total = 0.0
    for start in range(0, len(columns.inputs), BLOCK):
        block = _part(columns, slice(start, start + BLOCK))
        exact = _response(problem, pre_activation(problem, block), block)
        total += float(np.square(exact, dtype=np.float64).sum())
    return float(np.sqrt(total))


def _response(problem: Problem, values: Floats, columns: Columns) -> Floats:
    """Return phi(u) where the layer gives ``values``."""
    response: Floats = problem.activation(argument(problem, values, columns))
    return response


def first(columns: Columns, count: int) -> Columns:
    """Return the first ``count`` columns, which are a random sample of them, as views."""
    return _part(columns, slice(0, count))


def _part(columns: Columns, rows: slice) -> Columns:
    outputs, offset = (None if given is None else given[rows] for given in (columns.outputs, columns.offset))
    return Columns(columns.inputs[rows], outputs, offset)
