"""What training did: the epochs of one course."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TrainedEpoch:
    """One pass over the samples: the mean loss on them, the loss on those that select, seconds of wall clock.

    ``agreement`` is the share of the samples that select to which the model gives the original's class, None where
    there are no classes. Epoch 0 is the model as it was given; it has no loss on the samples that train.
    """

    number: int
    loss: float | None
    selected: float
    seconds: float
    agreement: float | None = None

    def __str__(self) -> str:
        told = [] if self.loss is None else [f"loss {self.loss:.4g}"]
        told.append(f"on others {self.selected:.4g}")
        if self.agreement is not None:
            told.append(f"same class {self.agreement:.1%}")
        return ", ".join(told)


Ended = Literal["epochs", "time", "no gain", "interrupted", "diverged"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training did.

    ``samples`` were trained on and ``selecting`` chose the ``best`` epoch; ``weights`` values were trained; ``loss``
    tells how each output was compared ("kl", "l2"), ``bfloat16`` whether products were taken in that, and ``ended`` why
    the last epoch was the last: all were done, the time was over, nothing got better for a while, Ctrl-C, or the loss
    was no longer finite. ``rounded`` says whether the figures of the epochs are those of weights rounded to INT8.
    """

    epochs: tuple[TrainedEpoch, ...]
    best: int
    samples: int
    selecting: int
    weights: int
    loss: dict[str, str]
    bfloat16: bool
    ended: Ended = "epochs"
    rounded: bool = False
