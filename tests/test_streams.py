"""Streams: each example once per pass, the same steps for any number of readers, and exact resumption."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from bkd_hf import BKDConfig, BKDTrainer, ImageDataset, InputError, load_classifier, load_image_dataset, load_processor
from bkd_hf.arguments import parse_arguments
from bkd_hf.commands import split
from bkd_hf.data import class_counts
from bkd_hf.errors import TrainingStopped
from bkd_hf.inputs import load_splits
from bkd_hf.streams import (
    POSITION,
    Lane,
    Stream,
    StreamedImages,
    count_labels,
    load_stream,
    open_columns,
    read_counts,
)

NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, Path]:
    """The same 400 images in 10 files of parquet and in 3 of webdataset; two files of others to evaluate on."""
    digits = load_image_dataset("digits")["eval"].shuffle(seed=0)
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("parquet", "webdataset")}

    def write_tar(part: datasets.Dataset, path: Path) -> None:
        with tarfile.open(path, "w") as file:
            for number, example in enumerate(part.cast_column("image", datasets.Image(decode=False))):
                for kind, content in (("png", example["image"]["bytes"]), ("cls", str(example["label"]).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{kind}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))

    for number in range(10):
        digits.shard(10, number).to_parquet(folders["parquet"] / f"train-{number:05d}-of-00010.parquet")
    digits.select(range(20)).to_parquet(folders["parquet"] / "test-00000-of-00001.parquet")
    for number in range(3):
        write_tar(digits.shard(3, number), folders["webdataset"] / f"train-{number}.tar")
    write_tar(digits.select(range(20)), folders["webdataset"] / "test-0.tar")
    return folders


@pytest.fixture(scope="module")
def opened(shards, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("counts")
    found: dict[str, dict] = {}
    for kind, path in shards.items():
        assert split.main(["--dataset_name", str(path), "--count_only", "--output_dir", str(folder / kind)]) == 0
        counts = folder / kind / "class_counts.json"
        assert json.loads(counts.read_text()) == dict.fromkeys(NAMES, 40)
        found[kind] = load_stream(str(path), str(counts), buffer_size=100, cache_dir=str(folder))
    return found


def images(stream: Stream, batch_size: int = 8) -> StreamedImages:
    sample = ImageDataset(stream.sample, load_processor("cifar-resnet-8", 8), "pad_crop", cache_images="none")
    found = StreamedImages(stream, sample)
    found.batch_size = batch_size
    return found


def test_columns_labels_and_evaluation_are_as_without_a_stream(opened, shards):
    loaded = load_image_dataset(str(shards["parquet"]))
    for data in opened.values():
        assert data["train"].features == loaded["train"].features
        assert data["train"].class_counts == [40] * 10
        assert len(data["train"].sample) == 400
        assert data["eval"]["label"] == loaded["eval"]["label"]
        assert data["eval"][3]["image"] == loaded["eval"][3]["image"]


def test_processes_read_different_lanes_and_their_workers_ask_no_group(opened):
    """A worker that was not forked has a process group of its own, if any."""
    found = []
    for process in range(2):
        data = images(opened["parquet"]["train"])
        data.num_readers, data.process = 2, (process, 2)
        found.append([example[POSITION][0] for example, _ in zip(data, range(4), strict=False)])
    assert [{lane % 2 for lane in lanes} for lanes in found] == [{0}, {1}]


def test_an_example_without_a_label_is_named_as_such(opened):
    for label in (None, -1):
        with pytest.raises(InputError, match=r"\(split train\) has no label. Remove such examples"):
            opened["parquet"]["train"].number_of(label)


@pytest.mark.parametrize(("kind", "num_lanes"), [("parquet", 2), ("parquet", 8), ("webdataset", 4)])  # of 3 files
def test_lanes_read_each_example_once_and_go_on_where_they_were(opened, kind, num_lanes):
    stream, seen = opened[kind]["train"], Counter()
    for number in range(num_lanes):
        passes, found = Lane(stream, number, num_lanes, 0).take(1000, 1)
        assert set(passes) == {0}
        seen.update((example["image"]["bytes"], example["label"]) for example in found)
    assert (sum(seen.values()), len({image for image, _ in seen})) == (400, len(seen))
    whole = Lane(stream, 1, num_lanes, 0).take(300)
    assert whole[0][-1] > 0
    assert [e["label"] for e in whole[1]] != [e["label"] for e in Lane(stream, 1, num_lanes, 1).take(300)[1]]
    for cut in (1, 25, 139):
        first = Lane(stream, 1, num_lanes, 0)
        first.take(cut)
        again = Lane(stream, 1, num_lanes, 0, json.loads(json.dumps(first.position))).take(300 - cut)
        assert again == (whole[0][cut:], whole[1][cut:])


def steps_of(stream: Stream, processes: int, accumulation: int, monkeypatch, workers: int = 0) -> list[list]:
    """Sums of the pixels, and labels, of the examples of 15 steps, as these processes see them together."""
    steps: list[list] = [[] for _ in range(15)]
    for rank in range(processes):
        state = SimpleNamespace(num_processes=processes, process_index=rank)
        monkeypatch.setattr("bkd_hf.streams.PartialState", lambda state=state: state)
        part = images(stream)
        part.num_readers = processes * max(1, workers)
        loader = DataLoader(part, batch_size=None, collate_fn=lambda batch: batch, num_workers=workers)
        for number, batch in enumerate(islice(loader, 15 * accumulation)):
            sums = batch["pixel_values"].to("cpu").sum(dim=(1, 2, 3))
            steps[number // accumulation] += zip(sums.tolist(), batch["labels"].tolist(), strict=True)
    return [sorted(step) for step in steps]


def test_steps_are_the_same_for_any_number_of_readers(opened, monkeypatch):
    stream = opened["parquet"]["train"]
    alone = steps_of(stream, 1, 4, monkeypatch)
    assert len({tuple(step) for step in alone}) == 15
    for processes, accumulation, workers in ((2, 2, 0), (4, 1, 0), (1, 4, 2)):
        assert steps_of(stream, processes, accumulation, monkeypatch, workers) == alone


def train(data, tmp_path, checkpoint=None, callback=None, **options) -> BKDTrainer:
    torch.manual_seed(0)
    student, teacher = load_classifier("cifar-resnet-8", NAMES, 8), load_classifier("cifar-resnet-8", NAMES, 8)
    options = {"max_steps": 40, "save_steps": 30, "per_device_train_batch_size": 8, "logging_steps": 20} | options
    args = BKDConfig(
        str(tmp_path), learning_rate=0.01, optim="sgd", use_cpu=True, disable_tqdm=True,
        **{"method": "bkd-calibrated"} | options,
    )  # fmt: skip
    evaluated = ImageDataset(data["eval"], load_processor("cifar-resnet-8", 8))
    trainer = BKDTrainer(
        student, None if args.method == "ce" else teacher, args, train_dataset=images(data["train"]),
        eval_dataset=evaluated, callbacks=[callback] if callback else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_training_is_bitwise_the_same(opened, tmp_path, workers):
    """After one pass of the 400 images, with batches that were read ahead."""
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    whole = train(opened["parquet"], tmp_path, **options)
    assert whole.state.epoch == pytest.approx(40 * 16 / 400)
    again = train(opened["parquet"], tmp_path, "checkpoint-30", **options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert again.state.epoch == whole.state.epoch
    logs = [[e for e in each.state.log_history if "kd_loss" in e] for each in (whole, again)]
    assert logs[0] == logs[1]


def test_a_pass_ends_like_an_epoch(opened, tmp_path):
    """400 images in steps of 32: passes end in steps 13, 25 and 38, the training in step 40."""
    every = dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "epoch")
    trainer = train(opened["parquet"], tmp_path, per_device_train_batch_size=32, **every)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert [entry["step"] for entry in trainer.state.log_history if name in entry] == [13, 25, 38, 40]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (13, 25, 38, 40)}
    assert (trainer.state.epoch, trainer.state.num_train_epochs) == (40 / 12.5, 4)


def test_a_stop_in_the_evaluation_of_a_pass_evaluates_once(opened, tmp_path):
    """400 images in steps of 100: the first pass ends with step 4."""

    class Stopping(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    every = dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "epoch")
    options = {"per_device_train_batch_size": 100, "max_steps": 8, "enable_jit_checkpoint": True, "method": "ce"}
    with pytest.raises(TrainingStopped):
        train(opened["parquet"], tmp_path, callback=Stopping(), **every, **options)
    trainer = train(opened["parquet"], tmp_path, checkpoint="checkpoint-4", **every, **options)
    told = [(entry["step"], "eval_loss" in entry) for entry in trainer.state.log_history if "train_loss" not in entry]
    assert told == [(4, False), (4, True), (8, False), (8, True)]


def test_other_cuts_cannot_go_on(opened, tmp_path):
    train(opened["parquet"], tmp_path, max_steps=3, save_steps=3)
    with pytest.raises(InputError, match="saved with a stream of batch_size 8, which is 4 here"):
        train(opened["parquet"], tmp_path, "checkpoint-3", per_device_train_batch_size=4)


def test_what_was_divided_is_not_divided_again(opened, shards):
    found, *_ = open_columns(str(shards["parquet"]), None, (None, None), (None, None))
    with pytest.raises(InputError, match="was divided among processes by split_dataset_by_node"):
        Stream(split_dataset_by_node(found["train"], 0, 2), dict.fromkeys(NAMES, 40))


def small_shards(folder: Path, labels: list[list], feature: Any) -> Path:
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    for number, shard in enumerate(labels):
        images = [Image.new("L", (4, 4), 10 * number + i) for i in range(len(shard))]
        data = datasets.Dataset.from_dict({"image": images, "label": shard}, features=features)
        data.to_parquet(folder / f"train-{number}.parquet")
    data.to_parquet(folder / "test-0.parquet")
    return folder


def test_numbers_with_gaps_are_names_of_classes(tmp_path):
    folder = small_shards(tmp_path, [[3, 7, 7, 3, 7]], datasets.Value("int64"))
    (counts := tmp_path / "counts.json").write_text(json.dumps(count_labels(str(folder))))
    opened = load_stream(str(folder), str(counts), cache_dir=str(tmp_path))
    assert opened["train"].class_counts == [2, 3]
    assert opened["eval"]["label"][:] == [0, 1, 1, 0, 1]
    assert opened["eval"].features["label"].names == ["3", "7"]
    found, _, columns = open_columns(str(folder), None, (None, None), (None, None))
    by_number = Stream(found["train"], dict.fromkeys("abcdefgh", 1), 100, columns)
    assert set(by_number.sample["label"]) == {3, 7}


def test_shards_without_examples(tmp_path):
    folder = small_shards(tmp_path, [[0, 1]] * 5 + [[]] * 4 + [[1, 0]], datasets.ClassLabel(names=["a", "b"]))
    found, _, columns = open_columns(str(folder), None, (None, None), (None, None))
    stream = Stream(found["train"], {"a": 6, "b": 6}, 100, columns)
    lanes = [Lane(stream, number, 8, seed=0) for number in range(8)]
    for lane in lanes:
        assert len(lane.take(60)[1]) == 60


@pytest.mark.parametrize(
    ("labels", "feature"),
    [([[0], [1]], datasets.List(datasets.Value("int64"))), ([0.5, 1.5], datasets.Value("float32"))],
)
def test_labels_that_are_no_classes_cannot_be_counted(tmp_path, labels, feature):
    with pytest.raises(InputError, match="the labels in column 'label' are not classes"):
        count_labels(str(small_shards(tmp_path, [labels], feature)))


def test_the_demo_can_be_streamed(tmp_path):
    (counts := tmp_path / "counts.json").write_text(json.dumps(count_labels("digits")))
    opened, loaded = load_stream("digits", str(counts), cache_dir=str(tmp_path)), load_image_dataset("digits")
    assert opened["train"].class_counts == class_counts(loaded["train"])
    assert opened["eval"]["label"][:] == loaded["eval"]["label"][:]


@pytest.mark.parametrize("what", ["count", "train", "evaluate"])
def test_a_damaged_shard_is_named_in_one_line(shards, tmp_path, what, capsys):
    folder = shutil.copytree(shards["parquet"], tmp_path / "shards")
    name = "test-00000-of-00001.parquet" if what == "evaluate" else "train-00007-of-00010.parquet"
    (folder / name).write_bytes((folder / name).read_bytes()[:-40] + bytes(40))
    (tmp_path / "counts.json").write_text(json.dumps(dict.fromkeys(NAMES, 40)))
    if what == "count":
        assert split.main(["--dataset_name", str(folder), "--count_only", "--output_dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
    else:
        with pytest.raises(InputError) as refusal:
            load_stream(str(folder), str(tmp_path / "counts.json"), cache_dir=str(tmp_path))
        error = str(refusal.value)
    assert "A shard of --dataset_name cannot be read" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "feature", "expected"),
    [
        ({"b": 2, "a": 3}, datasets.Value("string"), {"a": 3, "b": 2}),
        ({"10": 2, "2": 3}, datasets.Value("int64"), {"2": 3, "10": 2}),
        ({"\u00e9": 2, "x": 3}, datasets.ClassLabel(names=["x", "e\u0301"]), {"x": 3, "\u00e9": 2}),
        ({"1": 2, "0": 3}, datasets.ClassLabel(names=["x", "y"]), {"x": 3, "y": 2}),
        ({"y": 2, "x": 3}, datasets.ClassLabel(names=["x", "y"]), {"x": 3, "y": 2}),
        ({"z": 2}, datasets.ClassLabel(names=["x", "y"]), "there is no class 'z' in the data"),
        ({"2": 2}, datasets.ClassLabel(names=["x", "y"]), "there is no class '2' in the data"),
        ({"x": 2}, datasets.Value("int64"), "there is no class 'x' in the data"),
        ({"x": -2}, datasets.Value("string"), "expected {"),
        ([3, 4], datasets.Value("string"), "expected {"),
    ],
)
def test_counts_by_name_or_number(tmp_path, content, feature, expected):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(content))
    if isinstance(expected, dict):
        found = read_counts(str(path), feature)
        assert list(found.items()) == list(expected.items())
    else:
        with pytest.raises(InputError, match=f"--class_counts {path}: {expected}"):
            read_counts(str(path), feature)


@pytest.mark.parametrize("label", [10, -2, "ten"])
def test_labels_that_were_not_counted_are_refused(opened, label):
    with pytest.raises(InputError, match="of which --class_counts says nothing"):
        opened["parquet"]["train"].number_of(label)


COUNTED = "--streaming true --class_counts counts.json --max_steps 5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--streaming true --max_steps 5", "--streaming needs --class_counts FILE"),
        ("--streaming true --class_counts counts.json", "--streaming needs --max_steps"),
        (f"{COUNTED} --teacher_cache auto", "--teacher_cache auto does not go with --streaming"),
        (f"{COUNTED} --method resample", "--sampler class_balanced does not go with --streaming"),
        (f"{COUNTED} --head cosine --head_init class_mean", "--head_init class_mean does not go with --streaming"),
        (f"{COUNTED} --head_bias balanced", "--head_bias balanced does not go with --streaming"),
        (f"{COUNTED} --imbalance_ratio 10", "--imbalance_ratio 10.0 does not go with --streaming"),
        (f"{COUNTED} --cache_images disk", "--cache_images disk does not go with --streaming"),
        (f"{COUNTED} --export onnx", "--export onnx does not go with --streaming"),
    ],
)
def test_what_needs_all_images_is_refused(line, message):
    with pytest.raises(InputError, match=message):
        parse_arguments(line.split())
    assert np.all(parse_arguments(COUNTED.split()).data.streaming)


def test_the_evaluation_set_beside_a_stream_can_be_reduced(shards, tmp_path):
    (counts := tmp_path / "counts.json").write_text(json.dumps(dict.fromkeys(NAMES, 40)))
    words = ["--dataset_name", str(shards["parquet"]), *COUNTED.replace("counts.json", str(counts)).split()]
    words += ["--cache_dir", str(tmp_path), "--max_eval_samples", "12"]
    assert len(load_splits(parse_arguments(words))["eval"]) <= 12
