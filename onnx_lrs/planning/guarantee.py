"""From guarantees of layers to one of the network's output, where the layers form a chain to it.

Each fully connected layer of the chain keeps to an error on the ORIGINAL network's columns; what passes on grows at
most by the spectral norms of the layers behind (solvers/certificate.py). The bound holds for the calibration samples
that all reservoirs of the chain share, and says nothing of others; it stands beside the error measured on them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.calibration.subject import Subject
from onnx_lrs.graph.layers import Layer, find, weight_matrix
from onnx_lrs.graph.model import View, is_standard
from onnx_lrs.planning.candidates import Fitted
from onnx_lrs.solvers.certificate import Link, bound, norm_of, spectral_norm

PASSES = ("Relu", "Identity", "Dropout")  # between two layers of a chain: they make no error larger


@dataclasses.dataclass(frozen=True)
class Chain:
    """Fully connected layers that lead to one output, in order, and that output."""

    layers: tuple[Layer, ...]
    output: str


@dataclasses.dataclass(frozen=True)
class Promise:
    """A chain with the largest error of its output, ||y - y'||_F over ``items``, that the guarantees allow."""

    chain: Chain
    bound: float
    items: NDArray[np.int64]


def find_chain(view: View, compressed: Sequence[str]) -> Chain | str:
    """Return the chain that holds every compressed layer (by node) and ends in an output, or why there is none."""
    if not compressed:
        return "no layer was compressed"
    by_output = {layer.output: layer for layer in find(view, smallest=0)[0]}  # small and excluded ones are links too
    for output in view.graph.outputs:
        found: list[Layer] = []
        layer = by_output.get(_behind(view, output.name))
        while layer is not None and _is_link(layer):
            found.insert(0, layer)
            layer = by_output.get(_behind(view, layer.input))
        chain = _cut(found, compressed)
        if chain:
            return Chain(chain, output.name)
    return "the compressed layers are no chain of fully connected layers up to an output of the model"


def _is_link(layer: Layer) -> bool:
    """Return whether the layer is fully connected and adds nothing but a constant row."""
    if layer.op == "Gemm":
        return layer.bias is not None or layer.affine  # else its C is computed, perhaps from the chain itself
    return layer.op == "MatMul" and not layer.geometry.weight_left


def _cut(found: Sequence[Layer], compressed: Sequence[str]) -> tuple[Layer, ...]:
    """Return the chain from its first compressed layer on if it holds all of them, else nothing."""
    inside = [i for i, layer in enumerate(found) if layer.node in compressed]
    return tuple(found[inside[0] :]) if len(inside) == len(compressed) else ()


def _behind(view: View, name: str) -> str:
    """Return the tensor in front of the elementwise nodes that make ``name`` and that no error grows in."""
    while name in view.tensors and view.tensors[name].inputs:
        node = view.tensors[name].inputs[0]
        if node.op not in PASSES or not is_standard(node.domain):
            return name
        name = node.inputs[0].name
    return name


def promise(
    subject: Subject, fitted: Mapping[str, Fitted], items: Mapping[str, NDArray[np.int64] | None]
) -> Promise | str:
    """Return what the guarantees of the fitted layers promise together, or why they promise nothing.

    ``items`` holds, by node, the sample of each column that the layer was fitted to.
    """
    if any(f.allowed is None for f in fitted.values()):
        return "a compressed layer has no guarantee of its own"
    chain = find_chain(subject.view, list(fitted))
    if isinstance(chain, str):
        return chain
    if any(math.prod(subject.shapes[la.node]) != la.out for la in chain.layers if la.node in fitted):
        return "its layers see more than one column a sample"
    known = [items.get(layer.node) for layer in chain.layers if layer.node in fitted]
    shared = _shared([each for each in known if each is not None])
    if len(shared) == 0 or any(each is None for each in known):
        return "it is not known which samples the columns come from"
    return Promise(chain, bound(_link(subject, layer, fitted) for layer in chain.layers).reached, shared)


def _shared(known: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the samples whose every column is in all the reservoirs: one column a sample, none unknown."""
    if not known or any((each < 0).any() or len(np.unique(each)) != len(each) for each in known):
        return np.zeros(0, np.int64)
    shared = known[0]
    for each in known[1:]:
        shared = np.intersect1d(shared, each)
    return np.sort(shared)


def _link(subject: Subject, layer: Layer, fitted: Mapping[str, Fitted]) -> Link:
    done = fitted.get(layer.node)
    if done is None:
        return Link(layer.name, 0.0, 0.0, spectral_norm(weight_matrix(subject.view, layer)))
    assert done.allowed is not None  # checked by the caller
    assert done.reached is not None
    return Link(layer.name, done.allowed, done.reached, norm_of(done.factors))
