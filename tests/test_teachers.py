"""Teachers made by others: different pixels, labels and heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTImageProcessorPil

from bkd_hf import (
    BKDTrainer,
    FrozenTeacher,
    ImageDataset,
    InputError,
    balanced_distillation_loss,
    class_balanced_weights,
    cross_entropy_loss,
    dkd_loss,
    load_classifier,
    load_image_dataset,
    load_processor,
    load_results,
    load_teacher,
)
from bkd_hf.arguments import parse_arguments
from bkd_hf.given_teacher import was_trained_on
from bkd_hf.head import head_modules
from bkd_hf.machine import default_precision
from bkd_hf.teacher import align_labels, beats_guessing
from bkd_hf.views import Rendering, same_pixels
from tests.architectures import tiny
from tests.test_cli import QUICK, RECIPE, refused, run, run_here  # noqa: F401 (a fixture)
from tests.test_images import photos, pixels_of
from tests.test_trainer import COUNTS, config, images, resnet, trainer_for, vit

DIGITS = [str(number) for number in range(10)]


# ---- Two preprocessings, one view


def processor(size: int = 16, **kwargs) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size}, **kwargs)


SHORTEST = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
PROCESSORS = {
    "ViT": {},
    "DeiT": {},
    "Beit": {"size": {"height": 32, "width": 32}},
    "ConvNext": {"size": {"shortest_edge": 32}},  # with its crop_pct
    "Bit": SHORTEST,
    "EfficientNet": {"size": {"height": 32, "width": 32}},  # normalises twice
    "MobileNetV2": SHORTEST,
    "MobileViT": SHORTEST,  # blue, green, red
    "Pvt": {"size": {"height": 32, "width": 32}},
    "Levit": SHORTEST,
    "Siglip": {"size": {"height": 32, "width": 32}},
    "CLIP": SHORTEST,
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_pixels_are_those_of_the_models_own_processor(name):
    own = getattr(transformers, f"{name}ImageProcessorPil")(**PROCESSORS[name])
    data = photos()
    expected = own(images=[image.convert("RGB") for image in data["image"]], return_tensors="pt")["pixel_values"]
    # The same bytes; the arithmetic that follows is measured on black and white, and rounded in another order.
    ours = pixels_of(ImageDataset(data, own), range(len(data)))
    torch.testing.assert_close(ours, expected.float(), rtol=0, atol=2e-6)
    # As the teacher of a student with the same geometry.
    pair = ImageDataset(data, processor(32), teacher_processor=processor(32, image_mean=[0.1] * 3))
    assert set(pair[0]) == {"pixel_values", "teacher_pixel_values", "labels"}


def coordinates(size: int = 96) -> Image.Image:
    """Red is the column, green the row."""
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.linspace(40, 255, size)
    pixels[:, :, 1] = np.linspace(40, 255, size)[:, None]
    return Image.fromarray(pixels)


def pattern_dataset(student, teacher, augmentation: str, **kwargs) -> ImageDataset:
    import datasets

    from tests.test_images import stored

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": [stored(coordinates())] * 24, "label": [0, 1] * 12}, features=features)
    return ImageDataset(data, student, augmentation, teacher_processor=teacher, **kwargs)


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize(
    "teacher",
    [
        processor(64, image_mean=[0.3, 0.4, 0.5], image_std=[0.2, 0.3, 0.4]),
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48}),
    ],
    ids=["other size and numbers", "other crop"],
)
def test_student_and_teacher_see_the_same_part_of_the_image(augmentation, cache, teacher):
    student = processor(32, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    dataset = pattern_dataset(student, teacher, augmentation, cache_images=cache)
    examples = dataset.__getitems__(list(range(24)))
    seen = []
    for name, own in (("pixel_values", student), ("teacher_pixel_values", teacher)):
        pixels = torch.stack([example[name] for example in examples])
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (own.image_mean, own.image_std))
        original = (pixels * std + mean) * 255
        # Both at the same, coarse, size: content can be compared.
        seen.append(torch.nn.functional.adaptive_avg_pool2d(original, 8)[:, :2, 1:-1, 1:-1])
    student_view, teacher_view = seen
    inside = (student_view > 35) & (teacher_view > 35)  # not the padding
    assert inside.float().mean() > 0.7
    # 215 levels over 96 pixels: within half a pixel of the student's 32.
    assert (student_view - teacher_view)[inside].abs().max() < 4.0
    if augmentation != "none":  # views differ: the comparison would notice another crop or flip
        assert (student_view - teacher_view.roll(1, dims=0))[inside].abs().max() > 20


def test_nothing_is_rendered_twice_where_the_processors_agree():
    first, second = load_processor("cifar-resnet-8"), load_processor("cifar-resnet-8")
    assert same_pixels(first, second)
    dataset = ImageDataset(load_image_dataset("digits")["eval"], first, teacher_processor=second)
    assert set(dataset[0]) == {"pixel_values", "labels"}
    assert not same_pixels(first, processor(32, resample=3))
    assert not same_pixels(first, processor(32, image_mean=[0.5, 0.5, 0.6]))
    assert not same_pixels(first, processor(33))


def test_region_is_the_part_that_the_processor_keeps():
    centre = Rendering(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 16, "width": 16})
    )
    assert centre.region(96, 96) == pytest.approx((24, 24, 72, 72), abs=0.5)
    assert Rendering(processor(32)).region(90, 50) == pytest.approx((0, 0, 90, 50), abs=0.3)
    assert Rendering(processor(32)).region(1, 1) == (0, 0, 1, 1)


def test_parts_are_interpolated_as_the_processor_does():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 255, 255))
    shades = {
        resample: set(Rendering(processor(8, resample=resample)).part(image, (0, 0, 2, 1)).flatten().tolist())
        for resample in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR)
    }
    assert shades[Image.Resampling.NEAREST] == {0, 255}
    assert len(shades[Image.Resampling.BILINEAR]) > 2


def test_own_transform_cannot_make_pixels_for_another_teacher():
    with pytest.raises(InputError, match="train_transform makes the student's pixels alone"):
        ImageDataset(photos(), processor(), train_transform=lambda image: image, teacher_processor=processor(32))


# ---- Labels by name


def test_labels_are_aligned_by_name():
    assert align_labels(["cat", "dog", "owl"], ["owl", "cat", "dog"]) == [2, 0, 1]  # permuted
    assert align_labels(["ant", "Aquarium Fish", "x"], ["aquarium_fish", "ant"]) == [
        1,
        0,
    ]  # superset, written otherwise
    assert align_labels(["cat"], ["cat", "dog"]) == [0, None]
    assert align_labels(["Cat", "cat"], ["cat"]) == [1]  # exact before similar
    assert align_labels(["e", "e\u0301"], ["\u00e9", "e"]) == [1, 0]  # an accent is a character of its own, or not
    assert align_labels(["x", "y"], ["\u00e9"], {"e\u0301": "y"}) == [1]
    assert align_labels(["n01", "n02"], ["cat", "dog"], {"cat": "n02", "dog": 0}) == [1, 0]


@pytest.mark.parametrize(
    ("teacher", "classes", "label_map", "message"),
    [
        (["crane", "crane"], ["crane"], None, "2 outputs called 'crane' .numbers 0, 1."),
        (["a"], ["b"], {"c": "a"}, "the data has no class 'c'"),
        (["a"], ["b"], {"b": "z"}, "the teacher has no output 'z' .for 'b'."),
        (["a"], ["b"], {"b": 7}, "the teacher has no output 7"),
        (["a", "b"], ["a", "b"], {"a": "b"}, "would stand for both 'a' and 'b'"),
    ],
)
def test_bad_alignments(teacher, classes, label_map, message):
    with pytest.raises(InputError, match=message):
        align_labels(teacher, classes, label_map)


def test_ten_thousand_classes_are_aligned_quickly():
    names = [f"class {number}" for number in range(21_000)]
    assert align_labels(names, names[10_000:0:-1]) == list(range(10_000, 0, -1))


def test_aligned_teacher_answers_in_the_order_of_the_data():
    model = resnet(1).eval()
    pixels = torch.randn(4, 3, 8, 8)
    plain = FrozenTeacher(model)(pixel_values=pixels)
    aligned = FrozenTeacher(model, [3, None, 0])
    answers = aligned(pixel_values=pixels)
    assert torch.equal(answers[:, [0, 2]], plain[:, [3, 0]])
    assert (answers[:, 1] == float("-inf")).all()
    assert aligned.known_classes.tolist() == [0, 2]
    assert aligned.num_classes == 3
    assert FrozenTeacher(model, range(5)).known_classes is None


@pytest.mark.parametrize("method", ["bkd", "dkd"])
def test_loss_with_a_partial_teacher_is_that_over_the_classes_it_knows(tmp_path, method):
    columns = [4, None, 0, 1, None]
    known = [0, 2, 3]
    student, teacher = resnet(1).train(), resnet(2).eval()
    pixels = torch.stack([example["pixel_values"] for example in images()])
    labels = torch.tensor([example["labels"] for example in images()])
    with torch.no_grad():
        z_s, z_t = student(pixels).logits, teacher(pixels).logits[:, [4, 0, 1]]
    taught = torch.isin(labels, torch.tensor(known))
    places = torch.tensor([known.index(int(label)) for label in labels[taught]])
    if method == "bkd":
        weights = class_balanced_weights(COUNTS)[known]
        distilled = balanced_distillation_loss(z_s[taught][:, known], z_t[taught], weights, reduction="sum")
    else:
        distilled = dkd_loss(z_s[taught][:, known], z_t[taught], places, reduction="sum") / 20  # first epoch of 20
    expected = cross_entropy_loss(z_s, labels) + distilled / len(labels)
    trainer = BKDTrainer(
        model=resnet(1),
        teacher_model=FrozenTeacher(resnet(2), columns),
        args=config(tmp_path, method=method, per_device_train_batch_size=40, max_steps=1),
        train_dataset=images(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


# ---- The script


def changed(folder: Path, target: Path, order: list[int] | None = None, names: list[str] | None = None) -> Path:
    """A copy of a teacher with its outputs in another order (by rows of its head), or under other names."""
    shutil.copytree(folder, target)
    model = load_teacher(str(folder)).model
    head = model.classifier
    if order is not None:
        weight, bias = head.weight.detach()[order], head.bias.detach()[order]
        head = torch.nn.Linear(weight.shape[1], len(order))
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        model.classifier = head
    names = [str(number) for number in order or range(10)] if names is None else names
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.save_pretrained(target)
    return target


def options_for(tmp_path: Path, teacher: Path) -> list[str]:
    return [*QUICK, "--output_dir", str(tmp_path / "run"), "--teacher_model_name_or_path", str(teacher)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run, whose teacher is given to others."""
    folder = tmp_path_factory.mktemp("teachers") / "run"
    run(*QUICK, "--output_dir", str(folder))
    return folder


def test_what_a_teacher_was_trained_on():
    """The hash of a stream is never that of the same images at hand: their class counts decide."""

    def data(fingerprint: str | None, *counts: int) -> dict:
        return {"fingerprint": fingerprint, "class_names": ["a", "b"], "class_counts": list(counts)}

    def origin(streaming: bool = False, **kwargs) -> dict:
        return {"data": {**data("1", 9, 3), **kwargs}, "options": {"data": {"streaming": streaming}}}

    here, elsewhere = data("1", 9, 3), data("2-sampled", 9, 3)
    assert was_trained_on(here, False, origin()) is True
    assert was_trained_on(elsewhere, False, origin()) is False
    assert was_trained_on(elsewhere, True, origin()) is was_trained_on(elsewhere, False, origin(True)) is True
    assert was_trained_on(elsewhere, True, origin(class_names=["b", "a"], class_counts=[3, 9])) is True
    assert was_trained_on(elsewhere, True, origin(class_counts=[3, 9])) is False
    assert was_trained_on(elsewhere, True, {}) is was_trained_on(here, False, origin(fingerprint=None)) is None


@pytest.mark.slow
def test_permuted_and_larger_heads_answer_the_same(finished, tmp_path, run_here):  # noqa: F811
    teacher = finished / "teacher"
    expected = load_results(finished)["teacher"]["metrics"]
    order = [7, 3, 9, 1, 0, 2, 8, 6, 4, 5]
    for number, rows in enumerate((order, [*order, 0, 1])):
        names = [*map(str, order), *(["ten", "eleven"] if len(rows) > 10 else [])]
        other = changed(teacher, tmp_path / f"teacher{number}", rows, names)
        output = run_here(*options_for(tmp_path / str(number), other), "--num_train_epochs", "1")
        assert "The teacher's outputs are put into the order of the data, by name" in output
        metrics = load_results(tmp_path / str(number) / "run")["teacher"]["metrics"]
        assert metrics["per_class_accuracy"] == expected["per_class_accuracy"]


@pytest.mark.slow
def test_teacher_that_lacks_classes(finished, tmp_path, run_here):  # noqa: F811
    names = ["0", "1", "2", "drei", "4", "5", "6", "7", "8", "neun"]
    teacher = changed(finished / "teacher", tmp_path / "teacher", names=names)
    message = refused(*options_for(tmp_path, teacher))
    assert "has no output for 2 of 10 classes: '3', '9'." in message
    assert "--allow_partial_teacher" in message
    (tmp_path / "map.json").write_text(json.dumps({"3": "drei", "9": 9}))
    output = run_here(*options_for(tmp_path, teacher), "--teacher_label_map", str(tmp_path / "map.json"))
    assert "no output for" not in output
    expected = load_results(finished)["teacher"]["metrics"]["per_class_accuracy"]
    assert load_results(tmp_path / "run")["teacher"]["metrics"]["per_class_accuracy"] == expected

    output = run_here(*options_for(tmp_path / "partial", teacher), "--allow_partial_teacher")
    assert "WARNING: --teacher_model_name_or_path" in output
    assert "These classes are learned from the labels alone." in output
    accuracies = load_results(tmp_path / "partial" / "run")["teacher"]["metrics"]["per_class_accuracy"]
    assert accuracies[3] == accuracies[9] == 0.0
    (tmp_path / "map.json").write_text("{")
    message = refused(*options_for(tmp_path / "other", teacher), "--teacher_label_map", str(tmp_path / "map.json"))
    assert "is no JSON" in message


@pytest.mark.slow
def test_teacher_without_names(finished, tmp_path, run_here):  # noqa: F811
    teacher = changed(finished / "teacher", tmp_path / "teacher", names=[f"LABEL_{n}" for n in range(10)])
    message = refused(*options_for(tmp_path, teacher))
    assert "does not name its 10 classes" in message
    assert "--assume_label_order" in message
    run_here(*options_for(tmp_path, teacher), "--assume_label_order", "--num_train_epochs", "1")


@pytest.mark.slow
def test_teacher_that_guesses_is_refused(finished, tmp_path, run_here):  # noqa: F811
    # The right names, the wrong rows: what alignment by name cannot see.
    teacher = changed(finished / "teacher", tmp_path / "teacher", [5, 6, 7, 8, 9, 0, 1, 2, 3, 4], DIGITS)
    message = refused(*options_for(tmp_path, teacher))
    assert "% of the evaluation examples (mean over classes), where guessing gives 10.0 %" in message
    assert "--force_teacher" in message
    output = run_here(*options_for(tmp_path, teacher), "--force_teacher", "--num_train_epochs", "1")
    assert "it is used all the same (--force_teacher)" in output


@pytest.mark.parametrize(
    ("accuracies", "num_images", "expected"),
    [
        ([1.0, 1.0], [2, 2], True),  # as good as it can be shown
        ([1.0, 1.0], [1, 1], True),
        ([1.0, 0.75], [4, 4], True),
        ([0.5, 0.5], [2, 2], None),  # a good one may have had bad luck
        ([0.8, 0.6], [20, 20], None),
        ([0.5, 0.5], [40, 40], False),
        ([1.0, 0.0], [100, 10], False),  # says the same of all
        ([0.6, 0.6], [500, 500], True),
        ([0.11] * 10, [1000] * 10, False),
        ([0.2] * 10, [1000] * 10, True),
        ([0.004] * 1000, [50] * 1000, False),  # by far no chance, but of no use
        ([0.4, 0.4, 0.4], [1000, 1000, 1], None),  # one image of a class says little about it
        ([1.0], [10], True),
    ],
)
def test_what_beats_guessing(accuracies, num_images, expected):
    assert beats_guessing(accuracies, num_images) is expected


@pytest.mark.slow
def test_teacher_with_other_pixels_is_rendered_for_itself(finished, tmp_path, run_here):  # noqa: F811
    teacher = finished / "teacher"
    other = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    own = json.loads((teacher / "preprocessor_config.json").read_text())
    student_settings = ["--image_size", "24"]
    output = run_here(*options_for(tmp_path, other), *student_settings, "--num_train_epochs", "1")
    assert "The teacher takes other pixels than the student" in output
    assert own["size"] == {"height": 16, "width": 16}
    results = load_results(tmp_path / "run")
    assert results["teacher"]["metrics"] == load_results(finished)["teacher"]["metrics"]


@pytest.mark.slow
def test_teacher_for_other_classes_is_fine_tuned_first(tmp_path, run_here):  # noqa: F811
    load_classifier("cifar-resnet-8", ["cat", "dog"], image_size=16).save_pretrained(tmp_path / "pets")
    load_processor("cifar-resnet-8", image_size=16, image_mean=[0.2] * 3).save_pretrained(tmp_path / "pets")
    output = run_here(*options_for(tmp_path, tmp_path / "pets"), "--teacher_num_train_epochs", "3")
    assert "is fine-tuned on the data first: its head is for other classes ('cat', 'dog')." in output
    assert "learned from scratch: classifier.bias, classifier.weight; all else starts from its weights" in output
    assert "no effect" not in output
    results = load_results(tmp_path / "run")
    assert results["teacher"]["training"]["epochs"] == 3
    assert load_teacher(str(tmp_path / "run" / "teacher")).model.config.id2label == dict(enumerate(DIGITS))
    # Its own pixels, not the student's.
    saved = json.loads((tmp_path / "run" / "teacher" / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == [0.2] * 3


# ---- Fine-tuning


def test_head_for_other_classes_is_renewed_and_all_else_kept(tmp_path):
    original = load_classifier("cifar-resnet-8", ["a", "b", "c"], image_size=8)
    original.save_pretrained(tmp_path)
    for names in (["a", "b"], ["x", "y", "z"], ["c", "b", "a"]):
        model = load_classifier(str(tmp_path), names)
        assert model.new_parameters == ["classifier.bias", "classifier.weight"]
        assert model.config.id2label == dict(enumerate(names))
        assert torch.equal(model.conv.weight, original.conv.weight)
        assert model.classifier.weight.shape[0] != 3 or not torch.equal(
            model.classifier.weight, original.classifier.weight
        )
    same = load_classifier(str(tmp_path), ["a", "b", "c"])
    assert same.new_parameters == []
    assert torch.equal(same.classifier.weight, original.classifier.weight)


@pytest.mark.parametrize("make", [vit, resnet])
def test_frozen_backbone_keeps_its_weights_and_statistics(tmp_path, make):
    trainer = trainer_for(tmp_path, make(1), teacher=None, freeze_backbone=True, weight_decay=0.1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_backbone_of_a_student_that_is_made_when_training_begins_is_frozen_too(tmp_path):
    trainer = BKDTrainer(
        args=config(tmp_path, method="ce", freeze_backbone=True), train_dataset=images(), model_init=lambda: resnet(1)
    )
    trainer.train()
    changed = [
        name
        for name, value in trainer.model.state_dict().items()
        if not torch.equal(value, resnet(1).state_dict()[name])
    ]
    assert changed == ["classifier.weight", "classifier.bias"]


def test_head_has_its_own_learning_rate(tmp_path):
    trainer = trainer_for(
        tmp_path, teacher=None, learning_rate=0.0, head_learning_rate=0.05, lr_scheduler_type="constant"
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(before[name], value)}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before)


def test_heads_are_found():
    assert list(head_modules(vit())) == ["classifier"]
    nameless = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 5))
    nameless.config = type("Config", (), {"num_labels": 5})
    assert list(head_modules(nameless)) == ["1"]


def test_fresh_backbone_cannot_be_frozen(tmp_path):
    message = refused(*QUICK, "--output_dir", str(tmp_path / "run"), "--freeze_backbone")
    assert "starts from fresh weights" in message


@pytest.mark.slow
def test_recipe_for_foundation_models_runs_with_random_weights(tmp_path, run_here):  # noqa: F811
    for name, folder in (("DINOv2", "teacher"), ("ResNet", "student")):
        tiny(name, seed=0).save_pretrained(tmp_path / folder)
        processor(32).save_pretrained(tmp_path / folder)
    output = run_here(
        "--config", str(RECIPE.with_name("foundation.yaml")), "--dataset_name", "digits", "--max_train_samples", "150",
        "--model_name_or_path", str(tmp_path / "student"), "--teacher_model_name_or_path", str(tmp_path / "teacher"),
        "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1", "--teacher_num_train_epochs", "1",
        "--num_threads", "1", "--dataloader_num_workers", "0", "--disable_tqdm", "true",
        "--force_distillation", "true",
    )  # fmt: skip
    assert "--adapter lora trains" in output
    results, of_teacher = load_results(tmp_path / "run"), load_results(tmp_path / "run" / "teacher")
    assert results["options"]["training"]["distillation_prior"] == "teacher"
    told = of_teacher["options"]["training"]
    assert (told["adapter"], told["head"], told["head_init"]) == ("lora", "cosine", "class_mean")
    again = load_teacher(str(tmp_path / "run" / "teacher"))  # as any other model: without peft
    assert not [name for name, _ in again.named_parameters() if "lora" in name]


@pytest.mark.slow
def test_recipe_for_pretrained_models_runs_with_random_weights(tmp_path, run_here):  # noqa: F811
    recipe = RECIPE.with_name("finetune.yaml")
    told = parse_arguments(["--config", str(recipe), "--dataset_name", "user/birds"])
    assert told.model.teacher_model_name_or_path == "google/vit-base-patch16-224-in21k"
    assert (told.training.learning_rate, told.for_teacher().training.learning_rate) == (1e-4, 3e-5)
    for name, folder in (("ViT", "teacher"), ("ResNet", "student")):
        tiny(name, seed=0).save_pretrained(tmp_path / folder)
        processor(32).save_pretrained(tmp_path / folder)
    output = run_here(
        "--config", str(recipe), "--dataset_name", "digits", "--max_train_samples", "150", "--num_threads", "1",
        "--model_name_or_path", str(tmp_path / "student"), "--dataloader_num_workers", "0", "--disable_tqdm", "true",
        "--teacher_model_name_or_path", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "run"),
        "--num_train_epochs", "2", "--teacher_num_train_epochs", "1",
        "--finetune_teacher", "true", "--allow_partial_teacher", "true",
        "--teacher_classification_loss", "balanced_softmax", "--force_distillation", "true",
    )  # fmt: skip
    assert "is fine-tuned on the data first: --finetune_teacher." in output
    assert "--allow_partial_teacher has no effect: --finetune_teacher gives the teacher a head" in output
    assert output.count("learned from scratch: classifier") == 2
    results = load_results(tmp_path / "run")
    assert results["hardware"]["precision"] == default_precision(use_cpu=True)
    assert results["teacher"]["training"]["epochs"] == 1
    assert results["options"]["training"]["distillation_prior"] == "teacher"  # it has balanced answers already
