"""What a layer gives behind its activation, on sampled columns: targets, errors, and refits that see it."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.solvers.problem import Activation, AnyFactors, Array, Columns, Problem

Floats = NDArray[np.float32]
BLOCK = 4096  # columns multiplied at a time, so that nothing of (n, out) is held twice


def bias_of(problem: Problem) -> Array:
    """Return the layer's bias, zeros if it has none; shape (out,)."""
    return np.zeros(problem.out) if problem.bias is None else np.asarray(problem.bias, np.float64)


def pre_activation(problem: Problem, columns: Columns) -> Floats:
    """Return what the layer should give before its activation, (n, out) float32: given, or ``W x + b``."""
    if columns.outputs is not None:
        return columns.outputs
    return columns.inputs @ problem.weight.T.astype(np.float32) + bias_of(problem).astype(np.float32)


def activated(values: Floats, activation: Activation) -> Floats:
    """Return phi of the values."""
    return np.maximum(values, 0) if activation == "relu" else values


def activation_error(problem: Problem, factors: AnyFactors, columns: Columns) -> float:
    """Return ||phi(y) - phi(y')||_F / ||phi(y)||_F on sampled columns, phi being what follows the layer; 0 for 0 / 0.

    ``y' = E x + b + bias_shift`` in float32, a block of columns at a time, summed in float64.
    """
    near = factors.dense().T.astype(np.float32)
    row = (bias_of(problem) + factors.bias_shift).astype(np.float32)
    lost = total = 0.0
    for start in range(0, len(columns.inputs), BLOCK):
        block = _part(columns, slice(start, start + BLOCK))
        exact = activated(pre_activation(problem, block), problem.activation)
        found = activated(block.inputs @ near + row, problem.activation)
        lost += _square_sum(exact - found)
        total += _square_sum(exact)
    return float(np.sqrt(lost / total)) if total > 0 else 0.0


def _square_sum(values: Floats) -> float:
    """Return the sum of squares, squared in float64 too: float32 squares of 1e20 are infinite, of 1e-23 zero."""
    return float(np.einsum("no,no->", values, values, dtype=np.float64))


def first(columns: Columns, count: int) -> Columns:
    """Return the first ``count`` columns, which are a random sample of them, as views."""
    return _part(columns, slice(0, count))


def _part(columns: Columns, rows: slice) -> Columns:
    outputs = None if columns.outputs is None else columns.outputs[rows]
    return dataclasses.replace(columns, inputs=columns.inputs[rows], outputs=outputs)
