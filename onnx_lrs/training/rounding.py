"""Weights as INT8 leaves them, with a gradient: what onnxruntime.quantization stores (static QDQ, symmetric).

Every output channel has a scale, max |w| / 127, and its values become the nearest multiples of it, halves to the even
one (quant_utils.compute_scale_zp and quantize_nparray, ONNX Runtime 1.32). That is float32 throughout, and so to the
bit what DequantizeLinear gives. What is left out: the scale of a channel whose bias would not fit INT32 is widened
there, by how much depends on the calibrated inputs.
"""

from __future__ import annotations

import torch

LEVELS = 127  # steps on either side of zero


def nearest(weight: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Return a weight with every value at the nearest level of its channel; zeros stay zero.

    Parameters
    ----------
    weight : Tensor of float32
    axis : int, optional
        The dimension whose entries have a scale each; None: one scale for all.
    """
    others = [place for place in range(weight.ndim) if place != axis]
    scale = weight.abs().amax(others, keepdim=True) / LEVELS
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)  # channels of zeros
    return (weight / scale).round().clamp(-LEVELS, LEVELS) * scale


def straight_through(weight: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Return the rounded weight, whose gradient the weight itself gets (Bengio et al. 2013, arXiv 1308.3432).

    Rounding has no gradient of any use, so it is taken for the identity on the way back, scales included (as Jacob et
    al. 2018, arXiv 1712.05877, train for INT8).
    """
    fixed = weight.detach()
    return nearest(fixed, axis) + (weight - fixed)  # the second part is zero, to the bit
