"""Make .onnx files smaller: low-rank + structured sparse weights, fitted to the activations.

>>> import onnx_lrs
>>> result = onnx_lrs.compress("model.onnx", "small.onnx", data="calibration/", budget=onnx_lrs.Budget(params=0.5))

The names below are loaded when they are first used, so that ``onnx-lrs --help`` need not wait for NumPy and ONNX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_lrs.api import compare, compress, inspect, refine
    from onnx_lrs.config import Budget, CompareConfig, Config, CudaOptions, Preprocess, Training
    from onnx_lrs.data import Dataset
    from onnx_lrs.errors import OnnxLrsError
    from onnx_lrs.report.comparison import Comparison
    from onnx_lrs.report.refinement import Refinement
    from onnx_lrs.report.result import Inspection, Result

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CompareConfig",
    "Comparison",
    "Config",
    "CudaOptions",
    "Dataset",
    "Inspection",
    "OnnxLrsError",
    "Preprocess",
    "Refinement",
    "Result",
    "Training",
    "__version__",
    "compare",
    "compress",
    "inspect",
    "refine",
]

_HOMES = {
    "Budget": "config",
    "CompareConfig": "config",
    "Comparison": "report.comparison",
    "Config": "config",
    "CudaOptions": "config",
    "Dataset": "data",
    "Inspection": "report.result",
    "OnnxLrsError": "errors",
    "Preprocess": "config",
    "Refinement": "report.refinement",
    "Result": "report.result",
    "Training": "config",
    "compare": "api",
    "compress": "api",
    "inspect": "api",
    "refine": "api",
}

if not TYPE_CHECKING:  # a type checker would take it for a promise that every name exists

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
