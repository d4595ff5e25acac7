r"""Exact rewrites that come first: BatchNormalization into the Conv before it.

With ``g = scale / sqrt(var + eps)`` the pair computes ``g (W x + b - mean) + beta = (g W) x + (g (b - mean) + beta)``.
A BatchNormalization behind anything else (Conv + Relu, for example) is left alone.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_lrs.graph.behind import is_inference_norm
from onnx_lrs.graph.layers import read_elsewhere
from onnx_lrs.graph.model import View, is_standard
from onnx_lrs.graph.splice import Edit, Names, splice, stored_constant
from onnx_lrs.graph.weights import Scratch


def fold_batch_norm(model: onnx.ModelProto, scratch: Scratch | None = None) -> tuple[onnx.ModelProto, int]:
    """Return the model with every foldable BatchNormalization merged into its Conv, and how many there were.

    Without any, that is the model itself, not a copy. Large merged weights go to ``scratch`` if there is one.
    """
    view, names = View(model), Names(model)
    nodes: dict[str, list[gs.Node]] = {}
    for conv in view.nodes:
        norm = _foldable(view, conv)
        if norm is not None:
            merged = _merged(view, names, (conv, norm), scratch)
            if merged is not None:
                nodes |= {conv.outputs[0].name: [merged], norm.outputs[0].name: []}
    return splice(model, Edit(nodes)) if nodes else model, len(nodes) // 2


def _merged(view: View, names: Names, pair: tuple[gs.Node, gs.Node], scratch: Scratch | None) -> gs.Node | None:
    """Return the Conv that does both; None if its numbers would not be finite (negative variance, NaN weight)."""
    conv, norm = pair
    weight, bias = _folded(view, conv, norm)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return None
    operands = [
        gs.Variable(conv.inputs[0].name),
        stored_constant(names.fresh(f"{conv.inputs[1].name}_folded"), weight, scratch),
        gs.Constant(names.fresh(f"{conv.outputs[0].name}_bias"), bias),
    ]
    return gs.Node("Conv", conv.name, conv.attrs, operands, [gs.Variable(norm.outputs[0].name)], domain=conv.domain)


def _foldable(view: View, conv: gs.Node) -> gs.Node | None:
    """Return the BatchNormalization that can be merged into a Conv, or None."""
    if conv.op != "Conv" or not is_standard(conv.domain):
        return None
    norm = view.sole_reader(conv.outputs[0].name)
    if norm is None:
        return None
    constants = [t.name for t in conv.inputs[1:] if t.name]
    if read_elsewhere(view, conv.inputs[1].name):  # a shared weight would be stored once for each of its readers
        return None
    if not is_inference_norm(view, norm) or not all(view.is_constant(name) for name in constants):
        return None
    if any(view.constant(name).dtype != np.float32 for name in constants):
        return None
    return norm


def _folded(view: View, conv: gs.Node, norm: gs.Node) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    scale, beta, mean, var = (view.constant(t.name).astype(np.float64) for t in norm.inputs[1:5])
    weight = view.constant(conv.inputs[1].name)
    has_bias = len(conv.inputs) > 2 and conv.inputs[2].name
    bias = view.constant(conv.inputs[2].name).astype(np.float64) if has_bias else np.zeros_like(mean)
    with np.errstate(all="ignore"):
        gain = scale / np.sqrt(var + norm.attrs.get("epsilon", 1e-5))
        shaped = gain.reshape(-1, *[1] * (weight.ndim - 1))
        return (weight * shaped).astype(np.float32), ((bias - mean) * gain + beta).astype(np.float32)
