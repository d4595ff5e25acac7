"""Images shifted and mirrored at random; the teacher sees the same ones, so no label is needed for them.

Grey images are not mirrored: they are mostly writing and scans, which nobody meets mirrored.
"""

from __future__ import annotations

import torch

SHIFT = 8  # images move by at most one part in so many of their side: 4 of 32 pixels, 28 of 224
CHANNELS = (1, 3, 4)


def layout_of(shape: tuple[int, ...]) -> str | None:
    """Return "NCHW" or "NHWC" for a batch of images, None for anything else."""
    if len(shape) != 4:
        return None
    if shape[1] in CHANNELS:
        return "NCHW"
    return "NHWC" if shape[3] in CHANNELS else None


def moved(images: torch.Tensor, layout: str, generator: torch.Generator) -> torch.Tensor:
    """Return each image shifted by its own random distance, its border repeated; half of the coloured ones mirrored.

    Parameters
    ----------
    images : Tensor
        (n, c, h, w) or, for layout "NHWC", (n, h, w, c).
    layout : {"NCHW", "NHWC"}
    generator : torch.Generator
    """
    if layout == "NHWC":
        return moved(images.permute(0, 3, 1, 2), "NCHW", generator).permute(0, 2, 3, 1)
    count, channels, *sides = images.shape
    places = []
    for side in sides:
        most = side // SHIFT
        shift = torch.randint(-most, most + 1, (count, 1), generator=generator)
        places.append((torch.arange(side) + shift).clamp(0, side - 1))
    rows, columns = places
    if channels > 1:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    every, all_channels = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return images[every, all_channels, rows[:, None, :, None], columns[:, None, None, :]]
