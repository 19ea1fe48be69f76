"""What is lost with the teacher's k best classes instead of all."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_hf.losses import balanced_distillation_loss, balanced_log_targets, class_balanced_weights
from bkd_hf.top_k import TopK, top_k_distillation_loss


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(3, 40), st.floats(0.5, 4), st.sampled_from([None, 0.5, 1.0]), st.booleans(),
    st.data(),
)  # fmt: skip
def test_what_the_top_k_leave_out(seed, num_classes, temperature, power, standardize, data):
    """The loss over all classes is that over the k best and the rest, and what the rest weighs."""
    k, generator = data.draw(st.integers(1, num_classes - 1)), torch.Generator().manual_seed(seed)
    z_s, z_t = 4 * torch.randn(2, 5, num_classes, generator=generator, dtype=torch.float64)
    w = class_balanced_weights(torch.randint(1, 1000, (num_classes,), generator=generator))
    w = None if power is None else w**power
    shifts = torch.zeros(1, num_classes, dtype=torch.float64) if w is None else w.log()[None]
    rows = TopK(k, shifts, temperature, standardize).take(z_t)
    z_s.requires_grad_(k == num_classes - 1)
    found = top_k_distillation_loss(z_s, rows, w, k, -1, temperature, "none", standardize)
    whole = balanced_distillation_loss(z_s, z_t, w, temperature, "none", 1.0, standardize)
    if k == num_classes - 1:  # the rest is a class
        gradients = [torch.autograd.grad(loss.sum(), z_s)[0] for loss in (found, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
        z_s = z_s.detach()
    log_q = balanced_log_targets(z_t, w, temperature, 1.0, standardize)
    log_s = balanced_log_targets(z_s, None, temperature, 1.0, standardize)
    assert torch.equal(rows[:, k : 2 * k].long().sort().values, log_q.topk(k).indices.sort().values)
    left = torch.ones_like(log_q, dtype=bool).scatter(1, rows[:, k : 2 * k].long(), False)
    q, s = (x.masked_fill(~left, -torch.inf).log_softmax(dim=1) for x in (log_q, log_s))
    inside = torch.where(left, q.exp() * (q - s), 0.0).sum(dim=1)
    missing = temperature**2 * torch.where(left, log_q.exp(), 0.0).sum(dim=1) * inside
    torch.testing.assert_close(found.detach() + missing, whole.detach(), rtol=1e-9, atol=1e-9)
    assert (missing >= -1e-12).all()


def test_rows_tell_what_they_are_for():
    shifts = torch.zeros(1, 5)
    others = TopK(2, shifts), TopK(3, shifts), TopK(2, shifts, 3.0), TopK(2, shifts + 1), TopK(2, shifts, 2.0, True)
    assert len({str(each.describe()) for each in others}) == 5
