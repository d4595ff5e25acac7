"""What a compressed model loses on samples that nothing was fitted to, and whether that is within the limit.

The judging samples are cut in two: one part is asked as often as the search needs, the other confirms what was found.
A model that passes by luck on the first part is thus caught by the second.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.calibration.subject import Material, Subject
from onnx_lrs.data import batches
from onnx_lrs.errors import ConfigError, VerificationError
from onnx_lrs.progress import Silent
from onnx_lrs.report.result import OutputQuality
from onnx_lrs.runtime.session import Feed, Session
from onnx_lrs.runtime.verify import compare_outputs

Items = NDArray[np.int64]
Predict = Callable[[Feed], Feed]
Metric = Callable[[Predict, Iterable[tuple[NDArray[np.int64], Feed]]], float]


@dataclasses.dataclass(frozen=True)
class Drop:
    """What is lost, and what that is a share of: "accuracy", "agreement", "relative error" or "metric"."""

    value: float
    measure: str


def halves(items: Items, seed: int) -> tuple[Items, Items]:
    """Return the items that are asked in the search and those that confirm, drawn at random, each in order.

    Raises
    ------
    ConfigError
        If there are fewer than two.
    """
    if len(items) < 2:
        raise ConfigError(
            "--max-drop needs two samples that judge: one for the search, one that confirms.",
            "Give more data, a larger --holdout, or samples of their own with --test.",
        )
    order = np.random.default_rng(seed).permutation(items)
    middle = (len(items) + 1) // 2
    return np.sort(order[:middle]), np.sort(order[middle:])


class Gate:
    """Judges models against the original; ``search`` and ``confirm`` are the two parts of the samples that judge."""

    def __init__(
        self,
        subject: Subject,
        material: Material,
        limit: float,
        threads_and_seed: tuple[int, int],
        metric: Metric | None = None,
    ) -> None:
        assert material.judge is not None  # max_drop is refused without data
        self.limit = limit
        self.search, self.confirm = halves(material.judge_items, threads_and_seed[1])
        self._subject, self._samples, self._labels = subject, material.judge, material.labels
        self._threads, self._metric = threads_and_seed[0], metric
        self._original: dict[int, float] = {}

    def drop(self, model: onnx.ModelProto, items: Items) -> Drop:
        """Return what a model loses on some of the samples.

        Infinitely much where its outputs are not finite.
        """
        if self._metric is not None:
            return Drop(self._value(self._subject.original, items, kept=True) - self._value(model, items), "metric")
        with contextlib.ExitStack() as stack:
            sessions = (
                stack.enter_context(Session(self._subject.original, self._threads)),
                stack.enter_context(Session(model, self._threads)),
            )
            batching = self._subject.batch, self._subject.dynamic_batch
            try:
                found = compare_outputs(sessions, self._samples, items, self._labels, batching, Silent())
            except VerificationError:  # outputs that are not finite: as bad as can be, and a looser plan may do
                return Drop(float("inf"), "relative error")
        return drop_of(found)

    def _value(self, model: onnx.ModelProto, items: Items, kept: bool = False) -> float:
        """Return the caller's metric; that of the original is asked once a part."""
        assert self._metric is not None
        if kept and len(items) and int(items[0]) in self._original:
            return self._original[int(items[0])]
        with Session(model, self._threads) as session:
            value = float(self._metric(session.run, self._feeds(items)))
        if kept and len(items):
            self._original[int(items[0])] = value
        return value

    def _feeds(self, items: Items) -> Iterator[tuple[Items, Feed]]:
        yield from batches(self._samples, items, self._subject.batch, self._subject.dynamic_batch)

    def holds(self, drop: Drop) -> bool:
        """Return whether a drop is within the limit; a rounding of floats does not decide."""
        return drop.value <= self.limit + 1e-9


def drop_of(quality: Sequence[OutputQuality]) -> Drop:
    """Return the largest drop over the outputs: of accuracy where there are labels, else of agreement, else the error.

    Agreement is that of the most likely class with the original's.
    """
    pairs = [(q.accuracy_before, q.accuracy_after) for q in quality]
    accuracy = [before - after for before, after in pairs if before is not None and after is not None]
    if accuracy:
        return Drop(max(accuracy), "accuracy")
    agreement = [1.0 - q.top1_agreement for q in quality if q.top1_agreement is not None]
    if agreement:
        return Drop(max(agreement), "agreement")
    return Drop(max((q.relative_l2 for q in quality), default=0.0), "relative error")
