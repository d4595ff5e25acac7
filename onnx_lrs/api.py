"""What a deployment pipeline imports: compress a model, or look at one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from onnx_lrs.calibration.subject import Inputs, Subject, examine
from onnx_lrs.comparison import Request
from onnx_lrs.comparison import compare as run_comparison
from onnx_lrs.config import Budget, CompareConfig, Config, Training
from onnx_lrs.data import TensorSpec, open_samples
from onnx_lrs.graph import model as models
from onnx_lrs.graph.model import ModelSource
from onnx_lrs.graph.quantised import floated, is_quantised
from onnx_lrs.graph.weights import scratch_for
from onnx_lrs.pipeline import compress as run
from onnx_lrs.planning.gate import Metric
from onnx_lrs.planning.job import Job
from onnx_lrs.planning.spectra import effective_ranks
from onnx_lrs.progress import Progress, Silent
from onnx_lrs.refining import Wish
from onnx_lrs.refining import refine as run_refinement
from onnx_lrs.report.call import python_call
from onnx_lrs.report.comparison import Comparison
from onnx_lrs.report.refinement import Refinement
from onnx_lrs.report.result import Inspection, LayerInfo, Result, Totals


def compress(
    model: ModelSource,
    output: str | os.PathLike[str] | None = None,
    *,
    data: Any = None,
    labels: Any = None,
    test: Any = None,
    budget: Budget | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
    metric: Metric | None = None,
    call: str | None = None,
) -> Result:
    """Make a model smaller and faster by low-rank + structured sparse weights.

    Parameters
    ----------
    model : path or onnx.ModelProto
        The original; it is never changed.
    output : path, optional
        Where to write the compressed model. Without it the model is only in ``Result.model``.
    data : optional
        Typical inputs: a folder of images, a .npy or .npz file, an array, a mapping of arrays, an iterable of dicts, a
        :class:`onnx_lrs.Dataset`, or onnxruntime's CalibrationDataReader. Without it the fit sees weights only.
    labels : optional
        Class numbers of the samples that judge (``test`` if given, else ``data``): an array, a .npy or .npz file, or
        "folders" for class sub-folders. Adds accuracy to the quality.
    test : optional
        Other samples to judge on, in the forms of ``data``. Without it a share of ``data`` is held out.
    budget : Budget, optional
        Short for ``config.budget``; it wins over it.
    config : Config, optional
        All settings. Default: ``Config()``: as fast as it gets within one point of quality where there is data.
    progress : Progress, optional
        Is told stages and steps; silent by default.
    executor : concurrent.futures.Executor, optional
        Solves layers side by side, in place of the ``config.jobs`` threads of this process: threads, processes or a
        cluster (dask's ``client.get_executor()``). The file is the same, to the byte. It is not shut down.
    metric : callable, optional
        What ``max_drop`` limits instead of accuracy or agreement: ``metric(predict, samples) -> float``, larger is
        better, and the drop is that of the original less that of the compressed model. ``predict`` takes a feed (dict
        of arrays) and returns the outputs by name; ``samples`` yields (numbers of the samples, feed).
    call : str, optional
        What a report names as the way to repeat the run, for programs that have a command line of their own. Default:
        this call in Python, objects abbreviated.

    Returns
    -------
    Result
        Sizes, quality, layers and settings; ``to_json()`` for a file, ``model`` for the ModelProto.

    Raises
    ------
    OnnxLrsError
        One of its subclasses in :mod:`onnx_lrs.errors`; nothing has been written then, unless the message says that the
        model was and only a file beside it is missing. Where that is the page of ``config.report`` the error's
        attribute ``record`` is the :class:`Result`.
    """
    settings = config or Config()
    if budget is not None:
        settings = dataclasses.replace(settings, budget=budget)
    target = None if output is None else pathlib.Path(output)
    if call is None:
        named = {"data": data, "labels": labels, "test": test, "config": settings, "metric": metric}
        call = python_call("compress", (model, output), named)
    inputs = Inputs(data, labels, test)
    return run(Job(model, target, inputs, settings, progress or Silent(), executor, metric, call))


def refine(
    model: ModelSource,
    compressed: ModelSource,
    output: str | os.PathLike[str] | None = None,
    *,
    data: Any,
    labels: Any = None,
    test: Any = None,
    training: Training | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
    call: str | None = None,
) -> Refinement:
    """Train a compressed model to give what the original gives; needs ``pip install "onnx-lrs[refine]"``.

    Weights and biases of Conv, Gemm and MatMul are trained; ranks, kept channels and single entries stay what they are,
    and so does the graph. No labels are needed: the original is the teacher.

    Parameters
    ----------
    model, compressed : path or onnx.ModelProto
        The original, and what was made of it, with the same inputs and outputs; neither is changed.
    output : path, optional
        Where to write the refined model. Without it the model is only in ``Refinement.model``.
    data : path, array, iterable or Dataset
        Typical inputs, in the forms that :func:`compress` takes: a share trains, another selects the best state, and
        without ``test`` a third judges.
    labels : optional
        Class numbers of the samples that judge, as in :func:`compress`. Without ``test`` those of the samples
        that train are used as well, for a mixed loss.
    test : optional
        Other samples to judge on.
    training : Training, optional
        How to train. Default: ``Training()``.
    config : Config, optional
        Preprocessing, threads, seed, holdout, memory and work folder; what else it holds is not used.
    progress : Progress, optional
        Is told stages and epochs; silent by default.
    call : str, optional
        What the record names as the way to repeat the run. Default: this call in Python, objects abbreviated.

    Returns
    -------
    Refinement
        Quality before and after, the loss of every epoch; ``model`` is the ModelProto.

    Raises
    ------
    OnnxLrsError
        One of its subclasses: a model that onnx2torch cannot translate (ModelError), models that do not belong
        together, data that cannot be used, PyTorch missing (ConfigError); nothing has been written then.
    """
    settings, course = config or Config(), training or Training()
    if call is None:
        named = {"data": data, "labels": labels, "test": test, "training": course, "config": settings}
        call = python_call("refine", (model, compressed, output), named)
    target = None if output is None else pathlib.Path(output)
    return run_refinement(
        Wish(model, compressed, target, Inputs(data, labels, test), course, settings, progress or Silent(), call)
    )


def compare(
    models: Sequence[ModelSource],
    *,
    data: Any = None,
    labels: Any = None,
    config: CompareConfig | None = None,
    progress: Progress | None = None,
    call: str | None = None,
) -> Comparison:
    """Time models against each other, and hold their outputs against the first one's where there is data.

    Every model runs once a round, in turn; sessions are opened afresh again and again, because how weights happen to
    lie in memory moves latencies by percents. Loading and memory are measured in a process of its own for each.

    Parameters
    ----------
    models : sequence of path or onnx.ModelProto
        Two or more that take the same inputs; the first is what the others are held against. A model in memory is
        written to a temporary folder.
    data : optional
        Inputs, in the forms that :func:`compress` takes; the first ones are timed, all are compared. Default: random
        inputs, and no word on quality.
    labels : optional
        Class numbers of the samples: an array, a .npy or .npz file, or "folders".
    config : CompareConfig, optional
        Batches, providers, threads, how long, and what GPUs shall do.
    progress : Progress, optional
        Is told stages and steps; silent by default.
    call : str, optional
        What a report names as the way to repeat the comparison. Default: this call in Python, objects abbreviated.

    Returns
    -------
    Comparison
        Medians, percentiles, ratios with intervals; ``to_json()``, ``to_csv()``, ``to_markdown()``, ``to_html()``.

    Raises
    ------
    OnnxLrsError
        One of its subclasses in :mod:`onnx_lrs.errors`: a model that cannot be read or run (ModelError), a provider
        that does not start (RuntimeEnvironmentError), data or a setting that does not fit.
    """
    settings = config or CompareConfig()
    if call is None:
        call = python_call("compare", (list(models),), {"data": data, "labels": labels, "config": settings})
    return run_comparison(Request(tuple(models), data, labels, settings, progress or Silent(), call))


def inspect(
    model: ModelSource, *, data: Any = None, config: Config | None = None, progress: Progress | None = None
) -> Inspection:
    """Return a model's layers with parameters and multiply-accumulates, and why a layer would be left dense.

    The model is run once to learn its shapes: on the first sample, or on random inputs. With ``data`` (in the forms
    that :func:`compress` takes) the effective rank of every layer is told as well.

    Raises
    ------
    ModelError
        If the model cannot be read or does not run.
    DataError
        If the data cannot be used, or without data an input has open dimensions besides the batch that
        ``config.shapes`` does not give.
    """
    settings = config or Config()
    original = models.load(model)
    inputs, outputs = models.signature(original)
    notes = []
    if is_quantised(original):  # what compress would work on, or its error
        original = floated(original).model
        notes.append("The model is in INT8 (QDQ): shown are the layers of the float model behind it.")
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_for(original, None))
        samples = None
        if data is not None:
            samples = stack.enter_context(open_samples(data, inputs, settings.preprocess))
        subject = examine(model, original, settings, samples, scratch)
        ranks: dict[str, int] = {}
        if samples is not None:
            ranks = effective_ranks(subject, samples, settings, progress or Silent())
    if samples is not None:
        notes.append(f"Effective ranks on {samples.description}.")
    in_file = isinstance(model, str | os.PathLike)
    return Inspection(
        input=str(model) if in_file else None,
        opset=models.opset(original),
        ir_version=int(original.ir_version),
        producer=f"{original.producer_name} {original.producer_version}".strip(),
        inputs=tuple(str(spec) for spec in inputs),
        outputs=tuple(str(spec) for spec in outputs),
        totals=Totals(subject.params, sum(subject.macs.values()), subject.file_bytes),
        layers=_layer_infos(subject, ranks),
        notes=tuple(notes),
        dynamic=tuple(_open_dimensions(inputs)),
        external_bytes=subject.file_bytes - pathlib.Path(model).stat().st_size if in_file else 0,
    )


def _open_dimensions(inputs: Sequence[TensorSpec]) -> Iterator[str]:
    for spec in inputs:
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int):
                yield f"{spec.name}: axis {axis}{f' ({size})' if size else ''}"


def _layer_infos(subject: Subject, ranks: Mapping[str, int]) -> tuple[LayerInfo, ...]:
    """Return eligible and skipped layers in graph order; those inside subgraphs last."""
    infos = {
        layer.node: LayerInfo(
            name=layer.name,
            op=layer.op,
            shape=layer.weight_shape,
            params=layer.params,
            macs=subject.macs[layer.node],
            eligible=True,
            reason=None,
            full_rank=min(layer.out, layer.d),
            effective_rank=ranks.get(layer.node),
        )
        for layer in subject.layers
    }
    for skip in subject.skipped:
        macs = subject.macs.get(skip.node or "", 0)
        key = skip.node or f"subgraph {skip.name}"
        infos[key] = LayerInfo(skip.name, skip.op, skip.shape, skip.params, macs, False, skip.reason)
    order = {node.outputs[0].name: i for i, node in enumerate(subject.view.nodes)}
    return tuple(info for _, info in sorted(infos.items(), key=lambda item: order.get(item[0], len(order))))
