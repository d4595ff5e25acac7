"""A record as a page: one file, no script, nothing from outside, the same bytes for the same record.

What a page shows is made of a record by report/result_page.py and report/comparison_page.py, the plots by
report/plots.py; the templates beside this file only put it in order. Every text is escaped, whatever it holds.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

from onnx_lrs.errors import ConfigError, OutputError
from onnx_lrs.progress import Progress
from onnx_lrs.report import words
from onnx_lrs.report.record import write_text

NEEDED = ("jinja2", "matplotlib")
TEMPLATES = Path(__file__).with_name("templates")
LONGEST = 1000  # characters of a text; names come from files and may be of any length
LONGEST_NAME = 90
LONGEST_CALL = 8000  # it is there to be copied


def check_extra() -> None:
    """Refuse a page that could not be made.

    Raises
    ------
    ConfigError
        If a library that pages need is not installed; with the command that installs it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"A report needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            'Install what reports need: pip install "onnx-lrs[report]". --json writes a report without it.',
        )


def check_place(place: Path, others: Sequence[Path]) -> None:
    """Refuse a page before the work starts that could not be written after it; ``others`` are not to be replaced.

    Raises
    ------
    ConfigError
        If a library is missing, or the page would replace one of the other files.
    OutputError
        If the place is a folder, or in none.
    """
    check_extra()
    for other in others:
        if place.resolve() == other.resolve():
            raise ConfigError(f"--report {place} would overwrite {other}.", "Give it its own name.")
    if place.is_dir() or not place.parent.is_dir():
        raise OutputError(
            f"The report cannot be written to {place}: {'it' if place.is_dir() else place.parent} is "
            f"{'a folder' if place.is_dir() else 'not a folder'}.",
            "Name a file in a folder that exists.",
        )


def publish(place: Path, make: Callable[[], str], progress: Progress, written: str = "") -> None:
    """Make a page and write it, as a stage of its own; ``written`` says what an interruption does not take back.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    progress.stage("report", 1)
    try:
        write_text(place, make())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(written) from None
    progress.step(str(place))


def page(template: str, content: Mapping[str, Any]) -> str:
    """Return the page that a template makes of its content.

    Raises
    ------
    ConfigError
        If a library that pages need is not installed.
    """
    check_extra()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
    )
    environment.filters |= {"name": _name, "lines": _lines, "picture": _picture}
    return environment.get_template(template).render(content)


def _finalized(value: Any) -> Any:
    """Return what a template puts into the page: texts without control characters, and none without end."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return words.shortened(words.printable(value), LONGEST)
    return value


def _name(text: str) -> str:
    """Return a name that does not fill the page."""
    return words.shortened(words.printable(text), LONGEST_NAME)


def _lines(text: str) -> Markup:
    """Return a long text, its line breaks kept."""
    from markupsafe import Markup

    clean = "\n".join(map(words.printable, words.shortened(text, LONGEST_CALL).splitlines()))
    return Markup("{}").format(clean)


def _picture(data: bytes) -> Markup:
    """Return a JPEG as an address that holds it."""
    from markupsafe import Markup

    return Markup(f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}")
