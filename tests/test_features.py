"""Features of a frozen backbone are computed once, and the head learns the same from them as from the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bkd_hf import (
    BKDConfig,
    BKDTrainer,
    ImageDataset,
    InputError,
    load_classifier,
    load_image_dataset,
    load_processor,
)
from bkd_hf.arguments import parse_arguments
from bkd_hf.features import answer_features
from bkd_hf.rehearsal import check_before_work
from bkd_hf.run import run
from tests.architectures import EVERY_BUT_TIMM, IMAGE_SIZES, tiny
from tests.test_head import Examples
from tests.tiny_models import tiny_deit_with_two_heads

LABELS = [0, 1, 2, 3, 4] * 4


class Watched(Examples):
    """Counts how often an image is read."""

    reads = 0

    def describe_views(self) -> dict[str, Any]:
        return {"sum": self.pixel_values.sum().item()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        return super().__getitem__(index)


def examples(size: int = 32) -> Watched:
    return Watched(torch.randn(len(LABELS), 3, size, size, generator=torch.Generator().manual_seed(0)), LABELS)


def config(folder: Path, **options: Any) -> BKDConfig:
    values = {
        "method": "balanced-softmax", "freeze_backbone": True, "num_train_epochs": 3, "learning_rate": 0.1,
        "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "feature_cache": str(folder / "features"),
    }  # fmt: skip
    return BKDConfig(folder, **(values | options))


def train(name: str, data: Any, folder: Path, checkpoint: str | None = None, **options: Any) -> BKDTrainer:
    trainer = BKDTrainer(tiny(name, seed=0), args=config(folder, **options), train_dataset=data)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def head_of(trainer: BKDTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", EVERY_BUT_TIMM)
def test_the_same_head_for_every_architecture(name, tmp_path):
    data = examples(IMAGE_SIZES.get(name, 32))
    expected = head_of(train(name, data, tmp_path, feature_cache="off"))
    data.reads = 0
    found = head_of(train(name, data, tmp_path))
    assert data.reads == 24 + 1  # three batches of 8; one image to find out how many features there are
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    data.reads = 0
    assert torch.equal(head_of(train(name, data, tmp_path)), found)
    assert data.reads == 1


def augmented() -> ImageDataset:
    digits = load_image_dataset("digits")["eval"].select(range(40))
    return ImageDataset(digits, load_processor("cifar-resnet-8", 32), augmentation="pad_crop")


def resnets() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [load_classifier("cifar-resnet-8", [str(digit) for digit in range(10)]) for _ in range(2)]


def test_with_a_teacher_and_views(tmp_path):
    found = []
    for cache in ({}, {"teacher_cache": str(tmp_path / "logits"), "feature_cache": str(tmp_path / "features")}):
        student, teacher = resnets()
        args = config(tmp_path, method="bkd", teacher_cache_views=2, **{"feature_cache": "off"} | cache)
        trainer = BKDTrainer(student, teacher, args, train_dataset=augmented())
        trainer.train()
        found.append(head_of(trainer))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-4)  # logits are kept in float16
    assert len(list((tmp_path / "features").rglob("view*.bin"))) == 2


def test_an_interrupted_training_goes_on_with_the_same_features(tmp_path):
    data, options = examples(), {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 6}
    whole = train("ViT", data, tmp_path, **options)
    data.reads = 0
    resumed = train("ViT", data, tmp_path, checkpoint=str(tmp_path / "checkpoint-6"), **options)
    assert data.reads == 1
    assert torch.equal(head_of(resumed), head_of(whole))


def test_saved_as_any_other_model(tmp_path):
    trainer = train("ResNet", examples(), tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    again = type(trainer.model).from_pretrained(tmp_path / "saved").eval()
    pixels = examples().pixel_values
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, trainer.model.eval()(pixels).logits)


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="answers of DeiTForImageClassificationWithTeacher are not those of one head"):
        answer_features(tiny_deit_with_two_heads(5, 32))
    with pytest.raises(InputError, match="--feature_cache must be off without --freeze_backbone"):
        config(tmp_path, freeze_backbone=False)
    with pytest.raises(InputError, match="--feature_cache: the training images are augmented"):
        BKDTrainer(resnets()[0], args=config(tmp_path), train_dataset=augmented()).train()
    with pytest.raises(InputError, match="--feature_cache needs --teacher_cache with a teacher"):
        check_before_work(
            parse_arguments(
                ["--dataset_name", "digits", "--model_name_or_path", str(tmp_path), "--freeze_backbone", "true",
                 "--feature_cache", "auto", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
            )
        )  # fmt: skip


def test_augmented_images_are_refused_before_a_teacher_is_trained(tmp_path):
    tiny("ResNet", seed=0).save_pretrained(tmp_path / "student")
    load_processor("cifar-resnet-8", 32).save_pretrained(tmp_path / "student")
    arguments = parse_arguments(
        ["--dataset_name", "digits", "--model_name_or_path", str(tmp_path / "student"), "--freeze_backbone", "true",
         "--feature_cache", "auto", "--teacher_cache", "auto", "--output_dir", str(tmp_path / "run"),
         "--teacher_freeze_backbone", "false", "--teacher_feature_cache", "off", "--use_cpu", "true"]
    )  # fmt: skip
    with pytest.raises(InputError, match="--feature_cache: the training images are augmented"):
        run(arguments)
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "teacher").exists()
