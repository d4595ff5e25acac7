"""A plan as a JSON file that a person can read, change and have carried out."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_lrs.calibration.capture import is_wide
from onnx_lrs.calibration.subject import Subject
from onnx_lrs.config import GIB
from onnx_lrs.errors import ConfigError, OutputError
from onnx_lrs.graph.layers import Layer
from onnx_lrs.planning.prices import Plan
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.problem import CHAINS
from onnx_lrs.solvers.projected import TUCKER, tucker_params
from onnx_lrs.work import replacing

FORMAT = 1
DENSE = "dense"
REMEDY = "Mend the entry, or let a run write a new plan into a new file."
FIELDS = frozenset(("name", "node", "form", "latency_ms", "rank", "damping", "inner_rank", "elements", "kept_channels"))


def write_plan(
    place: pathlib.Path,
    subject: Subject,
    plan: Plan,
    about: Mapping[str, Any],
    latencies: Mapping[str, tuple[float, float]],
) -> None:
    """Write a plan with every compressible layer, the dense ones too; ``about`` goes in front.

    ``latencies`` are the milliseconds of layers dense and as planned, by node, where they were measured.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    content = {
        "format": FORMAT,
        **about,
        "layers": [_entry(layer, plan.chosen.get(layer.node), latencies.get(layer.node)) for layer in subject.layers],
    }
    try:
        with replacing(place) as file:
            file.write(_text(content).encode())
    except OSError as error:
        raise OutputError(
            f"The plan cannot be written to {place}: {error.strerror or error}.", "Choose another file."
        ) from None


def _text(content: Mapping[str, Any]) -> str:
    """Return the content as JSON with one line a layer, which is what people edit."""
    layers = ",\n  ".join(json.dumps(entry) for entry in content["layers"])
    head = json.dumps({k: v for k, v in content.items() if k != "layers"}, indent=1, default=str)
    return f'{head[:-2]},\n "layers": [\n  {layers}\n ]\n}}\n'


def _entry(layer: Layer, chosen: Candidate | None, latency: tuple[float, float] | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": layer.name, "node": layer.node, "form": DENSE}
    if latency is not None:
        entry["latency_ms"] = [round(ms, 4) for ms in latency]
    if chosen is None:
        return entry
    entry |= {"form": chosen.form, "rank": chosen.rank, "damping": chosen.damping}
    if chosen.inner:
        entry["inner_rank"] = chosen.inner
    if chosen.elements:
        entry["elements"] = chosen.elements
    if len(chosen.support):
        entry["kept_channels"] = [int(channel) for channel in chosen.support]
    return entry


def read_plan(place: pathlib.Path, subject: Subject, forms: Sequence[str], memory_bytes: int) -> Plan:
    """Return the plan of a file; ``forms`` are those that the method offers, ``memory_bytes`` what solves may take.

    A layer that the file does not name stays dense. Losses are not known, they are nan.

    Raises
    ------
    ConfigError
        If the file is no plan, names a layer that the model does not have, or asks for what a layer cannot become.
    """
    layers = {layer.node: layer for layer in subject.layers}
    chosen: dict[str, Candidate] = {}
    seen: set[str] = set()
    for entry in _entries(place):
        layer = layers.get(str(entry.get("node", "")))
        if layer is None:
            raise ConfigError(
                f"--plan {place} names {entry.get('name', entry)!r}, which is no compressible layer of this model.",
                "A plan belongs to the model it was made for; onnx-lrs inspect MODEL lists the layers.",
            )
        _check(place, layer, entry, layer.node in seen)
        seen.add(layer.node)
        if entry["form"] != DENSE:
            chosen[layer.node] = _candidate(place, layer, entry, forms)
            if chosen[layer.node].form in CHAINS and is_wide(layer, memory_bytes):
                raise ConfigError(
                    f"--plan {place}, layer {layer.name!r}: form is {entry['form']!r}; within --memory "
                    f"{memory_bytes / GIB:.3g}GiB such a layer can only be low-rank.",
                    "Allow more --memory, as the run that wrote the plan had, or choose low-rank.",
                )
    return Plan(chosen)


def _entries(place: pathlib.Path) -> list[dict[str, Any]]:
    """Return the layers of a plan's file as they stand there."""
    why = f'it needs "format": {FORMAT} and a list of objects as "layers"'
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        content = None
    entries = content.get("layers") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"--plan {place} is no plan: {why}.", REMEDY)
    return entries


def _check(place: pathlib.Path, layer: Layer, entry: Mapping[str, Any], twice: bool) -> None:
    """Refuse what would be carried out otherwise than its writer thinks: slips of the pen, copied lines."""
    unknown = sorted(entry.keys() - FIELDS)
    if unknown:
        what = f"{', '.join(map(repr, unknown))} is no field of a plan; there are {', '.join(sorted(FIELDS))}"
    elif entry.get("name", layer.name) != layer.name:
        what = f"its name is {entry['name']!r}, but its node {layer.node!r} is this layer"
    elif twice:
        what = "it is there twice"
    elif "form" not in entry:
        what = "it has no form; 'dense' leaves it as it is"
    elif any(isinstance(value, bool) for value in entry.values()):
        what = "true and false stand for no field of a plan"
    else:
        return
    raise ConfigError(f"--plan {place}, layer {layer.name!r}: {what}.", REMEDY)


def _candidate(place: pathlib.Path, layer: Layer, entry: Mapping[str, Any], forms: Sequence[str]) -> Candidate:
    def refuse(field: str, limit: str) -> ConfigError:
        return ConfigError(f"--plan {place}, layer {layer.name!r}: {field} is {entry.get(field)!r}; {limit}.", REMEDY)

    form, rank, elements = entry["form"], entry.get("rank", 0), entry.get("elements", 0)
    if form not in forms:
        raise refuse("form", f"it is one of {', '.join((DENSE, *forms))}")
    kernel = layer.geometry.kernel
    if form in CHAINS and (layer.op != "Conv" or len(kernel) != 2 or set(layer.geometry.strides) != {1}):
        raise refuse("form", "only 2-D convolutions with a stride of 1 are taken apart like this")
    if form in CHAINS and (min(kernel) < 2 if form == "spatial" else layer.taps < 2):
        raise refuse("form", "this layer has no k x k kernel to take apart")
    inner, widest = entry.get("inner_rank", 0), layer.channels if form == TUCKER else 0
    if not isinstance(inner, int) or not bool(widest) <= inner <= widest:
        raise refuse("inner_rank", f"it is a whole number from 1 to {layer.channels} for {TUCKER}, else left out")
    most = _most(layer, form, inner)
    ranked = form not in ("channels", "elements")
    if not isinstance(rank, int) or not ranked <= rank <= most * ranked:
        raise refuse("rank", f"it is a whole number from 1 to {most}, 0 for channels or elements alone")
    kept = entry.get("kept_channels", [])
    whole = isinstance(kept, list) and all(isinstance(k, int) and 0 <= k < layer.channels for k in kept)
    if not whole or len(set(kept)) != len(kept) or ("channels" in form) != bool(kept):
        raise refuse("kept_channels", f"it lists different channels from 0 to {layer.channels - 1} where some are kept")
    if not isinstance(elements, int) or ("elements" in form) != bool(elements) or not 0 <= elements <= layer.params:
        raise refuse("elements", f"it is a whole number up to {layer.params} where single entries are kept")
    damping = entry.get("damping")
    if damping is not None and not (isinstance(damping, int | float) and 0 <= damping < math.inf):
        raise refuse("damping", "it is a number from 0 up, or left out")
    params = _params(layer, form, (inner, rank)) + len(kept) * layer.taps * layer.out + elements
    support = np.array(kept, np.int64)
    return Candidate(form, rank, params, math.nan, support, math.nan if damping is None else damping, elements, inner)


def _sides(layer: Layer, form: str) -> tuple[int, int]:
    """Return what a rank costs on the input's and on the output's side; Tucker-2 apart."""
    if form not in CHAINS:
        return layer.d, layer.out
    height, width = layer.geometry.kernel if form == "spatial" else (1, layer.taps)
    return layer.channels * height, layer.out * width


def _most(layer: Layer, form: str, inner: int) -> int:
    """Return the highest rank that a form may have."""
    return min(layer.out, inner * layer.taps) if form == TUCKER else min(_sides(layer, form))


def _params(layer: Layer, form: str, ranks: tuple[int, int]) -> int:
    """Return the weights of the low-rank part; ``ranks`` are (inner, outer)."""
    if form == TUCKER:
        return tucker_params(layer.channels, layer.out, layer.taps, ranks)
    return ranks[1] * sum(_sides(layer, form))
