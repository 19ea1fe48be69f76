from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, TrainerCallback, TrainerState
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import HPSearchBackend

from bkd_hf import (
    BKDConfig,
    BKDTrainer,
    FrozenTeacher,
    InputError,
    LongTailEvaluation,
    TeacherLogitsError,
    TrainingDivergedError,
    align_labels,
    bkd_loss,
    class_balanced_weights,
    load_classifier,
    load_teacher,
    long_tail_metrics,
)
from bkd_hf.measure import measure
from bkd_hf.progress import TellOfTime
from bkd_hf.results import effective_batch_size
from tests.tiny_models import tiny_vit

COUNTS = [20, 10, 5, 3, 2]
NAMES = [str(n) for n in range(5)]


def images(number: int = 40, size: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(5), COUNTS)[:number]
    pixels = torch.randn(number, 3, size, size, generator=generator)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return load_classifier("cifar-resnet-8", NAMES, image_size=8)


def vit(seed: int = 0) -> nn.Module:
    return tiny_vit(seed, num_labels=5)


def config(tmp_path: Path, **kwargs) -> BKDConfig:
    defaults = {
        "per_device_train_batch_size": 20,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return BKDConfig(output_dir=str(tmp_path / "out"), **{**defaults, **kwargs})


def trainer_for(tmp_path: Path, model=None, teacher="resnet", data=None, **kwargs) -> BKDTrainer:
    init = {name: kwargs.pop(name) for name in ("callbacks", "compute_metrics", "class_counts") if name in kwargs}
    data = images() if data is None else data
    return BKDTrainer(
        model=resnet(1) if model is None else model,
        teacher_model=resnet(2) if teacher == "resnet" else teacher,
        args=config(tmp_path, **kwargs),
        train_dataset=data,
        eval_dataset=data,
        **init,
    )


class Linear(nn.Module):
    """A classifier of vectors called "features"."""

    def __init__(self, inputs: int, bias_for_class_0: float = 0.0):
        super().__init__()
        torch.manual_seed(inputs)
        self.linear = nn.Linear(inputs, 5)
        self.seen: list[torch.Size] = []
        with torch.no_grad():
            self.linear.bias[0] += bias_for_class_0

    def forward(self, features: torch.Tensor) -> ImageClassifierOutput:
        self.seen.append(features.shape)
        return ImageClassifierOutput(logits=self.linear(features))


# ---- The loss


def test_logged_loss_is_the_formula(tmp_path):
    student, teacher = resnet(1), resnet(2)
    # One step over all examples, with BatchNorm in training mode as in the trainer.
    student.train()
    teacher.eval()
    batch = torch.stack([example["pixel_values"] for example in images()])
    labels = torch.tensor([example["labels"] for example in images()])
    arguments = (student(batch).logits, teacher(batch).logits, labels, class_balanced_weights(COUNTS, 0.99))
    expected = bkd_loss(*arguments, temperature=3.0, alpha=0.5).item()
    plain = nn.functional.cross_entropy(arguments[0], labels).item()

    trainer = trainer_for(
        tmp_path,
        per_device_train_batch_size=40,
        max_steps=1,
        temperature=3.0,
        distillation_weight=0.5,
        class_balance_beta=0.99,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected, rel=1e-5)
    assert log["ce_loss"] == pytest.approx(plain, rel=1e-5)
    assert log["kd_loss"] == pytest.approx((expected - plain) / 0.5, rel=1e-4)


def test_inputs_with_the_teachers_prefix_go_to_the_teacher(tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "features": torch.randn(4, generator=generator),
            "teacher_features": torch.randn(7, generator=generator),
            "labels": i % 5,
        }
        for i in range(20)
    ]
    student, teacher = Linear(4), Linear(7)
    trainer = trainer_for(tmp_path, student, teacher, data)
    trainer.train()
    assert set(student.seen) == {torch.Size([20, 4])}
    assert set(teacher.seen) == {torch.Size([20, 7])}
    trainer.evaluate()
    assert len(teacher.seen) == 2  # two epochs of one step; none for the evaluation

    both = [{name: value for name, value in example.items() if name != "teacher_features"} for example in data]
    student, teacher = Linear(4), Linear(4)
    trainer_for(tmp_path, student, teacher, both).train()
    assert set(teacher.seen) == {torch.Size([20, 4])}


def test_without_a_teacher_it_is_cross_entropy_on_the_same_path(tmp_path):
    alone, ignoring = (
        trainer_for(tmp_path, resnet(1), teacher, distillation_weight=weight)
        for teacher, weight in ((None, 1.0), ("resnet", 0.0))
    )
    for trainer in (alone, ignoring):
        trainer.train()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, ignoring.model.state_dict()[name])
    assert "kd_loss" not in alone.state.log_history[0]


def test_label_smoothing_is_honoured(tmp_path):
    trainer = trainer_for(tmp_path, teacher=None, label_smoothing_factor=0.1)
    logits = torch.from_numpy(trainer.predict(images()).predictions)
    labels = torch.tensor([example["labels"] for example in images()])
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_plain_module_learns_smoothed_labels(tmp_path):
    data = [{"features": torch.ones(3), "labels": label} for label in [0, 1, 2, 3, 4] * 4]
    trainer = trainer_for(tmp_path, Linear(3), teacher=None, data=data, label_smoothing_factor=0.5)
    loss = trainer.compute_loss(trainer.model.train(), {"features": torch.ones(2, 3), "labels": torch.tensor([0, 1])})
    logits = trainer.model(torch.ones(2, 3)).logits
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 1]), label_smoothing=0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert trainer.args.label_smoothing_factor == 0.5
    trainer.train()


def test_each_trainer_computes_in_its_own_precision(tmp_path):
    """Also with the models of an earlier one."""
    pixels = torch.stack([example["pixel_values"] for example in images()])
    student, teacher = resnet(1), FrozenTeacher(resnet(2))
    trainer_for(tmp_path, student, teacher, bf16=True, max_steps=1, num_train_epochs=1).train()
    expected = teacher.model(pixels).logits
    later = trainer_for(tmp_path, student, teacher, max_steps=1)
    assert torch.equal(later.teacher_model(pixel_values=pixels), expected)
    found = torch.from_numpy(later.predict(images()).predictions)
    with torch.no_grad():
        assert torch.allclose(found, type(student).forward(student.eval(), pixels).logits, atol=1e-5)
    assert not torch.equal(
        torch.from_numpy(trainer_for(tmp_path, student, None, method="ce", bf16=True).predict(images()).predictions),
        found,
    )


def test_a_forward_of_ones_own_outlives_the_precision_of_a_trainer(tmp_path):
    student, calls = resnet(1), []
    of_class = student.forward

    @functools.wraps(of_class)
    def forward(*args, **kwargs):
        calls.append(1)
        return of_class(*args, **kwargs)

    student.forward = forward
    trainer = trainer_for(tmp_path, student, None, method="ce", bf16=True, max_steps=1)
    trainer.evaluate()
    trainer.train()
    calls.clear()
    trainer_for(tmp_path, student, None, method="ce").evaluate()
    assert calls


def test_a_student_without_anything_to_train_is_refused(tmp_path):
    was_teacher = FrozenTeacher(resnet(1)).model
    with pytest.raises(InputError, match=r"All weights of the student are frozen.* pass a copy"):
        trainer_for(tmp_path, was_teacher).train()
    trainer_for(tmp_path, was_teacher).evaluate()
    trainer_for(tmp_path, was_teacher.requires_grad_(True), max_steps=1).train()


def test_evaluation_is_plain_cross_entropy_with_long_tail_metrics(tmp_path):
    trainer = trainer_for(tmp_path, per_device_eval_batch_size=16)  # 40 = 16 + 16 + 8
    metrics = trainer.evaluate()
    predictions = trainer.predict(images())
    expected = nn.functional.cross_entropy(
        torch.from_numpy(predictions.predictions), torch.from_numpy(predictions.label_ids)
    )
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert {"eval_accuracy", "eval_medium_shot_accuracy", "eval_few_shot_accuracy"} < set(metrics)
    mine = trainer_for(tmp_path, compute_metrics=lambda prediction: {"mine": 1.0}).evaluate()
    assert mine["eval_mine"] == 1.0
    assert "eval_accuracy" not in mine
    assert trainer.predict(images()).predictions.shape == (40, 5)


@pytest.mark.parametrize("option", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}])
def test_metrics_are_those_of_all_logits_whatever_is_collected(tmp_path, option):
    for compute_metrics in (None, LongTailEvaluation(COUNTS)):
        trainer = trainer_for(tmp_path, compute_metrics=compute_metrics, per_device_eval_batch_size=16, **option)
        prediction = trainer.predict(images(), metric_key_prefix="eval")
        logits, labels = prediction.predictions, np.array([example["labels"] for example in images()])
        logits = np.concatenate(logits) if isinstance(logits, list) else logits
        expected = long_tail_metrics(logits, labels, COUNTS)
        loss = nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        for metrics in (prediction.metrics, trainer.evaluate()):
            assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-6)
            for name, value in expected.items():
                assert name == "per_class_accuracy" or metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-12), name

    def mine(prediction, compute_result: bool = True) -> dict[str, float]:
        return {"mine": 1.0}

    assert trainer_for(tmp_path, compute_metrics=mine, **option).evaluate()["eval_mine"] == 1.0


@pytest.mark.parametrize("start", [None, 1, 0.5])
def test_weights_in_force_are_deferred(tmp_path, start):
    class Note(TrainerCallback):
        weights: list = []  # noqa: RUF012

        def on_step_begin(self, args, state, control, **kwargs):
            Note.weights.append(trainer.class_weights.clone())

    Note.weights = []
    trainer = trainer_for(tmp_path, callbacks=[Note()], deferred_reweighting_start=start)
    trainer.train()
    balanced = class_balanced_weights(COUNTS).float()
    uniform = torch.ones(5)
    expected = [balanced] * 4 if start is None else [uniform, uniform, balanced, balanced]
    assert all(torch.equal(a, b) for a, b in zip(Note.weights, expected, strict=True))


# ---- The teacher


def test_teacher_is_frozen_in_evaluation_mode_and_kept_out_of_everything(tmp_path):
    teacher = resnet(2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = trainer_for(tmp_path, teacher=teacher, save_strategy="epoch", momentum=0.9)
    trainer.model.train()
    trainer.teacher_model.train()
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in teacher.parameters()}
    assert trainer.model.state_dict().keys() == resnet().state_dict().keys()
    saved = sum(file.stat().st_size for file in Path(trainer.args.output_dir).rglob("*.safetensors"))
    size = sum(value.numel() * value.element_size() for value in resnet().state_dict().values())
    assert saved < 2 * size * 1.2  # two checkpoints of the student alone


def test_teacher_by_folder(tmp_path):
    resnet(2).save_pretrained(tmp_path / "teacher")
    by_folder = trainer_for(tmp_path, teacher=str(tmp_path / "teacher"))
    by_module = trainer_for(tmp_path, teacher=resnet(2))
    for trainer in (by_folder, by_module):
        trainer.train()
    assert by_folder.state.log_history[0]["loss"] == by_module.state.log_history[0]["loss"]


def test_teacher_without_trained_head_is_refused(tmp_path):
    model = resnet(2)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"lacks trained weights for classifier\.bias"):
        load_teacher(str(tmp_path))
    with pytest.raises(InputError, match="nobody/nothing' cannot be loaded"):
        load_teacher("nobody/nothing")


class BadFrom(nn.Module):
    """A teacher whose logits are NaN from some call on."""

    def __init__(self, call: int):
        super().__init__()
        self.inner, self.call, self.calls = resnet(2), call, 0

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits = self.inner(pixel_values).logits
        return logits * float("nan") if self.calls >= self.call else logits


def test_bad_teacher_is_found_in_the_first_batch(tmp_path):
    trainer = trainer_for(tmp_path, teacher=BadFrom(1), logging_steps=500)
    with pytest.raises(TeacherLogitsError, match="at step 1"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_bad_teacher_is_found_before_the_next_save(tmp_path):
    trainer = trainer_for(
        tmp_path, teacher=BadFrom(4), num_train_epochs=4, logging_steps=500, save_strategy="steps", save_steps=3
    )
    with pytest.raises(TeacherLogitsError, match="at step 4"):
        trainer.train()
    checkpoints = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3"]
    good = load_classifier(f"{trainer.args.output_dir}/checkpoint-3", NAMES)
    assert all(value.isfinite().all() for value in good.state_dict().values())


def test_bad_teacher_is_found_at_the_next_log(tmp_path):
    trainer = trainer_for(tmp_path, teacher=BadFrom(2), num_train_epochs=4, logging_steps=3)
    with pytest.raises(TeacherLogitsError, match="at step 2"):
        trainer.train()
    assert trainer.state.global_step == 3


# ---- Divergence


class Diverges(Linear):
    """A student whose logits are NaN from some training step on."""

    def __init__(self, step: int):
        super().__init__(1)
        self.step = step

    def forward(self, features: torch.Tensor) -> ImageClassifierOutput:
        logits = super().forward(features).logits
        is_bad = self.training and len(self.seen) >= self.step
        return ImageClassifierOutput(logits=logits * float("nan") if is_bad else logits)


def numbers() -> list[dict]:
    return [{"features": torch.tensor([i / 10]), "labels": i % 5} for i in range(40)]  # two steps an epoch


@pytest.mark.parametrize(("teacher", "logging_steps", "stopped_at"), [(None, 3, 6), (Linear(1), 500, 6)])
def test_diverged_training_is_stopped_before_the_next_log_or_save(tmp_path, teacher, logging_steps, stopped_at):
    trainer = trainer_for(
        tmp_path, Diverges(4), teacher, numbers(), num_train_epochs=4, logging_steps=logging_steps,
        save_strategy="steps", save_steps=3, learning_rate=0.5,
    )  # fmt: skip
    with pytest.raises(TrainingDivergedError, match=r"diverged.* at step 4\..* --learning_rate \(it is 0\.5\)"):
        trainer.train()
    assert trainer.state.global_step == stopped_at
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_last_step_that_spoils_the_weights_is_not_saved(tmp_path):
    options = {"num_train_epochs": 1, "learning_rate": 1e38, "max_grad_norm": 0, "per_device_train_batch_size": 40}
    data = [{**example, "features": 1e3 * example["features"]} for example in numbers()]
    trainer = trainer_for(tmp_path, Linear(1), None, data, save_strategy="epoch", **options)
    with pytest.raises(TrainingDivergedError, match="at step 1"):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    with pytest.raises(TrainingDivergedError, match="at step 1"):  # nor is what a caller would save
        trainer_for(tmp_path, Linear(1), None, data, **options).train()


def test_a_data_set_may_have_a_sample_of_its_own(tmp_path):
    class Sampled(list):
        def sample(self) -> list:
            return []

    losses = []
    for data in (images(), Sampled(images())):
        trainer = trainer_for(tmp_path, data=data, student_init="auto", max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("names", [["b", "a", "c", "d", "e"], ["v", "w", "x", "y", "z"]], ids="".join)
def test_a_teacher_with_classes_in_another_order_is_refused(tmp_path, names):
    teacher = load_classifier("cifar-resnet-8", names, image_size=8)
    student = load_classifier("cifar-resnet-8", list("abcde"), image_size=8)
    if "a" in names:
        with pytest.raises(ValueError, match="Class 0 of the student, 'a', is output 1 of the teacher"):
            trainer_for(tmp_path, student, teacher)
        trainer = trainer_for(tmp_path, student, FrozenTeacher(teacher, align_labels(names, list("abcde"))))
        assert trainer.teacher_model.columns == [1, 0, 2, 3, 4]
    else:
        with pytest.warns(UserWarning, match="no class name in common"):
            trainer_for(tmp_path, student, teacher)


# ---- Class counts


def test_class_counts_of_any_training_set(tmp_path):
    data = images()

    class Opaque(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            return data[index]

    class WithTargets(Opaque):
        targets = [example["labels"] for example in data]  # noqa: RUF012

    table = datasets.Dataset.from_list(
        [{"pixel_values": e["pixel_values"].numpy(), "label": e["labels"]} for e in data]
    )
    for dataset in (data, Opaque(), WithTargets(), table.with_format("torch")):
        assert trainer_for(tmp_path, data=dataset).class_counts.tolist() == COUNTS
    assert trainer_for(tmp_path, class_counts=[9, 8, 7, 6, 5]).class_counts.tolist() == [9, 8, 7, 6, 5]
    trainer_for(tmp_path, data=table.with_format("torch"), max_steps=1).train()


def test_data_set_with_transform(tmp_path):
    table = datasets.Dataset.from_dict({"value": list(range(20)), "label": [i % 5 for i in range(20)]})

    def transform(batch: dict) -> dict:
        return {
            "pixel_values": [torch.full((3, 8, 8), float(value)) for value in batch["value"]],
            "labels": batch["label"],
        }

    trainer = trainer_for(tmp_path, data=table.with_transform(transform))
    assert trainer.class_counts.tolist() == [4] * 5
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_counts": [1, 2, 3]}, "student: 5, teacher: 5, class counts: 3"),
        ({"class_counts": [1, 2, 3, 4, 0]}, r"1 of 5 classes has no training example \('4'\).*--empty_classes clamp"),
        ({"data": [{**e, "labels": e["labels"] + 1} for e in images()]}, "has the label 5, outside the range"),
        ({"data": [{**e, "labels": e["labels"] - 1} for e in images()]}, "Label -1 of the training set is negative"),
        ({"teacher": load_classifier("cifar-resnet-8", NAMES[:4])}, "student: 5, teacher: 4"),
        ({"teacher": load_classifier("cifar-resnet-8", NAMES), "model": "same"}, "the student itself"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    if arguments.get("model") == "same":
        arguments = {**arguments, "model": arguments["teacher"]}
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((torch.zeros(3, 8, 8), 1), "A training example is a tuple; a dict is expected"),
        ({"pixel_values": torch.zeros(3, 8, 8), "class": 1}, 'no "labels", only pixel_values, class'),
        ({"pixel_values": torch.zeros(3, 8, 8), "labels": torch.eye(5)[1]}, "one class number is expected"),
        ({"image": torch.zeros(3, 8, 8), "labels": 1}, r"nothing that the model takes.*ImageDataset"),
    ],
    ids=("tuple", "no label", "one-hot", "image"),
)
def test_examples_that_no_training_can_use_are_refused(tmp_path, example, message):
    with pytest.raises(ValueError, match=message):
        BKDTrainer(resnet(), args=config(tmp_path, method="ce", max_steps=1), train_dataset=[example] * 4).train()


def test_logged_loss_is_the_sum_of_its_parts_though_steps_differ_in_size(tmp_path):
    trainer = trainer_for(tmp_path, per_device_train_batch_size=36, num_train_epochs=1, logging_strategy="epoch")
    trainer.train()
    assert trainer.state.global_step == 2  # of 36 images and of 4
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["ce_loss"] + log["kd_loss"], rel=1e-5)


def test_empty_classes_are_named_or_count_as_one_image(tmp_path):
    model = load_classifier("cifar-resnet-8", ["ash", "birch", "cedar", "elm", "fir"], image_size=8)
    with pytest.raises(InputError, match=r"1 of 5 classes has no training example \('cedar'\), and --distillation"):
        trainer_for(tmp_path, model, class_counts=[9, 4, 0, 2, 1])
    trainer = trainer_for(tmp_path, model, class_counts=[9, 4, 0, 2, 1], empty_classes="clamp")
    torch.testing.assert_close(trainer.class_weights, class_balanced_weights([9, 4, 1, 2, 1]).float())
    assert trainer.class_counts.tolist() == [9, 4, 0, 2, 1]  # the metrics tell what there is


def test_args_must_be_a_bkd_config(tmp_path):
    with pytest.raises(ValueError, match="BKDConfig"):
        BKDTrainer(model=resnet(), args={"learning_rate": 1})


# ---- Optimisation


def test_step_decay_follows_the_recipe(tmp_path):
    trainer = trainer_for(
        tmp_path,
        num_train_epochs=8,
        learning_rate=0.1,
        lr_warmup_epochs=2,
        lr_step_epochs=[4, 6],
        lr_step_factors=[0.01, 0.0001],
        lr_scheduler_type="linear",
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[::2] == rates[1::2]  # two steps an epoch at the same rate
    assert rates[::2] == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.001, 0.001, 0.00001, 0.00001])


def test_momentum_and_decay_on_all_parameters(tmp_path):
    trainer = trainer_for(tmp_path, momentum=0.9, weight_decay=0.1, decay_all_parameters=True)
    optimizer = trainer.create_optimizer()
    assert [(len(g["params"]) > 0, g["momentum"], g["nesterov"]) for g in optimizer.param_groups if g["params"]] == [
        (True, 0.9, False)
    ]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert len(optimizer.param_groups[0]["params"]) == len(list(trainer.model.parameters()))
    default = trainer_for(tmp_path, weight_decay=0.1).create_optimizer()
    assert len(default.param_groups[1]["params"]) > 0


def test_inherited_defaults_are_those_of_transformers():
    from dataclasses import fields

    from transformers import TrainingArguments

    ours = {f.name: f.default for f in fields(BKDConfig)}
    for f in fields(TrainingArguments):
        assert ours[f.name] == f.default, f.name


# ---- In every other respect a Trainer


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5},
        {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_features_of_trainer(tmp_path, options):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is a property of the process
    trainer = trainer_for(tmp_path, vit(1), vit(2), **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == trainer.state.max_steps
    assert all(math.isfinite(loss) for loss in losses)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_uses_one_gpu(tmp_path):
    losses = []
    for visible in (1, 2):
        options = config(tmp_path, method="cb-ce", per_device_train_batch_size=10, gradient_accumulation_steps=2)
        options._n_gpu = visible
        trainer = BKDTrainer(model=resnet(1), args=options, train_dataset=images())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("model", [vit, resnet])
def test_load_best_model_at_end_loads_the_best(tmp_path, model):
    best: dict[str, torch.Tensor] = {}

    class KeepFirst(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            if state.global_step == state.best_global_step:
                best.update({name: value.clone() for name, value in model.state_dict().items()})

    trainer = trainer_for(
        tmp_path,
        model(1),
        None,
        callbacks=[KeepFirst()],
        num_train_epochs=3,
        learning_rate=5.0,  # diverges, so the first checkpoint is the best
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_global_step < trainer.state.global_step
    assert best.keys() == trainer.model.state_dict().keys()
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


def test_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, save_strategy="epoch", num_train_epochs=1)
    trainer.train()
    other = trainer_for(tmp_path, vit(1), None)
    with pytest.raises(ValueError, match="checkpoint-2 does not fit the model"):
        other.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")


def test_token_is_never_saved(tmp_path):
    trainer = trainer_for(tmp_path, hub_token="hf_planted", save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == "hf_planted"
    files = [file for file in Path(trainer.args.output_dir).rglob("*") if file.is_file()]
    assert any(file.name == "training_args.bin" for file in files)
    assert not [file for file in files if b"hf_planted" in file.read_bytes()]


def test_drop_last_and_sequential_order(tmp_path):
    seen = []

    class Student(Linear):
        def forward(self, features):
            seen.append(features[:, 0].tolist())
            return super().forward(features)

    data = [{"features": torch.tensor([float(i)]), "labels": i % 5} for i in range(10)]
    trainer_for(
        tmp_path,
        Student(1),
        None,
        data,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        dataloader_drop_last=True,
        train_sampling_strategy="sequential",
    ).train()
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_iterable_data_set_takes_trainers_own_path(tmp_path):
    table = datasets.Dataset.from_list([{"features": [float(i)], "labels": i % 5} for i in range(20)])
    data = table.to_iterable_dataset().with_format("torch")
    trainer = BKDTrainer(
        model=Linear(1),
        teacher_model=Linear(1),
        args=config(tmp_path, max_steps=2),
        train_dataset=data,
        class_counts=COUNTS,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="needs class_counts"):
        BKDTrainer(model=Linear(1), teacher_model=Linear(1), args=config(tmp_path, max_steps=2), train_dataset=data)


def test_student_and_teacher_of_text_are_measured(tmp_path):
    def bert(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=5, **size))

    table = datasets.Dataset.from_dict(
        {
            "input_ids": [[i % 20, 3, i % 7, 0] for i in range(40)],
            "attention_mask": [[1, 1, 1, i % 2] for i in range(40)],
            "text": ["not for the models"] * 40,
            "label": np.repeat(np.arange(5), COUNTS).tolist(),
        }
    )
    teacher = bert(2)
    trainer = trainer_for(tmp_path, bert(1), teacher, table, max_steps=1, eval_strategy="epoch")
    trainer.train()
    results = trainer.save_results("texts")
    inputs = {name: torch.tensor(table[name][:]) for name in ("input_ids", "attention_mask")}
    right = teacher(**inputs).logits.argmax(dim=1) == torch.tensor(table["label"][:])
    assert results["teacher"]["metrics"]["accuracy"] == pytest.approx(right.float().mean().item())


def test_frozen_teacher_answers_with_logits_of_any_model():
    logits = torch.randn(2, 5)
    for answer in (logits, (logits,), ImageClassifierOutput(logits=logits)):

        class Answers(nn.Module):
            def forward(self, answer=answer):
                return answer

        assert torch.equal(FrozenTeacher(Answers())(), logits)


def test_trainer_state_is_as_users_know_it(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.save_state()
    state = json.loads((Path(trainer.args.output_dir) / "trainer_state.json").read_text())
    assert {"loss", "ce_loss", "kd_loss", "learning_rate", "epoch", "step"} <= set(state["log_history"][0])


def test_equals_a_loop_written_by_hand(tmp_path):
    data = images()
    options = {
        "momentum": 0.9,
        "weight_decay": 0.01,
        "decay_all_parameters": True,
        "learning_rate": 0.1,
        "num_train_epochs": 4,
        "lr_warmup_epochs": 2,
        "lr_step_epochs": [3],
        "lr_step_factors": [0.01],
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 16,  # 16 + 16 + 8
    }
    trainer = trainer_for(tmp_path, resnet(1), resnet(2), data, **options)
    trainer.train()

    student, teacher, weights = resnet(1).train(), resnet(2).eval(), class_balanced_weights(COUNTS)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for rate in (0.05, 0.1, 0.1, 0.001):
        optimizer.param_groups[0]["lr"] = rate
        for start in (0, 16, 32):
            pixels = torch.stack([example["pixel_values"] for example in data[start : start + 16]])
            labels = torch.tensor([example["labels"] for example in data[start : start + 16]])
            with torch.no_grad():
                teacher_logits = teacher(pixels).logits
            loss = bkd_loss(student(pixels).logits, teacher_logits, labels, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


# ---- What costs time and changes nothing


@pytest.mark.parametrize(
    ("options", "logged"),
    [
        ({"logging_steps": 3}, [3]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_strategy": "epoch"}, [2, 4]),
    ],
)
def test_norm_of_the_gradients_is_that_of_every_step_where_it_is_logged(tmp_path, options, logged):
    def norms(**kwargs) -> dict[int, float]:
        trainer = trainer_for(tmp_path, **kwargs)
        trainer.train()
        return {entry["step"]: entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry}

    each = norms(logging_steps=1)
    assert norms(**options) == {step: each[step] for step in logged}
    assert all(norm > 0 for norm in each.values())


def test_norm_is_taken_at_every_step_where_gradients_are_clipped(tmp_path):
    clipped = [trainer_for(tmp_path, max_grad_norm=1e-9, logging_steps=steps) for steps in (1, 1000)]
    for trainer in clipped:
        trainer.train()
    for one, other in zip(*(trainer.model.parameters() for trainer in clipped), strict=True):
        assert torch.equal(one, other)


# ---- Evaluation is of all images


@pytest.mark.parametrize(
    "option",
    [
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "group_by_length"},
        {"prediction_loss_only": True},
        {"accelerator_config": {"even_batches": False}},
    ],
)
def test_training_options_do_not_reach_evaluation(tmp_path, option):
    expected = trainer_for(tmp_path).evaluate()["eval_accuracy"]
    trainer = trainer_for(tmp_path, per_device_eval_batch_size=16, **option)  # 40 = 16 + 16 + 8
    metrics, measured = trainer.measure(images())
    assert measured.num_images == 40
    assert measured.labelled.tolist() == COUNTS
    assert metrics["eval_accuracy"] == expected
    assert trainer.args.dataloader_drop_last == bool(option.get("dataloader_drop_last"))


def test_answers_about_some_of_the_images_are_refused(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    whole = trainer._get_dataloader
    monkeypatch.setattr(trainer, "_get_dataloader", lambda *args, **kwargs: Short(whole(*args, **kwargs)))
    for evaluate in (trainer.evaluate, lambda: trainer.measure(images())):
        with pytest.raises(InputError, match="has answers about 32 of 40 examples"):
            evaluate()


class Short:
    """A loader that leaves out its last batch."""

    def __init__(self, loader):
        self.dataset, self.loader = loader.dataset, loader

    def __iter__(self):
        return iter(list(self.loader)[:-1])

    def __len__(self):
        return len(self.loader) - 1


def test_workers_that_stay_are_those_of_the_data_set_that_is_asked_about(tmp_path):
    trainer = trainer_for(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    first = trainer.evaluate()["eval_loss"]
    others = images()[::-1][:20]
    assert trainer.evaluate(others)["eval_loss"] == trainer.predict(others).metrics["test_loss"] != first
    assert trainer.evaluate()["eval_loss"] == first


# ---- What others brought


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.slow
def test_teacher_in_another_precision_is_used(tmp_path, dtype):
    trainer = trainer_for(tmp_path, teacher=resnet(2).to(dtype), method="kd")
    trainer.train()
    assert next(trainer.teacher_model.parameters()).dtype == dtype
    expected = trainer_for(tmp_path, method="kd")
    expected.train()
    logged = [entry["kd_loss"] for entry in trainer.state.log_history if "kd_loss" in entry]
    assert logged == pytest.approx([e["kd_loss"] for e in expected.state.log_history if "kd_loss" in e], rel=0.05)


def test_student_answers_one_class_whatever_it_was_for(tmp_path):
    foreign = tiny_vit(0, 5, problem_type="multi_label_classification", function_to_apply="sigmoid", return_dict=False)
    foreign.save_pretrained(tmp_path / "foreign")
    loaded = load_classifier(str(tmp_path / "foreign"), NAMES)
    for student in (foreign, loaded):
        trainer = trainer_for(tmp_path, student, teacher=None, max_steps=1)
        trainer.train()
        trainer.save_model()
        saved = AutoConfig.from_pretrained(trainer.args.output_dir)
        assert saved.problem_type == "single_label_classification"
        assert not hasattr(saved, "function_to_apply")


# ---- Search for hyperparameters


class Backend(HyperParamSearchBackendBase):
    """Tries given options, as `run_hp_search_optuna` does: it takes the model away after each trial."""

    name = "wandb"
    trials: ClassVar[list[dict]] = []

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        values = []
        for trial in self.trials[:n_trials]:
            trainer.objective = None
            trainer.train(trial=dict(trial))
            if trainer.objective is None:
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            values.append(trainer.objective)
            trainer.model_wrapped, trainer.model = None, None
            trainer.accelerator.clear()
        return values


@pytest.mark.slow
@pytest.mark.parametrize("evaluates", ["no", "epoch"])
def test_search_for_hyperparameters_varies_them(tmp_path, monkeypatch, evaluates):
    Backend.trials = [
        {"method": "bkd", "class_balance_beta": 0.9},
        {"method": "bkd", "class_balance_beta": 0.9999},
        {"method": "ce"},
        {"method": "ce", "distillation_loss": "kd", "learning_rate": 0.01},
        # Evaluations while it trains would come before its head's bias is fitted.
        {"method": "bkd-calibrated", "learning_rate": 0.05, "head_bias": "learned"},  # with its own loss again
    ]
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="1")))
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, Backend)
    options = {"num_train_epochs": 1, "max_steps": 2, "eval_strategy": evaluates}
    expected = []
    for trial in Backend.trials:
        is_distilled = trial["method"] != "ce" or "distillation_loss" in trial
        alone = trainer_for(tmp_path, teacher="resnet" if is_distilled else None, **{**options, **trial})
        alone.train()
        expected.append(alone.evaluate()["eval_loss"])
    assert len(set(expected)) == len(expected)
    trainer = BKDTrainer(
        model_init=lambda: resnet(1),
        teacher_model=resnet(2),
        args=config(tmp_path, method="bkd", **options),
        train_dataset=images(),
        eval_dataset=images(),
    )
    found = trainer.hyperparameter_search(
        backend="wandb", n_trials=5, compute_objective=lambda metrics: metrics["eval_loss"]
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_search_may_try_a_word_where_the_method_has_a_number(tmp_path, monkeypatch):
    Backend.trials = [{"class_balance_power": "auto"}, {"class_balance_power": 0.75}]
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="1")))
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, Backend)
    powers = []
    trainer = BKDTrainer(
        model_init=lambda: resnet(1), teacher_model=resnet(2), args=config(tmp_path, method="bkd", max_steps=1),
        train_dataset=images(), eval_dataset=images(),
    )  # fmt: skip
    trainer.hyperparameter_search(
        backend="wandb", n_trials=2, compute_objective=lambda _: powers.append(trainer.bkd_objective.power) or 0.0
    )
    assert powers == [0.5, 0.75]


def test_a_search_without_an_objective_takes_the_loss(tmp_path, monkeypatch):
    """`Trainer` would add up all metrics, and find the smallest accuracy."""
    Backend.trials = [{"learning_rate": 0.01}]
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="1")))
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, Backend)
    trainer = BKDTrainer(
        model_init=lambda: resnet(1), args=config(tmp_path, method="ce", max_steps=1),
        train_dataset=images(), eval_dataset=images(),
    )  # fmt: skip
    alone = trainer_for(tmp_path, teacher=None, method="ce", max_steps=1, learning_rate=0.01)
    alone.train()
    found = trainer.hyperparameter_search(backend="wandb", n_trials=1)
    assert found == pytest.approx([alone.evaluate()["eval_loss"]], rel=1e-5)


class InEvaluation(Linear):
    """Keeps itself in evaluation mode, as models do whose statistics are frozen."""

    def train(self, mode: bool = True) -> InEvaluation:
        return super().train(False)


def test_a_student_that_stays_in_evaluation_mode_is_distilled_all_the_same(tmp_path):
    data = [{"features": torch.ones(2) * i, "labels": i % 5} for i in range(40)]
    trainer = trainer_for(tmp_path, InEvaluation(2), Linear(2), data, method="bkd", max_steps=1)
    trainer.train()
    assert "kd_loss" in trainer.state.log_history[0]


def test_restored_callbacks_keep_the_time(tmp_path):
    options = {
        "teacher": None,
        "method": "ce",
        "save_strategy": "epoch",
        "restore_callback_states_from_checkpoint": True,
    }
    trainer_for(tmp_path, **options, num_train_epochs=1).train()
    resumed = trainer_for(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.clock.seconds < 100


def test_a_long_training_tells_how_long(monkeypatch):
    told, now = [], iter([100.0, 120.0])
    monkeypatch.setattr("bkd_hf.progress.time.perf_counter", lambda: next(now))
    teller, state = TellOfTime(told.append), TrainerState(max_steps=600, num_train_epochs=3)
    teller.on_train_begin(None, state, None)
    for step in range(1, 20):
        state.global_step = step
        teller.on_step_end(None, state, None)
    assert told == ["An epoch takes about 7 min, all of the training 20 min more."]  # 2 s a step


def test_a_training_that_had_done_all_its_steps_does_no_more(tmp_path):
    options = {"max_steps": 3, "per_device_train_batch_size": 5, "save_strategy": "steps", "save_steps": 3}
    first = trainer_for(tmp_path, **options)
    first.train()
    again = trainer_for(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert all(torch.equal(*pair) for pair in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_time_and_speed_are_those_of_all_sessions(tmp_path):
    options = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer_for(tmp_path, num_train_epochs=20, **options).train()
    trainer = trainer_for(tmp_path, num_train_epochs=21, **options)
    trainer.train(resume_from_checkpoint=True)
    trainer.evaluate()
    found = measure(trainer)["student"]["training"]
    last = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry][-1]
    assert found["epochs"] == 21
    assert found["seconds"] > 2 * last


def test_no_whole_checkpoint_is_a_new_beginning_and_none_an_error(tmp_path):
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    trainer = trainer_for(tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match="has no whole checkpoint: its training begins anew"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer_for(tmp_path / "other", max_steps=1).train(resume_from_checkpoint=True)


def test_a_module_without_a_configuration_is_measured(tmp_path):
    data = [{"features": torch.randn(6), "labels": example["labels"]} for example in images()]
    trainer = trainer_for(tmp_path, Linear(6), Linear(6), data, max_steps=1)
    trainer.train()
    results = trainer.save_results("mine")
    assert results["data"]["class_names"] == NAMES
    assert results["teacher"]["architecture"] == "Linear"


def test_the_batch_size_that_was_found_is_the_one_that_is_told(tmp_path):
    def needs_memory(model, args, kwargs):
        if model.training and len(kwargs["pixel_values"]) > 18:
            raise RuntimeError("CUDA out of memory.")

    trainer = trainer_for(tmp_path, teacher=None, auto_find_batch_size=True, method="ce", max_steps=2)
    trainer.model.register_forward_pre_hook(needs_memory, with_kwargs=True)
    trainer.train()
    assert effective_batch_size(measure(trainer)) == 18


# ---- Unusual data


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(images())


def test_a_stream_of_ones_own_is_measured_and_what_needs_random_access_says_so(tmp_path):
    trainer = BKDTrainer(
        resnet(1), resnet(2), config(tmp_path, max_steps=2, method="bkd"), train_dataset=Stream(), class_counts=COUNTS,
        eval_dataset=images(),
    )  # fmt: skip
    trainer.train()
    trainer.save_results()
    with pytest.raises((InputError, ValueError), match="length and random access"):
        BKDTrainer(
            resnet(1), resnet(2), config(tmp_path, max_steps=2, method="bkd-calibrated"), train_dataset=Stream(),
            class_counts=COUNTS,
        )  # fmt: skip


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return itertools.cycle(images())


@pytest.mark.parametrize("kind", [Stream, Endless])
def test_passes_over_a_set_without_length_are_counted_by_its_examples(tmp_path, kind):
    """40 images in steps of 20: 10 steps are 5 passes, and 0.8 of them are over after 8."""
    seen = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights = trainer.classification_weights
            seen.append((state.epoch, weights.unique().numel() > 1, trainer._get_learning_rate()))

    options = {"method": "ce", "class_weighting": "drw", "class_weighting_start": 0.8, "max_steps": 10}
    steps = {"lr_step_epochs": [1], "lr_step_factors": [0.1]}
    trainer = BKDTrainer(
        resnet(), None, config(tmp_path, **options, **steps), train_dataset=kind(), class_counts=COUNTS,
        eval_dataset=images(), callbacks=[Spy()],
    )  # fmt: skip
    trainer.train()
    assert [epoch for epoch, *_ in seen] == [step / 2 for step in range(1, 11)]
    assert [are_weighted for _, are_weighted, _ in seen] == [False] * 7 + [True] * 3
    assert [rate for *_, rate in seen] == pytest.approx([0.05] + [0.005] * 9)
    training = trainer.save_results()["student"]["training"]
    assert (training["steps"], training["epochs"]) == (10, 5)
    assert training["images_per_second"] == pytest.approx(200 / training["seconds"], rel=0.2)


def test_epochs_of_unknown_length_are_no_steps_of_the_learning_rate(tmp_path):
    options = {"method": "ce", "max_steps": 4, "lr_step_epochs": [1], "lr_step_factors": [0.1]}
    with pytest.raises(InputError, match=r"--lr_step_epochs needs epochs, .* give the trainer class_counts"):
        BKDTrainer(resnet(), None, config(tmp_path, **options), train_dataset=Stream()).train()


@pytest.mark.parametrize("options", [{"method": "bkd-calibrated"}, {"method": "ce", "head_bias": "balanced"}], ids=str)
def test_examples_without_a_label_count_for_nothing_anywhere(tmp_path, options):
    labelled = images()
    data = [*labelled, {**labelled[0], "labels": -100}, {**labelled[1], "labels": -100}]
    trainer = trainer_for(tmp_path, data=data, teacher=None if options["method"] == "ce" else "resnet", **options)
    assert trainer.class_counts.tolist() == COUNTS
    trainer.train()
    found = trainer.evaluate()
    expected = trainer_for(tmp_path, trainer.model, teacher=None, method="ce").evaluate()
    for name in ("eval_loss", "eval_accuracy", "eval_few_shot_accuracy"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("options", [{"method": "bkd"}, {"method": "ce", "class_weighting": "reweight"}], ids=str)
def test_a_step_without_any_label_changes_nothing(tmp_path, options):
    unlabelled = [{**example, "labels": -100} for example in images()[:8]]
    options |= {"teacher": None} if options["method"] == "ce" else {}
    options |= {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential", "logging_steps": 1}
    options |= {"optim": "sgd", "momentum": 0.0, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    weights = []
    for data, steps in (([*unlabelled, *images()], 2), ([*images(), *unlabelled], 1)):
        model = vit(0)
        trainer = trainer_for(tmp_path, model, data=data, **options | {"max_steps": steps})
        trainer.train()
        assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], msg=name)


def test_a_data_set_may_have_examples_without_a_label(tmp_path):
    labels = [*(example["labels"] for example in images()), -100, -100]
    data = datasets.Dataset.from_dict({"features": torch.randn(len(labels), 3), "labels": labels}).with_format("torch")
    trainer = trainer_for(tmp_path, Linear(3), None, data, method="ce", max_steps=1)
    assert trainer.class_counts.tolist() == COUNTS
    trainer.train()


def test_unsigned_labels_are_all_labels(tmp_path):
    """−100 is 156 in uint8."""
    losses = []
    for dtype in (torch.uint8, torch.int64):
        data = [{"features": torch.ones(1), "labels": torch.tensor(label, dtype=dtype)} for label in (156, 3)]
        torch.manual_seed(0)
        model = Linear(1)
        model.linear = nn.Linear(1, 200)
        trainer = trainer_for(tmp_path, model, None, data, method="ce", max_steps=2, class_counts=[1] * 200)
        trainer.train()
        losses.append([*(log["loss"] for log in trainer.state.log_history[:2]), trainer.evaluate()["eval_loss"]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("options", [{"head_init": "class_mean"}, {"head_bias": "balanced"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_other_integers_fit_a_head(tmp_path, options, dtype):
    heads = []
    for of_labels in (dtype, torch.int64):
        data = [{**each, "labels": torch.tensor(each["labels"], dtype=of_labels)} for each in images()]
        trainer = trainer_for(tmp_path, vit(), None, data, method="ce", max_steps=2, **options)
        trainer.train()
        heads.append(trainer.model.classifier.weight.sum() + trainer.model.classifier.bias.sum())
    assert torch.equal(*heads)


def test_an_attribute_that_lists_the_classes_is_not_taken_for_labels(tmp_path):
    class Listed(list):
        labels: ClassVar = [0, 1, 2, 3, 4]

    class Named(list):
        labels: ClassVar = NAMES

    for kind in (Listed, Named):
        assert trainer_for(tmp_path, data=kind(images()), method="bkd").class_counts.tolist() == COUNTS


def test_no_step_is_left_where_the_last_is_dropped(tmp_path):
    trainer = trainer_for(tmp_path, per_device_train_batch_size=64, dataloader_drop_last=True)
    with pytest.raises(InputError, match="--dataloader_drop_last true leaves no step of 40 training examples"):
        trainer.train()


def test_an_epoch_that_a_callback_ends_is_followed_by_the_next(tmp_path):
    class Ending(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    class Views(list):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    epochs: list[int] = []
    trainer = trainer_for(tmp_path, teacher=None, data=Views(images()), method="ce", callbacks=[Ending()])
    epochs.clear()
    trainer.train()
    assert sorted({*epochs}) == [0, 1]
    assert epochs == sorted(epochs)


# ---- Models of all kinds, and what is given from outside


@dataclasses.dataclass
class Answers:
    """No dict, and the logits are not the first."""

    features: torch.Tensor
    logits: torch.Tensor


class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(192, 5)

    def forward(self, pixel_values, labels=None, label_mask=None):
        features = pixel_values.flatten(1)
        return Answers(features[:, :5], self.head(features))


def test_logits_are_those_of_that_name_and_labels_too(tmp_path):
    trainer = trainer_for(tmp_path, Unusual(), teacher=None, method="ce")
    trainer.train()
    pixels, labels = (torch.tensor(np.stack([e[name] for e in images()])) for name in ("pixel_values", "labels"))
    with torch.no_grad():
        expected = trainer.model(pixels).logits
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nn.functional.cross_entropy(expected, labels).item())
    without_labels = [{"pixel_values": e["pixel_values"], "teacher_pixel_values": e["pixel_values"]} for e in images()]
    trainer.args.remove_unused_columns = False
    assert np.allclose(trainer.predict(without_labels).predictions, expected, atol=1e-6)


class WithOneMore(LongTailEvaluation):
    def __call__(self, prediction):
        return {**super().__call__(prediction), "one_more": float(len(prediction.label_ids))}


def test_metrics_of_a_subclass_are_its_own(tmp_path):
    found = trainer_for(tmp_path, compute_metrics=WithOneMore(COUNTS)).evaluate()
    assert found["eval_one_more"] == 40
    assert found["eval_accuracy"] == trainer_for(tmp_path).evaluate()["eval_accuracy"]


class Needing(BKDTrainer):
    def __init__(self, needed, **kwargs):
        super().__init__(**kwargs)


def test_a_subclass_may_take_other_arguments(tmp_path):
    args = config(tmp_path, max_steps=1, bf16=True, bf16_full_eval=True)
    trainer = Needing(
        1, model=resnet(1), teacher_model=resnet(2), args=args, train_dataset=images(), eval_dataset=images()
    )
    trainer.train()
    trainer.save_results()
    assert {p.dtype for p in trainer.teacher_model.parameters()} == {torch.float32}  # not that of an evaluation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_learning_rate": 0.1}, "--head_learning_rate"),
        ({"layer_decay": 0.5}, "--layer_decay"),
        ({"lr_step_epochs": [1], "lr_step_factors": [0.1]}, "--lr_step_epochs"),
    ],
)
def test_options_of_an_optimizer_that_is_given_are_refused(tmp_path, options, message):
    student = vit()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(InputError, match=f"{message} does not change the `optimizers` that are given"):
        BKDTrainer(
            student, None, config(tmp_path, method="ce", **options), train_dataset=images(),
            optimizers=(optimizer, schedule),
        )  # fmt: skip


def test_smoothing_does_not_reach_a_loss_of_ones_own(tmp_path):
    with pytest.raises(InputError, match=r"--label_smoothing_factor 0\.1 does not reach a classification_loss"):
        BKDTrainer(
            resnet(), None, config(tmp_path, method="ce", label_smoothing_factor=0.1), train_dataset=images(),
            classification_loss=lambda logits, labels: logits[:, 0],
        )  # fmt: skip


@pytest.mark.parametrize("adapter", ["lora", "bitfit"])
def test_checkpointing_that_keeps_gradients_from_an_adapter_is_refused(tmp_path, adapter):
    options = {"adapter": adapter, "activation_checkpointing": True}
    with pytest.raises(InputError, match=r"--activation_checkpointing_kwargs must be .*use_reentrant.*false"):
        config(tmp_path, **options, activation_checkpointing_kwargs={"use_reentrant": True})
    config(tmp_path, **options, activation_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("name", ["expected_calibration_error", "eval_birds_expected_calibration_error"])
def test_the_best_calibration_is_the_least_error(tmp_path, name):
    assert config(tmp_path, metric_for_best_model=name).greater_is_better is False
    assert config(tmp_path, metric_for_best_model=name, greater_is_better=True).greater_is_better is True
    assert config(tmp_path, metric_for_best_model="accuracy").greater_is_better is True


# ---- Training again


def test_class_means_start_a_head_once(tmp_path):
    trainer = trainer_for(tmp_path, vit(), teacher=None, method="ce", head_init="class_mean")
    trainer.train()
    trained = trainer.model.classifier.weight.clone()
    trainer.args.learning_rate, trainer.optimizer = 0.0, None
    trainer.train()
    assert torch.equal(trainer.model.classifier.weight, trained)


class Known(list):
    def describe_views(self):
        return {}


def test_each_new_model_has_its_own_features(tmp_path):
    args = config(tmp_path, method="ce", freeze_backbone=True, feature_cache=str(tmp_path / "cache"))
    made: list[int] = []
    trainer = BKDTrainer(
        model_init=lambda: vit(len(made)), args=args, train_dataset=Known(images()), eval_dataset=images()
    )
    for _ in range(2):
        made.append(1)
        trainer.train()
        expected = trainer_for(tmp_path, trainer.model, teacher=None, method="ce").evaluate()["eval_loss"]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)


def test_a_batch_size_that_was_too_large_leaves_nothing_in_the_loss(tmp_path):
    def needs_memory(model, args, kwargs):
        if model.training and len(kwargs["pixel_values"]) == 20 and next(calls) == 1:
            raise RuntimeError("CUDA out of memory.")

    calls, losses = itertools.count(), []
    for options in ({"auto_find_batch_size": True}, {"per_device_train_batch_size": 18}):
        # The first step of 20 is done, the second fails; then all begins anew.
        trainer = trainer_for(tmp_path, vit(), None, method="ce", learning_rate=0.0, logging_steps=2, **options)
        trainer.model.register_forward_pre_hook(needs_memory, with_kwargs=True)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
