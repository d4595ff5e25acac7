"""Put the factors of all layers into the graph, and take out filters that nobody reads any more.

A filter (output channel) of a producer is dead when every path from it ends in a layer that has dropped the channel.
Then the row goes from the producer's weights, the readers' channel numbers are renumbered, and a reader that keeps all
that is left needs no Gather.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_lrs.graph.forms import Site, build, dense_of, feature_axis
from onnx_lrs.graph.layers import Layer, bias_row, weight_matrix
from onnx_lrs.graph.model import View, is_standard, takes_sparse
from onnx_lrs.graph.splice import Edit, Names, splice
from onnx_lrs.graph.tuning import constants, with_values
from onnx_lrs.graph.weights import Scratch
from onnx_lrs.solvers.problem import AnyFactors, ElementFactors, Factors, SpatialFactors

ELEMENTWISE = {
    *("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "Softplus"),
    *("Softsign", "ThresholdedRelu", "Gelu", "Mish", "Erf", "Identity", "Dropout", "Abs", "Neg", "Exp", "Sqrt"),
}
POOLS = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool"}
Indices = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """The new model, and for each layer (by node) that lost filters the ones it still has.

    ``placed`` are the factors of each layer that was replaced, of the filters it still has, and ``made`` the names of
    its new initialisers by role.
    """

    model: onnx.ModelProto
    kept_outputs: Mapping[str, Indices]
    placed: Mapping[str, AnyFactors] = dataclasses.field(default_factory=dict)
    made: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


def rewrite(
    view: View,
    layers: Sequence[Layer],
    factors: Mapping[str, AnyFactors],
    ranks: Mapping[str, int],
    scratch: Scratch | None = None,
) -> Rewritten:
    """Return the model with the given layers factorised.

    Parameters
    ----------
    view : View
        The model with exact rewrites already done.
    layers : sequence of Layer
        All layers found, also those left dense (a dense producer can lose filters).
    factors : mapping of node to Factors, SpatialFactors or ElementFactors
        What replaces a layer; a layer that is missing stays as it is.
    ranks : mapping of tensor name to int
        Number of dimensions of each layer's input.
    scratch : Scratch, optional
        Where large new weights go; without it they are in memory.

    Raises
    ------
    ValueError
        If factors have rank 0 and neither channels nor elements.
    """
    alive, reshaped = alive_outputs(view, layers, {n: f.kept for n, f in factors.items() if _reads_only_kept(f)})
    nodes: dict[str, list[gs.Node]] = {}
    placed: dict[str, AnyFactors] = {}
    made: dict[str, Mapping[str, str]] = {}
    names = Names(view.model)
    for layer in layers:
        given = factors.get(layer.node)
        if given is None and layer.node not in alive:
            continue
        used = given if given is not None else _as_dense(view, layer)
        _refuse_empty(layer, used)
        rows = alive.get(layer.node)
        source = _source_rows(view, layer, alive)
        axis = feature_axis(layer.op, layer.geometry, ranks.get(layer.input))
        site = _site(view, names, layer, used, (rows, source), axis)
        site = dataclasses.replace(site, scratch=scratch)
        placed[layer.node] = used if rows is None else take_rows(used, rows)
        nodes[layer.node] = build(site, placed[layer.node])
        if layer.bias_add is not None and site.bias is not None:
            nodes[layer.bias_add] = [_new_add(view, layer, site, site.bias)]
        made[layer.node] = site.made
    return Rewritten(splice(view.model, Edit(nodes=nodes, reshaped=frozenset(reshaped))), alive, placed, made)


def merged(
    view: View,
    layers: Sequence[Layer],
    ranks: Mapping[str, int],
    rewritten: Rewritten,
) -> onnx.ModelProto:
    """Return the graph as it was before :func:`rewrite`, dense, with the weights that the new one has come to.

    Filters that nobody reads any more keep the weights that they had; channels that nobody keeps have weight zero.

    Parameters
    ----------
    view, layers, ranks
        What :func:`rewrite` was given.
    rewritten : Rewritten
        What it returned, its model with other values by now.
    """
    values = constants(rewritten.model)
    model = with_values(view.model, {name: values[name] for name in constants(view.model).keys() & values.keys()})
    now, dense = View(model), {}
    for layer in layers:
        if layer.node in rewritten.placed:
            stored = {role: values[name] for role, name in rewritten.made[layer.node].items() if name in values}
            dense[layer.node] = _merged_layer(now, layer, rewritten, stored)
    found = rewrite(now, layers, dense, ranks).model
    names = {layer.node: view.tensors[layer.node].inputs[0].name for layer in layers}
    for node in found.graph.node:  # layers are called by their nodes, and --exclude goes by that
        if node.output and node.output[0] in names:
            node.name = names[node.output[0]]
    return found


def _merged_layer(view: View, layer: Layer, rewritten: Rewritten, stored: Mapping[str, NDArray[Any]]) -> Factors:
    """Return a layer with the weights that its factors have come to, as a sparse part that keeps every channel."""
    factors = _as_dense(view, layer)
    rows = rewritten.kept_outputs.get(layer.node, np.arange(layer.out))
    factors.sparse[rows] = dense_of(layer, rewritten.placed[layer.node], stored)
    if "bias" in stored:
        old = bias_row(view, layer)
        shift = np.asarray(stored["bias"], np.float64).reshape(-1)
        factors.bias_shift[rows] = shift if old is None else shift - old[rows]
    return factors


def _site(
    view: View,
    names: Names,
    layer: Layer,
    factors: AnyFactors,
    kept: tuple[Indices | None, Indices | None],
    axis: int,
) -> Site:
    rows, source = kept
    passed = _passed_bias(view, layer)
    bias = None if passed else _new_bias(view, layer, factors)
    if bias is not None and rows is not None:
        bias = bias[rows]
    index = None
    if isinstance(factors, Factors) and len(factors.kept):
        available = np.arange(layer.channels) if source is None else source
        index = np.searchsorted(available, factors.kept)
        index = None if len(index) == len(available) else index
    return Site(layer, names, view.opset, bias, passed, index, axis, takes_sparse(view.model))


def _refuse_empty(layer: Layer, factors: AnyFactors) -> None:
    if factors.rank or isinstance(factors, SpatialFactors):
        return
    if not (factors.sparse.nnz if isinstance(factors, ElementFactors) else len(factors.kept)):
        raise ValueError(f"layer {layer.name!r}: factors of rank 0 without channels or elements")


def _new_bias(view: View, layer: Layer, factors: AnyFactors) -> NDArray[np.float64] | None:
    old = bias_row(view, layer)
    if not layer.affine or (old is None and not factors.bias_shift.any()):
        return old
    return factors.bias_shift if old is None else old + factors.bias_shift


def _passed_bias(view: View, layer: Layer) -> str | None:
    """Return the C of a Gemm that is no constant row: it goes into the last Gemm as it is."""
    if layer.op != "Gemm" or layer.bias is not None:
        return None
    node = view.tensors[layer.node].inputs[0]
    return node.inputs[2].name if len(node.inputs) > 2 and node.inputs[2].name else None


def _new_add(view: View, layer: Layer, site: Site, bias: NDArray[np.float64]) -> gs.Node:
    """Return the Add behind a MatMul with the new bias, its operands in the old order."""
    assert layer.bias is not None
    assert layer.bias_add is not None
    add = view.tensors[layer.bias_add].inputs[0]
    shape = view.constant(layer.bias).shape
    value = site.constant("bias", bias.reshape(*shape[:-1], -1))
    inputs = [value if t.name == layer.bias else gs.Variable(t.name) for t in add.inputs]
    return gs.Node(add.op, add.name, add.attrs, inputs, [gs.Variable(layer.bias_add)], domain=add.domain)


def _as_dense(view: View, layer: Layer) -> Factors:
    """Return a dense layer as a sparse part that keeps every channel."""
    empty = np.zeros((layer.out, 0)), np.zeros((0, layer.d))
    everything = np.arange(layer.channels)
    return Factors(*empty, everything, weight_matrix(view, layer), np.zeros(layer.out), layer.taps)


def take_rows(factors: AnyFactors, rows: Indices) -> AnyFactors:
    """Return the factors of some of the layer's outputs."""
    if isinstance(factors, SpatialFactors):
        return factors.of_outputs(rows)
    shift = factors.bias_shift[rows]
    return dataclasses.replace(factors, left=factors.left[rows], sparse=factors.sparse[rows], bias_shift=shift)


def _reads_only_kept(factors: AnyFactors) -> TypeGuard[Factors]:
    return isinstance(factors, Factors) and not factors.rank


Reach = Mapping[str, tuple[list[str], set[str]]]


def reach_of(view: View, layers: Sequence[Layer]) -> Reach:
    """Return who reads a layer's filters and the tensors on the way, by node, for each layer that could lose some."""
    reach = {la.node: None if _passed_bias(view, la) else _readers_behind(view, la) for la in layers}
    return {node: found for node, found in reach.items() if found is not None and found[0]}


def alive_outputs(
    view: View, layers: Sequence[Layer], reads: Mapping[str, Indices], reach: Reach | None = None
) -> tuple[dict[str, Indices], set[str]]:
    """Return the filters still read, for each layer that loses some, and the tensors that become narrower.

    ``reads`` gives the channels read by each layer (by node) that does not read all of them; ``reach`` is what
    :func:`reach_of` gives, where it is known already.
    """
    reach = reach_of(view, layers) if reach is None else reach
    alive: dict[str, Indices] = {}
    reshaped: set[str] = set()
    for layer in layers:
        readers, passed = reach.get(layer.node, ((), set()))
        if not readers or any(reader not in reads for reader in readers):
            continue
        union = np.unique(np.concatenate([reads[reader] for reader in readers])).astype(np.int64)
        if len(union) < layer.out:
            alive[layer.node] = union
            reshaped |= passed
    return alive, reshaped


def _readers_behind(view: View, layer: Layer) -> tuple[list[str], set[str]] | None:
    """Return the nodes that read the layer's channels and the tensors on the way, or None if a path leaves them."""
    wanted_axis_ops = ELEMENTWISE | POOLS if layer.op == "Conv" else ELEMENTWISE
    found: list[str] = []
    passed = {layer.node}
    queue = [layer.output]
    while queue:
        name = queue.pop()
        passed.add(name)
        if name in view.outputs or name in view.captured:
            return None
        for node in view.readers(name):
            if not node.inputs or node.inputs[0].name != name or [t.name for t in node.inputs].count(name) > 1:
                return None
            if _same_feature_axis(layer, node):
                found.append(node.outputs[0].name)
            elif node.op in wanted_axis_ops and is_standard(node.domain) and not any(t.name for t in node.outputs[1:]):
                queue.append(node.outputs[0].name)
            else:
                return None
    return found, passed


def _same_feature_axis(layer: Layer, node: gs.Node) -> bool:
    """Return whether ``node`` reads as features what ``layer`` writes as outputs."""
    if layer.op == "Conv":
        return bool(node.op == "Conv")
    if node.op == "Gemm":
        return layer.op == "Gemm" and not node.attrs.get("transA", 0)
    return bool(node.op == "MatMul") and not layer.geometry.weight_left


def _source_rows(view: View, layer: Layer, alive: Mapping[str, Indices]) -> Indices | None:
    """Return the channels that are left of this layer's input, if its producer loses filters."""
    name = layer.input
    while name in view.tensors and view.tensors[name].inputs:
        node = view.tensors[name].inputs[0]
        key: str = node.outputs[0].name
        if key in alive:
            return alive[key]
        behind_add = [t.name for t in node.inputs if t.name in alive] if node.op == "Add" else []
        if behind_add:  # the bias of a MatMul
            return alive[behind_add[0]]
        if node.op not in ELEMENTWISE | POOLS:
            return None
        name = node.inputs[0].name
    return None
