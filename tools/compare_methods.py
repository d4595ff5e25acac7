"""Compare the methods layer by layer on columns that none of them has seen.

Every layer is approximated by every method at several budgets, from the statistics that the pipeline itself takes
(moments and sampled columns of the fit and select samples), and judged on held-out columns behind its activation:
``||phi(y) - phi(y')|| / ||phi(y)||``. One JSON line is appended for every cell as soon as it is done; cells that are in
the file already are not computed again, so a run that was stopped goes on where it was::

    python tools/compare_methods.py --out cells.jsonl
    python tools/compare_methods.py --model net.onnx --data images/ --preset raw --layers '*/Conv' --out cells.jsonl
    python tools/compare_methods.py --render cells.jsonl > compared.md

Without --model it is the shipped LeNet-5 with its 1,000 calibration digits, or with training images of --mnist DIR
(``mnist_train.npz`` with ``x`` (N,28,28) uint8). Budgets count parameters, single entries of S without their indices.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import fnmatch
import fractions
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from trials import (
    ORDER,
    WITHOUT_ADMM,
    Record,
    Row,
    add_threads,
    append_record,
    checked_threads,
    chosen_rows,
    failure,
    figure,
    machine,
    markdown,
    read_records,
    refuse_mixture,
    rows,
    say,
    shape_of,
)

from onnx_lrs.calibration.capture import Capture, Setting, Statistic, groups, is_wide
from onnx_lrs.calibration.subject import Inputs, Material, Subject, examine, open_material
from onnx_lrs.cli import parse_size
from onnx_lrs.config import GIB, Config, Preprocess
from onnx_lrs.data import Split, split
from onnx_lrs.demo import folder
from onnx_lrs.errors import OnnxLrsError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.layers import Layer
from onnx_lrs.planning.candidates import FIT, JUDGE, SELECT, Bench
from onnx_lrs.progress import Silent
from onnx_lrs.solvers import Budget, Problem, Solution, objective
from onnx_lrs.solvers.behind import activation_error
from onnx_lrs.solvers.blas import threads_for
from onnx_lrs.solvers.problem import CHAINS, judged

LENET_LAYERS = ("conv2", "fc1", "fc2")
BUDGETS = ("1/2", "1/4", "1/8", "1/16")
READ_AT = ("1/4", "1/8", "1/16")  # budgets of the reading
FULLY_CONNECTED_ONLY = ("ddlr",)
COMBINED = ("lrs", "admm", "greedy")
BASELINES = ("svd", "hsvd", "channels", "magnitude")
SAME = 1e-3  # relative difference up to which two errors count as equal
UNCHANGED = 1e-9  # of J: what rounding may do
ROLES = 3


# ---------------------------------------------------------------------------------------------------------- the cells


@dataclasses.dataclass(frozen=True)
class Network:
    """A model opened for measuring: what was asked for, its layers, its data by role, and what makes cells comparable.

    ``settings`` go into every record; cells of one model that were made with others cannot stand in one table.
    """

    name: str
    subject: Subject
    layers: tuple[Layer, ...]
    material: Material
    config: Config
    settings: Record


@dataclasses.dataclass(frozen=True)
class Task:
    """One cell to fill."""

    layer: Layer
    row: Row
    budget: str

    def key(self, network: str) -> tuple[str, str, str, str]:
        """Return what identifies the cell."""
        return network, self.layer.name, self.row.label, self.budget


def key_of(record: Record) -> tuple[str, str, str, str]:
    """Return what identifies a record's cell."""
    return record["model"], record["layer"], record["method"], record["budget"]


def applies(row: Row, layer: Layer) -> bool:
    """Return whether a method is made for such a layer."""
    return layer.op != "Conv" or row.method not in FULLY_CONNECTED_ONLY


def tasks_of(network: Network, chosen: Sequence[Row], budgets: Sequence[str], done: Sequence[Record]) -> list[Task]:
    """Return the cells that are not in the file yet."""
    there = {key_of(record) for record in done}
    wanted = [
        Task(layer, row, budget)
        for layer in network.layers
        for budget in budgets
        for row in chosen
        if applies(row, layer)
    ]
    return [task for task in wanted if task.key(network.name) not in there]


def filled(network: Network, tasks: Sequence[Task]) -> Iterator[Record]:
    """Yield the record of every task, layer by layer; statistics are captured for as many layers as fit memory."""
    config, subject, material = network.config, network.subject, network.material
    layers = [layer for layer in network.layers if any(task.layer is layer for task in tasks)]
    if not layers or material.split is None or material.samples is None:
        return
    parts = material.split
    roles = {FIT: parts.fit, SELECT: parts.select, JUDGE: parts.held_out}
    setting = Setting(
        config.memory_bytes, config.columns, subject.batch, config.threads, config.seed, subject.dynamic_batch
    )
    capture = Capture(subject.folded, layers, material.samples, setting)
    with contextlib.closing(capture):
        for group in groups(layers, ROLES, config.memory_bytes, with_columns=True):
            say(f"{network.name}: statistics of {', '.join(layer.name for layer in group)}")
            found = capture.statistics(group, roles, Silent(), with_columns=True)
            for layer in group:
                own = found.pop(layer.node)
                for task in tasks:
                    if task.layer is layer:
                        yield cell(network, task, own)


def cell(network: Network, task: Task, statistics_of: Mapping[str, Statistic]) -> Record:
    """Return the record of one cell; a method that fails is a record too."""
    layer, config = task.layer, network.config
    bench = Bench(network.subject.view, task.row.method, config.multiple, config.memory_bytes, True)
    _, problem = bench._problem(layer, statistics_of)  # the very problem that the pipeline would make
    record = {
        "model": network.name,
        "layer": layer.name,
        "method": task.row.label,
        "budget": task.budget,
        "op": layer.op,
        "out": layer.out,
        "d": layer.d,
        "taps": layer.taps,
        "activation": layer.activation.name,
        "dense_params": problem.params,
        "columns": {role: _rows_of(own) for role, own in statistics_of.items()},
        **network.settings,
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
    }
    params = int(fractions.Fraction(task.budget) * problem.params)
    begun = time.perf_counter()
    try:
        with threads_for(problem.d, config.threads):
            solution = task.row.solve(problem, Budget(params=params, multiple=config.multiple))
    except Exception as error:  # noqa: BLE001 - a method that fails is a figure of the table
        return record | {"status": "FAILED", "failed": failure(error), "seconds": time.perf_counter() - begun}
    seconds = time.perf_counter() - begun
    return record | {"status": solution.status.name, "seconds": seconds} | measured(problem, solution, statistics_of)


def _rows_of(statistic: Statistic) -> dict[str, int]:
    kept = 0 if statistic.columns is None else len(statistic.columns.inputs)
    return {"moments": statistic.moments.count, "sampled": kept}


def measured(problem: Problem, solution: Solution, statistics_of: Mapping[str, Statistic]) -> Record:
    """Return shape and errors of a solution: J on the fit's moments, linear and activation error on the held-out."""
    if solution.factors is None:
        return {}
    held_out = statistics_of[JUDGE]
    assert held_out.columns is not None  # wide layers were refused
    nothing = objective(problem.weight, 0 * problem.weight, problem.moments, problem.affine)
    return shape_of(solution.factors) | {
        "share": solution.factors.params / problem.params,
        "activation_error": activation_error(problem, solution.factors, held_out.columns),
        "linear_error": judged(problem.weight, solution.factors, held_out.moments, problem.affine),
        "objective": solution.objective,
        "relative_objective": solution.objective / nothing if nothing > 0 else 0.0,
    }


# ------------------------------------------------------------------------------------------------------- the networks


def open_network(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Network:
    """Open model and data and divide the samples; the drawn images are divided as the pipeline divides all.

    Raises
    ------
    OnnxLrsError
        If model or data cannot be read, or a layer is too wide for --memory.
    ValueError
        If a pattern matches no layer.
    """
    path = arguments.model or folder() / "lenet5.onnx"
    config = Config(
        multiple=arguments.multiple,
        memory_bytes=arguments.memory,
        threads=arguments.threads,
        seed=arguments.seed,
        preprocess=Preprocess.from_preset(arguments.preset) if arguments.preset else None,
    )
    original = models.load(path)
    material = open_material(Inputs(source(arguments)), models.signature(original)[0], config, stack)
    material, images = limited(material, arguments.limit_images, config)
    subject = examine(path, original, config, material.samples)
    layers = matching(subject.layers, arguments.layers or (LENET_LAYERS if arguments.model is None else ("*",)))
    wide = [layer.name for layer in layers if is_wide(layer, config.memory_bytes)]
    if wide:
        raise ValueError(f"too wide for --memory {config.memory_bytes / GIB:g}GiB: {', '.join(wide)}; allow more")
    settings = {
        "data": "mnist_train" if arguments.mnist else "digits" if arguments.model is None else arguments.data.name,
        "images": images,
        "seed": config.seed,
        "multiple": config.multiple,
        "memory": config.memory_bytes,
        "threads": config.threads,
        "machine": machine(config.threads),
    }
    return Network(arguments.name or path.stem, subject, layers, material, config, settings)


COMPARABLE = ("data", "images", "seed", "multiple", "memory")  # settings that all cells of one model share


def source(arguments: argparse.Namespace) -> Any:
    """Return the calibration samples: a path, or the digits as the shipped model takes them."""
    if arguments.model is not None:
        return arguments.data
    if arguments.mnist is not None:
        with np.load(arguments.mnist / "mnist_train.npz") as archive:
            digits = archive["x"]
    else:
        with np.load(folder() / "digits.npz") as archive:
            digits = archive["calibration"]
    return digits[:, None].astype(np.float32)


def limited(material: Material, limit: int | None, config: Config) -> tuple[Material, int]:
    """Return the material with at most ``limit`` items, drawn at random, and how many there are."""
    assert material.samples is not None
    total = len(material.samples)
    if limit is None or limit >= total:
        return material, total
    drawn = np.sort(np.random.default_rng(config.seed).permutation(total)[:limit]).astype(np.int64)
    parts = split(limit, config.holdout, config.seed)
    chosen = Split(drawn[parts.fit], drawn[parts.select], drawn[parts.held_out])
    return dataclasses.replace(material, split=chosen, judge_items=chosen.held_out), limit


def matching(layers: Sequence[Layer], patterns: Sequence[str]) -> tuple[Layer, ...]:
    """Return the layers whose names match a pattern.

    Raises
    ------
    ValueError
        If a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
            raise ValueError(f"--layers {pattern!r} matches no layer; there are {', '.join(la.name for la in layers)}")
    return tuple(layer for layer in layers if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns))


# ----------------------------------------------------------------------------------------------------------- rendering


@dataclasses.dataclass(frozen=True)
class Cells:
    """The records of one network, with the orders in which they are shown."""

    network: str
    records: tuple[Record, ...]

    @property
    def layers(self) -> list[str]:
        """Layer names in the order of the file."""
        return list(dict.fromkeys(record["layer"] for record in self.records))

    @property
    def methods(self) -> list[str]:
        """Method labels in the order of all tables."""
        present = dict.fromkeys(record["method"] for record in self.records)
        return sorted(present, key=lambda label: ORDER.index(label) if label in ORDER else len(ORDER))

    @property
    def budgets(self) -> list[str]:
        """Budgets, the largest first."""
        return sorted({record["budget"] for record in self.records}, key=fractions.Fraction, reverse=True)

    def at(self, layer: str, method: str, budget: str) -> Record | None:
        """Return one cell's record."""
        return {key_of(record): record for record in self.records}.get((self.network, layer, method, budget))

    def error(self, layer: str, method: str, budget: str) -> float | None:
        """Return one cell's held-out error behind the activation."""
        record = self.at(layer, method, budget)
        return None if record is None else record.get("activation_error")


def by_network(records: Sequence[Record]) -> list[Cells]:
    """Return the cells of every network, in the order of the file; of two records of one cell the later one."""
    latest = list({key_of(record): record for record in records}.values())
    names = dict.fromkeys(record["model"] for record in latest)
    return [Cells(name, tuple(record for record in latest if record["model"] == name)) for name in names]


def render(records: Sequence[Record], details: bool) -> str:
    """Return all tables and the reading as Markdown."""
    networks = by_network(records)
    parts = []
    for cells in networks:
        parts += [f"## {cells.network}", conditions(cells)]
        for budget in cells.budgets:
            parts += [f"### {cells.network} at {budget} of a layer's parameters", error_table(cells, budget)]
            if details:
                parts += ["Rank + kept channels, or + entries (e):", detail_table(cells, budget)]
        parts += failures(cells)
    parts += ["## Seconds a solve", "The median over all layers and budgets; in brackets the longest one."]
    parts += [seconds_table(networks), "## Reading", *reading(networks)]
    return "\n\n".join(parts)


def conditions(cells: Cells) -> str:
    """Return what the figures of a network are and what they were measured on."""
    record = cells.records[0]
    machines = dict.fromkeys(each["machine"] for each in cells.records)
    return (
        "Relative error behind the activation on held-out columns, in percent; the best of a row is bold. Single "
        f"entries are counted without their indices. {record['images']:,} images ({record['data']}), a fifth of them "
        f"held out, seed {record['seed']}, ranks and channels in multiples of {record['multiple']}. "
        f"{'; '.join(machines)}."
    )


def error_table(cells: Cells, budget: str) -> str:
    """Return the errors at one budget: a row a layer, a column a method."""
    body = []
    for layer in cells.layers:
        errors = [cells.error(layer, method, budget) for method in cells.methods]
        best = min((figure(100 * e) for e in errors if e is not None), key=float, default=None)
        texts = [_error_text(cells.at(layer, method, budget), best) for method in cells.methods]
        body.append([_layer_text(cells, layer), *texts])
    return markdown(["layer", *cells.methods], body)


def _layer_text(cells: Cells, layer: str) -> str:
    record = next(each for each in cells.records if each["layer"] == layer)
    return f"{layer} ({record['out']} x {record['d']})"


def _error_text(record: Record | None, best: str | None) -> str:
    if record is None:
        return ""
    if record.get("activation_error") is None:
        return record["status"].lower()
    text = figure(100 * record["activation_error"])
    return f"**{text}**" if text == best else text


def detail_table(cells: Cells, budget: str) -> str:
    """Return what the methods chose at one budget."""
    body = [
        [_layer_text(cells, layer), *[_shape_text(cells.at(layer, method, budget)) for method in cells.methods]]
        for layer in cells.layers
    ]
    return markdown(["layer", *cells.methods], body)


def _shape_text(record: Record | None) -> str:
    if record is None or "params" not in record:
        return ""
    sparse = f"{record['elements']:,}e" if record["elements"] else str(record["channels"])
    shape = f"{record['rank']} {record['form']}" if record["form"] in CHAINS else f"{record['rank']} + {sparse}"
    return f"{shape} ({record['share']:.1%})"


def failures(cells: Cells) -> list[str]:
    """Return why methods failed, as a list of one paragraph; empty if none did."""
    found = [
        f"- {record['method']} failed on {record['layer']} at {record['budget']}: {record['failed']}"
        for record in cells.records
        if record["status"] == "FAILED"
    ]
    return ["\n".join(found)] if found else []


def seconds_table(networks: Sequence[Cells]) -> str:
    """Return the solve times: a row a network, a column a method."""
    methods = sorted(
        dict.fromkeys(method for cells in networks for method in cells.methods),
        key=lambda label: ORDER.index(label) if label in ORDER else len(ORDER),
    )
    body = []
    for cells in networks:
        row = [cells.network]
        for method in methods:
            own = [r["seconds"] for r in cells.records if r["method"] == method and "params" in r]
            row.append(f"{figure(statistics.median(own))} ({figure(max(own))})" if own else "")
        body.append(row)
    return markdown(["network", *methods], body)


# ------------------------------------------------------------------------------------------------------------- reading


def reading(networks: Sequence[Cells]) -> list[str]:
    """Return in sentences what the cells say: combined methods against baselines, lrs with and without its ADMM."""
    found = []
    for budget in READ_AT:
        lines = [line for cells in networks for line in comparisons(cells, budget)]
        if lines:
            found += [f"At {budget}, held-out error against the better of {', '.join(BASELINES)}:", "\n".join(lines)]
    lines = [effect_of_admm(cells) for cells in networks]
    told = [line for line in lines if line]
    return found + (["The three-block ADMM inside lrs (lrs against lrs without it):", "\n".join(told)] if told else [])


def comparisons(cells: Cells, budget: str) -> list[str]:
    """Return on how many layers the combined methods are better than the better baseline, one line a method."""
    present = [method for method in COMBINED if method in cells.methods]
    sets = [(method,) for method in present] + ([tuple(present)] if len(present) > 1 else [])
    return [line for methods in sets if (line := comparison(cells, methods, budget))]


def comparison(cells: Cells, methods: Sequence[str], budget: str) -> str | None:
    """Return on how many layers the best of some methods is better than the best baseline; None if nothing is known.

    The forms of the better ones are counted too: a form that no baseline has says nothing about combining.
    """
    pairs = [(_best(cells, la, methods, budget), _best(cells, la, BASELINES, budget)) for la in cells.layers]
    alone = sum(own is not None and base is None for own, base in pairs)
    known = [(own, base) for own, base in pairs if own and base and base["activation_error"]]
    if not known:
        return None
    ratios = [own["activation_error"] / base["activation_error"] for own, base in known]
    lower = [own["form"] for (own, _), ratio in zip(known, ratios, strict=True) if ratio < 1 - SAME]
    higher = sum(ratio > 1 + SAME for ratio in ratios)
    forms = ", ".join(f"{count} {form}" for form, count in collections.Counter(lower).most_common())
    who = methods[0] if len(methods) == 1 else f"the best of {', '.join(methods)}"
    return (
        f"- {cells.network}: {who} is lower on {len(lower)}{f' ({forms})' if forms else ''}, equal (within {SAME:.1%}) "
        f"on {len(ratios) - len(lower) - higher}, higher on {higher} of {len(ratios)} layers; median ratio "
        f"{statistics.median(ratios):.3f}{f'; no baseline keeps to the budget on {alone} more' if alone else ''}."
    )


def _best(cells: Cells, layer: str, methods: Sequence[str], budget: str) -> Record | None:
    found = [cells.at(layer, method, budget) for method in methods]
    known = [record for record in found if record and record.get("activation_error") is not None]
    return min(known, key=lambda record: record["activation_error"], default=None)


def effect_of_admm(cells: Cells) -> str | None:
    """Return on how many cells the ADMM of lrs changed the result, and how much; None if it was not measured."""
    pairs = []
    for layer in cells.layers:
        for budget in cells.budgets:
            with_it, without = cells.at(layer, "lrs", budget), cells.at(layer, WITHOUT_ADMM, budget)
            if with_it and without and "params" in with_it and "params" in without:
                pairs.append((with_it, without))
    if not pairs:
        return None
    changed = [(a, b) for a, b in pairs if abs(a["objective"] - b["objective"]) > UNCHANGED * abs(b["objective"])]
    layers = len({a["layer"] for a, _ in changed})
    start = (
        f"- {cells.network}: changed {len(changed)} of {len(pairs)} results, on {layers} of {len(cells.layers)} layers"
    )
    if not changed:
        return f"{start}."
    told = [
        f"{title} {_spread([a[name] / b[name] - 1 for a, b in changed if b[name]])}"
        for title, name in (("J", "objective"), ("held-out linear error", "linear_error"))
    ]
    behind = _spread([a["activation_error"] / b["activation_error"] - 1 for a, b in changed if b["activation_error"]])
    return f"{start}; where it did: {', '.join(told)}, held-out error behind the activation {behind}."


def _spread(changes: Sequence[float]) -> str:
    """Return the median of relative changes and their range."""
    if not changes:
        return "0"
    return f"{statistics.median(changes):+.2%} (from {min(changes):+.2%} to {max(changes):+.2%})"


# -------------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare the methods layer by layer on held-out columns.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FILE.jsonl", help="measure, appending one line a cell")
    target.add_argument("--render", type=Path, metavar="FILE.jsonl", help="print the tables of a file as Markdown")
    parser.add_argument("--details", action="store_true", help="with --render: also ranks, channels, entries")
    parser.add_argument("--model", type=Path, help="an .onnx file (default: the shipped LeNet-5)")
    parser.add_argument("--data", type=Path, help="its calibration data: a folder of images, .npy or .npz")
    parser.add_argument("--preset", help="preprocessing of images: imagenet, caffe or raw (default: 0..1)")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="mnist_train.npz for the LeNet-5 lies here")
    parser.add_argument("--name", help="what the model is called in the tables (default: its file name)")
    parser.add_argument("--layers", nargs="+", metavar="PATTERN", help="shell patterns of layer names (default: all)")
    labels = list(rows())
    parser.add_argument("--methods", nargs="+", default=labels, metavar="NAME", help=f"which of {', '.join(labels)}")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help=f"default: {' '.join(BUDGETS)}")
    parser.add_argument("--limit-images", type=int, metavar="N", help="draw so many samples at random")
    parser.add_argument("--multiple", type=int, default=8, help="of ranks and kept channels (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of draws and splits (default: 0)")
    parser.add_argument("--memory", type=parse_size, default=2 * GIB, metavar="SIZE", help="as of onnx-lrs (2GiB)")
    add_threads(parser)
    arguments = parser.parse_args()
    check(parser, arguments)
    return arguments, parser


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a message if the arguments contradict each other."""
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data belong together")
    if arguments.model is not None and arguments.mnist is not None:
        parser.error("--mnist is for the shipped LeNet-5, not for --model")
    if arguments.limit_images is not None and arguments.limit_images < 3:
        parser.error("--limit-images: at least 3, one each to fit, to select and to judge")
    for budget in arguments.budgets:
        try:
            valid = 0 < fractions.Fraction(budget) < 1
        except (ValueError, ZeroDivisionError):
            valid = False
        if not valid:
            parser.error(f"--budgets: {budget!r} is no fraction between 0 and 1; write 1/4 or 0.25")


def fill(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Measure what the file lacks."""
    chosen = chosen_rows(parser, arguments.methods)
    done = read_records(arguments.out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(checked_threads(parser, arguments.threads))
        network = open_network(arguments, stack)
        refuse_mixture(network.name, {name: network.settings[name] for name in COMPARABLE}, done)
        tasks = tasks_of(network, chosen, arguments.budgets, done)
        say(f"{network.name}: {len(tasks)} cells to fill in {len(network.layers)} layers")
        for number, record in enumerate(filled(network, tasks), 1):
            append_record(arguments.out, record)
            error = record.get("activation_error")
            told = record.get("failed") or (record["status"] if error is None else f"{error:.4f}")
            where = f"{record['layer']}, {record['budget']}, {record['method']}"
            say(f"{number}/{len(tasks)} {where}: {told} in {record['seconds']:.1f} s")


def main() -> None:
    """Measure, or print what was measured."""
    arguments, parser = parse_arguments()
    try:
        if arguments.render is None:
            fill(arguments, parser)
            return
        records = read_records(arguments.render)
        if not records:
            parser.error(f"--render: {arguments.render} holds no cells; make some with --out {arguments.render}")
        print(render(records, arguments.details))
    except (OnnxLrsError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
