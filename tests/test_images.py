from __future__ import annotations

import io
import os
import warnings
import zlib

import datasets
import numpy as np
import pytest
import torch
import transformers as T
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
    default_data_collator,
)

from bkd_hf import ImageDataset, InputError, default_augmentation, load_image_dataset, load_processor
from bkd_hf.decoding import upright_rgb
from bkd_hf.images import channel_statistics, collate_images, default_num_workers
from bkd_hf.inputs import load_own_processor
from bkd_hf.models import check_image_size
from bkd_hf.options import ModelArguments
from bkd_hf.sampling import hash_uniform
from bkd_hf.views import PixelBytes, output_size


@pytest.mark.parametrize(
    ("kind", "options", "size"),
    [
        (ViTImageProcessorPil, {"size": {"height": 16, "width": 16}}, {"height": 24, "width": 24}),
        (ConvNextImageProcessorPil, {"size": {"shortest_edge": 16}}, {"shortest_edge": 24}),
        (
            CLIPImageProcessorPil,
            {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
            {"shortest_edge": 30},
        ),
        (
            DeiTImageProcessorPil,
            {"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}},
            {"height": 30, "width": 30},
        ),
    ],
)
def test_another_image_size_stays_with_the_processor(tmp_path, kind, options, size):
    kind(**options).save_pretrained(tmp_path)
    T.ResNetConfig().save_pretrained(tmp_path)
    given = load_own_processor(ModelArguments(str(tmp_path), image_size=24), photos())
    given.save_pretrained(tmp_path / "student")
    assert output_size(load_processor(str(tmp_path / "student"))) == (24, 24)
    assert dict(given.size) == size
    assert output_size(load_own_processor(ModelArguments(str(tmp_path)), photos())) == (16, 16)


def test_palettes_with_transparency_keep_their_colours_in_silence():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    file = io.BytesIO()
    image.save(file, format="PNG", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(upright_rgb(Image.open(file)))
    assert pixels.tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_a_model_of_one_size_refuses_another():
    about = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    with pytest.raises(InputError, match=r"--image_size 48: x \(vit\) takes images of 32×32 pixels only, as"):
        check_image_size("x", T.ViTConfig(**about), 48)
    for config in (T.ViTConfig(**{**about, "image_size": 48}), T.Dinov2Config(**about), T.ResNetConfig()):
        check_image_size("x", config, 48)


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
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 24, "width": 24}),
    ],
    ids=["resize", "bicubic", "raw", "center crop", "crop share", "border"],
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


@pytest.mark.parametrize("cache", ["memory", "none", "disk"])
@pytest.mark.parametrize("kind", ["cut off", "no pixels", "a bomb", "empty", "a pipe"])
def test_corrupt_image_is_named(tmp_path, cache, kind):
    good = tmp_path / "good.png"
    Image.new("RGB", (4, 4)).save(good)
    content, bad = good.read_bytes(), tmp_path / "broken.png"
    size = {"no pixels": bytes(8), "a bomb": (60_000).to_bytes(4, "big") * 2}.get(kind, content[16:24])
    header = b"IHDR" + size + content[24:29]
    content = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    if kind == "a pipe":
        os.mkfifo(bad)
    else:
        bad.write_bytes({"cut off": content[:40], "empty": b""}.get(kind, content))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": [str(good), str(bad)], "label": [0, 1]}, features=features)
    # The cache on the disk is named by the content of the files, which a pipe does not have.
    verb = "read: it is no regular file" if (kind, cache) == ("a pipe", "disk") else "decoded"
    with pytest.raises(InputError, match=rf"Image 1 \(.*broken.png\) cannot be {verb}"):
        ImageDataset(data, vit_processor(), cache_images=cache, cache_dir=tmp_path)[1]


def test_plain_numbers_are_labels():
    data = photos().cast_column("label", datasets.Value("int64"))
    found = ImageDataset(data, vit_processor())
    assert found.class_names == [str(number) for number in range(len(found.class_counts))]


def test_a_border_has_no_part_that_another_model_could_see():
    bordered = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 24, "width": 24})
    for processor, teacher in ((bordered, vit_processor(24)), (vit_processor(24), bordered)):
        with pytest.raises(InputError, match="one of them adds a border"):
            ImageDataset(photos(), processor, teacher_processor=teacher)


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


def test_batches_are_those_of_transformers():
    dataset = ImageDataset(photos(), vit_processor(), "pad_crop", teacher_processor=vit_processor(24))
    check_batch([dataset[index] for index in (3, 1, 5)])
    numbers = torch.arange(24.0).reshape(4, 3, 2)
    check_batch([{"x": part, "label": i, "y": [i, 2.5]} for i, part in enumerate(numbers)])
    check_batch([{"label": label} for label in torch.arange(3)])
    check_batch([{"x": x, "label_ids": label} for x, label in zip(numbers, torch.eye(4), strict=True)])


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


def test_bytes_are_not_joined_with_those_of_other_processors():
    examples = ImageDataset(photos(), vit_processor(), as_bytes=True).__getitems__([0, 1, 2])
    joined = PixelBytes.join([example["pixel_values"] for example in examples])
    picked = PixelBytes.join([examples[2]["pixel_values"], examples[0]["pixel_values"]])
    assert torch.equal(picked.values, joined.values[[2, 0]])
    other = ImageDataset(photos(), vit_processor(rescale_factor=1 / 128), as_bytes=True)
    with pytest.raises(ValueError, match="different image processors"):
        PixelBytes.join([examples[0]["pixel_values"], other[0]["pixel_values"]])


def test_workers_where_they_pay():
    small = ImageDataset(photos(), vit_processor(32), "pad_crop")
    seen = ImageDataset(photos(), vit_processor(32), "pad_crop", cache_images="none")
    large = ImageDataset(photos(), vit_processor(65), "pad_crop")
    cut = ImageDataset(photos(), vit_processor(32), "random_resized_crop")
    changed = ImageDataset(photos(), vit_processor(32), "pad_crop", operations=["autoaugment"])
    assert default_num_workers(small, 8, on_cuda=True) == default_num_workers(small, 8, on_cuda=False) == 0
    for dataset in (seen, large, cut, changed):
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


# ---- Images of all kinds and sizes

RED, SIZE = (200, 30, 20), (12, 10)


def rotated() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(Image.new("RGB", SIZE, RED), "JPEG", exif=exif, quality=95)


KINDS = {
    "RGB": lambda: stored(Image.new("RGB", SIZE, RED)),
    "RGBA": lambda: stored(Image.new("RGBA", SIZE, (*RED, 255))),
    "palette": lambda: stored(Image.new("RGB", SIZE, RED).convert("P", palette=Image.Palette.ADAPTIVE)),
    "CMYK": lambda: stored(Image.new("RGB", SIZE, RED).convert("CMYK"), "TIFF"),
    "grayscale": lambda: stored(Image.new("L", SIZE, 90)),
    "black and white": lambda: stored(Image.new("1", SIZE, 1)),
    "16 bits": lambda: stored(Image.fromarray(np.full(SIZE[::-1], 90 * 256, dtype=np.uint16))),
    "rotated by EXIF": rotated,
    "1 × 1": lambda: stored(Image.new("RGB", (1, 1), RED)),
    "10,000 × 50": lambda: stored(Image.new("RGB", (10_000, 50), RED)),
    "50 × 10,000": lambda: stored(Image.new("RGB", (50, 10_000), RED)),
}
COLOURS = {"grayscale": (90, 90, 90), "16 bits": (90, 90, 90), "black and white": (255, 255, 255)}


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
@pytest.mark.parametrize(
    "processor",
    [
        vit_processor(16),
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
    ],
    ids=["resized", "cropped"],
)
def test_images_of_all_kinds_and_sizes_in_one_data_set(processor, augmentation):
    data = labelled([make() for make in KINDS.values()] * 2)
    dataset = ImageDataset(data, processor, augmentation, teacher_processor=vit_processor(24), cache_images="none")
    for name, size in (("pixel_values", 16), ("teacher_pixel_values", 24)):
        pixels = torch.stack([example[name] for example in dataset.__getitems__(list(range(len(dataset))))])
        assert pixels.shape == (len(dataset), 3, size, size)
        assert pixels.isfinite().all()
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
    centres = ((pixels_of(dataset, range(len(KINDS))) * std + mean) * 255)[:, :, 8, 8]
    for kind, centre in zip(KINDS, centres, strict=True):
        np.testing.assert_allclose(centre.numpy(), COLOURS.get(kind, RED), atol=6, err_msg=kind)
