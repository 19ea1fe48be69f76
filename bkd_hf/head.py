"""The head of a classifier: found, trained alone, freed of the class frequencies."""

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
#: Training images of a class, and in all, to which a head's bias is fitted.
IMAGES_PER_CLASS, NUM_IMAGES = 100, 20_000
#: A class is favoured if it is answered so many times as often as it occurs; and so it may be after the bias was
#: fitted, which leaves other images, that the model has not seen, some room below the former.
TOO_OFTEN, OFTEN = 3.0, 1.25
#: A class with n images counts n / (n + FEW) of one with many, as it tells so much less of images not seen.
FEW = 5
#: The least step of [`least_lowering`], in logits, and how many it takes at most (of 100 classes it took 6 for each).
_STEP, _ROUNDS_PER_CLASS = 1e-3, 30


def num_labels(model: nn.Module) -> int | None:
    """Return a model's number of classes, where its configuration tells."""
    return getattr(getattr(model, "config", None), "num_labels", None)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the part of a classifier that is specific to its classes, by name: what maps features to logits."""
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
        InputError: If the head cannot be told from the rest.
    """
    head = head_modules(model)
    if not head:
        raise InputError(
            "--freeze_backbone, --adapter, --layer_decay and --head_learning_rate need a model whose head can be told "
            f"from the rest, which {type(model).__name__} is not: call it `classifier`."
        )
    return head


def freeze_backbone(model: nn.Module) -> None:
    """Train the head alone, with the rest in evaluation mode: not even statistics of BatchNorm change.

    Raises:
        InputError: If the head cannot be told from the rest.
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
    """Have a model's configuration say what it is trained for, whatever its weights were: one class of several.

    `pipeline` would apply a sigmoid to the answers of a model that was for several classes at once.
    """
    if isinstance(config := getattr(model, "config", None), PreTrainedConfig):
        if config.problem_type is not None:
            config.problem_type = "single_label_classification"
        config.return_dict = True
        config.__dict__.pop("function_to_apply", None)


def prepare_head(model: nn.Module, args: BKDConfig) -> None:
    """Have a student answer one class; freeze all but its head, or find that one's bias, where the options need it.

    Raises:
        InputError: If the head cannot be told from the rest, or has no bias.
    """
    answer_one_class(model)
    if args.freeze_backbone:
        freeze_backbone(model)
    if args.head_bias == "balanced" and not head_biases(model):
        raise InputError(
            f"--head_bias balanced: the head of {type(model).__name__} has no bias, or cannot be told from the rest. "
            "Use --head_bias learned, or another model."
        )


def head_biases(model: nn.Module) -> list[nn.Parameter]:
    """Return the biases that are added to a classifier's logits: one for each head, none where it has none."""
    last = []
    for head in head_modules(model).values():
        biases = [parameter for name, parameter in head.named_parameters() if name.split(".")[-1] == "bias"]
        last += biases[-1:]
    number = num_labels(model)
    return [bias for bias in last if number is None or bias.shape == (number,)]


@torch.no_grad()
def shift_logits(model: nn.Module, shift: torch.Tensor) -> None:
    """Add C numbers to a classifier's logits for ever, by the bias of its head, where it has one."""
    for bias in head_biases(model):
        if bias.shape == shift.shape:
            bias.add_(shift.to(bias))


def sample_for_bias(labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw the training images that [`balancing_shift`] needs: at most `IMAGES_PER_CLASS` of each class.

    Args:
        labels: N class numbers.
        seed: Of the draw.

    Returns:
        Increasing indices, at most `NUM_IMAGES`.
    """
    num_classes = len(np.unique(labels))
    most = max(1, min(IMAGES_PER_CLASS, NUM_IMAGES // max(1, num_classes)))
    return choose_per_class(labels, np.full(labels.max(initial=-1) + 1, most), seed)[:NUM_IMAGES]


def favours_a_class(logits: torch.Tensor, labels: torch.Tensor, times: float | None = None) -> bool:
    """Whether some class is answered so many times as often as it occurs, each class counting the same.

    Where none is, there is little to take out, and a tail that is known by heart would seem to need no help.

    Args:
        logits: N×C, of training images.
        labels: N class numbers.
        times: More than so many; `TOO_OFTEN` if not given.
    """
    times_answered = _times_answered(logits.cpu().argmax(dim=1), _shares(labels.cpu(), few=0), logits.shape[1])
    return bool(times_answered.max() > (TOO_OFTEN if times is None else times))


def _shares(labels: torch.Tensor, few: int) -> torch.Tensor:
    """Return what each of N images counts for where a class with n of them counts n / (n + few)."""
    return 1 / (torch.bincount(labels)[labels].double() + few)


def _times_answered(answers: torch.Tensor, shares: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return how many times as often as it occurs each class is answered; rounded, as sums depend on their order."""
    return torch.bincount(answers, shares, minlength=num_classes).round(decimals=9)


def least_lowering(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the least that has to be taken off a classifier's logits so that it favours no class.

    The class that is answered most is lowered until it is answered no more than `OFTEN` times as often as a class of
    many training images occurs, where one of n images counts n / (n + `FEW`); then the next, until none is left. All
    others stay as they are, so a class that the model does not know is not answered for its own sake. It is the
    ascending auction of the assignment problem (Bertsekas, 1988, Annals of Operations Research 14): classes have room
    for so many images, what is taken off is their price, and the prices that it ends with are the least at which
    nobody is turned away, in whatever order they rise.

    Args:
        logits: N×C.
        labels: N class numbers.

    Returns:
        C numbers ≤ 0 (float64); zeros if images with much the same logits, which no lowering can part, are too many.
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
    """Return what has to be added to a classifier's logits so that its mean answer is the uniform distribution.

    The b at which the cross-entropy of z + b is least on training images, each *class* counting the same, whatever
    prior the training has left in z. It is the re-training of the classifier on balanced data (Kang et al., 2020,
    arXiv 1910.09217), of its bias alone; convex, with C unknowns. Where there are few images to tell from it stays
    small: a class with n of them counts n / (n + `FEW`), and each number has a normal prior with variance 1.

    Args:
        logits: N×C.
        labels: N class numbers. A class without an image gets no shift.

    Returns:
        C numbers (float64), with mean 0 over the classes that have images.
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
