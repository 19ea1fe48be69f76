"""Features of a frozen backbone: computed once, as the teacher's logits are, so that the head alone has to be run."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from .errors import InputError
from .head import the_head
from .teacher import split_inputs

#: Column of a batch: what comes into the head of a classifier, as one row of numbers for each example.
FEATURES = "features"


def answer_features(model: nn.Module) -> Callable[[dict[str, Any]], torch.Tensor]:
    """Have a classifier also answer `features` in place of images; return what computes them.

    Args:
        model: Its logits are those of its head about what the layers below it give. It is changed in place, and saved
            as before.

    Returns:
        A function of a batch, on the device of the model; it returns the features, B×F.

    Raises:
        InputError: Here, or when the features are computed, if the logits are not those of the head alone.
    """
    refusal = (
        f"--feature_cache: the answers of {type(model).__name__} are not those of one head about its features. Use "
        "--feature_cache off."
    )
    if len(heads := list(the_head(model).values())) != 1:
        raise InputError(refusal)
    shape: list[torch.Size] = []  # of the features of one example

    def forward(self: nn.Module, *args: Any, features: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if features is None:
            return type(self).forward(self, *args, **kwargs)
        (head,) = the_head(self).values()  # of this model: it may be a copy
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
