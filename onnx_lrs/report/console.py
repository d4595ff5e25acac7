"""What a person sees: progress while a run works, then tables. All of it goes to stderr; stdout is for JSON.

The text is made for pasting into an issue: at most 100 columns wide, no colours when stderr is no terminal, and a
figure that is not known is a dash. Names come from the model file, so they are printed as they are, never as markup,
and without control characters.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import IO, Any, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from onnx_lrs.report import words
from onnx_lrs.report.comparison import Comparison
from onnx_lrs.report.refinement import Refinement
from onnx_lrs.report.result import Inspection, LayerInfo, LayerResult, Optimised, OutputQuality, Result
from onnx_lrs.report.training import Trained

REPORT_WIDTH = 100
SUMMARY_LAYERS = 8
SUMMARY_REASONS = 8
SUMMARY_NODES = 3
INSPECTED_LAYERS = 20


# ---------------------------------------------------------------------------------------------------- consoles


def discard(stream: IO[str]) -> None:
    """Send what is still written to ``stream`` nowhere: its reader has gone (``| head``)."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


class _StderrConsole(Console):
    """A console whose closed reader does not end the run: the file matters more than the words about it."""

    def on_broken_pipe(self) -> None:
        """Fall silent and go on."""
        self.quiet = True
        discard(sys.stderr)


def stderr_console() -> Console:
    """Return the console of a command line run: stderr, 100 columns wide where nothing says otherwise."""
    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else REPORT_WIDTH
    return _StderrConsole(stderr=True, width=width, markup=False, emoji=False, highlight=False)


# ---------------------------------------------------------------------------------------------------- progress


@dataclasses.dataclass
class _Stage:
    name: str
    steps: int
    began: float
    task: TaskID | None
    done: int = 0


class ConsoleProgress:
    """Progress on stderr: bars on a terminal, otherwise one plain line when a stage ends.

    Use it as a context manager; leaving it ends the last stage and gives the terminal back, whatever happened.

    Parameters
    ----------
    console : rich.console.Console, optional
        Where to draw; stderr by default.
    quiet : bool
        Say nothing at all.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or stderr_console()
        self._quiet = quiet
        # FORCE_COLOR makes rich call a log file a terminal; bars in a log file are unreadable, so ask the file too.
        drawn = not quiet and self._console.is_interactive and self._console.file.isatty()
        self._bars = _bars(self._console) if drawn else None
        self._stage: _Stage | None = None

    def __enter__(self) -> ConsoleProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(stopped=kind is not None)
        finally:
            if self._bars is not None:
                self._bars.stop()

    def stage(self, name: str, steps: int) -> None:
        """Begin the stage ``name`` of ``steps`` steps; the one before is over."""
        self._end(stopped=False)
        task = None
        if self._bars is not None:
            task = self._bars.add_task(words.printable(name), total=steps or None, label="")
        self._stage = _Stage(name, steps, time.perf_counter(), task)

    def step(self, label: str) -> None:
        """One step of the current stage is done; ``label`` names it (a layer, a batch)."""
        if self._stage is None:
            return
        self._stage.done += 1
        if self._bars is not None and self._stage.task is not None:
            self._bars.update(self._stage.task, advance=1, label=words.printable(label))

    def note(self, text: str) -> None:
        """Say one plain sentence to the user, on its own line."""
        self._line(text)

    def _end(self, *, stopped: bool) -> None:
        stage, self._stage = self._stage, None
        if stage is None:
            return
        if self._bars is None:
            self._line(_stage_line(stage, time.perf_counter() - stage.began, stopped))
        elif stage.task is not None:
            if not stopped:
                full = max(stage.done, 1)
                self._bars.update(stage.task, total=full, completed=full, label="")
            self._bars.stop_task(stage.task)

    def _line(self, text: str) -> None:
        if not self._quiet:
            self._console.print(_text(text), soft_wrap=True)


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[label]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        refresh_per_second=4,  # latency is measured while this thread draws
        redirect_stdout=False,
    )


def _stage_line(stage: _Stage, seconds: float, stopped: bool) -> str:
    if stopped:
        return f"{stage.name}: stopped after {stage.done} of {stage.steps} steps, {words.seconds(seconds)}"
    steps = f"{stage.done} step{'' if stage.done == 1 else 's'}, " if stage.done else ""
    return f"{stage.name}: {steps}{words.seconds(seconds)}"


# ------------------------------------------------------------------------------------------------------ result


def print_result(result: Result, verbose: bool = False, *, console: Console | None = None) -> None:
    """Print what a run did: sizes before and after, quality, layers, skipped layers, notes, the file.

    Parameters
    ----------
    result : Result
        The record of the run.
    verbose : bool
        List every layer and every skipped layer with its reason instead of a summary.
    console : rich.console.Console, optional
        Where to print; stderr by default.
    """
    blocks: list[RenderableType] = ["", _sizes(result), *_latency_line(result)]
    blocks += [*_optimised(result.optimised, verbose), *_ways(result), "", *_quality(result)]
    if result.refined is not None:
        blocks += ["", *_trained(result.refined.rounds[-1], verbose)]
    blocks += [*_search(result), "", *_layers(result, verbose), *_certificate(result)]
    blocks += _skipped_all(result) if verbose else _skipped_summary(result)
    blocks += ["", *_notes(result.notes), _effort_line(result, verbose)]
    console = console or stderr_console()
    _print(blocks, console)
    written = "Nothing was written: no output file was named." if result.output is None else f"Wrote {result.output}"
    if result.dry_run:
        written = "No model was written: a dry run. Errors are those that the plan counts with; the rest was measured."
    elif result.unchanged:
        written = f"Nothing pays: {result.unchanged}. {written}, the original as it was."
    console.print(_text(written), soft_wrap=True)  # a path in one piece can be copied


def _sizes(result: Result) -> Table:
    before, after, ratio = result.before, result.after, result.ratio
    table = _table("", ">Before", ">After", "Change")
    table.add_row(
        "Parameters",
        words.count(before.params),
        words.count(after.params),
        words.change(ratio.params, "smaller", "larger"),
    )
    table.add_row("MACs", words.count(before.macs), words.count(after.macs), words.change(ratio.macs, "fewer", "more"))
    size = words.change(ratio.file_bytes, "smaller", "larger")
    table.add_row("File size", words.byte_count(before.file_bytes), words.byte_count(after.file_bytes), size)
    speed = "not measured"
    if before.latency_ms is not None and after.latency_ms is not None:
        speed = words.change(ratio.latency_ms, "faster", "slower")
    table.add_row("Latency", words.milliseconds(before.latency_ms), words.milliseconds(after.latency_ms), speed)
    return table


def _search(result: Result) -> list[RenderableType]:
    """Return what was tried to find how fast the model gets within what may be lost."""
    if not result.search:
        return []
    lost = f">Lost ({words.measure_of(result.search)})"
    table = _table(
        ">Latency asked", ">Predicted", lost, "Layers fitted", "", title="Search, against the original model"
    )
    for step in result.search:
        held = "within the limit" if step.held else "too much"
        asked, predicted = f"{step.latency:.3f}", f"{step.predicted:.3f}"
        table.add_row(asked, predicted, f"{step.drop:.2%}", _text(step.fit), held)
    return ["", table]


def _latency_line(result: Result) -> list[Text]:
    if result.after.latency_ms is None:
        return []
    threads, provider = result.settings.get("threads"), result.environment.get("provider")
    parts = ["Latency is the median"]
    if threads is not None:
        parts.append(f"{threads} thread{'' if threads == 1 else 's'}")
    batch = result.settings.get("batch", 1)
    if batch != 1:
        parts.append(f"batch {batch}")
    if provider is not None:
        parts.append(str(provider))
    return [_text(", ".join(parts) + ".")]


def _optimised(optimised: Optimised | None, verbose: bool) -> list[RenderableType]:
    """Return what ONNX Runtime fused, and by name what it does not fuse in the compressed model alone (-v: all)."""
    if optimised is None:
        return []
    after, known = optimised.after, _stood_before(optimised)
    named = {
        "Not fused": after.unfused_sums + after.unfused_activations,
        "Conv outside NCHWc": after.outside_nchwc if after.nchwc else (),
        "Left to the CPU": after.elsewhere or (),
    }
    lines: list[RenderableType] = [_optimised_line(optimised)]
    for title, nodes in named.items():
        told = nodes if verbose else tuple(node for node in nodes if node not in known)
        shown = told if verbose else told[:SUMMARY_NODES]
        rest = f" and {len(told) - len(shown)} more (-v: all)" if len(told) > len(shown) else ""
        if told:
            lines.append(_text(f"{title}: {', '.join(shown)}{rest}."))
    return [*lines, "", _op_counts(optimised)] if verbose else lines


def _optimised_line(optimised: Optimised) -> Text:
    before, after = optimised.before, optimised.after
    whole = (before.nchwc, after.nchwc) == (before.convs, after.convs)
    layout = "all in NCHWc" if whole else f"in NCHWc {before.nchwc} -> {after.nchwc}"
    counts = [  # those that are zero twice are left out
        ("reorders", before.reorders, after.reorders),
        ("activations fused", before.activations, after.activations),
        ("activations alone", len(before.unfused_activations), len(after.unfused_activations)),
        ("sums fused", before.sums, after.sums),
        ("sums alone", len(before.unfused_sums), len(after.unfused_sums)),
        ("copies to or from the CPU", before.copies, after.copies),
        ("nodes left to the CPU", len(before.elsewhere or ()), len(after.elsewhere or ())),
    ]
    parts = [f"Conv {before.convs} -> {after.convs}, {layout}"] if before.convs or after.convs else []
    parts += [f"{name} {one} -> {other}" for name, one, other in counts if one or other]
    nodes = f"{sum(before.ops.values())} -> {sum(after.ops.values())} nodes"
    integers = sum(count for name, count in after.ops.items() if "QLinear" in name or "QGemm" in name)
    if integers:  # layouts and fusions are those of float kernels
        parts = [f"{integers} of them on integers"]
    return _text(f"As ONNX Runtime runs it: {'; '.join([nodes, *parts])}.")


def _stood_before(optimised: Optimised) -> set[str]:
    """Return what stands alone in the original network as well: compression is no reason for it."""
    before = optimised.before
    return {*before.unfused_sums, *before.unfused_activations, *before.outside_nchwc, *(before.elsewhere or ())}


def _op_counts(optimised: Optimised) -> Table:
    before, after = optimised.before.ops, optimised.after.ops
    table = _table("Operator", ">Before", ">After", title="Nodes that ONNX Runtime runs")
    for name in sorted(before.keys() | after.keys()):
        table.add_row(_text(name), str(before.get(name, 0)), str(after.get(name, 0)))
    return table


def _quality(result: Result) -> list[RenderableType]:
    quality = result.quality
    if not quality:
        reason = "no calibration data" if quality is None else "the model has no floating-point output"
        if result.dry_run or result.unchanged:
            reason = "a dry run" if result.dry_run else "nothing was changed"
        return [_text(f"Quality: not measured ({reason}).")]
    columns: dict[str, list[str]] = {
        "Output": [q.name for q in quality],
        ">Relative error": [words.percent(q.relative_l2) for q in quality],
        ">Cosine": [words.number(q.cosine, 5) for q in quality],
        ">Top-1 same": [words.percent(q.top1_agreement) for q in quality],
        ">Top-5 same": [words.percent(q.top5_agreement) for q in quality],
        "Accuracy": [_accuracy(q) for q in quality],
        ">Samples": [str(q.samples) for q in quality],
    }
    known = {title: cells for title, cells in columns.items() if any(cell != words.UNKNOWN for cell in cells)}
    table = _table(*known, title="Quality on held-out samples, against the original model")
    for row in zip(*known.values(), strict=True):
        table.add_row(*map(_text, row))
    before = () if result.refined is None else result.refined.before
    return [table, *(_text(words.before_training(quality)) for quality in before)]


def _ways(result: Result) -> list[RenderableType]:
    """Return the table of precisions, where one was asked for."""
    if not result.variants:
        return []
    head, *rows = words.ways(result.variants)
    table = _table(head[0], *(f">{name}" for name in head[1:]), title="The ways to run it, timed in turn")
    for row in rows:
        table.add_row(*map(_text, row))
    return ["", table]


def _accuracy(quality: OutputQuality) -> str:
    if quality.accuracy_before is None or quality.accuracy_after is None:
        return words.UNKNOWN
    return f"{words.percent(quality.accuracy_before)} -> {words.percent(quality.accuracy_after)}"


def _layers(result: Result, verbose: bool) -> list[RenderableType]:
    if not result.layers:
        return [_text("No layer was compressed.")]
    kind = _budget_kind(result.settings)
    layers: Sequence[LayerResult] = result.layers
    title = f"Compressible layers ({len(layers)})"
    if not verbose and len(layers) > SUMMARY_LAYERS:
        layers = sorted(layers, key=lambda layer: _cost(layer, kind)[1], reverse=True)[:SUMMARY_LAYERS]
        unit = "MACs" if kind == "macs" else "parameters"
        title = f"The {len(layers)} of {len(result.layers)} compressible layers with the most {unit} left (-v: all)"
    timed = any(layer.latency_before_ms is not None for layer in layers)
    unit = ">MACs" if kind == "macs" else ">Parameters"
    table = _table("Layer", "Weight", "Form", unit, *[">Latency"] * timed, ">Error", title=title)
    for layer in layers:
        before, after = _cost(layer, kind)
        cells = [_text(layer.name), _text(words.weight(layer.op, layer.shape)), _text(words.form(layer))]
        cells.append(Text(f"{words.count(before)} -> {words.count(after)}"))
        if timed:
            cells.append(
                Text(f"{words.milliseconds(layer.latency_before_ms)} -> {words.milliseconds(layer.latency_after_ms)}")
            )
        table.add_row(*cells, Text(words.percent(words.error(layer))))
    behind = any(layer.activation_error is not None for layer in layers)
    return [table, _text("Errors are those behind the activation.")] if behind else [table]


def _certificate(result: Result) -> list[RenderableType]:
    """Return what each layer's guarantee allowed and reached, and what they promise for the output."""
    table = _table("Layer", ">Error allowed", ">Error on calibration columns", title="Guarantees")
    for layer in result.layers:
        if layer.allowed_error is not None:
            table.add_row(_text(layer.name), words.percent(layer.allowed_error), words.percent(layer.reached_error))
    if not table.row_count:
        return []
    found = result.certificate
    if found is None:
        return ["", table]
    line = (
        f"Output {found.output} behind {', '.join(found.layers)} is off by at most {words.percent(found.bound)} "
        f"on {found.samples} calibration samples; measured {words.percent(found.measured)}."
    )
    return ["", table, _text(line)]


def _budget_kind(settings: dict[str, Any]) -> Literal["params", "macs"]:
    """Return the unit the layer table counts in: MACs if they were to be saved."""
    budget = settings.get("budget")
    return "macs" if isinstance(budget, dict) and budget.get("macs") is not None else "params"


def _cost(layer: LayerResult, kind: Literal["params", "macs"]) -> tuple[int, int]:
    if kind == "macs":
        return layer.macs_before, layer.macs_after
    return layer.params_before, layer.params_after


def _skipped_summary(result: Result) -> list[RenderableType]:
    if not result.skipped:
        return []
    layers: collections.Counter[str] = collections.Counter(layer.reason for layer in result.skipped)
    params: collections.Counter[str] = collections.Counter()
    for layer in result.skipped:
        params[layer.reason] += layer.params
    table = _table(">Layers", ">Parameters", "Reason", title=f"Left as they were ({len(result.skipped)}; -v: all)")
    for reason, count in layers.most_common(SUMMARY_REASONS):
        table.add_row(str(count), words.count(params[reason]), _text(reason))
    rest = len(layers) - SUMMARY_REASONS
    if rest > 0:
        table.add_row("", "", f"and {rest} more reason{'' if rest == 1 else 's'}")
    return ["", table]


def _skipped_all(result: Result) -> list[RenderableType]:
    if not result.skipped:
        return []
    table = _table("Layer", "Op", ">Parameters", "Reason", title=f"Left as they were ({len(result.skipped)})")
    for layer in result.skipped:
        table.add_row(_text(layer.name), _text(layer.op), words.count(layer.params), _text(layer.reason))
    return ["", table]


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return [_text(f"Note: {note}") for note in notes]


def _effort_line(result: Result, verbose: bool) -> Text:
    total = result.seconds.get("total", sum(result.seconds.values()))
    line = f"Took {words.seconds(total)}"
    if verbose and len(result.seconds) > 1:
        parts = [f"{name} {words.seconds(value)}" for name, value in result.seconds.items() if name != "total"]
        line += f" ({', '.join(parts)})"
    if result.peak_memory_bytes > 0:
        line += f", peak memory {words.byte_count(result.peak_memory_bytes)}"
    return _text(line + ".")


# -------------------------------------------------------------------------------------------------- inspection


def print_inspection(inspection: Inspection, verbose: bool = False, *, console: Console | None = None) -> None:
    """Print what a model holds and which of its layers can be compressed.

    Parameters
    ----------
    inspection : Inspection
        The record of the look.
    verbose : bool
        List every layer in the model's order instead of the 20 largest.
    console : rich.console.Console, optional
        Where to print; stderr by default.
    """
    blocks: list[RenderableType] = [_model_facts(inspection), "", *_inspected_layers(inspection, verbose)]
    blocks += [_eligible_line(inspection.layers), *_notes(inspection.notes)]
    _print(blocks, console or stderr_console())


def print_comparison(comparison: Comparison, *, console: Console | None = None) -> None:
    """Print times, ratios and models of a comparison; on stderr by default."""
    blocks: list[RenderableType] = [_timings(comparison), "", _compared(comparison)]
    if comparison.layers:
        blocks += ["", _layer_times(comparison)]
    blocks += ["", _text(comparison.machine()), *_notes(comparison.notes)]
    _print(blocks, console or stderr_console())


def print_refinement(refinement: Refinement, verbose: bool = False, *, console: Console | None = None) -> None:
    """Print the quality before and after training and how the loss fell; on stderr by default."""
    effort = f"Took {words.seconds(refinement.seconds['total'])}"
    effort += f", peak memory {words.byte_count(refinement.peak_memory_bytes)}."
    blocks: list[RenderableType] = ["", _refined_quality(refinement), "", *_trained(refinement.trained, verbose), ""]
    console = console or stderr_console()
    _print([*blocks, *_notes(refinement.notes), _text(effort)], console)
    written = "Nothing was written: no output file was named."
    console.print(_text(f"Wrote {refinement.output}" if refinement.output else written), soft_wrap=True)


def _trained(trained: Trained, verbose: bool) -> list[RenderableType]:
    """Return how the loss fell: first, best and last epoch, or all."""
    table = _table(">Epoch", ">Loss", ">On samples that select", ">Same class", ">Seconds", title="Training")
    chosen = {0, trained.best, trained.epochs[-1].number}
    for epoch in trained.epochs:
        if verbose or epoch.number in chosen:
            loss = words.UNKNOWN if epoch.loss is None else f"{epoch.loss:.4g}"
            figures = (loss, f"{epoch.selected:.4g}", words.percent(epoch.agreement), f"{epoch.seconds:.1f}")
            table.add_row(str(epoch.number), *figures)
    kinds = ", ".join(f"{name}: {kind}" for name, kind in trained.loss.items())
    what = f"{words.count(trained.weights)} weights on {trained.samples} samples, {trained.selecting} others select"
    half = (", bfloat16" if trained.bfloat16 else "") + (", weights rounded to INT8" if trained.rounded else "")
    return [table, _text(f"Epoch {trained.best} was the best. Trained {what} (loss {kinds}{half}).")]


def _refined_quality(refinement: Refinement) -> Table:
    table = _table(
        "Output",
        "",
        ">Relative error",
        ">Top-1 same",
        ">Accuracy",
        title="Against the original model, on held-out samples",
    )
    for before, after in zip(refinement.before, refinement.after, strict=True):
        if before.accuracy_before is not None:
            table.add_row(_text(before.name), "original", "", "", words.percent(before.accuracy_before))
        for name, quality in (("compressed", before), ("refined", after)):
            figures = (quality.relative_l2, quality.top1_agreement, quality.accuracy_after)
            table.add_row(_text(quality.name), name, *map(words.percent, figures))
    return table


def _timings(comparison: Comparison) -> Table:
    several = {
        header: name
        for header, name in (("Provider", "provider"), (">Batch", "batch"))
        if len({getattr(t, name) for t in comparison.timings}) > 1  # what all share is told under the tables
    }
    headers = (">Median", ">p90", ">p99", ">Samples/s", ">Latency ratio", "")
    table = _table("Model", *several, *headers)
    for t in comparison.timings:
        place = [str(getattr(t, name)) for name in several.values()]
        ratio = "1" if t.verdict == "first" else f"{t.ratio:.3f} ({t.ratio_low:.3f}-{t.ratio_high:.3f})"
        times = [words.milliseconds(ms) for ms in (t.median_ms, t.p90_ms, t.p99_ms)]
        table.add_row(_text(t.model), *place, *times, words.three_digits(t.throughput), ratio, words.said(t))
    return table


def _compared(comparison: Comparison) -> Table:
    judged = any(model.quality for model in comparison.models)
    headers = [">File", ">Parameters", ">Load", ">Peak memory"]
    table = _table("Model", *headers, *([">Output off by", ">Same class", ">Accuracy"] if judged else []))
    for model in comparison.models:
        memory = "" if model.peak_memory_bytes is None else words.byte_count(model.peak_memory_bytes)
        figures = [words.byte_count(model.file_bytes), words.count(model.params)]
        figures += [words.milliseconds(model.load_ms), memory]
        if judged:
            quality = model.quality[0] if model.quality else None
            figures += ["", "", ""] if quality is None else _against_first(quality)
        table.add_row(_text(model.name), *figures)
    return table


def _against_first(quality: OutputQuality) -> list[str]:
    return [words.percent(quality.relative_l2), words.percent(quality.top1_agreement), _accuracy(quality)]


def _layer_times(comparison: Comparison) -> Table:
    several = len({(t.provider, t.batch) for t in comparison.layers}) > 1
    names = [f">{words.printable(model.name)}" for model in comparison.models]
    table = _table("Layer", *(["Provider", ">Batch"] if several else []), *names, title="Times of the layers, per call")
    for t in comparison.layers:
        place = [t.provider, str(t.batch)] if several else []
        table.add_row(_text(t.layer), *place, *(words.milliseconds(ms) for ms in t.ms))
    return table


def _model_facts(inspection: Inspection) -> Table:
    totals = inspection.totals
    facts = [
        ("Model", inspection.input or "(in memory)"),
        ("Format", f"opset {inspection.opset}, IR version {inspection.ir_version}"),
        ("Producer", inspection.producer or words.UNKNOWN),
        *(("Input", text) for text in inspection.inputs),
        *(("Output", text) for text in inspection.outputs),
        ("Open sizes", ", ".join(inspection.dynamic) or "none"),
        ("Parameters", words.count(totals.params)),
        ("MACs", words.count(totals.macs)),
        ("File size", words.byte_count(totals.file_bytes)),
    ]
    if inspection.external_bytes:
        facts.append(("External data", f"{words.byte_count(inspection.external_bytes)} of it"))
    if totals.latency_ms is not None:
        facts.append(("Latency", words.milliseconds(totals.latency_ms)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for name, value in facts:
        table.add_row(name, _text(value))
    return table


def _inspected_layers(inspection: Inspection, verbose: bool) -> list[RenderableType]:
    layers: Sequence[LayerInfo] = inspection.layers
    if not layers:
        return []
    title = f"Layers ({len(layers)})"
    if not verbose and len(layers) > INSPECTED_LAYERS:
        layers = sorted(layers, key=lambda layer: layer.params, reverse=True)[:INSPECTED_LAYERS]
        title = f"The {len(layers)} largest of {len(inspection.layers)} layers (-v: all)"
    ranked = any(layer.effective_rank is not None for layer in layers)
    rank = [">Rank"] if ranked else []
    table = _table("Layer", "Weight", ">Parameters", ">", ">MACs", ">", *rank, "Compressible", title=title)
    totals = inspection.totals
    for layer in layers:
        answer = "yes" if layer.eligible else f"no: {layer.reason or 'no reason given'}"
        figures = []
        for value, total in ((layer.params, totals.params), (layer.macs, totals.macs)):
            figures += [words.count(value), words.percent(value / total) if total else words.UNKNOWN]
        if ranked:
            figures.append(
                words.UNKNOWN if layer.effective_rank is None else f"{layer.effective_rank}/{layer.full_rank}"
            )
        table.add_row(_text(layer.name), _text(words.weight(layer.op, layer.shape)), *figures, _text(answer))
    said = [_text("Rank: the lowest that keeps 99 % of the variance of the layer's outputs, of the full one.")]
    return [table, *(said * ranked), ""]


def _eligible_line(layers: Sequence[LayerInfo]) -> Text:
    eligible = [layer for layer in layers if layer.eligible]
    line = f"{len(eligible)} of {len(layers)} layers can be compressed"
    params, macs = sum(layer.params for layer in layers), sum(layer.macs for layer in layers)
    if params and macs:
        share_params = words.percent(sum(layer.params for layer in eligible) / params)
        share_macs = words.percent(sum(layer.macs for layer in eligible) / macs)
        line += f"; they hold {share_params} of these layers' parameters and {share_macs} of their MACs"
    return _text(line + ".")


# ------------------------------------------------------------------------------------------------------ tables


def _print(blocks: Iterable[RenderableType], console: Console) -> None:
    for block in blocks:
        console.print(block, width=min(console.width, REPORT_WIDTH))


def _table(*headers: str, title: str = "") -> Table:
    """Return an empty table; a header that starts with ``>`` belongs to a column of figures, kept on one line."""
    columns = [
        Column(header.removeprefix(">"), justify="right", no_wrap=True)
        if header.startswith(">")
        else Column(header, overflow="fold")
        for header in headers
    ]
    return Table(
        *columns,
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _text(text: str) -> Text:
    return Text(words.printable(text))
