"""What a run works on: the model, looked at and run once, and the samples, divided by role."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs import data as sources
from onnx_lrs.calibration.capture import Setting, is_too_large, rows_per_call
from onnx_lrs.config import Config, Precision
from onnx_lrs.data import Samples, TensorSpec
from onnx_lrs.errors import ConfigError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.cost import macs_by_node, tensors_to_measure
from onnx_lrs.graph.fold import fold_batch_norm
from onnx_lrs.graph.layers import Layer, Skipped, find, tensors_around
from onnx_lrs.graph.model import ModelSource, View
from onnx_lrs.graph.rewrite import Reach, reach_of
from onnx_lrs.graph.weights import Scratch
from onnx_lrs.runtime.session import Feed, Session, with_outputs
from onnx_lrs.runtime.verify import takes_batches

RANDOM_ITEMS = 64  # how many random inputs --random-data fits on


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Where samples come from, as the caller named it. ``labels`` belong to the samples that judge."""

    data: Any = None
    labels: Any = None
    test: Any = None


@dataclasses.dataclass(frozen=True)
class Material:
    """Samples by role: ``split`` divides ``samples``; ``judge`` may be other samples. All None without data."""

    samples: Samples | None
    split: sources.Split | None
    judge: Samples | None
    judge_items: NDArray[np.int64]
    labels: NDArray[np.int64] | None


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model under work: as given, with exact rewrites done, its layers, and the shapes it runs on.

    ``feed`` is one input at the smallest batch, ``shapes`` the tensors measured on it, ``macs`` multiply-accumulates by
    node (its first output), ``params`` the original's weights, ``file_bytes`` its size with external data, ``batch``
    the largest number of samples in one call, ``scratch`` where new weights go if the model's own lie in files,
    ``precision`` what the new model will compute in.
    """

    original: onnx.ModelProto
    folded: onnx.ModelProto
    view: View
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    feed: Feed
    shapes: Mapping[str, tuple[int, ...]]
    macs: Mapping[str, int]
    params: int
    file_bytes: int
    dynamic_batch: bool
    batch: int
    scratch: Scratch | None = None
    precision: Precision = "float32"

    @functools.cached_property
    def reach(self) -> Reach:
        """Who reads which layer's filters."""
        return reach_of(self.view, self.layers)

    @property
    def ranks(self) -> dict[str, int]:
        """Number of dimensions by tensor name."""
        return {name: len(shape) for name, shape in self.shapes.items()}


def open_material(
    wanted: Inputs, inputs: Sequence[TensorSpec], config: Config, stack: contextlib.ExitStack
) -> Material:
    """Open the data and divide it into what fits, what selects and what judges; ``stack`` closes it.

    Raises
    ------
    ConfigError
        If labels or test data come without calibration data.
    """
    if wanted.data is None and not config.random_data:
        if wanted.test is not None or wanted.labels is not None:
            raise ConfigError("Labels or test data were given without calibration data.", "Give --data as well.")
        return Material(None, None, None, np.zeros(0, np.int64), None)
    if wanted.data is None:
        samples = sources.random_samples(inputs, config.shapes, RANDOM_ITEMS, config.seed)
    else:
        samples = sources.open_samples(wanted.data, inputs, config.preprocess)
    stack.enter_context(samples)
    split = sources.split(len(samples), config.holdout, config.seed)
    if wanted.test is None:
        return Material(samples, split, samples, split.held_out, sources.open_labels(wanted.labels, samples))
    test = stack.enter_context(sources.open_samples(wanted.test, inputs, config.preprocess))
    return Material(samples, split, test, np.arange(len(test)), sources.open_labels(wanted.labels, test))


def examine(
    source: ModelSource,
    original: onnx.ModelProto,
    config: Config,
    samples: Samples | None,
    scratch: Scratch | None = None,
) -> Subject:
    """Fold, find the layers, and run the model once to learn the shapes everything runs on.

    Raises
    ------
    ModelError
        If ONNX Runtime does not load or run the model.
    ConfigError
        If a pattern of ``exclude`` matches no layer.
    DataError
        If there are no samples and an input has open dimensions that --shape does not give.
    """
    inputs, _ = models.signature(original)
    dynamic = all(len(spec.shape) > 0 and not isinstance(spec.shape[0], int) for spec in inputs)
    folded, _ = fold_batch_norm(original, scratch)
    view = View(folded)
    found = find(view, config.exclude)
    _check_patterns(config, [item.name for kind in found for item in kind])
    layers, skipped = _that_fit(*found, config.memory_bytes)
    feed = _probe_feed(config, inputs, samples, dynamic)
    shapes = measure_shapes(folded, view, sorted(tensors_around(layers)), feed, config.threads)
    dynamic = dynamic and samples is not None and takes_batches(folded, samples, config.threads)
    return Subject(
        original=original,
        folded=folded,
        view=view,
        layers=layers,
        skipped=skipped,
        feed=feed,
        shapes=shapes,
        macs=macs_by_node(view, shapes),
        params=models.weight_count(original),
        file_bytes=models.source_bytes(source),
        dynamic_batch=dynamic,
        batch=_batch(layers, shapes, feed, samples, config),
        scratch=scratch,
        precision=config.precision,
    )


def _check_patterns(config: Config, names: Sequence[str]) -> None:
    """Refuse a pattern that protects nothing: the layer that the user meant would be compressed."""
    for pattern in config.exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"--exclude {pattern!r} matches no layer.",
                f"Layers are called {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}; see inspect.",
            )


def _batch(
    layers: Sequence[Layer],
    shapes: Mapping[str, tuple[int, ...]],
    feed: Feed,
    samples: Samples | None,
    config: Config,
) -> int:
    if samples is None:
        return 1
    rows = min(max(len(value), 1) if value.ndim else 1 for value in feed.values())
    setting = Setting(config.memory_bytes, config.columns, config.calibration_batch, config.threads, config.seed, True)
    fitted = int((1 - sources.SELECT_SHARE) * (1 - config.holdout) * samples.row_count)
    return rows_per_call(layers, shapes, rows, setting, fitted)


def _that_fit(
    layers: tuple[Layer, ...], skipped: tuple[Skipped, ...], memory_bytes: int
) -> tuple[tuple[Layer, ...], tuple[Skipped, ...]]:
    """Move the layers whose matrices have no room in memory to the skipped ones."""
    large = [layer for layer in layers if is_too_large(layer, memory_bytes)]
    reason = f"too large for --memory {memory_bytes / 2**30:.3g}GiB; allow more"
    left = tuple(Skipped(la.name, la.op, la.node, la.weight_shape, la.params, reason) for la in large)
    return tuple(layer for layer in layers if layer not in large), skipped + left


def measure_shapes(
    model: onnx.ModelProto, view: View, more: Sequence[str], feed: Feed, threads: int
) -> dict[str, tuple[int, ...]]:
    """Run the model once and return the shapes of its inputs, outputs, what costs MACs, and the tensors in ``more``."""
    wanted = dict.fromkeys([*tensors_to_measure(view), *more, *view.outputs])
    names = [name for name in wanted if name not in feed]
    with Session(with_outputs(model, names), threads) as session:
        return {name: value.shape for name, value in (feed | session.run(feed)).items()}


def _probe_feed(config: Config, inputs: Sequence[TensorSpec], samples: Samples | None, dynamic: bool) -> Feed:
    """Return one feed at the smallest batch: the first sample, or random numbers when there is no data."""
    if samples is None:
        return sources.random_samples(inputs, config.shapes, 1, config.seed).item(0)
    feed = samples.item(0)
    if dynamic and len({len(value) for value in feed.values()}) == 1:
        return {name: value[:1] for name, value in feed.items()}
    return feed
