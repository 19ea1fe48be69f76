from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bkd_hf import InputError, class_counts, load_image_dataset, long_tailed_counts, make_long_tailed
from bkd_hf.data import PROFILES, fingerprint, limit_examples, stored_images


def balanced_set(num_classes: int = 10, per_class: int = 50) -> datasets.Dataset:
    labels = np.tile(np.arange(num_classes), per_class)
    features = datasets.Features({"x": datasets.Value("int64"), "label": datasets.ClassLabel(num_classes=num_classes)})
    return datasets.Dataset.from_dict({"x": np.arange(labels.size), "label": labels}, features=features)


def png(value: int, size: tuple[int, int] = (4, 4)) -> dict:
    file = io.BytesIO()
    Image.new("L", size, value).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


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


def test_class_order_and_max_count():
    subset = make_long_tailed(balanced_set(3, 50), "label", 4, max_count=20, class_order=[2, 0, 1])
    assert class_counts(subset, "label") == [10, 5, 20]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_longer_tail_is_contained_in_a_shorter_one(profile):
    subsets = [set(make_long_tailed(balanced_set(), "label", ratio, profile)["x"]) for ratio in (50, 10, 2)]
    assert subsets[0] < subsets[1] < subsets[2]


def test_pareto_subset():
    subset = make_long_tailed(balanced_set(), "label", 10, "pareto", max_count=40, pareto_alpha=2)
    assert class_counts(subset, "label") == long_tailed_counts(40, 10, 10, "pareto", 2)


def test_never_more_than_a_class_has():
    labels = [0] * 10 + [1] * 3 + [2] * 9
    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b", "c"])})
    dataset = datasets.Dataset.from_dict({"label": labels}, features=features)
    with pytest.raises(InputError, match=r"1 of 3 classes \(b\) cannot give .* class 1 has 3, its share is 7"):
        make_long_tailed(dataset, "label", 2, max_count=10)
    assert class_counts(make_long_tailed(dataset, "label", 2), "label") == [4, 2, 2]  # by default it fits


def test_no_class_is_left_empty():
    with pytest.raises(InputError, match=r"imbalance_ratio 1000 leaves 4 of 10 classes \(6, 7, 8, 9\) without images"):
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


def test_saved_data_set_with_other_column_names(tmp_path):
    feature = datasets.ClassLabel(names=["cat", "dog"])
    data = {"train": image_set([0, 1] * 6, feature, "fine_label"), "test": image_set([0, 1], feature, "fine_label")}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "saved")
    loaded = load_image_dataset(str(tmp_path / "saved"))
    assert loaded["train"].column_names == ["image", "label"]
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    assert len(loaded["eval"]) == 2


def test_folder_of_class_folders(tmp_path):
    for split, number in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (5, 7), (i, 0, 0)).save(folder / f"{i}.png")
    loaded = load_image_dataset(str(tmp_path / "animals"))
    assert class_counts(loaded["train"], "label") == [6, 6]
    assert class_counts(loaded["eval"], "label") == [2, 2]
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    # Of files it is enough to look at names and sizes, unless they are to be compared with stored images.
    train = loaded["train"]
    stored = [{"bytes": Path(image["path"]).read_bytes(), "path": None} for image in stored_images(train)]
    embedded = datasets.Dataset.from_dict({"image": stored, "label": train["label"]}, features=train.features)
    assert fingerprint(train) != fingerprint(embedded) == fingerprint(embedded, read_files=True)
    assert fingerprint(train, read_files=True) == fingerprint(embedded)


def test_an_untouched_test_split_is_asked_for(tmp_path):
    feature = datasets.ClassLabel(names=["cat", "dog"])
    parts = {"train": 20, "validation": 4, "test": 6}
    data = {split: image_set([0, 1] * (number // 2), feature) for split, number in parts.items()}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "all")
    assert len(load_image_dataset(str(tmp_path / "all"))["eval"]) == 4
    assert len(load_image_dataset(str(tmp_path / "all"), untouched_test=True)["eval"]) == 6
    datasets.DatasetDict(train=data["train"]).save_to_disk(tmp_path / "train")
    assert len(load_image_dataset(str(tmp_path / "train"))["eval"]) == 4
    with pytest.raises(InputError, match="has no test split, which nobody trains on: it has train"):
        load_image_dataset(str(tmp_path / "train"), untouched_test=True)


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
        ([[0], [1], [0, 1]], datasets.List(datasets.Value("int64")), "are not classes"),
        ([0, 0, 0], datasets.ClassLabel(names=["only"]), "one class only"),
        (["x", "x", "x"], datasets.Value("string"), "one class only"),
        ([0, 1, 0, 1], datasets.ClassLabel(names=["a", "b", "ghost"]), r"1 of 3 classes \(ghost\) have a name but no"),
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
    for read_files in (False, True):
        with pytest.raises(InputError, match=r"Image 0 \(nowhere\.png\) cannot be read: No such file or directory"):
            fingerprint(loaded["train"], read_files)


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
        ({"eval_split": "test"}, "--eval_split_name test"),
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


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), ratio=st.floats(1, 50))
def test_subsets_of_any_seed_have_the_counts(seed, ratio):
    subset = make_long_tailed(balanced_set(5, 50), "label", ratio, split_seed=seed)
    assert class_counts(subset, "label") == long_tailed_counts(50, 5, ratio)
