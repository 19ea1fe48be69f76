"""The head of a classifier: finding it, training it alone, removing the class frequencies from its bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from .config import BKDConfig
from .data import choose_per_class
from .errors import InputError
from .modeling_cosine_head import CosineHeadForImageClassification

_NAMES = {"classifier", "head", "fc", "cls_classifier", "distillation_classifier", "classifier_distill"}
#: Maximal numbers of training images, per class and in total, to which a head's bias is fitted.
IMAGES_PER_CLASS, NUM_IMAGES = 100, 20_000
#: A class is favoured if it is predicted more than `TOO_OFTEN` times as often as it occurs. On training images, a fit
#: allows only `OFTEN` times, which leaves room for unseen images.
TOO_OFTEN, OFTEN = 3.0, 1.25
#: A class with n images gets the weight n / (n + FEW), as few images say little about unseen ones.
FEW = 5
#: Smallest step of [`least_lowering`], in logits, and most steps per class (100 classes needed 6 each).
_STEP, _ROUNDS_PER_CLASS = 1e-3, 30


def num_labels(model: nn.Module) -> int | None:
    """Return a model's number of classes, if its configuration has it."""
    return getattr(getattr(model, "config", None), "num_labels", None)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules, by name, that map a classifier's features to logits."""
    if isinstance(model, CosineHeadForImageClassification):
        name = f"model.{model.config.head_name}"
        return {name: model.get_submodule(name)}
    found = {name: module for name, module in model.named_children() if name in _NAMES}
    if found:
        return found
    last = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "shape", (None,))[0] == num_labels(model)
    ]
    return dict(last[-1:])


def the_head(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the head by name, as [`head_modules`].

    Raises:
        InputError: If the head cannot be identified.
    """
    head = head_modules(model)
    if not head:
        raise InputError(
            "--freeze_backbone, --adapter, --layer_decay and --head_learning_rate need a model whose head can be told "
            f"from the rest, which {type(model).__name__} is not: call it `classifier`."
        )
    return head


def freeze_backbone(model: nn.Module) -> None:
    """Freeze all but the head and keep the rest in evaluation mode, so that BatchNorm statistics do not change either.

    Raises:
        InputError: If the head cannot be identified.
    """
    head = the_head(model)
    model.requires_grad_(False)
    for module in head.values():
        module.requires_grad_(True)

    def keep_in_evaluation_mode(model: nn.Module, _: Any) -> None:
        if model.training:
            for module in model.children():
                module.eval()
            for module in head.values():
                module.train()

    model.register_forward_pre_hook(keep_in_evaluation_mode)


def answer_one_class(model: nn.Module) -> None:
    """Set a model's configuration to single-label classification, whatever its weights were trained for.

    `pipeline` would apply a sigmoid to the logits of a multi-label model.
    """
    if isinstance(config := getattr(model, "config", None), PreTrainedConfig):
        if config.problem_type is not None:
            config.problem_type = "single_label_classification"
        config.return_dict = True
        config.__dict__.pop("function_to_apply", None)


def prepare_head(model: nn.Module, args: BKDConfig) -> None:
    """Make a student single-label; freeze all but its head, or check that it has a bias, if the options need it.

    Raises:
        InputError: If the head cannot be identified, or has no bias.
    """
    answer_one_class(model)
    if args.freeze_backbone:
        freeze_backbone(model)
    check_head_bias(model, args)


def check_has_weights_to_train(model: nn.Module) -> None:
    """Raise an `InputError` if all weights of a model are frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "All weights of the student are frozen, so there is nothing to train. If it was a teacher before, pass a "
            "copy, or call requires_grad_(True)."
        )


def check_head_bias(model: nn.Module, args: BKDConfig) -> None:
    """Check that a student's head has the bias that `head_bias` is to fit.

    Raises:
        InputError: If it has none.
    """
    if args.head_bias == "balanced" and not head_biases(model):
        raise InputError(
            f"--head_bias balanced: the head of {type(model).__name__} has no bias, or cannot be told from the rest. "
            "Use --head_bias learned, or another model."
        )


def head_biases(model: nn.Module) -> list[nn.Parameter]:
    """Return the biases added to a classifier's logits: one for each head that has a bias."""
    last = []
    for head in head_modules(model).values():
        biases = [parameter for name, parameter in head.named_parameters() if name.split(".")[-1] == "bias"]
        last += biases[-1:]
    number = num_labels(model)
    return [bias for bias in last if number is None or bias.shape == (number,)]


@torch.no_grad()
def shift_logits(model: nn.Module, shift: torch.Tensor) -> None:
    """Add C numbers to a classifier's logits permanently, by the bias of its head, if it has one."""
    for bias in head_biases(model):
        if bias.shape == shift.shape:
            bias.add_(shift.to(bias))


def sample_for_bias(labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw the training images that [`balancing_shift`] needs: at most `IMAGES_PER_CLASS` of each class.

    Args:
        labels: N class numbers.
        seed: Seed of the draw.

    Returns:
        Increasing indices, at most `NUM_IMAGES`.
    """
    num_classes = len(np.unique(labels[labels >= 0]))
    most = max(1, min(IMAGES_PER_CLASS, NUM_IMAGES // max(1, num_classes)))
    return choose_per_class(labels, np.full(labels.max(initial=-1) + 1, most), seed)[:NUM_IMAGES]


def favours_a_class(logits: torch.Tensor, labels: torch.Tensor, times: float | None = None) -> bool:
    """Whether some class is predicted far more often than it occurs, with equal weight for each class.

    If none is, there is little to correct, and a fit would underrate a tail that the student has memorised.

    Args:
        logits: N×C, of training images.
        labels: N class numbers.
        times: A class is favoured above this ratio. If not given, `TOO_OFTEN`; of fewer than five classes (C + 1)/2,
            halfway to C, the ratio if no other class is predicted.
    """
    times_answered = _times_answered(logits.cpu().argmax(dim=1), _shares(labels.cpu(), few=0), logits.shape[1])
    if times is None:
        times = min(TOO_OFTEN, (len(labels.unique()) + 1) / 2)
    return bool(times_answered.max() > times)


def _shares(labels: torch.Tensor, few: int) -> torch.Tensor:
    """Return the weight of each of N images if a class with n of them has the weight n / (n + few)."""
    return 1 / (torch.bincount(labels)[labels].double() + few)


def _times_answered(answers: torch.Tensor, shares: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the ratio of predictions to occurrences of each class; rounded, as sums depend on their order."""
    return torch.bincount(answers, shares, minlength=num_classes).round(decimals=9)


def least_lowering(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the smallest reduction of a classifier's logits after which it favours no class.

    The most predicted class is lowered until it is predicted at most `OFTEN` times as often as a class with many
    training images occurs, where a class with n images has the weight n / (n + `FEW`); then the next, until none is
    left. The logits of all other classes are unchanged, so classes that the model does not know are not raised. This
    is the ascending auction for the assignment problem (Bertsekas, 1988, Annals of Operations Research 14): classes
    have limited capacity, the reduction is their price, and the final prices are the lowest at which all images are
    placed, in whatever order the prices rise.

    Args:
        logits: N×C.
        labels: N class numbers.

    Returns:
        C numbers ≤ 0 (float64); zeros if too many images have almost the same logits, which no reduction can separate.
    """
    z, shares = logits.detach().cpu().double(), _shares(labels.cpu(), FEW)
    shift, answers = z.new_zeros(z.shape[1]), z.argmax(dim=1)
    for _ in range(max(1000, _ROUNDS_PER_CLASS * z.shape[1])):
        times_answered = _times_answered(answers, shares, z.shape[1])
        favoured = int(times_answered.argmax())
        if times_answered[favoured] <= OFTEN:
            return shift
        images = torch.nonzero(answers == favoured).flatten()
        scores = z[images] + shift
        own = scores[:, favoured].clone()
        scores[:, favoured] = -torch.inf
        others, their_classes = scores.max(dim=1)
        margins, order = (own - others).sort(descending=True)
        num_kept = int((shares[images][order].cumsum(dim=0).round(decimals=9) <= OFTEN).sum())
        num_kept = int((margins > margins[num_kept]).sum())
        if num_kept == 0:
            break
        lowering = max((margins[num_kept - 1] + margins[num_kept]).item() / 2, _STEP)
        shift[favoured] -= lowering
        lost = order[margins < lowering]
        answers[images[lost]] = their_classes[lost]
    return torch.zeros_like(shift)


def balancing_shift(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the shift of a classifier's logits that makes its mean prediction the uniform distribution.

    This is the b that minimises the cross-entropy of z + b on training images with equal weight for each *class*,
    whatever prior is left in z: re-training the classifier on balanced data (Kang et al., 2020, arXiv 1910.09217),
    but only its bias. The problem is convex, with C unknowns. With few images the shift stays small: a class with n
    images has the weight n / (n + `FEW`), and each entry has a normal prior with variance 1.

    Args:
        logits: N×C.
        labels: N class numbers. A class without images gets no shift.

    Returns:
        C numbers (float64), with mean 0 over the classes with images.
    """
    z, y = logits.detach().cpu().double(), labels.cpu()
    present = torch.bincount(y, minlength=z.shape[1]) > 0
    weights = _shares(y, FEW)
    num_effective = weights.sum() ** 2 / (weights**2).sum()
    shift = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = F.cross_entropy((z + shift)[:, present], (present.cumsum(0) - 1)[y], reduction="none")
        loss = (weights * losses).sum() / weights.sum() + (shift**2).sum() / (2 * num_effective)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = shift.detach()
    return torch.where(present, found - found[present].mean(), 0.0)
