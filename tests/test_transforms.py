from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

from bkd_hf import ImageDataset, InputError, default_augmentation, load_image_dataset
from bkd_hf.randomness import hash_uniform
from bkd_hf.transforms import (
    channel_statistics,
    decode_image,
    draw_shifts,
    random_resized_crop_box,
    shift_and_flip,
)
from bkd_hf.views import output_size


def vit_processor(size: int = 16, **kwargs) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3], **kwargs
    )


def stored(image: Image.Image, format: str = "PNG", **kwargs) -> dict:
    file = io.BytesIO()
    image.save(file, format=format, **kwargs)
    return {"bytes": file.getvalue(), "path": None}


def photos(number: int = 12, seed: int = 0) -> datasets.Dataset:
    """Images of different sizes with smooth content."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(number):
        pixels = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        size = tuple(int(n) for n in generator.integers(20, 60, 2))
        images.append(stored(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1] * (number // 2)}, features=features)


def pixels_of(dataset, indices) -> torch.Tensor:
    return torch.stack([example["pixel_values"] for example in dataset.__getitems__(list(indices))])


@pytest.mark.parametrize(
    "processor",
    [
        vit_processor(16),
        vit_processor(40, resample=3),
        vit_processor(24, do_normalize=False),
        ViTImageProcessorPil(size={"shortest_edge": 30}, do_center_crop=True, crop_size={"height": 24, "width": 24}),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}),
    ],
    ids=["resize", "bicubic", "raw", "center crop", "crop share"],
)
def test_evaluation_pixels_are_the_processors_own(processor):
    data = photos()
    own = processor(images=[image.convert("RGB") for image in data["image"]], return_tensors="pt")["pixel_values"]
    for cache in ("memory", "none"):
        ours = pixels_of(ImageDataset(data, processor, cache_images=cache), range(len(data)))
        # The same bytes; only the arithmetic of (x/255 − mean)/std is rounded in another order.
        torch.testing.assert_close(ours, own.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("augmentation", ["pad_crop", "random_resized_crop"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(augmentation):
    data = photos()
    make = lambda **kwargs: ImageDataset(data, vit_processor(), augmentation, **kwargs)  # noqa: E731
    dataset = make(data_seed=3)
    everything = pixels_of(dataset, range(12))
    assert torch.equal(pixels_of(dataset, [7, 2]), everything[[7, 2]])  # whatever the batch
    assert torch.equal(dataset[5]["pixel_values"], everything[5])
    assert torch.equal(pixels_of(make(data_seed=3, cache_images="none"), range(12)), everything)
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


def test_shift_and_flip_by_hand():
    image = np.arange(8 * 8, dtype=np.uint8).reshape(1, 8, 8, 1) + 1
    centre = draw_shifts(np.array([[0.5, 0.5]]), 8, 8)
    assert np.array_equal(shift_and_flip(image, centre, np.array([False])), image)
    assert np.array_equal(shift_and_flip(image, centre, np.array([True])), image[:, :, ::-1])
    corner = shift_and_flip(image, draw_shifts(np.array([[0.0, 0.999]]), 8, 8), np.array([False]))[0, :, :, 0]
    assert (corner[0] == 0).all()  # one row of padding from above
    assert (corner[:, -1] == 0).all()  # one column from the right
    assert np.array_equal(corner[1:, :-1], image[0, :-1, 1:, 0])


def test_flips_can_be_switched_off():
    row = np.zeros((16, 16, 3), dtype=np.uint8)
    row[:, :4] = 255  # bright on the left
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict(
        {"image": [stored(Image.fromarray(row))] * 40, "label": [0, 1] * 20}, features=features
    )
    for flip, sides in ((True, {True, False}), (False, {True})):
        pixels = pixels_of(ImageDataset(data, vit_processor(), "pad_crop", horizontal_flip=flip), range(40))
        on_the_left = pixels[:, 0, 8, :8].mean(1) > pixels[:, 0, 8, 8:].mean(1)
        assert set(on_the_left.tolist()) == sides


@settings(deadline=None)
@given(width=st.integers(1, 10_000), height=st.integers(1, 3000), seed=st.integers(0, 1000))
def test_random_resized_crops_lie_in_the_image(width, height, seed):
    left, top, right, bottom = random_resized_crop_box(width, height, hash_uniform(seed, np.arange(40)))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) >= 50 and max(width, height) <= 1.3 * min(width, height):
        assert 0.05 < (right - left) * (bottom - top) / (width * height) <= 1
        assert 0.7 < (right - left) / (bottom - top) < 1.4


def test_train_transform_replaces_augmentation():
    def transform(image: Image.Image) -> torch.Tensor:
        assert image.mode == "RGB"
        return torch.full((3, 2, 2), float(image.width))

    data = photos()
    dataset = ImageDataset(data, vit_processor(), "pad_crop", train_transform=transform)
    assert [example["pixel_values"][0, 0, 0].item() for example in dataset.__getitems__([0, 3])] == [
        data[0]["image"].width,
        data[3]["image"].width,
    ]


def test_modes_and_orientation():
    upright = Image.new("RGB", (6, 4), (10, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode_image(stored(upright, "JPEG", exif=exif)).size == (4, 6)
    for mode in ("L", "RGBA", "P", "CMYK", "1", "LA"):
        image = decode_image(stored(upright.convert(mode), "TIFF" if mode == "CMYK" else "PNG"))
        assert (image.mode, image.size) == ("RGB", (6, 4))
    deep = Image.fromarray(np.full((4, 6), 200 * 256, dtype=np.uint16))
    assert decode_image(stored(deep)).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_corrupt_image_is_named(tmp_path, cache):
    good = tmp_path / "good.png"
    Image.new("RGB", (4, 4)).save(good)
    bad = tmp_path / "broken.png"
    bad.write_bytes(good.read_bytes()[:40])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": [str(good), str(bad)], "label": [0, 1]}, features=features)
    with pytest.raises(InputError, match=r"Image 1 \(.*broken.png\) cannot be decoded"):
        ImageDataset(data, vit_processor(), cache_images=cache)[1]


def test_defaults_by_size_and_bad_arguments():
    assert default_augmentation(vit_processor(32)) == "pad_crop"
    assert default_augmentation(vit_processor(224)) == "random_resized_crop"
    assert output_size(ViTImageProcessorPil(size={"height": 20, "width": 30})) == (20, 30)
    with pytest.raises(InputError, match="different sizes"):
        output_size(ViTImageProcessorPil(size={"shortest_edge": 32}))
    with pytest.raises(InputError, match="augmentation must be one of"):
        ImageDataset(photos(), vit_processor(), "mixup")
    with pytest.raises(InputError, match="cache_images must be one of"):
        ImageDataset(photos(), vit_processor(), cache_images="disk")


def test_channel_statistics():
    data = load_image_dataset("digits")["train"]
    pixels = np.stack([np.asarray(image) for image in data["image"]]) / 255
    mean, std = channel_statistics(data)
    assert mean == [pytest.approx(pixels.mean(), abs=1e-3)] * 3
    assert std == [pytest.approx(pixels.std(), abs=1e-3)] * 3


def test_hash_uniform_looks_random():
    numbers = hash_uniform(0, np.arange(20_000)[:, None], np.arange(2))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0] / numbers.size
    assert np.abs(histogram - 0.05).max() < 0.005
    assert abs(np.corrcoef(numbers.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.03
    assert hash_uniform(1, 2) != hash_uniform(2, 1)
