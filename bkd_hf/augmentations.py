"""Augmentations of training images: a table with one line and one pure function each.

A view is a function of (seed, epoch, index): the same pixels for any number of workers and processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from transformers.image_processing_utils import BaseImageProcessor

from .views import output_size

#: Up to this many pixels a side, images are shifted by padding and cropping; larger ones by random resized crops.
SMALL_IMAGE_SIZE = 64

_CROP_AREA = (0.08, 1.0)
_CROP_ASPECT_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10


class Augmentation(NamedTuple):
    """How views of images are chosen; see [`Operation`] for what is then done to their pixels.

    Attributes:
        views: Function of width, height and B×`num_draws` numbers in [0, 1), each a hash of (seed, epoch, index) and
            its column. Returns B boxes (left, top, right, bottom), and B booleans: which views are mirrored.
        num_draws: Random numbers per image.
        of_original: Whether boxes are parts of the stored image, which are resized. Otherwise they are parts of the
            processor's view, keep its size, and may extend beyond it, where pixels are black.
    """

    views: Callable[[int, int, np.ndarray], tuple[np.ndarray, np.ndarray]]
    num_draws: int = 0
    of_original: bool = False


def whole_view(width: int, height: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The processor's own view."""
    return np.tile([0, 0, width, height], (len(draws), 1)), np.zeros(len(draws), dtype=bool)


def pad_crop(width: int, height: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images shifted by whole pixels, up to an eighth of their size in each direction, mirrored half of the time."""
    pads = np.array([round(width / 8), round(height / 8)])
    left_top = (draws[:, [2, 1]] * (2 * pads + 1)).astype(np.int64) - pads
    return np.hstack([left_top, left_top + np.array([width, height])]), draws[:, 0] < 0.5


def random_resized_crop(width: int, height: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 to 100 % of the image at an aspect ratio of 3/4 to 4/3, mirrored half of the time."""
    boxes = [random_resized_crop_box(width, height, numbers) for numbers in draws[:, 1:]]
    return np.array(boxes), draws[:, 0] < 0.5


def random_resized_crop_box(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random part of an image (Szegedy et al., 2015, arXiv 1409.4842, section 6).

    The first of ten tries that fits into the image (`draws` as for [`first_fitting_box`]); else the largest central
    crop within the aspect ratios.
    """
    box = first_fitting_box(width, height, draws, _CROP_AREA, _CROP_ASPECT_RATIO)
    if box is not None:
        return box
    crop_width = min(width, max(1, round(height * _CROP_ASPECT_RATIO[1])))
    crop_height = min(height, max(1, round(width / _CROP_ASPECT_RATIO[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def first_fitting_box(
    width: int, height: int, draws: np.ndarray, areas: tuple[float, float], ratios: tuple[float, float]
) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the first of some random boxes that fits into an image; `None` if none does.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        draws: 4 numbers in [0, 1) per box: area, aspect ratio, position from the left and from the top.
        areas: Smallest and largest share of the image.
        ratios: Smallest and largest width/height; their logarithms are equally likely.
    """
    log_ratios = np.log(ratios)
    for area_draw, ratio_draw, left_draw, top_draw in draws.reshape(-1, 4):
        area = width * height * (areas[0] + area_draw * (areas[1] - areas[0]))
        ratio = math.exp(log_ratios[0] + ratio_draw * (log_ratios[1] - log_ratios[0]))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(left_draw * (width - box_width + 1))
            top = int(top_draw * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    return None


AUGMENTATIONS = {
    "none": Augmentation(whole_view),
    "pad_crop": Augmentation(pad_crop, num_draws=3),
    "random_resized_crop": Augmentation(random_resized_crop, num_draws=1 + 4 * _CROP_ATTEMPTS, of_original=True),
}


def default_augmentation(processor: BaseImageProcessor) -> str:
    """The usual augmentation for a model's image size: `"pad_crop"` up to 64 pixels, `"random_resized_crop"` above."""
    return "pad_crop" if max(output_size(processor)) <= SMALL_IMAGE_SIZE else "random_resized_crop"


def move_and_mirror(images: np.ndarray, shifts: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Shift a window over images, which are zero outside, and mirror some.

    Args:
        images: B×H×W×C bytes.
        shifts: B×2 fractions of width and height by which the window moves right and down, rounded to whole pixels;
            images of another size with the same fractions show the same part.
        mirrored: B booleans.

    Returns:
        B×H×W×C bytes.
    """
    if not shifts.any() and not mirrored.any():
        return images
    batch, height, width, channels = images.shape
    right, down = np.rint(shifts * np.array([width, height])).astype(np.int64).T
    rows, columns = int(np.abs(down).max(initial=0)), int(np.abs(right).max(initial=0))
    padded = np.zeros((batch, height + 2 * rows, width + 2 * columns, channels), dtype=np.uint8)
    padded[:, rows : rows + height, columns : columns + width] = images
    # Copying whole rows and pixels is seven times as fast as indexing each byte.
    windows = sliding_window_view(padded, (height, width), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    moved = np.ascontiguousarray(windows[np.arange(batch), down + rows, right + columns])
    pixels = moved.view(f"V{channels}")
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    return moved
