"""From a layer and its moments to a solver's problem, its error curve, and back to factors of the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import is_wide
from onnx_lrs.graph.layers import Layer, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.solvers import Candidate, Moments, Problem, curve, fit
from onnx_lrs.solvers.blas import threads_for
from onnx_lrs.solvers.closed_form import DATA_FREE
from onnx_lrs.solvers.problem import AnyFactors, Factors, judged

FIT, SELECT, JUDGE = "fit", "select", "judge"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The factors of one layer and their relative error on held-out columns (None without data)."""

    factors: AnyFactors
    error: float | None


@dataclasses.dataclass(frozen=True)
class Bench:
    """Turns layers into problems: the model they come from and the settings that matter."""

    view: View
    method: str
    multiple: int
    memory_bytes: int
    threads: int

    def curve(self, layer: Layer, moments: Mapping[str, Moments]) -> list[Candidate]:
        """Return the layer's undominated candidates, losses on the SELECT moments (weights only if there are none)."""
        method, problem = self._problem(layer, moments)
        with threads_for(problem.d, self.threads):
            return curve(problem, method, self.multiple) if method else []

    def fit(self, layer: Layer, chosen: Candidate, moments: Mapping[str, Moments]) -> Fitted:
        """Return the factors for a candidate, fitted on the FIT and judged on the JUDGE moments."""
        method, problem = self._problem(layer, moments)
        assert method is not None  # a layer without a method has no candidates to choose
        with threads_for(problem.d, self.threads):
            factors = fit(problem, chosen, method).factors
        assert factors is not None
        judge = moments.get(JUDGE)
        narrow = self._in_outputs(layer, moments)
        weight = problem.weight if narrow or not self._is_wide(layer) else None
        known = judge is not None and weight is not None
        error = judged(weight, factors, judge, layer.affine) if known else None  # type: ignore[arg-type]
        return Fitted(self._widened(layer, factors) if narrow else factors, error)

    def _is_wide(self, layer: Layer) -> bool:
        return is_wide(layer, self.memory_bytes)

    def _in_outputs(self, layer: Layer, moments: Mapping[str, Moments]) -> bool:
        """Return whether the layer is solved in the space of its outputs: ``W x ~ U U^T (W x)``."""
        return bool(moments) and self._is_wide(layer) and self.method not in DATA_FREE

    def _problem(self, layer: Layer, moments: Mapping[str, Moments]) -> tuple[str | None, Problem]:
        fit_on, select_on = moments.get(FIT), moments.get(SELECT)
        if self._in_outputs(layer, moments):
            identity = np.eye(layer.out)
            problem = Problem(identity, 1, fit_on, select_on, affine=layer.affine, width=layer.d)
            return (None if self.method == "channels" else "hsvd"), problem
        if self._is_wide(layer):
            fit_on = select_on = None
        weight = weight_matrix(self.view, layer)
        square = len(layer.geometry.kernel) == 2 and set(layer.geometry.strides) == {1}
        kernel = (layer.geometry.kernel[0], layer.geometry.kernel[1]) if square else None
        return self.method, Problem(weight, layer.taps, fit_on, select_on, layer.affine, kernel)

    def _widened(self, layer: Layer, factors: AnyFactors) -> Factors:
        """Return factors of W from factors of the identity on its outputs."""
        assert isinstance(factors, Factors)
        right: NDArray[np.float64] = factors.right @ weight_matrix(self.view, layer)
        return dataclasses.replace(factors, right=right, taps=layer.taps)
