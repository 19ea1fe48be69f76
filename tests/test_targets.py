"""Distillation targets: the power of the class weights, the check before training, the start from the teacher."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import ImageClassifierOutput

from bkd_hf import (
    BKDConfig,
    BKDTrainer,
    FrozenTeacher,
    InputError,
    TeacherLogitsError,
    balanced_distillation_loss,
    balanced_softmax_loss,
    bkd_loss,
    class_balanced_weights,
    kd_loss,
    logit_adjustment_loss,
    post_hoc_logit_adjustment,
)
from bkd_hf.losses import balanced_log_targets
from bkd_hf.methods import DISTILLATION_LOSSES, Loss
from bkd_hf.progress import tell_of_targets
from bkd_hf.targets import describe_targets, prior_in_teacher, strongest_power, target_statistics, why_collapsed
from tests.test_trainer import COUNTS, config, images, resnet, trainer_for, vit

WEIGHTS = class_balanced_weights(COUNTS, 0.9999)
LOG_COUNTS = torch.tensor(COUNTS).double().log()


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))


# ---- The power


def test_the_papers_loss_has_the_power_one(logits):
    assert torch.equal(
        balanced_distillation_loss(*logits, WEIGHTS, 2.0, power=1.0), balanced_distillation_loss(*logits, WEIGHTS, 2.0)
    )


@pytest.mark.parametrize(("power", "p"), [(0.3, 0.3), ("auto", 1 / 3), (0, 0), (2.5, 2.5)])
def test_power_by_hand(logits, power, p):
    student, teacher = logits
    target = teacher.div(3.0).exp() * WEIGHTS**p
    target /= target.sum(dim=1, keepdim=True)
    expected = 9.0 * (target * (target.log() - student.div(3.0).log_softmax(dim=1))).sum(dim=1)
    found = balanced_distillation_loss(student, teacher, WEIGHTS, 3.0, "none", power=power)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    labels = torch.zeros(7, dtype=torch.long)
    total = bkd_loss(student, teacher, labels, WEIGHTS, 3.0, alpha=0.5, power=power)
    plain = bkd_loss(student, teacher, labels, WEIGHTS, 3.0, alpha=0.0)
    torch.testing.assert_close(total - plain, 0.5 * expected.mean(), rtol=1e-12, atol=1e-12)


def test_power_zero_is_plain_distillation(logits):
    torch.testing.assert_close(balanced_distillation_loss(*logits, WEIGHTS, power=0.0), kd_loss(*logits))


def test_auto_takes_the_class_frequencies_out_once():
    """Bayes: if z_t = log p(x|y) + log π_y, the target at power 1/T is what T makes of p(x|y) alone."""
    likelihood = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = 1 / torch.tensor(COUNTS).double()
    target = balanced_log_targets(likelihood + LOG_COUNTS, weights, 2.0, "auto")
    torch.testing.assert_close(target, (likelihood / 2).log_softmax(dim=1))


@pytest.mark.parametrize("power", [-0.1, math.inf, math.nan])
def test_no_such_power(logits, power):
    with pytest.raises(ValueError, match=r"power must be a finite number ≥ 0, or \"auto\", got"):
        balanced_distillation_loss(*logits, WEIGHTS, power=power)


@pytest.mark.parametrize("power", [-1, "-0.5", math.inf, "nan", "most"])
def test_no_such_option(power):
    with pytest.raises(ValueError, match=r"--class_balance_power must be a finite number ≥ 0, auto or measured, got"):
        BKDConfig(output_dir="unused", use_cpu=True, class_balance_power=power)


@pytest.mark.parametrize(
    "options", [{"method": "kd"}, {"method": "ce"}, {"method": "dive"}, {"distillation_loss": "kd"}]
)
@pytest.mark.parametrize("power", [0.5, "auto"])
def test_a_loss_without_weights_has_no_power(options, power):
    with pytest.raises(ValueError, match=r"--class_balance_power must be left out: --distillation_loss .* has no"):
        BKDConfig(output_dir="unused", use_cpu=True, class_balance_power=power, **options)


def test_text_and_numbers_are_the_same_option():
    assert BKDConfig(output_dir="unused", use_cpu=True, class_balance_power="0.5").class_balance_power == 0.5
    assert BKDConfig(output_dir="unused", use_cpu=True).class_balance_power == 1.0
    calibrated = BKDConfig(output_dir="unused", use_cpu=True, method="bkd-calibrated")
    assert (calibrated.class_balance_power, calibrated.student_init) == ("measured", "auto")


def one_step(tmp_path, **options) -> tuple[BKDTrainer, float]:
    trainer = trainer_for(tmp_path, **{"per_device_train_batch_size": 40, "max_steps": 1, **options})
    trainer.train()
    return trainer, trainer.state.log_history[0]["kd_loss"]


@pytest.mark.parametrize(("power", "p"), [("auto", 0.5), (0.25, 0.25), (0, 0.0)])
def test_trainer_distils_with_the_power(tmp_path, power, p):
    batch = torch.stack([example["pixel_values"] for example in images()])
    with torch.no_grad():
        student = resnet(0).train()(pixel_values=batch).logits
        teacher = resnet(1).eval()(pixel_values=batch).logits
    trainer, logged = one_step(
        tmp_path, model=resnet(0), teacher=resnet(1), method="bkd", class_balance_power=power, student_init="model"
    )
    assert trainer.bkd_objective.power == p
    expected = balanced_distillation_loss(student, teacher, WEIGHTS, 2.0, power=p)
    assert logged == pytest.approx(expected.item(), rel=1e-4)


# ---- The measured power


def test_measured_power_by_hand():
    weights = torch.tensor([1.0, math.e, math.e**2])
    logits = torch.tensor([[4.0, 1.0, 0.0], [0.0, 3.0, 2.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1, 2, 0])  # the last one is wrong already
    # At T = 2: the first is right up to p = min(3/2, 4/4) = 1, the second up to 1/2; the rarest class always is.
    assert strongest_power(logits, labels, weights, 2.0, share_kept=1.0) == 0.5
    assert strongest_power(logits[:1], labels[:1], weights, 2.0) == pytest.approx(1.0)
    assert strongest_power(logits[:1], labels[:1], weights, 1.5) == 1.0
    assert strongest_power(logits[1:2], labels[1:2], weights, 1.25) == pytest.approx(0.8)
    assert strongest_power(logits[3:], labels[3:], weights, 4.0) == 0.25  # nothing to keep


@given(st.integers(0, 2**20), st.floats(0.1, 30), st.floats(1, 5))
def test_measured_power_keeps_right_answers(seed, scale, temperature):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (200,), generator=generator)
    logits = torch.randn(200, 5, generator=generator).double()
    logits[torch.arange(200), labels] += 1
    logits *= scale
    power = strongest_power(logits, labels, WEIGHTS, temperature)
    assert 1 / temperature <= power <= min(1, 2 / temperature)
    right = logits.argmax(dim=1) == labels

    def kept(p: float) -> float:
        return (balanced_log_targets(logits, WEIGHTS, temperature, p).argmax(dim=1) == labels)[right].double().mean()

    if power > 1 / temperature:
        assert kept(power - 1e-6) >= 0.95
    if power < min(1, 2 / temperature):
        assert kept(power + 0.02) <= 0.96


def test_a_memorising_teacher_is_given_the_papers_power_and_an_unsure_one_bayes():
    labels = torch.arange(5)
    memorised = 20.0 * torch.eye(5)
    assert strongest_power(memorised, labels, WEIGHTS) == 1.0
    assert strongest_power(0.1 * torch.eye(5), labels, WEIGHTS) == 0.5
    # At a higher temperature p = 1 would remove the class frequencies more than twice.
    assert strongest_power(memorised, labels, WEIGHTS, temperature=4.0) == 0.5


@pytest.mark.parametrize(("power", "tau"), [("auto", 1.0), (1, 0.0), (0.75, 0.5), (0, 2.0), (3, 0.0)])
def test_labels_and_targets_ask_for_balanced_answers_on_average(tmp_path, power, tau):
    options = {"method": "bkd-calibrated", "class_balance_power": power, "student_init": "model"}
    trainer = trainer_for(tmp_path, model=resnet(0), per_device_train_batch_size=40, max_steps=1, **options)
    assert trainer.bkd_objective.tau == tau
    p = trainer.bkd_objective.power
    settled = {"class_balance_power": p, "distillation_prior": 1.0, "logit_adjustment_tau": tau}
    assert trainer.bkd_objective.settled == settled
    batch = torch.stack([example["pixel_values"] for example in images()])
    labels = torch.tensor([example["labels"] for example in images()])
    with torch.no_grad():
        expected = logit_adjustment_loss(resnet(0).train()(pixel_values=batch).logits, labels, COUNTS, tau)
    trainer.train()
    assert trainer.state.log_history[0]["ce_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_at_the_papers_power_the_loss_is_the_papers(tmp_path):
    losses = []
    for options in ({"method": "bkd"}, {"method": "bkd-calibrated", "class_balance_power": 1}):
        trainer = trainer_for(tmp_path, **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_without_a_teacher_the_labels_alone_are_balanced(tmp_path):
    trainer = trainer_for(tmp_path, teacher=None, method="bkd-calibrated", max_steps=1)
    assert trainer.bkd_objective.tau == 1.0
    trainer.train()  # there are no targets to look at, nor weights of theirs
    assert trainer.class_weights is None


@pytest.mark.parametrize("tau", ["nan", "inf", "most"])
def test_no_such_tau(tau):
    with pytest.raises(ValueError, match="--logit_adjustment_tau must be a finite number, or auto, got"):
        BKDConfig(output_dir="unused", use_cpu=True, method="logit-adjustment", logit_adjustment_tau=tau)
    with pytest.raises(
        ValueError, match="--logit_adjustment_tau must be a number with --distillation_loss none, or another --method"
    ):
        BKDConfig(output_dir="unused", use_cpu=True, method="logit-adjustment", logit_adjustment_tau="auto")


# ---- The look


def test_statistics_by_hand():
    counts = [200, 50, 5]
    targets = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6], [0.3, 0.4, 0.3]])
    teacher = torch.tensor([[2.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 1.0, 0]])
    labels = torch.tensor([0, 1, 0, 1])
    found = target_statistics(targets.log(), teacher, labels, counts)
    assert (found["num_images"], found["target_agreement"], found["teacher_agreement"]) == (4, 0.5, 1.0)
    assert found["mass"] == pytest.approx({"many_shot": 0.275, "medium_shot": 0.275, "few_shot": 0.45})
    assert found["labels"] == {"many_shot": 0.5, "medium_shot": 0.5, "few_shot": 0.0}
    assert (found["favoured_class"], found["favoured_share"], found["favoured_label_share"]) == (2, 0.5, 0.0)
    line = describe_targets({**found, "power": 0.5}, ["a", "b", "c"])
    assert "right for 50 % (teacher 100 %)" in line
    assert "few-shot classes 45 % (0 % of the examples); most often 'c', 50 % (0 % of the examples)" in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"target_agreement": 0.14}, "right for 14 % of the training examples, the teacher for 60 %"),
        ({"target_agreement": 0.16}, None),
        ({"favoured_share": 0.9, "favoured_label_share": 0.02}, "90 % of the distillation targets name 'b'"),
        ({"favoured_share": 0.9, "favoured_label_share": 0.2}, None),
    ],
)
def test_collapse(change, reason):
    fine = {"target_agreement": 0.5, "teacher_agreement": 0.6, "favoured_class": 1, "favoured_share": 0.3,
            "favoured_label_share": 0.3}  # fmt: skip
    found = why_collapsed({**fine, **change}, ["a", "b"])
    assert found is None if reason is None else reason in found


class Unsure(torch.nn.Module):
    """Answers alike for all images: the training frequencies."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return LOG_COUNTS.float().expand(len(pixel_values), 5)


class Balanced(Unsure):
    """Answers alike for all images: each class the same."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixel_values), 5)


class Sure(torch.nn.Module):
    """Knows all training images by heart, from their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.stack([example["pixel_values"] for example in images()]).flatten(1))
        self.register_buffer("labels", torch.tensor([example["labels"] for example in images()]))
        self.scale = torch.nn.Parameter(torch.tensor(50.0))

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        nearest = torch.cdist(pixel_values.flatten(1), self.seen).argmin(dim=1)
        return ImageClassifierOutput(logits=self.scale * torch.nn.functional.one_hot(self.labels[nearest], 5).float())


def test_a_look_at_a_teacher_that_is_outvoted(tmp_path):
    trainer = trainer_for(tmp_path, teacher=Unsure(), method="bkd")
    found = trainer.look_at_targets()
    assert found["num_images"] == 40
    assert found["teacher_agreement"] == 20 / 40
    assert found["favoured_class"] == 4  # the rarest: n^−2 · n
    assert "100 % of the distillation targets name '4'" in why_collapsed(found, list("01234"))
    calibrated = trainer_for(tmp_path, teacher=Unsure(), method="bkd", class_balance_power="auto").look_at_targets()
    assert calibrated["mass"]["few_shot"] == pytest.approx(
        1 - 1 / 5, abs=0.01
    )  # the class of 20 images is no few-shot


@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_a_loss_without_weights_has_none_that_could_be_measured(loss):
    options = {"distillation_loss": loss, "logit_adjustment_tau": 1.0}
    with pytest.raises(InputError, match=f"--distillation_loss {loss} does not go with .* Use --method {loss}"):
        BKDConfig(output_dir="unused", use_cpu=True, method="bkd-calibrated", **options)


def test_what_is_measured_is_about_the_logits_that_the_targets_see(tmp_path):
    options = {"method": "bkd-calibrated", "student_init": "model"}
    trainer = trainer_for(tmp_path, teacher=Sure(), logit_standardization=True, **options)
    found = trainer.look_at_targets()
    assert found["power"] < 0.9  # of the logits as they are, the teacher is too sure to be outvoted
    assert trainer_for(tmp_path, teacher=Sure(), **options).look_at_targets()["power"] == 1.0


def test_looking_changes_nothing_in_the_training(tmp_path):
    weights = []
    for looks in (False, True):
        trainer = trainer_for(tmp_path, model=vit(0), teacher=vit(1), method="bkd")
        if looks:
            trainer.look_at_targets()
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_a_look_at_part_of_the_images(tmp_path):
    assert trainer_for(tmp_path, method="bkd").look_at_targets(num_images=7)["num_images"] == 7


def test_a_look_with_a_partial_teacher(tmp_path):
    partial = FrozenTeacher(resnet(1), columns=[0, None, 2, 3, 4])
    found = trainer_for(tmp_path, teacher=partial, method="bkd").look_at_targets()
    assert found["num_images"] == 40 - COUNTS[1]
    assert math.isfinite(found["mass"]["few_shot"])
    unknowing = FrozenTeacher(resnet(1), columns=[None, None, None, None, 4])
    trainer = trainer_for(tmp_path, teacher=unknowing, method="bkd")
    with pytest.raises(InputError, match="No training example that was looked at is of a class that the teach"):
        trainer.look_at_targets(num_images=1)


def trainer_with_own_loss(tmp_path, **options) -> BKDTrainer:
    return BKDTrainer(
        model=resnet(1),
        teacher_model=resnet(2),
        args=config(tmp_path, **options),
        train_dataset=images(),
        distillation_loss=lambda s, t, y, w: ((s - t) ** 2 * w).mean(1),
    )


def test_nothing_to_look_at(tmp_path, monkeypatch):
    without_targets = Loss(lambda student_logits, teacher_logits: ((student_logits - teacher_logits) ** 2).sum(1))
    monkeypatch.setitem(DISTILLATION_LOSSES, "mse", without_targets)
    assert trainer_for(tmp_path, method="kd", distillation_loss="mse").look_at_targets() is None
    assert trainer_for(tmp_path, teacher=None, method="ce").look_at_targets() is None
    assert trainer_with_own_loss(tmp_path, method="bkd").look_at_targets() is None


def test_measured_needs_images_to_look_at(tmp_path):
    with pytest.raises(InputError, match="--class_balance_power measured looks at training examples first"):
        trainer_with_own_loss(tmp_path, method="bkd-calibrated")


def test_a_teacher_of_nothing_but_nan(tmp_path):
    teacher = resnet(1)
    torch.nn.init.constant_(teacher.classifier.weight, math.nan)
    with pytest.raises(TeacherLogitsError, match="not finite"):
        trainer_for(tmp_path, teacher=teacher, method="bkd").look_at_targets()


# ---- The prior in the teacher


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), kappa=st.floats(0, 1))
def test_the_prior_in_a_teacher_is_found(seed, kappa):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([4000, 1000, 300, 80, 20])
    labels = torch.repeat_interleave(torch.arange(5), counts // 20)
    noise = 0.3 * torch.randn(len(labels), 5, generator=generator, dtype=torch.float64)
    logits = noise + 2 * torch.nn.functional.one_hot(labels, 5) + kappa * counts.double().log()
    assert prior_in_teacher(logits, labels, counts) == pytest.approx(kappa, abs=0.1)
    memorised = logits + 50 * torch.nn.functional.one_hot(labels, 5)  # whose answers do not tell
    assert prior_in_teacher(memorised, labels, counts) == 1.0


@pytest.mark.parametrize("counts", [[400, 100, 20], [900, 300, 100, 30, 10]])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_the_prior_in_an_exact_teacher_of_few_classes_is_found(counts, kappa):
    counts, generator = torch.tensor(counts), torch.Generator().manual_seed(0)
    angles = torch.arange(len(counts)) * 2 * math.pi / len(counts)
    means = torch.stack([angles.cos(), angles.sin()], dim=1)  # each class as far from its neighbours
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    points = means[labels] + torch.randn(len(labels), 2, generator=generator)
    logits = -(torch.cdist(points, means) ** 2) / 2 + kappa * counts.log()
    assert prior_in_teacher(logits, labels, counts) == pytest.approx(kappa, abs=0.15)


def test_nothing_to_measure_is_all():
    assert prior_in_teacher(torch.randn(6, 3), torch.arange(6) % 3, [7, 7, 7]) == 1.0
    assert prior_in_teacher(torch.randn(6, 2), torch.arange(6) % 2, [70, 7]) == 1.0


def test_only_what_the_teacher_still_holds_is_taken_out(tmp_path):
    options = {"method": "bkd-calibrated", "class_balance_power": "auto", "distillation_prior": "teacher"}
    trainer = trainer_for(tmp_path, teacher=Balanced(), **options)
    kappa = trainer.look_at_targets()["prior_in_teacher"]
    assert kappa == pytest.approx(0, abs=1e-9)
    assert trainer.bkd_objective.tau == pytest.approx(1)  # the labels alone have to be balanced
    torch.testing.assert_close(trainer.class_weights, torch.ones(5))
    counts = trainer_for(tmp_path, teacher=Balanced(), **{**options, "distillation_prior": "counts"})
    torch.testing.assert_close(counts.class_weights, WEIGHTS.float() ** 0.5)
    assert "class frequencies in the teacher's confusions: κ = 0.00" in describe_targets(
        counts.look_at_targets(), list("01234")
    )


@pytest.mark.parametrize(("is_balanced", "is_warned_of"), [(None, True), (True, True), (False, False)])
def test_a_teacher_that_is_known_to_be_trained_plainly_is_not_called_balanced(tmp_path, is_balanced, is_warned_of):
    teacher, told = FrozenTeacher(Balanced()), []
    teacher.is_balanced = is_balanced
    trainer = trainer_for(tmp_path, teacher=teacher, method="bkd", class_balance_power="auto")
    tell_of_targets(trainer, list("01234"), told.append, are_forced=True)
    assert any("class frequencies only to a share of κ = 0.00, but" in line for line in told) == is_warned_of


def test_unsigned_labels_are_looked_at(tmp_path):
    unsigned = [{**example, "labels": torch.tensor(example["labels"], dtype=torch.uint8)} for example in images()]
    looks = [trainer_for(tmp_path, data=data, method="bkd").look_at_targets() for data in (images(), unsigned)]
    assert looks[0] == looks[1]


def test_no_such_prior(tmp_path):
    with pytest.raises(InputError, match="--distillation_prior must be one of auto, counts, teacher, got uniform"):
        BKDConfig(output_dir="unused", use_cpu=True, distillation_prior="uniform")
    with pytest.raises(InputError, match="--distillation_prior teacher looks at training examples first"):
        trainer_with_own_loss(tmp_path, method="bkd", distillation_prior="teacher").train()


# ---- The student's start


def test_the_student_starts_as_the_adjusted_teacher(tmp_path):
    teacher = vit(1)
    trainer = trainer_for(tmp_path, model=vit(0), teacher=teacher, method="bkd-calibrated")
    assert trainer.student_started_from_teacher
    batch = torch.stack([example["pixel_values"] for example in images()])
    with torch.no_grad():
        student = trainer.model.eval()(pixel_values=batch).logits.double()
        adjusted = post_hoc_logit_adjustment(teacher.eval()(pixel_values=batch).logits, COUNTS)
    difference = student - torch.from_numpy(adjusted)
    torch.testing.assert_close(difference, difference[:, :1].expand(-1, 5), rtol=0, atol=1e-5)
    labels = torch.tensor([example["labels"] for example in images()])
    ce = torch.nn.functional.cross_entropy(teacher(pixel_values=batch).logits, labels)
    assert balanced_softmax_loss(student, labels, COUNTS).item() == pytest.approx(ce.item(), rel=1e-5)


def test_a_loss_that_keeps_the_frequencies_keeps_the_teachers_head(tmp_path):
    teacher = vit(1)
    trainer = trainer_for(tmp_path, model=vit(0), teacher=teacher, method="kd", student_init="teacher")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), teacher.parameters(), strict=True))


def test_another_architecture_starts_from_its_own_weights(tmp_path):
    student = resnet(0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = trainer_for(tmp_path, model=student, teacher=vit(1), method="bkd-calibrated")
    assert not trainer.student_started_from_teacher
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    with pytest.raises(InputError, match=r"--student_init teacher: the student is a CifarResNet.*, the teacher a ViT"):
        trainer_for(tmp_path, model=resnet(0), teacher=vit(1), method="bkd", student_init="teacher")


def test_a_teacher_whose_outputs_are_in_another_order_gives_no_weights(tmp_path):
    teacher = FrozenTeacher(vit(1), columns=[1, 0, 2, 3, 4])
    assert not trainer_for(
        tmp_path, model=vit(0), teacher=teacher, method="bkd-calibrated"
    ).student_started_from_teacher


def test_a_teacher_that_has_learned_all_there_is_gives_no_weights(tmp_path):
    sure = Sure()
    options = {"method": "bkd-calibrated", "model": Sure(), "teacher": sure}
    trainer = trainer_for(tmp_path, **options)
    assert trainer.bkd_objective.power == 1
    assert not trainer.student_started_from_teacher
    assert trainer_for(tmp_path, **options, class_balance_power="auto").student_started_from_teacher
    assert trainer_for(tmp_path, **options, student_init="teacher").student_started_from_teacher


def test_a_head_of_class_means_is_not_mixed_with_the_teachers_weights(tmp_path):
    options = {"method": "bkd-calibrated", "class_balance_power": 0.5, "head_init": "class_mean"}
    trainer = trainer_for(tmp_path, model=vit(0), teacher=vit(1), **options)
    assert not trainer.student_started_from_teacher
    with pytest.raises(InputError, match=r"--head_init must be random with --student_init teacher"):
        trainer_for(tmp_path, model=vit(0), teacher=vit(1), **options, student_init="teacher")


def test_the_papers_student_starts_from_its_own_weights(tmp_path):
    student = vit(0)
    before = student.classifier.weight.clone()
    trainer = trainer_for(tmp_path, model=student, teacher=vit(1), method="bkd")
    assert torch.equal(trainer.model.classifier.weight, before)
