"""How an image processor renders an image: which part of it, at what size, with which normalisation.

Views stay bytes during transfer (`PixelBytes`), and become numbers on the model's device.

The processor's own code is used, not imitated. Its arithmetic is measured on black and white images, without a border
that it may add, and inverted to get the underlying bytes; the part of an image that it keeps is found by passing
coordinates through it. So this works with every processor that resizes, crops, and maps bytes to numbers channel by
channel, whatever its options.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from .errors import InputError

#: Left, top, right, bottom, in pixels of the image, not necessarily whole.
Box = tuple[float, float, float, float]

_PROBES = ((96, 64), (64, 96), (80, 80))  # width, height


class PixelBytes:
    """A batch of images as bytes, with the arithmetic that converts them to a model's numbers on its device.

    `.to(device)` returns a tensor, B×3×H×W float32. Only a quarter of its size is transferred between processes and to
    a GPU, which then does the arithmetic. `Trainer` and `accelerate` call it as for any tensor of a batch.

    Args:
        values: B×H×W×3 bytes.
        scale: Factor of each channel.
        shift: Offset of each channel, added to the scaled byte.
    """

    def __init__(self, values: torch.Tensor, scale: tuple[float, ...], shift: tuple[float, ...]):
        self.values, self.scale, self.shift = values, scale, shift

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: str | int | torch.device, non_blocking: bool = False) -> torch.Tensor:
        """Return B×3×H×W float32, on a device."""
        values = self.values.to(device, non_blocking=non_blocking)
        batch, height, width, channels = values.shape
        # By whole rows, as torch takes several times as long with operands of three numbers.
        rows = values.view(batch * height, width * channels).to(torch.float32)
        rows.mul_(_row(self.scale, width, rows.device)).add_(_row(self.shift, width, rows.device))
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def pin_memory(self) -> PixelBytes:
        """Return the same in pinned memory; called by torch's `DataLoader`."""
        return PixelBytes(self.values.pin_memory(), self.scale, self.shift)

    def unbind(self) -> list[PixelBytes]:
        """Return the images one by one, as batches of one."""
        return [PixelBytes(values[None], self.scale, self.shift) for values in self.values]

    @staticmethod
    def join(parts: Sequence[PixelBytes]) -> PixelBytes:
        """Join batches, without a copy if they are the parts of one (see [`whole`]).

        Raises:
            ValueError: If their arithmetic differs.
        """
        first, tensors = parts[0], [part.values for part in parts]
        if any((part.scale, part.shift) != (first.scale, first.shift) for part in parts):
            raise ValueError("Images of data sets with different image processors do not fit into one batch.")
        values = whole(tensors)
        return PixelBytes(torch.cat(tensors) if values is None else values.flatten(0, 1), first.scale, first.shift)


def whole(parts: Sequence[Any]) -> torch.Tensor | None:
    """The tensor of which these are all the parts, in order; `None` if there is none."""
    first = parts[0]
    if not all(isinstance(part, torch.Tensor) for part in parts) or first.requires_grad:
        return None
    begin, step = first.untyped_storage().data_ptr(), first.nbytes
    layout = (first.shape, first.stride(), first.dtype)
    if first.untyped_storage().nbytes() != len(parts) * step or any(
        part.data_ptr() != begin + i * step or (part.shape, part.stride(), part.dtype) != layout
        for i, part in enumerate(parts)
    ):
        return None
    return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))


class Rendering:
    """How a model sees an image.

    Args:
        processor: The model's image processor.
        region_of: Another rendering, whose part of the image is used instead of the processor's own. Without effect if
            both are the same.

    Raises:
        InputError: If the processor gives images of different sizes, or there is a `region_of` and one of both adds
            a border.
    """

    def __init__(self, processor: BaseImageProcessor, region_of: Rendering | None = None):
        self.processor = processor
        height, width = output_size(processor)
        self.size = width, height
        resample = getattr(processor, "resample", None)
        self._resample = PILImageResampling.BILINEAR if resample is None else resample  # NEAREST is 0
        #: Converts between RGB and the channel order of this model's bytes, in both directions.
        self.channels = slice(None, None, -1 if getattr(processor, "do_flip_channel_order", False) else 1)
        self._scale, self._shift = _arithmetic(processor)
        if region_of is not None and (_adds_border(processor) or _adds_border(region_of.processor)):
            raise InputError(
                "The image processors of teacher and student differ, and one of them adds a border, so that they "
                "cannot see the same part of an image: set its crop_size to at most its size, in its "
                "preprocessor_config.json."
            )
        self._region_of = region_of if region_of is not None and not self._shows_the_same(region_of) else None
        # Images of the model's size that the processor does not change skip it, as it takes longer than decoding 32×32
        # pixels.
        self._shows_as_they_are: tuple[int, int] | None = None
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        if np.array_equal(self.view(Image.fromarray(noise)), noise):
            self._shows_as_they_are = self.size

    def describe(self) -> dict[str, Any]:
        """Return everything that a view depends on beside the image."""
        of_region = None if self._region_of is None else self._region_of.describe()
        return {"processor": json.loads(self.processor.to_json_string()), "region_of": of_region}

    def view(self, image: Image.Image) -> np.ndarray:
        """H×W×3 bytes: the processor's view of the image, before its arithmetic."""
        if image.size == self._shows_as_they_are:
            return np.asarray(image)
        if self._region_of is None:
            return self._bytes(image)
        return self.part(image, self._region_of.region(*image.size))

    def part(self, image: Image.Image, box: Box, mirrored: bool = False) -> np.ndarray:
        """H×W×3 bytes: a part of the image at the model's size, interpolated as the processor does."""
        view = image.resize(self.size, self._resample, box=box)
        if mirrored:
            view = ImageOps.mirror(view)
        return np.asarray(view)[:, :, self.channels]

    def as_pixels(self, views: np.ndarray) -> PixelBytes:
        """B×H×W×3 bytes, with the processor's arithmetic."""
        return PixelBytes(torch.from_numpy(np.ascontiguousarray(views)), self._scale, self._shift)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (renderings live as long as their data set)
    def region(self, width: int, height: int) -> Box:
        """The part that the processor keeps of an image of this size."""
        coordinates = np.zeros((height, width, 3), np.uint8)
        coordinates[:, :, 0] = np.linspace(0, 255, width).round()
        coordinates[:, :, 1] = np.linspace(0, 255, height).round()[:, None]
        seen = self._bytes(Image.fromarray(coordinates)).astype(float)[:, :, self.channels]
        left, right = _ends(seen[:, :, 0].mean(axis=0), width)
        top, bottom = _ends(seen[:, :, 1].mean(axis=1), height)
        return left, top, right, bottom

    def _bytes(self, image: Image.Image) -> np.ndarray:
        """H×W×3 bytes after the processor's own resizing and cropping."""
        pixels = np.moveaxis(_pixel_values(self.processor, image), 0, -1)
        scale, shift = (np.array(values, dtype=np.float32) for values in (self._scale, self._shift))
        return np.rint((pixels - shift) / scale).clip(0, 255).astype(np.uint8)

    def _shows_the_same(self, other: Rendering) -> bool:
        return all(
            np.allclose(self.region(*size), other.region(*size), rtol=0, atol=0.01 * max(size)) for size in _PROBES
        )


def same_pixels(first: BaseImageProcessor, second: BaseImageProcessor) -> bool:
    """Whether two processors give the same numbers for the same image."""
    generator = np.random.default_rng(0)
    for width, height in _PROBES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        ours, theirs = _pixel_values(first, image), _pixel_values(second, image)
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
            return False
    return True


def set_image_size(processor: BaseImageProcessor, image_size: int) -> None:
    """Set the height and width of a processor's output; a processor that crops keeps the same part of an image.

    Raises:
        InputError: If that is impossible.
    """
    square, before = {"height": image_size, "width": image_size}, output_size(processor)
    crops = getattr(processor, "do_center_crop", False)
    if processor.size and "height" not in processor.size:
        name, edge = next(iter(dict(processor.size).items()))
        processor.size = {name: round(edge * image_size / min(before)) if crops else image_size}
    elif processor.size and crops:
        processor.size = {name: round(edge * image_size / min(before)) for name, edge in dict(processor.size).items()}
    else:
        processor.size = square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square
    if (found := output_size(processor)) != (image_size, image_size):
        raise InputError(
            f"--image_size {image_size}: the image processor ({type(processor).__name__}) gives images of "
            f"{found[0]}×{found[1]} pixels all the same. Set the size in its preprocessor_config.json."
        )


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of a processor's output.

    Raises:
        InputError: If they depend on the image.
    """
    sizes = {_pixel_values(processor, Image.new("RGB", size)).shape[1:] for size in _PROBES}
    if len(sizes) != 1:
        raise InputError(
            f"The image processor ({type(processor).__name__}) gives images of different sizes, which do not fit into "
            "a batch: set a fixed size (height and width) or a centre crop in its preprocessor_config.json."
        )
    return sizes.pop()


def _pixel_values(processor: BaseImageProcessor, image: Image.Image) -> np.ndarray:
    """3×H×W, the processor's output."""
    return np.asarray(processor(images=[image], return_tensors="np")["pixel_values"][0])


def _arithmetic(processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of each channel that turn a byte into the processor's number."""
    black, white = _black_and_white(processor, _PROBES[0])
    inside = ~_border(black, white)
    shift = black[:, inside].mean(axis=1, dtype=np.float64)
    scale = (white[:, inside].mean(axis=1, dtype=np.float64) - shift) / 255
    return tuple(scale.tolist()), tuple(shift.tolist())


def _border(black: np.ndarray, white: np.ndarray) -> np.ndarray:
    """H×W booleans: pixels that are the same for a black and a white image, as the processor adds them."""
    return (black == white).all(axis=0)


def _adds_border(processor: BaseImageProcessor) -> bool:
    return any(_border(*_black_and_white(processor, size)).any() for size in _PROBES)


def _black_and_white(processor: BaseImageProcessor, size: tuple[int, int]) -> list[np.ndarray]:
    """What the processor makes of a black and a white image of this size."""
    return [_pixel_values(processor, Image.new("RGB", size, (byte,) * 3)) for byte in (0, 255)]


@functools.lru_cache(maxsize=64)
def _row(values: tuple[float, ...], width: int, device: torch.device) -> torch.Tensor:
    """One value for each channel, repeated for a row of pixels; cached, as each copy to a GPU takes time."""
    return torch.tensor(values, dtype=torch.float32).repeat(width).to(device)


def _ends(values: np.ndarray, length: int) -> tuple[float, float]:
    """Begin and end of a line of pixels, each of which holds its coordinate (0 to 255 over `length`)."""
    margin = values.size // 8  # interpolation distorts the coordinates at the image's borders
    inside = np.arange(margin, values.size - margin)
    if length < 2 or inside.size < 2:
        return 0.0, float(length)
    slope, start = np.polyfit(inside + 0.5, values[inside] / 255 * (length - 1) + 0.5, 1)
    return float(max(0.0, start)), float(min(length, start + slope * values.size))
