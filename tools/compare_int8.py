"""What low rank + sparse gives on top of INT8: four ways to run a model, paired times at several batches, quality.

Every cell is one model and budget: onnx-lrs --quantize int8, then the original, the original in INT8, low-rank +
sparse, and that in INT8, all timed against INT8 in turn. The models stay in the folder. One JSON line a cell; what is
in the file is not done again::

    python tools/compare_int8.py alexnet.onnx --data train/ --test test/ --labels folders --preset raw \
        --budgets params=0.1 max_drop=0.01 --batches 1 16 --folder int8/
    python tools/compare_int8.py --folder int8/ --retime
    python tools/compare_int8.py --render int8/cells.jsonl

--retime times the models of a folder again, for a machine that was busy before. Model, data and all flags that are not
listed by --help are those of onnx-lrs (--refine among them).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from compare_fits import budget_of
from trials import Record, append_record, figure, machine, markdown, parsed, read_records, say

import onnx_lrs
from onnx_lrs import CompareConfig, cli
from onnx_lrs.graph import model as models
from onnx_lrs.report.result import Result

KEY = ("model", "budget", "refined")
FIRST = "INT8"  # what the others are timed against


def made(budget: str, options: Sequence[str], folder: Path) -> Result:
    """Return what onnx-lrs makes of the model."""
    arguments = parsed(options)
    config = dataclasses.replace(cli.config_from(arguments), budget=budget_of(budget), work=folder / "work")
    sources = {name: getattr(arguments, name) for name in ("data", "labels", "test")}
    return onnx_lrs.compress(arguments.model, folder / f"{_stem(budget, options)}.onnx", **sources, config=config)


def _stem(budget: str, options: Sequence[str]) -> str:
    arguments = parsed(options)
    return f"{Path(arguments.model).stem}-{budget}{'-refined' * bool(arguments.refine)}".replace("=", "")


def _file(folder: Path, stem: str, way: str) -> Path:
    return folder / f"{stem}-{way.replace(', ', '-').replace(' ', '').replace('+', '-')}.onnx"


def timed(stem: str, ways: Sequence[str], own: argparse.Namespace, threads: int) -> Record:
    """Return by batch the latency of each way as a fraction of INT8's, with both ends of its interval."""
    names = sorted(ways, key=lambda name: name != FIRST)
    files = [_file(own.folder, stem, name) for name in names]
    found: Record = {}
    for batch in own.batches:
        config = CompareConfig(batches=(batch,), threads=threads, seconds=own.seconds)
        timings = onnx_lrs.compare(files, config=config).timings
        found[str(batch)] = {name: [t.ratio, t.ratio_low, t.ratio_high] for name, t in zip(names, timings, strict=True)}
    return found


def retimed(own: argparse.Namespace, cells: Sequence[Record]) -> list[Record]:
    """Return the cells with new times of the models that lie in the folder."""
    found = []
    for c in cells:
        found.append(c | {"times": timed(c["stem"], [way["name"] for way in c["ways"]], own, c["threads"])})
        say(f"{c['stem']}: {found[-1]['times']}")
    return found


def cell(budget: str, options: Sequence[str], own: argparse.Namespace) -> Record:
    """Return what one model and budget gave."""
    arguments = parsed(options)
    result = made(budget, options, own.folder)
    config = cli.config_from(arguments)
    stem = _stem(budget, options)
    for variant in result.variants:
        assert variant.model is not None
        models.save(variant.model, _file(own.folder, stem, variant.name), external=False)
    record: Record = dict(zip(KEY, (Path(arguments.model).stem, budget, bool(arguments.refine)), strict=True))
    return record | {
        "stem": stem,
        "threads": config.threads,
        "smaller": result.ratio.params,
        "seconds": sum(result.seconds.values()),
        "ways": [
            {
                "name": v.name,
                "bytes": v.file_bytes,
                "quality": [dataclasses.asdict(q) for q in v.quality or ()],
                "in_float": len(v.in_float),
                "chosen": v.chosen,
            }
            for v in result.variants
        ],
        "times": timed(stem, [variant.name for variant in result.variants], own, config.threads),
    }


def render(cells: Sequence[Record]) -> str:
    """Return the cells as a Markdown table, a row for each way."""
    batches = list(dict.fromkeys(batch for c in cells for batch in c["times"]))
    header = ["model", "budget", "way", "kB"]
    header += [f"faster than INT8, batch {batch}" for batch in batches] + ["output off by", "same class", "accuracy"]
    body = []
    for c in cells:
        for way in c["ways"]:
            quality = (way["quality"] or [{}])[0]
            budget = f"{c['budget']}{', refined' * c['refined']}"
            name = f"**{way['name']}**" if way["chosen"] else way["name"]
            if way["in_float"]:
                name += f" ({way['in_float']} in float)"
            times = [c["times"].get(batch, {}).get(way["name"]) for batch in batches]
            body.append(
                [
                    *(c["model"], budget, name, figure(way["bytes"] / 1e3, 4)),
                    *("" if t is None else f"{1 / t[0]:.2f}x ({1 / t[2]:.2f}-{1 / t[1]:.2f})" for t in times),
                    *(_percent(quality.get(k)) for k in ("relative_l2", "top1_agreement", "accuracy_after")),
                ]
            )
    return markdown(header, body)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--budgets", nargs="+", metavar="KIND=F", help="params=0.1 latency=0.2 max_drop=0.01 ...")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="N", help="samples in a timed call")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of timing at each batch (20)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where models, the work folder and cells.jsonl go")
    parser.add_argument("--retime", action="store_true", help="time the models of --folder again")
    parser.add_argument("--render", type=Path, metavar="CELLS", help="only print the table of a finished run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    own, options = _parser().parse_known_args(argv)
    options = [*options, "--quantize", "int8"]
    if own.render is not None:
        print(render(read_records(own.render)))
        return 0
    if own.folder is None or not (own.budgets or own.retime):
        _parser().error("--folder and --budgets are needed")
    own.folder.mkdir(parents=True, exist_ok=True)
    kept = own.folder / "cells.jsonl"
    cells = read_records(kept)
    if own.retime:
        cells = retimed(own, cells)
        kept.unlink(missing_ok=True)
        for record in cells:
            append_record(kept, record)
        print(render(cells))
        return 0
    done = {tuple(c[name] for name in KEY) for c in cells}
    arguments = parsed(options)
    for budget in own.budgets:
        if (Path(arguments.model).stem, budget, bool(arguments.refine)) in done:
            continue
        record = cell(budget, options, own)
        append_record(kept, record)
        cells.append(record)
        say(f"{record['model']} {budget}: {record['times']}")
    print(render(cells))
    if cells:
        print(f"\n{machine(cells[0]['threads'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
