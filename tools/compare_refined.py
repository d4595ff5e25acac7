"""What refining gives: by budget, by the number of epochs, by rounds, and from a warm start against cold ones.

Every cell is one compressed model trained in one way and judged on the test samples. "warm" starts from what onnx-lrs
fitted; "svd" has the same forms, ranks and kept channels fitted to the weights alone, "random" has random factors
(He et al. 2015) in their place. With --rounds K the model is compressed and refined K times on the way to the budget,
at the same number of epochs in all. One JSON line a cell; what is in the file is not done again::

    python tools/compare_refined.py resnet20.onnx --data train.npy --test test.npy --labels labels.npy \
        --preset imagenet --budgets params=0.5 params=0.35 --starts warm svd random --passes 1 2 4 8 --folder refined/
    python tools/compare_refined.py resnet20.onnx ... --budgets params=0.35 --counts 1 2 4 --passes 16 --folder refined/
    python tools/compare_refined.py --render refined/cells.jsonl

Model, data and all flags that are not listed by --help are those of onnx-lrs, those of training included.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from compare_fits import budget_of
from trials import Record, append_record, figure, machine, markdown, parsed, read_records, say

import onnx_lrs
from onnx_lrs import cli
from onnx_lrs.graph import model as models
from onnx_lrs.graph.tuning import constants, twin, with_values

STARTS = ("warm", "svd", "random")
KEY = ("model", "budget", "start", "rounds", "epochs")


def compressed(budget: str, start: str, options: Sequence[str], folder: Path) -> Path:
    """Return the file of a compressed model, made where it is missing; a cold one of the plan of the warm one."""
    arguments = parsed(options)
    name = f"{Path(arguments.model).stem}-{budget}".replace("=", "")
    place, plan = folder / f"{name}-{start}.onnx", folder / f"{name}.json"
    if place.exists():
        return place
    config = dataclasses.replace(cli.config_from(arguments), work=folder / "work", plan=plan, refine=None)
    if start == "warm":
        config = dataclasses.replace(config, budget=budget_of(budget))
        sources = {name: getattr(arguments, name) for name in ("data", "labels", "test")}
        onnx_lrs.compress(arguments.model, place, **sources, config=config)
        return place
    compressed(budget, "warm", options, folder)
    found = onnx_lrs.compress(arguments.model, config=dataclasses.replace(config, budget=None)).model  # no data: SVD
    assert found is not None
    if start == "random":
        found = _drawn(found, constants(models.load(arguments.model)).keys())
    models.save(found, place, external=False)
    return place


def _drawn(model: onnx.ModelProto, old: Any) -> onnx.ModelProto:
    """Return a model with random numbers for what the original does not have; biases stay."""
    rng = np.random.default_rng(0)
    drawn = {}
    for each in twin(model).tunables:
        shape = each.values.shape
        if each.name not in old and len(shape) > 1:
            values = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
            drawn[each.name] = values if each.support is None else values * each.support
    return with_values(model, drawn)


def cell(budget: str, start: str, rounds: int, epochs: int, options: Sequence[str], folder: Path) -> Record:
    """Return what one training gave."""
    arguments = parsed(options)
    config = cli.config_from(arguments)
    assert config.refine is not None
    training = dataclasses.replace(config.refine, epochs=epochs, rounds=rounds, patience=epochs)
    sources = {name: getattr(arguments, name) for name in ("data", "labels", "test")}
    name = Path(arguments.model).stem
    record: Record = dict(zip(KEY, (name, budget, start, rounds, epochs), strict=True)) | {"threads": config.threads}
    target = folder / f"{name}-{budget}-{start}-{rounds}-{epochs}.onnx".replace("=", "")
    if rounds == 1:
        small = compressed(budget, start, options, folder)
        found = onnx_lrs.refine(arguments.model, small, target, **sources, training=training, config=config)
        before, after, trained = found.before, found.after, [found.trained]
    else:
        settings = dataclasses.replace(config, budget=budget_of(budget), work=folder / "work", refine=training)
        result = onnx_lrs.compress(arguments.model, target, **sources, config=settings)
        assert result.refined is not None
        before, after, trained = result.refined.before, result.quality or (), list(result.refined.rounds)
    if any(course.ended == "interrupted" for course in trained):
        raise KeyboardInterrupt  # a cell is whole or not there
    original = models.weight_count(models.load(arguments.model))
    return record | {
        "smaller": original / models.weight_count(models.load(target)),
        "before": [dataclasses.asdict(quality) for quality in before],
        "after": [dataclasses.asdict(quality) for quality in after],
        "seconds": sum(epoch.seconds for course in trained for epoch in course.epochs),
        "done": sum(course.epochs[-1].number for course in trained),
        "best": [course.best for course in trained],
        "samples": trained[-1].samples,
        "learning_rate": training.learning_rate,
        "loss": training.loss,
        "bfloat16": trained[-1].bfloat16,
    }


def render(cells: Sequence[Record]) -> str:
    """Return the cells as a Markdown table."""
    header = ["model", "budget", "smaller", "start", "rounds", "epochs", "seconds"]
    header += ["output off by, before", "after", "accuracy dense", "before", "after"]
    body = []
    for c in cells:
        before, after = c["before"][0], c["after"][0]
        body.append(
            [
                *(c["model"], c["budget"], f"{c['smaller']:.2f}x", c["start"], str(c["rounds"]), str(c["done"])),
                *(figure(c["seconds"], 0), figure(before["relative_l2"]), figure(after["relative_l2"])),
                *(figure(q, 4) for q in (before["accuracy_before"], before["accuracy_after"], after["accuracy_after"])),
            ]
        )
    return markdown(header, body)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--budgets", nargs="+", metavar="KIND=F", help="params=0.5 macs=0.5 ...")
    parser.add_argument("--starts", nargs="+", default=["warm"], choices=STARTS)
    parser.add_argument("--counts", nargs="+", type=int, default=[1], metavar="K", help="numbers of rounds")
    parser.add_argument("--passes", nargs="+", type=int, default=[20], metavar="N", help="numbers of epochs")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where models, the work folder and cells.jsonl go")
    parser.add_argument("--render", type=Path, metavar="CELLS", help="only print the table of a finished run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    own, options = _parser().parse_known_args(argv)
    options = [*options, "--refine"]  # the flags of training are for it
    if own.render is not None:
        print(render(read_records(own.render)))
        return 0
    if own.folder is None or not own.budgets:
        _parser().error("--folder and --budgets are needed")
    own.folder.mkdir(parents=True, exist_ok=True)
    kept = own.folder / "cells.jsonl"
    cells = read_records(kept) if kept.exists() else []
    done = {tuple(c[name] for name in KEY) for c in cells}
    name = Path(parsed(options).model).stem
    wanted = [
        (budget, start, rounds, epochs)
        for budget in own.budgets
        for rounds in own.counts
        for start in (own.starts if rounds == 1 else ["warm"])
        for epochs in own.passes
    ]
    for budget, start, rounds, epochs in wanted:
        if (name, budget, start, rounds, epochs) in done:
            continue
        record = cell(budget, start, rounds, epochs, options, own.folder)
        append_record(kept, record)
        cells.append(record)
        say(f"{budget} {start}, rounds {rounds}, epochs {epochs}: {record['after'][0].get('accuracy_after')}")
    print(render(cells))
    if cells:
        print(f"\n{machine(cells[0]['threads'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
