"""Operations on the pixels of training images, after the view is chosen: a table with one line and function each.

Their random numbers are hashes of (seed, epoch, index), like those of the views. Kernels, lists of kernels and
magnitudes are those of the papers, and equal torchvision's for PIL images to the byte (nearest pixel, black outside),
except that torchvision rounds magnitudes to single precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets.fingerprint import Hasher
from PIL import Image, ImageEnhance, ImageOps

from .augmentations import first_fitting_box

#: Width and height of the view that defines magnitudes: the student's. Shifts and erased areas, in its pixels, are the
#: same fractions of a teacher's view of another size.
Size = tuple[int, int]


class Operation(NamedTuple):
    """An operation on training images.

    Attributes:
        apply: Function of an image (H×W×3 bytes, red first), `num_draws` numbers in [0, 1) and the size that defines
            magnitudes. Returns H×W×3 bytes.
        num_draws: Random numbers per image.
        title: Name in the card.
        source: Number of the paper on arXiv; `None` if it has none.
    """

    apply: Callable[[np.ndarray, np.ndarray, Size], np.ndarray]
    num_draws: int
    title: str
    source: str | None


# ---- Kernels: each is one change of an image, at a magnitude -------------------------------------------------------


class Ranges(NamedTuple):
    """The largest magnitudes.

    Attributes:
        size: Width and height of the view in whose pixels shifts are given.
        right: Horizontal shift in pixels, in either direction.
        down: Vertical shift in pixels, in either direction.
        shear: Pixels by which a row or column is shifted more than the one before.
        angle: In degrees, counter-clockwise.
        factor: Relative change of brightness, colour, contrast and sharpness, up to 1.
        bits: Remaining bits of each byte.
    """

    size: Size
    right: float
    down: float
    shear: float
    angle: float
    factor: float
    bits: int


def usual_ranges(size: Size) -> Ranges:
    """Ranges of AutoAugment and RandAugment: 150 of 331 pixels, as on ImageNet, for any image size."""
    return Ranges(size, 150 / 331 * size[0], 150 / 331 * size[1], shear=0.3, angle=30, factor=0.9, bits=4)


def wide_ranges(size: Size) -> Ranges:
    """Ranges of TrivialAugment: 32 pixels for any image size."""
    return Ranges(size, 32, 32, shear=0.99, angle=135, factor=0.99, bits=2)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Show at (x, y) what was at (ax + by + c, dx + ey + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0)


def _move(image: Image.Image, right: float, down: float, size: Size) -> Image.Image:
    """Move by whole pixels of a view of this size."""
    x, y = (round(int(step) * own / of) for step, own, of in zip((right, down), image.size, size, strict=True))
    return _affine(image, 1, 0, -x, 0, 1, -y)


#: Functions of an image, a fraction of the largest magnitude in [-1, 1] (some ignore the sign), and `Ranges`.
KERNELS: dict[str, Callable[[Image.Image, float, Ranges], Image.Image]] = {
    "Identity": lambda image, share, most: image,
    "ShearX": lambda image, share, most: _affine(image, 1, share * most.shear, 0, 0, 1, 0),
    "ShearY": lambda image, share, most: _affine(image, 1, 0, 0, share * most.shear, 1, 0),
    "TranslateX": lambda image, share, most: _move(image, share * most.right, 0, most.size),
    "TranslateY": lambda image, share, most: _move(image, 0, share * most.down, most.size),
    "Rotate": lambda image, share, most: image.rotate(share * most.angle),
    "Brightness": lambda image, share, most: ImageEnhance.Brightness(image).enhance(1 + share * most.factor),
    "Color": lambda image, share, most: ImageEnhance.Color(image).enhance(1 + share * most.factor),
    "Contrast": lambda image, share, most: ImageEnhance.Contrast(image).enhance(1 + share * most.factor),
    "Sharpness": lambda image, share, most: ImageEnhance.Sharpness(image).enhance(1 + share * most.factor),
    "Posterize": lambda image, share, most: ImageOps.posterize(image, 8 - round(abs(share) * (8 - most.bits))),
    "Solarize": lambda image, share, most: ImageOps.solarize(image, 255 - 255 * abs(share)),  # type: ignore[arg-type]
    "AutoContrast": lambda image, share, most: ImageOps.autocontrast(image),
    "Equalize": lambda image, share, most: ImageOps.equalize(image),
    "Invert": lambda image, share, most: ImageOps.invert(image),
}
#: The kernels of RandAugment and TrivialAugment.
COMMON_KERNELS = [name for name in KERNELS if name != "Invert"]


# ---- Operations ---------------------------------------------------------------------------------------------------

#: The 25 sub-policies for CIFAR-10 (arXiv 1805.09501, appendix): two kernels, each with its probability and magnitude
#: (0 to 9; some kernels ignore it).
CIFAR10_POLICY = (
    (("Invert", 0.1, 7), ("Contrast", 0.2, 6)), (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)), (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 8), ("Equalize", 0.9, 2)), (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)), (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 5), ("Equalize", 0.5, 1)), (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)), (("Equalize", 0.3, 7), ("AutoContrast", 0.4, 8)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)), (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 3)), (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 8), ("Equalize", 0.6, 4)), (("Color", 0.9, 9), ("Equalize", 0.6, 6)),
    (("AutoContrast", 0.8, 4), ("Solarize", 0.2, 8)), (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 3)), (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 2), ("Solarize", 0.8, 3)), (("Equalize", 0.8, 8), ("Invert", 0.1, 3)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1)),
)  # fmt: skip


def autoaugment(pixels: np.ndarray, draws: np.ndarray, size: Size) -> np.ndarray:
    """One of 25 sub-policies: two kernels, each with its own probability and magnitude."""
    image, most = Image.fromarray(pixels), usual_ranges(size)
    policy = CIFAR10_POLICY[int(draws[0] * len(CIFAR10_POLICY))]
    for (name, probability, magnitude), chance, sign in zip(policy, draws[1:3], draws[3:5], strict=True):
        if chance < probability:
            image = KERNELS[name](image, _signed(magnitude / 9, sign), most)
    return np.asarray(image)


def randaugment(pixels: np.ndarray, draws: np.ndarray, size: Size) -> np.ndarray:
    """Two kernels of 14, at magnitude 9 of 0 to 30."""
    image, most = Image.fromarray(pixels), usual_ranges(size)
    for kernel, sign in draws.reshape(2, 2):
        image = KERNELS[COMMON_KERNELS[int(kernel * len(COMMON_KERNELS))]](image, _signed(9 / 30, sign), most)
    return np.asarray(image)


def trivialaugment_wide(pixels: np.ndarray, draws: np.ndarray, size: Size) -> np.ndarray:
    """One kernel of 14, at a magnitude of 0 to 30, with wider ranges than RandAugment."""
    kernel, magnitude, sign = draws
    apply = KERNELS[COMMON_KERNELS[int(kernel * len(COMMON_KERNELS))]]
    return np.asarray(apply(Image.fromarray(pixels), _signed(int(magnitude * 31) / 30, sign), wide_ranges(size)))


def cutout(pixels: np.ndarray, draws: np.ndarray, size: Size) -> np.ndarray:
    """Black square of half the (shorter) side around any pixel, clipped at the image's border.

    It is black as in the long-tail recipes, which erase before normalising; the paper's code erases after it, to the
    mean.
    """
    (x, y), half = (int(draw * side) for draw, side in zip(draws, size, strict=True)), min(size) // 4
    return _erase(pixels, (x - half, y - half, x + half, y + half), size)


def random_erasing(pixels: np.ndarray, draws: np.ndarray, size: Size) -> np.ndarray:
    """Black rectangle of 2 to 40 % of the image at an aspect ratio of 0.3 to 1/0.3, half of the time.

    It is black, one of the paper's fills, so that models with different image sizes see the same.
    """
    box = first_fitting_box(*size, draws[1:], (0.02, 0.4), (0.3, 1 / 0.3)) if draws[0] < 0.5 else None
    return pixels if box is None else _erase(pixels, box, size)


#: By name; users can add their own.
OPERATIONS = {
    "autoaugment": Operation(autoaugment, 5, "AutoAugment by the policy for CIFAR-10", "1805.09501"),
    "randaugment": Operation(randaugment, 4, "RandAugment", "1909.13719"),
    "trivialaugment_wide": Operation(trivialaugment_wide, 3, "TrivialAugment", "2103.10158"),
    "cutout": Operation(cutout, 2, "cutout", "1708.04552"),
    "random_erasing": Operation(random_erasing, 1 + 4 * 10, "random erasing", "1708.04896"),
}

_OWN = tuple(OPERATIONS.values())


def identities(names: Sequence[str]) -> list[Any]:
    """Describe operations for a cache: by name, and those of users also by a hash of their code."""
    return [name if OPERATIONS[name] in _OWN else [name, _hash(OPERATIONS[name])] for name in names]


def _hash(operation: Operation) -> str:
    try:
        return Hasher.hash([inspect.getsource(operation.apply), operation.num_draws])
    except (OSError, TypeError):  # typed into a console, or no function
        return Hasher.hash(operation)


def operate(images: np.ndarray, names: Sequence[str], draws: Sequence[np.ndarray], size: Size) -> np.ndarray:
    """Change images by some operations, one after another.

    Args:
        images: B×H×W×3 bytes, red first.
        names: Names of the operations.
        draws: For each of them, B×`num_draws` numbers in [0, 1).
        size: Width and height that define magnitudes.

    Returns:
        B×H×W×3 bytes.
    """
    for name, numbers in zip(names, draws, strict=True):
        apply = OPERATIONS[name].apply
        images = np.stack([apply(pixels, row, size) for pixels, row in zip(images, numbers, strict=True)])
    return images


def _signed(share: float, draw: float) -> float:
    return share if draw < 0.5 else -share


def _erase(pixels: np.ndarray, box: Sequence[int], size: Size) -> np.ndarray:
    """Make a part black: left, top, right, bottom in pixels of a view of this size."""
    height, width, _ = pixels.shape
    left, top, right, bottom = (
        round(min(max(end, 0), of) * own / of)
        for end, of, own in zip(box, (*size, *size), (width, height, width, height), strict=True)
    )
    erased = pixels.copy()
    erased[top:bottom, left:right] = 0
    return erased
