"""Make .onnx files smaller: low-rank + structured sparse weights, fitted to the activations."""

__version__ = "0.1.0"
