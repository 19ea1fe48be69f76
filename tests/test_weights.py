from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bkd_hf import class_balanced_weights, deferred_weights

counts_lists = st.lists(st.integers(1, 100_000), min_size=2, max_size=30)


@pytest.mark.parametrize("number", range(4))
def test_equals_the_reference(golden, number):
    case = golden["cases"][number]
    weights = class_balanced_weights(case["class_counts"], case["beta"])
    expected = torch.tensor(case["class_weights"], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)


@given(counts=counts_lists, beta=st.floats(0, 1, exclude_max=True))
def test_laws(counts, beta):
    weights = class_balanced_weights(counts, beta)
    assert weights.dtype == torch.float64
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-9)
    assert (weights > 0).all()
    # The rarer the class, the larger its weight.
    order = np.argsort(counts)
    assert (torch.diff(weights[order]) <= 1e-9).all()


@given(counts=counts_lists)
def test_limits(counts):
    torch.testing.assert_close(class_balanced_weights(counts, beta=0.0), torch.ones(len(counts), dtype=torch.float64))
    inverse = 1 / torch.tensor(counts, dtype=torch.float64)
    expected = inverse * len(counts) / inverse.sum()
    torch.testing.assert_close(class_balanced_weights(counts, beta=1 - 1e-12), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_kinds_of_counts(kind):
    torch.testing.assert_close(class_balanced_weights(kind([9, 3, 1])), class_balanced_weights([9, 3, 1]))


def test_classes_without_images():
    with pytest.raises(ValueError, match=r"1 of 3 classes has no training example \(first: class 1\)"):
        class_balanced_weights([5, 0, 2])
    torch.testing.assert_close(class_balanced_weights([5, 0, 2], missing="clamp"), class_balanced_weights([5, 1, 2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], 1.0), "beta"),
        (([1, 2], -0.1), "beta"),
        (([1, 2], float("nan")), "beta"),
        (([1, -2],), "whole numbers"),
        (([1, 2.5],), "whole numbers"),
        (([],), "one number per class"),
        (([1, 2], 0.9, "ignore"), "missing"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        class_balanced_weights(*arguments)


@pytest.mark.parametrize(
    ("start", "epoch", "balanced"),
    [
        (None, 0.0, True),
        (0, 0.0, True),
        (160, 159.99, False),
        (160, 160.0, True),
        (0.8, 159.9, False),
        (0.8, 160, True),
    ],
)
def test_deferral(start, epoch, balanced):
    weights = class_balanced_weights([100, 10, 1])
    in_force = deferred_weights(weights, start, epoch, num_epochs=200)
    assert torch.equal(in_force, weights if balanced else torch.ones_like(weights))


@pytest.mark.parametrize("num_epochs", [10, 20, 50, 100, 200, 300])
def test_deferral_begins_with_the_epoch_that_a_fraction_names(num_epochs):
    """0.14 · 50 is above 7 in floating point."""
    weights = class_balanced_weights([100, 1])
    for percent in (number for number in range(1, 100) if number * num_epochs % 100 == 0):
        start, epoch = percent / 100, percent * num_epochs // 100
        assert torch.equal(deferred_weights(weights, start, epoch, num_epochs), weights)
        assert torch.equal(deferred_weights(weights, start, epoch - 0.01, num_epochs), torch.ones_like(weights))
