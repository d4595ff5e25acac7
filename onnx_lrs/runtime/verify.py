"""Proof before writing: the model is valid, loads, keeps its signature, and how close its outputs are."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.data import Samples, batches
from onnx_lrs.errors import DataError, ModelError, VerificationError
from onnx_lrs.graph.model import PROTOBUF_LIMIT, signature
from onnx_lrs.graph.weights import constant_outside, is_outside, references
from onnx_lrs.progress import Pace, Progress
from onnx_lrs.report.result import Changes, OutputQuality
from onnx_lrs.runtime.examples import Changed
from onnx_lrs.runtime.session import Feed, Session

TOP = 5


def check_structure(original: onnx.ModelProto, compressed: onnx.ModelProto) -> None:
    """Run onnx.checker (in full) and compare the signatures.

    Raises
    ------
    VerificationError
        If the compressed model is invalid or its inputs or outputs changed.
    """
    if compressed.ByteSize() < PROTOBUF_LIMIT:  # the checker takes larger models by path only; ONNX Runtime checks them
        try:
            _check(compressed)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            _refuse_unless_inherited(original, error)
    if signature(original) != signature(compressed):
        raise VerificationError("The compressed model's inputs or outputs differ from the original's.", _REPORT)


def _check(model: onnx.ModelProto) -> None:
    """Check all of a model; shape inference calls a sparse operand an error, though every runtime reads it as dense."""
    model = _with_outside_as_inputs(model)
    if model.graph.sparse_initializer:
        onnx.checker.check_model(model)
        model = _seen_by_operators(model)
    onnx.checker.check_model(model, full_check=True)


def _with_outside_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a twin that takes weights in files as inputs: the checker knows no absolute references."""
    if not any(True for _ in references(model)):
        return model
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    made = {node.output[0]: node.attribute[0].t for node in model.graph.node if constant_outside(node)}
    made |= {tensor.name: tensor for tensor in model.graph.initializer if is_outside(tensor)}
    del twin.graph.initializer[:], twin.graph.node[:]
    twin.graph.initializer.extend(tensor for tensor in model.graph.initializer if not is_outside(tensor))
    twin.graph.node.extend(node for node in model.graph.node if not constant_outside(node))
    listed = {value.name for value in model.graph.input}
    for name, tensor in made.items():
        if name not in listed:
            twin.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return twin


def _seen_by_operators(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a twin that takes its sparse initialisers as dense inputs: their type and shape without the zeros."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.sparse_initializer[:]
    listed = {value.name for value in twin.graph.input}
    for tensor in model.graph.sparse_initializer:
        name, kind = tensor.values.name, tensor.values.data_type
        if name not in listed:
            twin.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, list(tensor.dims)))
    return twin


_REPORT = "Nothing was written. This is a bug in onnx-lrs; please report it with the model."


def _refuse_unless_inherited(original: onnx.ModelProto, error: Exception) -> None:
    """Raise, unless the checker refused the original too (custom operators, old quirks)."""
    try:
        _check(original)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return
    raise VerificationError(f"onnx.checker refuses the compressed model: {error}", _REPORT) from None


class Meter:
    """Streams pairs of one output into an :class:`OutputQuality` and :class:`Changes`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows = 0
        self._sums = np.zeros(3)  # squared difference, squared reference, cosines
        self._agreements = np.zeros(2)
        self._correct = np.zeros(2)
        self._classes = self._by_sample = True
        self._labelled = 0
        self._changed = Changed(name)

    def add(
        self,
        a: NDArray[np.generic],
        b: NDArray[np.generic],
        labels: NDArray[np.int64] | None,
        samples: NDArray[np.int64],
    ) -> None:
        """Take in the outputs of the original (a) and the compressed model (b) for the same inputs.

        ``labels`` and ``samples`` are the true classes and the numbers of the rows that were fed.
        """
        rows = len(a) if a.ndim else 1
        x, y = (np.asarray(v, np.float64).reshape(rows, -1) for v in (a, b))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        dots = np.einsum("nd,nd->n", x, y)
        cosines = np.divide(dots, norms, out=(norms == 0).astype(float), where=norms > 0)
        self._rows += rows
        self._sums += [np.square(x - y).sum(), np.square(x).sum(), cosines.sum()]
        self._classes &= a.ndim == 2 and a.shape[1] > 1 and a.dtype.kind == "f"
        if self._classes:
            labels = labels if labels is not None and len(labels) == len(x) else None
            self._add_classes(x, y, labels)
            self._by_sample &= len(samples) == len(x)
            if self._by_sample:
                self._changed.add(x, y, labels, samples)

    def _add_classes(self, x: NDArray[np.float64], y: NDArray[np.float64], labels: NDArray[np.int64] | None) -> None:
        first, second = x.argmax(axis=1), y.argmax(axis=1)
        best = np.argsort(-y, axis=1, kind="stable")[:, :TOP]
        self._agreements += [np.sum(first == second), np.sum(best == first[:, None])]
        if labels is not None:
            self._correct += [np.sum(first == labels), np.sum(second == labels)]
            self._labelled += len(labels)

    def quality(self) -> OutputQuality:
        """Return the figures over everything added."""
        difference, reference, cosines = self._sums
        top1, top5 = (float(v) / self._rows for v in self._agreements) if self._classes else (None, None)
        before, after = (float(v) / self._labelled for v in self._correct) if self._labelled else (None, None)
        return OutputQuality(
            name=self._name,
            relative_l2=float(np.sqrt(difference / reference)) if reference else float(difference > 0),
            cosine=float(cosines / self._rows),
            samples=self._rows,
            top1_agreement=top1,
            top5_agreement=top5,
            accuracy_before=before,
            accuracy_after=after,
        )

    def changes(self) -> Changes | None:
        """Return which samples have another class; None where the output has no classes, or its rows are no samples."""
        return self._changed.changes() if self._classes and self._by_sample else None


def compare_outputs(
    sessions: tuple[Session, Session],
    samples: Samples,
    items: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    batching: tuple[int, bool],
    progress: Progress,
) -> tuple[OutputQuality, ...]:
    """Return how close every floating-point output is on the given items; see :func:`compare_answers`."""
    return compare_answers(sessions, samples, items, labels, batching, progress)[0]


def compare_answers(
    sessions: tuple[Session, Session],
    samples: Samples,
    items: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    batching: tuple[int, bool],
    progress: Progress,
) -> tuple[tuple[OutputQuality, ...], tuple[Changes, ...]]:
    """Return how close every floating-point output is on the given items, and of those with classes what changed.

    ``labels`` holds the class of every row of the samples, ``batching`` the largest batch and whether it is dynamic.

    Raises
    ------
    DataError
        If the original's own outputs are not finite.
    VerificationError
        If the compressed model's outputs are not finite.
    """
    return compare_several(sessions, samples, items, labels, batching, progress)[0]


def compare_several(
    sessions: Sequence[Session],
    samples: Samples,
    items: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    batching: tuple[int, bool],
    progress: Progress,
) -> list[tuple[tuple[OutputQuality, ...], tuple[Changes, ...]]]:
    """Return the same for every session behind the first one, which is the original's and runs once."""
    original, *others = sessions
    starts = np.concatenate([[0], np.cumsum([samples.rows(i) for i in range(len(samples))])])
    meters: list[dict[str, Meter]] = [{} for _ in others]
    size, dynamic = batching
    pace = Pace(progress, size if dynamic else 1)
    for indices, feed in batches(samples, items, size, dynamic):
        a, results = original.run(feed), [session.run(feed) for session in others]
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices])
        own = None if labels is None else labels[rows]
        for name in original.outputs:
            for b, known in zip(results, meters, strict=True):
                if a[name].dtype.kind == "f":
                    _check_finite(name, a, b)
                    known.setdefault(name, Meter(name)).add(a[name], b[name], own, rows)
        pace.advance(len(indices))
    pace.finish()
    return [
        (
            tuple(meter.quality() for meter in known.values()),
            tuple(c for c in (meter.changes() for meter in known.values()) if c is not None),
        )
        for known in meters
    ]


def takes_batches(model: onnx.ModelProto | pathlib.Path, samples: Samples, threads: int) -> bool:
    """Return whether two samples in one call give what they give alone.

    Exporters mark the batch as dynamic and still bake its size into a Reshape, and the first axis may be the time.
    With a single sample there is nothing to join, and nothing to tell it by: no.
    """
    if len(samples) < 2:
        return False
    first, second = samples.item(0), samples.item(1)
    pairs = [(first[name], second[name]) for name in first]
    if any(a.ndim == 0 or a.shape != b.shape for a, b in pairs):
        return True  # such samples are not joined anyway
    with Session(model, threads) as session:
        alone = [session.run(feed) for feed in (first, second)]
        try:
            joined = session.run({name: np.concatenate([first[name], second[name]]) for name in first})
        except ModelError:
            return False
    return all(_stacked(name, alone, joined) for name in joined)


def _stacked(name: str, alone: Sequence[Feed], joined: Feed) -> bool:
    parts = [feed[name] for feed in alone]
    if any(part.ndim == 0 for part in parts) or joined[name].shape != np.concatenate(parts).shape:
        return False
    scale = float(np.abs(np.nan_to_num(joined[name])).max(initial=0.0)) if joined[name].dtype.kind == "f" else 0.0
    return bool(np.allclose(np.concatenate(parts), joined[name], rtol=1e-3, atol=1e-3 * scale, equal_nan=True))


def change_of_output(
    sessions: tuple[Session, Session], name: str, samples: Samples, items: NDArray[np.int64], batching: tuple[int, bool]
) -> tuple[float, float]:
    """Return ||y - y'||_F and ||y||_F of one output over the given items, in float64."""
    sums = np.zeros(2)
    for _, feed in batches(samples, items, *batching):
        a, b = (np.asarray(session.run(feed, [name])[name], np.float64) for session in sessions)
        sums += [np.square(a - b).sum(), np.square(a).sum()]
    return float(np.sqrt(sums[0])), float(np.sqrt(sums[1]))


def check_original_finite(name: str, values: Iterable[NDArray[np.generic]]) -> None:
    """Refuse data on which the original itself fails: there is nothing to compare with.

    Raises
    ------
    DataError
        If a value of the output is not finite.
    """
    if not all(np.isfinite(value).all() for value in values):
        raise DataError(
            f"The original model's output {name!r} is not finite on this data.", "Check the preprocessing of the data."
        )


def _check_finite(name: str, a: Feed, b: Feed) -> None:
    check_original_finite(name, [a[name]])
    if a[name].shape != b[name].shape:
        raise VerificationError(f"Output {name!r} has shape {b[name].shape} instead of {a[name].shape}.", _REPORT)
    if not np.isfinite(b[name]).all():
        raise VerificationError(f"The compressed model's output {name!r} is not finite.", "Nothing was written.")
