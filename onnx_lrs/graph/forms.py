"""Factors -> nodes, one form a function.

``y = (left @ right + S) x + b``: ``right`` becomes a Conv with ``rank`` filters that carries the layer's strides, pads
and dilations, ``left`` a 1x1 Conv (Gemm: two Gemms, MatMul: two MatMuls); S becomes a Gather of the kept channels and a
layer of the same op on them; where both exist an Add joins them. The bias is added once, by the last node of a chain.

More forms of a k x k Conv are chains as well: k x 1 -> 1 x k, 1 x 1 -> k x k, and 1 x 1 -> k x k -> 1 x 1.

S with single entries joins the weight instead of the output: one layer whose weight ``left @ right + S`` is computed
from constants. A runtime does that once, at load (ONNX Runtime folds it away), and then runs the dense layer: a smaller
file at the same speed. Where the parts would take more bytes than the weight in full, that is stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import scipy.sparse
from numpy.typing import NDArray

from onnx_lrs.graph.layers import Geometry, Layer
from onnx_lrs.graph.model import sparse_bytes, sparse_tensor
from onnx_lrs.graph.splice import Names, SparseConstant, stored_constant
from onnx_lrs.graph.weights import Scratch
from onnx_lrs.solvers.problem import (
    AnyFactors,
    ElementFactors,
    Factors,
    ProjectedFactors,
    SpatialFactors,
    TuckerFactors,
)

Floats = NDArray[np.float64]
GEMM_C_OPTIONAL = 11  # the opset since which Gemm's third input may be left out


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a layer's nodes go.

    ``bias`` (out,) is the new bias or None; ``passed_bias`` the name of a Gemm's C that is kept as it is; ``index`` the
    positions to gather from the input's channels (None: all of them, in order); ``feature_axis`` the axis they lie on;
    ``takes_sparse`` whether the model's format has sparse initialisers; ``scratch`` takes large new weights, or None.
    ``made`` collects the names of the layer's new initialisers by role.
    """

    layer: Layer
    names: Names
    opset: int
    bias: Floats | None
    passed_bias: str | None
    index: NDArray[np.int64] | None
    feature_axis: int
    takes_sparse: bool
    scratch: Scratch | None = None
    made: dict[str, str] = dataclasses.field(default_factory=dict)

    def name(self, role: str) -> str:
        """Return a fresh name for a new initialiser of this layer, and keep it."""
        self.made[role] = self.names.fresh(f"{self.layer.name}.{role}")
        return self.made[role]

    def constant(self, role: str, values: NDArray[Any], dtype: type = np.float32) -> gs.Tensor:
        """Return a new initialiser of this layer."""
        return stored_constant(self.name(role), np.ascontiguousarray(values, dtype=dtype), self.scratch)

    def tensor(self, role: str) -> gs.Variable:
        """Return a new intermediate tensor of this layer."""
        return gs.Variable(self.names.fresh(f"{self.layer.name}.{role}_output"), dtype=np.float32)


def build(site: Site, factors: AnyFactors) -> list[gs.Node]:
    """Return the nodes that compute the factorised layer, the last of which writes the node's own output tensor."""
    x, y = gs.Variable(site.layer.input), gs.Variable(site.layer.node, dtype=np.float32)
    if isinstance(factors, ProjectedFactors):
        return _projected(site, factors, x, y)
    if isinstance(factors, SpatialFactors):
        return _spatial(site, factors, x, y)
    if isinstance(factors, ElementFactors):
        return _elements(site, factors, x, y)
    if not factors.rank:
        return _sparse(site, factors, x, y, with_bias=True)
    if not len(factors.kept):
        return _low_rank(site, factors, x, y)
    low, sparse = site.tensor("low_rank"), site.tensor("sparse")
    join = gs.Node("Add", site.names.fresh(f"{site.layer.name}.sum"), {}, [low, sparse], [y])
    return [*_low_rank(site, factors, x, low), *_sparse(site, factors, x, sparse, with_bias=False), join]


def _low_rank(site: Site, factors: Factors, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
    middle = site.tensor("right")
    first = _product(site, "right", factors.right, x, middle, with_bias=False)
    return [first, _pointwise(site, "left", factors.left, middle, y)]


def _sparse(site: Site, factors: Factors, x: gs.Tensor, y: gs.Tensor, with_bias: bool) -> list[gs.Node]:
    if site.index is None:
        return [_product(site, "sparse", factors.sparse, x, y, with_bias)]
    gathered = site.tensor("kept")
    index = site.constant("kept_channels", site.index, np.int64)
    name = site.names.fresh(f"{site.layer.name}.gather")
    gather = gs.Node("Gather", name, {"axis": site.feature_axis}, [x, index], [gathered])
    return [gather, _product(site, "sparse", factors.sparse, gathered, y, with_bias)]


def _elements(site: Site, factors: ElementFactors, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
    entries = stored_entries(factors.sparse)
    nodes: list[gs.Node] = []
    if not is_in_parts(factors.rank, int(entries.nnz), entries.shape, site.takes_sparse):
        weight = site.constant("weight", _shaped(site.layer, factors.dense()))
    elif not factors.rank:
        weight = _sparse_constant(site, entries)
    else:
        nodes, weight = _low_rank_weight(site, factors)
        if entries.nnz:
            operands, weight = [weight, _sparse_constant(site, entries)], site.tensor("weight")
            nodes.append(gs.Node("Add", site.names.fresh(f"{site.layer.name}.weight_sum"), {}, operands, [weight]))
    return [*nodes, _layer(site, "elements", weight, (x, y), with_bias=True)]


def _low_rank_weight(site: Site, factors: ElementFactors) -> tuple[list[gs.Node], gs.Tensor]:
    """Return the nodes that compute ``left @ right`` as the layer's weight, and their result."""
    layer, product = site.layer, site.tensor("low_rank")
    operands = [site.constant("left", _turned(layer, factors.left))]
    operands.insert(0 if _is_turned(layer) else 1, site.constant("right", _turned(layer, factors.right)))
    nodes = [gs.Node("MatMul", site.names.fresh(f"{layer.name}.low_rank_product"), {}, operands, [product])]
    if layer.op != "Conv":
        return nodes, product
    kernel = site.tensor("kernel")
    shape = site.constant("kernel_shape", np.array(_weight_shape(layer, len(factors.left))), np.int64)
    reshape = gs.Node("Reshape", site.names.fresh(f"{layer.name}.low_rank_kernel"), {}, [product, shape], [kernel])
    return [*nodes, reshape], kernel


def stored_entries(sparse: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return S as it is stored: float32, sorted, each position once and none of them zero."""
    entries = scipy.sparse.csr_array(sparse, copy=True)
    entries.sum_duplicates()
    entries = entries.astype(np.float32)
    entries.eliminate_zeros()
    return entries


def is_in_parts(rank: int, count: int, shape: tuple[int, int], takes_sparse: bool) -> bool:
    """Return whether ``left @ right + S`` is stored as such, that is, takes fewer bytes than the matrix in full.

    ``count`` is the number of entries of S, ``shape`` that of the matrix, (out, d); ``takes_sparse`` says whether the
    model's format has sparse tensors.
    """
    parts = 4 * rank * sum(shape) + sparse_bytes(count, math.prod(shape))
    possible = bool(rank) if not count else takes_sparse
    return possible and parts < 4 * math.prod(shape)


def element_params(rank: int, count: int, shape: tuple[int, int], takes_sparse: bool) -> int:
    """Return the values that are stored for ``left @ right + S``, in parts or in full; see :func:`is_in_parts`."""
    return rank * sum(shape) + count if is_in_parts(rank, count, shape, takes_sparse) else math.prod(shape)


def _sparse_constant(site: Site, entries: scipy.sparse.csr_array) -> SparseConstant:
    """Return S in the shape of the layer's weight."""
    matrix = scipy.sparse.csr_array(entries.T) if _is_turned(site.layer) else entries
    matrix.sort_indices()
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    shape = _weight_shape(site.layer, entries.shape[0])
    stored = sparse_tensor(rows * matrix.shape[1] + matrix.indices, matrix.data, shape)
    return SparseConstant(site.name("elements"), stored)


def _spatial(site: Site, factors: SpatialFactors, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
    geometry, middle = site.layer.geometry, site.tensor("vertical")
    columns, rows = _axis(geometry, 0), _axis(geometry, 1)
    vertical = site.constant("vertical", factors.right[:, :, :, None])
    horizontal = [middle, site.constant("horizontal", factors.left[:, :, None, :])]
    if site.bias is not None:
        horizontal.append(site.constant("bias", site.bias))
    return [
        gs.Node(
            "Conv", site.names.fresh(f"{site.layer.name}.vertical"), conv_attributes(columns), [x, vertical], [middle]
        ),
        gs.Node("Conv", site.names.fresh(f"{site.layer.name}.horizontal"), conv_attributes(rows), horizontal, [y]),
    ]


def _projected(site: Site, factors: ProjectedFactors, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
    """Return 1 x 1 -> k x k, for Tucker-2 with a 1 x 1 behind it.

    The k x k Conv is the layer's own on fewer channels, with its strides and pads.
    """
    middle = site.tensor("projected")
    ones = [1] * len(site.layer.geometry.kernel)
    projection = site.constant("projection", factors.right.reshape(*factors.right.shape[:2], *ones))
    name = site.names.fresh(f"{site.layer.name}.projection_product")
    first = gs.Node("Conv", name, {"kernel_shape": ones}, [x, projection], [middle])
    kernel = factors.left.reshape(len(factors.left), -1)
    if not isinstance(factors, TuckerFactors):
        return [first, _product(site, "kernel", kernel, middle, y, with_bias=True)]
    core = site.tensor("core")
    second = _product(site, "core", kernel, middle, core, with_bias=False)
    return [first, second, _pointwise(site, "outer", factors.outer, core, y)]


def _axis(geometry: Geometry, axis: int) -> Geometry:
    """Return the geometry of a 2-D kernel that keeps one axis and is 1 wide on the other."""

    def only(values: tuple[int, ...]) -> tuple[int, int]:
        return (values[0], 1) if axis == 0 else (1, values[1])

    top, left, bottom, right = geometry.pads
    return dataclasses.replace(
        geometry,
        kernel=only(geometry.kernel),
        strides=only(geometry.strides),
        dilations=only(geometry.dilations),
        pads=(top, 0, bottom, 0) if axis == 0 else (0, left, 0, right),
    )


def conv_attributes(geometry: Geometry) -> dict[str, Any]:
    """Return the attributes of a Conv node that reads its input in this way."""
    attrs: dict[str, Any] = {"kernel_shape": list(geometry.kernel)}
    attrs |= {"strides": list(geometry.strides), "dilations": list(geometry.dilations)}
    if geometry.auto_pad == "NOTSET":
        return attrs | {"pads": list(geometry.pads)}
    return attrs | {"auto_pad": geometry.auto_pad}


def _product(site: Site, role: str, matrix: Floats, x: gs.Tensor, y: gs.Tensor, with_bias: bool) -> gs.Node:
    """Return the node ``y = matrix x`` that reads its input as the original layer does; matrix (rows, k * taps)."""
    return _layer(site, role, site.constant(role, _shaped(site.layer, matrix)), (x, y), with_bias)


def _layer(site: Site, role: str, weight: gs.Tensor, ends: tuple[gs.Tensor, gs.Tensor], with_bias: bool) -> gs.Node:
    """Return a node that reads its input as the original layer does, with another weight; ``ends`` are x and y."""
    layer, name = site.layer, site.names.fresh(f"{site.layer.name}.{role}_product")
    if layer.op == "Conv":
        bias = [site.constant("bias", site.bias)] if with_bias and site.bias is not None else []
        return gs.Node("Conv", name, conv_attributes(layer.geometry), [ends[0], weight, *bias], [ends[1]])
    if layer.op == "Gemm":
        return _gemm(site, name, weight, ends, with_bias, layer.geometry.trans_a)
    return _matmul(site, name, weight, ends)


def _pointwise(site: Site, role: str, matrix: Floats, x: gs.Tensor, y: gs.Tensor) -> gs.Node:
    """Return the last node of a chain, ``y = matrix x + b`` at every position."""
    layer, name = site.layer, site.names.fresh(f"{site.layer.name}.{role}_product")
    if layer.op == "Gemm":
        return _gemm(site, name, site.constant(role, _turned(layer, matrix)), (x, y), True, False)
    if layer.op == "MatMul":
        return _matmul(site, name, site.constant(role, _turned(layer, matrix)), (x, y))
    ones = [1] * len(layer.geometry.kernel)
    weight = site.constant(role, matrix.reshape(*matrix.shape, *ones))
    bias = [] if site.bias is None else [site.constant("bias", site.bias)]
    return gs.Node("Conv", name, {"kernel_shape": ones}, [x, weight, *bias], [y])


def dense_of(layer: Layer, factors: AnyFactors, stored: Mapping[str, NDArray[Any]]) -> Floats:
    """Return the weight, (out, d), that factors stand for when their initialisers hold other values.

    Parameters
    ----------
    layer : Layer
    factors : Factors, SpatialFactors or ElementFactors
        What :func:`build` was given; of them only the shapes and the kept channels are used.
    stored : mapping of role to ndarray
        The values by ``Site.made``, in the shapes that they have in the file; sparse ones dense.
    """
    if isinstance(factors, ElementFactors) and "weight" in stored:
        return _unshaped(layer, stored["weight"])
    if isinstance(factors, ElementFactors):
        dense = np.zeros(factors.sparse.shape)
        if factors.rank:
            dense += _unshaped(layer, stored["left"]) @ _unshaped(layer, stored["right"])
        return dense + _unshaped(layer, stored["elements"]) if "elements" in stored else dense
    roles = {"left": "left", "right": "right", "sparse": "sparse"}
    if isinstance(factors, TuckerFactors):
        roles = {"outer": "outer", "left": "core", "right": "projection"}
    elif isinstance(factors, ProjectedFactors):
        roles = {"left": "kernel", "right": "projection"}
    elif isinstance(factors, SpatialFactors):
        roles = {"left": "horizontal", "right": "vertical"}
    parts = {field: stored[role] for field, role in roles.items() if role in stored}
    if isinstance(factors, Factors):
        parts = {field: _unshaped(layer, values) for field, values in parts.items()}
    shaped = {field: np.asarray(v, np.float64).reshape(getattr(factors, field).shape) for field, v in parts.items()}
    return dataclasses.replace(factors, **shaped).dense()  # type: ignore[arg-type]


def _unshaped(layer: Layer, values: NDArray[Any]) -> Floats:
    """Return a stored weight as a matrix (rows, columns)."""
    matrix = np.asarray(values, np.float64)
    return matrix.reshape(len(matrix), -1) if layer.op == "Conv" else _turned(layer, matrix)


def _is_turned(layer: Layer) -> bool:
    """Return whether the layer stores its matrix as (d, out)."""
    if layer.op == "Gemm":
        return not layer.geometry.trans_b
    return layer.op == "MatMul" and not layer.geometry.weight_left


def _turned(layer: Layer, matrix: Floats) -> Floats:
    return matrix.T if _is_turned(layer) else matrix


def _shaped(layer: Layer, matrix: Floats) -> Floats:
    """Return a matrix (rows, k * taps) as the layer's weight; it may read fewer channels than the layer does."""
    return matrix.reshape(len(matrix), -1, *layer.geometry.kernel) if layer.op == "Conv" else _turned(layer, matrix)


def _weight_shape(layer: Layer, rows: int) -> tuple[int, ...]:
    """Return the shape of the layer's weight with that many outputs."""
    if layer.op == "Conv":
        return (rows, layer.channels, *layer.geometry.kernel)
    return (layer.d, rows) if _is_turned(layer) else (rows, layer.d)


def _gemm(
    site: Site,
    name: str,
    weight: gs.Tensor,
    ends: tuple[gs.Tensor, gs.Tensor],
    with_bias: bool,
    trans_a: bool,
) -> gs.Node:
    flags = site.layer.geometry
    attrs: dict[str, Any] = {"transA": int(trans_a), "transB": int(flags.trans_b)}
    inputs = [ends[0], weight]
    if with_bias and site.passed_bias is not None:
        attrs["beta"] = flags.beta
        inputs.append(gs.Variable(site.passed_bias))
    elif with_bias and site.bias is not None:
        inputs.append(site.constant("bias", site.bias))
    elif site.opset < GEMM_C_OPTIONAL:
        inputs.append(site.constant("zero", np.zeros(1)))
    return gs.Node("Gemm", name, attrs, inputs, [ends[1]])


def _matmul(site: Site, name: str, weight: gs.Tensor, ends: tuple[gs.Tensor, gs.Tensor]) -> gs.Node:
    operands = [weight, ends[0]] if site.layer.geometry.weight_left else [ends[0], weight]
    return gs.Node("MatMul", name, {}, operands, [ends[1]])


def feature_axis(op: str, geometry: Geometry, rank: int | None) -> int:
    """Return the axis of a layer's input that holds its channels or features.

    ``rank`` is the input's number of dimensions, which only a MatMul needs.
    """
    if op == "Conv":
        return 1
    if op == "Gemm":
        return 0 if geometry.trans_a else 1
    assert rank is not None
    return rank - (2 if geometry.weight_left else 1)
