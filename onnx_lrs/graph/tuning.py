"""Weights that may be trained: which values of a model they are, a plain twin for other libraries, and the way back.

Trained are the float32 constants that a Conv, ConvTranspose, Gemm or MatMul multiplies with, and those that they or an
Add right behind them add, one value a feature; batch norms, masks and tables stay as they are. The support of a weight
is fixed: what is zero in it stays zero, so that a sparse part stays what it is (a bias may leave zero). A weight that
the graph computes from constants (low rank + single entries) is no constant itself: what it is made of is trained.

On the way back nothing but values changes: graph, names, opset and the kind of storage (initialiser, Constant node,
sparse initialiser) are those of the given model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from onnx_lrs.graph import weights
from onnx_lrs.graph.model import COMPUTED_OPS, INITIALISERS_NO_INPUTS, array_tensor, is_standard
from onnx_lrs.graph.splice import outer_reads

Array = NDArray[np.float32]
MULTIPLIED = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1)}  # operands by operator
CHANNELS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}  # axis of a weight's own scales in onnxruntime.quantization
ADDED = {"Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,)}
SUBGRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclasses.dataclass(frozen=True, eq=False)
class Tunable:
    """One constant that may be trained.

    Parameters
    ----------
    name : str
        Of the tensor in the graph.
    values : ndarray of float32
        As they are.
    support : ndarray of bool, optional
        Which entries may change, of the shape of ``values``. None: all.
    """

    name: str
    values: Array
    support: NDArray[np.bool_] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Twin:
    """A model that says the same in fewer ways.

    Parameters
    ----------
    model : onnx.ModelProto
        All weights dense initialisers in memory, none of them a graph input; every node has a name of its own.
    tunables : tuple of Tunable
        In the order in which the graph reads them.
    made : mapping of str to tuple of onnx.NodeProto
        Weights that the original computes when it is loaded, initialisers here: the nodes that make each, in order.
    constants : mapping of str to ndarray
        What those nodes read besides tunables.
    channels : mapping of str to int or None
        Weights that INT8 quantisation rounds: the axis whose entries have a scale each, None: one scale for all.
    """

    model: onnx.ModelProto
    tunables: tuple[Tunable, ...]
    made: Mapping[str, tuple[NodeProto, ...]]
    constants: Mapping[str, NDArray[np.generic]]
    channels: Mapping[str, int | None]


def twin(original: onnx.ModelProto) -> Twin:
    """Return a model's plain twin, and what of it may be trained."""
    model = weights.loaded(original)
    stored, sparse = _stored(model)
    computing = _computing(model, stored)
    operands = dict.fromkeys([*_operands(model, MULTIPLIED), *_biases(model)])
    made = {name: _makers(computing, name) for name in operands if name in computing}
    tuned = tuple(_tunables(model, stored, sparse, made))
    read = {name for nodes in made.values() for node in nodes for name in node.input} & stored.keys()
    constants = {name: stored[name] for name in sorted(read - {each.name for each in tuned})}
    dense = {name: stored[name] for name in (*operands, *sparse) if name in stored}
    dense |= {name: evaluated(nodes, stored, np.transpose)[name] for name, nodes in made.items()}
    plain = _plain(model, stored, dense)
    whole = {name: values for name, values in stored.items() if name not in sparse}
    return Twin(plain, tuned, made, constants, _channels(plain, whole))


def evaluated(
    nodes: Sequence[NodeProto], known: Mapping[str, Any], permuted: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    """Return all tensors of nodes that compute a weight, by name, with those that are known.

    Works on the arrays of any library: ``permuted(array, axes)`` is its transpose.
    """
    found = dict(known)
    for node in nodes:
        first, *others = [found[name] for name in node.input]
        if node.op_type == "Transpose":
            given = {attribute.name: list(attribute.ints) for attribute in node.attribute}
            result = permuted(first, given.get("perm") or list(range(first.ndim))[::-1])
        elif node.op_type == "Reshape":
            result = first.reshape([int(size) for size in others[0]])
        elif node.op_type == "MatMul":
            result = first @ others[0]
        else:
            result = first + others[0] if node.op_type == "Add" else first
        found[node.output[0]] = result
    return found


def constants(model: onnx.ModelProto) -> dict[str, Array]:
    """Return the float32 constants of a model that callers cannot replace, by name; sparse ones dense."""
    stored, _ = _stored(weights.loaded(model))
    return {name: _as_float32(values) for name, values in stored.items() if values.dtype == np.float32}


def _as_float32(values: NDArray[np.generic]) -> Array:
    return np.asarray(values, np.float32)


def _stored(model: onnx.ModelProto) -> tuple[dict[str, NDArray[np.generic]], set[str]]:
    """Return the constants that callers cannot replace, dense, and the names of those that are stored sparse."""
    listed = model.ir_version < INITIALISERS_NO_INPUTS  # as inputs, because they had to be
    given = set() if listed else {value.name for value in model.graph.input}
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name not in given}
    stored |= {name: numpy_helper.to_array(tensor) for name, tensor in _constant_tensors(model)}
    sparse = {t.values.name: _dense(t) for t in model.graph.sparse_initializer}
    return stored | sparse, set(sparse)


def _dense(sparse: onnx.SparseTensorProto) -> NDArray[np.generic]:
    values = numpy_helper.to_array(sparse.values)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    dense[_places(sparse)] = values
    return dense


def _places(sparse: onnx.SparseTensorProto) -> tuple[NDArray[np.int64], ...]:
    """Return the coordinates of the stored values, which a file holds as such or as positions in the flat tensor."""
    indices = numpy_helper.to_array(sparse.indices)
    return np.unravel_index(indices, tuple(sparse.dims)) if indices.ndim == 1 else tuple(indices.T)


def _operands(model: onnx.ModelProto, places: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for node in model.graph.node:
        yield from _operands_of(node, places)


def _operands_of(node: NodeProto, places: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    if is_standard(node.domain):
        yield from (node.input[i] for i in places.get(node.op_type, ()) if i < len(node.input) and node.input[i])


def _biases(model: onnx.ModelProto) -> Iterator[str]:
    """Yield what layers add, and what is added right behind them."""
    yield from _operands(model, ADDED)
    layers = {name for node in model.graph.node if node.op_type in MULTIPLIED for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Add" and is_standard(node.domain):
            first, second = node.input
            yield from ([second] if first in layers else []) + ([first] if second in layers else [])


def _computing(model: onnx.ModelProto, stored: Mapping[str, NDArray[np.generic]]) -> dict[str, NodeProto]:
    """Return the nodes that compute from constants alone what a weight may be made of, by their output."""
    found: dict[str, NodeProto] = {}
    for node in model.graph.node:  # in the order of the data
        known = all(name in stored or name in found for name in node.input)
        if (
            node.op_type in COMPUTED_OPS
            and is_standard(node.domain)
            and node.input
            and known
            and _is_plain(node, stored)
        ):
            found[node.output[0]] = node
    return found


def _is_plain(node: NodeProto, stored: Mapping[str, NDArray[np.generic]]) -> bool:
    """Return whether a Reshape has a stored shape without "as before" in it; other operators are plain."""
    return node.op_type != "Reshape" or (node.input[1] in stored and bool((stored[node.input[1]] != 0).all()))


def _makers(computing: Mapping[str, NodeProto], name: str) -> tuple[NodeProto, ...]:
    """Return the nodes that make a computed constant, in order."""
    needed, waiting = set(), [name]
    while waiting:
        output = waiting.pop()
        if output in computing:
            needed.add(output)
            waiting += computing[output].input
    return tuple(node for output, node in computing.items() if output in needed)


def _tunables(
    model: onnx.ModelProto,
    stored: Mapping[str, NDArray[np.generic]],
    sparse: Collection[str],
    made: Mapping[str, Sequence[NodeProto]],
) -> Iterator[Tunable]:
    inside = {name for node in model.graph.node if _has_subgraphs(node) for name in outer_reads(node)}
    weights_of = dict.fromkeys(_operands(model, MULTIPLIED))
    parts = [name for made_of in weights_of for node in made.get(made_of, ()) for name in node.input]
    multiplied = dict.fromkeys([*weights_of, *parts])
    added = [name for bias in _biases(model) for name in (bias, *(n for m in made.get(bias, ()) for n in m.input))]
    for name in dict.fromkeys([*multiplied, *added]):
        values = stored.get(name)
        if name in inside or values is None or values.dtype != np.float32 or values.size == 0:
            continue
        if name not in multiplied and values.size != max(values.shape, default=1):
            continue  # more than one value a feature: a mask or a table
        support = values != 0 if name in multiplied or name in sparse else None
        yield Tunable(name, _as_float32(values), None if support is None or support.all() else support)


def _has_subgraphs(node: NodeProto) -> bool:
    return any(attribute.type in SUBGRAPHS for attribute in node.attribute)


def _plain(
    model: onnx.ModelProto, stored: Collection[str], dense: Mapping[str, NDArray[np.generic]]
) -> onnx.ModelProto:
    """Return the model, changed in place: weights are ``dense`` initialisers, nodes have names."""
    graph = model.graph
    known = {tensor.name for tensor in graph.initializer}
    extra = {name: values for name, values in dense.items() if name not in known}
    del graph.sparse_initializer[:]
    graph.initializer.extend(array_tensor(np.asarray(values), name) for name, values in extra.items())
    nodes = _living([node for node in graph.node if extra.keys().isdisjoint(node.output)], graph)
    inputs = [value for value in graph.input if value.name not in stored]
    del graph.node[:], graph.input[:]
    graph.input.extend(inputs)
    graph.node.extend(nodes)
    for place, node in enumerate(graph.node):
        node.name = f"node_{place}"
    return model


def _living(nodes: list[NodeProto], graph: onnx.GraphProto) -> list[NodeProto]:
    """Return the nodes that somebody reads; what made a weight is read by nobody once the weight is stored."""
    wanted = {value.name for value in graph.output}
    living = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            living.append(node)
            wanted |= outer_reads(node)
    return living[::-1]


def _channels(model: onnx.ModelProto, whole: Mapping[str, NDArray[np.generic]]) -> dict[str, int | None]:
    """Return the axes of the scales with which onnxruntime.quantization (static, QDQ, per channel) stores weights.

    It takes initialisers, which its preprocessing makes of Constant nodes; models with sparse initialisers it does not
    take at all, and what the graph computes is an activation to it. Of several nodes that read a weight the last one
    decides, unless it would need an axis that the weight does not have.
    """
    found: dict[str, int | None] = {}
    for node in model.graph.node:
        for name in _operands_of(node, MULTIPLIED):
            if name not in whole:
                continue
            turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            axis = CHANNELS.get(node.op_type, 0 if turned else 1)
            if axis < whole[name].ndim:
                found[name] = axis
            else:
                found.setdefault(name, None)
    return found


def with_values(original: onnx.ModelProto, values: Mapping[str, Array]) -> onnx.ModelProto:
    """Return a copy of a model with other values of some constants, each stored as it was.

    Parameters
    ----------
    original : onnx.ModelProto
    values : mapping of str to ndarray of float32
        By tensor name, of the shapes that they have. Those of a sparse initialiser are zero outside its support.

    Raises
    ------
    KeyError
        If the model has no constant of a name.
    ValueError
        If a shape differs.
    """
    model = onnx.ModelProto()
    model.CopyFrom(original)
    left = dict(values)
    for stored in (*model.graph.initializer, *_constant_tensors(model)):
        name, tensor = stored if isinstance(stored, tuple) else (stored.name, stored)
        if name in left:
            _refill(tensor, left.pop(name))
    for sparse in model.graph.sparse_initializer:
        if sparse.values.name in left:
            _refill_sparse(sparse, left.pop(sparse.values.name))
    if left:
        raise KeyError(f"no constants: {', '.join(left)}")
    return model


def boundaries(original: onnx.ModelProto, compressed: onnx.ModelProto) -> list[str]:
    """Return the tensors between blocks that both models have, in order: all data flows through each of them.

    Outputs of layers and normalisations are left out: a normalisation folded into a layer changes what a name means.
    """
    both = set(_cuts(original))
    return [name for name in _cuts(compressed) if name in both]


def _cuts(model: onnx.ModelProto) -> Iterator[str]:
    ends = {value.name for value in model.graph.output}
    last = {name: place for place, node in enumerate(model.graph.node) for name in outer_reads(node)}
    alive = {value.name for value in model.graph.input} & last.keys()
    alive -= {tensor.name for tensor in model.graph.initializer}
    for place, node in enumerate(model.graph.node):
        if alive.isdisjoint(outer_reads(node)):
            continue  # computed from constants
        alive |= set(node.output) & last.keys()
        alive -= {name for name in alive if last[name] <= place}
        first = node.output[0]
        if alive == {first} and first not in ends and node.op_type not in (*MULTIPLIED, "BatchNormalization"):
            yield first


def _constant_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, TensorProto]]:
    for node in model.graph.node:
        if node.op_type == "Constant" and is_standard(node.domain) and node.attribute[0].name == "value":
            yield node.output[0], node.attribute[0].t


def _refill(tensor: TensorProto, values: Array) -> None:
    if tuple(tensor.dims) != values.shape:
        raise ValueError(f"{tensor.name} is {list(tensor.dims)}, not {list(values.shape)}")
    fresh = array_tensor(np.asarray(values, np.float32), tensor.name)
    if tensor.HasField("doc_string"):
        fresh.doc_string = tensor.doc_string
    tensor.CopyFrom(fresh)


def _refill_sparse(sparse: onnx.SparseTensorProto, values: Array) -> None:
    """Put new values at the places that a sparse initialiser has."""
    if tuple(sparse.dims) != values.shape:
        raise ValueError(f"{sparse.values.name} is {list(sparse.dims)}, not {list(values.shape)}")
    chosen = values[_places(sparse)]
    name, kind = sparse.values.name, TensorProto.FLOAT
    sparse.values.CopyFrom(TensorProto(name=name, data_type=kind, dims=[len(chosen)], float_data=chosen.tolist()))
