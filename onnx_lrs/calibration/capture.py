"""Run the samples through ONNX Runtime and reduce every layer's input, batch by batch, to moments and a few columns.

Layers that read the same tensor in the same way (the 1x1 branches of an inception module) share one statistic. A layer
too wide for a d x d matrix is described by the moments of its own outputs W x, which is all the low-rank step needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.calibration.columns import channel_major, columns, is_by_sample
from onnx_lrs.calibration.frontier import Call, Frontier, calls_of
from onnx_lrs.calibration.reservoir import Reservoir, lots
from onnx_lrs.calibration.store import Store
from onnx_lrs.data import Samples
from onnx_lrs.errors import DataError
from onnx_lrs.graph.layers import Geometry, Layer, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.graph.segments import Cutter
from onnx_lrs.progress import Pace, Progress, Timer
from onnx_lrs.runtime.session import Feed
from onnx_lrs.solvers.moments import Accumulator, Moments, permuted
from onnx_lrs.solvers.problem import Columns

MATRICES_PER_SOLVE = 8  # d x d float64 at once while one layer is solved: two moments, metric, factor, temporaries
WEIGHTS_PER_SOLVE = 7  # out x d float64 at once: the weight, its image, approximation and what two trials leave of it
COLUMNS_PER_WIDTH = 8  # columns wanted per column of H, so that its inverse means something
KEPT_PER_WIDTH, MOST_KEPT = 4, 20_000  # columns in a reservoir: per column of H, and at most
ARRAYS_PER_SOLVE = 3  # n x out float32 at once while a layer is fitted to its columns, beside one copy of them
ACTIVATIONS_SHARE = 4  # of the memory holds what waits between two parts of the network; the rest goes to disk
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
    return min(KEPT_PER_WIDTH * layer.d, MOST_KEPT, share_of_memory(layer.d, memory_bytes) // (4 * layer.d))


def solver_rows(layer: Layer, memory_bytes: int) -> int:
    """Return how many of these columns a solver gets, so that its copy of them and its outputs fit a share as well."""
    room = share_of_memory(layer.d, memory_bytes) // (4 * layer.d + 4 * ARRAYS_PER_SOLVE * layer.out)
    return min(reservoir_rows(layer, memory_bytes), room)


def has_few_columns(layer: Layer, memory_bytes: int) -> bool:
    """Return whether memory leaves a solver fewer sampled columns than the layer has features."""
    return solver_rows(layer, memory_bytes) < layer.d


def share_of_memory(width: int, memory_bytes: int) -> int:
    """Return the bytes that the sampled columns of one role may take, for a solve with matrices of that width."""
    left = max(memory_bytes - 8 * width**2 * MATRICES_PER_SOLVE, 0)
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


def solves_at_once(group: Sequence[Layer], roles: int, memory_bytes: int, with_columns: bool) -> int:
    """Return how many solves have room beside the statistics of a group; at least one."""
    sizes = {key_of(layer, memory_bytes): _bytes(layer, roles, memory_bytes, with_columns) for layer in group}
    work = max((own for _, own in sizes.values()), default=0)
    return max(1, (memory_bytes - sum(size for size, _ in sizes.values())) // max(work, 1))


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
    """Runs the original network over the samples, group by group of its layers, each part of it once.

    A group that lies behind the last one goes on from there; any other group begins a new pass. ``layers`` are all
    layers that may be asked for.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        samples: Samples,
        setting: Setting,
        timer: Timer | None = None,
    ) -> None:
        self._view = View(model)
        self._cutter = Cutter(self._view, _inputs(layers))
        self._layers = layers
        self._samples = samples
        self._setting = setting
        self._timer = timer or Timer()
        self._pass: _Pass | None = None
        self._passed: list[tuple[Sequence[Layer], Roles]] = []

    def expect(self, layers: Sequence[Layer]) -> None:
        """Narrow the layers that may be asked for, from the next pass on: what the others read need not wait."""
        self.close()
        self._layers = layers

    def moments(self, group: Sequence[Layer], roles: Roles, progress: Progress) -> dict[str, dict[str, Moments]]:
        """Return node -> role -> moments, for those who need nothing else; see :meth:`statistics`."""
        found = self.statistics(group, roles, progress)
        return {node: {role: s.moments for role, s in own.items()} for node, own in found.items()}

    def statistics(
        self,
        group: Sequence[Layer],
        roles: Roles,
        progress: Progress,
        with_columns: bool = False,
        known: Collection[str] = (),
    ) -> dict[str, dict[str, Statistic]]:
        """Return node -> role -> statistic; wide layers get the moments of W x and no columns.

        Layers in ``known`` get none. The network is run through them all the same, cut as it would be without them:
        where it is cut decides what ONNX Runtime fuses, and that the last bits.

        Raises
        ------
        DataError
            If an activation is not finite (names layer and samples).
        """
        memory = self._setting.memory_bytes
        wanted = [layer for layer in group if layer.node not in known]
        if not wanted:
            self._passed.append((group, roles))
            for items in roles.values():
                for _ in range(steps(items, self._setting)):
                    progress.step("known samples")
            return {}
        self._catch_up(roles)
        found = self._gather(group, wanted, roles, progress, with_columns)
        return {
            layer.node: {
                role: _cut(own[key_of(layer, memory)], solver_rows(layer, memory)) for role, own in found.items()
            }
            for layer in wanted
        }

    def _catch_up(self, roles: Roles) -> None:
        """Run the network through the groups that were passed by, now that a later one is wanted."""
        passed, self._passed = self._passed, []
        for group, earlier in passed:
            if _same(earlier, roles):
                for _ in self._calls(group, roles):
                    continue

    def _gather(
        self, group: Sequence[Layer], wanted: Sequence[Layer], roles: Roles, progress: Progress, with_columns: bool
    ) -> dict[str, dict[Key, Statistic]]:
        memory = self._setting.memory_bytes
        firsts = {key_of(layer, memory): layer for layer in reversed(wanted)}
        rows = {k: reservoir_rows(v, memory) if with_columns else 0 for k, v in firsts.items()}
        sums = {
            role: {k: Accumulator(v.out if is_wide(v, memory) else v.d) for k, v in firsts.items()} for role in roles
        }
        kept = {role: {k: Reservoir(n, firsts[k].d) for k, n in rows.items() if n} for role in roles}
        for role, part in self._stream(firsts, self._calls(group, roles), roles, progress):
            with self._timer.of("moments"):
                sums[role][part.key].add(part.columns)
            if part.key in kept[role]:
                drawn = lots_of(self._samples, self._setting.seed, part.items, len(part.columns), part.by_sample)
                kept[role][part.key].add(part.columns, *drawn)
        return {
            role: {
                k: self._statistic(v, sums[role].pop(k).moments(), kept[role].pop(k, None)) for k, v in firsts.items()
            }
            for role in roles
        }

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

    def _stream(
        self, firsts: Mapping[Key, Layer], calls: Iterator[tuple[Call, Feed]], roles: Roles, progress: Progress
    ) -> Iterator[tuple[str, _Part]]:
        setting = self._setting
        wide = {
            k: weight_matrix(self._view, v, np.float32) for k, v in firsts.items() if is_wide(v, setting.memory_bytes)
        }
        rows = {role: sum(self._samples.rows(int(i)) for i in items) for role, items in roles.items()}
        every = setting.batch if setting.dynamic_batch else 1
        paces = {role: Pace(progress, every) for role in roles}
        for call, values in calls:
            for key, layer in firsts.items():
                with self._timer.of("columns"):
                    uniform = uniform_numbers(
                        self._samples, setting.seed, call.items, wanted_columns(layer, setting), rows[call.role]
                    )
                    chunk = columns(layer, values[layer.input], uniform)
                    check_finite(layer, chunk, call)
                    by_sample = is_by_sample(layer, values[layer.input], len(uniform))
                    chunk = chunk @ wide[key].T if key in wide else chunk
                yield call.role, _Part(key, chunk, call.items, by_sample)
            paces[call.role].advance(len(call.items))
        for pace in paces.values():
            pace.finish()

    def _calls(self, group: Sequence[Layer], roles: Roles) -> Iterator[tuple[Call, Feed]]:
        """Yield every call with the inputs of the group."""
        if self._pass is None or not self._pass.reaches(group, roles):
            self.close()
            self._pass = _Pass(self._cutter, self._layers, self._samples, self._setting, self._timer)
            self._pass.begin(roles)
        yield from self._pass.values(group)

    def close(self) -> None:
        """Forget the activations."""
        if self._pass is not None:
            self._pass.close()
            self._pass = None


def _same(one: Roles, other: Roles) -> bool:
    return [*one] == [*other] and all(np.array_equal(one[role], other[role]) for role in one)


def _inputs(layers: Sequence[Layer]) -> set[str]:
    return {layer.input for layer in layers}


def wanted_columns(layer: Layer, setting: Setting) -> int:
    """Return how many columns of a layer enter its moments in a role."""
    return max(setting.columns, COLUMNS_PER_WIDTH * layer.d)


def lots_of(
    samples: Samples, seed: int, items: NDArray[np.int64], total: int, by_sample: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the priority of each of ``total`` columns of a call and its item, -1 where items cannot be told apart."""
    if len(items) > 1 and not by_sample:
        priorities, found = lots(seed, (int(items[0]),), (total,))
        return priorities, np.full_like(found, -1)
    rows = [samples.rows(int(i)) for i in items]
    return lots(seed, tuple(int(i) for i in items), tuple(total * n // sum(rows) for n in rows))


def uniform_numbers(
    samples: Samples, seed: int, items: NDArray[np.int64], wanted: int, rows: int
) -> NDArray[np.float64]:
    """Return numbers that decide the positions; they depend on seed and sample only, not on batches or layers.

    ``wanted`` columns are shared by ``rows`` rows, those of all samples of the role.
    """
    count = -(-wanted // max(rows, 1))
    return np.concatenate([np.random.default_rng([seed, int(i)]).random((samples.rows(int(i)), count)) for i in items])


def check_finite(layer: Layer, columns: NDArray[np.float32], call: Call) -> None:
    """Refuse activations that are not finite.

    Raises
    ------
    DataError
        Names the layer and the first sample of the call.
    """
    if not np.isfinite(columns).all():
        raise DataError(
            f"The input of layer {layer.name!r} is not finite for sample {call.items[0]}.",
            "Check the preprocessing of the data.",
        )


class _Pass:
    """One run of the original network over the samples of some roles, part by part."""

    def __init__(
        self, cutter: Cutter, layers: Sequence[Layer], samples: Samples, setting: Setting, timer: Timer
    ) -> None:
        self._cutter = cutter
        self._later = list(layers)
        self._samples = samples
        self._setting = setting
        self._timer = timer
        self._store = Store(setting.memory_bytes // ACTIVATIONS_SHARE)
        self._frontier = Frontier(cutter, self._store, setting.threads, timer)
        self._done: set[int] = set()
        self._roles: dict[str, NDArray[np.int64]] = {}
        self._calls: list[Call] = []

    def begin(self, roles: Roles) -> None:
        """Read the samples."""
        self._roles = dict(roles)
        inputs = [name for name in self._needed(_inputs(self._later)) if self._cutter.is_given(name)]
        with self._timer.of("read"):
            feeds = self._read(roles)
            self._frontier.begin(feeds, inputs)

    def _read(self, roles: Roles) -> Iterator[Feed]:
        setting = self._setting
        for call, feed in calls_of(self._samples, list(roles.items()), setting.batch, setting.dynamic_batch):
            self._calls.append(call)
            yield feed

    def _needed(self, tensors: set[str]) -> set[str]:
        """Return what has to be live for some tensors to be reached."""
        nodes = self._cutter.ancestors(tensors, self._done)
        return (self._cutter.reads(nodes) | tensors) - self._cutter.makes(nodes)

    def reaches(self, group: Sequence[Layer], roles: Roles) -> bool:
        """Return whether the inputs of some layers lie ahead, for these samples."""
        return _same(roles, self._roles) and all(self._frontier.has(name) for name in self._needed(_inputs(group)))

    def values(self, group: Sequence[Layer]) -> Iterator[tuple[Call, Feed]]:
        """Go on to the inputs of some layers and yield them call by call."""
        tensors = _inputs(group)
        nodes = self._cutter.ancestors(tensors, self._done)
        self._done |= set(nodes)
        self._later = [layer for layer in self._later if layer not in group]
        keep = self._needed(_inputs(self._later))
        for number, made in self._frontier.advance(nodes, keep, tensors):
            live = {name: self._frontier.value(name, number) for name in tensors - made.keys()}
            yield self._calls[number], live | made
        self._frontier.release(keep)

    def close(self) -> None:
        """Forget everything."""
        self._store.close()


def _cut(statistic: Statistic, rows: int) -> Statistic:
    """Return the statistic with the first ``rows`` columns, a view."""
    if statistic.columns is None or statistic.items is None or not rows:
        return Statistic(statistic.moments)
    return Statistic(statistic.moments, Columns(statistic.columns.inputs[:rows]), statistic.items[:rows])


def steps(items: NDArray[np.int64], setting: Setting) -> int:
    """Return how many steps a pass over the items tells the progress bar."""
    return -(-len(items) // setting.batch) if setting.dynamic_batch else len(items)
