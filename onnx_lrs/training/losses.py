"""How far a student is from its teacher: one number for each output, differentiable.

"l2": ||s - t||^2 over the mean ||t||^2 of the samples. "kl": T^2 KL(softmax(t / T) || softmax(s / T)), averaged over
the samples (Hinton, Vinyals and Dean 2015, arXiv 1503.02531), whose limit for large T is the former without the mean
score; for scores of classes the former did better (Kim et al. 2021, arXiv 2105.08919; docs/refine.md). With labels a
cross entropy is mixed in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

LEAST = 1e-12  # of a probability whose logarithm is a score


@dataclasses.dataclass(frozen=True)
class Goal:
    """What one tensor of the student shall be like.

    Parameters
    ----------
    name : str
        Of the tensor, in student and teacher.
    kind : {"kl", "l2"}
        Class scores, or values.
    probabilities : bool
        Whether class scores are probabilities; their logarithms are scores like any.
    scale : float
        Mean ||t||^2 of a sample; used by "l2".
    weight : float
        In the sum over the goals.
    classes : bool
        Whether the largest value of a row is an answer.
    """

    name: str
    kind: str
    probabilities: bool = False
    scale: float = 1.0
    weight: float = 1.0
    classes: bool = False


@dataclasses.dataclass(frozen=True)
class Loss:
    """The sum over the goals; with labels ``label_share`` of a goal with classes is the cross entropy."""

    goals: Sequence[Goal]
    temperature: float
    label_share: float

    def __call__(
        self, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the mean over the samples, a scalar; ``labels`` (n,) int64 are their classes."""
        parts = [goal.weight * self._part(goal, found[goal.name], wanted[goal.name], labels) for goal in self.goals]
        return torch.stack(parts).sum()

    def _part(self, goal: Goal, found: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        found, wanted = found.float(), wanted.float()
        apart = self._divergence(goal, found, wanted) if goal.kind == "kl" else _relative(goal, found, wanted)
        if labels is None or self.label_share == 0 or not goal.classes:
            return apart
        of_labels = functional.cross_entropy(scores(found, goal.probabilities), labels)
        return (1 - self.label_share) * apart + self.label_share * of_labels

    def _divergence(self, goal: Goal, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        student, teacher = (
            functional.log_softmax(scores(value, goal.probabilities) / self.temperature, 1) for value in (found, wanted)
        )
        return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * self.temperature**2


def _relative(goal: Goal, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found - wanted).square().sum() / (len(found) if found.ndim else 1) / goal.scale


def scores(values: torch.Tensor, probabilities: bool) -> torch.Tensor:
    """Return what softmax makes probabilities of."""
    return values.clamp_min(LEAST).log() if probabilities else values
