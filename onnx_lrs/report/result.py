"""The record a run leaves: typed, and plain JSON on request. docs/result.md describes every field."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import onnx

from onnx_lrs.report.record import Report
from onnx_lrs.report.training import Trained

SCHEMA = 1

Form = Literal[
    "dense",
    "low-rank",
    "channels",
    "low-rank + channels",
    "spatial",
    "projected",
    "tucker",
    "elements",
    "low-rank + elements",
]


@dataclasses.dataclass(frozen=True)
class Totals:
    """Size and cost of one model.

    ``params`` counts the elements of floating-point weights, ``macs`` the multiply-accumulates of one run at the
    smallest batch (Conv, Gemm, MatMul), ``latency_ms`` is the median over interleaved rounds, None when not measured.
    """

    params: int
    macs: int
    file_bytes: int
    latency_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Before divided by after for each field of :class:`Totals`; above 1 is better."""

    params: float
    macs: float
    file_bytes: float
    latency_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class SearchStep:
    """One question of the search for what ``max_drop`` allows.

    ``latency`` is the limit that was tried and ``predicted`` what its plan is predicted to take, fractions of the
    original's; ``drop`` what was lost, a share of ``measure`` ("accuracy", "agreement", "relative error", "metric");
    ``fit`` says how the layers were fitted ("alone", "cascade"), or "confirm" where the untouched samples were asked.
    """

    latency: float
    predicted: float
    drop: float
    measure: str
    fit: str
    held: bool


@dataclasses.dataclass(frozen=True)
class ParetoPoint:
    """One plan: what it leaves of the original's cost, a fraction, the loss it is expected to make, layers changed."""

    fraction: float
    loss: float
    layers: int


@dataclasses.dataclass(frozen=True)
class Pareto:
    """What a plan would have lost at other budgets, from the same error curves; nothing was fitted for it.

    ``kind`` is the cost ("latency", "params", "macs" or "size") and ``limit`` the fraction of it that was asked for,
    None where none was. ``points`` are plans of which none beats another in both cost and loss, by rising cost;
    ``chosen`` is the plan of this run, None where the original was kept. A loss is the sum over the layers of what each
    is expected to make of the outputs, a relative squared error; without data that of the layer itself.
    """

    kind: str
    limit: float | None
    points: tuple[ParetoPoint, ...]
    chosen: ParetoPoint | None


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One of the forms that a layer was offered.

    ``params`` are the weights it would have and ``error`` the relative error of the layer's output on the samples that
    select (without data: of its weights); ``chosen`` says that the plan took it.
    """

    form: Form
    rank: int
    kept_channels: int
    elements: int
    params: int
    error: float
    chosen: bool


@dataclasses.dataclass(frozen=True)
class ChangedAnswer:
    """A sample whose largest class is another one in the compressed model.

    ``sample`` counts the rows of the data that judges, ``name`` is that of its file, empty where it has none.
    ``before`` and ``after`` are the classes, ``before_scores`` what the original gives these two and ``after_scores``
    what the compressed model does; ``label`` is the true class, None without labels. The texts are the names of the
    classes where the labels came from folders, else empty. ``thumbnail`` is a small JPEG of a sample that is a picture
    and not part of the JSON.
    """

    sample: int
    name: str
    before: int
    after: int
    label: int | None
    before_scores: tuple[float, float]
    after_scores: tuple[float, float]
    before_text: str = ""
    after_text: str = ""
    label_text: str = ""
    thumbnail: bytes = dataclasses.field(default=b"", repr=False, compare=False, metadata={"json": False})


@dataclasses.dataclass(frozen=True)
class Changes:
    """The samples of which an output of the shape (batch, classes) has another largest class.

    Of the ``changed`` ones ``lost`` were right before and ``won`` are right now; None without labels. ``examples`` are
    at most 12: lost ones first, then by how clearly the original preferred its own answer.
    """

    output: str
    changed: int
    lost: int | None
    won: int | None
    examples: tuple[ChangedAnswer, ...]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What became of one compressible layer.

    ``shape`` is the weight's shape in the file, ``error`` the relative error of the layer's output ``||y - y'|| / ||y -
    mean(y)||`` on held-out columns (None without data, 0.0 for a dense layer). ``rank`` is 0 without a low-rank part,
    ``inner_rank`` 0 but for Tucker-2, ``kept_channels`` 0 without a branch on kept channels, ``elements`` 0 without
    single entries, ``channels`` the input channels of the layer and ``kept_outputs`` the filters left when every reader
    has dropped the others. ``activation_error`` is ||phi(y) - phi(y')|| / ||phi(y)|| behind the activation phi on
    held-out columns, where the method sampled columns; ``allowed_error`` and ``reached_error`` are those of a
    guarantee, counted in the same way on the columns of the fit. ``status`` says how the solve ended: ``solved``,
    ``dense`` for a layer left as it is, or another name in :class:`onnx_lrs.solvers.Status` in lower case.
    ``activation`` is what follows the layer, with what stands between: "add + relu", or "sigmoid, fitted as linear"
    where it is not piecewise linear. ``latency_before_ms`` and ``latency_after_ms`` are those of the layer alone in a
    small graph, where latency decides. Of ``params_after``, ``low_rank_params`` belong to low-rank factors or chains of
    thinner convolutions and ``sparse_params`` to kept channels or single entries; the rest is a dense weight. ``curve``
    holds what the layer was offered, where a report was asked for.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    form: Form
    rank: int
    kept_channels: int
    elements: int
    channels: int
    outputs: int
    kept_outputs: int
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    error: float | None
    activation_error: float | None = None
    allowed_error: float | None = None
    reached_error: float | None = None
    status: str = "solved"
    activation: str = "linear"
    damping: float | None = None
    latency_before_ms: float | None = None
    latency_after_ms: float | None = None
    inner_rank: int = 0
    low_rank_params: int = 0
    sparse_params: int = 0
    curve: tuple[CurvePoint, ...] = ()


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What the guarantees of the layers promise for an output, beside what was measured on the same samples.

    ``bound`` and ``measured`` are ||y - y'|| / ||y|| over ``samples`` calibration samples; ``layers`` the chain of
    fully connected layers that it covers. The bound says nothing of other samples.
    """

    output: str
    layers: tuple[str, ...]
    samples: int
    bound: float
    measured: float


@dataclasses.dataclass(frozen=True)
class OptimisedGraph:
    """What ONNX Runtime made of a model's graph when it loaded it (subgraphs of If and Loop are not looked into).

    ``ops`` counts its nodes, non-standard operators with their domain in front. ``nchwc`` of the ``convs`` run in
    the blocked layout of the CPU, ``reorders`` lead into it and out of it. ``activations`` and ``sums`` were fused into
    a layer (Conv, Gemm, MatMul); the ``unfused`` ones stand behind one as nodes of their own. A sum has two computed
    operands, so adding a bias is none. ``copies`` go between a device and the CPU, ``elsewhere`` are the nodes that the
    provider left to the CPU (None where ONNX Runtime does not tell).
    """

    ops: dict[str, int]
    convs: int
    nchwc: int
    reorders: int
    activations: int
    sums: int
    unfused_activations: tuple[str, ...] = ()
    unfused_sums: tuple[str, ...] = ()
    outside_nchwc: tuple[str, ...] = ()
    copies: int = 0
    elsewhere: tuple[str, ...] | None = ()


@dataclasses.dataclass(frozen=True)
class Optimised:
    """The original and the compressed model as ONNX Runtime runs them."""

    before: OptimisedGraph
    after: OptimisedGraph


@dataclasses.dataclass(frozen=True)
class SkippedLayer:
    """A layer that was left dense, and why."""

    name: str
    op: str
    params: int
    macs: int
    reason: str


@dataclasses.dataclass(frozen=True)
class OutputQuality:
    """How close one output of the compressed model is to the original on held-out samples.

    ``top1_agreement`` and ``top5_agreement`` are shares of samples and None unless the output is (batch, classes);
    the accuracies are None without labels.
    """

    name: str
    relative_l2: float
    cosine: float
    samples: int
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None


@dataclasses.dataclass(frozen=True)
class Refined:
    """What refining did to a compressed model before it was judged.

    ``before`` is what the compressed model gave on the samples that judge, ``rounds`` what training did in each round,
    the last one with the model that was written.
    """

    before: tuple[OutputQuality, ...]
    rounds: tuple[Trained, ...]


@dataclasses.dataclass(frozen=True)
class Variant:
    """The network in one of the ways that it could be handed out, where a precision was asked for.

    ``name`` is "original", "INT8" or "FP16" (the original in that precision), "low-rank + sparse" (in float32) and that
    with ", INT8" or ", FP16". ``latency_ms`` is the median, all timed in turn; ``quality`` is against the original,
    None without data; ``in_float`` names the tensors whose nodes stay in float32, because in INT8 too much was lost.
    ``chosen`` is what was handed out. ``model`` is not part of the JSON.
    """

    name: str
    file_bytes: int
    latency_ms: float
    quality: tuple[OutputQuality, ...] | None
    in_float: tuple[str, ...]
    chosen: bool
    model: onnx.ModelProto | None = dataclasses.field(default=None, repr=False, compare=False, metadata={"json": False})


@dataclasses.dataclass(frozen=True)
class Result(Report):
    """The outcome of :func:`onnx_lrs.compress`.

    ``model`` is the compressed ModelProto and is not part of the JSON; large weights that lie in the output's data file
    are not in it, it refers to them as the file does. ``quality`` is None without data. ``notes`` are the plain
    sentences that the console shows as well. ``certificate`` is None without guarantees, or where they do not add up to
    one (a note says why). ``optimised`` is None where ONNX Runtime's own graph was not looked at.
    ``predicted_latency_ms`` is what the plan was predicted to take, None where latency does not decide, and
    ``predicted_on`` the device that it is predicted for where that is not this machine, else empty; ``search`` the
    questions of a search for what ``max_drop`` allows. ``unchanged`` says why the original was kept, empty where it was
    not; with ``dry_run`` nothing was fitted, and errors are those that the plan counts with. ``changes`` tells of each
    output with classes which samples changed theirs, None without quality. ``pareto`` is what other budgets would have
    cost, where a report was asked for and a plan was made. ``refined`` is what training did, None without it.
    ``variants`` are the ways that the network was timed in where a precision was asked for, else empty. ``call``
    repeats the run: the command line, or the Python call with objects abbreviated.
    """

    input: str | None
    output: str | None
    before: Totals
    after: Totals
    ratio: Ratio
    quality: tuple[OutputQuality, ...] | None
    layers: tuple[LayerResult, ...]
    skipped: tuple[SkippedLayer, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_bytes: int
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()
    profile: dict[str, float] = dataclasses.field(default_factory=dict)
    optimised: Optimised | None = None
    predicted_latency_ms: float | None = None
    predicted_on: str = ""
    search: tuple[SearchStep, ...] = ()
    unchanged: str = ""
    dry_run: bool = False
    changes: tuple[Changes, ...] | None = None
    pareto: Pareto | None = None
    refined: Refined | None = None
    variants: tuple[Variant, ...] = ()
    call: str = ""
    schema: int = SCHEMA
    model: onnx.ModelProto | None = dataclasses.field(default=None, repr=False, compare=False, metadata={"json": False})

    def to_html(self) -> str:
        """Return a page about the run, one file without anything from outside; docs/report.md tells what it shows.

        Raises
        ------
        ConfigError
            If jinja2 or matplotlib are missing.
        """
        from onnx_lrs.report.html import check_extra, page
        from onnx_lrs.report.result_page import content

        check_extra()
        return page("result.html", content(self))


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One Conv, Gemm or MatMul of a model as it is, and whether it can be compressed.

    ``shape`` is the weight's shape in the file and empty when the layer has no constant weight. ``reason`` says why a
    layer is not ``eligible`` and is None when it is. ``effective_rank`` is the lowest rank that keeps 99 % of the
    variance of the layer's outputs on the data, of at most ``full_rank``; None without data
    and for layers left as they are.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    params: int
    macs: int
    eligible: bool
    reason: str | None
    full_rank: int | None = None
    effective_rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Inspection(Report):
    """What :func:`onnx_lrs.inspect` finds in a model; nothing is changed.

    ``inputs`` and ``outputs`` are one text a tensor: name, type and shape, ``image float32 [N,3,32,32]``; ``dynamic``
    lists the dimensions of the inputs that are open, "image: axis 0 (N)". ``external_bytes`` are those of weights
    beside the file, which ``totals.file_bytes`` holds as well.
    """

    input: str | None
    opset: int
    ir_version: int
    producer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    totals: Totals
    layers: tuple[LayerInfo, ...]
    notes: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    external_bytes: int = 0
    schema: int = SCHEMA


def ratio_of(before: Totals, after: Totals) -> Ratio:
    """Return before / after, field by field."""

    def over(a: float | None, b: float | None) -> float:
        return math.nan if not a or not b else a / b

    return Ratio(
        params=over(before.params, after.params),
        macs=over(before.macs, after.macs),
        file_bytes=over(before.file_bytes, after.file_bytes),
        latency_ms=over(before.latency_ms, after.latency_ms) if before.latency_ms and after.latency_ms else None,
    )
