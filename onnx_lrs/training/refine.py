"""A compressed model brought near the original again, on the same inputs and without labels.

The original, in ONNX Runtime, is the teacher; the compressed model, translated by onnx2torch, is the student.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from onnx_lrs.config import Training
from onnx_lrs.data import Samples
from onnx_lrs.errors import ConfigError, VerificationError
from onnx_lrs.graph import tuning
from onnx_lrs.graph.model import is_standard, signature
from onnx_lrs.report.training import Trained, TrainedEpoch
from onnx_lrs.runtime.session import Feed, Session
from onnx_lrs.training.loop import Pool, Trainer
from onnx_lrs.training.losses import Goal, Loss
from onnx_lrs.training.state import State
from onnx_lrs.training.student import Student

PARITY = 1e-3  # largest difference of torch's outputs from ONNX Runtime's, relative to the largest output
SCORED = ("Gemm", "MatMul", "Add", "Conv", "Flatten", "Reshape", "Squeeze", "GlobalAveragePool", "AveragePool")
SEEN = 64  # samples that tell how large an output is
PROBABLE = ("Softmax", "LogSoftmax")


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a model is refined on: samples and which of their items train and select, classes where they are known."""

    samples: Samples
    train: NDArray[np.int64]
    select: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    joined: bool  # whether items may go through the model together


def refined(
    models: tuple[onnx.ModelProto, onnx.ModelProto],
    lesson: Lesson,
    training: Training,
    threads_and_seed: tuple[int, int],
    kept: tuple[State | None, Callable[[State], None]],
    tell: Callable[[TrainedEpoch], None],
) -> tuple[onnx.ModelProto, Trained]:
    """Return the compressed model with the values that came out best on the samples that select.

    Parameters
    ----------
    models : (onnx.ModelProto, onnx.ModelProto)
        The original and the compressed one, with the same inputs and outputs.
    lesson : Lesson
    training : Training
    threads_and_seed : (int, int)
    kept : (State or None, callable)
        Where an earlier run stood, and what keeps the state behind each epoch.
    tell : callable
        Is given the figures of each epoch.

    Raises
    ------
    ModelError
        If onnx2torch does not know an operator of the compressed model.
    VerificationError
        If the translated model does not compute what the file does, before or after, or training diverges.
    """
    original, compressed = models
    threads, seed = threads_and_seed
    torch.set_num_threads(threads)
    names = [spec.name for spec in signature(original)[1] if spec.dtype.kind == "f"]
    student = Student(tuning.twin(compressed), names)
    with Session(original, threads) as session, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="onnx2torch")  # of things that nobody here can mend

        def teacher(feed: Feed) -> Feed:
            return session.run(feed, names)

        pools = _pool(lesson, lesson.train), _pool(lesson, lesson.select)
        goals = _goals(original, session, pools[1], names, training.loss)
        _check_parity(compressed, student, pools[1], threads)
        loss = Loss(goals, training.temperature, 0.0 if lesson.labels is None else training.label_share)
        trainer = Trainer(student, teacher, loss, pools, training, seed)
        state = trainer.run(kept[0], kept[1], tell)
    model = tuning.with_values(compressed, state.best)
    _check_parity(model, Student(tuning.twin(model), names), pools[1], threads)
    return model, Trained(
        epochs=state.history,
        best=state.best_epoch.number,
        samples=len(lesson.train),
        selecting=len(lesson.select),
        weights=sum(values.size for values in state.values.values()),
        loss={goal.name: goal.kind for goal in goals},
        bfloat16=trainer.autocast,
        ended=trainer.ended,
    )


def _pool(lesson: Lesson, items: NDArray[np.int64]) -> Pool:
    feeds = [lesson.samples.item(int(item)) for item in items]
    if lesson.labels is None:
        return Pool(feeds, None, lesson.joined)
    ends = np.cumsum([lesson.samples.rows(i) for i in range(len(lesson.samples))])
    labels = np.split(lesson.labels, ends[:-1])
    return Pool(feeds, [labels[item] for item in items], lesson.joined)


def _goals(
    original: onnx.ModelProto, session: Session, pool: Pool, names: Sequence[str], asked: str
) -> tuple[Goal, ...]:
    feed = next(pool.batches(range(len(pool)), SEEN)).feed
    makers = {output: node for node in original.graph.node for output in node.output}
    goals = []
    for name, value in session.run(feed, list(names)).items():
        maker = makers[name].op_type if name in makers and is_standard(makers[name].domain) else ""
        classes = value.ndim == 2 and value.shape[1] > 1
        kind = asked
        if asked == "auto":
            kind = "kl" if classes and maker in PROBABLE else "l2"
        if kind == "kl" and not classes:
            raise ConfigError(f"--loss kl: output {name!r} of shape {list(value.shape)} is no class scores.", "Use l2.")
        rows = len(value) if value.ndim else 1
        scale = float(np.square(value, dtype=np.float64).sum()) / rows
        known = kind == "kl" or (classes and maker in (*SCORED, *PROBABLE))
        goals.append(Goal(name, kind, maker == "Softmax", max(scale, 1e-12), 1 / len(names), known))
    return tuple(goals)


def _check_parity(model: onnx.ModelProto, student: Student, pool: Pool, threads: int) -> None:
    """Refuse a translation that does not compute what the file does."""
    feed = next(pool.batches(range(len(pool)), 8)).feed
    with Session(model, threads) as session, torch.no_grad():
        wanted = session.run(feed)
        found = student(*(torch.from_numpy(np.ascontiguousarray(value)) for value in feed.values()))
    for name, value in found.items():
        apart = float(np.abs(value.numpy() - wanted[name]).max(initial=0.0))
        if not apart <= PARITY * max(float(np.abs(wanted[name]).max(initial=0.0)), 1e-12):
            raise VerificationError(
                f"Output {name!r} of the model translated for training is off by {apart:.3g} from ONNX Runtime's.",
                "Nothing was written. Compress without --refine.",
            )
