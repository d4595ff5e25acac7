"""A model quantised in QDQ format back to floats: weights dequantised, pairs around activations taken out.

QDQ means that each tensor goes through QuantizeLinear and DequantizeLinear, and everything between computes in floats.
So the float model is in there, but for the rounding, and for what the *clamp* of a pair did: a pair rounds, and clips
to ``[(qmin - zero_point) * scale, (qmax - zero_point) * scale]``. ONNX Runtime's quantize_static counts on that and
deletes each Relu and Clip in front of a pair (QDQRemovableActivation, unless activations are symmetric), so a model
without its pairs may lack them. Nobody wrote down which; what the pair's range says decides:

- Its ends are small whole numbers, as those of a Clip are and those of a measured range are not (behind a ReLU6 the
  scale is 6 / 255 to the last bit; of measured ranges one in 10^5 would be such): a Clip at these ends.
- Its lower end is 0 (``zero_point == qmin``) and what is in front may be negative: a Relu takes its place. If there was
  none, the quantised model clamped there all the same. A Clip whose upper end no sample of the calibration reached
  becomes a Relu, too: none of those samples tells the difference.
- Any other end is where the samples of the calibration ended. Saturation beyond it is an artefact of quantisation and
  is not reproduced (a Clip at other than whole numbers is lost with it); nor is any clamp of a graph input, in front of
  which nothing can have been deleted.

What is known to stay within these ends (behind a Relu, pooled from such, a sum of such, ...) is not cut off again, nor
is a tensor that is read by nothing but Relus or Clips that do it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype, tensor_dtype_to_np_dtype

from onnx_lrs.errors import ModelError
from onnx_lrs.graph.model import INITIALISERS_NO_INPUTS, View, array_tensor, is_standard
from onnx_lrs.graph.splice import Edit, Names, splice
from onnx_lrs.graph.weights import SMALLEST_OUTSIDE, Scratch

MICROSOFT = ("com.microsoft", "com.ms.internal.nhwc")
QUANTISED = re.compile(r"[Qq]uantize|Integer|^Q[A-Z]")  # QLinearConv, QGemm, MatMulInteger, DynamicQuantizeLSTM, ...
IN_BLOCKS = ("MatMulNBits", "MatMulBnb4", "MatMulFpQ4")  # of com.microsoft; GatherBlockQuantized is one as well
DYNAMIC = re.compile(r"Dynamic|Integer")
PAIR = ("QuantizeLinear", "DequantizeLinear")
CLIP_BY_INPUTS = 11  # the opset since which a Clip's ends are inputs
LARGEST_END = 128  # of a Clip that a scale is taken for; float32 is so coarse at large numbers that many are whole
REMEDY = "Give the float model that it was made from."
ACTIVATIONS = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16)
WEIGHTS = (*ACTIVATIONS, TensorProto.INT32)

Bounds = tuple[float, float]
ANYTHING: Bounds = (-math.inf, math.inf)
FROM_ZERO: Bounds = (0.0, math.inf)
RANGES = dict.fromkeys(("Sigmoid", "HardSigmoid", "Softmax"), (0.0, 1.0)) | {"Tanh": (-1.0, 1.0)}
RANGES |= dict.fromkeys(("Abs", "Exp", "Softplus", "Sqrt"), FROM_ZERO)
SAME_VALUES = {  # what comes out lies between what comes in through the first input
    *(
        "Identity",
        "Transpose",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "GatherElements",
    ),
    *("Expand", "Tile", "MaxPool", "GlobalMaxPool", "GlobalAveragePool", "ReduceMean", "ReduceMax", "ReduceMin"),
    *("DepthToSpace", "SpaceToDepth"),
}
ONE_OF_ALL = {"Concat", "Max", "Min"}
ROUNDING = 1e-6  # relative; how far beyond its bounds float32 may take a value


@dataclasses.dataclass(frozen=True)
class Scale:
    """How a tensor was quantised: ``value = scale * (integer - zero_point)``, for the tensor as a whole.

    ``dtype`` is the integers' element type: UINT8, INT8, UINT16 or INT16 of onnx.TensorProto. ``scale`` is a float32
    without loss.
    """

    scale: float
    zero_point: int
    dtype: int


@dataclasses.dataclass(frozen=True)
class Floated:
    """A float model made of a quantised one, and the scales of its activations by the name of the float tensor."""

    model: onnx.ModelProto
    scales: Mapping[str, Scale]


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """Scale and zero point of a Q or DQ node, scalars or of shape (channels,), and the integers' element type."""

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]
    dtype: int


@dataclasses.dataclass
class _Tensor:
    """A float tensor that goes through pairs: all Q nodes on it, and all names of what comes out behind them."""

    front: str
    scale: Scale
    pairs: list[str] = dataclasses.field(default_factory=list)
    behind: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Changes:
    """Names to read instead of others, names to write instead, and nodes in place of a Q by the name of its output."""

    reads: dict[str, str] = dataclasses.field(default_factory=dict)
    writes: dict[str, str] = dataclasses.field(default_factory=dict)
    nodes: dict[str, list[gs.Node]] = dataclasses.field(default_factory=dict)


def is_quantised(model: onnx.ModelProto) -> bool:
    """Return whether a model has any operator of quantisation: in its graph, its subgraphs or its functions."""
    return any(_is_quantisation(node) for node, _ in _every_node(model))


def floated(model: onnx.ModelProto, scratch: Scratch | None = None) -> Floated:
    """Return the float model in a model of QDQ format, with the scales that its activations had.

    Each DequantizeLinear of a constant becomes a float32 initialiser under the name of its output, with the values that
    ONNX Runtime computes. Pairs on other tensors go, or a Relu or Clip takes their place (see above). Inputs, outputs
    and opsets stay. A tensor has the name that it has in front of its pair, or of the graph output behind it; an
    Identity stands only where a graph output is a graph input or a second name of the same tensor. The argument is
    never changed. Large new weights go to ``scratch`` if there is one.

    Raises
    ------
    ModelError
        If the model is quantised otherwise: in QOperator format, dynamically, in blocks, to 4 bits or float8, per axis
        at an activation, inside a subgraph, with computed scales, or where integers are read by anything but
        DequantizeLinear.
    """
    _refuse_others(model)
    view = View(model)
    made: dict[str, TensorProto] = {}
    bounds: dict[str, Bounds] = {}
    for node in view.nodes:
        if _is_pair(node):
            _refuse_open_ends(view, node)
        name = node.outputs[0].name if node.outputs else ""
        if _is_dequantise(node) and _is_weight(view, node) and _is_read(view, name):
            values = _values(view, node)
            bounds[name] = (float(values.min()), float(values.max())) if values.size else ANYTHING
            outside = scratch if values.nbytes >= SMALLEST_OUTSIDE else None
            made[name] = outside.tensor(name, values) if outside else array_tensor(values, name)
    tensors = _tensors(view)
    clamps = _clamps(view, tensors, bounds)
    names, changes = Names(model), _Changes()
    known = {t.front: _place(view, names, t, clamps.get(t.front), changes) for t in tensors.values()}
    scales = {known[t.front]: t.scale for t in tensors.values() if t.front not in made}
    return Floated(_rebuilt(model, names, made, changes), scales)


# ------------------------------------------------------------------------------------------------ what is declined


def _declined(node: gs.Node | onnx.NodeProto, why: str) -> ModelError:
    proto = isinstance(node, onnx.NodeProto)
    outputs = list(node.output) if proto else [t.name for t in node.outputs]
    name = node.name or next(iter(outputs), "")
    kind = node.op_type if proto else node.op
    return ModelError(f"The model is quantised in a way that is not supported: {kind} node {name!r} {why}.", REMEDY)


def _refuse_others(model: onnx.ModelProto) -> None:
    for node, inside in _every_node(model):
        if not _is_quantisation(node):
            continue
        if inside:
            raise _declined(node, "lies inside a subgraph or a function")
        if node.op_type in IN_BLOCKS or "Block" in node.op_type:
            raise _declined(node, "holds a weight that is quantised in blocks")
        if DYNAMIC.search(node.op_type):
            raise _declined(node, "belongs to dynamic quantisation, which keeps no scales of activations")
        if node.op_type not in PAIR:
            raise _declined(node, "computes with integers (QOperator format); only the QDQ format can be undone")


def _is_quantisation(node: onnx.NodeProto) -> bool:
    if node.domain in MICROSOFT and node.op_type in IN_BLOCKS:
        return True
    return (is_standard(node.domain) or node.domain in MICROSOFT) and bool(QUANTISED.search(node.op_type))


def _every_node(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, bool]]:
    """Yield all nodes, and whether they lie in a subgraph or function."""
    for node in model.graph.node:
        yield node, False
        yield from ((inner, True) for inner in _inner_nodes(node))
    for function in model.functions:
        for node in function.node:
            yield from ((each, True) for each in (node, *_inner_nodes(node)))


def _inner_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for graph in _subgraphs(node):
        for inner in graph.node:
            yield inner
            yield from _inner_nodes(inner)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _refuse_open_ends(view: View, node: gs.Node) -> None:
    """Decline integers that come from anywhere but a constant or a Q, or go anywhere but into a DQ."""
    if _is_dequantise(node):
        source = node.inputs[0].name
        if not view.is_constant(source) and _quantiser(view, node) is None:
            where = "a graph input" if source in view.inputs else "a computed integer tensor"
            raise _declined(node, f"reads {where}, {source!r}")
        return
    result = node.outputs[0].name
    if result in view.outputs:
        raise _declined(node, f"gives the integers {result!r} as a graph output")
    others = [reader for reader in view.readers(result) if not _is_dequantise(reader)]
    if others:
        by = f"{others[0].op} node {others[0].name or others[0].outputs[0].name!r}"
        raise _declined(
            node, f"gives the integers {result!r}, which are read by {by} and not by DequantizeLinear alone"
        )


def _is_pair(node: gs.Node) -> bool:
    return node.op in PAIR and (is_standard(node.domain) or node.domain in MICROSOFT)


def _is_dequantise(node: gs.Node) -> bool:
    return _is_pair(node) and node.op == "DequantizeLinear"


def _quantiser(view: View, node: gs.Node) -> gs.Node | None:
    """Return the Q node whose integers a DQ node reads."""
    tensor = view.tensors.get(node.inputs[0].name)
    made_by = tensor.inputs[0] if tensor is not None and tensor.inputs else None
    return made_by if made_by is not None and _is_pair(made_by) and not _is_dequantise(made_by) else None


# ------------------------------------------------------------------------------------------------ scales and weights


def _numbers(view: View, node: gs.Node) -> _Numbers:
    """Return scale and zero point of a Q or DQ node, if they can be used."""
    if node.attrs.get("block_size"):
        raise _declined(node, f"quantises in blocks of {node.attrs['block_size']}")
    given = [t.name for t in node.inputs[1:] if t.name]
    for name in given:
        if not view.is_constant(name):
            raise _declined(node, f"has a scale or zero point that is not constant, {name!r}")
    scale = view.constant(given[0])
    if scale.dtype != np.float32:
        raise _declined(node, f"has a scale that is not float32, {given[0]!r} ({scale.dtype})")
    if _is_dequantise(node) and node.attrs.get("output_dtype", 0) not in (0, TensorProto.FLOAT):
        raise _declined(node, "does not give float32")
    if scale.ndim > 1:
        raise _declined(node, f"has scales {given[0]!r} of shape {list(scale.shape)}: quantised in blocks")
    if not np.isfinite(scale).all() or scale.min() < 0:
        raise _declined(node, f"has a scale that is negative or not finite, {given[0]!r}")
    dtype = _integer_type(view, node, given)
    if dtype not in WEIGHTS:
        kind = TensorProto.DataType.Name(dtype)
        raise _declined(node, f"quantises to {kind}; 8- and 16-bit integers and int32 biases are supported")
    zero_point = view.constant(given[1]).astype(np.int64) if len(given) > 1 else np.zeros(scale.shape, np.int64)
    if scale.size == 1 and zero_point.size == 1:  # ONNX Runtime takes vectors of one element for scalars as well
        return _Numbers(scale.reshape(()), zero_point.reshape(()), dtype)
    return _Numbers(scale, zero_point, dtype)


def _integer_type(view: View, node: gs.Node, given: list[str]) -> int:
    if len(given) > 1:
        return int(np_dtype_to_tensor_dtype(view.constant(given[1]).dtype))
    if _is_dequantise(node):
        made_by = _quantiser(view, node)
        if made_by is not None:
            return _integer_type(view, made_by, [t.name for t in made_by.inputs[1:] if t.name])
        return int(np_dtype_to_tensor_dtype(view.constant(node.inputs[0].name).dtype))
    return int(node.attrs.get("output_dtype", 0)) or TensorProto.UINT8


def _same(one: _Numbers, other: _Numbers) -> bool:
    arrays = ((one.scale, other.scale), (one.zero_point, other.zero_point))
    return one.dtype == other.dtype and all(np.array_equal(a, b) for a, b in arrays)


def _is_weight(view: View, node: gs.Node) -> bool:
    """Return whether a DQ node's result is constant: its integers are, or the floats that they are made from."""
    made_by = _quantiser(view, node)
    return view.is_constant(node.inputs[0].name if made_by is None else made_by.inputs[0].name)


def _is_read(view: View, name: str) -> bool:
    return bool(view.readers(name)) or name in view.outputs


def _values(view: View, node: gs.Node) -> NDArray[np.float32]:
    """Return what a DQ node makes of a constant, to the bit as ONNX Runtime computes it."""
    numbers, made_by = _numbers(view, node), _quantiser(view, node)
    if made_by is None:
        stored = view.constant(node.inputs[0].name)
        if np_dtype_to_tensor_dtype(stored.dtype) != numbers.dtype:
            raise _declined(node, f"has a zero point of another type than its integers ({stored.dtype})")
        scale, zero_point = _spread(node, numbers, stored.shape)
        return (stored.astype(np.int64) - zero_point).astype(np.float32) * scale
    if not _same(numbers, _numbers(view, made_by)):
        raise _declined(node, f"has another scale or zero point than the QuantizeLinear before it, {made_by.name!r}")
    stored = view.constant(made_by.inputs[0].name)
    if stored.dtype != np.float32 or numbers.dtype not in ACTIVATIONS:
        raise _declined(made_by, f"quantises {stored.dtype} values")
    if not numbers.scale.all():
        raise _declined(made_by, "has a scale of 0")
    scale, zero_point = _spread(node, numbers, stored.shape)
    ends = np.iinfo(tensor_dtype_to_np_dtype(numbers.dtype))
    # In floats all the way: the integers are small enough, and NaN stays NaN.
    return np.clip(np.rint(stored / scale), ends.min - zero_point, ends.max - zero_point).astype(np.float32) * scale


def _spread(node: gs.Node, numbers: _Numbers, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scale and zero point so that they broadcast over a tensor of that shape."""
    if numbers.scale.ndim == 0 and numbers.zero_point.ndim == 0:
        return numbers.scale, numbers.zero_point
    axis = int(node.attrs.get("axis", 1))
    inside = -len(shape) <= axis < len(shape)
    if not inside or numbers.scale.shape != (shape[axis],) or numbers.zero_point.shape != numbers.scale.shape:
        raise _declined(node, f"has {numbers.scale.size} scales for axis {axis} of a tensor of shape {list(shape)}")
    across = [1] * len(shape)
    across[axis] = -1
    return numbers.scale.reshape(across), numbers.zero_point.reshape(across)


def _tensors(view: View) -> dict[str, _Tensor]:
    """Return the float tensors that go through pairs, by the name in front of the first pair, in the graph's order."""
    found: dict[str, _Tensor] = {}
    roots: dict[str, str] = {}  # from a name behind a pair to the name in front of all pairs
    for node in view.nodes:
        if not _is_pair(node) or view.is_constant(node.inputs[0].name):
            continue
        made_by = _quantiser(view, node) if _is_dequantise(node) else node
        if made_by is None or view.is_constant(made_by.inputs[0].name):
            continue
        front = roots.get(made_by.inputs[0].name, made_by.inputs[0].name)
        scale = _scale(view, node)
        tensor = found.setdefault(front, _Tensor(front, scale))
        if tensor.scale != scale:
            raise _declined(node, f"has another scale or zero point than another node on the tensor {front!r}")
        if _is_dequantise(node):
            tensor.behind.append(node.outputs[0].name)
            roots[node.outputs[0].name] = front
        else:
            tensor.pairs.append(node.outputs[0].name)
    return found


def _scale(view: View, node: gs.Node) -> Scale:
    """Return the one scale that a Q or DQ node of an activation has."""
    numbers = _numbers(view, node)
    if numbers.scale.ndim or numbers.zero_point.ndim:
        raise _declined(node, f"has {numbers.scale.size} scales along an axis of an activation")
    if numbers.dtype not in ACTIVATIONS or not numbers.scale:
        raise _declined(node, "quantises an activation to int32, or has a scale of 0")
    return Scale(float(numbers.scale), int(numbers.zero_point), numbers.dtype)


# ------------------------------------------------------------------------------------------------ what a clamp did


def _clamps(view: View, tensors: Mapping[str, _Tensor], bounds: dict[str, Bounds]) -> dict[str, Bounds]:
    """Return between what a tensor has to be cut off in place of its pairs, by the name in front; none for most.

    ``bounds`` has those of the weights, and gets those of all tensors about which something is known.
    """
    found: dict[str, Bounds] = {}
    firsts = {tensor.pairs[0]: tensor for tensor in tensors.values()}
    for node in view.nodes:
        if not _is_pair(node):
            limits = _limits(view, node, bounds)
            if limits != ANYTHING:
                bounds |= {t.name: limits for t in node.outputs}
            continue
        tensor = firsts.get(node.outputs[0].name)
        if tensor is None:
            continue
        before = bounds.get(tensor.front, ANYTHING)
        if tensor.front in view.inputs:
            bounds |= dict.fromkeys((tensor.front, *tensor.behind), _range(tensor.scale))
            continue
        clamp = _clamp(tensor.scale, before)
        if clamp is not None and not _is_cut_behind(view, tensor, clamp, bounds):
            found[tensor.front] = clamp
            before = _cut(before, clamp)
        bounds |= dict.fromkeys(tensor.behind, before)
    return found


def _clamp(scale: Scale, before: Bounds) -> Bounds | None:
    """Return between what the pair of a scale has to cut off a tensor with these bounds, by the rules of the module."""
    kind = np.iinfo(tensor_dtype_to_np_dtype(scale.dtype))
    low, high = _whole_ends(scale) or (0.0 if scale.zero_point == kind.min else -math.inf, math.inf)
    slack = ROUNDING * max(abs(end) for end in (low, high, 1.0) if math.isfinite(end))
    if low - slack <= before[0] and before[1] <= high + slack:
        return None
    return low, high


def _range(scale: Scale) -> Bounds:
    """Return the smallest and the largest value that can be written with a scale."""
    kind = np.iinfo(tensor_dtype_to_np_dtype(scale.dtype))
    return (kind.min - scale.zero_point) * scale.scale, (kind.max - scale.zero_point) * scale.scale


def _whole_ends(scale: Scale) -> Bounds | None:
    """Return the small whole numbers that a scale was made from, if it was: a Clip's ends.

    ONNX Runtime makes it from a range [low, high] around 0 as ``(high - low) / (qmax - qmin)``, and the zero point as
    ``round(qmin - low / scale)``; both have to come out again.
    """
    kind = np.iinfo(tensor_dtype_to_np_dtype(scale.dtype))
    low = round(_range(scale)[0])
    high = low + round(scale.scale * (kind.max - kind.min))
    exact = (high - low) / (kind.max - kind.min)
    if not (low <= 0 <= high and exact > 0 and max(-low, high) < LARGEST_END):
        return None
    near = abs(scale.scale - float(np.float32(exact))) <= np.spacing(np.float32(exact))
    return (float(low), float(high)) if near and round(kind.min - low / exact) == scale.zero_point else None


def _is_cut_behind(view: View, tensor: _Tensor, clamp: Bounds, bounds: Mapping[str, Bounds]) -> bool:
    """Return whether all that reads a tensor behind its pairs is a Relu or Clip that cuts off as much."""
    for name in tensor.behind:
        readers = [reader for reader in view.readers(name) if not _is_pair(reader)]
        if name in view.outputs or any(reader.op not in ("Relu", "Clip") for reader in readers):
            return False
        cuts = [_limits(view, reader, {**bounds, name: ANYTHING}) for reader in readers]
        if any(low < clamp[0] or high > clamp[1] for low, high in cuts):
            return False
    return True


def _limits(view: View, node: gs.Node, bounds: Mapping[str, Bounds]) -> Bounds:
    """Return between what the results of a node lie; ANYTHING where that is not known."""
    if not is_standard(node.domain):
        return ANYTHING
    if node.op in RANGES:
        return RANGES[node.op]
    operands = [t.name for t in node.inputs]
    if node.op == "Relu":
        return _cut(_bounds(view, operands[0], bounds), FROM_ZERO)
    if node.op == "Clip":
        return _cut(_bounds(view, operands[0], bounds), _clip_ends(view, node, bounds))
    if node.op in SAME_VALUES:
        return _bounds(view, operands[0], bounds)
    if node.op == "Resize" and node.attrs.get("mode", "nearest") != "cubic" and "extrapolation_value" not in node.attrs:
        return _bounds(view, operands[0], bounds)
    if node.op in ("AveragePool", "Pad"):  # zeros may be among the values
        added = [name for name in operands[2:3] if name and node.op == "Pad"]
        fill = float(node.attrs.get("value", 0.0))
        return _hull([_bounds(view, name, bounds) for name in (operands[0], *added)] + [(fill, fill), (0.0, 0.0)])
    if node.op in ONE_OF_ALL:
        return _hull(_bounds(view, name, bounds) for name in operands)
    if node.op in ("Add", "Sum"):
        lows, highs = zip(*(_bounds(view, name, bounds) for name in operands), strict=True)
        return sum(lows), sum(highs)
    if node.op in ("Sub", "Mul", "Div"):
        return _arithmetic(node.op, *(_bounds(view, name, bounds) for name in operands))
    return ANYTHING


def _bounds(view: View, name: str, bounds: Mapping[str, Bounds]) -> Bounds:
    if name in bounds or not view.is_constant(name):
        return bounds.get(name, ANYTHING)
    values = view.constant(name)
    return (float(values.min()), float(values.max())) if values.size and values.dtype.kind in "fiu" else ANYTHING


def _clip_ends(view: View, node: gs.Node, bounds: Mapping[str, Bounds]) -> Bounds:
    if view.opset < CLIP_BY_INPUTS:
        return float(node.attrs.get("min", -math.inf)), float(node.attrs.get("max", math.inf))
    low, high = (*(t.name for t in node.inputs[1:3]), "", "")[:2]
    return _bounds(view, low, bounds)[0] if low else -math.inf, _bounds(view, high, bounds)[1] if high else math.inf


def _cut(before: Bounds, ends: Bounds) -> Bounds:
    low, high = (min(max(value, ends[0]), ends[1]) for value in before)
    return low, high


def _hull(parts: Iterable[Bounds]) -> Bounds:
    lows, highs = zip(*parts, strict=True)
    return min(lows), max(highs)


def _arithmetic(operator: str, one: Bounds, other: Bounds) -> Bounds:
    """Return the bounds of a difference, product or quotient; no more than the sign where an end is infinite."""
    if operator == "Sub":
        return one[0] - other[1], one[1] - other[0]
    if operator == "Div":
        if other[0] <= 0:
            return ANYTHING
        other = 1 / other[1], 1 / other[0]
    if not all(map(math.isfinite, (*one, *other))):
        return FROM_ZERO if one[0] >= 0 and other[0] >= 0 else ANYTHING
    corners = [a * b for a in one for b in other]
    return min(corners), max(corners)


# ------------------------------------------------------------------------------------------------ the new graph


def _place(view: View, names: Names, tensor: _Tensor, clamp: Bounds | None, changes: _Changes) -> str:
    """Note what has to change for a tensor without its pairs, and return the name under which all read it."""
    front = tensor.front
    ends = [name for name in tensor.behind if name in view.outputs]
    made_by = view.tensors[front].inputs
    movable = bool(made_by) and not _is_pair(made_by[0]) and front not in view.outputs
    nodes: list[gs.Node] = []
    if clamp is not None:
        alone = movable and all(_is_pair(reader) for reader in view.readers(front))
        if not ends and alone:  # what is behind the clamp keeps the name, as ONNX Runtime gave it the Relu's
            changes.writes[front] = names.fresh(f"{front}_unclamped")
        name = ends[0] if ends else front if alone else names.fresh(f"{front}_clamped")
        nodes.append(_clamping(view, names, clamp, changes.writes.get(front, front), name))
    elif ends and movable:
        name = ends[0]
        changes.writes[front] = changes.reads[front] = name
    else:
        name = front
    for other in ends:
        if other != name:
            nodes.append(gs.Node("Identity", names.fresh(f"{other}_identity"), {}, [_named(name)], [_named(other)]))
    changes.reads |= {behind: name for behind in tensor.behind if behind != name}
    changes.nodes[tensor.pairs[0]] = nodes
    return name


def _named(name: str) -> gs.Variable:
    return gs.Variable(name)


def _clamping(view: View, names: Names, clamp: Bounds, source: str, name: str) -> gs.Node:
    operands, results = [_named(source)], [_named(name)]
    if clamp == FROM_ZERO:
        return gs.Node("Relu", names.fresh(f"{name}_relu"), {}, operands, results)
    wish = names.fresh(f"{name}_clip")
    if view.opset < CLIP_BY_INPUTS:
        return gs.Node("Clip", wish, {"min": clamp[0], "max": clamp[1]}, operands, results)
    ends = zip(("min", "max"), clamp, strict=True)
    operands += [gs.Constant(names.fresh(f"{wish}_{end}"), np.array(value, np.float32)) for end, value in ends]
    return gs.Node("Clip", wish, {}, operands, results)


def _rebuilt(
    model: onnx.ModelProto, names: Names, made: Mapping[str, TensorProto], changes: _Changes
) -> onnx.ModelProto:
    """Return a copy of the model without Q and DQ nodes, with the changes made and new initialisers added."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    edit: dict[str, list[gs.Node]] = {}
    untrue = set(changes.reads) | set(made)
    for node in graph.node:
        if _is_quantisation(node):  # under names of their own, so that others can take theirs before they go
            untrue.add(node.output[0])
            fresh = names.fresh(f"{node.output[0]}_gone")
            edit[fresh] = changes.nodes.get(node.output[0], [])
            node.output[0] = fresh
    _rename(graph, changes.reads, changes.writes)
    told = [value for value in graph.value_info if value.name not in untrue]
    del graph.value_info[:], graph.quantization_annotation[:]
    graph.value_info.extend(told)
    graph.initializer.extend(made.values())
    if copy.ir_version < INITIALISERS_NO_INPUTS:
        graph.input.extend(make_tensor_value_info(t.name, t.data_type, t.dims) for t in made.values())
    return splice(copy, Edit(edit))


def _rename(graph: onnx.GraphProto, reads: Mapping[str, str], writes: Mapping[str, str]) -> None:
    """Change in place what nodes read and write; subgraphs read outer tensors under their new names, too.

    A name means the same everywhere: ONNX forbids a subgraph to use one again.
    """
    for node in graph.node:
        node.input[:] = [reads.get(name, name) for name in node.input]
        node.output[:] = [writes.get(name, name) for name in node.output]
        for inner in _subgraphs(node):
            _rename(inner, reads, {})
