"""Compare the ways to fit over whole networks: accuracy, size, time and memory of every budget and fit.

Every (samples, budget, fit) is one run of onnx_lrs.compress in a process of its own, so that its peak memory is its
own. One JSON line is appended for every run as soon as it is done; runs that are in the file already are not done
again, failed ones neither (delete their lines to try them again). ``--render`` prints the tables::

    python tools/compare_fits.py resnet20.onnx --data train/ --test test.npz --labels test.npz --preset raw \
        --budgets params=0.7 params=0.5 macs=0.33 --fits independent cascade-linear cascade --out cells.jsonl
    python tools/compare_fits.py resnet20.onnx --data train/ --test test/ --labels folders --budgets params=0.5 \
        --samples 128 256 512 1024 2048 --out cells.jsonl
    python tools/compare_fits.py --render cells.jsonl > compared.md

Model, data and all flags that are not listed by --help are those of onnx-lrs. Accuracies are compared on samples that
no fit has seen: give --test. With --samples the calibration samples are a random subset; a smaller one is contained in
every larger one, and --seed draws another.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from trials import (
    Record,
    append_record,
    failure,
    figure,
    machine,
    markdown,
    parsed,
    read_command_line,
    read_records,
    refuse_mixture,
    say,
    shared_settings,
)

import onnx_lrs
from onnx_lrs import cli
from onnx_lrs.calibration.subject import Inputs, examine, open_material
from onnx_lrs.config import GIB, Budget, Config
from onnx_lrs.data import LABELS, batches, open_samples
from onnx_lrs.errors import OnnxLrsError
from onnx_lrs.graph import model as models
from onnx_lrs.images import class_folders, image_files
from onnx_lrs.runtime.session import Session

FITS = {"independent": "independent", "cascade-linear": "cascade", "cascade": "cascade + activation"}  # and titles
BASE = "independent"  # what the others are held against, and all there is where Config has no field ``fit``
# fields of Config that make a cell; cells of one model share the others
OWN = ("budget", "fit", "plan", "dry_run", "latency_table", "provider")
BUDGETS = ("latency", "params", "macs", "size", "max_drop", "gain")
TAKEN = ("output", *BUDGETS, "fit", "json", "random_data", "plan", "dry_run")  # flags of onnx-lrs without a use here
PLAIN = "plain_forward"


# ---------------------------------------------------------------------------------------------------------- the cells


@dataclasses.dataclass(frozen=True)
class Task:
    """One run: flags of onnx-lrs, what is compared, the data cut to ``samples``."""

    options: tuple[str, ...]
    budget: str
    fit: str
    samples: int
    data: Path

    def key(self, model: str) -> tuple[str, str, str, int]:
        """Return what identifies the cell."""
        return model, self.budget, self.fit, self.samples


def key_of(record: Record) -> tuple[str, str, str, int]:
    """Return what identifies a record's cell."""
    return record["model"], record["budget"], record["fit"], record["samples"]


def has_fits() -> bool:
    """Return whether this onnx-lrs knows more than one fit."""
    return "fit" in {field.name for field in dataclasses.fields(Config)}


def budget_of(text: str) -> Budget:
    """Return the budget in ``params=0.5``.

    Raises
    ------
    ValueError
        If it has another form.
    ConfigError
        If the fraction is out of its range.
    """
    kind, _, fraction = text.partition("=")
    with contextlib.suppress(ValueError):
        if kind in (field.name for field in dataclasses.fields(Budget)):
            return Budget(**{kind: float(fraction)})
    raise ValueError(f"--budgets: {text!r} is no budget; write params=0.5, macs=0.33 or gain=0.1")


def config_of(options: Sequence[str], budget: str, fit: str) -> Config:
    """Return the settings of one run."""
    chosen: dict[str, Any] = {"budget": budget_of(budget)} | ({"fit": fit} if has_fits() else {})
    return dataclasses.replace(cli.config_from(parsed(options)), **chosen)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process.

    Linux starts the count of a process's peak memory at that of the process it came from, so this one must stay small:
    whatever reads a model or data is called in this way.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def measure(task: Task) -> Record:
    """Return the figures of one run; one that fails is a record too."""
    begun = time.perf_counter()
    arguments = parsed(task.options)
    try:
        config = config_of(task.options, task.budget, task.fit)
        result = onnx_lrs.compress(
            arguments.model, data=task.data, labels=arguments.labels, test=arguments.test, config=config
        )
        plain = plain_forward(Path(arguments.model), task.data, config)
    except Exception as error:  # noqa: BLE001 - a run that fails is a figure of the table
        return {"failed": failure(error), "seconds": {"total": time.perf_counter() - begun}}
    return figures(result.to_dict()) | {"profile": result.to_dict().get("profile", {}) | {PLAIN: plain}}


def figures(report: Record) -> Record:
    """Return what the tables need of a report; of several outputs the first that is a classification."""
    outputs = report["quality"]
    chosen = next((output for output in outputs if output["top1_agreement"] is not None), outputs[0])
    return {
        **{name: chosen[name] for name in ("accuracy_before", "accuracy_after", "relative_l2", "top1_agreement")},
        "judged": chosen["samples"],
        "params_ratio": report["ratio"]["params"],
        "macs_ratio": report["ratio"]["macs"],
        "file_ratio": report["ratio"]["file_bytes"],
        "latency_before_ms": report["before"]["latency_ms"],
        "latency_after_ms": report["after"]["latency_ms"],
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "provider": report["environment"]["provider"],
        "versions": report["environment"]["versions"],
    }


def plain_forward(path: Path, data: Path, config: Config) -> float:
    """Return the seconds that ONNX Runtime takes for all calibration samples once, in the batches of the capture."""
    original = models.load(path)
    with contextlib.ExitStack() as stack:
        material = open_material(Inputs(data), models.signature(original)[0], config, stack)
        assert material.samples is not None  # there is data
        subject = examine(path, original, config, material.samples)
        session = stack.enter_context(Session(original, config.threads))
        session.run(subject.feed)
        seconds = 0.0
        for _, feed in batches(material.samples, range(len(material.samples)), subject.batch, subject.dynamic_batch):
            begun = time.perf_counter()
            session.run(feed)
            seconds += time.perf_counter() - begun
        return seconds


# ------------------------------------------------------------------------------------------------------- the samples


def nested(total: int, count: int, seed: int) -> np.ndarray:
    """Return ``count`` of ``total`` indices, sorted; for the same seed a smaller draw is part of every larger one."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def prepare(options: Sequence[str], counts: Sequence[int], folder: Path) -> dict[int, Path]:
    """Write the subsets of the calibration data into ``folder``.

    Returns
    -------
    dict of int to Path
        The data by number of samples; without ``counts`` it is all of the data.

    Raises
    ------
    OnnxLrsError
        If model or data cannot be read.
    ValueError
        If there are fewer samples than wanted.
    """
    arguments = parsed(options)
    config, source = cli.config_from(arguments), Path(arguments.data)
    inputs = models.signature(models.load(arguments.model))[0]
    with open_samples(source, inputs, config.preprocess) as samples:
        total = samples.total_rows
    if max(counts, default=0) > total:
        raise ValueError(f"--samples {max(counts)}: {source} holds {total}")
    chosen = {count: nested(total, count, config.seed) for count in counts if count < total}
    cut = {count: folder / f"{count}{source.suffix if source.is_file() else ''}" for count in chosen}
    if source.is_dir():
        for count, items in chosen.items():
            link_images(source, items, cut[count])
    else:
        cut_arrays(source, [spec.name for spec in inputs], chosen, cut)
    return {count: cut.get(count, source) for count in counts or [total]}


def link_images(source: Path, items: np.ndarray, target: Path) -> None:
    """Make a folder of links to some of the images, in the same sub-folders."""
    target.mkdir()
    for name in class_folders(source):  # also those that become empty: the position is the class number
        (target / name).mkdir()
    files = image_files(source)
    for item in items:
        link = target / files[item].relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files[item].resolve())


def cut_arrays(
    source: Path, inputs: Sequence[str], chosen: Mapping[int, np.ndarray], targets: Mapping[int, Path]
) -> None:
    """Write the rows of each subset of a .npy or .npz file; of the latter only what feeds the model."""
    if not chosen:
        return
    if source.suffix.lower() == ".npy":
        values = np.load(source, mmap_mode="r")
        for count, items in chosen.items():
            np.save(targets[count], values[items])
        return
    with np.load(source) as archive:
        names = [name for name in archive if name in inputs] or [name for name in archive if name != LABELS]
        arrays = {name: archive[name] for name in names}
    for count, items in chosen.items():
        np.savez(targets[count], **{name: values[items] for name, values in arrays.items()})


# ----------------------------------------------------------------------------------------------------------- rendering

Place = tuple[str, str, int]  # model, budget, samples
PLACE = ("model", "budget", "samples")


def places(records: Sequence[Record]) -> dict[Place, dict[str, Record]]:
    """Return the runs by place and fit: models and budgets in the order of the file, a later run for an earlier."""
    found: dict[Place, dict[str, Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in PLACE), {})[record["fit"]] = record
    models_ = list(dict.fromkeys(record["model"] for record in records))
    budgets = list(dict.fromkeys(record["budget"] for record in records))
    order = sorted(found, key=lambda place: (models_.index(place[0]), budgets.index(place[1]), place[2]))
    return {place: {fit: found[place][fit] for fit in FITS if fit in found[place]} for place in order}


def render(records: Sequence[Record]) -> str:
    """Return all tables as Markdown."""
    runs = places(records)
    parts = ["## Accuracy", accuracy_table(runs), *remarks(runs)]
    parts += ["## Size, time and memory", cost_table(runs)]
    parts.append(
        "Parameters, MACs, file and latency: before / after. The output's error and class: against the dense model."
    )
    series = growth_table(runs)
    if series is not None:
        parts += ["## Time against the number of samples", series]
        parts.append("Against the row above; linear is at most twice the seconds for twice the samples.")
    parts += ["## Where the capture's time goes", profile_table(runs)]
    parts.append("Seconds; in brackets, how many plain forward passes over all calibration samples that is.")
    return "\n\n".join([*parts, conditions(records)])


def score(record: Record | None) -> float | None:
    """Return a run's accuracy, or without labels how often the largest class stayed."""
    if record is None or "failed" in record:
        return None
    accuracy = record["accuracy_after"]
    return record["top1_agreement"] if accuracy is None else accuracy


def percent(share: float | None) -> str:
    """Return a share as a figure of a table."""
    return "" if share is None else f"{100 * share:.2f}"


def _place_text(place: Place) -> list[str]:
    model, budget, samples = place
    return [model, budget, f"{samples:,}"]


def accuracy_table(runs: Mapping[Place, Mapping[str, Record]]) -> str:
    """Return the accuracies in percent: a row a place, a column a fit."""
    others = [fit for fit in FITS if fit != BASE]
    header = [*PLACE, "dense", *FITS.values(), *(f"{FITS[fit]} >= {FITS[BASE]}" for fit in others)]
    body = []
    for place, own in runs.items():
        dense = next((r["accuracy_before"] for r in own.values() if r.get("accuracy_before") is not None), None)
        texts = [_failed(own[fit]) or percent(score(own[fit])) if fit in own else "" for fit in FITS]
        body.append(
            [*_place_text(place), percent(dense), *texts, *(_not_worse(own.get(fit), own.get(BASE)) for fit in others)]
        )
    return markdown(header, body)


def _failed(record: Record) -> str:
    """Return the kind of a failure, empty if there was none."""
    return record.get("failed", "").partition(":")[0]


def _not_worse(record: Record | None, base: Record | None) -> str:
    own, other = score(record), score(base)
    return "" if own is None or other is None else "yes" if own >= other else "no"


def remarks(runs: Mapping[Place, Mapping[str, Record]]) -> list[str]:
    """Return what the accuracies are if they are none, and why runs failed."""
    done = [r for own in runs.values() for r in own.values() if "failed" not in r]
    unlabelled = dict.fromkeys(r["model"] for r in done if r["accuracy_after"] is None)
    notes = [f"- {model}: no labels; how often the largest class is that of the dense model." for model in unlabelled]
    notes += [
        f"- {record['model']}: {FITS[fit]} failed at {record['budget']}, {record['samples']:,} samples: "
        f"{record['failed']}"
        for own in runs.values()
        for fit, record in own.items()
        if "failed" in record
    ]
    return ["Percent of the judging samples.", *(["\n".join(notes)] if notes else [])]


def cost_table(runs: Mapping[Place, Mapping[str, Record]]) -> str:
    """Return what each run took and what it gave: a row a run."""
    header = [*PLACE, "fit", "seconds", "peak GiB", "parameters", "MACs", "file", "latency (ms)", "latency"]
    header += ["output error (%)", "same class (%)"]
    body = []
    for place, own in runs.items():
        for fit, record in own.items():
            texts = [_failed(record)] if "failed" in record else _cost_texts(record)
            body.append([*_place_text(place), FITS[fit], *texts, *[""] * (len(header) - 4 - len(texts))])
    return markdown(header, body)


def _cost_texts(record: Record) -> list[str]:
    before, after = record["latency_before_ms"], record["latency_after_ms"]
    ratios = [record["params_ratio"], record["macs_ratio"], record["file_ratio"]]
    return [
        figure(record["seconds"]["total"]),
        f"{record['peak_memory_bytes'] / GIB:.2f}",
        *(_times(ratio) for ratio in ratios),
        f"{figure(before)} -> {figure(after)}" if before and after else "",
        _times(before / after if before and after else None),
        percent(record["relative_l2"]),
        percent(record["top1_agreement"]),
    ]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def growth_table(runs: Mapping[Place, Mapping[str, Record]]) -> str | None:
    """Return the wall time of every series of sample counts, with the ratio to the count before; None without one."""
    series: dict[tuple[str, str, str], list[Record]] = {}
    for own in runs.values():
        for fit, record in own.items():
            if "failed" not in record:
                series.setdefault((record["model"], record["budget"], fit), []).append(record)
    body = []
    for (model, budget, fit), records in series.items():
        for before, record in zip([None, *records], records, strict=False) if len(records) > 1 else ():
            ratios = ["", ""]
            if before is not None:
                seconds = record["seconds"]["total"] / before["seconds"]["total"]
                ratios = [_times(record["samples"] / before["samples"]), _times(seconds)]
            total = figure(record["seconds"]["total"])
            body.append([model, budget, FITS[fit], f"{record['samples']:,}", total, *ratios])
    header = [
        "model",
        "budget",
        "fit",
        "samples",
        "seconds",
        "samples, to the row before",
        "seconds, to the row before",
    ]
    return markdown(header, body) if body else None


def profile_table(runs: Mapping[Place, Mapping[str, Record]]) -> str:
    """Return the seconds of each kind of capture work, also in plain forward passes: a row a run."""
    done = [(place, fit, r) for place, own in runs.items() for fit, r in own.items() if "failed" not in r]
    kinds = [kind for kind in dict.fromkeys(k for _, _, r in done for k in r["profile"]) if kind != PLAIN]
    body = []
    for place, fit, record in done:
        profile, plain = record["profile"], record["profile"][PLAIN]
        texts = [f"{figure(profile[k])} ({_times(profile[k] / plain)})" if k in profile else "" for k in kinds]
        body.append([*_place_text(place), FITS[fit], figure(plain), *texts])
    return markdown([*PLACE, "fit", "plain forward", *kinds], body)


def conditions(records: Sequence[Record]) -> str:
    """Return in one line what the figures were measured on, how and when."""
    done = [record for record in records if "failed" not in record] or records
    told = (
        f"{r['machine']}; ONNX Runtime with {r['threads']} thread{'s' * (r['threads'] != 1)}"
        f"{', ' + r['provider'] if 'provider' in r else ''}"
        for r in done
    )
    return f"Measured on {'; '.join(dict.fromkeys(told))}."


# -------------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line; what is not this tool's own goes to onnx-lrs as ``options``."""
    parser = argparse.ArgumentParser(
        description="Compare the ways to fit over whole networks.",
        usage="compare_fits.py MODEL --data PATH [--test PATH] [flags of onnx-lrs] --out FILE.jsonl [options]\n"
        "       compare_fits.py --render FILE.jsonl",
        allow_abbrev=False,
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FILE.jsonl", help="measure, appending one line a run")
    target.add_argument("--render", type=Path, metavar="FILE.jsonl", help="print the tables of a file as Markdown")
    parser.add_argument("--budgets", nargs="+", default=["params=0.5"], metavar="KIND=F", help="default: params=0.5")
    known = list(FITS) if has_fits() else [BASE]
    parser.add_argument("--fits", nargs="+", choices=known, default=known, help=f"default: {' '.join(known)}")
    parser.add_argument("--samples", nargs="+", type=int, metavar="N", help="so many of the calibration samples each")
    parser.add_argument("--name", help="what the model is called in the tables (default: its file name)")
    return read_command_line(parser, check), parser


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a message if something is missing or contradicts another."""
    given = vars(parsed(arguments.options))
    for name in TAKEN:
        if given.get(name) is not None:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} has no use here: the tool has --budgets and --fits, and writes no model")
    if given["data"] is None:
        parser.error("--data is missing: fits are compared on calibration samples")
    if arguments.samples and given["test"] is None:
        parser.error("--samples needs --test: all sizes are judged on the same samples")
    if min(arguments.samples or [3]) < 3:
        parser.error("--samples: at least 3, one each to fit, to select and to judge")


def settings_of(arguments: argparse.Namespace) -> Record:
    """Return what all cells of one model share, as JSON gives it back."""
    return shared_settings(arguments.options, OWN)


def fill(arguments: argparse.Namespace) -> bool:
    """Measure what the file lacks; return whether no wanted cell has failed."""
    options, settings = arguments.options, settings_of(arguments)
    name = arguments.name or Path(parsed(options).model).stem
    for budget in arguments.budgets:
        budget_of(budget)  # a mistyped one ends here
    done = read_records(arguments.out)
    refuse_mixture(name, settings, done)
    there = {key_of(record): record for record in done}
    with tempfile.TemporaryDirectory(prefix="compare-fits-") as folder:
        data = alone(prepare, options, sorted(set(arguments.samples or ())), Path(folder))
        wanted = [
            Task(options, budget, fit, count, path)
            for count, path in data.items()
            for budget in dict.fromkeys(arguments.budgets)
            for fit in dict.fromkeys(arguments.fits)
        ]
        tasks = [task for task in wanted if task.key(name) not in there]
        say(f"{name}: {len(tasks)} runs to do, {len(wanted) - len(tasks)} in the file")
        for number, task in enumerate(tasks, 1):
            record = cell(name, task, settings)
            append_record(arguments.out, record)
            there[key_of(record)] = record
            say(f"{number}/{len(tasks)} {task.budget}, {task.fit}, {task.samples} samples: {_told(record)}")
    failed = [task for task in wanted if "failed" in there[task.key(name)]]
    if failed:
        say(f"{len(failed)} of {len(wanted)} runs failed; delete their lines to try them again")
    return not failed


def cell(name: str, task: Task, settings: Record) -> Record:
    """Return the whole record of one run, also if its process was killed."""
    common = dict(zip(("model", "budget", "fit", "samples"), task.key(name), strict=True)) | settings
    common |= {
        "machine": machine(settings["threads"]),
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
    }
    begun = time.perf_counter()
    try:
        found = alone(measure, task)
    except BrokenProcessPool:
        found = {"failed": "Killed: the process ended, perhaps for want of memory"}
        found["seconds"] = {"total": time.perf_counter() - begun}
    return common | found


def _told(record: Record) -> str:
    reached = score(record)
    told = record.get("failed") or ("done" if reached is None else f"{percent(reached)} %")
    return f"{told} in {record['seconds']['total']:.1f} s"


def main() -> None:
    """Measure, or print what was measured; the exit code is 1 if a run failed."""
    os.environ.setdefault(*cli.NO_TELEMETRY)
    arguments, parser = parse_arguments()
    try:
        if arguments.render is None:
            sys.exit(0 if fill(arguments) else 1)
        records = read_records(arguments.render)
        if not records:
            parser.error(f"--render: {arguments.render} holds no cells; make some with --out {arguments.render}")
        print(render(records))
    except (OnnxLrsError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
