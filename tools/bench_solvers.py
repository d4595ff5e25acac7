"""Time the methods against one float32 Gram product of the same layer's data, X^T X, in the same run.

The layers are synthetic: 512 filters of 3x3, columns like those behind a ReLU (rectified correlated Gaussians), the
budget a quarter of the parameters. A product is timed right before and right after every solve, and the ratio is taken
to the mean of the two, so that a machine that slows down for a while slows both. NumPy computes X^T X as a symmetric
product, half the work of a general one::

    python tools/bench_solvers.py --markdown > bench.md
    python tools/bench_solvers.py --d 576 --methods lrs admm

The table goes to stderr, or as Markdown to stdout. A benchmark states what it found and ends with 0. Where other work
runs on the same cores, BLAS threads wait for each other and ratios grow: measure on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import numpy as np
from trials import (
    WITHOUT_ADMM,
    Row,
    add_threads,
    checked_threads,
    chosen_rows,
    failure,
    figure,
    machine,
    markdown,
    rich_table,
    rows,
    say,
)

from onnx_lrs.solvers import Budget, Columns, Problem
from onnx_lrs.solvers.moments import moments_of

WIDTHS = (576, 1152, 2304, 4608)
COLUMNS = 20_000
FILTERS, TAPS = 512, 9
SHARE = 4  # the budget is 1 / SHARE of the layer's parameters
MULTIPLE = 8
DECAY = 0.7  # the spectrum of the Gaussians falls as j^-DECAY
ROUNDS = ((1152, 5), (2304, 3))  # rounds up to a width; one above
PROMISED_AT = 4608
PROMISED = {"greedy": 3.0, "admm": 10.0}  # the largest ratio that is promised at that width


@dataclasses.dataclass(frozen=True)
class Times:
    """What one method took, in seconds, beside the products around it; ``failed`` says why there are none."""

    solves: tuple[float, ...]
    grams: tuple[float, ...]
    failed: str | None = None

    @property
    def ratio(self) -> float | None:
        """The median over the rounds of a solve to the mean of the two products around it."""
        if not self.solves:
            return None
        around = zip(self.grams[::2], self.grams[1::2], strict=True)
        return statistics.median(s / ((a + b) / 2) for s, (a, b) in zip(self.solves, around, strict=True))


@dataclasses.dataclass(frozen=True)
class Line:
    """All of one width: the median time of a product, and every method's times by label."""

    d: int
    gram: float
    rounds: int
    times: dict[str, Times]


def make_problem(d: int, n: int, seed: int) -> Problem:
    """Return the layer: weights of decaying spectrum, rectified correlated columns, moments of all of them.

    Parameters
    ----------
    d : int
        Columns of the weight, a multiple of 9.
    n : int
        Sampled columns.
    seed : int
        Decides everything random.
    """
    rng = np.random.default_rng([seed, d])
    spectrum = (np.arange(1, d + 1) ** -DECAY).astype(np.float32)
    mixing = spectrum[:, None] * rng.standard_normal((d, d), np.float32)
    inputs = rng.standard_normal((n, d), np.float32) @ mixing
    inputs /= inputs.std(axis=0)
    np.maximum(inputs, 0, out=inputs)
    rank = min(FILTERS, d)
    parts = rng.standard_normal((FILTERS, rank)) * np.arange(1, rank + 1) ** -DECAY
    weight = parts @ rng.standard_normal((rank, d)) / np.sqrt(d)
    bias = 0.1 * rng.standard_normal(FILTERS)
    columns, moments = Columns(inputs), moments_of(inputs)
    return Problem(weight, TAPS, moments, kernel=(3, 3), bias=bias, activation="relu", columns=columns)


def time_gram(inputs: np.ndarray) -> float:
    """Return the seconds of one float32 product X^T X."""
    begun = time.perf_counter()
    inputs.T @ inputs
    return time.perf_counter() - begun


def time_solve(row: Row, problem: Problem) -> float:
    """Return the seconds of one solve.

    Raises
    ------
    RuntimeError
        If the method gave no factors.
    """
    budget = Budget(params=problem.params // SHARE, multiple=MULTIPLE)
    begun = time.perf_counter()
    solution = row.solve(problem, budget)
    seconds = time.perf_counter() - begun
    if solution.factors is None:
        raise RuntimeError(solution.status.name)
    return seconds


def measure(d: int, n: int, chosen: list[Row], rounds: int, seed: int) -> Line:
    """Time all methods on one layer: round by round, product, method, product, next method."""
    problem = make_problem(d, n, seed)
    assert problem.columns is not None
    inputs = problem.columns.inputs
    time_gram(inputs)  # the first one wakes the threads
    grams: dict[str, list[float]] = {row.label: [] for row in chosen}
    solves: dict[str, list[float]] = {row.label: [] for row in chosen}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for row in chosen:
            if row.label in failed:
                continue
            before = time_gram(inputs)
            try:
                seconds = time_solve(row, problem)
            except Exception as error:  # noqa: BLE001 - a method that fails is a figure of the table
                failed[row.label] = failure(error)
                say(f"d {d}: {row.label} failed: {failed[row.label]}")
                continue
            solves[row.label].append(seconds)
            grams[row.label] += [before, time_gram(inputs)]
            say(f"d {d}, round {number + 1} of {rounds}: {row.label} {seconds:.3f} s, X^T X {before:.3f} s")
    times = {
        row.label: Times(tuple(solves[row.label]), tuple(grams[row.label]), failed.get(row.label)) for row in chosen
    }
    every = [seconds for found in grams.values() for seconds in found] or [time_gram(inputs)]
    return Line(d, statistics.median(every), rounds, times)


def rounds_for(d: int) -> int:
    """Return how often a layer of this width is timed."""
    return next((rounds for most, rounds in ROUNDS if d <= most), 1)


def cell(times: Times) -> str:
    """Return a ratio, or that there is none."""
    return "failed" if times.failed else figure(times.ratio)


def promises(lines: list[Line]) -> list[str]:
    """Return what is promised beside what was measured, one sentence a method."""
    found = []
    for label, limit in PROMISED.items():
        ratios = [line.times[label].ratio for line in lines if line.d == PROMISED_AT and label in line.times]
        promise = f"{label} at d = {PROMISED_AT}: promised at most {limit:g}"
        if not ratios or ratios[0] is None:
            found.append(f"{promise}, not measured in this run.")
        else:
            found.append(f"{promise}, measured {figure(ratios[0])}: {'kept' if ratios[0] <= limit else 'not kept'}.")
    return found


def failures(lines: list[Line]) -> list[str]:
    """Return why methods failed, one sentence each."""
    return [
        f"{label} failed at d = {line.d}: {times.failed}."
        for line in lines
        for label, times in line.times.items()
        if times.failed
    ]


def report(lines: list[Line], arguments: argparse.Namespace, labels: list[str]) -> None:
    """Print table, promises and conditions: Markdown on stdout, or a table on stderr."""
    header = ["d", "X^T X (s)", "rounds", *labels]
    body = [
        [str(line.d), figure(line.gram), str(line.rounds), *[cell(line.times[label]) for label in labels]]
        for line in lines
    ]
    title = (
        f"Seconds of one float32 X^T X, and solve times as multiples of it: {FILTERS} x d layers of 3x3 kernels, "
        f"{arguments.n:,} columns, 1/{SHARE} of the parameters, multiple {MULTIPLE}, ReLU, seed {arguments.seed}."
    )
    notes = [*promises(lines), *failures(lines), f"Measured on {machine(arguments.threads)}."]
    if arguments.markdown:
        print("\n\n".join([title, markdown(header, body), "\n".join(f"- {note}" for note in notes)]))
        return
    rich_table(title, header, body)
    for note in notes:
        say(note)


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time the methods against one float32 product X^T X of the same data.")
    labels = [label for label in rows() if label != WITHOUT_ADMM]
    shown = " ".join(map(str, WIDTHS))
    parser.add_argument(
        "--d", type=int, nargs="+", default=list(WIDTHS), metavar="D", help=f"widths (default: {shown})"
    )
    parser.add_argument("--n", type=int, default=COLUMNS, metavar="N", help=f"columns (default: {COLUMNS})")
    parser.add_argument(
        "--methods", nargs="+", default=labels, metavar="NAME", help=f"which (default: {', '.join(labels)})"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="repetitions (default: 5, 3 or 1, fewer for wide layers)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the layers (default: 0)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown on stdout")
    add_threads(parser)
    arguments = parser.parse_args()
    for d in arguments.d:
        if d < 1 or d % TAPS:
            parser.error(f"--d {d}: the layers have 3x3 kernels, so d must be a positive multiple of {TAPS}")
    if arguments.n < 2 or (arguments.rounds is not None and arguments.rounds < 1):
        parser.error("--n must be at least 2, --rounds at least 1")
    return arguments, parser


def main() -> None:
    """Measure width by width and report."""
    arguments, parser = parse_arguments()
    chosen = chosen_rows(parser, arguments.methods)
    with checked_threads(parser, arguments.threads):
        lines = [
            measure(d, arguments.n, chosen, arguments.rounds or rounds_for(d), arguments.seed) for d in arguments.d
        ]
        report(lines, arguments, [row.label for row in chosen])


if __name__ == "__main__":
    main()
