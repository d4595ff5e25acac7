"""Calibration data: every source becomes indexed samples (contract; see the functions)."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a model input or output; a dynamic dimension is a str (its name) or None."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
