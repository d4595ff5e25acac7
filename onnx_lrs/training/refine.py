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
from onnx_lrs.errors import ConfigError, DataError, ModelError, VerificationError
from onnx_lrs.graph import tuning
from onnx_lrs.graph.model import is_standard, signature
from onnx_lrs.report.training import Trained, TrainedEpoch
from onnx_lrs.runtime.session import Feed, Session, with_outputs
from onnx_lrs.training.loop import Kept, Pool, Trainer, tensors
from onnx_lrs.training.losses import Goal, Loss
from onnx_lrs.training.state import State
from onnx_lrs.training.student import Student

PARITY = 1e-3  # largest difference of torch's outputs from ONNX Runtime's, relative to the largest output
SCORED = ("Gemm", "MatMul", "Add", "Conv", "Flatten", "Reshape", "Squeeze", "GlobalAveragePool", "AveragePool")
SEEN = 64  # samples that tell how large an output is
PROBABLE = ("Softmax", "LogSoftmax")


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a model is refined on: samples and which of their items train and select, classes where they are known.

    ``joined`` says whether samples may go through the model together; ``room`` bytes of samples stay in memory.
    """

    samples: Samples
    train: NDArray[np.int64]
    select: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    joined: bool
    room: int


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
        If onnx2torch does not know an operator of the compressed model, or there is nothing to train or to compare.
    ConfigError, DataError
        If the outputs do not go with the loss or with the labels.
    VerificationError
        If the translated model does not compute what the file does, before or after, or training diverges.
    """
    original, compressed = models
    threads, seed = threads_and_seed
    torch.set_num_threads(threads)
    names = _compared(original, compressed)
    between = tuning.boundaries(original, compressed) if training.block_share else []
    student = Student(tuning.twin(compressed), [*names, *between])
    pools = _pool(lesson, lesson.train), _pool(lesson, lesson.select)
    _check_parity(compressed, student, names, pools[1], threads)
    teaching = with_outputs(original, [*names, *between]) if between else original
    with Session(teaching, threads) as session, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="onnx2torch")  # of things that nobody here can mend

        def teacher(feed: Feed) -> Feed:
            return session.run(feed, [goal.name for goal in goals])

        seen = next(pools[1].batches(range(len(pools[1])), SEEN)).feed
        goals = _goals(original, session, pools[1], (names, lesson.labels), training)
        goals += _between(session.run(seen, between), student, seen, training.block_share) if between else ()
        loss = Loss(goals, training.temperature, 0.0 if lesson.labels is None else training.label_share)
        trainer = Trainer(student, teacher, loss, pools, training, seed)
        state = trainer.run(kept[0], kept[1], tell)
    model = tuning.with_values(compressed, state.best)
    trainer.take(dataclasses.replace(state, values=state.best))
    _check_parity(model, student.cpu(), names, pools[1], threads)
    return model, Trained(
        epochs=state.history,
        best=state.best_epoch.number,
        samples=len(lesson.train),
        selecting=len(lesson.select),
        weights=sum(values.size for values in state.values.values()),
        loss={goal.name: goal.kind for goal in goals},
        bfloat16=trainer.autocast,
        ended=trainer.ended,
        rounded=training.fake_quant,
    )


def _pool(lesson: Lesson, items: NDArray[np.int64]) -> Pool:
    room = lesson.room * len(items) // (len(lesson.train) + len(lesson.select))
    feeds = Kept(lesson.samples.item, items.tolist(), room)
    if lesson.labels is None:
        return Pool(feeds, None, lesson.joined)
    ends = np.cumsum([lesson.samples.rows(i) for i in range(len(lesson.samples))])
    labels = np.split(lesson.labels, ends[:-1])
    return Pool(feeds, [labels[item] for item in items], lesson.joined)


def _compared(original: onnx.ModelProto, compressed: onnx.ModelProto) -> list[str]:
    """Return the outputs that can be compared: of floating-point numbers, and made by some node."""
    made = [{name for node in model.graph.node for name in node.output} for model in (original, compressed)]
    names = [spec.name for spec in signature(original)[1] if spec.dtype.kind == "f"]
    found = [name for name in names if all(name in makers for makers in made)]
    if not found:
        raise ModelError(
            "No output of this model is a floating-point number that it computes.", "It cannot be refined."
        )
    return found


def _goals(
    original: onnx.ModelProto,
    session: Session,
    pool: Pool,
    names_and_labels: tuple[Sequence[str], NDArray[np.int64] | None],
    training: Training,
) -> tuple[Goal, ...]:
    """Return how each output is compared, its size seen on some samples."""
    names, labels = names_and_labels
    seen = [session.run(batch.feed, list(names)) for batch in pool.batches(range(min(len(pool), SEEN)), SEEN)]
    makers = {output: node for node in original.graph.node for output in node.output}
    highest = -1 if labels is None else int(labels.max(initial=-1))
    goals, shapes = [], {name: list(value.shape) for name, value in seen[0].items()}
    for name, value in seen[0].items():
        maker = makers[name].op_type if is_standard(makers[name].domain) else ""
        classes = value.ndim == 2 and value.shape[1] > 1 and (maker in (*SCORED, *PROBABLE) or training.loss == "kl")
        divergence = classes and (training.loss == "kl" or (training.loss == "auto" and maker in PROBABLE))
        kind, weight = "kl" if divergence else "l2", (1 - training.block_share) / len(names)
        labelled = classes and value.shape[1] > highest
        size = float(np.mean([_size(found[name]) for found in seen]))
        goals.append(Goal(name, kind, maker == "Softmax", size, weight, labelled))
    if training.loss == "kl" and not any(goal.kind == "kl" for goal in goals):
        raise ConfigError(f"--loss kl compares class scores; the outputs are {shapes}.", "Use --loss l2.")
    if highest >= 0 and training.label_share and not any(goal.classes for goal in goals):
        told = f"The labels go up to {highest}; no output has so many classes: {shapes}."
        raise DataError(told, "Check the labels, or leave them out of training: --label-share 0.")
    return tuple(goals)


def _between(seen: Feed, student: Student, feed: Feed, share: float) -> tuple[Goal, ...]:
    """Return the goals of tensors between blocks; those that lost filters are left out."""
    with torch.no_grad():
        found = student(*tensors(feed))
    alike = {name: value for name, value in seen.items() if tuple(found[name].shape) == value.shape}
    return tuple(Goal(name, "l2", scale=_size(value), weight=share / len(alike)) for name, value in alike.items())


def _size(value: NDArray[np.generic]) -> float:
    """Return the mean sum of squares of a row."""
    rows = len(value) if value.ndim else 1
    return max(float(np.square(value, dtype=np.float64).sum()) / rows, 1e-12)


def _check_parity(model: onnx.ModelProto, student: Student, names: Sequence[str], pool: Pool, threads: int) -> None:
    """Refuse a translation that does not compute what the file does: the weights of the file, nothing is rounded."""
    feed = next(pool.batches(range(len(pool)), 8)).feed
    with Session(model, threads) as session, torch.no_grad():
        wanted = session.run(feed, list(names))
        found = student(*tensors(feed))
    for name in names:
        apart = float(np.abs(found[name].numpy() - wanted[name]).max(initial=0.0))
        if not apart <= PARITY * max(float(np.abs(wanted[name]).max(initial=0.0)), 1e-12):
            raise VerificationError(
                f"Output {name!r} of the model translated for training is off by {apart:.3g} from ONNX Runtime's.",
                "Nothing was written. Compress without --refine.",
            )
