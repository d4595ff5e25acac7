"""Plots as SVG that stands in a page: no text that comes from a file, colours of the page, the same bytes each time.

Colours are those of the page's style sheet, so that they change with light and dark: matplotlib draws in colours that
stand for them (INKS), and these become ``var(--ink)`` and so on. Texts stay texts, in the font of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from onnx_lrs.report.words import COSTS, is_known, measure_of

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

    from onnx_lrs.report.result import CurvePoint, LayerResult, Pareto, ParetoPoint, SearchStep

INKS = {  # no two alike, none of them matplotlib's own
    "ink": "#010203",
    "faint": "#020304",
    "mark": "#030405",
    "low-rank": "#040506",
    "channels": "#050607",
    "low-rank-channels": "#060708",
    "spatial": "#070809",
    "projected": "#08090a",
    "tucker": "#090a0b",
    "elements": "#0a0b0c",
    "low-rank-elements": "#0b0c0d",
}
LINES: Mapping[str, tuple[float, ...]] = {  # strokes and gaps of each form, for who does not see the colours
    "low-rank": (),
    "channels": (5, 3),
    "low-rank + channels": (6, 2, 1.5, 2),
    "spatial": (1.5, 2),
    "projected": (7, 1.5),
    "tucker": (4, 1.5, 1.5, 1.5),
    "elements": (5, 3),
    "low-rank + elements": (6, 2, 1.5, 2),
}
SHAPES = {"alone": "o", "confirm": "D"}  # of the steps of a search, by how layers were fitted; others are squares
SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it; the page draws in its own
    "font.size": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INKS["ink"]),
    "grid.color": INKS["faint"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
LEAST = 1e-4  # errors below are drawn there: a logarithm has no zero
SMALL, WIDE = (2.5, 2.0), (4.2, 2.5)  # inches; on a phone either is as wide as the page
FRAMES = {SMALL: (0.2, 0.21, 0.71, 0.56), WIDE: (0.15, 0.17, 0.81, 0.78)}  # left, bottom, width, height: shares of it
DECADE = 30.0  # of largest and smallest: below, powers of ten alone name nothing


def ink(form: str) -> str:
    """Return the name of the colour of a form in the style sheet."""
    return form.replace(" + ", "-")


def dashes(form: str) -> str:
    """Return the strokes and gaps of a form's line as SVG writes them; empty for a line in one piece."""
    return " ".join(f"{length:g}" for length in LINES[form])


def curve(layer: LayerResult, salt: str) -> Markup:
    """Return how a layer's error falls with the weights that it keeps, form by form, what the plan took marked."""
    points = [point for point in layer.curve if is_known(point.error)]

    def draw(axes: Axes) -> None:
        for form in dict.fromkeys(point.form for point in points):
            own = [point for point in points if point.form == form]
            mark = "o" if len(own) == 1 else ""
            style = (0, LINES[form] or None)
            axes.plot(*_places(layer, own), color=INKS[ink(form)], linestyle=style, marker=mark, markersize=3)
        _ring(axes, *_places(layer, [point for point in points if point.chosen]))
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel("weights kept")
        axes.xaxis.set_major_formatter(_percent)
        _logarithmic(axes, _percent)
        rank = next((p.params / p.rank for p in points if p.form == "low-rank" and p.rank), None)
        if rank is not None:
            _with_ranks(axes, layer.params_before / rank)

    return _svg(draw, SMALL, salt)


def _places(layer: LayerResult, points: Sequence[CurvePoint]) -> tuple[list[float], list[float]]:
    return [p.params / layer.params_before for p in points], [max(p.error, LEAST) for p in points]


def _ring(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Mark what was chosen."""
    style = {"markerfacecolor": "none", "markeredgecolor": INKS["mark"], "markeredgewidth": 1.8}
    axes.plot(x, y, linestyle="", marker="o", markersize=7, **style)


def _with_ranks(axes: Axes, full: float) -> None:
    """Add a second axis above: the ranks of the low-rank form, ``full`` where it has all of the layer's weights."""
    from matplotlib.ticker import MaxNLocator

    above = axes.secondary_xaxis("top", functions=(lambda share: share * full, lambda rank: rank / full))
    above.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    above.set_xlabel("rank of low-rank alone", labelpad=3)


def pareto(found: Pareto) -> Markup:
    """Return the loss that is foretold over the cost, the plan of the run and what was asked for marked."""
    chosen = () if found.chosen is None else (found.chosen,)

    def draw(axes: Axes) -> None:
        axes.plot(*_with_losses(found.points), color=INKS["low-rank"], marker="o", markersize=3)
        _ring(axes, *_with_losses(chosen))
        if found.limit is not None:
            axes.axvline(found.limit, color=INKS["mark"], linestyle="--", linewidth=1)
        axes.set_xlabel(f"{COSTS[found.kind]} left, of the original's")
        axes.set_ylabel("loss foretold")
        axes.xaxis.set_major_formatter(_percent)
        _logarithmic(axes, _plain)

    return _svg(draw, WIDE, "pareto")


def _with_losses(points: Sequence[ParetoPoint]) -> tuple[list[float], list[float]]:
    """Return costs and losses of the plans that lose something: a logarithm has no zero."""
    known = [p for p in points if is_known(p.loss) and p.loss > 0]
    return [p.fraction for p in known], [p.loss for p in known]


def search(steps: Sequence[SearchStep], limit: float | None) -> Markup:
    """Return what plans lost over what they are foretold to take; filled marks kept to the limit."""
    known = [step for step in steps if is_known(step.drop)]

    def draw(axes: Axes) -> None:
        for step in known:
            colour = INKS["low-rank" if step.held else "channels"]
            shape = SHAPES.get(step.fit, "s")
            style = {"markeredgecolor": colour, "markerfacecolor": colour if step.held else "none"}
            axes.plot([step.predicted], [step.drop], linestyle="", marker=shape, markersize=6, **style)
        if limit is not None:
            axes.axhline(limit, color=INKS["mark"], linestyle="--", linewidth=1)
        axes.set_xlabel("latency foretold, of the original's")
        axes.set_ylabel(f"{measure_of(steps)} lost")
        axes.xaxis.set_major_formatter(_percent)
        axes.yaxis.set_major_formatter(_percent)

    return _svg(draw, WIDE, "search")


def _percent(value: float, place: object = None) -> str:
    return f"{100 * value:.3g} %"


def _plain(value: float, place: object = None) -> str:
    return f"{value:g}"


def _logarithmic(axes: Axes, write: Callable[[float, object], str]) -> None:
    """Make a logarithmic axis of y, with few ticks; powers as plain numbers, superscripts need another kind of text."""
    from matplotlib.ticker import LogLocator

    if not any(len(line.get_ydata()) for line in axes.get_lines()):
        axes.set_ylim(LEAST, 1.0)  # nothing is known; an axis from 0 has no logarithm
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < DECADE * low else (1,), numticks=6))
    axes.yaxis.set_major_formatter(write)
    axes.minorticks_off()


@contextmanager
def _own_settings(salt: str) -> Iterator[None]:
    """Draw with these settings, whatever the user's own file of matplotlib says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        matplotlib.rcParams["svg.hashsalt"] = f"onnx-lrs {salt}"
        yield


def _svg(draw: Callable[[Axes], None], inches: tuple[float, float], salt: str) -> Markup:
    """Return what ``draw`` draws as SVG that scales with the page; ``salt`` keeps its names apart from other plots'."""
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    with _own_settings(salt):
        figure = Figure(figsize=inches)
        draw(figure.add_axes(FRAMES[inches]))
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    return Markup(_embedded(file.getvalue()))  # numbers and our own words: no text of it comes from a file


def _embedded(svg: str) -> str:
    """Return an SVG file as an element of a page, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg[^>]*(viewBox=\"[^\"]*\")[^>]*>", r'<svg class="plot" role="img" \1>', svg, count=1)
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # would style the whole page
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?\s*", "", svg)
    svg = svg.replace("xlink:href=", "href=")
    used = set(re.findall(r"#([\w.-]+)[\"')]", svg))  # other names would be there again in the next plot
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for name, colour in INKS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
