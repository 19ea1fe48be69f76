"""From stored images to a model's pixels: decoding, caching, augmentation, normalisation.

Augmentation is a function of (seed, epoch, index): the same pixels for any number of workers and processes.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any, Literal

import datasets
import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .data import IMAGE_COLUMN, LABEL_COLUMN, class_counts, fingerprint, labels_of
from .errors import InputError
from .randomness import hash_uniform
from .views import Rendering, output_size, same_pixels

logger = logging.get_logger(__name__)

Augmentation = Literal["none", "pad_crop", "random_resized_crop"]
AUGMENTATIONS: tuple[Augmentation, ...] = ("none", "pad_crop", "random_resized_crop")
CacheImages = Literal["auto", "memory", "none"]

#: Up to this many pixels a side, images are shifted by padding and cropping; larger ones by random resized crops.
SMALL_IMAGE_SIZE = 64
#: `cache_images="auto"` keeps decoded images in memory up to this share of what is free.
_CACHE_SHARE_OF_MEMORY = 0.25

# What PIL's many decoders raise for broken files, and what a missing image gives.
_DECODING_ERRORS = (
    OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip

_CROP_AREA = (0.08, 1.0)
_CROP_ASPECT_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10


class ImageDataset(torch.utils.data.Dataset):
    """A labelled image data set as a model takes it: `{"pixel_values": 3×H×W float32, "labels": int}`.

    Given the processor of a teacher that takes other pixels, there are `"teacher_pixel_values"` too: the same view of
    the image, the same crop and the same flip, at the teacher's size and in its numbers.

    Batches are transformed as one array, so that it is fast to fetch many examples at a time (`__getitems__`, which
    torch's `DataLoader` uses).

    Args:
        dataset: With the columns `"image"` and `"label"`, as [`load_image_dataset`] gives it.
        processor: The model's image processor: size, crop, mean, standard deviation, interpolation.
        augmentation: `"none"`: the processor's own view (for evaluation); `"pad_crop"`: padded by an eighth with
            zeros and cropped at random (for small images); `"random_resized_crop"`: 8 to 100 % of the image at an
            aspect ratio of 3/4 to 4/3 (for large images).
        horizontal_flip: Whether augmented images are mirrored half of the time.
        data_seed: Seed of the augmentation.
        cache_images: `"memory"`: decode every image once, now; `"none"`: decode it each time it is seen;
            `"auto"`: in memory if the images take less than a quarter of what is free.
        train_transform: Called with each PIL image (RGB) instead of all augmentation and normalisation; returns a
            3×H×W tensor. Whether it gives the same pixels after a resume is then up to it.
        teacher_processor: The teacher's image processor; without effect if it gives the same pixels as `processor`.

    Raises:
        InputError: If an argument is unknown, an image cannot be decoded, a processor gives no fixed size, or a
            `train_transform` is to make pixels for a teacher with another processor.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: BaseImageProcessor,
        augmentation: Augmentation = "none",
        horizontal_flip: bool = True,
        data_seed: int = 0,
        cache_images: CacheImages = "auto",
        train_transform: Callable[[Image.Image], torch.Tensor] | None = None,
        teacher_processor: BaseImageProcessor | None = None,
    ):
        if augmentation not in AUGMENTATIONS:
            raise InputError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}.")
        if cache_images not in ("auto", "memory", "none"):
            raise InputError(f"cache_images must be one of auto, memory, none, got {cache_images!r}.")
        self.labels = labels_of(dataset, LABEL_COLUMN)
        self.distinguishes_repetitions = True  # see SampledExamples
        self.class_counts = class_counts(dataset, LABEL_COLUMN)
        self.class_names: list[str] = dataset.features[LABEL_COLUMN].names
        self.augmentation = augmentation
        self.horizontal_flip = horizontal_flip
        self.data_seed = data_seed
        self.train_transform = train_transform
        self._encoded = dataset.select_columns([IMAGE_COLUMN]).cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
        student = Rendering(processor)
        self._renderings = {"pixel_values": student}
        if teacher_processor is not None and not same_pixels(processor, teacher_processor):
            if train_transform is not None:
                raise InputError(
                    "train_transform makes the student's pixels alone, but the teacher's image processor gives "
                    "others: use an augmentation of ImageDataset, or a teacher with the same processor."
                )
            self._renderings["teacher_pixel_values"] = Rendering(teacher_processor, region_of=student)
        # In shared memory, so that workers that stay alive between epochs see it change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

        # What is cached: images at the model's size, or originals where each view is cut out of the original anew.
        self._needs_originals = train_transform is not None or augmentation == "random_resized_crop"
        self._originals: list[np.ndarray] | None = None
        self._views: dict[str, np.ndarray] = {}
        if len(self) and self._should_cache(cache_images):
            indices = logging.tqdm(range(len(self)), desc="Decoding images", leave=False)
            if self._needs_originals:
                self._originals = [np.asarray(_decode_example(self._encoded, index)) for index in indices]
            else:
                self._views = {
                    name: np.empty((len(self), rendering.height, rendering.width, 3), dtype=np.uint8)
                    for name, rendering in self._renderings.items()
                }
                for index in indices:
                    image = _decode_example(self._encoded, index)
                    for name, rendering in self._renderings.items():
                        self._views[name][index] = rendering.view(image)

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded; if not, they are each time they are seen."""
        return bool(self._views) or self._originals is not None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next examples get."""
        self._epoch[0] = epoch

    def describe_views(self) -> dict[str, Any]:
        """Return all that the pixels of an example depend on, beside its number and the epoch, for `TeacherCache`.

        Raises:
            InputError: If they depend on more than that.
        """
        if self.train_transform is not None:
            raise InputError(
                "--teacher_cache does not go with a train_transform, whose pixels may differ each time: use an "
                "augmentation of ImageDataset, or --teacher_cache off."
            )
        return {
            "images": fingerprint(self._encoded),
            "augmentation": self.augmentation,
            "horizontal_flip": self.horizontal_flip,
            "data_seed": self.data_seed,
            "processors": {name: rendering.describe() for name, rendering in self._renderings.items()},
        }

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the examples of these indices; `i + r · len(self)` is image i augmented for the r-th time."""
        repetitions, images = np.divmod(np.asarray(indices), len(self))
        pixels = self._pixels(images, repetitions)
        return [
            {**{name: values[i] for name, values in pixels.items()}, "labels": label}
            for i, label in enumerate(self.labels[images].tolist())
        ]

    # ---- Views ----------------------------------------------------------------------------------------------------

    def _pixels(self, indices: np.ndarray, repetitions: np.ndarray) -> dict[str, torch.Tensor]:
        if self.train_transform is not None:
            return {"pixel_values": torch.stack([self.train_transform(self._original(i)) for i in indices.tolist()])}
        views = self._views_of(indices, repetitions)
        return {name: rendering.normalise(views[name]) for name, rendering in self._renderings.items()}

    def _views_of(self, indices: np.ndarray, repetitions: np.ndarray) -> dict[str, np.ndarray]:
        """B×H×W×3 bytes for each model, of one and the same view of each image."""
        if self.augmentation == "none":
            return self._fixed_size_views(indices)
        num_draws = 3 if self.augmentation == "pad_crop" else 1 + 4 * _CROP_ATTEMPTS
        counters = (indices + repetitions * len(self))[:, None]
        draws = hash_uniform(self.data_seed, int(self._epoch), counters, np.arange(num_draws))
        mirrored = (draws[:, 0] < 0.5) & self.horizontal_flip
        if self.augmentation == "pad_crop":
            student = self._renderings["pixel_values"]
            shifts = draw_shifts(draws[:, 1:], student.height, student.width)
            return {
                name: shift_and_flip(views, shifts, mirrored)
                for name, views in self._fixed_size_views(indices).items()
            }
        images = [self._original(index) for index in indices.tolist()]
        boxes = [random_resized_crop_box(*image.size, draw[1:]) for image, draw in zip(images, draws, strict=True)]
        return {
            name: np.stack([rendering.part(*view) for view in zip(images, boxes, mirrored, strict=True)])
            for name, rendering in self._renderings.items()
        }

    def _fixed_size_views(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if self._views:
            return {name: views[indices] for name, views in self._views.items()}
        images = [_decode_example(self._encoded, index) for index in indices.tolist()]
        return {
            name: np.stack([rendering.view(image) for image in images]) for name, rendering in self._renderings.items()
        }

    def _original(self, index: int) -> Image.Image:
        if self._originals is not None:
            return Image.fromarray(self._originals[index])
        return _decode_example(self._encoded, index)

    # ---- Storage --------------------------------------------------------------------------------------------------

    def _should_cache(self, cache_images: CacheImages) -> bool:
        if cache_images != "auto":
            return cache_images == "memory"
        bytes_per_image = 3.0 * sum(r.height * r.width for r in self._renderings.values())
        if self._needs_originals:
            sample = np.linspace(0, len(self) - 1, num=min(64, len(self)), dtype=int)
            bytes_per_image = 3 * float(
                np.mean([math.prod(_decode_example(self._encoded, int(index)).size) for index in sample])
            )
        copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return bytes_per_image * len(self) * copies <= _CACHE_SHARE_OF_MEMORY * psutil.virtual_memory().available


def default_augmentation(processor: BaseImageProcessor) -> Augmentation:
    """The usual augmentation for a model's image size: `"pad_crop"` up to 64 pixels, `"random_resized_crop"` above."""
    return "pad_crop" if max(output_size(processor)) <= SMALL_IMAGE_SIZE else "random_resized_crop"


def decode_image(stored: dict[str, Any]) -> Image.Image:
    """Decode an image as `datasets` stores it (`{"bytes", "path"}`) to RGB, upright as its EXIF data says."""
    source = io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]
    with Image.open(source) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def _decode_example(encoded: datasets.Dataset, index: int) -> Image.Image:
    stored = encoded[index][IMAGE_COLUMN]
    try:
        return decode_image(stored)
    except _DECODING_ERRORS as error:
        where = f" ({stored['path']})" if stored and stored.get("path") else ""
        raise InputError(
            f"Image {index}{where} cannot be decoded: {error}. Repair or remove it from the data set."
        ) from error


def channel_statistics(dataset: datasets.Dataset, max_images: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the red, green and blue values, in [0, 1], of (up to `max_images`) images.

    Raises:
        InputError: If an image cannot be decoded.
    """
    encoded = dataset.cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
    indices = np.linspace(0, len(dataset) - 1, num=min(max_images, len(dataset)), dtype=int)
    count, total, total_squares = 0, np.zeros(3), np.zeros(3)
    for index in indices.tolist():
        pixels = np.asarray(_decode_example(encoded, index)).reshape(-1, 3) / 255
        count += len(pixels)
        total += pixels.sum(axis=0)
        total_squares += (pixels**2).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(total_squares / count - mean**2, 1e-4))
    return mean.round(4).tolist(), std.round(4).tolist()


def draw_shifts(draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """Turn random numbers into shifts by whole pixels, up to an eighth of the size in each direction.

    Args:
        draws: B×2 numbers in [0, 1): vertically and horizontally.
        height: Of the images, in pixels.
        width: Of the images, in pixels.

    Returns:
        B×2 shifts of the window over the image (down and to the right), as shares of height and width.
    """
    sizes = np.array([height, width])
    pads = np.array([round(height / 8), round(width / 8)])
    return ((draws * (2 * pads + 1)).astype(np.int64) - pads) / sizes


def shift_and_flip(images: np.ndarray, shifts: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Move the window over images, which are zero outside, and mirror some.

    Args:
        images: B×H×W×C bytes.
        shifts: B×2 shares of height and width by which the window is moved down and to the right, rounded to whole
            pixels: images of another size, moved by the same shares, show the same.
        mirrored: B booleans.

    Returns:
        B×H×W×C bytes.
    """
    batch, height, width, _ = images.shape
    down, right = np.rint(shifts * np.array([height, width])).astype(np.int64).T
    pad_rows, pad_columns = int(np.abs(down).max(initial=0)), int(np.abs(right).max(initial=0))
    padded = np.pad(images, ((0, 0), (pad_rows, pad_rows), (pad_columns, pad_columns), (0, 0)))
    columns = np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width))
    return padded[
        np.arange(batch)[:, None, None],
        (down[:, None] + pad_rows + np.arange(height))[:, :, None],
        (right[:, None] + pad_columns + columns)[:, None, :],
    ]


def random_resized_crop_box(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random part of an image (Szegedy et al., 2015, arXiv 1409.4842, section 6).

    The first of ten tries that fits into the image; else the largest central crop within the aspect ratios.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        draws: 4 numbers in [0, 1) per try: area, aspect ratio, position from the left and from the top.
    """
    log_ratios = np.log(_CROP_ASPECT_RATIO)
    for area_draw, ratio_draw, left_draw, top_draw in draws.reshape(-1, 4):
        area = width * height * (_CROP_AREA[0] + area_draw * (_CROP_AREA[1] - _CROP_AREA[0]))
        ratio = math.exp(log_ratios[0] + ratio_draw * (log_ratios[1] - log_ratios[0]))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(left_draw * (width - crop_width + 1))
            top = int(top_draw * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * _CROP_ASPECT_RATIO[1])))
    crop_height = min(height, max(1, round(width / _CROP_ASPECT_RATIO[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height
