"""Training of what is in an ONNX file, with PyTorch; nothing outside imports it before it is needed."""
