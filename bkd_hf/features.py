"""Features of a frozen backbone: computed once, like the teacher's logits, so that only the head has to be run."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from .errors import InputError
from .head import the_head
from .teacher import split_inputs

#: Column of a batch: the input of a classifier's head, one row of numbers per example.
FEATURES = "features"


def answer_features(model: nn.Module) -> Callable[[dict[str, Any]], torch.Tensor]:
    """Let a classifier accept `features` in place of images; return the function that computes them.

    Args:
        model: Its logits are its head's output for the features of the layers below. It is changed in place; saving it
            works as before.

    Returns:
        A function of a batch, on the device of the model; it returns the features, B×F.

    Raises:
        InputError: Here, or when the features are computed, if the logits do not depend only on the head's input.
    """
    refusal = (
        f"--feature_cache: the answers of {type(model).__name__} are not those of one head about its features. Use "
        "--feature_cache off."
    )
    if len(heads := list(the_head(model).values())) != 1:
        raise InputError(refusal)
    shape: list[torch.Size] = []  # shape of one example's features

    @functools.wraps(type(model).forward)  # from whose signature other trainers read what the model takes
    def forward(self: nn.Module, *args: Any, features: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if features is None:
            return type(self).forward(self, *args, **kwargs)
        (head,) = the_head(self).values()  # of `self`, which may be a copy
        return ImageClassifierOutput(logits=head(features.reshape(-1, *shape[0])))

    @torch.no_grad()
    def compute(batch: dict[str, Any]) -> torch.Tensor:
        (head,), seen, was_training = heads, [], model.training
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            logits = model.eval()(**split_inputs(batch)[0]).logits
            if not seen:
                raise InputError(refusal)
            shape[:], found = [seen[0].shape[1:]], seen[0].flatten(1).float()
            if not torch.allclose(model(features=found).logits, logits, rtol=1e-3, atol=1e-3):
                raise InputError(refusal)
        finally:
            hook.remove()
            model.train(was_training)
        return found

    model.forward = types.MethodType(forward, model)
    return compute
