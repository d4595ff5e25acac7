"""Figures and records in words, the same on the console and on a page. What is not known is a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from onnx_lrs.report.comparison import Timed
    from onnx_lrs.report.result import LayerResult, OutputQuality, SearchStep, Variant

UNKNOWN = "-"
COSTS = {"latency": "latency", "params": "parameters", "macs": "multiply-accumulates", "size": "file size"}


def printable(text: str) -> str:
    """Return a text without control characters: names come from files."""
    return "".join(char if char.isprintable() else "?" for char in text)


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters, its middle left out."""
    if len(text) <= most:
        return text
    front = (most - 1) // 2
    return f"{text[:front]}…{text[len(text) - (most - 1 - front) :]}"


def is_known(value: float | None) -> TypeGuard[float]:
    """Return whether there is a finite number."""
    return value is not None and math.isfinite(value)


def measure_of(search: Sequence[SearchStep]) -> str:
    """Return what the steps of a search lose; one whose outputs were not finite has a measure of its own."""
    known = [step for step in search if is_known(step.drop)] or list(search)
    return known[-1].measure if known else ""


def three_digits(value: float) -> str:
    """Return a number below a thousand with three digits."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def count(value: int) -> str:
    """Return a count with three digits and a decimal prefix: 431 k, 15.2 M, 1.23 G."""
    return _scaled(value, "")


def ways(variants: Sequence[Variant]) -> list[list[str]]:
    """Return a table of the ways that a model was brought into: a column each, a row a figure, names in front."""
    rows = [
        ["", *(variant.name for variant in variants)],
        ["File size", *(byte_count(variant.file_bytes) for variant in variants)],
        ["Latency", *(milliseconds(variant.latency_ms) for variant in variants)],
    ]
    for place, output in enumerate(variants[0].quality or ()):
        own = [(variant.quality or ())[place] for variant in variants]
        rows.append([f"Error, {output.name}", *(percent(q.relative_l2) for q in own)])
        for what, name in (("Top-1 same", "top1_agreement"), ("Accuracy", "accuracy_after")):
            if getattr(own[-1], name) is not None:
                rows.append([what, *(percent(getattr(q, name)) for q in own)])
    return [*rows, ["", *("handed out" if variant.chosen else "" for variant in variants)]]


def byte_count(value: int) -> str:
    """Return a size with three digits and a decimal prefix: 46.8 MB."""
    return _scaled(value, "B")


def _scaled(value: float, unit: str) -> str:
    if value < 1000:
        return f"{value:.0f} {unit}".rstrip()
    for prefix in "kMG":
        value /= 1000
        if value < 999.5:
            return f"{three_digits(value)} {prefix}{unit}"
    return f"{three_digits(value / 1000)} T{unit}"


def milliseconds(value: float | None) -> str:
    """Return a time: 12.3 ms, 0.042 ms."""
    if not is_known(value):
        return UNKNOWN
    return f"{three_digits(value)} ms" if value >= 1 else f"{value:.3f} ms"


def seconds(value: float) -> str:
    """Return a time: 9.5 s, 2 min 5 s."""
    return f"{value:.1f} s" if value < 120 else f"{int(value) // 60} min {int(value) % 60} s"


def number(value: float | None, digits: int) -> str:
    """Return a number with so many digits behind the point."""
    return f"{value:.{digits}f}" if is_known(value) else UNKNOWN


def percent(value: float | None) -> str:
    """Return a fraction: 3.12 %, <0.01 %."""
    if not is_known(value):
        return UNKNOWN
    return "<0.01 %" if 0 < value < 0.0001 else f"{100 * value:.2f} %"


def change(ratio: float | None, better: str, worse: str) -> str:
    """Return before / after in words: ``2.00x smaller``, ``1.05x slower``, ``same``."""
    if not is_known(ratio) or ratio <= 0:
        return UNKNOWN
    factor = max(ratio, 1 / ratio)
    if factor < 1.005:
        return "same"
    return f"{factor:.2f}x {better if ratio > 1 else worse}"


def weight(op: str, shape: tuple[int, ...]) -> str:
    """Return an operator with the shape of its weight: ``Conv 64x32x3x3``."""
    return f"{op} {'x'.join(map(str, shape))}".rstrip()


def form(layer: LayerResult) -> str:
    """Return the form with its figures: ``low-rank 64 + channels 120/512``, ``elements 9.30 %`` of the weight."""
    weights = layer.params_before * layer.kept_outputs / max(layer.outputs, 1)
    figures = {
        "low-rank": f" {layer.rank}",
        "spatial": f" {layer.rank}",
        "projected": f" {layer.rank}",
        "tucker": f" {layer.inner_rank}, {layer.rank}",
        "channels": f" {layer.kept_channels}/{layer.channels}",
        "elements": f" {percent(layer.elements / weights if weights else None)}",
        "dense": "",
    }
    text = " + ".join(part + figures.get(part, "") for part in layer.form.split(" + "))
    if layer.kept_outputs != layer.outputs:
        text += f", outputs {layer.kept_outputs}/{layer.outputs}"
    return text


def error(layer: LayerResult) -> float | None:
    """Return the error behind the activation where it was measured: in front of it a fit to it may look far off.

    None for a layer that was left as it is: what others in front of it do to it was not measured.
    """
    if layer.form == "dense":
        return None
    return layer.error if layer.activation_error is None else layer.activation_error


def said(timed: Timed) -> str:
    """Return the verdict of a comparison in words."""
    if timed.verdict == "faster":
        return f"{1 / timed.ratio:.2f}x faster"
    if timed.verdict == "slower":
        return f"{timed.ratio:.2f}x slower"
    return "" if timed.verdict == "first" else "too noisy to tell"


def before_training(quality: OutputQuality) -> str:
    """Return what an output of the compressed model was like before it was trained."""
    told = [f"relative error {percent(quality.relative_l2)}"]
    if quality.top1_agreement is not None:
        told.append(f"top-1 same {percent(quality.top1_agreement)}")
    if quality.accuracy_after is not None:
        told.append(f"accuracy {percent(quality.accuracy_after)}")
    return f"Before training, {quality.name}: {', '.join(told)}."
