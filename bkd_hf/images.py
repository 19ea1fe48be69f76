"""From stored images to a model's pixels: decoding, augmentation, normalisation.

Augmentation is a function of (seed, epoch, index): the same pixels for any number of workers and processes.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import PIL
import psutil
import torch
import transformers
from PIL import Image
from transformers import default_data_collator
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .augmentations import AUGMENTATIONS, SMALL_IMAGE_SIZE, move_and_mirror
from .data import LABEL_COLUMN, class_counts, class_names, fingerprint, labels_of
from .decoding import (
    KeptImages,
    StoredImages,
    decode_image,
    decode_part,
    may_be_reduced,
    open_image,
    reading,
    shared_images,
    upright_rgb,
)
from .errors import InputError
from .machine import memory_limit
from .operations import OPERATIONS, identities, operate
from .sampling import hash_uniform
from .views import Box, PixelBytes, Rendering, same_pixels, whole

logger = logging.get_logger(__name__)

CacheImages = Literal["auto", "memory", "disk", "none"]
CACHE_IMAGES: tuple[CacheImages, ...] = get_args(CacheImages)

#: `cache_images="auto"` keeps decoded images up to this share of the free memory.
_CACHE_SHARE_OF_MEMORY = 0.25


# ---- The data set -------------------------------------------------------------------------------------------------


class ImageDataset(torch.utils.data.Dataset):
    """A labelled image data set as model inputs: `{"pixel_values": 3×H×W float32, "labels": int}`.

    If the teacher's processor gives other pixels, examples also have `"teacher_pixel_values"`: the same view of the
    image, with the same crop and flip, in the teacher's size and normalisation.

    Batches are transformed as one array, so fetching many examples at a time (`__getitems__`, which torch's
    `DataLoader` uses) and batching them by [`collate_images`] is fast.

    Args:
        dataset: With the columns `"image"` and `"label"`, as returned by [`load_image_dataset`].
        processor: The model's image processor: size, crop, mean, standard deviation, interpolation.
        augmentation: `"none"`: the processor's own view (for evaluation); `"pad_crop"`: padded by an eighth with
            zeros and cropped at random (for small images); `"random_resized_crop"`: 8 to 100 % of the image at an
            aspect ratio of 3/4 to 4/3 (for large images).
        horizontal_flip: Whether augmented images are mirrored half of the time.
        operations: Operations applied in turn to the pixels of these views, with the same random numbers for student
            and teacher: `"autoaugment"`, `"randaugment"`, `"trivialaugment_wide"`, `"cutout"`, `"random_erasing"` (see
            `bkd_hf/operations.py`).
        data_seed: Seed of the augmentation.
        cache_images: `"memory"`: decode every image once, now; `"disk"`: the same, into a file shared by the processes
            of this machine and by later runs on the same images; `"none"`: decode an image each time it is used;
            `"auto"`: in memory, if the images take less than a quarter of the free memory; if this machine runs
            several processes (`LOCAL_WORLD_SIZE`), on disk, if they take less than a quarter of its memory.
        train_transform: Called with each PIL image (RGB) instead of all augmentation and normalisation; returns a
            3×H×W tensor. Whether pixels are the same after a resume then depends on it.
        teacher_processor: The teacher's image processor; without effect if it gives the same pixels as `processor`.
        cache_dir: Folder of the decoded images on disk; by default `bkd_hf` in the cache folder of `datasets`.
        reduced_decoding: Whether JPEGs are decoded only as large as their random resized crop needs, which is up to
            twice as fast and slightly alters pixels: see [`decode_part`]. Images that are large enough for it are
            decoded each time, and not cached like the others.
        as_bytes: Whether pixels stay bytes ([`PixelBytes`], batched by [`collate_images`]) until a batch is sent to
            the model's device, which reduces the transfer from workers and to a GPU. The numbers are the same.

    Raises:
        InputError: If an argument is unknown, an image cannot be decoded, a processor gives no fixed size, a
            `train_transform` is used with a teacher that has another processor, or the disk is full.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        processor: BaseImageProcessor,
        augmentation: str = "none",
        horizontal_flip: bool = True,
        data_seed: int = 0,
        cache_images: CacheImages = "auto",
        train_transform: Callable[[Image.Image], torch.Tensor] | None = None,
        teacher_processor: BaseImageProcessor | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        reduced_decoding: bool = True,
        as_bytes: bool = False,
        operations: Sequence[str] = (),
    ):
        if augmentation not in AUGMENTATIONS:
            raise InputError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}.")
        if unknown := [name for name in operations if name not in OPERATIONS]:
            raise InputError(f"operations must be some of {', '.join(OPERATIONS)}, got {unknown[0]!r}.")
        if cache_images not in CACHE_IMAGES:
            raise InputError(f"cache_images must be one of {', '.join(CACHE_IMAGES)}, got {cache_images!r}.")
        self.labels = labels_of(dataset, LABEL_COLUMN)
        self.distinguishes_repetitions = True  # see SampledExamples
        self.collator = collate_images  # batches its examples
        self.class_counts = class_counts(dataset, LABEL_COLUMN)
        self.class_names = class_names(dataset)
        self.augmentation, self.horizontal_flip, self.data_seed = augmentation, horizontal_flip, data_seed
        self.operations = list(operations)
        self.train_transform, self.as_bytes = train_transform, as_bytes
        self._stored = StoredImages(dataset)
        student = Rendering(processor)
        self._renderings = {"pixel_values": student}
        if teacher_processor is not None and not same_pixels(processor, teacher_processor):
            if train_transform is not None:
                raise InputError(
                    "train_transform makes the student's pixels alone, but the teacher's image processor gives "
                    "others: use an augmentation of ImageDataset, or a teacher with the same processor."
                )
            self._renderings["teacher_pixel_values"] = Rendering(teacher_processor, region_of=student)
        # Whether views are cropped from originals, which are then cached; otherwise the processors' views are cached.
        self._needs_originals = train_transform is not None or AUGMENTATIONS[augmentation].of_original
        # Width and height for which JPEGs may be decoded smaller; the same with and without a teacher.
        self._reduced_for = None
        if reduced_decoding and train_transform is None and self._needs_originals:
            self._reduced_for = [rendering.size for rendering in self._renderings.values()]
        # In shared memory, so that persistent workers see changes.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._kept: KeptImages | None = None
        if len(self) and cache_images != "none":
            self._keep(cache_images, Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE, "bkd_hf")))

    @property
    def in_memory(self) -> bool:
        """Whether decoded images are cached, in memory or in a mapped file; if not, each is decoded when used."""
        return self._kept is not None

    @property
    def needs_workers(self) -> bool:
        """Whether worker processes should prepare the batches.

        Not if images are already decoded, at most 64 pixels wide and high, and there are no operations: receiving such
        a batch takes as long as making it (128 images of 32×32 pixels: 1.4 and 1.6 ms). Making it takes 3 ms with
        cutout, 24 with AutoAugment and cutout, 28 with RandAugment.
        """
        size = max(max(rendering.size) for rendering in self._renderings.values())
        return not self.in_memory or self._needs_originals or size > SMALL_IMAGE_SIZE or bool(self.operations)

    def for_student_alone(self) -> ImageDataset:
        """Return the same views without the teacher's, and without their cost; the epoch is shared."""
        alone = copy.copy(self)
        alone._renderings = {"pixel_values": self._renderings["pixel_values"]}
        return alone

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose augmentation the next examples get."""
        self._epoch[0] = epoch

    def describe_views(self) -> dict[str, Any]:
        """Return everything that an example's pixels depend on beside its index and the epoch, for a `LogitsFolder`.

        Raises:
            InputError: If they depend on more than can be described.
        """
        if self.train_transform is not None:
            raise InputError(
                "--teacher_cache does not go with a train_transform, whose pixels may differ each time: use an "
                "augmentation of ImageDataset, or --teacher_cache off."
            )
        return {
            "images": fingerprint(self._stored.dataset, with_times=True),
            "pillow": PIL.__version__,
            "augmentation": self.augmentation,
            **({"operations": identities(self.operations)} if self.operations else {}),  # keeps earlier caches valid
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
        """Return the examples of these indices; `i + r · len(self)` is the r-th augmentation of image i."""
        counters = np.asarray(indices)
        images = counters % len(self)
        return self._examples(images, counters, self.labels[images])

    def of_others(
        self, images: list[dict[str, Any]], keys: np.ndarray, labels: np.ndarray, data_seed: int, epoch: int
    ) -> list[dict[str, Any]]:
        """Return examples of other stored images, rendered in the same way; `keys` replace their indices."""
        others: Any = copy.copy(self)
        others._stored, others._kept, others.data_seed = images, None, data_seed
        others._epoch = torch.tensor([epoch])
        return others._examples(np.arange(len(keys)), keys, labels)

    def _examples(self, images: np.ndarray, counters: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
        columns: dict[str, Any] = {}
        if self.train_transform is not None:
            columns["pixel_values"] = [self.train_transform(self._original(index)) for index in images.tolist()]
        else:
            for name, views in self._operated(self._views(images, counters), counters).items():
                pixels = self._renderings[name].as_pixels(views)
                columns[name] = pixels.unbind() if self.as_bytes else pixels.to("cpu").unbind()
        columns["labels"] = labels.tolist()
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    # ---- Views ----------------------------------------------------------------------------------------------------

    def _views(self, indices: np.ndarray, counters: np.ndarray) -> dict[str, np.ndarray]:
        """B×H×W×3 bytes for each model, of the same view of each image."""
        choose, num_draws, of_original = AUGMENTATIONS[self.augmentation]
        draws = hash_uniform(self.data_seed, int(self._epoch), counters[:, None], np.arange(num_draws))
        if of_original:
            return _stacked(self._part(index, row) for index, row in zip(indices.tolist(), draws, strict=True))
        student = self._renderings["pixel_values"]
        boxes, mirrored = choose(*student.size, draws)
        shifts, flips = boxes[:, :2] / np.array(student.size), mirrored & self.horizontal_flip
        return {name: move_and_mirror(seen, shifts, flips) for name, seen in self._processors_views(indices).items()}

    def _operated(self, views: dict[str, np.ndarray], counters: np.ndarray) -> dict[str, np.ndarray]:
        """The same views after the operations."""
        counts, size = [OPERATIONS[name].num_draws for name in self.operations], self._renderings["pixel_values"].size
        draws = [
            hash_uniform(self.data_seed, int(self._epoch), counters[:, None], place, np.arange(count))
            for place, count in enumerate(counts)
        ]
        for name, seen in views.items():
            channels = self._renderings[name].channels
            views[name] = operate(seen[..., channels], self.operations, draws, size)[..., channels]
        return views

    def _processors_views(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if self._kept is None:
            return _stacked(self._processed(index) for index in indices.tolist())
        views, begin = {}, 0
        for name, rendering in self._renderings.items():
            width, height = rendering.size
            end = begin + 3 * width * height
            views[name] = self._kept.rows[:, begin:end][indices].reshape(len(indices), height, width, 3)
            begin = end
        return views

    def _processed(self, index: int) -> dict[str, np.ndarray]:
        """H×W×3 bytes for each model: its processor's view of an image."""
        with reading(self._stored, index) as stored:
            image = decode_image(stored)
        return {name: rendering.view(image) for name, rendering in self._renderings.items()}

    def _part(self, index: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """H×W×3 bytes for each model: a part of an image."""

        def choose(width: int, height: int) -> tuple[Box, bool]:
            boxes, mirrored = AUGMENTATIONS[self.augmentation].views(width, height, draws[None])
            return tuple(boxes[0].tolist()), bool(mirrored[0]) and self.horizontal_flip

        image = self._kept_original(index)
        if image is not None:
            box, mirrored = choose(*image.size)
        else:
            with reading(self._stored, index) as stored:
                image, box, mirrored = decode_part(stored, choose, self._reduced_for)
        return {name: rendering.part(image, box, mirrored) for name, rendering in self._renderings.items()}

    def _original(self, index: int) -> Image.Image:
        kept = self._kept_original(index)
        if kept is None:
            with reading(self._stored, index) as stored:
                kept = decode_image(stored)
        return kept

    def _kept_original(self, index: int) -> Image.Image | None:
        pixels = self._kept[index] if self._kept is not None else np.zeros(0)
        return Image.fromarray(pixels) if pixels.size else None

    # ---- Decoded images that are kept -----------------------------------------------------------------------------

    def _keep(self, cache_images: CacheImages, folder: Path) -> None:
        place = _place_for(self._num_bytes()) if cache_images == "auto" else cache_images
        if place == "disk":
            try:
                self._kept = shared_images(folder / self._key(), len(self), self._decoded, self._num_bytes)
            except OSError as error:
                message = f"Decoded images cannot be kept in {folder}: {error}."
                if cache_images == "disk":
                    raise InputError(
                        f"{message} Name a folder on another disk (cache_dir, or the environment variable "
                        'HF_DATASETS_CACHE), or choose cache_images "memory" or "none".'
                    ) from error
                logger.warning(f"{message} Each process decodes them for itself.")
                place = _place_for(self._num_bytes(), shared=False)
        if place == "memory":
            file = io.BytesIO()
            KeptImages.write(file, self._decoded())
            self._kept = KeptImages(file.getvalue(), len(self))

    def _decoded(self) -> Iterator[np.ndarray]:
        """What is cached of each example: its original, H×W×3 bytes, or its views for all models as one row of pixels.

        Originals that are decoded for each view at the size that it needs are 0×0×3 here, so that caching changes only
        how long a view takes, and not its pixels.
        """
        for index in logging.tqdm(range(len(self)), desc="Decoding images", leave=False):
            if self._needs_originals:
                with reading(self._stored, index) as stored, open_image(stored) as image:
                    reduced = may_be_reduced(image, self._reduced_for)
                    pixels = np.zeros((0, 0, 3), np.uint8) if reduced else np.asarray(upright_rgb(image))
                yield pixels
            else:
                yield np.concatenate([view.reshape(1, -1, 3) for view in self._processed(index).values()], axis=1)

    def _num_bytes(self) -> int:
        """Size of everything that is cached; approximate for originals."""
        if not self._needs_originals:
            return 3 * len(self) * sum(math.prod(rendering.size) for rendering in self._renderings.values())
        sample, pixels = np.linspace(0, len(self) - 1, num=min(64, len(self)), dtype=int).tolist(), []
        for index in sample:
            with reading(self._stored, index) as stored, open_image(stored) as image:
                pixels.append(0 if may_be_reduced(image, self._reduced_for) else math.prod(image.size))
        return round(3 * len(self) * np.mean(pixels))

    def _key(self) -> str:
        """Cache name that includes everything on which the content depends."""
        made_by: dict[str, Any] = {"pillow": PIL.__version__}
        if self._needs_originals:
            made_by["reduced_for"] = self._reduced_for
        else:
            made_by["transformers"] = transformers.__version__
            made_by |= {name: rendering.describe() for name, rendering in self._renderings.items()}
        made_by["images"] = fingerprint(self._stored.dataset, with_times=True)
        key = hashlib.blake2b(json.dumps(made_by).encode(), digest_size=16).hexdigest()
        return f"{'originals' if self._needs_originals else 'views'}-{key}"


def _stacked(examples: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    found = list(examples)
    return {name: np.stack([example[name] for example in found]) for name in found[0]}


def _place_for(num_bytes: int, shared: bool = True) -> CacheImages:
    """Where `cache_images="auto"` caches decoded images of this size, if processes may share them."""
    processes, memory = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), psutil.virtual_memory()
    # Free memory changes all the time, and all processes must decide alike.
    available = min(memory.available if processes == 1 else memory.total, memory_limit())
    copies = 1 if shared else processes
    if not 0 < num_bytes * copies <= _CACHE_SHARE_OF_MEMORY * available:
        return "none"
    return "disk" if shared and processes > 1 else "memory"


def collate_images(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine examples into a batch, as `transformers`' `default_data_collator` does.

    Tensors that are successive parts of one tensor, as returned by [`ImageDataset`]'s `__getitems__`, are not copied:
    the batch is that tensor.
    """
    names = [name for name in examples[0] if name not in ("label", "label_ids")]  # these are renamed
    batch: dict[str, Any] = {}
    for name in names:
        parts = [example[name] for example in examples]
        joined = PixelBytes.join(parts) if isinstance(parts[0], PixelBytes) else whole(parts)
        if joined is not None:
            batch[name] = joined
    others = [{name: value for name, value in example.items() if name not in batch} for example in examples]
    return {**batch, **default_data_collator(others)}


def default_num_workers(dataset: Any, num_cores: int, on_cuda: bool) -> int:
    """Default number of data workers per process.

    None if they would not pay off (see `ImageDataset.needs_workers`), otherwise one per core. Decoding a JPEG and
    cropping 224×224 pixels takes a core 1.5 ms (500×375) to 8 ms (2000×1500). On a CPU, workers and model alternate.
    With a GPU, one core is left for the main process, and 16 workers (some thousand images a second) are enough.

    Args:
        dataset: The training images, or another object that says whether it needs workers.
        num_cores: Cores available to this process: those of the machine divided among its processes.
        on_cuda: Whether the models are on a GPU.
    """
    if not dataset.needs_workers:
        return 0
    return min(max(1, num_cores - 1), 16) if on_cuda else num_cores


def channel_statistics(dataset: datasets.Dataset, max_images: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the red, green and blue values, in [0, 1], of (up to `max_images`) images.

    Raises:
        InputError: If an image cannot be decoded.
    """
    images = StoredImages(dataset)
    count, total, total_squares = 0, np.zeros(3), np.zeros(3)
    for index in np.linspace(0, len(dataset) - 1, num=min(max_images, len(dataset)), dtype=int).tolist():
        with reading(images, index) as stored:
            pixels = np.asarray(decode_image(stored)).reshape(-1, 3) / 255
        count += len(pixels)
        total += pixels.sum(axis=0)
        total_squares += (pixels**2).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(total_squares / count - mean**2, 1e-4))
    return mean.round(4).tolist(), std.round(4).tolist()
