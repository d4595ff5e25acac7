"""A model as a torch module whose parameters are the file's own constants.

onnx2torch translates the operators. What it makes of a weight depends on the operator (a Gemm's is transposed and
scaled, a shared one is copied), so its own parameters are not what is trained: the leaves are tensors of the names,
shapes and values that the file has, and every call computes from them what the translated modules need. Going back is
then no translation at all.
"""

from __future__ import annotations

import dataclasses
import warnings
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

NEWEST = 17  # opset to which a model is taken where onnx2torch does not know an operator of its own
STORE = "initializers"  # onnx2torch's module of constants that are no module's parameters


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._network = (
                convert(model, attach_onnx_mapping=True).eval(),
            )  # in a tuple: none of its parameters is ours
        self.leaves = torch.nn.ParameterDict()
        self.keys = {
            each.name: f"w{place}" for place, each in enumerate(twin.tunables)
        }  # of leaves: names may hold dots
        self._made, self._constants = twin.made, {n: torch.from_numpy(np.array(v)) for n, v in twin.constants.items()}
        for each in twin.tunables:
            self.leaves[self.keys[each.name]] = torch.nn.Parameter(torch.from_numpy(np.array(each.values)))
            support = None if each.support is None else torch.from_numpy(each.support.astype(np.float32))
            self.register_buffer(f"support_{self.keys[each.name]}", support)
        known = self.keys.keys() | twin.made.keys()
        self._routes = tuple(route for route in _routes(model, self._network[0]) if route.name in known)
        self._places = _places(model, outputs)
        self._outputs = tuple(outputs)

    @property
    def values(self) -> dict[str, NDArray[np.float32]]:
        """The trained constants by the names that they have in the file."""
        return {name: self._value(name).detach().cpu().numpy().copy() for name in self.keys}

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs by name."""
        values: dict[str, Any] = {name: self._value(name) for name in self.keys}
        for nodes in self._made.values():
            values |= evaluated(nodes, self._constants | values, torch.permute)
        replaced = {route.target: _on_route(values[route.name], route) for route in self._routes}
        found = functional_call(self._network[0], replaced, inputs)
        parts = found if isinstance(found, list | tuple) else [found]
        return {name: parts[place] for name, place in zip(self._outputs, self._places, strict=True)}

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


def _places(model: onnx.ModelProto, outputs: Sequence[str]) -> list[int]:
    """Return which of the network's results each output is: onnx2torch gives one for each node that makes any."""
    makers = {name: place for place, node in enumerate(model.graph.node) for name in node.output}
    order = {maker: place for place, maker in enumerate(dict.fromkeys(makers[name] for name in outputs))}
    return [order[makers[name]] for name in outputs]


def _routes(model: onnx.ModelProto, network: torch.fx.GraphModule) -> Iterator[Route]:
    """Yield where every initialiser of the model went."""
    calls = {call.target: call for call in network.graph.nodes if call.op == "call_module"}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and is_standard(node.domain):
            yield from _of_module(node)
        elif node.name in calls:
            module = network.get_submodule(node.name)
            for name, argument in zip(module.onnx_mapping.inputs, calls[node.name].args, strict=False):
                if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
                    yield Route(str(argument.target), name)


def _of_module(node: onnx.NodeProto) -> Iterator[Route]:
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    gemm = node.op_type == "Gemm"
    yield Route(
        f"{node.name}.weight",
        node.input[1],
        transposed=gemm and not given.get("transB", 0),
        factor=float(given.get("alpha", 1.0)) if gemm else 1.0,
    )
    if len(node.input) > 2 and node.input[2]:
        yield Route(f"{node.name}.bias", node.input[2], factor=float(given.get("beta", 1.0)) if gemm else 1.0)
