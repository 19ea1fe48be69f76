"""Data sets as they are on the Hub: their columns, splits, labels, and images of every kind and size."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

from bkd_hf import ImageDataset, InputError, class_counts, load_image_dataset, long_tail_metrics, make_long_tailed
from tests.test_images import pixels_of, vit_processor

RED, SIZE = (200, 30, 20), (12, 10)


def encoded(image: Image.Image, format: str = "PNG", **options) -> dict:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return {"bytes": file.getvalue(), "path": None}


def table(images: list[dict], **columns) -> datasets.Dataset:
    data = datasets.Dataset.from_dict({"image": images, **columns})
    return data.cast_column("image", datasets.Image())


def saved(data: datasets.Dataset | datasets.DatasetDict, folder: Path) -> str:
    data.save_to_disk(str(folder))
    return str(folder)


def plain(number: int) -> list[dict]:
    return [encoded(Image.new("RGB", SIZE, (i, 0, 0))) for i in range(number)]


# ---- Columns, splits, labels


@pytest.mark.parametrize(
    ("image_column", "label_column", "labels", "names"),
    [
        ("image", "label", [0, 1] * 10, ["0", "1"]),
        ("img", "fine_label", [0, 1] * 10, ["0", "1"]),
        ("photo", "label", ["cat", "dog"] * 10, ["cat", "dog"]),
        ("image", "labels", [True, False] * 10, ["False", "True"]),
    ],
)
def test_columns_and_labels(tmp_path, image_column, label_column, labels, names):
    data = table(plain(20), **{label_column: labels})
    if image_column != "image":
        data = data.rename_column("image", image_column)
    splits = load_image_dataset(saved(data, tmp_path / "data"))
    assert splits["train"].column_names == ["image", "label"]
    assert splits["train"].features["label"].names == names
    assert len(splits["train"]) + len(splits["eval"]) == 20


@pytest.mark.parametrize("named", [None, "photo"])
@pytest.mark.parametrize(
    ("kind", "as_stored"),
    [
        (pa.struct({"bytes": pa.binary(), "path": pa.string()}), lambda image: image),
        (pa.struct({"path": pa.large_string(), "bytes": pa.large_binary()}), lambda image: image),
        (pa.struct({"bytes": pa.binary()}), lambda image: {"bytes": image["bytes"]}),
        (pa.binary(), lambda image: image["bytes"]),
        (pa.large_binary(), lambda image: image["bytes"]),
    ],
    ids=["struct", "struct of polars", "bytes in a struct", "bytes", "bytes of polars"],
)
def test_tables_that_do_not_say_which_column_holds_images(tmp_path, kind, as_stored, named):
    path = tmp_path / "data.parquet"
    images = pa.array([as_stored(image) for image in plain(20)], kind)
    pq.write_table(pa.table({"id": list(range(20)), "photo": images, "label": ["cat", "dog"] * 10}), path)
    loaded = load_image_dataset(str(path), image_column=named)
    assert loaded["train"][0]["image"].size == SIZE
    assert loaded["train"].features["label"].names == ["cat", "dog"]


def test_columns_of_bytes_are_images_where_nothing_else_is(tmp_path):
    stored = pa.array(plain(8), datasets.Image().pa_type)
    columns = {"image": stored, "mask": pa.array([b"?"] * 8, pa.binary()), "label": [0, 1] * 4}
    pq.write_table(pa.table(columns), tmp_path / "one.parquet")
    assert load_image_dataset(str(tmp_path / "one.parquet"))["train"][0]["image"].size == SIZE
    columns["image"] = stored.field("bytes")
    pq.write_table(pa.table(columns), tmp_path / "two.parquet")
    with pytest.raises(InputError, match="has 2 image columns; name the one to use by --image_column_name"):
        load_image_dataset(str(tmp_path / "two.parquet"))
    assert load_image_dataset(str(tmp_path / "two.parquet"), image_column="image")["train"][0]["image"].size == SIZE


def test_nested_folders_with_splits(tmp_path):
    for split, number in (("train", 3), ("validation", 2)):
        for name in ("ant", "bee"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", SIZE, (i, 9, 9)).save(tmp_path / "data" / split / name / f"{i}.jpg")
    splits = load_image_dataset(str(tmp_path / "data"))
    assert splits["train"].features["label"].names == ["ant", "bee"]
    assert (len(splits["train"]), len(splits["eval"])) == (6, 4)


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_evaluation_split_under_any_usual_name(tmp_path, name):
    data = datasets.DatasetDict(
        {"train": table(plain(8), label=["a", "b"] * 4), name: table(plain(4), label=["a", "b"] * 2)}
    )
    assert len(load_image_dataset(saved(data, tmp_path / "data"))["eval"]) == 4


def test_evaluation_split_under_an_unusual_name(tmp_path):
    data = datasets.DatasetDict(
        {"train": table(plain(8), label=["a", "b"] * 4), "held_out": table(plain(4), label=["a", "b"] * 2)}
    )
    folder = saved(data, tmp_path / "data")
    assert len(load_image_dataset(folder, eval_split="held_out")["eval"]) == 4
    with pytest.raises(InputError, match=r"--eval_split_name hold_out: .* has the splits train, held_out"):
        load_image_dataset(folder, eval_split="hold_out")


def test_class_that_is_absent_from_evaluation(tmp_path):
    data = datasets.DatasetDict(
        {"train": table(plain(9), label=["a", "b", "c"] * 3), "test": table(plain(4), label=["a", "c"] * 2)}
    )
    splits = load_image_dataset(saved(data, tmp_path / "data"))
    assert class_counts(splits["eval"]) == [2, 0, 2]
    metrics = long_tail_metrics(np.eye(3)[[0, 2, 0, 1]], np.array([0, 2, 0, 2]), class_counts(splits["train"]))
    assert metrics["per_class_accuracy"] == [1.0, None, 0.5]
    assert metrics["worst_class_accuracy"] == 0.5


@pytest.mark.parametrize(
    "labels", [[["cat"], ["cat", "dog"]] * 4, [[0, 1], [1]] * 4], ids=["lists of names", "lists of numbers"]
)
def test_several_labels_per_image_are_refused(tmp_path, labels):
    folder = saved(table(plain(8), label=labels), tmp_path / "data")
    with pytest.raises(InputError, match=r"several labels per image \(multi-label\)"):
        load_image_dataset(folder)


def test_multi_hot_labels_of_named_classes_are_refused(tmp_path):
    feature = datasets.List(datasets.ClassLabel(names=["cat", "dog"]))
    data = table(plain(8), label=[[0, 1], [1]] * 4).cast_column("label", feature)
    with pytest.raises(InputError, match="multi-label"):
        load_image_dataset(saved(data, tmp_path / "data"))


def test_ten_thousand_classes(tmp_path):
    one = plain(1)
    names = [f"species {number}" for number in range(10_000)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    labels = np.repeat(np.arange(10_000), 3)
    data = datasets.Dataset.from_dict({"image": one * len(labels), "label": labels}, features=features)
    splits = load_image_dataset(saved(data, tmp_path / "data"))
    assert class_counts(splits["train"]) == [2] * 10_000
    tail = make_long_tailed(splits["train"], imbalance_ratio=2)
    assert min(class_counts(tail)) == 1
    logits = np.eye(10_000, dtype=np.float32)[::50]
    metrics = long_tail_metrics(logits, np.arange(0, 10_000, 50), class_counts(tail))
    assert metrics["accuracy"] == 1.0


# ---- Images


def rotated() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", SIZE, RED), "JPEG", exif=exif, quality=95)


KINDS = {
    "RGB": lambda: encoded(Image.new("RGB", SIZE, RED)),
    "RGBA": lambda: encoded(Image.new("RGBA", SIZE, (*RED, 255))),
    "palette": lambda: encoded(Image.new("RGB", SIZE, RED).convert("P", palette=Image.Palette.ADAPTIVE)),
    "CMYK": lambda: encoded(Image.new("RGB", SIZE, RED).convert("CMYK"), "TIFF"),
    "grayscale": lambda: encoded(Image.new("L", SIZE, 90)),
    "black and white": lambda: encoded(Image.new("1", SIZE, 1)),
    "16 bits": lambda: encoded(Image.fromarray(np.full(SIZE[::-1], 90 * 256, dtype=np.uint16))),
    "rotated by EXIF": rotated,
    "1 × 1": lambda: encoded(Image.new("RGB", (1, 1), RED)),
    "10,000 × 50": lambda: encoded(Image.new("RGB", (10_000, 50), RED)),
    "50 × 10,000": lambda: encoded(Image.new("RGB", (50, 10_000), RED)),
}
COLOURS = {"grayscale": (90, 90, 90), "16 bits": (90, 90, 90), "black and white": (255, 255, 255)}


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
@pytest.mark.parametrize(
    "processor",
    [
        vit_processor(16),
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
    ],
    ids=["resized", "cropped"],
)
def test_images_of_all_kinds_and_sizes_in_one_data_set(tmp_path, processor, augmentation):
    data = table([make() for make in KINDS.values()] * 2, label=["a", "b"] * len(KINDS))
    data = data.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    dataset = ImageDataset(data, processor, augmentation, teacher_processor=vit_processor(24), cache_images="none")
    for name, size in (("pixel_values", 16), ("teacher_pixel_values", 24)):
        pixels = torch.stack([example[name] for example in dataset.__getitems__(list(range(len(dataset))))])
        assert pixels.shape == (len(dataset), 3, size, size)
        assert pixels.isfinite().all()
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
    centres = ((pixels_of(dataset, range(len(KINDS))) * std + mean) * 255)[:, :, 8, 8]
    for kind, centre in zip(KINDS, centres, strict=True):
        np.testing.assert_allclose(centre.numpy(), COLOURS.get(kind, RED), atol=6, err_msg=kind)
