"""The order of a refinement's steps: load both models, open the data, train, write the values back, verify, write."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib

import onnx

from onnx_lrs import __version__
from onnx_lrs.calibration.subject import Inputs, Material, open_material
from onnx_lrs.config import Config, Training
from onnx_lrs.data import fingerprint
from onnx_lrs.errors import ConfigError, ModelError, OutputError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.model import ModelSource
from onnx_lrs.progress import Clock, Progress
from onnx_lrs.report.environment import arithmetic, environment, peak_memory_bytes, processor, versions
from onnx_lrs.report.notes import refined_notes
from onnx_lrs.report.record import check_folder
from onnx_lrs.report.refinement import Refinement
from onnx_lrs.report.result import OutputQuality
from onnx_lrs.runtime.session import Session
from onnx_lrs.runtime.verify import check_structure, compare_outputs, takes_batches
from onnx_lrs.training.door import KEPT, check_training, train
from onnx_lrs.work import Identity, Work

JUDGED = 64  # samples in a call


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the caller asked for; ``call`` repeats it."""

    original: ModelSource
    compressed: ModelSource
    output: pathlib.Path | None
    inputs: Inputs
    training: Training
    config: Config
    progress: Progress
    call: str = ""


def refine(wish: Wish) -> Refinement:
    """Run the whole way; see :func:`onnx_lrs.refine`."""
    _check(wish)
    clock, config = Clock(wish.progress), wish.config
    with contextlib.ExitStack() as stack:
        with clock.stage("load"):
            original, compressed = models.load(wish.original), models.load(wish.compressed)
            _check_pair(original, compressed)
            material = open_material(wish.inputs, models.signature(original)[0], config, stack)
            assert material.samples is not None
            joined = takes_batches(compressed, material.samples, config.threads)
        work = stack.enter_context(_open_work(wish, material))
        before = _judged((original, compressed), wish, material, joined, (clock, "judge"))
        model, trained = train(
            (original, compressed), material, (wish.training, config), joined, work, clock, wish.progress
        )
        check_structure(compressed, model)
        after = _judged((original, model), wish, material, joined, (clock, "verify"))
        if wish.output is not None:
            with clock.stage("write"):
                models.save(model, wish.output, external=bool(models.weight_files(wish.compressed)))
    return Refinement(
        original=_name(wish.original),
        compressed=_name(wish.compressed),
        output=None if wish.output is None else str(wish.output),
        before=before,
        after=after,
        trained=trained,
        settings={"training": dataclasses.asdict(wish.training), **config.to_dict()},
        environment=environment("CPUExecutionProvider", config.threads, config.seed) | {"cpu": processor()},
        seconds=clock.total(),
        peak_memory_bytes=peak_memory_bytes(),
        call=wish.call,
        notes=tuple(refined_notes((trained,))),
        model=model,
    )


def _judged(
    pair: tuple[onnx.ModelProto, onnx.ModelProto],
    wish: Wish,
    material: Material,
    joined: bool,
    clock_and_stage: tuple[Clock, str],
) -> tuple[OutputQuality, ...]:
    assert material.judge is not None
    clock, stage = clock_and_stage
    size = JUDGED if joined else 1
    with clock.stage(stage, -(-len(material.judge_items) // size)), contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(Session(model, wish.config.threads)) for model in pair)
        return compare_outputs(
            (first, second), material.judge, material.judge_items, material.labels, (size, joined), wish.progress
        )


def _name(source: ModelSource) -> str | None:
    return None if isinstance(source, onnx.ModelProto) else str(source)


def _check(wish: Wish) -> None:
    """Refuse what cannot work before anything is read."""
    check_training(wish.training)
    if wish.training.rounds > 1:
        raise ConfigError("--rounds compresses anew in each round.", "Use onnx-lrs MODEL -o OUT --refine --rounds K.")
    if wish.inputs.data is None:
        raise ConfigError("Refining needs typical inputs.", "Give them with --data; labels are not needed.")
    if wish.output is None:
        return
    if wish.output.is_dir():
        raise OutputError(f"The output {wish.output} is a folder.", "Give a file name, for example refined.onnx.")
    check_folder(wish.output.parent, "-o")
    targets = wish.output, wish.output.with_name(models.external_name(wish.output))
    for source in (wish.original, wish.compressed):
        if isinstance(source, onnx.ModelProto):
            continue
        path = pathlib.Path(source)
        if models.same_file(wish.output, path):
            raise ConfigError(f"The output {wish.output} is the input {path}.", "Choose another name for -o.")
        if path.exists() and any(models.same_file(t, n) for t in targets for n in models.weight_files(path)):
            raise ConfigError(
                f"Writing {wish.output} would overwrite weights of {path}.", "Choose another name for -o."
            )


def _check_pair(original: onnx.ModelProto, compressed: onnx.ModelProto) -> None:
    """Refuse two models of which one cannot teach the other."""
    first, second = models.signature(original), models.signature(compressed)
    for kind, one, other in zip(("inputs", "outputs"), first, second, strict=True):
        if one != other:
            told = [", ".join(map(str, specs)) for specs in (one, other)]
            raise ModelError(
                f"The models' {kind} differ: {told[0]} and {told[1]}.",
                "Give the original first, then what was made of it.",
            )


def _open_work(wish: Wish, material: Material) -> Work:
    if wish.config.work is None:
        return Work()
    assert material.samples is not None
    deciding = {
        "models": [models.digest(wish.original), models.digest(wish.compressed)],
        "samples": fingerprint(material.samples, lambda: None),
        "settings": dataclasses.asdict(wish.training),
        "seed": wish.config.seed,
        "holdout": wish.config.holdout,
        "versions": versions() | {"onnx-lrs": __version__},
        "machine": arithmetic(),
    }
    words = {"what this is": "the state of one refinement; it may be deleted when the run is done"}
    return Work.open(pathlib.Path(wish.config.work), Identity(deciding, words), KEPT, wish.progress.note)
