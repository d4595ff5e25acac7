"""What a layer gets in the compressed network beside what it should give, reduced call by call.

The columns come from the compressed prefix, the responses from the original network at the same positions. What the
graph adds to the layer's output on the way to the activation (a shortcut) is taken from the compressed network, and
the response is what makes the sum right: the layer makes up for the shortcut's error (He et al., ICCV 2017).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import is_wide, share_of_memory
from onnx_lrs.calibration.columns import channel_major, columns, is_by_sample, responses
from onnx_lrs.calibration.frontier import Call, Frontier
from onnx_lrs.calibration.reservoir import Reservoir
from onnx_lrs.errors import VerificationError
from onnx_lrs.graph.layers import Layer, affine_behind, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.solvers.moments import Accumulator, Moments, permuted
from onnx_lrs.solvers.problem import Columns, Response

LEAST_KEPT = 64  # columns, whatever the memory
WEIGHTS_PER_REFIT = 10  # out x width float64 at once: weight, C, T, their images, reduced rows, factors, temporaries
MOST_FIT, MOST_JUDGE = 20_000, 4_096  # columns kept to fit behind the activation, and to choose or judge
Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How one layer is read: in its columns, or in its outputs W x where it is too wide (``weight`` (out, d))."""

    layer: Layer
    width: int
    weight: Floats | None
    affine: tuple[NDArray[np.float64] | None, NDArray[np.float64] | None, NDArray[np.float64] | None]

    @property
    def scale(self) -> NDArray[np.float64] | None:
        """What the layer's output is multiplied with before the activation, (out,)."""
        return self.affine[0]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Columns (n, width), responses (n, out) and what is added to them (n, out) or None, all float32.

    ``by_sample`` as in :func:`onnx_lrs.calibration.columns.is_by_sample`.
    """

    columns: Floats
    responses: Floats
    offset: Floats | None
    by_sample: bool


def reading_of(view: View, layer: Layer, memory_bytes: int) -> Reading:
    """Return how a layer is read."""
    wide = is_wide(layer, memory_bytes)
    weight = weight_matrix(view, layer, np.float32) if wide else None
    return Reading(layer, layer.out if wide else layer.d, weight, affine_behind(view, layer))


def target_of(layer: Layer) -> str:
    """Return the original's tensor that says what the layer should give: its own output, or the sum it is part of."""
    return layer.output if layer.behind.shortcut is None else layer.behind.total


def pair_of(
    reading: Reading, networks: tuple[Frontier, Frontier], number: int, call: Call, uniform: NDArray[np.float64]
) -> Pair:
    """Return what one call says of a layer; ``networks`` are the original and the compressed one."""
    layer, (original, compressed) = reading.layer, networks
    values = compressed.value(layer.input, number)
    by_sample = is_by_sample(layer, values, len(uniform))
    found = columns(layer, values, uniform)
    if not np.isfinite(found).all():
        raise VerificationError(
            f"The input of layer {layer.name!r} is not finite in the compressed network, for sample {call.items[0]}.",
            "Allow a larger budget, or fit layers alone: --fit independent.",
        )
    whole = original.value(target_of(layer), number)
    total = responses(layer, whole, uniform, by_sample)
    scale, shift, shortcut_scale = reading.affine
    offset = None
    if layer.behind.shortcut is not None:
        added = np.broadcast_to(compressed.value(layer.behind.shortcut, number), whole.shape)  # one for all samples?
        offset = responses(layer, added, uniform, by_sample)
        offset = offset if shortcut_scale is None else offset * shortcut_scale.astype(np.float32)
    if shift is not None:
        row = shift.astype(np.float32)
        offset = np.broadcast_to(row, total.shape).copy() if offset is None else offset + row
    summed = layer.behind.shortcut is not None
    wanted = total - offset if summed and offset is not None else total
    if summed and scale is not None:
        wanted = np.divide(wanted, scale.astype(np.float32), dtype=np.float32)
    if reading.weight is not None:
        found = found @ reading.weight.T
    return Pair(found, wanted, offset, by_sample)


@dataclasses.dataclass(frozen=True)
class PairStatistic:
    """What is known of a layer's pairs in one role: a sample with the items of its rows; moments where wanted."""

    sample: Columns
    items: NDArray[np.int64]
    moments: Moments | None = None
    response: Response | None = None


class Sink:
    """Takes in the pairs of one layer in one role; ``summed`` says whether moments are wanted."""

    def __init__(self, reading: Reading, rows: int, summed: bool) -> None:
        self._reading = reading
        self._sums = Accumulator(reading.width, reading.layer.out) if summed else None
        self._rows = rows
        self._kept: Reservoir | None = None

    def add(self, pair: Pair, priorities: NDArray[np.float64], items: NDArray[np.int64]) -> None:
        """Take in a pair with the priorities of its rows and the samples they come from."""
        if self._sums is not None:
            self._sums.add(pair.columns, pair.responses)
        packed = [pair.columns, pair.responses, *([] if pair.offset is None else [pair.offset])]
        if self._kept is None:
            self._kept = Reservoir(self._rows, sum(part.shape[1] for part in packed))
        self._kept.add(packed, priorities, items)

    def statistic(self) -> PairStatistic:
        """Return moments and response (None where they were not wanted) and a sample, in the weight's own order."""
        reading, layer = self._reading, self._reading.layer
        order = None if layer.taps == 1 or reading.weight is not None else channel_major(layer)
        assert self._kept is not None  # every role has samples
        packed, items = self._kept.sample()
        width, out = reading.width, layer.out
        inputs = packed[:, :width] if order is None else packed[:, order]
        offset = packed[:, width + out :] if packed.shape[1] > width + out else None
        sample = Columns(np.ascontiguousarray(inputs), np.ascontiguousarray(packed[:, width : width + out]), offset)
        if self._sums is None:
            return PairStatistic(sample, items)
        moments, mean, cross = self._sums.paired()
        if order is not None:
            moments, cross = permuted(moments, order), cross[:, order]
        return PairStatistic(sample, items, moments, Response(mean, cross))


def rows_to_keep(reading: Reading, memory_bytes: int, fit: bool) -> int:
    """Return how many columns of a layer are kept in a role, within its share of the memory."""
    row = 4 * (reading.width + 2 * reading.layer.out)
    return max(min(MOST_FIT if fit else MOST_JUDGE, share_of_memory(reading.width, memory_bytes) // row), LEAST_KEPT)


def bytes_of(reading: Reading, memory_bytes: int) -> int:
    """Return what the pairs of a layer take in memory: samples of three roles, moments, and one refit."""
    row = 4 * (reading.width + 2 * reading.layer.out)
    rows = rows_to_keep(reading, memory_bytes, fit=True) + 2 * rows_to_keep(reading, memory_bytes, fit=False)
    return rows * row + 8 * reading.width * (reading.width + WEIGHTS_PER_REFIT * reading.layer.out)
