"""Which layer becomes what: error curves of all layers, then the exact knapsack over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from onnx_lrs.calibration.capture import Capture, Roles, groups
from onnx_lrs.calibration.subject import Subject
from onnx_lrs.config import Budget
from onnx_lrs.errors import BudgetError
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.model import weight_count
from onnx_lrs.planning.allocate import Choice, allocate
from onnx_lrs.planning.candidates import Bench
from onnx_lrs.progress import Progress
from onnx_lrs.solvers import Candidate

Curves = Mapping[str, Sequence[Candidate]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The candidate chosen for each layer that is compressed, by node; the others stay dense."""

    chosen: Mapping[str, Candidate]


def error_curves(
    subject: Subject, bench: Bench, capture: Capture | None, roles: Roles, progress: Progress
) -> dict[str, list[Candidate]]:
    """Return every layer's candidates; statistics are captured group by group and dropped after use."""
    found: dict[str, list[Candidate]] = {}
    for group in groups(subject.layers, len(roles), bench.memory_bytes):
        moments = capture.moments(group, roles, progress) if capture else {}
        for layer in group:
            found[layer.node] = bench.curve(layer, moments.pop(layer.node, {}))
            progress.step(layer.name)
    return found


def make_plan(subject: Subject, curves: Curves, budget: Budget) -> Plan:
    """Choose one candidate for each layer so that the whole model keeps to the budget at the least total loss.

    Raises
    ------
    BudgetError
        If even the smallest candidates exceed it; names what can be reached.
    """
    layers = [layer for layer in subject.layers if curves[layer.node]]
    choices = [_choices(subject, layer, curves[layer.node], budget) for layer in layers]
    before = subject.params if budget.kind == "params" else sum(subject.macs.values())
    now = weight_count(subject.folded) if budget.kind == "params" else before
    fixed = now - sum(options[0].cost for options in choices)
    chosen = allocate(choices, int(budget.fraction * before) - fixed)
    if chosen is None:
        smallest = fixed + sum(min(c.cost for c in options) for options in choices)
        raise BudgetError(
            f"--{budget.kind} {budget.fraction} cannot be reached: the smallest candidates of the {len(layers)} layers "
            f"that can be compressed leave {smallest / before:.3f} of the {budget.kind}.",
            f"Allow at least --{budget.kind} {smallest / before + 0.001:.3f}, or a smaller --multiple.",
        )
    pairs = zip(layers, chosen, strict=True)
    return Plan({layer.node: curves[layer.node][index - 1] for layer, index in pairs if index > 0})


def _choices(subject: Subject, layer: Layer, candidates: Sequence[Candidate], budget: Budget) -> list[Choice]:
    """Return the layer's choices, dense first, each with its cost in the budget's unit."""
    if budget.kind == "macs":
        positions = subject.macs[layer.node] // layer.params
        return [Choice(subject.macs[layer.node], 0.0), *(Choice(c.params * positions, c.loss) for c in candidates)]
    new_bias = layer.out if layer.bias is None and layer.affine else 0
    return [Choice(layer.params, 0.0), *(Choice(c.params + new_bias, c.loss) for c in candidates)]
