"""Compare the forms that a convolution may take: latency in ONNX Runtime against error on columns not fitted to.

Every form is fitted in the H-metric at several ranks and run as a small network of its own: a 1x1 Conv and Relu before
the layer, Relu and GlobalAveragePool behind it, so that layouts and fusions are those of a network. All of a layer's
networks, and the dense one, are timed in turn, round by round. One JSON line is appended for every layer as soon as it
is done; layers that are in the file already are not measured again::

    python tools/compare_forms.py --model net.onnx --data images/ --preset raw --layers '*/Conv' --out forms.jsonl
    python tools/compare_forms.py --render forms.jsonl > forms.md

A form gains where its error is lower than that of the best form of onnx-lrs at the same latency, anywhere between 0.2
and 0.8 of what the dense layer takes. The small network without the layer is taken off all latencies.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import scipy.linalg
import scipy.optimize
from compare_methods import limited, matching
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from trials import (
    Record,
    add_threads,
    append_record,
    checked_threads,
    figure,
    machine,
    markdown,
    read_records,
    refuse_mixture,
    say,
)

from onnx_lrs.calibration.capture import Capture, Setting, Statistic, groups, is_wide
from onnx_lrs.calibration.subject import Inputs, Subject, examine, open_material
from onnx_lrs.cli import parse_size
from onnx_lrs.config import GIB, Config, Preprocess
from onnx_lrs.errors import OnnxLrsError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.layers import Geometry, Layer
from onnx_lrs.graph.rewrite import alive_outputs
from onnx_lrs.planning.candidates import FIT, JUDGE, SELECT, Bench
from onnx_lrs.progress import Silent
from onnx_lrs.runtime.session import CPU, runtime
from onnx_lrs.solvers.blas import threads_for
from onnx_lrs.solvers.closed_form import importance
from onnx_lrs.solvers.moments import Moments
from onnx_lrs.solvers.problem import Problem, spread
from onnx_lrs.solvers.projected import TUCKER, fit_projected, fit_tucker, tucker_params
from onnx_lrs.solvers.spatial import fit_spatial, top
from onnx_lrs.solvers.spectral import assemble, choose_damping, damped, reduce_rows, splits

Array = NDArray[np.float64]
Source = Literal["all", "gather", "gather rest", "slice", "first", "rest"]
LOW_RANK, SPATIAL, PROJECTED, CHANNELS, BOTH = "low-rank", "spatial", "projected", "channels", "low-rank + channels"
CUT = "channels, producer cut"
HOUSE = (LOW_RANK, SPATIAL, PROJECTED, TUCKER, CHANNELS, CUT, BOTH)  # what onnx-lrs writes
WINDOW = (0.2, 0.8)  # of the dense latency
GAIN = 0.03  # a relative fall of the error that counts
ROUNDS = 2  # of alternation for the forms that need one
SMALL_SIDE, MULTIPLE = 64, 16  # ranks and channels are multiples of 16, of 8 where a side has fewer than 64
OPSET, IR_VERSION = 17, 8


# ------------------------------------------------------------------------------------------------ forms as networks


@dataclasses.dataclass(frozen=True)
class Part:
    """A Conv of a form: its filters, its kernel (1 on an axis that another Conv reads), its groups."""

    out: int
    kernel: tuple[int, int] = (1, 1)
    group: int = 1


@dataclasses.dataclass(frozen=True)
class Branch:
    """A chain of Convs and what it reads.

    "all" channels; the ``kept`` ones by "gather" or "slice", the others by "gather rest"; or what one half of a divided
    producer makes, the "first" (the kept ones) or the "rest".
    """

    source: Source
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A form at one size: how it is computed and how well. ``error`` is relative, on columns not fitted to."""

    form: str
    size: str
    branches: tuple[Branch, ...]
    kept: int
    params: int
    error: float


class Network:
    """The small network around the branches of a form."""

    def __init__(self, layer: Layer, sides: Sequence[int], kept: int, seed: int) -> None:
        self._sides = sides  # of the input; ONNX Runtime fuses an Add only where it can tell the shapes beforehand
        self._geometry, self._channels, self._kept = layer.geometry, layer.channels, kept
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)
        self._made: dict[str, str] = {}

    def model(self, branches: Sequence[Branch]) -> onnx.ModelProto:
        """Return the network; without branches it is what stands around them."""
        ends = [self._branch(branch, with_bias=number == 0) for number, branch in enumerate(branches)]
        total = ends[0] if ends else self._tensor("all")
        for end in ends[1:]:
            total = self._node("Add", [total, end])
        if ends:
            total = self._node("Relu", [total])
        self._nodes.append(helper.make_node("GlobalAveragePool", [total], ["y"]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, *self._sides])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "out", 1, 1])
        graph = helper.make_graph(self._nodes, "form", [x], [y], self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _branch(self, branch: Branch, with_bias: bool) -> str:
        tensor, width = self._tensor(branch.source), self._width(branch.source)
        for number, part in enumerate(branch.parts):
            last = number == len(branch.parts) - 1
            attributes = _attributes(self._geometry, part.kernel) | {"group": part.group}
            tensor = self._conv(tensor, (part.out, width // part.group, *part.kernel), with_bias and last, attributes)
            width = part.out
        return tensor

    def _width(self, source: Source) -> int:
        rest = self._channels - self._kept
        return {"all": self._channels, "rest": rest, "gather rest": rest}.get(source, self._kept)

    def _tensor(self, source: Source) -> str:
        """Return the tensor that a branch reads, made once."""
        if source not in self._made:
            self._made[source] = self._new_tensor(source)
        return self._made[source]

    def _new_tensor(self, source: Source) -> str:
        if source in ("all", "first", "rest"):
            made = self._conv("x", (self._width(source), 1, 1, 1), True, {})
            return self._node("Relu", [made])
        if source == "slice":
            ends = [self._constant(np.array([value])) for value in (0, self._kept, 1)]
            return self._node("Slice", [self._tensor("all"), *ends])
        order = np.random.default_rng(0).permutation(self._channels)
        index = order[: self._kept] if source == "gather" else order[self._kept :]
        return self._node("Gather", [self._tensor("all"), self._constant(np.sort(index))], axis=1)

    def _conv(self, tensor: str, shape: tuple[int, ...], with_bias: bool, attributes: Mapping[str, Any]) -> str:
        weight = self._random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        bias = [self._constant(np.zeros(shape[0], np.float32))] if with_bias else []
        return self._node("Conv", [tensor, self._constant(weight.astype(np.float32)), *bias], **attributes)

    def _constant(self, values: NDArray[Any]) -> str:
        self._constants.append(numpy_helper.from_array(values, f"c{len(self._constants)}"))
        return str(self._constants[-1].name)

    def _node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, inputs, [f"t{len(self._nodes)}"], **attributes))
        return str(self._nodes[-1].output[0])


def _attributes(geometry: Geometry, kernel: tuple[int, int]) -> dict[str, Any]:
    """Return the attributes of a Conv that reads the layer's kernel on the axes on which it is wider than 1."""
    wide = [k > 1 for k in kernel]
    attributes: dict[str, Any] = {"kernel_shape": list(kernel)}
    for name, values in (("strides", geometry.strides), ("dilations", geometry.dilations)):
        attributes[name] = [value if w else 1 for value, w in zip(values, wide, strict=True)]
    if geometry.auto_pad != "NOTSET":
        return attributes | {"auto_pad": geometry.auto_pad}
    return attributes | {"pads": [value if w else 0 for value, w in zip(geometry.pads, wide * 2, strict=True)]}


# ------------------------------------------------------------------------------------------------- forms as matrices


@dataclasses.dataclass(frozen=True)
class Bed:
    """What all forms of a layer are fitted with: the problem, its damped metric H, and the moments that judge."""

    layer: Layer
    problem: Problem
    metric: Array
    damping: float
    judge: Moments

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        kh, kw = self.layer.geometry.kernel
        return kh, kw

    def error(self, approximation: Array) -> float:
        """Return ||y - y'|| / ||y - mean y|| on the judging columns, the bias that of the fit."""
        assert self.problem.moments is not None
        difference = self.problem.weight - approximation
        offset = difference @ (self.judge.mean - self.problem.moments.mean)
        left = float(np.vdot(difference @ self.judge.cov, difference)) + float(offset @ offset)
        return float(np.sqrt(left / np.vdot(self.problem.weight @ self.judge.cov, self.problem.weight)))

    def ranks(self, side: int, cost: float, fixed: float = 0.0, count: int = 8) -> list[int]:
        """Return at most ``count`` sizes below ``side`` that cost 0.05 to 0.9 of the dense layer, small ones denser."""
        step = MULTIPLE if side >= SMALL_SIDE else MULTIPLE // 2
        return spread(
            [r for r in range(step, side, step) if 0.05 <= (fixed + r * cost) / self.problem.params <= 0.9], count
        )


def low_rank_trials(bed: Bed) -> Iterator[Trial]:
    """Yield k x k -> 1 x 1, kept channels, and both together, in all the ways to read the channels.

    Beside kept channels the low-rank part need not read them: what it would add there S can hold as well. So
    the same error costs less where its right factor reads the rest of the channels alone.
    """
    problem, layer, reduced = bed.problem, bed.layer, reduce_rows(bed.problem.weight)
    order = importance(reduced.target, bed.metric, problem.taps)
    plain = bed.ranks(layer.channels, problem.taps * layer.out, 0.0, 4)
    counts = sorted({0, *plain})
    for split in splits(reduced.target, bed.metric, order, counts, problem.taps):
        kept = len(split.support)
        sparse = problem.taps * layer.out * kept
        ranks = bed.ranks(min(layer.out, problem.d), problem.rank_cost, sparse, 2 if kept else 8)
        for rank in [0, *ranks] if kept else ranks:
            error = bed.error(assemble(problem, reduced, split, rank).dense())
            size = " + ".join([f"rank {rank}"] * bool(rank) + [f"{kept} channels"] * bool(kept))
            yield from _ways(bed, (rank, kept), size, error)


def _ways(bed: Bed, sizes: tuple[int, int], size: str, error: float) -> Iterator[Trial]:
    """Yield the ways to run a rank and a number of kept channels."""
    (rank, kept), out, taps = sizes, bed.layer.out, bed.problem.taps
    low, dense = (Part(rank, bed.kernel), Part(out)), (Part(out, bed.kernel),)
    sparse = out * taps * kept
    whole, divided = rank * bed.problem.rank_cost + sparse, rank * (bed.problem.rank_cost - kept * taps) + sparse

    def trial(form: str, params: int, *branches: Branch) -> Trial:
        return Trial(form, size, branches, kept, params, error)

    if not kept:
        yield trial(LOW_RANK, whole, Branch("all", low))
    elif not rank:
        yield trial(CHANNELS, whole, Branch("gather", dense))
        yield trial(CUT, whole, Branch("first", dense))
        yield trial("channels by Slice", whole, Branch("slice", dense))
    else:
        yield trial(BOTH, whole, Branch("all", low), Branch("gather", dense))
        yield trial(f"{BOTH} by Slice", whole, Branch("all", low), Branch("slice", dense))
        yield trial(f"{BOTH}, disjoint", divided, Branch("gather rest", low), Branch("gather", dense))
        yield trial(f"{BOTH}, disjoint, producer divided", divided, Branch("rest", low), Branch("first", dense))


def spatial_trials(bed: Bed) -> Iterator[Trial]:
    """Yield k x 1 -> 1 x k."""
    (kh, kw), cost = bed.kernel, bed.layer.channels * bed.kernel[0] + bed.layer.out * bed.kernel[1]
    for rank in bed.ranks(min(bed.layer.channels * kh, bed.layer.out * kw), cost):
        factors, _ = fit_spatial(bed.problem, rank, bed.damping)
        branch = Branch("all", (Part(rank, (kh, 1)), Part(bed.layer.out, (1, kw))))
        yield Trial(SPATIAL, f"rank {rank}", (branch,), 0, rank * cost, bed.error(factors.dense()))


def projected_trials(bed: Bed) -> Iterator[Trial]:
    """Yield 1 x 1 -> k x k."""
    cost = bed.layer.channels + bed.layer.out * bed.problem.taps
    for rank in bed.ranks(bed.layer.channels, cost):
        factors, _ = fit_projected(bed.problem, rank, bed.damping)
        branch = Branch("all", (Part(rank), Part(bed.layer.out, bed.kernel)))
        yield Trial(PROJECTED, f"rank {rank}", (branch,), 0, rank * cost, bed.error(factors.dense()))


def tucker_trials(bed: Bed) -> Iterator[Trial]:
    """Yield Tucker-2, 1 x 1 -> k x k -> 1 x 1, its ranks alike as shares of channels and outputs."""
    problem, taps, out = bed.problem, bed.problem.taps, bed.layer.out
    few = 0.05 * problem.params  # so that no rank is too small by itself
    outer = bed.ranks(min(out, problem.d), 1.0, few, 6)
    pairs = [
        (inner, rank, tucker_params(bed.layer.channels, out, taps, (inner, rank)))
        for inner, rank in itertools.product(bed.ranks(bed.layer.channels, 1.0, few, 4), outer)
    ]
    pairs = [pair for pair in pairs if abs(pair[0] / bed.layer.channels - pair[1] / out) <= 0.25]
    pairs = [pair for pair in pairs if 0.05 <= pair[2] / problem.params <= 0.8]
    for inner, rank, params in pairs[:: max(len(pairs) // 8, 1)]:
        factors, _ = fit_tucker(problem, inner, rank, bed.damping)
        branch = Branch("all", (Part(inner), Part(rank, bed.kernel), Part(out)))
        yield Trial(TUCKER, f"ranks {inner}, {rank}", (branch,), 0, params, bed.error(factors.dense()))


def centre_trials(bed: Bed) -> Iterator[Trial]:
    """Yield k x k -> 1 x 1 beside a 1 x 1 Conv on all channels: its columns are the kept ones of the closed form."""
    problem, (kh, kw), geometry = bed.problem, bed.kernel, bed.layer.geometry
    middle = [d * (k - 1) // 2 for d, k in zip(geometry.dilations, bed.kernel, strict=True)]
    if kh % 2 == 0 or kw % 2 == 0 or list(geometry.pads) != middle * 2:
        return  # a 1 x 1 Conv would not read what the centre reads
    columns = np.arange(problem.d).reshape(-1, problem.taps)
    centre, others = columns[:, problem.taps // 2], np.delete(columns, problem.taps // 2, axis=1).ravel()
    single, reduced = dataclasses.replace(problem, taps=1), reduce_rows(problem.weight)
    order, fixed = np.concatenate([centre, others]), bed.layer.channels * bed.layer.out
    (split,) = splits(reduced.target, bed.metric, order, [len(centre)], 1)
    for rank in bed.ranks(min(bed.layer.out, problem.d), problem.rank_cost, fixed):
        factors = assemble(single, reduced, split, rank)
        branches = Branch("all", (Part(rank, bed.kernel), Part(bed.layer.out))), Branch("all", (Part(bed.layer.out),))
        params = fixed + rank * problem.rank_cost
        yield Trial("low-rank + centre tap", f"rank {rank}", branches, 0, params, bed.error(factors.dense()))


def grouped_trials(bed: Bed) -> Iterator[Trial]:
    """Yield grouped k x k Convs, alone and beside a low-rank part, for channels and filters put into groups freely.

    The channels are clustered by the weights' energy; that the order costs nothing in the network is taken for granted.
    """
    problem, out, channels = bed.problem, bed.layer.out, bed.layer.channels
    for group in (2, 4):
        if channels % group or out % group or channels // group < 4:
            continue
        for title, mask in (("natural order", natural(bed, group)), ("clustered", clustered(bed, group))):
            fixed = problem.params // group
            dense = Branch("all", (Part(out, bed.kernel, group),))
            for rank in [0, *bed.ranks(min(out, problem.d), problem.rank_cost, fixed, 3)]:
                low = Branch("all", (Part(rank, bed.kernel), Part(out)))
                approximation = fit_grouped(bed, mask, rank)
                form = "low-rank + grouped" if rank else "grouped"
                size = f"{group} groups, {title}" + (f", rank {rank}" if rank else "")
                params = fixed + rank * problem.rank_cost
                yield Trial(form, size, (low, dense) if rank else (dense,), 0, params, bed.error(approximation))


TRIALS = (low_rank_trials, spatial_trials, projected_trials, tucker_trials, centre_trials, grouped_trials)


def natural(bed: Bed, group: int) -> NDArray[np.int64]:
    """Return the group of each output and of each channel, one after the other, in their own order."""
    out, channels = bed.layer.out, bed.layer.channels
    return np.concatenate([np.arange(out) * group // out, np.arange(channels) * group // channels])


def clustered(bed: Bed, group: int) -> NDArray[np.int64]:
    """Return groups of equal size, outputs and channels assigned in turn to where most of the weights' energy lies."""
    out, channels = bed.layer.out, bed.layer.channels
    variance = np.diagonal(bed.metric).reshape(channels, -1)
    energy = np.einsum("oit,it->oi", bed.problem.weight.reshape(out, channels, -1) ** 2, variance)
    found = natural(bed, group)
    rows, columns = found[:out], found[out:]
    for _ in range(10):
        rows = _assigned(energy @ np.eye(group)[columns], group)
        columns = _assigned(energy.T @ np.eye(group)[rows], group)
    return np.concatenate([rows, columns])


def _assigned(benefit: Array, group: int) -> NDArray[np.int64]:
    """Return the group of each row, all groups of one size, of the most benefit (rows, groups) in total."""
    slots = np.repeat(np.arange(group), len(benefit) // group)
    rows, chosen = scipy.optimize.linear_sum_assignment(-benefit[:, slots])
    return np.asarray(slots[chosen[np.argsort(rows)]], np.int64)


def fit_grouped(bed: Bed, mask: NDArray[np.int64], rank: int) -> Array:
    """Return E: the grouped part by least squares on H and the low-rank part in turn, each exact for the other."""
    problem, out = bed.problem, bed.layer.out
    low, grouped = np.zeros_like(problem.weight), np.zeros_like(problem.weight)
    columns = np.repeat(mask[out:], problem.taps)
    factors = {g: scipy.linalg.cho_factor(bed.metric[np.ix_(columns == g, columns == g)]) for g in np.unique(mask)}
    for _ in range(2 * ROUNDS if rank else 1):
        residual = problem.weight - low
        for g, factor in factors.items():
            rows, own = mask[:out] == g, columns == g
            image = residual[rows] @ bed.metric[:, own]
            grouped[np.ix_(rows, own)] = scipy.linalg.cho_solve(factor, image.T).T
        if rank:
            rest = problem.weight - grouped
            basis = top(rest @ bed.metric @ rest.T, rank)
            low = basis @ (basis.T @ rest)
    return low + grouped


# ----------------------------------------------------------------------------------------------------- measuring


def measured(bed: Bed, shape: tuple[int, ...], arguments: argparse.Namespace) -> Record:
    """Return the trials of a layer with their latencies, milliseconds by batch."""
    begun = time.perf_counter()
    with threads_for(bed.problem.d, arguments.threads):
        trials = [trial for make in TRIALS for trial in make(bed)]
    say(f"{bed.layer.name}: {len(trials)} trials fitted in {time.perf_counter() - begun:.0f} s")
    dense = Trial("dense", "", (Branch("all", (Part(bed.layer.out, bed.kernel),)),), 0, bed.problem.params, 0.0)
    nothing = Trial("nothing", "", (), 0, 0, 1.0)
    everything = [nothing, dense, *trials]
    networks = list(dict.fromkeys((trial.branches, trial.kept) for trial in everything))
    sessions = [
        session_of(Network(bed.layer, shape[2:], kept, seed).model(branches), arguments.threads)
        for seed, (branches, kept) in enumerate(networks)
    ]
    times: list[list[float]] = [[] for _ in networks]
    for batch in arguments.batches:
        feed = {"x": np.random.default_rng(0).random((batch, 1, *shape[2:]), dtype=np.float32)}
        for found, value in zip(times, in_turn(sessions, feed, arguments), strict=True):
            found.append(value)
    of_network = dict(zip(networks, times, strict=True))
    return {
        "seconds": time.perf_counter() - begun,
        "trials": [
            {"form": t.form, "size": t.size, "params": t.params, "error": t.error, "ms": of_network[t.branches, t.kept]}
            for t in everything
        ],
    }


def session_of(model: onnx.ModelProto, threads: int) -> Any:
    """Return a session whose threads stop spinning when a run ends: there are as many pools as networks."""
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])


def in_turn(sessions: Sequence[Any], feed: Mapping[str, NDArray[Any]], arguments: argparse.Namespace) -> list[float]:
    """Return the median milliseconds of each session; all run once a round, every other round backwards.

    One thread runs in the caller's own, whose time on the processor leaves out what others do on a busy machine.
    """
    found: list[list[float]] = [[] for _ in sessions]
    clock = time.thread_time if arguments.clock == "cpu" else time.perf_counter
    end = time.perf_counter() + arguments.seconds
    number = 0
    while number <= arguments.rounds or time.perf_counter() < end:
        order = range(len(sessions)) if number % 2 else reversed(range(len(sessions)))
        for which in order:
            begun = clock()
            sessions[which].run(None, feed)
            found[which].append(1e3 * (clock() - begun))
        number += 1
    return [statistics.median(values[1:]) for values in found]  # the first warms up


def records(
    subject: Subject,
    layers: Sequence[Layer],
    capture: Capture,
    roles: Mapping[str, NDArray[np.int64]],
    arguments: argparse.Namespace,
) -> Iterator[Record]:
    """Yield the record of each layer; statistics are captured for as many layers as fit memory."""
    for group in groups(layers, len(roles), arguments.memory, with_columns=False):
        say(f"statistics of {', '.join(layer.name for layer in group)}")
        found = capture.statistics(group, roles, Silent(), with_columns=False)
        for layer in group:
            bed = bed_of(subject, layer, found.pop(layer.node), arguments)
            shape = subject.shapes[layer.input]
            yield {
                "layer": layer.name,
                "shape": [layer.channels, layer.out, *layer.geometry.kernel, *shape[2:]],
                "cut": bool(alive_outputs(subject.view, subject.layers, {layer.node: np.zeros(1, np.int64)})[0]),
                **measured(bed, shape, arguments),
            }


def bed_of(subject: Subject, layer: Layer, own: Mapping[str, Statistic], arguments: argparse.Namespace) -> Bed:
    """Return what the forms of a layer are fitted with: the very problem that the pipeline would make."""
    bench = Bench(subject.view, "lrs", MULTIPLE, arguments.memory)
    _, problem = bench._problem(layer, own)
    damping = choose_damping(problem)
    metric = damped(problem, damping)
    assert metric is not None  # there are moments
    return Bed(layer, problem, metric, damping, own[JUDGE].moments)


# ----------------------------------------------------------------------------------------------------- rendering


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a table measures a form by: the latency at one of the batches, or the parameters where ``batch`` is None."""

    title: str
    batch: int | None

    def of(self, trial: Record, record: Record) -> float:
        """Return the cost of a trial as a share of the dense layer's."""
        nothing, dense = record["trials"][:2]
        if self.batch is None:
            return float(trial["params"] / dense["params"])
        floor = nothing["ms"][self.batch]
        return float((trial["ms"][self.batch] - floor) / (dense["ms"][self.batch] - floor))


def usable(record: Record) -> list[Record]:
    """Return the trials that the network admits: a producer is cut or divided only if nobody else reads it."""
    return [t for t in record["trials"][2:] if record["cut"] or "producer" not in t["form"]]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lower convex hull of (cost, log error), by rising cost; at no cost the error is 1.

    A network mixes sizes and forms over its layers, so that what lies between two points is within reach. More points
    only lower the hull: a coarse grid of ranks is no gain for the forms held against it.
    """
    found: list[tuple[float, float]] = []
    for x, y in [(0.0, 0.0), *((cost, float(np.log(error))) for cost, error in sorted(points))]:
        if found and y >= found[-1][1]:
            continue
        while len(found) > 1 and _slope(found[-2], (x, y)) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append((x, y))
    return found


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def gains(record: Record, cost: Cost, house: Collection[str]) -> dict[str, float]:
    """Return by form how much lower its error is at best, relative to the front of the forms in ``house``.

    Beyond the front the error is taken as that of its last point.
    """
    trials = [(t["form"], cost.of(t, record), t["error"]) for t in usable(record)]
    costs, logs = zip(*front([(c, e) for form, c, e in trials if form in house]), strict=True)
    found: dict[str, float] = {}
    for form, own, error in trials:
        if form not in house and WINDOW[0] <= own <= WINDOW[1]:
            gain = 1.0 - error / float(np.exp(np.interp(own, costs, logs)))
            found[form] = max(gain, found.get(form, -np.inf))
    return found


def render(done: Sequence[Record], house: Collection[str]) -> str:
    """Return the gains as Markdown, of the forms that are not in ``house`` against those that are."""
    ours = list({(record["model"], record["layer"]): record for record in done}.values())
    batches = ours[0]["batches"]
    costs = [Cost(f"latency at batch {batch}", number) for number, batch in enumerate(batches)]
    costs.append(Cost("parameters", None))
    machines = dict.fromkeys(record["machine"] for record in ours)
    clock = "processor time of one thread" if ours[0]["clock"] == "cpu" else "wall clock"
    return "\n\n".join(
        [
            gain_table(ours, costs, house),
            f"By how many per cent the error is lower than that of the best of {', '.join(house)}, at equal "
            f"{' / '.join(cost.title for cost in costs)}, at the best size between {WINDOW[0]:g} and {WINDOW[1]:g} of "
            "the dense layer. Negative: higher at every size; -: no such size. The last row counts the layers from "
            f"{100 * GAIN:g} on. Latency is {clock}. {'; '.join(machines)}.",
        ]
    )


def gain_table(ours: Sequence[Record], costs: Sequence[Cost], house: Collection[str]) -> str:
    """Return the gains: a row a layer, a column a form, a figure a cost."""
    forms = list(dict.fromkeys(t["form"] for record in ours for t in record["trials"][2:] if t["form"] not in house))
    found = [[gains(record, cost, house) for cost in costs] for record in ours]
    body = []
    for record, own in zip(ours, found, strict=True):
        channels, out, *kernel, height, width = record["shape"]
        shape = f"{channels}->{out}, {'x'.join(map(str, kernel))}, {height}x{width}"
        dense = " / ".join(figure(ms) for ms in record["trials"][1]["ms"])
        cells = [" / ".join(f"{100 * each[form]:.0f}" if form in each else "-" for each in own) for form in forms]
        body.append([f"{record['model']} {record['layer']}", shape, dense, *cells])
    won = [
        " / ".join(f"{sum(own[i].get(form, 0.0) >= GAIN for own in found)}" for i in range(len(costs)))
        for form in forms
    ]
    return markdown(["layer", "shape", "dense ms", *forms], [*body, ["layers won", "", "", *won]])


# -------------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare the forms of convolutions: latency against error.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FILE.jsonl", help="measure, appending one line a layer")
    target.add_argument("--render", type=Path, metavar="FILE.jsonl", help="print the tables of a file as Markdown")
    parser.add_argument("--without", nargs="*", default=[], help="with --render: forms of onnx-lrs to hold against it")
    parser.add_argument("--model", type=Path, help="an .onnx file")
    parser.add_argument("--data", type=Path, help="its calibration data: a folder of images, .npy or .npz")
    parser.add_argument("--preset", help="preprocessing of images: imagenet, caffe or raw (default: 0..1)")
    parser.add_argument("--name", help="what the model is called in the tables (default: its file name)")
    parser.add_argument("--layers", nargs="+", default=["*"], metavar="PATTERN", help="shell patterns of layer names")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="N", help="default: 1 16")
    parser.add_argument("--rounds", type=int, default=30, help="every network runs at least so often (default: 30)")
    parser.add_argument("--seconds", type=float, default=10.0, help="and at least so long (default: 10)")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for --threads 1 on busy machines"
    )
    parser.add_argument("--limit-images", type=int, metavar="N", help="draw so many samples at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of draws and splits (default: 0)")
    parser.add_argument("--memory", type=parse_size, default=4 * GIB, metavar="SIZE", help="as of onnx-lrs (4GiB)")
    add_threads(parser)
    arguments = parser.parse_args()
    if arguments.out is not None and (arguments.model is None or arguments.data is None):
        parser.error("--out needs --model and --data")
    if min(arguments.batches) < 1 or arguments.rounds < 1:
        parser.error("--batches and --rounds: at least 1")
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu counts the calling thread alone: give --threads 1")
    return arguments, parser


def fill(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Measure the layers that the file lacks."""
    done = read_records(arguments.out)
    name = arguments.name or arguments.model.stem
    preprocess = Preprocess.from_preset(arguments.preset) if arguments.preset else None
    config = Config(
        multiple=MULTIPLE,
        memory_bytes=arguments.memory,
        threads=arguments.threads,
        seed=arguments.seed,
        preprocess=preprocess,
    )
    original = models.load(arguments.model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(checked_threads(parser, arguments.threads))
        material = open_material(Inputs(arguments.data), models.signature(original)[0], config, stack)
        material, images = limited(material, arguments.limit_images, config)
        settings = {"images": images, "seed": arguments.seed, "batches": arguments.batches}
        settings |= {"clock": arguments.clock, "threads": arguments.threads}
        refuse_mixture(name, settings, done)
        subject = examine(arguments.model, original, config, material.samples)
        there = {record["layer"] for record in done if record["model"] == name}
        layers = [
            la for la in matching(subject.layers, arguments.layers) if admitted(la, config) and la.name not in there
        ]
        assert material.samples is not None  # there is data
        assert material.split is not None
        parts = material.split
        roles = {FIT: parts.fit, SELECT: parts.select, JUDGE: parts.held_out}
        setting = Setting(
            config.memory_bytes, config.columns, subject.batch, config.threads, config.seed, subject.dynamic_batch
        )
        capture = stack.enter_context(contextlib.closing(Capture(subject.folded, layers, material.samples, setting)))
        for record in records(subject, layers, capture, roles, arguments):
            append_record(arguments.out, {"model": name, **settings, "machine": machine(arguments.threads)} | record)


def admitted(layer: Layer, config: Config) -> bool:
    """Return whether a layer has a 2-D kernel that is more than a point, and statistics that fit the memory."""
    return (
        layer.op == "Conv"
        and len(layer.geometry.kernel) == 2
        and layer.taps > 1
        and not is_wide(layer, config.memory_bytes)
    )


def main() -> None:
    """Measure, or print what was measured."""
    arguments, parser = parse_arguments()
    try:
        if arguments.render is None:
            fill(arguments, parser)
            return
        done = read_records(arguments.render)
        if not done:
            parser.error(f"--render: {arguments.render} holds no layers; measure some with --out {arguments.render}")
        print(render(done, [form for form in HOUSE if form not in arguments.without]))
    except (OnnxLrsError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
