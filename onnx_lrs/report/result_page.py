"""What the page of a run shows, made of its record alone: figures as texts, lengths of bars as shares, plots as SVG."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnx_lrs.report import words
from onnx_lrs.report.tolerances import ROUNDING, SLOWER

if TYPE_CHECKING:
    from markupsafe import Markup

    from onnx_lrs.report.result import ChangedAnswer, Changes, LayerResult, OutputQuality, Pareto, Result

MOST_ROWS = 200  # of a table; the JSON holds all
MOST_PLOTS = 40
MOST_OUTPUTS = 50
MOST_EXAMPLES = 48  # of all outputs together: each may bring a picture


@dataclasses.dataclass(frozen=True)
class Total:
    """One figure of the whole model before and after; ``share`` is what is left, at most 1 of a bar's length."""

    name: str
    before: str
    after: str
    change: str
    share: float | None


@dataclasses.dataclass(frozen=True)
class Wish:
    """A limit that was asked for, what was reached, and whether that keeps to it; "" where that is not known."""

    what: str
    limit: str
    reached: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer: texts, and the shares of its own weights, latency and of the largest error that bars show."""

    name: str
    weight: str
    form: str
    params: str
    of_model: str
    dense: float
    low_rank: float
    sparse: float
    latency: str
    latency_share: float | None
    error: str
    error_share: float


@dataclasses.dataclass(frozen=True)
class CurvePlot:
    """The error curve of one layer, and what became of it in words."""

    name: str
    caption: str
    svg: Markup


def content(result: Result) -> dict[str, Any]:
    """Return what the template of a run's page needs, a section a key; one that has nothing to tell is empty."""
    return {
        "title": _title(result),
        "result": result,
        "state": _state(result),
        "totals": list(_totals(result)),
        "wishes": list(_wishes(result)),
        "machine": machine(result.settings, result.environment),
        "ways": words.ways(result.variants) if result.variants else (),
        "quality": result.quality[:MOST_OUTPUTS] if result.quality else (),
        "no_quality": _no_quality(result),
        "before_training": result.refined.before[:MOST_OUTPUTS] if result.refined else (),
        "changes": changes_of(result.changes or ()),
        "layers": _layers(result),
        "more_layers": max(len(result.layers) - MOST_ROWS, 0),
        "timed": any(layer.latency_before_ms is not None for layer in result.layers),
        **_curves(result),
        **_planned(result),
        "skipped": result.skipped[:MOST_ROWS],
        "more_skipped": max(len(result.skipped) - MOST_ROWS, 0),
        "more_outputs": max(len(result.quality or ()) - MOST_OUTPUTS, 0),
        "measure": words.measure_of(result.search),
        "reasons": _reasons(result),
        "settings": list(flat(result.settings)),
        "environment": list(flat(result.environment)),
        "effort": _effort(result),
        "optimised": _optimised(result),
        "guarantee": _guarantee(result),
        "accuracy": accuracy,
        "words": words,
    }


def _title(result: Result) -> str:
    name = result.output or result.input or "a model in memory"
    return f"{'Plan for' if result.dry_run else 'Report on'} {name}"


def _state(result: Result) -> str:
    """Return what happened, in one sentence."""
    if result.dry_run:
        return "A dry run: a plan was made and no model written. Errors are those that the plan counts with."
    if result.unchanged:
        kept = f"{result.output} is the original" if result.output else "The original was kept"
        return f"Nothing pays: {result.unchanged}. {kept}."
    return f"Wrote {result.output}." if result.output else "No file was asked for; the model was handed to the caller."


def _totals(result: Result) -> Iterator[Total]:
    before, after, ratio = result.before, result.after, result.ratio
    counts = words.count(before.params), words.count(after.params)
    yield Total("Parameters", *counts, words.change(ratio.params, "smaller", "larger"), _inverse(ratio.params))
    counts = words.count(before.macs), words.count(after.macs)
    yield Total("Multiply-accumulates", *counts, words.change(ratio.macs, "fewer", "more"), _inverse(ratio.macs))
    sizes = words.byte_count(before.file_bytes), words.byte_count(after.file_bytes)
    yield Total("File size", *sizes, words.change(ratio.file_bytes, "smaller", "larger"), _inverse(ratio.file_bytes))
    times = words.milliseconds(before.latency_ms), words.milliseconds(after.latency_ms)
    speed = "not measured" if ratio.latency_ms is None else words.change(ratio.latency_ms, "faster", "slower")
    yield Total("Latency", *times, speed, _inverse(ratio.latency_ms))


def _inverse(ratio: float | None) -> float | None:
    return 1 / ratio if words.is_known(ratio) and ratio > 0 else None


def _share(before: float | None, after: float | None) -> float | None:
    """Return after / before; as the budget is checked, and not the inverse of a ratio, which is rounded twice."""
    return after / before if words.is_known(before) and words.is_known(after) and before > 0 else None


def _wishes(result: Result) -> Iterator[Wish]:
    """Yield each limit of the budget with what was reached."""
    budget: Mapping[str, float | None] = result.settings.get("budget") or {}
    before, after = result.before, result.after
    left = {
        "latency": _share(before.latency_ms, after.latency_ms),
        "params": _share(before.params, after.params),
        "macs": _share(before.macs, after.macs),
        "size": _share(before.file_bytes, after.file_bytes),
    }
    for kind, share in left.items():
        limit = budget.get(kind)
        if limit is not None:
            slack = SLOWER if kind == "latency" else 1.0
            met = "" if share is None else "met" if share <= limit * slack else "missed"
            if kind == "latency" and result.predicted_on:  # the limit is another device's
                met = ""
            yield Wish(f"{words.COSTS[kind]} left", f"at most {words.percent(limit)}", words.percent(share), met)
    if budget.get("max_drop") is not None:
        yield _drop_wish(result, budget["max_drop"])
    if budget.get("gain") is not None:
        yield _gain_wish(result, budget["gain"])
    if not budget and result.settings.get("plan"):
        yield Wish("plan", str(result.settings["plan"]), "carried out", "met")


def _drop_wish(result: Result, limit: float | None) -> Wish:
    if result.unchanged:  # what was handed out is the original
        return Wish("quality lost", f"at most {words.percent(limit)}", words.percent(0.0), "met")
    last = next((step for step in reversed(result.search) if step.fit == "confirm"), None)
    if last is None:
        return Wish("quality lost", f"at most {words.percent(limit)}", words.UNKNOWN, "missed" if result.search else "")
    met = "met" if last.held else "missed"
    return Wish(f"{last.measure} lost", f"at most {words.percent(limit)}", words.percent(last.drop), met)


def _gain_wish(result: Result, limit: float | None) -> Wish:
    pairs = [(layer.allowed_error, layer.reached_error) for layer in result.layers]
    known = [(allowed, reached) for allowed, reached in pairs if words.is_known(allowed) and words.is_known(reached)]
    held = all(reached <= allowed * (1 + ROUNDING) for allowed, reached in known)
    largest = max((reached for _, reached in known), default=None)
    met = ("met" if held else "missed") if known else ""
    return Wish("error of each layer", f"at most {words.percent(limit)}", words.percent(largest), met)


def machine(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return where and how it was measured, as far as the record tells."""
    threads, batch = settings.get("threads"), settings.get("batch", 1)
    parts = [environment.get("cpu"), environment.get("provider")]
    parts += [f"{threads} thread{'' if threads == 1 else 's'}" if threads is not None else None, f"batch {batch}"]
    return ", ".join(str(part) for part in parts if part)


def _no_quality(result: Result) -> str:
    """Return why there is no word on quality; empty where there is."""
    if result.quality:
        return ""
    if result.dry_run or result.unchanged:
        return "a dry run" if result.dry_run else "nothing was changed"
    return "there was no calibration data" if result.quality is None else "the model has no floating-point output"


def changes_of(changes: Sequence[Changes]) -> list[dict[str, Any]]:
    """Return what changed of each output in words, with examples as long as there is room."""
    found, room = [], MOST_EXAMPLES
    for one in changes[:MOST_OUTPUTS]:
        examples = [_example(answer) for answer in one.examples[:room]]
        room -= len(examples)
        found.append({"output": one.output, "said": _said(one), "examples": examples})
    return found


def _said(changes: Changes) -> str:
    if not changes.changed:
        return "No answer changed."
    text = f"{changes.changed} answer{' has' if changes.changed == 1 else 's have'} changed"
    if changes.lost is None or changes.won is None:
        return f"{text}."
    rest = changes.changed - changes.lost - changes.won
    return (
        f"{text}: {changes.lost} right before and wrong now, {changes.won} wrong before and right now, "
        f"{rest} wrong both times."
    )


def _example(answer: ChangedAnswer) -> dict[str, Any]:
    def named(number: int | None, text: str) -> str:
        if number is None:
            return ""
        return f"{text} ({number})" if text else str(number)

    return {
        "sample": answer.name or f"sample {answer.sample}",
        "before": named(answer.before, answer.before_text),
        "after": named(answer.after, answer.after_text),
        "label": named(answer.label, answer.label_text),
        "outcome": _outcome(answer),
        "scores": [
            ("original", *(_score(value) for value in answer.before_scores)),
            ("compressed", *(_score(value) for value in answer.after_scores)),
        ],
        "thumbnail": answer.thumbnail,
    }


def _outcome(answer: ChangedAnswer) -> str:
    if answer.label is None:
        return ""
    if answer.label == answer.before:
        return "lost"
    return "won" if answer.label == answer.after else "wrong both times"


def _score(value: float | None) -> str:
    return f"{value:.3g}" if words.is_known(value) else words.UNKNOWN


def _largest(layers: Sequence[LayerResult], most: int) -> list[LayerResult]:
    """Return the layers with the most weights, in the model's order."""
    order = sorted(range(len(layers)), key=lambda i: -layers[i].params_before)[:most]
    return [layers[i] for i in sorted(order)]


def _layers(result: Result) -> list[LayerRow]:
    shown = _largest(result.layers, MOST_ROWS)
    errors = [error for layer in shown if words.is_known(error := words.error(layer))]
    return [_layer_row(layer, max(result.before.params, 1), max(errors, default=0.0)) for layer in shown]


def _layer_row(layer: LayerResult, whole: int, worst: float) -> LayerRow:
    before, error = max(layer.params_before, 1), words.error(layer)
    dense = layer.params_after - layer.low_rank_params - layer.sparse_params
    took = layer.latency_before_ms, layer.latency_after_ms
    known = words.is_known(took[0]) and words.is_known(took[1]) and took[0] > 0
    return LayerRow(
        name=layer.name,
        weight=words.weight(layer.op, layer.shape),
        form=words.form(layer),
        params=f"{words.count(layer.params_before)} → {words.count(layer.params_after)}",
        of_model=words.percent(layer.params_before / whole),
        dense=max(dense, 0) / before,
        low_rank=layer.low_rank_params / before,
        sparse=layer.sparse_params / before,
        latency=f"{words.milliseconds(took[0])} → {words.milliseconds(took[1])}" if known else "",
        latency_share=took[1] / took[0] if known and took[0] and took[1] is not None else None,
        error=words.percent(error),
        error_share=error / worst if words.is_known(error) and worst > 0 else 0.0,
    )


def _curves(result: Result) -> dict[str, Any]:
    """Return the plots of the largest layers' error curves, their legend, and how many more there are."""
    from onnx_lrs.report import plots

    known = [layer for layer in result.layers if layer.curve]
    shown = _largest(known, MOST_PLOTS)
    forms = sorted({point.form for layer in shown for point in layer.curve})
    return {
        "curves": [CurvePlot(la.name, _caption(la), plots.curve(la, f"curve {i}")) for i, la in enumerate(shown)],
        "legend": [(form, plots.ink(form), plots.dashes(form)) for form in forms],
        "more_curves": len(known) - len(shown),
    }


def _caption(layer: LayerResult) -> str:
    chosen = next((point for point in layer.curve if point.chosen), None)
    if chosen is None:
        return "left as it was"
    kept = chosen.params / max(layer.params_before, 1)
    return f"{words.form(layer)}: {words.percent(kept)} of its weights, error {words.percent(chosen.error)}"


def _planned(result: Result) -> dict[str, Any]:
    """Return the plots of what other budgets would have cost, and of the search."""
    from onnx_lrs.report import plots

    found, limit = result.pareto, (result.settings.get("budget") or {}).get("max_drop")
    drawn = found is not None and sum(words.is_known(p.loss) and p.loss > 0 for p in found.points) > 1
    return {
        "pareto": plots.pareto(found) if found is not None and drawn else "",
        "pareto_rows": [] if found is None else _pareto_rows(found),
        "cost": "" if found is None else words.COSTS[found.kind],
        "search": plots.search(result.search, limit) if result.search else "",
    }


def _pareto_rows(found: Pareto) -> list[tuple[str, str, str, bool]]:
    """Return about ten of the plans in figures: cost, loss, layers, whether it is the one of this run."""
    step = max(len(found.points) // 10, 1)
    shown = [p for i, p in enumerate(found.points) if i % step == 0 or i == len(found.points) - 1]
    if found.chosen is not None and found.chosen not in shown:
        shown = sorted([*shown, found.chosen], key=lambda p: p.fraction)
    return [(words.percent(p.fraction), _score(p.loss), str(p.layers), p == found.chosen) for p in shown]


def _optimised(result: Result) -> list[tuple[str, int, int]]:
    """Return what ONNX Runtime made of both graphs, in counts; those that are zero twice are left out."""
    if result.optimised is None:
        return []
    before, after = result.optimised.before, result.optimised.after
    counts = [
        ("nodes", sum(before.ops.values()), sum(after.ops.values())),
        ("Conv", before.convs, after.convs),
        ("Conv in NCHWc", before.nchwc, after.nchwc),
        ("reorders", before.reorders, after.reorders),
        ("activations fused into a layer", before.activations, after.activations),
        ("activations on their own", len(before.unfused_activations), len(after.unfused_activations)),
        ("sums fused into a Conv", before.sums, after.sums),
        ("sums on their own", len(before.unfused_sums), len(after.unfused_sums)),
        ("copies to or from the CPU", before.copies, after.copies),
        ("nodes left to the CPU", len(before.elsewhere or ()), len(after.elsewhere or ())),
    ]
    return [(name, one, other) for name, one, other in counts if one or other]


def _guarantee(result: Result) -> str:
    """Return what the guarantees of the layers promise together; empty where they do not."""
    found = result.certificate
    if found is None:
        return ""
    layers = ", ".join(words.shortened(name, 40) for name in found.layers[:8])
    more = f" and {len(found.layers) - 8} more" if len(found.layers) > 8 else ""
    return (
        f"Output {words.shortened(found.output, 90)} behind {layers}{more} is off by at most "
        f"{words.percent(found.bound)} on {found.samples} calibration samples; measured "
        f"{words.percent(found.measured)}. That says nothing of other samples."
    )


def _reasons(result: Result) -> list[tuple[str, int, str]]:
    """Return why layers were left as they were, how many, and their weights."""
    counts = collections.Counter(layer.reason for layer in result.skipped)
    params: collections.Counter[str] = collections.Counter()
    for layer in result.skipped:
        params[layer.reason] += layer.params
    return [(reason, count, words.count(params[reason])) for reason, count in counts.most_common(MOST_ROWS)]


def flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names and values of nested settings; what was not set is left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        elif value is not None and value not in ((), []):
            yield f"{above}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _effort(result: Result) -> list[tuple[str, str]]:
    """Return what the run took."""
    found = [(name, words.seconds(value)) for name, value in result.seconds.items()]
    if result.peak_memory_bytes > 0:
        found.append(("peak memory", words.byte_count(result.peak_memory_bytes)))
    return found


def accuracy(quality: OutputQuality) -> str:
    """Return the accuracies before and after; empty without labels."""
    if quality.accuracy_before is None or quality.accuracy_after is None:
        return ""
    return f"{words.percent(quality.accuracy_before)} → {words.percent(quality.accuracy_after)}"
