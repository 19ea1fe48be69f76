from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_hf import balanced_distillation_loss, bkd_loss, class_balanced_weights, cross_entropy_loss, kd_loss


def random_batch(seed: int, batch: int = 6, classes: int = 5, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(batch, classes, generator=generator, dtype=dtype)
    teacher = 3 * torch.randn(batch, classes, generator=generator, dtype=dtype)
    labels = torch.randint(classes, (batch,), generator=generator)
    return student, teacher, labels


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("bkd_total", lambda s, t, y, w, c: bkd_loss(s, t, y, w, c["temperature"], c["alpha"])),
        ("bkd_distillation_only", lambda s, t, y, w, c: balanced_distillation_loss(s, t, w, c["temperature"])),
        ("kd_total_unweighted", lambda s, t, y, w, c: bkd_loss(s, t, y, None, c["temperature"], c["alpha"])),
        ("cross_entropy", lambda s, t, y, w, c: cross_entropy_loss(s, y)),
    ],
)
def test_values_and_gradients_are_those_of_the_reference(golden, number, name, loss):
    case = golden["cases"][number]
    student = torch.tensor(case["student_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(case["teacher_logits"], dtype=torch.float64, requires_grad=True)
    weights = class_balanced_weights(case["class_counts"], case["beta"])
    value = loss(student, teacher, torch.tensor(case["labels"]), weights, case)
    value.backward()
    assert value.item() == pytest.approx(case[name]["loss"], abs=1e-10)
    expected = torch.tensor(case[name]["student_logit_gradient"], dtype=torch.float64)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-10)
    assert teacher.grad is None


def test_hand_computed_value():
    # Teacher (0, 0) with weights (1, 3) at T = 1 is the target (1/4, 3/4); the student answers (1/2, 1/2).
    loss = balanced_distillation_loss(
        torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2), torch.tensor([1.0, 3.0]), temperature=1.0
    )
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)


def test_the_target_multiplies_the_softened_probabilities_by_the_weights():
    student, teacher, _ = random_batch(0)
    weights, temperature = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64), 3.0
    target = (teacher / temperature).softmax(-1) * weights
    target = target / target.sum(-1, keepdim=True)
    expected = (target * (target.log() - (student / temperature).log_softmax(-1))).sum(-1) * temperature**2
    actual = balanced_distillation_loss(student, teacher, weights, temperature, reduction="none")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 20),
    scale=st.floats(1e-3, 1e3),
    weights=st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
)
def test_weights_act_on_classes(seed, temperature, scale, weights):
    student, teacher, _ = random_batch(seed)
    uniform = torch.full((5,), scale, dtype=torch.float64)
    plain = kd_loss(student, teacher, temperature, reduction="none")
    same = balanced_distillation_loss(student, teacher, uniform, temperature, reduction="none")
    torch.testing.assert_close(same, plain, rtol=1e-9, atol=1e-12)

    weights = torch.tensor(weights, dtype=torch.float64)
    balanced = balanced_distillation_loss(student, teacher, weights, temperature, reduction="none")
    rescaled = balanced_distillation_loss(student, teacher, scale * weights, temperature, reduction="none")
    torch.testing.assert_close(rescaled, balanced, rtol=1e-9, atol=1e-12)
    # A weight per example would leave a student that equals its teacher without loss; one per class does not.
    of_itself = balanced_distillation_loss(teacher, teacher, weights, temperature, reduction="none")
    if weights.max() / weights.min() > 1.5:
        assert (of_itself > 0).all()
    # Permuting the classes together changes nothing.
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    permuted = balanced_distillation_loss(student[:, order], teacher[:, order], weights[order], temperature, "none")
    torch.testing.assert_close(permuted, balanced, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10_000])
def test_finite_for_extreme_logits(dtype, classes):
    student = torch.zeros(3, classes)
    teacher = torch.zeros(3, classes)
    student[0, 0], student[1, 1], student[2] = 1e4, -1e4, 1e4
    teacher[0, 1], teacher[1, 0], teacher[2, 0] = 1e4, 1e4, -1e4
    student = student.to(dtype).requires_grad_()
    weights = class_balanced_weights([5000] * (classes - 1) + [1], beta=0.9999)
    for temperature in (0.5, 2.0):
        loss = bkd_loss(student, teacher.to(dtype), torch.zeros(3, dtype=torch.long), weights, temperature)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.isfinite().all()


def test_reductions():
    student, teacher, labels = random_batch(1)
    weights = class_balanced_weights([100, 50, 20, 10, 5])
    each = bkd_loss(student, teacher, labels, weights, reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(bkd_loss(student, teacher, labels, weights, reduction="sum"), each.sum())
    torch.testing.assert_close(bkd_loss(student, teacher, labels, weights), each.mean())
    with pytest.raises(ValueError, match="reduction"):
        bkd_loss(student, teacher, labels, weights, reduction="average")


def test_ignored_examples_count_for_nothing():
    student, teacher, labels = random_batch(2)
    kept = torch.tensor([True, False, True, True, False, True])
    ignoring = torch.where(kept, labels, -100)
    expected = bkd_loss(student[kept], teacher[kept], labels[kept], None)
    torch.testing.assert_close(bkd_loss(student, teacher, ignoring, None), expected)
    torch.testing.assert_close(cross_entropy_loss(student, ignoring), F.cross_entropy(student, ignoring))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"alpha": -0.1}, "alpha must be"),
        ({"class_weights": torch.ones(4)}, "5 classes"),
        ({"class_weights": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])}, "positive"),
        ({"teacher_logits": torch.zeros(6, 4)}, "the student has 5, the teacher 4"),
        ({"teacher_logits": torch.zeros(3, 5)}, "same batch"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 5])}, "Label 5 is outside the range of the 5 classes"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, -1])}, "Label -1"),
        ({"labels": torch.zeros(6)}, "one integer label per example"),
    ],
)
def test_bad_input(arguments, message):
    student, teacher, labels = random_batch(3)
    good = {
        "student_logits": student,
        "teacher_logits": teacher,
        "labels": labels,
        "class_weights": None,
        "temperature": 2.0,
        "alpha": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        bkd_loss(**{**good, **arguments})
