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
from onnx_lrs.native import STDERR, redirected

CPU = "CPUExecutionProvider"
ERRORS_ONLY = 3  # ONNX Runtime's log severity
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


class Session:
    """One model ready to run on the CPU provider with a fixed number of threads.

    Use as a context manager: a model beyond protobuf's limit lives in a temporary folder until it is closed.

    Raises
    ------
    ModelError
        If ONNX Runtime cannot load the model.
    """

    def __init__(self, model: onnx.ModelProto, threads: int) -> None:
        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = ERRORS_ONLY
        self._folder = contextlib.ExitStack()
        try:
            self._session = ort.InferenceSession(self._loadable(model), options, providers=[CPU])
        except Exception as error:
            self._folder.close()
            raise ModelError(f"ONNX Runtime cannot load the model: {_short(error)}") from error
        self.provider: str = self._session.get_providers()[0]
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]

    def _loadable(self, model: onnx.ModelProto) -> bytes | str:
        if model.ByteSize() < PROTOBUF_LIMIT:
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
