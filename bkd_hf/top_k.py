"""Caching only the teacher's k best classes instead of all C: 2 GB of logits instead of 100."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .loss_inputs import (
    Reduction,
    at_least_float32,
    check_positive,
    log_weights,
    reduce,
    softened_divergence,
    standardized,
)


@dataclass(frozen=True)
class TopK:
    """What is kept of a teacher's logits: those of the k best classes, and the log-mass of all others.

    The best classes are those with the largest target probability. The mass of the others is that in the target: the
    log-sum-exp of z_t/T + p · log w over *them*, each with its own weight, so it is valid for one T, p and w.

    Args:
        k: Number of classes, 1 ≤ k < C.
        shifts: R×C logarithms of the class weights, p · log w, one row for each phase of the training: the last for
            its end; with deferred weights, the first (zeros) for its beginning.
        temperature: T > 0.
        standardize: Whether logits are standardized first.
    """

    k: int
    shifts: torch.Tensor
    temperature: float = 2.0
    standardize: bool = False

    def take(self, logits: torch.Tensor) -> torch.Tensor:
        """Return rows of 2k + R numbers: k logits and the numbers of their classes, and R logarithms of the rest.

        Args:
            logits: B×C, finite; computations use float32 at least.
        """
        (logits,) = at_least_float32(logits)
        logits = standardized(logits) if self.standardize else logits
        targets = logits[:, None] / self.temperature + self.shifts.to(logits)  # B×R×C
        classes = F.log_softmax(targets, dim=-1).amax(dim=1).topk(self.k).indices
        rest = targets.scatter(2, classes[:, None].expand(-1, len(self.shifts), -1), -torch.inf).logsumexp(dim=-1)
        return torch.cat([logits.gather(1, classes), classes.to(logits.dtype), rest], dim=1)

    def describe(self) -> dict[str, Any]:
        """Return everything that the rows depend on beside the logits."""
        shifts = hashlib.blake2b(self.shifts.cpu().numpy().tobytes(), digest_size=16).hexdigest()
        return {"k": self.k, "temperature": self.temperature, "standardize": self.standardize, "shifts": shifts}


def top_k_distillation_loss(
    student_logits: torch.Tensor,
    top_k: torch.Tensor,
    class_weights: torch.Tensor | None,
    k: int,
    phase: int = -1,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
    standardize: bool = False,
) -> torch.Tensor:
    """Class-balanced distillation from the teacher's k best classes.

        T² · KL( (q_1, …, q_k, q_R) ‖ (s_1, …, s_k, s_R) ),    q = softmax(z_t/T + p · log w),  s = softmax(z_s/T)

    where R combines all other classes, with the sum of their probabilities. All these q and s are exact, including the
    weight of each class in q_R and s_R. The student learns how much mass the rest has, but not how the teacher divides
    it. The missing part of the full loss is never negative, and weighted by the mass of the rest:

        T² · q_R · KL( q restricted to R ‖ s restricted to R )

    It is 0 for k = C − 1.

    Args:
        student_logits: B×C.
        top_k: B×(2k + R), from [`TopK.take`], with the same T, weights and standardization.
        class_weights: C positive weights of this phase, to the power p; `None` for 1.
        k: Number of classes.
        phase: Index of these weights among the R logarithms of the rest.
        temperature: T > 0.
        reduction: As for all losses.
        standardize: Whether z_s is standardized, as z_t was.
    """
    check_positive(temperature=temperature)
    student_logits, top_k = at_least_float32(student_logits, top_k.detach())
    classes, targets = top_k[:, k : 2 * k].long(), top_k[:, :k] / temperature
    if class_weights is not None:
        targets = targets + log_weights(class_weights, like=student_logits)[classes]
    log_q = F.log_softmax(torch.cat([targets, top_k[:, 2 * k :][:, phase, None]], dim=1), dim=-1)
    student_logits = (standardized(student_logits) if standardize else student_logits) / temperature
    rest = student_logits.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
    # k + 1 logits, whose softmax gives these probabilities.
    student = torch.cat([student_logits.gather(1, classes), rest], dim=1)
    return reduce(temperature**2 * softened_divergence(log_q, student, 1.0), reduction)
