"""What a candidate of a layer costs under each kind of limit: parameters, multiply-accumulates, bytes, nanoseconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from onnx_lrs.calibration.subject import Subject
from onnx_lrs.config import Precision
from onnx_lrs.graph.forms import GEMM_C_OPTIONAL
from onnx_lrs.graph.layers import Layer, read_elsewhere
from onnx_lrs.graph.model import sparse_bytes, stored_bytes, weight_count
from onnx_lrs.graph.rewrite import alive_outputs
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.projected import FORM as PROJECTED
from onnx_lrs.solvers.projected import TUCKER
from onnx_lrs.solvers.spatial import FORM

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHANNELS = "channels"  # the form that leaves filters in front of it unread
NODE_BYTES = 400  # of a node and the names around it, more than any that was seen
ROUNDING_BYTES = 1600  # of what stands around a quantised node: scales, zero points, the nodes that apply them
WEIGHT_BYTES: Mapping[Precision, int] = {"float32": 4, "fp16": 2, "int8": 1}
ROW_BYTES = {"int8": 9}  # scale and zero point of an output, and its bias in 32 bits instead of 8
Alive = Mapping[str, "NDArray[np.int64]"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The candidate chosen for each layer that is compressed, by node; the others stay dense."""

    chosen: Mapping[str, Candidate]


class Price(Protocol):
    """One kind of limit, in integers.

    ``before`` is the original's cost and ``now`` that of the model with exact rewrites done.
    """

    before: int
    now: int

    def dense(self, layer: Layer) -> int:
        """Return what the layer costs as it is."""

    def of(self, layer: Layer, candidate: Candidate) -> int:
        """Return what the layer costs with a candidate in its place."""

    def less(self, layer: Layer, candidate: Candidate | None, rows: int) -> int:
        """Return what a layer (None: dense) costs less once only so many of its filters are read."""


def reads_of(plan: Plan) -> dict[str, NDArray[np.int64]]:
    """Return the channels that layers of a plan read, by node, for each that does not read all."""
    return {node: np.sort(c.support) for node, c in plan.chosen.items() if c.form == CHANNELS}


def alive_after(subject: Subject, plan: Plan) -> Alive:
    """Return the filters still read, for each layer that loses some."""
    return alive_outputs(subject.view, subject.layers, reads_of(plan), subject.reach)[0]


def saved(price: Price, subject: Subject, plan: Plan, alive: Alive) -> int:
    """Return what a plan costs less than the sum of its layers, as filters that nobody reads go."""
    layers = (layer for layer in subject.layers if layer.node in alive)
    return sum(price.less(layer, plan.chosen.get(layer.node), len(alive[layer.node])) for layer in layers)


def cost_of(price: Price, subject: Subject, plan: Plan) -> int:
    """Return what the whole model costs with a plan."""
    layers = [layer for layer in subject.layers if layer.node in plan.chosen]
    more = sum(price.of(layer, plan.chosen[layer.node]) - price.dense(layer) for layer in layers)
    return price.now + more - saved(price, subject, plan, alive_after(subject, plan))


class Params:
    """Parameters, biases included."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.before = subject.params
        self.now = weight_count(subject.folded)

    def dense(self, layer: Layer) -> int:
        """Return the weights of the layer."""
        return layer.params

    def of(self, layer: Layer, candidate: Candidate) -> int:
        """Return the weights of the candidate and what its bias takes more."""
        return candidate.params + new_bias(self._subject, layer)

    def less(self, layer: Layer, candidate: Candidate | None, rows: int) -> int:
        """Return the rows of weights that go, and their biases."""
        has_bias = layer.bias is not None or (layer.affine and candidate is not None)
        total = (layer.out - rows) * (row_params(layer, candidate) + has_bias)
        if candidate is None and shares_bias(self._subject, layer):
            total -= layer.out  # the shorter bias is a new one beside the old
        return total


class Macs:
    """Multiply-accumulates of one run."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.before = self.now = sum(subject.macs.values())

    def dense(self, layer: Layer) -> int:
        """Return the layer's multiply-accumulates."""
        return self._subject.macs[layer.node]

    def of(self, layer: Layer, candidate: Candidate) -> int:
        """Return the candidate's multiply-accumulates."""
        first = candidate.inner or candidate.rank
        return macs_of(self._subject, layer, candidate.form, first, candidate.params)

    def less(self, layer: Layer, candidate: Candidate | None, rows: int) -> int:
        """Return what the rows that go would have cost."""
        return (layer.out - rows) * row_params(layer, candidate) * (self._subject.macs[layer.node] // layer.params)


class Size:
    """Bytes of the file, external data included; the names of new nodes are estimated from above.

    ``precision`` is that of the file to be written; what stands around its nodes is estimated from above, too.
    """

    def __init__(self, subject: Subject, precision: Precision = "float32") -> None:
        self._subject = subject
        self._params = Params(subject)
        self._each, self._row = WEIGHT_BYTES[precision], ROW_BYTES.get(precision, 0)
        self._node = NODE_BYTES + (ROUNDING_BYTES if precision == "int8" else 0)
        self.before = subject.file_bytes
        self.now = stored_bytes(subject.folded)
        if precision != "float32":
            more = sum(self.dense(la) - WEIGHT_BYTES["float32"] * la.params for la in subject.layers)
            self.now += more + self._node * len(subject.view.nodes)

    def dense(self, layer: Layer) -> int:
        """Return the bytes of the layer's weights."""
        return self._each * layer.params + self._row * layer.out

    def of(self, layer: Layer, candidate: Candidate) -> int:
        """Return the bytes of the candidate's weights, of its new nodes and its index of channels."""
        values = self._params.of(layer, candidate)
        stored = self._each * (values - candidate.elements) + 8 * len(candidate.support)
        stored += self._row * (layer.out * 2 + candidate.rank * layer.taps + candidate.inner)
        if candidate.elements:
            stored += sparse_bytes(candidate.elements, layer.params)
        nodes = 1 + bool(candidate.rank) + bool(candidate.inner)
        nodes += 2 * (bool(len(candidate.support)) + bool(candidate.elements))
        return stored + nodes * (self._node + 6 * len(layer.name))

    def less(self, layer: Layer, candidate: Candidate | None, rows: int) -> int:
        """Return the bytes of the rows that go."""
        return self._each * self._params.less(layer, candidate, rows)


def new_bias(subject: Subject, layer: Layer) -> int:
    """Return how many values the bias of a rewritten layer takes more than before."""
    added = layer.out if layer.affine and (layer.bias is None or shares_bias(subject, layer)) else 0
    if layer.op == "Gemm" and subject.view.opset < GEMM_C_OPTIONAL:
        added += 2  # a zero for the C of each Gemm that has no bias
    return added


def shares_bias(subject: Subject, layer: Layer) -> bool:
    """Return whether others read a layer's bias too, so that it stays where the layer gets a new one."""
    return layer.bias is not None and read_elsewhere(subject.view, layer.bias) is not None


def row_params(layer: Layer, chosen: Candidate | None) -> int:
    """Return the weights that go with one output of the layer."""
    if chosen is None:
        return layer.d
    if chosen.form == FORM:
        return chosen.rank * layer.geometry.kernel[1]
    if chosen.form == PROJECTED:
        return chosen.rank * layer.taps
    return chosen.rank + len(chosen.support) * layer.taps  # which rows single entries lie in is not known yet


def macs_of(subject: Subject, layer: Layer, form: str, first: int, params: int) -> int:
    """Return the multiply-accumulates of a layer in a given form with that many weights, ``first`` its inner rank.

    Every form works at the output's positions, but for what comes first in some of them: the k x 1 part of the spatial
    one keeps the input's width, the 1 x 1 part of the projected one and of Tucker-2 works at the input's positions.
    """
    positions = subject.macs[layer.node] // layer.params
    if form.endswith("elements"):  # run as the dense layer they are folded to
        return subject.macs[layer.node]
    if form in (PROJECTED, TUCKER):
        projection, read = first * layer.channels, math.prod(subject.shapes[layer.input]) // layer.channels
        return projection * read + (params - projection) * positions
    if form != FORM:
        return params * positions
    vertical = first * layer.channels * layer.geometry.kernel[0]
    rows = positions // subject.shapes[layer.node][3]
    return vertical * rows * subject.shapes[layer.input][3] + (params - vertical) * positions
