"""Factors -> nodes, one form a function.

``y = (left @ right + S) x + b``: ``right`` becomes a Conv with ``rank`` filters that carries the layer's strides, pads
and dilations, ``left`` a 1x1 Conv (Gemm: two Gemms, MatMul: two MatMuls); S becomes a Gather of the kept channels and a
layer of the same op on them; where both exist an Add joins them. The bias is added once, by the last node of a chain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_lrs.graph.layers import Geometry, Layer
from onnx_lrs.graph.splice import Names
from onnx_lrs.solvers.problem import AnyFactors, Factors, SpatialFactors

Floats = NDArray[np.float64]
GEMM_C_OPTIONAL = 11  # the opset since which Gemm's third input may be left out


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a layer's nodes go.

    ``bias`` (out,) is the new bias or None; ``passed_bias`` the name of a Gemm's C that is kept as it is; ``index`` the
    positions to gather from the input's channels (None: all of them, in order); ``feature_axis`` the axis they lie on.
    """

    layer: Layer
    names: Names
    opset: int
    bias: Floats | None
    passed_bias: str | None
    index: NDArray[np.int64] | None
    feature_axis: int

    def constant(self, role: str, values: NDArray[Any], dtype: type = np.float32) -> gs.Constant:
        """Return a new initialiser of this layer."""
        name = self.names.fresh(f"{self.layer.name}.{role}")
        return gs.Constant(name, np.ascontiguousarray(values, dtype=dtype))

    def tensor(self, role: str) -> gs.Variable:
        """Return a new intermediate tensor of this layer."""
        return gs.Variable(self.names.fresh(f"{self.layer.name}.{role}_output"), dtype=np.float32)


def build(site: Site, factors: AnyFactors) -> list[gs.Node]:
    """Return the nodes that compute the factorised layer, the last of which writes the node's own output tensor."""
    x, y = gs.Variable(site.layer.input), gs.Variable(site.layer.node, dtype=np.float32)
    if isinstance(factors, SpatialFactors):
        return _spatial(site, factors, x, y)
    if not factors.rank:
        if not len(factors.kept):
            raise ValueError(f"layer {site.layer.name!r}: factors of rank 0 that keep no channel")
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


def _spatial(site: Site, factors: SpatialFactors, x: gs.Tensor, y: gs.Tensor) -> list[gs.Node]:
    geometry, middle = site.layer.geometry, site.tensor("vertical")
    columns, rows = _axis(geometry, 0), _axis(geometry, 1)
    vertical = site.constant("vertical", factors.right[:, :, :, None])
    horizontal = [middle, site.constant("horizontal", factors.left[:, :, None, :])]
    if site.bias is not None:
        horizontal.append(site.constant("bias", site.bias))
    return [
        gs.Node("Conv", site.names.fresh(f"{site.layer.name}.vertical"), _conv_attrs(columns), [x, vertical], [middle]),
        gs.Node("Conv", site.names.fresh(f"{site.layer.name}.horizontal"), _conv_attrs(rows), horizontal, [y]),
    ]


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


def _conv_attrs(geometry: Geometry) -> dict[str, Any]:
    attrs: dict[str, Any] = {"kernel_shape": list(geometry.kernel)}
    attrs |= {"strides": list(geometry.strides), "dilations": list(geometry.dilations)}
    if geometry.auto_pad == "NOTSET":
        return attrs | {"pads": list(geometry.pads)}
    return attrs | {"auto_pad": geometry.auto_pad}


def _product(site: Site, role: str, matrix: Floats, x: gs.Tensor, y: gs.Tensor, with_bias: bool) -> gs.Node:
    """Return the node ``y = matrix x`` that reads its input as the original layer does; matrix (rows, k * taps)."""
    layer, name = site.layer, site.names.fresh(f"{site.layer.name}.{role}_product")
    if layer.op == "Conv":
        weight = site.constant(role, matrix.reshape(len(matrix), -1, *layer.geometry.kernel))
        bias = [site.constant("bias", site.bias)] if with_bias and site.bias is not None else []
        return gs.Node("Conv", name, _conv_attrs(layer.geometry), [x, weight, *bias], [y])
    if layer.op == "Gemm":
        return _gemm(site, (role, name), matrix, (x, y), with_bias, layer.geometry.trans_a)
    return _matmul(site, (role, name), matrix, x, y)


def _pointwise(site: Site, role: str, matrix: Floats, x: gs.Tensor, y: gs.Tensor) -> gs.Node:
    """Return the last node of a chain, ``y = matrix x + b`` at every position."""
    layer, name = site.layer, site.names.fresh(f"{site.layer.name}.{role}_product")
    if layer.op == "Gemm":
        return _gemm(site, (role, name), matrix, (x, y), True, False)
    if layer.op == "MatMul":
        return _matmul(site, (role, name), matrix, x, y)
    ones = [1] * len(layer.geometry.kernel)
    weight = site.constant(role, matrix.reshape(*matrix.shape, *ones))
    bias = [] if site.bias is None else [site.constant("bias", site.bias)]
    return gs.Node("Conv", name, {"kernel_shape": ones}, [x, weight, *bias], [y])


def _gemm(
    site: Site,
    called: tuple[str, str],
    matrix: Floats,
    ends: tuple[gs.Tensor, gs.Tensor],
    with_bias: bool,
    trans_a: bool,
) -> gs.Node:
    (role, name), (x, y) = called, ends
    flags = site.layer.geometry
    weight = site.constant(role, matrix if flags.trans_b else matrix.T)
    attrs: dict[str, Any] = {"transA": int(trans_a), "transB": int(flags.trans_b)}
    inputs = [x, weight]
    if with_bias and site.passed_bias is not None:
        attrs["beta"] = flags.beta
        inputs.append(gs.Variable(site.passed_bias))
    elif with_bias and site.bias is not None:
        inputs.append(site.constant("bias", site.bias))
    elif site.opset < GEMM_C_OPTIONAL:
        inputs.append(site.constant("zero", np.zeros(1)))
    return gs.Node("Gemm", name, attrs, inputs, [y])


def _matmul(site: Site, called: tuple[str, str], matrix: Floats, x: gs.Tensor, y: gs.Tensor) -> gs.Node:
    role, name = called
    if site.layer.geometry.weight_left:
        return gs.Node("MatMul", name, {}, [site.constant(role, matrix), x], [y])
    return gs.Node("MatMul", name, {}, [x, site.constant(role, matrix.T)], [y])


def feature_axis(layer: Layer, ranks: Mapping[str, int]) -> int:
    """Return the axis of the layer's input that holds its channels or features."""
    if layer.op == "Conv":
        return 1
    if layer.op == "Gemm":
        return 0 if layer.geometry.trans_a else 1
    return ranks[layer.input] - (2 if layer.geometry.weight_left else 1)
