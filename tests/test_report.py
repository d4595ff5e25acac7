"""Pages: one file from the record alone, nothing from outside, every figure the record's, whatever names hold."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import html.parser
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lrs
from onnx_lrs import Budget, CompareConfig, Comparison, Config, Preprocess, Result, cli, errors, pipeline
from onnx_lrs.graph import model as models
from onnx_lrs.progress import Silent
from onnx_lrs.report import html as pages
from onnx_lrs.report import plots, words
from onnx_lrs.report.call import python_call
from onnx_lrs.report.comparison import ComparedModel, LayerTime, Timed
from onnx_lrs.report.result import (
    Certificate,
    ChangedAnswer,
    Changes,
    CurvePoint,
    LayerResult,
    OutputQuality,
    Pareto,
    ParetoPoint,
    SearchStep,
    SkippedLayer,
)
from onnx_lrs.report.result_page import MOST_EXAMPLES, MOST_PLOTS, MOST_ROWS, content
from tests import small_nets as nets
from tests.test_console import FORMS, layer, typical
from tests.test_examples import pictures

LARGEST = 2_000_000  # bytes of a page
VOID = {"meta", "link", "br", "img", "line", "path", "use", "rect"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "</style></title><base href=//evil>",
    "$\\frac{1}{2}$ &lt;b&gt;",
    "a\u202eb\x00c\ud800d\ne",
    "x" * 5000,
)


class Reader(html.parser.HTMLParser):
    """A page as it is read: its tags with attributes, the text of each section, and whether tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.cells: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.sections[self._section] = ""
            self.cells[self._section] = []
        if tag == "tr" and self._section:
            self.cells[self._section].append([])
        if tag == "td":
            self.cells[self._section][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += data
            if "td" in self._open:
                rows = self.cells[self._section]
                rows[-1][-1] = f"{rows[-1][-1]} {data.strip()}".strip()

    def rows(self, section: str) -> list[list[str]]:
        """Return the cells of the rows of a section's tables, headers apart."""
        return [row for row in self.cells[section] if row]

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


def widths(page: str, kind: str) -> list[float]:
    """Return the lengths of the bars of a kind, in order."""
    return [float(share) for share in re.findall(rf'<i class="{kind}" style="width:([\d.]+)%"', page)]


# ------------------------------------------------------------------------------------------------ records and runs


def curved(index: int, name: str | None = None, form: str = "low-rank") -> LayerResult:
    """Return a layer with a curve of three forms."""
    found = layer(index, form)
    points = [
        CurvePoint(kind, 8 * i, 4 * i if kind == "channels" else 0, 0, 100_000 * i, 0.5 / i**2, False)
        for kind in ("channels", "low-rank", "spatial")
        for i in range(1, 9)
    ]
    points[3] = dataclasses.replace(points[3], chosen=True)
    return dataclasses.replace(found, curve=tuple(points), low_rank_params=found.params_after, name=name or found.name)


def full(name: str = "conv", count: int = 3) -> Result:
    """Return a record in which everything is there, ``name`` wherever a text comes from a file or a user."""
    answer = ChangedAnswer(7, name, 1, 2, 1, (2.5, 1.25), (1.0, 3.5), name, name, name, b"\xff\xd8picture")
    return typical(
        input=name,
        output=name,
        quality=(OutputQuality(name, 0.03, 0.99, 200, 0.9, 0.99, 0.8, 0.79),),
        layers=tuple(curved(i, f"{name}{i}") for i in range(count)),
        skipped=tuple(SkippedLayer(f"{name}{i}", "Conv", 9000, 10, f"grouped {name}") for i in range(count)),
        settings=Config(budget=Budget(max_drop=0.01, latency=0.7), exclude=(name,), threads=2).to_dict(),
        environment={"provider": name, "cpu": name},
        notes=(f"One {name}.",),
        search=(
            SearchStep(0.5, 0.45, 0.2, "accuracy", "alone", False),
            SearchStep(0.7, 0.65, 0.0, "accuracy", "cascade", True),
            SearchStep(0.7, 0.65, 0.005, "accuracy", "confirm", True),
        ),
        certificate=Certificate(name, (name, name), 10, 0.2, 0.1),
        changes=(Changes(name, 20, 9, 4, (answer, dataclasses.replace(answer, label=None, thumbnail=b""))),),
        pareto=Pareto(
            "latency",
            0.7,
            tuple(ParetoPoint(0.2 + 0.1 * i, 0.5 * 0.3**i, 9 - i) for i in range(8)),
            ParetoPoint(0.6, 0.006, 4),
        ),
        call=f"onnx-lrs {name}",
    )


def compared(name: str = "model", layers: int = 2) -> Comparison:
    quality = (OutputQuality("y", 0.03, 0.99, 200, 0.9, 0.99),)
    answer = ChangedAnswer(7, name, 1, 2, None, (2.5, 1.25), (1.0, 3.5))
    return Comparison(
        models=(
            ComparedModel(name, name, 4000, 1000, 3.25, None, None),
            ComparedModel(
                f"{name} 2", None, 2000, 500, 1.5, 99_000_000, 9, quality, (Changes("y", 1, None, None, (answer,)),)
            ),
        ),
        timings=tuple(
            timed
            for batch in (1, 8)
            for timed in (
                Timed(name, "cpu", batch, 99, 2.0, 2.1, 2.2, 2.5, 490.0, 1.0, 1.0, 1.0, "first"),
                Timed(f"{name} 2", "cpu", batch, 99, 1.0, 1.1, 1.2, 1.5, 980.0, 0.5, 0.4, 0.64, "faster", None, 3, 2),
            )
        ),
        layers=tuple(LayerTime(f"{name}{i}", "Conv", "cpu", 1, (0.5 + i, 0.25)) for i in range(layers)),
        data=name,
        level=0.99,
        settings=CompareConfig(threads=2).to_dict(),
        environment={
            "versions": {"onnxruntime": "1"},
            "cpu": name,
            "cpu_count": 2,
            "threads": 2,
            "gpu": None,
            "date": "x",
        },
        seconds={"total": 1.0},
        notes=(f"One {name}.",),
        call=f"onnx-lrs compare {name}",
    )


PAGES = {"run": full(), "comparison": compared(), "bare": typical(settings={}, environment={}, quality=None)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("report")
    onnx.save(nets.conv_net(), place / "model.onnx")
    pictures(place / "test")
    np.save(place / "data.npy", nets.as_floats(nets.pictures()))
    return place


@pytest.fixture(scope="module")
def squeezed(folder) -> tuple[Result, str]:
    """A real run: its record, and the page as it was written."""
    config = Config(budget=Budget(params=0.1), threads=1, multiple=1, report=folder / "run.html")
    sources = {"data": folder / "data.npy", "test": folder / "test", "labels": "folders"}
    result = onnx_lrs.compress(folder / "model.onnx", folder / "small.onnx", **sources, config=config)
    return result, (folder / "run.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def raced(squeezed, folder) -> tuple[Comparison, str]:
    """A real comparison, profile and pictures included."""
    config = CompareConfig(rounds=20, threads=1, profile=True, report=folder / "compare.html")
    paths = [folder / "model.onnx", folder / "small.onnx"]
    found = onnx_lrs.compare(paths, data=folder / "test", labels="folders", config=config)
    return found, (folder / "compare.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ one file, whole


def every_page(squeezed, raced) -> Iterator[str]:
    yield from (squeezed[1], raced[1])
    yield from (record.to_html() for record in PAGES.values())


def test_a_page_is_one_file_without_anything_from_outside(squeezed, raced):
    for page in every_page(squeezed, raced):
        assert len(page.encode()) < LARGEST
        assert not re.findall(r"https?:|@import|expression\(|javascript:", page)
        assert set(re.findall(r"url\((.)", page)) <= {"#"}
        read = Reader(page)
        for tag, attributes in read.tags:
            assert tag not in ("script", "iframe", "object", "embed", "base", "form")
            for name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
                assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        policy = [a["content"] for tag, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_names_within_a_page_are_there_once_and_links_lead_somewhere(squeezed, raced):
    for page in every_page(squeezed, raced):
        names = [attributes["id"] for _, attributes in Reader(page).tags if "id" in attributes]
        assert len(names) == len(set(names))
        targets = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
        assert set(targets) <= set(names)


def test_the_same_record_gives_the_same_bytes(squeezed, raced):
    assert squeezed[0].to_html() == squeezed[1]
    assert raced[0].to_html() == raced[1]


def test_so_it_does_in_another_process_with_another_taste(tmp_path):
    (tmp_path / "matplotlibrc").write_text(
        "lines.linewidth: 9\nsvg.fonttype: path\naxes.prop_cycle: cycler('color', ['r'])\n"
    )
    code = (
        "import hashlib\nfrom tests.test_report import PAGES\n"
        "print(hashlib.sha256(''.join(r.to_html() for r in PAGES.values()).encode()).hexdigest())"
    )
    ours = hashlib.sha256("".join(record.to_html() for record in PAGES.values()).encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path), "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == ours, done.stderr


def test_drawing_leaves_the_callers_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    full().to_html()
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not matplotlib.pyplot.get_fignums()


# ------------------------------------------------------------------------------------------------ names of any kind


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_is_text_whatever_it_holds(name):
    for plain, page in ((full().to_html(), full(name).to_html()), (compared().to_html(), compared(name).to_html())):
        ours, theirs = Reader(plain), Reader(page)
        assert [tag for tag, _ in theirs.tags] == [tag for tag, _ in ours.tags]
        assert [set(a) for _, a in theirs.tags] == [set(a) for _, a in ours.tags]
        assert page.encode("utf-8")
        assert "49" not in theirs.text("notes")
        whole = words.printable(name)
        assert (whole if len(whole) <= pages.LONGEST_NAME else whole[:30]) in theirs.text("notes")
        assert len(page.encode()) < LARGEST


def test_hundreds_of_layers_with_endless_names_fit():
    many = full("long " * 2000, count=600)
    quality = tuple(dataclasses.replace(many.quality[0], name=f"{i}" * 5000) for i in range(100))
    one = many.changes[0].examples[0]
    pictured = dataclasses.replace(one, thumbnail=b"x" * 4000)
    changes = tuple(Changes(f"{i}", 12, 1, 1, (pictured,) * 12) for i in range(40))
    page = dataclasses.replace(many, quality=quality, changes=changes).to_html()
    assert len(page.encode()) < LARGEST
    read = Reader(page)
    assert f"{600 - MOST_ROWS} more are in the JSON" in read.text("layers")
    assert f"{600 - MOST_PLOTS} more are in the JSON" in read.text("curves")
    assert sum(tag == "svg" and a.get("class") == "plot" for tag, a in read.tags) == MOST_PLOTS + 2
    assert sum(tag == "img" for tag, _ in read.tags) == MOST_EXAMPLES
    times = compared("long " * 2000, layers=600).to_html()
    assert len(times.encode()) < LARGEST
    assert f"{600 - MOST_ROWS} more are in the JSON" in Reader(times).text("layers")


# ------------------------------------------------------------------------------------------------ sections


SECTIONS = {"summary", "quality", "layers", "curves", "pareto", "search", "skipped", "notes", "again", "settings"}


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, set()),
        ({"pareto": None}, {"pareto"}),
        ({"search": ()}, {"search"}),
        ({"skipped": ()}, {"skipped"}),
        ({"notes": ()}, {"notes"}),
        ({"call": ""}, {"again"}),
        ({"layers": (layer(0),)}, {"curves"}),
        ({"layers": ()}, {"curves"}),
    ],
)
def test_sections_that_have_nothing_to_tell_are_not_there(changes, missing):
    read = Reader(dataclasses.replace(full(), **changes).to_html())
    assert set(read.sections) == SECTIONS - missing
    linked = {attributes["href"][1:] for tag, attributes in read.tags if tag == "a"}
    assert linked <= set(read.sections)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"quality": None}, "there was no calibration data"),
        ({"quality": ()}, "the model has no floating-point output"),
        ({"quality": None, "dry_run": True}, "a dry run"),
        ({"quality": None, "unchanged": "no layer becomes faster"}, "nothing was changed"),
    ],
)
def test_why_there_is_no_quality(changes, why):
    assert f"Not measured: {why}." in Reader(dataclasses.replace(full(), **changes).to_html()).text("quality")


def test_what_is_not_known_is_a_dash():
    unknown = dataclasses.replace(
        full(),
        before=dataclasses.replace(full().before, latency_ms=None, macs=0),
        ratio=dataclasses.replace(full().ratio, macs=math.nan, latency_ms=None),
        quality=(OutputQuality("y", math.nan, math.inf, 1),),
        layers=tuple(dataclasses.replace(curved(i), error=e) for i, e in enumerate((None, math.nan, math.inf))),
        search=(SearchStep(0.5, 0.5, math.inf, "accuracy", "alone", False),),
        pareto=Pareto("params", None, (ParetoPoint(0.5, math.nan, 1),), None),
    )
    broken = tuple(dataclasses.replace(p, error=math.nan) for p in unknown.layers[0].curve)
    unknown = dataclasses.replace(
        unknown, layers=(dataclasses.replace(unknown.layers[0], curve=broken), *unknown.layers[1:])
    )
    read = Reader(unknown.to_html())
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(read.sections.values()))
    assert read.rows("quality")[0][1:3] == ["-", "-"]
    assert "not measured" in read.text("summary")


# ------------------------------------------------------------------------------------------------ figures


def test_the_figures_are_those_of_the_record(squeezed):
    result, page = squeezed
    read = Reader(page)
    summary = read.text("summary")
    before, after = result.before, result.after
    for figure in (
        f"Parameters {words.change(result.ratio.params, 'smaller', 'larger')} "
        f"{words.count(before.params)} → {words.count(after.params)}",
        f"{words.byte_count(before.file_bytes)} → {words.byte_count(after.file_bytes)}",
        f"{words.milliseconds(before.latency_ms)} → {words.milliseconds(after.latency_ms)}",
    ):
        assert figure in summary
    assert read.rows("summary") == [
        ["parameters left", "at most 10.00 %", words.percent(after.params / before.params), "met"]
    ]
    (quality,) = result.quality
    accuracy = f"{words.percent(quality.accuracy_before)} → {words.percent(quality.accuracy_after)}"
    shown = [words.percent(quality.relative_l2), f"{quality.cosine:.5f}", words.percent(quality.top1_agreement)]
    assert read.rows("quality") == [["logits", *shown, words.percent(quality.top5_agreement), accuracy, "60"]]
    for row, one in zip(read.rows("layers"), result.layers, strict=True):
        weights = f"{words.count(one.params_before)} → {words.count(one.params_after)}"
        share = words.percent(one.params_before / before.params)
        cells = [one.name, words.weight(one.op, one.shape), words.form(one), weights, share]
        assert row == [*cells, words.percent(words.error(one))]
    assert read.rows("skipped")[: len({s.reason for s in result.skipped})][0][1] == words.count(
        result.skipped[0].params
    )
    for note in result.notes:
        assert note in read.text("notes")
    assert str(result.settings["columns"]) in read.text("settings")
    assert result.environment["versions"]["onnx"] in read.text("settings")


def test_bars_are_as_long_as_the_figures(squeezed):
    result, page = squeezed
    parts = page[page.index('<section id="layers">') : page.index('<section id="curves">')]
    low = [100 * one.low_rank_params / one.params_before for one in result.layers]
    sparse = [100 * one.sparse_params / one.params_before for one in result.layers]
    assert widths(parts, "low-rank") == pytest.approx(low, abs=0.006)
    assert widths(parts, "sparse") == pytest.approx(sparse, abs=0.006)
    worst = max(words.error(one) for one in result.layers)
    errors_shown = [100 * words.error(one) / worst for one in result.layers if words.error(one)]
    assert widths(parts, "error") == pytest.approx(errors_shown, abs=0.006)
    left = [result.after.params / result.before.params, result.after.macs / result.before.macs]
    assert widths(page, "after")[:2] == pytest.approx([100 * share for share in left], abs=0.006)


def test_changed_answers_are_shown_with_their_pictures(squeezed):
    result, page = squeezed
    (changes,) = result.changes
    assert changes.examples
    read = Reader(page)
    text = read.text("quality")
    assert f"{changes.changed} answer" in text
    assert f"{changes.lost} right before and wrong now, {changes.won} wrong before and right now" in text
    for answer in changes.examples:
        assert f"{answer.name} {answer.before_text} ({answer.before}) → {answer.after_text} ({answer.after})" in text
        assert f"original: {answer.before_scores[0]:.3g} against {answer.before_scores[1]:.3g}" in text
    shown = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    assert len(shown) == len(changes.examples)
    assert all(src.startswith("data:image/jpeg;base64,/9j/") for src in shown)


def test_a_page_needs_the_record_only(squeezed):
    """Without the model beside it the page is the same: it is a function of the record."""
    result, page = squeezed
    assert dataclasses.replace(result, model=None).to_html() == page
    assert content(result)["result"] is result


@pytest.mark.parametrize(
    ("budget", "search", "shown"),
    [
        (Budget(params=0.5), (), ["parameters left", "at most 50.00 %", "50.00 %", "met"]),
        (Budget(macs=0.4), (), ["multiply-accumulates left", "at most 40.00 %", "50.00 %", "missed"]),
        (Budget(latency=0.633), (), ["latency left", "at most 63.30 %", "63.36 %", "met"]),
        (Budget(latency=0.6), (), ["latency left", "at most 60.00 %", "63.36 %", "missed"]),
        (Budget(size=0.6), (), ["file size left", "at most 60.00 %", "50.00 %", "met"]),
        (Budget(max_drop=0.01), full().search, ["accuracy lost", "at most 1.00 %", "0.50 %", "met"]),
        (Budget(max_drop=0.01), full().search[:2], ["quality lost", "at most 1.00 %", "-", "missed"]),
    ],
)
def test_each_limit_is_told_with_what_was_reached(budget, search, shown):
    record = typical(settings=Config(budget=budget, threads=1).to_dict(), search=search)
    assert Reader(record.to_html()).rows("summary") == [shown]


def test_guarantees_and_plans_that_were_carried_out_are_told():
    kept = layer(0, allowed_error=0.1, reached_error=0.08)
    record = typical(settings=Config(budget=Budget(gain=0.1), threads=1).to_dict(), layers=(kept,))
    assert Reader(record.to_html()).rows("summary") == [["error of each layer", "at most 10.00 %", "8.00 %", "met"]]
    over = dataclasses.replace(record, layers=(dataclasses.replace(kept, reached_error=0.2),))
    assert Reader(over.to_html()).rows("summary")[0][-1] == "missed"
    carried = typical(settings=Config(plan="plan.json", threads=1).to_dict())
    assert Reader(carried.to_html()).rows("summary") == [["plan", "plan.json", "carried out", "met"]]
    assert "is off by at most 20.00 % on 10 calibration samples; measured 10.00 %" in Reader(full().to_html()).text(
        "quality"
    )


def test_a_comparison_shows_its_figures(raced):
    found, page = raced
    read = Reader(page)
    rows = read.rows("times")
    for row, timed in zip(rows, found.timings, strict=True):
        times = [words.milliseconds(ms) for ms in (timed.median_ms, timed.p90_ms, timed.p99_ms)]
        assert row[:4] == [words.shortened(timed.model, pages.LONGEST_NAME), *times]
        if timed.verdict != "first":
            assert f"{timed.ratio:.3f} ({timed.ratio_low:.3f} – {timed.ratio_high:.3f})" in row[5]
            assert row[6] == words.said(timed)
    for row, model in zip(read.rows("models"), found.models, strict=True):
        figures = [words.byte_count(model.file_bytes), words.count(model.params), words.milliseconds(model.load_ms)]
        assert row[1:] == [*figures, words.byte_count(model.peak_memory_bytes)]
    for row, timed in zip(read.rows("layers"), found.layers, strict=True):
        assert row[1:] == [words.milliseconds(ms) for ms in timed.ms]
    assert found.machine() in page
    assert f"{found.models[1].changes[0].changed} answer" in read.text("quality")


def test_intervals_lie_where_they_belong():
    """On a logarithmic axis from a bit below the least ratio to a bit above the largest, which is that of the first."""
    page = compared().to_html()
    ones = [float(x) for x in re.findall(r'<i style="left:([\d.]+)%"', page)]
    bars = [(float(x), float(w)) for x, w in re.findall(r'<b style="left:([\d.]+)%;width:([\d.]+)%"', page)]
    middles = [float(x) for x in re.findall(r'<u style="left:([\d.]+)%"', page)]
    assert len(set(ones)) == 1
    first, second = bars[:2]
    assert first == (pytest.approx(ones[0]), 0.0)
    assert 0 < second[0] < middles[1] < sum(second) < ones[0] < 100
    scale = (ones[0] - second[0]) / math.log(1 / 0.4)
    assert middles[1] == pytest.approx(ones[0] - scale * math.log(1 / 0.5), abs=0.02)
    assert sum(second) == pytest.approx(ones[0] - scale * math.log(1 / 0.64), abs=0.02)


# ------------------------------------------------------------------------------------------------ plots


@pytest.fixture
def drawn(monkeypatch) -> list:
    """What was drawn: (x, y, marker) of the lines of each plot."""
    found = []

    def look(draw, inches, salt):
        from matplotlib.figure import Figure

        axes = Figure().add_subplot()
        draw(axes)
        lines = [(list(map(float, ln.get_xdata())), list(map(float, ln.get_ydata())), ln) for ln in axes.lines]
        found.append((axes, lines))
        return ""

    monkeypatch.setattr(plots, "_svg", look)
    return found


def test_curves_are_drawn_from_the_record(drawn):
    one = curved(0)
    plots.curve(one, "x")
    ((axes, lines),) = drawn
    forms = list(dict.fromkeys(point.form for point in one.curve))
    assert len(lines) == len(forms) + 1
    for (x, y, _), form in zip(lines, forms, strict=False):
        own = [point for point in one.curve if point.form == form]
        assert x == pytest.approx([point.params / one.params_before for point in own])
        assert y == pytest.approx([point.error for point in own])
    (chosen,) = [point for point in one.curve if point.chosen]
    assert lines[-1][:2] == ([chosen.params / one.params_before], [chosen.error])
    assert lines[-1][2].get_marker() == "o"
    assert axes.get_yscale() == "log"
    (above,) = axes.child_axes
    low = next(point for point in one.curve if point.form == "low-rank")
    assert above._functions[0](low.params / one.params_before) == pytest.approx(low.rank)


def test_other_budgets_are_drawn_from_the_record(drawn):
    found = full().pareto
    plots.pareto(found)
    ((_, lines),) = drawn
    assert lines[0][0] == [point.fraction for point in found.points]
    assert lines[0][1] == [point.loss for point in found.points]
    assert lines[1][:2] == ([found.chosen.fraction], [found.chosen.loss])
    assert lines[2][0] == [0.7, 0.7]


def test_the_search_is_drawn_from_the_record(drawn):
    steps = full().search
    plots.search(steps, 0.01)
    ((_, lines),) = drawn
    assert [(x[0], y[0]) for x, y, _ in lines[:-1]] == [(step.predicted, step.drop) for step in steps]
    assert lines[-1][1] == [0.01, 0.01]
    assert [line.get_marker() for _, _, line in lines[:-1]] == ["o", "s", "D"]


def test_plots_take_their_colours_from_the_page(squeezed):
    page = squeezed[1]
    assert not [colour for colour in plots.INKS.values() if colour in page]
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for name in plots.INKS:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark.split("@media")[0]
    for kind in FORMS[1:]:
        assert plots.ink(kind) in plots.INKS
        assert kind in plots.LINES


def test_every_form_has_a_legend():
    points = [CurvePoint(form, 1, 1, 1, 1000 * i, 0.5 / i, False) for form in FORMS[1:] for i in (1, 2)]
    page = dataclasses.replace(full(), layers=(dataclasses.replace(layer(0), curve=tuple(points)),)).to_html()
    for form in FORMS[1:]:
        assert f'stroke="var(--{plots.ink(form)})"' in page


# ------------------------------------------------------------------------------------------------ runs of every kind


RUNS = {
    "no data": ({}, {"budget": Budget(params=0.5)}),
    "dry run": ({"data": True}, {"budget": Budget(params=0.5), "dry_run": True}),
    "gain": ({"data": True}, {"budget": Budget(gain=0.2), "method": "ddlr"}),
    "elements": ({"data": True}, {"budget": Budget(params=0.5), "method": "greedy", "structure": "elements"}),
    "random": ({}, {"budget": Budget(macs=0.6), "random_data": True}),
    "whole": ({"data": True}, {"budget": Budget(params=1.0)}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_runs_of_every_kind_have_a_page(kind, tmp_path):
    sources, settings = RUNS[kind]
    data = nets.as_floats(nets.pictures()) if sources else None
    config = Config(threads=1, report=tmp_path / "page.html", **settings)
    result = onnx_lrs.compress(nets.conv_net(), tmp_path / "o.onnx", data=data, config=config)
    read = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert ("pareto" in read.sections) == (result.pareto is not None) == (kind != "gain")
    assert ("curves" in read.sections) == (kind != "gain")
    assert len(read.rows("layers")) == len(result.layers)
    json.loads(result.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize(("model", "data"), [(nets.block(), nets.sentences()), (nets.two_inputs(), nets.pairs())])
def test_several_outputs_each_have_their_line(model, data, tmp_path):
    config = Config(threads=1, budget=Budget(params=0.5), report=tmp_path / "page.html")
    result = onnx_lrs.compress(model, data=data, config=config)
    rows = Reader((tmp_path / "page.html").read_text(encoding="utf-8")).rows("quality")
    assert [row[0] for row in rows] == [quality.name for quality in result.quality]


def test_where_the_original_is_kept_the_page_says_so(tmp_path):
    data = np.random.default_rng(0).standard_normal((60, 64, 8, 8), np.float32)
    config = Config(threads=1, budget=Budget(max_drop=0.1), report=tmp_path / "page.html")
    result = onnx_lrs.compress(nets.depthwise_net(), tmp_path / "o.onnx", data=data, config=config)
    assert result.unchanged
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"Nothing pays: {result.unchanged}." in page
    assert "Not measured: nothing was changed." in Reader(page).text("quality")


def test_the_model_is_the_same_with_and_without_a_page(squeezed, folder, tmp_path):
    config = Config(budget=Budget(params=0.1), threads=1, multiple=1)
    sources = {"data": folder / "data.npy", "test": folder / "test", "labels": "folders"}
    onnx_lrs.compress(folder / "model.onnx", tmp_path / "small.onnx", **sources, config=config)
    assert (tmp_path / "small.onnx").read_bytes() == (folder / "small.onnx").read_bytes()
    assert config.deciding() == dataclasses.replace(config, report="x.html").deciding()


def test_a_plan_that_is_carried_out_has_no_curves(folder, tmp_path):
    plan = {"plan": tmp_path / "plan.json", "threads": 1, "report": tmp_path / "page.html"}
    source = {"data": folder / "data.npy"}
    first = onnx_lrs.compress(nets.conv_net(), **source, config=Config(budget=Budget(params=0.5), **plan))
    again = onnx_lrs.compress(nets.conv_net(), **source, config=Config(**plan))
    assert (first.pareto is not None, again.pareto) == (True, None)
    read = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert {"curves", "pareto"} & set(read.sections) == set()
    assert read.rows("summary")[0][0] == "plan"


# ------------------------------------------------------------------------------------------------ how to do it again


def test_the_call_is_python_that_does_the_same():
    budget = Budget(params=0.5, macs=0.75)
    config = Config(budget=budget, seed=3, exclude=("*a b*",), shapes={"x": (1, 3)}, preprocess=Preprocess((2, 3)))
    named = {"data": Path("cal dir"), "labels": None, "config": config}
    call = python_call("compress", ("it's.onnx", Path("o.onnx")), named)
    seen: dict = {}

    def compress(*given, **more):
        seen.update(given=given, more=more)

    library = types.SimpleNamespace(Budget=Budget, Config=Config, Preprocess=Preprocess, compress=compress)
    eval(call, {"onnx_lrs": library})  # our own text
    assert seen == {"given": ("it's.onnx", "o.onnx"), "more": {"data": "cal dir", "config": config}}


def test_what_cannot_be_written_is_abbreviated():
    array, model = np.zeros((48, 3), np.float32), nets.one_gemm(8, 8)
    call = python_call("compress", (model, None), {"data": array, "labels": [1] * 99, "test": iter(())})
    assert call.startswith("onnx_lrs.compress(<ModelProto>, data=<array float32 (48, 3)>, labels=<list>, test=<")
    call = python_call("compare", ([model, "b.onnx"],), {"data": {"x": array}, "config": CompareConfig(threads=17)})
    assert call == "onnx_lrs.compare([<ModelProto>, 'b.onnx'], data=<dict>, config=onnx_lrs.CompareConfig(threads=17))"
    assert len(python_call("compress", ("x" * 9999,), {})) < 300


def test_a_run_from_python_says_how_it_was_called(squeezed, folder):
    result, page = squeezed
    assert result.call.startswith(
        f"onnx_lrs.compress('{folder}/model.onnx', '{folder}/small.onnx', data='{folder}/data.npy'"
    )
    assert "budget=onnx_lrs.Budget(params=0.1)" in result.call
    assert result.call in Reader(page).sections["again"]


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def shell(folder, squeezed, tmp_path, monkeypatch) -> Path:
    """A working folder with a model, a smaller one and data."""
    for name in ("model.onnx", "small.onnx", "data.npy"):
        shutil.copy(folder / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_line_writes_a_page_that_repeats_it(shell):
    argv = ["model.onnx", "-o", "o.onnx", "--data", "data.npy", "--params", "0.5", "--exclude", "fc 1*", "fc2*"]
    argv = [*argv[:-3], "--report", "page.html", "--json", "report.json", "-q", "--threads", "1"]
    assert cli.main(argv) == 0
    page = (shell / "page.html").read_text(encoding="utf-8")
    told = " ".join(Reader(page).sections["again"].split()).removeprefix("The same again ")
    assert shlex.split(told) == ["onnx-lrs", *argv]
    assert json.loads((shell / "report.json").read_text())["call"] == shlex.join(["onnx-lrs", *argv])
    assert json.loads((shell / "report.json").read_text())["pareto"]["chosen"]
    assert sorted(path.name for path in shell.iterdir()) == sorted(
        ["model.onnx", "small.onnx", "data.npy", "o.onnx", "page.html", "report.json"]
    )


def test_a_comparison_and_the_demo_write_one_too(shell):
    argv = ["compare", "model.onnx", "small.onnx", "--rounds", "20", "--threads", "1", "--report", "it's.html", "-q"]
    assert cli.main(argv) == 0
    assert shlex.join(["onnx-lrs", *argv]) in Reader((shell / "it's.html").read_text("utf-8")).sections["again"]
    assert cli.main(["demo", "--report", "demo.html", "--threads", "1", "-q"]) == 0
    assert "onnx-lrs demo --report demo.html" in Reader((shell / "demo.html").read_text("utf-8")).sections["again"]


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        ("missing/page.html", 7, "does not exist"),
        (".", 7, "is a folder"),
        ("-", 2, "the page goes into a file"),
        ("", 7, "a folder"),
        ("model.onnx", 2, "would overwrite the model"),
        ("o.onnx", 2, "would overwrite the output"),
        ("data.npy", 2, "would overwrite the data"),
        ("r.json", 2, "name the same file"),
        ("plan.json", 2, "would overwrite the plan"),
        ("o.onnx.data", 2, "would overwrite o.onnx.data"),
    ],
)
def test_a_place_that_will_not_do_is_refused_before_the_work(place, code, said, shell, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "_run", lambda *_: pytest.fail("it began"))
    argv = ["model.onnx", "-o", "o.onnx", "--data", "data.npy", "--json", "r.json", "--plan", "plan.json"]
    before = {path.name: path.read_bytes() for path in shell.iterdir()}
    assert cli.main([*argv, "--params", "0.5", "--report", place]) == code
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in shell.iterdir()} == before


def test_inspect_has_no_page(capsys):
    with pytest.raises(SystemExit):
        cli.main(["inspect", "model.onnx", "--report", "page.html"])
    assert "unrecognized arguments: --report" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [["matplotlib"], ["jinja2"], ["jinja2", "matplotlib"]])
def test_without_its_libraries_a_page_is_refused_before_anything_is_done(missing, shell, monkeypatch, capsys):
    record = full()
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it began"))
    for argv in (["model.onnx", "-o", "o.onnx"], ["compare", "model.onnx", "small.onnx"], ["demo"]):
        assert cli.main([*argv, "--report", "page.html"]) == 2
        told = capsys.readouterr().err
        assert f"A report needs {' and '.join(missing)}, which" in told
        assert 'pip install "onnx-lrs[report]"' in told
    with pytest.raises(errors.ConfigError, match="A report needs"):
        onnx_lrs.compress("model.onnx", config=Config(report="page.html"))
    with pytest.raises(errors.ConfigError, match="A report needs"):
        record.to_html()
    assert not (shell / "page.html").exists()


def test_everything_else_does_without_them(shell, monkeypatch):
    for name in pages.NEEDED:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["model.onnx", "-o", "o.onnx", "--params", "0.5", "-q", "--json", "r.json"]) == 0


def test_an_interruption_while_the_page_is_made_does_not_deny_the_model(shell, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Result, "to_html", interrupted)
    argv = ["model.onnx", "-o", "o.onnx", "--params", "0.5", "-q", "--report", "page.html"]
    assert cli.main(argv) == 130
    assert capsys.readouterr().err == "interrupted; o.onnx was already written\n"
    assert (shell / "o.onnx").exists()
    assert not (shell / "page.html").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, errors.OutputError("The disk is full.", "Buy one."), ValueError])
@pytest.mark.parametrize("kind", ["compress", "compare"])
def test_what_a_run_found_is_not_lost_with_its_page(stop, kind, shell, monkeypatch, capsys):
    def stopped(self):
        raise stop

    for record in (Result, Comparison):
        monkeypatch.setattr(record, "to_html", stopped)
    argv = ["model.onnx", "-o", "o.onnx", "--params", "0.5"]
    if kind == "compare":
        argv = ["compare", "model.onnx", "small.onnx", "--rounds", "20", "--threads", "1"]
    argv += ["-q", "--report", "page.html", "--json", "r.json"]
    with pytest.raises(ValueError, match=r"^$") if stop is ValueError else contextlib.nullcontext():
        assert cli.main(argv) == (130 if stop is KeyboardInterrupt else 7)
    assert json.loads((shell / "r.json").read_text())["call"] == shlex.join(["onnx-lrs", *argv])
    assert not (shell / "page.html").exists()
    told = capsys.readouterr().err
    if isinstance(stop, errors.OutputError):
        assert ("o.onnx was already written" in told) == (kind == "compress")


def test_a_page_that_fails_hands_the_model_over_all_the_same(shell, monkeypatch):
    def stopped(self):
        raise errors.OutputError("The disk is full.", "")

    monkeypatch.setattr(Result, "to_html", stopped)
    config = Config(budget=Budget(params=0.5), report="page.html", threads=1)
    with pytest.raises(errors.OutputError) as caught:
        onnx_lrs.compress("model.onnx", config=config)
    onnx.checker.check_model(caught.value.record.model)


def test_a_page_replaces_the_old_one_or_leaves_it(shell, monkeypatch):
    place = shell / "page.html"
    place.write_text("old")

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(errors.OutputError, match="No space left"):
            pages.publish(place, types.SimpleNamespace(to_html=lambda: "new"), Silent())
    assert place.read_text() == "old"
    pages.publish(place, types.SimpleNamespace(to_html=lambda: "new"), Silent())
    assert place.read_text() == "new"
    assert sorted(p.name for p in shell.iterdir() if "page" in p.name) == ["page.html"]


# ------------------------------------------------------------------------------------------------ in a browser


FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
FLAGS += (
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--disable-dev-shm-usage",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SEEN = """() => {
    const channel = (c) => { const v = c / 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
    const light = (text) => {
        const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(channel);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const contrast = (ink) => {
        const pair = [light(ink), paper];
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    };
    const texts = [...document.querySelectorAll("h1, p, td, th, dt, figcaption, .good, .bad")];
    const plots = [...document.querySelectorAll("svg.plot text")];
    const outside = [...document.querySelectorAll("body *")].filter((e) => {
        return !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > innerWidth + 1;
    });
    return {
        scroll: document.documentElement.scrollWidth,
        inner: innerWidth,
        outside: outside.length,
        text: Math.min(...texts.map((e) => contrast(getComputedStyle(e).color))),
        plot: Math.min(99, ...plots.map((e) => contrast(getComputedStyle(e).fill))),
        dark: paper < 0.2,
        drawn: plots.length > 0 ? Math.min(...plots.map((e) => e.getBoundingClientRect().height)) : 9,
    };
}"""


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None or CHROMIUM is None:
        pytest.skip("playwright or a Chromium is missing")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_page_reads_well_on_phones_and_screens_by_day_and_by_night(width, scheme, browser, squeezed, raced, tmp_path):
    hostile = full("".join(HOSTILE[:6]) + "x" * 500)
    written = {"run": squeezed[1], "comparison": raced[1], "full": full().to_html(), "hostile": hostile.to_html()}
    written |= {"bare": PAGES["bare"].to_html(), "hostile comparison": compared(HOSTILE[-1]).to_html()}
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    for name, text in written.items():
        place = tmp_path / f"{name}.html"
        place.write_text(text, encoding="utf-8")
        asked: list[str] = []
        wrong: list[str] = []
        view = context.new_page()
        view.on("request", lambda request, asked=asked: asked.append(request.url))
        view.on("console", lambda message, wrong=wrong: wrong.append(message.text))
        view.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        view.on("dialog", lambda dialog, wrong=wrong: (wrong.append("dialog"), dialog.dismiss()))
        view.goto(place.as_uri(), wait_until="load")
        view.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
        seen = view.evaluate(SEEN)
        assert seen["scroll"] <= seen["inner"] == width, (name, seen)
        assert seen["outside"] == 0, (name, seen)
        assert seen["text"] >= 4.5, (name, seen)
        assert seen["plot"] >= 4.5, (name, seen)
        assert seen["drawn"] >= 8, (name, seen)
        assert seen["dark"] == (scheme == "dark")
        assert wrong == [], name
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == [], name
        assert len([url for url in asked if url.startswith("file:")]) == 1, name
        view.close()
    context.close()
