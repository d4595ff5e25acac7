"""Check how well the loss that plans are chosen by tells what a whole network will lose.

A plan's predicted loss is the sum over its layers that the knapsack minimises (onnx_lrs/planning). This tool draws
random plans, predicts each, builds it from quick fits of single layers, and runs it on samples that neither fitted nor
selected anything. Spearman's rank correlation between predicted and real loss is printed for several predictors::

    python tools/check_losses.py resnet20.onnx --data train.npz --preset raw --out plans.jsonl
    python tools/check_losses.py resnet20.onnx --data train/ --test test/ --labels folders --plans 30 --out plans.jsonl
    python tools/check_losses.py --render plans.jsonl > losses.md

Each layer offers a ladder of its candidates, from the least loss to a loss of 1. Two of three plans draw a level of
loss, and every layer takes the rung next to it, with scatter; the levels lie between those at which all layers together
move the outputs by 1 % and by 50 %. The third draws some layers and any rung for each; the others stay dense.

One JSON line is appended for every plan as soon as it is measured; plans that are in the file are not measured again.
Model, data and all flags that are not listed by --help are those of onnx-lrs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats
from numpy.typing import NDArray
from trials import (
    Record,
    append_record,
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

from onnx_lrs import cli
from onnx_lrs.calibration.capture import Capture, Setting
from onnx_lrs.calibration.shelf import Shelf
from onnx_lrs.calibration.store import Store
from onnx_lrs.calibration.subject import Inputs, Material, Subject, examine, open_material
from onnx_lrs.config import Config
from onnx_lrs.errors import OnnxLrsError
from onnx_lrs.graph import model as models
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.planning.candidates import FIT, SELECT, Bench, solution_of
from onnx_lrs.planning.plan import error_curves
from onnx_lrs.planning.sensitivity import BOUND, Point, Points, Probe, kind_of, laws, probed
from onnx_lrs.planning.shop import Shop
from onnx_lrs.planning.workers import Task, Workers
from onnx_lrs.progress import Silent, Timer
from onnx_lrs.report.result import OutputQuality
from onnx_lrs.runtime.session import Session
from onnx_lrs.runtime.verify import compare_outputs
from onnx_lrs.solvers import METHODS, Candidate, Settings
from onnx_lrs.solvers.problem import AnyFactors
from onnx_lrs.work import Work

REAL = (0.01, 0.5)  # relative error of the outputs between which plans matter: below nobody cares, above it is lost
HIGHEST = 1.0  # loss of the last rung: as if the layer gave its mean
SCATTER = 1.0  # standard deviation of a layer's level around the plan's, in natural logarithms
HALVINGS = 6  # of the range of levels, to find the ends
ENOUGH = 0.8  # the correlation that is asked for
TAKEN = ("output", "params", "macs", "gain", "fit", "json", "random_data", "work")  # flags without a use here
OTHERS = (
    "budget",
    "fit",
    "work",
    "plan",
    "dry_run",
    "latency_table",
    "provider",
)  # fields of Config that decide nothing here
NODE, KIND, LOSS, OWN = range(4)  # of a layer in a record
Values = NDArray[np.float64]
Choice = dict[str, int]  # the rung of each layer that is compressed


# --------------------------------------------------------------------------------------------------------- the plans


@dataclasses.dataclass(frozen=True)
class Rung:
    """One candidate of a layer, fitted alone: its loss, its factors, and how much it alone moves the outputs."""

    kind: str
    loss: float
    factors: AnyFactors
    own: float


Ladders = Mapping[str, Sequence[Rung]]


@dataclasses.dataclass(frozen=True)
class Bed:
    """All that plans are made from and measured with."""

    subject: Subject
    material: Material
    config: Config
    ladders: Ladders
    points: Mapping[str, Points]

    def quality(self, chosen: Choice) -> tuple[OutputQuality, ...]:
        """Return what the network with the chosen rungs gives on the samples that judge."""
        subject, material, threads = self.subject, self.material, self.config.threads
        assert material.judge is not None  # there is data
        factors = {node: self.ladders[node][rung].factors for node, rung in chosen.items()}
        model = rewrite(subject.view, subject.layers, factors, subject.ranks).model
        with Session(subject.folded, threads) as dense, Session(model, threads) as compressed:
            batching = subject.batch, subject.dynamic_batch
            both = dense, compressed
            return compare_outputs(both, material.judge, material.judge_items, material.labels, batching, Silent())

    def error(self, chosen: Choice) -> float:
        """Return the relative squared error of the outputs, averaged over them."""
        return loss_of(self.quality(chosen)) if chosen else 0.0


def loss_of(quality: Sequence[OutputQuality]) -> float:
    """Return the relative squared error of the outputs, averaged over them."""
    return float(np.mean([output.relative_l2**2 for output in quality]))


@contextlib.contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Bed]:
    """Look at the model, and fit and probe all layers, as a run of onnx-lrs does it before it makes a plan."""
    own = parsed(arguments.options)
    config = cli.config_from(own).settled(can_be_judged=True)
    with contextlib.ExitStack() as stack:
        original = models.load(own.model)
        inputs = Inputs(own.data, own.labels, own.test)
        material = open_material(inputs, models.signature(original)[0], config, stack)
        subject = examine(own.model, original, config, material.samples)
        assert material.samples is not None  # there is data
        assert material.split is not None
        shop = open_shop(subject, material, config, stack)
        say(f"{len(subject.layers)} layers: error curves")
        roles = {FIT: material.split.fit, SELECT: material.split.select}
        curves, probes = error_curves(subject, shop, roles, Silent())
        say("sensitivities")
        batching = subject.batch, subject.dynamic_batch, config.threads
        measured = probed(subject, probes, material.samples, material.split.select, batching, Silent(), Work())
        say("ladders")
        ladders = {
            layer.node: ladder(shop, layer, rungs(curves[layer.node], arguments.rungs))
            for layer in subject.layers
            if layer.node in probes
        }
        yield Bed(subject, material, config, with_own(ladders, subject, material, config), measured)


def open_shop(subject: Subject, material: Material, config: Config, stack: contextlib.ExitStack) -> Shop:
    """Return the tools of a run of onnx-lrs whose statistics wait for the fit."""
    assert material.samples is not None
    memory, threads, with_columns = config.memory_bytes, config.threads, METHODS[config.method].needs_columns
    solver = Settings(structure=config.structure, steps=config.steps, seed=config.seed)
    bench = Bench(subject.view, config.method, config.multiple, memory, with_columns, solver)
    setting = Setting(memory, config.columns, subject.batch, threads, config.seed, subject.dynamic_batch)
    capture = Capture(subject.folded, subject.layers, material.samples, setting, Timer())
    stack.callback(capture.close)
    shelf = Shelf(stack.enter_context(Store(memory // 4, one_file=True)), Work())
    workers = stack.enter_context(Workers(config.jobs or threads, threads))
    return Shop(bench, capture, setting, workers, Timer(), shelf)


def rungs(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return at most ``count`` candidates whose losses lie evenly on a log scale, by rising loss."""
    usable = sorted((c for c in candidates if 0 < c.loss <= HIGHEST), key=lambda c: c.loss)
    if not usable:
        return []
    losses = np.log([c.loss for c in usable])
    wanted = np.linspace(losses[0], losses[-1], count)
    return [usable[i] for i in sorted({int(np.abs(losses - level).argmin()) for level in wanted})]


def ladder(shop: Shop, layer: Layer, chosen: Sequence[Candidate]) -> list[Probe]:
    """Return the kind of form, loss and factors of a layer's rungs, fitted quickly and alone like the probes."""
    assert shop.shelf is not None
    question = shop.bench.question(layer, shop.shelf.take(layer.node))
    quick = dataclasses.replace(question, settings=dataclasses.replace(question.settings, steps=0))
    tasks = [Task(layer.d, (quick, candidate)) for candidate in chosen]
    solutions = shop.workers.map(solution_of, tasks, shop.at_once([layer], 2))
    fitted = [(kind_of(c.form), c.loss, s.factors) for c, s in zip(chosen, solutions, strict=True)]
    return [(kind, loss, shop.bench.of_layer(layer, factors)) for kind, loss, factors in fitted if factors is not None]


def with_own(ladders: Mapping[str, Sequence[Probe]], subject: Subject, material: Material, config: Config) -> Ladders:
    """Return the ladders with the change that each rung alone makes at the outputs, on the samples that select."""
    assert material.samples is not None
    assert material.split is not None
    found: dict[str, list[Rung]] = {node: [] for node, fitted in ladders.items() if fitted}
    batching = subject.batch, subject.dynamic_batch, config.threads
    for number in range(max(map(len, ladders.values()), default=0)):
        at = {node: [fitted[number]] for node, fitted in ladders.items() if number < len(fitted)}
        own = probed(subject, at, material.samples, material.split.select, batching, Silent(), Work())
        for node, kinds in own.items():
            (((_, change),),) = kinds.values()
            found[node].append(Rung(*ladders[node][number], change))
    return found


def range_of_levels(bed: Bed) -> tuple[float, float]:
    """Return the losses at which all layers together move the outputs by the two errors of REAL."""
    losses = [rung.loss for ladder in bed.ladders.values() for rung in ladder]
    ends = []
    for wanted in REAL:
        low, high = np.log(min(losses) / 2), np.log(HIGHEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            reached = bed.error(at_levels(bed.ladders, dict.fromkeys(bed.ladders, float(middle))))
            low, high = (low, middle) if reached > wanted**2 else (middle, high)
        ends.append(float((low + high) / 2))
    return ends[0], ends[1]


def at_levels(ladders: Ladders, levels: Mapping[str, float]) -> Choice:
    """Return the rung next to each layer's level (the logarithm of a loss); dense where that is below all by half."""
    chosen = {}
    for node, steps in ladders.items():
        losses = np.log([rung.loss for rung in steps])
        if levels[node] >= losses[0] - np.log(2):
            chosen[node] = int(np.abs(losses - levels[node]).argmin())
    return chosen


def drawn(ladders: Ladders, ends: tuple[float, float], seed: int, number: int) -> Choice:
    """Return a random plan, never an empty one: two of three at a level of loss, the third of any rungs."""
    rng = np.random.default_rng([seed, number])
    while True:
        if number % 3 < 2:
            level = rng.uniform(*ends)
            chosen = at_levels(ladders, {node: level + SCATTER * rng.standard_normal() for node in ladders})
        else:
            share = rng.uniform()
            chosen = {node: int(rng.integers(len(own))) for node, own in ladders.items() if rng.uniform() < share}
        if chosen:
            return chosen


def measured(bed: Bed, chosen: Choice) -> Record:
    """Return what was foreseen of a plan, layer by layer, and what came."""
    quality = bed.quality(chosen)
    classes = next((output for output in quality if output.top1_agreement is not None), quality[0])
    taken = {node: bed.ladders[node][rung] for node, rung in chosen.items()}
    layers = [[node, rung.kind, rung.loss, rung.own] for node, rung in taken.items()]
    return {
        "real": loss_of(quality),
        "top1_agreement": classes.top1_agreement,
        "accuracy_before": classes.accuracy_before,
        "accuracy_after": classes.accuracy_after,
        "judged": classes.samples,
        "layers": layers,
        "points": {
            node: {
                kind: [[error, change if np.isfinite(change) else None] for error, change in own]
                for kind, own in kinds.items()
            }
            for node, kinds in bed.points.items()
        },
    }


# ---------------------------------------------------------------------------------------------------- the predictors


def column(record: Record, which: int) -> Values:
    """Return one figure of all layers of a plan."""
    return np.array([layer[which] for layer in record["layers"]], float)


def carried(bound: float, straight: bool = False) -> Callable[[Record], float]:
    """Return the predictor that carries losses to the outputs by laws; ``straight`` by the larger probe alone."""

    def predict(record: Record) -> float:
        points = {
            node: {kind: _points(own[-1:] if straight else own) for kind, own in kinds.items()}
            for node, kinds in record["points"].items()
        }
        found = laws(points, bound)
        return sum(found[node][kind].loss(loss) if found else loss for node, kind, loss, _ in record["layers"])

    return predict


def _points(own: Sequence[Sequence[float | None]]) -> list[Point]:
    return [(error or 0.0, np.nan if change is None else change) for error, change in own]


PREDICTORS: dict[str, Callable[[Record], float]] = {
    "losses": lambda record: float(column(record, LOSS).sum()),
    "one probe": carried(np.inf, straight=True),
    "one probe, bound 2": carried(2.0, straight=True),
    **{f"probes, bound {bound:g}": carried(bound) for bound in sorted({4.0, BOUND})},
    "probes": carried(np.inf),
    "own changes": lambda record: float(column(record, OWN).sum()),
    "roots of own changes": lambda record: float(np.sqrt(column(record, OWN)).sum()),
}
PRESENT = f"probes, bound {BOUND:g}"


def spearman(records: Sequence[Record], predictor: str) -> float | None:
    """Return the rank correlation of predicted and real loss; None for fewer than three plans."""
    if len(records) < 3:
        return None
    predict = PREDICTORS[predictor]
    found = scipy.stats.spearmanr([predict(r) for r in records], [r["real"] for r in records])
    return float(found.statistic)


# --------------------------------------------------------------------------------------------------------- rendering


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the plans of each model."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["model"], []).append(record)
    return found


def render(records: Sequence[Record], details: bool) -> str:
    """Return the correlations, and with details every plan, as Markdown."""
    header = ["model", "plans", "error (%)", *PREDICTORS]
    body = []
    for model, own in by_model(records).items():
        within = [record for record in own if REAL[0] <= record["real"] ** 0.5 <= REAL[1]]
        body += [correlations(label, chosen) for label, chosen in ((model, own), ("", within)) if chosen]
    parts = [markdown(header, body)]
    low, high = (f"{100 * end:g}" for end in REAL)
    parts.append(
        f"Spearman's correlation of predicted and real loss, bold from {ENOUGH} on; below, that of the plans between "
        f"{low} and {high} %. Error: of the outputs, relative, not squared. onnx-lrs plans with {PRESENT}."
    )
    if details:
        parts += [f"## {model}\n\n{plans_table(own)}" for model, own in by_model(records).items()]
    told = dict.fromkeys(f"{r['machine']}; ONNX Runtime with {r['threads']} threads" for r in records)
    return "\n\n".join([*parts, f"Measured on {'; '.join(told)}."])


def correlations(label: str, records: Sequence[Record]) -> list[str]:
    """Return a row of the table: how many plans, their real errors, and how well each predictor ranks them."""
    errors = 100 * np.sqrt([record["real"] for record in records])
    texts = [_correlation(spearman(records, predictor)) for predictor in PREDICTORS]
    return [label, str(len(records)), f"{figure(min(errors))} - {figure(max(errors))}", *texts]


def _correlation(value: float | None) -> str:
    return "" if value is None else f"**{value:.2f}**" if value >= ENOUGH else f"{value:.2f}"


def plans_table(records: Sequence[Record]) -> str:
    """Return every plan, by rising real loss."""
    header = ["plan", "layers", "error (%)", "same class (%)", "accuracy (%)", *PREDICTORS]
    body = []
    for record in sorted(records, key=lambda r: r["real"]):
        shares = [record["top1_agreement"], record["accuracy_after"]]
        texts = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        foreseen = [figure(predict(record)) for predict in PREDICTORS.values()]
        error = figure(100 * record["real"] ** 0.5)
        body.append([str(record["plan"]), str(len(record["layers"])), error, *texts, *foreseen])
    return markdown(header, body)


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line; what is not this tool's own goes to onnx-lrs as ``options``."""
    parser = argparse.ArgumentParser(
        description="Check how well the loss that plans are chosen by tells what a whole network will lose.",
        usage="check_losses.py MODEL --data PATH [--test PATH] [flags of onnx-lrs] --out FILE.jsonl [options]\n"
        "       check_losses.py --render FILE.jsonl [--details]",
        allow_abbrev=False,
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FILE.jsonl", help="measure, appending one line a plan")
    target.add_argument("--render", type=Path, metavar="FILE.jsonl", help="print the tables of a file as Markdown")
    parser.add_argument("--details", action="store_true", help="with --render: every plan as well")
    parser.add_argument("--plans", type=int, default=30, metavar="N", help="random plans (default: 30)")
    parser.add_argument("--rungs", type=int, default=8, metavar="N", help="candidates a layer (default: 8)")
    parser.add_argument("--name", help="what the model is called in the tables (default: its file name)")
    return read_command_line(parser, check), parser


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a message if something is missing or contradicts another."""
    given = vars(parsed(arguments.options))
    for name in TAKEN:
        if given.get(name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no use here: plans are random, and no model is written")
    if given["data"] is None:
        parser.error("--data is missing: losses are measured on samples")
    if arguments.plans < 3 or arguments.rungs < 2:
        parser.error("--plans: at least 3; --rungs: at least 2")


def settings_of(arguments: argparse.Namespace) -> Record:
    """Return what all plans of one model share, as JSON gives it back."""
    return {"rungs": arguments.rungs} | shared_settings(arguments.options, OTHERS)


def fill(arguments: argparse.Namespace) -> None:
    """Measure the plans that the file lacks, and print the correlations of the model."""
    settings = settings_of(arguments)
    name = arguments.name or Path(parsed(arguments.options).model).stem
    done = read_records(arguments.out)
    refuse_mixture(name, settings, done)
    there = {record["plan"] for record in done if record["model"] == name}
    missing = [number for number in range(arguments.plans) if number not in there]
    say(f"{name}: {len(missing)} plans to measure, {len(there)} in the file")
    if missing:
        with opened(arguments) as bed:
            ends = range_of_levels(bed)
            say(f"levels of loss: {np.exp(ends[0]):.2g} to {np.exp(ends[1]):.2g}")
            for number in missing:
                record = measured(bed, drawn(bed.ladders, ends, bed.config.seed, number))
                common = {"model": name, "plan": number} | settings | {"machine": machine(settings["threads"])}
                common["date"] = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
                append_record(arguments.out, common | record)
                say(f"plan {number}: {len(record['layers'])} layers, error {100 * record['real'] ** 0.5:.2f} %")
    own = by_model(read_records(arguments.out))[name]
    print("\n".join(f"{predictor}: Spearman {spearman(own, predictor):.3f}" for predictor in PREDICTORS))


def main() -> None:
    """Measure, or print what was measured."""
    os.environ.setdefault(*cli.NO_TELEMETRY)
    arguments, parser = parse_arguments()
    try:
        if arguments.render is None:
            fill(arguments)
            return
        records = read_records(arguments.render)
        if not records:
            parser.error(f"--render: {arguments.render} holds no plans; make some with --out {arguments.render}")
        print(render(records, arguments.details))
    except (OnnxLrsError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
