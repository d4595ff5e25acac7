"""A model in QDQ format as the float model that it was made from, and the scales of its activations.

Weights become what their integers stand for. A pair of QuantizeLinear and DequantizeLinear on an activation is taken
out, and its scale remembered, so that the tensor can be quantised alike again.

onnxruntime.quantization leaves out a Relu or Clip in front of such a pair, because integers end where it would cut.
Taken out, the pair would take the Relu with it. So where the integers end at zero and what makes the tensor may be
negative, a Clip to the range of the integers takes the place of the pair: that is what the given model computes but for
its rounding, whether the upper end was a Clip or only calibration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnx_lrs.errors import ModelError
from onnx_lrs.graph import weights
from onnx_lrs.graph.model import array_tensor, is_standard
from onnx_lrs.graph.splice import Names, outer_reads
from onnx_lrs.graph.tuning import SUBGRAPHS

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
MICROSOFT = "com.microsoft"
INTEGER_OPS = {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}
TYPES: dict[int, np.iinfo[Any]] = {
    int(helper.np_dtype_to_tensor_dtype(np.dtype(kind))): np.iinfo(kind)
    for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32)
}
NOT_NEGATIVE = {"Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs", "Exp", "Clip"}
KEEPS_SIGN = {
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "Concat",
    "Reshape",
    "Flatten",
    "Transpose",
}
KEEPS_SIGN |= {"Squeeze", "Unsqueeze", "Identity", "Slice", "Gather", "Split", "Pad", "Resize"}
CLIP_TAKES_INPUTS = 11  # the opset since which the limits of Clip are inputs
FLOAT_MODEL = "Give the float model that it was made from."
Number = NDArray[np.generic]


@dataclasses.dataclass(frozen=True)
class Scale:
    """The scale of an activation; ``dtype`` is the element type of its zero point in ``onnx.TensorProto``."""

    scale: float
    zero_point: int
    dtype: int

    @property
    def limits(self) -> tuple[float, float]:
        """The real numbers at both ends of the integers."""
        info = TYPES[self.dtype]
        return (info.min - self.zero_point) * self.scale, (info.max - self.zero_point) * self.scale


@dataclasses.dataclass(frozen=True)
class Floated:
    """The float model, and the scales of its activations by the names of its tensors."""

    model: onnx.ModelProto
    scales: Mapping[str, Scale]


def is_quantised(model: onnx.ModelProto) -> bool:
    """Return whether a graph holds operators on integers that quantisation makes."""
    return any(node.op_type in (QUANTIZE, DEQUANTIZE) or _is_integer(node) for node in model.graph.node)


def _is_integer(node: NodeProto) -> bool:
    quantised = node.domain == MICROSOFT and node.op_type.startswith(("QLinear", "QGemm", "QAttention", "DynamicQuant"))
    return quantised or (is_standard(node.domain) and node.op_type in INTEGER_OPS)


def floated(model: onnx.ModelProto) -> Floated:
    """Return a QDQ model as a float one; the given one is not changed.

    Raises
    ------
    ModelError
        For QOperator format, dynamic quantisation, types below eight bits or of eight bits float, blocks of scales,
        scales that are computed or that an activation has by channel, integers that anything but a DequantizeLinear
        reads, and such operators in subgraphs.
    """
    return _Floating(weights.loaded(model)).done()


class _Floating:
    """The work of :func:`floated`."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self._graph = model, model.graph
        self._names = Names(model)
        self._constants = {t.name: numpy_helper.to_array(t) for t in self._graph.initializer}
        for node in self._graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self._makers = {name: node for node in self._graph.node for name in node.output}
        self._same: dict[str, str] = {}  # outputs of pairs that are gone -> what stands in their place
        self._quantised: dict[str, str] = {}  # outputs of QuantizeLinear -> the tensor that it read
        self._scales: dict[str, Scale] = {}
        self._new: dict[str, NDArray[np.float32]] = {}
        self._nodes: list[NodeProto] = []
        self._renamed: dict[str, str] = {}  # tensors in front of a lost Relu

    def done(self) -> Floated:
        """Return the outcome."""
        for node in self._graph.node:
            if any(inner.op_type in (QUANTIZE, DEQUANTIZE) for inner in _inside(node)):
                raise _declined(node, "it holds quantised operators in a subgraph")
            if _is_integer(node):
                raise _declined(node, f"{node.op_type} computes with integers (only QDQ format can be read)")
            if node.op_type == QUANTIZE:
                self._quantize(node)
            elif node.op_type == DEQUANTIZE:
                self._dequantize(node)
            else:
                self._nodes.append(node)
        self._check_readers()
        return self._put_together()

    def _quantize(self, node: NodeProto) -> None:
        source = node.input[0]
        scale, zero = self._parameters(node)
        if source in self._constants:  # a weight that was left in float32 beside a pair
            info = TYPES[helper.np_dtype_to_tensor_dtype(zero.dtype)]
            steps = np.rint(self._constants[source] / _shaped(scale, self._constants[source], _axis(node)))
            shifted = steps + _shaped(zero, steps, _axis(node)).astype(np.float64)
            self._constants[node.output[0]] = np.clip(shifted, info.min, info.max).astype(zero.dtype)
            return
        if scale.size != 1:
            raise _declined(node, "an activation has a scale for each channel")
        found = Scale(
            float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]), helper.np_dtype_to_tensor_dtype(zero.dtype)
        )
        source = self._same.get(source, source)
        if self._scales.setdefault(source, found) != found:
            raise _declined(node, f"tensor {source!r} has two scales")
        self._quantised[node.output[0]] = source
        if found.limits[0] == 0.0 and source not in self._renamed and self._may_be_negative(source):
            self._renamed[source] = self._names.fresh(f"{source}_unclipped")

    def _may_be_negative(self, name: str) -> bool:
        maker = self._makers.get(self._quantised.get(name, name))
        if maker is None:  # an input of the graph: nothing stood in front of it
            return False
        if maker.op_type in KEEPS_SIGN:
            first = self._same.get(maker.input[0], maker.input[0])
            every = [self._same.get(n, n) for n in maker.input] if maker.op_type == "Concat" else [first]
            return any(n not in self._renamed and self._may_be_negative(n) for n in every)
        return maker.op_type not in NOT_NEGATIVE

    def _dequantize(self, node: NodeProto) -> None:
        source, made = node.input[0], node.output[0]
        if source in self._constants:
            scale, zero = self._parameters(node)
            stored = self._constants[source]
            whole = stored.astype(np.int64) - _shaped(zero, stored, _axis(node)).astype(np.int64)
            self._new[made] = whole.astype(np.float32) * _shaped(scale, stored, _axis(node)).astype(np.float32)
            return
        if source not in self._quantised:
            raise _declined(node, f"it reads {source!r}, which no QuantizeLinear made: integers are computed or given")
        self._same[made] = self._quantised[source]

    def _parameters(self, node: NodeProto) -> tuple[Number, Number]:
        """Return the scale and the zero point of a node, both of the same shape."""
        if any(a.name == "block_size" and a.i for a in node.attribute):
            raise _declined(node, "it has scales for blocks")
        if node.input[1] not in self._constants or (len(node.input) > 2 and node.input[2] not in self._constants):
            raise _declined(node, "its scale is computed")
        scale = self._constants[node.input[1]]
        given = self._constants[node.input[2]] if len(node.input) > 2 else None
        if given is None:
            default = self._constants.get(node.input[0])
            is_integer = default is not None and default.dtype.kind in "iu"
            given = np.zeros(scale.shape, default.dtype if default is not None and is_integer else np.uint8)
        kind = helper.np_dtype_to_tensor_dtype(given.dtype)
        if kind not in TYPES or scale.dtype != np.float32:
            raise _declined(node, f"its integers are of type {TensorProto.DataType.Name(kind)}")
        return scale, given

    def _check_readers(self) -> None:
        for node in self._nodes:
            for name in outer_reads(node):
                if name in self._quantised:
                    raise _declined(node, f"it reads the integers {name!r}")
        for value in self._graph.output:
            if value.name in self._quantised:
                raise ModelError(f"Output {value.name!r} gives integers that a QuantizeLinear makes.", FLOAT_MODEL)

    def _put_together(self) -> Floated:
        """Write the model anew: readers see what stands in a pair's place, outputs keep their names."""
        outputs = {value.name for value in self._graph.output}
        self._name_by_outputs(outputs)
        nodes: list[NodeProto] = []
        for node in self._nodes:
            copy = NodeProto.FromString(node.SerializeToString())
            _rename(copy, self._same)
            for place, name in enumerate(copy.output):
                copy.output[place] = self._renamed.get(name, name)
            nodes.append(copy)
            nodes += [self._clip(name) for name in node.output if name in self._renamed]
        for name in sorted(outputs & self._same.keys()):
            nodes.append(helper.make_node("Identity", [self._same[name]], [name], self._names.fresh(f"{name}_same")))
        nodes += [
            helper.make_node("Identity", [made], [name], name=self._names.fresh(f"{name}_constant"))
            for name in sorted(outputs & self._new.keys())
            for made in [self._names.fresh(f"{name}_value")]
            if self._new.setdefault(made, self._new[name]) is not None
        ]
        read = {name for node in nodes for name in outer_reads(node)} | outputs
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        kept += [array_tensor(np.asarray(v), name) for name, v in self._new.items() if name in read - outputs]
        del self._graph.node[:], self._graph.initializer[:], self._graph.value_info[:]
        self._graph.node.extend(node for node in nodes if node.op_type != "Constant" or read & set(node.output))
        self._graph.initializer.extend(kept)
        return Floated(self._model, dict(self._scales))

    def _name_by_outputs(self, outputs: Collection[str]) -> None:
        """Give a tensor in front of a pair the name of the output behind it, instead of an Identity between them."""
        for output in sorted(outputs & self._same.keys()):
            source = self._same[output]
            if source not in self._makers or source in outputs:
                continue
            for node in self._nodes:
                _rename(node, {source: output})
                for place, name in enumerate(node.output):
                    node.output[place] = output if name == source else name
            self._same = {name: output if to == source else to for name, to in self._same.items() if name != output}
            self._makers[output] = self._makers.pop(source)
            self._scales[output] = self._scales.pop(source)
            if source in self._renamed:
                self._renamed[output] = self._renamed.pop(source)

    def _clip(self, name: str) -> NodeProto:
        """Return the Clip behind which a tensor has its old name."""
        ends, opset = self._scales[name].limits, {o.domain: o.version for o in self._model.opset_import}[""]
        label = self._names.fresh(f"{name}_clip")
        if opset < CLIP_TAKES_INPUTS:
            return helper.make_node("Clip", [self._renamed[name]], [name], label, min=ends[0], max=ends[1])
        limits = [self._names.fresh(f"{name}_{end}") for end in ("least", "most")]
        for limit, value in zip(limits, ends, strict=True):
            self._graph.initializer.append(array_tensor(np.array(value, np.float32), limit))
        return helper.make_node("Clip", [self._renamed[name], *limits], [name], label)


def _declined(node: NodeProto, why: str) -> ModelError:
    name = node.name or (node.output[0] if node.output else "")
    return ModelError(f"The model is quantised, and {node.op_type} {name!r} cannot be undone: {why}.", FLOAT_MODEL)


def _inside(node: NodeProto) -> Iterator[NodeProto]:
    for attribute in node.attribute:
        if attribute.type in SUBGRAPHS:
            for graph in [attribute.g, *attribute.graphs]:
                for inner in graph.node:
                    yield inner
                    yield from _inside(inner)


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Let a node, and what its subgraphs read from outside, read other tensors."""
    for place, name in enumerate(node.input):
        node.input[place] = names.get(name, name)
    for attribute in node.attribute:
        if attribute.type in SUBGRAPHS:
            for graph in [attribute.g, *attribute.graphs]:
                for inner in graph.node:
                    _rename(inner, names)
                for value in graph.output:
                    value.name = names.get(value.name, value.name)


def _axis(node: NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)


def _shaped(values: Number, like: Number, axis: int) -> Number:
    """Return one value a channel in the shape that multiplies ``like`` along an axis."""
    if values.size == 1:
        return values.reshape(())
    sizes = [1] * like.ndim
    sizes[axis] = -1
    return values.reshape(sizes)
