"""From a layer and its statistics to a solver's problem, its error curve, and back to factors of the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from onnx_lrs.calibration.capture import Statistic, has_few_columns, is_wide
from onnx_lrs.graph.forms import is_in_parts, stored_entries
from onnx_lrs.graph.layers import Layer, bias_row, weight_matrix
from onnx_lrs.graph.model import View, takes_sparse
from onnx_lrs.graph.weights import Scratch
from onnx_lrs.planning.sensitivity import Probe, kind_of, probes_of
from onnx_lrs.solvers import METHODS, Candidate, Moments, Problem, Settings, Solution, Status, curve, fit
from onnx_lrs.solvers.activation import LINEAR
from onnx_lrs.solvers.behind import activation_error, plain, response_norm, without_offset
from onnx_lrs.solvers.problem import AnyFactors, ElementFactors, Factors, SpatialFactors, TuckerFactors, judged
from onnx_lrs.solvers.problem import Budget as LayerBudget
from onnx_lrs.solvers.spectral import choose_damping

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
    ``damping`` is that of a refit in the cascade.
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
class Question:
    """A layer as a solver sees it, picklable: ``method`` is None if none can take it; ``shape`` as stored."""

    method: str | None
    problem: Problem
    settings: Settings
    multiple: int
    shape: tuple[int, int]
    takes_sparse: bool


def candidates_of(question: Question) -> list[Candidate]:
    """Return the candidates that the file can hold and that no other of their form beats in parameters and loss."""
    if question.method is None:
        return []
    found = curve(question.problem, question.method, question.multiple, question.settings, each_form=True)
    shape, sparse = question.shape, question.takes_sparse
    return [c for c in found if not c.elements or is_in_parts(c.rank, c.elements, shape, sparse)]


def candidates_and_probes(question: Question) -> tuple[list[Candidate], list[Probe]]:
    """Return the candidates and, fitted quickly, those that are put into the network to see what their errors mean."""
    found = candidates_of(question)
    quick = dataclasses.replace(question, settings=dataclasses.replace(question.settings, steps=0))
    probes = []
    for probe in probes_of(found) if question.problem.moments is not None else ():
        factors = solution_of(quick, probe).factors
        assert factors is not None  # a candidate saves parameters
        probes.append((kind_of(probe.form), probe.loss, factors))
    return found, probes


def solution_of(question: Question, chosen: Candidate) -> Solution:
    """Return the solution for a candidate."""
    assert question.method is not None  # a layer without a method has no candidates to choose
    if np.isnan(chosen.damping):  # a plan written by hand
        chosen = dataclasses.replace(chosen, damping=choose_damping(question.problem))
    return fit(question.problem, chosen, question.method, question.settings)


def solution_within(question: Question, gain: float) -> Solution | None:
    """Return the smallest solution that keeps to the gain; None for a layer that the method cannot take."""
    if question.method is None or METHODS[question.method].within_error is None:
        return None
    return METHODS[question.method](question.problem, LayerBudget(gain=gain), settings=question.settings)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Turns layers into problems: the model they come from and the settings that matter.

    ``with_columns`` says whether the method needs sampled columns besides the moments. With ``scratch`` the factors
    lie in its file, since all layers' together may be half of the model.
    """

    view: View
    method: str
    multiple: int
    memory_bytes: int
    with_columns: bool = False
    settings: Settings = dataclasses.field(default_factory=Settings)
    scratch: Scratch | None = None

    def question(self, layer: Layer, statistics: Mapping[str, Statistic]) -> Question:
        """Return the layer as its solver sees it, fitted on the FIT and judged on the SELECT statistics."""
        method, problem = self._problem(layer, statistics)
        stored = (layer.out, layer.d), takes_sparse(self.view.model)
        return Question(method, problem, self.settings, self.multiple, *stored)

    def outcome(
        self, layer: Layer, question: Question, solution: Solution | None, statistics: Mapping[str, Statistic]
    ) -> Fitted | Status:
        """Return a solution as factors of the layer, or why the layer stays dense."""
        if solution is None:
            return Status.DENSE
        found = self._fitted(layer, question.problem, solution, statistics)
        if found is None:
            return solution.status
        guaranteed = solution.allowed is not None
        return Status.DENSE if guaranteed and self._saves_nothing(layer, found.factors) else found

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
        if judge is not None and (self.in_outputs(layer) or not is_wide(layer, self.memory_bytes)):
            error = judged(problem.weight, factors, judge.moments, layer.affine)
        if judge is not None and judge.columns is not None:
            behind = activation_error(seen, factors, without_offset(judge.columns) if guaranteed else judge.columns)
        widened = self.of_layer(layer, factors)
        scale = None
        if guaranteed and seen.columns is not None:
            scale = response_norm(seen, seen.columns)
        ended = solution.status, solution.allowed, solution.error
        return Fitted(widened, error, behind, *ended, scale)

    def in_outputs(self, layer: Layer) -> bool:
        """Return whether the layer is solved in the space of its outputs: ``W x ~ U U^T (W x)``."""
        possible = self.method in LOW_RANK and self.settings.structure == "channels"
        return is_wide(layer, self.memory_bytes) and possible

    def _problem(self, layer: Layer, statistics: Mapping[str, Statistic]) -> tuple[str | None, Problem]:
        fit_on, select_on = (s.moments if s else None for s in map(statistics.get, (FIT, SELECT)))
        if self.in_outputs(layer):
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

    def of_layer(self, layer: Layer, factors: AnyFactors) -> AnyFactors:
        """Return a solution as factors of the layer, mapped from the scratch file where there is one."""
        widened = self.widened(layer, factors) if self.in_outputs(layer) else factors
        return _kept(widened, self.scratch)

    def mapped(self, factors: AnyFactors) -> AnyFactors:
        """Return the same factors, mapped from the scratch file where there is one."""
        return _kept(factors, self.scratch)

    def widened(self, layer: Layer, factors: AnyFactors) -> Factors:
        """Return factors of W from factors of the identity on its outputs."""
        assert isinstance(factors, Factors)
        right = factors.right.astype(np.float32) @ weight_matrix(self.view, layer, np.float32)
        return dataclasses.replace(factors, right=right.astype(np.float64), taps=layer.taps)


def _kept(factors: AnyFactors, scratch: Scratch | None) -> AnyFactors:
    """Return the same factors, their large arrays mapped from the scratch file."""
    if scratch is None:
        return factors
    left, right = scratch.keep(factors.left), scratch.keep(factors.right)
    if isinstance(factors, TuckerFactors):
        return dataclasses.replace(factors, left=left, right=right, outer=scratch.keep(factors.outer))
    if isinstance(factors, SpatialFactors):
        return dataclasses.replace(factors, left=left, right=right)
    if isinstance(factors, Factors):
        return dataclasses.replace(factors, left=left, right=right, sparse=scratch.keep(factors.sparse))
    s = factors.sparse
    parts = scratch.keep(s.data), scratch.keep(s.indices), scratch.keep(s.indptr)
    return dataclasses.replace(factors, left=left, right=right, sparse=scipy.sparse.csr_array(parts, shape=s.shape))
