"""Make .onnx files smaller: low-rank + structured sparse weights, fitted to the activations.

>>> import onnx_lrs
>>> result = onnx_lrs.compress("model.onnx", "small.onnx", data="calibration/", budget=onnx_lrs.Budget(params=0.5))
"""

from onnx_lrs.api import compress, inspect
from onnx_lrs.config import Budget, Config, Preprocess
from onnx_lrs.data import Dataset
from onnx_lrs.errors import OnnxLrsError
from onnx_lrs.report.result import Inspection, Result

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Config",
    "Dataset",
    "Inspection",
    "OnnxLrsError",
    "Preprocess",
    "Result",
    "__version__",
    "compress",
    "inspect",
]
