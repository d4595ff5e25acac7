"""Settings of a run: frozen dataclasses, validated when they are built. Every command line flag is one field."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from onnx_lrs.errors import ConfigError

DEFAULT_PARAMS = 0.5
Fit = Literal["cascade", "cascade-linear", "independent"]
FITS: tuple[Fit, ...] = ("cascade", "cascade-linear", "independent")
Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: tuple[Provider, ...] = ("cpu", "cuda", "tensorrt")
GIB = 1 << 30
UNDECIDING = ("work", "jobs", "provider")  # settings that change how a result is reached, never the result
MEANING = {
    "params": "the fraction of the original that may remain",
    "gain": "the relative error that a layer's output may have",
}


def available_threads() -> int:
    """Return the number of CPU cores this process may use (an affinity mask counts)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _require(ok: bool, message: str, remedy: str = "") -> None:
    if not ok:
        raise ConfigError(message, remedy)


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of the model may remain: a fraction of the ORIGINAL over all weights, not only the compressible ones.

    Parameters
    ----------
    params : float, optional
        Upper limit of parameters after / parameters before, in (0, 1].
    macs : float, optional
        Upper limit of multiply-accumulates after / before, in (0, 1].
    gain : float, optional
        For methods with a guarantee, instead of a limit: every layer becomes as small as it can while its output behind
        the activation is off by at most this relative error on the calibration columns, in (0, 1].

    Raises
    ------
    ConfigError
        Unless exactly one is given and lies in (0, 1].
    """

    params: float | None = None
    macs: float | None = None
    gain: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in self.fields().items() if value is not None}
        _require(
            len(given) == 1,
            f"A budget takes exactly one of params, macs and gain, not {len(given)}.",
            f"For example Budget(params={DEFAULT_PARAMS}).",
        )
        for name, value in given.items():
            _require(
                0.0 < value <= 1.0,
                f"--{name} is {value}; it is {MEANING.get(name, MEANING['params'])}, in (0, 1].",
                f"For example --{name} {0.1 if name == 'gain' else 0.5}.",
            )

    def fields(self) -> dict[str, float | None]:
        """Return the limits by name."""
        return {"params": self.params, "macs": self.macs, "gain": self.gain}

    @property
    def kind(self) -> Literal["params", "macs", "gain"]:
        """What the budget limits."""
        return "params" if self.params is not None else "macs" if self.macs is not None else "gain"

    @property
    def fraction(self) -> float:
        """The limit: a fraction of the original, or of a layer's output for the gain."""
        (value,) = (value for value in self.fields().values() if value is not None)
        return value


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
class Config:
    """Everything that decides the outcome of a run besides the model and the data.

    Parameters
    ----------
    budget : Budget
        What may remain of the original.
    method : str
        A name in :data:`onnx_lrs.solvers.METHODS`.
    fit : {"cascade", "cascade-linear", "independent"}
        What a layer is fitted to: what the compressed layers in front of it give, with the activation behind it seen or
        not, or what the original network gives. Without data, and with a gain, layers are always independent.
    structure : {"channels", "elements"}
        What the sparse part keeps; single elements (method ``greedy``) make a smaller file at the same speed.
    steps : int, optional
        Limit of the iterations of one solve; None: the method's own.
    multiple : int
        Ranks and kept channels are multiples of it (kernels work in blocks).
    holdout : float
        Share of the samples used only for judging, in (0, 0.9].
    columns : int
        Sampled im2col columns (positions x images) per layer that enter the statistics; wider layers use 8 * d.
    memory_bytes : int
        Limit of what the run adds to the model and ONNX Runtime's own memory.
    batch : int
        Largest number of samples in one inference call.
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
    work : path, optional
        A folder that keeps finished layers, so that the same call goes on after an interruption; it decides nothing
        else. None: nothing is kept.
    """

    budget: Budget = dataclasses.field(default_factory=lambda: Budget(params=DEFAULT_PARAMS))
    method: str = "lrs"
    fit: Fit = "cascade"
    structure: Literal["channels", "elements"] = "channels"
    steps: int | None = None
    multiple: int = 8
    holdout: float = 0.2
    columns: int = 65536
    memory_bytes: int = 2 * GIB
    batch: int = 32
    threads: int = dataclasses.field(default_factory=available_threads)
    jobs: int | None = None
    provider: Provider = "cpu"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    random_data: bool = False
    preprocess: Preprocess | None = None
    work: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.work is not None:
            object.__setattr__(self, "work", os.fspath(self.work))
            _require(self.work != "", "--work is empty.", "Name a folder, or leave --work out.")
        _require(isinstance(self.budget, Budget), f"budget is {self.budget!r}.", "Write Budget(params=0.5).")
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
        _require(self.multiple >= 1, f"--multiple is {self.multiple}; it must be at least 1.")
        _require(0.0 < self.holdout <= 0.9, f"--holdout is {self.holdout}; it is a share in (0, 0.9].")
        _require(self.columns >= 256, f"--columns is {self.columns}; statistics need at least 256.")
        _require(self.batch >= 1, f"--batch is {self.batch}; it must be at least 1.")
        _require(self.threads >= 1, f"--threads is {self.threads}; it must be at least 1.")
        _require(self.jobs is None or self.jobs >= 1, f"--jobs is {self.jobs}; it must be at least 1.")
        _require(self.provider in PROVIDERS, f"--provider is {self.provider!r}; use {', '.join(PROVIDERS)}.")
        _require(self.seed >= 0, f"--seed is {self.seed}; it must not be negative.")
        _require(
            self.memory_bytes >= GIB // 4,
            f"--memory is {self.memory_bytes / 2**20:.0f} MiB; at least 256 MiB is needed.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide the outcome, as plain JSON values."""
        return {name: value for name, value in self.to_dict().items() if name not in UNDECIDING}
