"""From a layer and its statistics to a solver's problem, its error curve, and back to factors of the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import Statistic, has_few_columns, is_wide
from onnx_lrs.calibration.pairs import PairStatistic
from onnx_lrs.graph.forms import is_in_parts, stored_entries
from onnx_lrs.graph.layers import Layer, affine_behind, bias_row, weight_matrix
from onnx_lrs.graph.model import View, takes_sparse
from onnx_lrs.solvers import METHODS, Candidate, Moments, Problem, Settings, Solution, Status, curve, fit
from onnx_lrs.solvers.activation import LINEAR
from onnx_lrs.solvers.behind import activation_error, output_error, plain, response_norm, without_offset
from onnx_lrs.solvers.blas import threads_for
from onnx_lrs.solvers.cascade import GRID, ROUNDS, refit
from onnx_lrs.solvers.problem import AnyFactors, ElementFactors, Factors, judged
from onnx_lrs.solvers.problem import Budget as LayerBudget

LOW_RANK = ("lrs", "hsvd", "svd", "admm", "greedy")  # methods that low rank alone may stand in for
BLOCK = 4096  # columns of W taken to float64 at a time, or sampled columns multiplied at a time
FIT, SELECT, JUDGE = "fit", "select", "judge"
FITTED = "fitted"  # kind of what is kept


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The factors of one layer and their relative error on held-out columns (None without data).

    ``activation_error`` is ||phi(y) - phi(y')||_F / ||phi(y)||_F on the held-out columns that were sampled, phi being
    what follows the layer; None if none were. Unlike ``error`` it counts the mean of y on both sides. ``allowed`` and
    ``reached`` are those of a guarantee, ||phi(y) - phi(y')||_F over the columns of the fit, ``scale`` ||phi(y)||_F.
    """

    factors: AnyFactors
    error: float | None
    activation_error: float | None = None
    status: Status = Status.SOLVED
    allowed: float | None = None
    reached: float | None = None
    scale: float | None = None
    damping: float | None = None


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
    settings: Settings = dataclasses.field(default_factory=Settings)

    def curve(self, layer: Layer, statistics: Mapping[str, Statistic]) -> list[Candidate]:
        """Return the layer's undominated candidates, losses on the SELECT moments (weights only if there are none)."""
        method, problem = self._problem(layer, statistics)
        with threads_for(problem.d, self.threads):
            found = curve(problem, method, self.multiple, self.settings) if method else []
        sparse = takes_sparse(self.view.model)
        shape = layer.out, layer.d
        return [c for c in found if not c.elements or is_in_parts(c.rank, c.elements, shape, sparse)]

    def fit(
        self, layer: Layer, chosen: Candidate, statistics: Mapping[str, Statistic], steps: int | None = None
    ) -> Fitted:
        """Return the factors for a candidate, fitted on the FIT and judged on the JUDGE statistics.

        ``steps`` limits the iterations in place of the settings' own limit.
        """
        method, problem = self._problem(layer, statistics)
        assert method is not None  # a layer without a method has no candidates to choose
        with threads_for(problem.d, self.threads):
            limited = self.settings if steps is None else dataclasses.replace(self.settings, steps=steps)
            solution = fit(problem, chosen, method, limited)
        fitted = self._fitted(layer, problem, solution, statistics)
        assert fitted is not None  # a candidate saves parameters
        return fitted

    def start(self, layer: Layer, chosen: Candidate, statistics: Mapping[str, Statistic]) -> AnyFactors:
        """Return what a candidate is fitted to alone, for :meth:`refit`; wide layers in the space of their outputs."""
        method, problem = self._problem(layer, statistics)
        assert method is not None  # a layer without a method has no candidates to choose
        with threads_for(problem.d, self.threads):
            factors = fit(problem, chosen, method, self.settings).factors
        assert factors is not None  # a candidate saves parameters
        return factors

    def refit(
        self, layer: Layer, start: AnyFactors, pairs: Mapping[str, PairStatistic], behind_activation: bool = True
    ) -> Fitted:
        """Return factors fitted to what the compressed network gives, from those of :meth:`start`.

        Fitted on FIT, chosen on SELECT and judged on JUDGE pairs.
        """
        problem = self._paired(layer, pairs)
        changed = METHODS[self.method].sees_data
        with threads_for(problem.d, self.threads):
            found = refit(problem, start, GRID if changed else (), ROUNDS if behind_activation else ())
        judge = pairs[JUDGE].sample
        widened = self._widened(layer, found.factors) if self._in_outputs(layer) else found.factors
        error = output_error(problem, found.factors, judge)
        behind = activation_error(problem, found.factors, judge)
        return Fitted(widened, error, behind, damping=found.damping)

    def _paired(self, layer: Layer, pairs: Mapping[str, PairStatistic]) -> Problem:
        """Return the problem of a layer behind layers that are compressed."""
        wide = self._in_outputs(layer)
        square = len(layer.geometry.kernel) == 2 and set(layer.geometry.strides) == {1}
        return Problem(
            np.eye(layer.out) if wide else weight_matrix(self.view, layer),
            1 if wide else layer.taps,
            pairs[FIT].moments,
            None,
            layer.affine,
            (layer.geometry.kernel[0], layer.geometry.kernel[1]) if square and not wide else None,
            layer.d if wide else None,
            bias=bias_row(self.view, layer),
            activation=layer.activation,
            columns=pairs[FIT].sample,
            checks=pairs[SELECT].sample,
            response=pairs[FIT].response,
            scale=affine_behind(self.view, layer)[0],
        )

    def within(self, layer: Layer, gain: float, statistics: Mapping[str, Statistic]) -> Fitted | Status:
        """Return the smallest factors that keep to the gain on the FIT columns, or why the layer stays dense."""
        method, problem = self._problem(layer, statistics)
        if method != self.method:
            return Status.DENSE
        with threads_for(problem.d, self.threads):
            solution = METHODS[method](problem, LayerBudget(gain=gain), settings=self.settings)
        found = self._fitted(layer, problem, solution, statistics)
        if found is None:
            return solution.status
        return Status.DENSE if self._saves_nothing(layer, found.factors) else found

    def _saves_nothing(self, layer: Layer, factors: AnyFactors) -> bool:
        """Return whether single entries would be stored in full all the same."""
        if not isinstance(factors, ElementFactors):
            return False
        count = int(stored_entries(factors.sparse).nnz)
        return not is_in_parts(factors.rank, count, (layer.out, layer.d), takes_sparse(self.view.model))

    def _fitted(
        self, layer: Layer, problem: Problem, solution: Solution, statistics: Mapping[str, Statistic]
    ) -> Fitted | None:
        factors = solution.factors
        if factors is None:
            return None
        if not factors.params:  # the bias alone keeps to the error; a graph needs something to multiply with
            nothing = np.zeros((problem.out, 1)), np.zeros((1, problem.d))
            none = np.zeros(0, np.int64), np.zeros((problem.out, 0))
            factors = Factors(*nothing, *none, factors.bias_shift, layer.taps)
        error = behind = None
        guaranteed = solution.allowed is not None  # in front of an activation that the guarantee does not know
        seen = plain(problem) if guaranteed else problem
        judge = statistics.get(JUDGE)
        if judge is not None and (self._in_outputs(layer) or not is_wide(layer, self.memory_bytes)):
            error = judged(problem.weight, factors, judge.moments, layer.affine)
        if judge is not None and judge.columns is not None:
            behind = activation_error(seen, factors, without_offset(judge.columns) if guaranteed else judge.columns)
        widened = self._widened(layer, factors) if self._in_outputs(layer) else factors
        scale = None
        if guaranteed and seen.columns is not None:
            scale = response_norm(seen, seen.columns)
        return Fitted(widened, error, behind, solution.status, solution.allowed, solution.error, scale)

    def _in_outputs(self, layer: Layer) -> bool:
        """Return whether the layer is solved in the space of its outputs: ``W x ~ U U^T (W x)``."""
        possible = self.method in LOW_RANK and self.settings.structure == "channels"
        return is_wide(layer, self.memory_bytes) and possible

    def _problem(self, layer: Layer, statistics: Mapping[str, Statistic]) -> tuple[str | None, Problem]:
        fit_on, select_on = (s.moments if s else None for s in map(statistics.get, (FIT, SELECT)))
        if self._in_outputs(layer):
            if fit_on is None or not METHODS[self.method].sees_data:
                fit_on = Moments(1, np.zeros(layer.out), self._weight_gram(layer))
            return "hsvd", Problem(np.eye(layer.out), 1, fit_on, select_on, affine=layer.affine, width=layer.d)
        weight = weight_matrix(self.view, layer)
        if is_wide(layer, self.memory_bytes):
            return (None if METHODS[self.method].sees_data else self.method), Problem(weight, layer.taps)
        if layer.op == "Conv" and METHODS[self.method].fully_connected_only:
            return None, Problem(weight, layer.taps)
        if self.with_columns and fit_on is not None and has_few_columns(layer, self.memory_bytes):
            return None, Problem(weight, layer.taps)  # hardly a column would fit into memory
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
            activation=layer.activation if layer.behind.total in ("", layer.output) else LINEAR,
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
