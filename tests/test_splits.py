"""Splits as separate data sets: they are written as built, and read back unchanged."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from PIL import Image

from bkd_hf import InputError, class_counts, load_image_dataset, make_long_tailed, splits
from bkd_hf.data import fingerprint, stored_images
from bkd_hf.errors import PublishError
from bkd_hf.file_lists import build_split_from_files, read_inaturalist_json, read_list_file
from bkd_hf.hub import prepare
from bkd_hf.plots import plot_class_counts
from bkd_hf.splits import save_split
from tests.conftest import REPOSITORY
from tests.test_compare import main_of

SCRIPT = REPOSITORY / "scripts" / "make_long_tailed.py"
DIGITS = ["--dataset_name", "digits", "--imbalance_ratio", "65", "--max_class_count", "130"]
FILES = {
    "README.md",
    "class_counts.png",
    "split.json",
    *(f"data/{s}-00000-of-00001.parquet" for s in ("train", "test")),
}


@pytest.fixture(scope="module")
def make():
    """Run the script in this process; returns its exit code."""
    main = main_of(SCRIPT)
    return lambda *options: main([str(option) for option in options])


@pytest.fixture(scope="module")
def digits(make, tmp_path_factory) -> Path:
    """The demo's split; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("splits") / "digits"
    assert make(*DIGITS, "--output_dir", folder) == 0
    return folder


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def image_bytes(dataset: datasets.Dataset) -> list[bytes]:
    return [image["bytes"] for image in stored_images(dataset)]


# ---- A drawn split


def test_what_is_read_again_is_what_was_drawn(digits, tmp_path):
    loaded = datasets.load_dataset(str(digits), cache_dir=str(tmp_path))
    source = load_image_dataset("digits")
    tail = make_long_tailed(source["train"], imbalance_ratio=65, max_count=130)
    assert class_counts(loaded["train"]) == [130, 81, 51, 32, 20, 12, 8, 5, 3, 2]
    assert loaded["train"].features["label"].names == list("0123456789")
    assert fingerprint(loaded["train"]) == fingerprint(tail)
    assert image_bytes(loaded["test"]) == image_bytes(source["eval"])
    assert loaded["test"]["label"][:] == source["eval"]["label"][:]
    again = load_image_dataset(str(digits), cache_dir=str(tmp_path))
    assert {name: fingerprint(split) for name, split in again.items()} == {
        "train": fingerprint(tail), "eval": fingerprint(source["eval"])
    }  # fmt: skip
    record = json.loads((digits / "split.json").read_text())
    assert record["splits"]["train"] == {
        "num_images": 344, "class_counts": class_counts(tail), "fingerprint": fingerprint(tail)
    }  # fmt: skip
    assert record["how"]["seed"] == 0
    assert record["how"]["source_id"] is None


def test_only_what_belongs_to_it_is_there(digits):
    assert set(contents(digits)) == FILES
    (digits / "data" / "notes.txt").touch()
    assert set(prepare(digits, "user/digits").sizes()) == FILES
    (digits / "data" / "notes.txt").unlink()
    assert [path for path in digits.parent.iterdir() if path != digits] == []


def test_twice_gives_the_same_files(digits, make, tmp_path):
    assert make(*DIGITS, "--profile", "exp", "--seed", 0, "--output_dir", tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(digits)


def test_nothing_in_it_tells_of_the_machine(digits):
    for name, content in contents(digits).items():
        for told in (str(digits.parent), str(Path.home()) + "/", str(REPOSITORY)):
            assert told.encode() not in content, name


def test_the_test_split_is_a_published_one(make, tmp_path, capsys):
    data = load_image_dataset("digits")
    val, test = data["eval"].select(range(200)), data["eval"].select(range(200, 400))
    datasets.DatasetDict(train=data["train"], validation=val, test=test).save_to_disk(tmp_path / "three")
    datasets.DatasetDict(train=data["train"]).save_to_disk(tmp_path / "one")
    for options, expected in (([], test), (["--eval_split_name", "validation"], val)):
        folder = tmp_path / f"split{len(options)}"
        options = [*options, "--imbalance_ratio", 100]
        assert make("--dataset_name", tmp_path / "three", *options, "--seed", "5", "--output_dir", folder) == 0
        record = json.loads((folder / "split.json").read_text())
        assert record["splits"]["test"]["fingerprint"] == fingerprint(expected)
        assert record["splits"]["train"]["fingerprint"] == fingerprint(make_long_tailed(data["train"], split_seed=5))
        kept = record["splits"].get("validation", {}).get("fingerprint")
        assert kept == (fingerprint(val) if expected is test else None)


@pytest.fixture
def leaves(tmp_path) -> Path:
    """Class folders without a test split; the largest class is not the first by name."""
    for name, number in (("ash", 5), ("birch", 20), ("cedar", 10)):
        (tmp_path / "leaves" / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.random.default_rng(100 * number + i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "leaves" / name / f"{i}.png")
    return tmp_path / "leaves"


@pytest.mark.parametrize(
    ("options", "counts", "told"),
    [
        ([], [4, 16, 8], "nothing was cut"),
        (
            ["--imbalance_ratio", "8"],
            [2, 16, 5],
            "in the order of\ntheir sizes in the source without the images of `test`, the largest first",
        ),
        (["--imbalance_ratio", "2", "--class_order", "label"], [4, 2, 2], "in the order of\nthe labels"),
    ],
)
def test_an_unbalanced_source_without_a_test_split(leaves, make, tmp_path, options, counts, told):
    folder = tmp_path / "split"
    for _ in range(2):  # the same again is the same
        assert make("--dataset_name", leaves, *options, "--output_dir", folder) == 0
    splits = json.loads((folder / "split.json").read_text())["splits"]
    assert splits["train"]["class_counts"] == counts
    assert splits["test"]["class_counts"] == [1, 4, 2]
    assert splits["test"]["fingerprint"] == fingerprint(load_image_dataset(str(leaves))["eval"])  # as a run has it
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert told in text
    assert "a fifth of each class of the source" in text
    assert ("its index in the split without the images of `test`)" in text) == ("n_i = " in text)
    assert "\n\n\n" not in text
    assert "untouched" not in text


def test_a_tail_is_cut_out_of_a_balanced_source(make, tmp_path):
    assert make("--dataset_name", "digits", "--output_dir", tmp_path / "split") == 0
    counts = json.loads((tmp_path / "split" / "split.json").read_text())["splits"]["train"]["class_counts"]
    assert (max(counts), min(counts)) == (138, 1)


# ---- The card


def test_card(digits):
    card = front_matter(digits)
    assert card["license"] == "unknown"
    assert card["task_categories"] == ["image-classification"]
    assert card["size_categories"] == ["n<1K"]
    assert card["pretty_name"] == "digits, long-tailed (exp, ratio 65)"
    assert "source_datasets" not in card
    assert card["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*"}, {"split": "test", "path": "data/test-*"}
    ]  # fmt: skip
    image, label = card["dataset_info"]["features"]
    assert image == {"name": "image", "dtype": "image"}
    assert label["dtype"]["class_label"]["names"] == {str(i): str(i) for i in range(10)}
    assert [part["num_examples"] for part in card["dataset_info"]["splits"]] == [344, 400]
    assert DatasetCard.load(digits / "README.md").data.tags == ["long-tailed", "bkd_hf"]

    text = (digits / "README.md").read_text(encoding="utf-8")
    for expected in (
        "| images | 344 | 400 |",
        "| largest / smallest | 65 | 1 |",
        "| medium-shot classes (20 to 100 training images) | 4 |",
        "n_i = int(n_max · ratio^(−i / (C − 1))),  ratio = 65",
        "| 9 | 9 | 2 | 40 |",
        "python scripts/make_long_tailed.py --dataset_name digits --imbalance_ratio 65 --profile exp "
        "--max_class_count 130 --seed 0",
        "arXiv 1901.05555",
    ):
        assert expected in text
    assert not [line for line in text.splitlines() if "{{" in line or "{%" in line]
    assert "\n\n\n" not in text
    assert Image.open(digits / "class_counts.png").size[0] >= 900


@pytest.mark.parametrize(
    ("profile", "ratio", "told"),
    [
        ("step", "4.0", "for the first half"),
        ("pareto", "4.0", "(−1/α) − 1,  ratio = 4,  α = 6"),
        ("exp", "12.3456789", "ratio = 12.3456789"),
    ],
)
def test_card_of_other_options(make, tmp_path, profile, ratio, told):
    assert make(*DIGITS[:2], "--imbalance_ratio", ratio, "--profile", profile, "--output_dir", tmp_path / "s") == 0
    text = (tmp_path / "s" / "README.md").read_text(encoding="utf-8")
    assert told in text
    assert f"--imbalance_ratio {ratio.removesuffix('.0')} " in text


def test_card_of_many_classes_with_awkward_names(tmp_path):
    names = ["a|b <c>", "no", "1", *(f"class {i}" for i in range(3, 600))]
    labels = np.repeat(np.arange(600), np.where(np.arange(600) < 300, 2, 1))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    data = {"image": [{"bytes": bytes([i % 256]), "path": None} for i in range(labels.size)], "label": labels}
    dataset = datasets.Dataset.from_dict(data, features=features)
    how = {"name": "many", "train_list": "train.txt", "test_list": "test.txt", "command": "make"}
    save_split(datasets.DatasetDict(train=dataset, test=dataset), tmp_path / "many", how)
    text = (tmp_path / "many" / "README.md").read_text(encoding="utf-8")
    assert "the 100 largest" in text
    assert "the 100 smallest" in text
    assert text.count("| class ") == 197
    assert r"| 0 | a\|b &lt;c&gt; | 2 | 2 |" in text
    assert 'load_dataset("USER/NAME")' in text  # filled in when it is published
    assert front_matter(tmp_path / "many")["dataset_info"]["features"][1]["dtype"]["class_label"]["names"]["1"] == "no"


def test_numbers_are_checked_as_those_of_a_run(make, tmp_path, capsys):
    assert make(*DIGITS[:2], "--seed", "9" * 20, "--output_dir", tmp_path / "split") == 2
    assert "--seed must be in 0 to 4294967295" in capsys.readouterr().err


def test_a_hub_data_set_is_named_as_the_source(digits, tmp_path):
    data = datasets.load_dataset(str(digits), cache_dir=str(tmp_path / "cache"))
    how = {"name": "user/birds", "source_id": "user/birds", "command": "make"}
    save_split(data, tmp_path / "split", how, license="mit")
    card = front_matter(tmp_path / "split")
    assert card["source_datasets"] == ["user/birds"]
    assert card["license"] == "mit"
    text = (tmp_path / "split" / "README.md").read_text(encoding="utf-8")
    assert "[user/birds](https://huggingface.co/datasets/user/birds)" in text
    assert "was not stated" not in text


@pytest.mark.parametrize(("classes", "label"), [(10, "class (most"), (100, "rank of the class")])
def test_figure(classes, label):
    counts = np.geomspace(500, 5, classes).astype(int)
    figure = plot_class_counts("birds", [f"bird {i}" for i in range(classes)], counts)
    (axes,) = figure.axes
    assert label in axes.get_xlabel()
    assert [text.get_text() for text in axes.texts if text.get_text().isalpha()] == ["many", "medium", "few"]
    assert "birds" in figure.get_suptitle()


# ---- Running again


def test_the_same_command_again(digits, make, tmp_path, capsys):
    folder = Path(shutil.copytree(digits, tmp_path / "split"))
    before = contents(folder)
    assert make(*DIGITS, "--output_dir", folder) == 0
    assert "Already there" in capsys.readouterr().out
    assert contents(folder) == before
    assert make(*DIGITS, "--output_dir", folder, "--license", "bsd-3-clause") == 0
    assert front_matter(folder)["license"] == "bsd-3-clause"
    after = contents(folder)
    assert [name for name in after if after[name] != before[name]] == ["README.md"]


TRAIN, TEST = (f"data/{split}-00000-of-00001.parquet" for split in ("train", "test"))


@pytest.mark.parametrize(
    ("file", "change", "options", "message"),
    [
        (TRAIN, bytes, ["--seed", "1"], "holds another split: seed is 0 there, not 1. Choose another --output_dir"),
        (TRAIN, bytes, ["--profile", "step"], "holds another split: profile is exp there, not step"),
        (TRAIN, None, [], "holds this split, but not all of its files. Delete it to make it again"),
        (TEST, lambda content: content[:-100], [], "holds this split, but not all of its files"),
        ("split.json", None, [], "is there already, and holds no split"),
        ("split.json", lambda _: b"[]", [], "holds a split that this version of bkd_hf cannot read"),
        ("split.json", lambda content: content.replace(b'"fingerprint": "', b'"fingerprint": "f'), [],
         "holds this split of other images"),
    ],
)  # fmt: skip
def test_another_folder_is_never_overwritten(digits, make, tmp_path, capsys, file, change, options, message):
    folder = Path(shutil.copytree(digits, tmp_path / "split"))
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    before = contents(folder)
    assert make(*DIGITS, *options, "--output_dir", folder) == 2
    assert message in capsys.readouterr().err
    assert contents(folder) == before


def test_an_interruption_leaves_nothing(make, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(splits, "_check_reload", interrupt)
    assert make(*DIGITS, "--output_dir", tmp_path / "split") == 130
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_otherwise_is_not_kept(make, tmp_path, monkeypatch):
    write = splits._write_parquet
    monkeypatch.setattr(
        splits, "_write_parquet", lambda dataset, *rest: write(dataset.select(range(len(dataset))[::-1]), *rest)
    )
    with pytest.raises(RuntimeError, match="what is read again is not the same"):
        make(*DIGITS, "--output_dir", tmp_path / "split")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(make, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert make(*DIGITS, "--output_dir", tmp_path / "file" / "split") == 2
    assert "cannot be written to --output_dir" in capsys.readouterr().err


# ---- Lists of files


@pytest.fixture
def birds(tmp_path) -> Path:
    """Photos in folders as ImageNet-LT's, and lists of them."""
    folder = tmp_path / "images"
    lists: dict[str, list[str]] = {"train": [], "test": [], "val": []}
    for label, (wnid, number) in enumerate([("n02", 5), ("n01", 3), ("n03", 1)]):
        for split, count in (("train", number), ("test", 2), ("val", 1)):
            (folder / split / wnid).mkdir(parents=True)
            for i in range(count):
                name = f"{split}/{wnid}/photo {i}.JPEG"
                pixels = np.random.default_rng(len(lists[split])).integers(0, 256, (9, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name, quality=30 + label)
                lists[split].append(f"{name} {label}")
    for split, lines in lists.items():
        (tmp_path / f"Birds_LT_{split}.txt").write_text("\n".join(lines[::-1]) + "\n\n")
    return tmp_path


def list_options(folder: Path) -> list:
    return [
        "--train_list", folder / "Birds_LT_train.txt", "--test_list", folder / "Birds_LT_test.txt",
        "--image_folder", folder / "images",
    ]  # fmt: skip


def test_a_published_split(birds, make, tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_SHARD_BYTES", 1500)
    folder = tmp_path / "split"
    assert make(*list_options(birds), "--val_list", birds / "Birds_LT_val.txt", "--output_dir", folder) == 0
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train", "test", "validation"]
    assert len(list((folder / "data").glob("train-*.parquet"))) > 1
    for split in ("train", "test", "val"):
        files, labels = read_list_file(birds / f"Birds_LT_{split}.txt", birds / "images")
        part = loaded["validation" if split == "val" else split]
        assert image_bytes(part) == [file.read_bytes() for file in files]
        assert [image["path"] for image in stored_images(part)] == [file.name for file in files]
        assert part["label"][:] == labels
        assert part.features["label"].names == ["n02", "n01", "n03"]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "`train` is `Birds_LT_train.txt`" in text
    assert "--eval_split_name test" in text
    assert front_matter(folder)["pretty_name"] == "Birds_LT"
    assert str(birds).encode() not in b"".join(contents(folder).values())
    built = build_split_from_files(birds / "Birds_LT_train.txt", birds / "Birds_LT_test.txt", birds / "images")
    assert fingerprint(built["train"], read_all=True) == fingerprint(loaded["train"])


def test_images_for_training_and_test_are_told(birds, caplog):
    train, test = birds / "Birds_LT_train.txt", birds / "Birds_LT_test.txt"
    test.write_text(test.read_text() + train.read_text())
    build_split_from_files(train, test, birds / "images")
    assert "9 images of" in caplog.text


def test_default_folder_and_names(birds, make, monkeypatch):
    monkeypatch.chdir(birds)
    (birds / "names.txt").write_text("tit\nfinch\nowl\n")
    assert make(*list_options(Path()), "--class_names", "names.txt") == 0
    record = json.loads((birds / "outputs" / "Birds_LT" / "split.json").read_text())
    assert record["class_names"] == ["tit", "finch", "owl"]
    assert make("--dataset_name", "digits", "--profile", "step", "--imbalance_ratio", 2.5, "--seed", 3) == 0
    assert (birds / "outputs" / "digits_lt_2.5_step_seed3" / "README.md").exists()


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a/airfield", "a/arena", "b/bar"], ["airfield", "arena", "bar"]),
        (["data/a/arena/inside", "data/a/arena/outside", "data/b/bar/inside"],
         ["a/arena/inside", "a/arena/outside", "b/bar/inside"]),
        (["flat", "flat", "flat"], ["0", "1", "2"]),
    ],
)  # fmt: skip
def test_class_names_of_folders(tmp_path, folders, names):
    for label, folder in enumerate(folders):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{label}.jpg").touch()
    lines = [f"/{folder}/{label}.jpg {label}" for label, folder in enumerate(folders)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    built = build_split_from_files(tmp_path / "list.txt", tmp_path / "list.txt", tmp_path)
    assert built["train"].features["label"].names == names


def test_all_missing_files_are_named_at_once(birds, make, tmp_path, capsys):
    for name in ("train/n02/photo 0.JPEG", "train/n03/photo 0.JPEG", "test/n01/photo 1.JPEG"):
        (birds / "images" / name).unlink()
    assert make(*list_options(birds), "--output_dir", tmp_path / "split") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: 3 of 15 images are not in {birds / 'images'}:"
    assert lines[1:] == ["train/n03/photo 0.JPEG", "train/n02/photo 0.JPEG", "test/n01/photo 1.JPEG"]
    assert not (tmp_path / "split").exists()
    (birds / "Birds_LT_train.txt").unlink()
    assert make(*list_options(birds), "--push_to_hub", "user/birds") == 2  # before the Hub is asked
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: These are not there:",
        str(birds / "Birds_LT_train.txt"),
        f"1 of 6 images are not in {birds / 'images'}:",
        "test/n01/photo 1.JPEG",
    ]
    shutil.rmtree(birds / "images")
    assert make(*list_options(birds), "--class_names", "nowhere.txt") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == [str(birds / "Birds_LT_train.txt"), "nowhere.txt", f"{birds / 'images'} (a folder)"]


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        ("a.jpg 0\nb.jpg", "a.jpg 0", None, r"train.txt, line 2: expected `path label`, .* got 'b.jpg'"),
        ("a.jpg 0\n\nb.jpg -1", "a.jpg 0", None, "train.txt, line 3"),
        ("a.jpg 0\nb.jpg 1.0", "a.jpg 0", None, "line 2"),
        ("a.jpg 0\nb.jpg nan", "a.jpg 0", None, "line 2"),
        ("a.jpg 0\nb.jpg " + "9" * 5000, "a.jpg 0", None, "line 2"),
        (
            "a.jpg 0\nb.jpg 999999999999",
            "a.jpg 0",
            None,
            "no image of 999999999998 of 1000000000000 classes: 1",
        ),
        ("a.jpg 0\nb.jpg 1", "a.jpg 999999999999", None, "does not have: 999999999999"),
        ("a\0.jpg 0\nb.jpg 1", "a.jpg 0", None, "train.txt cannot be read as text: it holds zeros, as UTF-16 does"),
        ("\n", "a.jpg 0", None, "train.txt lists no image"),
        ("a.jpg 0", "a.jpg 0", None, "one class only"),
        ("a.jpg 1\nb.jpg 3", "a.jpg 1", None, r"no image of 2 of 4 classes: 0, 2. Labels are the numbers from 0 on"),
        ("a.jpg 0\nb.jpg 1", "a.jpg 2\na.jpg 7", None, "test.txt has classes that .*train.txt does not have: 2, 7"),
        ("a.jpg 0\nb.jpg 1", "a.jpg 0", "x", "has 1 names in 1 lines; there are 2 classes"),
        ("a.jpg 0\nb.jpg 1", "a.jpg 0", "x\n\ny", "has 2 names in 3 lines"),
        ("a.jpg 0\nb.jpg 1", "a.jpg 0", "x\nx", "names of several classes: x"),
    ],
)
def test_bad_lists(tmp_path, train, test, names, message):
    for name, text in (("a.jpg", ""), ("b.jpg", ""), ("train.txt", train), ("test.txt", test), ("names", names or "")):
        (tmp_path / name).write_text(text)
    names_file = tmp_path / "names" if names else None
    with pytest.raises(InputError, match=message):
        build_split_from_files(tmp_path / "train.txt", tmp_path / "test.txt", tmp_path, class_names=names_file)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-8-sig"])
@pytest.mark.parametrize("name", ["train.txt", "names"])
def test_encodings(tmp_path, encoding, name):
    texts = {"é.jpg": "", "b.jpg": "", "train.txt": "é.jpg 0\nb.jpg 1\n", "test.txt": "b.jpg 1", "names": "é\nb\n"}
    for file, text in texts.items():
        (tmp_path / file).write_text(text, encoding=encoding if file == name else "utf-8")
    build = functools.partial(
        build_split_from_files, tmp_path / "train.txt", tmp_path / "test.txt", tmp_path, None, tmp_path / "names"
    )
    if encoding == "utf-8-sig":
        assert build()["train"].features["label"].names == ["é", "b"]
        return
    with pytest.raises(InputError, match=f"{name} cannot be read as text: .*Save it as UTF-8") as raised:
        build()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make_special", [os.mkfifo, lambda path: path.symlink_to("a.jpg"), lambda path: path.mkdir()])
def test_what_is_listed_has_to_be_a_file(tmp_path, make_special):
    make_special(tmp_path / "a.jpg")
    for name, text in (("b.jpg", ""), ("train.txt", "a.jpg 0\nb.jpg 1"), ("test.txt", "b.jpg 1")):
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"1 of 2 images are not in"):
        build_split_from_files(tmp_path / "train.txt", tmp_path / "test.txt", tmp_path)


def test_accents_may_be_spelled_otherwise_in_a_list_than_on_the_disk(tmp_path):
    composed, apart = "\u00e9", "e\u0301"
    for folder, name in ((apart, "1.jpg"), (composed, "2.jpg"), ("b", "3.jpg")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    (tmp_path / "train.txt").write_text(f"{composed}/1.jpg 0\n{composed}/2.jpg 0\nb/3.jpg 1", encoding="utf-8")
    (tmp_path / "test.txt").write_text("b/3.jpg 1")
    built = build_split_from_files(tmp_path / "train.txt", tmp_path / "test.txt", tmp_path)["train"]
    assert built.features["label"].names == [composed, "b"]
    files = [image["path"] for image in stored_images(built)]
    assert files[0] == str(tmp_path / apart / "1.jpg")


# ---- JSON


def inaturalist(**changes) -> dict:
    return {
        "info": {"year": 2018},
        "images": [
            {"id": 7, "file_name": "train_val2018/b.jpg", "width": 8},
            {"id": 5, "file_name": "train_val2018/a.jpg"},
            {"id": 6, "file_name": "train_val2018/c.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 20},
            {"id": 2, "image_id": 6, "category_id": 12},
            {"id": 3, "image_id": 7, "category_id": 30},
        ],
        "categories": [
            {"id": 30, "name": "Parus major"},
            {"id": 12, "name": "Ficus variegata", "supercategory": "Plantae"},
            {"id": 20, "name": "Ficus variegata"},
        ],
        **changes,
    }


@pytest.fixture
def nature(tmp_path) -> Path:
    (tmp_path / "train_val2018").mkdir()
    for name in "abc":
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (ord(name), 0, 0)).save(file, format="JPEG")
        (tmp_path / "train_val2018" / f"{name}.jpg").write_bytes(file.getvalue())
    for name in ("train2018", "val2018"):
        (tmp_path / f"{name}.json").write_text(json.dumps(inaturalist()))
    return tmp_path


def test_inaturalist(nature, make, tmp_path):
    files, labels, names = read_inaturalist_json(nature / "train2018.json", nature)
    assert [file.name for file in files] == ["b.jpg", "a.jpg", "c.jpg"]
    assert labels == [2, 1, 0]  # numbered in the order of the categories' ids
    assert names == ["Ficus variegata (12)", "Ficus variegata (20)", "Parus major"]
    options = ["--train_list", nature / "train2018.json", "--test_list", nature / "val2018.json"]
    assert make(*options, "--image_folder", nature, "--output_dir", tmp_path / "split") == 0
    loaded = datasets.load_dataset(str(tmp_path / "split"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].features["label"].names == names
    assert loaded["train"]["label"][:] == labels
    assert image_bytes(loaded["train"]) == [file.read_bytes() for file in files]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": inaturalist()["annotations"][:1]}, "images without an annotation: 6, 7"),
        ({"annotations": [*inaturalist()["annotations"], {"image_id": 9, "category_id": 12}]}, "not list: 9"),
        ({"annotations": [*inaturalist()["annotations"], {"image_id": 5, "category_id": 12}]},
         "several annotations: 5"),
        ({"categories": inaturalist()["categories"][:2]}, "categories that it does not list: 20"),
        ({"categories": inaturalist()["categories"] * 2}, "an id is given to two"),
        ({"images": [{"id": 5}]}, "no field 'file_name'"),
        ({"images": [], "annotations": []}, "lists no image"),
        ({"images": 3}, "expected lists `images`"),
        ({"images": [{"id": 5, "file_name": None}]}, "expected lists `images`"),
        ({"categories": [{"id": 12}, {"id": "20"}]}, "expected lists `images`"),
        ({"categories": [*inaturalist()["categories"], {"id": 99, "name": "ghost"}]}, "no image of 1 of 4 classes: 3"),
    ],
)  # fmt: skip
def test_bad_json(nature, changes, message):
    (nature / "train2018.json").write_text(json.dumps(inaturalist(**changes)))
    with pytest.raises(InputError, match=message):
        build_split_from_files(nature / "train2018.json", nature / "train2018.json", nature)


def test_json_files_that_do_not_fit(nature):
    (nature / "list.txt").write_text("train_val2018/a.jpg 0")
    with pytest.raises(InputError, match=r"give all as lists, or all as \.json"):
        build_split_from_files(nature / "train2018.json", nature / "list.txt", nature)
    other = [{**category, "name": "another"} for category in inaturalist()["categories"]]
    (nature / "val2018.json").write_text(json.dumps(inaturalist(categories=other)))
    with pytest.raises(InputError, match="other categories than"):
        build_split_from_files(nature / "train2018.json", nature / "val2018.json", nature)
    (nature / "val2018.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        build_split_from_files(nature / "train2018.json", nature / "val2018.json", nature)


# ---- The command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --dataset_name, or --train_list, --test_list and --image_folder"),
        ([*DIGITS, "--train_list", "x"], "--train_list: with --dataset_name no lists are read"),
        (["--train_list", "x"], "--test_list, --image_folder: needed with --train_list"),
        (["--train_list", "x", "--seed", "1"], "--seed: it is for a split that is drawn from --dataset_name"),
        ([*DIGITS, "--pareto_alpha", "3"], "--pareto_alpha has no effect without --profile pareto"),
        ([*DIGITS, "--profile", "pareto", "--pareto_alpha", "0"], "pareto_alpha must be a finite number > 0, got 0"),
        ([*DIGITS, "--private"], "--private: without --push_to_hub"),
        (["--dataset_name", "digits", "--imbalance_ratio", "0.5"], "imbalance_ratio must be a finite number ≥ 1"),
        (["--dataset_name", "./nowhere"], "--dataset_name ./nowhere: there is no such file or folder"),
    ],
)
def test_bad_options(make, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert make(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_publishing(make, tmp_path, monkeypatch, capsys):
    calls = []

    def check_repo_access(repo_id, token=None, repo_type="model", private=None):
        calls.append(("check", repo_id, token, repo_type, private, (tmp_path / "split").exists()))
        if repo_id == "user/not mine":
            raise InputError("not yours")
        if repo_id == "user/down":
            raise PublishError("not now", is_temporary=True)

    def publish_folder(folder, repo_id, *, private=None, token=None, license=None):
        calls.append(("publish", Path(folder), repo_id, private, token))
        return f"https://huggingface.co/datasets/{repo_id}"

    stub = types.SimpleNamespace(check_repo_access=check_repo_access, publish_folder=publish_folder)
    monkeypatch.setitem(sys.modules, "bkd_hf.hub", stub)
    options = [*DIGITS, "--output_dir", tmp_path / "split", "--token", "secret"]
    assert make(*options, "--push_to_hub", "user/not mine") == 2
    assert make(*options, "--push_to_hub", "user/down") == 1
    assert not (tmp_path / "split").exists()
    assert make(*options, "--push_to_hub", "user/digits-lt", "--private") == 0
    assert calls[2:] == [
        ("check", "user/digits-lt", "secret", "dataset", True, False),
        ("publish", tmp_path / "split", "user/digits-lt", True, "secret"),
    ]
    assert "Published: https://huggingface.co/datasets/user/digits-lt" in capsys.readouterr().out
    assert b"secret" not in b"".join(contents(tmp_path / "split").values())


def test_help(make, capsys):
    with pytest.raises(SystemExit) as end:
        make("--help")
    assert end.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 120
