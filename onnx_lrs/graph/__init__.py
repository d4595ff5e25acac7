"""The graph wing: onnx and onnx-graphsurgeon."""
