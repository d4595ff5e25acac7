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
from onnx_lrs.solvers.closed_form import DATA_FREE, ROUNDS
from onnx_lrs.solvers.problem import AnyFactors, Factors, Settings, judged

KEEPS_CHANNELS = ("channels", "magnitude")  # methods without a low-rank part
BLOCK = 4096  # columns of W taken to float64 at a time
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

    def fit(self, layer: Layer, chosen: Candidate, moments: Mapping[str, Moments], rounds: int = ROUNDS) -> Fitted:
        """Return the factors for a candidate, fitted on the FIT and judged on the JUDGE moments.

        ``rounds`` bounds how often the support is chosen again.
        """
        method, problem = self._problem(layer, moments)
        assert method is not None  # a layer without a method has no candidates to choose
        with threads_for(problem.d, self.threads):
            factors = fit(problem, chosen, method, Settings(steps=rounds)).factors
        assert factors is not None
        judge = moments.get(JUDGE)
        comparable = self._in_outputs(layer) or not is_wide(layer, self.memory_bytes)
        error = judged(problem.weight, factors, judge, layer.affine) if judge is not None and comparable else None
        return Fitted(self._widened(layer, factors) if self._in_outputs(layer) else factors, error)

    def _in_outputs(self, layer: Layer) -> bool:
        """Return whether the layer is solved in the space of its outputs: ``W x ~ U U^T (W x)``."""
        return is_wide(layer, self.memory_bytes) and self.method not in KEEPS_CHANNELS

    def _problem(self, layer: Layer, moments: Mapping[str, Moments]) -> tuple[str | None, Problem]:
        fit_on, select_on = moments.get(FIT), moments.get(SELECT)
        if self._in_outputs(layer):
            if fit_on is None or self.method in DATA_FREE:
                fit_on = Moments(1, np.zeros(layer.out), self._weight_gram(layer))
            return "hsvd", Problem(np.eye(layer.out), 1, fit_on, select_on, affine=layer.affine, width=layer.d)
        weight = weight_matrix(self.view, layer)
        if is_wide(layer, self.memory_bytes):
            return (None if self.method == "channels" else self.method), Problem(weight, layer.taps)
        square = len(layer.geometry.kernel) == 2 and set(layer.geometry.strides) == {1}
        kernel = (layer.geometry.kernel[0], layer.geometry.kernel[1]) if square else None
        return self.method, Problem(weight, layer.taps, fit_on, select_on, layer.affine, kernel)

    def _weight_gram(self, layer: Layer) -> NDArray[np.float64]:
        """Return W W^T, (out, out): the moments of the outputs when nothing is known of the inputs."""
        weight = weight_matrix(self.view, layer, np.float32)
        gram = np.zeros((layer.out, layer.out))
        for start in range(0, layer.d, BLOCK):
            block = weight[:, start : start + BLOCK].astype(np.float64)
            gram += block @ block.T
        return gram

    def _widened(self, layer: Layer, factors: AnyFactors) -> Factors:
        """Return factors of W from factors of the identity on its outputs."""
        assert isinstance(factors, Factors)
        right = factors.right.astype(np.float32) @ weight_matrix(self.view, layer, np.float32)
        return dataclasses.replace(factors, right=right.astype(np.float64), taps=layer.taps)
