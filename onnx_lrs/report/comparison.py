"""What a comparison of models found, as records and as tables to paste: JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from typing import Any, Literal

from onnx_lrs.report.record import Report
from onnx_lrs.report.result import Changes, OutputQuality
from onnx_lrs.report.words import percent, said

SCHEMA = 1
Verdict = Literal["first", "faster", "slower", "cannot tell"]


@dataclasses.dataclass(frozen=True)
class ComparedModel:
    """One of the models.

    ``load_ms`` and ``peak_memory_bytes`` are those of a process of its own that loads the model from its file on the
    first provider and runs it on the first batch; the memory is that of the whole process, of which
    ``idle_memory_bytes`` were there before: Python and ONNX Runtime. Memory of a GPU is not in it; None where the
    system does not tell. ``quality`` holds its outputs against the first model's, None for that one and without data;
    ``changes`` tells which samples have another class there.
    """

    name: str
    path: str | None
    file_bytes: int
    params: int
    load_ms: float
    peak_memory_bytes: int | None
    idle_memory_bytes: int | None
    quality: tuple[OutputQuality, ...] | None = None
    changes: tuple[Changes, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Timed:
    """Times of one model's calls on one provider at one batch; milliseconds, and samples a second.

    ``ratio`` is its latency as a fraction of the first model's, between ``ratio_low`` and ``ratio_high`` with a
    confidence of ``Comparison.level``; ``verdict`` says what follows from that. ``on_cpu`` counts the nodes that a GPU
    provider left to the CPU, ``copies`` those that carry tensors between the two; None on the CPU. ``on_cuda`` counts
    those that TensorRT left to CUDA; None elsewhere.
    """

    model: str
    provider: str
    batch: int
    rounds: int
    median_ms: float
    mean_ms: float
    p90_ms: float
    p99_ms: float
    throughput: float
    ratio: float
    ratio_low: float
    ratio_high: float
    verdict: Verdict
    on_cuda: int | None = None
    on_cpu: int | None = None
    copies: int | None = None


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """What one layer of the first model takes in every model, in milliseconds a call, in their order.

    The time of a kernel that ONNX Runtime made of several nodes counts for the layer that it is named after. ``op`` is
    the type in the first model; "(others)" is all that belongs to no layer.
    """

    layer: str
    op: str
    provider: str
    batch: int
    ms: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Comparison(Report):
    """The outcome of :func:`onnx_lrs.compare`.

    ``data`` says what the models ran on, ``call`` repeats the comparison as a command line or a Python call.
    """

    models: tuple[ComparedModel, ...]
    timings: tuple[Timed, ...]
    layers: tuple[LayerTime, ...]
    data: str
    level: float
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    call: str = ""
    schema: int = SCHEMA

    def of(self, name: str) -> ComparedModel:
        """Return a model by its name."""
        return next(model for model in self.models if model.name == name)

    def slower_than(self, limit: float) -> tuple[Timed, ...]:
        """Return the timings of other models than the first whose ratio is not surely at most ``limit``."""
        return tuple(t for t in self.timings if t.verdict != "first" and t.ratio_high > limit)

    def to_csv(self) -> str:
        """Return one line for each timing with what is known of its model, a line of names in front."""
        lines = list(self._lines())
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def _lines(self) -> Iterator[dict[str, Any]]:
        for timed in self.timings:
            model = self.of(timed.model)
            apart = ("name", "quality", "changes")
            known = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in apart}
            quality = dataclasses.asdict(model.quality[0]) if model.quality else {}
            names = [f.name for f in dataclasses.fields(OutputQuality)]
            yield dataclasses.asdict(timed) | known | {f"output_{name}": quality.get(name) for name in names}

    def to_html(self) -> str:
        """Return a page about the comparison, one file without anything from outside; docs/report.md tells of it.

        Raises
        ------
        ConfigError
            If jinja2 or matplotlib are missing.
        """
        from onnx_lrs.report.comparison_page import content
        from onnx_lrs.report.html import check_extra, page

        check_extra()
        return page("comparison.html", content(self))

    def to_markdown(self) -> str:
        """Return the timings and the models as Markdown tables, with the machine under them."""
        blocks = [_markdown(*self._timings()), _markdown(*self._models())]
        if self.layers:
            blocks.append(_markdown(*self._layers()))
        return "\n\n".join([*blocks, self.machine()]) + "\n"

    def machine(self) -> str:
        """Return where, when and how this was measured, in one line."""
        env, cuda, providers = self.environment, self.settings["cuda"], self.settings["providers"]
        runtime = env["versions"].get("onnxruntime-gpu") or env["versions"].get("onnxruntime")
        parts = [f"{env['cpu']}, {env['cpu_count']} cores, {env['threads']} threads"]
        batches = {t.batch for t in self.timings}
        parts += [providers[0]] if len(providers) == 1 else []
        parts += [f"batch {batches.pop()}"] if len(batches) == 1 else []
        if env["gpu"]:
            parts.append(f"{env['gpu']}, CUDA graph {_on(cuda['cuda_graph'])}")
        if "cuda" in providers:
            search = cuda["cudnn_conv_algo_search"]
            parts.append(f"TF32 {_on(cuda['tf32'])}, NHWC {_on(cuda['prefer_nhwc'])}, {search} search of algorithms")
        parts += [f"ONNX Runtime {runtime}, {env['date']}", self.data]
        return f"{'; '.join(parts)}; ratios are of medians, with {100 * self.level:g} % intervals."

    def _timings(self) -> tuple[list[str], list[list[str]]]:
        header = ["model", "provider", "batch", "median ms", "p90", "p99", "mean", "samples/s", "latency ratio", ""]
        left = {"on CUDA": "on_cuda", "on CPU": "on_cpu", "copies": "copies"}
        told = {title: name for title, name in left.items() if any(getattr(t, name) is not None for t in self.timings)}
        body = [
            [
                t.model,
                t.provider,
                str(t.batch),
                *(f"{ms:.4g}" for ms in (t.median_ms, t.p90_ms, t.p99_ms, t.mean_ms, t.throughput)),
                "1" if t.verdict == "first" else f"{t.ratio:.3f} ({t.ratio_low:.3f} - {t.ratio_high:.3f})",
                said(t),
                *("" if getattr(t, name) is None else str(getattr(t, name)) for name in told.values()),
            ]
            for t in self.timings
        ]
        return [*header, *told], body

    def _models(self) -> tuple[list[str], list[list[str]]]:
        header = [
            "model",
            "file MB",
            "parameters",
            "load ms",
            "peak memory MB",
            "output off by",
            "same class",
            "accuracy",
        ]
        body = []
        for m in self.models:
            q = m.quality[0] if m.quality else None
            memory = "" if m.peak_memory_bytes is None else f"{m.peak_memory_bytes / 1e6:.0f}"
            body.append(
                [
                    *(m.name, f"{m.file_bytes / 1e6:.4g}", f"{m.params:,}", f"{m.load_ms:.4g}", memory),
                    "" if q is None else percent(q.relative_l2),
                    "" if q is None or q.top1_agreement is None else percent(q.top1_agreement),
                    ""
                    if q is None or q.accuracy_after is None
                    else f"{percent(q.accuracy_before)} -> {percent(q.accuracy_after)}",
                ]
            )
        return header, body

    def _layers(self) -> tuple[list[str], list[list[str]]]:
        header = ["layer", "provider", "batch", *(f"{model.name}, ms" for model in self.models)]
        return header, [[t.layer, t.provider, str(t.batch), *(f"{ms:.4f}" for ms in t.ms)] for t in self.layers]


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---" if name in ("model", "layer", "provider", "") else "---:" for name in header], *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
