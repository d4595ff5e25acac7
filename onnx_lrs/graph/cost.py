"""What a node costs: multiply-accumulates from the shapes it really runs on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx_graphsurgeon as gs

from onnx_lrs.graph.model import View, is_standard

Shapes = Mapping[str, tuple[int, ...]]
COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def tensors_to_measure(view: View) -> list[str]:
    """Return the computed tensors whose shapes :func:`macs_by_node` needs."""
    names: dict[str, None] = {}
    for node in _counted(view):
        for tensor in (*node.inputs[:2], node.outputs[0]):
            if tensor.name not in view.inputs and view.stored_shape(tensor.name) is None:
                names[tensor.name] = None
    return list(names)


def macs_by_node(view: View, shapes: Shapes) -> dict[str, int]:
    """Return multiply-accumulates of one run by the node's first output.

    Counted are Conv, ConvTranspose, Gemm and MatMul of the main graph, but for products of constants, which a runtime
    computes once; ``shapes`` holds measured tensors and inputs.
    """
    return {node.outputs[0].name: _macs(view, node, shapes) for node in _counted(view)}


def _counted(view: View) -> Iterator[gs.Node]:
    for node in view.nodes:
        if node.op in COUNTED and is_standard(node.domain) and not view.is_computed(node.outputs[0].name):
            yield node


def _macs(view: View, node: gs.Node, shapes: Shapes) -> int:
    first, second, output = (_shape(view, t.name, shapes) for t in (*node.inputs[:2], node.outputs[0]))
    if node.op == "Conv":  # weight (out, in / group, *kernel)
        return math.prod(output) * math.prod(second[1:])
    if node.op == "ConvTranspose":  # weight (in, out / group, *kernel)
        return math.prod(first) * math.prod(second[1:])
    inner = first[0] if node.op == "Gemm" and node.attrs.get("transA", 0) else first[-1]
    return math.prod(output) * inner


def _shape(view: View, name: str, shapes: Shapes) -> tuple[int, ...]:
    shape = shapes[name] if name in shapes else view.stored_shape(name)
    assert shape is not None  # tensors_to_measure asked for it
    return tuple(shape)
