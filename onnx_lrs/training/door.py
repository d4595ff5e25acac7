"""The door of this wing: everything heavy is imported behind it, when it is needed."""

from __future__ import annotations

import hashlib
import importlib.util

import numpy as np
import onnx

from onnx_lrs.calibration.subject import Material
from onnx_lrs.config import Config, Training
from onnx_lrs.errors import ConfigError
from onnx_lrs.graph.model import digest
from onnx_lrs.graph.tuning import twin
from onnx_lrs.progress import Clock, Progress
from onnx_lrs.report.training import Trained, TrainedEpoch
from onnx_lrs.training.state import State
from onnx_lrs.work import Work

NEEDED = ("torch", "onnx2torch")
KEPT = (State, TrainedEpoch)  # in a work folder


def check_training(training: Training) -> None:
    """Refuse a refinement that could not be made.

    Raises
    ------
    ConfigError
        If PyTorch or onnx2torch are not installed, with the command that installs them, or PyTorch finds no GPU.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Refining needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            'Install what it needs: pip install "onnx-lrs[refine]".',
        )
    if training.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: PyTorch finds no CUDA device.", "Use --device cpu.")


def check_operators(model: onnx.ModelProto) -> None:
    """Refuse a model that could not be translated; what compressing adds to it can be.

    Raises
    ------
    ModelError
        If onnx2torch does not know an operator, with the names of all of them.
    """
    from onnx_lrs.training.student import translatable, translated

    translated(translatable(twin(model).model))


def train(
    pair: tuple[onnx.ModelProto, onnx.ModelProto],
    material: Material,
    how: tuple[Training, Config],
    joined: bool,
    work: Work,
    clock: Clock,
    progress: Progress,
) -> tuple[onnx.ModelProto, Trained]:
    """Return the second model trained to give what the first gives, and what training did.

    Parameters
    ----------
    pair : (onnx.ModelProto, onnx.ModelProto)
        The original and the compressed one.
    material : Material
        The samples that fit are trained on, those that select choose the best epoch; those that judge are not touched.
    how : (Training, Config)
    joined : bool
        Whether samples may go through the model together.
    work : Work
        Keeps the state behind each epoch.
    clock, progress : Clock, Progress
        Are told the stage and its epochs.

    Raises
    ------
    ModelError, DataError, VerificationError
        As :func:`onnx_lrs.training.refine.refined`.
    """
    from onnx_lrs.training.refine import Lesson, refined

    training, config = how
    assert material.samples is not None
    assert material.split is not None
    items, labels = material.split.fit, material.labels
    if material.judge is not material.samples:  # then labels belong to others, and nothing is held out here
        items, labels = np.sort(np.concatenate([items, material.split.held_out])), None
    lesson = Lesson(material.samples, items, material.split.select, labels, joined, config.memory_bytes)
    deciding = [
        training,
        config.seed,
        joined,
        *map(tuple, (items, material.split.select, () if labels is None else labels)),
    ]
    name = hashlib.sha256("\n".join([repr(deciding), *map(digest, pair)]).encode()).hexdigest()[:16]

    def tell(epoch: TrainedEpoch) -> None:
        progress.step(str(epoch))

    with clock.stage("refine", training.epochs):
        return refined(
            pair,
            lesson,
            training,
            (config.threads, config.seed),
            (work.get("training", name), lambda state: work.put("training", name, state)),
            tell,
        )
