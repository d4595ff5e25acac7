"""Models timed against each other: in turn, in fresh sessions again and again, with an interval for every ratio."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.config import CompareConfig, Provider
from onnx_lrs.data import Samples, TensorSpec, random_samples
from onnx_lrs.errors import ConfigError, DataError, ModelError, OnnxLrsError, VerificationError
from onnx_lrs.progress import Progress
from onnx_lrs.report.comparison import ComparedModel, LayerTime, Timed, Verdict
from onnx_lrs.report.result import Changes, OutputQuality
from onnx_lrs.runtime.examples import told
from onnx_lrs.runtime.latency import calls_in_turn, drawn
from onnx_lrs.runtime.nodes import Placement, by_layer, node_name, placement, profiled, with_names
from onnx_lrs.runtime.probe import Order, probe
from onnx_lrs.runtime.ratios import FEWEST_WINDOWS, Interval, ratios
from onnx_lrs.runtime.session import Feed, Gpu, Session
from onnx_lrs.runtime.verify import compare_answers, takes_batches

MOST_WINDOWS = 40  # of time, each with fresh sessions; one a second where there are seconds for more than the fewest
ROUNDS = (3, 2000)  # in a window
ROUNDS_A_WINDOW = 5  # where rounds are counted, as long as there are not too few or too many windows
PROFILE_SECONDS, PROFILE_CALLS = 2.0, (5, 200)
OTHERS = "(others)"
BATCH = 32  # samples in a call while outputs are compared
Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A model that takes part: its name for people, its file, and what is known of it without running it.

    ``nodes`` are (name, op) of its nodes in graph order, ``file_bytes`` those of the file and of weights beside it;
    ``shown`` is the path that the user gave, None for a model in memory.
    """

    name: str
    path: pathlib.Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    nodes: tuple[tuple[str, str], ...]
    params: int
    file_bytes: int
    shown: str | None = None


def nodes_of(model: onnx.ModelProto) -> tuple[tuple[str, str], ...]:
    """Return (name, op) of a model's nodes in graph order; a node without a name is called after its output."""
    return tuple((node_name(node), node.op_type) for node in model.graph.node)


def shared_inputs(entrants: Sequence[Entrant]) -> tuple[TensorSpec, ...]:
    """Return the inputs that every model takes: the first one's, with each dimension fixed that any model fixes.

    Raises
    ------
    ModelError
        If a model's inputs differ in name, type, number of dimensions or a fixed dimension; with both models' inputs.
    """
    shared = entrants[0].inputs
    for other in entrants[1:]:
        theirs = {spec.name: spec for spec in other.inputs}
        if theirs.keys() != {spec.name for spec in shared} or not all(_agree(a, theirs[a.name]) for a in shared):
            raise ModelError(
                f"{other.name} takes {_listed(other.inputs)}, but {entrants[0].name} takes {_listed(shared)}.",
                "Models can be compared that take the same inputs: names, types, fixed dimensions.",
            )
        shared = tuple(dataclasses.replace(a, shape=_fixed(a, theirs[a.name])) for a in shared)
    return shared


def _agree(one: TensorSpec, other: TensorSpec) -> bool:
    if one.dtype != other.dtype or len(one.shape) != len(other.shape):
        return False
    pairs = zip(one.shape, other.shape, strict=True)
    return all(a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in pairs)


def _fixed(one: TensorSpec, other: TensorSpec) -> tuple[int | str | None, ...]:
    pairs = zip(one.shape, other.shape, strict=True)
    return tuple(b if isinstance(b, int) and not isinstance(a, int) else a for a, b in pairs)


def _listed(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, inputs))


def check_outputs(entrants: Sequence[Entrant]) -> None:
    """Refuse models whose outputs cannot be held against the first one's.

    Raises
    ------
    ModelError
        If a model has no output of the name of one of the first's.
    """
    first = entrants[0]
    for other in entrants[1:]:
        missing = [name for name in first.outputs if name not in other.outputs]
        if missing:
            raise ModelError(
                f"{other.name} has no output {missing[0]!r}, which {first.name} has.",
                "Export it with the same names, or leave the data out: then only times are compared.",
            )


def feed_of(entrants: Sequence[Entrant], samples: Samples | None, batch: int | None, config: CompareConfig) -> Feed:
    """Return what is timed: the first samples, or random numbers; as many as ``batch`` says, or as they come.

    Raises
    ------
    ConfigError
        If a model's batch is fixed to another number.
    DataError
        If there are no samples and a dimension is not known, or the samples differ in shape and cannot be joined.
    """
    inputs = shared_inputs(entrants)
    feed = (samples or random_samples(inputs, config.shapes, 1, config.seed)).item(0)
    if batch is None:
        return feed
    open_ended = [spec.name for spec in inputs if _is_open(spec)]
    if not open_ended:
        rows = _rows(feed)
        if rows != batch:
            name = next((e.name for e in entrants if not all(map(_is_open, e.inputs))), entrants[0].name)
            raise ConfigError(
                f"--batch {batch}: {name} does not take it, its batch is fixed to {rows}.",
                "Leave --batch out, or use the batch that it was exported with.",
            )
        return feed
    if samples is None:
        shapes = {name: (batch, *feed[name].shape[1:]) for name in open_ended}
        return random_samples(inputs, {**config.shapes, **shapes}, 1, config.seed).item(0)
    feeds = [feed, *(samples.item(i) for i in range(1, min(batch, len(samples))))]
    joined = {name: _joined(name, [one[name] for one in feeds]) for name in open_ended}
    rows = min(len(value) for value in joined.values())
    return feed | {name: value[np.arange(batch) % rows] for name, value in joined.items()}


def _is_open(spec: TensorSpec) -> bool:
    """Return whether the batch of an input is dynamic."""
    return bool(spec.shape) and not isinstance(spec.shape[0], int)


def _joined(name: str, parts: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    shapes = list(dict.fromkeys(part.shape[1:] for part in parts))
    if len(shapes) > 1:
        raise DataError(
            f"--batch: samples of input {name!r} have the shapes {list(shapes[0])} and {list(shapes[1])} behind the "
            "batch; they cannot be joined to one call.",
            "Leave --batch out: the first sample is timed then. Or give samples of one shape.",
        )
    return np.concatenate(parts)


def window_plan(config: CompareConfig) -> tuple[int, float, tuple[int, int]]:
    """Return how many windows of time there are, and in each: the seconds, and the least and most rounds."""
    if config.rounds is None:
        count = int(np.clip(config.seconds, FEWEST_WINDOWS, MOST_WINDOWS))
        return count, config.seconds / count, ROUNDS
    count = int(np.clip(config.rounds // ROUNDS_A_WINDOW, FEWEST_WINDOWS, MOST_WINDOWS))
    each = -(-config.rounds // count)
    return count, 0.0, (each, each)


def named(entrant: Entrant, error: OnnxLrsError, remedy: str | None = None) -> OnnxLrsError:
    """Return an error with the name of the model in front, and another remedy where one is given."""
    return type(error)(f"{entrant.name}: {error.message}", error.remedy if remedy is None else remedy)


@contextlib.contextmanager
def naming(entrant: Entrant, remedy: str | None = None) -> Iterator[None]:
    """Let errors of a block name the model."""
    try:
        yield
    except OnnxLrsError as error:
        raise named(entrant, error, remedy) from error


class Course:
    """One comparison: the entrants, what they run on, and how; ``folder`` is for files that live as long."""

    def __init__(
        self,
        entrants: Sequence[Entrant],
        samples: Samples | None,
        config: CompareConfig,
        progress: Progress,
        folder: pathlib.Path,
    ) -> None:
        self._entrants, self._samples, self._config, self._progress = tuple(entrants), samples, config, progress
        self._folder, self._rng = folder, np.random.default_rng(config.seed)
        wanted: Sequence[int | None] = config.batches or (None,)
        self._feeds = [feed_of(entrants, samples, batch, config) for batch in wanted]
        self._placements: dict[tuple[Provider, Entrant], Placement] = {}

    @property
    def steps(self) -> int:
        """How many steps the timing is told in."""
        return len(self._config.providers) * len(self._feeds) * window_plan(self._config)[0]

    @property
    def quality_steps(self) -> int:
        """How many steps the comparison of the outputs is told in."""
        assert self._samples is not None
        return len(self._entrants[1:]) * -(-len(self._samples) // self._batching[0])

    @functools.cached_property
    def _batching(self) -> tuple[int, bool]:
        """How many samples are joined to one call while outputs are compared, and whether they are."""
        samples, threads = self._samples, self._config.threads
        assert samples is not None
        dynamic = all(_is_open(spec) for entrant in self._entrants for spec in entrant.inputs)
        for entrant in self._entrants:
            with naming(entrant):
                dynamic = dynamic and takes_batches(entrant.path, samples, threads)
        return (BATCH, True) if dynamic else (1, False)

    def _gpu(self, entrant: Entrant) -> Gpu:
        engines = self._folder / f"engines{self._entrants.index(entrant)}"
        engines.mkdir(exist_ok=True)
        return Gpu(self._config.cuda, str(engines))

    def _session(self, entrant: Entrant, provider: Provider) -> Session:
        with naming(entrant):
            return Session(entrant.path, self._config.threads, False, provider, gpu=self._gpu(entrant))

    # ------------------------------------------------------------------------------------------------ loading

    def loaded(self) -> tuple[ComparedModel, ...]:
        """Return the models with what loading them takes, each in a process of its own.

        Before that every model runs once on every provider and batch, so that nothing is timed in vain.

        Raises
        ------
        ModelError
            If a model does not load or run, or has no node on a GPU that was named; with its name.
        """
        return tuple(self._loaded(entrant) for entrant in self._entrants)

    def _loaded(self, entrant: Entrant) -> ComparedModel:
        config, place = self._config, self._folder / "feed.npz"
        for provider in config.providers:
            self._try(entrant, provider)
        np.savez(place, **self._feeds[0])  # type: ignore[arg-type]  # numpy's stub takes the names for flags
        with naming(entrant):
            reading = probe(
                Order(str(entrant.path), str(place), config.threads, config.providers[0], self._gpu(entrant))
            )
        self._progress.step(entrant.name)
        return ComparedModel(
            name=entrant.name,
            path=entrant.shown,
            file_bytes=entrant.file_bytes,
            params=entrant.params,
            load_ms=reading.load_ms,
            peak_memory_bytes=reading.peak_bytes,
            idle_memory_bytes=reading.idle_bytes,
        )

    def _try(self, entrant: Entrant, provider: Provider) -> None:
        """Run every feed once, and see what a GPU leaves to other providers."""
        remedy = "Leave out of --batch what it does not take; --shape NAME:1,3,224,224 sets other dimensions."
        with self._session(entrant, provider) as session, naming(entrant, remedy if self._config.batches else None):
            for feed in self._feeds:
                session.run(feed)
        if provider != "cpu":
            how = self._config.threads, provider, self._gpu(entrant)
            with naming(entrant):
                kernels = profiled(entrant.path, self._feeds[0], how, 1)
                self._placements[provider, entrant] = placement(kernels, provider)

    # ------------------------------------------------------------------------------------------------ timing

    def timed(self) -> tuple[tuple[Timed, ...], tuple[LayerTime, ...]]:
        """Return the times of every provider and batch, and those of the layers where they are asked for."""
        timings: list[Timed] = []
        layers: list[LayerTime] = []
        for provider in self._config.providers:
            for feed in self._feeds:
                found = self._judged(provider, feed, self._windows(provider, feed))
                if self._config.profile:
                    layers += self._layer_times(provider, feed, found)
                timings += found
        return tuple(timings), tuple(layers)

    def _windows(self, provider: Provider, feed: Feed) -> list[Array]:
        """Return the times of every window, each of shape (rounds, models), in milliseconds."""
        found: list[Array] = []
        for _ in range(window_plan(self._config)[0]):
            found.append(self._window(provider, feed))
            self._progress.step(f"{provider}, batch {_rows(feed)}")
        return found

    def _window(self, provider: Provider, feed: Feed) -> Array:
        """Return the times of one window; its sessions are gone when the next one opens its own."""
        _, seconds, limits = window_plan(self._config)
        with contextlib.ExitStack() as stack:
            sessions = {
                which: stack.enter_context(self._session(self._entrants[which], provider))
                for which in next(drawn(len(self._entrants), self._rng))
            }
            calls = [self._call(entrant, sessions[i], feed) for i, entrant in enumerate(self._entrants)]
            return calls_in_turn(calls, seconds, limits, drawn(len(calls), self._rng))

    def _call(self, entrant: Entrant, session: Session, feed: Feed) -> Callable[[], None]:
        bound = self._config.io_binding
        if bound is None:
            bound = session.provider != "CPUExecutionProvider"
        with naming(entrant):
            run = session.bound(feed).run if bound else functools.partial(session.run, feed)

        def call() -> None:
            try:  # not naming(): entering a context would count for the call
                run()
            except OnnxLrsError as error:
                raise named(entrant, error) from error

        return call

    def _judged(self, provider: Provider, feed: Feed, windows: Sequence[Array]) -> list[Timed]:
        times = np.concatenate(windows)
        found: list[Timed] = []
        for i, (entrant, ratio) in enumerate(zip(self._entrants, ratios(windows, self._config.seed), strict=True)):
            own, place = times[:, i], self._placements.get((provider, entrant))
            left = {} if place is None else dataclasses.asdict(place)
            found.append(
                Timed(
                    model=entrant.name,
                    provider=provider,
                    batch=_rows(feed),
                    rounds=len(own),
                    median_ms=float(np.median(own)),
                    mean_ms=float(np.mean(own)),
                    p90_ms=float(np.quantile(own, 0.9)),
                    p99_ms=float(np.quantile(own, 0.99)),
                    throughput=1e3 * _rows(feed) / float(np.mean(own)),
                    ratio=ratio.value,
                    ratio_low=ratio.low,
                    ratio_high=ratio.high,
                    verdict=_verdict(i, ratio),
                    **left,
                )
            )
        return found

    def _layer_times(self, provider: Provider, feed: Feed, found: Sequence[Timed]) -> list[LayerTime]:
        """Return the times of the layers in every model, profiled for about two seconds each."""
        nodes, took = dict(self._entrants[0].nodes), []
        for entrant, timed in zip(self._entrants, found, strict=True):
            model, how = with_names(entrant.path), (self._config.threads, provider, self._gpu(entrant))
            runs = int(np.clip(1e3 * PROFILE_SECONDS / timed.median_ms, *PROFILE_CALLS))
            with naming(entrant):
                took.append(by_layer(profiled(model, feed, how, runs), model, nodes))
        return [
            LayerTime(name or OTHERS, nodes.get(name, ""), provider, _rows(feed), tuple(one[name] for one in took))
            for name in [*(name for name in took[0] if name), ""]
        ]

    # ------------------------------------------------------------------------------------------------ outputs

    def judged(self, compared: Sequence[ComparedModel], labels: NDArray[np.int64] | None) -> tuple[ComparedModel, ...]:
        """Return the models with how close each one's outputs are to the first one's, over all samples.

        Raises
        ------
        ModelError
            If a model does not run on a sample, or gives an output another shape than the first, or values that are
            not finite.
        DataError
            If the first model's own outputs are not finite.
        """
        provider, (first, *others) = self._config.providers[0], self._entrants
        found = [compared[0]]
        with self._session(first, provider) as reference:
            for other, model in zip(others, compared[1:], strict=True):
                with self._session(other, provider) as session:
                    try:
                        quality, changes = self._against((reference, session), labels)
                    except (ModelError, VerificationError) as error:
                        raise ModelError(
                            f"{other.name} against {first.name}: {error.message}",
                            "Leave that model out, or the data: then only times are compared.",
                        ) from error
                found.append(dataclasses.replace(model, quality=quality, changes=changes))
        return tuple(found)

    def _against(
        self, pair: tuple[Session, Session], labels: NDArray[np.int64] | None
    ) -> tuple[tuple[OutputQuality, ...], tuple[Changes, ...]]:
        samples = self._samples
        assert samples is not None
        items = np.arange(len(samples))
        quality, changes = compare_answers(pair, samples, items, labels, self._batching, self._progress)
        return quality, told(changes, samples, labels, self._config.report is not None)


def _rows(feed: Feed) -> int:
    return next((len(value) for value in feed.values() if value.ndim), 1)


def _verdict(place: int, ratio: Interval) -> Verdict:
    if place == 0:
        return "first"
    if not ratio.tells:
        return "cannot tell"
    return "faster" if ratio.value < 1 else "slower"
