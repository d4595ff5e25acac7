"""A model as a torch module whose parameters are the file's own constants.

onnx2torch translates the operators. What it makes of a weight depends on the operator (a Gemm's is transposed and
scaled, a shared one is copied), so its own parameters are not what is trained: the leaves are tensors of the names,
shapes and values that the file has, and every call computes from them what the translated modules need. Going back is
then no translation at all.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx2torch import convert
from onnx2torch.node_converters.registry import get_converter
from torch.func import functional_call

from onnx_lrs.errors import ModelError
from onnx_lrs.graph.model import is_standard, opset
from onnx_lrs.graph.tuning import Twin, evaluated
from onnx_lrs.runtime.session import with_outputs
from onnx_lrs.training.rounding import straight_through

FAILURES = (
    NotImplementedError,
    KeyError,
    ValueError,
    RuntimeError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
)
NEWEST = 17  # opset to which a model is taken where onnx2torch does not know an operator of its own


@dataclasses.dataclass(frozen=True)
class Route:
    """Where a constant goes: the tensor of the translated network, and how it has to look there."""

    target: str
    name: str
    transposed: bool = False
    factor: float = 1.0


class Student(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """A translated model; call it with the model's inputs in order.

    Parameters
    ----------
    twin : Twin
        The model.
    outputs : sequence of str
        Tensors that a call returns, by name: outputs of the graph or others.

    Raises
    ------
    ModelError
        If onnx2torch lacks an operator, with the names of all it lacks.
    """

    def __init__(self, twin: Twin, outputs: Sequence[str]) -> None:
        super().__init__()
        model = translatable(with_outputs(twin.model, outputs))
        self._network = (translated(model),)  # in a tuple: none of its parameters is ours
        self._routes = tuple(_routes(model, self._network[0]))
        trained = _reached(twin, model, [route.name for route in self._routes])
        self._routes = tuple(r for r in self._routes if r.name in trained or r.name in twin.made)
        self.leaves = torch.nn.ParameterDict()
        self.keys = {name: f"w{place}" for place, name in enumerate(trained)}  # of leaves: names may hold dots
        self._channels = {name: twin.channels[name] for name in trained if name in twin.channels}
        self._made, self._constants = twin.made, {n: torch.from_numpy(np.array(v)) for n, v in twin.constants.items()}
        for each in twin.tunables:
            if each.name not in trained:
                self._constants[each.name] = torch.from_numpy(np.array(each.values))
                continue
            self.leaves[self.keys[each.name]] = torch.nn.Parameter(torch.from_numpy(np.array(each.values)))
            support = None if each.support is None else torch.from_numpy(each.support.astype(np.float32))
            self.register_buffer(f"support_{self.keys[each.name]}", support)
        self._places = _places(model, outputs)
        self._outputs = tuple(outputs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Take what is translated along to another device."""
        self._network[0]._apply(fn)
        self._constants = {name: fn(value) for name, value in self._constants.items()}
        return super()._apply(fn, recurse)

    @property
    def values(self) -> dict[str, NDArray[np.float32]]:
        """The trained constants by the names that they have in the file."""
        return {name: self._value(name).detach().cpu().numpy().copy() for name in self.keys}

    def forward(self, *inputs: torch.Tensor, rounded: bool = False) -> dict[str, torch.Tensor]:
        """Return the outputs by name; ``rounded``: those of weights as INT8 leaves them, gradients straight through."""
        values: dict[str, Any] = {name: self._value(name) for name in self.keys}
        if rounded:
            values |= {name: straight_through(values[name], axis) for name, axis in self._channels.items()}
        for nodes in self._made.values():
            values |= evaluated(nodes, self._constants | values, torch.permute)
        replaced = {route.target: _on_route(values[route.name], route) for route in self._routes}
        found = functional_call(self._network[0], replaced, inputs)
        parts = found if isinstance(found, list | tuple) else [found]
        chosen = zip(self._outputs, self._places, strict=True)
        return {name: parts[i][j] if isinstance(parts[i], list | tuple) else parts[i] for name, (i, j) in chosen}

    def _value(self, name: str) -> torch.Tensor:
        """Return a constant; outside its support it stays zero, whatever the optimiser does."""
        key = self.keys[name]
        support = getattr(self, f"support_{key}")
        return self.leaves[key] if support is None else self.leaves[key] * support


def _on_route(value: torch.Tensor, route: Route) -> torch.Tensor:
    value = value.t() if route.transposed else value
    return value if route.factor == 1.0 else value * route.factor


def translatable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model in an opset that onnx2torch knows.

    Raises
    ------
    ModelError
        If there is none.
    """
    missing = _missing(model)
    if missing and opset(model) > NEWEST:
        try:
            older = onnx.version_converter.convert_version(model, NEWEST)
        except (RuntimeError, onnx.version_converter.ConvertError):
            older = model
        if not _missing(older):
            return older
    if missing:
        raise ModelError(
            f"This model cannot be trained: onnx2torch does not know {', '.join(missing)}.",
            "Compress it without --refine.",
        )
    return model


def _missing(model: onnx.ModelProto) -> list[str]:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    unknown: dict[str, None] = {}
    for node in model.graph.node:
        domain = "" if is_standard(node.domain) else node.domain
        try:
            get_converter(operation_type=node.op_type, version=versions.get(domain, 1), domain=domain)
        except NotImplementedError:
            unknown[f"{node.op_type} ({domain or 'opset'} {versions.get(domain, 1)})"] = None
    return list(unknown)


def translated(model: onnx.ModelProto) -> torch.fx.GraphModule:
    """Return what onnx2torch makes of a model.

    Raises
    ------
    ModelError
        If it fails.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return convert(model, attach_onnx_mapping=True).eval()
        except FAILURES as error:
            told = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(
                f"onnx2torch cannot translate this model: {told}", "Compress it without --refine."
            ) from None


def _reached(twin: Twin, model: onnx.ModelProto, routed: Sequence[str]) -> list[str]:
    """Return the constants that can be trained: those that a route leads to wherever they are read.

    Raises
    ------
    ModelError
        If there are none.
    """
    reads = Counter(name for node in model.graph.node for name in node.input)
    routes = Counter(routed)
    whole = {name for name in routes if routes[name] == reads[name]}
    lost = {name for name, nodes in twin.made.items() if name not in whole for node in nodes for name in node.input}
    parts = {name for nodes in twin.made.values() for node in nodes for name in node.input} - lost
    found = [
        t.name
        for t in twin.tunables
        if t.name not in lost and (t.name in whole or (t.name in parts and not reads[t.name]))
    ]
    if not found:
        raise ModelError("This model has no float32 weights that could be trained.", "Compress it without --refine.")
    return found


def _places(model: onnx.ModelProto, outputs: Sequence[str]) -> list[tuple[int, int]]:
    """Return which of the network's results each output is: onnx2torch gives one for each node that makes any.

    The second number counts within the result of a node with several outputs.
    """
    makers = {name: (place, i) for place, node in enumerate(model.graph.node) for i, name in enumerate(node.output)}
    order = {place: number for number, place in enumerate(dict.fromkeys(makers[name][0] for name in outputs))}
    return [(order[makers[name][0]], makers[name][1]) for name in outputs]


def _routes(model: onnx.ModelProto, network: torch.fx.GraphModule) -> Iterator[Route]:
    """Yield where every initialiser of the model went."""
    calls = {call.target: call for call in network.graph.nodes if call.op == "call_module"}
    there = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    for node in model.graph.node:
        if node.name not in calls:
            continue
        module = network.get_submodule(node.name)
        layer = node.op_type in ("Conv", "ConvTranspose", "Gemm") and is_standard(node.domain)
        if layer and node.input[1] not in module.onnx_mapping.inputs:
            at = f"{node.name}.1" if isinstance(module, torch.nn.Sequential) else node.name  # padded apart
            yield from (route for route in _of_module(node, at) if route.target in there)
            continue
        for name, argument in zip(module.onnx_mapping.inputs, calls[node.name].args, strict=False):
            if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
                yield Route(str(argument.target), name)


def _of_module(node: onnx.NodeProto, at: str) -> Iterator[Route]:
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    gemm = node.op_type == "Gemm"
    yield Route(
        f"{at}.weight",
        node.input[1],
        transposed=gemm and not given.get("transB", 0),
        factor=float(given.get("alpha", 1.0)) if gemm else 1.0,
    )
    if len(node.input) > 2 and node.input[2]:
        yield Route(f"{at}.bias", node.input[2], factor=float(given.get("beta", 1.0)) if gemm else 1.0)
