from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_hf import (
    balanced_distillation_loss,
    balanced_softmax_loss,
    bkd_loss,
    class_balanced_weights,
    cross_entropy_loss,
    dist_loss,
    dive_loss,
    dkd_loss,
    focal_loss,
    kd_loss,
    ldam_loss,
    logit_adjustment_loss,
    ltkd_loss,
    wsl_loss,
)
from bkd_hf.losses import dive_log_targets, ltkd_log_targets


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
        (
            "kd_total_class_balanced_ce",
            lambda s, t, y, w, c: (
                cross_entropy_loss(s, y, class_weights=w) + c["alpha"] * kd_loss(s, t, c["temperature"])
            ),
        ),
        ("cross_entropy", lambda s, t, y, w, c: cross_entropy_loss(s, y)),
        ("class_balanced_cross_entropy", lambda s, t, y, w, c: cross_entropy_loss(s, y, class_weights=w)),
        ("focal_gamma1", lambda s, t, y, w, c: focal_loss(s, y, gamma=1.0)),
        ("class_balanced_focal_gamma1", lambda s, t, y, w, c: focal_loss(s, y, gamma=1.0, class_weights=w)),
        # The reference's cosines are the student's logits / 10; ours already hold the scale 30.
        ("ldam_on_cosine_logits_max_m0.5_s30", lambda s, t, y, w, c: ldam_loss(30 * s / 10, y, c["class_counts"])),
        (
            "class_balanced_ldam_on_cosine_logits_max_m0.5_s30",
            lambda s, t, y, w, c: ldam_loss(30 * s / 10, y, c["class_counts"], 0.5, 30.0, class_weights=w),
        ),
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


@settings(max_examples=50)
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
    assert (of_itself > -1e-12).all()
    if weights.max() / weights.min() > 1.5:
        # Only rounding is left of the difference where a class has next to no probability to move.
        movable = (teacher / temperature).softmax(-1).min(-1).values > 1e-6
        assert (of_itself[movable] > 0).all()
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


def test_labels_may_be_of_any_integer_type():
    """−100 would be 156 in uint8."""
    student, teacher, _ = random_batch(0, 2, 200)
    labels = torch.tensor([156, 3])
    for loss in (
        lambda y: cross_entropy_loss(student, y), lambda y: bkd_loss(student, teacher, y, None),
        lambda y: dist_loss(student, teacher, y), lambda y: wsl_loss(student, teacher, y),
    ):  # fmt: skip
        assert torch.equal(loss(labels.to(torch.uint8)), loss(labels))
    torch.testing.assert_close(cross_entropy_loss(student, labels.to(torch.uint8)), F.cross_entropy(student, labels))


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


# ---- The other methods


COUNTS = [100, 50, 20, 10, 5]
WEIGHTS = class_balanced_weights(COUNTS)
CLASSIFICATION = {
    "cross_entropy": cross_entropy_loss,
    "focal": focal_loss,
    "ldam": lambda z, y, **kwargs: ldam_loss(z, y, COUNTS[: z.shape[1]], **kwargs),
    "balanced_softmax": lambda z, y, **kwargs: balanced_softmax_loss(z, y, COUNTS[: z.shape[1]], **kwargs),
    "logit_adjustment": lambda z, y, **kwargs: logit_adjustment_loss(z, y, COUNTS[: z.shape[1]], 1.5, **kwargs),
}
DISTILLATION = {
    "kd": lambda s, t, y, **kwargs: kd_loss(s, t, **kwargs),
    "bkd": lambda s, t, y, **kwargs: balanced_distillation_loss(s, t, None, **kwargs),
    "dive": lambda s, t, y, **kwargs: dive_loss(s, t, **kwargs),
    "dkd": lambda s, t, y, **kwargs: dkd_loss(s, t, y, **kwargs),
    "kd of standardized logits": lambda s, t, y, **kwargs: kd_loss(s, t, standardize=True, **kwargs),
    "wsl": wsl_loss,
    "dist": dist_loss,
    "ltkd": lambda s, t, y, **kwargs: ltkd_loss(s, t, y, COUNTS[: s.shape[1]], **kwargs),
}


def test_hand_computed_values_of_the_other_methods():
    zeros, label = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])
    # p = 1/2: (1 − p)² · log 2
    assert focal_loss(zeros, label, gamma=2.0).item() == pytest.approx(0.25 * math.log(2))
    # With class counts (3, 1) the rare class has 1/4 of the mass.
    assert balanced_softmax_loss(zeros, label, [3, 1]).item() == pytest.approx(math.log(4))
    assert logit_adjustment_loss(zeros, label, [3, 1], tau=2.0).item() == pytest.approx(math.log(10))
    # Class counts (16, 1): margins (1/4, 1/2); at scale 2 the label's logit loses 1.
    assert ldam_loss(zeros, label, [16, 1], 0.5, 2.0).item() == pytest.approx(math.log(1 + math.e))
    # The teacher (log 4, 0) to the power 1/2 is (2/3, 1/3).
    teacher = torch.tensor([[math.log(4), 0.0]], dtype=torch.float64)
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert dive_loss(zeros, teacher, temperature=1.0, power=0.5).item() == pytest.approx(expected)
    # Two classes: there is one other class, whose distribution is certain, so β has no effect.
    expected = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert dkd_loss(zeros, teacher, label, 1.0, alpha=1.0, beta=99.0).item() == pytest.approx(expected)


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 10), alpha=st.floats(0, 5), beta=st.floats(0, 10))
def test_decoupled_distillation_is_its_definition(seed, temperature, alpha, beta):
    student, teacher, labels = random_batch(seed)
    of_label = F.one_hot(labels, 5).bool()
    p_s, p_t = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    b_s, b_t = (torch.stack([p[of_label], 1 - p[of_label]], dim=1) for p in (p_s, p_t))
    q_s, q_t = (p.masked_fill(of_label, 0) / (1 - p[of_label])[:, None] for p in (p_s, p_t))
    target = (b_t * (b_t / b_s).log()).sum(1)
    others = torch.where(of_label, 0.0, q_t * (q_t / q_s).log()).sum(1)
    expected = temperature**2 * (alpha * target + beta * others)
    actual = dkd_loss(student, teacher, labels, temperature, alpha, beta, "none")
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    # α = 1 and β = 1 − p of the teacher is plain distillation (Zhao et al., eq. 5).
    beta_of_kd = 1 - p_t[of_label]
    parts = dkd_loss(student, teacher, labels, temperature, 1.0, 0.0, "none")
    parts += beta_of_kd * dkd_loss(student, teacher, labels, temperature, 0.0, 1.0, "none")
    torch.testing.assert_close(parts, kd_loss(student, teacher, temperature, "none"), rtol=1e-7, atol=1e-8)


def test_weighted_soft_labels_are_their_definition():
    student, teacher, labels = random_batch(1)
    ratio = F.cross_entropy(student, labels, reduction="none") / F.cross_entropy(teacher, labels, reduction="none")
    expected = (1 - torch.exp(-ratio)) * kd_loss(student, teacher, 3.0, "none")
    torch.testing.assert_close(wsl_loss(student, teacher, labels, 3.0, "none"), expected, rtol=1e-6, atol=1e-8)
    # The weights are constants: the gradient is that of kd, weighted.
    student.requires_grad_()
    (actual,) = torch.autograd.grad(wsl_loss(student, teacher, labels, 3.0, "sum"), student)
    weighted = (1 - torch.exp(-ratio)) * kd_loss(student, teacher, 3.0, "none")
    torch.testing.assert_close(actual, torch.autograd.grad(weighted.sum(), student)[0], rtol=1e-6, atol=1e-8)


def test_correlation_of_classes_and_of_examples_is_its_definition():
    student, teacher, labels = random_batch(2)
    p_s, p_t = ((z / 4).softmax(-1).numpy() for z in (student, teacher))
    of_examples = [np.corrcoef(a, b)[0, 1] for a, b in zip(p_s, p_t, strict=True)]
    of_classes = [np.corrcoef(a, b)[0, 1] for a, b in zip(p_s.T, p_t.T, strict=True)]
    expected = 16 * (3 * (1 - torch.tensor(of_examples)) + 0.5 * (1 - np.mean(of_classes)))
    actual = dist_loss(student, teacher, labels, 4.0, 3.0, 0.5, "none")
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert dist_loss(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-9)
    assert dist_loss(student[:1], teacher[:1], labels[:1], beta=0.0).isfinite()  # one example correlates with nothing


def test_groups_of_classes_are_balanced_as_defined():
    student, teacher, labels = random_batch(3, batch=8, classes=7)
    counts, temperature = [5, 100, 50, 400, 10, 20, 200], 3.0
    groups = [[3, 6], [1, 2, 5], [4, 0]]  # thirds of the classes, the largest first
    p_s, p_t = ((z / temperature).softmax(-1) for z in (student, teacher))
    b_s, b_t = (torch.stack([p[:, group].sum(1) for group in groups], dim=1) for p in (p_s, p_t))
    balanced = b_t / (3 * b_t.mean(0))
    balanced = balanced / balanced.sum(1, keepdim=True)
    between = (balanced * (balanced / b_s).log()).sum(1)
    within = torch.zeros(8, dtype=torch.float64)
    targets = torch.zeros_like(p_t)
    for index, group in enumerate(groups):
        q_s, q_t = (p[:, group] / p[:, group].sum(1, keepdim=True) for p in (p_s, p_t))
        within += (q_t * (q_t / q_s).log()).sum(1)
        targets[:, group] = balanced[:, [index]] * q_t
    expected = temperature**2 * (2 * between + 0.5 * within)
    actual = ltkd_loss(student, teacher, labels, counts, temperature, 2.0, 0.5, "none")
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    log_targets = ltkd_log_targets(teacher, counts, temperature)
    torch.testing.assert_close(log_targets, targets.log(), rtol=1e-9, atol=1e-9)
    of_itself = ltkd_loss(temperature * log_targets, teacher, labels, counts, temperature, reduction="none")
    torch.testing.assert_close(of_itself, torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_standardized_logits_have_no_size(seed, scale, shift):
    student, teacher, _ = random_batch(seed)
    z_s, z_t = ((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) for z in (student, teacher))
    expected = balanced_distillation_loss(z_s, z_t, WEIGHTS, 2.0, "none")
    actual = balanced_distillation_loss(scale * student + shift, teacher, WEIGHTS, 2.0, "none", standardize=True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), tau=st.floats(-2, 2))
def test_methods_contain_each_other(seed, tau):
    logits, teacher, labels = random_batch(seed)
    ce = cross_entropy_loss(logits, labels, reduction="none")
    same = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(focal_loss(logits, labels, 0.0, "none"), ce, **same)
    torch.testing.assert_close(ldam_loss(logits, labels, COUNTS, 0.0, reduction="none"), ce, **same)
    torch.testing.assert_close(logit_adjustment_loss(logits, labels, COUNTS, 0.0, reduction="none"), ce, **same)
    torch.testing.assert_close(logit_adjustment_loss(logits, labels, [7] * 5, tau, reduction="none"), ce, **same)
    torch.testing.assert_close(
        balanced_softmax_loss(logits, labels, COUNTS), logit_adjustment_loss(logits, labels, COUNTS, 1.0), **same
    )
    torch.testing.assert_close(dive_loss(logits, teacher, 2.0, power=1.0), kd_loss(logits, teacher, 2.0), **same)
    assert (ldam_loss(logits, labels, COUNTS, reduction="none") > ce).all()  # a margin only makes it harder


@pytest.mark.parametrize("loss", CLASSIFICATION.values(), ids=CLASSIFICATION)
def test_class_weights_of_classification(loss):
    logits, _, labels = random_batch(4)
    weighted = loss(logits, labels, class_weights=WEIGHTS, reduction="none")
    if loss is not focal_loss:
        torch.testing.assert_close(weighted, WEIGHTS[labels] * loss(logits, labels, reduction="none"))
        torch.testing.assert_close(loss(logits, labels, class_weights=WEIGHTS), weighted.sum() / WEIGHTS[labels].sum())
    uniform = loss(logits, labels, class_weights=torch.ones(5))
    torch.testing.assert_close(uniform, loss(logits, labels))


@pytest.mark.parametrize("loss", CLASSIFICATION.values(), ids=CLASSIFICATION)
def test_classification_ignores_what_is_to_be_ignored(loss):
    logits, _, labels = random_batch(5)
    kept = torch.tensor([True, False, True, True, False, True])
    ignoring = torch.where(kept, labels, -100)
    for weights in (None, WEIGHTS):
        expected = loss(logits[kept], labels[kept], class_weights=weights)
        torch.testing.assert_close(loss(logits, ignoring, class_weights=weights), expected)
        assert (loss(logits, ignoring, class_weights=weights, reduction="none")[~kept] == 0).all()


@pytest.mark.parametrize("name", ["dkd", "wsl", "dist", "ltkd"])
def test_distillation_ignores_what_is_to_be_ignored(name):
    student, teacher, labels = random_batch(6)
    kept = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(
        DISTILLATION[name](student, teacher, torch.where(kept, labels, -100)),
        DISTILLATION[name](student[kept], teacher[kept], labels[kept]),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*CLASSIFICATION, *DISTILLATION])
def test_all_methods_are_finite_for_extreme_logits(dtype, name):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4] * 3, [0.0, 0.0, 1e4]]).to(dtype).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4], [-1e4] * 3, [1e4, 0.0, 0.0]]).to(dtype)
    labels = torch.tensor([0, 0, 1, 2])
    if name in CLASSIFICATION:
        loss = CLASSIFICATION[name](student, labels)
    else:
        loss = DISTILLATION[name](student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_focal_gradient_is_finite_where_the_model_is_certain():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    for gamma in (0.5, 1.0, 2.0):
        (gradient,) = torch.autograd.grad(focal_loss(logits, torch.tensor([0]), gamma), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", DISTILLATION)
def test_no_gradient_reaches_the_teacher(name):
    student, teacher, labels = random_batch(7)
    DISTILLATION[name](student.requires_grad_(), teacher.requires_grad_(), labels).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t, y: focal_loss(s, y, gamma=-1), "gamma must be"),
        (lambda s, t, y: ldam_loss(s, y, [1, 2, 3]), "5 classes, the counts have shape"),
        (lambda s, t, y: ldam_loss(s, y, COUNTS, max_margin=-0.1), "max_margin must be"),
        (lambda s, t, y: ldam_loss(s, y, COUNTS, scale=0), "scale must be"),
        (lambda s, t, y: balanced_softmax_loss(s, y, [5, 4, 3, 2, 0]), "no training example .first: class 4."),
        (lambda s, t, y: logit_adjustment_loss(s, y, COUNTS, float("nan")), "tau must be"),
        (lambda s, t, y: dive_loss(s, t, power=0), "power must be"),
        (lambda s, t, y: dive_loss(s, t, temperature=0), "temperature must be"),
        (lambda s, t, y: dkd_loss(s, t, y, beta=-1), "beta must be"),
        (lambda s, t, y: dist_loss(s, t, y, gamma=math.inf), "gamma must be"),
        (lambda s, t, y: ltkd_loss(s, t, y, COUNTS, alpha=-1), "alpha must be"),
        (lambda s, t, y: ltkd_loss(s, t, y, COUNTS[:4]), "the logits have 5 classes, the counts have shape .4"),
        (lambda s, t, y: ltkd_loss(s[:, :2], t[:, :2], y * 0, COUNTS[:2]), "at least 3 classes"),
        (lambda s, t, y: ltkd_loss(s, t, y, [-1, *COUNTS[1:]]), "whole numbers ≥ 0, got -1.0 for class 0"),
        (lambda s, t, y: wsl_loss(s, t, y, temperature=-1), "temperature must be"),
        (lambda s, t, y: dkd_loss(s, t, y + 5), "is outside the range of the 5 classes"),
        (lambda s, t, y: cross_entropy_loss(s, y + 5, class_weights=WEIGHTS), "is outside the range"),
        (
            lambda s, t, y: cross_entropy_loss(s, y, class_weights=torch.ones(7)),
            r"5 classes, the weights have shape \(7",
        ),
        (lambda s, t, y: focal_loss(s, y, class_weights=torch.ones(3)), r"5 classes, the weights have shape \(3"),
        (lambda s, t, y: ldam_loss(s, y, COUNTS, class_weights=-WEIGHTS), "positive and finite"),
        (
            lambda s, t, y: balanced_softmax_loss(s, y, COUNTS, class_weights=torch.full((5,), math.nan)),
            "positive and",
        ),
        (lambda s, t, y: dkd_loss(s, t[:, :3], y), "the student has 5, the teacher 3"),
    ],
)
def test_bad_input_of_the_other_methods(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_batch(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: cross_entropy_loss(z, y, 1.5), "label_smoothing must be in"),
        (lambda z, y: cross_entropy_loss(z, y, -1), "label_smoothing must be in"),
        (lambda z, y: balanced_softmax_loss(z, y, [3, 2], math.nan), "label_smoothing must be in"),
        (lambda z, y: balanced_distillation_loss(z, z, torch.ones(2), power="foo"), "power must be a finite number"),
        (lambda z, y: dive_log_targets(z, 0.0), "temperature must be a finite number > 0"),
        (lambda z, y: ltkd_log_targets(z, [3, 2, 1], 0.0), "temperature must be a finite number > 0"),
        (lambda z, y: dkd_loss(z[:, :1], z[:, :1], y * 0), "dkd needs at least 2 classes, got 1"),
    ],
)
def test_what_is_out_of_range_is_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
