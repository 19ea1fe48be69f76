from __future__ import annotations

import io

import datasets
import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    ConvNextImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
    default_data_collator,
)

from bkd_hf import ImageDataset, InputError, default_augmentation, load_image_dataset
from bkd_hf.randomness import hash_uniform
from bkd_hf.sampling import SampledExamples
from bkd_hf.transforms import (
    channel_statistics,
    collate_images,
    decode_for_crop,
    decode_image,
    default_num_workers,
    draw_shifts,
    random_resized_crop_box,
    shift_and_flip,
)
from bkd_hf.views import PixelBytes, output_size


def vit_processor(size: int = 16, **kwargs) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3], **kwargs
    )


def stored(image: Image.Image, format: str = "PNG", **kwargs) -> dict:
    file = io.BytesIO()
    image.save(file, format=format, **kwargs)
    return {"bytes": file.getvalue(), "path": None}


def labelled(images: list[dict]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1] * (len(images) // 2)}, features=features)


def photos(number: int = 12, seed: int = 0, sizes: tuple[int, int] = (20, 60), **kwargs) -> datasets.Dataset:
    """Images of different sizes with smooth content."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(number):
        pixels = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        size = tuple(int(n) for n in generator.integers(*sizes, 2))
        images.append(stored(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), **kwargs))
    return labelled(images)


def bytes_of(dataset: ImageDataset) -> np.ndarray:
    """All examples of a data set made with `vit_processor`, as bytes."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    return ((pixels_of(dataset, range(len(dataset))) * std + mean) * 255).numpy()


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


@pytest.mark.parametrize(
    "processor",
    [vit_processor(24), ConvNextImageProcessorPil(size={"shortest_edge": 24}), MobileViTImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )],
    ids=["kept", "zoomed", "channels flipped"],
)  # fmt: skip
def test_images_of_the_models_own_size(processor):
    generator = np.random.default_rng(0)
    data = labelled([stored(Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)))] * 2)
    own = processor(images=list(data["image"]), return_tensors="pt")["pixel_values"].float()
    torch.testing.assert_close(pixels_of(ImageDataset(data, processor), range(2)), own, rtol=0, atol=2e-6)


@pytest.mark.parametrize("augmentation", ["pad_crop", "random_resized_crop"])
def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path, augmentation):
    data = photos()
    make = lambda **kwargs: ImageDataset(data, vit_processor(), augmentation, **kwargs)  # noqa: E731
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


def test_shift_and_flip_by_hand():
    image = np.arange(8 * 8, dtype=np.uint8).reshape(1, 8, 8, 1) + 1
    centre = draw_shifts(np.array([[0.5, 0.5]]), 8, 8)
    assert np.array_equal(shift_and_flip(image, centre, np.array([False])), image)
    assert np.array_equal(shift_and_flip(image, centre, np.array([True])), image[:, :, ::-1])
    corner = shift_and_flip(image, draw_shifts(np.array([[0.0, 0.999]]), 8, 8), np.array([False]))[0, :, :, 0]
    assert (corner[0] == 0).all()  # one row of padding from above
    assert (corner[:, -1] == 0).all()  # one column from the right
    assert np.array_equal(corner[1:, :-1], image[0, :-1, 1:, 0])


def test_shift_and_flip_of_images_of_another_size():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 12, 20, 3), dtype=np.uint8)
    shifts, mirrored = draw_shifts(generator.random((40, 2)), 24, 40), generator.random(40) < 0.5
    moved = shift_and_flip(images, shifts, mirrored)
    for image, (down, right), flip, result in zip(images, np.rint(shifts * (12, 20)), mirrored, moved, strict=True):
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


@pytest.mark.parametrize(
    ("dtype", "values", "seen"),
    [
        (np.uint16, [0, 200], [0, 0]),  # dark, as 65535 is white
        (np.uint16, [0, 65535], [0, 255]),
        (np.int32, [0, 198], [0, 198]),
        (np.int32, [0, 198 * 256], [0, 198]),
        (np.float32, [0, 0.5], [0, 128]),
        (np.float32, [0, 1], [0, 255]),
        (np.float32, [0, 198.4], [0, 198]),
        (np.int32, [-1, 5], None),
        (np.int32, [0, 65536], None),
        (np.float32, [-0.5, 0.5], None),
        (np.float32, [0, 300], None),
        (np.float32, [0, np.nan], None),
    ],
)
def test_depths(dtype, values, seen):
    image = stored(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")
    if seen is None:
        with pytest.raises(InputError, match=r"Image 1 cannot be decoded: its values run from .* is understood"):
            ImageDataset(labelled([stored(Image.new("L", (2, 1))), image]), vit_processor())
    else:
        assert np.asarray(decode_image(image)).tolist() == [[[value] * 3 for value in seen]]


@pytest.mark.parametrize("cache", ["memory", "none", "disk"])
def test_corrupt_image_is_named(tmp_path, cache):
    good = tmp_path / "good.png"
    Image.new("RGB", (4, 4)).save(good)
    bad = tmp_path / "broken.png"
    bad.write_bytes(good.read_bytes()[:40])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": [str(good), str(bad)], "label": [0, 1]}, features=features)
    with pytest.raises(InputError, match=r"Image 1 \(.*broken.png\) cannot be decoded"):
        ImageDataset(data, vit_processor(), cache_images=cache, cache_dir=tmp_path)[1]


def test_defaults_by_size_and_bad_arguments():
    assert default_augmentation(vit_processor(32)) == "pad_crop"
    assert default_augmentation(vit_processor(224)) == "random_resized_crop"
    assert output_size(ViTImageProcessorPil(size={"height": 20, "width": 30})) == (20, 30)
    with pytest.raises(InputError, match="different sizes"):
        output_size(ViTImageProcessorPil(size={"shortest_edge": 32}))
    with pytest.raises(InputError, match="augmentation must be one of"):
        ImageDataset(photos(), vit_processor(), "mixup")
    with pytest.raises(InputError, match="cache_images must be one of"):
        ImageDataset(photos(), vit_processor(), cache_images="tape")


# ---- JPEGs at reduced scale


@pytest.mark.parametrize(
    ("box", "size", "factor"),
    [
        ((0, 0, 640, 480), (80, 60), 8),
        ((0, 0, 640, 480), (81, 60), 4),
        ((0, 0, 640, 480), (80, 61), 4),
        ((3, 5, 323, 245), (100, 100), 2),
        ((3, 5, 203, 204), (100, 100), 1),
        ((10, 10, 20, 20), (224, 224), 1),
    ],
)
def test_jpegs_are_decoded_as_large_as_the_crop_needs(box, size, factor):
    photo = stored(Image.new("RGB", (640, 480)), "JPEG")
    image, part = decode_for_crop(photo, lambda width, height: box, [(8, 8), size])
    assert image.size == (640 // factor, 480 // factor)
    assert part == tuple(edge / factor for edge in box)
    assert decode_for_crop(photo, lambda width, height: box, None)[0].size == (640, 480)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_crops_are_chosen_in_the_upright_image(format, orientation):
    generator = np.random.default_rng(0)
    scene = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((335, 201), 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = stored(scene, format, exif=exif)
    upright, seen = decode_image(photo), []

    def lower_left_corner(width: int, height: int) -> tuple[int, int, int, int]:
        seen.append((width, height))
        return 0, height // 2, width // 2, height

    image, part = decode_for_crop(photo, lower_left_corner, [(16, 16)])
    assert seen == [upright.size]
    assert max(image.size) == (84 if format == "JPEG" else 335)
    shown = np.asarray(image.resize((16, 16), box=part), dtype=float)
    expected = np.asarray(upright.resize((16, 16), box=lower_left_corner(*upright.size)), dtype=float)
    assert np.abs(shown - expected).mean() < 1


def test_reduced_decoding_alters_pixels_by_little():
    jpegs = photos(16, sizes=(150, 400), format="JPEG", quality=90)
    make = lambda reduced: ImageDataset(  # noqa: E731
        jpegs, vit_processor(32), "random_resized_crop", cache_images="none", reduced_decoding=reduced
    )
    reduced, full = bytes_of(make(True)), bytes_of(make(False))
    assert np.array_equal(reduced, bytes_of(make(True)))
    of_image = np.abs(reduced - full).mean(axis=(1, 2, 3))
    assert 0.01 < of_image.mean() < 1.5
    assert of_image.max() < 3
    cached = ImageDataset(jpegs, vit_processor(32), "random_resized_crop", cache_images="memory")
    assert np.array_equal(bytes_of(cached), reduced)


@pytest.mark.parametrize("cache", ["auto", "memory", "disk"])
def test_what_is_kept_does_not_decide_what_is_seen(tmp_path, cache):
    """Of large and small JPEGs and of other formats: only what is never decoded at a smaller size is kept."""
    parts = [photos(4, sizes=sizes, format=kind) for sizes in ((150, 200), (30, 60)) for kind in ("JPEG", "PNG")]
    for data in (parts[0], datasets.concatenate_datasets(parts)):  # the first has nothing to keep
        options = {"teacher_processor": vit_processor(40), "cache_dir": tmp_path}
        kept, seen = (
            ImageDataset(data, vit_processor(32), "random_resized_crop", cache_images=where, **options)
            for where in (cache, "none")
        )
        for ours, theirs in zip(kept.__getitems__(range(len(data))), seen.__getitems__(range(len(data))), strict=True):
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
            assert torch.equal(ours["teacher_pixel_values"], theirs["teacher_pixel_values"])
        assert kept.describe_views() == seen.describe_views()


def test_the_student_sees_the_same_with_and_without_the_teachers_view():
    """A crop may be large enough to be decoded at half its size for the student, and not for the teacher."""
    jpegs = photos(16, sizes=(150, 200), format="JPEG", quality=90)
    dataset = ImageDataset(jpegs, vit_processor(32), "random_resized_crop", teacher_processor=vit_processor(90))
    alone = dataset.for_student_alone()
    assert "teacher_pixel_values" not in alone[0]
    dataset.set_epoch(3)
    assert torch.equal(pixels_of(alone, range(16)), pixels_of(dataset, range(16)))


def test_processors_own_view_is_of_the_whole_jpeg():
    jpegs = photos(4, sizes=(150, 400), format="JPEG", quality=90)
    own = vit_processor(32)(images=list(jpegs["image"]), return_tensors="pt")["pixel_values"]
    ours = pixels_of(ImageDataset(jpegs, vit_processor(32), cache_images="none"), range(4))
    torch.testing.assert_close(ours, own.float(), rtol=0, atol=2e-6)


def test_description_of_views_tells_reduced_decoding():
    make = lambda **kwargs: ImageDataset(  # noqa: E731
        photos(), vit_processor(), **{"augmentation": "random_resized_crop", "cache_images": "none", **kwargs}
    ).describe_views()
    assert make() != make(reduced_decoding=False)
    assert make() == make(cache_images="memory")
    assert make(augmentation="none") == make(augmentation="none", reduced_decoding=False)


# ---- Batches


def check_batch(examples: list[dict]) -> None:
    batch, usual = collate_images(examples), default_data_collator(examples)
    assert set(batch) == set(usual)
    for name, tensor in usual.items():
        assert torch.equal(batch[name], tensor)
        assert batch[name].dtype == tensor.dtype


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
def test_batches_are_put_together_without_a_copy(augmentation):
    dataset = ImageDataset(photos(), vit_processor(), augmentation, teacher_processor=vit_processor(24))
    examples = SampledExamples(dataset).__getitems__([3, -2, 5])
    check_batch(examples)
    batch = collate_images(examples)
    for name in ("pixel_values", "teacher_pixel_values"):
        assert batch[name].data_ptr() == examples[0][name].data_ptr()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
def test_bytes_become_the_same_numbers_where_they_arrive(augmentation, workers):
    def batches(as_bytes: bool) -> DataLoader:
        dataset = ImageDataset(photos(), vit_processor(), augmentation, teacher_processor=vit_processor(24))
        dataset.as_bytes = as_bytes
        return DataLoader(dataset, batch_size=5, collate_fn=collate_images, num_workers=workers)

    for ours, usual in zip(batches(True), batches(False), strict=True):
        for name, size in (("pixel_values", 16), ("teacher_pixel_values", 24)):
            assert ours[name].values.dtype == torch.uint8
            assert len(ours[name]) == len(ours["labels"])
            sent = send_to_device(ours, "cpu")[name]  # as accelerate does with every batch of a Trainer
            assert sent.shape == (len(ours["labels"]), 3, size, size)
            assert torch.equal(sent, usual[name])


def test_bytes_are_joined_without_a_copy_and_not_with_others():
    dataset = ImageDataset(photos(), vit_processor(), as_bytes=True)
    examples = dataset.__getitems__([0, 1, 2])
    joined = PixelBytes.join([example["pixel_values"] for example in examples])
    assert joined.values.data_ptr() == examples[0]["pixel_values"].values.data_ptr()
    picked = PixelBytes.join([examples[2]["pixel_values"], examples[0]["pixel_values"]])
    assert torch.equal(picked.values, joined.values[[2, 0]])
    other = ImageDataset(photos(), vit_processor(rescale_factor=1 / 128), as_bytes=True)
    with pytest.raises(ValueError, match="different image processors"):
        PixelBytes.join([examples[0]["pixel_values"], other[0]["pixel_values"]])


def test_any_examples_are_put_together():
    numbers = torch.arange(24.0).reshape(4, 3, 2)
    sideways = torch.arange(24.0).reshape(2, 3, 4).unbind(dim=2)
    for parts in (
        list(numbers),
        list(numbers)[:3],
        list(numbers)[1:],
        list(numbers)[::-1],
        [numbers[0], numbers[0]],
        [*numbers, *numbers.clone()],
        list(numbers.transpose(1, 2)),
        list(sideways),
        [torch.zeros(2, 3), torch.ones(2, 3)],
        [torch.tensor(1.0), torch.tensor(2.0)],
        [torch.zeros(0), torch.zeros(0)],
    ):
        examples = [{"x": part, "label": i, "y": [i, 2.5]} for i, part in enumerate(parts)]
        check_batch(examples)
    check_batch([{"label": label} for label in torch.arange(3)])
    check_batch([{"x": x, "label_ids": label} for x, label in zip(numbers, torch.eye(4), strict=True)])


def test_workers_where_they_pay():
    small = ImageDataset(photos(), vit_processor(32), "pad_crop")
    seen = ImageDataset(photos(), vit_processor(32), "pad_crop", cache_images="none")
    large = ImageDataset(photos(), vit_processor(65), "pad_crop")
    cut = ImageDataset(photos(), vit_processor(32), "random_resized_crop")
    assert default_num_workers(small, 8, on_cuda=True) == default_num_workers(small, 8, on_cuda=False) == 0
    for dataset in (seen, large, cut):
        assert default_num_workers(dataset, 8, on_cuda=False) == 8
        assert default_num_workers(dataset, 8, on_cuda=True) == 7
        assert default_num_workers(dataset, 1, on_cuda=True) == 1
        assert default_num_workers(dataset, 96, on_cuda=True) == 16


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
