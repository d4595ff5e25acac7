"""The last step before a model is judged: from float32 to the precision in which it will run.

In INT8 three things are done first that cost nothing at run time: between factors the basis is chosen in which rounding
makes least (solvers/rounding.py), the mean of what rounding a weight changes goes into its bias (Nagel et al. 2019,
section 4.2), and ranges come from the samples that the fit saw. Layers named in ``exclude`` stay in float32, with
whatever stands in their place.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.calibration.rounding import applied, mean_inputs, pairs
from onnx_lrs.calibration.subject import Material, Subject
from onnx_lrs.config import Config, Precision
from onnx_lrs.data import batches
from onnx_lrs.graph.layers import weight_matrix
from onnx_lrs.graph.linear import Product, links, products, turned, with_biases
from onnx_lrs.graph.quantised import Scale
from onnx_lrs.graph.tuning import constants
from onnx_lrs.planning.gate import Gate
from onnx_lrs.planning.plan import Curves
from onnx_lrs.runtime.quantise import Ranges, Recipe, ranges_of, stand_in, to_fp16, to_int8
from onnx_lrs.runtime.session import Feed, Session
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.rounding import best_turn, rounded

# Of a tensor between two products, relative to its mean square: it has 255 steps, and its span is about 10 times its
# root mean square in 4,096 positions (median over the 92 of AlexNet, GoogLeNet, VGG-16 and ResNet-20 compressed, in
# the basis that was chosen), a little more in all of them.
OF_TENSOR = (12.0 / 255.0) ** 2 / 12.0
FLOAT_BYTES = 4
ASKED = 32  # samples that tell which layers suffer most
MOST = 1024  # samples that ranges come from: with 256 images GoogLeNet (CIFAR-10) was off by 13 %, with 1,024 by 2.4 %


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A float model that is ready to be rounded, with the ranges of its activations (None but for INT8).

    ``shifts`` are what the biases of products take once those are rounded, by the tensors that they make.
    """

    model: onnx.ModelProto
    ranges: Ranges | None = None
    shifts: Mapping[str, NDArray[np.float64]] = dataclasses.field(default_factory=dict)


class Quantiser:
    """Brings models of one run into the precision that was asked for; float32 ones stay what they are.

    Parameters
    ----------
    subject : Subject
        The model.
    material : Material
        Samples; the fit and select parts give ranges. INT8 needs them.
    config : Config
        ``precision``, ``quantize_options``, ``threads``, ``seed``.
    scales : mapping of str to Scale, optional
        Of activations of a model that was given in INT8: they are kept.
    """

    def __init__(
        self, subject: Subject, material: Material, config: Config, scales: Mapping[str, Scale] | None = None
    ) -> None:
        self._subject, self._samples = subject, material.samples
        self._threads = config.threads
        self.precision: Precision = config.precision
        self._options = config.quantize_options
        self.recipe = dataclasses.replace(Recipe.of(config.quantize_options), scales=scales or {})
        self._items = np.zeros(0, np.int64)
        self._batch = _batch(subject, config.memory_bytes)
        self._turns = True
        if material.split is not None:
            every = material.split.fit_and_select
            drawn = np.random.default_rng(config.seed).permutation(every)[:MOST]
            self._items = np.sort(drawn)

    @property
    def label(self) -> str:
        """The precision with the options that latencies may depend on, as a table of latencies names it."""
        options = (f"{name}={value}" for name, value in sorted(self._options.items()))
        return " ".join([self.precision, *options])

    @property
    def rounds(self) -> bool:
        """Whether models change at all."""
        return self.precision != "float32"

    def stand_in(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a model of random weights as it would run, to be timed."""
        return stand_in(model, self.precision, self.recipe)

    def finished(self, model: onnx.ModelProto, exclude: Collection[str] = ()) -> onnx.ModelProto:
        """Return a float model in the wanted precision, nodes whose outputs are named in ``exclude`` in float32."""
        return self.rounded(self.prepared(model), exclude)

    def prepared(self, model: onnx.ModelProto) -> Prepared:
        """Return a float model with bases that suit INT8, what its biases will take, and its ranges."""
        if self.precision != "int8":
            return Prepared(model)
        balanced = self.balanced(model)
        ranges = ranges_of(balanced, self._feeds(), self.recipe, self._threads)
        return Prepared(balanced, ranges, self._shifts(balanced))

    def rounded(self, prepared: Prepared, exclude: Collection[str] = ()) -> onnx.ModelProto:
        """Return a prepared model in the wanted precision."""
        recipe = dataclasses.replace(self.recipe, exclude=self.recipe.exclude | frozenset(exclude))
        if self.precision == "fp16":
            return to_fp16(prepared.model, recipe.exclude)
        if prepared.ranges is None:
            return prepared.model
        shifts = {name: shift for name, shift in prepared.shifts.items() if name not in recipe.exclude}
        return to_int8(with_biases(prepared.model, shifts), prepared.ranges, recipe)

    def _feeds(self) -> Iterator[Feed]:
        assert self._samples is not None  # INT8 without data is refused
        for _, feed in batches(self._samples, self._items, self._batch, self._subject.dynamic_batch):
            yield feed

    def in_this_basis(self) -> Quantiser:
        """Return one that leaves the bases between products as they are."""
        other = copy.copy(self)
        other._turns = False
        return other

    def balanced(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a float model with the bases between its products in which INT8 makes least noise."""
        if self.precision != "int8" or not self._turns:
            return model
        found = links(model, products(model))
        count = -(-len(self._items) // self._batch) if self._subject.dynamic_batch else len(self._items)
        turns = {}
        for link, pair in pairs(model, found, self._feeds, count, self._threads):
            turn, _, _ = best_turn(pair)
            if turn is not None:
                turns[link.between] = turn
        return turned(model, found, turns) if turns else model

    def _shifts(self, model: onnx.ModelProto) -> dict[str, NDArray[np.float64]]:
        """Return the mean of what rounding the weight of each product changes, with the other sign.

        Not known, and so none, where options ask for other integers than those of rounded().
        """
        if self.recipe.weight_type != "QInt8" or self.recipe.reduce_range:
            return {}
        every = [product for product in products(model) if product.takes_bias]
        means, values = mean_inputs(model, every, self._feeds, self._threads), constants(model)
        nodes = {node.output[0]: node for node in model.graph.node}
        shifts = {}
        for product in every:
            if product.input in means:
                weight = values[product.weight]
                axis = int(product.turned) if self.recipe.per_channel else None
                change = rounded(weight, axis) - weight
                shifts[product.output] = -_mean_output(product, nodes[product.output], change, means[product.input])
        return shifts

    def by_loss(self, prepared: Prepared) -> list[str]:
        """Return the products of a prepared model, those first that move the outputs most when they alone are in INT8.

        Relative squared errors on a few samples.
        """
        names = [product.output for product in products(prepared.model)]
        every = {name for node in prepared.model.graph.node for name in node.output}
        feeds = []
        for feed in self._feeds():
            feeds.append(feed)
            if sum(len(next(iter(each.values()))) for each in feeds) >= ASKED:
                break
        outputs = [value.name for value in prepared.model.graph.output]
        with Session(prepared.model, self._threads) as session:
            given = [session.run(feed) for feed in feeds]
        moved = {}
        for name in names:
            with Session(self.rounded(prepared, every - {name}), self._threads) as session:
                runs = [session.run(feed) for feed in feeds]
            pairs_of = [
                (a[o], b[o]) for a, b in zip(given, runs, strict=True) for o in outputs if a[o].dtype.kind == "f"
            ]
            moved[name] = sum(float(np.square(a - b).sum() / max(np.square(a).sum(), 1e-30)) for a, b in pairs_of)
        return sorted(names, key=lambda name: -moved[name])


def kept_within(quantiser: Quantiser, gate: Gate, model: onnx.ModelProto) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Return a float model as it will run, and what of it stays in float32: as little as the gate allows.

    Where INT8 throughout loses too much and the float model does not, those products stay in float that move the
    outputs most, one, two, four, ... of them up to half. Without success all are rounded: the gate will refuse it.
    """
    prepared = quantiser.prepared(model)
    whole = quantiser.rounded(prepared)
    if quantiser.precision != "int8":
        return whole, frozenset()

    def holds(tried: onnx.ModelProto) -> bool:
        return gate.holds(gate.drop(tried, gate.search))

    if holds(whole) or not holds(model):
        return whole, frozenset()
    order = quantiser.by_loss(prepared)
    count = 1
    while count <= len(order) // 2:
        kept = frozenset(order[:count])
        mixed = quantiser.rounded(prepared, kept)
        if holds(mixed):
            return mixed, kept
        count *= 2
    return whole, frozenset()


def _batch(subject: Subject, memory_bytes: int) -> int:
    """Return how many samples may be in one call that gives all activations at once, within half of the memory."""
    around = {name for layer in subject.layers for name in (layer.input, layer.node)}
    rows = min(max(len(value), 1) if value.ndim else 1 for value in subject.feed.values())
    each = 2 * FLOAT_BYTES * sum(math.prod(subject.shapes[name]) for name in around) // rows  # layers, and between them
    return int(np.clip(memory_bytes // 2 // max(each, 1), 1, subject.batch))


def with_rounding(subject: Subject, curves: Curves) -> dict[str, list[Candidate]]:
    """Return the curves with what INT8 adds to each candidate's loss; those of other precisions as they are.

    A candidate of one step rounds its weights and its input as the dense layer does. Each further step rounds one more
    weight, about as well as the layer's own, and the tensor in front of it.
    """
    if subject.precision != "int8":
        return {node: list(own) for node, own in curves.items()}
    found = {}
    for layer in subject.layers:
        weight = weight_matrix(subject.view, layer)
        change = np.square(rounded(weight, 0) - weight).sum() / max(np.square(weight).sum(), 1e-30)
        step = float(change) + OF_TENSOR
        found[layer.node] = [_rounded_too(c, step) for c in curves[layer.node]]
    return found


def _rounded_too(candidate: Candidate, step: float) -> Candidate:
    steps = bool(candidate.rank) + bool(candidate.inner)
    return dataclasses.replace(candidate, loss=candidate.loss + steps * step) if steps else candidate


def _mean_output(
    product: Product, node: onnx.NodeProto, weight: NDArray[np.floating], mean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the mean over positions of what a product with another weight makes of a mean input, (out,)."""
    if product.op == "Gemm":
        return np.asarray((mean @ (weight if product.turned else weight.T)).reshape(-1), np.float64)
    value = applied(node, mean, weight)
    return np.asarray(value.mean(axis=(0, *range(2, value.ndim)), dtype=np.float64))
