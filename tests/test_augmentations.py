"""Augmentation of training images: which part is used, and which operations change its pixels."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import MobileViTImageProcessorPil

from bkd_hf import ImageDataset, InputError
from bkd_hf.augmentations import move_and_mirror, pad_crop, random_resized_crop_box
from bkd_hf.operations import (
    CIFAR10_POLICY,
    COMMON_KERNELS,
    KERNELS,
    OPERATIONS,
    Operation,
    Ranges,
    operate,
    usual_ranges,
    wide_ranges,
)
from bkd_hf.sampling import hash_uniform
from tests.test_images import labelled, photos, pixels_of, stored, vit_processor

# ---- Views


@pytest.mark.parametrize(
    ("augmentation", "operations"),
    [
        ("pad_crop", ()),
        ("random_resized_crop", ()),
        ("pad_crop", ("autoaugment", "cutout")),
        ("random_resized_crop", ("randaugment", "random_erasing")),
        ("none", ("trivialaugment_wide",)),
    ],
)
def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path, augmentation, operations):
    data = photos()
    make = lambda **kwargs: ImageDataset(  # noqa: E731
        data, vit_processor(), augmentation, operations=operations, **kwargs
    )
    dataset = make(data_seed=3)
    everything = pixels_of(dataset, range(12))
    assert torch.equal(pixels_of(dataset, [7, 2]), everything[[7, 2]])  # whatever the batch
    assert torch.equal(dataset[5]["pixel_values"], everything[5])
    for cache in ("none", "disk"):
        assert torch.equal(pixels_of(make(data_seed=3, cache_images=cache, cache_dir=tmp_path), range(12)), everything)
    for workers in (0, 2):
        loader = DataLoader(make(data_seed=3), batch_size=5, num_workers=workers)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), everything)
    assert not torch.equal(pixels_of(make(data_seed=4), range(12)), everything)
    dataset.set_epoch(1)
    assert not torch.equal(pixels_of(dataset, range(12)), everything)
    dataset.set_epoch(0)
    assert torch.equal(pixels_of(dataset, range(12)), everything)


def test_persistent_workers_see_the_epoch():
    dataset = ImageDataset(photos(), vit_processor(), "pad_crop")
    loader = DataLoader(dataset, batch_size=12, num_workers=1, persistent_workers=True)
    first = next(iter(loader))["pixel_values"]
    dataset.set_epoch(1)
    second = next(iter(loader))["pixel_values"]
    assert not torch.equal(first, second)
    assert torch.equal(second, pixels_of(dataset, range(12)))


def test_pad_crop_by_hand():
    image = np.arange(8 * 8, dtype=np.uint8).reshape(1, 8, 8, 1) + 1

    def seen(flip: float, down: float, right: float) -> np.ndarray:
        boxes, mirrored = pad_crop(8, 8, np.array([[flip, down, right]]))
        return move_and_mirror(image, boxes[:, :2] / 8, mirrored)

    assert np.array_equal(seen(0.9, 0.5, 0.5), image)
    assert np.array_equal(seen(0.1, 0.5, 0.5), image[:, :, ::-1])
    corner = seen(0.9, 0.0, 0.999)[0, :, :, 0]
    assert (corner[0] == 0).all()  # one row of padding from above
    assert (corner[:, -1] == 0).all()  # one column from the right
    assert np.array_equal(corner[1:, :-1], image[0, :-1, 1:, 0])


def test_the_same_window_over_images_of_another_size():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 12, 20, 3), dtype=np.uint8)
    boxes, mirrored = pad_crop(40, 24, generator.random((40, 3)))
    shifts = boxes[:, :2] / (40, 24)
    moved = move_and_mirror(images, shifts, mirrored)
    for image, (right, down), flip, result in zip(images, np.rint(shifts * (20, 12)), mirrored, moved, strict=True):
        rows, columns = np.arange(12) + int(down), np.arange(20) + int(right)
        outside = ((rows < 0) | (rows > 11))[:, None] | ((columns < 0) | (columns > 19))
        expected = np.where(outside[..., None], 0, image[rows.clip(0, 11)][:, columns.clip(0, 19)])
        assert np.array_equal(result, expected[:, ::-1] if flip else expected)


def test_flips_can_be_switched_off():
    row = np.zeros((16, 16, 3), dtype=np.uint8)
    row[:, :4] = 255  # bright on the left
    data = labelled([stored(Image.fromarray(row))] * 40)
    for flip, sides in ((True, {True, False}), (False, {True})):
        pixels = pixels_of(ImageDataset(data, vit_processor(), "pad_crop", horizontal_flip=flip), range(40))
        on_the_left = pixels[:, 0, 8, :8].mean(1) > pixels[:, 0, 8, 8:].mean(1)
        assert set(on_the_left.tolist()) == sides


@given(width=st.integers(1, 10_000), height=st.integers(1, 3000), seed=st.integers(0, 1000))
def test_random_resized_crops_lie_in_the_image(width, height, seed):
    left, top, right, bottom = random_resized_crop_box(width, height, hash_uniform(seed, np.arange(40)))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) >= 50 and max(width, height) <= 1.3 * min(width, height):
        assert 0.05 < (right - left) * (bottom - top) / (width * height) <= 1
        assert 0.7 < (right - left) / (bottom - top) < 1.4


# ---- Operations


def noise(number: int, width: int, height: int) -> np.ndarray:
    """B×H×W×3 bytes, half of them smooth."""
    generator = np.random.default_rng(0)
    rough = generator.integers(0, 256, (number - number // 2, height, width, 3), dtype=np.uint8)
    coarse = generator.integers(30, 220, (number // 2, 4, 5, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in coarse]
    return np.concatenate([rough, np.stack(smooth)])


def test_lists_are_the_papers():
    assert {*COMMON_KERNELS} == {
        "Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize", "Contrast", "Brightness",
        "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
    }  # fmt: skip
    parts = [part for policy in CIFAR10_POLICY for part in policy]
    assert len(parts) == 50
    assert Counter(name for name, _, _ in parts) == {
        "Equalize": 9, "AutoContrast": 7, "TranslateY": 5, "Color": 5, "Sharpness": 5, "Brightness": 4, "Solarize": 4,
        "Invert": 3, "Contrast": 2, "TranslateX": 2, "ShearY": 2, "Rotate": 1, "Posterize": 1,
    }  # fmt: skip
    assert sum(probability for _, probability, _ in parts) == pytest.approx(26.5)
    assert CIFAR10_POLICY[1] == (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9))


def test_kernels_are_torchvisions():
    """At its own magnitudes to the byte; the magnitudes up to its single precision."""
    theirs = pytest.importorskip("torchvision.transforms.autoaugment")
    mode = pytest.importorskip("torchvision.transforms").InterpolationMode.NEAREST
    policy = theirs.AutoAugment()._get_policies(theirs.AutoAugmentPolicy.CIFAR10)
    for ours, other in zip(CIFAR10_POLICY, policy, strict=True):
        for part, (name, probability, magnitude) in zip(ours, other, strict=True):
            assert part == (name, probability, part[2] if magnitude is None else magnitude)
    for width, height in ((32, 32), (40, 25)):
        size, images = (width, height), [Image.fromarray(pixels) for pixels in noise(2, width, height)]
        for bins, most, space in (
            (10, usual_ranges(size), theirs.AutoAugment()._augmentation_space(10, (height, width))),
            (31, usual_ranges(size), theirs.RandAugment()._augmentation_space(31, (height, width))),
            (31, wide_ranges(size), theirs.TrivialAugmentWide()._augmentation_space(31)),
        ):
            assert {*space} - {"Invert"} | {"Identity"} == {*COMMON_KERNELS}
            largest = {
                "ShearX": most.shear, "ShearY": most.shear, "TranslateX": most.right, "TranslateY": most.down,
                "Rotate": most.angle, **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), most.factor),
            }  # fmt: skip
            for name, (magnitudes, signed) in space.items():
                assert signed == (name in largest)
                for k in range(0, bins, 3):
                    share = k / (bins - 1)
                    magnitude = float(magnitudes[k]) if magnitudes.ndim else 0.0
                    exactly = most
                    if signed:
                        assert magnitude == pytest.approx(share * largest[name], rel=1e-6)
                        exactly = Ranges(size, *[magnitude] * 5, most.bits)
                    for image in images:
                        for sign in (1, -1):
                            ours = KERNELS[name](image, sign if signed else sign * share, exactly)
                            at = sign * magnitude if signed else magnitude
                            assert np.array_equal(ours, theirs._apply_op(image, name, at, mode, None)), (name, at)


def test_operations_by_hand():
    image = noise(2, 32, 32)[0]
    apply = lambda name, *draws: OPERATIONS[name].apply(image, np.array(draws), (32, 32))  # noqa: E731
    assert np.array_equal(apply("autoaugment", 21 / 25 + 0.01, 0.95, 0.75, 0.1, 0.1), image)  # neither happens
    moved = apply("autoaugment", 21 / 25 + 0.01, 0.1, 0.95, 0.1, 0.9)  # the first: 150/331 of 32, down
    assert np.array_equal(moved[14:], image[:-14])
    assert not moved[:14].any()
    up = apply("autoaugment", 21 / 25 + 0.01, 0.95, 0.1, 0.1, 0.9)  # the second, up
    assert np.array_equal(up[:-14], image[14:])
    place = lambda name: (COMMON_KERNELS.index(name) + 0.5) / 14  # noqa: E731
    brighter = apply("randaugment", place("Identity"), 0.1, place("Brightness"), 0.1)
    assert np.abs(brighter - (image * 1.27).clip(0, 255)).max() < 1
    assert np.array_equal(apply("trivialaugment_wide", place("Posterize"), 0.999, 0.9), image & 0b11000000)
    assert np.array_equal(apply("trivialaugment_wide", place("TranslateX"), 0.5, 0.9)[:, :-16], image[:, 16:])
    hole = (apply("cutout", 0.5, 0.999) != image).any(axis=2)
    assert (hole == np.pad(np.ones((9, 16), bool), ((23, 0), (8, 8)))).mean() > 0.999  # noise is black by chance
    assert np.array_equal(apply("random_erasing", 0.5, *[0.3] * 40), image)
    quarter = (apply("random_erasing", 0.49, *[(0.25 - 0.02) / 0.38, 0.5, 0.0, 0.999] * 10) != image).any(axis=2)
    assert (quarter == np.pad(np.ones((16, 16), bool), ((16, 0), (0, 16)))).mean() > 0.999


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_view_of_another_size_is_changed_alike(name):
    """Twice the size, of the same smooth content; what is moved or erased is the same share of it."""
    small = noise(200, 32, 32)[100:]
    large = small.repeat(2, axis=1).repeat(2, axis=2)
    draws = [hash_uniform(0, np.arange(100)[:, None], np.arange(OPERATIONS[name].num_draws))]
    changed, expected = (operate(images, [name], draws, (32, 32)) for images in (large, small))
    assert changed.dtype == np.uint8
    assert (expected != small).any(axis=(1, 2, 3)).mean() > 0.4
    error = np.abs(changed.astype(int) - expected.repeat(2, axis=1).repeat(2, axis=2)).mean(axis=(1, 2, 3))
    assert error.mean() < (1e-9 if name in ("cutout", "random_erasing") else 2)  # PIL equalises in whole steps


def test_models_see_the_same_operations_whatever_the_order_of_their_channels():
    data = labelled([stored(Image.fromarray(pixels)) for pixels in noise(8, 24, 24)])
    flips = MobileViTImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    dataset = ImageDataset(
        data, flips, operations=["randaugment", "cutout"], teacher_processor=vit_processor(24), as_bytes=True
    )
    for example in dataset.__getitems__(list(range(8))):
        shown = example["teacher_pixel_values"].values
        assert torch.equal(example["pixel_values"].values.flip(-1), shown)


def test_operations_leave_the_view_and_what_is_kept_alone(tmp_path):
    data, options = photos(), {"augmentation": "pad_crop", "cache_images": "disk", "cache_dir": tmp_path}
    plain, changed = (
        ImageDataset(data, vit_processor(), **options, operations=names, as_bytes=True)
        for names in ((), ("cutout", "cutout"))
    )
    assert len([path for path in tmp_path.iterdir() if path.suffix != ".lock"]) == 1
    views = [torch.cat([e["pixel_values"].values for e in d.__getitems__(list(range(12)))]) for d in (plain, changed)]
    same = (views[0] == views[1]).all(dim=3)
    assert not views[1][~same].any()
    assert same.float().mean(dim=(1, 2)).min() < 0.74  # the two squares are not the same one
    assert plain.describe_views() == {k: v for k, v in changed.describe_views().items() if k != "operations"}


def test_a_users_operation_is_described_by_its_code(monkeypatch):
    def dark(pixels, draws, size):
        return pixels // 2

    def black(pixels, draws, size):
        return pixels * 0

    described = []
    for apply in (dark, black, dark):
        monkeypatch.setitem(OPERATIONS, "mine", Operation(apply, 1, "mine", None))
        views = ImageDataset(photos(), vit_processor(), "pad_crop", operations=["cutout", "mine"]).describe_views()
        described.append(json.dumps(views["operations"]))
    assert described[0] == described[2] != described[1]


def test_unknown_operations_are_refused():
    with pytest.raises(InputError, match=r"operations must be some of autoaugment, .*, got 'mixup'"):
        ImageDataset(photos(), vit_processor(), operations=["cutout", "mixup"])
