"""im2col columns of a layer's input at sampled positions.

The columns come out tap-major (taps, channels), because gathering whole channel vectors from a channels-last copy is
several times faster than gathering single kernel windows; :func:`channel_major` is the permutation back to the weight's
order.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from onnx_lrs.graph.layers import Geometry, Layer

Floats = NDArray[np.float32]


def columns(layer: Layer, values: NDArray[np.generic], uniform: NDArray[np.float64]) -> Floats:
    """Return sampled columns of a layer's input, (n, taps * channels), float32, tap-major.

    Parameters
    ----------
    layer : Layer
        Which geometry to read with.
    values : ndarray
        The layer's input for one batch, as ONNX Runtime gave it.
    uniform : ndarray, shape (samples, positions)
        Numbers in [0, 1), one row a sample: position j is drawn from the j-th of ``positions`` equal strata, so that no
        position comes twice and the map is covered evenly. A smaller map gives all of its positions.
    """
    if layer.op == "Conv":
        return _conv_columns(layer.geometry, values, _per_image(uniform, len(values)))
    return _some_rows(_feature_rows(layer, values), uniform, is_by_sample(layer, values, len(uniform)))


def _some_rows(rows: NDArray[np.generic], uniform: NDArray[np.float64], by_sample: bool) -> Floats:
    samples = len(uniform) if by_sample else 1
    uniform, each = uniform.reshape(samples, -1), len(rows) // samples
    if each > uniform.shape[1]:
        rows = rows[(_strata(uniform, each) + each * np.arange(samples)[:, None]).ravel()]
    return np.ascontiguousarray(rows, np.float32)


def _positions(uniform: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return which of ``count`` positions of each image are read, (images, n): all of them if there are few."""
    if count <= uniform.shape[1]:
        return np.broadcast_to(np.arange(count), (len(uniform), count))
    return _strata(uniform, count)


def responses(layer: Layer, values: NDArray[np.generic], uniform: NDArray[np.float64], by_sample: bool) -> Floats:
    """Return rows of a tensor shaped like the layer's output, where :func:`columns` read its input; (n, out) float32.

    ``by_sample`` is what :func:`is_by_sample` says of the layer's input.
    """
    if layer.op == "Conv":
        count = math.prod(values.shape[2:])
        flat = _positions(_per_image(uniform, len(values)), count)
        last = np.moveaxis(values, 1, -1).reshape(len(values), count, layer.out)
        rows = last[np.arange(len(values))[:, None], flat].reshape(-1, layer.out)
        return np.ascontiguousarray(rows, np.float32)
    if layer.geometry.weight_left and values.ndim > 1:
        values = np.swapaxes(values, -1, -2)
    return _some_rows(values.reshape(-1, layer.out), uniform, by_sample)


def is_by_sample(layer: Layer, values: NDArray[np.generic], samples: int) -> bool:
    """Return whether :func:`columns` gives one sample after the other, equally many columns of each.

    So it is if the first axis of ``values`` (of their transpose, where that is read) counts the samples or equal parts
    of them, as windows cut out of each. A first axis that is a multiple of ``samples`` is taken for such a one.
    """
    if layer.op == "Conv":
        return len(values) % samples == 0
    if values.ndim < 2:
        return samples == 1
    across = layer.geometry.trans_a or layer.geometry.weight_left
    return int(values.shape[1 if across and values.ndim == 2 else 0]) % samples == 0


def channel_major(layer: Layer) -> NDArray[np.int64]:
    """Return the order that turns tap-major columns into the weight's channel-major ones, (d,)."""
    return np.arange(layer.d).reshape(layer.taps, layer.channels).T.ravel()


def _feature_rows(layer: Layer, values: NDArray[np.generic]) -> NDArray[np.generic]:
    if (layer.geometry.trans_a or layer.geometry.weight_left) and values.ndim > 1:
        values = np.swapaxes(values, -1, -2)
    return values.reshape(-1, layer.channels)


def _strata(uniform: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return distinct positions below ``count``, one from each stratum; shape of ``uniform``.

    Strata are whole positions, so their sizes may differ by one; each row is turned by a random distance (from lower
    digits of its first number), so that every position is equally likely all the same.
    """
    wanted = uniform.shape[1]
    edges = np.arange(wanted + 1) * count // wanted
    inside = edges[:-1] + (uniform * np.diff(edges)).astype(np.int64)
    turn = (uniform[:, :1] * 2**20 % 1 * count).astype(np.int64)
    return np.sort((inside + turn) % count, axis=1)


def _per_image(uniform: NDArray[np.float64], images: int) -> NDArray[np.float64]:
    """Share the numbers out where the graph folds something into the batch axis (windows, frames).

    The images of a sample share the numbers of that sample; where images belong to no one sample, they share all.
    """
    samples, count = uniform.shape
    if images == samples:
        return uniform
    if images % samples:
        return np.resize(uniform, (images, max(uniform.size // images, 1)))
    fold = images // samples
    each = max(count // fold, 1)
    return uniform[:, np.arange(fold * each) % count].reshape(images, each)


def _conv_columns(geometry: Geometry, values: NDArray[np.generic], uniform: NDArray[np.float64]) -> Floats:
    padded, output = _padded(geometry, np.asarray(values, np.float32))
    batch, count = len(values), math.prod(output)
    flat = _positions(uniform, count)
    sample = np.repeat(np.arange(batch), flat.shape[1])
    corner = [axis.ravel() * s for axis, s in zip(np.unravel_index(flat, output), geometry.strides, strict=True)]
    last = np.ascontiguousarray(np.moveaxis(padded, 1, -1))
    taps = list(itertools.product(*(range(k) for k in geometry.kernel)))
    found = np.empty((len(sample), len(taps), values.shape[1]), np.float32)
    for number, tap in enumerate(taps):  # kernel positions: a handful, each gathers all columns at once
        at = tuple(c + t * d for c, t, d in zip(corner, tap, geometry.dilations, strict=True))
        found[:, number] = last[(sample, *at)]
    return found.reshape(len(sample), -1)


def _padded(geometry: Geometry, values: Floats) -> tuple[Floats, tuple[int, ...]]:
    """Return the zero-padded input and the spatial shape of the output."""
    sizes = values.shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(geometry.kernel, geometry.dilations, strict=True)]
    before, after = _pads(geometry, sizes, reach)
    padded = np.pad(values, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    output = tuple((n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, geometry.strides, strict=True))
    return padded, output


def _pads(geometry: Geometry, sizes: tuple[int, ...], reach: list[int]) -> tuple[list[int], list[int]]:
    if geometry.auto_pad in ("NOTSET", "VALID"):
        pads = list(geometry.pads) if geometry.auto_pad == "NOTSET" else [0] * 2 * len(sizes)
        return pads[: len(sizes)], pads[len(sizes) :]
    total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(sizes, geometry.strides, reach, strict=True)]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if geometry.auto_pad == "SAME_UPPER" else (large, small)
