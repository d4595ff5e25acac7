"""The shipped example: a LeNet-5 for handwritten digits, with digits to calibrate and to judge on."""

from __future__ import annotations

import pathlib

import numpy as np

from onnx_lrs.api import compress
from onnx_lrs.config import Config
from onnx_lrs.errors import ModelError
from onnx_lrs.progress import Progress
from onnx_lrs.report.result import Result


def folder() -> pathlib.Path:
    """Return where the shipped model and digits lie: inside the installed package, or beside it in a checkout.

    Raises
    ------
    ModelError
        If the installation lacks them.
    """
    package = pathlib.Path(__file__).resolve().parent
    for place in (package / "models", package.parent / "models"):
        if (place / "lenet5.onnx").is_file() and (place / "digits.npz").is_file():
            return place
    raise ModelError("The demo's model is missing from this installation.", "pip install --force-reinstall onnx-lrs")


def run(output: pathlib.Path | None, config: Config, progress: Progress, call: str | None = None) -> Result:
    """Compress the shipped LeNet-5, calibrated on 1,000 training digits and judged on 1,000 test digits with labels.

    ``call`` is what a report names as the way to repeat it.
    """
    place = folder()
    with np.load(place / "digits.npz", allow_pickle=False) as digits:
        calibration, test, labels = (digits[key] for key in ("calibration", "test", "test_labels"))

    def as_input(images: np.ndarray) -> np.ndarray:
        return images[:, None].astype(np.float32)

    return compress(
        place / "lenet5.onnx",
        output,
        data=as_input(calibration),
        labels=labels,
        test=as_input(test),
        config=config,
        progress=progress,
        call=call,
    )
