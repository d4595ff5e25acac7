"""From a layer and its statistics to a solver's problem, its error curve, and back to factors of the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import Statistic, is_wide
from onnx_lrs.graph.layers import Layer, bias_row, weight_matrix
from onnx_lrs.graph.model import View
from onnx_lrs.solvers import Candidate, Moments, Problem, curve, fit
from onnx_lrs.solvers.behind import activation_error
from onnx_lrs.solvers.blas import threads_for
from onnx_lrs.solvers.closed_form import DATA_FREE, ROUNDS
from onnx_lrs.solvers.problem import AnyFactors, Factors, Settings, judged

KEEPS_CHANNELS = ("channels", "magnitude")  # methods without a low-rank part
BLOCK = 4096  # columns of W taken to float64 at a time, or sampled columns multiplied at a time
FIT, SELECT, JUDGE = "fit", "select", "judge"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The factors of one layer and their relative error on held-out columns (None without data).

    ``activation_error`` is ||phi(y) - phi(y')||_F / ||phi(y)||_F on the held-out columns that were sampled, phi being
    what follows the layer; None if none were. Unlike ``error`` it counts the mean of y on both sides.
    """

    factors: AnyFactors
    error: float | None
    activation_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Bench:
    """Turns layers into problems: the model they come from and the settings that matter.

    ``with_columns`` says whether the method needs sampled columns besides the moments.
    """

    view: View
    method: str
    multiple: int
    memory_bytes: int
    threads: int
    with_columns: bool = False

    def curve(self, layer: Layer, statistics: Mapping[str, Statistic]) -> list[Candidate]:
        """Return the layer's undominated candidates, losses on the SELECT moments (weights only if there are none)."""
        method, problem = self._problem(layer, statistics)
        with threads_for(problem.d, self.threads):
            return curve(problem, method, self.multiple) if method else []

    def fit(self, layer: Layer, chosen: Candidate, statistics: Mapping[str, Statistic], rounds: int = ROUNDS) -> Fitted:
        """Return the factors for a candidate, fitted on the FIT and judged on the JUDGE statistics.

        ``rounds`` bounds how often the support is chosen again.
        """
        method, problem = self._problem(layer, statistics)
        assert method is not None  # a layer without a method has no candidates to choose
        with threads_for(problem.d, self.threads):
            factors = fit(problem, chosen, method, Settings(steps=rounds)).factors
        assert factors is not None
        error = behind = None
        judge = statistics.get(JUDGE)
        if judge is not None and (self._in_outputs(layer) or not is_wide(layer, self.memory_bytes)):
            error = judged(problem.weight, factors, judge.moments, layer.affine)
        if judge is not None and judge.columns is not None:
            behind = activation_error(problem, factors, judge.columns)
        return Fitted(self._widened(layer, factors) if self._in_outputs(layer) else factors, error, behind)

    def _in_outputs(self, layer: Layer) -> bool:
        """Return whether the layer is solved in the space of its outputs: ``W x ~ U U^T (W x)``."""
        return is_wide(layer, self.memory_bytes) and self.method not in KEEPS_CHANNELS

    def _problem(self, layer: Layer, statistics: Mapping[str, Statistic]) -> tuple[str | None, Problem]:
        fit_on, select_on = (s.moments if s else None for s in map(statistics.get, (FIT, SELECT)))
        if self._in_outputs(layer):
            if fit_on is None or self.method in DATA_FREE:
                fit_on = Moments(1, np.zeros(layer.out), self._weight_gram(layer))
            return "hsvd", Problem(np.eye(layer.out), 1, fit_on, select_on, affine=layer.affine, width=layer.d)
        weight = weight_matrix(self.view, layer)
        if is_wide(layer, self.memory_bytes):
            return (None if self.method == "channels" else self.method), Problem(weight, layer.taps)
        square = len(layer.geometry.kernel) == 2 and set(layer.geometry.strides) == {1}
        kernel = (layer.geometry.kernel[0], layer.geometry.kernel[1]) if square else None
        columns, checks = (s.columns if s else None for s in map(statistics.get, (FIT, SELECT)))
        return self.method, Problem(
            weight,
            layer.taps,
            fit_on,
            select_on,
            layer.affine,
            kernel,
            bias=bias_row(self.view, layer),
            activation=layer.activation,
            columns=columns,
            checks=checks,
        )

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
