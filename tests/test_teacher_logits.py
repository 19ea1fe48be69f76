"""Precomputed teacher logits: the same numbers, whichever process computes them, and never damaged."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

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
from bkd_hf.teacher_logits import LogitsFolder, WithColumn, describe_teacher, describe_views, precompute_logits
from bkd_hf.trainer import TeacherLogitsError
from tests.conftest import REPOSITORY
from tests.faults import run, start_two

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


def watched(digits, **options) -> tuple[ImageDataset, list[int]]:
    """Images, and a list of the epochs that they are told."""
    dataset, seen = images(digits, **options), []
    tell = dataset.set_epoch
    dataset.set_epoch = lambda epoch: (seen.append(epoch), tell(epoch))
    return dataset, seen


def train(
    models, dataset, tmp_path: Path, data_collator=None, checkpoint: str | None = None, **options
) -> tuple[list[dict[str, float]], torch.Tensor, int]:
    """Losses of the epochs, the student's weights as one vector, and how often the teacher was asked."""
    student, teacher = copy.deepcopy(models)
    args = BKDConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=16, learning_rate=0.05,
        optim="sgd", use_cpu=True, logging_strategy="epoch", disable_tqdm=True,
        **{"num_train_epochs": 4, "save_strategy": "no", "teacher_cache": str(tmp_path / "cache"),
           "teacher_cache_views": 2, "teacher_cache_dtype": "float32"} | options,
    )  # fmt: skip
    CountingTeacher.calls = 0
    trainer = BKDTrainer(
        student, CountingTeacher(teacher), args, data_collator, train_dataset=dataset, class_counts=[8] * 10
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = [
        {k: v for k, v in entry.items() if "loss" in k} for entry in trainer.state.log_history if "loss" in entry
    ]
    return losses, torch.cat([p.detach().flatten() for p in student.parameters()]), CountingTeacher.calls


# ---- The same numbers


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_second_run_is_bitwise_the_run_that_computed_the_logits(models, digits, tmp_path, workers):
    first = train(models, images(digits), tmp_path)
    second = train(models, images(digits), tmp_path, **workers)
    assert first[2] == 2 * 5  # five batches of each of two views, of four epochs
    assert second[2] == 0
    assert second[0] == first[0]
    assert torch.equal(second[1], first[1])


def test_the_teachers_pixels_are_rendered_for_its_logits_alone(models, digits, tmp_path):
    of_teacher = load_processor("cifar-resnet-8", 8, [0.2] * 3, [0.3] * 3)
    rendered = []

    class Watched(ImageDataset):
        def __getitems__(self, indices):
            examples = super().__getitems__(indices)
            rendered.extend("teacher_pixel_values" in example for example in examples)
            return examples

    dataset = Watched(digits, load_processor("cifar-resnet-8", 8), "pad_crop", teacher_processor=of_teacher)
    cached = train(models, dataset, tmp_path)
    assert sum(rendered) == 2 * 80  # 76 images of two views, in batches of one size
    rendered.clear()
    assert train(models, dataset, tmp_path)[0] == cached[0]
    assert len(rendered) == 4 * len(digits)
    assert not any(rendered)
    online = train(models, dataset, tmp_path, teacher_cache="off", teacher_cache_dtype="float16")
    for ours, theirs in zip(cached[0], online[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_losses_are_those_of_the_online_teacher(models, digits, tmp_path, dtype, tolerance):
    train(models, images(digits), tmp_path, teacher_cache_dtype=dtype)
    cached = train(models, images(digits), tmp_path, teacher_cache_dtype=dtype)
    online = train(models, images(digits), tmp_path, teacher_cache="off", teacher_cache_dtype="float16")
    assert (cached[2], online[2]) == (0, 4 * 5)
    for ours, theirs in zip(cached[0], online[0], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)


# ---- The k best classes


@pytest.mark.parametrize(
    ("k", "options", "tolerance"),
    [
        (9, {"method": "kd", "class_balance_beta": 0.9999}, 1e-3),  # of ten classes: all is known
        (9, {"logit_standardization": True}, 1e-4),
        (4, {"teacher_cache_dtype": "float16"}, 0.4),
    ],
)
def test_training_with_the_top_k(models, digits, tmp_path, k, options, tolerance):
    options = {"method": "bkd-drw", "class_balance_beta": 0.5, "deferred_reweighting_start": 0.5} | options
    if options["method"] == "kd":
        del options["deferred_reweighting_start"]
    options |= {"num_train_epochs": 2, "teacher_cache_views": 1}
    cached = train(models, images(digits), tmp_path, **options, teacher_cache_top_k=k)
    (file,) = (tmp_path / "cache").glob("*/view0.bin")
    phases = 1 + ("deferred_reweighting_start" in options)
    logit = 2 if options.get("teacher_cache_dtype") == "float16" else 4
    assert file.stat().st_size == len(digits) * ((logit + 2) * k + 4 * phases) + 16
    whole = train(models, images(digits), tmp_path, **options)
    for ours, theirs in zip(cached[0], whole[0], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
        assert ours["kd_loss"] < theirs["kd_loss"] * (1 + tolerance)  # something is missing, nothing is added


def test_views_come_again_and_without_the_option_they_do_not(models, digits, tmp_path):
    dataset, seen = watched(digits)
    for options in ({}, {"teacher_cache": "off"}, {"teacher_cache": "off", "teacher_cache_views": None}):
        train(models, dataset, tmp_path, **({"teacher_cache_dtype": "float16"} | options))
    assert seen == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("views", "options"), [(None, {}), (2, {}), (None, {"augmentation": "none", "operations": ["cutout"]})]
)
def test_parts_of_data_sets_are_augmented_anew(models, digits, tmp_path, views, options):
    """Also where pixels stay bytes, which only `collate_images` puts together."""
    (first, seen), (second, _) = (watched(digits, as_bytes=True, **options) for _ in range(2))
    part, _ = torch.utils.data.random_split(first, [40, 36], torch.Generator().manual_seed(0))
    for dataset in (part, torch.utils.data.ConcatDataset([part, torch.utils.data.Subset(second, range(20))])):
        train(models, dataset, tmp_path, teacher_cache="auto", teacher_cache_views=views)
    assert seen == 2 * ([0, 1, 2, 3] if views is None else [0, 1, 0, 1])


def test_views_are_computed_when_an_epoch_needs_them(models, digits, tmp_path):
    assert train(models, images(digits), tmp_path, max_steps=7, teacher_cache_views=8)[2] == 2 * 5
    assert sorted(path.name for path in tmp_path.glob("cache/*/*")) == ["about.json", "view0.bin", "view1.bin"]
    assert train(models, images(digits), tmp_path, teacher_cache_views=3)[2] == 5  # the third


def test_resumed_in_the_middle_of_an_epoch(models, digits, tmp_path):
    whole = train(models, images(digits), tmp_path, save_strategy="steps", save_steps=8)
    resumed = train(models, images(digits), tmp_path, checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert resumed[2] == 0
    assert torch.equal(resumed[1], whole[1])


def test_logits_of_texts(tmp_path):
    """Padded by a collator of `transformers`, in a data set of 🤗 Datasets."""
    texts = datasets.Dataset.from_dict({"input_ids": [[1] * (2 + n % 3) for n in range(20)], "labels": [0, 1] * 10})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "a": 1})), pad_token="[PAD]")
    config = BertConfig(
        vocab_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=10,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    bert = [BertForSequenceClassification(config) for _ in range(2)]
    collator = DataCollatorWithPadding(tokenizer)
    cached = train(bert, texts, tmp_path, collator, teacher_cache_views=None)
    online = train(bert, texts, tmp_path, collator, teacher_cache="off", teacher_cache_views=None)
    assert (cached[2], online[2]) == (2, 8)
    assert cached[0][0] == pytest.approx(online[0][0], rel=1e-5)


def test_nothing_else_is_taken_for_the_same(models, digits, tmp_path):
    train(models, images(digits), tmp_path)
    other = copy.deepcopy(models[1])
    torch.nn.init.ones_(other.classifier.bias)
    assert train([models[0], other], images(digits), tmp_path, max_steps=1)[2] == 5
    assert train(models, images(digits), tmp_path, max_steps=1, teacher_cache_dtype="float16")[2] == 5
    same, *others = (
        describe_views(dataset, "instance")
        for dataset in (
            images(digits),
            images(digits, data_seed=1),
            images(digits, horizontal_flip=False),
            images(digits, augmentation="none"),
            images(digits, operations=["cutout"]),
            images(digits, operations=["cutout", "autoaugment"]),
            images(digits, operations=["autoaugment", "cutout"]),
            images(digits.select(range(75, -1, -1))),
            ImageDataset(digits, load_processor("cifar-resnet-8", 8, [0.4] * 3), "pad_crop"),
        )
    )
    assert same == describe_views(images(digits, cache_images="none"), "instance")
    assert same not in others


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


def test_images_are_told_apart_by_their_content(tmp_path):
    """Not by the names and sizes of their files."""

    def described(colour: int) -> dict:
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(tmp_path / "image.bmp")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        data = datasets.Dataset.from_dict({"image": [str(tmp_path / "image.bmp")], "label": [0]}, features=features)
        return describe_views(images(data, cache_images="none"), "instance")

    assert described(1) == described(1) != described(2)


def test_tables_are_told_apart_by_their_content():
    def described(values: list[int], **columns: list[int]) -> dict:
        return describe_views(datasets.Dataset.from_dict({"x": values, **columns}), "instance")

    rows = datasets.Dataset.from_dict({"x": [2, 1]}).select([1, 0])
    assert described([1, 2]) == described([1, 2]) == describe_views(rows, "instance") != described([1, 3])
    assert described([1, 2]) != described([1, 2], y=[1, 2])


# ---- Files


class Numbers(list):
    """Ten examples; the teacher's logits of number n in view v are n, 10 v and −∞."""

    def __init__(self):
        super().__init__({"n": n} for n in range(10))

    def set_epoch(self, view: int) -> None:
        self.view = view


def compute(folder: Path, view: int = 1, dtype: str = "float32", change=lambda logits: logits) -> LogitsFolder:
    files, data = LogitsFolder(folder, {"teacher": 1}, (2, 10, 3), dtype), Numbers()
    data.set_epoch(view)

    def teacher(batch):
        n = batch["n"].float()
        return change(torch.stack([n, torch.full_like(n, 10 * data.view), torch.full_like(n, float("-inf"))], 1))

    precompute_logits(teacher, data, files, view, batch_size=4)
    return files


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits_are_a_column(tmp_path, dtype):
    data = WithColumn(Numbers(), compute(tmp_path, dtype=dtype))
    data.set_epoch(1)
    expected = [{"n": n, "teacher_logits": [n, 10, float("-inf")]} for n in (9, 0, 3)]
    assert [{**e, "teacher_logits": e["teacher_logits"].tolist()} for e in data.__getitems__([9, 0, 3])] == expected
    assert data[9]["teacher_logits"].dtype == np.float32
    data.set_epoch(0)
    with pytest.raises(InputError, match="view 0 are not in"):
        data[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content + b"x",
        *(lambda content, at=at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in (0, 60, -1)),
    ],
    ids=["halved", "empty", "zeroed", "longer", "flipped at the start", "flipped inside", "flipped in the checksum"],
)
def test_damaged_files_are_computed_again(tmp_path, damage, caplog):
    files = compute(tmp_path)
    content = files.path(1).read_bytes()
    compute(tmp_path, change=pytest.fail)  # nothing to do
    files.path(1).write_bytes(damage(content))
    assert files.open(1) is None
    assert "are damaged" in caplog.text
    compute(tmp_path)
    assert files.path(1).read_bytes() == content


def test_training_goes_on_with_damaged_files(models, digits, tmp_path):
    first = train(models, images(digits), tmp_path)
    for path in tmp_path.glob("cache/*/view*.bin"):
        path.write_bytes(path.read_bytes()[::-1])
    second = train(models, images(digits), tmp_path)
    assert second[2] == first[2]
    assert torch.equal(second[1], first[1])


def test_files_of_other_views_and_teachers_are_not_taken(tmp_path):
    files = compute(tmp_path)
    shutil.copy(files.path(1), files.path(0))
    assert files.open(0) is None
    other = LogitsFolder(tmp_path, {"teacher": 2}, (2, 10, 3), "float32")
    shutil.copy(files.path(1), other.path(1))
    assert other.open(1) is None


@pytest.mark.parametrize(
    ("dtype", "change", "error", "message"),
    [
        ("float16", lambda logits: logits + 1e5, InputError, "--teacher_cache_dtype float16: use float32"),
        ("float32", lambda logits: logits * float("nan"), TeacherLogitsError, "not finite .* in view 1"),
        ("float32", lambda logits: -logits, TeacherLogitsError, "not finite .* in view 1"),
    ],
)
def test_nothing_is_left_of_logits_that_cannot_be_stored(tmp_path, dtype, change, error, message):
    with pytest.raises(error, match=message):
        compute(tmp_path, dtype=dtype, change=change)
    assert [path.name for path in tmp_path.glob("*/*")] == ["about.json"]
    compute(tmp_path, change=lambda logits: logits + 1e5)


def test_what_killed_runs_left_is_removed(tmp_path):
    old, new = (compute(tmp_path).folder / f"view0-{name}.partial" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    compute(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_size_is_said(tmp_path):
    assert str(compute(tmp_path)) == f"2 views × 10 examples × 3 classes, 0.0 MB in {tmp_path}; 50 % of it is there"
    assert str(compute(tmp_path, view=0)).endswith("all of it is there")


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
        ({"teacher_cache_top_k": 0}, "--teacher_cache_top_k must be at least 1, got 0"),
        *(
            (
                {"teacher_cache_top_k": 5, "distillation_loss": name},
                f"--teacher_cache_top_k must be left out with --distillation_loss {name}, which needs all .* got 5",
            )
            for name in ("dive", "dkd", "wsl", "dist", "ltkd")
        ),
        ({"teacher_cache_views": 0}, "--teacher_cache_views must be at least 1, got 0"),
        ({"teacher_cache_dtype": "int8"}, "--teacher_cache_dtype must be one of float16, float32, got int8"),
    ],
)
def test_options_are_checked(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        BKDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "columns", "named"),
    [
        ({"teacher_cache_top_k": 10}, None, "--teacher_cache_top_k must be less than the 10 classes, got 10"),
        (
            {"teacher_cache_top_k": 3},
            [0, None, *range(2, 10)],
            "top_k 3 does not go with a teacher that lacks",
        ),
    ],
)
def test_top_k_that_cannot_be_are_refused(models, digits, tmp_path, options, columns, named):
    student, teacher = copy.deepcopy(models)
    args = BKDConfig(str(tmp_path), use_cpu=True, teacher_cache=str(tmp_path / "cache"), **options)
    trainer = BKDTrainer(student, FrozenTeacher(teacher, columns), args, train_dataset=images(digits))
    with pytest.raises(InputError, match=named):
        trainer.train()


# ---- Real processes


@pytest.mark.slow
def test_two_processes_compute_what_one_reads(tmp_path):
    """A run by one process, with the same teacher as a run by two, finds all logits."""
    options = [
        "--config", REPOSITORY / "scripts" / "recipes" / "digits.yaml", "--train_augmentation", "pad_crop",
        "--num_train_epochs", "3", "--lr_step_epochs", "2", "--lr_step_factors", "0.1", "--num_threads", "1",
        "--teacher_cache", tmp_path / "cache", "--teacher_cache_views", "2", "--teacher_cache_dtype", "float32",
        "--disable_tqdm", "true", "--eval_strategy", "no",
    ]  # fmt: skip
    both = start_two(*options, "--per_device_train_batch_size", "16", "--output_dir", tmp_path / "two")
    assert [process.wait() for process in both] == [0, 0], [process.output for process in both]
    assert "Teacher cache: 2 views × 344 examples × 10 classes" in both[0].output
    teacher = ["--teacher_model_name_or_path", tmp_path / "two" / "teacher"]
    code, said = run(*options, *teacher, "--per_device_train_batch_size", "32", "--output_dir", tmp_path / "one")
    assert code == 0, said
    assert "all of it is there" in said
