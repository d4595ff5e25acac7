"""Plans of one model along their budgets: what was predicted, what is measured, what is lost.

Every (method, budget) is one run of onnx_lrs.compress; all share a work folder, so statistics and error curves are made
once. Then each model that came out runs in turn with the original, all in one process and for a few windows of time
each, so that all of them see the same minutes of the machine; and each is judged on the test samples. One JSON line a
model; what is in the file is not done again::

    python tools/pareto.py vgg16.onnx --data train/ --test test/ --labels folders --preset raw --methods lrs hsvd \
        --budgets latency=0.6 latency=0.4 macs=0.4 macs=0.25 --folder pareto/ --batches 1 16
    python tools/pareto.py --render pareto/cells.jsonl

Model, data and all flags that are not listed by --help are those of onnx-lrs. Latencies are fractions of the original's
in the same rounds; "predicted" is what the plan was made with, at the batch of --batch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compare_fits import budget_of
from trials import Record, append_record, figure, machine, markdown, parsed, read_records, say

import onnx_lrs
from onnx_lrs import cli
from onnx_lrs.errors import BudgetError
from onnx_lrs.graph import model as models
from onnx_lrs.report.result import Result
from onnx_lrs.runtime.latency import fast_quarter, times_in_turn
from onnx_lrs.runtime.session import Session

WINDOWS = 5  # of time in which each model is held against the original; the median counts
SECONDS = 1.0  # of one of them
MULTIPLE = 16  # for every budget, so that all share the same curves


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    method: str
    budget: str

    @property
    def name(self) -> str:
        """The model's file, without its ending."""
        return f"{self.method}-{self.budget}".replace("=", "")


def made(cell: Cell, options: Sequence[str], folder: Path) -> Record:
    """Return what one run of onnx-lrs gave; the model lies in the folder."""
    arguments = parsed(options)
    config = dataclasses.replace(
        cli.config_from(arguments),
        budget=budget_of(cell.budget),
        method=cell.method,
        multiple=arguments.multiple or MULTIPLE,
        work=folder / "work",
    )
    record: Record = {"method": cell.method, "budget": cell.budget, "batch": config.batch, "threads": config.threads}
    try:
        result = onnx_lrs.compress(
            arguments.model,
            folder / f"{cell.name}.onnx",
            data=arguments.data,
            labels=arguments.labels,
            test=arguments.test,
            config=config,
        )
    except BudgetError as error:
        return record | {"failed": str(error)}
    return record | _figures(result)


def _figures(result: Result) -> Record:
    assert result.before.latency_ms is not None
    assert result.after.latency_ms is not None
    predicted = result.predicted_latency_ms
    forms: dict[str, int] = {}
    for layer in result.layers:
        forms[layer.form] = forms.get(layer.form, 0) + 1
    return {
        "predicted": None if predicted is None else predicted / result.before.latency_ms,
        "own": result.after.latency_ms / result.before.latency_ms,
        "params": 1 / result.ratio.params,
        "macs": 1 / result.ratio.macs,
        "forms": forms,
        "unchanged": result.unchanged,
        "quality": [dataclasses.asdict(output) for output in result.quality or ()],
        "seconds": result.seconds["total"],
        "peak_memory_bytes": result.peak_memory_bytes,
        "search": [dataclasses.asdict(step) for step in result.search],
    }


def timed(original: Path, cells: Sequence[Record], folder: Path, batches: Sequence[int]) -> None:
    """Put the latency of every model at every batch, as a fraction of the original's, into its record.

    Only two models run in turn at a time: beside a dozen others the weights of each would be out of the caches at every
    call, which is not how a model runs in production.
    """
    there = [record for record in cells if "failed" not in record]
    if not there:
        return
    names = [Cell(record["method"], record["budget"]).name for record in there]
    with contextlib.ExitStack() as stack:
        paths = [original, *(folder / f"{name}.onnx" for name in names)]
        opened = (Session(models.load(path), there[0]["threads"]) for path in paths)
        first, *others = [stack.enter_context(session) for session in opened]
        (spec, *_), _ = models.signature(models.load(original))
        for batch in batches:
            shape = (batch, *(n if isinstance(n, int) else 1 for n in spec.shape[1:]))
            feed = {spec.name: np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)}
            rounds = itertools.product(range(WINDOWS), others)
            took = [fast_quarter(times_in_turn([first, other], [feed] * 2, SECONDS)) for _, other in rounds]
            original_ms, ms = np.moveaxis(np.reshape(took, (WINDOWS, len(others), 2)), 2, 0)
            ratios = np.median(ms / original_ms, axis=0)
            for record, ratio, before in zip(there, ratios, np.median(original_ms, axis=0), strict=True):
                record.setdefault("measured", {})[str(batch)] = float(ratio)
                record.setdefault("original_ms", {})[str(batch)] = float(before)


def render(cells: Sequence[Record]) -> str:
    """Return the models as a Markdown table, the fastest last."""
    batches = sorted({int(b) for c in cells for b in c.get("measured", {})})
    header = ["method", "budget", "predicted", *(f"measured, batch {b}" for b in batches), "predicted / measured"]
    header += ["parameters", "MACs", "output off by", "same class", "accuracy", "forms"]
    body = []
    for c in sorted(cells, key=lambda c: (c["method"], c["budget"].split("=")[0], -float(c["budget"].split("=")[1]))):
        if "failed" in c:
            body.append([c["method"], c["budget"], c["failed"].splitlines()[0], *[""] * (len(header) - 3)])
            continue
        measured = c.get("measured", {})
        own = measured.get(str(c["batch"]), c["own"])
        quality: dict[str, Any] = c["quality"][0] if c["quality"] else {}
        forms = ", ".join(f"{count} {form}" for form, count in sorted(c["forms"].items()))
        body.append(
            [
                c["method"],
                c["budget"],
                figure(c["predicted"]),
                *(figure(measured.get(str(b))) for b in batches),
                figure(c["predicted"] / own if c["predicted"] else None),
                figure(c["params"]),
                figure(c["macs"]),
                figure(quality.get("relative_l2"), 4),
                figure(quality.get("top1_agreement"), 4),
                f"{figure(quality.get('accuracy_before'), 4)} -> {figure(quality.get('accuracy_after'), 4)}",
                c["unchanged"] or forms,
            ]
        )
    return markdown(header, body)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--methods", nargs="+", default=["lrs"], metavar="NAME")
    parser.add_argument("--budgets", nargs="+", metavar="KIND=F", help="latency=0.5 macs=0.5 max_drop=0.01 ...")
    parser.add_argument("--batches", nargs="+", type=int, default=[1], metavar="N", help="batches to be timed at")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where models, the work folder and cells.jsonl go")
    parser.add_argument("--render", type=Path, metavar="CELLS", help="only print the table of a finished run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    own, options = _parser().parse_known_args(argv)
    if own.render is not None:
        print(render(read_records(own.render)))
        return 0
    if own.folder is None or not own.budgets:
        _parser().error("--folder and --budgets are needed")
    own.folder.mkdir(parents=True, exist_ok=True)
    kept = own.folder / "made.jsonl"
    cells = read_records(kept) if kept.exists() else []
    done = {(c["method"], c["budget"]) for c in cells}
    for method in own.methods:
        for budget in own.budgets:
            if (method, budget) in done:
                continue
            record = made(Cell(method, budget), options, own.folder)
            append_record(kept, record)
            cells.append(record)
            say(f"{method} {budget}: {record.get('failed', record.get('own'))}")
    timed(Path(parsed(options).model), cells, own.folder, own.batches)
    final = own.folder / "cells.jsonl"
    final.unlink(missing_ok=True)
    for record in cells:
        append_record(final, record)
    print(render(cells))
    print(f"\n{machine(cells[0]['threads'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
