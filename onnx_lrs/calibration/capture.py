"""Run the samples through ONNX Runtime and reduce every layer's input, batch by batch, to moments and a few columns.

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

from onnx_lrs.calibration.columns import channel_major, columns, is_by_sample
from onnx_lrs.calibration.reservoir import Reservoir, lots
from onnx_lrs.data import Samples, batches
from onnx_lrs.errors import DataError
from onnx_lrs.graph.layers import Geometry, Layer, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.progress import Pace, Progress
from onnx_lrs.runtime.session import Session, with_outputs
from onnx_lrs.solvers.moments import Accumulator, Moments, permuted
from onnx_lrs.solvers.problem import Columns

MATRICES_PER_SOLVE = 8  # d x d float64 at once while one layer is solved: two moments, metric, factor, temporaries
WEIGHTS_PER_SOLVE = 4  # out x d float64 at once: the weight, its reordered copy, the residual, the approximation
COLUMNS_PER_WIDTH = 8  # columns wanted per column of H, so that its inverse means something
KEPT_PER_WIDTH, MOST_KEPT = 4, 20_000  # columns in a reservoir: per column of H, and at most
ARRAYS_PER_SOLVE = 3  # n x out float32 at once while a layer is fitted to its columns, beside one copy of them
SHARES = 3  # equal parts that the d x d matrices leave of the memory: two roles' reservoirs, and that work space

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


@dataclasses.dataclass(frozen=True)
class Statistic:
    """What is known of a layer's input in one role.

    ``columns`` are a uniform sample of it in the weight's own order, its rows in an order random with respect to the
    data; ``items`` (n,) int64 says which sample each row comes from, -1 where that cannot be told. Both are None where
    columns were not asked for, and of layers too wide for d x d statistics. Layers that read the same share one array.
    """

    moments: Moments
    columns: Columns | None = None
    items: NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True)
class _Part:
    """The columns of one layer from one call; ``by_sample`` as in :func:`onnx_lrs.calibration.columns.is_by_sample`."""

    key: Key
    columns: NDArray[np.float32]
    items: NDArray[np.int64]
    by_sample: bool


Roles = Mapping[str, NDArray[np.int64]]  # name of a statistic -> the items that make it


def is_too_large(layer: Layer, memory_bytes: int) -> bool:
    """Return whether not even the smaller side of the layer has room for its matrices."""
    return 8 * min(layer.out, layer.d) ** 2 * MATRICES_PER_SOLVE > memory_bytes


def is_wide(layer: Layer, memory_bytes: int) -> bool:
    """Return whether the layer's d x d statistics would not fit; it is then solved from the moments of its outputs."""
    return 8 * layer.d**2 * MATRICES_PER_SOLVE > memory_bytes


def reservoir_rows(layer: Layer, memory_bytes: int) -> int:
    """Return how many columns of a layer are kept in a role; 4 * d bytes each.

    4 * d of them, at most 20,000, and no more than fit a quarter of the memory or a third of what the layer's d x d
    matrices leave of it: 0 for wide layers. It depends on nothing but d, so that layers with one input can share them.
    """
    return min(KEPT_PER_WIDTH * layer.d, MOST_KEPT, _share(layer, memory_bytes) // (4 * layer.d))


def solver_rows(layer: Layer, memory_bytes: int) -> int:
    """Return how many of these columns a solver gets, so that its copy of them and its outputs fit a share as well."""
    room = _share(layer, memory_bytes) // (4 * layer.d + 4 * ARRAYS_PER_SOLVE * layer.out)
    return min(reservoir_rows(layer, memory_bytes), room)


def has_few_columns(layer: Layer, memory_bytes: int) -> bool:
    """Return whether memory leaves a solver fewer sampled columns than the layer has features."""
    return solver_rows(layer, memory_bytes) < layer.d


def _share(layer: Layer, memory_bytes: int) -> int:
    left = max(memory_bytes - 8 * layer.d**2 * MATRICES_PER_SOLVE, 0)
    return min(memory_bytes // 4, left // SHARES)


def key_of(layer: Layer, memory_bytes: int) -> Key:
    """Return what identifies the statistic of a layer: its input and how it is read."""
    geometry = dataclasses.replace(layer.geometry, trans_b=False, alpha=1.0, beta=1.0)
    if layer.op == "Conv" and math.prod(layer.geometry.kernel) == 1:
        geometry = dataclasses.replace(geometry, dilations=tuple(1 for _ in geometry.kernel))
    own = layer.node if is_wide(layer, memory_bytes) else ""
    return layer.input, geometry, own


def groups(layers: Sequence[Layer], roles: int, memory_bytes: int, with_columns: bool = False) -> list[list[Layer]]:
    """Return the layers in groups whose statistics fit into memory together, beside the work space of one solve."""
    found: list[list[Layer]] = []
    sizes: dict[Key, int] = {}
    work = 0
    for layer in layers:
        own_size, own_work = _bytes(layer, roles, memory_bytes, with_columns)
        new_work = max(work, own_work)
        new_sizes = sizes | {key_of(layer, memory_bytes): own_size}
        if found and sum(new_sizes.values()) + new_work <= memory_bytes:
            found[-1].append(layer)
            sizes, work = new_sizes, new_work
        else:
            found.append([layer])
            sizes, work = {key_of(layer, memory_bytes): own_size}, own_work
    return found


def _bytes(layer: Layer, roles: int, memory_bytes: int, with_columns: bool) -> tuple[int, int]:
    """Return the bytes of a layer's statistics and of the work space of its solve."""
    width = layer.out if is_wide(layer, memory_bytes) else layer.d
    size = 8 * width**2 * roles
    work = 8 * width**2 * (MATRICES_PER_SOLVE - roles) + 8 * WEIGHTS_PER_SOLVE * layer.params
    if is_wide(layer, memory_bytes):
        size += 4 * layer.params  # the weight that makes outputs of inputs during a pass
    if with_columns:
        size += 4 * layer.d * reservoir_rows(layer, memory_bytes) * roles
        work += 4 * (layer.d + ARRAYS_PER_SOLVE * layer.out) * solver_rows(layer, memory_bytes)
    return size, work


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
        """Return node -> role -> moments, for those who need nothing else; see :meth:`statistics`."""
        found = self.statistics(group, roles, progress)
        return {node: {role: s.moments for role, s in own.items()} for node, own in found.items()}

    def statistics(
        self, group: Sequence[Layer], roles: Roles, progress: Progress, with_columns: bool = False
    ) -> dict[str, dict[str, Statistic]]:
        """Return node -> role -> statistic; wide layers get the moments of W x and no columns.

        Raises
        ------
        DataError
            If an activation is not finite (names layer and samples).
        """
        memory = self._setting.memory_bytes
        firsts = {key_of(layer, memory): layer for layer in reversed(group)}
        found = {role: self._gather(firsts, items, progress, with_columns) for role, items in roles.items()}
        return {
            layer.node: {
                role: _cut(own[key_of(layer, memory)], solver_rows(layer, memory)) for role, own in found.items()
            }
            for layer in group
        }

    def _gather(
        self, firsts: Mapping[Key, Layer], items: NDArray[np.int64], progress: Progress, with_columns: bool
    ) -> dict[Key, Statistic]:
        memory = self._setting.memory_bytes
        sums = {k: Accumulator(v.out if is_wide(v, memory) else v.d) for k, v in firsts.items()}
        rows = {k: reservoir_rows(v, memory) if with_columns else 0 for k, v in firsts.items()}
        kept = {k: Reservoir(n, firsts[k].d) for k, n in rows.items() if n}
        for part in self._stream(firsts, items, progress):
            sums[part.key].add(part.columns)
            if part.key in kept:
                kept[part.key].add(part.columns, *self._lots(part))
        return {k: self._statistic(v, sums.pop(k).moments(), kept.pop(k, None)) for k, v in firsts.items()}

    def _statistic(self, layer: Layer, moments: Moments, reservoir: Reservoir | None) -> Statistic:
        """Return moments and columns in the weight's own order."""
        plain = layer.taps == 1 or is_wide(layer, self._setting.memory_bytes)
        order = None if plain else channel_major(layer)
        if order is not None:
            moments = permuted(moments, order)
        if reservoir is None:
            return Statistic(moments)
        inputs, items = reservoir.sample(order)
        return Statistic(moments, Columns(inputs), items)

    def _stream(self, firsts: Mapping[Key, Layer], items: NDArray[np.int64], progress: Progress) -> Iterator[_Part]:
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
                uniform = self._uniform(layer, indices, rows)
                chunk = columns(layer, values[layer.input], uniform)
                if not np.isfinite(chunk).all():
                    raise DataError(
                        f"The input of layer {layer.name!r} is not finite for sample {indices[0]}.",
                        "Check the preprocessing of the data.",
                    )
                by_sample = is_by_sample(layer, values[layer.input], len(uniform))
                yield _Part(key, chunk @ wide[key].T if key in wide else chunk, indices, by_sample)
            pace.advance(len(indices))
        pace.finish()

    def _lots(self, part: _Part) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the priority of each column and the item it comes from, -1 where samples cannot be told apart."""
        total, seed = len(part.columns), self._setting.seed
        if len(part.items) > 1 and not part.by_sample:
            priorities, items = lots(seed, (int(part.items[0]),), (total,))
            return priorities, np.full_like(items, -1)
        rows = [self._samples.rows(int(i)) for i in part.items]
        return lots(seed, tuple(int(i) for i in part.items), tuple(total * n // sum(rows) for n in rows))

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


def _cut(statistic: Statistic, rows: int) -> Statistic:
    """Return the statistic with the first ``rows`` columns, a view."""
    if statistic.columns is None or statistic.items is None or not rows:
        return Statistic(statistic.moments)
    return Statistic(statistic.moments, Columns(statistic.columns.inputs[:rows]), statistic.items[:rows])


def steps(items: NDArray[np.int64], setting: Setting) -> int:
    """Return how many steps a pass over the items tells the progress bar."""
    return -(-len(items) // setting.batch) if setting.dynamic_batch else len(items)
