"""The arrays wing: layer approximation on plain NumPy arrays, without onnx or onnxruntime."""

from onnx_lrs.solvers.moments import Accumulator, Moments, merge
from onnx_lrs.solvers.problem import (
    Budget,
    Candidate,
    Columns,
    ElementFactors,
    Factors,
    Problem,
    ProjectedFactors,
    Settings,
    Solution,
    SpatialFactors,
    Status,
    TuckerFactors,
    objective,
)
from onnx_lrs.solvers.solve import METHODS, curve, fit, solve

__all__ = [
    "METHODS",
    "Accumulator",
    "Budget",
    "Candidate",
    "Columns",
    "ElementFactors",
    "Factors",
    "Moments",
    "Problem",
    "ProjectedFactors",
    "Settings",
    "Solution",
    "SpatialFactors",
    "Status",
    "TuckerFactors",
    "curve",
    "fit",
    "merge",
    "objective",
    "solve",
]
