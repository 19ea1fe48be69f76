from __future__ import annotations

import functools
import io
import os
import re
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset

import bkd_hf.data
from bkd_hf import (
    InputError,
    class_counts,
    load_image_dataset,
    long_tail_metrics,
    long_tailed_counts,
    make_long_tailed,
)
from bkd_hf.data import PROFILES, fingerprint, limit_examples, shared_fingerprint, stored_images
from bkd_hf.image_folders import load_image_folder
from bkd_hf.streams import count_labels
from bkd_hf.training_data import training_labels

SIZE = (12, 10)


def balanced_set(num_classes: int = 10, per_class: int = 50) -> datasets.Dataset:
    labels = np.tile(np.arange(num_classes), per_class)
    features = datasets.Features({"x": datasets.Value("int64"), "label": datasets.ClassLabel(num_classes=num_classes)})
    return datasets.Dataset.from_dict({"x": np.arange(labels.size), "label": labels}, features=features)


def png(value: int, size: tuple[int, int] = (4, 4)) -> dict:
    file = io.BytesIO()
    Image.new("L", size, value).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def table(images: list[dict], **columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def saved(data: datasets.Dataset | datasets.DatasetDict, folder: Path) -> str:
    data.save_to_disk(str(folder))
    return str(folder)


def plain(number: int) -> list[dict]:
    return [png(i, SIZE) for i in range(number)]


def image_set(labels: list, feature, name: str = "label") -> datasets.Dataset:
    features = datasets.Features({"img": datasets.Image(), name: feature})
    images = [png(i % 256) for i in range(len(labels))]
    return datasets.Dataset.from_dict({"img": images, name: labels}, features=features)


# ---- Long-tailed counts and subsets


@pytest.mark.parametrize("profile", ["exp", "step"])
@pytest.mark.parametrize("ratio", [100, 50, 20, 10])
@pytest.mark.parametrize(("name", "classes", "count"), [("cifar10", 10, 5000), ("cifar100", 100, 500)])
def test_published_counts(golden, name, classes, count, ratio, profile):
    assert long_tailed_counts(count, classes, ratio, profile) == golden["class_counts"][f"{name}_{profile}_ir{ratio}"]


@given(count=st.integers(1, 10_000), classes=st.integers(2, 300), ratio=st.floats(1, 1e6))
def test_laws_of_counts(count, classes, ratio):
    for profile in PROFILES:
        counts = long_tailed_counts(count, classes, ratio, profile)
        assert len(counts) == classes
        assert counts[0] == count
        assert counts == sorted(counts, reverse=True)
        assert abs(counts[-1] - count / ratio) <= 1 + 1e-6


def test_pareto_is_close_to_imagenet_lt():
    counts = long_tailed_counts(1280, 1000, 256, "pareto")
    assert (counts[0], counts[-1]) == (1280, 5)
    assert sum(counts) == pytest.approx(115_846, rel=0.05)  # Liu et al. (2019), who drew at random


@given(alpha=st.floats(1e-3, 1e6), classes=st.integers(2, 1000))
def test_pareto_of_any_alpha(alpha, classes):
    counts = long_tailed_counts(10_000, classes, 1000, "pareto", alpha)
    assert (counts[0], counts[-1]) == (10_000, 10)
    assert counts == sorted(counts, reverse=True)
    # With α → ∞ the quantiles are those of an exponential distribution, which has the shortest tail of them.
    limit = 10_000 * np.log(classes / np.arange(1, classes + 1)) / np.log(classes)
    assert (np.asarray(counts) <= np.maximum(limit, 10) + 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 5, 0.5), "imbalance_ratio must be a finite number ≥ 1, got 0.5"),
        ((10, 5, float("nan")), "imbalance_ratio"),
        ((10, 5, float("inf")), "imbalance_ratio"),
        ((10, 1, 2), "at least two classes"),
        ((0, 5, 2), "max_count"),
        ((10, 5, 2, "zipf"), "one of exp, step, pareto, got 'zipf'"),
        ((10, 5, 2, "pareto", 0), "pareto_alpha must be a finite number > 0, got 0"),
        ((10, 5, 2, "pareto", float("nan")), "pareto_alpha"),
    ],
)
def test_bad_counts(arguments, message):
    with pytest.raises(InputError, match=message):
        long_tailed_counts(*arguments)


def test_subset_has_the_counts_and_depends_on_split_seed_labels_and_index_alone():
    dataset = balanced_set()
    subset = make_long_tailed(dataset, "label", 10)
    assert class_counts(subset, "label") == long_tailed_counts(50, 10, 10)
    assert subset["x"] == sorted(subset["x"])  # the order of the data set
    assert make_long_tailed(dataset, "label", 10)["x"][:] == subset["x"][:]
    assert make_long_tailed(dataset, "label", 10, split_seed=1)["x"][:] != subset["x"][:]
    # A longer tail is contained in a shorter one.
    assert set(make_long_tailed(dataset, "label", 50)["x"]) < set(subset["x"])


def test_subset_is_the_same_on_every_machine():
    # Written down once: a change here changes every published split.
    assert make_long_tailed(balanced_set(3, 5), "label", 5)["x"][:] == [0, 1, 3, 6, 8, 9, 12, 13]


def test_class_order_max_count_and_alpha():
    subset = make_long_tailed(balanced_set(), "label", 10, "pareto", max_count=40, pareto_alpha=2)
    assert class_counts(subset, "label") == long_tailed_counts(40, 10, 10, "pareto", 2)
    subset = make_long_tailed(balanced_set(3, 50), "label", 4, max_count=20, class_order=[2, 0, 1])
    assert class_counts(subset, "label") == [10, 5, 20]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_longer_tail_is_contained_in_a_shorter_one(profile):
    subsets = [set(make_long_tailed(balanced_set(), "label", ratio, profile)["x"]) for ratio in (50, 10, 2)]
    assert subsets[0] < subsets[1] < subsets[2]


def test_never_more_than_a_class_has():
    labels = [0] * 10 + [1] * 3 + [2] * 9
    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b", "c"])})
    dataset = datasets.Dataset.from_dict({"label": labels}, features=features)
    with pytest.raises(InputError, match=r"1 of 3 classes \('b'\) cannot give .* class 1 has 3, its share is 7"):
        make_long_tailed(dataset, "label", 2, max_count=10)
    assert class_counts(make_long_tailed(dataset, "label", 2), "label") == [4, 2, 2]  # by default it fits


def test_no_class_is_left_empty():
    with pytest.raises(
        InputError, match=r"imbalance_ratio 1000 leaves 4 of 10 classes \('6', '7', '8', '9'\) without images"
    ):
        make_long_tailed(balanced_set(), "label", 1000)


def test_limit_keeps_every_class():
    subset = make_long_tailed(balanced_set(), "label", 50)
    limited = limit_examples(subset, 40, "max_train_samples")
    assert min(class_counts(limited, "label")) == 1
    assert 30 <= len(limited) <= 45
    with pytest.raises(InputError, match="--max_train_samples 5 is fewer than one example for each of the 10"):
        limit_examples(subset, 5, "max_train_samples")


# ---- Labels


def test_class_counts_follow_selections():
    labels = np.random.default_rng(0).integers(0, 1000, 1_280_000)  # a loop over them would be noticed
    features = datasets.Features({"label": datasets.ClassLabel(num_classes=1001)})
    dataset = datasets.Dataset.from_dict({"label": labels}, features=features)
    shuffled = dataset.select(np.random.default_rng(1).permutation(labels.size)[:1_000_000])
    counts = class_counts(dataset, "label")
    assert sum(class_counts(shuffled, "label")) == 1_000_000
    assert counts == np.bincount(labels, minlength=1001).tolist()
    small = dataset.select([5, 3, 5])
    assert Counter(small["label"]) == {c: n for c, n in enumerate(class_counts(small, "label")) if n}


def test_counts_of_bad_labels():
    with pytest.raises(InputError, match="no label column 'y'"):
        class_counts(balanced_set(), "y")
    with pytest.raises(InputError, match="not classes"):
        class_counts(datasets.Dataset.from_dict({"label": [0.5, 1.5]}), "label")
    with pytest.raises(InputError, match="Label -1"):
        class_counts(datasets.Dataset.from_dict({"label": [0, -1]}), "label")
    # What is missing is looked for, and counted, in the selection alone.
    gaps = datasets.Dataset.from_dict({"label": [None, 0, 1, None]})
    with pytest.raises(InputError, match=r"'label': 1 example has no label \(first: example 2\)"):
        class_counts(gaps.select([1, 2, 3]), "label")
    assert class_counts(gaps.select([1, 2]), "label") == [1, 1]


# ---- Loading


def test_digits_come_without_network():
    data = load_image_dataset("digits")
    assert class_counts(data["eval"], "label") == [40] * 10
    assert len(data["train"]) == 1797 - 400
    assert data["train"][0]["image"].size == (8, 8)
    assert fingerprint(data["train"]) == fingerprint(load_image_dataset("digits")["train"])
    assert fingerprint(data["train"]) != fingerprint(data["eval"])


def test_fingerprints_of_files(tmp_path, monkeypatch):
    """Images are what they show: other pixels in a file of the same name, size and time are others."""
    train = load_image_dataset(fill(tmp_path, {"train/cat": 6, "train/dog": 6, "val/cat": 2, "val/dog": 2}))["train"]
    files = [Path(image["path"]) for image in stored_images(train)]
    stored = [{"bytes": path.read_bytes(), "path": None} for path in files]
    embedded = datasets.Dataset.from_dict({"image": stored, "label": train["label"]}, features=train.features)
    whole = fingerprint(train)
    assert whole == fingerprint(embedded)

    def other_pixels(number: int, keep_time: bool = True) -> None:
        path, time = files[number], files[number].stat().st_mtime_ns
        path.write_bytes(path.read_bytes()[::-1])
        if keep_time:
            os.utime(path, ns=(time, time))

    other_pixels(3)
    assert fingerprint(train) != whole
    # Of too many to read, some are read; for caches of this machine, the time tells of the others.
    monkeypatch.setattr("bkd_hf.data.READABLE_BYTES", sum(path.stat().st_size for path in files) // 3)
    found = [(fingerprint(train), fingerprint(train, with_times=True))]
    for number, keep_time in ((0, True), (1, False)):
        other_pixels(number, keep_time)
        found.append((fingerprint(train), fingerprint(train, with_times=True)))
    os.utime(files[2])  # as if it had been copied
    assert (len({plain for plain, _ in found}), len({timed for _, timed in found})) == (2, 3)
    assert fingerprint(train) == found[-1][0]
    assert all(sampled.endswith("-sampled") for both in found for sampled in both)
    assert fingerprint(embedded) != fingerprint(embedded, read_all=True) == whole
    assert not fingerprint(train, read_all=True).endswith("-sampled")


def test_fingerprints_of_large_sets_are_made_once(monkeypatch):
    train, asked = load_image_dataset("digits")["train"], []
    monkeypatch.setattr("bkd_hf.data.READABLE_BYTES", 50_000)
    monkeypatch.setattr("bkd_hf.data._QUICK_BYTES", 10_000)
    digest = bkd_hf.data._digest
    monkeypatch.setattr("bkd_hf.data._digest", lambda data, n, **how: asked.append(n) or digest(data, n, **how))
    found = shared_fingerprint(train)
    assert found.endswith("-sampled")
    assert found == fingerprint(train) == fingerprint(train.select_columns(["label", "image"]))
    assert (shared_fingerprint(train), asked.count(50_000)) == (found, 1)
    assert fingerprint(train.select(range(len(train) - 1))) != found != fingerprint(train.select(range(1, len(train))))
    # Where all images can be read, they are read once for all kinds of fingerprints.
    monkeypatch.setattr("bkd_hf.data.READABLE_BYTES", 50_000_000)
    bkd_hf.data._fingerprints.clear()
    found = {fingerprint(train), fingerprint(train, with_times=True), fingerprint(train, read_all=True)}
    assert len(found) == 1
    assert asked.count(50_000_000) + asked.count(None) == 1


@pytest.mark.parametrize(
    ("others", "eval_split", "expected", "untouched"),
    [
        ({"validation": 4, "test": 6}, None, 4, 6),
        ({"val": 4}, None, 4, None),
        ({"test": 6}, None, 6, 6),
        ({"held_out": 8}, "held_out", 8, 8),
        ({"held_out": 8}, None, 4, None),
        ({}, None, 4, None),
    ],
    ids=str,
)
def test_evaluation_splits(tmp_path, others, eval_split, expected, untouched):
    feature = datasets.ClassLabel(names=["cat", "dog"])
    data = {split: image_set([0, 1] * (size // 2), feature) for split, size in {"train": 20, **others}.items()}
    load = functools.partial(load_image_dataset, saved(datasets.DatasetDict(data), tmp_path), eval_split=eval_split)
    assert len(load()["eval"]) == expected
    if untouched is not None:
        assert len(load(untouched_test=True)["eval"]) == untouched
    elif "val" not in others:
        with pytest.raises(InputError, match="has no test split, which nobody trains on: it has train"):
            load(untouched_test=True)


@pytest.mark.parametrize("of_test", [datasets.ClassLabel(names=["dog", "cat"]), datasets.Value("int64")])
def test_every_split_must_name_its_classes_alike(tmp_path, of_test):
    feature = datasets.ClassLabel(names=["cat", "dog"])
    features = {"train": feature, "validation": feature, "test": of_test}
    path = saved(
        datasets.DatasetDict({split: image_set([0, 1] * 5, each) for split, each in features.items()}), tmp_path
    )
    with pytest.raises(InputError, match="the training and the evaluation split name their classes differently"):
        load_image_dataset(path, untouched_test=True)


def test_parquet_without_evaluation_split_is_carved_stratified(tmp_path):
    path = tmp_path / "data.parquet"
    image_set(["b", "a", "b", "b", "a"] * 10 + ["c", "c"], datasets.Value("string"), "label").to_parquet(path)
    loaded = load_image_dataset(str(path))
    assert loaded["train"].features["label"].names == ["a", "b", "c"]
    assert class_counts(loaded["eval"], "label") == [4, 6, 1]
    assert class_counts(loaded["train"], "label") == [16, 24, 1]


def test_integers_with_gaps_are_renumbered(tmp_path, caplog):
    path = tmp_path / "data.parquet"
    image_set([10, 30, 30, 20, 10, 20], datasets.Value("int32")).to_parquet(path)
    loaded = load_image_dataset(str(path))
    assert loaded["train"].features["label"].names == ["10", "20", "30"]
    assert sorted(loaded["train"]["label"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.5, 1.5, 2.0], datasets.Value("float64"), "are not classes"),
        ([[0], [1], [0, 1]], datasets.List(datasets.Value("int64")), r"not classes.*several labels per image \(multi"),
        ([["cat"], ["cat", "dog"]], datasets.List(datasets.Value("string")), "multi-label"),
        ([[0, 1], [1]], datasets.List(datasets.ClassLabel(names=["cat", "dog"])), "multi-label"),
        ([0, 0, 0], datasets.ClassLabel(names=["only"]), "one class only"),
        (["x", "x", "x"], datasets.Value("string"), "one class only"),
        (
            [0, 1, 0, 1],
            datasets.ClassLabel(names=["a", "b", "ghost"]),
            r"1 of 3 classes \('ghost'\) has a name but no",
        ),
        (["a", None, "b"], datasets.Value("string"), r"'label': 1 example has no label \(first: example 1\)"),
        ([0, 1, None, None], datasets.ClassLabel(names=["a", "b"]), r"'label': 2 examples have no label \(first: exa"),
        ([0, -1, 1], datasets.ClassLabel(names=["a", "b"]), "Label -1"),
    ],
)
def test_bad_labels(tmp_path, labels, feature, message):
    path = tmp_path / "data.parquet"
    image_set(labels, feature).to_parquet(path)
    with pytest.raises(InputError, match=message):
        load_image_dataset(str(path))


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}])
def test_missing_images_are_refused(tmp_path, nothing):
    path = tmp_path / "data.parquet"
    images = pa.array([png(0), nothing, png(2), nothing], datasets.Image().pa_type)
    table = pa.table({"img": images, "label": [0, 1, 0, 1]})
    datasets.Dataset(table).cast_column("img", datasets.Image()).to_parquet(path)
    with pytest.raises(
        InputError, match=r"data\.parquet: split 'train', column 'img': 2 examples have no image \(first: example 1\)"
    ):
        load_image_dataset(str(path))


def test_paths_without_a_file_are_refused(tmp_path):
    path, label = tmp_path / "data.parquet", [0, 1] * 4
    datasets.Dataset.from_dict({"file": ["nowhere.png"] * 8, "label": label}).to_parquet(path)
    loaded = load_image_dataset(str(path), image_column="file")
    for read_all in (False, True):
        with pytest.raises(InputError, match=r"Image 0 \(nowhere\.png\) cannot be read: No such file or directory"):
            fingerprint(loaded["train"], read_all)


def test_files_with_other_columns_are_refused(tmp_path):
    image_set([0, 1] * 4, datasets.Value("int64")).to_parquet(tmp_path / "a.parquet")
    image_set([0, 1] * 4, datasets.Value("int64"), "other").to_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"cannot be loaded.* its files differ in their columns"):
        load_image_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "./nowhere"}, "--dataset_name ./nowhere: there is no such file or folder"),
        ({"image_column": "photo"}, "--image_column_name photo: .* has the columns img, label"),
        ({"image_column": "label"}, "--image_column_name label: the column holds"),
        ({"label_column": "y"}, "--label_column_name y"),
        ({"train_split": "training"}, "--train_split_name training: .* has the splits train"),
        ({"eval_split": "test"}, "--eval_split_name test: .* has the splits train"),
        ({"eval_split": "train"}, "is the training split"),
    ],
)
def test_bad_names(tmp_path, arguments, message):
    path = tmp_path / "data.parquet"
    image_set([0, 1] * 5, datasets.ClassLabel(names=["a", "b"])).to_parquet(path)
    with pytest.raises(InputError, match=message):
        load_image_dataset(**{"name": str(path), **arguments})


def test_unknown_hub_id():
    with pytest.raises(InputError, match="--dataset_name nobody/nothing cannot be loaded"):
        load_image_dataset("nobody/nothing")


def test_files_that_number_their_classes_differently_are_refused(tmp_path):
    for name, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        image_set([0, 1] * 4, datasets.ClassLabel(names=names)).to_parquet(tmp_path / f"{name}.parquet")
    for load in (load_image_dataset, count_labels):
        with pytest.raises(InputError, match=r"train.parquet and test.parquet name their classes differently"):
            load(str(tmp_path))
    image_set([0] * 4, datasets.ClassLabel(names=["cat"])).to_parquet(tmp_path / "test.parquet")
    assert load_image_dataset(str(tmp_path))["eval"]["label"][:] == [0] * 4  # the same numbers, though fewer


def test_an_output_format_is_left_behind(tmp_path):
    data = image_set([0, 1] * 5, datasets.ClassLabel(names=["a", "b"]))
    for number, (kind, columns) in enumerate((("torch", ["label"]), ("numpy", None))):
        data.with_format(kind, columns=columns).save_to_disk(path := tmp_path / str(number))
        loaded = load_image_dataset(str(path))["train"]
        assert isinstance(loaded[0]["image"], Image.Image)
        assert fingerprint(loaded.with_format("numpy", columns=["label"])) == fingerprint(loaded)
    assert fingerprint(loaded.with_transform(lambda batch: {"x": batch["label"]})) == fingerprint(loaded)


def test_two_columns_that_may_hold_the_labels(tmp_path):
    path = tmp_path / "data.parquet"
    data = image_set([0, 1] * 5, datasets.ClassLabel(names=["web", "photo"]), "source")
    data.add_column("label", ["cat", "dog"] * 5).to_parquet(path)
    with pytest.raises(InputError, match=r"are the labels in 'source' or in 'label'\? Say it by --label_column_name"):
        load_image_dataset(str(path))
    assert load_image_dataset(str(path), label_column="label")["train"].features["label"].names == ["cat", "dog"]


def test_configurations_of_a_folder(tmp_path):
    metadata = "---\nconfigs:\n"
    for name, labels in (("small", [0, 1] * 5), ("large", [0, 1] * 10)):
        image_set(labels, datasets.ClassLabel(names=["a", "b"])).to_parquet(tmp_path / f"{name}.parquet")
        metadata += f"- config_name: {name}\n  data_files: {name}.parquet\n"
    (tmp_path / "README.md").write_text(f"{metadata}---\n")
    assert sum(map(len, load_image_dataset(str(tmp_path), "large").values())) == 20
    for wrong in (None, "medium"):
        with pytest.raises(InputError, match=r"--dataset_config_name.* has the configurations 'small', 'large'"):
            load_image_dataset(str(tmp_path), wrong)


def test_a_configuration_of_what_has_none_is_refused(tmp_path):
    path = tmp_path / "data.parquet"
    data = image_set([0, 1] * 5, datasets.ClassLabel(names=["a", "b"]))
    data.to_parquet(path)
    data.save_to_disk(tmp_path / "saved")
    for name in ("digits", str(path), str(tmp_path / "saved")):
        with pytest.raises(InputError, match=r"--dataset_config_name small: .* has no configurations"):
            load_image_dataset(name, "small")


def test_empty_splits(tmp_path):
    feature = datasets.ClassLabel(names=["a", "b"])
    full, empty = image_set([0, 1] * 5, feature), image_set([0], feature).select([])
    datasets.DatasetDict({"train": full, "test": empty}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="one of its splits is empty"):
        load_image_dataset(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    full.to_parquet(tmp_path / "parquet" / "train.parquet")
    empty.to_parquet(tmp_path / "parquet" / "test.parquet")
    with pytest.raises(InputError, match=r"test.* corresponds to no data"):
        load_image_dataset(str(tmp_path / "parquet"))


# ---- Columns and labels of any data set


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


def test_class_that_is_absent_from_evaluation(tmp_path):
    data = datasets.DatasetDict(
        {"train": table(plain(9), label=["a", "b", "c"] * 3), "test": table(plain(4), label=["a", "c"] * 2)}
    )
    splits = load_image_dataset(saved(data, tmp_path / "data"))
    assert class_counts(splits["eval"]) == [2, 0, 2]
    metrics = long_tail_metrics(np.eye(3)[[0, 2, 0, 1]], np.array([0, 2, 0, 2]), class_counts(splits["train"]))
    assert metrics["per_class_accuracy"] == [1.0, None, 0.5]
    assert metrics["worst_class_accuracy"] == 0.5


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


# ---- Folders of class folders, as people have them


def fill(root: Path, folders: dict[str, int], name: str = "{}.png") -> str:
    """Write so many images into each folder, of which no two are alike."""
    for number, (folder, count) in enumerate(folders.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (2, 2), (number, i, 0)).save(root / folder / name.format(i))
    return str(root)


def counts(root: str) -> dict[str, dict[str, int]]:
    """Images of each class, by split."""
    return {
        split: dict(zip(data.features["label"].names, class_counts(data), strict=True))
        for split, data in (load_image_folder(root) or {}).items()
    }


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        # A word of a class's name is no split, …
        (
            {"train/cat": 9, "train/steam_train": 9, "test/cat": 3, "test/steam_train": 3},
            {"train": {"cat": 9, "steam_train": 9}, "test": {"cat": 3, "steam_train": 3}},
        ),
        (
            {"train/cat": 9, "train/test tube": 9, "val/cat": 3, "val/test tube": 3},
            {"train": {"cat": 9, "test tube": 9}, "validation": {"cat": 3, "test tube": 3}},
        ),
        ({"train/cat": 4, "train/train": 5}, {"train": {"cat": 4, "train": 5}}),
        # … nor a whole name, where the folders hold images.
        ({"steam_train": 3, "bullet_train": 4, "bus": 5}, {"train": {"bullet_train": 4, "bus": 5, "steam_train": 3}}),
        ({"bus": 3, "car": 4, "train": 5}, {"train": {"bus": 3, "car": 4, "train": 5}}),
        ({"train": 3, "test": 4}, {"train": {"test": 4, "train": 3}}),
        # Splits, as they are called.
        ({"Train/a": 3, "Train/b": 3, "TEST/b": 1}, {"train": {"a": 3, "b": 3}, "test": {"a": 0, "b": 1}}),
        ({"train_set/a": 3, "train_set/b": 3, "test_set/a": 1}, {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 0}}),
        ({"train/a": 3, "train/b": 3, "unseen/a": 1}, {"train": {"a": 3, "b": 3}, "unseen": {"a": 1, "b": 0}}),
        # Deeper trees.
        (
            {"pets/train/a": 3, "pets/train/b": 2, "pets/val/a": 1},
            {"train": {"a": 3, "b": 2}, "validation": {"a": 1, "b": 0}},
        ),
        ({"train/plants/7": 3, "train/birds/12": 2}, {"train": {"12": 2, "7": 3}}),
        ({"all/a": 3, "all/b": 2}, {"train": {"a": 3, "b": 2}}),
    ],
    ids=str,
)  # fmt: skip
def test_splits_and_classes(tmp_path, folders, expected):
    assert counts(fill(tmp_path, folders)) == expected


def test_names_of_files_say_nothing(tmp_path):
    root = fill(tmp_path, {"cat": 20, "dog": 20}, "img_test_{}.png")
    fill(tmp_path, {"cat": 60, "dog": 20})
    assert counts(root) == {"train": {"cat": 80, "dog": 40}}


def test_each_image_has_the_class_of_its_folder(tmp_path):
    data = load_image_dataset(fill(tmp_path, {"train/b": 3, "train/a": 2, "test/b": 2, "test/a": 1}))
    for split, colours in (("train", {"b": 0, "a": 1}), ("eval", {"b": 2, "a": 3})):
        for example in data[split]:
            name = data[split].features["label"].int2str(example["label"])
            assert example["image"].getpixel((0, 0))[0] == colours[name]


def test_what_is_hidden_or_no_image_is_left_out(tmp_path, caplog):
    root = fill(tmp_path, {"a": 3, "b": 2, "__background__": 1, "__MACOSX/a": 3, ".thumbnails": 4})
    (tmp_path / "a" / "notes.heic").write_text("no image by its name")
    (tmp_path / "a" / ".DS_Store").write_text("")
    (tmp_path / "LICENSE").write_text("")
    (tmp_path / "c" / "d").mkdir(parents=True)
    assert counts(root) == {"train": {"__background__": 1, "a": 3, "b": 2}}
    assert "left out, as they are no images by their names: a/notes.heic." in caplog.text
    assert "left out, as there is no file in it: c." in caplog.text


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"": 2, "a": 3, "b": 2}, r"lie in no class folder \(2 of 7\), such as 0.png: expected CLASS/IMAGE"),
        ({"train/a": 3, "train": 1}, r"no class folder \(1 of 4\), such as train/0.png: expected SPLIT/CLASS/IMAGE"),
        ({"": 2}, "no class folder"),
        ({"cat/left": 2, "cat/right": 2, "dog/left": 2}, "which folder is the class.*cat/left and dog/left"),
    ],
    ids=str,
)  # fmt: skip
def test_images_without_a_class_are_refused(tmp_path, folders, message):
    with pytest.raises(InputError, match=message):
        load_image_dataset(fill(tmp_path, folders))


def test_a_folder_that_describes_itself_is_left_to_datasets(tmp_path):
    root = fill(tmp_path, {"a": 6, "b": 6})
    rows = "".join(f"{name}/{i}.png,{i % 2}\n" for name in "ab" for i in range(6))
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}")
    assert load_image_folder(root) is None
    data = load_image_dataset(root)
    assert data["train"].features["label"].names == ["0", "1"]

    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "metadata.png")  # an image like all others
    assert load_image_dataset(root)["train"].features["label"].names == ["a", "b"]
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*\n"
        "  - split: test\n    path: b/*\n---\n"
    )
    assert load_image_folder(root) is None


def test_a_folder_with_the_name_of_the_demo_is_told(tmp_path, monkeypatch, caplog):
    fill(tmp_path / "digits", {"a": 6, "b": 6})
    monkeypatch.chdir(tmp_path)
    assert load_image_dataset("digits")["train"].features["label"].names[0] == "0"
    assert "--dataset_name digits is the demo of this name. For the folder here, write ./digits" in caplog.text
    assert load_image_dataset("./digits")["train"].features["label"].names == ["a", "b"]


# ---- Files that are none


@pytest.mark.parametrize(
    ("make_special", "message"),
    [
        (lambda path: os.mkfifo(path), "x.png is no file: it is a pipe, a device, or a link to nothing"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "x.png is no file"),
        (lambda path: path.symlink_to("/dev/zero"), "x.png is no file"),
        (lambda path: path.symlink_to("nowhere.png"), "x.png is no file"),
        (lambda path: path.symlink_to("x.png"), "x.png is no file"),
        (lambda path: path.with_name("up").symlink_to(".."), "up is a link back to a folder that it lies in"),
        (lambda path: Path(os.fsdecode(bytes(path.parent) + b"/\xe9.png")).touch(), "this name is no text in utf-8"),
        (lambda path: path.parent.with_name("README.md").write_text("---\na: [1\n: x\n---\n"), "are no YAML"),
        (
            lambda path: path.parent.with_name("README.md").write_bytes(b"---\nlicense: \xe9\n---\n"),
            "Save it as UTF-8",
        ),
        (lambda path: path.with_name("metadata.csv").write_bytes(b"file_name,label\n0.png,\xe9\n"), "not in UTF-8"),
        (lambda path: path.with_name("metadata.jsonl").write_text("{"), "cannot be loaded"),
    ],
)
def test_folders_with_what_is_no_image(tmp_path, monkeypatch, make_special, message):
    fill(tmp_path, {"a": 3, "b": 3})
    monkeypatch.chdir(tmp_path / "a")  # the path of a socket has to be short
    make_special(tmp_path / "a" / "x.png" if "bind" not in make_special.__code__.co_names else Path("x.png"))
    with pytest.raises(InputError, match=message) as raised:
        load_image_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "files",
    [
        {"x.parquet": b"PAR1xxx"},
        {"dataset_dict.json": b"{"},
        {"state.json": b"[]", "dataset_info.json": b"[]"},
    ],
)
def test_data_sets_that_are_none(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="cannot be loaded") as raised:
        load_image_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    assert "\n" not in str(raised.value)


def test_a_stored_path_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "x.jpg")], "label": [0]}, features=features)
    for read_all in (False, True):
        with pytest.raises(InputError, match="cannot be read: it is no regular file"):
            fingerprint(dataset, read_all)


def test_labels_do_not_reserve_memory():
    dataset = datasets.Dataset.from_dict({"label": [0, 999_999_999_999]})
    with pytest.raises(InputError, match="Label 999999999999 in column 'label'"):
        class_counts(dataset)


# ---- Spellings of accents


def test_spellings_of_a_class_are_one_class(tmp_path):
    composed, apart = "\u00e9", "e\u0301"
    root = fill(tmp_path / "x", {f"train/{composed}": 3, "train/b": 2, f"test/{apart}": 1})
    fill(tmp_path / "x", {f"train/{apart}": 2}, "more{}.png")
    assert counts(root) == {"train": {"b": 2, composed: 5}, "test": {"b": 0, composed: 1}}

    image = {"bytes": (tmp_path / "x" / "train" / "b" / "0.png").read_bytes(), "path": None}
    columns = {"image": [image] * 3, "label": [composed, apart, "b"]}
    names = {split: datasets.Dataset.from_dict(columns) for split in ("train", "test")}
    loaded = load_saved(names, tmp_path / "names")
    assert loaded["train"].features["label"].names == ["b", composed]
    assert class_counts(loaded["eval"]) == [1, 2]

    named = {
        split: datasets.Dataset.from_dict(
            {"image": [image] * 2, "label": [0, 1]},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[name, "b"])}),
        )
        for split, name in (("train", apart), ("test", composed))
    }
    loaded = load_saved(named, tmp_path / "named")
    assert loaded["train"].features["label"].names == loaded["eval"].features["label"].names == [composed, "b"]


def load_saved(splits: dict[str, datasets.Dataset], folder: Path) -> datasets.DatasetDict:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return load_image_dataset(str(folder))


@pytest.mark.parametrize("ratio", [49, 98, 103, 107])
def test_a_share_that_is_whole_is_not_cut_by_rounding(ratio):
    assert min(long_tailed_counts(ratio, 10, ratio)) == 1
    assert set(long_tailed_counts(12 * ratio, 10, ratio, "step")) == {12 * ratio, 12}


@pytest.mark.parametrize("ratio", [93, 99, 186])
def test_the_smallest_class_may_limit_the_others(ratio):
    """1 / (1 / 93) is below 93 in floating point."""
    tail = make_long_tailed(image_set([0] * ratio + [1], datasets.ClassLabel(names=["a", "b"])), imbalance_ratio=ratio)
    assert class_counts(tail) == [ratio, 1]


@pytest.mark.parametrize("counts", [(49, 20, 112, 7, 3), (30, 30, 30, 30, 30)])
def test_a_ratio_that_is_too_large_names_the_largest_that_fits(counts):
    labels = np.repeat(np.arange(5), counts).tolist()
    data = image_set(labels, datasets.ClassLabel(names=list("abcde")))
    with pytest.raises(InputError, match="choose a ratio of") as refused:
        make_long_tailed(data, imbalance_ratio=1000)
    ratio = int(re.search(r"a ratio of (\d+) or below", str(refused.value))[1])
    assert min(class_counts(make_long_tailed(data, imbalance_ratio=ratio))) == 1
    with pytest.raises(InputError):
        make_long_tailed(data, imbalance_ratio=ratio + 1)
    assert ("long-tailed already (112 to 3 per class)" in str(refused.value)) == (counts[0] != 30)


@pytest.mark.filterwarnings("error")
def test_a_tail_that_is_cut_by_class_numbers_is_told():
    data = image_set(np.repeat(np.arange(3), (10, 40, 20)).tolist(), datasets.ClassLabel(names=list("abc")))
    with pytest.warns(UserWarning, match=r"long-tailed already \(40 to 10 per class\), .*keeps 17 of 70"):
        assert class_counts(make_long_tailed(data, imbalance_ratio=4)) == [10, 5, 2]
    assert class_counts(make_long_tailed(data, imbalance_ratio=4, class_order=[1, 2, 0])) == [10, 40, 20]


@pytest.mark.parametrize(("train", "test"), [([0, 1], ["a", "b"]), (["a", "b"], [0, 1])])
def test_splits_whose_labels_are_of_other_types_are_refused(tmp_path, train, test):
    splits = {
        name: image_set(labels, datasets.Value("int64" if labels[0] == 0 else "string"))
        for name, labels in {"train": train * 4, "test": test}.items()
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    with pytest.raises(InputError, match=r"'label' are of other types in other splits \(train: \w+, eval: \w+\)"):
        load_image_dataset(str(tmp_path))


def test_one_column_for_images_and_labels_is_refused():
    with pytest.raises(InputError, match="--image_column_name image: the labels are in this column, too"):
        load_image_dataset("digits", image_column="image", label_column="image")


class Targets(torch.utils.data.Dataset):
    """As those of torchvision."""

    def __init__(self, targets: list[int], target_transform: Any = None):
        self.targets, self.target_transform, self.num_read = targets, target_transform, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, int]:
        self.num_read += 1
        target = self.targets[index]
        return {"labels": self.target_transform(target) if self.target_transform else target}


def test_labels_of_parts_are_not_read_one_by_one():
    data = Targets([2, 1, 0, 1])
    assert training_labels(Subset(Subset(data, [3, 0, 2]), range(2))).tolist() == [1, 2]
    assert data.num_read == 0


def test_labels_are_those_after_a_transform():
    assert training_labels(Targets([0, 0, 1], lambda target: 1 - target)).tolist() == [1, 1, 0]
