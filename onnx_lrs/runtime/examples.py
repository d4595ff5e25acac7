"""Which samples have another answer in the compressed model, a few of them in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.data import Samples
from onnx_lrs.report.result import ChangedAnswer, Changes

EXAMPLES = 12  # of an output
Scores = NDArray[np.float64]


class Changed:
    """Collects the samples of one output whose largest class changed; memory holds the examples only."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._changed = self._lost = self._won = 0
        self._labelled = False
        self._kept: list[tuple[bool, float, ChangedAnswer]] = []  # lost, by how much it was preferred, the answer

    def add(self, x: Scores, y: Scores, labels: NDArray[np.int64] | None, rows: NDArray[np.int64]) -> None:
        """Take in the scores of the original (x) and of the compressed model (y), both (n, classes).

        ``rows`` are the numbers of the samples, ``labels`` their true classes.
        """
        first, second = x.argmax(axis=1), y.argmax(axis=1)
        changed = np.flatnonzero(first != second)
        self._changed += len(changed)
        self._labelled |= labels is not None
        lost = np.zeros(len(x), bool)
        if labels is not None:
            lost = (first == labels) & (second != labels)
            self._lost += int(lost.sum())
            self._won += int(((first != labels) & (second == labels)).sum())
        margins = x[changed, first[changed]] - x[changed, second[changed]]
        order = np.lexsort((rows[changed], -margins, ~lost[changed]))[:EXAMPLES]
        for i, margin in zip(changed[order], margins[order], strict=True):
            pair = [int(first[i]), int(second[i])]
            answer = ChangedAnswer(
                sample=int(rows[i]),
                name="",
                before=pair[0],
                after=pair[1],
                label=None if labels is None else int(labels[i]),
                before_scores=(float(x[i, pair[0]]), float(x[i, pair[1]])),
                after_scores=(float(y[i, pair[0]]), float(y[i, pair[1]])),
            )
            self._kept.append((bool(lost[i]), float(margin), answer))
        self._kept = sorted(self._kept, key=lambda one: (not one[0], -one[1], one[2].sample))[:EXAMPLES]

    def changes(self) -> Changes:
        """Return what was found."""
        lost, won = (self._lost, self._won) if self._labelled else (None, None)
        return Changes(self._output, self._changed, lost, won, tuple(answer for *_, answer in self._kept))


def told(
    changes: Sequence[Changes], samples: Samples, labels: NDArray[np.int64] | None, pictures: bool
) -> tuple[Changes, ...]:
    """Return changes with the names of samples and classes and, where ``pictures`` says so, with thumbnails.

    Classes have names where the labels are those of the class sub-folders.
    """
    names = samples.class_names if labels is not None and labels is samples.labels else ()
    starts = np.concatenate([[0], np.cumsum([samples.rows(i) for i in range(len(samples))])])

    def named(answer: ChangedAnswer) -> ChangedAnswer:
        item = int(np.searchsorted(starts, answer.sample, side="right")) - 1
        return dataclasses.replace(
            answer,
            name=samples.name_of(answer.sample),
            before_text=_name(names, answer.before),
            after_text=_name(names, answer.after),
            label_text=_name(names, answer.label),
            thumbnail=samples.thumbnail(item, answer.sample - int(starts[item])) if pictures else b"",
        )

    return tuple(dataclasses.replace(one, examples=tuple(map(named, one.examples))) for one in changes)


def _name(names: Sequence[str], number: int | None) -> str:
    return names[number] if number is not None and number < len(names) else ""
