"""Settings of a run: frozen dataclasses, validated when they are built. Every command line flag is one field."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from onnx_lrs.errors import ConfigError

DEFAULT_PARAMS = 0.5
DEFAULT_DROP = 0.01
Fit = Literal["cascade", "cascade-linear", "independent"]
FITS: tuple[Fit, ...] = ("cascade", "cascade-linear", "independent")
Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: tuple[Provider, ...] = ("cpu", "cuda", "tensorrt")
Precision = Literal["float32", "int8", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8", "fp16")
GIB = 1 << 30
FAST_MULTIPLE, SMALL_MULTIPLE = 16, 8  # blocks of ONNX Runtime's convolutions (AVX-512); half of one
# Settings that the statistics, curves and fits of layers do not depend on: how a result is reached, or which plan is
# made of the same curves. A work folder serves all of them.
UNDECIDING = (
    *("work", "jobs", "dry_run", "budget", "batch", "provider", "latency_table", "plan", "refine", "report"),
    *("precision", "quantize_options"),
)
LIMITS = ("latency", "params", "macs", "size")
Search = Literal["exhaustive", "heuristic", "default"]
SEARCHES: tuple[Search, ...] = ("exhaustive", "heuristic", "default")
Compared = Literal["auto", "kl", "l2"]
COMPARED: tuple[Compared, ...] = ("auto", "kl", "l2")
LEAST_ROUNDS = 20
REMAINS = "the fraction of the original that may remain, in (0, 1]"
MEANING = {
    **dict.fromkeys(LIMITS, REMAINS),
    "max_drop": "the share of the quality that may be lost, in [0, 1)",
    "gain": "the relative error that a layer's output may have, in (0, 1]",
}
EXAMPLES = {"max_drop": 0.01, "gain": 0.1}


def available_threads() -> int:
    """Return the number of CPU cores this process may use (an affinity mask counts)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _require(ok: bool, message: str, remedy: str = "") -> None:
    if not ok:
        raise ConfigError(message, remedy)


def _take_paths(settings: object, names: tuple[str, ...]) -> None:
    """Make texts of the paths among a record's settings."""
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            object.__setattr__(settings, name, os.fspath(value))
            flag = f"--{name.replace('_', '-')}"
            _require(os.fspath(value) != "", f"{flag} is empty.", f"Name a path, or leave {flag} out.")
    _require(getattr(settings, "report", None) != "-", "--report -: the page goes into a file.", "Name the file.")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the compressed model may cost, and what it may lose.

    Limits are fractions of the ORIGINAL over the whole model, not only its compressible layers; several hold at once,
    and the loss is made as small as they allow. With ``max_drop`` it is the other way round: the model becomes as fast
    as it gets within that loss, and other limits must be met as well.

    Parameters
    ----------
    params : float, optional
        Upper limit of parameters after / parameters before, in (0, 1].
    macs : float, optional
        Upper limit of multiply-accumulates after / before, in (0, 1].
    latency : float, optional
        Upper limit of the measured latency after / before, in (0, 1].
    size : float, optional
        Upper limit of the file's bytes after / before, in (0, 1].
    max_drop : float, optional
        What may be lost on samples that nothing was fitted to, in [0, 1): accuracy where there are labels, else
        agreement with the original's classes, else relative error of the outputs; 0.01 is one point, or one percent.
    gain : float, optional
        For methods with a guarantee, instead of limits: every layer becomes as small as it can while its output behind
        the activation is off by at most this relative error on the calibration columns, in (0, 1].

    Raises
    ------
    ConfigError
        Unless at least one is given, each lies in its range, and a gain stands alone.
    """

    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    size: float | None = None
    max_drop: float | None = None
    gain: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        _require(bool(given), "A budget needs a limit.", f"For example Budget(params={DEFAULT_PARAMS}).")
        _require(
            self.gain is None or len(given) == 1,
            f"A gain stands alone, not with {' and '.join(name for name in given if name != 'gain')}.",
            "Leave one of them out.",
        )
        for name, value in given.items():
            inside = 0.0 <= value < 1.0 if name == "max_drop" else 0.0 < value <= 1.0
            _require(
                inside,
                f"--{name.replace('_', '-')} is {value}; it is {MEANING[name]}.",
                f"For example --{name.replace('_', '-')} {EXAMPLES.get(name, 0.5)}.",
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits given, as fractions of the original, by name."""
        return {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}

    @property
    def is_timed(self) -> bool:
        """Whether latency decides, so that it must be measured before anything is chosen."""
        return self.latency is not None or self.max_drop is not None

    def __str__(self) -> str:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in given.items())


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image file (or a uint8 image array) becomes a model input.

    The pixel value p in 0..255 becomes ``(p * scale - mean) / std`` per channel, after resize and centre crop.

    Parameters
    ----------
    resize : int or (int, int), optional
        Short side in pixels (aspect ratio kept), or (height, width). Default: the model's input size.
    crop : (int, int), optional
        Centre crop (height, width) after the resize. Default: the model's input size.
    mean, std : tuple of float
        One value, or one per channel, in units of ``p * scale``.
    scale : float
        Factor on the pixel value; 1/255 gives 0..1.
    layout : {"NCHW", "NHWC"}, optional
        Default: read off the model's input shape.
    channels : {"RGB", "BGR", "GRAY"}, optional
        Default: RGB for three input channels, GRAY for one.
    preset : str, optional
        The name the values came from; "default" when nobody chose them (the console then says so).
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0 / 255.0
    layout: Literal["NCHW", "NHWC"] | None = None
    channels: Literal["RGB", "BGR", "GRAY"] | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        _require(all(s > 0 for s in self.std), f"--std is {self.std}; every value must be positive.")
        _require(self.scale > 0, f"--scale is {self.scale}; it must be positive.")
        _require(self.layout in (None, "NCHW", "NHWC"), f"--layout is {self.layout!r}; use NCHW or NHWC.")
        _require(
            self.channels in (None, "RGB", "BGR", "GRAY"), f"--channels is {self.channels!r}; use RGB, BGR or GRAY."
        )
        for name, sizes in (("resize", self.resize), ("crop", self.crop)):
            values = (sizes,) if isinstance(sizes, int) else sizes or ()
            _require(all(v > 0 for v in values), f"--{name} is {sizes}; sizes are positive pixel counts.")

    @classmethod
    def from_preset(cls, name: str) -> Preprocess:
        """Return the preprocessing of a training recipe: ``imagenet``, ``caffe`` or ``raw``.

        ``imagenet``: RGB in 0..1, mean .485 .456 .406, std .229 .224 .225, short side of size / 0.875, centre crop.
        ``caffe``: BGR in 0..255 minus 104, 117, 123. ``raw``: RGB in 0..255 as it is.
        """
        presets = {
            "imagenet": cls(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), channels="RGB", preset="imagenet"),
            "caffe": cls(mean=(104.0, 117.0, 123.0), scale=1.0, channels="BGR", preset="caffe"),
            "raw": cls(scale=1.0, preset="raw"),
        }
        _require(name in presets, f"--preset is {name!r}; known presets: {', '.join(presets)}.")
        return presets[name]


@dataclasses.dataclass(frozen=True)
class Training:
    """How a compressed model is refined by :func:`onnx_lrs.refine`, or by :func:`onnx_lrs.compress` at its end.

    Parameters
    ----------
    epochs : int
        Passes over the samples at most.
    minutes : float, optional
        Of wall clock at most, over all rounds; the learning rate is back near zero by then.
    rounds : int
        Of compressing and refining on the way to the budget, in equal ratios; for ``compress`` only. The epochs are
        shared out among them.
    train_batch : int
        Samples in a step.
    learning_rate : float
        The highest one of the cycle: the length of a step in units of the root mean square of what it changes.
    weight_decay : float
        Of AdamW; biases have none.
    loss : {"auto", "kl", "l2"}
        Divergence of class scores, or relative squared error. "auto": the first for outputs that are probabilities.
    temperature : float
        Both sides' class scores are divided by it.
    label_share : float
        Of the cross entropy in the loss of outputs with classes, where there are labels, in [0, 1].
    block_share : float
        Of the relative squared errors of the tensors between blocks in the loss, in [0, 1).
    augment : bool
        Shift and mirror images.
    patience : int
        Epochs without a better loss on the samples that select, after which the run ends.
    device : {"cpu", "cuda"}
    autocast : {"auto", "on", "off"}
        Whether products are taken in bfloat16. "auto": where that makes a step faster.
    fake_quant : bool
        Train for INT8: every call computes with weights rounded as ``onnxruntime.quantization`` does it (static, QDQ,
        per channel), and so the best epoch is chosen. The file gets the weights before rounding.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    epochs: int = 20
    minutes: float | None = None
    rounds: int = 1
    train_batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    loss: Compared = "auto"
    temperature: float = 4.0
    label_share: float = 0.3
    block_share: float = 0.0
    augment: bool = True
    patience: int = 10
    device: Literal["cpu", "cuda"] = "cpu"
    autocast: Literal["auto", "on", "off"] = "auto"
    fake_quant: bool = False

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"--epochs is {self.epochs}; it must be at least 1.")
        _require(
            self.minutes is None or 0 < self.minutes < math.inf, f"--minutes is {self.minutes}; it must be positive."
        )
        _require(self.rounds >= 1, f"--rounds is {self.rounds}; it must be at least 1.")
        _require(self.rounds <= self.epochs, f"--rounds is {self.rounds}, more than {self.epochs} epochs.")
        _require(0 < self.learning_rate < math.inf, f"--learning-rate is {self.learning_rate}; it must be positive.")
        _require(0 < self.temperature < math.inf, f"--temperature is {self.temperature}; it must be positive.")
        _require(self.train_batch >= 1, f"--train-batch is {self.train_batch}; it must be at least 1.")
        _require(0 <= self.weight_decay < 1, f"weight_decay is {self.weight_decay}; it must be in [0, 1).")
        _require(0 <= self.label_share <= 1, f"--label-share is {self.label_share}; it must be in [0, 1].")
        _require(0 <= self.block_share < 1, f"--block-share is {self.block_share}; it must be in [0, 1).")
        _require(self.patience >= 1, f"--patience is {self.patience}; it must be at least 1.")
        for name, known in (("loss", COMPARED), ("device", ("cpu", "cuda")), ("autocast", ("auto", "on", "off"))):
            value = getattr(self, name)
            _require(value in known, f"--{name} is {value!r}; use {', '.join(known)}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run besides the model and the data.

    Parameters
    ----------
    budget : Budget, optional
        What may remain of the original. None: as fast as it gets within ``max_drop=0.01`` where there is data and the
        method makes layers faster, else ``params=0.5``.
    method : str
        A name in :data:`onnx_lrs.solvers.METHODS`.
    fit : {"cascade", "cascade-linear", "independent"}
        What a layer is fitted to: what the compressed layers in front of it give, with the activation behind it seen or
        not, or what the original network gives. Without data, and with a gain, layers are always independent.
    structure : {"channels", "elements"}
        What the sparse part keeps; single elements (method ``greedy``) make a smaller file at the same speed.
    steps : int, optional
        Limit of the iterations of one solve; None: the method's own.
    multiple : int, optional
        Ranks and kept channels are multiples of it (kernels work in blocks). None: 16 where latency decides, else 8.
    holdout : float
        Share of the samples used only for judging, in (0, 0.9].
    columns : int
        Sampled im2col columns (positions x images) per layer that enter the statistics; wider layers use 8 * d.
    memory_bytes : int
        Limit of what the run adds to the model and ONNX Runtime's own memory.
    batch : int
        Samples in the call whose latency is measured.
    calibration_batch : int
        Largest number of samples in one inference call of the calibration.
    threads : int
        Threads of ONNX Runtime's operators and of the reported latency.
    jobs : int, optional
        Layers and candidates solved at the same time; None: as many as ``threads``. Decides the time, not the file.
    provider : {"cpu", "cuda", "tensorrt"}
        Where ONNX Runtime runs the two models that are compared and timed. The fit runs on the CPU in any case.
    seed : int
        Decides the split of the samples and the sampled positions; same seed, same file.
    exclude : tuple of str
        Shell patterns of layer names to leave dense.
    shapes : mapping of str to tuple of int
        Shapes of inputs with dynamic dimensions other than the batch.
    random_data : bool
        Fit on random inputs when there is no data. Never done silently.
    preprocess : Preprocess, optional
        For images; None means the default (0..1, input size).
    latency_table : path, optional
        A file with measured latencies of layers. Where it exists it is used instead of measuring, so that a plan can be
        made for another device; else what was measured is written to it.
    plan : path, optional
        A file with the plan of a run. Where it exists it is carried out; else the plan is written to it.
    dry_run : bool
        Only make the plan and say what is to be expected of it; no model is written, and nothing is fitted but the
        plans that a search for ``max_drop`` tries.
    work : path, optional
        A folder that keeps finished layers, so that the same call goes on after an interruption; it decides nothing
        else. None: nothing is kept.
    refine : Training, optional
        How to train the compressed model before it is judged; needs ``pip install "onnx-lrs[refine]"``. None: not.
    precision : {"float32", "int8", "fp16"}
        What the compressed model computes in; the plan is made for it. INT8 is static (QDQ, per channel) and needs
        data; float16 is for GPUs. Inputs and outputs stay float32.
    quantize_options : mapping of str to str
        For INT8, options of ``onnxruntime.quantization.quantize_static`` by their names there:
        ``{"calibrate_method": "percentile", "reduce_range": "True"}``.
    report : path, optional
        Where to write a page about the run (HTML); needs ``pip install "onnx-lrs[report]"``. The result holds more
        then: the error curve of each layer, and what the plan would have lost at other budgets.
    """

    budget: Budget | None = None
    method: str = "lrs"
    fit: Fit = "cascade"
    structure: Literal["channels", "elements"] = "channels"
    steps: int | None = None
    multiple: int | None = None
    holdout: float = 0.2
    columns: int = 65536
    memory_bytes: int = 2 * GIB
    batch: int = 1
    calibration_batch: int = 32
    threads: int = dataclasses.field(default_factory=available_threads)
    jobs: int | None = None
    provider: Provider = "cpu"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    random_data: bool = False
    preprocess: Preprocess | None = None
    latency_table: str | os.PathLike[str] | None = None
    plan: str | os.PathLike[str] | None = None
    dry_run: bool = False
    work: str | os.PathLike[str] | None = None
    refine: Training | None = None
    precision: Precision = "float32"
    quantize_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    report: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _take_paths(self, ("work", "latency_table", "plan", "report"))
        _require(self.precision in PRECISIONS, f"--quantize is {self.precision!r}; use {' or '.join(PRECISIONS[1:])}.")
        _require(
            not self.quantize_options or self.precision == "int8",
            "--quantize-option is about INT8.",
            "Add --quantize int8, or leave it out.",
        )
        _require(isinstance(self.budget, Budget | None), f"budget is {self.budget!r}.", "Write Budget(params=0.5).")
        _require(
            not isinstance(self.exclude, str),
            f"exclude is the text {self.exclude!r}.",
            f"Give a tuple of patterns: exclude=({self.exclude!r},).",
        )
        _require(self.fit in FITS, f"--fit is {self.fit!r}; use {', '.join(FITS)}.")
        _require(
            self.structure in ("channels", "elements"), f"--structure is {self.structure!r}; use channels or elements."
        )
        _require(self.steps is None or self.steps >= 1, f"--steps is {self.steps}; it must be at least 1.")
        _require(self.multiple is None or self.multiple >= 1, f"--multiple is {self.multiple}; it must be at least 1.")
        _require(0.0 < self.holdout <= 0.9, f"--holdout is {self.holdout}; it is a share in (0, 0.9].")
        _require(self.columns >= 256, f"--columns is {self.columns}; statistics need at least 256.")
        _require(self.batch >= 1, f"--batch is {self.batch}; it must be at least 1.")
        _require(
            self.calibration_batch >= 1, f"--calibration-batch is {self.calibration_batch}; it must be at least 1."
        )
        _require(self.threads >= 1, f"--threads is {self.threads}; it must be at least 1.")
        _require(self.jobs is None or self.jobs >= 1, f"--jobs is {self.jobs}; it must be at least 1.")
        _require(self.provider in PROVIDERS, f"--provider is {self.provider!r}; use {', '.join(PROVIDERS)}.")
        _require(self.seed >= 0, f"--seed is {self.seed}; it must not be negative.")
        _require(
            self.memory_bytes >= GIB // 4,
            f"--memory is {self.memory_bytes / 2**20:.0f} MiB; at least 256 MiB is needed.",
        )

    def settled(self, can_be_judged: bool, can_be_faster: bool = True) -> Config:
        """Return the settings with what was left open: the budget (None where a plan is carried out) and the multiple.

        ``can_be_judged`` says whether there is data, ``can_be_faster`` whether the method makes layers faster at all.
        """
        budget = self.budget
        if self.plan is not None and os.path.exists(self.plan):  # noqa: PTH110 - a str
            _require(
                budget is None,
                f"--plan {self.plan} exists and is carried out; {budget} would make another one.",
                "Leave the budget out, or name a new file for the plan.",
            )
        elif budget is None:
            judged = can_be_judged and can_be_faster
            budget = Budget(max_drop=DEFAULT_DROP) if judged else Budget(params=DEFAULT_PARAMS)
        multiple = self.multiple or (FAST_MULTIPLE if budget is not None and budget.is_timed else SMALL_MULTIPLE)
        return dataclasses.replace(self, budget=budget, multiple=multiple)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide what is kept of layers, as plain JSON values."""
        return {name: value for name, value in self.to_dict().items() if name not in UNDECIDING}


@dataclasses.dataclass(frozen=True)
class CudaOptions:
    """How the CUDA provider runs a model; of these, ``cuda_graph`` alone holds for TensorRT as well.

    The defaults are ONNX Runtime's.

    Parameters
    ----------
    cuda_graph : bool
        Record the kernels of one call and launch them together. Shapes must not change; every node must be on the GPU.
    tf32 : bool
        Let float32 products round their factors to 10 bits of mantissa on tensor cores (compute capability 8 and up).
    prefer_nhwc : bool
        Run convolutions with the channels last.
    cudnn_conv_algo_search : {"exhaustive", "heuristic", "default"}
        How cuDNN's algorithm is chosen: all tried, guessed, or the first.

    Raises
    ------
    ConfigError
        If the search is none of these.
    """

    cuda_graph: bool = False
    tf32: bool = True
    prefer_nhwc: bool = False
    cudnn_conv_algo_search: Search = "exhaustive"

    def __post_init__(self) -> None:
        _require(
            self.cudnn_conv_algo_search in SEARCHES,
            f"--cudnn-conv-algo-search is {self.cudnn_conv_algo_search!r}; use {', '.join(SEARCHES)}.",
        )


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """How models are compared by :func:`onnx_lrs.compare`.

    Parameters
    ----------
    batches : tuple of int
        Samples in one call; each is timed by itself. Empty: one, or what ``shapes`` or the model fix.
    providers : tuple of {"cpu", "cuda", "tensorrt"}
        Where the models run; each is timed by itself. One that does not start is an error, not a figure of another.
    threads : int
        Threads of ONNX Runtime's operators.
    seconds : float
        How long calls are timed for each batch and provider, all models together, loading and warming up apart.
    rounds : int, optional
        How often each model is timed instead; at least 20.
    shapes : mapping of str to tuple of int
        Shapes of inputs with dynamic dimensions, with the batch; needed where there is no data.
    seed : int
        Of random inputs, of the orders in which models are opened and run, and of the bootstrap.
    preprocess : Preprocess, optional
        For images, as in :class:`Config`.
    io_binding : bool, optional
        Whether inputs and outputs lie on the device while calls are timed. None: on GPUs, not on the CPU.
    cuda : CudaOptions
        How GPUs run the models.
    profile : bool
        Time every node as well, and add them up by the layers of the first model. On the CPU only: ONNX Runtime's
        profiler tells how long the host took to launch a kernel on CUDA, and TensorRT makes one node of many layers.
    report : path, optional
        Where to write a page about the comparison (HTML); needs ``pip install "onnx-lrs[report]"``.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    batches: tuple[int, ...] = ()
    providers: tuple[Provider, ...] = ("cpu",)
    threads: int = dataclasses.field(default_factory=available_threads)
    seconds: float = 10.0
    rounds: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    seed: int = 0
    preprocess: Preprocess | None = None
    io_binding: bool | None = None
    cuda: CudaOptions = dataclasses.field(default_factory=CudaOptions)
    profile: bool = False
    report: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _take_paths(self, ("report",))
        _require(bool(self.providers), "--provider is empty.", "Give one or more, with commas between.")
        for name, values in (("batch", self.batches), ("provider", self.providers)):
            _require(len(set(values)) == len(values), f"--{name} names one twice: {', '.join(map(str, values))}.")
        _require(all(batch >= 1 for batch in self.batches), f"--batch is {self.batches}; every one must be at least 1.")
        for provider in self.providers:
            _require(provider in PROVIDERS, f"--provider is {provider!r}; use {', '.join(PROVIDERS)}.")
        _require(self.threads >= 1, f"--threads is {self.threads}; it must be at least 1.")
        _require(0.0 < self.seconds < math.inf, f"--seconds is {self.seconds}; it must be a positive number.")
        _require(
            self.rounds is None or self.rounds >= LEAST_ROUNDS,
            f"--rounds is {self.rounds}; an interval needs at least {LEAST_ROUNDS}.",
        )
        _require(self.seed >= 0, f"--seed is {self.seed}; it must not be negative.")
        _require(
            not (self.cuda.cuda_graph and self.io_binding is False),
            "--cuda-graph replays a call on fixed addresses, which --no-io-binding does not give.",
            "Leave one of them out.",
        )
        self._check_devices()

    def _check_devices(self) -> None:
        """Refuse what would have no effect, or give wrong times, on the providers that are named."""
        on_gpu = [provider for provider in self.providers if provider != "cpu"]
        _require(
            not (self.profile and on_gpu),
            f"--profile does not time layers on {' and '.join(on_gpu)}: on cuda ONNX Runtime's profiler sees how long "
            "the host takes to launch a kernel, and to tensorrt many layers are one node.",
            "Leave --profile out, or use it with --provider cpu.",
        )
        changed = [f.name for f in dataclasses.fields(CudaOptions) if getattr(self.cuda, f.name) != f.default]
        for name in changed:
            able = ("cuda", "tensorrt") if name == "cuda_graph" else ("cuda",)
            flag = "--no-tf32" if name == "tf32" else f"--{name.replace('_', '-')}"
            _require(
                any(provider in able for provider in self.providers),
                f"{flag} has no effect with --provider {','.join(self.providers)}.",
                f"Leave it out, or add --provider {' or '.join(able)}.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)
