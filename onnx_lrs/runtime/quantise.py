"""A float model in the precision it will run in: static INT8 in QDQ format, or float16; ranges of activations.

The integers are made by onnxruntime.quantization, as users make them. Its calibrators keep all activations that one
reader hands out, so that each batch is a reader of its own here: memory is that of one batch.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import fnmatch
import io
import pathlib
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from onnx_lrs.config import Precision
from onnx_lrs.errors import ConfigError, ModelError
from onnx_lrs.graph import weights
from onnx_lrs.graph.model import PROTOBUF_LIMIT, opset
from onnx_lrs.graph.quantised import Scale
from onnx_lrs.native import STDERR, redirected
from onnx_lrs.runtime.session import Feed, runtime

PER_CHANNEL_SINCE = 13  # the opset whose DequantizeLinear has an axis
METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile", "distribution": "Distribution"}
OF_CALIBRATORS = {  # extra options of quantize_static that are its calibrator's, by the names they have there
    "CalibTensorRangeSymmetric": "symmetric",
    "CalibMovingAverage": "moving_average",
    "CalibMovingAverageConstant": "averaging_constant",
    "CalibMaxIntermediateOutputs": "max_intermediate_outputs",
    "CalibPercentile": "percentile",
}
TYPES = ("QInt8", "QUInt8", "QInt16", "QUInt16")
NO_RANGE = 4.0  # of activations that stand in: models that are only timed
SHAPES_ALONE = ("SmoothQuant", "CalibStridedMinMax", "BlockSize")  # need more than a model and ranges
Ranges = Any  # onnxruntime.quantization.TensorsData: lowest and highest value, or a histogram, by tensor


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How activations and weights become integers: arguments of ``quantize_static`` under its own names.

    ``float_nodes`` are shell patterns of the names of nodes that stay in float32; ``exclude`` names more by an output,
    ``scales`` are those of tensors that have one already, by name.
    """

    calibrate_method: str = "MinMax"
    activation_type: str = "QUInt8"
    weight_type: str = "QInt8"
    per_channel: bool = True
    reduce_range: bool = False
    op_types: tuple[str, ...] = ()
    float_nodes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exclude: frozenset[str] = frozenset()
    scales: Mapping[str, Scale] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, str]) -> Recipe:
        """Return the recipe that options as texts ask for, ``{"calibrate_method": "percentile"}``.

        Raises
        ------
        ConfigError
            If the installed ONNX Runtime does not know an option, or it has no such value.
        """
        found: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, text in options.items():
            value = _value(text)
            if name == "calibrate_method":
                found[name] = METHODS.get(str(value).lower(), "")
                _require(found[name] != "", name, text, ", ".join(METHODS))
            elif name in ("activation_type", "weight_type"):
                found[name] = str(value)
                _require(value in TYPES, name, text, ", ".join(TYPES))
            elif name in ("per_channel", "reduce_range"):
                found[name] = value
                _require(isinstance(value, bool), name, text, "True or False")
            elif name in ("op_types_to_quantize", "nodes_to_exclude"):
                found["op_types" if name.startswith("op") else "float_nodes"] = tuple(str(text).split(","))
            else:
                _check_extra(name)
                extra[name] = value
        return cls(**found, extra=extra)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _require(ok: bool, name: str, text: str, known: str) -> None:
    if not ok:
        raise ConfigError(f"--quantize-option {name}={text}: {name} is one of {known}.")


def _check_extra(name: str) -> None:
    """Refuse what the installed ONNX Runtime would pass over in silence."""
    documented = set(re.findall(r"\w+", str(_library().quantize_static.__doc__))) | OF_CALIBRATORS.keys()
    if not name[:1].isupper() or name in SHAPES_ALONE or name not in documented:
        raise ConfigError(
            f"--quantize-option {name}: ONNX Runtime {runtime().__version__} has no option of that name for static "
            "quantisation, or it does not go with this tool.",
            "Known are calibrate_method, activation_type, weight_type, per_channel, reduce_range, "
            "op_types_to_quantize, nodes_to_exclude (names or patterns, with commas between) and the extra_options of "
            "onnxruntime.quantization.quantize_static.",
        )


def _library() -> Any:
    runtime()  # says what is wrong with the installation
    with redirected(STDERR, None):
        import onnxruntime.quantization
    return onnxruntime.quantization


def ranges_of(model: onnx.ModelProto, feeds: Iterable[Feed], recipe: Recipe, threads: int) -> Ranges:
    """Return the ranges of a model's activations over some feeds, one batch after the other.

    Raises
    ------
    ModelError
        If the model does not run.
    """
    library, ort = _library(), runtime()
    calibrator_options = {OF_CALIBRATORS[k]: v for k, v in recipe.extra.items() if k in OF_CALIBRATORS}
    with tempfile.TemporaryDirectory(prefix="onnx-lrs-") as folder, contextlib.redirect_stdout(io.StringIO()):
        place = pathlib.Path(folder) / "model.onnx"
        place.write_bytes(prepared(model).SerializeToString())
        calibrator = library.create_calibrator(
            place,
            _op_types(recipe),
            augmented_model_path=str(place.with_name("augmented.onnx")),
            calibrate_method=getattr(library.CalibrationMethod, recipe.calibrate_method),
            extra_options=calibrator_options,
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        calibrator.infer_session = ort.InferenceSession(
            calibrator.augmented_model_path, options, providers=["CPUExecutionProvider"]
        )
        for feed in feeds:
            calibrator.collect_data(_Once(feed))
        return calibrator.compute_data()


class _Once:
    """A CalibrationDataReader of one feed."""

    def __init__(self, feed: Feed) -> None:
        self._feeds = iter([feed])

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)

    def __iter__(self) -> Iterator[Feed]:
        return self._feeds


def stand_in_ranges(model: onnx.ModelProto) -> Ranges:
    """Return one and the same range for every tensor: enough for a model that is only timed."""
    library = _library()
    limit = np.array(NO_RANGE, np.float32)
    names = [value.name for value in model.graph.input] + [name for node in model.graph.node for name in node.output]
    data = {name: library.TensorData(lowest=-limit, highest=limit) for name in names}
    return library.TensorsData(library.CalibrationMethod.MinMax, data)


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that the quantiser can work on: weights in memory, types of tensors known, nodes named.

    An opset below 13 is raised to it: before, a DequantizeLinear has one scale for a whole weight.

    Raises
    ------
    ModelError
        If the model is too large for one message, or its operators cannot be brought to that opset.
    """
    whole = weights.loaded(model)
    if whole.ByteSize() >= PROTOBUF_LIMIT:
        raise ModelError(
            f"--quantize: the model holds {whole.ByteSize() / 2**30:.1f} GiB of weights, more than 1.9 GiB.",
            "Leave --quantize out, and quantise the compressed model with your own tools.",
        )
    if opset(whole) < PER_CHANNEL_SINCE:
        try:
            whole = onnx.version_converter.convert_version(whole, PER_CHANNEL_SINCE)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"--quantize: the model's opset is {opset(whole)}, INT8 per channel needs {PER_CHANNEL_SINCE}, and "
                f"onnx cannot convert it: {' '.join(str(error).split())[:200]}",
                f"Export the model with opset {PER_CHANNEL_SINCE} or above.",
            ) from None
    found = onnx.shape_inference.infer_shapes(whole)
    taken = {node.name for node in found.graph.node}
    for node in found.graph.node:
        if not node.name:
            node.name = next(n for n in (node.output[0], f"{node.output[0]}_node") if n not in taken)
    return found


def to_int8(model: onnx.ModelProto, ranges: Ranges, recipe: Recipe) -> onnx.ModelProto:
    """Return a float model in static INT8 (QDQ format); inputs and outputs stay float32, names of tensors as they are.

    Raises
    ------
    ModelError
        If onnxruntime.quantization cannot do it.
    """
    library = _library()
    source = prepared(model)
    excluded = [
        node.name
        for node in source.graph.node
        if recipe.exclude & set(node.output) or any(fnmatch.fnmatchcase(node.name, p) for p in recipe.float_nodes)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            quantizer = library.QDQQuantizer(
                source,
                recipe.per_channel,
                recipe.reduce_range,
                getattr(library.QuantType, recipe.weight_type),
                getattr(library.QuantType, recipe.activation_type),
                ranges,
                [],
                excluded,
                _op_types(recipe),
                dict(recipe.extra) | _known_scales(source, recipe, library.QuantType),
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ModelError(
                f"--quantize int8: onnxruntime.quantization refuses the model: {' '.join(str(error).split())[:300]}",
                "Name its nodes in --exclude, change --quantize-option, or leave --quantize out.",
            ) from None
    found: onnx.ModelProto = quantizer.model.model
    found.producer_name, found.producer_version = model.producer_name, model.producer_version
    return found


def _known_scales(model: onnx.ModelProto, recipe: Recipe, types: Any) -> dict[str, Any]:
    """Return the option that gives tensors of a model the scales that they had."""
    names = {value.name for value in model.graph.input} | {name for node in model.graph.node for name in node.output}
    known = {name: scale for name, scale in recipe.scales.items() if name in names}
    if not known:
        return {}
    given = {
        name: [
            {
                "quant_type": types.from_string(f"Q{'U' if dtype.startswith('u') else ''}Int{dtype.lstrip('uint')}"),
                "scale": np.array(scale.scale, np.float32),
                "zero_point": np.array(scale.zero_point, dtype),
            }
        ]
        for name, scale in known.items()
        for dtype in [str(onnx.helper.tensor_dtype_to_np_dtype(scale.dtype))]
    }
    return {"TensorQuantOverrides": given | dict(recipe.extra.get("TensorQuantOverrides", {}))}


def _op_types(recipe: Recipe) -> list[str]:
    """Return the operators to be quantised; without a choice all that ONNX Runtime has integers for, as by default."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return list(recipe.op_types) or sorted({*QLinearOpsRegistry, *QDQRegistry})


def to_fp16(model: onnx.ModelProto, exclude: Collection[str] = ()) -> onnx.ModelProto:
    """Return a float model in float16; inputs and outputs stay float32.

    By onnxruntime.transformers.float16, the copy of onnxconverter-common's that ONNX Runtime keeps.
    """
    runtime()
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source = prepared(model)
    blocked = [node.name for node in source.graph.node if set(exclude) & set(node.output)]
    made = ONNXModel(convert_float_to_float16(source, keep_io_types=True, node_block_list=blocked))
    made.topological_sort()
    found: onnx.ModelProto = made.model
    return found


def stand_in(model: onnx.ModelProto, precision: Precision, recipe: Recipe) -> onnx.ModelProto:
    """Return a model of random weights in the precision it will run in, to be timed."""
    if precision == "int8":
        return to_int8(model, stand_in_ranges(model), recipe)
    return to_fp16(model, recipe.exclude) if precision == "fp16" else model
