"""Small models and samples for tests of the whole way, and counts that share no code with onnx_lrs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}


def weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return weights as training leaves them: a falling spectrum, output by output of different size."""
    rows, columns = shape[0], math.prod(shape[1:])
    u, _, v = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
    falling = np.exp(-6 * np.arange(len(v)) / len(v)) + 0.01
    matrix = (u * falling) @ v * np.sqrt(2 * len(v) / np.square(falling).sum()) * np.sqrt(rows / len(v))
    return matrix.reshape(shape).astype(np.float32)


def bias(rng: np.random.Generator, size: int) -> np.ndarray:
    return (0.1 * rng.standard_normal(size)).astype(np.float32)


def build(nodes, constants: dict[str, np.ndarray], inputs, outputs, name: str = "net") -> onnx.ModelProto:
    """Return a checked model; ``inputs`` and ``outputs`` are (name, element type, shape)."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def conv_net(batch: int | str = "N", seed: int = 0) -> onnx.ModelProto:
    """Conv + Relu + MaxPool twice, then Gemm + Relu + Gemm: image (batch, 3, 16, 16) -> logits (batch, 10)."""
    rng = np.random.default_rng(seed)
    constants = {
        "conv1.w": weight(rng, 24, 3, 3, 3),
        "conv1.b": bias(rng, 24),
        "conv2.w": weight(rng, 48, 24, 3, 3),
        "conv2.b": bias(rng, 48),
        "fc1.w": weight(rng, 96, 768),
        "fc1.b": bias(rng, 96),
        "fc2.w": weight(rng, 96, 10),
        "fc2.b": bias(rng, 10),
    }
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        helper.make_node("Conv", ["image", "conv1.w", "conv1.b"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("MaxPool", ["r1"], ["p1"], **pool),
        helper.make_node("Conv", ["p1", "conv2.w", "conv2.b"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("MaxPool", ["r2"], ["p2"], **pool),
        helper.make_node("Flatten", ["p2"], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc1.w", "fc1.b"], ["g1"], "fc1", transB=1),
        helper.make_node("Relu", ["g1"], ["r3"]),
        helper.make_node("Gemm", ["r3", "fc2.w", "fc2.b"], ["logits"], "fc2"),
    ]
    ends = [("image", TensorProto.FLOAT, [batch, 3, 16, 16])], [("logits", TensorProto.FLOAT, [batch, 10])]
    return build(nodes, constants, *ends)


def pictures(count: int = 48, seed: int = 0) -> np.ndarray:
    """Return smooth random pictures, (count, 16, 16, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, 4, 4, 3))
    fine = np.kron(coarse, np.ones((1, 4, 4, 1))) + rng.normal(0, 12, (count, 16, 16, 3))
    return fine.clip(0, 255).astype(np.uint8)


def as_floats(images: np.ndarray) -> np.ndarray:
    """Return pictures as conv_net reads them by default: NCHW in 0..1."""
    return (images.transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)


def block(seed: int = 0, width: int = 48) -> onnx.ModelProto:
    """A feed-forward block with attention scores: tokens (N, S, width) -> the same and mean-free scores (N, S, S)."""
    rng = np.random.default_rng(seed)
    constants = {
        "q.w": weight(rng, width, width),
        "up.w": weight(rng, width, 4 * width),
        "up.b": bias(rng, 4 * width),
        "down.w": weight(rng, 4 * width, width),
        "down.b": bias(rng, width),
    }
    nodes = [
        helper.make_node("MatMul", ["tokens", "q.w"], ["query"], "q"),
        helper.make_node("Transpose", ["tokens"], ["keys"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["query", "keys"], ["scores"], "attention"),
        helper.make_node("MatMul", ["tokens", "up.w"], ["u"], "up"),
        helper.make_node("Add", ["u", "up.b"], ["ub"]),
        helper.make_node("Relu", ["ub"], ["ur"]),
        helper.make_node("MatMul", ["ur", "down.w"], ["d"], "down"),
        helper.make_node("Add", ["down.b", "d"], ["db"]),
        helper.make_node("Add", ["tokens", "db"], ["mixed"]),
    ]
    kind = TensorProto.FLOAT
    inputs = [("tokens", kind, ["N", "S", width])]
    return build(nodes, constants, inputs, [("mixed", kind, ["N", "S", width]), ("scores", kind, ["N", "S", "S"])])


def sentences(count: int = 40, seed: int = 0, width: int = 48) -> list[dict[str, np.ndarray]]:
    """Return feeds of one sentence each, 5 to 12 tokens long, in a space of lower rank than ``width``."""
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((width // 3, width)) / 4
    shapes = [(1, int(length), width // 3) for length in rng.integers(5, 13, count)]
    return [{"tokens": (rng.standard_normal(shape) @ topics).astype(np.float32)} for shape in shapes]


def two_inputs(seed: int = 0) -> onnx.ModelProto:
    """Two towers that meet: left (N, 40), right (N, 24) -> score (N, 6) and best (N,) int64."""
    rng = np.random.default_rng(seed)
    constants = {
        "l.w": weight(rng, 64, 40),
        "r.w": weight(rng, 64, 24),
        "r.b": bias(rng, 64),
        "o.w": weight(rng, 64, 64),
        "o.b": bias(rng, 64),
        "s.w": weight(rng, 64, 6),
        "s.b": bias(rng, 6),
    }
    nodes = [
        helper.make_node("Gemm", ["left", "l.w"], ["a"], "left", transB=1),
        helper.make_node("Gemm", ["right", "r.w", "r.b"], ["b"], "right", transB=1),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["act"]),
        helper.make_node("Gemm", ["act", "o.w", "o.b"], ["hidden"], "join"),
        helper.make_node("Relu", ["hidden"], ["act2"]),
        helper.make_node("Gemm", ["act2", "s.w", "s.b"], ["score"], "head"),
        helper.make_node("ArgMax", ["score"], ["best"], axis=1, keepdims=0),
    ]
    inputs = [("left", TensorProto.FLOAT, ["N", 40]), ("right", TensorProto.FLOAT, ["N", 24])]
    outputs = [("score", TensorProto.FLOAT, ["N", 6]), ("best", TensorProto.INT64, ["N"])]
    return build(nodes, constants, inputs, outputs)


def pairs(count: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mixes = {"left": rng.standard_normal((12, 40)), "right": rng.standard_normal((8, 24))}
    return {k: (rng.standard_normal((count, len(v))) @ v).astype(np.float32) for k, v in mixes.items()}


def depthwise_net() -> onnx.ModelProto:
    """Two depthwise convolutions: nothing that onnx_lrs can compress."""
    rng = np.random.default_rng(0)
    constants = {"a.w": bias(rng, 64 * 49).reshape(64, 1, 7, 7), "b.w": bias(rng, 64 * 49).reshape(64, 1, 7, 7)}
    nodes = [
        helper.make_node("Conv", ["image", "a.w"], ["a"], "a", group=64, pads=[3] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "b.w"], ["y"], "b", group=64, pads=[3] * 4),
    ]
    ends = [("image", TensorProto.FLOAT, ["N", 64, 8, 8])], [("y", TensorProto.FLOAT, ["N", 64, 8, 8])]
    return build(nodes, constants, *ends)


def one_gemm(features: int, outputs: int, values: np.ndarray | None = None) -> onnx.ModelProto:
    """Return ``y = W x + b`` as a single Gemm."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((features, outputs)).astype(np.float32) / np.float32(np.sqrt(features))
    constants = {"w": w if values is None else values, "b": bias(rng, outputs)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm")]
    return build(
        nodes, constants, [("x", TensorProto.FLOAT, ["N", features])], [("y", TensorProto.FLOAT, ["N", outputs])]
    )


# ------------------------------------------------------------------------------------------------ independent counts


def count_params(model: onnx.ModelProto) -> int:
    """Return the elements of float initialisers and float Constant nodes."""
    tensors = [*model.graph.initializer]
    tensors += [a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute]
    return sum(math.prod(t.dims) for t in tensors if t.data_type in FLOATS)


def count_macs(model: onnx.ModelProto, sizes: dict[str, int]) -> int:
    """Return multiply-accumulates of one run by static shape inference; ``sizes`` gives the open dimensions."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    known = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*known.input, *known.output, *known.value_info)
    }
    shapes |= {t.name: list(t.dims) for t in known.initializer}
    total = 0
    for node in known.node:
        if node.op_type == "Conv":
            total += math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            flipped = any(a.name == "transA" and a.i for a in node.attribute)
            total += math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if flipped else -1]
    return total


def run(model: onnx.ModelProto | Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, feed)
