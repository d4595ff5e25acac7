"""Statistics of layers put aside between the plan and the fit, so that no pass over the data is made twice for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import Statistic
from onnx_lrs.calibration.store import Store
from onnx_lrs.errors import OutputError
from onnx_lrs.solvers.moments import Moments
from onnx_lrs.solvers.problem import Columns
from onnx_lrs.work import Work

KIND = "statistics"  # of what is kept


class Shelf:
    """Statistics by node and role, in the work folder; without one they wait in a store and are gone with it."""

    def __init__(self, store: Store, work: Work) -> None:
        self._store = store
        self._work = work
        self._known: dict[str, dict[str, tuple[int, bool]]] = {}

    def put(self, node: str, statistics: Mapping[str, Statistic]) -> None:
        """Put aside what is known of a layer."""
        if self._work.folder is not None:
            self._work.put(KIND, node, dict(statistics))
            return
        self._known[node] = {}
        for role, each in statistics.items():
            self._known[node][role] = each.moments.count, each.columns is not None
            parts: list[NDArray[Any]] = [each.moments.mean, each.moments.cov]
            if each.columns is not None and each.items is not None:
                parts += [each.columns.inputs, each.items]
            for number, values in enumerate(parts):
                self._store.put((node, role), number, np.ascontiguousarray(values))

    def has(self, node: str) -> bool:
        """Return whether a layer's statistics are there."""
        return node in self._known or self._work.has(KIND, node)

    def look(self, node: str) -> dict[str, Statistic]:
        """Return what is known of a layer; it stays.

        Raises
        ------
        OutputError
            If it has gone from the work folder, or was damaged, since the run began.
        """
        if self._work.folder is not None:
            kept: dict[str, Statistic] | None = self._work.get(KIND, node, mapped=True)
            if kept is None:
                raise OutputError(
                    f"The statistics of {node!r} are no longer in {self._work.folder}.",
                    "Leave the work folder alone while a run uses it; the same command makes them again.",
                )
            return kept
        found = {}
        for role, (count, sampled) in self._known.get(node, {}).items():
            values = [np.asarray(self._store.get((node, role), number)) for number in range(4 if sampled else 2)]
            moments = Moments(count, values[0], values[1])
            found[role] = Statistic(moments, Columns(values[2]), values[3]) if sampled else Statistic(moments)
        return found

    def take(self, node: str) -> dict[str, Statistic]:
        """Return what is known of a layer, and forget it; what lies in a work folder stays there.

        Raises
        ------
        OutputError
            As :meth:`look`.
        """
        found = self.look(node)
        for role in self._known.pop(node, {}):
            self._store.drop((node, role))
        return found
