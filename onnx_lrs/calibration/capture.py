"""Run the samples through ONNX Runtime and reduce every layer's input to moments, batch by batch; nothing is kept.

Layers that read the same tensor in the same way (the 1x1 branches of an inception module) share one statistic. A layer
too wide for a d x d matrix is described by the moments of its own outputs W x, which is all the low-rank step needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.calibration.columns import channel_major, columns
from onnx_lrs.data import Samples, batches
from onnx_lrs.errors import DataError
from onnx_lrs.graph.layers import Geometry, Layer, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.progress import Pace, Progress
from onnx_lrs.runtime.session import Session, with_outputs
from onnx_lrs.solvers.moments import Accumulator, Moments, permuted

MATRICES_PER_SOLVE = 8  # d x d float64 at once while one layer is solved: two moments, metric, factor, temporaries
WEIGHTS_PER_SOLVE = 4  # out x d float64 at once: the weight, its reordered copy, the residual, the approximation
COLUMNS_PER_WIDTH = 8  # columns wanted per column of H, so that its inverse means something

Key = tuple[str, Geometry, str]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a capture pass needs to know besides model and data: see :class:`onnx_lrs.config.Config`."""

    memory_bytes: int
    columns: int
    batch: int
    threads: int
    seed: int
    dynamic_batch: bool


Roles = Mapping[str, NDArray[np.int64]]  # name of a statistic -> the items that make it


def is_too_large(layer: Layer, memory_bytes: int) -> bool:
    """Return whether not even the smaller side of the layer has room for its matrices."""
    return 8 * min(layer.out, layer.d) ** 2 * MATRICES_PER_SOLVE > memory_bytes


def is_wide(layer: Layer, memory_bytes: int) -> bool:
    """Return whether the layer's d x d statistics would not fit; it is then solved from the moments of its outputs."""
    return 8 * layer.d**2 * MATRICES_PER_SOLVE > memory_bytes


def key_of(layer: Layer, memory_bytes: int) -> Key:
    """Return what identifies the statistic of a layer: its input and how it is read."""
    geometry = dataclasses.replace(layer.geometry, trans_b=False, alpha=1.0, beta=1.0)
    if layer.op == "Conv" and math.prod(layer.geometry.kernel) == 1:
        geometry = dataclasses.replace(geometry, dilations=tuple(1 for _ in geometry.kernel))
    own = layer.node if is_wide(layer, memory_bytes) else ""
    return layer.input, geometry, own


def groups(layers: Sequence[Layer], roles: int, memory_bytes: int) -> list[list[Layer]]:
    """Return the layers in groups whose statistics fit into memory together, beside the work space of one solve."""
    found: list[list[Layer]] = []
    sizes: dict[Key, int] = {}
    work = 0
    for layer in layers:
        width = layer.out if is_wide(layer, memory_bytes) else layer.d
        own_work = 8 * width**2 * (MATRICES_PER_SOLVE - roles) + 8 * WEIGHTS_PER_SOLVE * layer.params
        new_work = max(work, own_work)
        new_sizes = sizes | {key_of(layer, memory_bytes): 8 * width**2 * roles}
        if found and sum(new_sizes.values()) + new_work <= memory_bytes:
            found[-1].append(layer)
            sizes, work = new_sizes, new_work
        else:
            found.append([layer])
            sizes, work = {key_of(layer, memory_bytes): 8 * width**2 * roles}, own_work
    return found


def rows_per_call(
    layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]], rows: int, setting: Setting, count: int
) -> int:
    """Return how many samples one call may hold so that activations and columns keep to a quarter of the memory.

    ``shapes`` were measured on ``rows`` samples; ``count`` samples are expected in a pass.
    """
    inputs = {layer.input: 4 * math.prod(shapes[layer.input]) // rows for layer in layers}
    working = 0
    for layer in layers:
        positions = math.prod(shapes[layer.node]) // layer.out // rows
        sampled = min(max(positions, 1), -(-max(setting.columns, COLUMNS_PER_WIDTH * layer.d) // max(count, 1)))
        # padded and channels-last copies of the input, the columns and their centred copy
        working = max(working, 3 * inputs[layer.input] + 8 * sampled * layer.d)
    return int(np.clip(setting.memory_bytes // 4 // max(sum(inputs.values()) + working, 1), 1, setting.batch))


class Capture:
    """Runs groups of layers over the samples; holds one session in which every layer's input is an output."""

    def __init__(self, model: onnx.ModelProto, layers: Sequence[Layer], samples: Samples, setting: Setting) -> None:
        self._view = View(model)
        self._samples = samples
        self._setting = setting
        self._fed = {v.name for v in model.graph.input}
        tensors = sorted({layer.input for layer in layers} - self._fed)
        self._session = Session(with_outputs(model, tensors), setting.threads) if tensors else None

    def moments(self, group: Sequence[Layer], roles: Roles, progress: Progress) -> dict[str, dict[str, Moments]]:
        """Return node -> role -> moments; wide layers get the moments of W x.

        Raises
        ------
        DataError
            If an activation is not finite (names layer and samples).
        """
        memory = self._setting.memory_bytes
        firsts = {key_of(layer, memory): layer for layer in reversed(group)}
        found: dict[Key, dict[str, Moments]] = {key: {} for key in firsts}
        for role, items in roles.items():
            sums = {k: Accumulator(v.out if is_wide(v, memory) else v.d) for k, v in firsts.items()}
            for key, chunk in self._stream(firsts, items, progress):
                sums[key].add(chunk)
            for key in list(sums):
                found[key][role] = self._in_weight_order(firsts[key], sums.pop(key).moments())
        return {layer.node: found[key_of(layer, memory)] for layer in group}

    def _in_weight_order(self, layer: Layer, moments: Moments) -> Moments:
        if layer.taps == 1 or is_wide(layer, self._setting.memory_bytes):
            return moments
        return permuted(moments, channel_major(layer))

    def _stream(
        self, firsts: Mapping[Key, Layer], items: NDArray[np.int64], progress: Progress
    ) -> Iterator[tuple[Key, NDArray[np.float32]]]:
        setting = self._setting
        wide = {
            k: weight_matrix(self._view, v, np.float32) for k, v in firsts.items() if is_wide(v, setting.memory_bytes)
        }
        tensors = sorted({layer.input for layer in firsts.values()} - self._fed)
        rows = sum(self._samples.rows(int(i)) for i in items)
        pace = Pace(progress, setting.batch if setting.dynamic_batch else 1)
        for indices, feed in batches(self._samples, items, setting.batch, setting.dynamic_batch):
            values = feed | (self._session.run(feed, tensors) if self._session and tensors else {})
            for key, layer in firsts.items():
                chunk = columns(layer, values[layer.input], self._uniform(layer, indices, rows))
                if not np.isfinite(chunk).all():
                    raise DataError(
                        f"The input of layer {layer.name!r} is not finite for sample {indices[0]}.",
                        "Check the preprocessing of the data.",
                    )
                yield key, chunk @ wide[key].T if key in wide else chunk
            pace.advance(len(indices))
        pace.finish()

    def _uniform(self, layer: Layer, indices: NDArray[np.int64], rows: int) -> NDArray[np.float64]:
        """Return numbers that decide the positions; they depend on seed and sample only, not on batches or layers."""
        wanted = max(self._setting.columns, COLUMNS_PER_WIDTH * layer.d)
        count = -(-wanted // max(rows, 1))
        drawn = [
            np.random.default_rng([self._setting.seed, int(i)]).random((self._samples.rows(int(i)), count))
            for i in indices
        ]
        return np.concatenate(drawn)

    def close(self) -> None:
        """Release the session."""
        if self._session is not None:
            self._session.close()


def steps(items: NDArray[np.int64], setting: Setting) -> int:
    """Return how many steps a pass over the items tells the progress bar."""
    return -(-len(items) // setting.batch) if setting.dynamic_batch else len(items)
