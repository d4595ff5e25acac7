"""A layer alone in a small graph, as it stands in its network: what its latency depends on, and nothing else.

A Conv is timed between a neighbour that feeds it and one that reads it, because a runtime that keeps images in blocks
of channels (ONNX Runtime's NCHWc) reorders where a layer falls out of that layout, and fuses the sum and the activation
behind it. The neighbours are the cheapest that stay in the layout: a 1x1 Conv from one channel and a global average.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import scipy.sparse
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnx_lrs.graph.forms import conv_attributes, feature_axis
from onnx_lrs.graph.layers import Geometry, Layer, find
from onnx_lrs.graph.model import View, array_tensor, is_standard
from onnx_lrs.graph.rewrite import ELEMENTWISE, POOLS, rewrite
from onnx_lrs.solvers.activation import Activation
from onnx_lrs.solvers.problem import (
    AnyFactors,
    ElementFactors,
    Factors,
    ProjectedFactors,
    SpatialFactors,
    TuckerFactors,
)

OPSET, IR_VERSION = 13, 8
COLDEST = 6  # log2 of the MiB that are let go by at most
LAYER = "layer"
KEEPS_LAYOUT = ELEMENTWISE | POOLS | {"Conv", "Concat", "Add", "BatchNormalization"}
Feed = dict[str, NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class Small:
    """A layer with its surroundings; equal ones take equally long.

    ``input_shape`` and ``output_shape`` are those of the run that is timed, batch included; ``fed``: another layer in
    front leaves its output in the runtime's own layout; ``shortcut``: a computed tensor is added behind the layer;
    ``cold_mib``: so much memory goes by between two runs of the layer that its weights are no longer near (0: they
    weigh less than its activations, which are what counts then).
    """

    op: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    out: int
    geometry: Geometry
    bias: bool
    activation: Activation
    fed: bool
    shortcut: bool
    cold_mib: int = 0

    @functools.cached_property  # asked for every candidate
    def key(self) -> str:
        """A text that is equal for equal layers, and only for those."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of factors: a form with its rank and number of kept channels, and how many outputs are left.

    ``gathered``: the kept channels are picked from all of them; else the input holds no others. ``inner`` is the inner
    rank of Tucker-2, ``weights`` its parameters.
    """

    form: str = "dense"
    rank: int = 0
    kept: int = 0
    outputs: int | None = None
    gathered: bool = True
    inner: int = 0
    weights: int = dataclasses.field(default=0, compare=False)

    @property
    def key(self) -> str:
        """A text that is equal for equal shapes, and only for those."""
        inner = f",{self.inner}" if self.inner else ""
        return f"{self.form},{self.rank},{self.kept},{self.outputs},{int(self.gathered)}{inner}"

    @classmethod
    def of_key(cls, key: str) -> Shape:
        """Return the shape that a key stands for, its weights unknown."""
        form, rank, kept, outputs, gathered, *inner = key.split(",")
        left = None if outputs == "None" else int(outputs)
        return cls(form, int(rank), int(kept), left, bool(int(gathered)), int(inner[0]) if inner else 0)

    @property
    def size(self) -> int:
        """What latency grows with, of shapes that differ in nothing else."""
        return self.weights or self.rank + self.kept


def small_of(view: View, layer: Layer, shapes: Mapping[str, tuple[int, ...]], weights: int) -> Small:
    """Return a layer with its surroundings; ``shapes`` are those of the timed run, ``weights`` the model's params."""
    activations = math.prod(shapes[layer.input]) + math.prod(shapes[layer.node])
    shortcut = layer.behind.shortcut
    added = shortcut is not None and shapes.get(shortcut, ()) == shapes[layer.node] and layer.op == "Conv"
    has_bias = layer.bias is not None or _has_operand(view, layer)
    return Small(
        op=layer.op,
        input_shape=tuple(int(n) for n in shapes[layer.input]),
        output_shape=tuple(int(n) for n in shapes[layer.node]),
        out=layer.out,
        geometry=layer.geometry,
        bias=has_bias,
        activation=layer.activation,
        fed=layer.op == "Conv" and is_fed(view, layer.input),
        shortcut=added,
        cold_mib=_cold_mib(weights) if layer.params > activations else 0,
    )


def _cold_mib(weights: int) -> int:
    """Return the model's weights in MiB, as a power of two so that similar models share their measurements."""
    return 1 << min(max(4 * weights // 2**20, 1).bit_length() - 1, COLDEST)


def _has_operand(view: View, layer: Layer) -> bool:
    node = view.tensors[layer.node].inputs[0]
    return layer.op != "MatMul" and len(node.inputs) > 2 and bool(node.inputs[2].name)


def is_fed(view: View, name: str) -> bool:
    """Return whether a tensor comes out of a Conv, perhaps through nodes that keep its layout."""
    waiting, seen = [name], {name}
    while waiting:
        tensor = view.tensors.get(waiting.pop())
        if tensor is None or not tensor.inputs:
            continue
        node = tensor.inputs[0]
        if node.op == "Conv":
            return True
        if node.op in KEEPS_LAYOUT and is_standard(node.domain):
            waiting += [t.name for t in node.inputs if t.name not in seen]
            seen |= {t.name for t in node.inputs}
    return False


def build_small(small: Small, shape: Shape) -> tuple[onnx.ModelProto, Feed]:
    """Return the graph of a layer in the given shape, with random weights, and one input for it."""
    narrow = dataclasses.replace(small, out=shape.outputs or small.out)
    if shape.kept and not shape.gathered:  # the channels that are not kept do not exist
        axis = feature_axis(small.op, small.geometry, len(small.input_shape))
        sizes = tuple(shape.kept if i == axis else n for i, n in enumerate(small.input_shape))
        narrow = dataclasses.replace(narrow, input_shape=sizes)
    model, feed = _dense(narrow)
    if shape.form == "dense" or (shape.form == "channels" and not shape.gathered):
        return model, feed
    view = View(model)
    layers = [layer for layer in find(view, smallest=0)[0] if layer.name == LAYER]
    factors = {layer.node: random_factors(layer, shape) for layer in layers}
    ranks = {layer.input: len(small.input_shape) for layer in layers}
    return rewrite(view, layers, factors, ranks).model, feed


@functools.lru_cache(maxsize=1)  # all layers of a model ask for the same
def streamer(mib: int) -> tuple[onnx.ModelProto, Feed]:
    """Return a graph that reads so many MiB of weights once: after it other weights have left the near caches."""
    draft = _Draft()
    draft.inputs["input"] = (1, 1024)
    weight = np.ones((1024, mib << 8), np.float32)
    draft.constants.append(array_tensor(weight, "weight"))
    return draft.model(draft.node("MatMul", ["input", "weight"], "output"))


def random_factors(layer: Layer, shape: Shape, support: NDArray[np.int64] | None = None) -> AnyFactors:
    """Return factors of that shape with random values of usual size; ``support`` names the kept channels."""
    generator = np.random.default_rng(0)

    def draw(*sizes: int) -> NDArray[np.float64]:
        return np.asarray(generator.standard_normal(sizes, np.float32) / np.sqrt(sizes[1]), np.float64)

    rank, shift = shape.rank, np.zeros(layer.out)
    if shape.form == "spatial":
        height, width = layer.geometry.kernel
        return SpatialFactors(draw(layer.out, rank, width), draw(rank, layer.channels, height), shift)
    if shape.form == "projected":
        left = draw(layer.out, rank * layer.taps).reshape(layer.out, rank, layer.taps)
        return ProjectedFactors(left, draw(rank, layer.channels)[:, :, None], shift)
    if shape.form == "tucker":
        core = draw(rank, shape.inner * layer.taps).reshape(rank, shape.inner, layer.taps)
        return TuckerFactors(core, draw(shape.inner, layer.channels)[:, :, None], shift, draw(layer.out, rank))
    if support is None:
        support = np.sort(generator.choice(layer.channels, shape.kept, replace=False))
    sparse = draw(layer.out, max(len(support) * layer.taps, 1))[:, : len(support) * layer.taps]
    left, right = draw(layer.out, max(rank, 1))[:, :rank], draw(max(rank, 1), layer.d)[:rank]
    return Factors(left, right, support.astype(np.int64), sparse, shift, layer.taps)


def random_elements(layer: Layer, rank: int, count: int) -> ElementFactors:
    """Return factors of a rank beside so many single entries, values and places random."""
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((layer.out, rank)), generator.standard_normal((rank, layer.d))
    places = np.sort(generator.choice(layer.params, count, replace=False))
    sparse = scipy.sparse.csr_array((np.ones(count), np.divmod(places, layer.d)), shape=(layer.out, layer.d))
    return ElementFactors(left, right, sparse, np.zeros(layer.out))


class _Draft:
    """Nodes and constants of a small graph while it is put together."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.inputs: dict[str, tuple[int, ...]] = {}
        self._generator = np.random.default_rng(1)

    def weight(self, name: str, shape: tuple[int, ...], fan_in: int) -> str:
        values = self._generator.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))
        self.constants.append(array_tensor(values, name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def neighbour(self, name: str, shape: tuple[int, ...]) -> str:
        """Add an input of one channel and the 1x1 Conv that makes a tensor of that shape from it."""
        self.inputs[name] = (shape[0], 1, *shape[2:])
        weight = self.weight(f"{name}.weight", (shape[1], 1, *[1] * (len(shape) - 2)), 1)
        return self.node("Relu", [self.node("Conv", [name, weight], f"{name}.spread")], f"{name}.full")

    def model(self, output: str) -> tuple[onnx.ModelProto, Feed]:
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in self.inputs.items()]
        graph = helper.make_graph(self.nodes, "small", values, [onnx.ValueInfoProto(name=output)], self.constants)
        graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        feed = {n: self._generator.standard_normal(s, np.float32) for n, s in self.inputs.items()}
        return model, feed


def _dense(small: Small) -> tuple[onnx.ModelProto, Feed]:
    draft = _Draft()
    if small.op != "Conv":
        draft.inputs["input"] = small.input_shape
        return draft.model(_activated(draft, small, _product(draft, small)))
    if small.fed:
        source = draft.neighbour("input", small.input_shape)
    else:
        draft.inputs["input"], source = small.input_shape, "input"
    g, channels = small.geometry, small.input_shape[1]
    inputs = [source, draft.weight("weight", (small.out, channels, *g.kernel), channels * int(np.prod(g.kernel)))]
    if small.bias:
        inputs.append(draft.weight("bias", (small.out,), 1))
    end = draft.node("Conv", inputs, LAYER, **conv_attributes(g))
    if small.shortcut:
        other = draft.neighbour("shortcut", (small.output_shape[0], small.out, *small.output_shape[2:]))
        end = draft.node("Add", [end, other], "sum")
    end = _activated(draft, small, end)
    return draft.model(draft.node("GlobalAveragePool", [end], "average"))


def _product(draft: _Draft, small: Small) -> str:
    g = small.geometry
    features = small.input_shape[feature_axis(small.op, g, len(small.input_shape))]
    if small.op == "Gemm":
        shape = (small.out, features) if g.trans_b else (features, small.out)
        inputs = ["input", draft.weight("weight", shape, features)]
        inputs += [draft.weight("bias", (small.out,), 1)] if small.bias else []
        return draft.node("Gemm", inputs, LAYER, transA=int(g.trans_a), transB=int(g.trans_b))
    weight = draft.weight("weight", (small.out, features) if g.weight_left else (features, small.out), features)
    end = draft.node("MatMul", [weight, "input"] if g.weight_left else ["input", weight], LAYER)
    if small.bias:
        end = draft.node(
            "Add", [end, draft.weight("bias", (small.out, 1) if g.weight_left else (small.out,), 1)], "sum"
        )
    return end


def _activated(draft: _Draft, small: Small, end: str) -> str:
    """Add the activation where it is one that runtimes fuse."""
    phi = small.activation
    if phi.name == "relu":
        return draft.node("Relu", [end], "active")
    if phi.name == "clip":
        limits = [*phi.breaks, np.inf][:2]
        names = [f"limit{i}" for i in range(2)]
        for name, limit in zip(names, limits, strict=True):
            draft.constants.append(array_tensor(np.array(limit, np.float32), name))
        return draft.node("Clip", [end, *names], "active")
    if phi.name == "leaky-relu":
        return draft.node("LeakyRelu", [end], "active", alpha=float(phi.slopes[0]))
    return end
