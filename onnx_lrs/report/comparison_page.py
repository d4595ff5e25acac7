"""What the page of a comparison shows, made of its record alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from onnx_lrs.report import words
from onnx_lrs.report.result_page import MOST_OUTPUTS, MOST_ROWS, accuracy, changes_of, flat

if TYPE_CHECKING:
    from onnx_lrs.report.comparison import Comparison, LayerTime, Timed

ROOM = 0.04  # of the axis of ratios, left free at both ends


@dataclasses.dataclass(frozen=True)
class Row:
    """One timing: texts, and where its ratio and the ends of its interval lie on the axis, from 0 to 1."""

    model: str
    median: str
    p90: str
    p99: str
    throughput: str
    ratio: str
    low: float
    middle: float
    high: float
    verdict: str
    said: str
    left: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The timings on one provider at one batch: ``one`` is where a ratio of 1 lies, ``ends`` what the axis ends at."""

    where: str
    rows: tuple[Row, ...]
    one: float
    ends: tuple[str, str]


def content(found: Comparison) -> dict[str, Any]:
    """Return what the template of a comparison's page needs, a section a key."""
    return {
        "title": f"Comparison with {found.models[0].name}",
        "found": found,
        "level": f"{100 * found.level:g} %",
        "groups": [_group(where, timings) for where, timings in _by_place(found.timings)],
        "judged": [
            {
                "name": model.name,
                "quality": model.quality[:MOST_OUTPUTS],
                "changes": changes_of(model.changes or ()),
            }
            for model in found.models
            if model.quality
        ],
        "names": [model.name for model in found.models],
        "layers": [_layers(where, times) for where, times in _by_place(found.layers)],
        "settings": list(flat(found.settings)),
        "environment": list(flat(found.environment)),
        "effort": [(name, words.seconds(value)) for name, value in found.seconds.items()],
        "accuracy": accuracy,
        "words": words,
    }


def _by_place(entries: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield entries by provider and batch, in their order, with what to call the place."""
    for provider, batch in dict.fromkeys((entry.provider, entry.batch) for entry in entries):
        yield f"{provider}, batch {batch}", [e for e in entries if (e.provider, e.batch) == (provider, batch)]


def _group(where: str, timings: Sequence[Timed]) -> Group:
    ends = [value for t in timings for value in (t.ratio_low, t.ratio_high) if words.is_known(value) and value > 0]
    low, high = min([1.0, *ends]), max([1.0, *ends])
    margin = ROOM * max(math.log(high / low), 0.05)
    low, high = low * math.exp(-margin), high * math.exp(margin)

    def place(value: float) -> float:
        inside = words.is_known(value) and value > 0
        return min(max(math.log(value / low) / math.log(high / low), 0.0), 1.0) if inside else 0.0

    rows = tuple(_row(timed, place(timed.ratio_low), place(timed.ratio), place(timed.ratio_high)) for timed in timings)
    return Group(where, rows, place(1.0), (f"{low:.2f}", f"{high:.2f}"))


def _row(timed: Timed, low: float, middle: float, high: float) -> Row:
    counts = ((timed.on_cuda, "on CUDA"), (timed.on_cpu, "on the CPU"), (timed.copies, "copies"))
    ratio = f"{words.number(timed.ratio, 3)} ({words.number(timed.ratio_low, 3)} – {words.number(timed.ratio_high, 3)})"
    return Row(
        model=timed.model,
        median=words.milliseconds(timed.median_ms),
        p90=words.milliseconds(timed.p90_ms),
        p99=words.milliseconds(timed.p99_ms),
        throughput=words.three_digits(timed.throughput),
        ratio="1" if timed.verdict == "first" else ratio,
        low=low,
        middle=middle,
        high=high,
        verdict=timed.verdict,
        said=words.said(timed),
        left=", ".join(f"{count} {what}" for count, what in counts if count),
    )


def _layers(where: str, times: Sequence[LayerTime]) -> dict[str, Any]:
    """Return the layers with their times and the shares of the longest that bars show, in the model's order."""
    order = sorted(range(len(times)), key=lambda i: -times[i].ms[0])[:MOST_ROWS]
    shown = [times[i] for i in sorted(order)]
    longest = max((ms for one in times for ms in one.ms), default=0.0) or 1.0
    rows = [
        {
            "name": one.layer,
            "op": one.op,
            "times": [(words.milliseconds(ms), ms / longest) for ms in one.ms],
        }
        for one in shown
    ]
    return {"where": where, "rows": rows, "more": len(times) - len(shown)}
