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

from .data import IMAGE_COLUMN, LABEL_COLUMN, class_counts, labels_of
from .errors import InputError
from .randomness import hash_uniform

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

    Raises:
        InputError: If an argument is unknown, an image cannot be decoded, or the processor gives no fixed size.
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
        self._processor = processor
        self._scale, self._shift = _normalisation(processor)
        self.height, self.width = output_size(processor)
        # In shared memory, so that workers that stay alive between epochs see it change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

        # What is cached: images at the model's size, or originals where each view is cut out of the original anew.
        self._needs_originals = train_transform is not None or augmentation == "random_resized_crop"
        self._cache: np.ndarray | list[np.ndarray] | None = None
        if len(self) and self._should_cache(cache_images):
            indices = logging.tqdm(range(len(self)), desc="Decoding images", leave=False)
            if self._needs_originals:
                self._cache = [np.asarray(_decode_example(self._encoded, index)) for index in indices]
            else:
                self._cache = np.empty((len(self), self.height, self.width, 3), dtype=np.uint8)
                for index in indices:
                    self._cache[index] = self._fixed_size_view(index)

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded; if not, they are each time they are seen."""
        return self._cache is not None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next examples get."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the examples of these indices; `i + r · len(self)` is image i augmented for the r-th time."""
        repetitions, images = np.divmod(np.asarray(indices), len(self))
        pixel_values = self._pixel_values(images, repetitions)
        return [
            {"pixel_values": pixels, "labels": label}
            for pixels, label in zip(pixel_values, self.labels[images].tolist(), strict=True)
        ]

    # ---- Views ----------------------------------------------------------------------------------------------------

    def _pixel_values(self, indices: np.ndarray, repetitions: np.ndarray) -> torch.Tensor:
        if self.train_transform is not None:
            return torch.stack([self.train_transform(self._original(index)) for index in indices.tolist()])
        return self._normalise(self._augmented_views(indices, repetitions))

    def _augmented_views(self, indices: np.ndarray, repetitions: np.ndarray) -> np.ndarray:
        """B×H×W×3 bytes."""
        if self.augmentation == "none":
            return self._fixed_size_views(indices)
        num_draws = 3 if self.augmentation == "pad_crop" else 1 + 4 * _CROP_ATTEMPTS
        counters = (indices + repetitions * len(self))[:, None]
        draws = hash_uniform(self.data_seed, int(self._epoch), counters, np.arange(num_draws))
        mirrored = (draws[:, 0] < 0.5) & self.horizontal_flip
        if self.augmentation == "pad_crop":
            return shift_and_flip(self._fixed_size_views(indices), draws[:, 1:], mirrored)
        return np.stack(
            [
                self._random_resized_crop(self._original(index), draw[1:], flip)
                for index, draw, flip in zip(indices.tolist(), draws, mirrored, strict=True)
            ]
        )

    def _random_resized_crop(self, image: Image.Image, draws: np.ndarray, mirrored: bool) -> np.ndarray:
        box = random_resized_crop_box(image.width, image.height, draws)
        view = image.resize((self.width, self.height), self._processor.resample, box=box)
        if mirrored:
            view = ImageOps.mirror(view)
        pixels = np.asarray(view)
        return pixels[:, :, ::-1] if getattr(self._processor, "do_flip_channel_order", False) else pixels

    def _fixed_size_views(self, indices: np.ndarray) -> np.ndarray:
        if isinstance(self._cache, np.ndarray):
            return self._cache[indices]
        return np.stack([self._fixed_size_view(index) for index in indices.tolist()])

    def _fixed_size_view(self, index: int) -> np.ndarray:
        """H×W×3 bytes: what the processor makes of the image, before its arithmetic."""
        return _geometry(self._processor, _decode_example(self._encoded, index))

    def _original(self, index: int) -> Image.Image:
        return (
            Image.fromarray(self._cache[index])
            if isinstance(self._cache, list)
            else _decode_example(self._encoded, index)
        )

    def _normalise(self, views: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(views)).to(torch.float32)
        return pixels.mul_(self._scale).add_(self._shift).permute(0, 3, 1, 2)

    # ---- Storage --------------------------------------------------------------------------------------------------

    def _should_cache(self, cache_images: CacheImages) -> bool:
        if cache_images != "auto":
            return cache_images == "memory"
        bytes_per_image = 3.0 * self.height * self.width
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


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that a processor gives.

    Raises:
        InputError: If they depend on the image.
    """
    sizes = {_geometry(processor, Image.new("RGB", size)).shape[:2] for size in ((96, 64), (64, 96))}
    if len(sizes) != 1:
        raise InputError(
            f"The image processor ({type(processor).__name__}) gives images of different sizes, which do not fit into "
            "a batch: set a fixed size (height and width) or a centre crop in its preprocessor_config.json."
        )
    return sizes.pop()


def same_pixels(first: BaseImageProcessor, second: BaseImageProcessor) -> bool:
    """Whether two processors make images of the same size, normalised in the same way."""
    arithmetic = (torch.cat(_normalisation(first)), torch.cat(_normalisation(second)))
    return output_size(first) == output_size(second) and torch.allclose(*arithmetic, rtol=1e-4, atol=1e-6)


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


def shift_and_flip(images: np.ndarray, draws: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Pad with zeros by an eighth of the size, crop back at random, mirror some.

    Args:
        images: B×H×W×C bytes.
        draws: B×2 numbers in [0, 1): where the crop lies, vertically and horizontally.
        mirrored: B booleans.

    Returns:
        B×H×W×C bytes.
    """
    batch, height, width, _ = images.shape
    pad_rows, pad_columns = round(height / 8), round(width / 8)
    padded = np.pad(images, ((0, 0), (pad_rows, pad_rows), (pad_columns, pad_columns), (0, 0)))
    top = (draws[:, 0] * (2 * pad_rows + 1)).astype(np.int64)
    left = (draws[:, 1] * (2 * pad_columns + 1)).astype(np.int64)
    columns = np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width))
    return padded[
        np.arange(batch)[:, None, None],
        (top[:, None] + np.arange(height))[:, :, None],
        (left[:, None] + columns)[:, None, :],
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


def _geometry(processor: BaseImageProcessor, image: Image.Image) -> np.ndarray:
    """H×W×3 bytes after the processor's own resizing and cropping."""
    processed = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return np.moveaxis(np.asarray(processed), 0, -1).astype(np.uint8)


def _normalisation(processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of each channel that turn a byte into what the processor would make of it."""
    factor = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
    mean, std = np.zeros(3), np.ones(3)
    if getattr(processor, "do_normalize", False):
        mean, std = np.broadcast_to(processor.image_mean, 3), np.broadcast_to(processor.image_std, 3)
    scale, shift = factor / std, -mean / std
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(shift, dtype=torch.float32)
