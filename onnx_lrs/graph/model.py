"""Load and save a ModelProto, and look at it through onnx-graphsurgeon.

What onnx-graphsurgeon loses on export (metadata_props, doc strings, attributes it does not know, the order of
value_info; measured on 0.6.1) cannot be lost here, because we never export a whole graph with it: it reads the graph
and builds new nodes, and those nodes are spliced into a copy of the user's ModelProto. Everything that is not replaced
stays as it was, byte for byte.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_lrs.data import TensorSpec
from onnx_lrs.errors import ModelError, OutputError
from onnx_lrs.graph import weights

OLDEST_OPSET = 7
INITIALISERS_NO_INPUTS = 4  # the IR version since which an initialiser need not be listed as a graph input
# The IR version that brought sparse initialisers into the format. Measured: onnx.checker 1.23.2 and ONNX Runtime 1.31.1
# take them from IR 4 on and in every opset (operators see a dense tensor), but the format's own word is what counts.
SPARSE_SINCE = 6
PROTOBUF_LIMIT = 2_000_000_000  # bytes; a protobuf message ends at 2^31 - 1, the rest is room for the graph
COMPUTED_OPS = ("MatMul", "Add", "Reshape", "Identity", "Transpose")  # what a weight of low rank + elements is made of
CONSTANT_FORMS = ("value", "value_float", "value_floats", "value_int", "value_ints")
ModelSource = str | os.PathLike[str] | onnx.ModelProto


def load(source: ModelSource) -> onnx.ModelProto:
    """Return the model; a ModelProto is copied, so the caller's stays untouched.

    Large weights that lie in external files stay there, and the model refers to them (graph/weights.py); nothing else
    of it depends on where it came from.

    Raises
    ------
    ModelError
        Missing or unreadable file, not an ONNX model, truncated, an opset below 7, or external data that is missing,
        cut short, or outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        _refuse_external(model)
    else:
        path = pathlib.Path(source)
        model = _read(path)
        _find_external_data(model, path.parent)
    _check_usable(model)
    return model


def digest(source: ModelSource) -> str:
    """Return a hash of a model with its weights: of the bytes of its files, or of its fields in memory.

    Raises
    ------
    ModelError
        If a file cannot be read.
    """
    found = hashlib.sha256()
    if isinstance(source, onnx.ModelProto):
        for piece in _pieces(source):
            found.update(len(piece).to_bytes(8, "little") + piece)
        return found.hexdigest()
    path = pathlib.Path(source)
    for place in (path, *(path.parent / name for name in sorted(external_places(path)))):
        try:
            with place.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(f"{place} cannot be read: {error.strerror or error}.", "Check the path.") from None
    return found.hexdigest()


def _pieces(message: Any) -> Iterator[bytes]:
    """Yield the fields of a model and of its graph one by one: as a whole it may be too large for protobuf."""
    for field, value in message.ListFields():
        yield field.name.encode()
        if field.name == "graph":
            yield from _pieces(value)
        elif hasattr(value, "SerializeToString"):
            yield value.SerializeToString(deterministic=True)
        elif isinstance(value, int | float | str | bytes):
            yield repr(value).encode()
        else:
            yield from (each.SerializeToString(deterministic=True) for each in value)


def _refuse_external(model: onnx.ModelProto) -> None:
    for tensor in all_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ModelError(
                f"The ModelProto's tensor {tensor.name!r} lies in an external file, and a ModelProto has no folder.",
                "Pass the path of the .onnx file, or onnx.load it with its external data.",
            )


def _read(path: pathlib.Path) -> onnx.ModelProto:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"The model {path} does not exist.", "Check the path.") from None
    except OSError as error:
        raise ModelError(f"The model {path} cannot be read: {error.strerror}.", "It must be a readable file.") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise ModelError(
            f"{path} ({len(content)} bytes) is not an ONNX model, or it is truncated.",
            "Export or copy it again; its size should match the source.",
        ) from None
    return model


def _check_usable(model: onnx.ModelProto) -> None:
    if not model.graph.node or not model.opset_import:
        raise ModelError("The file holds no ONNX graph.", "Export the model again with torch.onnx, tf2onnx or alike.")
    version = opset(model)
    if version < OLDEST_OPSET:
        raise ModelError(
            f"The model uses opset {version}; {OLDEST_OPSET} is the oldest supported.",
            "Convert it first: onnx.version_converter.convert_version(model, 17).",
        )


def _find_external_data(model: onnx.ModelProto, folder: pathlib.Path) -> None:
    """Make references to large tensors absolute, and load all others."""
    try:
        _check_external_data(model, folder)
        for tensor in weights.references(model):
            if weights.may_stay_outside(tensor):
                _check_as_onnx_does(tensor, folder)
                weights.anchor(tensor, folder.resolve())
        for tensor in all_tensors(model):
            if weights.is_outside(tensor) and not pathlib.PurePath(ExternalDataInfo(tensor).location).is_absolute():
                load_external_data_for_tensor(tensor, str(folder))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:  # onnx also refuses links and odd offsets
        raise ModelError(
            f"The model's external data cannot be read: {error}",
            "Save the model again with its data file beside it (onnx.save with save_as_external_data=True).",
        ) from None


def _check_as_onnx_does(tensor: TensorProto, folder: pathlib.Path) -> None:
    """Have onnx open a data file, which refuses links, without reading anything."""
    location = ExternalDataInfo(tensor).location
    trial = TensorProto(name=tensor.name)
    weights.refer(trial, location, 0, 0)
    load_external_data_for_tensor(trial, str(folder))


def _check_external_data(model: onnx.ModelProto, folder: pathlib.Path) -> None:
    root = folder.resolve()
    for tensor in all_tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        info = ExternalDataInfo(tensor)
        location = pathlib.PurePath(info.location)
        target = (root / location).resolve()
        if location.is_absolute() or ".." in location.parts or not target.is_relative_to(root):
            raise ModelError(
                f"Tensor {tensor.name!r} keeps its data in {info.location!r}, outside the model's folder: refused.",
                "Save the model again with its data file beside it (onnx.save with save_as_external_data=True).",
            )
        if not target.is_file():
            raise ModelError(
                f"Tensor {tensor.name!r} keeps its data in {info.location!r}, which is missing from {folder}.",
                "Put the data file beside the model.",
            )
        needed = (info.offset or 0) + (info.length or weights.least_bytes(tensor))
        if target.stat().st_size < needed:
            raise ModelError(
                f"{info.location!r} has {target.stat().st_size} bytes; tensor {tensor.name!r} ends at {needed}.",
                "The data file is truncated; copy it again.",
            )


def all_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield every dense TensorProto: initialisers and attributes of the graph, its subgraphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graph_tensors(graph)


def opset(model: onnx.ModelProto) -> int:
    """Return the version of the default operator set."""
    return max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=OLDEST_OPSET)


def file_bytes(path: pathlib.Path) -> int:
    """Return the size of a model file with its external data, in bytes."""
    return path.stat().st_size + sum((path.parent / place).stat().st_size for place in external_places(path))


def source_bytes(source: ModelSource) -> int:
    """Return the size of a model in bytes: of its files, or as it is in memory."""
    return source.ByteSize() if isinstance(source, onnx.ModelProto) else file_bytes(pathlib.Path(source))


def stored_bytes(model: onnx.ModelProto) -> int:
    """Return the bytes of a model with those of its weights that lie in files."""
    return int(model.ByteSize()) + weights.outside_bytes(model)


def serialised(model: onnx.ModelProto) -> bytes | None:
    """Return a model as bytes, None if it is beyond protobuf's limit; asking for its size first would take as long."""
    try:
        content = bytes(model.SerializeToString())
    except EncodeError:
        return None
    return content if len(content) < PROTOBUF_LIMIT else None


def external_places(path: pathlib.Path) -> set[str]:
    """Return the names of the files in which a model keeps external data; empty if it keeps everything itself."""
    model = bare(path)
    return {ExternalDataInfo(t).location for t in all_tensors(model) if t.data_location == TensorProto.EXTERNAL}


def weight_files(source: ModelSource) -> set[pathlib.Path]:
    """Return the files beside the model in which it keeps weights; empty for a model in memory."""
    if isinstance(source, onnx.ModelProto):
        return set()
    path = pathlib.Path(source)
    return {path.parent / place for place in external_places(path)}


def same_file(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Return whether two names are those of one file that exists."""
    return one.exists() and other.exists() and one.samefile(other)


def bare(path: pathlib.Path) -> onnx.ModelProto:
    """Return a model as its file has it: external data stays outside, located relative to the file's folder."""
    return onnx.load(str(path), load_external_data=False)


def external_name(path: pathlib.Path) -> str:
    """Return the name of the external data file that belongs to a model file."""
    return path.name + ".data"


def save(model: onnx.ModelProto, path: pathlib.Path, external: bool) -> None:
    """Write the model atomically: into a temporary folder beside the target, then moved into place.

    ``external`` (or weights that lie outside, or a size beyond protobuf's 2 GB) puts weights into ``<name>.data``
    beside the file. Weights that lie in other files are copied from there in chunks.

    Raises
    ------
    OutputError
        If the folder is missing or a write fails (disk full, no permission); files that were there stay whole.
    """
    external = external or any(True for _ in weights.references(model)) or model.ByteSize() > PROTOBUF_LIMIT
    path = path.resolve()  # write through a link, not over it
    if path.is_dir():
        raise OutputError(f"The output {path} is a folder.", "Give a file name, for example small.onnx.")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            _write(model, pathlib.Path(folder) / path.name, external)
            for name in (external_name(path), path.name):  # the model last: it must not point to data not yet there
                written = pathlib.Path(folder) / name
                if written.exists():
                    written.replace(path.parent / name)
    except FileNotFoundError:
        raise OutputError(f"The folder {path.parent} does not exist.", "Create it first.") from None
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}.", "Free space or choose another folder."
        ) from None


def _write(model: onnx.ModelProto, path: pathlib.Path, external: bool) -> None:
    if external:
        with path.with_name(external_name(path)).open("wb") as data:
            model = weights.written(model, data, external_name(path))
    path.write_bytes(model.SerializeToString(deterministic=True))
    for written in path.parent.iterdir():
        with written.open("rb") as handle:
            os.fsync(handle.fileno())


def signature(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs a caller feeds (initialisers listed as inputs left out) and the outputs.

    Raises
    ------
    ModelError
        If an input is no tensor (a sequence, map or optional).
    """
    constants = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    inputs = tuple(_spec(v) for v in model.graph.input if v.name not in constants)
    return inputs, tuple(_spec(v) for v in model.graph.output)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"{value.name!r} is not a tensor; models with sequences or maps are not supported.")
    tensor = value.type.tensor_type
    if tensor.elem_type == TensorProto.UNDEFINED:
        raise ModelError(f"{value.name!r} has no element type.", "Export the model again, or run onnx.shape_inference.")
    dims = tuple(d.dim_value if d.dim_value > 0 else d.dim_param or None for d in tensor.shape.dim)
    return TensorSpec(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), dims)


@contextlib.contextmanager
def _quiet_graphsurgeon() -> Iterator[None]:
    """Its logger prints to stdout, where --json has to stay alone."""
    before = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.severity = before


@dataclasses.dataclass(frozen=True)
class Extent:
    """Shape of a tensor that is known before a run, and how many parameters are stored for it."""

    shape: tuple[int, ...]
    params: int


class View:
    """A read-only look at a model's graph through onnx-graphsurgeon: constants, producers, readers.

    Keyed by tensor name, since onnx-graphsurgeon's nodes and tensors cannot be hashed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        with _quiet_graphsurgeon():
            self.graph = gs.import_onnx(model)
        self.opset = opset(model)
        self.initialisers = {t.name for t in model.graph.initializer}
        self.inputs = {v.name for v in model.graph.input}
        if (
            model.ir_version < INITIALISERS_NO_INPUTS
        ):  # listed because they had to be; ONNX Runtime lets nobody feed them
            self.inputs -= self.initialisers
        self.outputs = {v.name for v in model.graph.output}
        self.tensors: dict[str, gs.Tensor] = dict(self.graph.tensors())
        self.nodes: list[gs.Node] = list(self.graph.nodes)
        self.captured = _captured_by_subgraphs(self.graph)
        self._stored = _stored_constants(model)
        self._sparse = {
            t.values.name: Extent(tuple(t.dims), math.prod(t.values.dims)) for t in model.graph.sparse_initializer
        }
        self._computed: dict[str, Extent] = {}
        self._find_computed()
        self._reads = collections.Counter(t.name for node in self.nodes for t in node.inputs)

    def readers(self, name: str) -> list[gs.Node]:
        """Return the nodes that read a tensor, once for each operand; those of subgraphs included."""
        return list(self.tensors[name].outputs) if name in self.tensors else []

    def reads(self, name: str) -> int:
        """Return how many node inputs of the main graph are this tensor."""
        return self._reads[name]

    def sole_reader(self, name: str) -> gs.Node | None:
        """Return the only reader of a tensor that is read nowhere else: no graph output, subgraph or second node."""
        readers = self.readers(name)
        if not readers or name in self.outputs or name in self.captured:
            return None
        return readers[0] if all(node is readers[0] for node in readers) else None

    def is_sparse(self, name: str) -> bool:
        """Return whether a tensor is a sparse initialiser."""
        return name in self._sparse

    def is_computed(self, name: str) -> bool:
        """Return whether a tensor is computed from stored ones alone, which a runtime does once, at load.

        Known are the operators of a weight that is a product of two factors plus single elements.
        """
        return name in self._computed

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor is a constant; see :meth:`constant`."""
        if name in self.inputs:
            return False
        node = self._static_producer(name)
        return name in self._stored or (node is not None and self.is_constant(node.inputs[0].name))

    def constant(self, name: str) -> NDArray[Any]:
        """Return the value of a constant tensor, loaded afresh (onnx-graphsurgeon would keep a second copy of it).

        Initialisers, Constant nodes, and Identity or Transpose of a constant count; an initialiser that is also a graph
        input does not, because the caller may override it.

        Raises
        ------
        KeyError
            If the tensor is not constant.
        """
        if name in self._stored:
            return _loaded(self._stored[name])
        node = self._static_producer(name)
        if node is None:
            raise KeyError(name)
        value = self.constant(node.inputs[0].name)
        return value if node.op == "Identity" else np.transpose(value, node.attrs.get("perm"))

    def stored_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor stored in the model or computed from such alone; None if it depends on inputs.

        Stored are constants, sparse initialisers and defaults of inputs.
        """
        extent = self._extent(name)
        return None if extent is None else extent.shape

    def stored_params(self, name: str) -> int:
        """Return how many values are stored for a tensor of :meth:`stored_shape`, in all its factors; 0 for others."""
        extent = self._extent(name)
        return 0 if extent is None else extent.params

    def _extent(self, name: str) -> Extent | None:
        known = self._sparse.get(name) or self._computed.get(name)
        if known is not None:
            return known
        if name in self._stored:
            shape = _shape_of(self._stored[name])
            return Extent(shape, math.prod(shape))
        node = self._static_producer(name)
        extent = self._extent(node.inputs[0].name) if node is not None else None
        if node is None or extent is None or node.op == "Identity":
            return extent
        order = node.attrs.get("perm") or reversed(range(len(extent.shape)))
        return Extent(tuple(extent.shape[axis] for axis in order), extent.params)

    def _find_computed(self) -> None:
        """Go through the nodes in their order, which is that of the data, and note what needs no input."""
        for node in self.nodes:
            if node.op not in COMPUTED_OPS or not is_standard(node.domain) or not node.inputs or not node.outputs:
                continue
            operands = [None if t.name in self.inputs else self._extent(t.name) for t in node.inputs]
            known = [extent for extent in operands if extent is not None]
            result = self._combined(node, known) if len(known) == len(operands) else None
            if result is not None:
                self._computed[node.outputs[0].name] = result

    def _combined(self, node: gs.Node, operands: list[Extent]) -> Extent | None:
        """Return what a node makes of its operands; None if that is a constant anyway or left to be measured."""
        if node.op in ("Identity", "Transpose"):
            return self._extent(node.outputs[0].name) if self.is_computed(node.inputs[0].name) else None
        if len(operands) != 2:
            return None
        first, second = operands
        if node.op == "MatMul" and len(first.shape) == len(second.shape) == 2:
            return Extent((first.shape[0], second.shape[1]), first.params + second.params)
        if node.op == "Add" and first.shape == second.shape:
            return Extent(first.shape, first.params + second.params)
        if node.op == "Reshape" and self.is_constant(node.inputs[1].name):
            target = tuple(int(size) for size in self.constant(node.inputs[1].name))
            return Extent(target, first.params) if all(size > 0 for size in target) else None
        return None

    def _static_producer(self, name: str) -> gs.Node | None:
        """Return the Identity or Transpose node that makes a tensor, if one does."""
        tensor = self.tensors.get(name)
        node = tensor.inputs[0] if tensor is not None and tensor.inputs else None
        standard = node is not None and node.op in ("Identity", "Transpose") and is_standard(node.domain)
        return node if standard else None

    def chain(self, name: str) -> set[str]:
        """Return the tensor names from a constant back to its initialiser (Identity, Transpose, Constant nodes)."""
        names = {name}
        tensor = self.tensors[name]
        while not isinstance(tensor, gs.Constant) and tensor.inputs and tensor.inputs[0].inputs:
            tensor = tensor.inputs[0].inputs[0]
            names.add(tensor.name)
        return names


def is_standard(domain: str | None) -> bool:
    """Return whether a node's domain is ONNX's own."""
    return domain in (None, "", "ai.onnx")


def _stored_constants(model: onnx.ModelProto) -> dict[str, TensorProto | onnx.AttributeProto]:
    """Return initialisers and the values of Constant nodes by tensor name."""
    stored: dict[str, TensorProto | onnx.AttributeProto] = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and is_standard(node.domain):
            for attribute in node.attribute:
                if attribute.name in CONSTANT_FORMS:
                    stored[node.output[0]] = attribute
    return stored


def _loaded(stored: TensorProto | onnx.AttributeProto) -> NDArray[Any]:
    value = stored if isinstance(stored, TensorProto) else onnx.helper.get_attribute_value(stored)
    if not isinstance(value, TensorProto):
        return np.asarray(value, np.float32 if stored.name.startswith("value_float") else np.int64)
    if weights.is_outside(value):
        return weights.read(value)
    try:
        return numpy_helper.to_array(value)
    except ValueError:
        raise ModelError(
            f"The data of tensor {value.name or stored.name!r} does not fill its shape {list(value.dims)}.",
            "The model is damaged; export or copy it again.",
        ) from None


def _shape_of(stored: TensorProto | onnx.AttributeProto) -> tuple[int, ...]:
    value = stored if isinstance(stored, TensorProto) else onnx.helper.get_attribute_value(stored)
    return tuple(value.dims) if isinstance(value, TensorProto) else np.shape(value)


def _captured_by_subgraphs(graph: gs.Graph) -> set[str]:
    """Return every tensor name read inside If, Loop or Scan (names of the subgraph's own included: harmless)."""
    return {t.name for sub in graph.subgraphs(recursive=True) for t in _reads(sub)}


def _reads(sub: gs.Graph) -> list[gs.Tensor]:
    return [t for node in sub.nodes for t in node.inputs] + list(sub.outputs)


def weight_count(model: onnx.ModelProto) -> int:
    """Return the number of floating-point or 8-bit and smaller elements in initialisers and Constant nodes.

    Shapes, axes and channel indices (int32, int64) are not parameters. A sparse initialiser counts its stored values.
    """
    kinds = {TensorProto.INT32, TensorProto.INT64, TensorProto.UINT32, TensorProto.UINT64, TensorProto.BOOL}
    kinds |= {TensorProto.STRING}
    total = sum(int(t.values.dims[0]) for t in model.graph.sparse_initializer)
    for tensor in all_tensors(model):
        if tensor.data_type not in kinds:
            total += int(np.prod(tensor.dims, dtype=np.int64))
    return total


def takes_sparse(model: onnx.ModelProto) -> bool:
    """Return whether a model may hold sparse initialisers by the IR version that it declares."""
    return bool(model.ir_version >= SPARSE_SINCE)


def sparse_bytes(count: int, size: int) -> int:
    """Return the most bytes that ``count`` values of a float32 tensor of ``size`` elements take with their indices.

    A value takes 4 bytes and its index, a varint, one for each 7 bits of the largest index.
    """
    index_bytes = max(-(-(size - 1).bit_length() // 7), 1)
    return count * (4 + index_bytes)


def sparse_tensor(
    places: NDArray[np.int64], values: NDArray[np.float32], shape: Sequence[int]
) -> onnx.SparseTensorProto:
    """Return a sparse tensor without a name.

    ``places`` (count,) are ascending positions in the flattened tensor. They go into the field for integers, where
    small numbers take few bytes: 7 or 8 a stored value instead of the 12 of raw data.
    """
    stored = TensorProto(data_type=TensorProto.FLOAT, dims=[len(values)], float_data=values.tolist())
    indices = TensorProto(data_type=TensorProto.INT64, dims=[len(places)], int64_data=places.tolist())
    return onnx.SparseTensorProto(values=stored, indices=indices, dims=shape)


def array_tensor(values: NDArray[np.generic], name: str) -> TensorProto:
    """Return a TensorProto with raw data."""
    return numpy_helper.from_array(np.ascontiguousarray(values), name)
