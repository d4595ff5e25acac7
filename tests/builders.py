"""Small ONNX models for the tests, made with onnx.helper, and factors whose product is known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import scipy.sparse
from onnx import TensorProto, helper, numpy_helper

from onnx_lrs.solvers.problem import (
    ElementFactors,
    Factors,
    ProjectedFactors,
    SpatialFactors,
    TuckerFactors,
    columns_of,
)

OPSETS = (7, 9, 11, 13, 17, 26)  # 26 is the last one that ONNX Runtime 1.31 takes
node = helper.make_node
_ERRORS_ONLY = 3


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def make(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str] | Mapping[str, Sequence[int]],
    constants: Mapping[str, np.ndarray],
    *,
    opset: int = 17,
    ir: int | None = None,
    **graph: Any,
) -> onnx.ModelProto:
    """Return a float model; output shapes are given or inferred, and before IR 4 initialisers are inputs as well."""
    custom = {n.domain for n in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in sorted(custom))]
    ir = ir or helper.find_min_ir_version_for(imports[:1])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    if ir < 4:
        declared += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    given = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs)
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given.items()]
    made = helper.make_graph(nodes, "graph", declared, results, tensors, **graph)
    model = helper.make_model(made, opset_imports=imports, ir_version=ir)
    known = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.output}
    for output in model.graph.output:
        output.CopyFrom(known[output.name])
    return model


def run(model: onnx.ModelProto, feed: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
    """Return all outputs of ONNX Runtime; inputs that are not given are drawn at random (always the same)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    drawn = {i.name: normal(*(d if isinstance(d, int) else 2 for d in i.shape)) for i in session.get_inputs()}
    return session.run(None, drawn | dict(feed or {}))


def ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Return the number of dimensions of every tensor that shape inference knows."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values}


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


def layout(op: str, matrix: np.ndarray, kernel: Sequence[int] = (), **flags: Any) -> np.ndarray:
    """Return the weight tensor an op stores for ``y = matrix x``."""
    if op == "Conv":
        weight = matrix.reshape(len(matrix), -1, *kernel)
    elif op == "Gemm":
        weight = (matrix if flags.get("transB") else matrix.T) / flags.get("alpha", 1.0)
    else:
        weight = matrix if flags.get("left") else matrix.T
    return np.ascontiguousarray(weight, np.float32)


def planted(form: str, out: int, channels: int, taps: int = 1, seed: int = 0) -> Factors:
    """Return factors of one form; ``all_channels`` keeps every channel, ``channels`` and ``both`` some of them."""
    random = np.random.default_rng(seed)
    rank = 3 if form in ("low_rank", "both") else 0
    keep = {"low_rank": 0, "all_channels": channels}.get(form, channels // 3)
    kept = np.sort(random.permutation(channels)[:keep])
    return Factors(
        left=random.standard_normal((out, rank)),
        right=random.standard_normal((rank, channels * taps)),
        kept=kept,
        sparse=random.standard_normal((out, keep * taps)),
        bias_shift=np.zeros(out),
        taps=taps,
    )


def planted_spatial(out: int, channels: int, kernel: Sequence[int], seed: int = 0) -> SpatialFactors:
    random = np.random.default_rng(seed)
    left, right = random.standard_normal((out, 3, kernel[1])), random.standard_normal((3, channels, kernel[0]))
    return SpatialFactors(left, right, np.zeros(out))


def planted_projected(out: int, channels: int, taps: int, seed: int = 0) -> ProjectedFactors:
    random = np.random.default_rng(seed)
    left, right = random.standard_normal((out, 3, taps)), random.standard_normal((3, channels, 1))
    return ProjectedFactors(left, right, np.zeros(out))


def planted_tucker(out: int, channels: int, taps: int, seed: int = 0) -> TuckerFactors:
    random = np.random.default_rng(seed)
    core, right = random.standard_normal((2, 3, taps)), random.standard_normal((3, channels, 1))
    return TuckerFactors(core, right, np.zeros(out), random.standard_normal((out, 2)))


def planted_elements(out: int, d: int, rank: int = 0, share: float = 0.1, seed: int = 0) -> ElementFactors:
    """Return factors of quarters between -2 and 2: whoever multiplies them in float32 gets E without any rounding."""
    random = np.random.default_rng([seed, out, d, rank])
    left, right = random.integers(-8, 9, (out, rank)) / 4, random.integers(-8, 9, (rank, d)) / 4
    values = np.where(random.random((out, d)) < share, random.integers(1, 9, (out, d)) / 4, 0)
    return ElementFactors(left, right, scipy.sparse.csr_array(values), np.zeros(out))


def keeping(matrix: np.ndarray, kept: Sequence[int], taps: int = 1) -> Factors:
    """Return factors that take the columns of the kept channels from a matrix."""
    index = np.asarray(kept, np.int64)
    out, width = matrix.shape
    sparse = matrix[:, columns_of(index, taps)].astype(np.float64)
    return Factors(np.zeros((out, 0)), np.zeros((0, width)), index, sparse, np.zeros(out), taps)


def only(matrix: np.ndarray, kept: Sequence[int], taps: int = 1) -> np.ndarray:
    """Return a matrix that is zero outside the kept channels."""
    masked = np.zeros_like(matrix)
    columns = columns_of(np.asarray(kept, np.int64), taps)
    masked[:, columns] = matrix[:, columns]
    return masked
