"""What ONNX Runtime makes of a graph when it loads it: what was fused, and what stands alone."""

from __future__ import annotations

import collections
import pathlib
import tempfile
from collections.abc import Mapping

import onnx
from google.protobuf.message import DecodeError

from onnx_lrs.config import Provider
from onnx_lrs.errors import ModelError
from onnx_lrs.report.result import Optimised, OptimisedGraph
from onnx_lrs.runtime.session import Session, is_mapped

NCHWC = "com.microsoft.nchwc"
CONVS = {"Conv", "FusedConv"}
LAYERS = CONVS | {"ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
SUMS = {"Add", "Sum"}
REORDERS = {"ReorderInput", "ReorderOutput"}
COPIES = {"MemcpyFromHost", "MemcpyToHost"}
# A Reshape may stand between because ONNX Runtime puts some of its own around a sum in the blocked layout.
PASSED = REORDERS | SUMS | {"Reshape"}
ACTIVATIONS = {
    *("Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu"),
    *("Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu", "BiasGelu", "FastGelu", "QuickGelu"),
}
SUMMED = 3  # the input of a Conv of ONNX Runtime's own to which its result is added
Producers = Mapping[str, onnx.NodeProto]


def look_at_both(models: tuple[onnx.ModelProto, onnx.ModelProto], threads: int, provider: Provider) -> Optimised | None:
    """Return what runs before and after compression; None where one of the two cannot be looked at."""
    before, after = (look(model, threads, provider) for model in models)
    return None if before is None or after is None else Optimised(before, after)


def look(model: onnx.ModelProto, threads: int, provider: Provider = "cpu") -> OptimisedGraph | None:
    """Load the model once more, let ONNX Runtime write its optimised graph into a temporary folder, and read that.

    None for a model whose weights are mapped from files (they would be written once more), with TensorRT (ONNX Runtime
    does not write graphs with compiled parts), and where it cannot be written: this is for information only.

    Raises
    ------
    RuntimeEnvironmentError
        If the provider does not start.
    """
    if is_mapped(model) or provider == "tensorrt":
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="onnx-lrs-") as folder:
            place = pathlib.Path(folder) / "optimised.onnx"
            with Session(model, threads, mapped=False, provider=provider, written=place) as session:
                elsewhere = session.elsewhere()
            return read(onnx.load(place, load_external_data=False).graph, elsewhere)
    except (OSError, ModelError, DecodeError):  # no room for it; a model that does not load fails where it is run
        return None


def read(graph: onnx.GraphProto, elsewhere: tuple[str, ...] | None = ()) -> OptimisedGraph:
    """Return what a graph that ONNX Runtime optimised holds."""
    ops = collections.Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in graph.node)
    made = {name: node for node in graph.node for name in node.output if name}
    given = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    convs = [node for node in graph.node if node.op_type in CONVS]
    alone = [node for node in graph.node if _is_behind_layer(node, made)]
    return OptimisedGraph(
        ops=dict(sorted(ops.items())),
        convs=len(convs),
        nchwc=sum(node.domain == NCHWC for node in convs),
        reorders=sum(node.op_type in REORDERS for node in graph.node),
        activations=sum(_has_activation(node) for node in graph.node),
        sums=sum(_is_summed(node) for node in convs),
        unfused_activations=tuple(_name(node) for node in alone if node.op_type in ACTIVATIONS),
        unfused_sums=tuple(_name(node) for node in alone if _is_sum(node, given | made.keys())),
        outside_nchwc=tuple(_name(node) for node in convs if node.domain != NCHWC),
        copies=sum(node.op_type in COPIES for node in graph.node),
        elsewhere=elsewhere,
    )


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.op_type  # its outputs are called reorder_token_7


def _has_activation(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "activation" and attribute.s for attribute in node.attribute)


def _is_summed(node: onnx.NodeProto) -> bool:
    return len(node.input) > SUMMED and bool(node.input[SUMMED])


def _is_sum(node: onnx.NodeProto, computed: set[str]) -> bool:
    """Return whether a node adds up computed values; what has a constant operand adds a bias."""
    return node.op_type in SUMS and len(node.input) > 1 and all(name in computed for name in node.input)


def _is_behind_layer(node: onnx.NodeProto, made: Producers) -> bool:
    """Return whether an input comes from a layer, with nothing but reorders and sums between."""
    waiting, seen = list(node.input), set()
    while waiting:
        name = waiting.pop()
        source = made.get(name)
        if source is None or name in seen:
            continue
        seen.add(name)
        if source.op_type in LAYERS:
            return True
        if source.op_type in PASSED:
            waiting += source.input
    return False
