"""The head of a classifier: removing the remaining class frequencies from its bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from bkd_hf import BKDConfig, BKDTrainer, InputError
from bkd_hf.head import (
    balancing_shift,
    favours_a_class,
    head_biases,
    least_lowering,
    sample_for_bias,
    shift_logits,
)
from bkd_hf.head_fitting import class_vectors
from bkd_hf.models import load_classifier
from tests.architectures import EVERY_BUT_TIMM, IMAGE_SIZES, tiny

COUNTS = [400, 100, 20]


def drawn(counts: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced logits log p(x|y) of points in the plane, drawn from one normal distribution for each class."""
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    points = means[labels] + torch.randn(len(labels), 2, generator=generator)
    return -((points[:, None] - means) ** 2).sum(-1) / 2, labels


def test_shift_takes_out_the_prior_that_is_left():
    balanced, labels = drawn([8000, 2000, 400])
    left = torch.tensor([1.5, 0.3, -1.8])
    shift = balancing_shift(balanced + left, labels)
    torch.testing.assert_close(shift.float(), -left, atol=0.12, rtol=0)
    assert balancing_shift(balanced, labels).abs().max() < 0.12


def test_at_the_shift_the_mean_answer_is_uniform_but_for_the_prior():
    logits, labels = drawn(COUNTS)
    shift = balancing_shift(logits * 2 + 1, labels)
    answers = (logits.double() * 2 + 1 + shift).softmax(dim=1)
    counted = torch.tensor([n / (n + 5) for n in COUNTS]).double()  # a class with few images counts less
    mean = counted @ torch.stack([answers[labels == c].mean(dim=0) for c in range(3)]) / counted.sum()
    num_effective = counted.sum() ** 2 / sum(c**2 / n for c, n in zip(counted, COUNTS, strict=True))  # Kish's
    torch.testing.assert_close(mean + shift / num_effective, counted / counted.sum(), atol=1e-5, rtol=0)
    assert shift.sum().abs() < 1e-9


def test_shift_does_not_depend_on_a_common_shift_or_on_how_often_a_class_is_drawn():
    logits, labels = drawn([8000, 2000, 400])
    shift = balancing_shift(logits, labels)
    torch.testing.assert_close(balancing_shift(logits + 7, labels), shift, atol=1e-6, rtol=0)
    twice = torch.cat([torch.arange(len(labels)), torch.nonzero(labels == 0).flatten()])
    # The head class hardly counts more than before: 16000/16005 instead of 8000/8005.
    torch.testing.assert_close(balancing_shift(logits[twice], labels[twice]), shift, atol=1e-3, rtol=0)


def test_no_class_is_favoured_in_the_answers_where_it_is_not_in_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(400)
    logits = 0.05 * torch.randn(len(labels), 10, generator=generator)
    logits[:, 3] = 0.8 * torch.randn(len(labels), generator=generator)  # often far above the others, often far below
    log_mean = logits.double().exp().mean(dim=0).log()
    assert favours_a_class(logits - log_mean, labels)  # though its mean probability is that of the others
    shift = balancing_shift(logits, labels)
    shift += least_lowering(logits + shift, labels)
    assert not favours_a_class(logits + shift, labels, times=2)


def times_answered(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many times as often as a class with many images each class is answered, one with n counting n / (n + 5)."""
    shares = 1 / (torch.bincount(labels)[labels].double() + 5)
    return torch.bincount(logits.argmax(dim=1), shares, minlength=logits.shape[1])


@pytest.mark.parametrize("seed", range(5))
def test_least_lowering(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(8), torch.tensor([100, 60, 40, 20, 10, 5, 2, 1]))
    logits = torch.randn(len(labels), 8, generator=generator).double()
    logits += 2 * torch.randn(8, generator=generator)
    shift = least_lowering(logits, labels)
    assert times_answered(logits, labels).max() > 1.25
    assert (shift <= 0).all()
    # The least: each class that was lowered is answered as often as it may be, but for less than one more image.
    times = times_answered(logits + shift, labels)
    assert times.max() < 1.25 + 1e-9
    assert (times[shift < 0] > 1.25 - 1 / 6).all()
    # Neither the order of the classes nor that of the images matters, nor what is common to all classes.
    classes, images = (torch.randperm(n, generator=generator) for n in (8, len(labels)))
    renamed = least_lowering(7 + logits[images][:, classes], torch.argsort(classes)[labels[images]])
    torch.testing.assert_close(renamed, shift[classes], atol=0.02, rtol=0)
    # Once is enough.
    assert (least_lowering(logits + shift, labels) == 0).all()


def test_least_lowering_by_hand():
    labels = torch.arange(4).repeat_interleave(15)  # each class counts 15 / (15 + 5)
    logits = torch.zeros(60, 4)
    logits[:, 0] = torch.arange(60) + 0.5  # how sure an image is of class 0
    logits[torch.arange(60), torch.arange(60) % 3 + 1] = 0.25  # the class that it would be of otherwise
    # Class 0 is answered 60 / 20 times; it may be 1.25 times, by 25 images: the 35 that are least sure of it go.
    expected = torch.tensor([0.25 - 35, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(least_lowering(logits, labels), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("noise", [0, 1e-6])  # with some, most go from class 0 to 1 and back together
def test_images_that_cannot_be_told_apart_are_left_alone(noise):
    logits = torch.tensor([[1.0, 0, -50, -50]] * 200) + noise * torch.randn(200, 4, generator=torch.Generator())
    assert least_lowering(logits, torch.arange(4).repeat(50)).tolist() == [0, 0, 0, 0]


def test_a_class_without_images_keeps_its_logit():
    logits, labels = drawn([50, 0, 20])
    shift = balancing_shift(logits, labels)
    assert shift[1] == 0
    assert shift.isfinite().all()


def test_a_model_that_knows_all_images_by_heart_is_left_alone():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    logits = 30 * nn.functional.one_hot(labels, 3).float()
    assert balancing_shift(logits, labels).abs().max() < 1e-6


def test_sample_has_all_images_of_rare_classes():
    labels = np.repeat([0, 1, 2], COUNTS)
    chosen = sample_for_bias(labels, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [100, 100, 20]
    assert (np.diff(chosen) > 0).all()
    assert not np.array_equal(chosen, sample_for_bias(labels, seed=1))


class Linear(nn.Module):
    """A classifier of points, with or without a bias."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.classifier = nn.Linear(2, 3, bias=bias)

    def forward(self, points: torch.Tensor) -> dict[str, torch.Tensor]:
        return type("Output", (dict,), {"logits": property(lambda self: self["logits"])})(
            logits=self.classifier(points)
        )


def trainer_for(tmp_path, student: nn.Module, teacher: nn.Module | None = None, **options) -> BKDTrainer:
    logits, labels = drawn(COUNTS)
    points = logits[:, :2] - logits.mean(dim=1, keepdim=True)
    examples = [{"points": p, "labels": y} for p, y in zip(points, labels.tolist(), strict=True)]
    args = BKDConfig(
        str(tmp_path), num_train_epochs=1, learning_rate=1e-3, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, **options,
    )  # fmt: skip
    return BKDTrainer(student, teacher, args, train_dataset=examples)


def test_bias_of_the_student_is_fitted_after_training(tmp_path):
    trainer = trainer_for(tmp_path, Linear(), method="ce", head_bias="balanced")
    trainer.train()
    plain = trainer_for(tmp_path, Linear(), method="ce")
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.head_bias_shift is not None
    logits = torch.cat([plain.model(points=e["points"][None])["logits"] for e in plain.train_dataset]).detach()
    labels = torch.tensor([e["labels"] for e in plain.train_dataset])
    chosen = torch.from_numpy(sample_for_bias(labels.numpy(), seed=42))
    learned = logits[chosen] - trainer.head_bias_shift
    shift = balancing_shift(learned, labels[chosen])
    shift += least_lowering(learned + shift, labels[chosen])
    torch.testing.assert_close(trainer.head_bias_shift, shift, atol=1e-4, rtol=0)
    assert shift.abs().max() > 0.01
    plain.train()
    assert plain.head_bias_shift is None


@pytest.mark.parametrize(
    ("options", "is_fitted"),
    [
        ({"method": "bkd-calibrated", "class_balance_power": 0.5}, True),
        ({"method": "bkd-calibrated", "class_balance_power": 1.0}, False),
        ({"method": "bkd-calibrated", "class_balance_power": 0.5, "head_bias": "learned"}, False),
        ({"method": "bkd", "class_balance_power": 0.5}, False),
        ({"method": "kd", "head_bias": "balanced"}, True),
    ],
)
def test_auto_fits_below_power_one(tmp_path, monkeypatch, options, is_fitted):
    monkeypatch.setattr("bkd_hf.head.TOO_OFTEN", 0.0)
    trainer = trainer_for(tmp_path, Linear(), Linear(), **options)
    trainer.train()
    assert (trainer.head_bias_shift is not None) == is_fitted


@pytest.mark.parametrize("favoured", [0.0, 50.0])
def test_auto_fits_only_where_a_class_is_favoured(tmp_path, favoured):
    logits, labels = drawn(COUNTS)
    assert favours_a_class(logits + torch.tensor([0.0, 0.0, favoured]), labels) == bool(favoured)
    students = [Linear(), Linear()]
    with torch.no_grad():
        for student in students:
            student.classifier.weight.copy_(1.5 * torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]]))
            student.classifier.bias.copy_(torch.tensor([0.0, 0.0, favoured]))
    trainer = trainer_for(tmp_path, *students, method="bkd-calibrated", class_balance_power=0.5)
    trainer.train()
    assert (trainer.head_bias_shift is not None) == bool(favoured)


def test_a_head_without_bias(tmp_path, caplog):
    with pytest.raises(InputError, match="--head_bias balanced: the head of Linear has no bias"):
        trainer_for(tmp_path, Linear(bias=False), method="ce", head_bias="balanced")
    trainer = trainer_for(tmp_path, Linear(bias=False), Linear(), method="bkd-calibrated", class_balance_power=0.5)
    trainer.train()
    assert trainer.head_bias_shift is None


def test_every_head_is_shifted():
    model = nn.ModuleDict({"cls_classifier": nn.Linear(2, 3), "distillation_classifier": nn.Linear(2, 3)})
    before = [bias.clone() for bias in head_biases(model)]
    shift_logits(model, torch.tensor([1.0, 0.0, -1.0]))
    assert len(before) == 2
    for old, new in zip(before, head_biases(model), strict=True):
        assert (new - old).round(decimals=6).tolist() == [1.0, 0.0, -1.0]


# ---- Class means at the start


class Examples(torch.utils.data.Dataset):
    def __init__(self, pixel_values: torch.Tensor, labels: list[int]):
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def with_class_means(
    model: nn.Module, data: Examples, folder: Path, resume: bool | None = None, **options: Any
) -> nn.Module:
    """The model, just after it has started, at a rate of 0."""
    args = BKDConfig(
        folder, method="ce", head_init="class_mean", max_steps=1, learning_rate=0.0, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    BKDTrainer(model, args=args, train_dataset=data).train(resume_from_checkpoint=resume)
    return model


class Bare(nn.Module):
    """A classifier whose features are its inputs."""

    def __init__(self, num_labels: int = 2):
        super().__init__()
        self.classifier = nn.Linear(2, num_labels)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(pixel_values))


def test_class_means_by_hand(tmp_path):
    features = torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 2.0]])  # lengths: 14/5 in the mean
    model = with_class_means(Bare(), Examples(features, [0, 0, 1, 1, 1]), tmp_path)
    torch.testing.assert_close(model.classifier.weight, 30 / 2.8 * torch.eye(2))
    torch.testing.assert_close(model.classifier.bias, torch.zeros(2))
    (tmp_path / "checkpoint-1").mkdir()  # killed while it was saved
    again = with_class_means(Bare(), Examples(features, [0, 0, 1, 1, 1]), tmp_path, resume=True)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    with pytest.raises(InputError, match="there is no training example of 2, so no mean"):
        with_class_means(Bare(num_labels=3), Examples(features, [0, 0, 1, 1, 1]), tmp_path)


@pytest.mark.parametrize("name", EVERY_BUT_TIMM)
def test_class_means_for_every_architecture(name, tmp_path):
    size = IMAGE_SIZES.get(name, 32)
    images = torch.randn(10, 3, size, size, generator=torch.Generator().manual_seed(0))
    # Frozen: the statistics of BatchNorm would change in the step.
    model = with_class_means(tiny(name, 0), Examples(images, [0, 1, 2, 3, 4] * 2), tmp_path, freeze_backbone=True)
    for layer in class_vectors(model):
        lengths = layer.weight.norm(dim=1)
        torch.testing.assert_close(lengths, lengths[:1].expand(5))
    model.eval()
    with torch.no_grad():
        logits = model(pixel_values=images).logits
    assert (
        torch.stack([logits[c::5].mean(dim=0) for c in range(5)]).diagonal().min() >= 0
    )  # some answer 0 with random weights
    assert logits.abs().max() < 60


def test_class_means_of_a_cosine_head(tmp_path):
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = load_classifier("cifar-resnet-8", list("abcde"), cosine_scale=16.0)
    with_class_means(model, Examples(images, [0, 1, 2, 3, 4] * 2), tmp_path, head="cosine", head_scale=16.0)
    with torch.no_grad():
        logits = model.eval()(pixel_values=images).logits
    assert (logits.argmax(dim=1) == torch.arange(10) % 5).float().mean() > 0.5


@pytest.mark.parametrize(("num_classes", "shares"), [(2, [0.7, 0.8]), (3, [0.6, 0.7]), (10, [0.25, 0.35])])
def test_a_class_of_few_is_favoured_halfway_to_being_the_only_one(num_classes, shares):
    labels = torch.arange(num_classes).repeat_interleave(100)
    for share, is_favoured in zip(shares, [False, True], strict=True):
        answers = labels.clone()
        answers[torch.arange(len(labels)) % 100 < 100 * (share * num_classes - 1) / (num_classes - 1)] = 0
        assert favours_a_class(torch.nn.functional.one_hot(answers, num_classes).float(), labels) is is_favoured


def test_class_means_are_those_of_a_model_that_is_made_anew(tmp_path):
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = Examples(images, [0, 1, 2, 3, 4] * 2)
    expected = with_class_means(tiny("ViT", 0), data, tmp_path, freeze_backbone=True)
    args = BKDConfig(
        str(tmp_path), method="ce", head_init="class_mean", freeze_backbone=True, learning_rate=1e-12, max_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = BKDTrainer(model_init=lambda: tiny("ViT", 0), args=args, train_dataset=data)
    trainer.train()
    torch.testing.assert_close(trainer.model.classifier.weight, expected.classifier.weight, rtol=1e-4, atol=1e-4)


def test_a_bias_is_not_fitted_to_labels_that_the_collator_makes(tmp_path):
    """But the training was done, and its student stays."""
    data = [(torch.ones(2) * label, label) for label in [0, 0, 1]]

    def collate(examples: list) -> dict[str, torch.Tensor]:
        pixels, labels = zip(*examples, strict=True)
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}

    args = BKDConfig(str(tmp_path), method="ce", head_bias="balanced", max_steps=1, use_cpu=True, disable_tqdm=True,
                     save_strategy="no")  # fmt: skip
    trainer = BKDTrainer(Bare(), args=args, data_collator=collate, train_dataset=data, class_counts=[2, 1])
    trainer.train()
    assert trainer.head_bias_shift is None
