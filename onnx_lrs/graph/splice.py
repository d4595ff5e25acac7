"""Replace nodes of a ModelProto and leave every other byte of it alone.

New nodes are built with onnx-graphsurgeon and exported one by one; the model around them is never exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx.helper import make_tensor_value_info
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnx_lrs.graph.model import INITIALISERS_NO_INPUTS, array_tensor, is_standard
from onnx_lrs.graph.weights import SMALLEST_OUTSIDE, Scratch

CONSTANT_OPS = ("Constant", "Identity", "Transpose")
Created = NDArray[Any] | onnx.TensorProto | onnx.SparseTensorProto


@dataclasses.dataclass(frozen=True)
class Edit:
    """What to change, keyed by the first output of the node concerned.

    ``nodes`` gives the nodes that take the place of one, ``reshaped`` the tensors whose shape changes.
    """

    nodes: Mapping[str, Sequence[gs.Node]] = dataclasses.field(default_factory=dict)
    reshaped: frozenset[str] = frozenset()


class SparseConstant(gs.Variable):  # type: ignore[misc]
    """A new sparse initialiser as an operand of new nodes; onnx-graphsurgeon reads such constants but makes none."""

    def __init__(self, name: str, stored: onnx.SparseTensorProto) -> None:
        super().__init__(name, dtype=np.float32, shape=tuple(stored.dims))
        self.stored = onnx.SparseTensorProto()
        self.stored.CopyFrom(stored)
        self.stored.values.name = name


class OutsideConstant(gs.Variable):  # type: ignore[misc]
    """A new initialiser whose values lie in a file, as an operand of new nodes."""

    def __init__(self, stored: onnx.TensorProto) -> None:
        super().__init__(stored.name, dtype=np.float32, shape=tuple(stored.dims))
        self.stored = stored


class Names:
    """Fresh names for tensors and nodes that do not clash with the model's, in its subgraphs included."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._taken = set(_all_names(model.graph))

    def fresh(self, wish: str) -> str:
        """Return ``wish``, with a number behind it if it is taken."""
        name, number = wish, 1
        while name in self._taken:
            name, number = f"{wish}_{number}", number + 1
        self._taken.add(name)
        return name


def _all_names(graph: onnx.GraphProto) -> Iterable[str]:
    yield from (t.name for t in graph.initializer)
    yield from (t.values.name for t in graph.sparse_initializer)
    yield from (v.name for v in (*graph.input, *graph.output, *graph.value_info))
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
        for sub in _subgraphs(node):
            yield from _all_names(sub)


def _subgraphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def stored_constant(name: str, values: NDArray[Any], scratch: Scratch | None) -> gs.Tensor:
    """Return a new initialiser: in memory, or in the scratch file if there is one and the values are many."""
    if scratch is None or values.nbytes < SMALLEST_OUTSIDE:
        return gs.Constant(name, values)
    return OutsideConstant(scratch.tensor(name, values))


def splice(model: onnx.ModelProto, edit: Edit) -> onnx.ModelProto:
    """Return a copy of the model with the edit applied and what became unused by it removed."""
    nodes: list[onnx.NodeProto] = []
    created: dict[str, Created] = {}
    for node in model.graph.node:
        key = node.output[0] if node.output else ""
        if key not in edit.nodes:
            nodes.append(node)
            continue
        for made in edit.nodes[key]:
            nodes.append(OnnxExporter.export_node(made))
            created |= {t.name: t.values for t in made.inputs if isinstance(t, gs.Constant)}
            created |= {t.name: t.stored for t in made.inputs if isinstance(t, OutsideConstant | SparseConstant)}
    needed_before = _needed(model.graph, model.graph.node)
    nodes = _without_dead_constants(model.graph, nodes, needed_before)
    return _rebuilt(model, nodes, created, needed_before, edit.reshaped)


def _needed(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return every tensor name read by the nodes, their subgraphs or the graph's outputs."""
    names = {v.name for v in graph.output}
    for node in nodes:
        names.update(node.input)
        for sub in _subgraphs(node):
            names |= _needed(sub, sub.node)
    return names


def outer_reads(node: onnx.NodeProto) -> set[str]:
    """Return every tensor name that a node reads, or that its subgraphs read from outside of them."""
    names = {name for name in node.input if name}
    for sub in _subgraphs(node):
        names |= _captured(sub)
    return names


def _captured(graph: onnx.GraphProto) -> set[str]:
    """Return the names that a subgraph takes from the graphs around it."""
    own = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    own |= {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    read = {value.name for value in graph.output}
    return read.union(*map(outer_reads, graph.node)) - own


def _without_dead_constants(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], needed_before: set[str]
) -> list[onnx.NodeProto]:
    """Drop Constant, Identity and Transpose nodes that fed only what was replaced."""
    while True:
        needed = _needed(graph, nodes)
        kept = [n for n in nodes if not _newly_dead(n, needed, needed_before)]
        if len(kept) == len(nodes):
            return nodes
        nodes = kept


def _newly_dead(node: onnx.NodeProto, needed: set[str], needed_before: set[str]) -> bool:
    if node.op_type not in CONSTANT_OPS or not is_standard(node.domain):
        return False
    return node.output[0] in needed_before and node.output[0] not in needed


def _rebuilt(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    created: Mapping[str, Created],
    needed_before: set[str],
    reshaped: frozenset[str],
) -> onnx.ModelProto:
    old = model.graph
    unread = needed_before - _needed(old, nodes)
    gone = {t.name for t in old.initializer if t.name in unread}
    unmade = {name for node in old.node for name in node.output} - {name for node in nodes for name in node.output}
    untrue = gone | unmade | reshaped
    new: onnx.ModelProto = _shell(model, {"graph"})
    new.graph.CopyFrom(_shell(old, {"node", "initializer", "value_info", "input"}))
    new.graph.node.extend(nodes)
    new.graph.initializer.extend(t for t in old.initializer if t.name not in gone)
    dense = [_dense(name, made) for name, made in created.items() if not isinstance(made, onnx.SparseTensorProto)]
    new.graph.initializer.extend(dense)
    new.graph.sparse_initializer.extend(v for v in created.values() if isinstance(v, onnx.SparseTensorProto))
    new.graph.value_info.extend(v for v in old.value_info if v.name not in untrue)
    new.graph.input.extend(v for v in old.input if v.name not in gone)
    if model.ir_version < INITIALISERS_NO_INPUTS:
        new.graph.input.extend(make_tensor_value_info(t.name, t.data_type, t.dims) for t in dense)
    return new


def _dense(name: str, made: NDArray[Any] | onnx.TensorProto) -> onnx.TensorProto:
    return made if isinstance(made, onnx.TensorProto) else array_tensor(made, name)


def _shell(message: Any, skip: set[str]) -> Any:
    """Return a copy of a protobuf message without some fields; big fields are never copied only to be dropped."""
    copy = type(message)()
    for field, value in message.ListFields():
        if field.name in skip:
            continue
        if hasattr(value, "CopyFrom"):
            getattr(copy, field.name).CopyFrom(value)
        elif hasattr(value, "MergeFrom"):
            getattr(copy, field.name).MergeFrom(value)
        else:
            setattr(copy, field.name, value)
    return copy
