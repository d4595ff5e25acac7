"""What stands between a layer and its activation, and which activation it is.

The way from a layer's output y to the argument u of its activation may hold BatchNormalizations and one Add of a
computed tensor s (a shortcut), as long as nobody else sees what lies on it: ``u = scale * y + shortcut_scale * s +
shift``. Behind u there may be MaxPools. All activations that are seen here are monotone, and a maximum commutes with
every monotone function, so they change nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_lrs.graph.model import View, is_standard
from onnx_lrs.solvers.activation import LINEAR, RELU, Activation, clip, leaky_relu

Row = NDArray[np.float64]
INPUTS_SINCE = 11  # the opset in which the limits of Clip became inputs
UNLIMITED = float(np.finfo(np.float32).max)  # what exporters write for no limit
LEAK = 0.01  # the default of LeakyRelu
NOT_SEEN = {  # activations that have no piecewise linear form, or not with every attribute
    *("Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Swish", "Mish", "Gelu", "Erf", "Elu", "Selu", "Celu", "Softplus"),
    *("Softsign", "Softmax", "LogSoftmax", "ThresholdedRelu", "Clip", "LeakyRelu", "PRelu"),
}


@dataclasses.dataclass(frozen=True)
class Behind:
    """What stands behind a layer; names only.

    ``total`` is the tensor that holds the argument of the activation, up to MaxPools: the layer's own output, or that
    of the last BatchNormalization or Add on the way. ``shortcut`` is the Add's other operand, None without an Add;
    whether it has the shape of the layer's output is known at run time only. ``norms`` are the BatchNormalizations on
    the way, in order: first output, and whether it stands behind the Add. ``label`` is what a report says.
    """

    total: str = ""
    shortcut: str | None = None
    norms: tuple[tuple[str, bool], ...] = ()
    label: str = "linear"


NOTHING = Behind()


def look_behind(view: View, output: str, channels: int | None) -> tuple[Activation, Behind]:
    """Return the activation behind a layer's output, LINEAR if none is seen, and the way to it.

    ``channels`` is how many of them the output has along axis 1; None if its channels may lie along another axis, so
    that no BatchNormalization belongs to them.
    """
    way = _way(view, output, channels)
    found, pooled = activation_of(view, way.total)
    parts = ["batch-norm"] * any(not after for _, after in way.norms)
    parts += ["add"] * (way.shortcut is not None) + ["batch-norm"] * any(after for _, after in way.norms)
    if found is None:
        parts += _not_seen(view, way.total)
    elif found != LINEAR:
        parts += ["max-pool"] * pooled + [found.name]
    return found or LINEAR, dataclasses.replace(way, label=" + ".join(parts) or LINEAR.name)


def _way(view: View, output: str, channels: int | None) -> Behind:
    """Return the way from a layer's output as far as it goes; the label is not set yet."""
    way = Behind(output)
    while True:
        node = view.sole_reader(way.total)
        if node is None or not is_standard(node.domain):
            return way
        shortcut = addend(view, node, way.total) if way.shortcut is None else None
        if shortcut is not None:
            way = dataclasses.replace(way, total=node.outputs[0].name, shortcut=shortcut)
        elif channels is not None and _is_passable(view, node, channels):
            name = node.outputs[0].name
            way = dataclasses.replace(way, total=name, norms=(*way.norms, (name, way.shortcut is not None)))
        else:
            return way


def addend(view: View, node: gs.Node, name: str) -> str | None:
    """Return the other operand of an Add if it is computed from the model's inputs and not the tensor itself."""
    others = [t.name for t in node.inputs if t.name != name]
    if node.op != "Add" or len(others) != 1 or view.stored_shape(others[0]) is not None:
        return None
    return str(others[0])


def _is_passable(view: View, node: gs.Node, channels: int) -> bool:
    """Return whether a node is a BatchNormalization whose gains can be divided by."""
    if not is_inference_norm(view, node):
        return False
    gain, shift = gain_and_shift(view, node)
    finite = bool(np.isfinite(gain).all() and np.isfinite(shift).all())
    return gain.shape == shift.shape == (channels,) and finite and bool(gain.all())


def is_inference_norm(view: View, node: gs.Node) -> bool:
    """Return whether a node is a BatchNormalization with constant float32 parameters, one value a channel each."""
    if node.op != "BatchNormalization" or not is_standard(node.domain):
        return False
    trains = node.attrs.get("training_mode", 0) or any(t.name for t in node.outputs[1:])
    if trains or not node.attrs.get("spatial", 1):
        return False
    names = [t.name for t in node.inputs[1:]]
    return all(view.is_constant(name) and view.constant(name).dtype == np.float32 for name in names)


def gain_and_shift(view: View, norm: gs.Node) -> tuple[Row, Row]:
    """Return g and t, (channels,), of a BatchNormalization that computes ``g x + t``; finite or not."""
    scale, beta, mean, var = (view.constant(t.name).astype(np.float64) for t in norm.inputs[1:5])
    with np.errstate(all="ignore"):
        gain = scale / np.sqrt(var + norm.attrs.get("epsilon", 1e-5))
        return gain, beta - gain * mean


def affine_of(view: View, behind: Behind) -> tuple[Row | None, Row | None, Row | None]:
    """Return scale, shift and shortcut_scale of the way, each (channels,); None stands for 1, 0 and 1."""
    scale: Row | None = None
    shift: Row | None = None
    shortcut_scale: Row | None = None
    for name, is_behind_add in behind.norms:
        gain, moved = gain_and_shift(view, view.tensors[name].inputs[0])
        scale = gain if scale is None else gain * scale
        shift = moved if shift is None else gain * shift + moved
        if is_behind_add:
            shortcut_scale = gain if shortcut_scale is None else gain * shortcut_scale
    return scale, shift, shortcut_scale


# ------------------------------------------------------------------------------------------------------ the activation


def activation_of(view: View, tensor: str) -> tuple[Activation | None, bool]:
    """Return what every reader of a tensor applies to it first, and whether a MaxPool stands in front of any of them.

    None if somebody sees the tensor otherwise, or two readers apply different functions. A MaxPool between changes
    nothing, since the maximum commutes with monotone functions; its second output, the places of the maxima, does not
    survive the exchange.
    """
    found: set[Activation] = set()
    waiting, pooled = [tensor], False
    while waiting:
        name = waiting.pop()
        readers = view.readers(name)
        if not readers or name in view.outputs or name in view.captured:
            return None, pooled
        for node in readers:
            activation = as_activation(view, node, name)
            if activation is not None:
                found.add(activation)
            elif node.op == "MaxPool" and is_standard(node.domain) and len(node.outputs) == 1:
                waiting, pooled = [*waiting, node.outputs[0].name], True
            else:
                return None, pooled
    return (found.pop(), pooled) if len(found) == 1 else (None, pooled)


def as_activation(view: View, node: gs.Node, argument: str) -> Activation | None:
    """Return the monotone piecewise linear function that a node applies to a tensor, or None."""
    if not is_standard(node.domain) or node.inputs[0].name != argument:
        return None
    if node.op == "Relu":
        return RELU
    if node.op == "Clip":
        return _clip(view, node)
    if node.op == "LeakyRelu":
        return _leaky(float(np.float32(node.attrs.get("alpha", LEAK))))
    return _leaky(_scalar(view, node.inputs[1].name)) if node.op == "PRelu" else None


def _clip(view: View, node: gs.Node) -> Activation | None:
    limits: list[float | None] = [-np.inf, np.inf]
    if view.opset < INPUTS_SINCE:
        limits = [float(node.attrs.get("min", -np.inf)), float(node.attrs.get("max", np.inf))]
    else:
        for position, tensor in enumerate(node.inputs[1:3]):
            if tensor.name:
                limits[position] = _scalar(view, tensor.name)
    low, high = limits
    if low is None or high is None:
        return None
    low, high = (-np.inf if low <= -UNLIMITED else low), (np.inf if high >= UNLIMITED else high)
    return clip(low, high) if low <= high and low < np.inf and high > -np.inf else None


def _leaky(slope: float | None) -> Activation | None:
    return leaky_relu(slope) if slope is not None and 0 <= slope < np.inf else None


def _scalar(view: View, name: str) -> float | None:
    """Return a constant of one value, else None."""
    values: NDArray[Any] | None = view.constant(name) if view.is_constant(name) else None
    return float(values.reshape(())) if values is not None and values.size == 1 else None


def _not_seen(view: View, tensor: str) -> list[str]:
    """Return what to say of an activation that follows at once and is fitted as if it were none, if there is one."""
    readers = view.readers(tensor)
    ops = {node.op if is_standard(node.domain) else "" for node in readers}
    if len(ops) != 1 or not ops <= NOT_SEEN or tensor in view.outputs or tensor in view.captured:
        return []
    return [f"{ops.pop().lower()}, fitted as linear"]
