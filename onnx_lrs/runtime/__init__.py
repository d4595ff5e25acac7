"""The runtime wing: onnxruntime."""
