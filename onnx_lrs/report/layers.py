"""What became of each layer, as the report tells it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.subject import Subject
from onnx_lrs.graph.forms import element_params, is_in_parts, stored_entries
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.model import takes_sparse
from onnx_lrs.graph.rewrite import Rewritten, take_rows
from onnx_lrs.planning.course import Outcome
from onnx_lrs.planning.prices import Plan, macs_of
from onnx_lrs.report.result import (
    CurvePoint,
    Form,
    LayerResult,
    SkippedLayer,
)
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.closed_form import form_of
from onnx_lrs.solvers.problem import AnyFactors, ElementFactors, SpatialFactors, TuckerFactors, spread
from onnx_lrs.solvers.solve import undominated

POINTS = 12  # of a form in a layer's curve, those of few parameters closer together


def layer_results(subject: Subject, rewritten: Rewritten, outcome: Outcome, known: bool) -> tuple[LayerResult, ...]:
    """Return what became of each layer; ``known`` says whether there are samples that errors were measured on."""
    kept = rewritten.kept_outputs
    found = tuple(_layer_result(subject, layer, kept.get(layer.node), outcome, known) for layer in subject.layers)
    if outcome.timing is None:
        return found
    timed = outcome.timing.layers_ms(Plan({}) if not outcome.fitted or outcome.plan is None else outcome.plan)
    pairs = zip(subject.layers, found, strict=True)
    return tuple(
        dataclasses.replace(each, latency_before_ms=timed[la.node][0], latency_after_ms=timed[la.node][1])
        for la, each in pairs
    )


def _layer_result(
    subject: Subject, layer: Layer, outputs: NDArray[np.int64] | None, outcome: Outcome, known: bool
) -> LayerResult:
    done = outcome.fitted.get(layer.node)
    macs = subject.macs[layer.node]
    kept_outputs = layer.out if outputs is None else len(outputs)
    factors = done.factors if done else None
    if isinstance(factors, ElementFactors) and outputs is not None:
        factors = take_rows(factors, outputs)  # which rows the entries lie in is known only now
    form, rank, kept = _describe(factors)
    params = _params(subject, layer, factors, outputs)
    low_rank, sparse = _parts(subject, factors, params, kept_outputs)
    return LayerResult(
        name=layer.name,
        op=layer.op,
        shape=layer.weight_shape,
        form=form,
        rank=rank,
        kept_channels=kept,
        elements=int(stored_entries(factors.sparse).nnz) if isinstance(factors, ElementFactors) else 0,
        channels=layer.channels,
        outputs=layer.out,
        kept_outputs=kept_outputs,
        params_before=layer.params,
        params_after=params,
        macs_before=macs,
        macs_after=_macs_after(subject, layer, factors, outputs, params),
        error=done.error if done else (0.0 if known else None),
        activation_error=done.activation_error if done else None,
        allowed_error=done.allowed / done.scale if done and done.allowed is not None and done.scale else None,
        reached_error=done.reached / done.scale if done and done.reached is not None and done.scale else None,
        status=done.status.name.lower() if done else "dense",
        activation=layer.behind.label,
        damping=done.damping if done else None,
        inner_rank=factors.inner if isinstance(factors, TuckerFactors) else 0,
        low_rank_params=low_rank,
        sparse_params=sparse,
    )


def _describe(factors: AnyFactors | None) -> tuple[Form, int, int]:
    """Return form, rank and number of kept channels."""
    if factors is None:
        return "dense", 0, 0
    if isinstance(factors, SpatialFactors):
        chain: Form = factors.form  # type: ignore[assignment]
        return chain, factors.rank, 0
    if isinstance(factors, ElementFactors):
        return "low-rank + elements" if factors.rank else "elements", factors.rank, 0
    form: Form = form_of(factors.rank, len(factors.kept))  # type: ignore[assignment]
    return form, factors.rank, len(factors.kept)


def _macs_after(
    subject: Subject, layer: Layer, factors: AnyFactors | None, outputs: NDArray[np.int64] | None, params: int
) -> int:
    """Return the layer's cost after rewriting; one with single elements runs dense."""
    macs = subject.macs[layer.node]
    if isinstance(factors, ElementFactors):
        return macs if outputs is None else macs // layer.out * len(outputs)
    if factors is None and outputs is None:
        return macs
    form, rank, _ = _describe(factors)
    first = factors.inner if isinstance(factors, SpatialFactors) else rank
    return macs_of(subject, layer, form, first, params)


def _params(subject: Subject, layer: Layer, factors: AnyFactors | None, outputs: NDArray[np.int64] | None) -> int:
    """Return the layer's weights after rewriting; rows that went are not counted."""
    if isinstance(factors, ElementFactors):
        entries = stored_entries(factors.sparse)
        return element_params(factors.rank, int(entries.nnz), entries.shape, takes_sparse(subject.folded))
    share = 0 if outputs is None else layer.out - len(outputs)
    if factors is None:
        return layer.params - share * layer.d
    if isinstance(factors, SpatialFactors):
        return factors.params - share * int(factors.last[0].size)
    return factors.params - share * (factors.rank + int(factors.sparse.shape[1]))


def _parts(subject: Subject, factors: AnyFactors | None, params: int, outputs: int) -> tuple[int, int]:
    """Return which of a layer's ``params`` weights are low-rank, and which kept channels or single entries."""
    if factors is None:
        return 0, 0
    if isinstance(factors, ElementFactors):
        entries = stored_entries(factors.sparse)
        stored = is_in_parts(factors.rank, int(entries.nnz), entries.shape, takes_sparse(subject.folded))
        return (params - int(entries.nnz), int(entries.nnz)) if stored else (0, 0)
    sparse = 0 if isinstance(factors, SpatialFactors) else outputs * int(factors.sparse.shape[1])
    return params - sparse, sparse


def with_curves(subject: Subject, layers: Sequence[LayerResult], outcome: Outcome) -> tuple[LayerResult, ...]:
    """Return the layers with what each was offered, and what the plan took of it."""
    pairs = zip(subject.layers, layers, strict=True)
    chosen = {} if outcome.plan is None else outcome.plan.chosen
    return tuple(
        dataclasses.replace(found, curve=_curve(outcome.curves.get(la.node, ()), chosen.get(la.node)))
        for la, found in pairs
    )


def _curve(candidates: Sequence[Candidate], chosen: Candidate | None) -> tuple[CurvePoint, ...]:
    """Return the undominated points of each form, a few of them; the chosen one is there in any case."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.form, []).append(candidate)
    found = [_point(c, False) for group in groups.values() for c in spread(undominated(group), POINTS)]
    if chosen is not None and candidates:
        own = _point(chosen, True)
        found = [own, *(point for point in found if dataclasses.replace(point, chosen=True) != own)]
    return tuple(sorted(found, key=lambda point: (point.form, point.params, point.error)))


def _point(candidate: Candidate, chosen: bool) -> CurvePoint:
    form: Form = candidate.form  # type: ignore[assignment]
    error = math.sqrt(max(candidate.loss, 0.0))
    kept = len(candidate.support)
    return CurvePoint(form, candidate.rank, kept, candidate.elements, candidate.params, error, chosen)


def skipped_layers(subject: Subject) -> tuple[SkippedLayer, ...]:
    """Return the layers that could not be compressed, each with its reason."""
    return tuple(
        SkippedLayer(s.name, s.op, s.params, subject.macs.get(s.node or "", 0), s.reason) for s in subject.skipped
    )
