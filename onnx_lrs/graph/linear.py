"""Nodes that multiply with a stored weight, as they stand in a finished graph: pairs of them, other values, biases.

Between two such nodes with nothing in between, any invertible matrix may be put: ``B A x = (B T^-1) (T A) x``. That is
exact in float32 and decides how well both weights, and the tensor between them, fit into eight bits.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.graph.model import array_tensor, is_standard
from onnx_lrs.graph.splice import Names, outer_reads
from onnx_lrs.graph.tuning import constants, with_values

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]
OPS = ("Conv", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True)
class Product:
    """One Conv, Gemm or MatMul with a stored weight of its own.

    ``output`` is the tensor it makes and names it, ``input`` the computed one it reads. ``bias`` is the stored vector
    it adds, None without one; where something else is added ``takes_bias`` is False. ``turned``: the weight is
    (d, out), not (out, d). ``axis`` of the output holds the features, counted from the end for a MatMul. ``groups`` of
    a Conv.
    """

    output: str
    op: str
    input: str
    weight: str
    bias: str | None
    takes_bias: bool
    turned: bool
    axis: int
    groups: int


@dataclasses.dataclass(frozen=True)
class Link:
    """Two products of which only the second reads what the first one makes."""

    first: Product
    second: Product

    @property
    def between(self) -> str:
        """The tensor between them."""
        return self.first.output


def products(model: onnx.ModelProto) -> list[Product]:
    """Return the nodes of a graph that multiply with a float32 constant that nobody else reads, in order."""
    stored = constants(model)
    reads = collections.Counter(name for node in model.graph.node for name in outer_reads(node))
    found = []
    for node in model.graph.node:
        own = _product(node, stored) if node.op_type in OPS and is_standard(node.domain) else None
        if own is not None and reads[own.weight] == 1:
            found.append(own)
    return found


def _product(node: onnx.NodeProto, stored: Mapping[str, Array]) -> Product | None:
    flags = {a.name: a for a in node.attribute}
    whole = {name: flags[name].i if name in flags else 0 for name in ("transA", "transB")}
    places = [i for i, name in enumerate(node.input[:2]) if name in stored]
    if len(places) != 1 or (node.op_type != "MatMul" and places != [1]) or whole["transA"]:
        return None
    place = places[0]
    weight = node.input[place]
    if node.op_type == "MatMul" and stored[weight].ndim != 2:
        return None
    if node.op_type == "Gemm" and any(name in flags and flags[name].f != 1.0 for name in ("alpha", "beta")):
        return None
    given = node.input[2] if len(node.input) > 2 else ""
    out_axis = 1 if node.op_type == "Gemm" and not whole["transB"] else 0
    if node.op_type == "MatMul":
        out_axis = place  # x @ (d, out), or (out, d) @ x
    out = stored[weight].shape[out_axis]
    is_vector = given in stored and stored[given].shape in ((out,), (1, out))
    return Product(
        output=node.output[0],
        op=node.op_type,
        input=node.input[1 - place],
        weight=weight,
        bias=given if is_vector else None,
        takes_bias=node.op_type != "MatMul" and (is_vector or not given),
        turned=out_axis == 1,
        axis={"Conv": 1, "Gemm": 1}.get(node.op_type, -1 if place else -2),
        groups=flags["group"].i if "group" in flags else 1,
    )


def links(model: onnx.ModelProto, found: Sequence[Product]) -> list[Link]:
    """Return the pairs of products that follow each other with nothing in between, in order."""
    readers: dict[str, list[Product | None]] = collections.defaultdict(list)
    by_output = {product.output: product for product in found}
    for node in model.graph.node:
        product = by_output.get(node.output[0])
        for name in outer_reads(node):
            fits = product is not None and product.input == name and list(node.input).count(name) == 1
            readers[name].append(product if fits else None)
    ends = {value.name for value in model.graph.output}
    pairs = []
    for first in found:
        behind = readers[first.output]
        second = behind[0] if len(behind) == 1 else None
        if second is None or first.output in ends or not _match(first, second):
            continue
        pairs.append(Link(first, second))
    return pairs


def _match(first: Product, second: Product) -> bool:
    """Return whether the second one reads as features what the first one makes as such."""
    if first.groups != 1 or second.groups != 1 or not (first.takes_bias or first.op == "MatMul"):
        return False
    conv = [product.op == "Conv" for product in (first, second)]
    if any(conv):
        return all(conv)
    return not (first.axis == -2 or second.axis == -2) or first.axis == second.axis


def rows(product: Product, weight: NDArray[np.floating]) -> Doubles:
    """Return a weight as (out, d) in float64."""
    flat = weight.reshape(len(weight), -1) if product.op == "Conv" else weight
    return np.asarray(flat.T if product.turned else flat, np.float64)


def columns(product: Product, weight: NDArray[np.floating]) -> Doubles:
    """Return a weight as (out, channels, taps) in float64; taps is 1 but for a Conv."""
    if product.op == "Conv":
        return np.asarray(weight.reshape(*weight.shape[:2], -1), np.float64)
    return rows(product, weight)[:, :, None]


def turned(model: onnx.ModelProto, pairs: Sequence[Link], turns: Mapping[str, Doubles]) -> onnx.ModelProto:
    """Return the model with matrices put between products; its outputs are the same up to rounding.

    Parameters
    ----------
    model : onnx.ModelProto
    pairs : sequence of Link
        Of this model.
    turns : mapping of str to ndarray of float64, shape (rank, rank)
        By the tensor between the two; each invertible.
    """
    values = constants(model)
    changed: dict[str, NDArray[np.floating]] = {}
    for pair in pairs:
        if pair.between not in turns:
            continue
        turn = turns[pair.between]
        first, second = (changed.get(p.weight, values[p.weight]) for p in (pair.first, pair.second))
        made = turn @ rows(pair.first, first)
        changed[pair.first.weight] = (made.T if pair.first.turned else made).reshape(first.shape)
        read = np.einsum("ort,rs->ost", columns(pair.second, second), np.linalg.inv(turn))
        flat = read.reshape(second.shape) if pair.second.op == "Conv" else read[:, :, 0]
        changed[pair.second.weight] = flat.T if pair.second.turned else flat
        if pair.first.bias is not None:
            bias = values[pair.first.bias]
            changed[pair.first.bias] = (turn @ bias.reshape(-1).astype(np.float64)).reshape(bias.shape)
    return with_values(model, {name: np.asarray(value, np.float32) for name, value in changed.items()})


def with_biases(model: onnx.ModelProto, shifts: Mapping[str, Doubles]) -> onnx.ModelProto:
    """Return the model with biases shifted, new ones where a product had none.

    Parameters
    ----------
    model : onnx.ModelProto
    shifts : mapping of str to ndarray, shape (out,)
        By the tensor that a product makes; each takes a bias.
    """
    values, found = constants(model), {product.output: product for product in products(model)}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = Names(model)
    for node in copy.graph.node:
        shift = shifts.get(node.output[0])
        if shift is None:
            continue
        old = found[node.output[0]].bias
        bias = shift if old is None else values[old].reshape(-1) + shift
        del node.input[2:]
        node.input.append(names.fresh(old or f"{node.output[0]}_bias"))
        copy.graph.initializer.append(array_tensor(np.asarray(bias, np.float32), node.input[2]))
    read = {name for node in copy.graph.node for name in outer_reads(node)} | {v.name for v in copy.graph.output}
    unread = {found[output].bias for output in shifts} - read
    kept = [tensor for tensor in copy.graph.initializer if tensor.name not in unread]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy
