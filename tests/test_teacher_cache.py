"""The teacher's logits are computed once: same numbers, whoever fills the cache, and whatever happens on the way."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import default_data_collator

from bkd_hf import (
    BKDConfig,
    BKDTrainer,
    FrozenTeacher,
    ImageDataset,
    InputError,
    load_classifier,
    load_image_dataset,
    load_processor,
    load_teacher,
)
from bkd_hf.teacher_cache import TeacherCache, describe_teacher
from tests.conftest import REPOSITORY, WORKER_ENVIRONMENT, launch_two_processes

NAMES = [str(digit) for digit in range(10)]


class CountingTeacher(FrozenTeacher):
    calls = 0

    def forward(self, **inputs):
        CountingTeacher.calls += 1
        return super().forward(**inputs)


@pytest.fixture(scope="module")
def digits():
    return load_image_dataset("digits")["eval"].select(range(76))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return [load_classifier("cifar-resnet-8", NAMES, 8) for _ in range(2)]


def images(digits, **options) -> ImageDataset:
    return ImageDataset(digits, load_processor("cifar-resnet-8", 8), **{"augmentation": "pad_crop", **options})


def train(
    models, dataset, tmp_path: Path, data_collator=None, **options
) -> tuple[list[dict[str, float]], torch.Tensor, int]:
    """Losses of the epochs, the student's weights as one vector, and how often the teacher was asked."""
    student, teacher = copy.deepcopy(models)
    args = BKDConfig(
        output_dir=str(tmp_path / "run"), num_train_epochs=4, per_device_train_batch_size=16, learning_rate=0.05,
        optim="sgd", use_cpu=True, save_strategy="no", logging_strategy="epoch", disable_tqdm=True,
        **{"teacher_cache": str(tmp_path / "cache"), "teacher_cache_views": 2, "teacher_cache_dtype": "float32"}
        | options,
    )  # fmt: skip
    CountingTeacher.calls = 0
    trainer = BKDTrainer(
        student, CountingTeacher(teacher), args, data_collator, train_dataset=dataset, class_counts=[8] * 10
    )
    trainer.train()
    losses = [
        {k: v for k, v in entry.items() if "loss" in k} for entry in trainer.state.log_history if "loss" in entry
    ]
    return losses, torch.cat([p.detach().flatten() for p in student.parameters()]), CountingTeacher.calls


# ---- The same numbers


def test_second_run_is_bitwise_the_run_that_filled_the_cache(models, digits, tmp_path):
    first = train(models, images(digits), tmp_path)
    second = train(models, images(digits), tmp_path)
    assert first[2] == 2 * 5  # five batches of each of two views, of four epochs
    assert second[2] == 0
    assert second[0] == first[0]
    assert torch.equal(second[1], first[1])


def test_a_full_cache_saves_the_teachers_pixels_too(models, digits, tmp_path):
    """A teacher that takes other pixels: they are rendered while the cache is filled, and no more after that."""
    of_teacher = load_processor("cifar-resnet-8", 8, [0.2] * 3, [0.3] * 3)
    rendered = []

    class Watched(ImageDataset):
        def __getitems__(self, indices):
            examples = super().__getitems__(indices)
            rendered.extend("teacher_pixel_values" in example for example in examples)
            return examples

    dataset = Watched(digits, load_processor("cifar-resnet-8", 8), "pad_crop", teacher_processor=of_teacher)
    first = train(models, dataset, tmp_path)
    assert all(rendered)
    rendered.clear()
    second = train(models, dataset, tmp_path)
    assert len(rendered) == 4 * len(digits)
    assert not any(rendered)
    assert second[0] == first[0]
    assert torch.equal(second[1], first[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_losses_are_those_of_the_online_teacher(models, digits, tmp_path, dtype, tolerance):
    train(models, images(digits), tmp_path, teacher_cache_dtype=dtype)
    cached = train(models, images(digits), tmp_path, teacher_cache_dtype=dtype)
    online = train(models, images(digits), tmp_path, teacher_cache="off", teacher_cache_dtype="float16")
    assert (cached[2], online[2]) == (0, 4 * 5)
    for ours, theirs in zip(cached[0], online[0], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


def test_views_come_again_and_without_the_option_they_do_not(models, digits, tmp_path):
    seen = []

    class Watched(ImageDataset):
        def set_epoch(self, epoch):
            seen.append(epoch)
            super().set_epoch(epoch)

    dataset = Watched(digits, load_processor("cifar-resnet-8", 8), "pad_crop")
    for options in ({}, {"teacher_cache": "off"}, {"teacher_cache": "off", "teacher_cache_views": None}):
        train(models, dataset, tmp_path, **({"teacher_cache_dtype": "float16"} | options))
    assert seen == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("views", [None, 2])
def test_parts_of_data_sets_are_augmented_anew(models, digits, tmp_path, views):
    """Also where pixels stay bytes, which only `collate_images` puts together."""
    seen = []

    class Watched(ImageDataset):
        def set_epoch(self, epoch):
            seen.append(epoch)
            super().set_epoch(epoch)

    first, second = (Watched(digits, load_processor("cifar-resnet-8", 8), "pad_crop", as_bytes=True) for _ in "ab")
    part, _ = torch.utils.data.random_split(first, [40, 36], torch.Generator().manual_seed(0))
    for dataset in (part, torch.utils.data.ConcatDataset([part, torch.utils.data.Subset(second, range(20))])):
        train(models, dataset, tmp_path, teacher_cache="auto", teacher_cache_views=views)
    epochs = [0, 1, 2, 3] if views is None else [0, 1, 0, 1]
    assert seen == [*epochs, *(epoch for epoch in epochs for _ in range(2))]


def test_one_view_is_enough_where_nothing_is_augmented(models, digits, tmp_path):
    dataset = images(digits, augmentation="none")
    cached = train(models, dataset, tmp_path, teacher_cache_views=None)
    online = train(
        models, dataset, tmp_path, teacher_cache="off", teacher_cache_views=None, teacher_cache_dtype="float16"
    )
    assert (cached[2], online[2]) == (5, 20)
    for ours, theirs in zip(cached[0], online[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_interrupted_filling_goes_on(models, digits, tmp_path):
    complete = train(models, images(digits), tmp_path)
    shutil.rmtree(tmp_path / "cache")
    train(models, images(digits), tmp_path, max_steps=7)  # the first view, and two batches of the second
    assert train(models, images(digits), tmp_path)[2] == 3
    again = train(models, images(digits), tmp_path)
    assert again[2] == 0
    for ours, theirs in zip(again[0], complete[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    "change",
    ["weights", "data_seed", "horizontal_flip", "images", "processor", "views", "dtype"],
)
def test_nothing_else_is_taken_for_the_same(models, digits, tmp_path, change):
    train(models, images(digits), tmp_path)
    options, dataset, teacher = {}, images(digits), copy.deepcopy(models[1])
    if change == "weights":
        with torch.no_grad():
            teacher.classifier.bias[0] += 1
    elif change == "data_seed":
        dataset.data_seed = 1
    elif change == "horizontal_flip":
        dataset.horizontal_flip = False
    elif change == "images":
        dataset = images(digits.select(range(75, -1, -1)))
    elif change == "processor":
        dataset = ImageDataset(digits, load_processor("cifar-resnet-8", 8, [0.4] * 3), "pad_crop")
    elif change == "views":
        options = {"teacher_cache_views": 3}
    else:
        options = {"teacher_cache_dtype": "float16"}
    assert train([models[0], teacher], dataset, tmp_path, **options)[2] > 0


def test_teachers_of_another_architecture_are_others():
    """Also where their weights are the same."""
    weights = load_classifier("cifar-resnet-8", NAMES, 8, cosine_scale=10).state_dict()

    def described(scale: float, names: list[str] = NAMES) -> dict:
        model = load_classifier("cifar-resnet-8", names, 8, cosine_scale=scale)
        model.load_state_dict(weights)
        return describe_teacher(FrozenTeacher(model))

    assert described(10)["weights"] == described(30)["weights"]
    assert described(10) == described(10) != described(30)
    assert described(10) == described(10, [f"digit {name}" for name in NAMES])

    linear = torch.nn.Linear(3, 10)
    activations = (torch.nn.ReLU(), torch.nn.Tanh())
    first, second = (describe_teacher(FrozenTeacher(torch.nn.Sequential(linear, each))) for each in activations)
    assert first != second


def test_a_saved_teacher_is_the_same(tmp_path):
    teacher = load_classifier("cifar-resnet-8", NAMES, 8)
    teacher.save_pretrained(tmp_path)
    assert describe_teacher(load_teacher(str(tmp_path))) == describe_teacher(FrozenTeacher(teacher))


# ---- Files


def write(cache: TeacherCache, view: int, examples: list[int], value: float) -> torch.Tensor:
    return cache.write(view, np.array(examples), torch.full((len(examples), 3), value))


def opened(folder: Path, fill: bool = True, dtype: str = "float32") -> TeacherCache:
    cache = TeacherCache(folder, {"teacher": 1}, 2, 5, 3, dtype)
    cache.open(fill=fill)
    return cache


def test_entries_count_when_they_are_on_disk(tmp_path):
    writer = opened(tmp_path)
    write(writer, 0, [1, 3], 7.0)
    assert opened(tmp_path).num_known == 0  # as after a kill
    writer.flush()
    reader = opened(tmp_path, fill=False)
    assert reader.num_known == 2
    assert reader.read(0, np.array([3, 1])).tolist() == [[7.0] * 3] * 2
    assert reader.read(0, np.array([1, 2])) is None
    assert reader.read(1, np.array([1, 3])) is None


def test_first_answer_stays(tmp_path):
    cache = opened(tmp_path)
    write(cache, 0, [1], 7.0)
    assert write(cache, 0, [1, 2], 8.0).tolist() == [[7.0] * 3, [8.0] * 3]


def test_reader_changes_nothing(tmp_path):
    reader = opened(tmp_path, fill=False)
    assert write(reader, 0, [1], 7.0).tolist() == [[7.0] * 3]
    reader.flush()
    assert opened(tmp_path).num_known == 0


def test_one_run_fills(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    assert first.try_to_lock()
    assert not second.try_to_lock()
    first.close()
    assert second.try_to_lock()


def test_lock_falls_with_its_process(tmp_path):
    code = f"""
import os, signal
from bkd_hf.teacher_cache import TeacherCache
cache = TeacherCache({str(tmp_path)!r}, {{"teacher": 1}}, 2, 5, 3, "float32")
assert cache.try_to_lock()
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code], env=WORKER_ENVIRONMENT, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert opened(tmp_path).try_to_lock()


def test_accidents_are_not_stored_and_unknown_classes_are(tmp_path):
    cache = opened(tmp_path)
    logits = torch.tensor([[1.0, float("nan"), 0.0], [1.0, float("-inf"), 0.0], [float("inf"), 0.0, 0.0]])
    cache.write(0, np.array([0, 1, 2]), logits)
    assert cache.read(0, np.array([1])).tolist() == [[1.0, float("-inf"), 0.0]]
    assert cache.num_known == 1


def test_large_logits_need_float32(tmp_path):
    with pytest.raises(InputError, match="--teacher_cache_dtype float16: use float32"):
        write(opened(tmp_path, dtype="float16"), 0, [1], 1e5)
    write(opened(tmp_path, dtype="float32"), 0, [1], 1e5)


def test_size_is_known_beforehand(tmp_path):
    opened(tmp_path)
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.bin"))
    assert on_disk == TeacherCache.size_in_bytes(2, 5, 3, "float32") == 2 * 5 * (3 * 4 + 1)


# ---- Refused


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sampler": "class_balanced"}, "does not go with --sampler class_balanced"),
        ({"dataset": "transform"}, "does not go with a train_transform"),
        ({"dataset": "list"}, "those of a list need not be"),
        ({"data_collator": lambda examples: default_data_collator(examples)}, "a data_collator of your own"),
        ({"accelerator_config": {"dispatch_batches": True}}, "neither split_batches nor dispatch_batches"),
    ],
)
def test_refused_where_views_are_no_function_of_epoch_and_number(models, digits, tmp_path, options, reason, caplog):
    dataset = images(digits)
    if options.get("dataset") == "transform":
        dataset = images(digits, augmentation="none", train_transform=lambda image: torch.rand(3, 8, 8))
    elif options.get("dataset") == "list":
        dataset = [dataset[number] for number in range(20)]
    options = {key: value for key, value in options.items() if key != "dataset"}
    with pytest.raises(InputError, match=reason):
        train(models, dataset, tmp_path, **options)
    assert train(models, dataset, tmp_path, teacher_cache="auto", max_steps=1, **options)[2] == 1
    assert "The teacher's logits are not cached: --teacher_cache" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_a_stream_has_no_cache(models, digits, tmp_path, caplog):
    stream = datasets.Dataset.from_dict({"pixel_values": torch.rand(40, 3, 8, 8), "labels": [0, 1] * 20})
    stream, epochs = stream.to_iterable_dataset().with_format("torch"), []
    stream.set_epoch = epochs.append
    with pytest.raises(InputError, match="needs a training set with a length and random access"):
        train(models, stream, tmp_path, max_steps=6, teacher_cache_views=None)
    train(models, stream, tmp_path, max_steps=6, teacher_cache_views=None, teacher_cache="auto")
    assert set(epochs) == {0, 1}  # in another order each
    assert not (tmp_path / "cache").exists()


def test_full_disk_and_unwritable_folder_are_refused(models, digits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(models, images(digits), tmp_path, teacher_cache=str(tmp_path / "file" / "cache"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="fewer --teacher_cache_views"):
        train(models, images(digits), tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher_cache_views": 0}, "--teacher_cache_views must be at least 1, got 0"),
        ({"teacher_cache_dtype": "int8"}, "--teacher_cache_dtype must be one of float16, float32, got int8"),
    ],
)
def test_options_are_checked(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        BKDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


# ---- Real processes


def test_two_processes_fill_what_one_reads(tmp_path):
    """A run by two processes fills the cache; one by one process, with the same teacher, finds all in it."""
    script = str(REPOSITORY / "scripts" / "run_bkd.py")
    options = [
        "--config", str(REPOSITORY / "scripts" / "recipes" / "digits.yaml"), "--train_augmentation", "pad_crop",
        "--num_train_epochs", "3", "--lr_step_epochs", "2", "--lr_step_factors", "0.1", "--num_threads", "1",
        "--teacher_cache", str(tmp_path / "cache"), "--teacher_cache_views", "2", "--teacher_cache_dtype", "float32",
        "--disable_tqdm", "true", "--eval_strategy", "no",
    ]  # fmt: skip
    output = []
    for name, launcher, batch in (("two", launch_two_processes(), "16"), ("one", (sys.executable,), "32")):
        teacher = [] if name == "two" else ["--teacher_model_name_or_path", str(tmp_path / "two" / "teacher")]
        process = subprocess.run(
            [*launcher, script, *options, *teacher, "--per_device_train_batch_size", batch, "--output_dir",
             str(tmp_path / name)],
            capture_output=True, text=True, timeout=150, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr
        output.append(process.stdout)
    assert "Teacher cache: 2 views × 344 images × 10 classes" in output[0]
    assert "all of it is there" in output[1]
