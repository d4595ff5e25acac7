"""Statistics of layers put aside between the plan and the fit, so that no pass over the data is made twice for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import Statistic
from onnx_lrs.calibration.store import Store
from onnx_lrs.solvers.moments import Moments
from onnx_lrs.solvers.problem import Columns


class Shelf:
    """Statistics by node and role; large arrays wait in a :class:`onnx_lrs.calibration.store.Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, dict[str, tuple[int, bool]]] = {}

    def put(self, node: str, statistics: Mapping[str, Statistic]) -> None:
        """Put aside what is known of a layer."""
        self._known[node] = {}
        for role, each in statistics.items():
            self._known[node][role] = each.moments.count, each.columns is not None
            parts: list[NDArray[Any]] = [each.moments.mean, each.moments.cov]
            if each.columns is not None and each.items is not None:
                parts += [each.columns.inputs, each.items]
            for number, values in enumerate(parts):
                self._store.put((node, role), number, np.ascontiguousarray(values))

    def take(self, node: str) -> dict[str, Statistic]:
        """Return what is known of a layer, and forget it."""
        found = {}
        for role, (count, sampled) in self._known.pop(node, {}).items():
            values = [np.asarray(self._store.get((node, role), number)) for number in range(4 if sampled else 2)]
            moments = Moments(count, values[0], values[1])
            found[role] = Statistic(moments, Columns(values[2]), values[3]) if sampled else Statistic(moments)
            self._store.drop((node, role))
        return found
