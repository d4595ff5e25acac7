"""What the measuring tools share: rows of a table, the machine in words, JSON lines, Markdown.

A row is a method with its settings. Rows are made over whatever METHODS holds, so a new method joins the tables by
itself; what it needs besides its name (another structure, ADMM left out) is said here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import sys
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import threadpoolctl
from rich.console import Console
from rich.table import Table

from onnx_lrs import cli
from onnx_lrs.report.environment import environment
from onnx_lrs.solvers import METHODS, Budget, Problem, Settings, Solution, closed_form
from onnx_lrs.solvers.loop import Run
from onnx_lrs.solvers.problem import AnyFactors, ElementFactors, SpatialFactors

CPU = "CPUExecutionProvider"
Record = dict[str, Any]


# -------------------------------------------------------------------------------------------------- methods as rows


@dataclasses.dataclass(frozen=True)
class Row:
    """A method as it appears in a table: its label, its key in METHODS, its settings.

    ``without_admm`` leaves the three-block ADMM out of ``lrs`` and keeps all else of it.
    """

    label: str
    method: str
    settings: Settings = dataclasses.field(default_factory=Settings)
    without_admm: bool = False

    def solve(self, problem: Problem, budget: Budget) -> Solution:
        """Return what the method makes of a problem."""
        with support_of_the_start() if self.without_admm else contextlib.nullcontext():
            return METHODS[self.method](problem, budget, settings=self.settings)


WITHOUT_ADMM = "lrs without ADMM"
LISTED = (
    Row("lrs", "lrs"),
    Row(WITHOUT_ADMM, "lrs", without_admm=True),
    Row("admm", "admm"),
    Row("greedy", "greedy"),
    Row("greedy elements", "greedy", Settings(structure="elements")),
    Row("hsvd", "hsvd"),
    Row("channels", "channels"),
    Row("svd", "svd"),
    Row("spatial", "spatial"),
    Row("magnitude", "magnitude"),
    Row("ddlr", "ddlr"),
    Row("nettrim", "nettrim"),
)
ORDER = tuple(row.label for row in LISTED)


def rows() -> dict[str, Row]:
    """Return the rows of all methods that there are, by label: the listed ones first, then those listed nowhere."""
    known = {row.method for row in LISTED}
    others = [Row(name, name) for name in METHODS if name not in known]
    found = [*(row for row in LISTED if row.method in METHODS), *others]
    return {row.label: row for row in found}


def chosen_rows(parser: argparse.ArgumentParser, labels: Sequence[str]) -> list[Row]:
    """Return the rows with these labels, or end with the labels that there are."""
    found = rows()
    unknown = [label for label in labels if label not in found]
    if unknown:
        parser.error(f"--methods: unknown {', '.join(map(repr, unknown))}; there are {', '.join(map(repr, found))}")
    return [found[label] for label in labels]


@contextlib.contextmanager
def support_of_the_start() -> Iterable[None]:
    """Let the three-block ADMM propose the support it was given, so that ``lrs`` ends with its alternation.

    The closed form is then solved once more for that support: a little time, no change.
    """

    def propose(target: np.ndarray, metric: np.ndarray, taps: int, start: tuple[Any, Any, np.ndarray]) -> Run[Any]:
        state = types.SimpleNamespace(support=np.sort(start[2]))
        return Run(last=state, best=state, steps=(), converged=True)

    with mock.patch.object(closed_form, "propose", propose):
        yield


def failure(error: Exception) -> str:
    """Return an exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def shape_of(factors: AnyFactors) -> Record:
    """Return what a table says of factors: form, rank, kept channels, single entries of S, parameters."""
    if isinstance(factors, SpatialFactors):
        ranks = {"form": factors.form, "rank": factors.rank, "inner": factors.inner}
        return ranks | {"channels": 0, "elements": 0, "params": factors.params}
    if isinstance(factors, ElementFactors):
        parts = {"form": "elements", "rank": factors.rank, "channels": 0, "elements": int(factors.sparse.nnz)}
        return parts | {"params": factors.params}
    kept = len(factors.kept)
    form = closed_form.form_of(factors.rank, kept)
    return {"form": form, "rank": factors.rank, "channels": kept, "elements": 0, "params": factors.params}


# ------------------------------------------------------------------------------------------------------ the machine


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads to a command line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="threads of BLAS (default: all cores)")


def parsed(options: Sequence[str]) -> argparse.Namespace:
    """Return flags of onnx-lrs as it reads them itself."""
    return cli.parse(["compress", *options])


def read_command_line(
    parser: argparse.ArgumentParser, check: Callable[[argparse.ArgumentParser, argparse.Namespace], None]
) -> argparse.Namespace:
    """Read the command line; what is not the tool's own goes to onnx-lrs as ``options``, and not with --render."""
    arguments, options = parser.parse_known_args()
    arguments.options = tuple(options)
    if arguments.render is None:
        check(parser, arguments)
    elif options:
        parser.error(f"--render takes no {' '.join(options)}")
    return arguments


def shared_settings(options: Sequence[str], without: Collection[str]) -> Record:
    """Return the data's names and the settings of a run but for some, as JSON gives them back."""
    own = parsed(options)
    names = {name: getattr(own, name) and Path(getattr(own, name)).name for name in ("data", "test", "labels")}
    config = cli.config_from(own).to_dict()
    shared: Record = json.loads(json.dumps({name: value for name, value in config.items() if name not in without}))
    return names | shared


def checked_threads(parser: argparse.ArgumentParser, threads: int) -> threadpoolctl.threadpool_limits:
    """Return the limit of all BLAS threads, as a context manager."""
    if threads < 1:
        parser.error(f"--threads is {threads}; it must be at least 1")
    return threadpoolctl.threadpool_limits(threads, user_api="blas")


def machine(threads: int) -> str:
    """Return in one line what a time was measured on: cores, AVX-512 or not, threads, versions, date."""
    config = np.show_config(mode="dicts")
    found = config.get("SIMD Extensions", {}).get("found", [])
    wide = any("AVX512" in name or name == "X86_V4" for name in found)
    blas = config.get("Build Dependencies", {}).get("blas", {})
    versions = environment(CPU, threads, 0)["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{platform.machine()} with {os.cpu_count()} cores, {'AVX-512' if wide else 'no AVX-512'}; {threads} BLAS "
        f"thread{'s' * (threads != 1)} ({blas.get('name', 'unknown BLAS')} {blas.get('version', '')}); {named}; "
        f"{datetime.date.today().isoformat()}"
    )


# ------------------------------------------------------------------------------------------------------------ output


def say(text: str) -> None:
    """Tell on stderr how far the work is."""
    print(text, file=sys.stderr, flush=True)


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    lines = [" | ".join(header), " | ".join(["---", *["---:"] * (len(header) - 1)])]
    lines += [" | ".join(row) for row in body]
    return "\n".join(f"| {line} |" for line in lines)


def rich_table(title: str, header: Sequence[str], body: Iterable[Sequence[str]]) -> None:
    """Print a table on stderr."""
    say(title)
    table = Table()
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in body:
        table.add_row(*row)
    Console(stderr=True).print(table)


def figure(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits and no exponent; nothing for None."""
    if value is None:
        return ""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    places = max(digits - 1 - int(np.floor(np.log10(abs(value)))), 0)
    return f"{value:.{places}f}"


def read_records(path: Path) -> list[Record]:
    """Return the records of a JSON lines file, none if it does not exist; a last line cut off in writing is left out.

    Raises
    ------
    ValueError
        If another line is no JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = [line for line in lines[:-1] if line.strip()]  # what a run that was stopped left unfinished is no line
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds a line that is no JSON: {error}; remove it or use another file") from error


def refuse_mixture(model: str, settings: Record, done: Sequence[Record]) -> None:
    """Refuse to add cells to others of the same model that were made with other settings.

    Raises
    ------
    ValueError
        If there are some.
    """
    for record in done:
        if record["model"] != model:
            continue
        for name, value in settings.items():
            if record.get(name) != value:
                raise ValueError(
                    f"the file holds cells of {model} with {name} {record.get(name)}, not {value}; "
                    "use the same settings, another --name or another --out"
                )


def append_record(path: Path, record: Record) -> None:
    """Append a record as one line; numbers that are not finite become null. Drops an unfinished last line."""
    line = json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
