"""From stored images to a model's pixels: decoding, caching, augmentation, normalisation.

Augmentation is a function of (seed, epoch, index): the same pixels for any number of workers and processes.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import numpy as np
import PIL
import psutil
import torch
import transformers
import xxhash
from numpy.lib.stride_tricks import sliding_window_view
from PIL import ExifTags, Image, ImageOps
from transformers import default_data_collator
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .data import IMAGE_COLUMN, LABEL_COLUMN, class_counts, fingerprint, labels_of
from .errors import InputError
from .image_cache import shared_images
from .randomness import hash_uniform
from .views import Box, PixelBytes, Rendering, output_size, same_pixels, whole

logger = logging.get_logger(__name__)

Augmentation = Literal["none", "pad_crop", "random_resized_crop"]
AUGMENTATIONS: tuple[Augmentation, ...] = ("none", "pad_crop", "random_resized_crop")
CacheImages = Literal["auto", "memory", "disk", "none"]
CACHE_IMAGES: tuple[CacheImages, ...] = ("auto", "memory", "disk", "none")

#: Up to this many pixels a side, images are shifted by padding and cropping; larger ones by random resized crops.
SMALL_IMAGE_SIZE = 64
#: `cache_images="auto"` keeps decoded images up to this share of the memory that is free.
_CACHE_SHARE_OF_MEMORY = 0.25

# What PIL's many decoders raise for broken files, and what a missing image gives.
_DECODING_ERRORS = (
    OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip

# Whose decoder can give 1/2, 1/4 and 1/8 of the size; MPO is several JPEGs in a file.
_REDUCIBLE_FORMATS = ("JPEG", "MPO")
# Values of EXIF's orientation: the stored image's rows are columns; its last column, or row, comes first.
_TURNED, _FROM_THE_RIGHT, _FROM_BELOW = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)

_CROP_AREA = (0.08, 1.0)
_CROP_ASPECT_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10

_T = TypeVar("_T")


class ImageDataset(torch.utils.data.Dataset):
    """A labelled image data set as a model takes it: `{"pixel_values": 3×H×W float32, "labels": int}`.

    Given the processor of a teacher that takes other pixels, there are `"teacher_pixel_values"` too: the same view of
    the image, the same crop and the same flip, at the teacher's size and in its numbers.

    Batches are transformed as one array, so that it is fast to fetch many examples at a time (`__getitems__`, which
    torch's `DataLoader` uses), and to put them together by [`collate_images`].

    Args:
        dataset: With the columns `"image"` and `"label"`, as [`load_image_dataset`] gives it.
        processor: The model's image processor: size, crop, mean, standard deviation, interpolation.
        augmentation: `"none"`: the processor's own view (for evaluation); `"pad_crop"`: padded by an eighth with
            zeros and cropped at random (for small images); `"random_resized_crop"`: 8 to 100 % of the image at an
            aspect ratio of 3/4 to 4/3 (for large images).
        horizontal_flip: Whether augmented images are mirrored half of the time.
        data_seed: Seed of the augmentation.
        cache_images: `"memory"`: decode every image once, now; `"disk"`: the same, into a file that the processes of
            this machine share and that later runs on the same images find (see `bkd_hf.image_cache`); `"none"`:
            decode it each time it is seen; `"auto"`: in memory, if the images take less than a quarter of what is
            free; where this machine runs several processes (`LOCAL_WORLD_SIZE`), on the disk, if they take less than
            a quarter of its memory.
        train_transform: Called with each PIL image (RGB) instead of all augmentation and normalisation; returns a
            3×H×W tensor. Whether it gives the same pixels after a resume is then up to it.
        teacher_processor: The teacher's image processor; without effect if it gives the same pixels as `processor`.
        cache_dir: Folder of the decoded images on the disk; by default `bkd_hf` in the cache folder of `datasets`.
        reduced_decoding: Whether JPEGs are decoded only as large as their random resized crop needs, which is up to
            twice as fast and alters pixels a little: see [`decode_for_crop`]. Images that are large enough for it are
            decoded each time, wherever the others are kept.
        as_bytes: Whether pixels stay bytes ([`PixelBytes`], put together by [`collate_images`]) until a batch is sent
            to the model's device: less to carry for workers, and for the way to a GPU. The numbers are the same.

    Raises:
        InputError: If an argument is unknown, an image cannot be decoded, a processor gives no fixed size, a
            `train_transform` is to make pixels for a teacher with another processor, or the disk is full.
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
        cache_dir: str | os.PathLike[str] | None = None,
        reduced_decoding: bool = True,
        as_bytes: bool = False,
    ):
        if augmentation not in AUGMENTATIONS:
            raise InputError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}.")
        if cache_images not in CACHE_IMAGES:
            raise InputError(f"cache_images must be one of {', '.join(CACHE_IMAGES)}, got {cache_images!r}.")
        self.labels = labels_of(dataset, LABEL_COLUMN)
        self.distinguishes_repetitions = True  # see SampledExamples
        self.class_counts = class_counts(dataset, LABEL_COLUMN)
        self.class_names: list[str] = dataset.features[LABEL_COLUMN].names
        self.augmentation = augmentation
        self.horizontal_flip = horizontal_flip
        self.data_seed = data_seed
        self.train_transform = train_transform
        self.as_bytes = as_bytes
        self._stored = _StoredImages(dataset)
        student = Rendering(processor)
        self._renderings = {"pixel_values": student}
        if teacher_processor is not None and not same_pixels(processor, teacher_processor):
            if train_transform is not None:
                raise InputError(
                    "train_transform makes the student's pixels alone, but the teacher's image processor gives "
                    "others: use an augmentation of ImageDataset, or a teacher with the same processor."
                )
            self._renderings["teacher_pixel_values"] = Rendering(teacher_processor, region_of=student)
        # Width and height for which JPEGs may be decoded smaller; the same with and without the teacher's rendering.
        self._reduced_for = None
        if reduced_decoding and augmentation == "random_resized_crop" and train_transform is None:
            self._reduced_for = [(rendering.width, rendering.height) for rendering in self._renderings.values()]
        self._size_kept = {name: _size_kept(rendering) for name, rendering in self._renderings.items()}
        # In shared memory, so that workers that stay alive between epochs see it change.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

        # What is cached: images at the models' sizes, or originals where each view is cut out of the original anew.
        self._needs_originals = train_transform is not None or augmentation == "random_resized_crop"
        self._cached: dict[str, Any] = {}
        if len(self) and cache_images != "none":
            self._fill_cache(cache_images, Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE, "bkd_hf")))

    @property
    def in_memory(self) -> bool:
        """Whether decoded images are kept, in memory or in a mapped file; if not, each is decoded when it is seen."""
        return bool(self._cached)

    @property
    def needs_workers(self) -> bool:
        """Whether other processes should prepare the batches.

        Not if images are decoded and at most 64 pixels wide and high: to receive such a batch takes as long as to
        make it (128 images of 32×32 pixels: 1.4 and 1.6 ms).
        """
        size = max(max(rendering.height, rendering.width) for rendering in self._renderings.values())
        return not self._cached or self._needs_originals or size > SMALL_IMAGE_SIZE

    def for_student_alone(self) -> ImageDataset:
        """Return the same views without those for the teacher, which then cost nothing, at the same epoch always."""
        alone = copy.copy(self)
        alone._renderings = {"pixel_values": self._renderings["pixel_values"]}
        return alone

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next examples get."""
        self._epoch[0] = epoch

    def describe_views(self) -> dict[str, Any]:
        """Return all that the pixels of an example depend on, beside its number and the epoch (for a `LogitsFolder`).

        Raises:
            InputError: If they depend on more than that.
        """
        if self.train_transform is not None:
            raise InputError(
                "--teacher_cache does not go with a train_transform, whose pixels may differ each time: use an "
                "augmentation of ImageDataset, or --teacher_cache off."
            )
        return {
            "images": fingerprint(self._stored.dataset, read_files=True),
            "pillow": PIL.__version__,
            "augmentation": self.augmentation,
            "horizontal_flip": self.horizontal_flip,
            "data_seed": self.data_seed,
            "reduced_for": self._reduced_for,
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
        if not self.as_bytes:
            pixels = {name: values.to("cpu") for name, values in pixels.items()}
        examples = zip(*(values.unbind() for values in pixels.values()), strict=True)
        return [
            {**dict(zip(pixels, values, strict=True)), "labels": label}
            for values, label in zip(examples, self.labels[images].tolist(), strict=True)
        ]

    # ---- Views ----------------------------------------------------------------------------------------------------

    def _pixels(self, indices: np.ndarray, repetitions: np.ndarray) -> dict[str, PixelBytes | torch.Tensor]:
        if self.train_transform is not None:
            return {"pixel_values": torch.stack([self.train_transform(self._original(i)) for i in indices.tolist()])}
        views = self._views_of(indices, repetitions)
        return {name: rendering.as_pixels(views[name]) for name, rendering in self._renderings.items()}

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
        views = self._empty_views(len(indices))
        for position, (index, draw, flip) in enumerate(zip(indices.tolist(), draws[:, 1:], mirrored, strict=True)):
            image, box = self._crop(index, functools.partial(random_resized_crop_box, draws=draw))
            for name, rendering in self._renderings.items():
                views[name][position] = rendering.part(image, box, flip)
        return views

    def _crop(self, index: int, choose_box: Callable[[int, int], Box]) -> tuple[Image.Image, Box]:
        """As much of an image as the models need to see a part of it, and where in that the part is."""
        kept = self._kept(index)
        if kept is not None:
            return kept, choose_box(*kept.size)
        return self._stored.read(
            index, functools.partial(decode_for_crop, choose_box=choose_box, sizes=self._reduced_for)
        )

    def _fixed_size_views(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if self._cached:
            return {name: self._cached[name][indices] for name in self._renderings}
        return self._gathered((self._processed(index) for index in indices.tolist()), len(indices))

    def _processed(self, index: int) -> dict[str, np.ndarray]:
        """H×W×3 bytes for each model: what its processor makes of an image."""
        image = self._stored.read(index, decode_image)
        return {
            name: np.asarray(image) if image.size == self._size_kept[name] else rendering.view(image)
            for name, rendering in self._renderings.items()
        }

    def _gathered(self, images: Iterable[dict[str, np.ndarray]], number: int) -> dict[str, np.ndarray]:
        views = self._empty_views(number)
        for position, views_of_one in enumerate(images):
            for name, view in views_of_one.items():
                views[name][position] = view
        return views

    def _empty_views(self, number: int) -> dict[str, np.ndarray]:
        return {name: np.empty((number, r.height, r.width, 3), np.uint8) for name, r in self._renderings.items()}

    def _original(self, index: int) -> Image.Image:
        kept = self._kept(index)
        return self._stored.read(index, decode_image) if kept is None else kept

    def _kept(self, index: int) -> Image.Image | None:
        """A decoded original, if it is there."""
        pixels = self._cached["original"][index] if self._cached else None
        return None if pixels is None or not pixels.size else Image.fromarray(pixels)

    # ---- Cache ----------------------------------------------------------------------------------------------------

    def _fill_cache(self, cache_images: CacheImages, folder: Path) -> None:
        place = _place_for(self._num_bytes()) if cache_images == "auto" else cache_images
        if place == "disk":
            names = ["original"] if self._needs_originals else list(self._renderings)
            try:
                self._cached.update(
                    shared_images(folder / self._cache_key(), names, self._decode_all, self._num_bytes)
                )
            except OSError as error:
                message = f"Decoded images cannot be kept in {folder}: {error}."
                if cache_images == "disk":
                    raise InputError(
                        f"{message} Name a folder on another disk (cache_dir, or the environment variable "
                        'HF_DATASETS_CACHE), or choose cache_images "memory" or "none".'
                    ) from error
                logger.warning(f"{message} Each process decodes them for itself.")
                place = _place_for(self._num_bytes(), shared=False)
        if place == "memory" and self._needs_originals:
            self._cached = {"original": [images["original"] for images in self._decode_all()]}
        elif place == "memory":
            self._cached = dict(self._gathered(self._decode_all(), len(self)))

    def _decode_all(self) -> Iterator[dict[str, np.ndarray]]:
        """What is cached of each image, by name: H×W×3 bytes."""
        for index in logging.tqdm(range(len(self)), desc="Decoding images", leave=False):
            if self._needs_originals:
                yield {"original": self._stored.read(index, self._kept_original)}
            else:
                yield self._processed(index)

    def _num_bytes(self) -> int:
        """Size of all that is cached: of originals, about."""
        if not self._needs_originals:
            return 3 * len(self) * sum(r.height * r.width for r in self._renderings.values())
        sample = np.linspace(0, len(self) - 1, num=min(64, len(self)), dtype=int).tolist()
        return round(3 * len(self) * np.mean([self._stored.read(index, self._num_pixels_kept) for index in sample]))

    def _num_pixels_kept(self, stored: dict[str, Any]) -> int:
        with _open(stored) as image:
            return 0 if self._may_be_reduced(image) else math.prod(image.size)

    def _kept_original(self, stored: dict[str, Any]) -> np.ndarray:
        """H×W×3 bytes of an image; 0×0×3 of one that is decoded anew for each view, at the size that it needs.

        So what is kept decides how long a view takes, and not what it shows.
        """
        with _open(stored) as image:
            return np.zeros((0, 0, 3), np.uint8) if self._may_be_reduced(image) else np.asarray(_upright_rgb(image))

    def _may_be_reduced(self, image: Image.Image) -> bool:
        """Whether some crops of a stored image are decoded at half of its size, or less (see `decode_for_crop`)."""
        if self._reduced_for is None or image.format not in _REDUCIBLE_FORMATS:
            return False
        either_way_up = (image.size, image.size[::-1])
        return any(
            all(w >= 2 * width and h >= 2 * height for width, height in self._reduced_for) for w, h in either_way_up
        )

    def _cache_key(self) -> str:
        """A name for what is cached that says all on which its content depends."""
        made_by: dict[str, Any] = {"pillow": PIL.__version__}
        if self._needs_originals:
            made_by["reduced_for"] = self._reduced_for
        else:
            made_by["transformers"] = transformers.__version__
            made_by |= {name: rendering.describe() for name, rendering in self._renderings.items()}
        digest = xxhash.xxh3_128(json.dumps(made_by).encode())
        for index in range(len(self)):
            identity = self._stored.read(index, _identity)
            digest.update(len(identity).to_bytes(8, "little"))  # where each begins
            digest.update(identity)
        return f"{'originals' if self._needs_originals else 'views'}-{digest.hexdigest()}"


def default_augmentation(processor: BaseImageProcessor) -> Augmentation:
    """The usual augmentation for a model's image size: `"pad_crop"` up to 64 pixels, `"random_resized_crop"` above."""
    return "pad_crop" if max(output_size(processor)) <= SMALL_IMAGE_SIZE else "random_resized_crop"


def default_num_workers(dataset: ImageDataset, num_cores: int, on_cuda: bool) -> int:
    """How many workers should prepare a process's batches, if the user does not say.

    None, where they would not pay (see `ImageDataset.needs_workers`). Else one for each core: to decode a JPEG and cut
    224×224 pixels out of it takes a core 1.5 ms (500×375) to 8 ms (2000×1500), and on the CPU, workers and model take
    turns. A GPU's process keeps one core for itself, and 16 workers, some thousand images a second, suffice for it.

    Args:
        dataset: The training images.
        num_cores: Cores that are available to this process: those of the machine divided among its processes.
        on_cuda: Whether the models are on a GPU.
    """
    if not dataset.needs_workers:
        return 0
    return min(max(1, num_cores - 1), 16) if on_cuda else num_cores


def collate_images(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Put examples together to a batch, as `transformers`' `default_data_collator` does.

    Tensors that are the successive parts of one tensor, as those of [`ImageDataset`]'s `__getitems__` are, are not
    copied: the batch is that tensor.
    """
    names = [name for name in examples[0] if name not in ("label", "label_ids")]  # which get another name
    batch: dict[str, Any] = {}
    for name in names:
        parts = [example[name] for example in examples]
        joined = PixelBytes.join(parts) if isinstance(parts[0], PixelBytes) else whole(parts)
        if joined is not None:
            batch[name] = joined
    others = [{name: value for name, value in example.items() if name not in batch} for example in examples]
    return {**batch, **default_data_collator(others)}


# ---- Decoding -----------------------------------------------------------------------------------------------------


def decode_image(stored: dict[str, Any]) -> Image.Image:
    """Decode an image as `datasets` stores it (`{"bytes", "path"}`) to RGB, upright as its EXIF data says."""
    with _open(stored) as image:
        return _upright_rgb(image)


def decode_for_crop(
    stored: dict[str, Any],
    choose_box: Callable[[int, int], Box],
    sizes: Sequence[tuple[int, int]] | None,
) -> tuple[Image.Image, Box]:
    """Decode as much of an image as it takes to show a part of it.

    A JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size at which the part is still as large as it
    will be shown: the decoder leaves out the fine detail. Other formats are decoded in full. For views of 224×224
    pixels this takes 0.5 times as long with photographs of 2000×1500, 0.8 times with 1024×768, and is no gain with
    500×375, whose crops need all pixels. Views that are decoded so differ by 0.6 to 1.2 of 255 in the mean.

    Args:
        stored: As for [`decode_image`].
        choose_box: Called with the width and the height of the upright image: the part.
        sizes: Width and height at which the part will be shown, in pixels, of each model; `None` to decode in full.

    Returns:
        The image, RGB and upright, and the part's place in it.
    """
    with _open(stored) as image:
        if sizes is None or image.format not in _REDUCIBLE_FORMATS:
            image = _upright_rgb(image)
            return image, choose_box(*image.size)
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        width, height = image.size[::-1] if orientation in _TURNED else image.size
        left, top, right, bottom = choose_box(width, height)
        spare = min(min((right - left) / w, (bottom - top) / h) for w, h in sizes)
        factor = next((factor for factor in (8, 4, 2) if factor <= spare), 1)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        image = _upright_rgb(image)
        # The decoder completes the last column and row; where these come first now, all else has moved.
        x = image.width - width / factor if orientation in _FROM_THE_RIGHT else 0
        y = image.height - height / factor if orientation in _FROM_BELOW else 0
        return image, (left / factor + x, top / factor + y, right / factor + x, bottom / factor + y)


class _StoredImages:
    """The images of a data set as they are stored: `bytes`, or None and the `path` of a file.

    Read from its table directly: through the data set's own indexing it takes five times as long, a third of the time
    to decode 32×32 pixels.
    """

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.select_columns([IMAGE_COLUMN]).cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
        self._find()

    def _find(self) -> None:
        self._column = self.dataset.data.column(IMAGE_COLUMN)
        selection = self.dataset._indices
        self._rows = None if selection is None else selection.column(0)

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset}  # which is pickled as the files that it is mapped from

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find()

    def read(self, index: int, how: Callable[[dict[str, Any]], _T]) -> _T:
        """Read an image in some way, e.g. by [`decode_image`]; an `InputError` says which one is broken."""
        row = index if self._rows is None else self._rows[index].as_py()
        stored = self._column[row].as_py()
        try:
            return how(stored)
        except _DECODING_ERRORS as error:
            where = f" ({stored['path']})" if stored and stored.get("path") else ""
            raise InputError(
                f"Image {index}{where} cannot be decoded: {error}. Repair or remove it from the data set."
            ) from error


def _open(stored: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])


def _upright_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # what convert() would clip
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Bytes of 16-bit, 32-bit and floating-point images; how much white is, where the mode leaves it open, they show.

    Raises:
        ValueError: If they do not.
    """
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (255 if mode == "F" else 65535)):
        known = "0 to 1 or 0 to 255" if mode == "F" else "0 to 255 or 0 to 65535"
        raise ValueError(f"its values run from {low:g} to {high:g}, where {known} is understood")
    if mode == "F":
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    # Some versions of Pillow open 16-bit files as 32 bits.
    return (values >> (0 if mode == "I" and high <= 255 else 8)).astype(np.uint8)


def _identity(stored: dict[str, Any]) -> bytes:
    """What tells a stored image from others: its bytes, or those of the name, size and time of its file."""
    if stored["bytes"] is not None:
        return stored["bytes"]
    status = os.stat(stored["path"])
    return f"{stored['path']} {status.st_size} {status.st_mtime_ns}".encode()


def _size_kept(rendering: Rendering) -> tuple[int, int] | None:
    """Width and height of the images that a processor shows as they are, if there is such a size.

    They need not be sent through it, which takes longer than to decode 32×32 pixels.
    """
    noise = np.random.default_rng(0).integers(0, 256, (rendering.height, rendering.width, 3), dtype=np.uint8)
    kept = np.array_equal(rendering.view(Image.fromarray(noise)), noise)
    return (rendering.width, rendering.height) if kept else None


def _place_for(num_bytes: int, shared: bool = True) -> CacheImages:
    """Where `cache_images="auto"` keeps decoded images of this size, if processes may share them."""
    if not num_bytes:
        return "none"
    processes, memory = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), psutil.virtual_memory()
    if processes == 1:
        return "memory" if num_bytes <= _CACHE_SHARE_OF_MEMORY * memory.available else "none"
    # What is free changes by the moment, and all processes have to decide alike.
    copies = 1 if shared else processes
    fits = num_bytes * copies <= _CACHE_SHARE_OF_MEMORY * memory.total
    return ("disk" if shared else "memory") if fits else "none"


def channel_statistics(dataset: datasets.Dataset, max_images: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the red, green and blue values, in [0, 1], of (up to `max_images`) images.

    Raises:
        InputError: If an image cannot be decoded.
    """
    stored = _StoredImages(dataset)
    indices = np.linspace(0, len(dataset) - 1, num=min(max_images, len(dataset)), dtype=int)
    count, total, total_squares = 0, np.zeros(3), np.zeros(3)
    for index in indices.tolist():
        pixels = np.asarray(stored.read(index, decode_image)).reshape(-1, 3) / 255
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
    batch, height, width, channels = images.shape
    down, right = np.rint(shifts * np.array([height, width])).astype(np.int64).T
    rows, columns = int(np.abs(down).max(initial=0)), int(np.abs(right).max(initial=0))
    padded = np.zeros((batch, height + 2 * rows, width + 2 * columns, channels), dtype=np.uint8)
    padded[:, rows : rows + height, columns : columns + width] = images
    # Whole rows and whole pixels are copied, which is seven times as fast as indexing each byte.
    windows = sliding_window_view(padded, (height, width), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    moved = np.ascontiguousarray(windows[np.arange(batch), down + rows, right + columns])
    pixels = moved.view(f"V{channels}")
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    return moved


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
