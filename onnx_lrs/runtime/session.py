"""Sessions of ONNX Runtime with threads set and the provider checked; the only door to onnxruntime."""

from __future__ import annotations

import contextlib
import importlib.metadata
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_lrs.errors import ModelError, RuntimeEnvironmentError
from onnx_lrs.graph.model import PROTOBUF_LIMIT, save
from onnx_lrs.graph.weights import below, common_folder, outside_bytes
from onnx_lrs.native import STDERR, redirected

CPU = "CPUExecutionProvider"
ERRORS_ONLY = 3  # ONNX Runtime's log severity
# Measured on 1.31.1: absolute locations and links out of the model's folder are refused, buffers given for files or
# initialisers are copied, and locations below this folder are mapped.
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# Threads of a session spin for a while after a run and take the cores from the next session: two VGG-16 run in turn took
# 12.9 ms a call instead of 6.7 alone, four took 33 (2 cores, 2 threads). With this they stop when the run is done.
STOP_SPINNING = "session.force_spinning_stop"
MOST_COPIED = 2**28  # bytes of weights in files that a session may hold a second time for the sake of speed
Feed = dict[str, NDArray[Any]]


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
    """One model ready to run on the CPU provider with a fixed number of threads.

    Use as a context manager: a model beyond protobuf's limit lives in a temporary folder until it is closed. Weights in
    files are mapped, not read. ONNX Runtime copies them all the same where it packs them for its kernels, changes their
    layout or folds constants; a ``mapped`` session (default: by :func:`is_mapped`) does none of that.

    Raises
    ------
    ModelError
        If ONNX Runtime cannot load the model.
    """

    def __init__(self, model: onnx.ModelProto, threads: int, mapped: bool | None = None) -> None:
        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERRORS_ONLY
        options.add_session_config_entry(STOP_SPINNING, "1")
        without: list[str] = []
        if is_mapped(model) if mapped is None else mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            without = ["ConstantFolding"]
        self._folder = contextlib.ExitStack()
        try:
            content = self._loadable(model, options)
            self._session = ort.InferenceSession(content, options, providers=[CPU], disabled_optimizers=without)
        except Exception as error:
            self._folder.close()
            raise ModelError(f"ONNX Runtime cannot load the model: {_short(error)}") from error
        self.provider: str = self._session.get_providers()[0]
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]

    def _loadable(self, model: onnx.ModelProto, options: Any) -> bytes | str:
        root = common_folder(model)
        if model.ByteSize() < PROTOBUF_LIMIT and root is not None:
            options.add_session_config_entry(EXTERNAL_FOLDER, str(root))
            return bytes(below(model, root).SerializeToString())
        if model.ByteSize() < PROTOBUF_LIMIT and not outside_bytes(model):
            return bytes(model.SerializeToString())
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
            values = self._session.run(wanted, feed)
        except Exception as error:
            shapes = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in feed.items())
            raise ModelError(
                f"ONNX Runtime cannot run the model on {shapes}: {_short(error)}",
                "Check the input shapes; --shape NAME:1,3,224,224 sets dynamic dimensions.",
            ) from error
        return {name: np.asarray(value) for name, value in zip(wanted, values, strict=True)}

    def close(self) -> None:
        """Release the session and its temporary folder."""
        del self._session
        self._folder.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of the model whose outputs are exactly these tensors (their types left to ONNX Runtime)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {v.name: v for v in model.graph.output}
    del copy.graph.output[:]
    copy.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return copy
