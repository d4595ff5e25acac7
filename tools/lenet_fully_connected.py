"""Compress the two fully connected layers of the shipped LeNet-5 and count what the network still gets right.

Two questions, answered without retraining and without looking at a test image for any choice:

- Guarantees: fc1 (ReLU) and fc2 (nothing behind it) are solved by ddlr and nettrim for an allowed relative error, the
  gain, over a grid; in the parallel form (both on inputs of the original network) and the cascade form (fc2 on inputs
  of the compressed fc1, beside the original outputs, with the gain raised to Net-Trim's rule where it must be). The
  table holds the parameters, the accuracy, the bound that the certificate gives for the logits on the fit samples, and
  the error measured on them.
- Budget: every method at a share of the fully connected weights, 6.8 % by default. How much of it fc2 gets is the
  split with the least error of the logits on the select samples.

Run it with the MNIST files, or without them on the digits that are shipped::

    python tools/lenet_fully_connected.py --out fc.jsonl --mnist DIR
    python tools/lenet_fully_connected.py --render fc.jsonl

DIR holds ``mnist_train.npz`` and ``mnist_test.npz`` with ``x`` (N,28,28) uint8 and ``y``. Lines are appended as they
are done, and what is in the file is not computed again. Weights are counted without biases and, for single entries,
without their indices; bytes are those of the weights in the file, with indices.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from trials import (
    WITHOUT_ADMM,
    Record,
    Row,
    add_threads,
    append_record,
    checked_threads,
    failure,
    figure,
    machine,
    markdown,
    read_records,
    rows,
    say,
)

from onnx_lrs.data import split
from onnx_lrs.demo import folder
from onnx_lrs.graph import model as models
from onnx_lrs.graph.layers import bias_row, find, weight_matrix
from onnx_lrs.graph.model import View, sparse_bytes
from onnx_lrs.runtime.session import Session, with_outputs
from onnx_lrs.solvers import METHODS, Budget, Columns, ElementFactors, Problem, Settings, Solution, Status
from onnx_lrs.solvers.moments import moments_of

GAINS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
GUARANTEED = ("ddlr", "nettrim")
FORMS = ("parallel", "cascade")
SHARE = 0.068  # of the fully connected weights: what Net-Trim keeps of LeNet-5
SPLITS = (0.02, 0.05, 0.1, 0.15)  # of a budget, what fc2 may get, beside its even share
HOLDOUT = 0.2
BATCH = 500
CLAIMED = 0.8  # points of accuracy that nettrim may lose at SHARE
DROPS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # points of accuracy, at which ddlr and nettrim are compared
KEY = ("part", "method", "form", "gain", "share")
COMPARABLE = ("data", "images", "seed", "test_images")


@dataclasses.dataclass(frozen=True)
class Dense:
    """One fully connected layer as it is: W (out, d) and b (out,), float64."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Return ``inputs W^T + b`` in float32."""
        return inputs @ self.weight.T.astype(np.float32) + self.bias.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Bench:
    """The two layers, the features that enter fc1 by role (n, 800), the test labels, and how problems are made."""

    layers: tuple[Dense, Dense]
    fit: np.ndarray
    select: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    seed: int

    @property
    def params(self) -> int:
        """Weights of both layers."""
        return sum(layer.weight.size for layer in self.layers)

    def logits(self, layers: tuple[Dense, Dense], features: np.ndarray) -> np.ndarray:
        """Return what the network gives for features before fc1."""
        return layers[1](np.maximum(layers[0](features), 0))

    def accuracy(self, layers: tuple[Dense, Dense]) -> float:
        """Return the share of the test images that are labelled correctly."""
        return float((self.logits(layers, self.test).argmax(axis=1) == self.labels).mean())

    def error(self, layers: tuple[Dense, Dense], features: np.ndarray) -> float:
        """Return the Frobenius norm of what the logits are off by."""
        difference = self.logits(layers, features) - self.logits(self.layers, features)
        return math.sqrt(float(np.square(difference, dtype=np.float64).sum()))

    def scale(self, features: np.ndarray) -> float:
        """Return the Frobenius norm of the logits."""
        return math.sqrt(float(np.square(self.logits(self.layers, features), dtype=np.float64).sum()))

    def first(self) -> Problem:
        """Return the problem of fc1."""
        return self._problem(0, (Columns(self.fit), Columns(self.select)))

    def second(self, before: Dense | None = None) -> Problem:
        """Return the problem of fc2, in the cascade form behind a compressed fc1."""
        samples = []
        for features in (self.fit, self.select):
            original = np.maximum(self.layers[0](features), 0)
            if before is None:
                samples.append(Columns(original))
            else:
                samples.append(Columns(np.maximum(before(features), 0), self.layers[1](original)))
        return self._problem(1, (samples[0], samples[1]))

    def _problem(self, number: int, samples: tuple[Columns, Columns]) -> Problem:
        layer, (columns, checks) = self.layers[number], samples
        return Problem(
            layer.weight,
            moments=moments_of(columns.inputs),
            validation=moments_of(checks.inputs),
            bias=layer.bias,
            activation="linear" if number else "relu",
            columns=columns,
            checks=checks,
        )


# ------------------------------------------------------------------------------------------------------------ the data


def open_bench(arguments: argparse.Namespace, samples: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Bench:
    """Read the model, and run what lies before fc1 once for all images of :func:`read_images`."""
    model = models.load(folder() / "lenet5.onnx")
    view = View(model)
    named = {layer.name: layer for layer in find(view)[0]}
    images, test, labels = samples
    parts = split(len(images), HOLDOUT, arguments.seed)
    fitted = np.union1d(parts.fit, parts.held_out)  # the test images judge, so none of these need to
    layers = tuple(Dense(weight_matrix(view, named[n]), np.asarray(bias_row(view, named[n]))) for n in ("fc1", "fc2"))
    with Session(with_outputs(model, [named["fc1"].input]), arguments.threads) as session:

        def features(chosen: np.ndarray) -> np.ndarray:
            made = [
                session.run({"image": chosen[start : start + BATCH, None].astype(np.float32)})[named["fc1"].input]
                for start in range(0, len(chosen), BATCH)
            ]
            return np.concatenate(made)

        fit, select, judge = features(images[fitted]), features(images[parts.select]), features(test)
    return Bench((layers[0], layers[1]), fit, select, judge, labels, arguments.seed)


def read_images(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return calibration images drawn at random, test images and test labels."""
    if arguments.mnist is None:
        with np.load(folder() / "digits.npz") as archive:
            images, test, labels = archive["calibration"], archive["test"], archive["test_labels"]
    else:
        with np.load(arguments.mnist / "mnist_train.npz") as archive:
            images = archive["x"]
        with np.load(arguments.mnist / "mnist_test.npz") as archive:
            test, labels = archive["x"], archive["y"]
    count = min(arguments.limit_images, len(images))
    drawn = np.random.default_rng(arguments.seed).permutation(len(images))[:count]
    return images[np.sort(drawn)], test, labels


# --------------------------------------------------------------------------------------------------------- guarantees


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a layer takes: its weights, and the bytes of them in the file, indices of single entries included."""

    params: int
    stored: int


def apply(layer: Dense, solution: Solution) -> tuple[Dense, Cost]:
    """Return a layer with its solution and what that costs; as it was where there are no factors."""
    full = 4 * layer.weight.size
    if solution.factors is None:
        return layer, Cost(layer.weight.size, full)
    factors = solution.factors
    stored = 4 * factors.params
    if isinstance(factors, ElementFactors):
        stored += sparse_bytes(int(factors.sparse.nnz), layer.weight.size) - 4 * int(factors.sparse.nnz)
    return Dense(factors.dense(), layer.bias + factors.bias_shift), Cost(factors.params, min(stored, full))


def guaranteed(bench: Bench, method: str, form: str, gain: float) -> Record:
    """Return the record of one gain: both layers solved, accuracy, and the logits' error, certified and measured.

    The certificate of the parallel form is :mod:`onnx_lrs.solvers.certificate`'s; in the cascade form the inputs of
    fc2 are those that it will get, so what fc2 allows is the bound. Errors are relative to the norm of the logits.
    """
    from onnx_lrs.solvers.certificate import chain
    from onnx_lrs.solvers.constrained import cascade_gain

    settings, begun = Settings(seed=bench.seed), time.perf_counter()
    one = METHODS[method](bench.first(), Budget(gain=gain), settings=settings)
    first, cost1 = apply(bench.layers[0], one)
    problem, second_gain = bench.second(first if form == "cascade" else None), gain
    if form == "cascade":
        second_gain = max(gain, cascade_gain(problem))
    two = METHODS[method](problem, Budget(gain=second_gain), settings=settings)
    second, cost2 = apply(bench.layers[1], two)
    seconds = time.perf_counter() - begun
    if form == "cascade":
        bounds = two.allowed, two.allowed
    else:
        found = chain(("fc1", "fc2"), (one, two), tuple(layer.weight for layer in bench.layers))
        bounds = found.allowed, found.reached
    scale = bench.scale(bench.fit)
    return outcome(bench, (first, second), (cost1, cost2)) | {
        "bound": None if bounds[0] is None else bounds[0] / scale,
        "bound_reached": None if bounds[1] is None else bounds[1] / scale,
        "fc2_gain": float(second_gain),
        "status": f"{one.status.name}, {two.status.name}",
        "seconds": seconds,
    }


def outcome(bench: Bench, layers: tuple[Dense, Dense], costs: tuple[Cost, Cost]) -> Record:
    """Return what two compressed layers cost and give."""
    params, stored = sum(cost.params for cost in costs), sum(cost.stored for cost in costs)
    return {
        "params": params,
        "fc1_params": costs[0].params,
        "fc2_params": costs[1].params,
        "kept": params / bench.params,
        "stored": stored / (4 * bench.params),
        "accuracy": bench.accuracy(layers),
        "dense_accuracy": bench.accuracy(bench.layers),
        "error": bench.error(layers, bench.fit) / bench.scale(bench.fit),
        "select_error": bench.error(layers, bench.select) / bench.scale(bench.select),
    }


# ------------------------------------------------------------------------------------------------------------- budgets


def at_share(bench: Bench, row: Row, form: str, share: float, splits: Sequence[float]) -> Record:
    """Return the record of one method at a share of all weights; fc2's part of it is chosen on the select samples.

    It is one of ``splits``, its even share, or all of fc2.
    """
    total, begun = int(share * bench.params), time.perf_counter()
    small = bench.layers[1].weight.size
    parts = sorted({int(part * total) for part in (small / bench.params, *splits)} | {min(small, total)})
    found = []
    for second in parts:
        one = row.solve(bench.first(), Budget(params=total - second))
        first, cost1 = apply(bench.layers[0], one)
        problem = bench.second(first if form == "cascade" else None)
        two = row.solve(problem, Budget(params=second))
        if one.factors is None or (two.factors is None and two.status is not Status.DENSE):
            continue
        last, cost2 = apply(bench.layers[1], two)
        statuses = f"{one.status.name}, {two.status.name}"
        found.append(outcome(bench, (first, last), (cost1, cost2)) | {"status": statuses})
    seconds = time.perf_counter() - begun
    if not found:
        return {"status": "INFEASIBLE", "seconds": seconds}
    best = min(found, key=lambda record: record["select_error"])
    if best["params"] > total:
        raise RuntimeError(f"{best['params']} parameters for a budget of {total}")
    return best | {"seconds": seconds}


# ------------------------------------------------------------------------------------------------------------ the cells


@dataclasses.dataclass(frozen=True)
class Task:
    """One line to measure: the key of its record, and what makes the rest of it."""

    key: Record
    work: Callable[[Bench], Record]


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    """Return all lines that were asked for."""
    found = []
    for gain in arguments.gains:
        for method in (name for name in GUARANTEED if name in METHODS and name in arguments.methods):
            for form in FORMS:
                key = dict(zip(KEY, ("gain", method, form, gain, None), strict=True))
                found.append(Task(key, lambda bench, m=method, f=form, g=gain: guaranteed(bench, m, f, g)))
    for row in (row for label, row in rows().items() if label in arguments.methods and arguments.share):
        for form in FORMS if row.method in GUARANTEED else FORMS[:1]:
            key = dict(zip(KEY, ("share", row.label, form, None, arguments.share), strict=True))
            found.append(
                Task(key, lambda bench, r=row, f=form: at_share(bench, r, f, arguments.share, arguments.splits))
            )
    return found


def fill(arguments: argparse.Namespace) -> None:
    """Measure what the file lacks.

    Raises
    ------
    ValueError
        If the file holds lines that were made with other data.
    """
    done = read_records(arguments.out)
    samples = read_images(arguments)
    common = {
        "data": "mnist" if arguments.mnist else "digits",
        "images": len(samples[0]),
        "seed": arguments.seed,
        "test_images": len(samples[1]),
        "machine": machine(arguments.threads),
    }
    for record in done:
        other = [name for name in COMPARABLE if record[name] != common[name]]
        if other:
            raise ValueError(f"{arguments.out} was made with another {', '.join(other)}; use another --out")
    there = {tuple(record[name] for name in KEY) for record in done}
    tasks = [task for task in tasks_of(arguments) if tuple(task.key.values()) not in there]
    say(f"{len(tasks)} lines to measure")
    bench = open_bench(arguments, samples) if tasks else None
    for task in tasks:
        begun = time.perf_counter()
        try:
            found = task.work(bench)
        except Exception as error:  # noqa: BLE001 - a method that fails is a line of the table
            found = {"status": "FAILED", "failed": failure(error), "seconds": time.perf_counter() - begun}
        append_record(arguments.out, task.key | common | found)
        told = f"{found['kept']:.2%}, accuracy {found['accuracy']:.2%}" if "kept" in found else found["status"]
        say(f"{' '.join(str(v) for v in task.key.values() if v is not None)}: {told} in {found['seconds']:.1f} s")


# ----------------------------------------------------------------------------------------------------------- rendering


def render(records: Sequence[Record]) -> str:
    """Return the tables and what they say as Markdown."""
    latest = list({tuple(record[name] for name in KEY): record for record in records}.values())
    gains, shares = ([r for r in latest if r["part"] == part] for part in ("gain", "share"))
    one = latest[0]
    dense = next((r["dense_accuracy"] for r in latest if "dense_accuracy" in r), None)
    parts = [
        f"LeNet-5's fully connected layers, {one['images']:,} samples to fit and select ({one['data']}), accuracy on "
        f"{one['test_images']:,} test images{'' if dense is None else f', uncompressed {dense:.2%}'}; no retraining. "
        f"Weights are counted without indices, bytes with them. {one['machine']}."
    ]
    if gains:
        parts += ["### For an allowed error", gain_table(gains), *frontier(gains)]
    if shares:
        parts += ["### At a share of the weights", share_table(shares), *claim(shares)]
    failed = [f"- {r['method']} ({r['form']}) failed: {r['failed']}" for r in latest if r["status"] == "FAILED"]
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


def gain_table(records: Sequence[Record]) -> str:
    """Return one line a method, form and gain."""
    bounds = ["bound", "bound from reached errors", "measured error"]
    header = ["method", "gain", "gain of fc2", *COSTS, *bounds, "seconds"]
    body = []
    for record in sorted(records, key=lambda r: (r["method"], FORMS.index(r["form"]), r["gain"])):
        start = [f"{record['method']}, {record['form']}", f"{record['gain']:g}"]
        if "kept" not in record:
            body.append([*start, record["status"].lower(), *[""] * (len(header) - 3)])
            continue
        errors = [_percent(record[name]) for name in ("bound", "bound_reached", "error")]
        body.append([*start, figure(record["fc2_gain"]), *_costs(record), *errors, figure(record["seconds"])])
    return markdown(header, body)


COSTS = ("weights kept", "bytes kept", "fc1", "fc2", "accuracy", "points lost")


def _costs(record: Record) -> list[str]:
    shares = [f"{record['kept']:.2%}", f"{record['stored']:.2%}"]
    counts = [f"{record['fc1_params']:,}", f"{record['fc2_params']:,}"]
    lost = 100 * (record["dense_accuracy"] - record["accuracy"])
    return [*shares, *counts, f"{record['accuracy']:.2%}", f"{lost:.2f}"]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{figure(100 * value)} %"


def share_table(records: Sequence[Record]) -> str:
    """Return one line a method and form."""
    header = ["method", "allowed", *COSTS, "error (fit)", "seconds"]
    body = []
    for record in records:
        name = f"{record['method']}, {record['form']}" if record["method"] in GUARANTEED else record["method"]
        start = [name, f"{record['share']:.1%}"]
        if "kept" not in record:
            body.append([*start, record["status"].lower(), *[""] * (len(header) - 3)])
            continue
        body.append([*start, *_costs(record), _percent(record["error"]), figure(record["seconds"])])
    return markdown(header, body)


def frontier(records: Sequence[Record]) -> list[str]:
    """Return the least of each method at equal accuracy, in weights and in bytes, and how often ddlr needs less."""
    solved = [record for record in records if "kept" in record]
    return [*_frontier(solved, "kept", "weights"), *_frontier(solved, "stored", "bytes")] if solved else []


def _frontier(records: Sequence[Record], measure: str, unit: str) -> list[str]:
    names = list(dict.fromkeys((record["method"], record["form"]) for record in records))
    body, less, both = [], 0, 0
    for drop in DROPS:
        good = [r for r in records if r["accuracy"] >= r["dense_accuracy"] - drop / 100 - 1e-12]
        cells = [min((r[measure] for r in good if (r["method"], r["form"]) == name), default=None) for name in names]
        body.append([f"{drop:g}", *["" if cell is None else f"{cell:.2%}" for cell in cells]])
        ddlr, nettrim = (min((r[measure] for r in good if r["method"] == m), default=None) for m in GUARANTEED)
        if ddlr is not None and nettrim is not None:
            less, both = less + (ddlr < nettrim), both + 1
    header = ["points", *[f"{method}, {form}" for method, form in names]]
    told = [f"Fewest {unit} kept, over the grid, that lose at most so many points of accuracy:", markdown(header, body)]
    if both:
        told.append(f"At equal accuracy ddlr needs fewer {unit} than nettrim at {less} of {both} of these levels.")
    return told


def claim(records: Sequence[Record]) -> list[str]:
    """Return whether nettrim keeps the accuracy at the share, in one sentence a form."""
    told = []
    for record in records:
        if record["method"] != "nettrim" or "kept" not in record:
            continue
        lost = 100 * (record["dense_accuracy"] - record["accuracy"])
        told.append(
            f"- nettrim, {record['form']}: {lost:.2f} points lost at {record['kept']:.2%} of the weights without "
            f"retraining; promised at most {CLAIMED}: {'kept' if lost <= CLAIMED else 'not kept'}."
        )
    return ["\n".join(told)] if told else []


# -------------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compress LeNet-5's fully connected layers and count its accuracy.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FILE.jsonl", help="measure, appending one line a result")
    target.add_argument("--render", type=Path, metavar="FILE.jsonl", help="print the tables of a file as Markdown")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="mnist_train.npz and mnist_test.npz lie here")
    parser.add_argument("--limit-images", type=int, default=6000, metavar="N", help="samples drawn (default: 6000)")
    parser.add_argument("--gains", type=float, nargs="*", default=list(GAINS), help="grid of allowed relative errors")
    parser.add_argument("--share", type=float, default=SHARE, help=f"of the weights, 0 for none (default: {SHARE})")
    splits = f"of that, what fc2 may get, beside its even share and all of it (default: {' '.join(map(str, SPLITS))})"
    parser.add_argument("--splits", type=float, nargs="*", default=list(SPLITS), help=splits)
    labels = [label for label in rows() if label != WITHOUT_ADMM]
    parser.add_argument("--methods", nargs="+", default=labels, metavar="NAME", help=f"of {', '.join(labels)}")
    parser.add_argument("--seed", type=int, default=0, help="seed of draw and split (default: 0)")
    add_threads(parser)
    arguments = parser.parse_args()
    unknown = [label for label in arguments.methods if label not in rows()]
    if unknown:
        parser.error(f"--methods: unknown {', '.join(map(repr, unknown))}; there are {', '.join(rows())}")
    if not 0 <= arguments.share < 1:
        parser.error(f"--share is {arguments.share}; it is a share of the weights, from 0 up and below 1")
    if not all(0 < part < 1 for part in arguments.splits):
        parser.error("--splits are shares of the budget, between 0 and 1")
    if arguments.limit_images < 3 or any(gain < 0 for gain in arguments.gains):
        parser.error("--limit-images must be at least 3, and no gain negative")
    return arguments, parser


def main() -> None:
    """Measure, or print what was measured."""
    arguments, parser = parse_arguments()
    try:
        if arguments.render is None:
            with checked_threads(parser, arguments.threads):
                fill(arguments)
            return
        records = read_records(arguments.render)
    except ValueError as error:
        parser.error(str(error))
    if not records:
        parser.error(f"--render: {arguments.render} holds nothing; make it with --out {arguments.render}")
    print(render(records))


if __name__ == "__main__":
    main()
