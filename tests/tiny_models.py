"""Models small enough to train in a test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tiny_vit(seed: int, num_labels: int, image_size: int = 8, **kwargs: Any) -> ViTForImageClassification:
    """A ViT of two layers that sees four patches."""
    torch.manual_seed(seed)
    about = {"image_size": image_size, "patch_size": image_size // 2, "num_labels": num_labels}
    return ViTForImageClassification(ViTConfig(**_SIZE, **about, **kwargs))


def tiny_deit_with_two_heads(num_labels: int, image_size: int) -> DeiTForImageClassificationWithTeacher:
    """A model whose logits are the mean of two heads, so that it cannot have a cosine head."""
    about = {"image_size": image_size, "patch_size": image_size // 2, "num_labels": num_labels}
    return DeiTForImageClassificationWithTeacher(DeiTConfig(**_SIZE, **about))
