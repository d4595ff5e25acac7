"""Sessions of ONNX Runtime with threads set and the provider checked; the only door to onnxruntime."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.config import CudaOptions, Provider
from onnx_lrs.errors import ModelError, RuntimeEnvironmentError
from onnx_lrs.graph.model import save, serialised
from onnx_lrs.graph.weights import below, common_folder, outside_bytes
from onnx_lrs.native import STDERR, overheard, redirected

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS: dict[Provider, tuple[str, ...]] = {"cpu": (CPU,), "cuda": (CUDA, CPU), "tensorrt": (TENSORRT, CUDA, CPU)}
LIBRARIES = {
    "cuda": "pip install 'onnxruntime-gpu[cuda,cudnn]' brings its libraries (CUDA 13, cuDNN 9)",
    "tensorrt": "pip install 'onnxruntime-gpu[cuda,cudnn]' brings CUDA 13 and cuDNN 9; TensorRT's libraries have to be "
    "in LD_LIBRARY_PATH",
}
ERRORS_ONLY = 3  # ONNX Runtime's log severity
# Measured on 1.31.1: absolute locations and links out of the model's folder are refused, buffers given for files or
# initialisers are copied, and locations below this folder are mapped.
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# Threads of a session spin for a while after a run and take the cores from the next session: two VGG-16 run in turn
# took 12.9 ms a call instead of 6.7 alone, four took 33 (2 cores, 2 threads). With this they stop when the run is done.
STOP_SPINNING = "session.force_spinning_stop"
WRITTEN_WEIGHTS = "session.optimized_model_external_initializers_file_name"
WRITTEN_OUTSIDE = "session.optimized_model_external_initializers_min_size_in_bytes"
DEVICES = {CUDA: "cuda", TENSORRT: "cuda"}  # where inputs and outputs are bound
KEEP_ASSIGNMENT = "session.record_ep_graph_assignment_info"
MOST_COPIED = 2**28  # bytes of weights in files that a session may hold a second time for the sake of speed
Feed = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """How sessions use a GPU: the provider's options, and the folder in which TensorRT keeps the engines it builds.

    None: it keeps none and builds them again for every session, which takes minutes. An engine holds weights but is
    known by names and shapes only, so every model needs a folder of its own.
    """

    cuda: CudaOptions = dataclasses.field(default_factory=CudaOptions)
    engines: str | None = None


def runtime() -> Any:
    """Return the onnxruntime module.

    Raises
    ------
    RuntimeEnvironmentError
        If it is missing, cannot be loaded, or is installed twice (both wheels unpack into one folder).
    """
    installed = installed_wheels()
    if len(installed) > 1:
        raise RuntimeEnvironmentError(
            f"{' and '.join(installed)} are installed together; they overwrite each other's files.",
            f"pip uninstall -y {' '.join(installed)} && pip install {installed[-1]}",
        )
    try:
        with redirected(STDERR, None):  # it looks for devices and complains; a machine without a GPU is no news
            import onnxruntime
    except ImportError as error:
        raise RuntimeEnvironmentError(
            f"onnxruntime cannot be imported: {error}.", "pip install onnxruntime-gpu (or onnxruntime)"
        ) from None
    return onnxruntime


def installed_wheels() -> list[str]:
    """Return which distributions provide the onnxruntime package, in alphabetic order."""
    known = ("onnxruntime", "onnxruntime-gpu")
    return [name for name in known if any(True for _ in importlib.metadata.distributions(name=name))]


def is_mapped(model: onnx.ModelProto) -> bool:
    """Return whether a session runs the model from weights that are mapped from their files and copied nowhere."""
    return outside_bytes(model) > MOST_COPIED


class Session:
    """One model ready to run with a fixed number of threads, on the CPU provider unless another one is named.

    The model is one in memory, or a file, which ONNX Runtime then reads itself as a program in production would. Use as
    a context manager: a model beyond protobuf's limit lives in a temporary folder until it is closed. Weights in files
    are mapped, not read. ONNX Runtime copies them all the same where it packs them for its kernels, changes their
    layout or folds constants; a ``mapped`` session (default: by :func:`is_mapped`) does none of that. With ``written``
    ONNX Runtime leaves its optimised graph in that file, and the weights beside it; with ``profile`` it times every
    node and leaves that in a file whose name begins so when :meth:`end_profile` is called. ``gpu`` says how a GPU is
    used where the provider is one.

    Raises
    ------
    ModelError
        If ONNX Runtime cannot load the model. Whether a GPU's provider starts at all is for :func:`check_provider`.
    RuntimeEnvironmentError
        If another provider would run than the one that was named.
    """

    def __init__(
        self,
        model: onnx.ModelProto | pathlib.Path,
        threads: int,
        mapped: bool | None = None,
        provider: Provider = "cpu",
        written: pathlib.Path | None = None,
        gpu: Gpu | None = None,
        profile: pathlib.Path | None = None,
    ) -> None:
        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERRORS_ONLY
        options.add_session_config_entry(STOP_SPINNING, "1")
        gpu = gpu or Gpu()
        more: dict[str, Any] = {"providers": provider_options(provider, gpu), "disabled_optimizers": []}
        if mapped or (mapped is None and isinstance(model, onnx.ModelProto) and is_mapped(model)):
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            more["disabled_optimizers"] = ["ConstantFolding"]
        if written is not None:
            _write_to(written, options)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self._folder = contextlib.ExitStack()
        said = io.StringIO()
        try:
            content = self._loadable(model, options)
            if provider == "cpu":
                self._session = ort.InferenceSession(content, options, **more)
            else:
                with overheard() as said:  # a fall-back is said on the terminal only
                    if hasattr(ort, "preload_dlls"):  # since 1.21: CUDA's libraries that pip installed
                        ort.preload_dlls()
                    self._session = ort.InferenceSession(content, options, **more, enable_fallback=0)
        except Exception as error:
            self._folder.close()
            failure = not_loaded(provider, gpu.cuda, f"{error} {said.getvalue()}")
            failure.add_note(f"{said.getvalue()}\n{error}")  # line by line, for check_provider
            raise failure from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != PROVIDERS[provider][0]:
            self.close()
            raise _not_started(provider, self.provider, said.getvalue())
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]
        self._uncaptured = None  # a plain run copies its inputs: nothing that a CUDA graph could replay
        if provider != "cpu":
            self._uncaptured = ort.RunOptions()
            self._uncaptured.add_run_config_entry("gpu_graph_id", "-1")

    def _loadable(self, model: onnx.ModelProto | pathlib.Path, options: Any) -> bytes | str:
        if isinstance(model, pathlib.Path):
            return str(model)
        root = common_folder(model)
        if root is not None or not outside_bytes(model):
            content = serialised(model if root is None else below(model, root))
            if content is not None:
                if root is not None:
                    options.add_session_config_entry(EXTERNAL_FOLDER, str(root))
                return content
        folder = pathlib.Path(self._folder.enter_context(tempfile.TemporaryDirectory(prefix="onnx-lrs-")))
        save(model, folder / "model.onnx", external=True)
        return str(folder / "model.onnx")

    def run(self, feed: Feed, names: Sequence[str] | None = None) -> Feed:
        """Return the outputs (all, or the named ones) by name.

        Raises
        ------
        ModelError
            If ONNX Runtime fails to run the model on this feed.
        """
        wanted = list(names) if names is not None else self.outputs
        if not wanted:  # which ONNX Runtime would take for all
            return {}
        try:
            values = self._session.run(wanted, feed, self._uncaptured)
        except Exception as error:
            shapes = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in feed.items())
            raise ModelError(
                f"ONNX Runtime cannot run the model on {shapes}: {_short(error)}",
                "Check the input shapes; --shape NAME:1,3,224,224 sets dynamic dimensions.",
            ) from error
        return {name: np.asarray(value) for name, value in zip(wanted, values, strict=True)}

    def elsewhere(self) -> tuple[str, ...] | None:
        """Return the names of the nodes that the provider left to another one.

        None where ONNX Runtime does not tell: it does from some version behind 1.20 on, for sessions with ``written``.
        """
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return None
        parts = self._session.get_provider_graph_assignment_info()
        return tuple(
            node.name or node.op_type for part in parts if part.ep_name != self.provider for node in part.get_nodes()
        )

    def bound(self, feed: Feed) -> Bound:
        """Return the call on one feed with inputs and outputs that lie where the provider computes.

        Raises
        ------
        ModelError
            If ONNX Runtime fails to run the model on this feed.
        """
        return Bound(self._session, feed, self.run(feed), DEVICES.get(self.provider, "cpu"))

    def end_profile(self) -> pathlib.Path:
        """Return the file in which the times of the nodes are, for a session with ``profile``."""
        return pathlib.Path(self._session.end_profiling())

    def close(self) -> None:
        """Release the session and its temporary folder."""
        del self._session
        self._folder.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class Bound:
    """One call, its inputs and outputs bound to memory of a device: what a run takes there, without copies to and fro.

    ``outputs`` are values of the right types and shapes; ``device`` is ONNX Runtime's name of the device's kind. It
    keeps the session and its memory alive for as long as it lives itself.

    Raises
    ------
    ModelError
        If a value cannot lie there, as texts cannot on a GPU.
    """

    def __init__(self, session: Any, feed: Feed, outputs: Feed, device: str) -> None:
        ort = runtime()
        self._session, self._binding = session, session.io_binding()

        def there(values: Feed) -> dict[str, Any]:
            return {name: ort.OrtValue.ortvalue_from_numpy(value, device, 0) for name, value in values.items()}

        try:
            self._inputs = there(feed)
            self._outputs = there({name: np.zeros_like(value) for name, value in outputs.items()})
            for name, value in self._inputs.items():
                self._binding.bind_ortvalue_input(name, value)
            for name, value in self._outputs.items():
                self._binding.bind_ortvalue_output(name, value)
        except Exception as error:
            raise _unbound(error) from error

    def run(self) -> None:
        """Run the model and wait for its outputs.

        Raises
        ------
        ModelError
            If ONNX Runtime fails.
        """
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:
            raise _unbound(error) from error

    def values(self) -> Feed:
        """Return the outputs of the last run by name."""
        return {name: value.numpy() for name, value in self._outputs.items()}


def _unbound(error: Exception) -> ModelError:
    return ModelError(
        f"ONNX Runtime cannot run the model with bound inputs and outputs: {_short(error)}",
        "Try --no-io-binding, and without --cuda-graph.",
    )


def check_provider(provider: Provider) -> None:
    """Start a provider on a model of one node, so that a long run does not fail at its end.

    What fails to load behind this check fails for the model's sake, not the provider's.

    Raises
    ------
    RuntimeEnvironmentError
        If it does not start.
    """
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 13)]
    try:
        Session(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=7), 1, False, provider).close()
    except ModelError as error:
        raise _not_started(provider, None, "\n".join(error.__notes__)) from error


def provider_options(provider: Provider, gpu: Gpu) -> list[Any]:
    """Return ONNX Runtime's names of a provider and those behind it, with their options."""
    cuda, on_tensorrt = gpu.cuda, provider == "tensorrt"
    engines = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": gpu.engines} if gpu.engines else {}
    options = {
        CUDA: {
            "use_tf32": str(int(cuda.tf32)),
            "prefer_nhwc": str(int(cuda.prefer_nhwc)),
            "cudnn_conv_algo_search": cuda.cudnn_conv_algo_search.upper(),
            "enable_cuda_graph": str(int(cuda.cuda_graph and not on_tensorrt)),
        },
        TENSORRT: {"trt_cuda_graph_enable": str(cuda.cuda_graph), **engines},
    }
    return [(name, options[name]) if name in options else name for name in PROVIDERS[provider]]


def _write_to(place: pathlib.Path, options: Any) -> None:
    options.optimized_model_filepath = str(place)
    options.add_session_config_entry(WRITTEN_WEIGHTS, f"{place.name}.weights")
    options.add_session_config_entry(WRITTEN_OUTSIDE, "1024")
    options.add_session_config_entry(KEEP_ASSIGNMENT, "1")


def not_loaded(provider: Provider, cuda: CudaOptions, said: str) -> ModelError:
    """Return the error of a model that ONNX Runtime cannot load, with what it ``said``."""
    if provider == "cpu":
        return ModelError(f"ONNX Runtime cannot load the model: {_short(said)}")
    remedy = "See whether it loads with --provider cpu."
    if cuda.cuda_graph:
        remedy = f"Leave --cuda-graph out, for which every node has to run on the GPU. {remedy}"
    return ModelError(f"ONNX Runtime cannot load the model on {PROVIDERS[provider][0]}: {_short(said)}", remedy)


def _not_started(provider: Provider, instead: str | None, said: str) -> RuntimeEnvironmentError:
    """Return the error of a provider that did not start, with what ONNX Runtime ``said`` of the reason."""
    asked, available = PROVIDERS[provider][0], runtime().get_available_providers()
    outcome = "did not start" if instead is None else f"did not start, {instead} would run instead"
    remedy = f"{LIBRARIES[provider]}; a driver for the device has to be there as well."
    reason = _reason(said)
    if asked not in available:
        reason = f"this build of ONNX Runtime has {', '.join(available)} only"
        remedy = "For NVIDIA devices: pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'."
    message = f"--provider {provider}: {asked} {outcome}: {reason}."
    return RuntimeEnvironmentError(message, f"{remedy} Or: --provider cpu")


def _reason(said: str) -> str:
    """Return the missing library in ONNX Runtime's words, or the last thing it said."""
    plain = _without_colours(said)
    missing = re.search(r"with error: (.+)", plain)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return (missing[1].strip() if missing else lines[-1] if lines else "no reason was given").rstrip(".")[:500]


def _without_colours(said: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", said)


def _short(said: object) -> str:
    return " ".join(_without_colours(str(said)).split())[:500]


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of the model whose outputs are exactly these tensors (their types left to ONNX Runtime)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {v.name: v for v in model.graph.output}
    del copy.graph.output[:]
    copy.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return copy
