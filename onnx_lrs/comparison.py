"""The order of a comparison's steps: look at the models, load each alone, time them in turn, hold outputs together."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.config import CompareConfig
from onnx_lrs.data import Samples, open_labels, open_samples
from onnx_lrs.errors import ConfigError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.model import ModelSource
from onnx_lrs.progress import Clock, Progress
from onnx_lrs.report.comparison import Comparison, Timed
from onnx_lrs.report.environment import accelerators, environment, processor
from onnx_lrs.report.html import check_place, publish
from onnx_lrs.report.notes import ASSUMED
from onnx_lrs.runtime.compare import Course, Entrant, check_outputs, nodes_of, shared_inputs
from onnx_lrs.runtime.ratios import LEVEL
from onnx_lrs.runtime.session import PROVIDERS, check_provider


@dataclasses.dataclass(frozen=True)
class Request:
    """What the caller asked for; ``call`` repeats it."""

    models: Sequence[ModelSource]
    data: Any
    labels: Any
    config: CompareConfig
    progress: Progress
    call: str = ""


def compare(request: Request) -> Comparison:
    """Run the whole way; see :func:`onnx_lrs.compare`."""
    config, clock = request.config, Clock(request.progress)
    _check(request)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnx-lrs-")))
        with clock.stage("look", len(request.models)):
            for provider in config.providers:
                check_provider(provider)
            entrants = _entrants(request, folder)
            samples, labels = _material(request, entrants, stack)
        course = Course(entrants, samples, config, request.progress, folder)
        with clock.stage("load", len(entrants)):
            compared = course.loaded()
        if samples is not None:  # before the timing: what does not fit together shows here
            with clock.stage("quality", course.quality_steps):
                compared = course.judged(compared, labels)
        with clock.stage("time", course.steps):
            timings, layers = course.timed()
    found = Comparison(
        models=compared,
        timings=timings,
        layers=layers,
        data="random inputs" if samples is None else samples.description,
        level=LEVEL,
        settings=config.to_dict(),
        environment=_environment(config),
        seconds=clock.total(),
        notes=tuple(_notes(timings, samples)),
        call=request.call,
    )
    if config.report is not None:
        publish(pathlib.Path(config.report), found, request.progress)
    return found


def _environment(config: CompareConfig) -> dict[str, Any]:
    """Return where and when this runs; ``gpu`` is None where none takes part."""
    providers = ", ".join(PROVIDERS[provider][0] for provider in config.providers)
    return environment(providers, config.threads, config.seed) | {
        "cpu": processor(),
        "gpu": None if config.providers == ("cpu",) else accelerators(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _check(request: Request) -> None:
    if len(request.models) < 2:
        raise ConfigError("A comparison needs two models or more.", "onnx-lrs compare model.onnx small.onnx")
    if request.labels is not None and request.data is None:
        raise ConfigError("Labels were given without data.", "Labels belong to samples: give --data as well.")
    if request.config.report is not None:
        check_place(pathlib.Path(request.config.report), [*request.models, request.data, request.labels])


def _entrants(request: Request, folder: pathlib.Path) -> list[Entrant]:
    found = []
    for place, source in enumerate(request.models):
        found.append(_entrant(source, place, folder))
        request.progress.step(found[-1].name)
    return _with_names_apart(found)


def _material(
    request: Request, entrants: Sequence[Entrant], stack: contextlib.ExitStack
) -> tuple[Samples | None, NDArray[np.int64] | None]:
    """Return the samples and labels that were given, once the models are known to fit together; ``stack`` closes them.

    Raises
    ------
    ModelError
        If the models take other inputs than the first, or lack outputs that data would compare.
    DataError
        If data or labels cannot be used.
    """
    inputs = shared_inputs(entrants)
    if request.data is None:
        return None, None
    check_outputs(entrants)
    samples = stack.enter_context(open_samples(request.data, inputs, request.config.preprocess))
    return samples, open_labels(request.labels, samples)


def _entrant(source: ModelSource, place: int, folder: pathlib.Path) -> Entrant:
    model = models.load(source)
    inputs, outputs = models.signature(model)
    if isinstance(source, onnx.ModelProto):
        path, shown, name = folder / f"{place}.onnx", None, f"model {place + 1}"
        models.save(model, path, external=False)
    else:
        path = pathlib.Path(source).absolute()  # a link is not followed: weights lie beside it, not its target
        shown, name = os.fspath(source), os.fspath(source)
    return Entrant(
        name=name,
        path=path,
        inputs=inputs,
        outputs=tuple(spec.name for spec in outputs),
        nodes=nodes_of(model),
        params=models.weight_count(model),
        file_bytes=models.file_bytes(path),
        shown=shown,
    )


def _with_names_apart(entrants: Sequence[Entrant]) -> list[Entrant]:
    """Return the models, files called by as much of the end of their paths as tells them apart.

    One that is there again is called so: comparing a model with itself shows the noise.
    """
    paths = [None if entrant.shown is None else pathlib.Path(entrant.shown) for entrant in entrants]
    found = []
    for place, (entrant, path) in enumerate(zip(entrants, paths, strict=True)):
        name, again = entrant.name, 0
        if path is not None:
            name = _short(path, [other for other in paths if other is not None])
            again = paths[:place].count(path)
        found.append(dataclasses.replace(entrant, name=f"{name} ({again + 1})" if again else name))
    return found


def _short(path: pathlib.Path, others: Sequence[pathlib.Path]) -> str:
    """Return the shortest end of a path that no other one has."""
    ends = ([part.parts[-length:] for part in others if part != path] for length in range(1, len(path.parts)))
    for length, taken in enumerate(ends, 1):
        if path.parts[-length:] not in taken:
            return pathlib.Path(*path.parts[-length:]).as_posix()
    return str(path)


def _notes(timings: Sequence[Timed], samples: Samples | None) -> Iterator[str]:
    """Yield what the reader has to know besides the figures."""
    if samples is None:
        yield "Inputs were random numbers; --data gives real ones, and tells what the outputs lost."
    elif samples.guessed:
        yield ASSUMED
    for t in timings:
        where = f"{t.model}, {t.provider}, batch {t.batch}"
        if t.verdict == "cannot tell":
            yield (
                f"{where}: between {t.ratio_low:.3f} and {t.ratio_high:.3f} of the first model's latency, so it is not "
                "known which is faster. Give more --seconds, or stop other work."
            )
        if t.on_cuda:
            yield f"{where}: TensorRT left {t.on_cuda} nodes to CUDA."
        if t.on_cpu or t.copies:
            yield f"{where}: {t.on_cpu} nodes were left to the CPU, {t.copies} copy tensors between it and the GPU."
