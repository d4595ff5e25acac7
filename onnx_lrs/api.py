"""What a deployment pipeline imports: compress a model, or look at one."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from concurrent.futures import Executor
from typing import Any

from onnx_lrs.calibration.subject import Inputs, Subject, examine
from onnx_lrs.config import Budget, Config
from onnx_lrs.graph import model as models
from onnx_lrs.graph.model import ModelSource
from onnx_lrs.graph.weights import scratch_for
from onnx_lrs.pipeline import compress as run
from onnx_lrs.planning.gate import Metric
from onnx_lrs.planning.job import Job
from onnx_lrs.progress import Progress, Silent
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

    Returns
    -------
    Result
        Sizes, quality, layers and settings; ``to_json()`` for a file, ``model`` for the ModelProto.

    Raises
    ------
    OnnxLrsError
        One of its subclasses in :mod:`onnx_lrs.errors`; nothing has been written then.
    """
    settings = config or Config()
    if budget is not None:
        settings = dataclasses.replace(settings, budget=budget)
    target = None if output is None else pathlib.Path(output)
    return run(Job(model, target, Inputs(data, labels, test), settings, progress or Silent(), executor, metric))


def inspect(model: ModelSource, *, config: Config | None = None) -> Inspection:
    """Return a model's layers with parameters and multiply-accumulates, and why a layer would be left dense.

    The model is run once on random inputs to learn its shapes.

    Raises
    ------
    ModelError
        If the model cannot be read or does not run.
    DataError
        If an input has open dimensions besides the batch that ``config.shapes`` does not give.
    """
    settings = config or Config()
    original = models.load(model)
    with scratch_for(original, None) as scratch:
        subject = examine(model, original, settings, None, scratch)
    inputs, outputs = models.signature(original)
    return Inspection(
        input=None if not isinstance(model, str | os.PathLike) else str(model),
        opset=models.opset(original),
        ir_version=int(original.ir_version),
        producer=f"{original.producer_name} {original.producer_version}".strip(),
        inputs=tuple(str(spec) for spec in inputs),
        outputs=tuple(str(spec) for spec in outputs),
        totals=Totals(subject.params, sum(subject.macs.values()), subject.file_bytes),
        layers=_layer_infos(subject),
        notes=(),
    )


def _layer_infos(subject: Subject) -> tuple[LayerInfo, ...]:
    """Return eligible and skipped layers in graph order; those inside subgraphs last."""
    infos = {
        layer.node: LayerInfo(
            layer.name, layer.op, layer.weight_shape, layer.params, subject.macs[layer.node], True, None
        )
        for layer in subject.layers
    }
    for skip in subject.skipped:
        macs = subject.macs.get(skip.node or "", 0)
        key = skip.node or f"subgraph {skip.name}"
        infos[key] = LayerInfo(skip.name, skip.op, skip.shape, skip.params, macs, False, skip.reason)
    order = {node.outputs[0].name: i for i, node in enumerate(subject.view.nodes)}
    return tuple(info for _, info in sorted(infos.items(), key=lambda item: order.get(item[0], len(order))))
