"""What a person sees: the figures are there, no line is too wide, and nothing breaks on what is not known."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from onnx_lrs.config import Budget, Config
from onnx_lrs.report import words
from onnx_lrs.report.console import ConsoleProgress, print_inspection, print_result
from onnx_lrs.report.result import (
    Form,
    Inspection,
    LayerInfo,
    LayerResult,
    Optimised,
    OptimisedGraph,
    OutputQuality,
    Result,
    SkippedLayer,
    Totals,
    ratio_of,
)

FORMS = typing.get_args(Form)


def layer(index: int, form: str = "low-rank + channels", **changes) -> LayerResult:
    values = {
        "name": f"/model/layer{index}/layer{index}.0/downsample/conv1/Conv",
        "op": "Conv",
        "shape": (512, 256, 3, 3),
        "form": form,
        "rank": 64,
        "inner_rank": 32,
        "kept_channels": 120,
        "elements": 58_982,
        "channels": 256,
        "outputs": 512,
        "kept_outputs": 512,
        "params_before": 1_179_648,
        "params_after": 590_000 - 10_000 * index,
        "macs_before": 115_605_504,
        "macs_after": 10_000_000 + 1_000_000 * index,
        "error": 0.0312,
    }
    return LayerResult(**(values | changes))


def typical(**changes) -> Result:
    before = Totals(11_689_512, 1_814_073_344, 46_800_000, 12.31)
    after = Totals(5_844_756, 907_036_672, 23_400_000, 7.8)
    values = {
        "input": "resnet18.onnx",
        "output": "small.onnx",
        "before": before,
        "after": after,
        "ratio": ratio_of(before, after),
        "quality": (
            OutputQuality("logits", 0.0312, 0.99951, 200, 0.985, 0.999, 0.761, 0.758),
            OutputQuality("a/rather/long/name/of/an/embedding", 1e-7, 1.0, 200),
        ),
        "layers": tuple(layer(i, FORMS[i % len(FORMS)]) for i in range(12)),
        "skipped": tuple(
            SkippedLayer(f"/skipped/{i}", "Conv", 9000, 10**6, ("grouped convolution", "too small")[i % 3 == 0])
            for i in range(5)
        ),
        "settings": Config(threads=4).to_dict(),
        "environment": {"provider": "CPUExecutionProvider"},
        "seconds": {"capture": 3.2, "fit": 8.1},
        "peak_memory_bytes": 812_000_000,
        "optimised": optimised(),
        "notes": ("No preprocessing was named: pixels are scaled to 0..1 at the size of the model's input.",),
    }
    return Result(**(values | changes))


def optimised() -> Optimised:
    """Return what became of a network with a shortcut that was no Conv's before either."""
    before = OptimisedGraph({"com.microsoft.nchwc.Conv": 19, "Add": 1}, 19, 19, 2, 18, 3, ("relu",), ("block/Add",))
    after = OptimisedGraph(
        {"Conv": 1, "com.microsoft.nchwc.Conv": 25, "Add": 5},
        *(26, 25, 6, 17, 4),
        ("relu", "clip"),
        ("block/Add", *(f"/part{i}/conv/Conv.sum" for i in range(4))),
        ("/part9/conv/Conv.right_product",),
    )
    return Optimised(before, after)


def laden_with_none() -> Result:
    empty = Totals(0, 0, 0)
    return typical(
        input=None,
        output=None,
        before=empty,
        after=empty,
        ratio=ratio_of(empty, empty),
        quality=None,
        layers=(layer(0, error=None), layer(1, error=math.nan)),
        settings={},
        environment={},
        seconds={},
        peak_memory_bytes=0,
        notes=(),
        optimised=None,
    )


def inspection(count: int = 3) -> Inspection:
    layers = tuple(
        LayerInfo(f"/block{i}/conv", "Conv", (64, 32, 3, 3), 18_432 + i, 10**6, i != 0, None if i else "grouped")
        for i in range(count)
    )
    inputs, outputs = ("image float32 [N,3,32,32]",), ("logits float32 [N,10]",)
    return Inspection("m.onnx", 17, 8, "pytorch 2.1", inputs, outputs, Totals(431_080, 15_200_000, 1_724_000), layers)


def render(what: Result | Inspection, verbose: bool = False, width: int = 80, **terminal) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, **terminal)
    (print_result if isinstance(what, Result) else print_inspection)(what, verbose, console=console)
    return file.getvalue()


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


# -------------------------------------------------------------------------------------------------------- result


def test_the_figures_are_there():
    text = flat(render(typical()))
    assert "Parameters 11.7 M 5.84 M 2.00x smaller" in text
    assert "MACs 1.81 G 907 M 2.00x fewer" in text
    assert "File size 46.8 MB 23.4 MB 2.00x smaller" in text
    assert "Latency 12.3 ms 7.80 ms 1.58x faster" in text
    assert "4 threads, CPUExecutionProvider" in text
    for figure in ("3.12 %", "0.99951", "98.50 %", "99.90 %", "76.10 %", "75.80 %", "<0.01 %", "200"):
        assert figure in text
    assert "No preprocessing was named" in text
    assert "Took 11.3 s, peak memory 812 MB." in text
    assert text.rstrip().endswith("Wrote small.onnx")


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("what", [typical(), laden_with_none(), inspection(30)], ids=["typical", "none", "inspection"])
def test_no_line_is_wider_than_the_console_or_a_hundred_columns(what, verbose, width):
    lines = render(what, verbose, width).splitlines()
    assert max(map(len, lines)) <= min(width, 100)


@pytest.mark.parametrize("what", [typical(), inspection()], ids=["result", "inspection"])
def test_no_colours_where_there_is_no_terminal(what):
    assert "\x1b" not in render(what)
    assert "\x1b" in render(what, force_terminal=True)


@pytest.mark.parametrize("verbose", [False, True])
def test_what_is_not_known_is_a_dash(verbose):
    text = flat(render(laden_with_none(), verbose))
    assert "Parameters 0 0 -" in text
    assert "Latency - - not measured" in text
    assert "Latency is the median" not in text
    assert "Quality: not measured" in text
    assert "Nothing was written" in text
    assert "nan" not in text
    assert "None" not in text
    assert "peak memory" not in text


def test_the_layers_with_the_most_left_come_first():
    text = render(typical())
    order = [int(found) for found in re.findall(r"/model/layer(\d+)/", text)]
    assert order == list(range(8))
    assert "The 8 of 12 compressible layers with the most parameters left" in flat(text)
    assert "1.18 M -> 590 k" in text


def test_a_budget_of_macs_sorts_and_counts_macs():
    text = render(typical(settings=Config(budget=Budget(macs=0.5)).to_dict()))
    assert [int(found) for found in re.findall(r"/model/layer(\d+)/", text)] == list(range(11, 3, -1))
    assert "116 M -> 21.0 M" in text


def test_verbose_shows_every_layer_and_every_reason():
    text = render(typical(), verbose=True)
    assert [int(found) for found in re.findall(r"/model/layer(\d+)/", text)] == list(range(12))
    assert all(f"/skipped/{i}" in text for i in range(5))
    assert "(capture 3.2 s, fit 8.1 s)" in text


def test_skipped_layers_are_counted_by_reason():
    text = flat(render(typical()))
    assert "3 27.0 k grouped convolution" in text
    assert "2 18.0 k too small" in text
    assert "/skipped/0" not in text


def test_many_reasons_are_cut_short():
    skipped = tuple(SkippedLayer(f"/s{i}", "Conv", 1, 1, f"reason {i}") for i in range(11))
    assert "and 3 more reasons" in render(typical(skipped=skipped))


@pytest.mark.parametrize(
    ("form", "figures"),
    [
        ("dense", "dense"),
        ("low-rank", "low-rank 64"),
        ("spatial", "spatial 64"),
        ("projected", "projected 64"),
        ("tucker", "tucker 32, 64"),
        ("channels", "channels 120/256"),
        ("low-rank + channels", "low-rank 64 + channels 120/256"),
        ("elements", "elements 5.00 %"),
        ("low-rank + elements", "low-rank 64 + elements 5.00 %"),
    ],
)
def test_a_form_is_shown_with_its_figures(form, figures):
    text = render(typical(layers=(layer(0, form, name="c"),), skipped=()), width=100)
    assert re.search(rf"Conv 512x256x3x3  {re.escape(figures)}  ", text)


def test_what_onnxruntime_fuses_is_a_line_and_by_name_what_compression_left_alone():
    text = flat(render(typical(), width=100))
    assert "As ONNX Runtime runs it: 20 -> 31 nodes; Conv 19 -> 26, in NCHWc 19 -> 25; reorders 2 -> 6; " in text
    assert "activations fused 18 -> 17; activations alone 1 -> 2; sums fused 3 -> 4; sums alone 1 -> 5." in text
    assert "copies" not in text
    names = ", ".join(f"/part{i}/conv/Conv.sum" for i in range(3))
    assert f"Not fused: {names} and 2 more (-v: all)." in text
    assert "Conv outside NCHWc: /part9/conv/Conv.right_product." in text
    assert "block/Add" not in text


def test_verbose_counts_the_nodes_that_run_and_names_all_that_stand_alone():
    text = flat(render(typical(), verbose=True, width=100))
    assert "com.microsoft.nchwc.Conv 19 25" in text
    assert "Add 1 5" in text
    assert "Not fused: block/Add, " in text
    assert "more (-v: all)" not in text


def test_what_a_device_leaves_to_the_cpu_is_said():
    graph = OptimisedGraph({"MatMul": 2, "MemcpyToHost": 1}, 0, 0, 0, 0, 0, copies=1, elsewhere=("shape",))
    before = dataclasses.replace(graph, copies=0, elsewhere=None)
    text = flat(render(typical(optimised=Optimised(before, graph)), width=100))
    assert "runs it: 3 -> 3 nodes; copies to or from the CPU 0 -> 1; nodes left to the CPU 0 -> 1." in text
    assert "Left to the CPU: shape." in text


def test_dropped_filters_are_shown():
    text = flat(render(typical(layers=(layer(0, "dense", name="c", kept_outputs=400),)), width=100))
    assert "dense, outputs 400/512" in text


def test_elements_are_a_share_of_the_filters_that_are_left():
    shown = layer(0, "elements", name="c", kept_outputs=256)
    assert "elements 10.00 %, outputs 256/512" in flat(render(typical(layers=(shown,)), width=100))


def test_a_result_without_layers():
    assert "No layer was compressed." in render(typical(layers=(), skipped=()))


def test_columns_nobody_filled_are_left_out():
    text = render(typical(quality=(OutputQuality("y", 0.1, 0.9, 5),)))
    assert "Top-1" not in text
    assert "Accuracy" not in text
    assert "10.00 %" in text


def test_names_are_no_markup_and_hold_no_control_characters():
    text = render(typical(layers=(layer(0, name="[red]a\x1b[2J\nb[/red]:smile:"),), notes=("[bold]x",)), width=100)
    assert "[red]a?[2J?b[/red]:smile:" in text
    assert "\x1b" not in text
    assert "Note: [bold]x" in text


def test_a_long_path_stays_in_one_piece():
    path = "/data/" + "x" * 120 + "/small.onnx"
    assert f"Wrote {path}\n" in render(typical(output=path))


# ---------------------------------------------------------------------------------------------------- inspection


def test_an_inspection_says_what_is_there():
    text = flat(render(inspection()))
    for told in ("m.onnx", "opset 17, IR version 8", "pytorch 2.1", "image float32 [N,3,32,32]", "431 k", "15.2 M"):
        assert told in text
    assert "File size 1.72 MB" in text
    assert "Conv 64x32x3x3" in text
    assert "no: grouped" in text
    assert "2 of 3 layers can be compressed; they hold 66.67 % of these layers' parameters" in text


def test_a_large_inspection_shows_the_largest_layers():
    short, long = render(inspection(30)), render(inspection(30), verbose=True)
    assert "The 20 largest of 30 layers" in short
    assert "/block29/conv" in short
    assert "/block0/conv" not in short
    assert all(f"/block{i}/conv" in long for i in range(30))


def test_an_inspection_of_nothing():
    empty = dataclasses.replace(inspection(0), input=None, producer="", notes=("A note.",))
    text = render(empty)
    assert "0 of 0 layers" in text
    assert "Note: A note." in text


# ------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (431_080, "431 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (15_200_000, "15.2 M"),
        (9_996_000, "10.0 M"),
        (1_230_000_000, "1.23 G"),
        (7_000_000_000_000_000, "7000 T"),
    ],
)
def test_counts(value, text):
    assert words.count(value) == text


def test_bytes_are_decimal():
    assert [words.byte_count(n) for n in (12, 1_724_000, 46_800_000)] == ["12 B", "1.72 MB", "46.8 MB"]


@given(st.integers(0, 10**15))
def test_a_count_is_within_half_a_percent(value):
    number, _, prefix = words.count(value).partition(" ")
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]
    assert float(number) * scale == pytest.approx(value, rel=0.00501)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(2.0, "2.00x up"), (0.5, "2.00x down"), (1.0, "same"), (0.999, "same"), (None, "-"), (math.nan, "-"), (0.0, "-")],
)
def test_changes_in_words(ratio, text):
    assert words.change(ratio, "up", "down") == text


def test_times():
    assert [words.milliseconds(v) for v in (0.0421, 1.234, 12.34, 1234.5, None)] == [
        "0.042 ms",
        "1.23 ms",
        "12.3 ms",
        "1234 ms",
        "-",
    ]
    assert [words.seconds(v) for v in (0.04, 119.0, 125.9)] == ["0.0 s", "119.0 s", "2 min 5 s"]


# ------------------------------------------------------------------------------------------------------ progress


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(progress: ConsoleProgress) -> None:
    progress.stage("Capture", 2)
    progress.step("conv1")
    progress.step("[red]conv2")
    progress.note("[bold]A note.")
    progress.stage("Fit", 1)
    progress.step("conv1")
    progress.stage("Write", 0)


def break_off(display: ConsoleProgress, error: BaseException) -> None:
    with display as progress:
        progress.stage("Fit", 5)
        progress.step("conv1")
        raise error


def test_without_a_terminal_a_stage_is_one_line():
    file = io.StringIO()
    with ConsoleProgress(Console(file=file, width=20)) as progress:
        work(progress)
    lines = [re.sub(r"[\d.]+ s$", "T s", line) for line in file.getvalue().splitlines()]
    assert lines == ["[bold]A note.", "Capture: 2 steps, T s", "Fit: 1 step, T s", "Write: T s"]


def test_a_log_file_gets_lines_even_when_colours_are_forced():
    file = io.StringIO()
    with ConsoleProgress(Console(file=file, width=80, force_terminal=True)) as progress:
        work(progress)
    assert len(file.getvalue().splitlines()) == 4


def test_a_stage_that_breaks_off_says_how_far_it_came():
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        break_off(ConsoleProgress(Console(file=file, width=80)), KeyboardInterrupt())
    assert file.getvalue().startswith("Fit: stopped after 1 of 5 steps, ")


@pytest.mark.parametrize("file", [io.StringIO(), Tty()])
def test_quiet_progress_is_silent(file):
    with ConsoleProgress(Console(file=file, force_terminal=file.isatty()), quiet=True) as progress:
        work(progress)
    assert file.getvalue() == ""


def test_a_step_outside_a_stage_is_ignored():
    with ConsoleProgress(Console(file=io.StringIO())) as progress:
        progress.step("conv1")


def test_a_terminal_gets_bars_and_its_cursor_back():
    file = Tty()
    console = Console(file=file, width=100, force_terminal=True, force_interactive=True)
    with ConsoleProgress(console) as progress:
        work(progress)
    text = file.getvalue()
    assert "Capture" in text
    assert "2/2" in text
    assert "[bold]A note." in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_the_terminal_comes_back_after_an_error():
    file = Tty()
    console = Console(file=file, width=100, force_terminal=True, force_interactive=True)
    with pytest.raises(ValueError, match="no"):
        break_off(ConsoleProgress(console), ValueError("no"))
    text = file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "1/5" in text
