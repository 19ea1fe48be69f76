"""Texts: the same runs as for images, with tokens instead of pixels."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, BertConfig, RobertaConfig, pipeline

from bkd_hf import (
    InputError,
    TextDataset,
    class_counts,
    load_classifier,
    load_image_dataset,
    load_processor,
    load_results,
    load_text_dataset,
)
from bkd_hf.arguments import parse_arguments
from bkd_hf.docstrings import GROUPS, docstrings
from bkd_hf.plots import plot_class_accuracy, plot_confusion
from bkd_hf.rehearsal import check_before_work
from bkd_hf.text_data import fresh_tokenizer, limit_length, same_tokens, set_max_length
from bkd_hf.training_data import collator_of
from tests.test_cli import run_here  # noqa: F401
from tests.tiny_models import tiny_vit

TEXTS = ["The red cat sleeps.", "A cat eats fish!", "The old dog barks loudly at the cat.", "Dogs bark."] * 5
LABELS = ["cat", "cat", "dog", "dog"] * 5


def table(**more: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS, **more})


def write(source: str, folder: Path) -> Path:
    """A data set of texts, as its owner may have it."""
    path = folder / source
    if path.suffix == ".csv":
        table().to_csv(path)
    elif path.suffix in (".json", ".jsonl"):
        table().to_json(path)
    elif path.suffix == ".parquet":
        table().to_parquet(path)
    elif source == "saved":
        table().save_to_disk(path)
    else:
        path.mkdir()
        for split in ("train", "test"):
            table().to_csv(path / f"{split}.csv")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    found = fresh_tokenizer(TEXTS)
    set_max_length(found, "x", 16)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> Path:
    """A folder with a tiny BERT and a tiny ViT, as they are published."""
    folder = tmp_path_factory.mktemp("models")
    load_classifier("bert-1x64", ["cat", "dog"], task="text", processor=tokenizer).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    tiny_vit(0, 2).save_pretrained(folder / "vit")
    load_processor("cifar-resnet-8", 8).save_pretrained(folder / "vit")
    return folder


# ---- Where texts come from


@pytest.mark.parametrize("source", ["a.csv", "a.json", "a.jsonl", "a.parquet", "saved", "folder"])
def test_a_users_own_texts(tmp_path, source):
    splits = load_text_dataset(str(write(source, tmp_path)), cache_dir=str(tmp_path / "cache"))
    assert splits["train"].features["text"] == datasets.Value("string")
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert set(splits["train"]["text"]) | set(splits["eval"]["text"]) == set(TEXTS)


@pytest.mark.parametrize("place", ["a.csv", "folder"])
def test_words_that_csv_readers_take_for_missing_values_are_words(tmp_path, place):
    file = tmp_path / place if place.endswith(".csv") else tmp_path / place / "train.csv"
    file.parent.mkdir(exist_ok=True)
    file.write_text("text,label\n" + "null,NA\nyes,None\n" * 5)
    splits = load_text_dataset(str(tmp_path / place), cache_dir=str(tmp_path / "cache"))
    assert splits["train"].features["label"].names == ["NA", "None"]
    assert set(splits["train"]["text"]) == {"null", "yes"}
    file.write_text("text,label\nyes,a\n,b\n")
    with pytest.raises(InputError, match="1 example has no text"):
        load_text_dataset(str(tmp_path / place), cache_dir=str(tmp_path / "cache"))


def test_classes_of_csv_files_are_as_they_are_written(tmp_path):
    load = functools.partial(load_text_dataset, cache_dir=str(tmp_path / "cache"))
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{label}\n" for label in ("01", "1", "2") for i in range(10)))
    assert load(str(path))["train"].features["label"].names == ["01", "1", "2"]
    path.write_text("text,label\n" + "".join(f"t{i},{label}\n" for label in (1, 2, 10) for i in range(10)))
    assert load(str(path))["train"].features["label"].names == ["1", "2", "10"]  # numbers are in their order
    # The type must not depend on a chunk of 10,000 rows.
    path.write_text("text,label\n" + "t,1\n" * 10_001 + "t,a\n" * 10)
    assert load(str(path))["train"].features["label"].names == ["1", "a"]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\n" + "t,1\nt,2\n" * 5)
    (folder / "test.csv").write_text("text,label\nt,1\nt,x\n")
    with pytest.raises(InputError, match="the eval split has the label 'x', which the training split"):
        load(str(folder))
    (folder / "test.csv").write_text("text,class\nt,1\n")
    with pytest.raises(InputError, match="its files differ in their columns"):
        load(str(folder))


@pytest.mark.parametrize("name", ["data [v2].csv", "set [v2]"])
def test_names_that_look_like_patterns(tmp_path, name):
    if name.endswith(".csv"):
        path = write("a.csv", tmp_path).rename(tmp_path / name)
        assert len(load_text_dataset(str(path), cache_dir=str(tmp_path / "cache"))["train"]) == 16
    else:
        path = write("folder", tmp_path).rename(tmp_path / name)
        with pytest.raises(InputError, match=r"brackets.* for a pattern. Rename the folder"):
            load_text_dataset(str(path), cache_dir=str(tmp_path / "cache"))


def test_texts_of_a_data_frame_are_saved_texts(tmp_path):
    """With pandas 3 they are large strings; nothing may be written into the folder."""
    large = datasets.Features({"text": datasets.Value("large_string"), "label": datasets.Value("string")})
    table().cast(large).save_to_disk(tmp_path / "saved")
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert set(load_text_dataset(str(tmp_path / "saved"))["train"]["text"]) == set(TEXTS)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_a_tokenizer_without_a_maximum_gives_a_fresh_model_the_usual_one(tokenizer):
    unlimited = copy.deepcopy(tokenizer)
    unlimited.model_max_length = int(1e30)  # as transformers has it
    model = load_classifier("bert-1x64", ["cat", "dog"], task="text", processor=unlimited)
    assert model.config.max_position_embeddings == 512


def test_texts_with_an_output_format(tokenizer):
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS}).class_encode_column("label")
    for kind in ("numpy", "pandas"):
        found = TextDataset(data.with_format(kind), tokenizer)
        assert found[0] == TextDataset(data, tokenizer)[0]


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({}, {"text_column": "story"}, "--text_column_name story: "),
        ({}, {"text_column": "number"}, "--text_column_name number: the column holds "),
        ({"title": TEXTS, "text": None, "body": TEXTS}, {}, "has 2 text columns; name the one to use by --text_col"),
        ({"text": [None, *TEXTS[1:]]}, {}, "1 example has no text (first: example 0)"),
        ({"text": None}, {}, "has 0 text columns"),
        ({"label": None}, {}, "no label column found"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, options, expected):
    data = {"text": TEXTS, "label": LABELS, "number": [1] * len(TEXTS), **columns}
    data = datasets.Dataset.from_dict({name: values for name, values in data.items() if values is not None})
    data.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError) as error:
        load_text_dataset(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"), **options)
    assert expected in str(error.value)


def test_data_of_the_other_task_are_told(tmp_path):
    table().to_parquet(tmp_path / "a.parquet")
    pixels = np.zeros((4, 2, 2, 3), np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = datasets.Dataset.from_dict({"image": list(pixels), "label": [0, 1, 0, 1]}, features=features)
    images.to_parquet(tmp_path / "b.parquet")
    for load, name, task in ((load_image_dataset, "a", "text"), (load_text_dataset, "b", "image")):
        with pytest.raises(InputError, match=f"For {task}s say --task {task}"):
            load(str(tmp_path / f"{name}.parquet"), cache_dir=str(tmp_path / "cache"))


def test_docstrings_are_there():
    texts, labels = docstrings()
    assert len(set(texts)) == len(texts)
    assert min(np.bincount(labels)) >= 150
    splits = load_text_dataset("docstrings")
    assert class_counts(splits["eval"]) == [60] * len(GROUPS)
    assert not set(splits["train"]["text"]) & set(splits["eval"]["text"])


# ---- Tokens


def test_a_fresh_tokenizer_is_made_of_the_texts_in_any_order(tokenizer, tmp_path):
    assert same_tokens(fresh_tokenizer(TEXTS), fresh_tokenizer(TEXTS[::-1]))
    known, spelled = (tokenizer.tokenize(text) for text in ("the cat", "tac"))
    assert (known, spelled) == (["the", "cat"], ["t", "##a", "##c"])
    tokenizer.save_pretrained(tmp_path)
    assert same_tokens(tokenizer, AutoTokenizer.from_pretrained(tmp_path))
    assert not same_tokens(tokenizer, fresh_tokenizer(TEXTS))  # which cuts off later


def test_batches_are_padded_for_student_and_teacher(tokenizer):
    data = table().class_encode_column("label")
    others = fresh_tokenizer(["something else"])
    set_max_length(others, "x", 10)
    found = TextDataset(data, tokenizer, others)
    rows = found.__getitems__([3, 0])
    assert rows[1] == found[0]
    batch = collator_of(torch.utils.data.Subset(found, [0]))([{**row, "teacher_logits": np.ones(2)} for row in rows])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["teacher_logits"].shape == (2, 2)
    for prefix, used in (("", tokenizer), ("teacher_", others)):
        ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
        assert ids.shape[1] % 8 == 0
        for text, row, seen in zip((TEXTS[3], TEXTS[0]), ids, mask, strict=True):
            assert row[seen.bool()].tolist() == used(text, truncation=True)["input_ids"]
            assert (row[~seen.bool()] == used.pad_token_id).all()
    alone = found.for_student_alone()
    assert not any(name.startswith("teacher_") for name in alone[0])
    assert alone.describe_views() != found.describe_views() == TextDataset(data, tokenizer, others).describe_views()
    assert not any(name.startswith("teacher_") for name in TextDataset(data, tokenizer, tokenizer)[0])


# ---- Bad input


def test_texts_of_ones_own_have_a_model_and_its_training_by_default(tmp_path):
    options = parse_arguments(["--task", "text", "--dataset_name", "reviews.csv"])
    assert options.model.model_name_or_path == "bert-2x128"
    assert (options.training.learning_rate, options.training.num_train_epochs) == (2e-3, 20)
    given = parse_arguments(["--task", "text", "--dataset_name", "reviews.csv", "--model_name_or_path", "user/bert"])
    assert (given.model.model_name_or_path, given.training.learning_rate) == ("user/bert", 5e-5)
    (tmp_path / "mine.yaml").write_text("task: text\n")
    of_file = parse_arguments(["--config", str(tmp_path / "mine.yaml")])
    assert (of_file.model.model_name_or_path, of_file.data.dataset_name) == ("bert-2x128", "docstrings")
    assert of_file.training.learning_rate == 2e-3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "--task text --image_size 32",
            "--image_size is for --task image, and this is --task text: leave it out or use --task image.",
        ),
        ("--task text --train_augmentation pad_crop", "--train_augmentation is for --task image"),
        ("--task text --horizontal_flip false", "--horizontal_flip is for --task image"),
        ("--task text --image_column_name img", "--image_column_name is for --task image"),
        ("--task text --teacher_image_size 32", "--teacher_image_size is for --task image"),
        (
            "--max_length 64",
            "--max_length is for --task text, and this is --task image: leave it out or use --task text.",
        ),
        ("--text_column_name body", "--text_column_name is for --task text"),
        ("--task text --max_length 4", "--max_length must be at least 8, got 4."),
        ("--task text --max_length 1000", "--max_length 1000: bert-1x64 takes 512 tokens at most."),
        ("--task text --model_name_or_path {0}/bert --max_length 17", "takes 16 tokens at most"),
        (
            "--task text --model_name_or_path cifar-resnet-8",
            "cifar-resnet-8 classifies images, and this is --task tex",
        ),
        (
            "--task text --teacher_model_name_or_path cifar-resnet-8",
            "cifar-resnet-8 classifies images, and this is --",
        ),
        ("--model_name_or_path bert-1x64", "bert-1x64 classifies texts, and this is --task image"),
        ("--task text --model_name_or_path bert-1x65", "There is no bert-1x65: expected bert-LAYERSxWIDTH"),
        (
            "--task text --model_name_or_path {0}/vit",
            "(vit) classifies images, not texts: name another, or use --task i",
        ),
        ("--model_name_or_path {0}/bert", "(bert) classifies texts, not images: name another, or use --task text"),
        ("--task text --teacher_model_name_or_path {0}/vit", "(vit) classifies images, not texts"),
        ("--teacher_model_name_or_path {0}/bert", "(bert) classifies texts, not images"),
        ("--task text --method ldam", "--head cosine, which --classification_loss ldam needs, is for --task image"),
        ("--task text --export onnx", "--export onnx is for --task image"),
        ("--task audio", "--task must be one of image, text, got 'audio'."),
    ],
)
def test_what_does_not_go_with_the_task(models, options, expected):
    given = options.format(models).split()
    if "--task text" in options and "--model_name_or_path" not in given:
        given += ["--model_name_or_path", "bert-1x64"]
    with pytest.raises(InputError) as error:
        check_before_work(parse_arguments([*given, "--use_cpu", "true"]))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


# ---- A run


def test_a_run_on_texts(run_here, tmp_path):  # noqa: F811
    """The demo with few steps: a teacher and the cache of its logits, the card, resumption, another teacher."""
    folder, cache = tmp_path / "run", tmp_path / "cache"
    options = [
        "--dataset_name", "docstrings", "--model_name_or_path", "bert-1x64", "--max_train_samples", "100",
        "--max_eval_samples", "40", "--max_steps", "4", "--save_steps", "2", "--num_threads", "1", "--use_cpu", "true",
        "--disable_tqdm", "true", "--force_distillation", "true", "--teacher_cache", str(cache),
        "--save_total_limit", "2", "--max_length", "64",
    ]  # fmt: skip
    output = run_here(*options, "--output_dir", str(folder))
    assert " training texts of 10 classes" in output
    assert "image" not in output
    results = load_results(folder)
    shown = [plot(results).axes for plot in (plot_class_accuracy, plot_confusion)]
    labels = [axes[0].get_ylabel() for axes in shown]
    assert labels == ["training texts\n(log scale)", "true class (training texts)"]
    assert (results["data"]["task"], results["data"]["hub_id"], results["student"]["hub_id"]) == ("text", None, None)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert 'pipeline("text-classification", ' in card.text
    assert "image" not in card.text
    assert "max_length: 64" in card.text
    assert pipeline("text-classification", str(folder))("Send a mail.", truncation=True)[0]["label"] in GROUPS
    assert len(list(cache.glob("*/view0.bin"))) == 1

    weights = (folder / "model.safetensors").read_bytes()
    for name in ("results.json", "model.safetensors", "checkpoint-4"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_here(*options, "--output_dir", str(folder))
    assert (folder / "model.safetensors").read_bytes() == weights

    more = ["--max_train_samples", "150", "--teacher_model_name_or_path", str(folder), "--force_teacher", "true"]
    output = run_here(*options, *more, "--output_dir", str(tmp_path / "other"))
    assert "The teacher takes other tokens than the student" in output
    saved = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] == 64
    assert load_results(tmp_path / "other")["teacher"]["model"] == results["student"]["model"]


@pytest.mark.parametrize(("config", "expected"), [(BertConfig, 130), (RobertaConfig, 128)])
def test_positions_of_roberta_begin_behind_the_padding(config, expected):
    tokenizer = fresh_tokenizer(["a few words"])
    tokenizer.model_max_length = 10**30
    limit_length(tokenizer, config(max_position_embeddings=130))
    assert tokenizer.model_max_length == expected


def test_a_file_of_texts_is_no_file_of_images(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\nfine,good\n")
    with pytest.raises(InputError, match=r"must be a \.parquet file\. For texts say --task text\."):
        load_image_dataset(str(tmp_path / "reviews.csv"))
