"""Folders of class folders, as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bkd_hf import InputError, class_counts, load_image_dataset
from bkd_hf.image_folder import load_image_folder


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
    for split, blue in (("train", {"b": 0, "a": 1}), ("eval", {"b": 2, "a": 3})):
        for example in data[split]:
            name = data[split].features["label"].int2str(example["label"])
            assert example["image"].getpixel((0, 0))[0] == blue[name]


def test_what_is_hidden_or_no_image_is_left_out(tmp_path, caplog):
    root = fill(tmp_path, {"a": 3, "b": 2, "__MACOSX/a": 3, ".thumbnails": 4})
    (tmp_path / "a" / "notes.heic").write_text("no image by its name")
    (tmp_path / "a" / ".DS_Store").write_text("")
    (tmp_path / "LICENSE").write_text("")
    assert counts(root) == {"train": {"a": 3, "b": 2}}
    assert "left out, as they are no images by their names: a/notes.heic." in caplog.text


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
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*\n"
        "  - split: test\n    path: b/*\n---\n"
    )
    assert load_image_folder(root) is None
