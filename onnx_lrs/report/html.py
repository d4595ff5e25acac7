"""A record as a page: one file, no script, nothing from outside, the same bytes for the same record.

What a page shows is made of a record by report/result_page.py and report/comparison_page.py, the plots by
report/plots.py; the templates beside this file only put it in order. Every text is escaped, whatever it holds.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from markupsafe import Markup

from onnx_lrs.errors import ConfigError, OutputError
from onnx_lrs.progress import Progress
from onnx_lrs.report import words
from onnx_lrs.report.record import check_file, write_text

NEEDED = ("jinja2", "matplotlib")
IMPORTED = ("jinja2", "matplotlib.figure", "matplotlib.backends.backend_svg")
TEMPLATES = Path(__file__).with_name("templates")
LONGEST = 1000  # characters of a text; names come from files and may be of any length
LONGEST_NAME = 90
LONGEST_CALL = 8000  # it is there to be copied


def check_extra() -> None:
    """Refuse a page that could not be made.

    Raises
    ------
    ConfigError
        If a library that pages need is not installed or cannot be imported; with the command that installs it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    remedy = 'Install what reports need: pip install "onnx-lrs[report]". --json writes a report without it.'
    if missing:
        raise ConfigError(
            f"A report needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            remedy,
        )
    try:  # what is there may be of another time than numpy
        for name in IMPORTED:
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"A report needs {' and '.join(NEEDED)}, and one does not start: {error}.", remedy) from None


def check_place(place: Path, others: Iterable[object]) -> None:
    """Refuse a page before the work starts that could not be written after it.

    ``others`` are not to be replaced: those of them that are paths.

    Raises
    ------
    ConfigError
        If a library is missing, or the page would replace one of the other files.
    OutputError
        If the place is a folder, or its own folder is missing or cannot be written to.
    """
    check_extra()
    for other in others:
        if isinstance(other, str | os.PathLike) and place.resolve() == Path(other).resolve():
            raise ConfigError(f"--report {place} would overwrite {other}.", "Give it its own name.")
    check_file(place, "--report")


class Paged(Protocol):
    """A record that can be made into a page."""

    def to_html(self) -> str:
        """Return the page."""


def publish(place: Path, found: Paged, progress: Progress, written: str = "") -> None:
    """Make the page of a run and write it, as a stage of its own; ``written`` says what a failure does not take back.

    The run is over by then: whatever stops the page carries what was found as its attribute ``record``.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    progress.stage("report", 1)
    try:
        _write(place, found, written)
    finally:
        stopped: Any = sys.exc_info()[1]
        if stopped is not None:
            stopped.record = found
    progress.step(str(place))


def _write(place: Path, found: Paged, written: str) -> None:
    try:
        write_text(place, found.to_html())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(written or "only the page is missing") from None
    except OutputError as error:
        raise OutputError(f"{error.message} {written}." if written else error.message, error.remedy) from None


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
