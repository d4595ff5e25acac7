"""Find the layers that can be factorised, and read their weights as matrices.

Every layer is ``y = W x + b`` with W ``(out, channels * taps)``: a Conv's im2col columns (channel-major), a Gemm's or
MatMul's features (taps = 1). A layer that is left alone gets a reason a user can act on.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_lrs.errors import ModelError
from onnx_lrs.graph.behind import NOTHING, affine_of, look_behind
from onnx_lrs.graph.behind import Behind as Behind
from onnx_lrs.graph.model import View, is_standard
from onnx_lrs.solvers.activation import LINEAR, Activation

SMALLEST = 1024  # weights; below that the extra node costs more than any factorisation saves
WEIGHTED_OPS = ("Conv", "Gemm", "MatMul")
NOT_SUPPORTED = {
    "ConvTranspose": "ConvTranspose is not supported yet",
    "ConvInteger": "quantised layer: its weight is an integer",
    "QLinearConv": "quantised layer: its weight is an integer",
    "MatMulInteger": "quantised layer: its weight is an integer",
    "QLinearMatMul": "quantised layer: its weight is an integer",
    "LSTM": "recurrent layers are not supported yet",
    "GRU": "recurrent layers are not supported yet",
    "RNN": "recurrent layers are not supported yet",
}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How an op reads its input. Conv uses the first four fields, Gemm the flags, MatMul the side."""

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    trans_a: bool = False
    trans_b: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    weight_left: bool = False


@dataclasses.dataclass(frozen=True)
class Layer:
    """One compressible layer; picklable, holds names and numbers only.

    ``node`` is the name of the node's first output, which identifies it in the graph. ``output`` is where the layer's
    result with its bias appears (behind a following Add for a MatMul). ``bias`` is None if there is none, or if it is
    not a constant row; ``affine`` says whether the rewriting can add a bias without a new node. ``activation`` is what
    follows, LINEAR where nothing piecewise linear is seen; ``behind`` tells what stands between ``output`` and it.
    """

    name: str
    op: str
    node: str
    input: str
    weight: str
    weight_shape: tuple[int, ...]
    out: int
    channels: int
    taps: int
    bias: str | None
    bias_add: str | None
    affine: bool
    geometry: Geometry
    activation: Activation = LINEAR
    behind: Behind = NOTHING

    @property
    def d(self) -> int:
        """Columns of the weight matrix."""
        return self.channels * self.taps

    @property
    def params(self) -> int:
        """Weights, bias not counted."""
        return self.out * self.d

    @property
    def output(self) -> str:
        """The tensor that holds the layer's result."""
        return self.bias_add or self.node


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A layer left dense and why; ``node`` as in :class:`Layer`, None inside a subgraph.

    ``shape`` is that of its constant operand, ``params`` what is stored for it; () and 0 if it has none.
    """

    name: str
    op: str
    node: str | None
    shape: tuple[int, ...]
    params: int
    reason: str


def find(
    view: View, exclude: Sequence[str] = (), smallest: int = SMALLEST
) -> tuple[tuple[Layer, ...], tuple[Skipped, ...]]:
    """Return the layers that can be factorised, in graph order, and those that cannot, each with its reason.

    A layer of fewer than ``smallest`` weights gains nothing.
    """
    names = _unique_names(view.nodes)
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    for node, name in zip(view.nodes, names, strict=True):
        if node.op not in WEIGHTED_OPS and node.op not in NOT_SUPPORTED:
            continue
        if _makes_a_weight(view, node):
            continue
        found = _examine(view, node, name, exclude, smallest)
        if isinstance(found, Layer):
            layers.append(found)
        else:
            skipped.append(Skipped(name, node.op, node.outputs[0].name, *_constant_operand(view, node), found))
    return tuple(layers), tuple(skipped + _inside_subgraphs(view))


def _makes_a_weight(view: View, node: gs.Node) -> bool:
    """Return whether a product of constants is part of a weight: no layer then, it is computed once."""
    output = node.outputs[0].name
    return view.is_computed(output) and output not in view.outputs


def _constant_operand(view: View, node: gs.Node) -> tuple[tuple[int, ...], int]:
    """Return shape and parameters of a layer's stored weight, whichever input it is; () and 0 if there is none."""
    for tensor in node.inputs:
        name = _before_dequantization(tensor).name
        shape = view.stored_shape(name) or ()
        if len(shape) > 1:
            return shape, view.stored_params(name)
    return (), 0


def _before_dequantization(tensor: gs.Tensor) -> gs.Tensor:
    if tensor.inputs and tensor.inputs[0].op == "DequantizeLinear":
        return tensor.inputs[0].inputs[0]
    return tensor


def _unique_names(nodes: Sequence[gs.Node]) -> list[str]:
    names: list[str] = []
    seen: set[str] = set()
    for node in nodes:
        name = node.name
        if not name or name in seen:
            output = name = next((t.name for t in node.outputs if t.name), "")
            number = 1
            while name in seen:
                name, number = f"{output}_{number}", number + 1
        seen.add(name)
        names.append(name)
    return names


def _inside_subgraphs(view: View) -> list[Skipped]:
    return [
        Skipped(node.name or node.outputs[0].name, node.op, None, (), 0, "inside a subgraph (If, Loop or Scan)")
        for sub in view.graph.subgraphs(recursive=True)
        for node in sub.nodes
        if node.op in WEIGHTED_OPS
    ]


def _examine(view: View, node: gs.Node, name: str, exclude: Sequence[str], smallest: int) -> Layer | str:
    if node.op in NOT_SUPPORTED:
        return NOT_SUPPORTED[node.op]
    if not is_standard(node.domain):
        return f"operator of the custom domain {node.domain!r}"
    side = _weight_side(view, node)
    if isinstance(side, str):
        return side
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded by the user"
    weight = node.inputs[side].name
    reason = read_elsewhere(view, weight)
    if reason:
        return reason
    values = view.constant(weight)
    reason = _values_refused(name, weight, values)
    if reason:
        return reason
    layer = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}[node.op](view, node, name, values)
    if isinstance(layer, str):
        return layer
    if layer.params < smallest:
        return f"tiny: {layer.params} weights, below {smallest} nothing is gained"
    return _with_behind(view, layer)


def _weight_side(view: View, node: gs.Node) -> int | str:
    """Return which input is the weight, or the reason why none is."""
    first, second = (view.is_constant(t.name) for t in node.inputs[:2])
    if second:
        return "both inputs are constant" if first else 1
    if first:
        return 0 if node.op == "MatMul" else f"the constant is the first input of the {node.op}, not the weight"
    if any(t.name in view.inputs and t.name in view.initialisers for t in node.inputs[:2]):
        return "its weight is a graph input, so a caller may replace it"
    if any(view.is_sparse(t.name) for t in node.inputs[:2]):
        return "its weight is a sparse initialiser"
    if any(view.is_computed(t.name) for t in node.inputs[:2]):
        return "its weight is computed from constants (low rank + elements, for example)"
    for tensor in node.inputs[:2]:
        before = _before_dequantization(tensor)
        if before is not tensor and view.is_constant(before.name):
            return "quantised weight (QDQ)"
    return "its weight is computed in the graph" if node.op == "Conv" else "no constant weight (activations only)"


def read_elsewhere(view: View, weight: str) -> str | None:
    """Return the reason if somebody besides one node reads a weight (or a link of its chain), else None."""
    for link in view.chain(weight):
        if link in view.outputs or link in view.captured:
            return "its weight is also a graph output or read by a subgraph"
        if view.reads(link) != 1:
            return "its weight is shared with another node"
    return None


def _values_refused(layer: str, weight: str, values: NDArray[Any]) -> str | None:
    if values.dtype != np.float32:
        return f"weight of type {values.dtype}; only float32 is factorised"
    if not np.isfinite(values).all():
        raise ModelError(
            f"The weight {weight!r} of layer {layer!r} has values that are not finite.",
            "Export the model again; training may have diverged.",
        )
    return None


def _conv(view: View, node: gs.Node, name: str, values: NDArray[Any]) -> Layer | str:
    rank = values.ndim - 2
    group = int(node.attrs.get("group", 1))
    if not 1 <= rank <= 3:
        return f"convolution over {rank} spatial dimensions"
    if group != 1:
        depthwise = values.shape[1] == 1
        return "depthwise convolution" if depthwise else f"grouped convolution ({group} groups)"
    out, channels, *kernel = values.shape
    bias, constant = _bias(view, node, out)
    if bias and not constant:
        return "its bias is not constant"
    geometry = Geometry(
        kernel=tuple(kernel),
        strides=tuple(node.attrs.get("strides", [1] * rank)),
        dilations=tuple(node.attrs.get("dilations", [1] * rank)),
        pads=tuple(node.attrs.get("pads", [0] * 2 * rank)),
        auto_pad=str(node.attrs.get("auto_pad", "NOTSET")),
    )
    return Layer(
        name=name,
        op="Conv",
        node=node.outputs[0].name,
        input=node.inputs[0].name,
        weight=node.inputs[1].name,
        weight_shape=values.shape,
        out=out,
        channels=channels,
        taps=math.prod(kernel),
        bias=bias,
        bias_add=None,
        affine=True,
        geometry=geometry,
    )


def _gemm(view: View, node: gs.Node, name: str, values: NDArray[Any]) -> Layer:
    flags = Geometry(
        trans_a=bool(node.attrs.get("transA", 0)),
        trans_b=bool(node.attrs.get("transB", 0)),
        alpha=float(node.attrs.get("alpha", 1.0)),
        beta=float(node.attrs.get("beta", 1.0)),
    )
    out, features = values.shape if flags.trans_b else values.shape[::-1]
    bias, constant = _bias(view, node, out)
    return Layer(
        name=name,
        op="Gemm",
        node=node.outputs[0].name,
        input=node.inputs[0].name,
        weight=node.inputs[1].name,
        weight_shape=values.shape,
        out=out,
        channels=features,
        taps=1,
        bias=bias if constant else None,
        bias_add=None,
        affine=constant or not bias,  # a C that is no constant row is passed on as it is, and no bias can be shifted
        geometry=flags,
    )


def _matmul(view: View, node: gs.Node, name: str, values: NDArray[Any]) -> Layer | str:
    if values.ndim != 2:
        return f"weight of rank {values.ndim}; only matrices are factorised"
    left = view.is_constant(node.inputs[0].name)
    out, features = values.shape if left else values.shape[::-1]
    add = None if left else _following_add(view, node, out)
    return Layer(
        name=name,
        op="MatMul",
        node=node.outputs[0].name,
        input=node.inputs[1 if left else 0].name,
        weight=node.inputs[0 if left else 1].name,
        weight_shape=values.shape,
        out=out,
        channels=features,
        taps=1,
        bias=add[0] if add else None,
        bias_add=add[1] if add else None,
        affine=add is not None,
        geometry=Geometry(weight_left=left),
    )


def _following_add(view: View, node: gs.Node, out: int) -> tuple[str, str] | None:
    """Return (bias, output) of an Add that puts a constant row on this MatMul and nothing else."""
    reader = view.sole_reader(node.outputs[0].name)
    if reader is None or reader.op != "Add" or not is_standard(reader.domain):
        return None
    others = [t.name for t in reader.inputs if t.name != node.outputs[0].name]
    if len(others) != 1 or not view.is_constant(others[0]) or not _is_row(view.constant(others[0]), out):
        return None
    return others[0], reader.outputs[0].name


def _with_behind(view: View, layer: Layer) -> Layer:
    """Return the layer with what stands behind it.

    A Gemm with a C that is no constant row counts as linear: what its activation sees is not ``W x + b``. The channels
    of a product with a matrix lie along the last axis, which need not be that of a BatchNormalization.
    """
    if layer.op == "Gemm" and layer.bias is None and not layer.affine:
        return dataclasses.replace(layer, behind=Behind(layer.output))
    activation, behind = look_behind(view, layer.output, None if layer.op == "MatMul" else layer.out)
    return dataclasses.replace(layer, activation=activation, behind=behind)


def _bias(view: View, node: gs.Node, out: int) -> tuple[str | None, bool]:
    """Return the name of the bias input and whether it is a constant with one value per output."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return None, False
    bias = node.inputs[2].name
    return bias, view.is_constant(bias) and _is_row(view.constant(bias), out)


def _is_row(values: NDArray[Any], out: int) -> bool:
    return values.size == out and values.shape[-1:] == (out,) and values.dtype == np.float32


def tensors_around(layers: Iterable[Layer]) -> set[str]:
    """Return the computed tensors that layers are fitted to: inputs, shortcuts, and what their activations see."""
    names = {name for la in layers for name in (la.input, la.output, la.behind.total, la.behind.shortcut)}
    return {name for name in names if name}


def weight_matrix(view: View, layer: Layer, dtype: type[np.floating[Any]] = np.float64) -> NDArray[Any]:
    """Return W, (out, d), so that the layer computes ``W x + bias_row``; Gemm's alpha is inside."""
    matrix = view.constant(layer.weight).astype(dtype, copy=False)
    if layer.op == "Conv":
        return matrix.reshape(layer.out, layer.d)
    if layer.op == "Gemm":
        matrix = matrix if layer.geometry.trans_b else matrix.T
        return matrix if layer.geometry.alpha == 1.0 else dtype(layer.geometry.alpha) * matrix
    return matrix if layer.geometry.weight_left else matrix.T


def bias_row(view: View, layer: Layer) -> NDArray[np.float64] | None:
    """Return the constant bias, (out,), float64, Gemm's beta inside; None if there is none to change."""
    if layer.bias is None:
        return None
    return view.constant(layer.bias).astype(np.float64).reshape(layer.out) * (
        layer.geometry.beta if layer.op == "Gemm" else 1.0
    )


def affine_behind(
    view: View, layer: Layer
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Return scale, shift and shortcut_scale, (out,) float64, of what the activation sees.

    ``u = scale * y + shortcut_scale * s + shift`` with y the layer's output and s its shortcut. None stands for 1, 0
    and 1.
    """
    return affine_of(view, layer.behind)
